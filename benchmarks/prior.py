"""What a prior reaches: tokens, images and labels against real ones, on the bundled phantoms or on a folder of images.

    python benchmarks/prior.py --output_dir outputs/prior-benchmark

Without images of your own, the prior and the model are the bundled ones and the held-out images the test phantoms. The
judge is a classifier that is trained on the training images and never sees a generated one. `prior.json` holds all
figures with N, seeds and controls; `strength.png` shows what the dial of `DinoPriorPipeline.renoise` does.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner, DinoPriorPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import ImageDataset, Preprocessing, TrainingViews, open_images
from diffusers_dino.data.labels import LabelTable, read_label_table, stored_labels
from diffusers_dino.evaluation import PriorResult, evaluate_prior, table_text
from diffusers_dino.evaluation.classifier import ClassifierSettings, LabelledImages, predict, train_classifier
from diffusers_dino.evaluation.figures import new_figure
from diffusers_dino.evaluation.generation import embed_images, generate_variations, stack_images
from diffusers_dino.evaluation.packed import PackedImages
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics import open_extractor
from diffusers_dino.metrics.auroc import label_auroc, macro_auroc
from diffusers_dino.metrics.bootstrap import Bootstrap, Interval, bootstrap_interval, estimate_frechet, share_interval
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.metrics.manifolds import manifold_hits
from diffusers_dino.metrics.neighbours import nearest_by_cosine
from diffusers_dino.prior import Condition
from diffusers_dino.seeds import generator_for
from diffusers_dino.sheets import contact_sheet
from diffusers_dino.training.feature_cache import Recipe, open_feature_cache
from diffusers_dino.training.features import FeatureEncoder
from diffusers_dino.training.prior import encode_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


@dataclass
class Arguments:
    model: str = flag(str(DATA / "tiny-diffusion"), "DinoDiffusionPipeline; for `tokens` also a conditioner.")
    prior: str = flag(str(DATA / "tiny-prior"), "DinoPriorPipeline.")
    training: str = flag(f"{DATA}/phantom-cxr/phantom-cxr-train-*.tar", "Training images of both.")
    feature_cache: str | None = flag(None, "Their tokens, of `diffusers-dino cache --augment no`.")
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
    parts: list[str] = flag(["tokens", "images", "strength"], "What to measure.")
    strengths: list[float] = flag([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0], "Of variations.")
    output_dir: str = flag("outputs/prior-benchmark", "Where figures and pictures go.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folder = make_writable_folder(args.output_dir)
    pipe = None
    if set(args.parts) == {"tokens"}:
        inside = "conditioner" if Path(args.model, "conditioner").is_dir() else None
        conditioner = DinoImageConditioner.from_pretrained(args.model, subfolder=inside)
    else:
        pipe = DinoDiffusionPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
        conditioner = pipe.conditioner
    prior = DinoPriorPipeline.from_pretrained(args.prior)
    prior.set_progress_bar_config(disable=True)
    prior.check_conditioner(conditioner)
    training = load(args, args.training, args.training_keys, conditioner, args.feature_cache)
    held_out = load(args, args.held_out, args.held_out_keys, conditioner)
    condition = condition_of(prior, held_out.table)
    figures: dict[str, Any] = {"arguments": asdict(args)}

    def save(name: str, found: Any) -> None:
        figures[name] = found
        write_json(folder / "prior.json", figures, indent=2)

    if "tokens" in args.parts:
        save("tokens", compare_tokens(args, prior, training, held_out, condition))
        save("judge of tokens", judge_tokens(args, prior, training, held_out, condition))
    if pipe is None:
        return
    judge = Judge(args, folder, training, prior.labels)
    if "images" in args.parts:
        images = make_images(args, pipe, prior, condition, held_out.tokens)
        columns = [stack_images(held_out.images), *(images[name] for name in ("reconstructions", "asked", "anything"))]
        contact_sheet(*(column[:4] for column in columns)).save(folder / "prior.png")
        save("frechet", compare_images(args, images, stack_images(training.images), stack_images(held_out.images)))
        save("judge", judge_images(judge, images, held_out, prior.labels))
    if "strength" in args.parts:
        save("strength", sweep_strength(args, pipe, prior, judge, training, held_out, condition))
        draw_strength(figures["strength"]).savefig(folder / "strength.png", dpi=110, bbox_inches="tight")


class Real(NamedTuple):
    """Real images, what is known of them, and their tokens `(N, S, D)`."""

    images: ImageDataset
    table: LabelTable
    tokens: Tensor


def load(
    args: Arguments, source: str, keys: str | None, conditioner: DinoImageConditioner, cache: str | None = None
) -> Real:
    images = open_images(source, Preprocessing(args.size, args.remove_borders))
    if keys is not None:
        images = images.select(Path(keys).read_text().splitlines())
    table = stored_labels(images) if args.labels == "stored" else read_label_table(args.labels).select(images.keys)
    if cache is None:
        return Real(images, table, embed_images(conditioner, images))
    recipe = Recipe.of(None, conditioner, TrainingViews(images, None, args.seed), 0)
    views = open_feature_cache(cache, recipe, images, only_tokens=True)
    return Real(images, table, encode_tokens(views, FeatureEncoder(None, conditioner, "cpu"), range(len(images)))[0])


def condition_of(prior: DinoPriorPipeline, table: LabelTable) -> Condition:
    """All labels of each image known."""
    rows = [
        prior.prior.conditions.encode([n for n in prior.labels if n in own], [n for n in prior.labels if n not in own])
        for own in table.labels
    ]
    return Condition(*(torch.cat([row[i] for row in rows]) for i in range(3)))


def compare_tokens(
    args: Arguments, prior: DinoPriorPipeline, training: Real, held_out: Real, condition: Condition
) -> dict[str, Any]:
    """Distances, a two-sample test and copies, for the held-out images' labels and for anything."""
    figures = {}
    for name, asked in (("labels of the held-out images", condition), ("anything", None)):
        result = evaluate_prior(
            prior,
            training.tokens,
            held_out.tokens,
            asked,
            num_sets=args.num_sets,
            seed=args.seed,
            guidance_scale=1.0 if asked is None else args.guidance_scale,
        )
        figures[name] = asdict(result)
        print(f"\nTokens, asked for {name}: {result.num_held_out} held out, {result.num_training} of training")
        print_tokens(result)
    return figures


