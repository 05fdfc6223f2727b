"""Other methods than DiffSeg in the segmentation protocol: cuts, walks and clusters, without a mask in any choice."""

import pytest
import torch

import scripts
import tiny
from diffusers_dino import DiffSegPipeline
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.diffseg import FeatureClusters
from diffusers_dino.evaluation import Sweep, evaluate_segmentation
from diffusers_dino.evaluation.controls import split_in_halves
from diffusers_dino.evaluation.segmentation.protocol import BEST_PAIR, NO_GROUND_TRUTH, chosen_masks
from diffusers_dino.evaluation.segmentation.table import format_segmentation_table
from diffusers_dino.metrics.dice import dice

SIZE, COUNT = 32, 6
SHARED = {"timesteps": (50,), "mask_size": SIZE, "num_clusters": (3,)}
SWEEPS = [
    Sweep(method="walk", thresholds=(0.9, 1.5), **SHARED),
    Sweep(method="cut", features=("encoder",), thresholds=(0.5, 0.9), **SHARED),
    Sweep(method="clusters", features=("unet", "encoder"), **SHARED),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_masked_images(scripts.masked_folder(tmp_path_factory.mktemp("lungs"), COUNT), SIZE, SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def study(images, folder):
    pipe = DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    return evaluate_segmentation(pipe, images, folder, SWEEPS, untrained=False, batch_size=4, progress=False)


def test_each_method_has_rows_and_seconds(study, tmp_path):
    names = ["model, walk on attention", "model, cut of encoder", "model, clusters of unet + encoder"]
    assert list(study.swept) == names
    rows = {(row.method, row.selection): row for row in study.result.methods}
    for name in names:
        for selection in (BEST_PAIR, NO_GROUND_TRUTH):
            assert 0 < rows[name, selection].seconds < 60
    assert rows["Otsu", "nothing to choose"].seconds is None
    assert "seconds an image" in format_segmentation_table([study.result])


def test_clusters_are_of_the_other_half_and_name_lungs_themselves(study, images, folder):
    name = "model, clusters of unet + encoder"
    swept = study.swept[name][0]
    assert len(swept.settings) == 1
    halves = split_in_halves(images.patients, 0)
    of_half = [FeatureClusters.load(swept.folder / f"clusters-view-0-of-half-{half}.safetensors") for half in (0, 1)]
    pipe, row = DiffSegPipeline.from_pipe(tiny.tiny_pipeline()), None
    for index in range(COUNT):
        own = of_half[0] if halves[index] else of_half[1]
        expected = pipe(images.image(index)[None], clusters=own, output_size=SIZE).masks[0]
        assert (swept.read(index)[0] == expected).float().mean() > 0.97  # features were kept in half precision
        lungs = torch.isin(swept.read(index)[0], torch.tensor(own.names["lungs"]))
        assert torch.equal(swept.read_lungs(index)[0], lungs)
    row = next(r for r in study.result.methods if (r.method, r.selection) == (name, NO_GROUND_TRUTH))
    shown = chosen_masks(study, row, images, [1, 2])
    assert [dice(shown[i], images.mask(i + 1)).item() for i in (0, 1)] == pytest.approx(list(row.dice[1:3]))


def test_the_same_call_makes_nothing_again(study, images, folder):
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    pipe = DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    again = evaluate_segmentation(pipe, images, folder, SWEEPS, untrained=False, batch_size=4, progress=False)
    assert again.result == study.result
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def test_an_encoder_needs_no_diffusion_model(images, tmp_path):
    pipe = DiffSegPipeline(conditioner=tiny.tiny_conditioner())
    sweep = Sweep(method="clusters", **SHARED)
    result = evaluate_segmentation(pipe, images, tmp_path, [Sweep(**SHARED), sweep], progress=False).result
    assert {sweep.method for sweep in result.sweeps} == {"model, clusters of encoder"}
    with pytest.raises(ValueError, match="None of the models has a denoiser"):
        evaluate_segmentation(pipe, images, tmp_path, Sweep(**SHARED), progress=False)


def test_what_cannot_be_swept(images, tmp_path):
    for options in ({"method": "snakes"}, {"features": ("tokens",)}):
        with pytest.raises(ValueError, match="must be one of"):
            Sweep(**options)
    pipe = DiffSegPipeline.from_pipe(tiny.tiny_pipeline())
    with pytest.raises(ValueError, match="different methods"):
        evaluate_segmentation(pipe, images, tmp_path, [SWEEPS[0], SWEEPS[0]], progress=False)
    assert "method" not in Sweep().identity  # folders of older versions go on
