"""Encoders against transformers and timm themselves, from real checkpoints of tiny random networks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_dino.conditioner import DinoImageConditioner
from diffusers_dino.pixels import unit_to_uint8
from tiny import random_images, seeded

MEAN, STD = [0.5307, 0.5, 0.45], [0.2583, 0.25, 0.2]  # as little like ImageNet's as RAD-DINO's
CROPPING = {
    "image_processor_type": "BitImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 36},
    "resample": 3,
    "image_mean": MEAN,
    "image_std": STD,
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 48, "patch_size": 8}
WITH_MLP = {**TINY, "intermediate_size": 64}
TIMM_TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**options: Any) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**WITH_MLP), **options)


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**TINY))


def dinov2_with_registers() -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**TINY, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def dinov3() -> nn.Module:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**WITH_MLP, num_register_tokens=4))


# family: (constructor, number of global tokens)
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "dinov1": (lambda: vit(add_pooling_layer=False), 1),
    "vit-with-pooler": (vit, 2),
    "dinov2": (dinov2, 1),
    "dinov2-registers": (dinov2_with_registers, 5),
    "dinov3": (dinov3, 5),
}
# family: (timm's name, its patch, number of global tokens)
TIMM: dict[str, tuple[str, int, int]] = {
    "timm-dinov1": ("vit_small_patch16_224", 16, 1),
    "timm-dinov2": ("vit_small_patch14_dinov2", 14, 1),
    "timm-dinov2-registers": ("vit_small_patch14_reg4_dinov2", 14, 5),
    "timm-dinov3": ("vit_small_patch16_dinov3", 16, 5),
    "timm-eva02": ("eva02_tiny_patch14_224", 14, 1),
    "timm-deit-distilled": ("deit_tiny_distilled_patch16_224", 16, 2),
    "timm-beit": ("beit_base_patch16_224", 16, 1),
}
FAMILIES = [*TRANSFORMERS, *TIMM]


def save_transformers(model: nn.Module, folder: Path, processor: dict[str, Any] = CROPPING) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_timm(model: nn.Module, folder: Path, **pretrained_cfg: Any) -> Path:
    """A folder as timm itself publishes it."""
    timm.models.save_for_hf(model, folder, model_args=dict(model._model_args), safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    side = model.patch_embed.img_size[0]
    config["pretrained_cfg"] |= {"input_size": [3, side, side], "mean": MEAN, "std": STD, **pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def timm_model(family: str, patches: int = 3) -> nn.Module:
    name, patch, _ = TIMM[family]
    return timm.create_model(name, num_classes=0, img_size=patches * patch, **TIMM_TINY)


def build(family: str) -> nn.Module:
    with seeded(7):
        model = TRANSFORMERS[family][0]() if family in TRANSFORMERS else timm_model(family)
        for parameter in model.parameters():  # biases, registers and layer scales start at constants
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def checkpoint(family: str, folder: Path) -> Path:
    save = save_transformers if family in TRANSFORMERS else save_timm
    return save(build(family), folder / family)


def normalized(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def own_forward(model: nn.Module, pixels: Tensor) -> Tensor:
    """All tokens by the library's own call."""
    with torch.no_grad():
        if not isinstance(model, transformers.PreTrainedModel):
            return model.forward_features(normalized(pixels))
        options = {"interpolate_pos_encoding": True} if isinstance(model, transformers.ViTModel) else {}
        output = model(normalized(pixels), **options)
    sequence = output.last_hidden_state
    if getattr(model, "pooler", None) is None:
        return sequence
    return torch.cat([sequence[:, :1], output.pooler_output[:, None], sequence[:, 1:]], dim=1)


def pixels_for(conditioner: DinoImageConditioner, count: int = 2) -> Tensor:
    side = conditioner.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


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
        model = timm.create_model(
            f"local-dir:{tmp_path / family}", pretrained=True, num_classes=0, img_size=size
        ).eval()
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(model, pixels)).abs().max() <= 1e-5


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


