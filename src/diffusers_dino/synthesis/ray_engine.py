"""The making of a synthetic set on a Ray cluster: the plan, shards and files are those of `synthesise`."""

from __future__ import annotations

import logging
import os
import pickle
import platform
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..data.sharding.manifest import MANIFEST
from ..data.stores.walk import WORK
from ..extras import require
from ..pipelines import DinoDiffusionPipeline, DinoPriorPipeline
from ..workers import progress_bar
from .dataset import SyntheticSet, check_left_out, complete_set
from .plan import Plan, SynthesisError
from .plan_file import PLAN, freeze_plan
from .run import begun, bind, check_readable, compile_generator
from .shards import Gate, find_record, make_shard
from .tokens import PlannedSources, PriorTokens, TokenStore

__all__ = ["RayResources", "synthesise_with_ray"]

_MAX_ATTEMPTS = 4  # work that ends its worker each time, such as for want of memory, would do so for ever
_OBJECT_STORE_BYTES = 200 * 2**20  # only numbers of shards travel through it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayResources:
    """Which workers a set is made by.

    Args:
        num_workers: Workers at most, each with a pipeline of its own; by default as many as fit on the machines that
            the cluster has when the work begins.
        num_gpus: GPUs of each worker; with 0.5, two workers share one, with 0 they compute on the CPU.
        address: Of a running cluster, or `"auto"` for the one that this machine is part of; by default what
            `RAY_ADDRESS` says. Without either, Ray is started on this machine and stopped at the end.
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
    images: ImageDataset | None,
    output_dir: str | Path,
    *,
    gate: Gate | None = None,
    prior: PriorTokens | None = None,
    resources: RayResources | None = None,
    max_left_out: float = 0.05,
    progress: bool = True,
) -> SyntheticSet:
    """Generate the images of a plan as `synthesise` does, on a Ray cluster.

    A worker occupies as many CPUs as the plan has threads. One that dies is replaced, and its shard made again.

    Args:
        plan, max_left_out, progress: As for `synthesise`.
        pipe: On the CPU. Workers load it from the output folder.
        images: Holds the plan's sources; None for a plan without any. Workers must be able to read them under the same
            paths.
        output_dir: As for `synthesise`. All machines must share it under one path.
        gate: As for `synthesise`. Workers must be able to import its class.
        prior: As for `synthesise`, on the CPU. Workers load it from the output folder.
        resources: Which workers; by default those of this machine, without its GPUs.

    Raises:
        SynthesisError: As `synthesise`, and if a machine does not see the folder or a shard ends its worker each time.
        ImportError: If Ray is not installed.
        OSError: If the disk is full. What is finished stays.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise it reports home
    ray = require("ray", "ray", "Generating on a Ray cluster needs Ray")
    resources = resources or RayResources()
    plan = bind(plan, pipe, images, gate, prior)
    if getattr(pipe.denoiser, "peft_config", None):
        raise SynthesisError(
            "A loaded LoRA does not travel to workers: merge it into the weights first, with pipe.fuse_lora() and "
            "pipe.unload_lora_weights()."
        )
    with begun(plan, Path(output_dir).resolve()) as folder:
        if (folder / MANIFEST).is_file():
            return SyntheticSet.open(folder)
        dtypes, device = _dtypes(pipe), "cuda" if resources.num_gpus else "cpu"
        drawn = None if prior is None else (prior.settings(), _dtypes(prior.pipe))
        job = _Job(plan, images, gate, folder, dtypes, device, drawn)
        for name in ("model", "prior"):  # of a run that was killed
            shutil.rmtree(job.place(name), ignore_errors=True)
        pipe.save_pretrained(job.place("model"))
        if prior is not None:
            prior.pipe.save_pretrained(job.place("prior"))
        with _connected(ray, plan, resources) as num_workers:
            tokens, problems = TokenStore(plan, folder), []  # without a part for a prior's images
            found = {number: find_record(plan, number, folder) for number in range(plan.num_shards)}
            missing = [number for number, record in found.items() if record is None]
            left = [number for number in range(tokens.num_parts) if missing and not tokens.has_part(number)]
            done_before = tokens.num_parts - len(left)
            with progress_bar("Encoding sources", "part", tokens.num_parts, done_before, progress) as bar:
                for _, unreadable in _work(job, "part", left, num_workers, resources.num_gpus, bar):
                    problems += unreadable
                    bar.update()
            check_readable(problems, folder)

            left_out = sum(len(record.left_out) for record in found.values() if record is not None)
            done_before = len(plan) - sum(len(plan.shard(number)) for number in missing)
            with progress_bar("Synthesising", "image", len(plan), done_before, progress) as bar:
                for number, refused in _work(job, "shard", missing, num_workers, resources.num_gpus, bar):
                    left_out += refused
                    check_left_out(plan, left_out, max_left_out)
                    bar.update(len(plan.shard(number)))
        return complete_set(plan, folder, max_left_out, pipe.conditioner)


