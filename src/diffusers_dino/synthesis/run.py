"""From a plan to a folder of labelled synthetic images, in one process or in many, stopped and restarted at will."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..data.sharding.manifest import MANIFEST
from ..files import make_writable_folder
from ..fingerprints import as_json, fingerprint_pipeline, hash_of
from ..pipelines import DinoDiffusionPipeline
from .finish import SyntheticSet, WorkFolders, check_left_out, complete_set, finished_set, only_run
from .plan import Plan
from .plan_files import freeze_plan
from .settings import SynthesisError
from .shards import Gate, find_record, make_shard
from .tokens import PlannedSources, TokenStore, encode_part, has_part, num_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["bind", "check_readable", "load_generator", "prepare_folder", "progress_bar", "synthesise"]


def synthesise(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset,
    output_dir: str | Path,
    *,
    gate: Gate | None = None,
    accelerator: Accelerator | None = None,
    max_left_out: float = 0.05,
    progress: bool = True,
) -> SyntheticSet:
    """Generate the images of a plan into a folder of shards; called again, go on where it stopped.

    Each image is a function of the plan and its number, so the shards are the same bytes for any number of processes
    and restarts, on machines of one kind. `open_images(output_dir, ...)` reads the result.

    Args:
        plan: Which images, and how.
        pipe: A `DinoDiffusionPipeline` on the device that shall compute.
        images: Holds the plan's sources.
        output_dir: Where shards, `labels.csv` and `manifest.json` go. Processes and machines must share it.
        gate: Which images may pass; the others are drawn again.
        accelerator: Tells processes apart; without one this process works alone.
        max_left_out: Largest tolerated fraction of images that the gate refuses in every attempt.
        progress: Whether to show rate and time left.

    Returns:
        The finished set.

    Raises:
        SynthesisError: If the folder holds something else, a source is missing or unreadable, or the gate refuses too
            much. The message says what to do.
        PermissionError: If the folder is not writable.
        OSError: If the disk is full. What is finished stays.
    """
    if not 0 <= max_left_out <= 1:
        raise ValueError(f"max_left_out is a fraction in [0, 1], got {max_left_out}.")
    processes = _Processes(accelerator)
    plan = bind(plan, pipe, images, gate)
    if processes.is_main:
        prepare_folder(plan, output_dir)
    processes.wait()
    freeze_plan(plan, output_dir)  # every process must mean this plan
    folders = WorkFolders(Path(output_dir))
    if (done := finished_set(folders)) is not None:
        processes.wait()
        return done
    with only_run(folders) if processes.is_main else nullcontext():
        processes.wait()
        _encode_sources(plan, pipe, images, folders, processes, progress)
        _make_shards(plan, pipe, folders, gate, processes, max_left_out, progress)
        if processes.is_main:
            complete_set(plan, folders, max_left_out)
    processes.wait()
    return SyntheticSet.open(output_dir)


def load_generator(model: str | Path, dtype: str = "float32", scheduler: str | None = None) -> DinoDiffusionPipeline:
    """Load a pipeline that generates.

    Args:
        model: A folder, or a repository of the Hub.
        dtype: Of the weights: `"float32"`, `"bfloat16"` or `"float16"`.
        scheduler: Class of diffusers that takes the place of the model's scheduler, such as
            `"DPMSolverMultistepScheduler"`.

    Raises:
        ValueError: If diffusers has no such scheduler.
    """
    pipe = DinoDiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    if scheduler:
        kind = getattr(diffusers, scheduler, None)
        if kind is None or not hasattr(kind, "from_config"):
            raise ValueError(f"diffusers has no scheduler {scheduler!r}: give a name like DDIMScheduler.")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def bind(plan: Plan, pipe: DinoDiffusionPipeline, images: ImageDataset, gate: Gate | None = None) -> Plan:
    """The plan with fingerprints of all that its images follow from: model, scheduler, sources, gate.

    Raises:
        SynthesisError: If sources are missing or unreadable, or the model makes no square images.
        TypeError: If the gate has no fingerprint, or the pipeline is of another kind.
    """
    from ..pipelines import DinoDiffusionPipeline

    if not isinstance(pipe, DinoDiffusionPipeline):
        raise TypeError(
            f"Images are generated by a DinoDiffusionPipeline, got {type(pipe).__name__}: use "
            "DinoDiffusionPipeline.from_pipe(...)."
        )
    if gate is not None and not callable(getattr(gate, "fingerprint", None)):
        raise TypeError(f"The gate {type(gate).__name__} needs a method fingerprint(), by which a plan names it.")
    size = pipe.unet.config.get("sample_size")
    if not isinstance(size, int):
        raise SynthesisError(f"The model must make square images; the UNet's config has sample_size={size}.")
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    model = fingerprint_pipeline(pipe)
    model["scheduler"] = (
        f"{type(pipe.scheduler).__name__} {hash_of(json.dumps(as_json(scheduler), sort_keys=True))[:16]}"
    )
    return plan.bound_to(
        model=model,
        image_size=size * pipe.vae_scale_factor,
        preprocessing=asdict(images.preprocessing),
        source_pixels=_probe(plan, images),
        gate=None if gate is None else gate.fingerprint(),
    )


def prepare_folder(plan: Plan, output_dir: str | Path) -> WorkFolders:
    """Freeze a bound plan in its folder; one process does this.

    Raises:
        SynthesisError: If the folder holds another plan or other shards.
        PermissionError: If it is not writable.
    """
    folders = WorkFolders(make_writable_folder(output_dir))
    freeze_plan(plan, folders.output)
    if finished_set(folders) is not None:
        shutil.rmtree(folders.work, ignore_errors=True)  # killed while it cleaned up
    else:
        (folders.output / MANIFEST).unlink(missing_ok=True)  # of a set that has lost a shard
        folders.make()
    return folders


def check_readable(problems: Sequence[str], folders: WorkFolders) -> None:
    """Refuse to go on without some sources, naming all of them.

    Raises:
        SynthesisError: If there are problems.
    """
    if problems:
        raise SynthesisError(
            f"{len(problems)} source image(s) cannot be read, so their variations cannot be made: "
            f"{'; '.join(problems[:5])}{'; ...' if len(problems) > 5 else ''}. Mend them and go on in "
            f"{folders.output}, or plan without them into another folder."
        )


def progress_bar(title: str, total: int, done: int, unit: str = "image", show: bool = True) -> tqdm:
    """Rate and time left; where there is no terminal a line now and then."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, desc=title, unit=unit, mininterval=interval, smoothing=0.05, disable=not show
    )


