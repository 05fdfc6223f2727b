"""The path protocol: its arithmetic on paths that are known, and a run on a tiny untrained pipeline."""

import pytest
import torch

from diffusers_dino.evaluation import InterpolationResult, evaluate_interpolation
from diffusers_dino.evaluation.interpolation.plot import plot_path
from diffusers_dino.evaluation.interpolation.protocol import PathFigures, path_figures
from tiny import random_images, tiny_pipeline


def test_a_straight_path_is_monotone_and_a_leap_is_not():
    sources, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    straight = torch.lerp(sources[:, None], targets[:, None], torch.tensor([0.0, 0.5, 1.0])[:, None])
    figures = path_figures(straight, sources, targets)
    assert figures.to_source == pytest.approx((1, 0.5**0.5, 0))
    assert figures.to_target == pytest.approx((0, 0.5**0.5, 1))
    assert (figures.monotone_paths, figures.monotone_steps) == (1, 1)
    assert figures.falls_and_rises
    leap = straight.clone()
    leap[1, 1] = leap[1, 0]
    figures = path_figures(leap, sources, targets)
    assert (figures.monotone_paths, figures.monotone_steps) == (0.5, 0.75)
    back = path_figures(straight.flip(1), sources, targets)
    assert (back.monotone_paths, back.monotone_steps) == (0, 0)
    assert not back.falls_and_rises
    with pytest.raises(ValueError, match=r"paths \(P, F, D\)"):
        path_figures(straight[:, :1], sources, targets)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def result(pipe):
    images, training = random_images(6, channels=1), random_images(20, channels=1, seed=1)
    options = {"fractions": (0.0, 0.5, 1.0), "num_inference_steps": 2, "seeds": (0, 1)}
    return evaluate_interpolation(pipe, images, training, **options)


def test_controls_are_what_they_must_be(result, tmp_path):
    assert (result.num_pairs, result.num_training_images, result.seeds) == (6, 20, (0, 1))
    for space in (result.by_encoder, result.by_pixels):
        blend = space.pixel_blend
        assert blend.to_source[0] == pytest.approx(1, abs=1e-4)
        assert blend.to_target[2] == pytest.approx(1, abs=1e-4)
        assert blend.to_source[2] == pytest.approx(blend.to_target[0], abs=1e-4)  # the same pairs, seen from both ends
        assert space.untrained.to_source[0] - space.untrained.to_source[2] < 0.5
    assert result.by_pixels.pixel_blend.monotone_paths == 1
    assert result.by_pixels.pixel_blend.falls_and_rises
    result.save(tmp_path / "result.json")
    loaded = InterpolationResult.load(tmp_path / "result.json")
    assert loaded == result
    assert isinstance(loaded.by_pixels.generated, PathFigures)


def test_too_few_images_and_fractions_in_disorder(pipe):
    images = random_images(2)
    with pytest.raises(ValueError, match="two images or more"):
        evaluate_interpolation(pipe, images[:1], images)
    with pytest.raises(ValueError, match="ascending"):
        evaluate_interpolation(pipe, images, images, fractions=(0.5, 0.5))


def test_the_figure_has_a_curve_for_each_end_and_way(result):
    figure = plot_path(result)
    assert [axes.get_title() for axes in figure.axes] == ["by the encoder", "by 16 x 16 pixels"]
    for axes, space in zip(figure.axes, (result.by_encoder, result.by_pixels), strict=True):
        curves = [tuple(line.get_ydata()) for line in axes.get_lines()]
        assert len(curves) == 8
        assert space.generated.to_source in curves
        assert space.pixel_blend.to_target in curves
