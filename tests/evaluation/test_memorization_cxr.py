"""Copies planted among real radiographs, patients kept apart."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.memorization.planted import PLANTED
from diffusers_dino.metrics import open_extractor
from diffusers_dino.metrics.copy_gate import ImageViews, extract_views, search_copies, search_training
from diffusers_dino.metrics.neighbours import calibrate_threshold

CXR = Path(__file__).parents[3] / "shared" / "cxr"
CHANGES = ("exact", "mirrored", "slightly blurred (1 % of the side)", "mirrored and blurred")


@pytest.mark.cxr
@pytest.mark.skipif(not (CXR / "nih").is_dir(), reason="../shared/cxr/nih is missing")
def test_copies_of_radiographs_are_found_among_those_of_other_patients():
    """Half of the patients trained; the others' images and planted copies are searched. Ten ways of halving."""
    with open(CXR / "nih.csv", newline="") as file:
        patient = {Path(row["file"]).stem: row["patient"] for row in csv.DictReader(file)}
    images = open_images(CXR / "nih", Preprocessing(64))
    patients = np.array([patient[key] for key in images.keys])
    pixels = torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in range(len(images))])
    extractor = open_extractor("local-contrast")
    originals = extract_views(extractor, pixels)
    copies = [extract_views(extractor, PLANTED[name](pixels)) for name in CHANGES]

    alarms = []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(np.unique(patients))
        trained = np.isin(patients, order[: len(order) // 2])
        training = rows_of(originals, trained)
        threshold = calibrate_threshold(search_training(training, patients[trained].tolist()).relative)
        for views in copies:
            assert (search_copies(rows_of(views, trained), training).relative < threshold).all()
        alarms += [(search_copies(rows_of(originals, ~trained), training).relative < threshold).double().mean()]
    assert sum(alarms) / len(alarms) <= 0.01
    assert max(alarms) <= 0.025


def rows_of(views: ImageViews, chosen: np.ndarray) -> ImageViews:
    keys = [key for key, wanted in zip(views.upright.keys, chosen, strict=True) if wanted]
    return ImageViews(views.upright.select(keys), views.features[:, torch.from_numpy(chosen)])
