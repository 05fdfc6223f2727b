"""What the quickstart says of its images as a set: how far they are from real ones, and whether they are copies."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.evaluation import MemorizationResult, evaluate_memorization
from diffusers_dino.evaluation.controls import with_fresh_unet
from diffusers_dino.evaluation.fidelity.protocol import (
    REAL,
    UNTRAINED,
    FidelityResult,
    FidelityScores,
    Sampling,
    score_fidelity,
)
from diffusers_dino.evaluation.generation import embed_images, generate_variations
from diffusers_dino.evaluation.memorization.plot import draw_closest_pairs, plot_memorization
from diffusers_dino.evaluation.memorization.table import table_of_sets
from diffusers_dino.metrics import extract_features, open_extractor
from diffusers_dino.metrics.bootstrap import Bootstrap, Estimate
from diffusers_dino.report import Report

EXTRACTOR = "tiny"  # trained on phantoms, and knows nothing else
NUM_STEPS, SEED, GUIDANCE = 20, 0, 2.0
NUM_PAIRS = 6


@dataclass(frozen=True)
class Realism:
    """Both results, and the pairs that are nearest to being copies."""

    fidelity: FidelityResult
    memorization: MemorizationResult
    pairs: Image

    def save(self, folder: Path) -> None:
        self.fidelity.save(folder / "fidelity.json")
        self.memorization.save(folder / "memorization.json")


def measure_realism(pipe: DinoDiffusionPipeline, test: Tensor, training: Tensor) -> Realism:
    """Compare one image generated from each unseen one, with and without guidance, with the training images."""
    tokens = embed_images(pipe, test)
    plain = generate_variations(pipe, tokens, SEED, num_inference_steps=NUM_STEPS, guidance_scale=1.0)
    guided = generate_variations(pipe, tokens, SEED, num_inference_steps=NUM_STEPS, guidance_scale=GUIDANCE)
    fresh = with_fresh_unet(pipe)
    untrained = generate_variations(fresh, tokens, SEED, num_inference_steps=NUM_STEPS, guidance_scale=1.0)
    synthetic = torch.cat([plain, guided])
    memorization = evaluate_memorization(training, synthetic, test, num_pairs=NUM_PAIRS).result
    with_guidance, without = (
        Sampling(type(pipe.scheduler).__name__, NUM_STEPS, scale, SEED, len(test)) for scale in (GUIDANCE, 1.0)
    )
    rows = (
        score(f"generated, guidance {GUIDANCE:g}", guided, training, with_guidance),
        score("generated, without guidance", plain, training, without),
        score(UNTRAINED, untrained, training, without),
        score(REAL, test, training),
    )
    pairs = draw_closest_pairs(memorization, synthetic, training)
    return Realism(FidelityResult(rows), memorization, pairs)


def score(name: str, images: Tensor, reference: Tensor, sampling: Sampling | None = None) -> FidelityScores:
    extractor = open_extractor(EXTRACTOR)
    features = extract_features(extractor, images, keys=[f"{name} {i}" for i in range(len(images))])
    training = extract_features(extractor, reference, keys=[f"training {i}" for i in range(len(reference))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few images: the report says so
        return score_fidelity(name, features, training, sampling=sampling, bootstrap=Bootstrap(repeats=50))


def add_realism(report: Report, realism: Realism) -> None:
    """Both sections of the report."""
    rows, memorization = realism.fidelity.rows, realism.memorization
    first = rows[0]
    report.add_heading("How far are generated images from real ones?")
    report.add_text(
        f"{first.num_images} images are compared with the {first.num_reference} training phantoms by the extractor "
        f"{first.features.extractor} ({first.features.dim} features; {first.features.resize}; "
        f"{first.features.pixel_range}; weights {first.features.weights_sha256 or 'none'}). The real images are the "
        "unseen phantoms themselves: a perfect model would reach their figures. So few images make every Fréchet "
        "distance too large; the kernel distance does not depend on their number."
    )
    report.add_table(
        ["images", "Fréchet distance [95 %]", "kernel distance [95 %]", "coverage [95 %]"],
        [[row.images, *(with_interval(x) for x in (row.frechet, row.kernel, row.coverage))] for row in rows],
    )
    report.add_heading("Are they copies?")
    report.add_text(
        "Each image and its mirror image are compared with all training phantoms. Training phantoms, compared with "
        f"each other, say what is too near: a relative distance below {memorization.threshold:.2f}, which "
        f"{memorization.false_alarms:.0%} of real images may have. docs/memorization.md says what this shows, and "
        "that it proves no privacy."
    )
    report.add_table(*table_of_sets(memorization))
    report.add_figure(plot_memorization(memorization), "Relative distance to the nearest training phantom.")
    report.add_image(realism.pairs, "The closest pairs: generated | its nearest training phantom.")


def with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
