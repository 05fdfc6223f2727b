import logging
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom")
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import JPEG2000MC, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from dicom_files import (
    COLOR,
    FILM,
    FILM_8,
    LOSSLESS,
    LOSSY,
    dicom_bytes,
    dicom_dataset,
    dicom_report,
    lut_item,
    to_bytes,
)
from diffusers_dino.data import (
    NoImageError,
    UnreadableImageError,
    dicom_facts,
    read_image,
)
from diffusers_dino.data.images.dicom import read_dicom
from diffusers_dino.data.images.dicom_header import parse_dicom

CXR = Path(__file__).parents[2].parent / "shared" / "cxr"


def stretched(array: np.ndarray) -> np.ndarray:
    return (array - array.min()) / (array.max() - array.min())


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_transfer_syntaxes_give_every_bit(kind):
    syntax = LOSSLESS[kind]
    for film, bits, expected in ((FILM, 12, FILM), (FILM.astype(np.int16) - 2048, 12, FILM), (FILM_8, 8, FILM_8)):
        array = read_image(dicom_bytes(film, bits, syntax))
        assert array.dtype == expected.dtype
        assert np.array_equal(array, expected)
    turned = read_image(dicom_bytes(FILM, 12, syntax, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(turned, 4095 - FILM)


@pytest.mark.parametrize("kind", sorted(set(LOSSLESS) - {"JPEG lossless"}))
def test_color(kind):
    assert np.array_equal(read_image(dicom_bytes(COLOR, 8, LOSSLESS[kind])), COLOR)
    gray = np.dstack([FILM_8] * 3)
    assert np.array_equal(read_image(dicom_bytes(gray, 8, LOSSLESS[kind])), FILM_8)


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_transfer_syntaxes(kind):
    smooth = (FILM_8 // 2 + 40).astype(np.uint8)
    smooth[0, 0], smooth[-1, -1] = smooth[0, 1], smooth[-1, -2]
    assert np.abs(read_image(dicom_bytes(smooth, 8, LOSSY[kind])).astype(int) - smooth).mean() < 1
    color = np.dstack([smooth, 255 - smooth, smooth // 2])
    assert np.abs(read_image(dicom_bytes(color, 8, LOSSY[kind])).astype(int) - color).mean() < 4


def test_bits_beside_the_value_do_not_count():
    overlay = FILM | np.uint16(0xA000)  # an old way to store overlays
    assert np.array_equal(read_image(dicom_bytes(overlay, 12)), FILM)
    assert np.array_equal(read_image(dicom_bytes(FILM << np.uint16(4), 12, HighBit=15)), FILM)
    signed = FILM.astype(np.int16) - 2048
    assert np.array_equal(read_image(dicom_bytes(signed & np.int16(0x0FFF), 12)), FILM)


def test_few_bits_fill_uint8():
    assert read_image(dicom_bytes(FILM_8 >> 2, 6)).max() == 255


def test_rescale_changes_nothing_but_a_negative_slope_turns_over():
    assert np.array_equal(read_image(dicom_bytes(FILM, 12, RescaleSlope="2.5", RescaleIntercept="-1024")), FILM)
    assert np.array_equal(read_image(dicom_bytes(FILM, 12, RescaleSlope="-1", RescaleIntercept="4095")), 4095 - FILM)
    twice = dicom_bytes(FILM, 12, RescaleSlope="-1", RescaleIntercept="0", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_image(twice), FILM)


ROOT_LUT = (np.linspace(0, 1, 4096) ** 0.5 * 65535).astype(int)
SQUARE_LUT = (np.linspace(0, 1, 3000) ** 2 * 1023).astype(int)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("fields", "offset"),
    [
        ({"WindowCenter": 2000, "WindowWidth": 2500}, 1),
        ({"WindowCenter": [2000, 100], "WindowWidth": [2500, 50]}, 1),
        ({"WindowCenter": 2000, "WindowWidth": 2500, "VOILUTFunction": "LINEAR_EXACT"}, 1),
        ({"WindowCenter": 2000, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}, 1),
        ({"WindowCenter": 500, "WindowWidth": 700, "RescaleSlope": "0.5", "RescaleIntercept": "-500"}, 0.5),
        ({"VOILUTSequence": lut_item(300, 10, SQUARE_LUT)}, 1),
        ({"VOILUTSequence": lut_item(300, 10, SQUARE_LUT), "WindowCenter": 2000, "WindowWidth": 2500}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Applying a VOI LUT on a float input array")
def test_grayscale_is_shown_as_pydicom_shows_it(fields, offset, signed, photometric):
    if signed:  # the same film, stored around 0
        intercept = float(fields.get("RescaleIntercept", 0)) + 2048 * offset
        fields = {"RescaleSlope": str(offset)} | fields | {"RescaleIntercept": str(intercept)}
    stored = FILM.astype(np.int16) - 2048 if signed else FILM
    dataset = dicom_dataset(stored, 12, PhotometricInterpretation=photometric, **fields)
    array = read_image(to_bytes(dataset))
    assert array.dtype == np.uint16
    expected = stretched(apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float64))
    expected = 1 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(stretched(array.astype(np.float64)) - expected).max() < 1e-3


def test_modality_lut_then_window():
    dataset = dicom_dataset(FILM, 12, ModalityLUTSequence=lut_item(0, 16, ROOT_LUT))
    assert np.array_equal(read_image(to_bytes(dataset)), ROOT_LUT[FILM])
    dataset.WindowCenter, dataset.WindowWidth = 40000, 40000
    expected = apply_voi_lut(apply_modality_lut(FILM, dataset), dataset).astype(np.float64)
    assert np.abs(stretched(read_image(to_bytes(dataset)).astype(np.float64)) - stretched(expected)).max() < 1e-3


def test_lut_of_signed_values_starts_below_zero():
    item = lut_item(65536 - 2048, 16, ROOT_LUT)  # -2048 as it is written
    array = read_image(dicom_bytes(FILM.astype(np.int16) - 2048, 12, ModalityLUTSequence=item))
    assert np.array_equal(array, ROOT_LUT[FILM])


def test_lut_of_bytes():
    item = lut_item(0, 8, np.zeros(2, int))
    item[0].LUTDescriptor = [256, 0, 8]
    item[0]["LUTData"].value = bytes(range(255, -1, -1))
    assert np.array_equal(read_image(dicom_bytes(FILM_8, ModalityLUTSequence=item)), 255 - FILM_8)


@pytest.mark.parametrize(
    "fields",
    [
        {"WindowCenter": 60000, "WindowWidth": 100},  # of another image
        {"WindowCenter": 10, "WindowWidth": 10},
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": -5},
        {"WindowCenter": 2000},
        {"VOILUTSequence": lut_item(0, 10, SQUARE_LUT[:100])},
    ],
)
def test_a_view_that_does_not_fit_is_not_applied(fields):
    assert np.array_equal(read_image(dicom_bytes(FILM, 12, **fields)), FILM)


def test_view_and_polarity_can_be_chosen():
    data = dicom_bytes(FILM, 12, WindowCenter=2000, WindowWidth=1500)
    assert not np.array_equal(read_dicom(data), FILM)
    assert np.array_equal(read_dicom(data, view=False), FILM)
    assert np.array_equal(read_image(dicom_bytes(FILM, 12), inverted=True), 4095 - FILM)
    assert np.array_equal(
        read_image(dicom_bytes(FILM, 12, PhotometricInterpretation="MONOCHROME1"), inverted=False), FILM
    )


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_as_dark_as_the_darkest_tissue(photometric):
    inside = np.clip(FILM, 500, 3500)
    padded = np.pad(inside, 8, constant_values=4000)
    padded[:2] = 4050
    data = dicom_bytes(padded, 12, PhotometricInterpretation=photometric)
    limits = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    array = read_image(dicom_bytes(padded, 12, PhotometricInterpretation=photometric, **limits))
    tissue = array[8:-8, 8:-8]
    assert np.array_equal(tissue, read_image(data)[8:-8, 8:-8])
    assert (array[:8] == tissue.min()).all()
    everything = dicom_bytes(inside, 12, PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
    assert np.array_equal(read_image(everything), inside)


def test_signed_padding():
    padded = np.pad(FILM.astype(np.int16) // 2, 4, constant_values=-2000)
    array = read_image(dicom_bytes(padded, 12, PixelPaddingValue=-2000))
    assert (array[:4] == array[4:-4, 4:-4].min()).all()


def chest(height: int = 64, width: int = 64) -> np.ndarray:
    """A bright body on dark air, 12 bits."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.round(200 + 3500 * np.exp(-2 * (x**2 + y**2))).astype(np.uint16)


def test_a_radiograph_that_only_says_monochrome1_is_left_as_it_is(caplog):
    film = chest()
    wrong = dicom_bytes(film, 12, PhotometricInterpretation="MONOCHROME1", Modality="DX")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_image(wrong, "scan 7"), film)
    assert "scan 7 says MONOCHROME1" in caplog.text
    caplog.clear()
    right = dicom_bytes(4095 - film, 12, PhotometricInterpretation="MONOCHROME1", Modality="DX")
    assert np.array_equal(read_image(right), film)
    other = dicom_bytes(film, 12, PhotometricInterpretation="MONOCHROME1", Modality="US")
    assert np.array_equal(read_image(other), 4095 - film)
    assert np.array_equal(read_image(wrong, inverted=True), 4095 - film)
    assert not caplog.text


def test_palette_color():
    palette = {}
    for number, channel in enumerate(("Red", "Green", "Blue")):
        entries = (np.arange(256) * (number + 1) % 256 * 257).astype("<u2")
        palette[f"{channel}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{channel}PaletteColorLookupTableData"] = entries.tobytes()
    data = dicom_bytes(FILM_8, PhotometricInterpretation="PALETTE COLOR", **palette)
    expected = np.dstack([FILM_8.astype(int) * factor % 256 for factor in (1, 2, 3)])
    assert np.array_equal(read_image(data), expected)
    del palette["BluePaletteColorLookupTableData"]
    with pytest.raises(UnreadableImageError, match="palette is missing"):
        read_image(dicom_bytes(FILM_8, PhotometricInterpretation="PALETTE COLOR", **palette))


def test_color_of_16_bits_becomes_8():
    deep = COLOR.astype(np.uint16) * 257
    assert np.array_equal(read_image(dicom_bytes(deep, 16)), COLOR)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"NumberOfFrames": 3}, "several images"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation is none of MONOCHROME1"),
        ({"PhotometricInterpretation": "RGB"}, "1 samples a pixel do not make RGB"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "8 and 16 are read"),
        ({"BitsStored": 12, "HighBit": 5}, "8 and 16 are read"),
        ({"Rows": 41}, "cut short: 4480 of 4592 bytes"),
        ({"Rows": 0}, "no pixels"),
        ({"Rows": 65535, "Columns": 65535}, "more than 100000000"),
        ({"Rows": None}, "does not say its rows"),
        ({"PixelData": None}, "holds no pixels"),
    ],
)
def test_what_is_not_read_is_said(fields, message):
    with pytest.raises(UnreadableImageError, match=f"Cannot read scan 7: .*{message}"):
        read_image(dicom_bytes(FILM, 12, **fields), "scan 7")


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, JPEG2000Lossless])
def test_a_frame_of_another_size_than_the_header_says_is_not_decoded(syntax):
    with pytest.raises(UnreadableImageError, match="not of the size in its header, 57 x 40"):
        read_image(dicom_bytes(FILM_8, 8, syntax, Columns=57))


def test_unread_encodings_are_named_if_they_are_known():
    data, syntax = dicom_bytes(FILM_8, 8, JPEGBaseline8Bit), JPEGBaseline8Bit.encode()
    with pytest.raises(UnreadableImageError, match="stored as JPEG 2000 Part 2 Multi-component"):
        read_image(data.replace(syntax, JPEG2000MC.encode()))
    with pytest.raises(UnreadableImageError, match="stored in an unknown way, which") as caught:
        read_image(data.replace(syntax, b"JANE DOE, 12 MAIN ST. "))
    assert "JANE" not in str(caught.value)


def several_frames(count: int, syntax, offsets: bool = True) -> bytes:
    """A file whose pixels are those of several images, though its header says one."""
    dataset = dicom_dataset(FILM_8, 8, syntax)
    if not syntax.is_encapsulated:
        dataset.PixelData = dataset.PixelData * count
    else:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([frame] * count, has_bot=offsets)
    return to_bytes(dataset)


@pytest.mark.parametrize("syntax", [*LOSSLESS.values(), JPEGBaseline8Bit])
@pytest.mark.parametrize("offsets", [True, False])
def test_more_frames_than_the_header_says_are_refused(syntax, offsets):
    assert read_image(several_frames(1, syntax, offsets)).shape == FILM_8.shape
    for count in (2, 3):
        with pytest.raises(UnreadableImageError, match="scan 7: its pixels are those of several images"):
            read_image(several_frames(count, syntax, offsets), "scan 7")


@pytest.mark.parametrize("kind", ["implicit", "explicit", "big endian"])
def test_padding_behind_the_pixels_is_none_of_them_but_more_rows_are_refused(kind):
    def with_more(more: bytes) -> bytes:
        dataset = dicom_dataset(FILM, 12, LOSSLESS[kind])
        dataset.PixelData += more
        return to_bytes(dataset)

    for padding in (b"", bytes(2), bytes(1000), b"pad " * 5):
        assert np.array_equal(read_image(with_more(padding)), FILM)
    for rows in (1, 39):
        with pytest.raises(UnreadableImageError, match="bytes of pixels, but its header says 4480"):
            read_image(with_more(FILM[:rows].tobytes()))


@pytest.mark.parametrize("syntax", [*LOSSLESS.values(), *LOSSY.values()])
def test_a_file_that_is_cut_short_says_so(syntax):
    data = dicom_bytes(FILM_8 if syntax in LOSSY.values() else FILM, None, syntax)
    whole = read_image(data)
    for cut in (1, 2, 100, len(data) // 2, len(data) - 500):
        if (
            cut < 9 and syntax.is_encapsulated and syntax != LOSSLESS["deflated"]
        ):  # only the end of the sequence is gone
            assert np.array_equal(read_image(data[:-cut]), whole)
        elif cut > 9 or syntax != LOSSLESS["deflated"]:  # which may close with a byte that means nothing
            with pytest.raises(UnreadableImageError, match="cut short"):
                read_image(data[:-cut])


@pytest.mark.parametrize("kind", ["RLE", "JPEG lossless", "JPEG-LS", "JPEG 2000", "JPEG baseline", "JPEG extended"])
@pytest.mark.parametrize("fragments", [1, 3])
def test_a_missing_end_of_the_fragments_is_forgiven_but_no_missing_fragment(kind, fragments):
    syntax = {**LOSSLESS, **LOSSY}[kind]
    dataset = dicom_dataset(FILM_8, 8, syntax)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    fragments = 1 if kind == "RLE" else fragments  # as the standard wants it
    dataset.PixelData = encapsulate([frame], fragments_per_frame=fragments)
    data = to_bytes(dataset)
    assert data.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    for missing in (8, 6, 4, 3):
        assert np.array_equal(read_image(data[:-missing]), read_image(data))
    if fragments > 1:
        last = data.rindex(b"\xfe\xff\x00\xe0")
        with pytest.raises(UnreadableImageError, match="cut short"):
            read_image(data[:last])


@pytest.mark.parametrize("said", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("field", ["VOILUTSequence", "ModalityLUTSequence"])
def test_entries_of_a_table_may_be_wider_than_it_says(said, field):
    entries = np.linspace(0, 65535, 4096).astype(np.uint16)
    image = read_image(dicom_bytes(FILM, 12, **{field: lut_item(0, said, entries)}))
    assert np.array_equal(image, entries[FILM])


@pytest.mark.parametrize(
    "kind",
    [
        *("1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.88.59"),
        *("1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.104.1", "1.2.840.10008.5.1.4.1.1.481.5"),
        *("1.2.840.10008.5.1.4.1.1.9.1.1", "1.2.840.10008.1.3.10"),
    ],
)
def test_a_report_is_no_image_but_not_damaged(kind):
    with pytest.raises(NoImageError, match="scan 7: it is not an image"):
        read_image(dicom_report(kind), "scan 7")


@pytest.mark.parametrize("kind", ["1.2.840.10008.5.1.4.1.1.1", "1.2.3.4.5"])
def test_an_image_without_pixels_is_damaged(kind):
    dataset = dicom_dataset(FILM, 12, SOPClassUID=kind)
    del dataset["PixelData"]
    with pytest.raises(UnreadableImageError, match="cut short") as caught:
        read_image(to_bytes(dataset))
    assert not isinstance(caught.value, NoImageError)


@pytest.mark.parametrize("name", ["implicit", "explicit", "big endian"])
@pytest.mark.parametrize("part", ["no preamble", "no meta", "no meta, group length"])
def test_files_without_a_preamble(name, part):
    """As scanners and archives of the nineties write them."""
    data = dicom_bytes(FILM, 12, LOSSLESS[name])
    if part == "no preamble":
        data = data[132:]
    else:
        order = "big" if name == "big endian" else "little"
        first = (0x0008).to_bytes(2, order) + (0x0016).to_bytes(2, order)
        data = data[data.index(first, 132) :]
        if part.endswith("length"):
            kind = b"" if name == "implicit" else b"UL"
            length = (4).to_bytes(4 if name == "implicit" else 2, order)
            data = (0x0008).to_bytes(2, order) + bytes(2) + kind + length + (100).to_bytes(4, order) + data
    assert np.array_equal(read_image(data), FILM)
    assert dicom_facts(data) == {}


def test_rle_of_more_than_the_image_is_not_decoded():
    dataset = dicom_dataset(FILM_8, 8, RLELossless)
    dataset.PixelData = encapsulate([bytes([1, *[0] * 3, 64, *[0] * 59]) + b"\x81\x00" * 50_000])
    with pytest.raises(UnreadableImageError, match="not of the size"):
        read_image(to_bytes(dataset))


def test_deflated_bomb():
    data = dicom_bytes(np.zeros((3000, 3000), np.uint8), 8, LOSSLESS["deflated"])
    assert len(data) < 20_000
    with pytest.raises(UnreadableImageError, match="unpacks to more"):
        parse_dicom(data, [], most_bytes=2**20)
    assert not read_image(data).any()


@pytest.mark.cxr
@pytest.mark.skipif(not CXR.is_dir(), reason="../shared/cxr is missing")
def test_real_radiographs_come_out_upright_unclipped_and_with_dark_air():
    images = [read_image(CXR / "raw" / f"{name}.dcm") for name in ("siim_pneumothorax", "fake_monochrome1")]
    assert np.array_equal(*images)  # the second is the first with a 1 for a 2 in its header, not turned over
    film = images[0].astype(float) / 255
    assert film.shape == (1024, 1024)
    assert [film[:40, :40].mean() < 0.1, film[:40, -40:].mean() < 0.1] == [True, True]  # air beside the neck
    assert film[400:600, 400:600].mean() > 0.6  # mediastinum
    assert film[-300:, 200:800].mean() > film[300:600, 200:350].mean() + 0.1  # abdomen below, lung above
    assert ((film <= 0.001).mean() < 0.03, (film >= 0.999).mean() < 0.03) == (True, True)
    assert len(np.unique(images[0])) > 200
