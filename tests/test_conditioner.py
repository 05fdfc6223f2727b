"""The conditioner's own work: which tokens, in which units, in which type, kept how."""

import json

import accelerate
import PIL.Image
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from diffusers_dino.conditioner import DinoImageConditioner
from diffusers_dino.encoders import EncoderSpec
from diffusers_dino.encoders.tokens import semi_orthogonal

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGES = tiny.random_images(24)


def vit(size=24, width=16):
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=size,
        patch_size=4,
        hidden_dropout_prob=0.5,
    )
    with tiny.seeded(5):
        return transformers.ViTModel(config)


def several(**options) -> DinoImageConditioner:
    """DINOv2 with registers at 32 px and width 32, beside a ViT with a pooler at 24 px and width 16."""
    first, second = tiny.tiny_conditioner(), DinoImageConditioner.from_model(vit(), size=24, **HALF)
    specs = [*first.config["encoders"], *second.config["encoders"]]
    built = DinoImageConditioner(
        **{"encoders": specs, "tokens": "global", "projection_dim": 20, "projection_seed": 0, **options}
    )
    for encoder, source in zip(built.image_encoders, (first, second), strict=True):
        encoder.load_state_dict(source.image_encoders[0].state_dict())
    return built


@pytest.mark.parametrize(
    ("tokens", "slots"), [("global", [0, 1, 2, 3, 4]), ("cls", [0]), ("patch", range(5, 21)), ("all", range(21))]
)
def test_choice_of_tokens(tokens, slots):
    everything = tiny.tiny_conditioner(tokens="all").encode(IMAGES[:2])
    conditioner = tiny.tiny_conditioner(tokens=tokens)
    chosen = conditioner.encode(IMAGES[:2])
    assert torch.equal(chosen, everything[:, list(slots)])
    assert (conditioner.num_tokens, conditioner.token_dim) == chosen.shape[1:]


def test_trained_pooler_follows_the_class_token():
    model = vit().eval()
    conditioner = DinoImageConditioner.from_model(model, size=24, **HALF)
    pixels = conditioner.preprocess(IMAGES[:2])
    with torch.no_grad():
        output = model(pixels * 2 - 1)
    expected = torch.stack([output.last_hidden_state[:, 0], output.pooler_output], dim=1)
    assert (conditioner(pixels) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("tokens", ["global", "all"])
def test_several_encoders_side_by_side(tokens, tmp_path):
    both = several(tokens=tokens)
    assert both.image_size == (32, 24)
    pixels = both.preprocess(IMAGES[:3])
    assert [tuple(p.shape) for p in pixels] == [(3, 3, 32, 32), (3, 3, 24, 24)]
    encoded = both(pixels)
    first = tiny.tiny_conditioner(tokens=tokens)
    assert encoded.shape == (3, both.num_tokens, 20)
    alone = first(pixels[0]) @ both.heads[0].projection.T
    assert torch.allclose(encoded[:, : first.num_tokens], alone, atol=1e-5)
    both.fit_normalization(IMAGES.split(8))
    both.save_pretrained(tmp_path)
    again = DinoImageConditioner.from_pretrained(tmp_path)
    assert torch.equal(again.encode(IMAGES[:3]), both.encode(IMAGES[:3]))


def test_several_encoders_compile_to_one_graph():
    both = several(tokens="all")
    pixels = both.preprocess(IMAGES[:3])
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(both, fullgraph=True, backend="eager")(pixels), both(pixels), atol=1e-5)


def test_several_checkpoints(tmp_path):
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 3}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name in ("a", "b"):
        tiny.tiny_encoder().save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(processor))
    folders = [tmp_path / "a", tmp_path / "b"]
    both = DinoImageConditioner.from_encoder(folders, size=[32, 16])
    assert both.image_size == (32, 16)
    assert both.encode(IMAGES[:2]).shape == (2, 10, 32)
    with pytest.raises(ValueError, match=r"`size` has 3 values for 2 encoders"):
        DinoImageConditioner.from_encoder(folders, size=[32, 16, 8])
    with pytest.raises(ValueError, match="at least one encoder"):
        DinoImageConditioner.from_encoder([])


