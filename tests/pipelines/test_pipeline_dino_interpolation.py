"""`DinoInterpolationPipeline`: its ends are reconstructions, its noise is one, its arguments are checked."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline
from tiny import generate, generators

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # of NumPy, in diffusers' schedulers
    "ignore:Should have ta>=t0:UserWarning",  # of torchsde, which rounds
)

SCHEDULERS = [
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", {}, {"eta": 1.0}),
    ("DDPMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("DPMSolverSDEScheduler", {}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("PNDMScheduler", {}, {"num_inference_steps": 4}),
]


@pytest.fixture
def between(pipe):
    return DinoInterpolationPipeline.from_pipe(pipe)


def walk(between, *args, **options):
    defaults = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return between(*args, **{**defaults, **options}).images


@pytest.mark.parametrize(("name", "overrides", "options"), SCHEDULERS)
def test_the_ends_of_a_path_are_reconstructions_bit_for_bit(pipe, between, images, name, overrides, options):
    pipe.scheduler = between.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **overrides)
    path = walk(between, images[:1], images[1:2], fractions=[0.0, 0.5, 1.0], **options)
    np.testing.assert_array_equal(path[0], generate(pipe, images[:1], **options)[0])
    np.testing.assert_array_equal(path[2], generate(pipe, images[1:2], **options)[0])
    assert np.abs(path[1] - path[0]).max() > 1e-4
    alone = walk(between, images[:1], images[1:2], fractions=[0.0], **options)
    np.testing.assert_array_equal(alone[0], path[0])


def test_the_ends_of_a_batch_of_paths_are_reconstructions_of_the_batch(pipe, between, images):
    options = {"num_images_per_prompt": 2}
    paths = walk(between, images[:2], images[2:], fractions=[0.0, 0.3, 1.0], **options)
    assert paths.shape == (2 * 2 * 3, 32, 32, 1)
    np.testing.assert_array_equal(paths[0::3], generate(pipe, images[:2], **options))
    np.testing.assert_array_equal(paths[2::3], generate(pipe, images[2:], **options))


def test_every_point_is_a_reconstruction_from_its_tokens(pipe, between, images):
    seeds = [5, 6]
    source, target = pipe.encode_image(images[:2]), pipe.encode_image(images[2:])
    paths = walk(between, images[:2], images[2:], fractions=[0.25, 0.75], generator=generators(*seeds))
    for number, fraction in enumerate([0.25, 0.75]):
        tokens = torch.lerp(source, target, fraction)
        expected = generate(pipe, image_embeds=tokens, generator=generators(*seeds))
        np.testing.assert_array_equal(paths[number::2], expected)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
@pytest.mark.parametrize("generator", [None, 0, [0]])
def test_between_identical_images_nothing_changes_unless_the_noise_may(between, images, name, generator):
    between.scheduler = getattr(diffusers, name).from_config(between.scheduler.config)
    if generator is not None:
        generator = generators(0)[0] if generator == 0 else generators(0)
    for method in ("lerp", "slerp"):
        path = walk(between, images[:1], images[:1], fractions=[0, 0.4, 1], method=method, generator=generator)
        np.testing.assert_allclose(path, path[:1].repeat(3, axis=0), atol=1e-4)
    moving = walk(between, images[:1], images[:1], fractions=[0, 1], generator=generator, same_noise=False)
    assert np.abs(moving[0] - moving[1]).max() > 1e-3


def test_without_a_generator_the_global_seed_decides(between, images):
    def seeded(seed):
        torch.manual_seed(seed)
        return walk(between, images[:1], images[1:2], fractions=[0.5], generator=None)

    assert np.array_equal(seeded(1), seeded(1))
    assert not np.array_equal(seeded(1), seeded(2))


def test_a_generator_ends_where_one_reconstruction_leaves_it(pipe, between, images):
    one, other = generators(3, 3)
    walk(between, images[:1], images[1:2], generator=one)
    generate(pipe, images[:1], generator=other)
    assert torch.equal(one.get_state(), other.get_state())


def test_given_noise_is_that_of_every_point(pipe, between, images):
    noise = torch.randn(1, 4, 8, 8, generator=generators(9)[0])
    path = walk(between, images[:1], images[1:2], fractions=[0, 1], latents=noise)
    np.testing.assert_array_equal(path[:1], generate(pipe, images[:1], latents=noise))
    np.testing.assert_array_equal(path[1:], generate(pipe, images[1:2], latents=noise))


def test_images_of_different_sizes_and_types_make_a_path(between):
    gray = PIL.Image.new("L", (48, 100), 90)
    gray.paste(200, (0, 0, 24, 100))
    colour = tiny.random_images(1, size=64)
    assert walk(between, gray, colour).shape == (5, 32, 32, 1)
    assert walk(between, [gray, gray], [gray, PIL.Image.new("RGB", (33, 70))]).shape == (10, 32, 32, 1)
    assert walk(between, gray, colour, height=16, width=24).shape == (5, 16, 24, 1)


def test_each_side_may_be_images_or_tokens(between, images):
    source, target = between.encode_image(images[:1]), between.encode_image(images[1:2])
    expected = walk(between, images[:1], images[1:2])
    np.testing.assert_array_equal(walk(between, source_embeds=source, target_embeds=target), expected)
    np.testing.assert_array_equal(walk(between, images[:1], target_embeds=target), expected)


def test_pairs_may_have_fractions_of_their_own(between, images):
    both = walk(between, images[:2], images[2:], fractions=torch.tensor([[0.0, 0.5], [1.0, 0.2]]))
    first = walk(between, images[:2], images[2:], fractions=[0.0, 0.5])
    np.testing.assert_allclose(both[:2], first[:2], atol=1e-5)
    second = walk(between, images[:2], images[2:], fractions=[1.0, 0.2])
    np.testing.assert_allclose(both[2:], second[2:], atol=1e-5)
    np.testing.assert_array_equal(walk(between, images[:2], images[2:], fractions=0.5)[0], first[1])


def test_methods_and_norms_differ_between_the_ends_alone(between, images):
    paths = [
        walk(between, images[:1], images[1:2], fractions=[0, 0.5, 1], **options)
        for options in ({}, {"method": "slerp"}, {"restore_norm": True})
    ]
    for other in paths[1:]:
        np.testing.assert_array_equal(other[[0, 2]], paths[0][[0, 2]])
        assert np.abs(other[1] - paths[0][1]).max() > 1e-5


def test_interpolated_tokens(between, images):
    source, target = between.encode_image(images[:2]), between.encode_image(images[2:])
    tokens = between.interpolate(source, target, [0, 0.5, 1], method="slerp")
    assert tokens.shape == (2, 3, 5, tiny.TOKEN_DIM)
    assert torch.equal(tokens[:, 0], source)
    assert torch.equal(tokens[:, 2], target)
    expected = (source.norm(dim=-1) + target.norm(dim=-1)) / 2
    torch.testing.assert_close(tokens[:, 1].norm(dim=-1), expected)
    half = between.interpolate(source.bfloat16(), target.bfloat16(), [0.0, 0.3])
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[:, 0], source.bfloat16())


def test_mixtures_of_several_images(pipe, between, images):
    embeds = pipe.encode_image(images[:3])
    tokens = between.mix(embeds, [[1, 0, 0], [0, 0, 1], [0.2, 0.3, 0.5]])
    assert torch.equal(tokens[:2], embeds[[0, 2]])
    blend = (embeds * torch.tensor([0.2, 0.3, 0.5])[:, None, None]).sum(0)
    torch.testing.assert_close(tokens[2], blend)
    assert torch.equal(between.mix(embeds.bfloat16(), [0.0, 1.0, 0.0]), embeds[1:2].bfloat16())
    mixtures = generate(pipe, image_embeds=tokens, generator=generators(0, 0, 0))  # under the same noise
    np.testing.assert_allclose(mixtures[:1], generate(pipe, images[:1], generator=generators(0)), atol=1e-5)
    np.testing.assert_allclose(mixtures[1:2], generate(pipe, images[2:3], generator=generators(0)), atol=1e-5)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([[0.5, 2.0]], r"Fractions must be in \[0, 1\]"),
        *((fractions, "must be F numbers, or .* with P = 1 pairs") for fractions in ([], [[0.5], [0.5]], [[[0.5]]])),
    ],
)
def test_fractions_that_are_none(between, images, fractions, message):
    with pytest.raises(ValueError, match=message):
        walk(between, images[:1], images[1:2], fractions=fractions)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 0.5], [1.5, -0.5]], "must not be negative"),
        ([], "one weight for each of the 2 images"),
        (torch.zeros(0, 2), r"\(K,\) or \(M, K\)"),
    ],
)
def test_weights_that_are_no_weights(between, images, weights, message):
    with pytest.raises(ValueError, match=message):
        between.mix(between.encode_image(images[:2]), weights)


def test_arguments_that_do_not_go_together(between, images):
    a, b = images[:1], images[1:2]
    embeds = between.encode_image(a)
    with pytest.raises(ValueError, match="either `source` or `source_embeds`"):
        walk(between, target=b)
    with pytest.raises(ValueError, match="either `target` or `target_embeds`"):
        walk(between, a, b, target_embeds=embeds)
    with pytest.raises(ValueError, match="Each source needs its target"):
        walk(between, images[:2], b)
    with pytest.raises(ValueError, match="`method` must be one of"):
        walk(between, a, b, method="cubic")
    with pytest.raises(ValueError, match=r"`source_embeds` must have shape \(B, 5, 32\)"):
        walk(between, source_embeds=embeds[:, :3], target=b)
    with pytest.raises(TypeError, match="`target_embeds` must be a tensor"):
        walk(between, a, target_embeds=embeds.numpy())
    with pytest.raises(ValueError, match="2 are asked for, 10 generators"):
        walk(between, images[:2], images[2:], generator=generators(*range(10)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        walk(between, a, target_embeds=embeds * float("nan"))


def test_callbacks_and_the_progress_bar_see_every_point_anew(between, images, capsys):
    seen = []

    def stop_and_unguide(pipeline, step, timestep, tensors):
        seen.append((step, pipeline.guidance_scale, tensors["image_embeds"][0, 0, 0].item()))
        pipeline._guidance_scale = 1.0
        pipeline._interrupt = step == 1
        return {}

    names = ["latents", "image_embeds"]
    between.set_progress_bar_config(disable=False)
    watched = {"callback_on_step_end": stop_and_unguide, "callback_on_step_end_tensor_inputs": names}
    walk(between, images[:1], images[1:2], fractions=[0, 1], **watched)
    assert [(step, scale) for step, scale, _ in seen] == [(0, 2.0), (1, 1.0)] * 2
    assert seen[0][2] != seen[2][2]
    assert "/6" in capsys.readouterr().err


def test_it_loads_from_any_pipeline_of_these_components_and_saves_under_its_name(pipe, between, images, tmp_path):
    pipe.save_pretrained(tmp_path / "diffusion")
    loaded = DinoInterpolationPipeline.from_pretrained(tmp_path / "diffusion")
    path = walk(between, images[:1], images[1:2])
    np.testing.assert_array_equal(walk(loaded, images[:1], images[1:2]), path)
    loaded.save_pretrained(tmp_path / "interpolation")
    assert '"_class_name": "DinoInterpolationPipeline"' in (tmp_path / "interpolation/model_index.json").read_text()
    back = DinoDiffusionPipeline.from_pretrained(tmp_path / "interpolation")
    np.testing.assert_array_equal(generate(back, images[:1])[0], path[0])
    assert DinoDiffusionPipeline.from_pipe(between).unet is pipe.unet


def test_half_precision_keeps_the_ends(pipe, between, images):
    pipe.to(torch.bfloat16)
    path = walk(between, images[:1], images[1:2], fractions=[0, 1])
    np.testing.assert_array_equal(path[:1], generate(pipe, images[:1]))
    np.testing.assert_array_equal(path[1:], generate(pipe, images[1:2]))