def test_checkpoint_in_several_files(tmp_path):
    model = build("dinov2")
    folder = save_transformers(model, tmp_path / "x")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    conditioner = DinoImageConditioner.from_encoder(folder, tokens="all")
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(model, pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_in_half_precision_is_loading_then_casting(family, tmp_path):
    folder = checkpoint(family, tmp_path)
    loaded = DinoImageConditioner.from_encoder(folder, dtype=torch.bfloat16)
    pixels = pixels_for(loaded)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(pixels), DinoImageConditioner.from_encoder(folder).to(torch.bfloat16)(pixels))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_to_one_graph(family):
    conditioner = wrap(build(family))
    pixels = pixels_for(conditioner)
    torch._dynamo.reset()
    compiled = torch.compile(conditioner, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(pixels) - conditioner(pixels)).abs().max() <= 1e-5


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
    loaded = DinoImageConditioner.from_pretrained(tmp_path, torch_dtype=dtype)
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
    half = DinoImageConditioner.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    rotary = {name: buffer for name, buffer in exact.named_buffers() if "rope" in name}
    assert rotary
    for name, buffer in half.to(torch.float16).named_buffers():
        if name in rotary:
            assert torch.equal(buffer, rotary[name])


def wrap(model: nn.Module, **options: Any) -> DinoImageConditioner:
    native = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 32
    return DinoImageConditioner.from_model(
        model, **{"size": native, "mean": MEAN, "std": STD, "tokens": "all", **options}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_memory_is_copied(family):
    model = build(family)
    conditioner = wrap(model)
    pixels = pixels_for(conditioner)
    before = own_forward(model, pixels)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert (conditioner(pixels) - before).abs().max() <= 1e-5


def test_dinov1_pooler_that_the_checkpoint_does_not_hold_is_not_made_up(tmp_path):
    folder = checkpoint("dinov1", tmp_path)
    # what a plain load does: a random pooler, another one each time
    poolers = [transformers.ViTModel.from_pretrained(folder).pooler.dense.weight for _ in range(2)]
    assert not torch.equal(*poolers)
    first, second = (DinoImageConditioner.from_encoder(folder) for _ in range(2))
    assert first.num_tokens == 1
    pixels = pixels_for(first)
    assert torch.equal(first(pixels), second(pixels))


def test_dinov2_class_token_is_not_given_twice(tmp_path):
    assert DinoImageConditioner.from_encoder(checkpoint("dinov2", tmp_path)).num_tokens == 1


def test_classification_checkpoint_loads_without_its_head(tmp_path):
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY, num_labels=3)).eval()
    conditioner = DinoImageConditioner.from_encoder(save_transformers(model, tmp_path / "classifier"), tokens="all")
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(model.dinov2, pixels)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "size", "resample"),
    [
        ({}, 32, "bicubic"),
        ({"crop_size": 40}, 40, "bicubic"),
        ({"do_center_crop": False, "size": {"shortest_edge": 24}, "resample": 2}, 24, "bilinear"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, "resample": 0}, 16, None),
        ({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 64}}, 64, "bicubic"),
    ],
    ids=["crop", "crop-int", "shortest-edge", "height-width", "fast"],
)
def test_preprocessing_is_the_processors(changes, size, resample, tmp_path):
    processor = {**CROPPING, **changes}
    if processor["image_processor_type"] != "BitImageProcessor":
        processor = {key: value for key, value in processor.items() if "crop" not in key}
    folder = save_transformers(build("dinov2"), tmp_path / "rad-dino", processor)
    (spec,) = DinoImageConditioner.from_encoder(folder).config["encoders"]
    assert (spec["size"], spec["resample"]) == (size, resample or "nearest")
    assert spec["mean"] == pytest.approx(MEAN)
    assert spec["std"] == pytest.approx(STD)
    assert (spec["source"], spec["revision"]) == ("rad-dino", None)


