"""The segmentation protocol: units that survive a kill, choices scored on others than they were made on, baselines."""

import os
from dataclasses import replace

import pytest
import torch

import scripts
import tiny
from diffusers_dino import DiffSegPipeline
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.evaluation import SegmentationResult, SegmentationStudy, Sweep, evaluate_segmentation
from diffusers_dino.evaluation.controls import split_in_halves, with_fresh_unet
from diffusers_dino.evaluation.segmentation.baselines import kmeans_segments, mean_mask_of_others, otsu_mask
from diffusers_dino.evaluation.segmentation.plot import SWEEP_AXES, plot_segmentation_examples, plot_segmentation_sweep
from diffusers_dino.evaluation.segmentation.protocol import (
    BEST_PAIR,
    NO_GROUND_TRUTH,
    chosen_masks,
    cross_fit,
)
from diffusers_dino.evaluation.segmentation.segments import segment_images
from diffusers_dino.evaluation.segmentation.table import format_segmentation_table
from diffusers_dino.metrics.dice import dice

NUM_IMAGES, SIZE = 5, 32
SWEEP = Sweep(timesteps=(1, 300), thresholds=(0.5, 1.0), layers=("all", "up_blocks.1.attentions.0"), mask_size=SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_masked_images(scripts.masked_folder(tmp_path_factory.mktemp("lungs"), NUM_IMAGES), SIZE, SIZE)


@pytest.fixture(scope="module")
def diffseg():
    return DiffSegPipeline.from_pipe(tiny.tiny_pipeline())


@pytest.fixture(scope="module")
def study(diffseg, images, tmp_path_factory) -> SegmentationStudy:
    folder = tmp_path_factory.mktemp("study")
    return evaluate_segmentation(diffseg, images, folder, SWEEP, dataset="discs", batch_size=2, progress=False)


@pytest.fixture(scope="module")
def swept(study):
    return study.swept["model"][0]


@pytest.fixture(scope="module")
def result(study) -> SegmentationResult:
    return study.result


def test_segments_are_those_of_the_pipeline(diffseg, images, swept):
    assert len(swept.settings) == len(swept.read(3)) == 8
    for setting, segments in zip(swept.settings, swept.read(3), strict=True):
        expected = diffseg(
            images.image(3)[None],
            setting.timestep,
            setting.threshold,
            relative_threshold=True,
            refine=True,
            layers=None if setting.layers == "all" else [setting.layers],
        ).masks[0]
        assert (segments == expected).float().mean() > 0.98  # batches round differently


def test_a_killed_run_continues_with_the_unit_it_was_at(diffseg, images, swept, tmp_path, monkeypatch):
    calls = []
    attention_maps = DiffSegPipeline.attention_maps

    def interrupted(self, *args, **options):
        calls.append(args[1])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return attention_maps(self, *args, **options)

    monkeypatch.setattr(DiffSegPipeline, "attention_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment_images(diffseg, images, SWEEP, tmp_path, chunk=2, progress=False)
    done = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(done) == 5  # one file for each unit: (layers, timestep) x images
    again = segment_images(diffseg, images, SWEEP, tmp_path, chunk=2, progress=False)
    assert len(calls) == 6 + len(again.units()) - 5
    assert all(os.stat(path).st_mtime_ns == time for path, time in done.items())
    assert len(list(tmp_path.iterdir())) == len(again.units()) + 1  # nothing half-written is left
    for index in range(NUM_IMAGES):
        assert torch.equal(again.read(index), swept.read(index))


def test_maps_are_computed_once_for_all_thresholds(diffseg, images, tmp_path, monkeypatch):
    calls = []
    forward = diffseg.unet.forward
    monkeypatch.setattr(diffseg.unet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    sweep = Sweep(timesteps=(1, 9), thresholds=(0.3, 0.5, 0.9), refine=False, mask_size=SIZE)
    segment_images(diffseg, images, sweep, tmp_path, chunk=NUM_IMAGES, progress=False)
    assert len(calls) == 2


def test_segments_of_another_model_or_sweep_are_not_mixed(diffseg, images, swept):
    with pytest.raises(ValueError, match="begun with other settings:\n- model: "):
        segment_images(with_fresh_unet(diffseg, seed=5), images, SWEEP, swept.folder, chunk=2, progress=False)
    sweep = Sweep(timesteps=(2,), thresholds=SWEEP.thresholds, layers=SWEEP.layers, mask_size=SIZE)
    with pytest.raises(ValueError, match=r"timesteps was \[1, 300\], is \[2\]\n- chunk was 2, is 3"):
        segment_images(diffseg, images, sweep, swept.folder, chunk=3, progress=False)
    with pytest.raises(ValueError, match="needs one or more timesteps, all different"):
        Sweep(timesteps=())
    with pytest.raises(ValueError, match=r"thresholds, all different, got \[0.5, 0.5\]"):
        Sweep(thresholds=(0.5, 0.5))


def test_noise_depends_on_the_image_alone(diffseg, images, tmp_path):
    sweep = Sweep(timesteps=(500,), thresholds=(0.8,), add_noise=True, mask_size=SIZE)
    small, large = (
        segment_images(diffseg, images, sweep, tmp_path / str(chunk), chunk=chunk, progress=False) for chunk in (1, 5)
    )
    agreement = [(small.read(i) == large.read(i)).float().mean() for i in range(NUM_IMAGES)]
    assert min(agreement) > 0.95


def test_the_table_has_every_method_and_the_json_everything(result, tmp_path):
    found = {(row.method, row.selection) for row in result.methods}
    for model in ("model", "model, untrained"):
        assert {(model, BEST_PAIR), (model, NO_GROUND_TRUTH)} <= found
        assert (f"k-means, as many segments as {model}", BEST_PAIR) in found
    others = {"Otsu", "all ones", "mean mask of other patients", "two ellipses, where lungs are named"}
    assert others <= {method for method, _ in found}
    assert len(result.methods) == 10
    for row in result.methods:
        assert len(row.dice) == NUM_IMAGES
        assert row.low <= row.mean <= row.high
        assert row.lower_quartile <= row.median <= row.upper_quartile
    result.save(tmp_path / "result.json")
    assert SegmentationResult.load(tmp_path / "result.json") == result
    for style, sign in (("markdown", "| model | best pair |"), ("latex", r"\toprule"), ("csv", "discs,5,Otsu,")):
        assert sign in format_segmentation_table([result, result], style)
    assert "seconds an image of discs" in format_segmentation_table([result, replace(result, dataset="others")])
    with pytest.raises(ValueError, match="not 'html'"):
        format_segmentation_table([result], "html")


def test_otsu_finds_dark_discs(result):
    otsu = next(row for row in result.methods if row.method == "Otsu")
    assert otsu.mean > 0.95
    ones = next(row for row in result.methods if row.method == "all ones")
    assert ones.mean < 0.6


def test_the_masks_of_a_row_have_its_scores(study, images):
    for row in study.result.methods[:2]:
        masks = chosen_masks(study, row, images, range(NUM_IMAGES))
        scores = [dice(mask, images.mask(i)).item() for i, mask in enumerate(masks)]
        assert scores == pytest.approx(row.dice)


def test_figures_are_drawn_from_results(result, images):
    for axis in SWEEP_AXES:
        figure = plot_segmentation_sweep(result, axis)
        assert [panel.get_title() for panel in figure.axes] == ["model", "model, untrained"]
    mask = images.mask(0)
    figure = plot_segmentation_examples([images.image(0)[0]] * 7, [mask] * 7, [torch.ones_like(mask)] * 7, ["x"] * 7)
    assert len(figure.axes) == 12
    with pytest.raises(ValueError, match="not 'seed'"):
        plot_segmentation_sweep(result, "seed")
    with pytest.raises(ValueError, match="at least one"):
        plot_segmentation_examples([], [], [], [])


def test_an_image_is_never_scored_where_its_setting_was_chosen():
    halves = torch.tensor([True, True, False, False])
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.1], [0.0, 0.2, 1.0, 1.0]])  # each setting is good on one half
    fitted = cross_fit(scores, halves)
    assert fitted.settings == (0, 1)
    assert fitted.indices.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(fitted.scores, torch.tensor([0.0, 0.2, 0.0, 0.1]))
    with pytest.raises(ValueError, match="two halves"):
        cross_fit(scores, torch.ones(4, dtype=torch.bool))


