"""Images for `diffusers-dino shards`, and runs of it in this process."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from scripts import call_script
from shard_runs import SALT, picture

if not all(map(find_spec, ("imagehash", "webdataset"))):  # `pip install diffusers-dino[shards]`
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of 14 images, one of them with a mask."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(14):
        Image.fromarray(picture(number)).save(folder / ("more" if number % 2 else "") / f"Doe^{number:02d}.png")
    Image.fromarray(picture(0) > 128).save(folder / "Doe^00.mask.png")
    return folder


@pytest.fixture
def flags(tmp_path, images) -> dict:
    (tmp_path / "salt").write_text(SALT)
    return {
        "source": images,
        "salt_file": tmp_path / "salt",
        "output_dir": tmp_path / "out",
        "size": 32,
        "test_fraction": 0.3,
        "shard_size": 4,
        "part_size": 5,
        "num_workers": 0,
    }


@pytest.fixture
def make(flags):
    """Run the command in this process; flags by keyword win. Returns the output folder."""

    def run(**changed) -> Path:
        call_script("shards", **{**flags, **changed})
        return Path({**flags, **changed}["output_dir"])

    return run
