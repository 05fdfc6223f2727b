"""What the demo computes, without its page: on tiny components, with files as visitors drop them."""

import io
import json
import os
import sys
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
import tiny
from diffusers_dino import DiffSegPipeline, DinoInterpolationPipeline
from diffusers_dino.demo import launch, read_logins, tasks
from image_files import deep_png

PHANTOMS = scripts.EXAMPLES / "data/phantom-cxr/phantom-cxr-test-*.tar"


@pytest.fixture(scope="module")
def pipe():
    return tiny.tiny_pipeline(vae=tiny.tiny_vae(1))


def picture(seed=0, size=48) -> Image.Image:
    pixels = tiny.random_images(1, channels=1, size=size, seed=seed)[0, 0]
    return Image.fromarray((pixels * 255).byte().numpy())


def arrays(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


class TestReading:
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
    def test_every_mode_becomes_gray_or_rgb_of_full_range(self, tmp_path, mode):
        path = tmp_path / ("scan.tif" if mode == "CMYK" else "scan.png")
        pixels = (tiny.random_images(1, size=48)[0] * 255).byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).convert(mode).save(path)
        opened = tasks.open_image(path)
        assert opened.size == (48, 48)
        assert opened.mode == ("L" if mode == "L" else "RGB")
        assert (np.asarray(opened).min(), np.asarray(opened).max()) == (0, 255)

    def test_twelve_bits_in_sixteen_are_stretched(self, tmp_path):
        deep = np.linspace(100, 4095, 64 * 64).reshape(64, 64, 1).astype(np.uint16)
        (tmp_path / "deep.png").write_bytes(deep_png(deep))
        opened = np.asarray(tasks.open_image(tmp_path / "deep.png"))
        assert opened.dtype == np.uint8
        assert (opened[0, 0], opened[-1, -1]) == (0, 255)
        assert len(np.unique(opened)) == 256

    def test_the_first_picture_of_an_animation_is_read(self, tmp_path):
        first, second = picture(0), picture(1)
        first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
        assert np.asarray(tasks.open_image(tmp_path / "moving.gif")).mean() == pytest.approx(
            np.asarray(first).mean(), abs=40
        )

    def test_dicom_is_read(self, tmp_path):
        pytest.importorskip("pydicom")
        from dicom_files import dicom_bytes

        pixels = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)
        (tmp_path / "1.2.840").write_bytes(dicom_bytes(pixels, bits=12))
        assert tasks.open_image(tmp_path / "1.2.840").size == (48, 64)

    def test_dicom_without_the_extra_names_the_extra(self, tmp_path, monkeypatch):
        path = tmp_path / "scan.dcm"
        path.write_bytes(bytes(128) + b"DICM" + bytes(64))
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(ImportError, match=r"diffusers-dino\[dicom\]"):
            tasks.open_image(path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("note.txt", b"no image", "note.txt: it is not an image of a known format"),
            ("empty.png", b"", "empty.png: the file is empty"),
            ("nan.npy", np.full((64, 64), np.nan), "nan.npy: it holds values that are not finite"),
            ("small.npy", np.eye(8), "small.npy has 8 x 8 pixels: the shorter side must have 32"),
            ("line.npy", np.zeros((32, 4000)), "line.npy has 4000 x 32 pixels"),
        ],
    )
    def test_other_files_are_refused_by_name_without_their_folder(self, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        with pytest.raises(ValueError, match=message) as refusal:
            tasks.open_image(path)
        assert str(tmp_path) not in str(refusal.value)

    def test_examples_are_spread_over_the_bundled_images(self):
        examples = tasks.example_images(PHANTOMS, 64, 3)
        assert [example.size for example in examples] == [(64, 64)] * 3
        assert len(np.unique(arrays(examples), axis=0)) == 3


class TestSampling:
    def test_variations_are_those_of_the_pipeline_and_do_not_depend_on_their_number(self, pipe):
        sampling = tasks.SamplerSettings(steps=2, seed=7)
        done = []
        made = tasks.vary(pipe, picture(), 6, sampling, done.append)
        assert len(made) == 6
        assert made[0].size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        assert done == pytest.approx([0.25, 0.5, 0.75, 1])  # two batches of two steps
        alone = tasks.vary(pipe, picture(), 1, tasks.SamplerSettings(steps=2, seed=12))
        assert np.abs(arrays(made[5:]).astype(int) - arrays(alone)).max() <= 1
        expected = pipe(
            picture(), num_images_per_prompt=4, num_inference_steps=2, generator=tiny.generators(7, 8, 9, 10)
        )
        assert np.array_equal(arrays(made[:4]), arrays(expected.images))

    def test_every_scheduler_of_the_list_samples_and_leaves_the_pipeline_its_own(self, pipe):
        own = pipe.scheduler
        made = [
            tasks.vary(pipe, picture(), 1, tasks.SamplerSettings(steps=3, scheduler=name))[0]
            for name in tasks.SCHEDULERS
        ]
        assert len(np.unique(arrays(made), axis=0)) > 1
        assert pipe.scheduler is own

    @pytest.mark.parametrize("method", ["lerp", "slerp"])
    def test_a_blend_is_the_path_of_the_pipeline(self, pipe, method):
        done = []
        made = tasks.blend(
            pipe, picture(0), picture(1), 3, method, tasks.SamplerSettings(steps=2, seed=1), done.append
        )
        path = DinoInterpolationPipeline.from_pipe(pipe)(
            picture(0),
            picture(1),
            [0, 0.5, 1],
            method=method,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
        )
        assert np.array_equal(arrays(made), arrays(path.images))
        assert done[-1] == pytest.approx(1)

    def test_the_side_of_the_images_is_the_models(self, pipe):
        assert tasks.model_size(pipe) == tiny.IMAGE_SIZE


class TestSegments:
    def test_another_threshold_does_not_run_the_model_again(self, pipe, monkeypatch):
        segmenter = tasks.Segmenter(pipe)
        image = picture(size=40)
        few = segmenter.segment(image, 100, 1.5)
        assert tasks.labels_of(few, image).shape == (40, 40)
        calls = []
        monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: calls.append(args))
        many = segmenter.segment(image, 100, 0.05)
        assert not calls
        assert len(many) > len(few)

    def test_maps_of_the_last_images_are_kept_and_no_more(self, pipe):
        segmenter = tasks.Segmenter(pipe, kept=2)
        for seed in range(3):
            segmenter.segment(picture(seed), 50, 0.5)
        assert len(segmenter._maps) == 2

    def test_layers_can_be_chosen(self, pipe):
        segmenter = tasks.Segmenter(pipe)
        assert segmenter.layers[0] == tasks.ALL_LAYERS
        assert segmenter.finest_layer == "up_blocks.1.attentions.1"
        layers = tasks.ALL_LAYERS, segmenter.finest_layer
        chosen = [tasks.labels_of(segmenter.segment(picture(), 100, 0.1, layer), picture()) for layer in layers]
        assert not np.array_equal(*chosen)

    def test_segments_are_the_pipelines_by_falling_area(self, pipe):
        image = picture(size=40)
        labels = tasks.labels_of(tasks.Segmenter(pipe).segment(image, 100, 0.05), image)
        areas = np.bincount(labels.ravel())
        assert len(areas) > 2
        assert (np.diff(areas) <= 0).all()
        assert areas.min() > 0
        options = {"timestep": 100, "merge_threshold": 0.05, "relative_threshold": True, "refine": True}
        expected = DiffSegPipeline.from_pipe(pipe)(image, **options).masks[0].numpy()
        pairs = {
            (ours, theirs) for ours, theirs in zip(labels.ravel().tolist(), expected.ravel().tolist(), strict=True)
        }
        assert len(pairs) == len(areas)  # the same segments under other numbers

    def test_large_images_are_labelled_at_their_own_size(self, pipe):
        image = picture(size=1500)
        segments = tasks.Segmenter(pipe).segment(image, 100, 0.1)
        assert tasks.labels_of(segments, image).shape == (1500, 1500)
        assert tasks.fitted(image, tasks.DISPLAY).size == (1024, 1024)

    def test_a_mask_file_holds_the_numbers(self):
        labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        opened = Image.open(io.BytesIO(tasks.png(tasks.mask_image(labels))))
        assert np.array_equal(np.asarray(opened), labels)
        assert np.array_equal(np.asarray(opened.convert("RGB")), tasks.palette()[labels])

    def test_an_overlay_goes_from_the_image_to_the_colours(self):
        image, labels = picture(size=32), np.repeat(np.arange(2, dtype=np.uint8), 512).reshape(32, 32)
        assert np.array_equal(np.asarray(tasks.overlay(image, labels, 0)), np.asarray(image.convert("RGB")))
        assert np.array_equal(np.asarray(tasks.overlay(image, labels, 1)), tasks.palette()[labels])

    def test_colours_of_neighbouring_numbers_differ(self):
        palette = tasks.palette().astype(int)
        assert len(np.unique(palette, axis=0)) > 200
        assert np.abs(np.diff(palette[:12], axis=0)).sum(axis=1).min() > 100


