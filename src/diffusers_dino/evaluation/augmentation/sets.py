"""The synthetic images of `eval_augmentation.py`: a set for each fold and strategy, made in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...data import Preprocessing, open_images
from ...devices import device_of
from ...metrics.copy_gate import CopyGate
from ...synthesis import Plan, load_generator, synthesise
from ..packed import pack_images

__all__ = ["SyntheticJob", "make_synthetic", "pack_path"]


@dataclass(frozen=True)
class SyntheticJob:
    """What a set is made from; it travels to another process.

    Attributes:
        plan: Its images.
        model: The generator.
        dtype: Type of its weights.
        scheduler: A scheduler of diffusers in place of the model's.
        gate: File of a gate, if any.
        data_dir, data_split: The source images.
        remove_borders: Whether uniform borders are cut off the sources.
        folder: Where the set goes.
        size, channels: Side and channels of the images that classifiers see.
        device: Where to compute; None takes GPUs in turn if there are any.
    """

    plan: Plan
    model: str
    dtype: str
    scheduler: str | None
    gate: str | None
    data_dir: str
    data_split: str
    remove_borders: bool
    folder: Path
    size: int
    channels: int
    device: str | None


def make_synthetic(place: int, job: SyntheticJob) -> str:
    """Make a set, or go on with it, and pack its images for classifiers. Returns the digest of its plan."""
    pipe = load_generator(job.model, job.dtype, job.scheduler).to(device_of(place, job.device))
    size = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    preprocessing = Preprocessing(size, job.remove_borders)
    sources = open_images(job.data_dir, preprocessing, split=job.data_split, local_files_only=True)
    gate = None if job.gate is None else CopyGate.load(job.gate)
    made = synthesise(job.plan, pipe, sources, job.folder, gate=gate, progress=place == 0)
    images = open_images(job.folder, Preprocessing(job.size, remove_borders=False))
    pack_images(images, pack_path(job.folder), made.plan.digest, job.channels)
    return made.plan.digest


def pack_path(folder: Path) -> Path:
    """Where the images of a set are packed."""
    return folder.parent / f"{folder.name}.npy"
