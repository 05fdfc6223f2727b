"""The making of a synthetic set on a Ray cluster: the same plan, units and files as `synthesise`, other workers.

Ray Data could note finished rows by itself (`ray.data.checkpoint.CheckpointConfig`). It would note them for Ray alone,
by row and not by what is on the disk. The records beside the shards are what all engines go by, so a set that one of
them began another one goes on with, and a shard that was lost or changed is made again.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..data import ImageDataset
from ..pipelines import DinoDiffusionPipeline
from .finish import SyntheticSet, WorkFolders, check_left_out, complete_set, finished_set, only_run
from .plan import Plan
from .plan_files import PLAN, freeze_plan
from .run import bind, check_readable, prepare_folder, progress_bar
from .settings import SynthesisError
from .shards import Gate, find_record, make_shard
from .tokens import PlannedSources, TokenStore, encode_part, has_part, num_parts

__all__ = ["RayResources", "synthesise_with_ray"]

_MAX_ATTEMPTS = 4  # a unit that ends its worker each time, such as for want of memory, would do so for ever
_OBJECT_STORE_BYTES = 200 * 2**20  # what travels through it are numbers of units
_FOREVER = -1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayResources:
    """Who does the work.

    Args:
        num_workers: Workers at most, each with a pipeline of its own; by default as many as fit on the machines that
            are there when the work begins.
        num_gpus: GPUs of each worker; with 0.5, two share one. 0: they compute on the CPU.
        address: Of a cluster that runs, `"auto"` for one that this machine is part of; by default what `RAY_ADDRESS`
            says, and without it Ray is started on this machine and stopped at the end.

    Raises:
        ValueError: If a number is out of range.
    """

    num_workers: int | None = None
    num_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}.")
        if self.num_gpus < 0 or (self.num_gpus > 1 and self.num_gpus != int(self.num_gpus)):
            raise ValueError(
                f"num_gpus must be a fraction of a GPU, such as 0.5, or a whole number, got {self.num_gpus}."
            )


def synthesise_with_ray(
    plan: Plan,
    pipe: DinoDiffusionPipeline,
    images: ImageDataset,
    output_dir: str | Path,
    *,
    gate: Gate | None = None,
    resources: RayResources | None = None,
    max_left_out: float = 0.05,
    progress: bool = True,
) -> SyntheticSet:
    """Generate the images of a plan as `synthesise` does, on a Ray cluster.

    A worker occupies as many CPUs as the plan has threads. One that dies is replaced, and its shard made again.

    Args:
        plan: Which images, and how.
        pipe: On the CPU; workers get it by way of the output folder.
        images: Holds the plan's sources; workers must be able to read it under the same paths.
        output_dir: Where shards, `labels.csv` and `manifest.json` go. All machines must share it under one path.
        gate: Which images may pass; the others are drawn again. Workers must be able to import its class.
        resources: Who does the work; by default all of this machine, without its GPUs.
        max_left_out: Largest tolerated fraction of images that the gate refuses in every attempt.
        progress: Whether to show rate and time left, a step a shard.

    Returns:
        The finished set.

    Raises:
        ImportError: If Ray is not installed.
        SynthesisError: As `synthesise`, and if a machine does not see the folder or a unit ends its worker every time.
        OSError: If the disk is full. What is finished stays.
    """
    ray = _import_ray()
    resources = resources or RayResources()
    plan = bind(plan, pipe, images, gate)
    folders = prepare_folder(plan, Path(output_dir).resolve())
    if (done := finished_set(folders)) is not None:
        return done
    dtypes = {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    job = _Job(plan, images, gate, folders, dtypes, "cuda" if resources.num_gpus else "cpu")
    with only_run(folders):
        shutil.rmtree(job.attempts, ignore_errors=True)
        job.attempts.mkdir()
        _hand_over(pipe, job.model)
        with _connected(ray, plan, resources) as num_workers:
            cluster = _Cluster(ray, num_workers, plan.settings.threads, resources.num_gpus)
            _encode_sources(job, cluster, progress)
            _make_shards(job, cluster, max_left_out, progress)
        return complete_set(plan, folders, max_left_out)


@dataclass(frozen=True)
class _Job:
    """What every worker gets."""

    plan: Plan
    images: ImageDataset
    gate: Gate | None
    folders: WorkFolders
    dtypes: dict[str, torch.dtype]
    device: str

    @property
    def model(self) -> Path:
        """The pipeline."""
        return self.folders.work / "model"

    @property
    def attempts(self) -> Path:
        """Files of as many bytes as a unit has been begun in this run."""
        return self.folders.work / "attempts"


@dataclass(frozen=True)
class _Answer:
    """What a worker says of a unit.

    Attributes:
        number: Of the unit.
        attempt: From 1; more if workers died of, or during, earlier ones.
        host: Where the worker is.
        result: What `_Worker.work` returned.
        error: What it raised instead.
    """

    number: int
    attempt: int
    host: str
    result: Any = None
    error: Exception | None = None


class _Worker:
    """An actor: does units of one kind, with a pipeline that it loads for the first one and keeps.

    Errors are answers, so that they arrive as they are; Ray reports them as text.
    """

    kind: str

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        number, host = int(row["number"]), platform.node()
        attempt = 1
        try:
            attempt = self._begin(number, host)
            answer = _Answer(number, attempt, host, result=self.work(number))
        except Exception as error:
            answer = _Answer(number, attempt, host, error=_portable(error))
        return {"answer": pickle.dumps(answer)}

    def work(self, number: int) -> Any:
        raise NotImplementedError

    @cached_property
    def pipe(self) -> DinoDiffusionPipeline:
        """The pipeline, on its device, after a check that it is the plan's."""
        from diffusers.utils.logging import disable_progress_bar

        job = self.job
        disable_progress_bar()  # of loading, which Ray would repeat to the user for each worker
        pipe = DinoDiffusionPipeline.from_pretrained(job.model, dtype=job.dtypes, local_files_only=True)
        freeze_plan(bind(job.plan, pipe, job.images, job.gate), job.folders.output)  # it must mean this plan, too
        return pipe.to(job.device)

    def _begin(self, number: int, host: str) -> int:
        """Note that a unit is begun, and return how often it has been; one that always ends its worker is given up."""
        folders = self.job.folders
        if not (folders.output / PLAN).is_file():
            raise SynthesisError(
                f"{host} does not see {folders.output}: all machines must share the output folder under one path."
            )
        path = self.job.attempts / f"{self.kind}-{number:06d}"
        with open(path, "ab") as file:
            file.write(b".")
        attempt = path.stat().st_size
        if attempt > _MAX_ATTEMPTS:
            raise SynthesisError(
                f"{_MAX_ATTEMPTS} workers died one after the other of this unit, the last one maybe on {host}. If "
                "memory ran out, let fewer workers share a machine or a GPU. The same command goes on."
            )
        return attempt