def print_tokens(result: PriorResult) -> None:
    print("| tokens | Fréchet distance | two-sample accuracy | copies |\n| --- | --- | --- | --- |")
    for row in result.rows:
        frechet, test, copies = "", "", ""
        if row.frechet is not None:
            frechet = table_text.with_interval(row.frechet, row.frechet_low, row.frechet_high, ".1f")
            test = table_text.with_interval(row.two_sample, row.two_sample_low, row.two_sample_high, ".2f")
        if row.num_tokens:
            share = table_text.with_interval(row.copies, row.copies_low, row.copies_high, ".1%")
            copies = f"{share} of {row.num_tokens}"
        print(f"| {row.name} | {frechet} | {test} | {copies} |")


def judge_tokens(
    args: Arguments, prior: DinoPriorPipeline, training: Real, held_out: Real, condition: Condition
) -> dict[str, Any]:
    """Macro AUROC of the labels asked for, by logistic regressions on the tokens of real training images."""
    flat = prior.prior.standardise(training.tokens).flatten(1).numpy()
    labels, targets = prior.labels, held_out.table.targets(prior.labels)
    truth = training.table.targets(labels)
    models = [LogisticRegression(C=0.01, max_iter=1000).fit(flat, truth[:, i]) for i in range(len(labels))]
    anything = prior.prior.conditions.unknown(len(targets))
    sets = {
        "held out": held_out.tokens,
        "asked": draw(args, prior, condition),
        "anything": draw(args, prior, anything),
    }
    figures: dict[str, Any] = {"labels": labels}
    print("\nJudge of tokens: logistic regressions on the real training tokens")
    for name, each in sets.items():
        rows = prior.prior.standardise(each).flatten(1).numpy()
        scores = np.stack([model.decision_function(rows) for model in models], axis=1)
        figures[name] = with_interval(scores, targets)
        print_interval(name, figures[name]["macro"], figures[name]["interval"])
    return figures


