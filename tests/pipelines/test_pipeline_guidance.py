"""Guidance by diffusers' guiders, and by a weaker version of the denoiser."""

import copy
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)

import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.pipelines.guidance import guided_prediction
from tiny import generate

logging.getLogger("diffusers").setLevel(logging.ERROR)  # guiders warn that they are experimental
IMAGES = tiny.random_images(2)
MIDDLE = "mid_block.attentions.0.transformer_blocks"
SKIP = LayerSkipConfig([0], MIDDLE)
GUIDERS = {
    "apg": lambda: AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
    "cfg": lambda: ClassifierFreeGuidance(3.0),
    "perturbed": lambda: PerturbedAttentionGuidance(3.0, 2.0, 0.0, 1.0, perturbed_guidance_config=[SKIP]),
    "skip-layer": lambda: SkipLayerGuidance(3.0, 2.0, 0.0, 1.0, skip_layer_config=[SKIP]),
    "skipping": lambda: AutoGuidance(3.0, auto_guidance_config=[SKIP]),
    "tangential": lambda: TangentialClassifierFreeGuidance(3.0),
    "zero-star": lambda: ClassifierFreeZeroStarGuidance(3.0),
}


def weaker_unet(seed: int = 9):
    """The tiny UNet with noise on its weights."""
    unet = tiny.tiny_unet()
    with tiny.seeded(seed), torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


@pytest.fixture
def guided() -> DinoDiffusionPipeline:
    """A pipeline whose condition moves its predictions, with a guide."""
    pipe = tiny.tiny_pipeline(unet=weaker_unet(1), guide=weaker_unet(2))
    pipe.conditioner.null_tokens.copy_(tiny.gaussian(*pipe.conditioner.null_tokens.shape, dtype=torch.float32))
    return pipe


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_classifier_free_guider_is_guidance_scale(guided, rescale):
    options = {"guidance_scale": 3.0, "guidance_rescale": rescale, "guidance_start": 0.25, "guidance_end": 0.75}
    expected = generate(guided, IMAGES, num_inference_steps=4, **options)
    without = generate(guided, IMAGES, num_inference_steps=4)
    guided.guider = ClassifierFreeGuidance(3.0, rescale, start=0.25, stop=0.75)
    found = generate(guided, IMAGES, num_inference_steps=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    guided.guider = None
    assert (generate(guided, IMAGES, num_inference_steps=4) == without).all()


@pytest.mark.parametrize("name", GUIDERS)
def test_each_guider_moves_the_images_and_leaves_the_model_as_it_was(guided, name):
    plain = generate(guided, IMAGES, guidance_scale=1.0)
    guided.guider = GUIDERS[name]()
    first = generate(guided, IMAGES)
    assert np.isfinite(first).all()
    assert not np.allclose(first, plain, atol=1e-4)
    assert (generate(guided, IMAGES) == first).all()  # nothing of a call stays in the guider
    guided.guider = None
    assert (generate(guided, IMAGES, guidance_scale=1.0) == plain).all()


def test_layers_that_a_guider_skips_are_skipped_only_in_its_own_pass(guided):
    guided.guider = SkipLayerGuidance(3.0, 2.0, 0.0, 1.0, skip_layer_config=[SKIP])
    other = generate(guided, IMAGES)
    guided.guider = SkipLayerGuidance(3.0, 0.0, 0.0, 1.0, skip_layer_config=[SKIP])
    assert not np.allclose(generate(guided, IMAGES), other, atol=1e-4)


def test_a_guider_and_a_guide_are_saved_loaded_and_cleared(guided, tmp_path):
    guided.guider = AdaptiveProjectedGuidance(3.0, eta=0.5)
    expected = generate(guided, IMAGES)
    guided.save_pretrained(tmp_path / "with")
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path / "with")
    assert isinstance(loaded.guider, AdaptiveProjectedGuidance)
    assert loaded.guider.eta == 0.5
    assert (generate(loaded, IMAGES) == expected).all()
    loaded.guider = loaded.guide = None
    loaded.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without/guide").exists()
    assert DinoDiffusionPipeline.from_pretrained(tmp_path / "without").guider is None
    other = DinoDiffusionPipeline.from_pretrained(tmp_path / "with", guider=None)
    assert (generate(other, IMAGES) == generate(loaded, IMAGES)).all()


