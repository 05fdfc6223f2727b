"""From a plan to a folder of labelled synthetic images, by one process or many, stopped and restarted at will."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data import ImageDataset, Preprocessing
from ..data.sharding.manifest import MANIFEST
from ..data.stores.walk import RECORDS, WORK
from ..files import lock_folder, make_writable_folder, remove_partials
from ..fingerprints import as_json, fingerprint_model, fingerprint_pipeline, hash_of, own_config
from ..metrics.copy_gate import CopyGate
from ..metrics.neighbours import Groups
from ..pipelines import DinoDiffusionPipeline
from ..pipelines.compilation import compile_pipeline, is_compiled
from ..schedules import scheduler_like
from ..workers import progress_bar
from .dataset import SyntheticSet, check_left_out, complete_set, finished_set
from .plan import Plan, SynthesisError
from .plan_file import check_free, freeze_plan
from .shards import Gate, find_record, make_shard
from .tokens import TOKENS, PlannedSources, PriorTokens, TokenStore

__all__ = [
    "begun",
    "bind",
    "check_readable",
    "compile_generator",
    "load_generator",
    "only_run",
    "open_gate",
    "prepare_folder",
    "synthesise",
]

logger = logging.getLogger(__name__)


def synthesise(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset | None,
    output_dir: str | Path,
    *,
    gate: Gate | None = None,
    prior: PriorTokens | None = None,
    accelerator: Accelerator | None = None,
    max_left_out: float = 0.05,
    progress: bool = True,
) -> SyntheticSet:
    """Generate the images of a plan into a folder of shards; called again, go on where it stopped.

    Each image is a function of the plan and its number, so the shards are the same bytes for any number of processes
    and restarts, on machines of one kind. `open_images(output_dir, ...)` reads the result.

    Args:
        plan: Which images, and how.
        pipe: On the device that computes, perhaps compiled (`compile_generator`). That changes the last bits of
            images, so the plan notes it, and goes on only so.
        images: Holds the plan's sources; None for a plan without any.
        output_dir: Where shards, `labels.csv` and `manifest.json` go. All processes and machines must share it.
        gate: Which images may pass; the others are drawn again.
        prior: Draws the tokens of a plan of `plan_prior`, on the device that computes.
        accelerator: Of several processes, each of which must make this call; by default only this process works.
        max_left_out: Largest tolerated fraction of images that the gate refuses in every attempt.
        progress: Whether to show the rate and the time left.

    Raises:
        SynthesisError: If the folder holds something else, another run is at work there, a source is missing or
            unreadable, or the gate refuses too much. The message says what to do.
        OSError: If the folder is not writable or the disk is full. What is finished stays.
    """
    if not 0 <= max_left_out <= 1:
        raise ValueError(f"max_left_out is a fraction in [0, 1], got {max_left_out}.")
    processes, folder = _Processes(accelerator), Path(output_dir)
    plan = bind(plan, pipe, images, gate, prior)
    with begun(plan, folder) if processes.is_main else nullcontext():
        processes.wait()
        freeze_plan(plan, folder)  # every process must mean this plan
        if (folder / MANIFEST).is_file():
            processes.wait()
            return SyntheticSet.open(folder)
        tokens = TokenStore(plan, folder) if prior is None else prior.of(plan)
        sources, problems = PlannedSources(plan, images) if tokens.num_parts else None, []
        shards = range(plan.num_shards)
        found = [number for number in processes.share(shards) if find_record(plan, number, folder) is not None]
        finished = set(processes.gather(found))
        mine = processes.share(range(tokens.num_parts if len(finished) < len(shards) else 0))
        with processes.bar("Encoding sources", "part", len(mine), 0, progress) as bar:
            for number in mine:
                if not tokens.has_part(number):
                    problems += tokens.encode_part(number, pipe, sources)
                bar.update()
        check_readable(processes.gather(problems), folder)

        mine = processes.share([number for number in shards if number not in finished])
        done_before = sum(len(plan.shard(number)) for number in finished) if processes.count == 1 else 0
        total, left_out = done_before + sum(len(plan.shard(number)) for number in mine), 0
        with processes.bar("Synthesising", "image", total, done_before, progress) as bar:
            for number in mine:
                left_out += len(make_shard(plan, number, pipe, tokens, folder, gate, on_images=bar.update).left_out)
                check_left_out(plan, left_out, max_left_out)
        processes.wait()
        if processes.is_main:
            complete_set(plan, folder, max_left_out, pipe.conditioner)
    processes.wait()
    return SyntheticSet.open(folder)


def load_generator(model: str | Path, dtype: str = "float32", scheduler: str | None = None) -> DinoDiffusionPipeline:
    """Load the pipeline that generates.

    Args:
        model: A folder, or a repository of the Hub.
        dtype: Of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        scheduler: Class of diffusers in place of the model's scheduler, such as `"DPMSolverMultistepScheduler"`.
    """
    pipe = DinoDiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    if scheduler:
        kind = getattr(diffusers, scheduler, None)
        if kind is None or not hasattr(kind, "from_config"):
            raise ValueError(f"diffusers has no scheduler {scheduler!r}: give a name like DDIMScheduler.")
        pipe.scheduler = scheduler_like(pipe.scheduler, kind)
    return pipe


def compile_generator(pipe: DinoDiffusionPipeline) -> bool:
    """Compile the pipeline that generates, on the device that computes; False, with a warning, without a compiler.

    Kernels are chosen without timing them, so that all processes on machines of one kind choose the same.
    """
    return compile_pipeline(pipe, options={"deterministic": True})


def open_gate(
    path: str | Path, images: ImageDataset | None, patients: Groups | None = None, false_alarms: float = 0.01
) -> CopyGate:
    """Load a gate against near-copies; if there is no such file, calibrate it on the source images and write it there.

    A gate that knows none of a few source images was made from others: a warning says so.

    Args:
        path: The file. It holds features and small pictures of the images: keep it where they may be.
        images: The source images; None for a prior's, which have no sources.
        patients: Patient of each: images of one patient are not copies of each other.
        false_alarms: Share of unseen real images that a calibrated gate may refuse.

    Raises:
        ValueError: If there are too few images for the share of false alarms, there is neither a file nor an image, or
            the file is not that of a gate.
    """
    if is_new := not Path(path).exists():
        if images is None:
            raise ValueError(f"There is no gate {path}, and no source image to calibrate one on: make it first.")
        CopyGate.calibrate(images, groups=patients, false_alarms=false_alarms).save(path)
    gate = CopyGate.load(path)
    if is_new or images is None:
        return gate
    probe = [images[index]["image"] for index in range(0, len(images), max(1, len(images) // 8))]
    if all(gate(image[None]) for image in probe):
        logger.warning(
            "The gate %s knows none of %d source images that were shown to it, so it was calibrated on others. It "
            "keeps out copies of those, and not of the sources: is that what you want?",
            path,
            len(probe),
        )
    return gate


def bind(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset | None,
    gate: Gate | None = None,
    prior: PriorTokens | None = None,
) -> Plan:
    """The plan with fingerprints of all that its images follow from: model, scheduler, sources or prior, gate.

    SynthesisError if sources are missing or unreadable, the model does not make square images, or the prior is missing
    or another model's; TypeError if the gate has no fingerprint.
    """
    if not isinstance(pipe, DinoDiffusionPipeline):
        raise TypeError(
            f"Images are generated by a DinoDiffusionPipeline, got {type(pipe).__name__}: use "
            "DinoDiffusionPipeline.from_pipe(...)."
        )
    if gate is not None and not callable(getattr(gate, "fingerprint", None)):
        raise TypeError(f"The gate {type(gate).__name__} needs a method fingerprint(), which identifies it in a plan.")
    size = pipe.denoiser.config.get("sample_size")
    if not isinstance(size, int):
        raise SynthesisError(f"The model must make square images; the denoiser's config has sample_size={size}.")
    scheduler = json.dumps(as_json(own_config(pipe.scheduler)), sort_keys=True)
    model = fingerprint_pipeline(pipe)
    model["scheduler"] = f"{type(pipe.scheduler).__name__} {hash_of(scheduler)[:16]}"
    if (plan.strategy == "prior") != (prior is not None):
        wrong = "needs one" if prior is None else "takes none"
        raise SynthesisError(f"A plan of strategy {plan.strategy!r} {wrong}: a prior goes with plan_prior.")
    side = size * pipe.vae_scale_factor
    compiled = {"compiled": True} if is_compiled(pipe.denoiser) else {}
    verdicts = None if gate is None else gate.fingerprint()
    if prior is not None:
        return _bind_to_prior(plan, pipe, images, prior, model, image_size=side, gate=verdicts, **compiled)
    # Keys such as 000001 name images of many data sets: a few sources' pixels tell them apart
    count = len(plan.keys)
    probe = list(PlannedSources(plan, images).read(sorted({0, count // 2, count - 1})))
    problems = [reason for image, reason in probe if image is None]
    if problems:
        raise SynthesisError(f"A source image cannot be read: {problems[0]}. Mend it, or plan without it.")
    return plan.bound_to(
        model=model,
        image_size=side,
        preprocessing=asdict(images.preprocessing),
        source_pixels=hash_of(*(image for image, _ in probe))[:16],
        gate=verdicts,
        **compiled,
    )


def _bind_to_prior(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset | None,
    prior: PriorTokens,
    model: dict[str, str],
    **made_with: Any,
) -> Plan:
    if pipe.conditioner is None:
        raise SynthesisError("The model has no conditioner, which says whether the prior is its own.")
    try:
        prior.pipe.check_conditioner(pipe.conditioner)
    except ValueError as error:
        raise SynthesisError(str(error)) from error
    prior.of(plan)  # refuses labels that it does not know
    preprocessing = Preprocessing(made_with["image_size"]) if images is None else images.preprocessing
    return plan.bound_to(
        model={**model, "prior": fingerprint_model(prior.pipe.prior)},
        preprocessing=asdict(preprocessing),
        source_pixels=None,
        prior=prior.settings(),
        **made_with,
    )


def prepare_folder(plan: Plan, output_dir: str | Path) -> Path:
    """Freeze a bound plan in a folder without another plan or anything else. Only one process does this.

    SynthesisError if the folder holds something else, or another run is at work there.
    """
    with begun(plan, Path(output_dir)) as folder:
        return folder


@contextmanager
def begun(plan: Plan, output_dir: Path) -> Iterator[Path]:
    """Hold an output folder, with the plan frozen in it; it has a manifest only if its set is complete."""
    folder = make_writable_folder(output_dir)
    check_free(folder)  # before anything is written
    with only_run(folder):
        freeze_plan(plan, folder)
        if finished_set(folder) is not None:
            shutil.rmtree(folder / WORK, ignore_errors=True)  # left by a run that was killed while it cleaned up
        else:
            (folder / MANIFEST).unlink(missing_ok=True)  # of a set that has lost a shard
            (folder / TOKENS).mkdir(parents=True, exist_ok=True)
        yield folder


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, and remove what killed runs left half-written there.

    SynthesisError if another run is at work.
    """
    (folder / RECORDS).mkdir(exist_ok=True)
    with lock_folder(folder / RECORDS, SynthesisError):
        for place in (folder, folder / RECORDS, folder / TOKENS):
            remove_partials(place)
        yield


def check_readable(problems: Sequence[str], folder: Path) -> None:
    """Raise `SynthesisError`, which names sources that cannot be read, if there are any."""
    if problems:
        raise SynthesisError(
            f"{len(problems)} source image(s) cannot be read, so their variations cannot be made: "
            f"{'; '.join(problems[:5])}{'; ...' if len(problems) > 5 else ''}. Mend them and go on in "
            f"{folder}, or plan without them into another folder."
        )


class _Processes:
    """The processes of an accelerator, or only this one."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self.index = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.is_main = self.index == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's share of the items."""
        return list(items[self.index :: self.count])

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, the same list in each."""
        return items if self.count == 1 else gather_object(items)

    def wait(self) -> None:
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def bar(self, title: str, unit: str, total: int, done: int, progress: bool) -> tqdm:
        """Of this process's share; only the first process shows one."""
        of = f", process 1 of {self.count}" if self.count > 1 else ""
        return progress_bar(title + of, unit, total, done, progress and self.is_main)
