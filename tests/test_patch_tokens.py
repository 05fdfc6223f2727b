"""`diffusers-dino splice` as a user runs it, and what its figures mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.evaluation.reconstruction.splicing import splice_masks, travelled

ROOT = Path(__file__).parents[1]
MASKS = ["left half", "lower half", "quadrant", "lungs", "all but lungs", "all patches"]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Three images of 40 px with masks, the third of which has its lungs elsewhere."""
    folder = tmp_path / "images"
    folder.mkdir()
    scripts.image_folder(folder, 3, size=40)
    for number, left in enumerate((0, 4, 16)):
        mask = np.zeros((40, 40), np.uint8)
        mask[:, left : left + 12] = 255
        Image.fromarray(mask).save(folder / f"{number:03d}.mask.png")
    return folder


def test_pictures_and_figures_of_every_mask(data_dir, tmp_path):
    pipe = tiny.tiny_pipeline(conditioner=tiny.tiny_conditioner(tokens="all"))
    pipe.save_pretrained(tmp_path / "model")
    flags = {"model": tmp_path / "model", "data_dir": data_dir, "output_dir": tmp_path / "out"}
    scripts.call_script("splice", **flags, num_noises=2, num_inference_steps=2)
    assert Image.open(tmp_path / "out/reconstructions.png").size == ((1 + 2) * 32, 3 * 32)
    picture = np.array(Image.open(tmp_path / "out/splices.png"))
    assert picture.shape == (len(MASKS) * 32, (3 + 2) * 32, 3)
    assert picture[:32, 64:80].min() == 255  # the mask of the first row: the left half
    assert picture[:32, 80:96].max() == 0
    figures = json.loads((tmp_path / "out/splices.json").read_text())
    assert list(figures) == MASKS
    assert list(figures["all patches"]) == ["inside"]
    assert list(figures["lungs"]) == ["inside", "outside"]


def test_masks_on_the_grid_of_patches():
    lungs = torch.zeros(32, 32, dtype=torch.bool)
    lungs[8:24, 8:17] = True  # an eighth of the patches of the third column is not enough
    masks = splice_masks(4, lungs)
    assert masks["lungs"].nonzero().tolist() == [[1, 1], [2, 1]]
    assert torch.equal(masks["all but lungs"], ~masks["lungs"])
    assert masks["quadrant"].nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_the_figures_go_from_the_source_to_the_other():
    source, other = tiny.random_images(2, channels=1), tiny.random_images(2, channels=1, seed=1)
    region = torch.zeros(32, 32, dtype=torch.bool)
    region[:16] = True
    assert travelled(source, source, other, region) == 0
    assert travelled(other, source, other, region) == pytest.approx(1)
    assert travelled(torch.lerp(source, other, 0.3), source, other, region) == pytest.approx(0.3, abs=1e-5)
    half = torch.where(region, other, source)
    assert travelled(half, source, other, ~region) == 0


def test_a_model_on_global_tokens_is_refused(data_dir, tmp_path):
    tiny.tiny_pipeline().save_pretrained(tmp_path / "model")
    flags = {"model": tmp_path / "model", "data_dir": data_dir, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"tokens='global' of 1.*tokens=\"all\""):
        scripts.call_script("splice", **flags)


@pytest.mark.slow
def test_the_commands_of_the_script_from_training_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the config's paths start
    flags = {"tokens": "all", "normalize_tokens": 32, "output_dir": tmp_path / "model"}
    flags["train_data_dir"] = "examples/data/phantom-cxr/phantom-cxr-train-*.tar"
    flags |= {"max_train_samples": 32, "cache_views": 1, "max_train_steps": 2, "lr_warmup_steps": 1}
    scripts.call_script("train_dino.py", ROOT / "examples/configs/quickstart.yaml", **flags)
    conditioner = DinoDiffusionPipeline.from_pretrained(tmp_path / "model").conditioner
    assert conditioner.num_tokens == 5 + 64
    assert conditioner.heads[0].std.ne(1).all()  # fitted
    flags = {"model": tmp_path / "model", "output_dir": tmp_path / "out", "num_noises": 1, "num_inference_steps": 2}
    scripts.call_script("splice", **flags)
    assert list(json.loads((tmp_path / "out/splices.json").read_text())) == MASKS
