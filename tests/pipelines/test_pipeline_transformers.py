"""Pipelines on diffusers' transformers: what holds of a UNet holds of each family, and what does not fit is named."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.evaluation.controls import with_fresh_unet
from diffusers_dino.evaluation.membership.protocol import denoising_errors
from diffusers_dino.hub.folder import part_facts
from diffusers_dino.pipelines import deep_cache
from diffusers_dino.pipelines.lora import save_adapter
from diffusers_dino.training.models import add_lora

OPTIONS = {"num_inference_steps": 2, "output_type": "pt"}


def make(family="sd3", vae=None, conditioner=None, scheduler=None, **overrides) -> DinoDiffusionPipeline:
    return tiny.tiny_pipeline(
        unet=None,
        transformer=tiny.tiny_transformer(family, **overrides),
        vae=vae or tiny.tiny_vae(),
        conditioner=conditioner or tiny.tiny_conditioner(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=2.0),
    )


def vary(pipe, images, *seeds, **options):
    return pipe(images, generator=tiny.generators(*seeds), **{**OPTIONS, **options}).images


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    return make(family)


@pytest.fixture
def images():
    return tiny.random_images(2)


def test_saved_and_loaded_it_makes_the_same_images(pipe, images, tmp_path):
    made = vary(pipe, images, 0, 1)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", type(pipe.transformer).__name__]
    assert not (tmp_path / "unet").exists()
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.denoiser is loaded.transformer
    assert torch.equal(vary(loaded, images, 0, 1), made)
    facts = part_facts(tmp_path)
    assert facts["width of the condition"] == tiny.TOKEN_DIM
    assert "8 x 8 latents in patches of 2 x 2, 2 blocks of width 16" in facts["transformer"]


def test_images_do_not_depend_on_their_batch(pipe, images):
    together = vary(pipe, images, 0, 1)
    single = [vary(pipe, images[i : i + 1], i) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(single), atol=1e-5, rtol=0)
    pipe.enable_fixed_batch(2)
    together = vary(pipe, images, 0, 1, guidance_scale=2.0)
    for i in range(2):
        assert torch.equal(vary(pipe, images[i : i + 1], i, guidance_scale=2.0)[0], together[i])


def test_ends_of_a_path_are_the_variations(pipe, images):
    between = DinoInterpolationPipeline.from_pipe(pipe)
    assert between.transformer is pipe.transformer
    path = between(images[:1], images[1:], [0.0, 1.0], generator=tiny.generators(0), **OPTIONS).images
    for i in range(2):
        assert torch.equal(path[i : i + 1], vary(pipe, images[i : i + 1], 0))


def test_the_condition_and_its_guidance_act(pipe, images):
    made = [vary(pipe, each, 0, guidance_scale=scale) for each in (images[:1], images[1:]) for scale in (1.0, 3.0)]
    assert all(not torch.equal(made[i], made[j]) for i in range(4) for j in range(i))
    off = vary(pipe, images[:1], 0, guidance_scale=3.0, guidance_start=1.0)
    assert torch.equal(off, made[0])


def test_latents_of_16_channels_with_a_shift(family, images):
    vae = tiny.tiny_vae(latent_channels=16, shift_factor=0.1, scaling_factor=1.5)
    pipe = make(family, vae=vae, in_channels=16, out_channels=16)
    latents = vary(pipe, images, 0, 1, output_type="latent")
    pixels = vae.decode(latents / 1.5 + 0.1, return_dict=False)[0]
    assert torch.equal(vary(pipe, images, 0, 1), (pixels / 2 + 0.5).clamp(0, 1))


def test_a_lora_is_trained_saved_weighed_and_fused(pipe, family, images, tmp_path):
    plain = vary(pipe, images, 0, 1)
    add_lora(pipe.denoiser, rank=2, alpha=6)
    for name, weight in pipe.denoiser.named_parameters():
        assert weight.requires_grad == ("lora" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=tiny.generators(0)[0])
    changed = vary(pipe, images, 0, 1)
    save_adapter(pipe.denoiser, tmp_path)
    assert not torch.equal(changed, plain)

    loaded = make(family)
    loaded.load_lora_weights(tmp_path, adapter_name="mine")
    assert torch.equal(vary(loaded, images, 0, 1), changed)
    loaded.set_adapters("mine", 0.0)
    assert torch.equal(vary(loaded, images, 0, 1), plain)
    loaded.set_adapters("mine", 1.0)
    if family == "pixart":
        with pytest.raises(ValueError, match="set_adapters"):
            vary(loaded, images, 0, 1, cross_attention_kwargs={"scale": 0.0})
    else:
        assert torch.equal(vary(loaded, images, 0, 1, cross_attention_kwargs={"scale": 0.0}), plain)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    assert loaded.denoiser.state_dict().keys() == tiny.tiny_transformer(family).state_dict().keys()
    torch.testing.assert_close(vary(loaded, images, 0, 1), changed, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no LoRA weights of a UNet"):
        tiny.tiny_pipeline().load_lora_weights(tmp_path)


def test_attention_is_cached_and_other_caches_are_refused(pipe, images):
    plain = vary(pipe, images, 0, 1, num_inference_steps=8)
    with pytest.raises(TypeError, match="TaylorSeerCacheConfig cannot be used with a"):
        pipe.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="levels of a UNet"):
        deep_cache(pipe.transformer)
    pipe.enable_cache(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))
    assert not torch.equal(vary(pipe, images, 0, 1, num_inference_steps=8), plain)
    pipe.disable_cache()
    assert torch.equal(vary(pipe, images, 0, 1, num_inference_steps=8), plain)


@pytest.mark.parametrize("name", ["enable_freeu", "fuse_qkv_projections"])
def test_what_only_a_unet_has_is_refused(name):
    pipe = make()
    with pytest.raises(ValueError, match=r"[Uu][Nn]et"):
        getattr(pipe, name)()


def test_protocols_take_it(pipe, images):
    errors = denoising_errors(pipe, images, ["a", "b"], timesteps=[100, 500], num_noises=1, progress=False)
    assert errors.shape == (2, 2)
    assert not torch.equal(vary(with_fresh_unet(pipe, seed=3), images, 0, 1), vary(pipe, images, 0, 1))


def test_a_predicted_variance_is_left_out(images):
    pipe = make("pixart", scheduler=tiny.tiny_scheduler(), out_channels=8)
    assert vary(pipe, images, 0, 1).isfinite().all()


class TestWhatDoesNotFit:
    def test_tokens(self, family):
        field = {"sd3": "joint_attention_dim"}.get(family, "caption_channels")
        with pytest.raises(ValueError, match=rf"{field}=32, or the conditioner with projection_dim=48"):
            make(family, **{field: 48})

    def test_the_pooled_token(self, images):
        with pytest.raises(ValueError, match="pooled_projection_dim=32"):
            make(pooled_projection_dim=24)
        with pytest.raises(ValueError, match="pooled_projection_dim=32"):
            make(pooled_projection_dim=48)
        projected = tiny.tiny_conditioner(projection_dim=48)  # as Stable Diffusion 3 has it: 2048 of 4096
        pipe = make(conditioner=projected, joint_attention_dim=48, pooled_projection_dim=24)
        assert vary(pipe, images, 0, 1).isfinite().all()

    def test_channels(self, family):
        with pytest.raises(ValueError, match="4 channels, but the transformer has in_channels=16"):
            make(family, in_channels=16, out_channels=16)

    def test_patches_and_resolution(self, pipe, family, images):
        with pytest.raises(ValueError, match="`height` must be a positive multiple of 8"):
            vary(pipe, images, 0, 1, height=36)
        if family == "sd3":
            with pytest.raises(ValueError, match="pos_embed_max_size=8"):
                vary(pipe, images, 0, 1, width=64)
        assert vary(pipe, images, 0, 1, height=48, width=32).shape[-2:] == (48, 32)

    def test_its_class(self):
        flux = FluxTransformer2DModel(num_layers=0, num_single_layers=1, num_attention_heads=1, attention_head_dim=16)
        with pytest.raises(ValueError, match="FluxTransformer2DModel cannot be used as a denoiser"):
            tiny.tiny_pipeline(unet=None, transformer=flux)

    def test_two_denoisers(self):
        with pytest.raises(ValueError, match="one denoiser"):
            tiny.tiny_pipeline(transformer=tiny.tiny_transformer())

    @pytest.mark.parametrize(
        ("family", "overrides", "message"),
        [
            ("pixart", {"use_additional_conditions": True}, "use_additional_conditions=False"),
            ("pixart", {"out_channels": 12}, "out_channels=12"),
            ("sana", {"guidance_embeds": True}, "guidance_embeds"),
        ],
    )
    def test_other_inputs_and_outputs(self, family, overrides, message):
        with pytest.raises(ValueError, match=message):
            make(family, **overrides)

    def test_schedulers_of_the_other_kind(self, family, pipe, images):
        pipe.scheduler = DDIMScheduler.from_config(tiny.tiny_scheduler().config)
        with pytest.raises(ValueError, match="trained by flow matching"):
            pipe(images)
        other = make(family, scheduler=tiny.tiny_scheduler())
        assert vary(other, images, 0, 1).isfinite().all()
        other.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="not trained by flow matching"):
            other(images)

    def test_guidance_without_null_condition(self, pipe):
        embeds = torch.zeros(1, 5, tiny.TOKEN_DIM)
        pipe.conditioner = None
        with pytest.raises(ValueError, match="null condition"):
            pipe(image_embeds=embeds, guidance_scale=2.0)
        assert vary(pipe, None, 0, image_embeds=embeds, guidance_scale=1.0).shape == (1, 1, 32, 32)
