"""diffusers' switches of memory and speed on every pipeline: they change the way, not the result."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import is_xformers_available
from kinds import KINDS, bare_stable_diffusion

import tiny

CPU = torch.device("cpu")


def offload_sequentially(pipe):
    """What `enable_sequential_cpu_offload` does, which insists on a numbered device."""
    for name in ("conditioner", "unet", "vae"):
        model = getattr(pipe, name)
        cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def offload_groups(pipe, **options):
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


OFFLOADING = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": offload_sequentially,
    "leaves": lambda pipe: offload_groups(pipe, offload_type="leaf_level"),
    "blocks": lambda pipe: offload_groups(pipe, offload_type="block_level", num_blocks_per_group=1),
    "one excluded": lambda pipe: offload_groups(pipe, offload_type="leaf_level", exclude_modules="vae"),
}


@pytest.mark.parametrize("way", OFFLOADING)
def test_offloading_changes_nothing_twice(kind, images, way):
    pipe = kind.make()
    expected = kind.run(pipe, images)
    OFFLOADING[way](pipe)
    for _ in range(2):
        np.testing.assert_allclose(kind.run(pipe, images), expected, atol=1e-5)


@pytest.mark.parametrize("way", OFFLOADING)
def test_embeddings_may_be_encoded_before(pipe, images, way):
    expected = tiny.generate(pipe, images, guidance_scale=3.0)
    OFFLOADING[way](pipe)
    embeds = pipe.encode_image(images)
    np.testing.assert_allclose(tiny.generate(pipe, image_embeds=embeds, guidance_scale=3.0), expected, atol=1e-5)


def test_sequential_offloading_leaves_no_weights_in_memory(pipe, images):
    offload_sequentially(pipe)
    tiny.generate(pipe, images)
    for name in ("conditioner", "unet", "vae"):
        assert {parameter.device.type for parameter in getattr(pipe, name).parameters()} == {"meta"}
    assert pipe.conditioner.null_condition(2).device.type == "cpu"


def test_models_stay_where_they_are_from_point_to_point_of_a_path(images, monkeypatch):
    pipe, calls = KINDS["interpolation"].make(), []
    pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", lambda **options: calls.append(options))  # frees them all
    pipe(images[:1], images[1:2], num_inference_steps=1)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_offloading_on_a_gpu(images, way, dtype):
    expected = tiny.generate(tiny.tiny_pipeline(), images, guidance_scale=3.0)
    pipe = tiny.tiny_pipeline().to(dtype)
    if way == "group":
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")
    else:
        getattr(pipe, f"enable_{way}_cpu_offload")()
    result = tiny.generate(pipe, images, guidance_scale=3.0)
    assert np.abs(result - expected).mean() < (0.02 if dtype == torch.float16 else 2e-3)


def test_every_model_has_its_place_in_the_order_of_offloading(kind):
    pipe = kind.make()
    order = kind.pipeline.model_cpu_offload_seq.split("->")
    assert {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)} <= set(order)


SWITCHES = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "attention slices of one head": lambda pipe: pipe.enable_attention_slicing("max"),
    "plain attention": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "slices of the autoencoder": lambda pipe: pipe.vae.enable_slicing(),
    "tiles of the autoencoder": lambda pipe: pipe.vae.enable_tiling(),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_change_nothing(kind, images, switch):
    pipe = kind.make()
    expected = kind.run(pipe, images)
    SWITCHES[switch](pipe)
    np.testing.assert_allclose(kind.run(pipe, images), expected, atol=1e-4)


def test_projections_are_fused_and_parted(kind, images):
    pipe = kind.make()
    plain, processors = kind.run(pipe, images), set(map(type, pipe.unet.attn_processors.values()))
    pipe.fuse_qkv_projections()
    assert set(map(type, pipe.unet.attn_processors.values())) != processors
    pipe.unfuse_qkv_projections()
    assert set(map(type, pipe.unet.attn_processors.values())) == processors
    np.testing.assert_allclose(kind.run(pipe, images), plain, atol=1e-5)


def test_freeu_changes_the_result_until_it_is_off(kind, images):
    pipe = kind.make()
    plain = kind.run(pipe, images)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.8)
    assert not np.array_equal(kind.run(pipe, images), plain)
    pipe.disable_freeu()
    assert np.array_equal(kind.run(pipe, images), plain)


def test_weights_in_eight_bit_floats(kind, images):
    pipe = kind.make().to(torch.bfloat16)
    plain = kind.run(pipe, images)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.unet.parameters()}
    assert pipe.unet.dtype == torch.bfloat16
    assert np.abs(kind.run(pipe, images) - plain).mean() < 0.05


def test_xformers(kind, images):
    pipe = kind.make()
    if not is_xformers_available():
        with pytest.raises(ModuleNotFoundError, match="xformers"):
            pipe.enable_xformers_memory_efficient_attention()
        pytest.skip("xformers is not installed: its refusal was tested alone")
    if not torch.cuda.is_available():
        pytest.skip("xformers needs a GPU")
    plain = kind.run(pipe.to("cuda"), images)
    pipe.enable_xformers_memory_efficient_attention()
    np.testing.assert_allclose(kind.run(pipe, images), plain, atol=1e-3)


def sampled(pipe):
    embeds = torch.randn(1, 5, tiny.TOKEN_DIM, generator=torch.Generator().manual_seed(0))
    return tiny.generate(pipe, prompt_embeds=embeds, guidance_scale=1.0)


def test_parts_of_another_pipeline_are_used_and_left_as_they_are(kind, images):
    whole = kind.make()
    expected = kind.run(whole, images)
    whole.unet.set_attn_processor(AttnProcessor())
    other = bare_stable_diffusion(whole)
    before = sampled(other)
    made = kind.pipeline.from_pipe(other, conditioner=whole.conditioner)
    np.testing.assert_allclose(kind.run(made, images), expected, atol=1e-4)
    assert set(map(type, other.unet.attn_processors.values())) == {AttnProcessor}
    assert np.array_equal(sampled(other), before)
    empty = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    back = StableDiffusionPipeline.from_pipe(made, **empty, image_encoder=None, requires_safety_checker=False)
    own = [{key: value for key, value in pipe.config.items() if key[0] != "_"} for pipe in (back, other)]
    assert own[0] == own[1]
    made.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(kind.run(made, images), expected, atol=1e-4)


@pytest.mark.parametrize("origin", KINDS)
def test_pipelines_share_parts_in_their_own_types(kind, images, origin):
    source = KINDS[origin].make()
    source.unet.to(torch.bfloat16)
    made = kind.pipeline.from_pipe(source)
    assert all(getattr(made, name) is getattr(source, name) for name in ("vae", "conditioner", "unet", "scheduler"))
    assert (made.unet.dtype, made.vae.dtype) == (torch.bfloat16, torch.float32)
    assert np.isfinite(kind.run(made, images)).all()
    cast = kind.pipeline.from_pipe(source, dtype=torch.float32)
    assert {cast.unet.dtype, cast.vae.dtype} == {torch.float32}


def test_parts_that_are_missing_are_named(kind):
    class Bare:
        components = {"vae": tiny.tiny_vae(), "scheduler": tiny.tiny_scheduler()}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"Bare has no (conditioner and no )?unet, which a .* needs: give it by name"):
        kind.pipeline.from_pipe(Bare())
