"""What the demo computes, without its page: on tiny components, with files as visitors drop them."""

import io
import json
import os
import subprocess
import sys
import zipfile
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import priors
import scripts
import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.demo import launch, nearest, read_logins, reading, segments, tasks
from diffusers_dino.diffseg.settings import ALL_LAYERS
from diffusers_dino.metrics.copy_gate import CopyGate
from diffusers_dino.pipelines.checks import image_size
from diffusers_dino.pixels import to_unit, unit_to_uint8
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
        opened = reading.open_image(path)
        assert opened.size == (48, 48)
        assert opened.mode == ("L" if mode == "L" else "RGB")
        assert (np.asarray(opened).min(), np.asarray(opened).max()) == (0, 255)

    def test_twelve_bits_in_sixteen_are_stretched(self, tmp_path):
        deep = np.linspace(100, 4095, 64 * 64).reshape(64, 64, 1).astype(np.uint16)
        (tmp_path / "deep.png").write_bytes(deep_png(deep))
        opened = np.asarray(reading.open_image(tmp_path / "deep.png"))
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
            reading.open_image(path)
        assert str(tmp_path) not in str(refusal.value)

    def test_pixels_are_stretched_as_the_pipelines_stretch_them(self, tmp_path):
        for name, shape, dtype in (
            ("gray", (40, 50), np.uint16),
            ("bytes", (40, 50), np.uint8),
            ("rgb", (40, 50, 3), np.uint8),
        ):
            pixels = np.random.default_rng(0).integers(3, np.iinfo(dtype).max // 3, shape).astype(dtype)
            np.save(tmp_path / f"{name}.npy", pixels)
            opened = np.asarray(reading.open_image(tmp_path / f"{name}.npy"))
            expected = unit_to_uint8(to_unit(pixels.astype(np.uint16))[0]).movedim(0, -1).numpy()
            assert np.array_equal(opened, expected if len(shape) == 3 else expected[..., 0])
        np.save(tmp_path / "flat.npy", np.full((40, 40), 7, np.uint16))
        assert not np.asarray(reading.open_image(tmp_path / "flat.npy")).any()

    def test_a_file_that_has_gone_is_told_without_its_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"^scan\.png is not on the server any more: drop it again") as refusal:
            reading.open_image(tmp_path / "scan.png")
        assert str(tmp_path) not in str(refusal.value)

    def test_large_images_are_shrunk_and_the_visitor_is_told(self, tmp_path, monkeypatch):
        monkeypatch.setattr(reading, "KEPT_PIXELS", 10_000)
        told = []
        Image.fromarray(np.tile(np.arange(250, dtype=np.uint8), (100, 1))).save(tmp_path / "wide.png")
        opened = reading.open_image(tmp_path / "wide.png", told.append)
        assert opened.size == (158, 63)
        assert told == ["wide.png has 250 x 100 pixels: it is shown and used at 158 x 63."]
        monkeypatch.setattr(reading, "MOST_PIXELS", 20_000)
        with pytest.raises(ValueError, match=r"wide\.png"):
            reading.open_image(tmp_path / "wide.png")

    @pytest.mark.parametrize("name", ["film.gif", "stack.tif", "one.png"])
    def test_of_an_animation_the_first_image_is_used_and_the_visitor_is_told(self, tmp_path, name):
        frames, told = [picture(seed) for seed in range(3)], []
        frames[0].save(
            tmp_path / name, **({} if name == "one.png" else {"save_all": True, "append_images": frames[1:]})
        )
        opened = np.asarray(reading.open_image(tmp_path / name, told.append).convert("L")).astype(int)
        assert np.corrcoef(opened.ravel(), np.asarray(frames[0]).ravel())[0, 1] > 0.99
        assert told == ([] if name == "one.png" else [f"{name} holds several images: the first one is used."])

    def test_examples_are_spread_over_the_bundled_images(self):
        examples = reading.example_images(PHANTOMS, 64, 3)
        assert [example.size for example in examples] == [(64, 64)] * 3
        assert len(np.unique(arrays(examples), axis=0)) == 3


