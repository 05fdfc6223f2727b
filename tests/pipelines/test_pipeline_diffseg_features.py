"""`DiffSegPipeline` on features in place of attention maps: of the UNet, the encoder, or both; cuts and clusters."""

import pytest
import torch

import tiny
from diffusers_dino import DiffSegPipeline
from diffusers_dino.diffseg import FeatureClusters, capture_features, cut_features, stack_features, suppress
from diffusers_dino.diffseg.attention import self_attention_layers


@pytest.fixture(scope="module")
def diffseg():
    return DiffSegPipeline.from_pipe(tiny.tiny_pipeline())


@pytest.fixture(scope="module")
def images():
    return tiny.random_images(4)


OF_UNET, OF_ENCODER = {"timestep": 50}, {"encoder_size": 40}


@pytest.mark.parametrize(
    ("features", "options"),
    [("unet", OF_UNET), ("encoder", OF_ENCODER), (["unet", "encoder"], OF_UNET | OF_ENCODER)],
    ids=["unet", "encoder", "both"],
)
def test_cuts_of_features_by_hand(diffseg, images, features, options):
    output = diffseg(images[:2], features=features, cut_threshold=0.9, **options)
    assert output.masks.shape == (2, 32, 32)
    made = diffseg.patch_features(images[:2], features, **options)
    for i in range(2):
        expected = cut_features(made[i], 0.9)
        assert torch.allclose(output.maps[i], expected, atol=1e-5)
        assert torch.equal(output.masks[i], suppress(output.maps[i], 32))


def test_features_of_the_unet_are_what_its_layers_give(diffseg, images):
    with capture_features(diffseg.unet) as captured:
        diffseg.attention_maps(images, 50)
    assert torch.equal(captured[0], diffseg.patch_features(images, "unet", timestep=50))
    several = diffseg.patch_features(images, "unet", timestep=50, layers=["up_blocks"])
    with capture_features(diffseg.unet, ["up_blocks"]) as captured:
        diffseg.attention_maps(images, 50)
    assert torch.allclose(several, stack_features(captured), atol=1e-6)
    with capture_features(diffseg.unet, self_attention_layers(diffseg.unet)) as captured:
        diffseg.attention_maps(images, 50)
    every = diffseg.patch_features(images, "unet", timestep=50, layers="all")
    assert torch.allclose(every, stack_features(captured), atol=1e-6)


def test_features_of_the_encoder_need_no_unet(diffseg, images):
    alone = DiffSegPipeline(conditioner=diffseg.conditioner)
    made = alone.patch_features(images, encoder_layer=1)
    side = diffseg.conditioner.image_size // diffseg.conditioner.image_encoders[0].patch
    assert made.shape == (4, tiny.TOKEN_DIM, side, side)
    assert torch.equal(made, diffseg.patch_features(images, encoder_layer=1))
    assert alone(images, features="encoder").masks.shape == (4, 32, 32)
    with pytest.raises(ValueError, match="no unet or no scheduler"):
        alone(images)


def test_walks_on_attention(diffseg, images):
    maps = diffseg.attention_maps(images, 300)
    few, many = (diffseg.segment(maps, merging="ncut", cut_threshold=t, walk_steps=2) for t in (0.8, 1.5))
    assert sum(few.num_segments) < sum(many.num_segments)
    called = diffseg(images, 300, merging="ncut", cut_threshold=1.5, output_size=8)
    assert torch.equal(called.masks, many.masks)


def test_clusters_bring_their_features_along(diffseg, images, tmp_path):
    clusters = diffseg.fit_clusters(images.split(2), 3, features=["unet", "encoder"], timestep=9, encoder_size=40)
    clusters.save(tmp_path / "clusters.safetensors")
    loaded = FeatureClusters.load(tmp_path / "clusters.safetensors")
    output = diffseg(images, clusters=loaded, output_size=(20, 30))
    assert output.masks.shape == (4, 20, 30)
    made = diffseg.patch_features(images, ["unet", "encoder"], timestep=9, encoder_size=40)
    for i in range(4):
        assert torch.allclose(output.maps[i], clusters.assign(made)[i], atol=1e-5)
    for other in ({"features": "unet"}, {"merging": "ncut"}, {"timestep": 9}, {"encoder_size": 40}):
        with pytest.raises(ValueError, match="take the place of merging"):
            diffseg(images, clusters=loaded, **other)
    fitted_with = diffseg.fit_clusters([images], 3, features="unet", unet_kwargs={})
    assert torch.equal(
        diffseg(images, clusters=fitted_with, unet_kwargs={}).masks, diffseg(images, clusters=fitted_with).masks
    )
    single = diffseg(images[2], clusters=loaded, output_size=(20, 30))
    assert (single.masks[0] == output.masks[2]).float().mean() > 0.98  # a segment's number is the same in any batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "tokens"}, "`features` must be one of"),
        ({"features": ["unet", "unet"]}, "each once"),
        ({"features": []}, "one or several"),
        ({"merging": "mean"}, "`merging` must be one of"),
        ({"features": "unet", "merging": "kl"}, "of attention maps"),
        ({"merging": "ncut", "cut_threshold": 0}, "`cut_threshold` must be above 0"),
        ({"merging": "ncut", "walk_steps": 0}, "`walk_steps` must be a positive integer"),
        ({"features": "unet", "layers": ["nowhere"]}, "no self-attention in"),
        ({"encoder_size": 40}, "`encoder_size` would change nothing"),
        ({"features": "unet", "encoder_size": 40}, "`encoder_size` would change nothing"),
        ({"features": "encoder", "size": 64, "timestep": 9}, "`timestep` and `size` would change nothing"),
        ({"cut_threshold": 0.3}, "`cut_threshold` would change nothing"),
        ({"merging": "ncut", "refine": True}, "`refine` would change nothing"),
        ({"features": "encoder", "merge_threshold": 0.2, "sides": [4]}, "`sides` and `merge_threshold` would change"),
        ({"features": "encoder", "encoder_size": 41}, "not a multiple of the patch"),
        ({"features": "encoder", "encoder_layer": 99}, "layers of .* are 1 to"),
        ({"features": "encoder", "encoder_layer": True}, "layers of .* are 1 to"),
    ],
    ids=str,
)
def test_what_is_refused(diffseg, images, options, message):
    with pytest.raises(ValueError, match=message):
        diffseg(images, **options)


def test_without_a_conditioner():
    pixels = DiffSegPipeline(tiny.tiny_unconditional_unet(), tiny.tiny_scheduler())
    with pytest.raises(ValueError, match="no conditioner, whose encoder makes features"):
        pixels(tiny.random_images(1), features="encoder")
    assert pixels(tiny.random_images(1), features="unet").masks.shape == (1, 32, 32)
    transformer = DiffSegPipeline.from_pipe(tiny.tiny_pipeline(unet=None, transformer=tiny.tiny_transformer()))
    assert transformer.patch_features(tiny.random_images(1), "unet").ndim == 4
