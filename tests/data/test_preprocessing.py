from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from diffusers_dino.data import Preprocessing, read_image
from diffusers_dino.data.images.preprocessing import border_window, stretch_to_uint8

CXR = Path(__file__).parents[2].parent / "shared" / "cxr"


@pytest.fixture
def scan() -> np.ndarray:
    """A smooth 8-bit image (60, 60) without uniform lines."""
    y, x = np.mgrid[:60, :60] / 59
    return np.round(255 * (0.5 + 0.25 * np.sin(7 * x + 1) + 0.25 * np.cos(5 * y + x))).astype(np.uint8)


SIDES = st.integers(1, 40)


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(3))),
    ),
    st.integers(1, 24),
)
@settings(max_examples=60, deadline=None)
def test_any_image_becomes_a_square_of_uint8(image, size):
    prepared = Preprocessing(size)(image)
    assert prepared.dtype == np.uint8
    assert prepared.shape == (size, size, *image.shape[2:])


@pytest.mark.parametrize("band", [(0, 0, 20, 20), (10, 0, 0, 0), (3, 5, 8, 13)])
@pytest.mark.parametrize("value", [0, 255])
def test_padding_is_removed(scan, band, value):
    top, bottom, left, right = band
    padded = np.pad(scan, ((top, bottom), (left, right)), constant_values=value)
    assert np.array_equal(padded[border_window(padded, 0.01)], scan[border_window(scan, 0.01)])


def test_a_frame_around_padding_is_removed(scan):
    framed = np.pad(np.pad(scan, 8), 2, constant_values=255)
    assert framed[border_window(framed, 0.01)].shape == scan.shape


def test_images_without_borders_stay_as_they_are(scan):
    assert np.array_equal(scan[border_window(scan, 0.01)], scan)
    uniform = np.full((10, 12), 7, np.uint8)
    assert np.array_equal(uniform[border_window(uniform, 0.01)], uniform)
    assert not Preprocessing(8)(uniform).any()


@pytest.fixture
def banded(scan):
    """An image whose centred square begins with a uniform band, which its own left side does not have."""
    image = np.tile(scan[:40, :40], (1, 2))
    image[:, 20:28] = 255
    return image


def test_what_was_prepared_for_another_size_is_only_resized(banded):
    earlier = Preprocessing(64)
    prepared = earlier(banded) // 2 + 20  # of no full range
    smaller = Image.fromarray(prepared).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(Preprocessing(32)(prepared, earlier), smaller)
    assert np.array_equal(earlier(prepared, earlier), prepared)
    assert Preprocessing(32).window(prepared, earlier) == (slice(0, 64), slice(0, 64))
    assert Preprocessing(32).window(prepared) != (slice(0, 64), slice(0, 64))
    # another range is mapped, of the same pixels
    clipped = Preprocessing(64, clip_percent=2.0)
    expected = replace(clipped, remove_borders=False)(prepared)
    assert np.array_equal(clipped(prepared, earlier), expected)
    # borders that stayed on, and images that are not what the shards say, are prepared in full
    for image, before in ((prepared, Preprocessing(64, remove_borders=False)), (banded, earlier)):
        assert np.array_equal(Preprocessing(32)(image, before), Preprocessing(32)(image))


def test_a_mask_is_cut_as_its_image_is(scan):
    mask = scan > 128
    padded, padded_mask = (np.pad(array, ((3, 5), (8, 30))) for array in (scan, mask))
    prepare = Preprocessing(24, resampling="box")
    kept = prepare.prepare_mask(padded_mask, prepare.window(padded))
    assert kept.dtype == bool
    assert kept.shape == (24, 24)
    assert np.array_equal(kept, prepare.prepare_mask(mask, (slice(0, 60), slice(0, 60))))
    assert (kept == (prepare(padded) > 128)).mean() > 0.9  # they lie on each other
    rows, columns = Preprocessing(24, remove_borders=False).window(padded)
    assert (rows, columns) == (slice(0, 68), slice(15, 83))


def test_a_gradient_is_not_eaten_up():
    gradient = np.repeat(np.arange(200, dtype=np.uint8)[:, None], 50, axis=1)
    assert len(gradient[border_window(gradient, 0.01)]) > 180


def test_16_bit_twin_of_an_8_bit_image_comes_out_the_same(scan):
    deep = np.pad(scan.astype(np.uint16) * 16 + 100, ((0, 0), (20, 20)))
    difference = Preprocessing(32)(deep).astype(int) - Preprocessing(32)(scan)
    assert np.abs(difference).max() <= 1


def test_dynamic_range_is_mapped_to_the_ends():
    image = np.array([[100, 200], [300, 500]], np.uint16)
    assert stretch_to_uint8(image).tolist() == [[0, 64], [128, 255]]
    hot = np.linspace(0, 100, 10_000).reshape(100, 100)
    hot[0, 0] = 1e6
    assert np.median(stretch_to_uint8(hot)) == 0
    assert abs(np.median(stretch_to_uint8(hot, clip_percent=1)) - 127) < 3


def test_crop_is_central():
    image = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9)
    prepare = Preprocessing(5, remove_borders=False)
    assert np.array_equal(prepare(image), stretch_to_uint8(image)[:, 2:7])
    assert np.array_equal(prepare(image.T), stretch_to_uint8(image).T[2:7])


def test_downsampling_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = Preprocessing(8, remove_borders=False)(stripes)
    assert np.abs(small.astype(int) - 127).max() < 40


def test_fingerprint_tells_configurations_apart():
    base = Preprocessing()
    assert base.fingerprint() == Preprocessing(512).fingerprint() == Preprocessing(clip_percent=0).fingerprint()
    others = {"size": 256, "remove_borders": False, "border_tolerance": 0.02, "clip_percent": 1.0, "resampling": "box"}
    assert others.keys() == asdict(base).keys()
    changed = {replace(base, **{name: value}).fingerprint() for name, value in others.items()}
    assert len({base.fingerprint()} | changed) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size"),
        ({"border_tolerance": 1.5}, "border_tolerance"),
        ({"clip_percent": 50}, "clip_percent"),
        ({"resampling": "cubic"}, "resampling must be one of box, bilinear"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**options)


@pytest.mark.parametrize("shape", [(5,), (4, 4, 4), (0, 4), (1, 4, 4, 3)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="Expected an image of shape"):
        Preprocessing(8)(np.zeros(shape))


def test_nan_is_refused():
    image = np.random.default_rng(0).random((8, 8))
    image[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        Preprocessing(8, remove_borders=False)(image)


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is missing")
def test_bordered_16_bit_radiograph_matches_its_8_bit_twin():
    prepare = Preprocessing(512)
    deep = prepare(read_image(CXR / "raw" / "nih_00001280_004_16bit_bordered.png"))
    twin = prepare(read_image(CXR / "raw" / "nih_00001280_004_1024px.png"))
    assert np.abs(deep.astype(int) - twin).mean() <= 2
