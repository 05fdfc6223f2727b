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
        assert made[0].size == (tasks.model_size(pipe),) * 2 == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
        assert done == pytest.approx([0.25, 0.5, 0.75, 1])  # two batches of two steps
        alone = tasks.vary(pipe, picture(), 1, tasks.SamplerSettings(steps=2, seed=12))
        assert np.abs(arrays(made[5:]).astype(int) - arrays(alone)).max() <= 1
        options = {"num_images_per_prompt": 4, "num_inference_steps": 2}
        expected = pipe(picture(), generator=tiny.generators(7, 8, 9, 10), **options)
        assert np.array_equal(arrays(made[:4]), arrays(expected.images))

    def test_every_scheduler_of_the_list_samples_and_leaves_the_pipeline_its_own(self, pipe):
        own = pipe.scheduler
        settings = [tasks.SamplerSettings(steps=3, scheduler=name) for name in tasks.SCHEDULERS]
        made = [tasks.vary(pipe, picture(), 1, sampling)[0] for sampling in settings]
        assert len(np.unique(arrays(made), axis=0)) > 1
        assert pipe.scheduler is own

    @pytest.mark.parametrize("method", ["lerp", "slerp"])
    def test_a_blend_is_the_path_of_the_pipeline(self, pipe, method):
        done = []
        sampling = tasks.SamplerSettings(steps=2, seed=1)
        made = tasks.blend(pipe, picture(0), picture(1), 3, method, sampling, done.append)
        options = {"method": method, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(1)}
        path = DinoInterpolationPipeline.from_pipe(pipe)(picture(0), picture(1), [0, 0.5, 1], **options)
        assert np.array_equal(arrays(made), arrays(path.images))
        assert done[-1] == pytest.approx(1)


class TestSegments:
    def test_another_threshold_does_not_run_the_model_again(self, pipe, monkeypatch):
        segmenter = tasks.Segmenter(pipe, kept=1)
        segmenter.segment(picture(), 100, 1.5)
        image = picture(size=40)
        few = segmenter.segment(image, 100, 1.5)
        assert tasks.labels_of(few, image).shape == (40, 40)
        calls = []
        monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: calls.append(args))
        many = segmenter.segment(image, 100, 0.05)
        assert not calls
        assert len(many) > len(few)
        assert len(segmenter._maps) == 1  # of the last image

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
        pairs = set(zip(labels.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len(areas)  # the same segments under other numbers

    def test_large_images_are_labelled_at_their_own_size(self, pipe):
        image = picture(size=1500)
        segments = tasks.Segmenter(pipe).segment(image, 100, 0.1)
        assert tasks.labels_of(segments, image).shape == (1500, 1500)
        assert tasks.fitted(image, tasks.DISPLAY).size == (1024, 1024)

    def test_an_overlay_goes_from_the_image_to_the_colours_and_a_mask_holds_the_numbers(self):
        image, labels = picture(size=32), np.repeat(np.arange(2, dtype=np.uint8), 512).reshape(32, 32)
        assert np.array_equal(np.asarray(tasks.overlay(image, labels, 0)), np.asarray(image.convert("RGB")))
        assert np.array_equal(np.asarray(tasks.overlay(image, labels, 1)), tasks.palette()[labels])
        mask = Image.open(io.BytesIO(tasks.png(tasks.mask_image(labels))))
        assert np.array_equal(np.asarray(mask), labels)


def test_an_archive_holds_the_pictures_at_their_size_and_says_how_they_were_made():
    sampling = tasks.SamplerSettings(steps=3)
    archive = tasks.archive({"a": picture(), "b": picture(1)}, "tiny", sampling, task="variations")
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert sorted(file.namelist()) == ["a.png", "b.png", "settings.json"]
        assert np.array_equal(np.asarray(Image.open(file.open("b.png"))), np.asarray(picture(1)))
        noted = json.loads(file.read("settings.json"))
    assert noted.items() >= {"synthetic": True, "model": "tiny", "steps": 3, "task": "variations"}.items()


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
