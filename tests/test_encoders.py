"""Encoders against transformers and timm themselves: tokens, types, graphs, saved weights."""

import shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import FAMILIES, TIMM, TINY, TRANSFORMERS, build, checkpoint, own_forward, pixels_for, wrap
from diffusers_dino.conditioner import DinoImageConditioner
from diffusers_dino.pipelines.compilation import compile_models


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_librarys_own(family, tmp_path):
    folder = checkpoint(family, tmp_path)
    conditioner = DinoImageConditioner.from_encoder(folder, tokens="all")
    expected_globals = (TRANSFORMERS[family] if family in TRANSFORMERS else TIMM[family])[-1]
    encoder = conditioner.image_encoders[0]
    assert encoder.num_global == expected_globals
    pixels = pixels_for(conditioner)
    tokens = conditioner(pixels)
    assert tokens.shape == (2, conditioner.num_tokens, conditioner.token_dim)
    assert conditioner.num_tokens == expected_globals + encoder.num_patches
    assert (tokens - own_forward(build(family), pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_interpolates_positions_the_models_own_way(family, tmp_path):
    patch = 8 if family in TRANSFORMERS else TIMM[family][1]
    size = 5 * patch
    conditioner = DinoImageConditioner.from_encoder(checkpoint(family, tmp_path), tokens="all", size=size)
    assert conditioner.image_size == size
    if family in TRANSFORMERS:
        model = build(family)
    else:
        # timm 1.0.20 by itself expects a pickle
        weights = {"source": "", "state_dict": load_file(tmp_path / family / "model.safetensors")}
        options = {"pretrained_cfg_overlay": weights, "num_classes": 0, "img_size": size}
        model = timm.create_model(f"local-dir:{tmp_path / family}", pretrained=True, **options).eval()
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(model, pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_of_any_layer_are_the_networks_own(family):
    conditioner = wrap(build(family), tokens="patch")
    encoder, images = conditioner.image_encoders[0], torch.rand(2, 3, 50, 40)
    side = encoder.spec.size // encoder.patch
    pixels = conditioner.preprocess(images, crop=False)
    last = conditioner.patch_features(images, layer=encoder.depth)
    assert last.shape == (2, encoder.width, side, side)
    assert torch.allclose(last.flatten(2).transpose(1, 2), conditioner(pixels), atol=1e-5)
    earlier = conditioner.patch_features(images, layer=1)
    if family in TRANSFORMERS:
        options = {"interpolate_pos_encoding": True} if encoder.spec.architecture == "vit" else {}
        normalized = (pixels - encoder.pixel_mean) / encoder.pixel_std
        hidden = encoder.model(normalized, output_hidden_states=True, **options).hidden_states[1]
        assert torch.allclose(earlier.flatten(2).transpose(1, 2), hidden[:, encoder.num_prefix :], atol=1e-5)
    assert not torch.allclose(earlier, last, atol=1e-3)
    assert torch.isfinite(earlier).all()
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        conditioner.patch_features(images, size=encoder.patch + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_needs_nothing_else(family, tmp_path):
    folder = checkpoint(family, tmp_path)
    conditioner = DinoImageConditioner.from_encoder(folder)
    conditioner.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    again = DinoImageConditioner.from_pretrained(tmp_path / "saved")
    pixels = pixels_for(conditioner)
    assert torch.equal(again(pixels), conditioner(pixels))
    assert dict(again.config)["encoders"] == dict(conditioner.config)["encoders"]
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("family", [*TRANSFORMERS, "dinov2-swiglu"])
def test_saved_weights_have_the_names_they_have_on_the_hub(family, tmp_path):
    """Which is what `save_pretrained` of transformers writes, whatever the installed release calls its layers."""
    swiglu = transformers.Dinov2Config(**TINY, use_swiglu_ffn=True)
    model = transformers.Dinov2Model(swiglu).eval() if family == "dinov2-swiglu" else build(family)
    model.save_pretrained(tmp_path / "hub")
    conditioner = wrap(model)
    conditioner.save_pretrained(tmp_path / "saved")
    on_hub = load_file(tmp_path / "hub" / "model.safetensors")
    saved = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    prefix = "image_encoders.0.model."
    assert {name.removeprefix(prefix) for name in saved if name.startswith(prefix)} == set(on_hub)
    assert all(torch.equal(saved[prefix + name], tensor) for name, tensor in on_hub.items())
    pixels = pixels_for(conditioner)
    assert torch.equal(DinoImageConditioner.from_pretrained(tmp_path / "saved")(pixels), conditioner(pixels))


@pytest.mark.parametrize("family", ["dinov2", "timm-dinov2"])
def test_saved_in_several_files(family, tmp_path):
    conditioner = wrap(build(family))
    conditioner.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    pixels = pixels_for(conditioner)
    assert torch.equal(DinoImageConditioner.from_pretrained(tmp_path)(pixels), conditioner(pixels))


@pytest.mark.parametrize("lost", ["heads.0.mean", "null_tokens", "image_encoders.0.model.layernorm.weight"])
def test_incomplete_conditioner_is_refused(lost, tmp_path):
    wrap(build("dinov2")).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"incomplete: 1 tensors.*{lost}"):
        DinoImageConditioner.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_to_one_graph(family, whole):
    """Also the layers do, which are all that is compiled of large encoders."""
    conditioner = wrap(build(family))
    pixels = pixels_for(conditioner)
    expected = conditioner(pixels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_models(conditioner, whole=whole, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (conditioner(pixels) - expected).abs().max() <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of them the trial's


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiles_with_inductor():
    conditioner = wrap(build("dinov2-registers"))
    pixels = pixels_for(conditioner)
    torch._dynamo.reset()
    with torch.no_grad():
        tokens = torch.compile(conditioner, fullgraph=True)(pixels)
        assert (tokens - conditioner(pixels)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, dtype, tmp_path):
    exact = wrap(build(family))
    pixels = pixels_for(exact)
    expected = exact(pixels)
    exact.save_pretrained(tmp_path)
    loaded = DinoImageConditioner.from_pretrained(tmp_path, dtype=dtype)
    cast = wrap(build(family)).to(dtype)
    for half in (loaded, cast):
        assert half.dtype == dtype
        tokens = half(pixels)
        assert tokens.dtype == dtype
        assert (tokens.float() - expected).abs().mean() <= 0.02 * expected.abs().mean()
    assert torch.equal(loaded(pixels), cast(pixels))


@pytest.mark.parametrize("family", ["dinov3", "timm-dinov3", "timm-eva02"])
def test_rotary_positions_stay_float32(family, tmp_path):
    exact = wrap(build(family))
    exact.save_pretrained(tmp_path)
    half = DinoImageConditioner.from_pretrained(tmp_path, dtype=torch.bfloat16)
    rotary = {name: buffer for name, buffer in exact.named_buffers() if "rope" in name}
    assert rotary
    for name, buffer in half.to(torch.float16).named_buffers():
        if name in rotary:
            assert torch.equal(buffer, rotary[name])


@pytest.mark.parametrize("family", ["dinov2", "timm-dinov2"])
def test_model_in_memory_is_copied(family):
    model = build(family)
    conditioner = wrap(model)
    pixels = pixels_for(conditioner)
    before = own_forward(model, pixels)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert (conditioner(pixels) - before).abs().max() <= 1e-5
