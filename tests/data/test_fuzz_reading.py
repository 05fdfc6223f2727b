import io
import time
import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")
from dicom_files import COLOR, FILM, FILM_8, LOSSLESS, LOSSY, dicom_bytes, lut_item
from diffusers_dino.data import UnreadableImageError, read_image
from image_files import deep_png, deep_tiff, encoded

COUNT = 1000


def whole_files() -> dict[str, bytes]:
    """A good file of every kind that is read."""
    gray, deep, color = (Image.fromarray(array) for array in (FILM_8, FILM, COLOR))
    files = {f"{kind} gray": encoded(gray, kind) for kind in ("png", "jpeg", "tiff", "webp", "bmp", "gif")}
    files |= {f"{kind} color": encoded(color, kind) for kind in ("png", "jpeg", "tiff", "webp", "bmp")}
    files |= {"png 16": encoded(deep, "png"), "tiff 16": encoded(deep, "tiff")}
    for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        files[f"tiff {name}"] = encoded(gray, "tiff", compression=name)
    files["png color 16"] = deep_png(COLOR.astype(np.uint16) * 257)
    files["tiff color 16"] = deep_tiff(COLOR.astype(np.uint16) * 257, compressed=True)
    files |= {"png palette": encoded(color.quantize(64), "png"), "png alpha": encoded(color.convert("RGBA"), "png")}
    for name, save in (("npy", np.save), ("npz", lambda file, array: np.savez_compressed(file, image=array))):
        save(buffer := io.BytesIO(), FILM)
        files[name] = buffer.getvalue()
    files |= {f"dicom {name}": dicom_bytes(FILM, 12, syntax) for name, syntax in LOSSLESS.items()}
    files |= {f"dicom {name}": dicom_bytes(FILM_8, 8, syntax) for name, syntax in LOSSY.items()}
    shown = {"VOILUTSequence": lut_item(300, 10, np.arange(1000)), "WindowCenter": 2000, "WindowWidth": 900}
    files["dicom shown"] = dicom_bytes(FILM, 12, PhotometricInterpretation="MONOCHROME1", **shown)
    return files


def damaged(data: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    """Cut a file, flip some of its bits, overwrite some of its bytes, or put another file's start before it."""
    way, changed = random.integers(4), bytearray(data)
    if way == 0:
        return data[: random.integers(len(data))]
    if way == 1:
        for place in random.integers(0, len(data), random.integers(1, 6)):
            changed[place] ^= 1 << random.integers(8)
    elif way == 2:
        start = random.integers(len(data))  # somewhere, and there close together
        for place in random.integers(start, min(start + 300, len(data)), random.integers(1, 40)):
            changed[place] = random.integers(256)
    else:
        length = random.integers(4, 400)
        changed[:length] = others[random.integers(len(others))][:length]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # decoders' remarks on damage
def test_a_thousand_damaged_files_are_each_read_or_refused():
    random = np.random.default_rng(0)
    files = whole_files()
    for name, data in files.items():
        assert read_image(data, name).shape[:2] == FILM.shape
    kinds, originals = list(files), list(files.values())
    messages, arrays, slowest = [], [], 0.0
    for number in range(COUNT):
        kind = kinds[number % len(kinds)]
        data = damaged(files[kind], originals, random)
        start = time.monotonic()
        try:
            arrays.append(read_image(data, kind))
        except UnreadableImageError as error:
            messages.append((kind, str(error)))
        slowest = max(slowest, time.monotonic() - start)
    assert len(arrays) + len(messages) == COUNT
    assert min(len(arrays), len(messages)) > COUNT // 5
    assert slowest < 10
    for array in arrays:
        assert array.dtype in (np.uint8, np.uint16)
        assert array.ndim == 2 or (array.shape[2] == 3 and array.dtype == np.uint8)
        assert array.size
    for kind, message in messages:
        assert message.startswith(f"Cannot read {kind}: ")
        assert len(message) < 500


def test_noise_and_starts_of_formats_alone():
    random = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in whole_files().values():
            for noise in (b"", random.bytes(500), bytes(500), b"\xff" * 500):
                with pytest.raises(UnreadableImageError):
                    read_image(data[:24] + noise)
