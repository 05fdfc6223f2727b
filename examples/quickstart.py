"""Train a small model on the bundled phantoms, generate from it, and write one self-contained report.

    python examples/quickstart.py --output_dir outputs/quickstart

What runs is what a user runs: `accelerate launch examples/train_dino.py` with `examples/configs/quickstart.yaml`, then
`DinoDiffusionPipeline.from_pretrained`. The autoencoder and the encoder in `examples/data` are frozen; `train_vae.py`
and `pretrain_dino.py` trained them on the same phantoms, without labels.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.plots import plot_loss
from diffusers_dino.protocols import ReconstructionResult, evaluate_reconstruction
from diffusers_dino.report import Report

EXAMPLES = Path(__file__).resolve().parent


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/quickstart"), metadata={"help": "Where model and report go."})
    config: Path = field(default=EXAMPLES / "configs/quickstart.yaml", metadata={"help": "Of train_dino.py."})
    data_dir: Path = field(default=EXAMPLES / "data/phantom-cxr", metadata={"help": "Folder of the phantom shards."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Instead of the config's, for a trial run."})
    num_sources: int = field(default=6, metadata={"help": "Unseen images in the picture of variations."})
    num_variations: int = field(default=5, metadata={"help": "Variations of each of them."})
    num_seeds: int = field(default=3, metadata={"help": "Noise seeds that the figures are averaged over."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    args.output_dir = args.output_dir.resolve()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model_dir = args.output_dir / "model"
    stopwatch = Stopwatch()

    with stopwatch("train the UNet"):
        train(args, model_dir)
    with stopwatch("load the pipeline and the images"):
        pipe = DinoDiffusionPipeline.from_pretrained(model_dir)
        pipe.set_progress_bar_config(disable=True)
        size = json.loads((model_dir / "vae" / "config.json").read_text())["sample_size"]
        test_images = load_images(args.data_dir, "test", size)
        training_images = load_images(args.data_dir, "train", size)
    with stopwatch("generate and measure"):
        result = evaluate_reconstruction(pipe, test_images, training_images, seeds=range(args.num_seeds))
        result.save(args.output_dir / "reconstruction.json")
    with stopwatch("draw variations"):
        grid = draw_variations(pipe, test_images[: args.num_sources], args.num_variations)

    report = Report("diffusers-dino quickstart")
    add_introduction(report, test_images, training_images, pipe)
    add_loss(report, model_dir)
    report.add_heading("Variations of unseen images")
    report.add_image(grid, f"Left: the source. Right: {args.num_variations} variations generated from its tokens.")
    add_figures(report, result)
    add_stages(report, stopwatch)
    report.save(args.output_dir / "report.html")
    print(f"Report: {args.output_dir / 'report.html'}\nModel:  {model_dir}")


def train(args: Arguments, model_dir: Path) -> None:
    """Run the training script in a process of its own, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += [f"--num_cpu_threads_per_process={torch.get_num_threads()}"]  # accelerate's default on a CPU is one
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    command += [str(EXAMPLES / "train_dino.py"), str(args.config.resolve())]
    command += [f"--train_data_dir={args.data_dir.resolve()}/phantom-cxr-train-*.tar", f"--output_dir={model_dir}"]
    if args.max_train_steps is not None:
        command += ["--max_train_steps", str(args.max_train_steps)]
    subprocess.run(command, check=True, cwd=EXAMPLES.parent)  # the config's paths start there


def load_images(data_dir: Path, split: str, size: int) -> Tensor:
    """All images of a split: `(N, 1, size, size)` in [0, 1]."""
    images = open_images(str(data_dir / f"phantom-cxr-{split}-*.tar"), Preprocessing(size=size))
    return torch.stack([images[i]["image"] for i in range(len(images))])


def draw_variations(pipe: DinoDiffusionPipeline, sources: Tensor, num_variations: int):
    """One row for each source: the source, then its variations."""
    generated = pipe(
        sources,
        num_images_per_prompt=num_variations,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    cells = []
    for i, source in enumerate(pipe.image_processor.numpy_to_pil(sources.movedim(1, -1).numpy())):
        cells += [source.convert("L"), *generated[i * num_variations : (i + 1) * num_variations]]
    return make_image_grid(cells, rows=len(sources), cols=1 + num_variations)


def add_introduction(report: Report, test: Tensor, training: Tensor, pipe: DinoDiffusionPipeline) -> None:
    parameters = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
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
    report.add_table(
        [f"Fréchet distance of 16 x 16 pixels, {n} against {n} unseen images", ""],
        [
            ["generated, without guidance", result.frechet_generated],
            ["control: untrained UNet", result.frechet_untrained],
            ["control: as many training images", result.frechet_training_images],
        ],
    )


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
    main()
