"""`diffusers-dino evaluate memorization` as a user runs it, on phantoms."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import scripts
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation import MemorizationResult
from diffusers_dino.metrics.copy_gate import CopyGate

PHANTOMS = Path(__file__).parents[1] / "examples/data/phantom-cxr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """128 real images of 32 px, of 64 patients; 30 "generated" ones, of which two are copies."""
    root = tmp_path_factory.mktemp("images")
    images = open_images(PHANTOMS / "phantom-cxr-train-00000[0-1].tar", Preprocessing(32))
    (root / "real").mkdir()
    (root / "synthetic").mkdir()
    rows = ["file,patient"]
    for number in range(158):
        pixels = Image.fromarray((images[number]["image"][0] * 255).round().byte().numpy())
        if number < 128:
            pixels.save(root / "real" / f"real-{number:03d}.png")
            rows.append(f"real-{number:03d}.png,patient-{number // 2}")
        else:
            pixels.save(root / "synthetic" / f"new-{number:03d}.png")
    copy = Image.open(root / "real" / "real-004.png")
    copy.save(root / "synthetic" / "new-130.png")
    copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "synthetic" / "new-140.png")
    (root / "patients.csv").write_text("\n".join(rows) + "\n")
    (root / "training_keys.txt").write_text("\n".join(f"real-{i:03d}" for i in range(104)))
    return root


@pytest.fixture
def flags(folder, tmp_path) -> dict:
    return {
        "training": folder / "real",
        "training_keys": folder / "training_keys.txt",
        "held_out": folder / "real",
        "synthetic": folder / "synthetic",
        "patients": folder / "patients.csv",
        "size": 32,
        "false_alarms": 0.05,
        "num_pairs": 4,
        "num_planted": 1,
        "output_dir": tmp_path / "out",
    }


def test_the_report_names_the_copies_and_no_patient(flags, folder, capsys):
    scripts.call_script("evaluate memorization", **flags)
    out = flags["output_dir"]
    result = MemorizationResult.load(out / "memorization.json")
    assert (result.training.num_images, result.held_out.num_images, result.synthetic.num_images) == (104, 24, 30)
    assert {(x.key, x.training_key, x.mirrored) for x in result.closest[:2]} == {
        ("new-130", "real-004", False),
        ("new-140", "real-004", True),
    }
    report = (out / "report.html").read_text()
    assert "local-contrast" in report
    assert f"Below {result.threshold:.3f}" in report
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', report))
    for name in ("report.html", "memorization.json"):
        text = (out / name).read_text()
        assert "new-130" in text
        assert "patient-" not in text
        assert str(folder) not in text
    assert Image.open(out / "pairs.png").width == 6 * 32
    assert Image.open(out / "distances.png").width > 100
    gate = CopyGate.load(out / "gate.safetensors")
    assert gate.fingerprint() == json.loads((out / "memorization.json").read_text())["gate"]
    images = open_images(folder / "synthetic", Preprocessing(32))
    passed = gate(torch.stack([images[i]["image"] for i in range(len(images))]))
    assert int((~passed).sum()) == result.synthetic.copies
    assert f"synthetic | 30 | {result.synthetic.copies}" in capsys.readouterr().out


def test_without_synthetic_images_the_gate_is_made(flags):
    scripts.call_script("evaluate memorization", **{**flags, "synthetic": None, "held_out": None, "draw_pairs": False})
    out = flags["output_dir"]
    assert sorted(path.name for path in out.iterdir()) == [
        "distances.png",
        "gate.safetensors",
        "lock",
        "memorization.json",
        "report.html",
    ]


def test_what_cannot_be_measured_is_said(flags, tmp_path):
    def fails(message: str, error: type[Exception] = ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            scripts.call_script("evaluate memorization", **{**flags, **changed})

    (tmp_path / "empty").mkdir()
    fails("Give --training", training=None)
    fails("empty", FileNotFoundError, synthetic=tmp_path / "empty")
    fails("No image is held out", training_keys=None)
    fails("No image is held out", training_keys=None, held_out=f"{flags['held_out']}/.")  # the same folder
    fails("104 of the held-out images are training images, such as real-000", held_out_keys=flags["training_keys"])
    fails("it takes 2995", false_alarms=0.001)
    fails("has no column 'person'", patient_column="person")
    fails("There is no feature extractor", extractor="nobody")
