r"""Fréchet and kernel distance, precision, recall, density, coverage and Vendi score of a model or of all checkpoints.

    diffusers-dino evaluate fidelity --run my-model --data_dir /data/cxr --training_keys training_keys.txt \
        --table labels.csv --features xrv --weights xrv.safetensors --output_dir outputs/fid

One image is generated from each source and the set is compared with a reference of real images of other patients:
those that `--training_keys` lists against all others, or `--reference_dir` against `--data_dir`, or two halves of the
patients. Beside the models stand the untrained UNet and the sources themselves. Features are kept in `--output_dir`,
under a name that follows from weights, images and settings: the same command continues after a kill, and what is done
is not done again. With `--run`, the checkpoint with the lowest `--metric` is kept as the pipeline `best`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ... import DinoDiffusionPipeline
from ...data import ImageDataset, Preprocessing, open_images
from ...data.labels import read_label_table
from ...devices import device_of
from ...evaluation.controls import with_fresh_unet
from ...evaluation.fidelity.plot import plot_fidelity
from ...evaluation.fidelity.protocol import (
    REAL,
    UNTRAINED,
    FidelityResult,
    FidelityScores,
    Sampling,
    encode_sources,
    generate_features,
    require_disjoint,
    score_fidelity,
)
from ...evaluation.fidelity.table import format_fidelity_table
from ...evaluation.segmentation.protocol import split_in_halves
from ...evaluation.table_text import TABLE_FORMATS
from ...files import make_writable_folder, save_atomically
from ...fingerprints import fingerprint_pipeline, hash_of
from ...metrics import FeatureSet, extract_features, open_extractor
from ...metrics.bootstrap import Bootstrap
from ...seeds import generator_for
from ...training.checkpoints import complete_checkpoints
from ...training.models import load_trained_pipeline
from ..arguments import flag

logger = logging.getLogger("eval_fid")


@dataclass
class Arguments:
    run: str | None = flag(
        None, "Folder that train_dino.py wrote: measure all its complete checkpoints.", group="Models"
    )
    steps: list[int] = flag([], "Of these, the checkpoints after so many updates alone.")  # noqa: RUF009
    model: list[str] = flag([], "Pipelines or checkpoints, in place of a run.")  # noqa: RUF009
    untrained: bool = flag(True, "Show the UNet before training beside them.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    data_dir: str | None = flag(None, "Images: a folder, webdataset tars, or a URL.", group="Images")
    training_keys: str | None = flag(None, "Text file of keys: these are the reference, all others are sources.")
    reference_dir: str | None = flag(None, "Other images to take as the reference.")
    table: str | None = flag(None, "CSV file that names the patient of each image.")
    key_column: str = flag("file", "Its column of file names or keys.")
    patient_column: str = flag("patient", "Its column of patients.")
    num_images: int | None = flag(None, "Take so many of the sources alone, drawn at random.")
    num_reference: int | None = flag(None, "Take so many images of the reference alone, drawn at random.")
    remove_borders: bool = flag(True, "Cut uniform borders off, as training does unless told not to.")
    features: str = flag(
        "pixels", "Feature extractor: pixels, tiny, xrv, rad-dino, dinov2, inception, timm/NAME ...", group="Figures"
    )
    weights: str | None = flag(None, "Its weights: a local file or folder.")
    neighbors: int = flag(5, "Balls of precision, recall, density and coverage reach to this neighbour.")
    bootstrap_repeats: int = flag(200, "Draws of the intervals.")
    metric: Literal["frechet", "kernel"] = flag("frechet", "Distance that chooses the best checkpoint.")
    num_inference_steps: int = flag(25, "Sampling steps.", group="Sampling")
    guidance_scale: float = flag(1.0, "Guidance; 1 is none.")
    batch_size: int = flag(64, "Images at once.")
    seed: int = flag(0, "Of noise, of what is drawn at random, of the halves and of the bootstrap.")
    output_dir: str = flag(
        "outputs/fid", "Where features, figures, tables and the best checkpoint go.", group="Output"
    )


def main(args: Arguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    check_arguments(args)
    models = list_models(args)
    output_dir = make_writable_folder(args.output_dir)
    pipe = load(args, models[0].path)
    evaluation = Evaluation(args, pipe, output_dir / "features")
    rows = []
    for place, model in enumerate(models):
        pipe = pipe if place == 0 else load(args, model.path)
        rows.append(evaluation.generated(model.name, pipe, model.step))
    if args.untrained:
        rows.append(evaluation.generated(UNTRAINED, with_fresh_unet(pipe)))
    rows.append(evaluation.real())
    write_results(FidelityResult(tuple(rows)), output_dir)
    if args.run:
        keep_best(args, rows, {model.name: model.path for model in models}, output_dir / "best")


class Model(NamedTuple):
    name: str
    path: str
    step: int | None = None


def check_arguments(args: Arguments) -> None:
    if bool(args.run) == bool(args.model):
        raise ValueError("Give --run (a folder that train_dino.py wrote) or --model.")
    if not args.data_dir:
        raise ValueError("Give --data_dir: images that the model has not seen, and real ones to compare with.")
    if args.training_keys and args.reference_dir:
        raise ValueError(
            "The reference is what --training_keys lists or what is in --reference_dir: give one of them."
        )
    names = [Path(path).name for path in args.model]
    if len(set(names)) < len(names):
        raise ValueError(f"The last parts of --model name the rows and must differ, got {names}.")


def list_models(args: Arguments) -> list[Model]:
    """What is measured: the models that were named, or the complete checkpoints of a run."""
    if args.model:
        return [Model(Path(path).name or path, path) for path in args.model]
    found = complete_checkpoints(args.run)
    if missing := set(args.steps) - {checkpoint.step for checkpoint in found}:
        there = ", ".join(str(checkpoint.step) for checkpoint in found)
        raise ValueError(f"{args.run} has no checkpoint after {min(missing)} updates; there are those after {there}.")
    chosen = [c for c in found if not args.steps or c.step in args.steps]
    return [Model(c.path.name, str(c.path), c.step) for c in chosen]


def load(args: Arguments, path: str) -> DinoDiffusionPipeline:
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    return load_trained_pipeline(path, dtype).to(torch.device(device_of(0, args.device)))


class Evaluation:
    """Sources, reference and settings that all rows share; features that are on disk are not computed again."""

    def __init__(self, args: Arguments, pipe: DinoDiffusionPipeline, folder: Path) -> None:
        self.args, self.folder = args, folder
        folder.mkdir(exist_ok=True)
        self.extractor = open_extractor(args.features, args.weights, torch.device(device_of(0, args.device)))
        sources, reference, patients = open_sets(args, pipe.unet.config["sample_size"] * pipe.vae_scale_factor)
        self.sources = self._of_images("sources", sources, args.data_dir)
        self.reference = self._of_images("reference", reference, args.reference_dir or args.data_dir)
        require_disjoint(self.sources, self.reference)
        self.images = sources.select(self.sources.keys)  # without what cannot be read
        groups = [[patients[key] for key in one.keys] if patients else None for one in (self.sources, self.reference)]
        self.bootstrap = Bootstrap(args.bootstrap_repeats, args.seed, 0.95, *groups)
        self.tokens: dict[str, Tensor] = {}  # by the fingerprint of the conditioner, which checkpoints share
        logger.info(f"{len(self.sources)} sources, {len(self.reference)} real images of others as the reference")

    def generated(self, name: str, pipe: DinoDiffusionPipeline, step: int | None = None) -> FidelityScores:
        """The row of a model."""
        args = self.args
        settings = (args.num_inference_steps, args.guidance_scale, args.seed, args.batch_size, args.dtype)
        sampling = Sampling(type(pipe.scheduler).__name__, *settings)
        parts = fingerprint_pipeline(pipe)

        def compute() -> FeatureSet:
            if parts["conditioner"] not in self.tokens:
                self.tokens[parts["conditioner"]] = encode_sources(pipe, self.images, args.batch_size)
            tokens = self.tokens[parts["conditioner"]]
            return generate_features(pipe, tokens, self.sources.keys, self.extractor, sampling)

        images = args.data_dir, self.images.preprocessing.fingerprint(), self.sources.keys
        features = self._cached(name, (parts, dict(pipe.scheduler.config), sampling, *images), compute)
        return self._score(name, features, step, sampling)

    def real(self) -> FidelityScores:
        """The row of the sources themselves."""
        return self._score(REAL, self.sources)

    def _score(
        self, name: str, features: FeatureSet, step: int | None = None, sampling: Sampling | None = None
    ) -> FidelityScores:
        options = {"step": step, "sampling": sampling, "neighbors": self.args.neighbors, "bootstrap": self.bootstrap}
        scores = score_fidelity(name, features, self.reference, **options)
        logger.info(f"{name}: Fréchet distance {scores.frechet.value:.4g}, kernel distance {scores.kernel.value:.4g}")
        return scores

    def _of_images(self, name: str, images: ImageDataset, place: str) -> FeatureSet:
        facts = place, images.preprocessing.fingerprint(), images.keys
        return self._cached(name, facts, lambda: extract_features(self.extractor, images, self.args.batch_size))

    def _cached(self, name: str, facts: tuple[object, ...], compute: Callable[[], FeatureSet]) -> FeatureSet:
        """Features from the file whose name follows from all that they depend on, computed if there is none."""
        path = self.folder / f"{name}-{hash_of(self.extractor.spec, *facts)[:16]}.safetensors"
        if not path.is_file():
            compute().save(path)
        return FeatureSet.load(path)


def open_sets(args: Arguments, size: int) -> tuple[ImageDataset, ImageDataset, dict[str, str] | None]:
    """Sources, reference, and the patient of each key if a table names them; no patient is in both sets."""
    preprocessing = Preprocessing(size, remove_borders=args.remove_borders)
    images = open_images(args.data_dir, preprocessing)
    known = open_images(args.reference_dir, preprocessing) if args.reference_dir else images
    patients = read_patients(args, [*images.keys, *known.keys]) if args.table else None
    if args.reference_dir:
        sources, reference = images.keys, known.keys
    elif args.training_keys:
        listed = set(Path(args.training_keys).read_text().split())
        reference = known.select(listed).keys
        sources = [key for key in images.keys if key not in listed]
    else:
        if patients is None:
            logger.warning("There is no --table: images of one patient may be on both sides of the comparison.")
        first = split_in_halves([patients[key] if patients else key for key in images.keys], args.seed).tolist()
        sources, reference = ([k for k, inside in zip(images.keys, first, strict=True) if inside == s] for s in (1, 0))
    if patients and (left_out := {patients[key] for key in reference} & {patients[key] for key in sources}):
        sources = [key for key in sources if patients[key] not in left_out]
        logger.warning(f"Left the sources of {len(left_out)} patients out, who are in the reference, too.")
    chosen = draw(sources, args.num_images, args.seed), draw(reference, args.num_reference, args.seed)
    if not all(chosen):
        raise ValueError(f"There are {len(chosen[0])} sources and {len(chosen[1])} images in the reference.")
    return images.select(chosen[0]), known.select(chosen[1]), patients


def read_patients(args: Arguments, keys: Sequence[str]) -> dict[str, str]:
    columns = {"key_column": args.key_column, "patient_column": args.patient_column}
    table = read_label_table(args.table, label_column=None, **columns).select(list(dict.fromkeys(keys)))
    return dict(zip(table.keys, table.patients, strict=True))


def draw(keys: Sequence[str], count: int | None, seed: int) -> list[str]:
    if count is None or count >= len(keys):
        return list(keys)
    return [keys[i] for i in torch.randperm(len(keys), generator=generator_for(seed, "subset"))[:count].tolist()]


def write_results(result: FidelityResult, output_dir: Path) -> None:
    result.save(output_dir / "result.json")
    for style, suffix in TABLE_FORMATS.items():
        (output_dir / f"table.{suffix}").write_text(format_fidelity_table(result, style))
    if result.checkpoints:
        plot_fidelity(result).savefig(output_dir / "fidelity.png", dpi=150, bbox_inches="tight")
    print((output_dir / "table.md").read_text())


def keep_best(args: Arguments, rows: Sequence[FidelityScores], paths: dict[str, str], folder: Path) -> None:
    """Write the best checkpoint as a whole pipeline, with what the training script's `best` says of itself."""
    best = FidelityResult(tuple(rows)).best_checkpoint(args.metric)
    facts = {
        "metric": f"{args.metric}_{args.features}",
        "value": getattr(best, args.metric).value,
        "step": best.step,
        "num_images": best.num_images,
        "num_reference": best.num_reference,
        "features": best.features.to_dict(),
    }
    with save_atomically(folder) as partial:
        load_trained_pipeline(paths[best.images]).save_pretrained(partial)
        (partial / "metric.json").write_text(json.dumps(facts, indent=1))
    logger.info(f"{best.images} has the lowest {args.metric} distance; it is kept in {folder}")
