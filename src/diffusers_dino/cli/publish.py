r"""Publish a trained model on the Hugging Face Hub, or write it to a folder to carry: weights, configs, card, samples.

    diffusers-dino publish --model outputs/quickstart/model --repo_id org/name --results outputs/quickstart \
        --samples examples/data/phantom-cxr --license apache-2.0 --dry_run

`--model` is the folder that a training wrote: a pipeline, a LoRA, a conditioner or an autoencoder. The card is written
from the record of the training and the results. `--dry_run` shows all that would be uploaded, and uploads nothing.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from ..data.sources import describe_source
from ..hub.cards import CARD, folder_card
from ..hub.folder import half_precision_files, model_files
from ..hub.markdown import needs_agreement
from ..hub.measurements import read_results
from ..hub.privacy import Content, check_pictures, check_private
from ..hub.record import TrainingRecord
from ..hub.samples import draw_samples
from ..hub.upload import push_files, write_files
from .arguments import flag

SAMPLES = "samples/samples.png"


@dataclass
class Arguments:
    model: str | None = flag(None, "Folder of the trained pipeline, LoRA, conditioner or autoencoder.", group="What")
    variant: str | None = flag(None, "Also upload the weights as fp16 or bf16, for `from_pretrained(variant=...)`.")
    results: list[str] | None = flag(None, "Result files of `evaluate`, or folders of them.", group="Card")
    evaluated_on: str = flag("held-out images", "What the results were measured on, as the card calls it.")
    sources: list[str] | None = flag(
        None,
        "Data sets that it was trained on: names of the catalogue, phantom_cxr, or YAML files. Default: on record.",
    )
    base_model: list[str] | None = flag(None, "Models that it was made from; by default those on record.")
    datasets: list[str] | None = flag(None, "Data sets of the Hub that it was trained on.")
    license: str | None = flag(None, "Of the weights, as the Hub spells it, such as apache-2.0.")
    tags: list[str] | None = flag(None, "Further tags for the Hub's search.")
    keep_card: bool = flag(False, "Upload the folder's README.md as it is, in place of a new card.")
    samples: str | None = flag(
        None, "Phantoms or a synthetic set to draw samples from; other images are refused.", group="Samples"
    )
    num_samples: int = flag(4, "Sources in the picture of samples.")
    num_variations: int = flag(3, "Variations of each.")
    num_inference_steps: int | None = flag(None, "Their sampling steps; by default 25, and 4 of a distilled model.")
    guidance_scale: float | None = flag(None, "Their guidance scale; by default 2, and 1 of a distilled LoRA.")
    seed: int = flag(0, "Seed of their noise.")
    gate: str | None = flag(
        None, "gate.safetensors of `evaluate memorization`: refuse samples that are near-copies of training images."
    )
    lora_base: str | None = flag(None, "Pipeline to draw a LoRA's samples with: a folder or a repository of the Hub.")
    device: str = flag("cpu", "Where to draw them, such as cuda.")
    repo_id: str | None = flag(None, "Repository, org/name; made if it does not exist.", group="Where")
    private: bool = flag(False, "A repository that is made here is private; a public one is refused.")
    revision: str | None = flag(None, "Branch to commit to; made if it does not exist.")
    create_pr: bool = flag(False, "Open a pull request.")
    commit_message: str = flag("Upload model", "Message of the commit.")
    output_dir: str | None = flag(None, "Write the files and their SHA-256 to this folder, in place of an upload.")
    dry_run: bool = flag(False, "Show the files and the card; nothing leaves this machine.")
    terms_checked: bool = flag(False, "The terms of credentialed sources allow that this model is public.")


def main(args: Arguments) -> None:
    check_arguments(args)
    folder = Path(args.model)
    record = open_record(args, folder)
    with tempfile.TemporaryDirectory() as aside:
        files = model_files(folder)
        if args.variant:
            files |= half_precision_files(folder, args.variant, aside)
        samples = {SAMPLES: picture_of_samples(args)} if args.samples else {}
        card = (folder / CARD).read_text() if args.keep_card else write_card(args, folder, record, list(samples))
        files |= {**samples, CARD: card.encode()}
        check_private(files)
        check_pictures(card, samples)
        show(files, folder)
        if args.dry_run:
            print(f"\n{card}\nNothing was uploaded (--dry_run).")
        elif args.output_dir:
            print(f"Written to {write_files(files, args.output_dir)}")
        else:
            check_terms(args, record)
            options = {"private": args.private or None, "revision": args.revision, "create_pr": args.create_pr}
            commit = push_files(files, args.repo_id, commit_message=args.commit_message, **options)
            print(f"Uploaded: {commit.pr_url or commit.commit_url}")


def check_arguments(args: Arguments) -> None:
    if args.model is None or not Path(args.model).is_dir():
        raise ValueError(f"--model has to be the folder of a trained model, got {args.model}.")
    if args.repo_id is None and args.output_dir is None and not args.dry_run:
        raise ValueError("Say where it should go: --repo_id org/name, or --output_dir for a folder to carry.")
    if args.repo_id is not None:
        validate_repo_id(args.repo_id)
    if args.keep_card and not Path(args.model, CARD).is_file():
        raise FileNotFoundError(f"--keep_card: there is no {CARD} in {args.model}.")
    if args.keep_card and args.results:
        raise ValueError("--results are for a new card, which --keep_card does not write.")


def open_record(args: Arguments, folder: Path) -> TrainingRecord:
    """The record of the training, with what the flags say in place of it."""
    given = {
        "sources": args.sources and [describe_source(name) for name in args.sources],
        "base_models": args.base_model,
        "datasets": args.datasets,
    }
    return replace(TrainingRecord.load(folder), **{name: value for name, value in given.items() if value})


def check_terms(args: Arguments, record: TrainingRecord) -> None:
    signed = [source["title"] for source in record.sources if needs_agreement(source)]
    if signed and not (args.private or args.terms_checked):
        raise ValueError(
            f"It was trained on {', '.join(signed)}, which only those may use who signed their terms. Upload it with "
            "--private, or with --terms_checked if you have read that the terms allow a public model."
        )


def write_card(args: Arguments, folder: Path, record: TrainingRecord, samples: list[str]) -> str:
    shown = f"Left: {args.num_samples} images that do not show real people. Right: what the model makes of them."
    card = folder_card(
        folder,
        args.repo_id or folder.resolve().name,
        record,
        measurements=read_results(args.results, args.evaluated_on) if args.results else (),
        samples=dict.fromkeys(samples, shown),
        license=args.license,
        tags=args.tags or (),
    )
    return str(card)


def picture_of_samples(args: Arguments) -> bytes:
    names = ("num_samples", "num_variations", "num_inference_steps", "guidance_scale", "seed")
    options = {name: getattr(args, name) for name in (*names, "gate", "lora_base", "device")}
    buffer = io.BytesIO()
    draw_samples(args.model, args.samples, **options).save(buffer, "png")
    return buffer.getvalue()


def show(files: dict[str, Content], folder: Path) -> None:
    """Print what is uploaded, and what of the folder is not."""
    sizes = {path: len(x) if isinstance(x, bytes) else x.stat().st_size for path, x in sorted(files.items())}
    for path, size in sizes.items():
        print(f"{size:>14,}  {path}")
    left = sum(path.is_file() and path.relative_to(folder).as_posix() not in files for path in folder.rglob("*"))
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files; {left} other files of the folder stay here")
