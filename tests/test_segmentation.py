"""DiffSeg's arithmetic against a plain float64 transcription of the published equations."""

import numpy as np
import pytest
import torch

from diffusers_dino.segmentation import (
    aggregate_attention,
    anchor_positions,
    merge_attention,
    pairwise_kl,
    refine_segments,
    suppress,
)


def attention_maps(sides=(16, 8, 4), heads=2, segments=5, contrast=4.0, seed=0) -> dict[int, torch.Tensor]:
    """Self-attention that prefers keys of the query's own segment, the segments being Voronoi cells."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(segments, 2, generator=generator)
    attention = {}
    for side in sides:
        grid = (torch.arange(side) + 0.5) / side
        positions = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).view(-1, 2)
        cell = torch.cdist(positions, centers).argmin(dim=1)
        noise = torch.randn(heads, side * side, side * side, generator=generator)
        attention[side] = (contrast * (cell[:, None] == cell).float() + noise).softmax(dim=-1)
    return attention


def reference_merge(maps: np.ndarray, thresholds: list[float], per_side: int) -> np.ndarray:
    """Sections 3.2 and 3.3 of the paper, one distance at a time, in float64."""

    def distance(x, y):
        ratio = np.log(x) - np.log(y)
        return ((x * ratio).sum() - (y * ratio).sum()) / 2

    size = maps.shape[-1]
    step = (size - 1) // (per_side - 1)
    start = (size - 1 - step * (per_side - 1)) // 2
    line = [start + step * i for i in range(per_side)]
    anchors = [maps[row * size + column] for row in line for column in line]
    merged = []
    for anchor in anchors:
        near = [m for m in maps if distance(anchor, m) < thresholds[0]]
        merged.append(np.mean(near, axis=0))
    for threshold in thresholds[1:]:
        taken, result = set(), []
        for i, candidate in enumerate(merged):
            if i in taken:
                continue
            near = [j for j, other in enumerate(merged) if distance(candidate, other) < threshold]
            taken.update([i, *near])
            result.append(np.mean([merged[j] for j in near], axis=0))
        merged = result
    return np.array(merged)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("contrast", [1.0, 4.0, 12.0])
def test_merge_equals_the_float64_reference(threshold, contrast):
    maps = aggregate_attention(attention_maps(contrast=contrast))
    expected = reference_merge(maps.double().numpy(), [threshold] * 3, per_side=8)
    merged = merge_attention(maps, [threshold] * 3, anchors_per_side=8)
    assert merged.shape == expected.shape
    labels = suppress(merged, 64)
    expected_labels = suppress(torch.from_numpy(expected), 64)
    assert (labels == expected_labels).float().mean() >= 0.999


def test_segments_are_found_and_refinement_keeps_them():
    attention = attention_maps(contrast=6.0, segments=4)
    maps = aggregate_attention(attention)
    merged = merge_attention(maps, [0.3] * 3, anchors_per_side=8)
    refined = refine_segments(maps, merged)
    assert 2 <= len(refined) <= len(merged)
    centers = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(64) + 0.5) / 64
    positions = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).view(-1, 2)
    truth = torch.cdist(positions, centers).argmin(dim=1)
    for candidates in (merged, refined):
        labels = suppress(candidates, 64).flatten()
        majority = sum((truth[labels == k].bincount().max() for k in labels.unique()), torch.tensor(0))
        assert majority / len(truth) > 0.85


def test_aggregation_gives_distributions_and_weighs_by_side():
    attention = attention_maps(sides=(16, 8))
    maps = aggregate_attention(attention)
    assert maps.shape == (256, 16, 16)
    assert torch.allclose(maps.sum(dim=(1, 2)), torch.ones(256), atol=1e-5)
    only_16 = aggregate_attention({16: attention[16]})
    only_8 = aggregate_attention({8: attention[8]}, size=16)
    assert torch.allclose(maps, (16 * only_16 + 8 * only_8) / 24, atol=1e-7)
    assert torch.allclose(only_16, attention[16].mean(0).view(256, 16, 16), atol=1e-7)
    assert torch.equal(only_8.view(16, 16, -1)[0, 0], only_8.view(16, 16, -1)[1, 1])  # queries are repeated
    weighted = aggregate_attention(attention, weights={16: 1, 8: 0})
    assert torch.allclose(weighted, only_16, atol=1e-7)


def test_aggregation_works_for_sides_that_do_not_divide():
    maps = aggregate_attention(attention_maps(sides=(12, 5)), size=13)
    assert maps.shape == (169, 13, 13)
    assert torch.allclose(maps.sum(dim=(1, 2)), torch.ones(169), atol=1e-5)


def test_aggregation_reads_half_precision_in_float32():
    attention = {side: maps.bfloat16() for side, maps in attention_maps().items()}
    assert aggregate_attention(attention).dtype == torch.float32


def test_divergence_equals_its_definition_on_peaked_maps():
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 10
    x = logits.softmax(dim=1)
    definition = torch.tensor([[((a - b) * (a.log() - b.log())).sum() / 2 for b in x.double()] for a in x.double()])
    assert torch.allclose(pairwise_kl(x, x).double(), definition, atol=1e-4)
    assert torch.isfinite(pairwise_kl(torch.eye(4), torch.eye(4))).all()


def test_anchors_are_the_published_grid():
    rows = anchor_positions(64, 16) // 64
    assert rows.unique().tolist() == list(range(1, 62, 4))
    assert anchor_positions(5, 1).tolist() == [12]


def test_thresholds_at_the_extremes():
    maps = aggregate_attention(attention_maps())
    assert len(merge_attention(maps, [float("inf")] * 2, anchors_per_side=4)) == 1
    for thresholds in ([0.0], [0.1, -1], [], [float("nan")]):
        with pytest.raises(ValueError, match="threshold above 0"):
            merge_attention(maps, thresholds)


def test_a_constant_image_is_one_segment():
    maps = torch.full((64, 8, 8), 1 / 64)
    merged = merge_attention(maps, [0.05] * 3, anchors_per_side=4)
    assert len(merged) == 1
    assert suppress(merged, (20, 30)).tolist() == [[0] * 30] * 20


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ({}, {}, "no attention maps"),
        ({4: torch.ones(1, 16, 15)}, {}, "side 4 must be"),
        ({4: torch.ones(1, 16, 16)}, {"size": 2}, "do not fit the size 2"),
        ({4: torch.ones(1, 16, 16)}, {"weights": {8: 1}}, "needs a weight"),
        ({4: torch.ones(1, 16, 16)}, {"weights": {4: 0}}, "above 0"),
    ],
)
def test_maps_that_do_not_fit_are_refused(attention, options, message):
    with pytest.raises(ValueError, match=message):
        aggregate_attention(attention, **options)


def test_merge_refuses_maps_and_anchors_that_do_not_fit():
    with pytest.raises(ValueError, match="size \\* size"):
        merge_attention(torch.ones(10, 4, 4), [0.1])
    with pytest.raises(ValueError, match="1 to 4 anchors"):
        merge_attention(torch.full((16, 4, 4), 1 / 16), [0.1], anchors_per_side=5)