class _Processes:
    """Who does what: the processes of an accelerator, or this one alone."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self.index = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's share, so that the shares together are all items."""
        return list(items[self.index :: self.count])

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, the same list in each."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def bar(self, title: str, total: int, done: int, progress: bool, unit: str = "image") -> tqdm:
        """Of this process's share."""
        of = f", process 1 of {self.count}" if self.count > 1 else ""
        return progress_bar(title + of, total, done, unit, show=progress and self.is_main)


def _encode_sources(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset,
    folders: WorkFolders,
    processes: _Processes,
    progress: bool,
) -> None:
    """Encode the sources that are not yet; each process makes its share of parts."""
    sources = PlannedSources(plan, images)
    parts = range(num_parts(plan))
    problems = []
    with processes.bar("Encoding sources", len(processes.share(parts)), 0, progress, unit="part") as bar:
        for number in processes.share(parts):
            if not has_part(plan, number, folders.tokens):
                problems += encode_part(plan, number, pipe, sources, folders.tokens)
            bar.update()
    check_readable(processes.gather(problems), folders)


def _make_shards(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    folders: WorkFolders,
    gate: Gate | None,
    processes: _Processes,
    max_left_out: float,
    progress: bool,
) -> None:
    """Make the shards that are not there, or not as they were noted; each process makes its share of those."""
    numbers = range(plan.num_shards)
    mine = [n for n in processes.share(numbers) if find_record(plan, n, folders.output, folders.records) is not None]
    finished = set(processes.gather(mine))
    left = processes.share([number for number in numbers if number not in finished])
    tokens = TokenStore(plan, folders.tokens)
    done = sum(len(plan.shard(number)) for number in finished) if processes.count == 1 else 0
    left_out = 0
    with processes.bar("Synthesising", done + sum(len(plan.shard(n)) for n in left), done, progress) as bar:
        for number in left:
            record = make_shard(
                plan, number, pipe, tokens, folders.output, folders.records, gate, on_images=bar.update
            )
            left_out += len(record.left_out)
            check_left_out(plan, left_out, max_left_out)
    processes.wait()


def _probe(plan: Plan, images: ImageDataset) -> str:
    """A hash of a few sources' pixels: keys such as 000001 name images of many data sets."""
    sources = PlannedSources(plan, images)
    count = len(plan.keys)
    read = list(sources.read(sorted({0, count // 2, count - 1})))
    problems = [reason for image, reason in read if image is None]
    if problems:
        raise SynthesisError(f"A source image cannot be read: {problems[0]}. Mend it, or plan without it.")
    return hash_of(*(image for image, _ in read))[:16]
