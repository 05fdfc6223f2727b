"""Train a small model on the bundled phantoms, generate from it, and write one self-contained report.

    python examples/quickstart.py --output_dir outputs/quickstart

What runs is what a user runs: `python examples/train_dino.py` with `examples/configs/quickstart.yaml`, then
`DinoDiffusionPipeline.from_pretrained`. The autoencoder and the encoder in `examples/data` are frozen; `train_vae.py`
and `pretrain_dino.py` trained them on the same phantoms, without labels.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline, DinoPriorPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.console import run
from diffusers_dino.cli.launch import launch_training
from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.diffseg.lungs import lung_prior, name_lungs
from diffusers_dino.diffseg.settings import ALL_LAYERS, DiffSegSettings, note_settings
from diffusers_dino.evaluation import (
    MemorizationResult,
    ReconstructionResult,
    evaluate_memorization,
    evaluate_reconstruction,
)
from diffusers_dino.evaluation.controls import with_fresh_unet
from diffusers_dino.evaluation.fidelity.protocol import score_fidelity
from diffusers_dino.evaluation.fidelity.result import REAL, UNTRAINED, FidelityResult, Sampling
from diffusers_dino.evaluation.figures import plot_loss
from diffusers_dino.evaluation.generation import embed_images, generate_variations
from diffusers_dino.evaluation.memorization.plot import draw_closest_pairs, plot_memorization
from diffusers_dino.evaluation.memorization.table import table_of_sets
from diffusers_dino.evaluation.segmentation.baselines import otsu_mask
from diffusers_dino.evaluation.table_text import with_interval
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics import extract_features, open_extractor
from diffusers_dino.metrics.bootstrap import Bootstrap
from diffusers_dino.metrics.dice import best_union, dice
from diffusers_dino.report import Report
from diffusers_dino.sheets import contact_sheet

EXAMPLES = Path(__file__).resolve().parent
# What segmentation chooses from: all attention layers together, or one of the decoder's two of the largest resolution.
LAYERS = (None, ("up_blocks.1.attentions.0",), ("up_blocks.1.attentions.1",))
TIMESTEPS, THRESHOLDS = (100, 300, 500), (0.2, 0.3, 0.4, 0.5)
GUIDANCE = 2.0
GUIDED, PLAIN = f"generated, guidance {GUIDANCE:g}", "generated, without guidance"


@dataclass
class Arguments:
    output_dir: str = flag("outputs/quickstart", "Where model and report go.")
    config: str = flag(str(EXAMPLES / "configs/quickstart.yaml"), "YAML file for train_dino.py.")
    data_dir: str = flag(str(EXAMPLES / "data/phantom-cxr"), "Folder of the phantom shards.")
    max_train_steps: int | None = flag(None, "In place of the config's, for a trial run.")
    num_sources: int = flag(6, "Unseen images in the picture of variations.")
    num_variations: int = flag(5, "Variations of each of them.")
    num_paths: int = flag(3, "Paths between unseen images, and segmented images.")
    num_points: int = flag(7, "Images along a path.")
    prior: str = flag(str(EXAMPLES / "data/tiny-prior"), "Prior over the tokens of the bundled encoder.")
    num_seeds: int = flag(3, "Noise seeds that the figures are averaged over.")
    num_inference_steps: int = flag(20, "Sampling steps of all images.")
    num_planted: int = flag(50, "Training images tampered with in each way, to see what the search for copies finds.")
    num_tuning: int = flag(32, "Training images that the settings of segmentation are chosen on.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    check_files(args)
    output_dir = make_writable_folder(Path(args.output_dir).resolve())
    model_dir = output_dir / "model"
    stopwatch = Stopwatch()

    with stopwatch("train the UNet"):
        train(args, model_dir)
    with stopwatch("load the pipeline and the images"):
        pipe = DinoDiffusionPipeline.from_pretrained(model_dir)
        pipe.set_progress_bar_config(disable=True)
        size = json.loads((model_dir / "vae" / "config.json").read_text())["sample_size"]
        test, training = (load_phantoms(Path(args.data_dir), split, size) for split in ("test", "train"))
    with stopwatch("generate and measure"):
        result = evaluate_reconstruction(
            pipe,
            test.images,
            training.images,
            seeds=range(args.num_seeds),
            num_inference_steps=args.num_inference_steps,
        )
        result.save(output_dir / "reconstruction.json")
    with stopwatch("compare with real images"):
        sets = generate_sets(pipe, test.images, args.num_inference_steps)
        fidelity = measure_fidelity(sets, training.images, type(pipe.scheduler).__name__, args.num_inference_steps)
        fidelity.save(output_dir / "fidelity.json")
        synthetic = torch.cat([sets[PLAIN], sets[GUIDED]])
        options = {"num_pairs": 6, "num_planted": args.num_planted}
        memorization = evaluate_memorization(training.images, synthetic, test.images, **options).result
        memorization.save(output_dir / "memorization.json")
    with stopwatch("draw variations and paths"):
        variations = draw_variations(pipe, test.images[: args.num_sources], args)
        paths = draw_paths(pipe, test.images, args)
    with stopwatch("draw from labels, without an image"):
        asked, drawn = draw_from_labels(pipe, args)
    with stopwatch("segment"):
        segmentation, strips = segment(pipe, test, training, args)
        write_json(output_dir / "segmentation.json", segmentation, indent=2)
        pipe.unet.save_config(model_dir / "unet")  # with the chosen settings, which are now the defaults

    report = Report("diffusers-dino quickstart")
    add_introduction(report, test.images, training.images, pipe)
    add_loss(report, model_dir)
    report.add_heading("Variations of unseen images")
    caption = f"Left: the source. Right: {args.num_variations} variations generated from its tokens."
    report.add_image(variations, caption)
    add_figures(report, result)
    add_fidelity(report, fidelity)
    add_memorization(report, memorization, draw_closest_pairs(memorization, synthetic, training.images))
    report.add_heading("Paths between unseen images")
    caption = f"Left and right: two sources. Between: {args.num_points} images from interpolated tokens and one noise."
    report.add_image(paths, caption)
    report.add_heading("From labels, without an image")
    report.add_image(drawn, f"A row each: {', '.join(asked)}. A prior drew the tokens from only these names.")
    add_segmentation(report, segmentation, strips, args.num_tuning, len(test.images))
    add_stages(report, stopwatch)
    report.save(output_dir / "report.html")
    print(f"Report: {output_dir / 'report.html'}\nModel:  {model_dir}")


def check_files(args: Arguments) -> None:
    """End early, and say where to get it, if something that lies beside this script in a clone is not there."""
    for path in (EXAMPLES / "train_dino.py", args.config, args.data_dir, args.prior):
        if not Path(path).exists():
            raise FileNotFoundError(
                f"There is no {path}. The quickstart needs train_dino.py, configs/ and data/, which are in the folder "
                "examples/ of the diffusers-dino repository: run it in a clone."
            )


def train(args: Arguments, model_dir: Path) -> None:
    """Run the training script in a process of its own, as a user does."""
    flags = [
        str(Path(args.config).resolve()),
        f"--train_data_dir={Path(args.data_dir).resolve()}/phantom-cxr-train-*.tar",
        f"--output_dir={model_dir}",
        "--overwrite_output_dir",
    ]
    if args.max_train_steps is not None:
        flags += [f"--max_train_steps={args.max_train_steps}"]
    launch_training(EXAMPLES / "train_dino.py", flags, EXAMPLES.parent, finished=model_dir / "model_index.json")


class Phantoms(NamedTuple):
    images: Tensor  # (N, 1, size, size) in [0, 1]
    lungs: Tensor  # (N, size, size) bool


def load_phantoms(data_dir: Path, split: str, size: int) -> Phantoms:
    """All phantoms of a split, with the exact masks of their lungs."""
    samples = open_masked_images(data_dir / f"phantom-cxr-{split}-*.tar", size, mask_size=size)
    loaded = [samples[i] for i in range(len(samples))]
    return Phantoms(*(torch.stack([getattr(sample, name) for sample in loaded]) for name in ("image", "mask")))


def generate_sets(pipe: DinoDiffusionPipeline, images: Tensor, num_steps: int) -> dict[str, Tensor]:
    """One image from each source, in the ways that are compared, and the sources themselves, each `(N, C, H, W)`."""
    tokens = embed_images(pipe, images)

    def generate(model: DinoDiffusionPipeline, guidance_scale: float) -> Tensor:
        return generate_variations(model, tokens, seed=0, num_inference_steps=num_steps, guidance_scale=guidance_scale)

    return {
        GUIDED: generate(pipe, GUIDANCE),
        PLAIN: generate(pipe, 1.0),
        UNTRAINED: generate(with_fresh_unet(pipe), 1.0),
        REAL: images,
    }


def measure_fidelity(sets: dict[str, Tensor], training: Tensor, scheduler: str, num_steps: int) -> FidelityResult:
    """How far each set is from the training images."""
    extractor = open_extractor("tiny")  # trained on phantoms, and knows nothing else
    reference = extract_features(extractor, training, keys=[f"training {i}" for i in range(len(training))])
    rows = []
    for name, images in sets.items():
        features = extract_features(extractor, images, keys=[f"{name} {i}" for i in range(len(images))])
        scale = GUIDANCE if name == GUIDED else 1.0
        sampling = None if name == REAL else Sampling(scheduler, num_steps, scale, seed=0, batch_size=len(images))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too few images: the report says so
            rows.append(score_fidelity(name, features, reference, sampling=sampling, bootstrap=Bootstrap(repeats=50)))
    return FidelityResult(tuple(rows))


def sampling(args: Arguments) -> dict[str, Any]:
    """How images are drawn that are shown, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    return {"num_inference_steps": args.num_inference_steps, "guidance_scale": GUIDANCE, "generator": generator}


