"""Each command that fills a folder is refused where another run is at work, before it has changed anything there."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from diffusers_dino.cli import COMMANDS
from scripts import EXAMPLES, TOY_CLASSIFIER, call_script, image_folder, tiny_training

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pipeline, images with labels, patients and masks, and lists of keys."""
    folder = tmp_path_factory.mktemp("two")
    tiny.tiny_pipeline().save_pretrained(folder / "model")
    tiny_training(folder, 16)
    rows = [f"{number:03d}.png,p{number % 8},{'Mass' if number % 2 else 'No Finding'}\n" for number in range(16)]
    (folder / "labels.csv").write_text("".join(["file,patient,findings\n", *rows]))
    (folder / "keys.txt").write_text("".join(f"{number:03d}\n" for number in range(8)))
    (folder / "salt").write_text("a salt of 16 bytes")
    image_folder(folder / "other", 8, size=40)
    (folder / "masked" / "images").mkdir(parents=True)
    (folder / "masked" / "masks").mkdir()
    for number in range(4):
        (folder / "masked/images" / f"{number}.png").write_bytes((folder / f"images/{number:03d}.png").read_bytes())
        mask = np.zeros((40, 40), np.uint8)
        mask[10:30, 5:20] = 255
        Image.fromarray(mask).save(folder / "masked/masks" / f"{number}.png")
    return folder


def commands(place: Path, out: Path) -> dict[str, dict]:
    """The flags of each command and script that fills a folder."""
    images, model = {"data_dir": place / "images", "output_dir": out}, {"model": place / "model"}
    labelled = images | TOY_CLASSIFIER | {"labels": place / "labels.csv", "num_labels": 1}
    training = {"train_data_dir": place / "images", "resolution": 32}
    frozen = training | {name: place / name for name in ("vae", "conditioner")}
    run = {"max_train_steps": 2, "train_batch_size": 2, "output_dir": out}
    return {
        "shards": {"source": place / "images", "salt_file": place / "salt", "output_dir": out, "num_workers": 0},
        "cache": frozen | {"feature_cache": out},
        "synthesise": images | model | {"ratio": 1},
        "evaluate fidelity": images | model | {"features": "tiny"},
        "evaluate memorization": {"training": place / "images", "false_alarms": 0.2, "output_dir": out},
        "evaluate labels": labelled | {"synthetic": place / "other", "num_folds": 3},
        "evaluate augmentation": labelled | model | {"regimes": 4, "num_folds": 2},
        "evaluate segmentation": {"pipeline": place / "model", "data": place / "masked", "output_dir": out},
        "evaluate interpolation": images | model | {"training_keys": place / "keys.txt"},
        "extract": {"data": place / "images", "output": out / "features.safetensors"},
        "splice": images | model | {"data_dir": place / "masked"},
        "publish": model | {"output_dir": out},
        "train_dino.py": frozen | run | {"unet_config": place / "unet_config"},
        "train_vae.py": training | run | {"num_validation_images": 2},
        "pretrain_dino.py": training | run,
        "train_prior.py": training | run | {"conditioner": place / "conditioner", "width": 16, "num_heads": 2},
        "distill_dino.py": training | run | {"pretrained_pipeline": place / "model"},
    }


NAMES = list(commands(Path(), Path()))


def test_all_that_fill_a_folder_are_here():
    flags = {name: command.load().Arguments.__dataclass_fields__ for name, command in COMMANDS.items()}
    assert set(NAMES) >= {name for name, known in flags.items() if {"output_dir", "feature_cache"} & set(known)}
    assert set(NAMES) >= {path.name for path in EXAMPLES.glob("*_*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_which_another_run_is_at_work_is_refused(place, tmp_path, monkeypatch, name):
    out, flock, asked = tmp_path / "out", fcntl.flock, []

    def refuse(file, operation):
        path = Path(getattr(file, "name", ""))
        if not path.resolve().is_relative_to(out):
            return flock(file, operation)
        asked.append(path)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Exception, match=f"Another run is at work (in|on) {out}"):
        call_script(name, **commands(place, out)[name])
    assert asked
    assert {path for path in out.rglob("*") if path.is_file()} == set(asked)
