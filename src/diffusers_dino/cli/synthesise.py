r"""Make a data set of synthetic, labelled images from real ones: webdataset shards, labels.csv and a manifest.

    accelerate launch -m diffusers_dino synthesise --model my-model --data_dir /data/cxr --labels /data/cxr.csv \
        --strategy interpolation --ratio 5 --output_dir synthetic

The plan is frozen first: which images to make, from which sources and with which noise. If the run is stopped at any
moment, the same command goes on, with any number of processes, and ends with the same shards.
docs/synthesis.md describes what is written.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ..data import ImageDataset
from ..data.labels import LabelTable, read_label_table
from ..data.sharding import recorded_sources
from ..files import atomic_write
from ..hub.cards import write_dataset_card
from ..hub.measurements import read_results
from ..pipelines import DinoDiffusionPipeline, DinoPriorPipeline
from ..pipelines.checks import default_steps, image_size
from ..synthesis import (
    Plan,
    PriorTokens,
    RayResources,
    SynthesisSettings,
    SyntheticSet,
    begun_threads,
    bind,
    compile_generator,
    draw_examples,
    export,
    load_generator,
    only_run,
    open_gate,
    plan_interpolation,
    plan_prior,
    plan_reconstruction,
    prepare_folder,
    synthesise,
    synthesise_with_ray,
)
from .arguments import flag, settings_of
from .image_flags import STORED, RealImageArguments, open_real_images
from .sampling_flags import SamplingArguments

NO_IMAGES = "none"
PLANNERS = {"reconstruction": plan_reconstruction, "interpolation": plan_interpolation, "prior": plan_prior}


@dataclass
class Arguments(SamplingArguments, RealImageArguments):
    model: str = flag(
        "outputs/quickstart/model", "DinoDiffusionPipeline: a folder or a repository of the Hub.", group="Synthesis"
    )
    strategy: Literal["reconstruction", "interpolation", "prior"] = flag(
        "reconstruction",
        "Variations of images; images between two that share a label, which needs labels; or, with --prior, images of "
        "no source, whose labels come together as in --labels.",
    )
    prior: str | None = flag(
        None, f"DinoPriorPipeline of the model, for --strategy prior, which needs no image: --data_dir {NO_IMAGES}."
    )
    prior_guidance_scale: float = flag(1.0, "Its guidance; 1 is none.")
    prior_inference_steps: int = flag(50, "Its sampling steps.")
    balanced: bool = flag(False, "With --strategy prior: every label equally often.")
    identical: bool = flag(
        False, "With --strategy interpolation: only between images of the very same labels, which the result then has."
    )
    soft_labels: float | None = flag(
        None,
        "With --strategy interpolation: soft labels, (1 - r^g) y1 + r^g y2 at a fraction r between images. "
        "This is g; 1 mixes labels as tokens are mixed.",
    )
    num_inference_steps: int | None = flag(None, "Sampling steps; by default 50, and 4 of a distilled model.")
    ratio: float | None = flag(None, "Synthetic images for each source.")
    num_images: int | None = flag(None, "Number of synthetic images, in place of --ratio.")
    seed: int = flag(0, "Seed of the plan and of the noise.")
    batch_size: int = flag(16, "Images sampled together by a process.")
    threads: int | None = flag(None, "CPU threads of a process; by default what PyTorch chooses at the first run.")
    compile: bool = flag(False, "Compile the model: worth minutes at the start for thousands of images.")
    gate: str | None = flag(
        None,
        "File of a CopyGate: near-copies are drawn again. Calibrated on the real images if there is no such file.",
        group="Gate",
    )
    gate_false_alarms: float = flag(0.01, "Share of unseen real images that a newly calibrated gate may refuse.")
    max_attempts: int = flag(5, "How often an image is drawn before the gate's refusal is final.")
    max_left_out: float = flag(0.05, "Largest tolerated fraction of images that are refused in all attempts.")
    output_dir: str = flag("synthetic", "Folder of the shards; all processes must share it.", group="Output")
    shard_size: int = flag(1000, "Images in a shard. A process that is killed loses one shard.")
    format: Literal["png", "jpg"] = flag("png", "How images are stored.")
    quality: int = flag(95, "Quality of JPEG.")
    grayscale: bool = flag(False, "Store the mean of three channels.")
    engine: Literal["local", "ray"] = flag(
        "local", "local: this machine or accelerate's processes; ray: a Ray cluster."
    )
    ray_address: str | None = flag(None, "Ray cluster, such as auto; by default Ray is started on this machine.")
    ray_workers: int | None = flag(None, "Workers on it at most; by default as many as fit.")
    ray_gpus: float | None = flag(
        None, "GPUs of each worker; may be a fraction. By default one if this machine has one."
    )
    plan_only: bool = flag(False, "Freeze the plan and stop.")
    num_drawn: int = flag(8, "Examples beside their sources in examples.png, which shows real images; 0: none.")
    export: Literal["folder", "datasets", "xrv"] | None = flag(
        None,
        "Also write the set to --export_dir: folder (images and labels.csv), datasets (for load_from_disk) or xrv "
        "(images, and a table with TorchXRayVision's pathologies).",
    )
    export_dir: str | None = flag(None, "Where the export goes; by default --output_dir with the kind at its end.")
    title: str = flag("Synthetic images", "Of the card, README.md.")
    license: str | None = flag(None, "Of the set, as the Hub spells it, for the card.")
    privacy_report: str | None = flag(
        None,
        "memorization.json of `evaluate memorization` on this set, for the card: run the same command again with it.",
    )


def main(args: Arguments) -> None:
    accelerator = Accelerator(
        # nobody knows how long the slowest process will take; if one dies, the launcher ends the others
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))]
    )
    if args.export_dir is not None and args.export is None:
        raise ValueError("--export_dir says where --export goes: give both.")
    check_strategy(args)
    if args.engine == "ray" and accelerator.num_processes > 1:
        raise ValueError("Ray distributes the work by itself: start the command as one process, without a launcher.")
    with accelerator.main_process_first():  # one process downloads
        pipe = load_generator(args.model, args.dtype, args.scheduler)
        # Ray's workers take both pipelines from the CPU
        prior = load_prior(args, torch.device("cpu") if args.engine == "ray" else accelerator.device)
    if args.engine == "local":
        pipe.to(accelerator.device)
    if args.compile:  # also for Ray's workers, which load and compile their own
        compile_generator(pipe)
    must_calibrate = args.gate is not None and not Path(args.gate).exists()  # only that needs patients
    images, table = open_regime(args, pipe, must_calibrate)
    gate = None
    if args.gate is not None:
        with accelerator.main_process_first():  # one process calibrates
            gate = open_gate(args.gate, images, table and table.patients, args.gate_false_alarms)
    steps = args.num_inference_steps or default_steps(pipe.scheduler)
    threads = begun_threads(args.output_dir) if args.threads is None else args.threads
    settings = settings_of(SynthesisSettings, args, num_inference_steps=steps, threads=threads)
    plan = make_plan(args, images, table, settings)
    if args.plan_only:
        if accelerator.is_main_process:
            prepare_folder(bind(plan, pipe, images, gate, prior), args.output_dir)
            print(f"{args.output_dir}: {len(plan)} images from {len(plan.keys)} sources in {plan.num_shards} shards")
        return
    shared: dict[str, Any] = {"gate": gate, "max_left_out": args.max_left_out}
    if args.engine == "ray":
        gpus = float(torch.cuda.is_available()) if args.ray_gpus is None else args.ray_gpus
        resources = RayResources(args.ray_workers, gpus, args.ray_address)
        made = synthesise_with_ray(plan, pipe, images, args.output_dir, prior=prior, resources=resources, **shared)
    else:
        made = synthesise(plan, pipe, images, args.output_dir, prior=prior, accelerator=accelerator, **shared)
    if accelerator.is_main_process:
        describe(made, images, args)
    accelerator.end_training()


def make_plan(
    args: Arguments, images: ImageDataset | None, table: LabelTable | None, settings: SynthesisSettings
) -> Plan:
    own = {
        "prior": {"balanced": args.balanced},
        "interpolation": {"identical": args.identical, "exponent": args.soft_labels},
    }
    return PLANNERS[args.strategy](
        images.keys if images is not None else table.keys if table else (),
        table and table.labels,
        ratio=args.ratio,
        num_images=args.num_images,
        seed=args.seed,
        settings=settings,
        **own.get(args.strategy, {}),
    )


def check_strategy(args: Arguments) -> None:
    """ValueError for flags of one strategy with another."""
    if (args.strategy == "prior") != (args.prior is not None):
        raise ValueError("A prior goes with --strategy prior: give both --strategy prior and --prior, or neither.")
    if args.balanced and args.prior is None:
        raise ValueError("--balanced goes with --strategy prior: other strategies have the labels of their sources.")
    if args.identical and args.strategy != "interpolation":
        raise ValueError("--identical goes with --strategy interpolation: it says which images are paired.")
    if args.soft_labels is not None and args.strategy != "interpolation":
        raise ValueError("--soft_labels goes with --strategy interpolation: other images have those of one source.")


def load_prior(args: Arguments, device: torch.device) -> PriorTokens | None:
    if args.prior is None:
        return None
    pipe = DinoPriorPipeline.from_pretrained(args.prior).to(device)
    return PriorTokens(pipe, args.prior_guidance_scale, args.prior_inference_steps)


def open_regime(
    args: Arguments, pipe: DinoDiffusionPipeline, must_calibrate: bool
) -> tuple[ImageDataset | None, LabelTable | None]:
    """The real images, and what is known of them. A prior needs no images: `--data_dir none` and a table of labels."""
    if args.data_dir != NO_IMAGES:
        return open_real_images(args, image_size(pipe), must_calibrate, pipe)
    if args.prior is None or must_calibrate or args.labels == STORED:
        raise ValueError(
            f"--data_dir {NO_IMAGES} goes with --strategy prior, a table of labels or none, and a calibrated gate or "
            "none."
        )
    return None, read_label_table(args.labels, args.key_column, args.label_column, None) if args.labels else None


def describe(made: SyntheticSet, images: ImageDataset | None, args: Arguments) -> None:
    """Write the examples and the card, and print what was made."""
    measurements = [] if args.privacy_report is None else read_results([args.privacy_report])
    with only_run(made.folder):
        if args.num_drawn:
            with atomic_write(made.folder / "examples.png") as file:
                draw_examples(made, images, args.num_drawn).save(file, "png")
        sources = [] if images is None else recorded_sources(args.data_dir)
        options = {"model": args.model, "sources": sources, "measurements": measurements, "license": args.license}
        write_dataset_card(made, args.title, **options)
        if args.export:
            print(f"{export(made, args.export, args.export_dir or f'{made.folder}-{args.export}')}: {args.export}")
    gate, sources = (made.manifest["lineage"][name] for name in ("gate", "sources"))
    print(f"{made.folder}: {len(made)} of {len(made.plan)} images in {len(made.manifest['shards'])} shards")
    if gate["fingerprint"]:
        print(
            f"The gate refused {gate['refused']}; {gate['redrawn']} passed later, {len(made.left_out)} are left out."
        )
    if "unlike" in sources:
        print(
            f"{sources['unlike']} of {sources['count']} sources are unlike the images that the model was trained on "
            f"(familiarity below {sources['familiarity_below']}, as it is for that share of images like those)."
        )