def draw_variations(pipe: DinoDiffusionPipeline, sources: Tensor, args: Arguments) -> Image:
    """One row for each source: the source, then its variations."""
    return contact_sheet(sources, pipe(sources, num_images_per_prompt=args.num_variations, **sampling(args)).images)


def draw_paths(pipe: DinoDiffusionPipeline, images: Tensor, args: Arguments) -> Image:
    """One row for each pair of neighbours in the test set: a source, the path from it to the other, the other."""
    between = DinoInterpolationPipeline.from_pipe(pipe)
    between.set_progress_bar_config(disable=True)
    sources, targets = images[0 : 2 * args.num_paths : 2], images[1 : 2 * args.num_paths : 2]
    paths = between(sources, targets, torch.linspace(0, 1, args.num_points), **sampling(args)).images
    return contact_sheet(sources, paths, targets)


def draw_from_labels(pipe: DinoDiffusionPipeline, args: Arguments) -> tuple[tuple[str, ...], Image]:
    """The labels that the prior knows, and one row of images for each of them."""
    prior = DinoPriorPipeline.from_pretrained(args.prior)
    prior.set_progress_bar_config(disable=True)
    prior.check_conditioner(pipe.conditioner)
    tokens = prior(
        labels=[[label] for label in prior.labels],
        num_images_per_prompt=args.num_variations,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).image_embeds
    images = pipe(image_embeds=tokens, **sampling(args)).images
    return prior.labels, contact_sheet(*(images[i :: args.num_variations] for i in range(args.num_variations)))


