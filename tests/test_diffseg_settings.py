"""Settings of DiffSeg that were chosen for a model travel with it, and are the defaults wherever it segments."""

import pytest
import torch
from PIL import Image

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline
from diffusers_dino.demo.segments import Segmenter
from diffusers_dino.diffseg import DiffSegSettings, note_settings, noted_settings
from diffusers_dino.evaluation import Sweep
from diffusers_dino.hub.folder import part_facts

CHOSEN = DiffSegSettings(timestep=50, merge_threshold=0.2, layers=("up_blocks.1", "down_blocks.0"))
EXPLICIT = {"timestep": 50, "merge_threshold": 0.2, "relative_threshold": True, "layers": CHOSEN.layers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noted")
    pipe = tiny.tiny_pipeline()
    note_settings(pipe.unet, CHOSEN)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def images():
    return tiny.random_images(2)


def test_what_was_noted_is_the_default_of_every_pipeline(folder, images):
    loaded = DiffSegPipeline.from_pretrained(folder)
    made = DiffSegPipeline.from_pipe(DinoDiffusionPipeline.from_pretrained(folder))
    plain = DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    expected = plain(images, **EXPLICIT).masks
    for noted in (loaded, made):
        assert noted.settings == CHOSEN
        assert torch.equal(noted(images).masks, expected)
        assert not torch.equal(noted(images, layers="all").masks, expected)
    assert noted_settings(plain.unet.config) is None


@pytest.mark.parametrize("own", [{"layers": "all"}, {"layers": ["up_blocks.0"]}, {"sides": [8]}])
def test_what_is_given_goes_before_what_was_noted(folder, images, own):
    noted, plain = DiffSegPipeline.from_pretrained(folder), DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    given = {"timestep": 300, "merge_threshold": 0.5, **own}
    there, here = (pipe(images, **given) for pipe in (noted, plain))
    assert torch.equal(there.masks, here.masks)
    assert all(torch.equal(*pair) for pair in zip(there.maps, here.maps, strict=True))
    assert torch.equal(noted(images, 300, relative_threshold=False, **own).masks, here.masks)


def test_a_model_without_a_note_has_the_general_defaults(images):
    plain = DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    explicit = plain(images, 300, 0.35, relative_threshold=True, layers="all")
    assert torch.equal(plain(images).masks, explicit.masks)
    assert torch.equal(plain(images, timestep=None).masks, explicit.masks)


def test_the_demo_begins_with_it(folder):
    segmenter = Segmenter(DinoDiffusionPipeline.from_pretrained(folder))
    assert segmenter.settings == CHOSEN
    assert segmenter.layer == "up_blocks.1+down_blocks.0" == segmenter.layers[-1]
    assert len(segmenter.segment(Image.new("L", (40, 40), 7), 50, 0.2, segmenter.layer))
    plain = Segmenter(tiny.tiny_pipeline())
    assert plain.layer == plain.finest_layer


def test_it_is_a_point_of_a_sweep_and_told_on_the_card(folder):
    sweep = Sweep(timesteps=(300,), thresholds=(0.3, 0.6), mask_size=32).at(CHOSEN)
    (view,) = sweep.views
    assert (*view, *sweep.thresholds, sweep.mask_size) == ("up_blocks.1+down_blocks.0", 50, 0.2, 32)
    assert Sweep().at(DiffSegSettings()).views == [("all", 300)]
    assert "timestep 50" in part_facts(folder)["segments by default"]


@pytest.mark.parametrize(
    "note",
    [
        {"timestep": -1},
        {"timestep": 1.5},
        {"merge_threshold": 0},
        {"merge_threshold": float("nan")},
        {"layers": "up_blocks"},
        {"layers": []},
        {"clusters": 3},
        7,
    ],
)
def test_a_damaged_note_is_refused(images, note):
    pipe = tiny.tiny_pipeline()
    pipe.unet.register_to_config(_diffseg=note)
    with pytest.raises(ValueError, match="does not say how to segment"):
        DiffSegPipeline.from_pipe(pipe)(images)
