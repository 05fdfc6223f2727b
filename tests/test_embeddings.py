"""Arithmetic on tokens: exact ends, norms, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dino.embeddings import lerp, mix, slerp, splice_patch_tokens

fractions = st.floats(0, 1, width=32)
seeds = st.integers(0, 2**31)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 5, 16)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", [lerp, slerp, lambda a, b, t: lerp(a, b, t, restore_norm=True)])
@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_the_ends_of_a_path_are_its_images_bit_for_bit(path, seed):
    a, b = tokens(seed), tokens(seed + 1)
    assert torch.equal(path(a, b, 0.0), a)
    assert torch.equal(path(a, b, 1.0), b)
    assert torch.equal(path(a, b, torch.tensor([0.0, 1.0])), torch.stack([a[0], b[1]]))


@given(seed=seeds, fraction=fractions)
@settings(max_examples=50, deadline=None)
def test_lerp_is_the_papers_formula(seed, fraction):
    a, b = tokens(seed), tokens(seed + 1)
    assert torch.allclose(lerp(a, b, fraction), (1 - fraction) * a + fraction * b, atol=1e-6)


@given(seed=seeds, fraction=fractions)
@settings(max_examples=50, deadline=None)
def test_restored_and_spherical_norms_are_interpolated(seed, fraction):
    a, b = tokens(seed), 3 * tokens(seed + 1)
    expected = (1 - fraction) * a.norm(dim=-1) + fraction * b.norm(dim=-1)
    for mixed in (lerp(a, b, fraction, restore_norm=True), slerp(a, b, fraction)):
        assert torch.allclose(mixed.norm(dim=-1), expected, rtol=1e-4)


@given(seed=seeds, fraction=fractions)
@settings(max_examples=50, deadline=None)
def test_slerp_divides_the_angle_in_the_fraction(seed, fraction):
    a, b = tokens(seed).double(), tokens(seed + 1).double()
    part = torch.acos(torch.cosine_similarity(a, slerp(a, b, fraction), dim=-1).clamp(-1, 1))
    whole = torch.acos(torch.cosine_similarity(a, b, dim=-1))
    assert torch.allclose(part, fraction * whole, atol=1e-6)


@pytest.mark.parametrize("other", [lambda a: a, lambda a: -a, lambda a: 2 * a, torch.zeros_like])
def test_slerp_of_parallel_opposite_and_zero_tokens_is_finite_and_straight(other):
    a = tokens(0)
    assert torch.allclose(slerp(a, other(a), 0.25), torch.lerp(a, other(a), 0.25), atol=1e-5)


def test_halfway_between_orthogonal_tokens_the_chord_is_short():
    a, b = torch.eye(2)[:1], torch.eye(2)[1:]
    assert lerp(a, b, 0.5).norm().item() == pytest.approx(math.sqrt(0.5))
    assert lerp(a, b, 0.5, restore_norm=True).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0])])
@pytest.mark.parametrize("path", [lerp, slerp])
def test_fractions_outside_the_unit_interval_are_refused(path, fraction):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        path(tokens(0), tokens(1), fraction)


def test_tokens_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        lerp(tokens(0), tokens(0, 2, 4, 16), 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        lerp(tokens(0), tokens(1), torch.tensor([0.1, 0.2, 0.3]))


def test_mix_of_two_is_lerp_and_of_one_is_itself():
    a, b = tokens(0), tokens(1)
    pair = torch.stack([a, b])
    assert torch.allclose(mix(pair, torch.tensor([0.3, 0.7])), lerp(a, b, 0.7), atol=1e-6)
    restored = mix(pair, torch.tensor([0.3, 0.7]), restore_norm=True)
    assert torch.allclose(restored, lerp(a, b, 0.7, restore_norm=True), atol=1e-5)
    assert torch.equal(mix(pair, torch.tensor([1.0, 0.0])), a)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0], [float("nan"), 1.0]])
def test_weights_that_are_no_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"sum to 1|one weight"):
        mix(torch.stack([tokens(0), tokens(1)]), torch.tensor(weights))


def test_splice_takes_patches_where_the_mask_is_true_and_keeps_global_tokens():
    a, b = torch.zeros(2, 2 + 6, 4), torch.ones(2, 2 + 6, 4)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    spliced = splice_patch_tokens(a, b, mask)
    assert spliced[..., 0].tolist() == [[0, 0, 1, 0, 0, 0, 0, 1]] * 2
    with pytest.raises(TypeError, match="bool"):
        splice_patch_tokens(a, b, mask.float())
    with pytest.raises(ValueError, match="at most 8"):
        splice_patch_tokens(a, b, torch.ones(3, 3, dtype=torch.bool))
