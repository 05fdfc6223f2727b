"""What a prior reaches: tokens, images and labels against real ones, on the bundled phantoms or on a folder of images.

    python benchmarks/prior.py --output_dir outputs/prior-benchmark

Without images of your own, the prior and the model are the bundled ones and the held-out images the test phantoms. The
judge is a classifier that is trained on the training images and never sees a generated one. `prior.json` holds all
figures with N, seeds and controls.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner, DinoPriorPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import ImageDataset, Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable, read_label_table, stored_labels
from diffusers_dino.evaluation.classifier import ClassifierSettings, LabelledImages, predict, train_classifier
from diffusers_dino.evaluation.generation import generate_variations, stack_images
from diffusers_dino.evaluation.packed import PackedImages
from diffusers_dino.evaluation.prior import PriorResult, evaluate_prior
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics import open_extractor
from diffusers_dino.metrics.auroc import label_auroc, macro_auroc
from diffusers_dino.metrics.bootstrap import Bootstrap, bootstrap_interval, estimate_frechet
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.metrics.neighbours import nearest_by_cosine
from diffusers_dino.prior import Condition
from diffusers_dino.seeds import generator_for
from diffusers_dino.sheets import contact_sheet

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


@dataclass
class Arguments:
    model: str = flag(str(DATA / "tiny-diffusion"), "DinoDiffusionPipeline; with --only_tokens also a conditioner.")
    prior: str = flag(str(DATA / "tiny-prior"), "DinoPriorPipeline.")
    training: str = flag(f"{DATA}/phantom-cxr/phantom-cxr-train-*.tar", "Training images of both.")
    held_out: str = flag(f"{DATA}/phantom-cxr/phantom-cxr-test-*.tar", "Images that neither has seen.")
    labels: str = flag("stored", "CSV of labels, or `stored` beside the images.")
    training_keys: str | None = flag(None, "Text file of the keys of the training images in --training.")
    held_out_keys: str | None = flag(None, "The same for --held_out.")
    size: int = flag(128, "Side of the images in pixels.")
    remove_borders: bool = flag(False, "Cut uniform borders off.")
    extractor: str = flag("tiny", "Features of the Fréchet distance.")
    num_sets: int = flag(8, "Sets of as many draws as held-out images.")
    num_image_sets: int = flag(3, "Of those, sets that images are made of.")
    seed: int = flag(0, "Seed of everything.")
    guidance_scale: float = flag(1.0, "Of the prior.")
    image_guidance_scale: float = flag(2.0, "Of the model.")
    num_inference_steps: int = flag(20, "Of the model.")
    judge_steps: int = flag(1500, "Updates of the judge.")
    judge_size: int = flag(64, "Pixels that it sees.")
    only_tokens: bool = flag(False, "Leave the images out.")
    output_dir: str = flag("outputs/prior-benchmark", "Where figures and pictures go.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folder = make_writable_folder(args.output_dir)
    if args.only_tokens:
        inside = "conditioner" if Path(args.model, "conditioner").is_dir() else None
        conditioner, pipe = DinoImageConditioner.from_pretrained(args.model, subfolder=inside), None
    else:
        pipe = DinoDiffusionPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
        conditioner = pipe.conditioner
    prior = DinoPriorPipeline.from_pretrained(args.prior)
    prior.set_progress_bar_config(disable=True)
    prior.check_conditioner(conditioner)
    training, known = load(args, args.training, args.training_keys)
    held_out, asked = load(args, args.held_out, args.held_out_keys)
    tokens, real = embed(conditioner, training), embed(conditioner, held_out)
    condition = condition_of(prior, asked)

    result = evaluate_prior(
        prior, tokens, real, condition, num_sets=args.num_sets, seed=args.seed, guidance_scale=args.guidance_scale
    )
    unconditional = evaluate_prior(prior, tokens, real, num_sets=args.num_sets, seed=args.seed)
    figures: dict[str, Any] = {"arguments": asdict(args), "asked": asdict(result), "anything": asdict(unconditional)}
    for name, each in (("labels of the held-out images", result), ("anything", unconditional)):
        print(f"\nTokens, asked for {name}: {each.num_held_out} held out, {each.num_training} of training")
        print_tokens(each)
    figures["judge of tokens"] = judge_tokens(args, prior, tokens, known, real, asked, condition)
    write_json(folder / "prior.json", figures, indent=2)
    if args.only_tokens:
        return
    images = make_images(args, pipe, prior, condition, real)
    figures["frechet"] = compare_images(args, images, stack_images(training), stack_images(held_out))
    figures["judge"] = judge(args, folder, training, known, held_out, asked, images, prior.labels)
    figures["strength"] = sweep_strength(args, pipe, prior, condition, real)
    write_json(folder / "prior.json", figures, indent=2)
    rows = 4
    columns = [
        stack_images(held_out)[:rows],
        *(images[name][:rows] for name in ("reconstructions", "asked", "anything")),
    ]
    contact_sheet(*columns).save(folder / "prior.png")


def load(args: Arguments, source: str, keys: str | None) -> tuple[ImageDataset, LabelTable]:
    images = open_images(source, Preprocessing(args.size, args.remove_borders))
    if keys is not None:
        images = images.select(Path(keys).read_text().splitlines())
    if args.labels == "stored":
        return images, stored_labels(images)
    return images, read_label_table(args.labels).select(images.keys)


def embed(conditioner: DinoImageConditioner, images: ImageDataset) -> Tensor:
    """Condition tokens `(N, S, D)` of all images."""
    blocks = torch.arange(len(images)).split(64)
    return torch.cat([conditioner.encode([images[i]["image"] for i in rows.tolist()]) for rows in blocks])


def condition_of(prior: DinoPriorPipeline, table: LabelTable) -> Condition:
    """All labels of each image known."""
    rows = [
        prior.prior.conditions.encode([n for n in prior.labels if n in own], [n for n in prior.labels if n not in own])
        for own in table.labels
    ]
    return Condition(*(torch.cat([row[i] for row in rows]) for i in range(3)))


def print_tokens(result: PriorResult) -> None:
    print("| tokens | Fréchet distance | two-sample accuracy | copies |\n| --- | --- | --- | --- |")
    for row in result.rows:
        frechet, test, copies = "", "", ""
        if row.frechet is not None:
            frechet = f"{row.frechet:.1f} [{row.frechet_low:.1f}, {row.frechet_high:.1f}]"
            test = f"{row.two_sample:.2f} [{row.two_sample_low:.2f}, {row.two_sample_high:.2f}]"
        if row.num_tokens:
            copies = f"{row.copies:.1%} [{row.copies_low:.1%}, {row.copies_high:.1%}] of {row.num_tokens}"
        print(f"| {row.name} | {frechet} | {test} | {copies} |")


def judge_tokens(
    args: Arguments,
    prior: DinoPriorPipeline,
    tokens: Tensor,
    known: LabelTable,
    real: Tensor,
    asked: LabelTable,
    condition: Condition,
) -> dict[str, Any]:
    """Macro AUROC of the labels asked for, by logistic regressions on the tokens of real training images."""
    flat = prior.prior.standardise(tokens).flatten(1).numpy()
    labels, targets = prior.labels, asked.targets(prior.labels)
    truth = known.targets(labels)
    models = [LogisticRegression(C=0.01, max_iter=1000).fit(flat, truth[:, i]) for i in range(len(labels))]
    anything = prior.prior.conditions.unknown(len(real))
    sets = {"held out": real, "asked": draw(args, prior, condition), "anything": draw(args, prior, anything)}
    figures: dict[str, Any] = {"labels": labels}
    print("\nJudge of tokens: logistic regressions on the real training tokens")
    for name, each in sets.items():
        rows = prior.prior.standardise(each).flatten(1).numpy()
        scores = np.stack([model.decision_function(rows) for model in models], axis=1)
        figures[name] = with_interval(scores, targets)
        print(
            f"| {name} | {figures[name]['macro']:.3f} [{', '.join(f'{x:.3f}' for x in figures[name]['interval'])}] |"
        )
    return figures


def with_interval(scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Macro AUROC of R sets of as many images as there are targets, drawn by held-out image."""
    groups = np.arange(len(scores)) % len(targets)  # images that were asked for alike belong together
    targets = np.tile(targets, (len(scores) // len(targets), 1))
    interval = bootstrap_interval(
        lambda rows: macro_auroc(scores[rows], targets[rows]), len(groups), groups.tolist(), 500
    )
    per_label = label_auroc(scores, targets).tolist()
    return {"macro": macro_auroc(scores, targets), "interval": interval, "per label": per_label}


def draw(args: Arguments, prior: DinoPriorPipeline, condition: Condition, name: str = "judge") -> Tensor:
    """One draw for each row of a condition."""
    generators = [generator_for(args.seed, name, row) for row in range(len(condition.labels))]
    return prior(condition=condition, generator=generators, guidance_scale=args.guidance_scale).image_embeds


def make_images(
    args: Arguments, pipe: DinoDiffusionPipeline, prior: DinoPriorPipeline, condition: Condition, real: Tensor
) -> dict[str, Tensor]:
    """Images of the held-out images' tokens, and of as many that the prior draws: of their labels, of anything."""
    count = len(real)

    drawn = {"reconstructions": [real] * args.num_image_sets}
    kinds = {"asked": condition, "anything": prior.prior.conditions.unknown(count)}
    for name, what in kinds.items():
        drawn[name] = [draw(args, prior, what, f"{name} {number}") for number in range(args.num_image_sets)]
    return {
        name: torch.cat(
            [
                generate_variations(
                    pipe,
                    tokens,
                    seed=number,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.image_guidance_scale,
                    progress=False,
                )
                for number, tokens in enumerate(sets)
            ]
        )
        for name, sets in drawn.items()
    }


def compare_images(args: Arguments, images: dict[str, Tensor], training: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Fréchet distance of each set of as many images as are held out to the training images; mean over the sets."""
    extract = open_extractor(args.extractor)
    features = {name: extract_all(extract, each) for name, each in {**images, "real": held_out}.items()}
    reference, count = extract_all(extract, training), len(held_out)
    figures: dict[str, Any] = {}
    print(f"\nImages: Fréchet distance ({args.extractor}) of sets of {count} to {len(training)} training images")
    for name, each in features.items():
        values = [frechet_of_samples(part, reference) for part in each.split(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimate = estimate_frechet(each[:count], reference, Bootstrap(repeats=200, seed=args.seed))
        figures[name] = {"sets": values, "mean": float(np.mean(values)), "first set": asdict(estimate)}
        first = f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
        print(f"| {name} | {np.mean(values):.1f} | first set {first} |")
    for name in ("asked", "anything"):
        figures[name]["ratio to reconstructions"] = figures[name]["mean"] / figures["reconstructions"]["mean"]
        print(f"{name}: {figures[name]['ratio to reconstructions']:.2f} x reconstructions")
    return figures


def extract_all(extract: Any, images: Tensor) -> Tensor:
    return torch.cat([extract(part) for part in images.split(64)])


def judge(
    args: Arguments,
    folder: Path,
    training: ImageDataset,
    known: LabelTable,
    held_out: ImageDataset,
    asked: LabelTable,
    images: dict[str, Tensor],
    labels: tuple[str, ...],
) -> dict[str, Any]:
    """Macro AUROC of the labels asked for, by a classifier that was trained on the real training images."""
    started = time.perf_counter()

    def packed(name: str, pixels: Tensor) -> PackedImages:
        small = torch.nn.functional.interpolate(pixels, size=args.judge_size, mode="area").mean(1)
        path = folder / f"{name}.npy"
        np.save(path, (small * 255).round().byte().numpy())
        write_json(
            path.with_suffix(".json"), {"keys": [str(i) for i in range(len(small))], "recipe": "", "num_averaged": 0}
        )
        return PackedImages(path)

    def labelled(name: str, pixels: Tensor, targets: np.ndarray) -> LabelledImages:
        times = len(pixels) // len(targets)
        return LabelledImages(packed(name, pixels), np.arange(len(pixels)), np.tile(targets, (times, 1)))

    settings = ClassifierSettings(
        options='{"growth_rate": 12, "block_config": [3, 3, 3]}',
        size=args.judge_size,
        max_steps=args.judge_steps,
        validation_steps=args.judge_steps,
        max_scale=1.2,
    )
    real = labelled("training", stack_images(training), known.targets(labels))
    model = train_classifier([real], None, settings, seed=args.seed).model
    figures: dict[str, Any] = {"labels": labels, "model": settings.name, "updates": settings.max_steps}
    print(f"\nJudge: {settings.name}, {len(real.rows)} real training images, {settings.max_steps} updates")
    for name, pixels in {**images, "held out": stack_images(held_out)}.items():
        found = labelled(name, pixels, asked.targets(labels))
        figures[name] = with_interval(predict(model, found), asked.targets(labels))
        macro, (low, high) = figures[name]["macro"], figures[name]["interval"]
        print(f"| {name} | {macro:.3f} [{low:.3f}, {high:.3f}] |", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    return figures


def sweep_strength(
    args: Arguments, pipe: DinoDiffusionPipeline, prior: DinoPriorPipeline, condition: Condition, real: Tensor
) -> list[dict[str, float]]:
    """How far tokens move: which share still finds its own image among the held-out ones, by strength."""
    rows = []
    flat = prior.prior.standardise(real).flatten(1)
    print("\nStrength: share of tokens whose nearest held-out image is their own, and relative distance moved")
    for strength in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        generators = [generator_for(args.seed, "strength", row) for row in range(len(real))]
        moved = prior.prior.standardise(
            prior.renoise(real, strength, condition=condition, generator=generators)
        ).flatten(1)
        found = (nearest_by_cosine(moved, flat) == torch.arange(len(flat))).double().mean().item()
        distance = ((moved - flat).norm(dim=1) / flat.norm(dim=1)).mean().item()
        rows.append({"strength": strength, "retrieval": found, "relative distance": distance})
        print(f"| {strength} | {found:.2f} | {distance:.2f} |", flush=True)
    return rows


if __name__ == "__main__":
    main()
