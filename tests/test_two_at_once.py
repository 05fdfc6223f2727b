"""Each command that fills a folder is refused where another process is at work, before it has changed anything."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from checkpoints import save_transformers
from diffusers_dino.cli import COMMANDS
from forks import FORKING
from scripts import EXAMPLES, TOY_CLASSIFIER, call_script, image_folder, masked_folder, tiny_training

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pipeline, images with labels, patients and masks, and lists of keys."""
    folder = tmp_path_factory.mktemp("two")
    tiny.tiny_pipeline().save_pretrained(folder / "model")
    tiny.tiny_pipeline(conditioner=tiny.tiny_conditioner(tokens="all")).save_pretrained(folder / "on all tokens")
    save_transformers(tiny.tiny_encoder(), folder / "teacher")
    tiny_training(folder, 16)
    rows = [f"{number:03d}.png,p{number % 8},{'Mass' if number % 2 else 'No Finding'}\n" for number in range(16)]
    (folder / "labels.csv").write_text("".join(["file,patient,findings\n", *rows]))
    (folder / "keys.txt").write_text("".join(f"{number:03d}\n" for number in range(8)))
    (folder / "salt").write_text("a salt of 16 bytes")
    image_folder(folder / "other", 8, size=40)
    masked_folder(folder / "masked", 4)
    call_script("synthesise", **commands(folder, folder / "set")["synthesise"])
    return folder


def commands(place: Path, out: Path) -> dict[str, dict]:
    """The flags of each command and script that fills a folder."""
    images, model = {"data_dir": place / "images", "output_dir": out}, {"model": place / "model"}
    drawn = images | model | {"num_inference_steps": 1}
    labels = {"labels": place / "labels.csv"}
    labelled = TOY_CLASSIFIER | labels | {"num_labels": 1, "validation_fraction": 0, "max_train_steps": 1}
    suite = {"table": place / "labels.csv", "network_steps": 1, "classifier_steps": 1, "draw": False}
    training = {"train_data_dir": place / "images", "resolution": 32}
    frozen = training | {name: place / name for name in ("vae", "conditioner")}
    run = {"max_train_steps": 1, "train_batch_size": 2, "output_dir": out}
    return {
        "shards": {"source": place / "images", "salt_file": place / "salt", "output_dir": out, "num_workers": 0},
        "cache": frozen | {"feature_cache": out},
        "synthesise": drawn | labels | {"ratio": 1, "num_drawn": 1},
        "evaluate fidelity": drawn | {"features": "tiny", "bootstrap_repeats": 20, "untrained": False},
        "evaluate memorization": {
            "training": place / "images",
            "false_alarms": 0.2,
            "num_planted": 1,
            "size": 32,
            "output_dir": out,
        },
        "evaluate labels": images | labelled | {"synthetic": place / "set", "num_folds": 3},
        "filter": images | labelled | {"synthetic": place / "set", "num_folds": 3, "bootstrap_repeats": None},
        "evaluate augmentation": drawn | labelled | {"regimes": 4, "ratios": 1, "num_folds": 2},
        "evaluate segmentation": {
            "pipeline": place / "model",
            "data": place / "masked",
            "timesteps": 300,
            "thresholds": 0.5,
            "num_examples": 1,
            "untrained": False,
            "refine": False,
            "output_dir": out,
        },
        "evaluate interpolation": drawn | {"training_keys": place / "keys.txt", "num_images": 2},
        "evaluate membership": model
        | {
            "training": place / "images",
            "training_keys": place / "keys.txt",
            "held_out": place / "images",
            "num_noises": 1,
            "output_dir": out,
        },
        "evaluate suite": suite
        | {"synthetic": place / "set", "real": place / "images", "size": 32, "false_alarms": 0.2, "output_dir": out},
        "extract": {"data": place / "images", "output": out / "features.safetensors"},
        "splice": images | {"model": place / "on all tokens", "data_dir": place / "masked"},
        "publish": model | {"output_dir": out},
        "train_dino.py": frozen | run | {"unet_config": place / "unet_config"},
        "train_vae.py": training | run | {"num_validation_images": 2},
        "pretrain_dino.py": training | run | {"hidden_size": 24, "num_hidden_layers": 1, "head_hidden_size": 32},
        "train_prior.py": training
        | run
        | {"conditioner": place / "conditioner", "width": 16, "num_heads": 2, "validation_data_dir": place / "images"},
        "distill_dino.py": training | run | {"pretrained_pipeline": place / "model"},
        "distill_encoder.py": training
        | run
        | {"teacher": place / "teacher", "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "validation_data_dir": place / "images", "num_statistics_images": 16},
    }


NAMES = list(commands(Path(), Path()))


def test_all_that_fill_a_folder_are_here():
    flags = {name: command.load().Arguments.__dataclass_fields__ for name, command in COMMANDS.items()}
    assert set(NAMES) >= {name for name, known in flags.items() if {"output_dir", "feature_cache"} & set(known)}
    assert set(NAMES) >= {path.name for path in EXAMPLES.glob("*_*.py")}


class Watch:
    """Stops a process where it changes a folder for the first time under its lock, and notes each change without."""

    def __init__(self, out: Path, held: Any, go_on: Any) -> None:
        self.out, self.held, self.go_on = str(out), held, go_on
        self.locks: set[str] = set()
        self.without: list[str] = []
        self.busy = False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "fcntl.flock":
            self.locks.add(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        changes = event in ("os.rename", "os.remove")
        changes |= event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        place = arguments[0] if changes else None
        if self.busy or not isinstance(place, (str, Path)) or not str(place).startswith(f"{self.out}/"):
            return
        if str(place).endswith("lock"):
            return
        self.busy = True
        if self._is_locked():
            if not self.held.is_set():
                self.held.set()
                assert self.go_on.wait(60)
        elif self.locks:
            self.without.append(f"{event} {place}")
        self.busy = False

    def _is_locked(self) -> bool:
        """Whether another opening of the lock's file could not lock it."""
        for path in self.locks:
            if path.startswith(self.out) and os.path.exists(path):
                with open(path) as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return True
        return False


def work(name: str, place: Path, out: Path, held: Any, go_on: Any) -> None:
    """What the first process does: all of the command, but for a pause in the middle."""
    torch.set_num_threads(1)
    watch = Watch(out, held, go_on)
    sys.addaudithook(watch)
    call_script(name, **commands(place, out)[name])
    assert not watch.without, f"changed without the lock: {watch.without}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_second_process_is_refused_and_the_first_one_ends_well(place, tmp_path, name):
    out, held, go_on = tmp_path / "out", FORKING.Event(), FORKING.Event()
    first = FORKING.Process(target=work, args=(name, place, out, held, go_on), daemon=False)
    first.start()
    try:
        while not held.wait(0.02):
            assert first.is_alive(), "the command has not changed the folder under a lock"
        before = contents(out)
        with pytest.raises(Exception, match=f"Another run is at work (in|on) {out}"):
            call_script(name, **commands(place, out)[name])
        assert contents(out) == before
        go_on.set()
        first.join(60)
        assert first.exitcode == 0
        assert set(contents(out)) > set(before)
    finally:
        first.kill()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")}