def test_several_encoders_want_a_common_width_and_all_their_pixels():
    with pytest.raises(ValueError, match=r"\[32, 16\].*projection_dim"):
        several(projection_dim=None)
    both = several()
    with pytest.raises(ValueError, match="2 encoders, got 1"):
        both(both.preprocess(IMAGES[:1])[0])
    with pytest.raises(ValueError, match="positive"):
        several(projection_dim=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_projection_is_semi_orthogonal(rows, columns, seed):
    matrix = semi_orthogonal(rows, columns, torch.Generator().manual_seed(seed))
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    assert torch.allclose(gram, torch.eye(min(rows, columns)), atol=1e-5)


def test_wider_projection_keeps_all_distances():
    plain, projected = tiny.tiny_conditioner(), tiny.tiny_conditioner(projection_dim=48)
    a, b = plain.encode(IMAGES[:8]).flatten(0, 1), projected.encode(IMAGES[:8]).flatten(0, 1)
    assert b.shape[1] == projected.token_dim == 48
    assert torch.allclose(torch.pdist(a), torch.pdist(b), atol=1e-4)


def test_projection_is_seeded_and_saved(tmp_path):
    one, same, other = (tiny.tiny_conditioner(projection_dim=8, projection_seed=s) for s in (1, 1, 2))
    assert torch.equal(one.heads[0].projection, same.heads[0].projection)
    assert not torch.equal(one.heads[0].projection, other.heads[0].projection)
    one.heads[0].projection.mul_(2)  # as if another LAPACK had made it
    one.save_pretrained(tmp_path)
    again = DinoImageConditioner.from_pretrained(tmp_path)
    assert torch.equal(again.heads[0].projection, one.heads[0].projection)


def test_fitted_tokens_are_standard(tmp_path):
    conditioner = tiny.tiny_conditioner(tokens="all")
    raw = conditioner.encode(IMAGES)
    conditioner.fit_normalization(IMAGES.split(10), slot_offset=0)
    tokens = conditioner.encode(IMAGES)
    slots = [*tokens[:, :5].unbind(1), tokens[:, 5:].flatten(0, 1)]
    for slot in slots:
        assert slot.mean(0).abs().max() <= 1e-3
        assert slot.std(0).max() <= 1 + 1e-3
        assert slot.std(0).median() == pytest.approx(1, abs=1e-3)
    patches = raw[:, 5:].flatten(0, 1)
    assert torch.allclose(conditioner.heads[0].mean[5], patches.mean(0), atol=1e-5)
    conditioner.save_pretrained(tmp_path)
    assert torch.equal(DinoImageConditioner.from_pretrained(tmp_path).encode(IMAGES), tokens)


def test_slots_keep_apart_by_a_fixed_mean_of_their_own():
    plain, marked = tiny.tiny_conditioner(), tiny.tiny_conditioner()
    plain.fit_normalization([IMAGES], slot_offset=0)
    marked.fit_normalization([IMAGES], slot_offset=0.5)
    offsets = marked.encode(IMAGES) - plain.encode(IMAGES)  # (B, S, D)
    assert torch.allclose(offsets, offsets[:1].expand_as(offsets), atol=1e-4)  # the same for every image
    assert offsets[0].std(-1).tolist() == pytest.approx([0.5] * 5, rel=0.4)
    similarity = torch.corrcoef(offsets[0]) - torch.eye(5)
    assert similarity.abs().max() < 0.6  # another one for every slot


def test_fit_does_not_depend_on_batches_nor_on_an_earlier_fit():
    one, other = tiny.tiny_conditioner(), tiny.tiny_conditioner()
    one.fit_normalization(IMAGES.split(24))
    other.fit_normalization(IMAGES[:16] for _ in range(2))
    other.fit_normalization([list(IMAGES[:7]), IMAGES[7:]])
    assert torch.allclose(one.heads[0].mean, other.heads[0].mean, atol=1e-6)
    assert torch.allclose(one.heads[0].std, other.heads[0].std, atol=1e-6)


def test_patch_tokens_alone_share_statistics():
    conditioner = tiny.tiny_conditioner(tokens="patch")
    conditioner.fit_normalization(IMAGES.split(8))
    assert conditioner.heads[0].mean.shape == (1, 32)
    assert conditioner.encode(IMAGES).flatten(0, 1).mean(0).abs().max() <= 1e-3


def test_constant_channels_are_not_blown_up():
    model = tiny.tiny_encoder()
    model.layernorm.weight.data[:4] = 0  # these channels are their bias, exactly
    model.layernorm.weight.data[4:8] = 1e-4  # and these nearly
    conditioner = DinoImageConditioner.from_model(model, size=32, **HALF)
    conditioner.fit_normalization(IMAGES.split(8), slot_offset=0)
    tokens = conditioner.encode(IMAGES)
    assert tokens[..., :4].abs().max() <= 1e-3
    assert tokens[..., 4:8].std(0).max() <= 0.1
    model.layernorm.weight.data.zero_()
    conditioner = DinoImageConditioner.from_model(model, size=32, **HALF)
    conditioner.fit_normalization(IMAGES.split(8))
    assert torch.isfinite(conditioner.encode(IMAGES)).all()


def test_fit_on_too_few_images_changes_nothing():
    conditioner = tiny.tiny_conditioner()
    for batches in ([], [IMAGES[:15]]):
        with pytest.raises(ValueError, match=f"at least 16 images, got {15 if batches else 0}"):
            conditioner.fit_normalization(batches)
    assert conditioner.heads[0].mean.eq(0).all()
    assert conditioner.heads[0].std.eq(1).all()


def test_fit_refuses_tokens_that_are_not_finite():
    model = tiny.tiny_encoder()
    model.layernorm.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        DinoImageConditioner.from_model(model, size=32, **HALF).fit_normalization(IMAGES.split(8))


def test_null_condition_is_zero_until_set_and_is_saved(tmp_path):
    conditioner = tiny.tiny_conditioner(projection_dim=12)
    assert conditioner.null_condition(3).shape == (3, 5, 12)
    assert conditioner.null_condition(1).eq(0).all()
    null = torch.randn(5, 12)
    conditioner.null_tokens.copy_(null)
    conditioner.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = DinoImageConditioner.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(again.null_tokens, null)
        assert torch.equal(again.null_condition(2), null.to(dtype).expand(2, -1, -1))


def test_encoders_stay_frozen_and_in_evaluation_mode():
    conditioner = DinoImageConditioner.from_model(vit(), size=24, **HALF)  # with a dropout of a half
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert conditioner.train() is conditioner
    assert not any(module.training for module in conditioner.modules())
    assert torch.equal(conditioner.encode(IMAGES), conditioner.encode(IMAGES))


def test_gradients_reach_pixels_of_any_size():
    conditioner = tiny.tiny_conditioner()
    images = tiny.random_images(2, size=45).requires_grad_()
    conditioner.encode(images).square().sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad[..., :44, :44].abs().amax(dim=(0, 1)).gt(0).float().mean() > 0.9
    assert not any(p.grad is not None for p in conditioner.parameters())


def test_no_graph_without_need():
    conditioner = tiny.tiny_conditioner().requires_grad_(True)  # even if someone thawed it
    assert not conditioner.encode(IMAGES[:1]).requires_grad
    with torch.no_grad():
        assert not conditioner.encode(IMAGES[:1].clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_survive_half_precision(dtype, tmp_path):
    conditioner = tiny.tiny_conditioner(projection_dim=8)
    conditioner.fit_normalization(IMAGES.split(8))
    exact = dict(conditioner.state_dict())
    conditioner.save_pretrained(tmp_path)
    loaded = DinoImageConditioner.from_pretrained(tmp_path, dtype=dtype)
    for half in (loaded, tiny.tiny_conditioner(projection_dim=8).to(dtype)):
        assert half.dtype == dtype
        assert {b.dtype for b in half.buffers()} == {torch.float32}
        assert {p.dtype for p in half.parameters()} == {dtype}
    for name in ("heads.0.mean", "heads.0.std", "heads.0.projection"):
        assert torch.equal(loaded.state_dict()[name], exact[name])
    loaded.to(torch.float32)
    assert loaded.encode(IMAGES[:1]).dtype == torch.float32


def test_square_is_the_central_one():
    image = torch.zeros(3, 32, 64)
    image[..., 16:48] = 0.5
    (pixels,) = tiny.tiny_conditioner().preprocess(image)
    assert torch.equal(pixels, torch.full((3, 32, 32), 0.5))


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("side", [8, 31, 32, 300])
def test_resizing_stays_in_range_and_ignores_the_rest_of_the_batch(resample, side):
    conditioner = tiny.tiny_conditioner(resample=resample)
    noise = torch.rand(3, side, side + 5, generator=torch.Generator().manual_seed(0))
    alone = conditioner.preprocess(noise)
    assert alone.shape == (1, 3, 32, 32)
    assert alone.min() >= 0
    assert alone.max() <= 1
    assert torch.equal(conditioner.preprocess([IMAGES[0], noise, PIL.Image.new("L", (90, 50))])[1], alone[0])
    assert torch.equal(conditioner.preprocess(torch.stack([noise.flip(0), noise, 1 - noise]))[1], alone[0])


def test_downsizing_is_antialiased():
    stripes = torch.arange(256).remainder(2).float().expand(3, 256, 256)
    pixels = tiny.tiny_conditioner().preprocess(stripes)
    assert (pixels[..., 2:-2] - 0.5).abs().max() <= 0.02


def test_images_smaller_than_a_patch():
    with pytest.raises(ValueError, match=r"smaller than a patch.*7 pixels, a patch 8"):
        tiny.tiny_conditioner().encode(torch.rand(3, 7, 100))


@pytest.mark.parametrize("shape", [(1, 3, 40, 40), (1, 1, 32, 32), (3, 32, 32), (1, 3, 32, 31)])
def test_forward_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="preprocess"):
        tiny.tiny_conditioner()(torch.rand(shape))


@pytest.mark.parametrize("key", ["tokens", "projection_dim", "encoders"])
def test_misspelt_key_in_a_saved_config(key, tmp_path):
    tiny.tiny_conditioner().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[f"{key}s"] = config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((TypeError, ValueError), match=key):
        DinoImageConditioner.from_pretrained(tmp_path)


def test_misspelt_key_of_an_encoder():
    values = dict(tiny.tiny_conditioner().config["encoders"][0])
    values["stdev"] = values.pop("std")
    with pytest.raises(ValueError, match=r"missing or unknown: std, stdev"):
        EncoderSpec.from_dict(values)


def test_config_records_preprocessing_and_source(tmp_path):
    conditioner = tiny.tiny_conditioner(source="tiny-dino", resample="bilinear")
    conditioner.save_pretrained(tmp_path)
    (spec,) = json.loads((tmp_path / "config.json").read_text())["encoders"]
    assert {key: spec[key] for key in ("size", "resample", "mean", "std", "source", "revision")} == {
        "size": 32,
        "resample": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "source": "tiny-dino",
        "revision": None,
    }


def test_sequential_offloading_keeps_the_tokens():
    conditioner = tiny.tiny_conditioner()
    conditioner.fit_normalization(IMAGES.split(8))
    expected = conditioner.encode(IMAGES[:2])
    accelerate.cpu_offload(conditioner, torch.device("cpu"))  # as `enable_sequential_cpu_offload` does
    assert conditioner.device.type == "meta"
    assert torch.equal(conditioner.encode(IMAGES[:2]), expected)
    assert torch.equal(conditioner.null_condition(2), torch.zeros(2, 5, 32))


def test_a_conditioner_with_other_tokens_shares_its_encoders(conditioner, images, tmp_path):
    conditioner.fit_normalization([tiny.random_images(16, seed=1)])
    other = conditioner.with_tokens("all")
    assert conditioner.with_tokens(None) is conditioner.with_tokens("global") is conditioner
    assert other.num_tokens == 5 + 16
    weight = next(conditioner.image_encoders.parameters())
    assert next(other.image_encoders.parameters()).data_ptr() == weight.data_ptr()
    plain = tiny.tiny_conditioner(tokens="all")  # the statistics stayed behind
    torch.testing.assert_close(other.encode(images), plain.encode(images))
    other.fit_normalization([tiny.random_images(16, seed=1)])
    other.save_pretrained(tmp_path)
    loaded = DinoImageConditioner.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images), other.encode(images))
    with pytest.raises(ValueError, match="must be one of global, cls, patch, all"):
        conditioner.with_tokens("registers")
