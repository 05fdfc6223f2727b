"""Files of features, statistics and gates that are damaged, edited, huge or not files: each is refused by name."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_dino.metrics import FeatureSet, GaussianStatistics, open_extractor
from diffusers_dino.metrics.copy_gate import CopyGate
from tiny import random_images

PIXELS = open_extractor("pixels")
KINDS = {
    "features": (FeatureSet.load, "not a file of features, or is damaged"),
    "statistics": (GaussianStatistics.load, "not a file of statistics, or is damaged"),
    "gate": (CopyGate.load, "not the file of a gate, or is damaged|edited|gate needs the extractor"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a file of each kind."""
    folder, images = tmp_path_factory.mktemp("files"), random_images(20, 1, 40)
    features = FeatureSet(PIXELS(images), tuple(map(str, range(20))), PIXELS.spec)
    features.save(folder / "features")
    GaussianStatistics.of(features).save(folder / "statistics")
    CopyGate(features, 0.4, PIXELS).save(folder / "gate")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def refused(kind, tmp_path) -> Callable[[bytes], None]:
    """Writes bytes, and reads them as that kind of file, which must be refused by name."""
    load, message = KINDS[kind]

    def check(content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / "file")
        assert str(tmp_path / "file") in str(error.value) or "gate needs the extractor" in str(error.value)

    return check


def header_of(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: bytes | dict, data: bytes) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_a_flipped_bit_anywhere_is_refused_at_once(kind, written, refused):
    content, started = written[kind], time.monotonic()
    places = [*range(8), *torch.linspace(8, len(content) - 1, 60).long().tolist()]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        refused(bytes(changed))
    assert time.monotonic() - started < 20


def test_files_that_say_they_hold_more_than_they_do_are_refused(kind, written, refused):
    header, data = header_of(written[kind])
    name = next(name for name in header if name != "__metadata__")
    shape, (start, stop) = header[name]["shape"], header[name]["data_offsets"]
    for changes in (
        {"shape": [10**12, *shape[1:]]},
        {"shape": [10**12, *shape[1:]], "data_offsets": [start, 10**15]},
        {"shape": [-1, *shape[1:]]},
        {"data_offsets": [stop, start]},
    ):
        refused(with_header({**header, name: {**header[name], **changes}}, data))
    refused(written[kind][:-1])
    refused(written[kind] + b"\0")
    refused(struct.pack("<Q", 1 << 60) + written[kind][8:])
    refused(b"")
    refused(b"no tensors")
    refused(next(content for other, content in written.items() if other != kind))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "null", '"text"', "{}", "{", "\\", "1e999"])
def test_descriptions_of_another_form_are_refused(kind, written, refused, text):
    header, data = header_of(written[kind])
    name = "gate" if kind == "gate" else "spec"
    refused(with_header({**header, "__metadata__": {name: text}}, data))


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", "256"), ("dim", 1e30), ("dim", -1), ("extractor", 7), ("weights_sha256", []), ("layer", None)],
)
def test_descriptions_of_wrong_types_are_refused(kind, written, refused, name, value):
    header, data = header_of(written[kind])
    entry = "gate" if kind == "gate" else "spec"
    description = json.loads(header["__metadata__"][entry])
    (description["spec"] if kind == "gate" else description)[name] = value
    del header["sha256" if "sha256" in header else "__metadata__"]
    refused(with_header({**header, "__metadata__": {entry: json.dumps(description)}}, data))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_read(kind, tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file is not .*a folder, a pipe or a device"):
        KINDS[kind][0](tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        KINDS[kind][0](tmp_path / "missing")


def without_hash(path: Path, **changes: torch.Tensor) -> None:
    """A file as it was written before files held a hash, with other tensors in the place of some."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({name: tensor for name, tensor in {**tensors, **changes}.items() if name != "sha256"}, path, metadata)


def test_files_from_before_there_was_a_hash_are_read(kind, written, tmp_path):
    (tmp_path / "file").write_bytes(written[kind])
    without_hash(tmp_path / "file")
    KINDS[kind][0](tmp_path / "file")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("features", {"keys": torch.zeros(20)}),
        ("features", {"keys": torch.tensor(list(b'{"a": 1}'), dtype=torch.uint8)}),
        ("features", {"keys": torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}),
        ("features", {"features": torch.zeros(20)}),
        ("features", {"features": torch.zeros(20, 256, dtype=torch.int32)}),
        ("statistics", {"count": torch.tensor(-3)}),
        ("statistics", {"count": torch.tensor([20, 20])}),
        ("statistics", {"count": torch.tensor(2.5)}),
        ("statistics", {"mean": torch.tensor(0.0, dtype=torch.float64)}),
        ("statistics", {"mean": torch.full((256,), float("nan"), dtype=torch.float64)}),
        ("statistics", {"mean": torch.zeros(256)}),
        ("statistics", {"scatter": torch.zeros(256, 255, dtype=torch.float64)}),
        ("statistics", {"scatter": -torch.eye(256, dtype=torch.float64)}),
        ("statistics", {"scatter": torch.eye(2, dtype=torch.float64), "mean": torch.zeros(2, dtype=torch.float64)}),
    ],
)
def test_arrays_of_another_form_are_refused(kind, changes, written, tmp_path):
    (tmp_path / "file").write_bytes(written[kind])
    without_hash(tmp_path / "file", **changes)
    load, message = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file")
