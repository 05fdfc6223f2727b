"""Images that a model must not have seen, and images that cannot be read: neither may pass without a word."""

import logging
import shutil

import pytest
import torch

import scripts
import tiny
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.evaluation import (
    evaluate_interpolation,
    evaluate_memorization,
    evaluate_reconstruction,
    evaluate_segmentation,
)
from diffusers_dino.evaluation.controls import rows_in
from diffusers_dino.evaluation.fidelity.sets import choose_sets, require_disjoint
from diffusers_dino.evaluation.generation import embed_images, stack_images
from diffusers_dino.metrics import extract_features, open_extractor

PREPROCESSING = Preprocessing(32, remove_borders=False)


@pytest.fixture
def folder(tmp_path):
    return scripts.image_folder(tmp_path / "images", 8, size=32)


def features_of(folder):
    return extract_features(open_extractor("pixels"), open_images(folder, PREPROCESSING))


def renamed(folder, count: int):
    """The first images of a folder under other names, in a folder of their own."""
    other = folder.with_name(f"renamed-{count}")
    other.mkdir()
    for path in sorted(folder.iterdir())[:count]:
        shutil.copy(path, other / f"copy-{path.name}")
    return other


def test_a_reference_of_the_same_images_under_other_names_is_refused(folder, caplog):
    sources = features_of(folder)
    for count in (4, 8):
        with pytest.raises(
            ValueError, match=f"{count} of the 8 sources are images of the reference under other names"
        ):
            require_disjoint(sources, features_of(renamed(folder, count)))
    assert not caplog.text
    require_disjoint(sources, features_of(renamed(folder, 1)))
    assert "1 of the 8 sources" in caplog.text


def test_it_is_said_where_patients_are_not_known(folder, caplog):
    images = open_images(folder, PREPROCESSING)
    for options in (
        {},
        {"reference_keys": images.keys[:4]},
        {"reference": open_images(renamed(folder, 3), PREPROCESSING)},
    ):
        caplog.clear()
        choose_sets(images, **options)
        assert "Patients are not known" in caplog.text
    caplog.clear()
    choose_sets(images, patients={key: key for key in images.keys})
    assert not caplog.text


def test_training_images_among_the_unseen_are_warned_of(pipe, caplog):
    images, others = tiny.random_images(4, channels=1), tiny.random_images(6, channels=1, seed=1)
    for evaluate in (evaluate_interpolation, evaluate_reconstruction):
        options = {"seeds": (0,), "num_inference_steps": 1, "progress": False}
        evaluate(pipe, images, others, **options)
        assert "training images" not in caplog.text
        evaluate(pipe, images, torch.cat([others, images[1:3]]).expand(-1, 3, -1, -1), **options)
        assert "2 of 4 images are among the training images" in caplog.text
        caplog.clear()


def test_rows_are_compared_to_the_bit():
    rows = torch.rand(3, 2, 2)
    assert rows_in(rows, torch.cat([rows[2:], rows[:1] + 1e-6])).tolist() == [False, False, True]
    assert rows_in(rows[:0], rows).tolist() == []


def test_held_out_images_that_were_trained_on_say_nothing(caplog):
    training, unseen = tiny.random_images(40, channels=1), tiny.random_images(15, channels=1, seed=1)
    options = {"false_alarms": 0.1, "num_planted": 1, "progress": False, "training_groups": range(40)}
    mixed = torch.cat([unseen, training[:10]])
    groups = [*range(100, 115), *range(10)]  # the patients are known, so these are not compared with themselves
    result = evaluate_memorization(training, held_out=mixed, held_out_groups=groups, **options).result
    assert result.held_out_in_training == 10
    assert "10 of the held-out images are training images" in caplog.text
    assert "10 groups, such as patients, have training and held-out images" in caplog.text
    assert evaluate_memorization(training, held_out=unseen, **options).result.held_out_in_training == 0
    with pytest.raises(ValueError, match="10 of the 25 held-out images are training images: no threshold"):
        evaluate_memorization(training, held_out=mixed, held_out_groups=groups, calibrate_on="held out", **options)


def test_what_is_too_few_to_promise_says_what_to_set():
    images = tiny.random_images(40, channels=1)
    with pytest.raises(ValueError, match=r"it takes 299.*set false_alarms to 0.0722 or more"):
        evaluate_memorization(images, progress=False)
    evaluate_memorization(images, false_alarms=0.0722, num_planted=1, progress=False)


def test_an_image_that_cannot_be_read_is_left_out_and_never_doubled(folder, pipe, caplog):
    (folder / "003.png").write_bytes(b"no image")
    images = open_images(folder, PREPROCESSING, max_unreadable=0.5)
    caplog.set_level(logging.WARNING)
    stacked = stack_images(images)
    assert "1 of 8 images cannot be read and are left out" in caplog.text
    assert len(stacked) == len({image.numpy().tobytes() for image in stacked}) == 7
    whole = stack_images(images.select([key for key in images.keys if key != "003"]))
    assert torch.equal(stacked, whole)
    with pytest.raises(ValueError, match="1 of 8 images cannot be read"):
        embed_images(pipe, images, batch_size=3)
    readable = images.select([key for key in images.keys if key != "003"])
    torch.testing.assert_close(embed_images(pipe, readable, 3), embed_images(pipe, whole, 3), rtol=0, atol=0)
    result = evaluate_interpolation(pipe, images, images, num_inference_steps=1, progress=False)
    assert (result.num_pairs, result.num_training_images) == (7, 7)


def test_planted_copies_are_of_images_that_can_be_read(tmp_path):
    folder = scripts.image_folder(tmp_path / "images", 14, size=32)
    (folder / "005.png").write_bytes(b"no image")
    images = open_images(folder, PREPROCESSING, max_unreadable=0.5)
    result = evaluate_memorization(images, false_alarms=0.5, progress=False).result
    assert {planted.num_images for planted in result.planted} == {13}
    assert result.training.num_images == 13
    assert next(planted.found for planted in result.planted if planted.change == "exact") == 1


@pytest.mark.parametrize("count", [0, -1, -5])
def test_a_number_of_images_below_one_is_not_counted_from_the_end(count, folder, pipe):
    shutil.copy(folder / "001.png", folder / "000.mask.png")
    images = open_images(folder, PREPROCESSING)
    for options in ({"num_sources": count}, {"num_reference": count}):
        with pytest.raises(ValueError, match="At least one image must be drawn"):
            choose_sets(images, **options)
    with pytest.raises(ValueError, match="max_samples must be at least 1"):
        open_masked_images(folder, 32, max_samples=count)
    pixels = tiny.random_images(4, channels=1)
    for call in (
        lambda: extract_features(open_extractor("pixels"), pixels, count),
        lambda: evaluate_reconstruction(pipe, pixels, pixels, batch_size=count),
        lambda: evaluate_segmentation(pipe, open_masked_images(folder, 32), folder / "out", batch_size=count),
    ):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            call()
    for flags in ({"num_images": count}, {"num_points": count}, {"num_points": 1}):
        with pytest.raises(ValueError, match="--num_points 2 or more, --num_images 2 or more"):
            scripts.call_script("evaluate interpolation", training_keys="keys.txt", **flags)
