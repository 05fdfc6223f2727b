"""The gate: planted copies among phantoms that all look alike, verdicts on one image alone, files that were edited."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.memorization.planted import PLANTED
from diffusers_dino.fingerprints import hash_of
from diffusers_dino.metrics import FeatureSet, open_extractor
from diffusers_dino.metrics.copy_gate import CopyGate, ImageViews, extract_views, search_copies, search_training

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
    assert (~gate(phantoms[384:])).double().mean() <= 0.01
    copies = {change: make(phantoms[i:384:32]) for i, (change, make) in enumerate(PLANTED.items())}
    require_found(gate, copies)


def require_found(gate: CopyGate, copies: dict[str, torch.Tensor]) -> None:
    """At least 95 % of all, and all but one of each kind."""
    found = {change: ~gate(images.clamp(0, 1)) for change, images in copies.items()}
    assert torch.cat(list(found.values())).double().mean() >= 0.95
    assert {change for change, refused in found.items() if refused.sum() < len(refused) - 1} == set()


def test_other_changes_are_found_too(phantoms, gate):
    originals, cut = phantoms[7:384:32], PLANTED["3 % cut off each side"]
    smaller = F.interpolate(originals, 56, mode="bilinear", antialias=True)
    squashed = F.interpolate(originals, (64, 58), mode="bilinear", antialias=True)
    marked = originals.clone()
    marked[..., -12:, -16:] = 1
    changed = {
        "shrunk within a black border": F.pad(smaller, 4 * (4,)),
        "shrunk within a white border": F.pad(smaller, 4 * (4,), value=1),
        "black bands at two sides": F.pad(squashed, (3, 3)),
        "mirrored, turned and cropped": cut(PLANTED["turned by 5 degrees"](originals.flip(-1))),
        "mirrored, moved and darker": 0.8 * originals.flip(-1).roll((2, -2), (2, 3)),
        "a mark in a corner": marked,
    }
    require_found(gate, changed)
    assert not gate(F.interpolate(originals, 100, mode="bicubic").clamp(0, 1)).any()  # saved larger


def test_a_verdict_depends_on_the_image_alone(phantoms, gate):
    images = torch.cat([phantoms[:6], phantoms[:6].flip(-1), 0.5 * phantoms[1:7] + 0.5 * phantoms[:6]])
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
    assert torch.equal(loaded.distances(phantoms[380:388]), gate.distances(phantoms[380:388]))
    assert (loaded.threshold, loaded.balance) == (gate.threshold, gate.balance)
    training = gate._training
    features = FeatureSet(training, tuple(map(str, range(len(training)))), gate.extractor.spec)
    stricter = CopyGate(features, 0.9, gate.extractor)
    assert stricter.fingerprint() != gate.fingerprint()
    assert stricter(phantoms[384:400]).sum() < gate(phantoms[384:400]).sum()


def test_edited_and_damaged_files_are_refused(gate, tmp_path):
    path = tmp_path / "gate.safetensors"
    gate.save(path)
    with safe_open(path, "pt") as file:
        training, pictures = file.get_tensor("training"), file.get_tensor("pictures")
        description = json.loads(file.metadata()["gate"])

    def fails(message: str, features=training, pictures=pictures, **changes) -> None:
        tensors = {"training": features} if pictures is None else {"training": features, "pictures": pictures}
        save_file(tensors, path, {"gate": json.dumps({**description, **changes})})
        with pytest.raises(ValueError, match=message):
            CopyGate.load(path)

    with pytest.raises(ValueError, match="different extractors"):
        CopyGate.load(path, open_extractor("pixels"))
    fails("edited", threshold=0.01)
    fails("edited", balance=[0.5, 1.0])
    fails("edited", features=training[:-1].contiguous(), pictures=pictures[:-1].contiguous())
    fails("edited", pictures=255 - pictures)
    fails("edited", pictures=None)
    fails("in uint8", pictures=pictures[:-1].contiguous())
    fails("in uint8", pictures=pictures.float())
    for balance in ([1.0], [1.0, float("nan")], [-1.0, 1.0]):
        fails("positive number", balance=balance)
    fails("is damaged", balance=7)
    fails("its format is 7", format=7)
    fails("is damaged", features=training.masked_fill(training > 0, float("nan")))
    fails("is damaged", features=training[:, 1:].contiguous())
    fails("is damaged", spec={})
    fails("relative distance in", threshold=1.5)
    fails("gate needs the extractor nobody", spec={**description["spec"], "extractor": "nobody"})


def test_gates_from_before_there_were_pictures_are_read(phantoms, gate, tmp_path):
    path, spec = tmp_path / "gate.safetensors", gate.extractor.spec
    old = {"format": 1, "threshold": 0.4, "spec": spec.to_dict()}
    fingerprint = hash_of(json.dumps(old, sort_keys=True), gate._training)[:16]
    save_file({"training": gate._training}, path, {"gate": json.dumps({**old, "fingerprint": fingerprint})})
    read = CopyGate.load(path)
    assert (read.fingerprint(), read.threshold) == (fingerprint, 0.4)
    features = FeatureSet(gate._training, tuple(map(str, range(384))), spec)
    known = ImageViews(features, features.features[None])
    relative = search_copies(extract_views(gate.extractor, phantoms[380:390]), known).relative
    torch.testing.assert_close(read.distances(phantoms[380:390]), relative, atol=1e-5, rtol=0)
    assert read(PLANTED["turned by 10 degrees"](phantoms[:8])).any()  # which it misses, as it did
    read.save(tmp_path / "again.safetensors")
    assert CopyGate.load(tmp_path / "again.safetensors").fingerprint() == fingerprint


def test_other_extractors_make_gates_too(phantoms, tmp_path):
    gate = CopyGate.calibrate(phantoms[::8], open_extractor("pixels"), false_alarms=0.05)
    assert not gate(phantoms[::64].flip(-1)).any()
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
    views = extract_views(open_extractor("local-contrast"), twice)._replace(pictures=None)
    assert search_training(views).relative.median() < 0.3  # each finds its own patient
    assert search_training(views, list(range(100)) * 2).relative.median() > 0.5


def test_a_calibration_that_duplicates_have_spoiled_says_so(phantoms, caplog):
    again = PLANTED["slightly blurred (1 % of the side)"](phantoms[:2])  # the same images under other patients
    images = torch.cat([phantoms[:60], again])
    CopyGate.calibrate(images, false_alarms=0.05)
    assert "patient, or duplicates?" in caplog.text
    caplog.clear()
    CopyGate.calibrate(images, groups=[*range(60), 0, 1], false_alarms=0.05)
    assert not caplog.text
