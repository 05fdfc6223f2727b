"""The reconstruction protocol on a tiny untrained pipeline: its controls, and its independence of batches."""

import pytest
import torch

from diffusers_dino.evaluation import ReconstructionResult, evaluate_reconstruction
from diffusers_dino.evaluation.controls import derangement
from diffusers_dino.evaluation.generation import generate_variations
from tiny import random_images, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def images():
    return random_images(8, channels=1)


def test_a_copy_of_the_source_in_the_training_set_is_the_lookups_answer(pipe, images, tmp_path):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    training = torch.cat([random_images(8, channels=1, seed=5), images])
    result = evaluate_reconstruction(pipe, images, training, seeds=(0, 1), num_inference_steps=2)
    assert result.by_encoder.nearest_training_image == 1
    assert result.by_pixels.nearest_training_image == 1
    assert (result.num_images, result.num_training_images, result.seeds) == (8, 16, (0, 1))
    for figures in (result.by_encoder, result.by_pixels):
        # no training happened: what is generated finds its source no more often than a shuffled one, give or take
        assert figures.generated <= 0.5
    assert result.frechet_training_images < result.frechet_untrained
    result.save(tmp_path / "result.json")
    assert ReconstructionResult.load(tmp_path / "result.json") == result
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


def test_a_variation_does_not_depend_on_the_batch(pipe, images):
    tokens = pipe.encode_image(images)
    whole = generate_variations(pipe, tokens, seed=1, num_inference_steps=2)
    parts = generate_variations(pipe, tokens, seed=1, num_inference_steps=2, batch_size=3)
    assert torch.allclose(whole, parts, atol=1e-4)
    assert not torch.allclose(whole, generate_variations(pipe, tokens, seed=2, num_inference_steps=2), atol=1e-2)


@pytest.mark.parametrize("n", [2, 3, 64])
def test_derangement_moves_everything(n):
    order = derangement(n, seed=0)
    assert sorted(order.tolist()) == list(range(n))
    assert (order != torch.arange(n)).all()
