r"""Does a prior help a rare class? A classifier of tokens, without and with tokens that the prior draws of it.

    python benchmarks/prior_rare_class.py --conditioner my-model/conditioner --images /data/cxr \
        --labels /data/cxr.csv --rare "Viral Pneumonia" --size 224

A few images of the class are labelled, others of other classes, and many are not labelled at all. The prior is
trained by `examples/train_prior.py` on all of them; a logistic regression on the labelled tokens is then given the
drawn ones, too. Its AUROC on patients that nothing has seen is reported with the interval of the difference (patients
drawn whole).
"""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from diffusers_dino import DinoImageConditioner, DinoPriorPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.labels import LabelTable, read_label_table
from diffusers_dino.evaluation.generation import embed_images
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics.auroc import label_auroc
from diffusers_dino.metrics.bootstrap import bootstrap_samples, percentile_interval
from diffusers_dino.seeds import generator_for

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train_prior.py"


@dataclass
class Arguments:
    conditioner: str = flag("my-model/conditioner", "Saved DinoImageConditioner.")
    images: str = flag("/data/cxr", "Folder of images.")
    labels: str = flag("/data/cxr.csv", "CSV with file, patient and findings.")
    rare: str = flag("Viral Pneumonia", "The class.")
    size: int = flag(112, "Side of the images in pixels.")
    remove_borders: bool = flag(False, "Cut uniform borders off.")
    num_rare: int = flag(50, "Labelled images of the class.")
    num_others: int = flag(500, "Labelled images of other classes.")
    num_unlabelled: int = flag(1000, "Images without a label.")
    num_test: int = flag(500, "Images of other patients, to measure on.")
    num_drawn: int = flag(500, "Tokens of the class that the prior draws.")
    guidance_scale: float = flag(1.0, "Of the prior.")
    max_train_steps: int = flag(2000, "Updates of the prior, unless it stops early.")
    seed: int = flag(0, "Seed of the choice, the prior and the draws.")
    output_dir: str = flag("outputs/prior-rare-class", "Where everything goes.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folder = make_writable_folder(args.output_dir)
    images = open_images(args.images, Preprocessing(args.size, args.remove_borders))
    table = read_label_table(args.labels).select(images.keys)
    chosen = choose(args, table.keys, table.labels, table.patients)
    conditioner = DinoImageConditioner.from_pretrained(args.conditioner)
    prior = train_prior(args, folder, chosen, table)
    prior.set_progress_bar_config(disable=True)
    prior.check_conditioner(conditioner)

    def tokens_of(keys: list[str]) -> np.ndarray:
        selected = images.select(keys)
        encoded = prior.prior.standardise(embed_images(conditioner, selected)).flatten(1).numpy()
        places = {key: place for place, key in enumerate(selected.keys)}
        return encoded[[places[key] for key in keys]]

    labelled = chosen["rare"] + chosen["others"]
    truth = np.array([True] * len(chosen["rare"]) + [False] * len(chosen["others"]))
    known, test = tokens_of(labelled), tokens_of(chosen["test"])
    row_of = {key: row for row, key in enumerate(table.keys)}
    target = np.array([args.rare in table.labels[row_of[key]] for key in chosen["test"]])
    patients = [table.patients[row_of[key]] for key in chosen["test"]]
    drawn = prior(
        labels=[args.rare],
        num_images_per_prompt=args.num_drawn,
        guidance_scale=args.guidance_scale,
        generator=[generator_for(args.seed, "rare class", row) for row in range(args.num_drawn)],
    ).image_embeds
    drawn = prior.prior.standardise(drawn).flatten(1).numpy()
    copied = known[truth][np.arange(args.num_drawn) % truth.sum()]
    sets = {
        "real": (known, truth),
        "real, the class repeated as often": stacked(known, truth, copied),
        "real and drawn": stacked(known, truth, drawn),
    }
    scores = {name: fit(*each).decision_function(test) for name, each in sets.items()}
    counts = {name: len(keys) for name, keys in chosen.items()}
    figures = {"arguments": asdict(args), "counts": {**counts, "positives in test": int(target.sum())}}
    for name in sets:
        figures[name] = {"auroc": auroc(scores[name], target), "less real": difference(scores, name, target, patients)}
        low, high = figures[name]["less real"]
        gain = figures[name]["auroc"] - figures["real"]["auroc"]
        print(f"| {name} | {figures[name]['auroc']:.3f} | {gain:+.3f} [{low:+.3f}, {high:+.3f}] |")
    write_json(folder / "rare_class.json", figures, indent=2)


def choose(args: Arguments, keys: tuple, labels: tuple, patients: tuple) -> dict[str, list[str]]:
    """Disjoint images: labelled ones, unlabelled ones, and those to measure on, which are of other patients."""
    generator = np.random.default_rng(args.seed)
    people = sorted(set(patients))
    held = set(generator.permutation(people)[: len(people) // 5].tolist())
    order = generator.permutation(len(keys)).tolist()
    wanted = {"rare": args.num_rare, "others": args.num_others}
    wanted |= {"unlabelled": args.num_unlabelled, "test": args.num_test}
    chosen: dict[str, list[str]] = {name: [] for name in wanted}
    for place in order:
        own = "rare" if args.rare in labels[place] else "others"
        kinds = ["test"] if patients[place] in held else [own, "unlabelled"]
        for kind in kinds:
            if len(chosen[kind]) < wanted[kind]:
                chosen[kind].append(keys[place])
                break
    short = {name: len(chosen[name]) for name in wanted if len(chosen[name]) < wanted[name]}
    if short:
        raise ValueError(f"There are too few images: {short} of {wanted}.")
    return chosen


def train_prior(args: Arguments, folder: Path, chosen: dict[str, list[str]], table: LabelTable) -> DinoPriorPipeline:
    """Train on labelled and unlabelled images; the table says nothing of the latter."""
    row_of = {key: row for row, key in enumerate(table.keys)}
    labelled = chosen["rare"] + chosen["others"]
    with open(folder / "known.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "findings"])
        writer.writerows([key, "|".join(sorted(table.labels[row_of[key]]))] for key in labelled)
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in labelled + chosen["unlabelled"]))
    flags = {
        "conditioner": args.conditioner,
        "train_data_dir": args.images,
        "keys_file": folder / "keys.txt",
        "labels": folder / "known.csv",
        "resolution": args.size,
        "remove_borders": args.remove_borders,
        "width": 192,
        "max_train_steps": args.max_train_steps,
        "checkpointing_steps": 0,
        "seed": args.seed,
        "output_dir": folder / "prior",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(TRAIN), *words], check=True)
    return DinoPriorPipeline.from_pretrained(folder / "prior")


def stacked(known: np.ndarray, truth: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([known, more]), np.concatenate([truth, np.ones(len(more), bool)])


def fit(tokens: np.ndarray, truth: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=0.01, max_iter=2000).fit(tokens, truth)


def auroc(scores: np.ndarray, target: np.ndarray) -> float:
    return float(label_auroc(scores[:, None], target[:, None])[0])


def difference(
    scores: dict[str, np.ndarray], name: str, target: np.ndarray, patients: list[str]
) -> tuple[float, float]:
    """95 % interval of the gain over the real tokens only, of the same draws of patients."""
    draws = bootstrap_samples(
        lambda rows: auroc(scores[name][rows], target[rows]) - auroc(scores["real"][rows], target[rows]),
        len(target),
        patients,
        1000,
    )
    return tuple(percentile_interval(draws))


if __name__ == "__main__":
    main()
