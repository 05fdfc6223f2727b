"""8-bit and 4-bit models: real layers of bitsandbytes, on the CPU where it can run them."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, UNet2DConditionModel
from transformers import BitsAndBytesConfig as TransformersConfig

import tiny
from checkpoints import FAMILIES, checkpoint, pixels_for
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner, DinoInterpolationPipeline
from diffusers_dino.quantization import quantize
from diffusers_dino.training import models
from tiny import generate

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

import bitsandbytes as bnb
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

BUNDLED = Path(__file__).parents[1] / "examples/data/tiny-diffusion"
BITS = {
    "8": {"load_in_8bit": True},
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
LAYER = {"8": bnb.nn.Linear8bitLt, "4": bnb.nn.Linear4bit, "4-double": bnb.nn.Linear4bit}
WIDTH = 64


@pytest.fixture(autouse=True)
def quiet(caplog):
    """bitsandbytes says of each 8-bit product in float32 that it is computed in float16."""
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


@pytest.fixture
def without_a_gpu(monkeypatch):
    """diffusers refuses to quantise while loading where there is no GPU; what comes after that runs on the CPU too."""
    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)


def wide_pipeline():
    """The tiny pipeline at widths that 4-bit layers on a CPU can have."""
    unet = tiny.tiny_unet(block_out_channels=(64, 64), cross_attention_dim=WIDTH)
    encoder = tiny.tiny_encoder(hidden_size=WIDTH)
    preprocessing = {"size": tiny.IMAGE_SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return tiny.tiny_pipeline(unet=unet, conditioner=DinoImageConditioner.from_model(encoder, **preprocessing))


def layers_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("bits", "tolerance", "cosine", "size"), [("8", 0.003, 0.999, 0.7), ("4", 0.03, 0.98, 0.67)])
def test_a_trained_pipeline_generates_nearly_the_same(bits, tolerance, cosine, size):
    pipe = DinoDiffusionPipeline.from_pretrained(BUNDLED)
    images = tiny.random_images(2, size=128)
    plain, tokens = generate(pipe, images), pipe.encode_image(images)
    before = pipe.unet.get_memory_footprint(), pipe.conditioner.get_memory_footprint()
    for model in (pipe.unet, pipe.conditioner):
        assert quantize(model, BitsAndBytesConfig(**BITS[bits])) is model
        assert layers_of(model, LAYER[bits])
    quantized = pipe.encode_image(images)
    assert quantized.dtype == torch.float32
    assert F.cosine_similarity(quantized, tokens, dim=-1).min() > cosine
    difference = np.abs(generate(pipe, images) - plain)
    assert 0 < difference.mean() < tolerance
    after = pipe.unet.get_memory_footprint(), pipe.conditioner.get_memory_footprint()
    assert after[0] < size * before[0]  # most of this UNet is convolutions
    assert after[1] < 0.4 * before[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", ["8", "4"])
def test_what_is_not_quantised_keeps_its_type(images, bits, dtype):
    pipe = wide_pipeline().to(dtype)
    plain = generate(pipe, images)
    for model in (pipe.unet, pipe.conditioner):
        quantize(model, BitsAndBytesConfig(**BITS[bits]))
        assert model.dtype == dtype
    assert pipe.unet.conv_in.weight.dtype == dtype
    assert pipe.conditioner.null_tokens.dtype == pipe.conditioner.heads[0].mean.dtype == torch.float32
    assert np.abs(generate(pipe, images) - plain).mean() < 0.02


def test_layers_may_be_left_and_the_config_is_not_changed():
    unet, config = wide_pipeline().unet, BitsAndBytesConfig(**BITS["8"], llm_int8_skip_modules=["to_q"])
    quantize(unet, config)
    assert config.llm_int8_skip_modules == ["to_q"]
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert type(attention.to_q) is torch.nn.Linear
    assert isinstance(attention.to_k, bnb.nn.Linear8bitLt)


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_encoders(family, bits, tmp_path):
    conditioner = DinoImageConditioner.from_encoder(checkpoint(family, tmp_path), tokens="all")
    pixels = pixels_for(conditioner)
    plain = conditioner(pixels)
    before = len(layers_of(conditioner, torch.nn.Linear))
    quantize(conditioner, BitsAndBytesConfig(**BITS[bits]))
    assert len(layers_of(conditioner, torch.nn.Linear)) == before
    least = 0.98 if bits == "4" and torch.cuda.is_available() else 0.99  # whose kernels round in half precision
    assert F.cosine_similarity(conditioner(pixels), plain, dim=-1).min() > least


@pytest.mark.parametrize("bits", BITS)
def test_reading_the_state_changes_nothing(images, bits):
    pipe = wide_pipeline()
    quantize(pipe.unet, BitsAndBytesConfig(**BITS[bits]))
    first = generate(pipe, images)
    pipe.unet.state_dict()
    assert np.array_equal(generate(pipe, images), first)


@pytest.mark.parametrize("bits", BITS)
def test_saved_models_are_loaded_by_diffusers(without_a_gpu, images, tmp_path, bits):
    pipe = wide_pipeline()
    for model in (pipe.unet, pipe.conditioner):
        quantize(model, BitsAndBytesConfig(**BITS[bits]))
    expected = generate(pipe, images)
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "conditioner/config.json").read_text())["quantization_config"]
    assert saved["load_in_8bit"] == (bits == "8")
    options = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", **options),
        "conditioner": DinoImageConditioner.from_pretrained(tmp_path, subfolder="conditioner", **options),
    }
    for part in parts.values():
        assert layers_of(part, LAYER[bits])
    np.testing.assert_allclose(generate(tiny.tiny_pipeline(**parts), images), expected, atol=0.01)


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("kind", [DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline])
def test_pipelines_are_quantised_as_they_are_loaded(without_a_gpu, images, tmp_path, kind, bits):
    wide_pipeline().save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit",
        quant_kwargs=BITS[bits],
        components_to_quantize=["unet", "conditioner"],
    )
    pipe = kind.from_pretrained(tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32)
    assert layers_of(pipe.unet, LAYER[bits])
    assert layers_of(pipe.conditioner, LAYER[bits])
    assert not layers_of(pipe.vae, LAYER[bits])
    if kind is DiffSegPipeline:
        assert pipe(images, merge_threshold=0.3, relative_threshold=True).masks.shape == (4, 32, 32)
    else:
        given = (images[:1], images[1:2]) if kind is DinoInterpolationPipeline else (images,)
        assert np.isfinite(pipe(*given, num_inference_steps=2, output_type="np").images).all()


def test_attention_maps_of_a_quantised_unet(images):
    pipe = wide_pipeline()
    plain = DiffSegPipeline.from_pipe(pipe).attention_maps(images[:1])
    quantize(pipe.unet, BitsAndBytesConfig(**BITS["8"]))
    assert torch.allclose(DiffSegPipeline.from_pipe(pipe).attention_maps(images[:1]), plain, atol=1e-3)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_lora_is_trained_and_used_on_a_quantised_unet(images, bits, tmp_path):
    pytest.importorskip("peft")
    pipe = wide_pipeline()
    quantize(pipe.unet, BitsAndBytesConfig(**BITS[bits]))
    plain = generate(pipe, images)
    models.add_lora(pipe.unet, rank=4)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    latents, target = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, losses = pipe.encode_image(images), []
    for _ in range(4):
        loss = F.mse_loss(pipe.unet(latents, 500, encoder_hidden_states=embeds).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = generate(pipe, images)
    assert np.abs(adapted - plain).max() > 1e-3
    with pytest.warns(UserWarning, match="rounding errors"):  # peft's: the sum is rounded to 8 or 4 bits anew
        pipe.fuse_lora()
    assert np.abs(generate(pipe, images) - adapted).mean() < (0.005 if bits == "8" else 0.03)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_saved_lora_loads_into_a_quantised_unet(images, bits, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe, other = wide_pipeline(), wide_pipeline()
    other.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(other.unet)))
    in_full = generate(other, images)
    quantize(pipe.unet, BitsAndBytesConfig(**BITS[bits]))
    plain = generate(pipe, images)
    pipe.load_lora_weights(tmp_path)
    assert np.abs(generate(pipe, images) - in_full).mean() < np.abs(plain - in_full).mean()
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe, images), plain)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantised_models_are_offloaded(images, bits):
    pipe = wide_pipeline()
    for model in (pipe.unet, pipe.conditioner):
        quantize(model, BitsAndBytesConfig(**BITS[bits]))
    expected = generate(pipe, images)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        np.testing.assert_allclose(generate(pipe, images), expected, atol=1e-5)


def test_what_cannot_be_quantised(pipe, monkeypatch):
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(TypeError, match=r"diffusers\.BitsAndBytesConfig, got dict"):
        quantize(pipe.unet, {"load_in_8bit": True})
    with pytest.raises(TypeError, match=r"diffusers\.BitsAndBytesConfig"):
        quantize(pipe.unet, TransformersConfig(load_in_8bit=True))
    with pytest.raises(TypeError, match="unet or conditioner, got DinoDiffusionPipeline"):
        quantize(pipe, config)
    quantize(pipe.unet, config)
    with pytest.raises(ValueError, match="UNet2DConditionModel is quantised already"):
        quantize(pipe.unet, config)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.unet.to(torch.bfloat16)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[train\]"):
        quantize(pipe.conditioner, config)


def test_adapters_come_afterwards(pipe):
    pytest.importorskip("peft")
    models.add_lora(pipe.unet, rank=2)
    with pytest.raises(ValueError, match="has adapters: unload them"):
        quantize(pipe.unet, BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu(images, tmp_path, bits, offload):
    plain = generate(wide_pipeline(), images)
    wide_pipeline().save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits[0]}bit",
        quant_kwargs=BITS[bits],
        components_to_quantize=["unet", "conditioner"],
    )
    pipe = DinoDiffusionPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float16)
    assert pipe.unet.device.type == "cuda"
    pipe.enable_model_cpu_offload() if offload else pipe.to("cuda")
    for _ in range(2):
        assert np.abs(generate(pipe, images) - plain).mean() < 0.02
    pipe.save_pretrained(tmp_path / "quantised")
    again = DinoDiffusionPipeline.from_pretrained(tmp_path / "quantised", dtype=torch.float16).to("cuda")
    assert np.abs(generate(again, images) - plain).mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_in_memory_on_a_gpu(images, bits):
    pipe = wide_pipeline().to(torch.float16)
    plain = generate(wide_pipeline(), images)
    for model in (pipe.unet, pipe.conditioner):
        quantize(model, BitsAndBytesConfig(**BITS[bits]), "cuda")
        assert model.device.type == "cuda"
    assert np.abs(generate(pipe.to("cuda"), images) - plain).mean() < 0.02
