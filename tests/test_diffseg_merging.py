"""DiffSeg's arithmetic against the published algorithm in float64 (`published_diffseg.py`)."""

import pytest
import torch

from diffusers_dino.diffseg.merging import (
    aggregate_attention,
    anchor_divergence,
    anchor_positions,
    merge_attention,
    pairwise_kl,
    refine_segments,
    relative_thresholds,
    suppress,
)
from published_diffseg import (
    published_aggregate,
    published_anchors,
    published_divergences,
    published_mask,
    published_merge,
    published_refine,
    structured_attention,
)


def attention_maps(sides=(16, 8, 4), **options) -> dict[int, torch.Tensor]:
    return structured_attention(sides, **{"segments": 5, "locality": 0.0, **options})


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("contrast", [1.0, 4.0, 12.0])
def test_masks_are_those_of_the_published_algorithm(threshold, contrast):
    attention = attention_maps(contrast=contrast)
    expected = published_merge(published_aggregate(attention), [threshold] * 3, per_side=8)
    merged = merge_attention(aggregate_attention(attention), [threshold] * 3, anchors_per_side=8)
    assert merged.shape == expected.shape
    assert (suppress(merged, 64) == published_mask(expected, 64)).float().mean() >= 0.999


def test_masks_are_those_of_the_published_algorithm_at_its_own_sizes():
    """64, 32, 16 and 8 to 512 px, with and without refinement; `benchmarks/diffseg.py` has the whole table."""
    attention = structured_attention(contrast=5.0)
    exact, maps = published_aggregate(attention), aggregate_attention(attention)
    flat = exact.flatten(1)
    exact_divergence = published_divergences(flat[published_anchors(64, 4)], flat)
    divergence = anchor_divergence(maps, 4)
    assert torch.allclose(divergence.double(), exact_divergence, atol=1e-5)
    for threshold in (0.05, 0.2, 0.5, 0.9):
        expected = published_merge(exact, [threshold] * 3, 4, exact_divergence)
        merged = merge_attention(maps, [threshold] * 3, 4, divergence)
        assert len(merged) == len(expected)
        assert (suppress(merged, 512) == published_mask(expected, 512)).float().mean() >= 0.999
    expected, merged = published_refine(exact, expected), refine_segments(maps, merged)
    assert len(merged) == len(expected)
    assert (suppress(merged, 512) == published_mask(expected, 512)).float().mean() >= 0.999


def test_one_threshold_a_pass():
    attention = attention_maps(contrast=4.0)
    thresholds = [0.1, 0.4, 0.8, 0.2]
    expected = published_merge(published_aggregate(attention), thresholds, per_side=8)
    merged = merge_attention(aggregate_attention(attention), thresholds, anchors_per_side=8)
    assert torch.allclose(merged.double(), expected, atol=1e-6)


def test_a_given_divergence_changes_nothing_but_time():
    maps = aggregate_attention(attention_maps())
    merged = merge_attention(maps, [0.3] * 2, 8, divergence=anchor_divergence(maps, 8))
    assert torch.equal(merged, merge_attention(maps, [0.3] * 2, 8))
    with pytest.raises(ValueError, match=r"must be \(16, 256\), anchors by maps"):
        merge_attention(maps, [0.3], 4, divergence=anchor_divergence(maps, 8))


def test_relative_thresholds_are_in_units_of_the_mean_divergence():
    maps = aggregate_attention(attention_maps())
    flat = maps.flatten(1)
    mean = float(pairwise_kl(flat, flat).mean())
    assert relative_thresholds(maps, [1.0, 0.3]) == pytest.approx([mean, 0.3 * mean], rel=1e-4)


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
    only_8 = aggregate_attention(attention, weights={16: 0, 8: 1})
    assert torch.allclose(maps, (16 * only_16 + 8 * only_8) / 24, atol=1e-7)
    assert torch.allclose(only_16, attention[16].mean(0).view(256, 16, 16), atol=1e-7)
    assert torch.equal(only_8.view(16, 16, -1)[0, 0], only_8.view(16, 16, -1)[1, 1])  # queries are repeated
    weighted = aggregate_attention(attention, weights={16: 1, 8: 0})
    assert torch.allclose(weighted, only_16, atol=1e-7)


def test_aggregation_works_for_sides_that_do_not_divide():
    maps = aggregate_attention(attention_maps(sides=(13, 5)))
    assert maps.shape == (169, 13, 13)
    assert torch.allclose(maps.sum(dim=(1, 2)), torch.ones(169), atol=1e-5)


def test_aggregation_reads_half_precision_in_float32():
    attention = {side: maps.bfloat16() for side, maps in attention_maps().items()}
    assert aggregate_attention(attention).dtype == torch.float32


def test_aggregation_leaves_its_input_alone():
    attention = attention_maps(sides=(8, 4), heads=1)
    before = {side: maps.clone() for side, maps in attention.items()}
    aggregate_attention(attention)
    assert all(torch.equal(attention[side], before[side]) for side in attention)


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


def test_equal_maps_are_one_segment():
    maps = torch.full((64, 8, 8), 1 / 64)
    for thresholds in ([0.05] * 3, relative_thresholds(maps, [0.3] * 3)):
        merged = merge_attention(maps, thresholds, anchors_per_side=4)
        assert len(merged) == 1
        assert suppress(merged, (20, 30)).tolist() == [[0] * 30] * 20


def test_similar_maps_are_told_apart_to_rounding():
    """Divergences far below the rounding of the entropies that they are differences of."""
    noise = 1e-3 * torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    x = noise.softmax(dim=1)
    expected = published_divergences(x.double(), x.double())
    assert torch.allclose(pairwise_kl(x, x).double(), expected, rtol=1e-2, atol=1e-9)


def test_suppression_of_many_candidates_is_an_argmax():
    merged = torch.rand(50, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(suppress(merged, (5, 7)), merged.argmax(dim=0))
    assert suppress(torch.ones(40, 4, 4), 8).unique().tolist() == [0]  # the first of equals, as argmax


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ({}, {}, "no attention maps"),
        ({4: torch.ones(1, 16, 15)}, {}, "side 4 must be"),
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
    with pytest.raises(ValueError, match="sum 1"):
        merge_attention(torch.ones(16, 4, 4), [0.1])
    with pytest.raises(ValueError, match="sum 1"):
        relative_thresholds(torch.full((16, 4, 4), float("nan")), [0.1])
