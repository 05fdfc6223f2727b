r"""Search a synthetic set for copies of training images, and make a gate that keeps them out of the next one.

    diffusers-dino evaluate memorization --training /data/cxr --training_keys training_keys.txt \
        --held_out /data/cxr --held_out_keys held_out_keys.txt --synthetic outputs/synthetic \
        --patients /data/cxr.csv --output_dir outputs/memorization

Images are folders or webdataset tars. Without `--synthetic` the search is set up and checked, and `gate.safetensors`
is written, which `synthesise --gate` takes. Writes `memorization.json`, `report.html`, `distances.png` and, where
patients may be shown, `pairs.png`. Reports name images by their keys and nothing else.
Needs the extra `eval`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...data import ImageDataset, Preprocessing, open_images
from ...data.keys import read_keys
from ...data.labels import read_label_table, stored_labels
from ...evaluation import evaluate_memorization
from ...evaluation.memorization.plot import draw_closest_pairs, plot_memorization
from ...evaluation.memorization.table import make_report, table_of_sets
from ...files import lock_folder, make_writable_folder
from ...metrics import open_extractor
from ..arguments import flag


@dataclass
class Arguments:
    training: str | None = flag(
        None, "What the generator was trained on: a folder, or webdataset tars.", group="Images"
    )
    synthetic: str | None = flag(None, "What it generated, likewise.")
    held_out: str | None = flag(None, "Real images that it was not trained on, likewise.")
    training_keys: str | None = flag(None, "Text file of the keys of --training to use, one a line.")
    held_out_keys: str | None = flag(None, "The same for --held_out; by default what --training_keys does not list.")
    patients: str | None = flag(None, "CSV table with the patient of each real image, or `stored` in the shards.")
    key_column: str = flag("file", "Its column of keys or file names.")
    patient_column: str = flag("patient", "Its column of patients.")
    size: int = flag(128, "Side in pixels that images are prepared at.")
    remove_borders: bool = flag(False, "Cut uniform borders off real images, if it was done in training.")
    extractor: str = flag("local-contrast", "Feature space: not the generator's own encoder.", group="Search")
    weights: str | None = flag(None, "Weights of the extractor, if it has any.")
    false_alarms: float = flag(0.01, "Share of real images that may be called copies; 0.01 takes 299 images.")
    calibrate_on: Literal["training", "held out"] = flag("training", "Real images that the threshold comes from.")
    batch_size: int = flag(64, "Images computed at once.")
    device: str = flag("cpu", "Where features are computed, such as cuda.")
    output_dir: str = flag("outputs/memorization", "Where the report and the gate go.", group="Output")
    num_pairs: int = flag(12, "Closest pairs to list.")
    draw_pairs: bool = flag(True, "Show them as pictures; no, where the report must not show patients.")


def main(args: Arguments) -> None:
    if not args.training:
        raise ValueError("Give --training: the images that the generator was trained on.")
    output_dir = make_writable_folder(args.output_dir)
    with lock_folder(output_dir, OSError):
        measure(args, output_dir)


def measure(args: Arguments, output_dir: Path) -> None:
    training, held_out = open_real_images(args)
    # what was generated has been prepared already
    synthetic = open_images(args.synthetic, Preprocessing(args.size, remove_borders=False)) if args.synthetic else None
    result, gate = evaluate_memorization(
        training,
        synthetic,
        held_out,
        extractor=open_extractor(args.extractor, args.weights, args.device),
        training_groups=read_patients(args, training),
        held_out_groups=read_patients(args, held_out),
        false_alarms=args.false_alarms,
        calibrate_on=args.calibrate_on,
        num_pairs=args.num_pairs,
        batch_size=args.batch_size,
    )
    result.save(output_dir / "memorization.json")
    gate.save(output_dir / "gate.safetensors")
    figure = plot_memorization(result)
    figure.savefig(output_dir / "distances.png", dpi=150, bbox_inches="tight")
    report = make_report(result)
    report.add_figure(figure, "Relative distance to the nearest training image.")
    if result.closest and args.draw_pairs:
        pairs = draw_closest_pairs(result, synthetic, training)
        pairs.save(output_dir / "pairs.png")
        report.add_image(pairs, "Closest pairs, nearest first: synthetic | its nearest training image.")
    report.save(output_dir / "report.html")
    for row in table_of_sets(result)[1]:
        print(*row, sep=" | ")
    print(f"Report: {output_dir / 'report.html'}\nGate:   {output_dir / 'gate.safetensors'}")


def open_real_images(args: Arguments) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and held-out images; what trained is never held out."""
    preprocessing = Preprocessing(args.size, remove_borders=args.remove_borders)
    training = open_images(args.training, preprocessing)
    if args.training_keys:
        training = training.select(read_keys(args.training_keys))
    if not args.held_out:
        return training, None
    held_out, trained = open_images(args.held_out, preprocessing), set(training.keys)
    is_same = os.path.realpath(args.held_out) == os.path.realpath(args.training)
    if args.held_out_keys:
        held_out = held_out.select(read_keys(args.held_out_keys))
        if is_same and (both := sorted(trained & set(held_out.keys))):
            raise ValueError(
                f"{len(both)} of the held-out images are training images, such as {both[0]}: --held_out_keys and "
                "--training_keys must not have keys in common."
            )
    elif args.training_keys or is_same:
        held_out = held_out.select([key for key in held_out.keys if key not in trained])
    if not len(held_out):
        raise ValueError("No image is held out: the training set has all keys of --held_out.")
    return training, held_out


def read_patients(args: Arguments, images: ImageDataset | None) -> tuple[str, ...] | None:
    if not args.patients or images is None:
        return None
    if args.patients == "stored":
        return stored_labels(images).patients
    return read_label_table(args.patients, args.key_column, None, args.patient_column).select(images.keys).patients
