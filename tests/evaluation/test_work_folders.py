"""Folders that evaluations work in: one run at a time, kills at every rename and unlink, damaged files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
import tiny
from diffusers_dino import DiffSegPipeline
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.evaluation import Sweep, choose_sets, evaluate_fidelity, evaluate_segmentation
from diffusers_dino.evaluation.packed import PackedImages, pack_images
from diffusers_dino.evaluation.segmentation.segments import segment_images
from diffusers_dino.files import lock_folder
from kills import kills

SWEEP = Sweep(timesteps=(1,), thresholds=(0.5, 1.0), mask_size=16, refine=False)
PREPROCESSING = Preprocessing(16, remove_borders=False)


@pytest.fixture(scope="module")
def diffseg():
    return DiffSegPipeline.from_pipe(tiny.tiny_pipeline())


@pytest.fixture
def images(tmp_path) -> Path:
    """Four images of 32 px and masks of their left sides."""
    folder = scripts.image_folder(tmp_path / "images", 4, size=32)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :12] = 255
    for number in range(4):
        Image.fromarray(mask).save(folder / f"{number:03d}.mask.png")
    return folder


def segment(diffseg, images: Path, folder: Path):
    options = {"batch_size": 2, "untrained": False, "progress": False}
    return evaluate_segmentation(diffseg, open_masked_images(images, 32, 16), folder, SWEEP, **options)


def test_python_calls_do_not_share_a_folder(pipe, diffseg, images, tmp_path):
    sets = choose_sets(open_images(images, PREPROCESSING))
    with lock_folder(tmp_path):
        with pytest.raises(RuntimeError, match="Another run is at work"):
            segment(diffseg, images, tmp_path)
        with pytest.raises(RuntimeError, match="Another run is at work"):
            evaluate_fidelity(pipe, sets, folder=tmp_path)


def test_segments_survive_a_kill_at_every_rename(diffseg, images, tmp_path):
    opened = open_masked_images(images, 32, 16)

    def run(name: str):
        swept = segment_images(diffseg, opened, SWEEP, tmp_path / name, chunk=2, progress=False)
        return torch.stack([swept.read(i) for i in range(4)])

    whole, numbers = run("whole"), []
    for number in kills(lambda: run("killed")):
        numbers.append(number)
        assert torch.equal(run("killed"), whole)
        names = [{path.name for path in folder.rglob("*")} for folder in (tmp_path / "whole", tmp_path / "killed")]
        assert names[0] == names[1]  # nothing half-written is left
        shutil.rmtree(tmp_path / "killed")
    assert len(numbers) == 3  # the settings and two units


def test_packed_images_survive_a_kill_at_every_rename_and_unlink(images, tmp_path):
    before, after = (
        open_images(images, PREPROCESSING).select([f"{i:03d}" for i in own]) for own in ([0, 1], [2, 3, 1])
    )
    path = tmp_path / "pack.npy"
    pack_images(before, path)
    numbers = []
    for number in kills(lambda: pack_images(after, path)):
        numbers.append(number)
        packed = pack_images(after, path)
        expected = dict(after.read_many(range(3)))
        assert packed.keys == tuple(expected)
        assert all(np.array_equal(image, expected[key]) for key, image in zip(packed.keys, packed.array, strict=True))
        pack_images(before, path)
    assert len(numbers) == 3


@pytest.mark.parametrize("facts", ["", "{", "[]", "null", '{"keys": 3}', '{"keys": [], "recipe": "a"}', "[" * 100_000])
def test_damaged_facts_of_packed_images_are_named(facts, images, tmp_path):
    packed = pack_images(open_images(images, PREPROCESSING), tmp_path / "pack.npy")
    packed.path.with_suffix(".json").write_text(facts)
    with pytest.raises(ValueError, match=r"pack\.(json|npy)"):
        PackedImages(packed.path)


@pytest.mark.parametrize("kept", [0, 5, 90, -1])
def test_cut_arrays_of_packed_images_are_named(kept, images, tmp_path):
    packed = pack_images(open_images(images, PREPROCESSING), tmp_path / "pack.npy")
    packed.path.write_bytes(packed.path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"pack\.npy is damaged"):
        PackedImages(packed.path)


def test_pixels_that_have_changed_are_not_taken(images, tmp_path):
    opened = open_images(images, PREPROCESSING)
    path = pack_images(opened, tmp_path / "pack.npy").path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"pack.npy is damaged \(its pixels have changed\)"):
        pack_images(opened, path)
    path.unlink()
    assert pack_images(opened, path).path.read_bytes() == whole


def test_damaged_segments_are_named(diffseg, images, tmp_path):
    swept = segment(diffseg, images, tmp_path).swept["model"][0]
    path = swept.path(0, 2)
    whole, segments = path.read_bytes(), swept.read(3)
    for damaged in (b"", whole[:50], whole[:-9], b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            swept.read(3)
    found = 0
    for position in range(len(whole)):  # some bytes of an archive say twice what it holds, or nothing
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert torch.equal(swept.read(3), segments)
        except ValueError as error:
            assert f"{path.name} is damaged" in str(error)  # noqa: PT017
            found += 1
    assert found > len(whole) // 3
    np.savez_compressed(path, segments=np.zeros((2, 1, 16, 16), np.uint16))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        swept.read(2)


def test_an_image_that_cannot_be_segmented_is_left_out(diffseg, images, tmp_path, caplog):
    for number in range(4, 24):
        shutil.copy(images / "001.png", images / f"{number:03d}.png")
        shutil.copy(images / "001.mask.png", images / f"{number:03d}.mask.png")
    (images / "002.png").write_bytes(b"no image")
    result = segment(diffseg, images, tmp_path / "out").result
    assert "Left out" in caplog.text
    assert len(result.keys) == 23
    assert "002" not in result.keys
    assert not result.patients_known
    (images / "003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 24 images cannot be read"):
        segment(diffseg, images, tmp_path / "two")


def test_masks_without_anything_are_refused(diffseg, images, tmp_path, caplog):
    empty = Image.fromarray(np.zeros((32, 32), np.uint8))
    for number in range(4):
        empty.save(images / f"{number:03d}.mask.png")
        if number == 2:
            segment(diffseg, images, tmp_path / "some")
            assert "3 of 4 masks are empty" in caplog.text
    with pytest.raises(ValueError, match="All 4 masks are empty"):
        segment(diffseg, images, tmp_path / "all")


def test_patients_beside_images_are_known(images):
    for number in range(4):
        (images / f"{number:03d}.json").write_text(f'{{"patient": "p{number // 2}"}}')
    opened = open_masked_images(images, 32)
    assert (opened.patients, opened.patients_known) == (["p0", "p0", "p1", "p1"], True)
    (images / "003.json").write_text("{")
    opened = open_masked_images(images, 32)
    assert (opened.patients, opened.patients_known) == (["p0", "p0", "p1", "003"], False)