class TestSampling:
    @pytest.mark.parametrize(
        "setting",
        [
            {"steps": 0},
            {"steps": 10**6},
            {"guidance": float("nan")},
            {"guidance": -1},
            {"guidance": 1e9},
            {"seed": None},
            {"seed": 2**70},
            {"scheduler": "os.system"},
        ],
    )
    def test_settings_that_no_slider_gives_are_refused(self, setting):
        with pytest.raises(ValueError, match=next(iter(setting))):
            tasks.SamplerSettings(**setting)

    @pytest.mark.parametrize("count", [0, 17])
    def test_as_many_variations_as_asked_for_within_bounds(self, pipe, count):
        with pytest.raises(ValueError, match="1 to 16 variations"):
            tasks.vary(pipe, picture(), count, tasks.SamplerSettings())

    def test_variations_are_those_of_the_pipeline_and_do_not_depend_on_their_number(self, pipe):
        sampling = tasks.SamplerSettings(steps=2, seed=7)
        done = []
        made = tasks.vary(pipe, picture(), 6, sampling, done.append)
        assert len(made) == 6
        assert made[0].size == (image_size(pipe),) * 2 == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
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

    def test_findings_are_drawn_without_an_image_and_do_not_depend_on_their_number(self, pipe):
        prior = priors.tiny_prior_pipeline()
        sampling = tasks.SamplerSettings(steps=2, seed=7)
        done = []
        made = tasks.draw(pipe, prior, ["Edema"], ["Nodule"], 2.0, 5, sampling, done.append)
        assert len(made) == 5
        assert done[-1] == pytest.approx(1)
        alone = tasks.draw(pipe, prior, ["Edema"], ["Nodule"], 2.0, 1, tasks.SamplerSettings(steps=2, seed=11))
        assert np.abs(arrays(made[4:]).astype(int) - arrays(alone)).max() <= 1
        assert len(tasks.draw(pipe, prior, [], [], 2.0, 2, sampling)) == 2
        with pytest.raises(ValueError, match="at once"):
            tasks.draw(pipe, prior, ["Edema"], ["Edema"], 2.0, 1, sampling)

    @pytest.mark.parametrize("method", ["lerp", "slerp"])
    def test_a_blend_is_the_path_of_the_pipeline(self, pipe, method):
        done = []
        sampling = tasks.SamplerSettings(steps=2, seed=1)
        made = tasks.blend(pipe, picture(0), picture(1), 3, method, sampling, done.append)
        options = {"method": method, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(1)}
        path = DinoInterpolationPipeline.from_pipe(pipe)(picture(0), picture(1), [0, 0.5, 1], **options)
        assert np.array_equal(arrays(made), arrays(path.images))
        assert done[-1] == pytest.approx(1)


def test_near_copies_are_those_that_a_gate_refuses():
    known = tiny.random_images(60, channels=1, size=32)
    pictures = [Image.fromarray((image[0] * 255).round().byte().numpy()) for image in known[:2]]
    pictures.append(Image.fromarray((tiny.random_images(1, channels=1, size=32, seed=9)[0, 0] * 255).byte().numpy()))
    found = nearest.TrainingImages(CopyGate.calibrate(known, false_alarms=0.05)).nearest(pictures)
    assert [near.is_copy for near in found] == [True, True, False]
    assert [near.picture.size for near in found] == [(32, 32)] * 3


