import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data import RawLayout, UnreadableImageError, read_image

CXR = Path(__file__).parents[2].parent / "shared" / "cxr"
GRAY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
COLOR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp"])
def test_lossless_8_bit(kind):
    assert np.array_equal(read_image(encoded(Image.fromarray(GRAY), kind)), GRAY)
    assert np.array_equal(read_image(encoded(Image.fromarray(COLOR), kind)), COLOR)


def test_jpeg_and_webp():
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    for kind, options in (("jpeg", {"quality": 95}), ("webp", {"lossless": True})):
        array = read_image(encoded(Image.fromarray(smooth), kind, **options))
        assert array.shape == (64, 64)
        assert np.abs(array.astype(int) - smooth).mean() < 3


def test_16_bit_keeps_its_precision(tmp_path):
    deep = GRAY.astype(np.uint16) * 17
    for kind in ("png", "tiff"):
        array = read_image(encoded(Image.fromarray(deep), kind))
        assert array.dtype == np.uint16
        assert np.array_equal(array, deep)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png"), deep)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wider_values_are_mapped_linearly(dtype):
    values = (GRAY.astype(np.float64) * 1000 - 3e4).astype(dtype)
    array = read_image(encoded(Image.fromarray(values), "tiff"))
    assert array.dtype == np.uint16
    assert (array.min(), array.max()) == (0, 65535)
    expected = (values - values.min()) / (values.max() - values.min()) * 65535
    assert np.abs(array - expected).max() < 1


def test_palette_is_resolved():
    palette = Image.fromarray(COLOR).quantize(64)
    assert np.array_equal(read_image(encoded(palette)), np.asarray(palette.convert("RGB")))
    gray = Image.fromarray(GRAY).convert("P")
    assert np.array_equal(read_image(encoded(gray)), GRAY)


def test_alpha_is_composited_on_black():
    alpha = np.full(GRAY.shape, 255, np.uint8)
    alpha[:6] = 0
    array = read_image(encoded(Image.fromarray(np.dstack([COLOR, alpha]))))
    assert not array[:6].any()
    assert np.array_equal(array[6:], COLOR[6:])
    gray_alpha = read_image(encoded(Image.fromarray(np.dstack([GRAY, alpha]), "LA")))
    assert gray_alpha.shape == GRAY.shape
    assert not gray_alpha[:6].any()


def test_one_bit_and_gray_in_three_channels():
    bits = Image.fromarray(GRAY > 100)
    assert np.array_equal(read_image(encoded(bits)), np.where(GRAY > 100, 255, 0))
    assert np.array_equal(read_image(encoded(Image.fromarray(np.dstack([GRAY] * 3)))), GRAY)


def test_orientation_of_a_photograph_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert read_image(encoded(Image.fromarray(GRAY), "tiff", exif=exif)).shape == GRAY.shape[::-1]


def test_cmyk_becomes_rgb():
    assert read_image(encoded(Image.fromarray(COLOR).convert("CMYK"), "jpeg")).shape == COLOR.shape


def test_file_without_a_header_as_jsrt_has_them():
    film = np.arange(0, 4096, 17, dtype=np.uint16)[:240].reshape(12, 20)
    layout = RawLayout(20, 12, byte_order="big", bits=12)
    data = film.astype(">u2").tobytes()
    array = read_image(data, raw=layout)
    assert array.dtype == np.uint16
    assert array.dtype.isnative
    assert np.array_equal(array, film)
    assert np.array_equal(read_image(data, raw=replace(layout, inverted=True)), 4095 - film)
    assert np.array_equal(read_image(GRAY.tobytes(), raw=RawLayout(20, 12, "uint8")), GRAY)
    with pytest.raises(UnreadableImageError, match=r"film: 20 x 12 pixels of uint16 are 480 bytes, not 478"):
        read_image(data[:-2], "film", raw=layout)
    with pytest.raises(UnreadableImageError, match="more than 12 bits"):
        read_image(data, raw=replace(layout, byte_order="little"))


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"dtype": "float32"}, {"byte_order": ">"}, {"bits": 17}, {"dtype": "uint8", "bits": 12}]
)
def test_impossible_layout(wrong):
    with pytest.raises(ValueError, match="must be"):
        RawLayout(**{"width": 4, "height": 4, **wrong})


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"not an image" * 100])
def test_what_is_no_image(data, tmp_path):
    with pytest.raises(UnreadableImageError, match="scan 7"):
        read_image(data, "scan 7")
    (tmp_path / "file.png").write_bytes(data)
    with pytest.raises(UnreadableImageError, match=r"file\.png"):
        read_image(tmp_path / "file.png")


def test_missing_file(tmp_path):
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UnreadableImageError, match="directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp", "webp"])
def test_a_bomb_is_refused_before_it_is_decoded(kind):
    with pytest.raises(UnreadableImageError, match=r"says 20 x 12 pixels, more than 239: .* Raise max_pixels"):
        read_image(encoded(Image.fromarray(GRAY), kind), max_pixels=239)
    assert read_image(encoded(Image.fromarray(GRAY), kind), max_pixels=240).shape[:2] == GRAY.shape


def test_nan_in_a_float_tiff():
    values = GRAY.astype(np.float32)
    values[0, 0] = np.nan
    with pytest.raises(UnreadableImageError, match="not finite"):
        read_image(encoded(Image.fromarray(values), "tiff"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on damaged TIFF tags
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp"])
def test_damaged_files_are_read_or_refused_but_never_break_the_reader(kind):
    whole = encoded(Image.fromarray(COLOR), kind)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        data = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.5 else whole)
        for place in random.integers(0, len(data), random.integers(1, 5)):
            data[place] = random.integers(256)
        try:
            array = read_image(bytes(data))
            assert array.dtype in (np.uint8, np.uint16)
            assert array.ndim in (2, 3)
        except UnreadableImageError:
            refused += 1
    assert refused > 20


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is missing")
def test_real_radiographs_are_read_at_their_depth():
    deep = read_image(CXR / "raw" / "nih_00001280_004_16bit_bordered.png")
    assert (deep.dtype, deep.shape, deep.max()) == (np.uint16, (1024, 1344), 4095)
    for path in [*(CXR / "raw").glob("*.png"), *(CXR / "raw").glob("*.jpg")]:
        assert read_image(path).shape[0] >= 512
