"""Publish a trained model on the Hugging Face Hub, or as a folder to carry: weights, configs, card, samples, no more.

    diffusers-dino publish --model outputs/quickstart/model --repo_id org/name --results outputs/quickstart \
        --samples examples/data/phantom-cxr --license apache-2.0 --dry_run

`--model` is what training left: a pipeline, a LoRA, a conditioner or an autoencoder. The card is written from the
record of the training and the results. `--dry_run` shows all that would be uploaded; without it, it is uploaded.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

import diffusers_dino

from .. import DinoDiffusionPipeline
from ..data import Preprocessing, open_images
from ..data.datasets import collate
from ..data.sharding import require_synthetic
from ..data.sources import describe_source
from ..hub.cards import needs_agreement
from ..hub.folder import Content, class_of, folder_kind, model_files, variant_of
from ..hub.measurements import read_results
from ..hub.model_card import TrainingRecord, folder_card
from ..hub.upload import CARD, check_pictures, check_private, push_files, write_files
from ..latents import decode_latents, encode_to_moments, vae_scale_factor
from ..metrics.copy_gate import CopyGate
from ..pixels import unit_to_vae, vae_to_unit
from ..sheets import contact_sheet
from .arguments import flag

SAMPLES = "samples/samples.png"


@dataclass
class Arguments:
    model: str | None = flag(None, "Folder of the trained pipeline, LoRA, conditioner or autoencoder.", group="What")
    variant: str | None = flag(None, "Also upload the weights as fp16 or bf16, for `from_pretrained(variant=...)`.")
    results: list[str] | None = flag(None, "Result files of the eval_*.py scripts, or folders of them.", group="Card")  # noqa: RUF009
    evaluated_on: str = flag("held-out images", "What the results were measured on, as the card calls it.")
    sources: list[str] | None = flag(  # noqa: RUF009
        None,
        "Data sets that it was trained on: names of the catalogue, phantom_cxr, or YAML files; else those on record.",
    )
    base_model: list[str] | None = flag(None, "Models that it was made from; else those on record.")  # noqa: RUF009
    datasets: list[str] | None = flag(None, "Data sets of the Hub that it was trained on; else on record.")  # noqa: RUF009
    license: str | None = flag(None, "Of the weights, as the Hub spells it, such as apache-2.0.")
    tags: list[str] | None = flag(None, "Further tags for the Hub's search.")  # noqa: RUF009
    keep_card: bool = flag(False, "Upload the folder's README.md as it is, in place of a new card.")
    samples: str | None = flag(
        None, "Phantoms or a synthetic set to draw samples from; other images are refused.", group="Samples"
    )
    num_samples: int = flag(4, "Sources in the picture of samples.")
    num_variations: int = flag(3, "Variations of each.")
    num_inference_steps: int = flag(25, "Sampling steps of the samples.")
    guidance_scale: float = flag(2.0, "Their guidance.")
    seed: int = flag(0, "Of their noise.")
    gate: str | None = flag(
        None, "gate.safetensors of eval_memorization.py: samples that are near-copies are refused."
    )
    lora_base: str | None = flag(None, "Pipeline to draw a LoRA's samples with: a folder or a repository of the Hub.")
    device: str = flag("cpu", "Where to draw them, such as cuda.")
    repo_id: str | None = flag(None, "Repository, org/name; made if it does not exist.", group="Where")
    private: bool = flag(False, "A repository that is made here is private.")
    revision: str | None = flag(None, "Branch to commit to; made if it does not exist.")
    create_pr: bool = flag(False, "Open a pull request.")
    commit_message: str = flag("Upload model", "Of the commit.")
    output_dir: str | None = flag(None, "Write the files and their SHA-256 to this folder, in place of an upload.")
    dry_run: bool = flag(False, "Show the files and the card; nothing leaves this machine.")
    terms_checked: bool = flag(False, "The terms of credentialed sources allow that this model is public.")


def main(args: Arguments) -> None:
    check_arguments(args)
    folder = Path(args.model)
    record = open_record(args, folder)
    with ExitStack() as stack:
        files = model_files(folder)
        if args.variant:
            files |= variant_files(args, folder, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        samples = {SAMPLES: draw_samples(args, folder)} if args.samples else {}
        files |= samples
        files[CARD] = (
            (folder / CARD).read_bytes() if args.keep_card else write_card(args, folder, record, list(samples))
        )
        check_private(files)
        check_pictures(files)
        show(files, folder)
        if args.dry_run:
            print(f"\n{files[CARD].decode()}\nNothing was uploaded (--dry_run).")
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
    if args.variant not in (None, "fp16", "bf16"):
        raise ValueError(f"--variant is fp16 or bf16, not {args.variant}.")
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
            f"It was trained on {', '.join(signed)}, which are given to those alone who signed their terms. Upload it "
            "with --private, or with --terms_checked if you have read that the terms allow a public model."
        )


def variant_files(args: Arguments, folder: Path, aside: Path) -> dict[str, Content]:
    """The weights in half precision, written aside."""
    kind, name = folder_kind(folder), class_of(folder)
    if kind == "lora":
        raise ValueError("A LoRA has no variants: it is cast to its pipeline's type when it is loaded.")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[args.variant]
    library = diffusers if kind == "vae" else diffusers_dino
    model = getattr(library, name).from_pretrained(folder, torch_dtype=dtype)
    model.save_pretrained(aside, variant=args.variant)
    return {
        path: content for path, content in model_files(aside).items() if variant_of(Path(path).name) == args.variant
    }


def write_card(args: Arguments, folder: Path, record: TrainingRecord, samples: list[str]) -> bytes:
    shown = f"Left: {args.num_samples} images that are not of anybody. Right: what the model makes of them."
    card = folder_card(
        folder,
        args.repo_id or folder.resolve().name,
        record,
        measurements=read_results(args.results, args.evaluated_on) if args.results else (),
        samples=dict.fromkeys(samples, shown),
        license=args.license,
        tags=args.tags or (),
    )
    return str(card).encode()


@torch.no_grad()
def draw_samples(args: Arguments, folder: Path) -> bytes:
    """A PNG of sources that are verified to be synthetic, each beside variations or its reconstruction."""
    require_synthetic(args.samples)
    kind = folder_kind(folder)
    if kind == "conditioner":
        raise ValueError("A conditioner makes no images: leave --samples out.")
    if kind == "vae":
        vae = getattr(diffusers, class_of(folder)).from_pretrained(folder).to(args.device)
        sources = open_sources(args, vae.config["sample_size"])
        pixels = unit_to_vae(sources.to(args.device), vae.config["in_channels"])
        drawn = vae_to_unit(decode_latents(vae, encode_to_moments(vae, pixels)[0])).cpu()
    else:
        pipe = load_pipeline(args, folder, kind).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        sources = open_sources(args, pipe.unet.config["sample_size"] * vae_scale_factor(pipe.vae))
        sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        sampling |= {"num_images_per_prompt": args.num_variations, "output_type": "pt"}
        drawn = pipe(sources, generator=torch.Generator().manual_seed(args.seed), **sampling).images.float().cpu()
    if args.gate and (refused := int((~CopyGate.load(args.gate)(drawn)).sum())):
        raise ValueError(f"{refused} of {len(drawn)} samples are near-copies of training images: try another --seed.")
    buffer = io.BytesIO()
    contact_sheet(sources, drawn).save(buffer, "png")
    return buffer.getvalue()


def load_pipeline(args: Arguments, folder: Path, kind: str) -> DinoDiffusionPipeline:
    if kind == "pipeline":
        return DinoDiffusionPipeline.from_pretrained(folder)
    if args.lora_base is None:
        raise ValueError("Samples of a LoRA are drawn with the pipeline that it is for: give --lora_base.")
    pipe = DinoDiffusionPipeline.from_pretrained(args.lora_base)
    pipe.load_lora_weights(folder)
    return pipe


def open_sources(args: Arguments, size: int) -> Tensor:
    """`(N, C, size, size)` in [0, 1], spread over the set."""
    images = open_images(args.samples, Preprocessing(size, remove_borders=False))
    if len(images) < args.num_samples:
        raise ValueError(f"--num_samples {args.num_samples} of {len(images)} images.")
    stride = len(images) // args.num_samples
    return collate([images[number * stride] for number in range(args.num_samples)])["image"]


def show(files: dict[str, Content], folder: Path) -> None:
    """Print what is uploaded, and what of the folder is not."""
    sizes = {path: len(x) if isinstance(x, bytes) else x.stat().st_size for path, x in sorted(files.items())}
    for path, size in sizes.items():
        print(f"{size:>14,}  {path}")
    left = sum(path.is_file() and path.relative_to(folder).as_posix() not in files for path in folder.rglob("*"))
    print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files; {left} other files of the folder stay here")
