"""DICOM files for tests, written by pydicom: the pixels by its encoders, by Pillow or by the small encoder below."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmwrite
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

LOSSLESS = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "RLE": RLELossless,
    "JPEG lossless": JPEGLosslessSV1,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
}
_Y, _X = np.mgrid[:40, :56]
FILM = np.round(2047.5 + 1200 * np.sin(_X / 9) * np.cos(_Y / 7)).astype(np.uint16)  # 12 bits
FILM[0, 0], FILM[-1, -1] = 0, 4095
FILM_8 = (FILM >> 4).astype(np.uint8)
COLOR = np.dstack([FILM_8, 255 - FILM_8, FILM_8 // 2])
LOSSY = {"JPEG baseline": JPEGBaseline8Bit, "JPEG extended": JPEGExtended12Bit}


def dicom_dataset(
    pixels: np.ndarray, bits: int | None = None, syntax: UID = ExplicitVRLittleEndian, **fields: Any
) -> Dataset:
    """A data set with one radiograph.

    Args:
        pixels: `(H, W)` or `(H, W, 3)` of an integer type of 8 or 16 bits.
        bits: Bits stored; by default all.
        syntax: How the pixels are encoded.
        fields: Further fields by keyword, which win over those that are set here.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    _encode(dataset, pixels, syntax)
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    return dataset


def dicom_bytes(pixels: np.ndarray, bits: int | None = None, syntax: UID = ExplicitVRLittleEndian, **fields) -> bytes:
    """The file of a `dicom_dataset`."""
    return to_bytes(dicom_dataset(pixels, bits, syntax, **fields))


def dicom_report(kind: str = "1.2.840.10008.5.1.4.1.1.88.11") -> bytes:
    """A file without pixels, of a kind that is not an image."""
    dataset = dicom_dataset(FILM, 12, SOPClassUID=kind)
    for keyword in ("Rows", "Columns", "PixelData", "PhotometricInterpretation", "BitsAllocated"):
        del dataset[keyword]
    return to_bytes(dataset)


def to_bytes(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def lut_item(first: int, bits: int, entries: np.ndarray) -> Sequence:
    """A modality LUT or VOI LUT sequence of one table."""
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    return Sequence([item])


def _encode(dataset: Dataset, pixels: np.ndarray, syntax: UID) -> None:
    """Put the pixels into the data set."""
    deep = pixels.itemsize == 2
    if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
        dataset.compress(syntax, pixels, generate_instance_uid=False)
        return
    dataset.file_meta.TransferSyntaxUID = syntax
    if not syntax.is_compressed or syntax == DeflatedExplicitVRLittleEndian:
        stored = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<"))
        dataset.add_new("PixelData", "OW" if deep else "OB", stored.tobytes() + b"\0" * (stored.nbytes % 2))
        return
    if syntax == JPEGLosslessSV1:
        frame = jpeg_lossless(pixels, dataset.BitsStored)
    else:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=95)
        frame = buffer.getvalue()
        if pixels.ndim == 3:
            dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.add_new("PixelData", "OB", encapsulate([frame]))
    dataset["PixelData"].is_undefined_length = True


def jpeg_lossless(pixels: np.ndarray, bits: int) -> bytes:
    """Encode grayscale as JPEG lossless with the left neighbour as prediction (ITU-T T.81 annex H, process 14).

    Every length category gets a Huffman code of 5 bits, which wastes space and needs no statistics.
    """
    height, width = pixels.shape
    values = pixels.astype(np.int64) & (2**bits - 1)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 2 ** (bits - 1)
    stream = []
    for difference in (values - predicted).ravel().tolist():
        category = abs(difference).bit_length()
        extra = difference if difference >= 0 else difference + 2**category - 1
        stream.append(f"{category:05b}" + (f"{extra:0{category}b}" if category else ""))
    text = "".join(stream)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content

    frame = bytes([bits, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 1, 1, 0x11, 0])
    header = segment(0xC4, table) + segment(0xC3, frame) + segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    return b"\xff\xd8" + header + scan + b"\xff\xd9"


# Fields that `dicom_facts` gives or the reader looks at, and some of those where identities belong.
_LOOKED_AT = (
    *("Modality", "ViewPosition", "Laterality", "ImageLaterality", "PixelSpacing", "ImagerPixelSpacing"),
    *("PatientID", "StudyInstanceUID", "PhotometricInterpretation", "NumberOfFrames", "WindowCenter", "WindowWidth"),
    *("VOILUTFunction", "RescaleSlope", "RescaleIntercept", "SpecificCharacterSet"),
)
_TEXT_TYPES = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
_WORDS = ("DOE", "ZZ", "DR", "MRN", "TEL", "BORN", "ST", "ID")


def planted_headers(count: int, seed: int = 0) -> list[tuple[bytes, list[str]]]:
    """Radiographs with identities at random places of the header, some of which should hold something else.

    Returns:
        Files, and the texts that were planted in each. Every file has one in a field that is looked at, one in a
        private field, one inside a sequence, one in the file's own group, and four in any fields of text.
    """
    random = np.random.default_rng(seed)
    fields = [tag for tag, (vr, *_) in DicomDictionary.items() if vr in _TEXT_TYPES and 0x00080000 <= tag < 0x7FE00000]
    film = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) % 4096
    files = []
    with warnings.catch_warnings():  # pydicom quotes what it finds impossible
        warnings.simplefilter("ignore")
        for number in range(count):
            secrets = [f"{word}{random.integers(10**9):09d}" for word in _WORDS]
            dataset = dicom_dataset(film, 12, WindowCenter=2000, WindowWidth=3000, Modality="DX", ViewPosition="PA")
            places = [tag_for_keyword(_LOOKED_AT[number % len(_LOOKED_AT)]), *random.choice(fields, 4).tolist()]
            for tag, secret in zip(places, secrets, strict=False):
                _plant(dataset, tag, dictionary_VR(tag), secret)
            _plant(dataset, 0x00090010, "LO", secrets[5])
            _plant(dataset, 0x00091001, "UN", secrets[5])
            item = Dataset()
            _plant(item, 0x00080005, "CS", secrets[6])
            _plant(item, 0x00283003, "LO", secrets[6])
            dataset.add_new(0x00283010, "SQ", Sequence([item]))
            dataset.file_meta.PrivateInformationCreatorUID = "1.2.3"
            _plant(dataset.file_meta, 0x00020016, "AE", secrets[7])
            files.append((to_bytes(dataset), secrets))
    return files


def _plant(dataset: Dataset, tag: int, vr: str, secret: str) -> None:
    """Put text into a field as its bytes, whatever the field is meant for."""
    value = secret.encode() + b" " * (len(secret) % 2)
    dataset[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