def segment(
    pipe: DinoDiffusionPipeline, test: Phantoms, training: Phantoms, args: Arguments
) -> tuple[dict[str, float], Image]:
    """Mean Dice of the lungs on the test set, with controls; and image | true lungs | named segments | segments."""
    diffseg = DiffSegPipeline.from_pipe(pipe)
    few = Phantoms(*(each[: args.num_tuning] for each in training))  # the setting is chosen on these
    untrained = with_fresh_unet(diffseg)
    for each in (diffseg, untrained):
        note_best_settings(each, few)
    segments, segments_of_untrained = diffseg(test.images).masks, untrained(test.images).masks
    pairs = list(zip(segments, test.images[:, 0], strict=True))
    named = torch.stack([name_lungs(numbers, image).mask for numbers, image in pairs])
    size, count = test.lungs.shape[-1], len(test.lungs)
    masks = {
        "segments named by position and darkness, without a mask": named,
        "control: Otsu's threshold": torch.stack([otsu_mask(image) for image in test.images[:, 0]]),
        "control: two ellipses, where lungs are named": lung_prior(size).expand(count, -1, -1),
        "control: mean mask of the training set": (training.lungs.float().mean(0) > 0.5).expand(count, -1, -1),
    }
    figures = {
        "best one or two segments, by the true mask": best_pairs(segments, test.lungs),
        "control: the same of an untrained UNet": best_pairs(segments_of_untrained, test.lungs),
        **{name: dice(mask, test.lungs).mean().item() for name, mask in masks.items()},
    }
    shades = segments / segments.amax((1, 2), keepdim=True).clamp(min=1)
    columns = (test.images, test.lungs[:, None], named[:, None], shades[:, None])
    return figures, contact_sheet(*(column[: args.num_paths] for column in columns))


def note_best_settings(diffseg: DiffSegPipeline, phantoms: Phantoms) -> None:
    """Note with the model the settings, its new defaults, with which one or two segments come nearest to the lungs."""
    scores = {}
    for layers, timestep in product(LAYERS, TIMESTEPS):
        maps = diffseg.attention_maps(phantoms.images, timestep, layers=layers or ALL_LAYERS)
        for threshold in THRESHOLDS:
            size = phantoms.lungs.shape[-1]
            segments = diffseg.segment(maps, threshold, relative_threshold=True, output_size=size).masks
            scores[DiffSegSettings(timestep, threshold, layers)] = best_pairs(segments, phantoms.lungs)
    note_settings(diffseg.unet, max(scores, key=scores.get))


