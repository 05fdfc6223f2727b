"""Crops, loss, teacher and signs of collapse of self-distillation."""

import math

import pytest
import torch

from diffusers_dino.training.self_distillation import (
    Crops,
    DistillationNetwork,
    cross_view_loss,
    effective_rank,
    update_teacher,
)
from tiny import random_images, tiny_encoder


def make_network() -> DistillationNetwork:
    encoder = tiny_encoder()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(DistillationNetwork.global_width(encoder), 7)
    return DistillationNetwork(encoder, head, 0.5, 0.25)


def test_whole_crops_without_exposure_are_the_images():
    images = random_images(3, channels=1)
    crops = Crops(32, (1.0, 1.0), ratio=1.0, exposure=0.0)(images, torch.Generator().manual_seed(0))
    assert torch.allclose(crops, images, atol=1e-5)


def test_crops_lie_inside_the_image_and_have_the_asked_area():
    column = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)  # brightness tells the place
    crops = Crops(16, (0.25, 0.25), ratio=1.0, exposure=0.0)(column, torch.Generator().manual_seed(0))
    assert crops.shape == (200, 1, 16, 16)
    extent = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert torch.allclose(extent, torch.full_like(extent, 0.5 * 15 / 16 * 64 / 63), atol=0.03)
    left = crops[:, 0, 0, 0]
    assert left.min() < 0.05
    assert 0.45 < left.max() < 0.56


def test_crops_depend_on_the_generator_alone():
    images, crops = random_images(4), Crops(16, (0.3, 0.8))
    first = crops(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, crops(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, crops(images, torch.Generator().manual_seed(2)))
    assert first.min() >= 0
    assert first.max() <= 1


def test_large_images_are_cropped_without_aliasing():
    stripes = torch.zeros(1, 1, 128, 128)
    stripes[..., ::2] = 1
    crops = Crops(16, (1.0, 1.0), ratio=1.0, exposure=0.0)(stripes, torch.Generator())
    assert torch.allclose(crops, torch.full_like(crops, 0.5), atol=1e-4)


@pytest.mark.parametrize("options", [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"ratio": 0.5}, {"size": 0}])
def test_impossible_crops_are_refused(options):
    with pytest.raises(ValueError, match=r"[Cc]rops"):
        Crops(**{"size": 16, "scale": (0.5, 1.0), **options})


def test_network_embeds_views_of_several_sizes():
    network = make_network()
    large, small = random_images(4), random_images(6, channels=1, size=16)
    features, logits = network([large, small])
    assert features.shape == (4, 5 * 32)
    assert logits.shape == (10, 7)
    expected = network.encoder((large - 0.5) / 0.25).last_hidden_state[:, :5].flatten(1)
    assert torch.allclose(features, expected, atol=1e-6)


def test_cross_view_loss_against_a_loop_and_of_an_untrained_student():
    torch.manual_seed(0)
    images, num_prototypes = 3, 5
    student = torch.randn(4 * images, num_prototypes)
    targets = torch.randn(2 * images, num_prototypes).softmax(-1)
    terms = []
    for t in range(2):
        for s in range(4):
            for b in range(images):
                if s != t:
                    log_student = (student[s * images + b] / 0.1).log_softmax(-1)
                    terms.append(-(targets[t * images + b] * log_student).sum())
    loss = cross_view_loss(student, targets, images, temperature=0.1)
    assert torch.allclose(loss, torch.stack(terms).mean(), rtol=1e-5)
    untrained = cross_view_loss(torch.zeros(6, 8), torch.rand(6, 8).softmax(-1), 3, temperature=0.1)
    assert math.isclose(untrained.item(), math.log(8), rel_tol=1e-5)


def test_teacher_moves_towards_the_student():
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    update_teacher(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, expected)


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(4000, 10, generator=generator)
    assert 9.8 < effective_rank(independent) <= 10
    assert math.isclose(effective_rank(independent[:, :1].expand(-1, 10)), 1, rel_tol=1e-6)
    assert effective_rank(torch.ones(20, 10)) == 1
    with pytest.raises(ValueError, match="N >= 2"):
        effective_rank(torch.ones(1, 10))
