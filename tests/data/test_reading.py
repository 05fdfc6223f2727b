import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data import Preprocessing, RawLayout, UnreadableImageError, read_image
from diffusers_dino.data.images.reading import as_image
from image_files import deep_png, deep_tiff, encoded, peak_of

CXR = Path(__file__).parents[2].parent / "shared" / "cxr"
GRAY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
COLOR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp"])
def test_lossless_8_bit(kind):
    assert np.array_equal(read_image(encoded(GRAY, kind)), GRAY)
    assert np.array_equal(read_image(encoded(COLOR, kind)), COLOR)


def test_jpeg_and_webp():
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    for kind, options in (("jpeg", {"quality": 95}), ("webp", {"lossless": True})):
        array = read_image(encoded(smooth, kind, **options))
        assert array.shape == (64, 64)
        assert np.abs(array.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wider_values_are_mapped_linearly(dtype):
    values = (GRAY.astype(np.float64) * 1000 - 3e4).astype(dtype)
    array = read_image(encoded(values, "tiff"))
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
    array = read_image(encoded(np.dstack([COLOR, alpha])))
    assert not array[:6].any()
    assert np.array_equal(array[6:], COLOR[6:])
    gray_alpha = read_image(encoded(Image.fromarray(np.dstack([GRAY, alpha]), "LA")))
    assert gray_alpha.shape == GRAY.shape
    assert not gray_alpha[:6].any()
    one_value = read_image(encoded(GRAY, transparency=239))
    assert np.array_equal(one_value, np.where(GRAY == 239, 0, GRAY))


def test_one_bit_and_gray_in_three_channels():
    bits = Image.fromarray(GRAY > 100)
    assert np.array_equal(read_image(encoded(bits)), np.where(GRAY > 100, 255, 0))
    assert np.array_equal(read_image(encoded(np.dstack([GRAY] * 3))), GRAY)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_orientation_of_a_photograph_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    data = encoded(GRAY, kind)
    assert np.array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data))))
    turned = read_image(encoded(GRAY, kind, exif=exif))
    assert np.array_equal(turned, np.rot90(read_image(data), -1))


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
    with pytest.raises(UnreadableImageError, match="is a folder, where a file is needed"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp", "webp"])
def test_a_bomb_is_refused_before_it_is_decoded(kind):
    with pytest.raises(UnreadableImageError, match=r"says 20 x 12 pixels, more than 239: .* Raise max_pixels"):
        read_image(encoded(GRAY, kind), max_pixels=239)
    assert read_image(encoded(GRAY, kind), max_pixels=240).shape[:2] == GRAY.shape


def npy(array: np.ndarray, **more: np.ndarray) -> bytes:
    """A `.npy` file, or a `.npz` file if it holds more arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=array, **more) if more else np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("array", [GRAY, COLOR, GRAY.astype(np.uint16) * 17, np.asfortranarray(GRAY)])
def test_numpy_keeps_what_images_have(array):
    for data in (npy(array), npy(array, mask=GRAY), npy(array[None, ..., None] if array.ndim == 2 else array[None])):
        assert np.array_equal(read_image(data), array)
        assert read_image(data).dtype == array.dtype


def test_numpy_values_of_other_types():
    wide = GRAY.astype(np.float64) * 1000 - 3e4
    expected = np.round((wide - wide.min()) / (wide.max() - wide.min()) * 65535)
    for dtype in (np.float64, np.float32, np.int32, ">i4", np.int64):
        assert np.array_equal(read_image(npy(wide.astype(dtype))), expected)
    assert np.array_equal(read_image(npy(GRAY > 100)), np.where(GRAY > 100, 255, 0))
    assert np.array_equal(read_image(npy(GRAY.astype(np.int64))), GRAY)
    assert np.array_equal(read_image(npy(COLOR / 255)), as_image(COLOR / 255))
    assert read_image(npy(COLOR / 255)).dtype == np.uint8
    gray_in_color = read_image(npy(np.dstack([wide] * 3)))
    assert np.array_equal(gray_in_color, expected)


def test_npz_with_one_array_of_any_name():
    buffer = io.BytesIO()
    np.savez(buffer, scan=GRAY)
    assert np.array_equal(read_image(buffer.getvalue()), GRAY)
    buffer = io.BytesIO()
    np.savez(buffer, scan=GRAY, other=GRAY)
    with pytest.raises(UnreadableImageError, match="one array, or one named image"):
        read_image(buffer.getvalue())


class Pickled:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[Pickled()]], dtype=object), "pickled objects are never loaded"),
        (np.zeros((4, 4), [("name", "S8")]), "no numbers"),
        (np.zeros((4, 4), np.complex64), "no numbers"),
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\) is neither"),
        (np.zeros(9), "is neither"),
        (np.zeros((0, 4)), "no pixels"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.array([[-1.7e308, 1.7e308]]), "not finite"),
        (np.zeros((20, 50), np.uint8), "says 50 x 20 pixels, more than 999"),
    ],
)
def test_numpy_that_is_no_image(array, message, capsys):
    for data in (npy(array), npy(array, other=GRAY)):
        with pytest.raises(UnreadableImageError, match=message):
            read_image(data, max_pixels=999)
    assert not capsys.readouterr().out


def test_npz_bombs():
    bomb = npy(np.zeros((9000, 9000), np.uint8), other=GRAY)
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImageError, match="more than 1000000"):
        read_image(bomb, max_pixels=1_000_000)
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            archive.writestr("image.npy", npy(GRAY))
        with pytest.raises(UnreadableImageError, match="another way"):
            read_image(buffer.getvalue())


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_of_16_bits_a_channel_keeps_them(channels):
    deep = GRAY.astype(np.uint16) * 17  # 12 bits, of which Pillow would keep the upper four
    pixels = np.dstack([deep] * min(channels, 3) if channels > 2 else [deep])
    if channels in (2, 4):
        pixels = np.dstack([pixels, np.full(GRAY.shape, 65535, np.uint16)])
    array = read_image(deep_png(pixels))
    assert array.dtype == np.uint16
    assert np.array_equal(array, deep)


def test_alpha_and_color_of_a_deep_png():
    color = COLOR.astype(np.uint16) * 257
    assert np.array_equal(read_image(deep_png(color)), COLOR)
    alpha = np.full(GRAY.shape, 65535, np.uint16)
    alpha[:6] = 0
    array = read_image(deep_png(np.dstack([color, alpha])))
    assert not array[:6].any()
    stretched = COLOR[6:] / COLOR[6:].max() * 255  # the brightest channel to 255
    assert np.abs(array[6:] - stretched).max() < 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_tiff_of_16_bits_a_channel_keeps_them(order, compressed):
    deep = GRAY.astype(np.uint16) * 17
    assert np.array_equal(read_image(deep_tiff(np.dstack([deep] * 3), order, compressed)), deep)
    assert np.array_equal(read_image(deep_tiff(COLOR.astype(np.uint16) * 257, order, compressed)), COLOR)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_an_inverted_image_is_turned_over_within_its_bits(kind):
    assert np.array_equal(read_image(encoded(GRAY, kind), inverted=True), 255 - GRAY)
    deep = GRAY.astype(np.uint16) * 17  # 12 bits
    assert np.array_equal(read_image(encoded(deep, kind), inverted=True), 4095 - deep)
    assert np.array_equal(read_image(encoded(deep, kind), inverted=False), deep)


def test_first_page_is_read():
    pages = [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]
    assert np.array_equal(read_image(encoded(pages[0], "tiff", save_all=True, append_images=pages[1:])), GRAY)


def test_tiff_that_claims_more_rows_than_it_has():
    data = bytearray(encoded(GRAY, "tiff"))
    place = data.index(b"\x01\x01")  # the tag of the height, 257
    data[place + 8 : place + 12] = (1_000_000).to_bytes(4, "little")
    with pytest.raises(UnreadableImageError, match="do not cover its 20 x 1000000 pixels"):
        read_image(bytes(data))


def test_content_tells_the_format(tmp_path):
    (tmp_path / "scan.jpg").write_bytes(encoded(GRAY, "png"))
    assert np.array_equal(read_image(tmp_path / "scan.jpg"), GRAY)


def test_other_formats_of_pillow_are_not_tried():
    for kind in ("eps", "ppm", "tga", "pdf"):
        with pytest.raises(UnreadableImageError, match="not an image of a known format"):
            read_image(encoded(COLOR, kind))


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is missing")
def test_real_radiographs_are_read_at_their_depth():
    deep = read_image(CXR / "raw" / "nih_00001280_004_16bit_bordered.png")
    assert (deep.dtype, deep.shape, deep.max()) == (np.uint16, (1024, 1344), 4095)


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is missing")
def test_every_real_radiograph_is_read():
    paths = [*(CXR / "nih").glob("*.jpg"), *(CXR / "lungmask").glob("*/*"), *(CXR / "raw").iterdir()]
    assert len(paths) == 669 + 2 * 38 + 6
    for path in paths:
        array = read_image(path)
        assert array.min() < array.max()
        assert min(array.shape[:2]) >= 512


Y, X = np.mgrid[:48, :64]
RAMP = np.round((0.6 * X / 63 + 0.4 * Y / 47) * 65535).astype(np.int64)


def tiff_of(pixels: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def correlations(image: np.ndarray, *channels: np.ndarray) -> float:
    pairs = zip([image] if image.ndim == 2 else np.moveaxis(image, 2, 0), channels, strict=True)
    return min(np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}, {"compression": "zlib"}])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
def test_gray_tiff_of_every_type_is_right_or_refused(kind, white, order, layout):
    """Pillow wraps unsigned values, takes signed for unsigned ones, swaps bytes twice and forgets that white is 0."""
    kind = np.dtype(kind)
    if kind.kind == "f":
        values = (RAMP / 65535 * 1000 - 200).astype(kind)
    else:
        bits = 8 * kind.itemsize
        values = (RAMP.astype(np.uint64) << 48 >> (64 - bits)).astype(f"u{kind.itemsize}")
        values = (values ^ (values.dtype.type(1) << (bits - 1))).view(kind) if kind.kind == "i" else values
    stored = (-values if kind.kind == "f" else ~values) if white else values
    data = tiff_of(stored, byteorder=order, photometric="miniswhite" if white else "minisblack", **layout)
    if "compression" in layout and (white or kind.itemsize == 8 or kind == "f2" or kind == "u4"):
        try:
            image = read_image(data)
        except UnreadableImageError:
            return
    else:
        image = read_image(data)
    assert image.shape == RAMP.shape
    assert correlations(image, RAMP) > 0.999
    if kind == "u2":
        assert np.array_equal(image, values)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rowsperstrip": 5}, {"compression": "zlib"}])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("alpha", [False, True])
def test_color_tiff_of_16_bits(order, planar, alpha, layout):
    channels = [RAMP, RAMP // 2, 65535 - RAMP]
    stored = np.stack([*channels, np.full_like(RAMP, 65535)][: 3 + alpha]).astype(np.uint16)
    stored = stored if planar == "separate" else np.ascontiguousarray(np.moveaxis(stored, 0, -1))
    options = {"extrasamples": ["unassalpha"]} if alpha else {}
    data = tiff_of(stored, byteorder=order, planarconfig=planar, photometric="rgb", **options, **layout)
    assert correlations(read_image(data), *channels) > 0.999


def test_tiff_that_is_cut_short_or_holds_a_volume_is_refused():
    data = tiff_of(RAMP.astype(np.uint16), photometric="minisblack", metadata=None)
    assert np.array_equal(read_image(data), RAMP)
    with pytest.raises(UnreadableImageError, match="cut short"):
        read_image(data[:-10])
    volume = np.stack([RAMP, RAMP[::-1]]).astype(np.uint16)
    with pytest.raises(UnreadableImageError, match="volume"):
        read_image(tiff_of(volume, photometric="minisblack", volumetric=True))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_deep_tiff(orientation):
    values = RAMP.astype(np.uint16)
    tag = [(274, "H", 1, orientation, True)]
    image = read_image(tiff_of(values, photometric="minisblack", extratags=tag))
    eight = read_image(tiff_of((values >> 8).astype(np.uint8), photometric="minisblack", extratags=tag))
    assert np.array_equal(image >> 8, eight)


@pytest.mark.parametrize("kind", ["deep gray", "alpha", "deep alpha", "webp", "npz", "float tiff"])
def test_a_small_file_does_not_take_gigabytes(kind):
    side = 2000
    shape = {"alpha": (4,), "deep alpha": (4,), "webp": (3,)}.get(kind, ())
    dtype = {"deep gray": np.uint16, "deep alpha": np.uint16, "npz": np.float64, "float tiff": np.float32}
    pixels = np.zeros((side, side, *shape), dtype.get(kind, np.uint8))
    pixels[100:200, 100:200] = 255
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, image=pixels)
        data = buffer.getvalue()
    elif kind == "deep alpha":
        data = deep_png(pixels)
    else:
        format_of = {
            "webp": ("webp", {"lossless": True}),
            "float tiff": ("tiff", {"compression": "tiff_adobe_deflate"}),
        }
        name, options = format_of.get(kind, ("png", {}))
        data = encoded(pixels, name, **options)
    assert len(data) < 200_000
    Preprocessing(64)(read_image(data))
    assert peak_of(lambda: Preprocessing(64)(read_image(data))) < 24 * side**2  # bytes a pixel


@pytest.mark.parametrize(("kind", "millions"), [("u1", 100), ("u2", 100), ("f4", 100), ("f8", 50), ("u8", 50)])
def test_bytes_are_bounded_as_well_as_pixels(kind, millions):
    for more, message in ((0, "cut short"), (1, "more than")):
        header = {"descr": f"<{kind}", "fortran_order": False, "shape": (millions + more, 10**6)}
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, header)
        with pytest.raises(UnreadableImageError, match=message):
            read_image(buffer.getvalue())