class _Encoder(_Worker):
    """Encodes parts of the sources."""

    kind = "part"

    @cached_property
    def sources(self) -> PlannedSources:
        return PlannedSources(self.job.plan, self.job.images)

    def work(self, number: int) -> list[str]:
        """Why sources cannot be read."""
        return encode_part(self.job.plan, number, self.pipe, self.sources, self.job.folders.tokens)


class _ShardMaker(_Worker):
    """Makes shards."""

    kind = "shard"

    @cached_property
    def tokens(self) -> TokenStore:
        return TokenStore(self.job.plan, self.job.folders.tokens)

    def work(self, number: int) -> int:
        """How many images are left out."""
        plan, folders = self.job.plan, self.job.folders
        record = make_shard(plan, number, self.pipe, self.tokens, folders.output, folders.records, self.job.gate)
        return len(record.left_out)


@dataclass(frozen=True)
class _Cluster:
    """Ray, and how much of it a worker occupies."""

    ray: ModuleType
    num_workers: int
    num_cpus: int
    num_gpus: float

    def run(self, worker: type[_Worker], job: _Job, numbers: Sequence[int]) -> Iterator[_Answer]:
        """Do units, and yield the answers as they come.

        Raises:
            Exception: What the first unit that failed raised.
        """
        if not numbers:
            return
        count = min(self.num_workers, len(numbers))
        rows = self.ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers))
        answers = rows.map(
            worker,
            fn_constructor_args=(job,),
            compute=self.ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus or None,
        )
        answers.context.enable_progress_bars = False
        answers.context.execution_no_progress_timeout_s = _FOREVER  # nobody knows how long a shard will take
        for row in answers.iter_rows():
            answer = pickle.loads(row["answer"])
            if answer.error is not None:
                raise answer.error
            yield answer


