"""Checkpoints of encoders: what is read from them, with which preprocessing, and what is refused."""

import json
import shutil

import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import (
    CROPPING,
    FAMILIES,
    MEAN,
    STD,
    TINY,
    build,
    checkpoint,
    create_timm_model,
    normalized,
    own_forward,
    pixels_for,
    save_timm,
    save_transformers,
    wrap,
)
from diffusers_dino.conditioner import DinoImageConditioner
from diffusers_dino.pixels import unit_to_uint8
from tiny import random_images


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


def test_dinov1_pooler_that_the_checkpoint_does_not_hold_is_not_made_up(tmp_path):
    folder = checkpoint("dinov1", tmp_path)
    # what a plain load does: a random pooler, another one each time
    poolers = [transformers.ViTModel.from_pretrained(folder).pooler.dense.weight for _ in range(2)]
    assert not torch.equal(*poolers)
    first, second = (DinoImageConditioner.from_encoder(folder) for _ in range(2))
    assert first.num_tokens == 1
    pixels = pixels_for(first)
    assert torch.equal(first(pixels), second(pixels))


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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_of_the_hub(place, name, family):
    """The layout that huggingface_hub keeps on disk, read offline."""
    repository = place / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint(family, place), repository / "snapshots" / COMMIT)
    return {"cache_dir": place, "local_files_only": True}


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:", ""])
@pytest.mark.parametrize("family", ["timm-dinov2-registers", "dinov3"])
def test_hub_checkpoint_and_its_commit(family, prefix, tmp_path):
    cache = cache_of_the_hub(tmp_path, "org/encoder", family)
    conditioner = DinoImageConditioner.from_encoder(f"{prefix}org/encoder", tokens="all", **cache)
    (spec,) = conditioner.config["encoders"]
    assert (spec["source"], spec["revision"]) == ("org/encoder", COMMIT)
    pixels = pixels_for(conditioner)
    assert (conditioner(pixels) - own_forward(build(family), pixels)).abs().max() <= 1e-5


def test_timm_name_stands_for_its_hub_repository(tmp_path):
    cache = cache_of_the_hub(tmp_path, "timm/vit_small_patch14_reg4_dinov2.lvd142m", "timm-dinov2-registers")
    for name in ("vit_small_patch14_reg4_dinov2", "timm/vit_small_patch14_reg4_dinov2.lvd142m"):
        conditioner = DinoImageConditioner.from_encoder(name, **cache)
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


@pytest.mark.parametrize("num_classes", [0, 3])
def test_timm_checkpoint_that_lacks_weights_is_refused(num_classes, tmp_path):
    """timm itself fills in random ones where the checkpoint has a classifier."""
    model = create_timm_model("vit_small_patch16_224", img_size=32, num_classes=num_classes)
    folder = save_timm(model, tmp_path / "whole")
    assert DinoImageConditioner.from_encoder(folder).num_tokens == 1
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.mlp.fc2.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fill its network(.|\n)*blocks.1.mlp.fc2.weight"):
        DinoImageConditioner.from_encoder(folder)


def test_timm_model_without_class_token(tmp_path):
    model = create_timm_model("vit_small_patch16_224", img_size=32, class_token=False, global_pool="avg")
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
    with pytest.raises(FileNotFoundError, match="'org/no-such' is not a folder here, and the Hub gave no encoder"):
        DinoImageConditioner.from_encoder("org/no-such", cache_dir=tmp_path)


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
