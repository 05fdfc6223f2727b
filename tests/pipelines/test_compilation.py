"""Compiled models: whole graphs, the same results, and what happens where they cannot be compiled."""

import importlib
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import tiny
from diffusers_dino.denoisers import family_of
from diffusers_dino.pipelines import compilation, deep_cache
from diffusers_dino.pipelines.compilation import compile_models, compile_pipeline, compiler_problem, is_compiled
from diffusers_dino.training.features import FeatureEncoder


def gradients(model, denoiser, batch_size=2):
    """What a training step makes of a batch: the loss, and all gradients."""
    generator = torch.Generator().manual_seed(batch_size)
    latents = torch.randn(batch_size, tiny.LATENT_CHANNELS, 8, 8, generator=generator)
    tokens = torch.randn(batch_size, 5, tiny.TOKEN_DIM, generator=generator)
    prediction = family_of(denoiser).predict(model, latents, torch.arange(batch_size), tokens)
    loss = prediction.float().square().mean()
    loss.backward()
    found = [parameter.grad.clone() for parameter in denoiser.parameters()]
    denoiser.zero_grad()
    return loss.detach(), *found


@pytest.fixture
def accelerator():
    """One of mixed precision, which wraps what it prepares."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_training_step_is_one_graph_for_batches_of_any_size(accelerator):
    """Batches of a second size give a graph for all."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = tiny.tiny_unet(**tiny.ONE_LEVEL).train()
    model = accelerator.prepare(denoiser)
    expected = [gradients(model, denoiser, batch_size) for batch_size in (2, 3, 4)]
    assert compile_models(denoiser, fullgraph=True, backend="eager")
    for batch_size, values in zip((2, 3, 4), expected, strict=True):
        torch.testing.assert_close(gradients(model, denoiser, batch_size), values, atol=1e-6, rtol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # one of them the trial's


@pytest.mark.slow
def test_gradients_of_compiled_blocks_are_the_eager_ones():
    """A whole model trains in test_train_dino, whose losses are compared."""
    torch.compiler.reset()
    denoiser = tiny.tiny_unet(**tiny.ONE_LEVEL).train()
    expected = gradients(denoiser, denoiser)
    denoiser.to(memory_format=torch.channels_last)
    assert compile_models(denoiser, whole=False, fullgraph=True)
    torch.testing.assert_close(gradients(denoiser, denoiser), expected, atol=1e-5, rtol=1e-4)


def test_large_denoisers_are_compiled_by_blocks(monkeypatch):
    blocks = "BasicTransformerBlock"
    for large in (False, True):
        monkeypatch.setattr(compilation, "_LARGE", 0 if large else 10**9)
        denoiser = tiny.tiny_unet()
        compile_models(denoiser, backend="eager")
        compiled = {type(part).__name__ for part in denoiser.modules() if part._compiled_call_impl is not None}
        assert compiled == ({blocks} if large else {"UNet2DConditionModel"})


@pytest.mark.parametrize("vae", [tiny.tiny_vae, tiny.tiny_taesd])
def test_features_are_the_eager_ones_from_one_graph_of_each_model(vae):
    """Batches of another size change nothing for the first; test_train_dino trains with inductor's."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    vae, conditioner = vae().requires_grad_(False), tiny.tiny_conditioner()
    encode = FeatureEncoder(vae, conditioner, "cpu")
    batches = [{"image": tiny.random_images(count, vae.config["in_channels"], size=40)} for count in (3, 2)]
    expected = list(map(encode, batches))
    vae.to(memory_format=torch.channels_last)
    assert compile_models(vae.encoder, conditioner, fullgraph=True, backend="eager", dynamic=False)
    features = list(map(encode, batches))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert all(map(torch.equal, encode(batches[0]), features[0]))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5  # one of them the trial's
    torch.compiler.reset()  # as in a run that goes on, whose first batch is another one
    assert all(map(torch.equal, encode(batches[1]), features[1]))


@pytest.mark.parametrize("cached", [True, False])
def test_training_compiles_frozen_models_unless_features_are_cached(pipe, cached):
    script = importlib.import_module("train_dino")
    script.compile_for_training(script.Arguments(), pipe, cached)
    assert is_compiled(pipe.unet)
    assert is_compiled(pipe.vae.encoder) == is_compiled(pipe.conditioner) == (not cached)
    assert not is_compiled(pipe.vae.decoder)


def test_pipelines_sample_the_same_images_in_one_graph(images):
    """Of each shape; tests/synthesis samples with inductor's."""
    pipe = tiny.tiny_pipeline(unet=tiny.tiny_unet(**tiny.ONE_LEVEL))
    expected = tiny.generate(pipe, images[:2])
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_pipeline(pipe, fullgraph=True, backend="eager")
    together = tiny.generate(pipe, images[:2])
    assert abs(together - expected).max() < 1e-4
    tiny.generate(pipe, images[:1])  # another shape, compiled by itself
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (tiny.generate(pipe, images[:2]) == together).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_it_stays_eager_with_one_warning(pipe, caplog):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    torch.compiler.reset()
    with caplog.at_level(logging.WARNING):
        assert not compile_pipeline(pipe, backend=broken)
    (record,) = (record for record in caplog.records if record.name.startswith("diffusers_dino"))
    assert "not compiled" in record.message
    assert "No working C++ compiler found" in record.message
    assert all(part._compiled_call_impl is None for part in [*pipe.unet.modules(), *pipe.vae.modules()])


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    # monkeypatch would leave these settings deleted
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++"), "fx_graph_cache": False}):
        assert "/nonexistent/g++" in compiler_problem("cpu")
    torch.compiler.reset()


def test_caches_are_refused(pipe):
    pipe.enable_cache(deep_cache(pipe.unet))
    with pytest.raises(ValueError, match=r"disable_cache\(\) first"):
        compile_pipeline(pipe)
