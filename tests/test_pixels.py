"""Every accepted type of image reaches the same unit range; everything else is refused with a reason."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dino.pixels import (
    resize_unit,
    stored_images,
    to_unit,
    unit_to_uint8,
    unit_to_vae,
    unit_to_xrv,
    vae_to_unit,
)
from image_files import peak_of
from tiny import LargestTensor

RGB = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(RGB),
        PIL.Image.fromarray(RGB).convert("RGBA"),
        RGB,
        RGB.astype(np.float32) / 255,
        RGB.astype(np.float64) / 255,
        np.ascontiguousarray(RGB[::-1, ::-1])[::-1, ::-1],
        np.dstack([RGB, np.full((5, 7, 1), 255, np.uint8)]),
        EXPECTED,
        EXPECTED.double(),
        torch.from_numpy(RGB).permute(2, 0, 1),
    ],
    ids=lambda image: f"{type(image).__name__}-{image.mode if isinstance(image, PIL.Image.Image) else image.dtype}",
)
def test_all_types_agree(image):
    (unit,) = to_unit(image)
    assert unit.dtype == torch.float32
    assert unit.shape == (3, 5, 7)
    assert torch.allclose(unit, EXPECTED, atol=1e-7)


MODES = ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_pil_modes_show_the_same_gray(mode):
    gray = PIL.Image.new("L", (6, 4), 100)
    via = {"La": "LA", "PA": "P", "RGBa": "RGBA", "RGBX": "RGB", "HSV": "RGB"}.get(mode)
    image = (gray.convert(via) if via else gray).convert(mode)
    assert image.mode == mode
    (unit,) = to_unit(image)
    assert unit.shape == (3, 4, 6)
    assert torch.equal(unit * 255, torch.full((3, 4, 6), 100.0))


@pytest.mark.parametrize(
    ("image", "value"),
    [(PIL.Image.new("1", (2, 2), 1), 1.0), (PIL.Image.new("F", (2, 2), 0.25), 0.25), (np.ones((3, 3), bool), 1.0)],
    ids=["one bit", "float", "mask"],
)
def test_images_of_one_value(image, value):
    assert to_unit(image)[0].unique().tolist() == [value]


def test_palette_image_shows_its_colours():
    image = PIL.Image.fromarray(RGB[:2, :2]).quantize(4)
    assert image.mode == "P"
    assert (to_unit(image)[0] - EXPECTED[:, :2, :2]).abs().max() <= 2 / 255


def test_palette_image_with_a_transparent_colour():
    image = PIL.Image.new("P", (3, 3), 0)
    image.putpalette([200, 100, 50])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert to_unit(PIL.Image.open(buffer))[0].max() == 0


def test_alpha_is_composited_on_black():
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[..., 3] = 51
    for image in (rgba, PIL.Image.fromarray(rgba), rgba.astype(np.float32) / 255):
        assert torch.allclose(to_unit(image)[0], torch.tensor(200 / 255 * 0.2), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint32, ">u2", ">i4"])
def test_wide_integers_span_their_own_range(dtype):
    image = np.array([[100, 3000], [1550, 100]]).astype(dtype)
    assert torch.allclose(to_unit(image)[0][1], torch.tensor([[0, 1], [0.5, 0]]))


def test_a_batch_of_wide_integers_is_stretched_image_by_image():
    units = to_unit(np.stack([np.eye(3, dtype=np.uint16) * 10, np.eye(3, dtype=np.uint16) * 1000])[..., None])
    assert torch.equal(units[0], units[1])


def test_signed_extremes_and_constant_images():
    assert to_unit(np.array([[-(2**31), 2**31 - 1]], np.int32))[0][0].tolist() == [[0, 1]]
    assert to_unit(np.full((2, 2), 700, np.uint16))[0].max() == 0


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_pil_images_of_16_and_32_bits(mode):
    levels = np.array([[0, 30000], [60000, 15000]])
    raw = levels.astype({"I;16": "<u2", "I;16B": ">u2", "I": "=i4"}[mode])
    image = PIL.Image.frombytes(mode, (2, 2), raw.tobytes())
    assert torch.allclose(to_unit(image)[0][0], torch.tensor([[0, 0.5], [1, 0.25]]))


def test_batches_and_lists():
    assert len(to_unit(torch.rand(4, 1, 5, 6))) == 4
    assert len(to_unit(np.random.default_rng(0).random((4, 5, 6, 3)))) == 4
    mixed = to_unit([PIL.Image.new("L", (3, 2)), np.zeros((5, 4), np.uint8), torch.rand(2, 3, 7, 7)])
    assert [tuple(u.shape) for u in mixed] == [(3, 2, 3), (3, 5, 4), (3, 7, 7), (3, 7, 7)]


def test_tensors_keep_their_graph():
    x = torch.rand(1, 4, 4, dtype=torch.float64, requires_grad=True)
    to_unit(x)[0].sum().backward()
    assert x.grad.unique().tolist() == [3.0]


def test_the_callers_array_is_not_shared():
    image = np.zeros((3, 3), np.float32)
    (unit,) = to_unit(image)
    image += 1
    assert unit.max() == 0


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "no image"),
        (np.zeros((0, 4, 4, 3)), ValueError, "no image"),
        (np.zeros((4, 0, 3)), ValueError, "no pixels"),
        (PIL.Image.new("L", (0, 5)), ValueError, "no pixels"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.int32), ValueError, "no image"),
        (np.full((4, 4), np.nan), ValueError, "NaN"),
        (torch.full((3, 4, 4), torch.inf), ValueError, "infinity"),
        (torch.full((3, 4, 4), -1.0), ValueError, r"\[-1, -1\].*\(x \+ 1\) / 2"),
        (np.full((4, 4, 3), 255.0), ValueError, r"in \[0, 1\]"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"got 2 \(shape \(4, 4, 2\)\)"),
        (np.zeros((3, 5, 5), np.uint8), ValueError, r"layout.*\(3, 5, 5\)"),
        (torch.zeros(5, 5, 3), ValueError, "channels"),
        (np.zeros(4), ValueError, r"shape \(4,\)"),
        (torch.zeros(1, 1, 3, 4, 4), ValueError, "layout"),
        ("chest.png", TypeError, "load_image"),
        (None, TypeError, "NoneType"),
        pytest.param([[PIL.Image.new("L", (2, 2))]], TypeError, "list", id="nested list"),
        (np.zeros((4, 4), np.int64), TypeError, "int64"),
        (np.zeros((4, 4), np.int8), TypeError, "int8"),
        (np.zeros((4, 4), complex), TypeError, "complex"),
        (np.array([["a"]]), TypeError, "numbers"),
        (np.zeros((4, 4, 4), np.uint16), TypeError, "Alpha"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        to_unit(image)


def test_vae_range_round_trip():
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(vae_to_unit(unit_to_vae(x, 3)), x, atol=1e-6)
    gray = unit_to_vae(x, 1)
    assert gray.shape == (2, 1, 4, 4)
    assert torch.allclose(gray, x.mean(1, keepdim=True) * 2 - 1)
    assert unit_to_vae(gray.clamp(0, 1), 3).shape == (2, 3, 4, 4)
    assert vae_to_unit(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(("shape", "channels"), [((2, 4, 4), 3), ((4, 4), 3), ((1, 4, 4), 2)])
def test_vae_range_refuses_other_channels(shape, channels):
    with pytest.raises(ValueError):
        unit_to_vae(torch.zeros(shape), channels)


def test_xrv_range():
    assert unit_to_xrv(torch.tensor([0, 0.5, 1]).view(3, 1, 1, 1)).flatten().tolist() == [-1024, 0, 1024]
    assert unit_to_xrv(torch.ones(2, 3, 4, 4)).shape == (2, 1, 4, 4)


@given(st.integers(0, 255))
def test_eight_bits_survive(value):
    image = np.full((2, 2), value, np.uint8)
    assert unit_to_uint8(to_unit(image)[0]).unique().tolist() == [value]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float32, torch.bool])
def test_large_gray_images_take_four_bytes_a_pixel(dtype):
    image = (torch.arange(4_000_000).reshape(1, 2000, 2000) % 2).to(dtype)
    with LargestTensor() as largest:
        (unit,) = to_unit(image)
        (again,) = to_unit(unit)
        small = resize_unit(again[None], 32, "bicubic")
    assert largest.nbytes <= 4 * image.numel() + 2**20
    assert torch.equal(again, unit)
    assert torch.equal(small, resize_unit(unit[None].contiguous(), 32, "bicubic"))


@pytest.mark.parametrize("shape", [(100_000, 1), (1, 100_000), (50_000, 20)])
@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
def test_narrow_images_are_not_made_wide_at_their_full_height(shape, resample):
    image = torch.linspace(0, 1, shape[0] * shape[1]).reshape(1, 1, *shape)
    with LargestTensor() as largest:
        small = resize_unit(image, 512, resample)
    assert largest.nbytes <= 4 * max(image.numel(), 512 * 512 * 2)
    line = small.mean(-1 if shape[0] > shape[1] else -2).flatten()
    torch.testing.assert_close(line, torch.linspace(0, 1, 512), atol=5e-3, rtol=0)


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "array", "deep array"])
def test_large_images_take_at_most_ten_bytes_a_pixel_on_their_way_to_a_model(kind):
    side = 2500
    small = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8))
    mode = {"array": "RGBA", "deep array": "RGB", "F": "1", "I;16": "I"}.get(kind, kind)
    image = small.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else small.convert(mode)
    image = image.convert(kind) if kind in ("F", "I;16") else image
    image = image.point(lambda value: value / 255) if kind == "F" else image
    image = np.array(image, np.uint16 if kind == "deep array" else None) if "array" in kind else image
    expected = resize_unit(to_unit(image)[0][None], 64, "bicubic")

    def shrink():
        (stored,) = stored_images(image)
        assert torch.equal(stored.resized(64, "bicubic"), expected)

    assert peak_of(shrink) < 10 * side**2


def test_a_batch_of_many_large_images_is_resized_as_each_of_them():
    batch = torch.rand(3, 3, 900, 700)
    (stored,) = stored_images(batch)
    expected = torch.cat([resize_unit(image[None], 32, "bilinear") for image in batch])
    assert torch.equal(stored.resized(32, "bilinear"), expected)
    (square,) = stored_images([stored.center_square()])
    assert torch.equal(square.unit(), batch[..., 100:800, :])
