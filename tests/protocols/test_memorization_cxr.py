"""Copies planted among real radiographs, patients kept apart."""

import csv
from pathlib import Path

import pytest
import torch

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.metrics.copy_gate import CopyGate
from diffusers_dino.protocols.planted_copies import PLANTED

CXR = Path(__file__).parents[3] / "shared" / "cxr"


@pytest.mark.cxr
@pytest.mark.skipif(not (CXR / "nih").is_dir(), reason="../shared/cxr/nih is missing")
def test_copies_of_radiographs_are_found_among_those_of_other_patients():
    with open(CXR / "nih.csv", newline="") as file:
        patient = {Path(row["file"]).stem: row["patient"] for row in csv.DictReader(file)}
    images = open_images(CXR / "nih", Preprocessing(64))
    chosen = set(sorted(set(patient.values()))[::2])
    groups = [patient[key] for key in images.keys]
    trained = torch.tensor([group in chosen for group in groups])
    pixels = torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in range(len(images))])
    training, others = pixels[trained], pixels[~trained]
    gate = CopyGate.calibrate(training, groups=[group for group in groups if group in chosen])

    changes = ["exact", "mirrored", "slightly blurred (1 % of the side)", "mirrored and blurred"]
    # 1,000 "generated" images: all those of other patients, the rest copies
    copies = torch.cat([PLANTED[name](training) for name in changes])[::2][: 1000 - len(others)]
    assert len(copies) + len(others) == 1000
    assert not gate(copies).any()
    assert (~gate(others)).double().mean() <= 0.01