def test_autoguidance_moves_away_from_the_guide(guided):
    generated = generate(guided, IMAGES, guidance_scale=1.0, autoguidance_scale=2.0, num_inference_steps=1)
    timestep = DDIMScheduler.from_config(guided.scheduler.config)
    timestep.set_timesteps(1)
    tokens, noise = guided.encode_image(IMAGES), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = timestep.timesteps[0]
    with torch.no_grad():
        strong, weak = (model(noise, t, tokens).sample for model in (guided.unet, guided.guide))
        latents = timestep.step(2 * strong - weak, t, noise).prev_sample
        expected = guided.vae.decode(latents / guided.vae.config.scaling_factor).sample
    np.testing.assert_allclose(generated, (expected.permute(0, 2, 3, 1).numpy() / 2 + 0.5).clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("component", ["unet", "guide"])
def test_a_guide_may_be_of_another_type(guided, component):
    expected = generate(guided, IMAGES, autoguidance_scale=2.0)
    getattr(guided, component).to(torch.bfloat16)
    found = generate(guided, IMAGES, autoguidance_scale=2.0)
    assert 0 < np.abs(found - expected).mean() < 0.02


def test_both_guidances_add_up_within_the_interval(guided):
    conditional, null, weak = (tiny.gaussian(2, 4, 3, 3, seed=seed) for seed in range(3))
    both = guided_prediction(conditional, null, 3.0, weak, 1.5, 0.0)
    torch.testing.assert_close(both, conditional + 2 * (conditional - null) + 0.5 * (conditional - weak))
    assert guided_prediction(conditional, None, 3.0, None, 1.5, 0.7) is conditional
    free = generate(guided, IMAGES, guidance_scale=1.0)
    options = {"guidance_scale": 3.0, "autoguidance_scale": 2.0}
    assert (generate(guided, IMAGES, guidance_start=0.4, guidance_end=0.5, **options) == free).all()
    assert (generate(guided, IMAGES, **options) != free).any()


def test_a_guide_alone_changes_no_bit_and_each_image_is_its_own(guided):
    bare = DinoDiffusionPipeline.from_pipe(guided, guide=None)
    assert (generate(guided, IMAGES) == generate(bare, IMAGES)).all()
    options = {"autoguidance_scale": 2.0, "guidance_scale": 1.0}
    both = generate(guided, IMAGES, generator=tiny.generators(0, 1), **options)
    one = generate(guided, IMAGES[1:], generator=tiny.generators(1), **options)
    np.testing.assert_allclose(both[1:], one, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "pixart", "sana"])
def test_transformers_are_guided_too(family):
    kind = FlowMatchEulerDiscreteScheduler if family != "pixart" else None
    models = []
    for seed in (1, 2):
        with tiny.seeded(seed), torch.no_grad():
            models.append(tiny.tiny_transformer(family))
            for parameter in models[-1].parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = {"scheduler": kind()} if kind else {}
    pipe = tiny.tiny_pipeline(unet=None, transformer=models[0], guide=models[1], **scheduler)
    pipe.conditioner.null_tokens.copy_(tiny.gaussian(*pipe.conditioner.null_tokens.shape, dtype=torch.float32))
    plain, free = generate(pipe, IMAGES, guidance_scale=3.0), generate(pipe, IMAGES, guidance_scale=1.0)
    assert not np.allclose(generate(pipe, IMAGES, guidance_scale=1.0, autoguidance_scale=2.0), free, atol=1e-4)
    pipe.guider = ClassifierFreeGuidance(3.0)
    unskipped = generate(pipe, IMAGES)
    np.testing.assert_allclose(unskipped, plain, atol=1e-5)
    if family != "pixart":
        pipe.guider = SkipLayerGuidance(3.0, 2.0, 0.0, 1.0, skip_layer_config=[LayerSkipConfig([1])])
        with pytest.raises(ValueError, match="diffusers does not do in a"):
            generate(pipe, IMAGES)
    skip = LayerSkipConfig([0], skip_attention=family == "pixart")  # it finds the blocks by itself
    pipe.guider = SkipLayerGuidance(3.0, 2.0, 0.0, 1.0, skip_layer_config=[skip])
    if family == "sana":  # diffusers finds no feed-forward part in its blocks
        with pytest.raises(ValueError, match="nothing would be skipped"):
            generate(pipe, IMAGES)
    else:
        assert not np.allclose(generate(pipe, IMAGES), unskipped, atol=1e-4)
    with pytest.raises(ValueError, match="differ in their class"):
        DinoDiffusionPipeline.from_pipe(pipe, guider=None, guide=tiny.tiny_unet())


