"""The gate: planted copies among phantoms that all look alike, verdicts on one image alone, files that were edited."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.memorization.planted import PLANTED
from diffusers_dino.metrics import FeatureSet, open_extractor
from diffusers_dino.metrics.copy_gate import CopyGate, extract_views, search_training

PHANTOMS = Path(__file__).parents[2] / "examples/data/phantom-cxr"


@pytest.fixture(scope="module")
def phantoms() -> torch.Tensor:
    """`(512, 1, 64, 64)`: all of one person, and so more alike than patients are."""
    images = open_images(PHANTOMS / "phantom-cxr-train-*.tar", Preprocessing(64))
    return torch.stack([images[i]["image"] for i in range(len(images))])


@pytest.fixture(scope="module")
def gate(phantoms) -> CopyGate:
    return CopyGate.calibrate(phantoms[:384])


def test_planted_copies_are_found_with_few_false_alarms(phantoms, gate):
    training, others = phantoms[:384], phantoms[384:]
    changes = [name for name in PLANTED if name in ("exact", "mirrored") or "blurred" in name]
    copies = torch.cat([PLANTED[name](training[i % 2 :: 2]) for i, name in enumerate(changes)])
    assert len(changes) == 4
    assert not gate(copies).any()
    assert (~gate(others)).double().mean() <= 0.01


def test_a_verdict_depends_on_the_image_alone(phantoms, gate):
    images = torch.cat([phantoms[:20], phantoms[:20].flip(-1), 0.5 * phantoms[1:21] + 0.5 * phantoms[:20]])
    together = gate.distances(images)
    assert torch.equal(gate.distances(images.flip(0)).flip(0), together)
    assert torch.equal(torch.cat([gate.distances(image[None]) for image in images]), together)
    assert torch.equal(gate(images), together >= gate.threshold)
    assert 0 < gate(images).sum() < len(images)
    assert gate(images[:0]).shape == (0,)
    assert torch.allclose(gate.distances(phantoms[:4].expand(-1, 3, -1, -1)), gate.distances(phantoms[:4]), atol=1e-6)


def test_a_gate_is_the_same_after_it_was_saved(phantoms, gate, tmp_path):
    gate.save(tmp_path / "gate.safetensors")
    loaded = CopyGate.load(tmp_path / "gate.safetensors")
    assert loaded.fingerprint() == gate.fingerprint()
    assert torch.equal(loaded.distances(phantoms[:40]), gate.distances(phantoms[:40]))
    assert loaded.threshold == gate.threshold
    training = gate._training
    features = FeatureSet(training, tuple(map(str, range(len(training)))), gate.extractor.spec)
    stricter = CopyGate(features, 0.9, gate.extractor)
    assert stricter.fingerprint() != gate.fingerprint()
    assert stricter(phantoms[384:424]).sum() < gate(phantoms[384:424]).sum()


def test_edited_and_damaged_files_are_refused(gate, tmp_path):
    path = tmp_path / "gate.safetensors"
    gate.save(path)
    with safe_open(path, "pt") as file:
        training, description = file.get_tensor("training"), json.loads(file.metadata()["gate"])

    def fails(message: str, features: torch.Tensor = training, **changes) -> None:
        save_file({"training": features}, path, {"gate": json.dumps({**description, **changes})})
        with pytest.raises(ValueError, match=message):
            CopyGate.load(path)

    with pytest.raises(ValueError, match="different extractors"):
        CopyGate.load(path, open_extractor("pixels"))
    fails("edited", threshold=0.01)
    fails("edited", features=training[:-1].contiguous())
    fails("its format is 7", format=7)
    fails("is damaged", features=training.masked_fill(training > 0, float("nan")))
    fails("is damaged", features=training[:, 1:].contiguous())
    fails("is damaged", spec={})
    fails("relative distance in", threshold=1.5)
    fails("gate needs the extractor nobody", spec={**description["spec"], "extractor": "nobody"})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        CopyGate.load(path)
    with pytest.raises(FileNotFoundError):
        CopyGate.load(tmp_path / "missing.safetensors")


def test_other_extractors_make_gates_too(phantoms, tmp_path):
    gate = CopyGate.calibrate(phantoms[::4], open_extractor("pixels"), false_alarms=0.05)
    assert not gate(phantoms[::4].flip(-1)).any()
    gate.save(tmp_path / "gate.safetensors")
    assert CopyGate.load(tmp_path / "gate.safetensors").extractor.spec.extractor == "pixels"


def test_too_few_and_bad_images_are_refused(phantoms, gate):
    for message, count, false_alarms in (("it takes 299", 50, 0.01), ("At least 11", 10, 0.5), ("nothing", 0, 0.01)):
        with pytest.raises(ValueError, match=message):
            CopyGate.calibrate(phantoms[:count], false_alarms=false_alarms)
    with pytest.raises(ValueError, match="finite"):
        gate(phantoms[:2] * float("nan"))


def test_an_unreadable_image_does_not_move_the_groups_of_the_others(phantoms, tmp_path):
    for number, image in enumerate(phantoms[:40, 0]):
        Image.fromarray((image * 255).byte().numpy()).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "00.png").write_bytes(b"no image")
    images = open_images(tmp_path, Preprocessing(64))
    groups = [number // 2 for number in range(40)]  # 00 and 01 are of one patient, 02 and 03, ...
    gate = CopyGate.calibrate(images, groups=groups, false_alarms=0.1)
    clean = open_images(tmp_path, Preprocessing(64)).select([f"{number:02d}" for number in range(1, 40)])
    assert CopyGate.calibrate(clean, groups=groups[1:], false_alarms=0.1).fingerprint() == gate.fingerprint()
    with pytest.raises(ValueError, match="one group an image"):
        CopyGate.calibrate(images, groups=groups[1:], false_alarms=0.1)


def test_patients_with_two_like_images_do_not_lower_the_threshold(phantoms):
    twice = torch.cat([phantoms[:200:2], PLANTED["slightly blurred (1 % of the side)"](phantoms[:200:2])])
    views = extract_views(open_extractor("local-contrast"), twice)
    assert search_training(views).relative.median() < 0.3  # each finds its own patient
    assert search_training(views, list(range(100)) * 2).relative.median() > 0.5