def best_pairs(segments: Tensor, lungs: Tensor) -> float:
    return sum(best_union(a, b).dice for a, b in zip(segments, lungs, strict=True)) / len(lungs)


def add_introduction(report: Report, test: Tensor, training: Tensor, pipe: DinoDiffusionPipeline) -> None:
    parameters = sum(p.numel() for p in pipe.denoiser.parameters()) / 1e6
    report.add_text(
        f"A UNet of {parameters:.2f} million parameters was trained on {len(training)} phantom radiographs of "
        f"{training.shape[-1]} px, without labels, to generate an image from the {pipe.conditioner.num_tokens} global "
        f"tokens that a frozen DINO encoder computes from it. Everything below is measured on {len(test)} phantoms "
        "that no part of the model has seen. The phantoms are rendered from one CT with varied pose, shape and "
        "findings: they show that the software works, not how well it does on patients."
    )


def add_loss(report: Report, model_dir: Path) -> None:
    lines = [json.loads(line) for line in (model_dir / "train_log.jsonl").read_text().splitlines()]
    report.add_heading("Training")
    report.add_figure(plot_loss([x["step"] for x in lines], [x["loss"] for x in lines]), "Loss of the UNet.")


def add_figures(report: Report, result: ReconstructionResult) -> None:
    n, seeds = result.num_images, len(result.seeds)
    report.add_heading("Does the model follow its condition?")
    report.add_text(
        f"One image is generated from the tokens of each of {n} unseen phantoms (guidance {result.guidance_scale}, "
        f"{result.num_inference_steps} steps, mean of {seeds} noise seeds). It counts as found if its nearest "
        f"neighbour among the {n} is its own source: by the encoder's tokens, and by 16 x 16 gray pixels, a space "
        "that the encoder did not shape."
    )
    encoder, pixels = result.by_encoder, result.by_pixels
    report.add_table(
        ["share that finds its source", "by the encoder", "by 16 x 16 pixels"],
        [
            ["generated", encoder.generated, pixels.generated],
            ["control: asked for another image's source", encoder.shuffled, pixels.shuffled],
            ["control: untrained UNet", encoder.untrained, pixels.untrained],
            ["control: nearest training image", encoder.nearest_training_image, pixels.nearest_training_image],
            ["chance", 1 / n, 1 / n],
        ],
    )


def add_fidelity(report: Report, result: FidelityResult) -> None:
    first = result.rows[0]
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
        [
            [row.images, *(with_interval(x.value, x.low, x.high) for x in (row.frechet, row.kernel, row.coverage))]
            for row in result.rows
        ],
    )


def add_memorization(report: Report, result: MemorizationResult, pairs: Image) -> None:
    report.add_heading("Are they copies?")
    report.add_text(
        "Each image and its mirror image are compared with all training phantoms. Training phantoms, compared with "
        f"each other, say what is too near: a relative distance below {result.threshold:.2f}, which "
        f"{result.false_alarms:.0%} of real images may have. docs/memorization.md says what this shows, and that it "
        "does not prove privacy."
    )
    report.add_table(*table_of_sets(result))
    report.add_figure(plot_memorization(result), "Relative distance to the nearest training phantom.")
    report.add_image(pairs, "The closest pairs: generated | its nearest training phantom.")


def add_segmentation(report: Report, figures: dict[str, float], strips: Image, num_tuning: int, n: int) -> None:
    report.add_heading("Segments without training or labels")
    report.add_text(
        "The model's self-attention in one denoising step, merged to segments (DiffSeg). Layers, timestep and "
        f"threshold are chosen on {num_tuning} training phantoms, and the figures are means over the {n} unseen ones. "
        "Phantoms of one person have much the same lungs, so the mean mask is hard to beat."
    )
    report.add_table(["Dice of the lungs, against the exact masks", ""], list(figures.items()))
    report.add_image(strips, "The image, its lungs, the segments that were named lungs, and all segments.")


def add_stages(report: Report, stopwatch: Stopwatch) -> None:
    unit = 1024**2 if sys.platform != "darwin" else 1024**3  # ru_maxrss is in KiB on Linux, in bytes on macOS
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit
    report.add_heading("Time and memory")
    report.add_table(["stage", "seconds"], [*stopwatch.rows, ("all", round(sum(s for _, s in stopwatch.rows)))])
    report.add_text(
        f"Largest process: {peak:.1f} GiB. {torch.get_num_threads()} threads, PyTorch {torch.__version__}."
    )


class Stopwatch:
    """Names stages and takes their times."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        print(f"== {stage} ==", flush=True)
        start = time.perf_counter()
        yield
        self.rows.append((stage, round(time.perf_counter() - start)))


if __name__ == "__main__":
    run(main)