def print_interval(name: str, value: float, interval: Interval) -> None:
    print(f"| {name} | {table_text.with_interval(value, *interval, '.3f')} |", flush=True)


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
    drawn = {"reconstructions": [real] * args.num_image_sets}
    for name, what in {"asked": condition, "anything": prior.prior.conditions.unknown(len(real))}.items():
        drawn[name] = [draw(args, prior, what, f"{name} {number}") for number in range(args.num_image_sets)]
    return {
        name: torch.cat([generate(args, pipe, tokens, number) for number, tokens in enumerate(sets)])
        for name, sets in drawn.items()
    }


def generate(args: Arguments, pipe: DinoDiffusionPipeline, tokens: Tensor, seed: int) -> Tensor:
    """An image for each of the tokens: `(N, C, H, W)` in [0, 1]."""
    return generate_variations(
        pipe,
        tokens,
        seed=seed,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.image_guidance_scale,
        progress=False,
    )


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
        first = table_text.with_interval(estimate.value, estimate.low, estimate.high, ".1f")
        print(f"| {name} | {np.mean(values):.1f} | first set {first} |")
    for name in ("asked", "anything"):
        figures[name]["ratio to reconstructions"] = figures[name]["mean"] / figures["reconstructions"]["mean"]
        print(f"{name}: {figures[name]['ratio to reconstructions']:.2f} x reconstructions")
    return figures


def extract_all(extract: Any, images: Tensor) -> Tensor:
    return torch.cat([extract(part) for part in images.split(64)])


