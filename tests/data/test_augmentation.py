import pytest
import torch

from diffusers_dino.data import Augmentation
from diffusers_dino.data.images.augmentation import sharpen

IDENTITY = {"sharpness": 0, "shear": 0, "translation": 0, "scale": (1, 1)}


@pytest.fixture
def images() -> torch.Tensor:
    coarse = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")


def test_draws_depend_on_seed_epoch_and_key_alone(images):
    augment = Augmentation()
    keys, epochs = ["a", "b", "c", "d"], [0, 0, 1, 1]
    batch = augment(images, keys, 3, epochs)
    for i in range(4):
        alone = augment(images[i : i + 1], keys[i : i + 1], 3, epochs[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone)
    assert not torch.allclose(batch, augment(images, keys, 4, epochs))
    assert not torch.allclose(batch, augment(images, keys, 3, [5] * 4))
    assert not torch.allclose(batch, augment(images, list("efgh"), 3, epochs))


def test_range_and_shape_are_kept(images):
    for channels in (1, 3):
        augmented = Augmentation(sharpness=5)(images.expand(-1, channels, -1, -1), list("abcd"), 0, [0] * 4)
        assert augmented.shape == (4, channels, 32, 32)
        assert 0 <= augmented.min() <= augmented.max() <= 1


def test_no_change_asked_none_made(images):
    torch.testing.assert_close(Augmentation(**IDENTITY)(images, list("abcd"), 0, [0] * 4), images, atol=1e-5, rtol=0)


def test_never_flips_by_default_and_always_if_asked(images):
    flipped = Augmentation(**IDENTITY, flip=1.0)(images, list("abcd"), 0, [0] * 4)
    torch.testing.assert_close(flipped, images.flip(-1), atol=1e-5, rtol=0)
    assert Augmentation().flip == 0


def test_extremes_of_the_draws_are_the_papers(images):
    """A draw of 0 or just below 1 gives the ends of the ranges."""
    spot = torch.zeros(2, 1, 101, 101)
    spot[:, :, 30:71, 30:71] = 1
    uniform = torch.full((2, 7), 0.5)
    uniform[0, 1], uniform[1, 1] = 0.0, 1.0  # scale 0.9 and 1.4
    areas = Augmentation(sharpness=0).apply(spot, uniform).sum(dim=(1, 2, 3))
    assert areas[0] == pytest.approx(41**2 * 0.9**2, rel=0.02)
    assert areas[1] == pytest.approx(41**2 * 1.4**2, rel=0.02)
    uniform = torch.full((1, 7), 0.5)
    uniform[0, 4] = 1.0  # horizontal shift
    shifted = Augmentation(sharpness=0, scale=(1, 1)).apply(spot[:1], uniform)[0, 0]
    center = (shifted.sum(dim=0) * torch.arange(101)).sum() / shifted.sum()
    assert abs(center - 50) == pytest.approx(0.05 * 101, abs=0.1)


def test_sharpening_raises_contrast_at_edges_alone():
    step = torch.full((1, 1, 8, 8), 0.25)
    step[..., 4:] = 0.75
    sharper = sharpen(step, torch.ones(1))
    assert sharper[0, 0, 0, 3] < 0.25
    assert sharper[0, 0, 0, 4] > 0.75
    assert torch.equal(sharper[..., :2], step[..., :2])
    assert torch.equal(sharpen(step, torch.zeros(1)), step)


@pytest.mark.parametrize(
    "options", [{"shear": -1}, {"scale": (1.4, 0.9)}, {"scale": (0, 1)}, {"scale": (1, 1, 1)}, {"flip": 1.5}]
)
def test_bad_ranges(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)
