"""What `DiffSegPipeline` refuses, and how it says so: before the model runs where that is possible."""

import pytest
import torch
from diffusers import SCMScheduler

import tiny
from diffusers_dino import DiffSegPipeline


@pytest.fixture
def diffseg(pipe):
    return DiffSegPipeline.from_pipe(pipe)


@pytest.mark.parametrize("threshold", [0, -0.5, float("nan"), [0.5, 0], [], "0.5", [None], ["0.5"], [[0.5]]])
def test_thresholds(diffseg, images, threshold):
    diffseg.unet.forward = None  # what is refused never gets there
    with pytest.raises(ValueError, match="`merge_threshold` must be above 0"):
        diffseg(images, merge_threshold=threshold)


@pytest.mark.parametrize("timestep", [-1, 1000, 2.5, True, [], [10, 1000], "300", [None]])
def test_timesteps(diffseg, images, timestep):
    with pytest.raises(ValueError, match="`timestep` must be an integer from 0 to 999"):
        diffseg(images, timestep=timestep)


def test_images_of_different_sizes_need_a_size(diffseg):
    pair = [tiny.random_images(1)[0], tiny.random_images(1, size=48)[0]]
    with pytest.raises(ValueError, match=r"different sizes, \[\(32, 32\), \(48, 48\)\].*`output_size`"):
        diffseg(pair)
    assert diffseg(pair, output_size=40).masks.shape == (2, 40, 40)


def test_an_image_with_nan(diffseg):
    with pytest.raises(ValueError, match="NaN"):
        diffseg(torch.full((3, 32, 32), float("nan")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_merges": 0}, "`num_merges` must be a positive integer"),
        ({"anchors_per_side": 9}, "1 to 8 anchors"),
        ({"anchors_per_side": 0}, "`anchors_per_side` must be a positive integer"),
        ({"size": 30}, "`size` must be a positive multiple of 4"),
        *(
            ({"output_size": size}, "`output_size` must be")
            for size in (0, -1, 2.5, True, "32", (0, 5), (5,), (8, 8, 8), (8, None))
        ),
        ({"output_type": "pil"}, "`output_type` must be one of"),
        ({"weights": {8: 1.0}}, "Side 4 needs a weight"),
    ],
)
def test_other_arguments(diffseg, images, options, message):
    with pytest.raises(ValueError, match=message):
        diffseg(images, **options)


@pytest.mark.parametrize("argument", ["generator", "image_embeds"])
def test_arguments_of_a_wrong_type(diffseg, images, argument):
    with pytest.raises(TypeError, match=argument):
        diffseg(images, **{argument: 42})


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(1, 5, 16), r"shape \(B, S, 32\).*got \(1, 5, 16\)"),
        (torch.zeros(5, tiny.TOKEN_DIM), r"shape \(B, S, 32\).*got \(5, 32\)"),
        (torch.full((1, 5, tiny.TOKEN_DIM), torch.nan), "NaN"),
    ],
    ids=["width", "axes", "NaN"],
)
@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_tokens_that_the_denoiser_does_not_take(images, denoiser, embeds, message):
    parts = {"unet": None, "transformer": tiny.tiny_transformer()} if denoiser == "transformer" else {}
    with pytest.raises(ValueError, match=f"`image_embeds`.*{message}"):
        DiffSegPipeline.from_pipe(tiny.tiny_pipeline(**parts))(images, image_embeds=embeds)


def test_tokens_for_a_unet_without_a_condition():
    pixels = DiffSegPipeline(tiny.tiny_unconditional_unet(), tiny.tiny_scheduler())
    with pytest.raises(ValueError, match="takes no condition"):
        pixels(tiny.random_images(1), image_embeds=torch.zeros(1, 5, tiny.TOKEN_DIM))


def test_no_condition(images):
    diffseg = DiffSegPipeline.from_pipe(tiny.tiny_pipeline(conditioner=None))
    with pytest.raises(ValueError, match="neither a conditioner nor a text encoder"):
        diffseg(images)
    tokens = torch.zeros(1, 5, tiny.TOKEN_DIM)
    for given in ({"image_embeds": tokens}, {"unet_kwargs": {"encoder_hidden_states": tokens}}):
        assert diffseg(images, **given).masks.shape == (4, 32, 32)


def test_a_vae_of_another_model(pipe):
    with pytest.raises(ValueError, match="latents have 3 channels, but the UNet has in_channels=4"):
        DiffSegPipeline.from_pipe(pipe, vae=tiny.tiny_vae(latent_channels=3))


def test_a_pipeline_without_a_unet(pipe):
    from diffusers import DiTPipeline

    transformer = DiTPipeline(transformer=None, vae=pipe.vae, scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="DiTPipeline has no unet"):
        DiffSegPipeline.from_pipe(transformer)


def test_a_unet_that_does_not_say_its_size(images):
    diffseg = DiffSegPipeline.from_pipe(tiny.tiny_pipeline(unet=tiny.tiny_unet(sample_size=None)))
    with pytest.raises(ValueError, match="give `size` in pixels"):
        diffseg(images)
    assert diffseg(images, size=32).masks.shape == (4, 32, 32)


def test_latents_that_overflow(diffseg, images):
    diffseg.vae.encoder.conv_in.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"NaN or infinity.*float16"):
        diffseg(images)


def test_a_number_of_inputs_that_does_not_fit(diffseg, images):
    with pytest.raises(ValueError, match="for 3 images, and there are 4"):
        diffseg(images, image_embeds=torch.zeros(3, 5, tiny.TOKEN_DIM))
    with pytest.raises(ValueError, match="4 are asked for, 2 generators"):
        diffseg(images, add_noise=True, generator=tiny.generators(0, 1))


def test_noise_of_a_scheduler_that_adds_it_in_another_way(pipe, images):
    diffseg = DiffSegPipeline.from_pipe(pipe, scheduler=SCMScheduler())
    with pytest.raises(ValueError, match="add_noise=False"):
        diffseg(images, add_noise=True)
    assert diffseg(images).masks.shape == (4, 32, 32)
    with pytest.raises(ValueError, match="no unet or no scheduler"):
        DiffSegPipeline.from_pipe(pipe, scheduler=None)(images)


@pytest.mark.parametrize("shape", [(20000, 10), (10, 20000), (300000, 1), (1, 300000), (100000, 30)])
def test_extreme_shapes_go_straight_to_the_size_of_the_model(diffseg, shape):
    """20000 x 10 pixels as a square would take 5 GB; here no tensor is much larger than the image or the model's."""
    image = torch.linspace(0, 1, shape[0] * shape[1]).reshape(1, *shape)

    with tiny.LargestTensor() as largest:
        output = diffseg(image)
    assert output.masks.shape == (1, *shape)
    assert largest.nbytes < 4 * (2**20 + 20 * image.numel())


def test_large_images_are_seen_whole_too(diffseg):
    coarse = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    wide, square = (
        torch.nn.functional.interpolate(coarse, size, mode="bilinear") for size in ((50, 5000), (500, 500))
    )
    maps = diffseg.attention_maps(wide)
    torch.testing.assert_close(maps, diffseg.attention_maps(square), atol=1e-3, rtol=5e-2)
    assert not torch.allclose(maps, diffseg.attention_maps(wide[..., 2475:2525]), atol=1e-3)


def test_an_image_without_a_patch(diffseg):
    with pytest.raises(ValueError, match="smaller than a patch"):
        diffseg(torch.zeros(1, 3, 5))