def test_paths_are_guided_too(guided):
    path = DinoInterpolationPipeline.from_pipe(guided)
    options = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.0, "autoguidance_scale": 2.0}
    start = guided(IMAGES[:1], generator=torch.Generator().manual_seed(0), **options).images
    ends = path(IMAGES[:1], IMAGES[1:], [0.0, 1.0], generator=torch.Generator().manual_seed(0), **options).images
    assert (ends[:1] == start).all()


def test_a_guider_serves_one_call_at_a_time_and_may_be_copied(guided):
    guided.guider = GUIDERS["apg"]()
    shared = DinoDiffusionPipeline.from_pipe(guided, scheduler=copy.deepcopy(guided.scheduler))
    own = DinoDiffusionPipeline.from_pipe(shared, guider=copy.deepcopy(guided.guider))
    expected = generate(guided, IMAGES)
    found = []

    def meanwhile(pipe, step, timestep, tensors):
        if not found:
            with pytest.raises(RuntimeError, match=r"guider=copy\.deepcopy"):
                generate(shared, IMAGES)
            found.append(generate(own, IMAGES))
        return {}

    assert (generate(guided, IMAGES, callback_on_step_end=meanwhile) == expected).all()
    assert (found[0] == expected).all()


def test_what_is_no_guider_is_refused(pipe):
    for wrong in (tiny.tiny_scheduler(), 2.0):
        with pytest.raises(TypeError, match="must be one of diffusers' guiders"):
            DinoDiffusionPipeline.from_pipe(pipe, guider=wrong)
    pipe.guider = "cfg"
    with pytest.raises(TypeError, match="got str"):
        generate(pipe, IMAGES)


@pytest.mark.parametrize(
    ("guider", "message"),
    [
        (lambda: SmoothedEnergyGuidance(seg_guidance_layers=[0]), "SmoothedEnergyGuidance asks for .*pred_cond_seg"),
        (lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]), f"no such layers.*{MIDDLE}"),
        (lambda: AutoGuidance(auto_guidance_config=LayerSkipConfig([5], MIDDLE)), r"skip layers \[5\]"),
    ],
)
def test_a_guider_that_asks_for_more_is_refused_by_name(pipe, guider, message):
    pipe.guider = guider()
    with pytest.raises(ValueError, match=message):
        generate(pipe, IMAGES)


def test_a_guider_needs_the_null_condition_and_leaves_no_room_for_another_scale(pipe):
    pipe.guider = ClassifierFreeGuidance(2.0)
    tokens = pipe.encode_image(IMAGES)
    with pytest.raises(ValueError, match="settings of its own"):
        generate(pipe, IMAGES, guidance_scale=3.0)
    pipe.conditioner = None
    with pytest.raises(ValueError, match="no conditioner"):
        generate(pipe, image_embeds=tokens)
    distilled = tiny.tiny_pipeline(unet=tiny.tiny_unet(time_cond_proj_dim=8), guider=ClassifierFreeGuidance(2.0))
    with pytest.raises(ValueError, match="takes the guidance scale as an input"):
        generate(distilled, IMAGES)


def test_a_guider_and_a_cache_do_not_go_together(pipe):
    from diffusers_dino.pipelines.caching import deep_cache

    pipe.enable_cache(deep_cache(pipe.unet))
    pipe.guider = ClassifierFreeGuidance(2.0)
    with pytest.raises(ValueError, match="disable_cache"):
        generate(pipe, IMAGES)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda: tiny.tiny_unet(cross_attention_dim=48), "width of the condition: 48 and 32"),
        (lambda: tiny.tiny_unet(in_channels=8, out_channels=8), "channels of the latents: 8 and 4"),
        (lambda: tiny.tiny_unet(time_cond_proj_dim=8), "distilled"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(pipe, guide, message):
    with pytest.raises(ValueError, match=message):
        DinoDiffusionPipeline.from_pipe(pipe, guide=guide())


def test_a_guide_of_other_tokens_or_another_objective_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)  # notes the condition
    other = tiny.tiny_pipeline(conditioner=tiny.tiny_conditioner(tokens="all"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ in their condition tokens"):
        DinoDiffusionPipeline.from_pipe(pipe, guide=other.unet)
    flow = tiny.tiny_unet()
    flow.register_to_config(_flow_matching=True)
    with pytest.raises(ValueError, match="differ in their flow matching"):
        DinoDiffusionPipeline.from_pipe(pipe, guide=flow)


def test_autoguidance_without_a_guide_is_refused(pipe):
    with pytest.raises(ValueError, match="earlier checkpoint as `guide`"):
        generate(pipe, IMAGES, autoguidance_scale=2.0)
    with pytest.raises(ValueError, match="autoguidance_scale"):
        generate(pipe, IMAGES, autoguidance_scale=-1.0)
