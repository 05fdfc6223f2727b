"""Frozen models on a stream of their own: a batch ahead on a GPU, and nothing else there or elsewhere."""

import copy
import importlib
from itertools import islice

import pytest
import torch

import scripts
import tiny
from diffusers_dino.data import GlobalBatchSampler, Preprocessing, TrainingViews, load_batches, open_images
from diffusers_dino.devices import deterministic
from diffusers_dino.training import models, optim
from diffusers_dino.training.features import FeatureEncoder, encode_ahead

UPDATES = 12


@pytest.fixture
def views(tmp_path):
    images = open_images(scripts.image_folder(tmp_path / "images", 24, size=40), Preprocessing(tiny.IMAGE_SIZE))
    return TrainingViews(images, None)


def train(pipe, views, device, ahead):
    """Positions and losses of some updates, and the weights at their end."""
    script, pipe = importlib.import_module("train_dino"), copy.deepcopy(pipe)
    trainable = models.adapt_for_training(pipe, device)
    optimizer = optim.make_adamw(trainable, lr=1e-3)
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, device)
    batches = load_batches(views, GlobalBatchSampler(len(views), 4), device=device)
    positions, losses = [], []
    for batch in islice(encode_ahead(batches, encode) if ahead else batches, UPDATES):
        loss = script.compute_loss(script.Arguments(), pipe, pipe.unet, encode, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        positions.append(batch["position"])
        losses.append(loss.detach())
    return positions, torch.stack(losses), [parameter.detach() for parameter in trainable]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_is_the_same_to_the_bit(pipe, views, device):
    with deterministic(torch.get_num_threads()):
        (positions, losses, weights), (others, *rest) = (train(pipe, views, device, ahead) for ahead in (False, True))
    assert positions == others
    assert torch.equal(losses, rest[0])
    assert all(map(torch.equal, weights, rest[1]))


def test_on_a_cpu_no_batch_is_taken_before_its_turn(pipe):
    taken = []
    batches = (taken.append(number) or {"position": [number]} for number in range(3))
    ahead = encode_ahead(batches, FeatureEncoder(pipe.vae, pipe.conditioner, "cpu"))
    assert next(ahead) == {"position": [0]}
    assert taken == [0]
    assert [batch["position"] for batch in ahead] == [[1], [2]]


@pytest.mark.gpu
def test_on_a_gpu_features_are_a_batch_ahead_and_the_last_comes_too(pipe, views):
    models.adapt_for_training(pipe, torch.device("cuda"))
    encode = FeatureEncoder(pipe.vae, pipe.conditioner, "cuda")
    blocks = list(islice(GlobalBatchSampler(len(views), 4), 5))
    taken = []

    def batches():
        for batch in load_batches(views, blocks, device="cuda"):
            taken.append(batch["position"])
            yield batch

    found = []
    for number, batch in enumerate(encode_ahead(batches(), encode), start=1):
        assert len(taken) == min(number + 1, 5)
        found.append([part.clone() for part in batch["features"]])
    expected = [encode(batch) for batch in load_batches(views, blocks, device="cuda")]
    assert len(found) == 5
    for parts, others in zip(found, expected, strict=True):
        assert all(map(torch.equal, parts, others))