class Judge:
    """A classifier that is trained on the real training images."""

    def __init__(self, args: Arguments, folder: Path, training: Real, labels: tuple[str, ...]) -> None:
        self.folder = folder
        self.settings = ClassifierSettings(
            options='{"growth_rate": 12, "block_config": [3, 3, 3]}',
            size=args.judge_size,
            max_steps=args.judge_steps,
            validation_steps=args.judge_steps,
            max_scale=1.2,
        )
        real = self._labelled("training", stack_images(training.images), training.table.targets(labels))
        self.model = train_classifier([real], None, self.settings, seed=args.seed).model
        print(f"\nJudge: {self.settings.name}, {len(real.rows)} real training images, {args.judge_steps} updates")

    def __call__(self, name: str, pixels: Tensor, targets: np.ndarray) -> dict[str, Any]:
        """Macro AUROC of `targets` in R images of each of them, `(R N, C, H, W)` in [0, 1]."""
        return with_interval(predict(self.model, self._labelled(name, pixels, targets)), targets)

    def _labelled(self, name: str, pixels: Tensor, targets: np.ndarray) -> LabelledImages:
        small = torch.nn.functional.interpolate(pixels, size=self.settings.size, mode="area").mean(1)
        path = self.folder / f"{name}.npy"
        np.save(path, (small * 255).round().byte().numpy())
        keys = [str(number) for number in range(len(small))]
        write_json(path.with_suffix(".json"), {"keys": keys, "recipe": "", "num_averaged": 0})
        targets = np.tile(targets, (len(pixels) // len(targets), 1))
        return LabelledImages(PackedImages(path), np.arange(len(pixels)), targets)


def judge_images(judge: Judge, images: dict[str, Tensor], held_out: Real, labels: tuple[str, ...]) -> dict[str, Any]:
    """Macro AUROC of the labels asked for."""
    figures: dict[str, Any] = {"labels": labels, "model": judge.settings.name, "updates": judge.settings.max_steps}
    for name, pixels in {**images, "held out": stack_images(held_out.images)}.items():
        figures[name] = judge(name, pixels, held_out.table.targets(labels))
        print_interval(name, figures[name]["macro"], figures[name]["interval"])
    return figures


def sweep_strength(
    args: Arguments,
    pipe: DinoDiffusionPipeline,
    prior: DinoPriorPipeline,
    judge: Judge,
    training: Real,
    held_out: Real,
    condition: Condition,
) -> list[dict[str, Any]]:
    """Variations of the held-out images by strength: how far they go, whose they still are, and what they cover."""
    extract, known = open_extractor(args.extractor), prior.prior.standardise(training.tokens).flatten(1)
    flat = prior.prior.standardise(held_out.tokens).flatten(1)
    unrelated = torch.cdist(flat, flat).square().sum() / (len(flat) * (len(flat) - 1))
    sources, targets = stack_images(held_out.images), held_out.table.targets(prior.labels)
    covered = extract_all(extract, stack_images(training.images))
    rows, repeats = [], args.num_image_sets
    print(f"\nStrength: {repeats} variations of each of {len(flat)} images, asked for their own labels")
    for strength in args.strengths:
        sets = [vary(args, prior, held_out.tokens, strength, condition, number) for number in range(repeats)]
        images = torch.cat([generate(args, pipe, tokens, number) for number, tokens in enumerate(sets)])
        moved = prior.prior.standardise(torch.cat(sets)).flatten(1)
        seen = prior.prior.standardise(pipe.conditioner.encode(images)).flatten(1)
        agreement = judge("strength", images, targets)
        row: dict[str, Any] = {
            "strength": strength,
            "distance": ((moved - flat.repeat(repeats, 1)).square().sum(1).mean() / unrelated).sqrt().item(),
            "retrieval of tokens": found(moved, flat),
            "retrieval by the encoder": found(seen, flat),
            "retrieval by pixels": found(thumbnails(images), thumbnails(sources)),
            "label agreement": (agreement["macro"], *agreement["interval"]),
            "coverage of tokens": coverage(moved, known),
            "coverage": coverage(extract_all(extract, images), covered),
        }
        rows.append(row)
        shown = [value if isinstance(value, tuple) else (value,) for value in row.values()]
        print(f"| {' | '.join(', '.join(f'{x:.2f}' for x in each) for each in shown)} |", flush=True)
    return rows


def vary(
    args: Arguments, prior: DinoPriorPipeline, tokens: Tensor, strength: float, condition: Condition, number: int
) -> Tensor:
    generators = [generator_for(args.seed, "strength", number, row) for row in range(len(tokens))]
    return prior.renoise(tokens, strength, condition=condition, generator=generators)


def thumbnails(images: Tensor) -> Tensor:
    """`(N, 256)`: gray values of 16 x 16 px."""
    return torch.nn.functional.interpolate(images.mean(1, keepdim=True), size=16, mode="area").flatten(1)


def found(queries: Tensor, gallery: Tensor) -> tuple[float, float, float]:
    """Share of R queries of each of N sources that are nearest to their own; with an interval, drawn by source."""
    own = torch.arange(len(queries)) % len(gallery)
    hits = (nearest_by_cosine(queries, gallery) == own).double().numpy()
    return float(hits.mean()), *bootstrap_interval(lambda rows: float(hits[rows].mean()), len(hits), own.tolist())


def coverage(features: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Share of real images with one of the others in the ball of its 5 nearest (Naeem et al. 2020)."""
    hits = manifold_hits(features, reference)["coverage"]
    return hits.mean().item(), *share_interval(int(hits.sum()), len(hits))


def draw_strength(rows: list[dict[str, Any]]) -> Figure:
    """The figures of a sweep against the strength."""
    figure = new_figure(6, 3.4)
    axes = figure.subplots()
    strengths = [row["strength"] for row in rows]
    axes.plot(strengths, [row["distance"] for row in rows], "k--", label="distance moved, of that to another image")
    curves = ("retrieval by the encoder", "retrieval by pixels", "label agreement", "coverage")
    for name in curves:
        value, low, high = np.array([row[name] for row in rows]).T
        line = axes.plot(strengths, value, marker="o", markersize=3, label=name)[0]
        axes.fill_between(strengths, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="strength", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


if __name__ == "__main__":
    main()
