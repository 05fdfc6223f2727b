r"""The whole suite on real radiographs: what it takes, an honest set, and planted faults.

    python benchmarks/suite.py --images ../shared/cxr/kermany/images \
        --table ../shared/cxr/kermany.csv
    python benchmarks/suite.py --images ../shared/cxr/nih --table ../shared/cxr/nih.csv --num_images 220
    python benchmarks/suite.py --overfitted 8

Images are shared out by patient to a synthetic, a real and a training set. The first set is honest: real images of
others. In `planted` it holds blurred copies of training images, and its labels are shuffled. Prints seconds of wall
clock and of processors, and the answers. The last command overfits the bundled model on so many phantoms and attacks
it.
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
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.datasets import to_float
from diffusers_dino.data.labels import LabelTable, read_label_table
from diffusers_dino.evaluation import evaluate_membership, evaluate_suite, open_image_set
from diffusers_dino.latents import encode_to_moments
from diffusers_dino.pixels import unit_to_uint8, unit_to_vae
from diffusers_dino.seeds import generator_for

PHANTOMS = "examples/data/phantom-cxr/phantom-cxr-{}-*.tar"
SETS = ("synthetic", "real", "training")


@dataclass
class Arguments:
    images: str | None = flag(None, "Folder of real images.")
    table: str | None = flag(None, "Their labels and patients.")
    label_column: str = flag("findings", "Its column of labels.")
    num_images: int = flag(500, "Images of each set.")
    size: int = flag(64, "Side in pixels.")
    model: str | None = flag(None, "A pipeline to attack, too.")
    cases: list[str] = flag(["honest", "planted"], "Which sets to score.")
    num_copies: int = flag(10, "Planted copies.")
    overfitted: int = flag(0, "Overfit the bundled model on so many phantoms, and attack it.")
    overfit_steps: int = flag(150, "Updates of it.")
    seed: int = flag(0, "Of the sets.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.overfitted:
        attack_overfitted(args)
        return
    with TemporaryDirectory() as folder:
        for case in args.cases:
            score(args, Path(folder) / case, planted=case == "planted")


def score(args: Arguments, folder: Path, planted: bool) -> None:
    table = read_label_table(args.table, label_column=args.label_column)
    images = open_images(args.images, Preprocessing(args.size))
    table = table.select(images.keys)
    chosen = share_out(table, args.num_images, args.seed)
    for name, keys in chosen.items():
        write(folder / name, images.select(keys), table)
    if planted:
        spoil(folder, args.num_copies, args.seed)
    plain = Preprocessing(args.size, remove_borders=False)
    sets = {name: open_image_set(folder / name, plain, folder / f"{name}.csv", label_column="labels") for name in SETS}
    pipe = DinoDiffusionPipeline.from_pretrained(args.model) if args.model else None
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


def attack_overfitted(args: Arguments) -> None:
    pipe = DinoDiffusionPipeline.from_pretrained("examples/data/tiny-diffusion")
    members, others = (phantoms(split, args.overfitted) for split in ("train", "test"))
    before = evaluate_membership(pipe, members, others, seed=args.seed, progress=False)
    with torch.no_grad():
        pixels = unit_to_vae(unit_to_uint8(members).float() / 255, pipe.vae.config["in_channels"])
        latents, tokens = encode_to_moments(pipe.vae, pixels)[0], pipe.encode_image(members)
    pipe.unet.train().requires_grad_(True)
    optimizer, random = torch.optim.AdamW(pipe.unet.parameters(), 1e-3), torch.Generator().manual_seed(args.seed)
    for _ in range(args.overfit_steps):
        timesteps = torch.randint(0, 500, (len(latents),), generator=random)
        noise = torch.randn(latents.shape, generator=random)
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        loss = (pipe.unet(noisy, timesteps, encoder_hidden_states=tokens).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe.unet.eval().requires_grad_(False)
    after = evaluate_membership(pipe, members, others, seed=args.seed, progress=False)
    for name, result in (("as it is bundled", before), ("overfitted", after)):
        attack = result.combined
        print(
            f"{name}: AUROC {attack.auroc:.3f} [{attack.low:.3f}, {attack.high:.3f}] of {result.num_training} and "
            f"{result.num_held_out} images; leaks: {result.leaks}"
        )


def phantoms(split: str, count: int) -> torch.Tensor:
    images = open_images(PHANTOMS.format(split), Preprocessing(128, remove_borders=False))
    return torch.stack([to_float(array) for _, array in images.read_many(range(count))])


if __name__ == "__main__":
    main()