@dataclass(frozen=True)
class _Job:
    """What every worker gets."""

    plan: Plan
    images: ImageDataset | None
    gate: Gate | None
    folder: Path
    dtypes: dict[str, torch.dtype]
    device: str
    drawn: tuple[dict[str, float], dict[str, torch.dtype]] | None = None  # settings and types of the prior, if any

    def place(self, name: Literal["model", "prior"]) -> Path:
        """Where a pipeline is."""
        return self.folder / WORK / name


class _Answer(NamedTuple):
    """What a worker says about a part or a shard: what `_Worker.work` returned, or the error that it raised."""

    host: str
    result: Any
    error: Exception | None


class _Worker:
    """An actor that encodes parts of the sources or makes shards, with a pipeline that it loads once.

    It returns errors instead of raising them, since Ray would turn them into text.
    """

    def __init__(self, job: _Job, kind: Literal["part", "shard"]) -> None:
        self.job, self.kind = job, kind

    def answer(self, number: int) -> bytes:
        """A pickled `_Answer`."""
        try:
            answer = _Answer(platform.node(), self.work(number), None)
        except Exception as error:
            answer = _Answer(platform.node(), None, _portable(error))
        return pickle.dumps(answer)

    def work(self, number: int) -> list[str] | int:
        """Encode a part, and say which sources cannot be read; or make a shard, and count the images left out."""
        job = self.job
        if not (job.folder / PLAN).is_file():
            raise SynthesisError(
                f"{platform.node()} does not see {job.folder}: all machines must share the output folder under one "
                "path."
            )
        if self.kind == "part":
            return self.tokens.encode_part(number, self.pipe, self.sources)
        return len(make_shard(job.plan, number, self.pipe, self.tokens, job.folder, job.gate).left_out)

    @cached_property
    def pipe(self) -> DinoDiffusionPipeline:
        """The pipeline, on its device, after a check that it is the plan's."""
        job = self.job
        disable_progress_bar()  # of loading, which Ray would repeat to the user for each worker
        pipe = DinoDiffusionPipeline.from_pretrained(job.place("model"), dtype=job.dtypes, local_files_only=True)
        pipe = pipe.to(job.device)
        if job.plan.made_with.get("compiled"):
            compile_generator(pipe)
        # every worker must mean this plan
        freeze_plan(bind(job.plan, pipe, job.images, job.gate, self.prior), job.folder)
        return pipe

    @cached_property
    def prior(self) -> PriorTokens | None:
        """The prior of the plan, on its device, if the plan has one."""
        if self.job.drawn is None:
            return None
        settings, dtypes = self.job.drawn
        pipe = DinoPriorPipeline.from_pretrained(self.job.place("prior"), dtype=dtypes, local_files_only=True)
        return PriorTokens(pipe.to(self.job.device), **settings)

    @cached_property
    def tokens(self) -> TokenStore | PriorTokens:
        job = self.job
        return TokenStore(job.plan, job.folder) if self.prior is None else self.prior.of(job.plan)

    @cached_property
    def sources(self) -> PlannedSources:
        return PlannedSources(self.job.plan, self.job.images)


def _work(
    job: _Job, kind: Literal["part", "shard"], numbers: Sequence[int], num_workers: int, num_gpus: float, bar: tqdm
) -> Iterator[tuple[int, Any]]:
    """Have parts encoded or shards made, yield number and result of each as they come, and raise a worker's error."""
    ray = require("ray", "ray", "Generating on a Ray cluster needs Ray")
    worker = ray.remote(num_cpus=job.plan.settings.threads, num_gpus=num_gpus)(_Worker)
    waiting, idle, busy, deaths = deque(numbers), [], {}, Counter()
    try:
        while waiting or busy:
            while waiting and len(busy) < num_workers:
                actor, number = idle.pop() if idle else worker.remote(job, kind), waiting.popleft()
                busy[actor.answer.remote(number)] = actor, number
            (done, *_), _ = ray.wait(list(busy))
            actor, number = busy.pop(done)
            try:
                answer = pickle.loads(ray.get(done))
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                ray.kill(actor)
                deaths[number] += 1
                if deaths[number] == _MAX_ATTEMPTS:
                    raise SynthesisError(
                        f"{_MAX_ATTEMPTS} workers died one after the other of {kind} {number}. If memory ran out, let "
                        f"fewer workers share a machine or a GPU, and go on. Ray says of the last one: {error}"
                    ) from error
                waiting.appendleft(number)  # another worker begins it anew
                continue
            if answer.error is not None:
                raise answer.error
            if deaths[number]:
                made = f"{kind} {number}; {answer.host} made it in attempt {deaths[number] + 1}."
                bar.write(f"A worker died while it made {made}")
            idle.append(actor)
            yield number, answer.result
    finally:  # what is under way has nobody left to take it
        for actor, _ in busy.values():
            ray.kill(actor)


@contextmanager
def _connected(ray: ModuleType, plan: Plan, resources: RayResources) -> Iterator[int]:
    """Connect to Ray or start it here, and yield the number of workers."""
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


def _dtypes(pipe: DiffusionPipeline) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _portable(error: Exception) -> Exception:
    """The error itself if it can be pickled, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