def test_old_feature_extractor_configs_are_read(tmp_path):
    old = {"feature_extractor_type": "ViTFeatureExtractor", "image_mean": MEAN, "image_std": STD, "size": 48}
    folder = save_transformers(build("dinov1"), tmp_path / "dino", {**old, "resample": 3, "do_resize": True})
    assert DinoImageConditioner.from_encoder(folder).image_size == 48


def test_other_rescaling_is_folded_into_mean_and_std(tmp_path):
    """A processor that maps to 0..2 before its mean, and one that does not normalise."""
    double = save_transformers(build("dinov2"), tmp_path / "double", {**CROPPING, "rescale_factor": 2 / 255})
    (spec,) = DinoImageConditioner.from_encoder(double).config["encoders"]
    assert spec["mean"] == pytest.approx([v / 2 for v in MEAN])
    plain = save_transformers(build("dinov2"), tmp_path / "plain", {**CROPPING, "do_normalize": False})
    (spec,) = DinoImageConditioner.from_encoder(plain).config["encoders"]
    assert (spec["mean"], spec["std"]) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("side", [20, 100])
def test_pixels_match_the_image_processor(side, resample, tmp_path):
    """Without its cut after the resize, which is left out on purpose; the processor rounds to 8 bits in between."""
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"resample": resample, "image_mean": MEAN, "image_std": STD}
    folder = save_transformers(build("dinov1"), tmp_path / "dino", processor)
    image = PIL.Image.fromarray(unit_to_uint8(random_images(1, size=side)[0]).permute(1, 2, 0).numpy())
    expected = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    pixels = normalized(DinoImageConditioner.from_encoder(folder).preprocess(image))
    assert (pixels - expected).abs().max() <= 2 / 255 / min(STD)


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:", ""])
@pytest.mark.parametrize("family", ["timm-dinov2-registers", "dinov3"])
def test_hub_checkpoint_and_its_commit(family, prefix, tmp_path):
    """The layout that huggingface_hub keeps on disk, read offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--encoder"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint(family, tmp_path), repository / "snapshots" / commit)
    conditioner = DinoImageConditioner.from_encoder(
        f"{prefix}org/encoder", tokens="all", cache_dir=tmp_path, local_files_only=True
    )
    (spec,) = conditioner.config["encoders"]
    assert (spec["source"], spec["revision"]) == ("org/encoder", commit)
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(build(family), pixels)).abs().max() <= 1e-5


def test_timm_name_stands_for_its_hub_repository(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--timm--vit_small_patch14_reg4_dinov2.lvd142m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint("timm-dinov2-registers", tmp_path), repository / "snapshots" / commit)
    for name in ("vit_small_patch14_reg4_dinov2", "timm/vit_small_patch14_reg4_dinov2.lvd142m"):
        conditioner = DinoImageConditioner.from_encoder(name, cache_dir=tmp_path, local_files_only=True)
        assert conditioner.config["encoders"][0]["source"] == "timm/vit_small_patch14_reg4_dinov2.lvd142m"


def test_timm_preprocessing(tmp_path):
    folder = save_timm(build("timm-dinov2"), tmp_path / "x", interpolation="bilinear", crop_pct=0.875)
    conditioner = DinoImageConditioner.from_encoder(f"local-dir:{folder}")
    (spec,) = conditioner.config["encoders"]
    assert (spec["size"], spec["resample"], spec["mean"], spec["std"]) == (42, "bilinear", MEAN, STD)


def test_resampling_without_a_counterpart_is_said(tmp_path, caplog):
    folder = save_transformers(build("dinov2"), tmp_path / "x", {**CROPPING, "resample": 1})
    assert DinoImageConditioner.from_encoder(folder).config["encoders"][0]["resample"] == "bicubic"
    assert "lanczos" in caplog.text


def test_timm_model_without_class_token(tmp_path):
    model = timm.create_model("vit_small_patch16_224", img_size=32, class_token=False, global_pool="avg", **TIMM_TINY)
    conditioner = wrap(model.eval(), tokens="patch")
    assert conditioner.num_tokens == 4
    for tokens in ("global", "cls"):
        with pytest.raises(ValueError, match="tokens='patch'"):
            wrap(model, tokens=tokens)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "dinov3_convnext"}, "dinov3_convnext"),
        ({"architecture": "resnet50", "pretrained_cfg": {}}, "resnet50"),
        ({"architecture": "no_such_network"}, "no_such_network"),
        ({}, "no architecture"),
    ],
)
def test_unknown_family_names_the_supported_ones(config, found, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{found}.*DINOv1.*RAD-DINO.*DINOv3 ViT.*timm"):
        DinoImageConditioner.from_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"ResNetModel.*DINOv1.*timm"):
        wrap(transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)))


def test_network_with_a_head_is_refused():
    with pytest.raises(ValueError, match=r"Dinov2ForImageClassification.*base model"):
        wrap(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY)))


@pytest.mark.parametrize("family", ["dinov2", "timm-dinov2"])
def test_pickle_is_not_opened(family, tmp_path):
    folder = checkpoint(family, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin, a pickle.*safetensors"):
        DinoImageConditioner.from_encoder(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds none"):
        DinoImageConditioner.from_encoder(folder)


@pytest.mark.parametrize("family", ["dinov2", "timm-dinov2"])
def test_corrupt_weights(family, tmp_path):
    weights = checkpoint(family, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt"):
        DinoImageConditioner.from_encoder(weights.parent)


def test_missing_weights_are_not_made_up(tmp_path):
    weights = checkpoint("dinov2", tmp_path) / "model.safetensors"
    state = load_file(weights)
    del state["layernorm.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*layernorm\.weight"):
        DinoImageConditioner.from_encoder(weights.parent)


def test_folder_without_config_and_a_name_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DinoImageConditioner.from_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DinoImageConditioner.from_encoder(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor an id"):
        DinoImageConditioner.from_encoder("./no/such/folder")


def test_missing_preprocessing(tmp_path):
    folder = checkpoint("dinov2", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json.*from_model"):
        DinoImageConditioner.from_encoder(folder)


@pytest.mark.parametrize("size", [{"height": 32, "width": 48}, {"longest_edge": 32}])
def test_processor_of_oblong_images(size, tmp_path):
    processor = {**CROPPING, "image_processor_type": "ViTImageProcessor", "do_center_crop": False, "size": size}
    folder = save_transformers(build("dinov1"), tmp_path / "x", processor)
    with pytest.raises(ValueError, match="give `size`"):
        DinoImageConditioner.from_encoder(folder)
    assert DinoImageConditioner.from_encoder(folder, size=40).image_size == 40


@pytest.mark.parametrize("family", ["dinov1", "dinov2", "dinov3", "timm-dinov1", "timm-dinov3"])
def test_size_must_hold_whole_patches(family, tmp_path):
    with pytest.raises(ValueError, match=r"33 is not a multiple of the patch.*size=32 or"):
        DinoImageConditioner.from_encoder(checkpoint(family, tmp_path), size=33)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 0),
        ("size", 32.0),
        ("mean", [0.5]),
        ("std", [0, 1, 1]),
        ("std", [1, 1, torch.nan]),
        ("resample", "box"),
    ],
)
def test_preprocessing_that_makes_no_sense(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must"):
        wrap(build("dinov2"), **{option: value})


def test_timm_model_of_another_size_or_unknown_arguments():
    model = build("timm-dinov1")
    with pytest.raises(ValueError, match="dynamic_img_size"):
        wrap(model, size=64)
    with pytest.raises(ValueError, match="model_args"):
        wrap(model, model_args={"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 48})


def test_encoders_of_gray_images_are_refused():
    with pytest.raises(ValueError, match="1 channels"):
        wrap(transformers.Dinov2Model(transformers.Dinov2Config(**TINY, num_channels=1)))


@pytest.mark.parametrize("argument", ["attn_implementation", "checkpoint_path"])
def test_config_cannot_point_at_code_or_files(argument, tmp_path):
    wrap(build("dinov2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoders"][0]["arguments"][argument] = "someone/else"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=argument):
        DinoImageConditioner.from_pretrained(tmp_path)
