"""DiffSeg on diffusers' transformers: the image's part of joint attention, the pipeline, and what cannot be read."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, FusedJointAttnProcessor2_0

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline
from diffusers_dino.diffseg.attention import capture_self_attention, self_attention_layers
from diffusers_dino.diffseg.merging import aggregate_attention


def sd3(**overrides):
    """Two blocks of joint attention; the first also has one of the image only, as in Stable Diffusion 3.5."""
    return tiny.tiny_transformer("sd3", **{"dual_attention_layers": (0,), **overrides})


def pixart():
    return tiny.tiny_transformer("pixart")


def run(model, side=8, dtype=torch.float32):
    latents = tiny.gaussian(2, 4, side, side, dtype=dtype)
    tokens = tiny.gaussian(2, 5, tiny.TOKEN_DIM, seed=1, dtype=dtype)
    pooled = {"pooled_projections": tokens[:, 0]} if isinstance(model, SD3Transformer2DModel) else {}
    times = torch.full((2,), 300)
    with torch.no_grad():
        return model(hidden_states=latents, timestep=times, encoder_hidden_states=tokens, **pooled).sample


def explicit_maps(model):
    """Attention of each block written out over image and condition; its image-to-image part, rows brought to sum 1."""
    found = []

    def read(layer: Attention, args, kwargs):
        def heads(x, norm):
            x = x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, condition = kwargs.get("hidden_states", args[0] if args else None), kwargs.get("encoder_hidden_states")
        query, key = heads(layer.to_q(image), layer.norm_q), heads(layer.to_k(image), layer.norm_k)
        if condition is not None and layer.add_k_proj is not None:
            key = torch.cat([key, heads(layer.add_k_proj(condition), layer.norm_added_k)], dim=2)
        whole = (query @ key.transpose(-1, -2) * layer.scale).softmax(-1)  # (B, h, N, N + S)
        part = whole[..., : image.shape[1]]
        found.append(part / part.sum(-1, keepdim=True))

    layers = self_attention_layers(model).values()
    hooks = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in layers]
    run(model)
    for hook in hooks:
        hook.remove()
    return torch.cat(found, dim=1).mean(1)


MODELS = {"joint": sd3, "joint without norms": lambda: sd3(qk_norm=None, dual_attention_layers=()), "cross": pixart}


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_the_explicit_attention_of_the_blocks(name):
    model = MODELS[name]()
    expected, alone = explicit_maps(model), run(model)
    with capture_self_attention(model) as maps:
        assert torch.equal(run(model), alone)  # the model does not notice
    assert set(maps) == {4}  # 8 x 8 latents in patches of 2
    assert (maps[4] - expected).abs().max() <= 1e-5
    assert expected.std() > 1e-4
    torch.testing.assert_close(maps[4].sum(-1), torch.ones(2, 16))
    assert aggregate_attention({4: maps[4][:1]}).shape == (16, 4, 4)


def test_fused_projections_are_read_too():
    model = sd3(dual_attention_layers=(), qk_norm=None)
    expected = explicit_maps(model)
    model.fuse_qkv_projections()
    kinds = {type(layer.processor) for layer in self_attention_layers(model).values()}
    assert FusedJointAttnProcessor2_0 in kinds
    with capture_self_attention(model) as maps:
        run(model)
    assert (maps[4] - expected).abs().max() <= 1e-5
    normed = sd3(dual_attention_layers=())
    normed.fuse_qkv_projections()
    with pytest.raises(ValueError, match="leaves out the norms"), capture_self_attention(normed):
        pass


@pytest.mark.parametrize("name", ["joint", "cross"])
def test_adapters_and_half_precision(name):
    peft = pytest.importorskip("peft")
    model = MODELS[name]()
    adapter = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(adapter, model)
    expected = explicit_maps(model)
    with capture_self_attention(model) as maps:
        run(model)
    assert (maps[4] - expected).abs().max() <= 1e-5
    with capture_self_attention(model.to(torch.bfloat16)) as half:
        run(model, dtype=torch.bfloat16)
    assert half[4].dtype == torch.float32
    assert (half[4] - expected).abs().max() <= 1e-2


def test_blocks_are_chosen_by_name():
    model = sd3()
    with capture_self_attention(model, layers=["transformer_blocks.0.attn2"]) as maps:
        run(model)
    with capture_self_attention(model) as whole:
        run(model)
    assert not torch.allclose(maps[4], whole[4], atol=1e-6)
    with pytest.raises(ValueError, match="no self-attention of side 8"), capture_self_attention(model, sides=[8]):
        run(model)


def test_attention_that_has_no_maps_is_refused_by_name():
    linear = tiny.tiny_transformer("sana")
    message = "SanaTransformer2DModel.*SanaLinearAttnProcessor2_0 of its layer .*attends linearly"
    with pytest.raises(ValueError, match=message), capture_self_attention(linear):
        pass


def test_rotary_positions_are_refused_by_name():
    from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

    model = pixart()
    model.transformer_blocks[1].attn1.set_processor(HunyuanAttnProcessor2_0())
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1.*rotary"), capture_self_attention(model):
        pass


@pytest.mark.parametrize("name", ["joint", "cross"])
def test_latents_that_are_not_square_are_refused(name):
    model = MODELS[name]()
    with pytest.raises(ValueError, match="read as squares"), capture_self_attention(model):
        model(hidden_states=torch.zeros(1, 4, 8, 4), timestep=torch.zeros(1))


@pytest.fixture
def joint() -> DinoDiffusionPipeline:
    flow = FlowMatchEulerDiscreteScheduler()
    return tiny.tiny_pipeline(unet=None, transformer=sd3(), scheduler=flow)


IMAGES = tiny.random_images(2)


def test_the_pipeline_segments_with_cross_attention():
    pipe = DiffSegPipeline.from_pipe(tiny.tiny_pipeline(unet=None, transformer=pixart()))
    maps = pipe.attention_maps(IMAGES)
    assert maps.shape == (2, 16, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(2, 16))


def test_the_pipeline_segments_with_a_transformer_of_a_flow(joint, tmp_path):
    pipe = DiffSegPipeline.from_pipe(joint)
    maps = pipe.attention_maps(IMAGES, timestep=300)
    assert maps.shape == (2, 16, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(2, 16))
    latents = joint.vae.encode(IMAGES.mean(1, keepdim=True) * 2 - 1).latent_dist.mean * joint.vae.config.scaling_factor
    tokens = joint.encode_image(IMAGES)
    with capture_self_attention(joint.transformer) as direct, torch.no_grad():  # the clean latents at time 0.3
        joint.transformer(latents, tokens, tokens[:, 0], torch.full((2,), 300))
    torch.testing.assert_close(maps, torch.stack([aggregate_attention({4: each[None]}) for each in direct[4]]))
    masks = pipe(IMAGES, merge_threshold=0.3, relative_threshold=True).masks
    assert masks.shape == (2, 32, 32)
    pipe.save_pretrained(tmp_path)
    loaded = DiffSegPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.attention_maps(IMAGES, timestep=300), maps)
    noisy = pipe.attention_maps(IMAGES, timestep=900, add_noise=True, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(noisy, maps, atol=1e-6)


def test_what_does_not_fit_a_transformer_is_refused(joint):
    pipe = DiffSegPipeline.from_pipe(joint)
    with pytest.raises(ValueError, match="multiple of 8"):  # four pixels a latent, two latents a patch
        pipe(IMAGES, size=28)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        pipe(IMAGES, size=128)
    with pytest.raises(ValueError, match="`unet_kwargs` are of a UNet"):
        pipe(IMAGES, unet_kwargs={"class_labels": torch.zeros(2)})
    pipe.conditioner = None
    with pytest.raises(ValueError, match="The transformer needs a condition"):
        pipe(IMAGES)
    assert pipe.attention_maps(IMAGES, image_embeds=joint.encode_image(IMAGES)).shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match="one denoiser"):
        DiffSegPipeline.from_pipe(joint, unet=tiny.tiny_unet())
    with tiny.seeded(0):
        unknown = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1)
    with pytest.raises(ValueError, match="DiTTransformer2DModel cannot be used"):
        DiffSegPipeline.from_pipe(joint, transformer=unknown)
    with pytest.raises(ValueError, match="SanaTransformer2DModel cannot be segmented"):
        DiffSegPipeline.from_pipe(joint, transformer=tiny.tiny_transformer("sana")).attention_maps(
            IMAGES, image_embeds=torch.ones(2, 5, 32)
        )
    with pytest.raises(ValueError, match="latents have 4 channels"):
        DiffSegPipeline.from_pipe(joint, transformer=sd3(in_channels=8, out_channels=8))