def test_a_patient_is_in_one_half_alone():
    patients = [str(i // 3) for i in range(30)]
    halves = split_in_halves(patients)
    assert halves.sum() == 15
    for patient in set(patients):
        assert len({half for half, name in zip(halves.tolist(), patients, strict=True) if name == patient}) == 1
    assert torch.equal(halves, split_in_halves(patients))
    assert not torch.equal(halves, split_in_halves(patients, seed=1))
    with pytest.raises(ValueError, match="two patients"):
        split_in_halves(["a", "a"])


def test_the_mean_mask_has_not_seen_the_patient():
    masks = torch.zeros(4, 3, 3, dtype=torch.bool)
    masks[0] = masks[1] = True
    others = mean_mask_of_others(masks, ["a", "a", "b", "c"])
    assert not others[0].any()  # b and c are empty
    assert others[2].all()  # two of three others are full
    with pytest.raises(ValueError, match="two patients"):
        mean_mask_of_others(masks, ["a"] * 4)


def test_otsu_maximises_the_variance_between_classes():
    image = torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) ** 2
    levels = (image * 255).round()

    def between(threshold: int) -> float:
        low, high = levels[levels <= threshold], levels[levels > threshold]
        return (len(low) * len(high) * (low.mean() - high.mean()) ** 2).item() if len(low) and len(high) else 0.0

    best = max(range(256), key=between)
    assert torch.equal(otsu_mask(image), levels <= best)
    assert otsu_mask(torch.full((4, 4), 0.3)).shape == (4, 4)


def test_kmeans_clusters_brightness_position_or_both():
    image = torch.zeros(32, 32)
    image[:, 16:] = 1.0
    halves = kmeans_segments(image, 2, 0.0, side=32)
    assert len(halves[:, :16].unique()) == len(halves[:, 16:].unique()) == 1
    assert len(halves.unique()) == 2
    assert len(kmeans_segments(torch.zeros(32, 32), 4, 1.0, side=16).unique()) == 4  # position alone
    assert len(kmeans_segments(torch.zeros(32, 32), 4, 0.0, side=16).unique()) == 1  # nothing to tell apart