def test_the_training_images_are_shown_that_the_gate_knows_and_no_others(tmp_path):
    images = open_images(scripts.image_folder(tmp_path / "images", 60, size=48), Preprocessing(48))
    gate = CopyGate.calibrate(images, false_alarms=0.05)
    known = nearest.TrainingImages(gate, images)
    made = [Image.fromarray(array) for _, array in images.read_many([3, 5])]
    found = known.nearest([made[0], made[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert [near.is_copy for near in found] == [True, True]
    assert np.array_equal(arrays([found[0].picture]), arrays(made[:1]))
    pytest.importorskip("gradio", reason="The demo needs Gradio: pip install diffusers-dino[demo]")
    from diffusers_dino.demo.tabs import told

    shown, facts = told(made, 7, known)
    assert [picture.size for picture, _ in shown] == [(48, 48)] * 4
    assert facts["near_copies"] == [7, 8]
    others = open_images(scripts.image_folder(tmp_path / "others", 59, size=48), Preprocessing(48))
    with pytest.raises(ValueError, match="59 training images are not the 60"):
        nearest.TrainingImages(gate, others)


def test_an_image_of_another_kind_is_unlike_and_nobody_can_tell_without_statistics(pipe):
    assert tasks.unlike(pipe, picture()) is None
    bundled = DinoDiffusionPipeline.from_pretrained(scripts.EXAMPLES / "data/tiny-diffusion")
    (phantom,) = reading.example_images(PHANTOMS, 128, 1)
    assert tasks.unlike(bundled, phantom) is None
    assert tasks.unlike(bundled, Image.new("L", (128, 128), 99)) < 0.01


class TestSegments:
    def test_another_threshold_does_not_run_the_model_again(self, pipe, monkeypatch):
        segmenter = segments.Segmenter(pipe, kept=1)
        segmenter.segment(picture(), 100, 1.5)
        image = picture(size=40)
        few = segmenter.segment(image, 100, 1.5)
        assert segments.labels_of(few, image).shape == (40, 40)
        calls = []
        monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: calls.append(args))
        many = segmenter.segment(image, 100, 0.05)
        assert not calls
        assert len(many) > len(few)
        assert len(segmenter._maps) == 1  # of the last image

    def test_layers_can_be_chosen(self, pipe):
        segmenter = segments.Segmenter(pipe)
        assert segmenter.layers[0] == ALL_LAYERS
        assert segmenter.finest_layer == "up_blocks.1.attentions.1"
        layers = ALL_LAYERS, segmenter.finest_layer
        chosen = [segments.labels_of(segmenter.segment(picture(), 100, 0.1, layer), picture()) for layer in layers]
        assert not np.array_equal(*chosen)

    def test_segments_are_the_pipelines_by_falling_area(self, pipe):
        image = picture(size=40)
        labels = segments.labels_of(segments.Segmenter(pipe).segment(image, 100, 0.05), image)
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
        maps = segments.Segmenter(pipe).segment(image, 100, 0.1)
        assert segments.labels_of(maps, image).shape == (1500, 1500)
        assert reading.fitted(image, reading.DISPLAY).size == (1024, 1024)
        long = image.resize((6000, 800))
        assert segments.labels_of(segments.Segmenter(pipe).segment(long, 100, 0.1), long).shape == (800, 6000)

    def test_an_overlay_goes_from_the_image_to_the_colours_and_a_mask_holds_the_numbers(self):
        image, labels = picture(size=32), np.repeat(np.arange(2, dtype=np.uint8), 512).reshape(32, 32)
        assert np.array_equal(np.asarray(segments.overlay(image, labels, 0)), np.asarray(image.convert("RGB")))
        assert np.array_equal(np.asarray(segments.overlay(image, labels, 1)), segments.palette()[labels])
        mask = Image.open(io.BytesIO(tasks.png(segments.mask_image(labels))))
        assert np.array_equal(np.asarray(mask), labels)


def test_an_archive_holds_the_pictures_at_their_size_and_says_how_they_were_made():
    sampling = tasks.SamplerSettings(steps=3)
    archive = tasks.archive({"a": picture(), "b": picture(1)}, "tiny", sampling, task="variations")
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert sorted(file.namelist()) == ["a.png", "b.png", "settings.json"]
        assert np.array_equal(np.asarray(Image.open(file.open("b.png"))), np.asarray(picture(1)))
        noted = json.loads(file.read("settings.json"))
    assert noted.items() >= {"synthetic": True, "model": "tiny", "steps": 3, "task": "variations"}.items()


# Peak and rest of a process's memory in MB above what the model takes, while it segments an image that is 8 times as
# wide as high and downloads the files.
MEASURED = """
import resource, sys
import numpy as np
from PIL import Image
import tiny
from diffusers_dino.demo import reading, segments, tasks

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

Image.fromarray(np.tile(np.arange(20_000, dtype=np.uint16), (2500, 1))).save(sys.argv[1])
pipe = tiny.tiny_pipeline(vae=tiny.tiny_vae(1))
segmenter = segments.Segmenter(pipe)
segmenter.segment(Image.new("L", (64, 64)), 100, 0.1)
tasks.release_memory()
before = now()
image = reading.open_image(sys.argv[1])
maps = segmenter.segment(image, 100, 0.05)
labels = segments.labels_of(maps, image)
files = tasks.png(segments.mask_image(labels)), tasks.png(segments.overlay(image, labels, 0.5))
tasks.vary(pipe, image, 1, tasks.SamplerSettings(steps=1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
del image, maps, labels, files
tasks.release_memory()
print(peak, now() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="The memory of a process is read as Linux tells it.")
def test_a_large_image_takes_bounded_memory_and_gives_it_back(tmp_path):
    code, places = MEASURED, os.pathsep.join([os.path.dirname(tiny.__file__), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "wide.png")]
    printed = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, check=True
    )
    peak, rest = map(float, printed.stdout.split()[-2:])
    assert peak < 1500
    assert rest < 300


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
