r"""The whole suite on real radiographs: what it takes, an honest set, and planted faults.

    python benchmarks/suite.py --images ../shared/cxr/kermany/images \
        --table ../shared/cxr/kermany.csv
    python benchmarks/suite.py --images ../shared/cxr/nih --table ../shared/cxr/nih.csv --num_images 220
    python benchmarks/suite.py --cases overfitted --num_images 8 --size 128

Images are shared out by patient to a synthetic, a real and a training set. The first set is honest: real images of
others. In `planted` it holds blurred copies of training images, and its labels are shuffled. In `overfitted` it is
honest again, and the model, which is attacked in all cases, learns the training set by heart first. Prints seconds of
wall clock and of processors, and the answers.
"""

from __future__ import annotations

import csv
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image, ImageFilter

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import ImageDataset, Preprocessing
from diffusers_dino.data.labels import LabelTable, read_label_table, stored_labels
from diffusers_dino.evaluation import evaluate_suite, open_image_set
from diffusers_dino.evaluation.generation import stack_images
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pipelines.checks import image_size
from diffusers_dino.pipelines.preparation import open_images_for
from diffusers_dino.pixels import unit_to_vae
from diffusers_dino.seeds import generator_for

SETS = ("synthetic", "real", "training")


@dataclass
class Arguments:
    images: str = flag("examples/data/phantom-cxr", "Real images: a folder or tars.")
    table: str | None = flag(None, "Their labels and patients; by default those beside images in shards.")
    label_column: str = flag("findings", "Its column of labels.")
    num_images: int = flag(500, "Images of each set.")
    size: int = flag(64, "Side in pixels.")
    model: str = flag("examples/data/tiny-diffusion", "The pipeline that is attacked.")
    cases: list[str] = flag(["honest", "planted"], "Which sets to score: honest, planted, overfitted.")
    num_copies: int = flag(10, "Planted copies.")
    overfit_steps: int = flag(150, "Updates by which a model is overfitted, of 32 images at most.")
    seed: int = flag(0, "Of the sets.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    with TemporaryDirectory() as folder:
        for case in args.cases:
            score(args, Path(folder) / case)


def score(args: Arguments, folder: Path) -> None:
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    images = open_images_for(pipe, args.images, args.size)
    table = read_label_table(args.table, label_column=args.label_column) if args.table else stored_labels(images)
    table = table.select(images.keys)
    chosen = share_out(table, args.num_images, args.seed)
    for name, keys in chosen.items():
        write(folder / name, images.select(keys), table)
    if folder.name == "planted":
        spoil(folder, args.num_copies, args.seed)
    plain = Preprocessing(args.size, remove_borders=False)
    sets = {name: open_image_set(folder / name, plain, folder / f"{name}.csv", label_column="labels") for name in SETS}
    if folder.name == "overfitted":
        overfit(pipe, sets["training"].images.resized(image_size(pipe)), args)
    started, worked = time.perf_counter(), time.process_time()
    times: list[tuple[str, float, float]] = []
    result = evaluate_suite(
        folder=folder / "out",
        **sets,
        pipe=pipe,
        progress=lambda state: times.append((state.question, time.perf_counter(), time.process_time())),
    )
    sizes = ", ".join(f"{one.num_images} {one.name} ({one.num_patients} patients)" for one in result.sets)
    print(
        f"{folder.name}: {sizes}, {args.size} px, seed {args.seed}, {torch.get_num_threads()} threads: "
        f"{time.perf_counter() - started:.0f} s, {time.process_time() - worked:.0f} s of processors"
    )
    for (name, begun, first), (_, ended, last) in itertools.pairwise(times):
        print(f"  {name}: {ended - begun:.0f} s, {last - first:.0f} s of processors")
    for answer in result.answers:
        print(f"  {answer.question}: {answer.verdict}. {answer.line}")


def share_out(table: LabelTable, count: int, seed: int) -> dict[str, list[str]]:
    """The keys of each set; patients stay together."""
    patients = sorted(set(table.patients))
    order = torch.randperm(len(patients), generator=generator_for(seed, "sets")).tolist()
    chosen: dict[str, list[str]] = {name: [] for name in SETS}
    by_patient: dict[str, list[str]] = {}
    for key, patient in zip(table.keys, table.patients, strict=True):
        by_patient.setdefault(patient, []).append(key)
    for i in order:
        name = min(SETS, key=lambda one: len(chosen[one]))
        chosen[name] += by_patient[patients[i]][: max(0, count - len(chosen[name]))]
    return chosen


def write(folder: Path, images, table: LabelTable) -> None:
    folder.mkdir(parents=True)
    rows = table.select(images.keys)
    with open(f"{folder}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "patient", "labels"))
        for number, (patient, labels) in enumerate(zip(rows.patients, rows.labels, strict=True)):
            ((_, array),) = images.read_many([number])
            Image.fromarray(array).save(folder / f"{number:05d}.png")
            writer.writerow((f"{number:05d}.png", patient, "|".join(sorted(labels))))


def spoil(folder: Path, count: int, seed: int) -> None:
    """Replace the first synthetic images by blurred training images, and shuffle the labels."""
    for number in range(count):
        name = f"{number:05d}.png"
        Image.open(folder / "training" / name).filter(ImageFilter.GaussianBlur(0.6)).save(folder / "synthetic" / name)
    with open(folder / "synthetic.csv", newline="") as file:
        header, *rows = csv.reader(file)
    order = torch.randperm(len(rows), generator=generator_for(seed, "shuffle")).tolist()
    with open(folder / "synthetic.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *([*row[:2], rows[i][2]] for row, i in zip(rows, order, strict=True))])


def overfit(pipe: DinoDiffusionPipeline, images: ImageDataset, args: Arguments) -> None:
    """Train the UNet on these few images until it knows them by heart."""
    shown = stack_images(images)
    with torch.no_grad():
        pixels = unit_to_vae(shown, pipe.vae.config["in_channels"])
        latents, tokens = encode_to_moments(pipe.vae, pixels)[0], pipe.encode_image(shown)
    pipe.unet.train().requires_grad_(True)
    optimizer, random = torch.optim.AdamW(pipe.unet.parameters(), 1e-3), torch.Generator().manual_seed(args.seed)
    for _ in range(args.overfit_steps):
        some = torch.randperm(len(latents), generator=random)[:32]
        timesteps = torch.randint(0, 500, (len(some),), generator=random)
        noise = torch.randn(latents[some].shape, generator=random)
        noisy = pipe.scheduler.add_noise(latents[some], noise, timesteps)
        loss = (pipe.unet(noisy, timesteps, encoder_hidden_states=tokens[some]).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe.unet.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