def test_an_archive_holds_the_pictures_at_their_size_and_says_how_they_were_made():
    archive = tasks.archive(
        {"a": picture(), "b": picture(1)}, "tiny", tasks.SamplerSettings(steps=3), task="variations"
    )
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert sorted(file.namelist()) == ["a.png", "b.png", "settings.json"]
        assert np.array_equal(np.asarray(Image.open(file.open("b.png"))), np.asarray(picture(1)))
        noted = json.loads(file.read("settings.json"))
    made_with = {"steps": 3, "guidance": 2.0, "seed": 0, "scheduler": "the model's own"}
    assert noted == {"synthetic": True, "model": "tiny", **made_with, "task": "variations"}


class TestStarting:
    def test_logins_are_read_line_by_line(self, tmp_path):
        (tmp_path / "logins").write_text("ann:a:b\n\nben:c\n")
        assert read_logins(tmp_path / "logins") == [("ann", "a:b"), ("ben", "c")]

    @pytest.mark.parametrize("content", ["", "ann\n", "ann:\n", ":secret\n"])
    def test_a_file_that_would_let_anybody_in_is_refused(self, tmp_path, content):
        (tmp_path / "logins").write_text(content)
        with pytest.raises(ValueError, match="NAME:PASSWORD"):
            read_logins(tmp_path / "logins")

    def test_a_missing_gradio_names_the_extra_and_leaves_nothing(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        with patch.dict(os.environ), pytest.raises(ImportError, match=r"diffusers-dino\[demo\]"):
            launch("nothing")
        assert not list(tmp_path.iterdir())

    def test_without_the_repository_a_model_has_to_be_named(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="give --model"):
            scripts.call_script("demo")