def _encode_sources(job: _Job, cluster: _Cluster, progress: bool) -> None:
    """Encode the sources that are not yet."""
    count = num_parts(job.plan)
    left = [number for number in range(count) if not has_part(job.plan, number, job.folders.tokens)]
    problems: list[str] = []
    with progress_bar("Encoding sources", count, count - len(left), unit="part", show=progress) as bar:
        for answer in cluster.run(_Encoder, job, left):
            _tell_of_deaths(answer, f"part {answer.number} of the sources", bar)
            problems += answer.result
            bar.update()
    check_readable(problems, job.folders)


def _make_shards(job: _Job, cluster: _Cluster, max_left_out: float, progress: bool) -> None:
    """Make the shards that are not there, or not as they were noted."""
    plan, folders = job.plan, job.folders
    found = {n: find_record(plan, n, folders.output, folders.records) for n in range(plan.num_shards)}
    left = [number for number, record in found.items() if record is None]
    left_out = sum(len(record.left_out) for record in found.values() if record is not None)
    done = len(plan) - sum(len(plan.shard(number)) for number in left)
    with progress_bar("Synthesising", len(plan), done, show=progress) as bar:
        for answer in cluster.run(_ShardMaker, job, left):
            _tell_of_deaths(answer, f"shard {answer.number}", bar)
            left_out += answer.result
            check_left_out(plan, left_out, max_left_out)
            bar.update(len(plan.shard(answer.number)))


def _tell_of_deaths(answer: _Answer, unit: str, bar: Any) -> None:
    if answer.attempt > 1:
        bar.write(f"A worker died while it made {unit}; {answer.host} made it in attempt {answer.attempt}.")


def _hand_over(pipe: DinoDiffusionPipeline, folder: Path) -> None:
    """Put the pipeline where workers find it."""
    if getattr(pipe.unet, "peft_config", None):
        raise SynthesisError(
            "A loaded LoRA does not travel to workers: make it part of the weights before, with pipe.fuse_lora() and "
            "pipe.unload_lora_weights()."
        )
    shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left half of it
    pipe.save_pretrained(folder)


@contextmanager
def _connected(ray: ModuleType, plan: Plan, resources: RayResources) -> Iterator[int]:
    """Ray, connected or started here, and how many workers there shall be."""
    threads, address = plan.settings.threads, resources.address or os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized()
    if started and address:
        ray.init(address)
    elif started:
        num_cpus = max(os.cpu_count() or 1, threads * (resources.num_workers or 1))
        ray.init("local", num_cpus=num_cpus, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False)
    try:
        fitting = _count_fitting(ray.nodes(), threads, resources.num_gpus)
        if not fitting:
            logger.warning(
                "No machine of the cluster has the %d CPUs and %g GPUs that a worker needs: waiting for one that has.",
                threads,
                resources.num_gpus,
            )
        yield resources.num_workers or max(1, fitting)
    finally:
        if started:
            ray.shutdown()


def _count_fitting(nodes: Sequence[dict[str, Any]], num_cpus: int, num_gpus: float) -> int:
    """How many workers fit on the machines of a cluster."""
    count = 0
    for node in nodes:
        if node["Alive"]:
            there = node["Resources"]
            by_gpu = [int(there.get("GPU", 0) / num_gpus)] if num_gpus else []
            count += min([int(there.get("CPU", 0)) // num_cpus, *by_gpu])
    return count


def _portable(error: Exception) -> Exception:
    """The error itself, if it survives the way to another process, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it calls home otherwise
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("Generating on a Ray cluster needs Ray: pip install 'diffusers-dino[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray
