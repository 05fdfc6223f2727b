"""Small folders as each data set is laid out when downloaded (`source_layouts.yaml`), and a source of one's own."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dicom_files import dicom_bytes
from diffusers_dino.data.sources import OpenSource, open_source

LAYOUTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TABLE = {"name": "own", "table": {"file": "t.csv"}, "image": "images/{file}", "id": "{file}"}


def lay_out(name: str, root: Path) -> dict[str, dict[str, Any]]:
    """Write the files of a data set; returns the attributes that its records must have, by image id."""
    layout, expected = LAYOUTS[name], {}
    for table, content in layout.get("tables", {}).items():
        write(root / table, content)
    for image_id, facts in layout["records"].items():
        default = {"patient": image_id, "labels": None, "uncertain": (), "view": None, "split": None, "invert": None}
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
        expected[image_id] = {**default, **given, "masks": tuple(root / mask for mask in facts.get("masks", ()))}
    masks = [mask for facts in expected.values() for mask in facts["masks"]]
    for path in [*(root / image for image in layout["images"]), *masks]:
        picture(path, layout.get("depth", 8), layout.get("color", False))
    return expected


def write(path: Path, content: Any) -> None:
    """A file with a text, what a JSON holds, or the files of an archive by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tgz":
        with tarfile.open(path, "w:gz") as tar:
            for name, text in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        return
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def picture(path: Path, depth: int = 8, color: bool = False) -> None:
    """A tiny image of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".dcm", ".dicom"):
        path.write_bytes(dicom_bytes(np.arange(120, dtype=np.uint8).reshape(12, 10)))
    elif path.suffix == ".IMG":  # dark at the bottom, since large values are dark here
        np.repeat(np.arange(2048)[:, None] * 2, 2048, axis=1).astype(">u2").tofile(path)
    else:
        values = np.random.default_rng(len(str(path))).integers(0, 2**depth, (12, 10, 3) if color else (12, 10))
        Image.fromarray(values.astype(np.uint16 if depth > 8 else np.uint8)).save(path)


def own(tmp_path, rows: str, images: tuple[str, ...] = ("a.png", "b.png"), **more) -> OpenSource:
    """A source of a table `file,patient,finding` and some images."""
    write(tmp_path / "t.csv", "file,patient,finding\n" + rows)
    for image in images:
        picture(tmp_path / "images" / image)
    description = TABLE | {"patient": "{patient}", "labels": {"column": "{finding}", "none": ["none found"]}} | more
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(description))
    return open_source(tmp_path / "own.yaml", tmp_path)
