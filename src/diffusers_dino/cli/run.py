"""A training in its output folder: what it goes on from, what it was asked for, and the checkpoints that it writes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import SchedulerType

from .. import data
from ..conditioner import DinoImageConditioner
from ..files import make_writable_folder
from ..fingerprints import as_json, hash_of
from ..hub.upload import push_folder
from ..latents import VAE
from ..training import checkpoints
from ..training.checkpoints import Checkpoint, Resumable
from ..training.feature_cache import Recipe, open_feature_cache
from ..training.features import CachedViews, FeatureEncoder, Views, encode_ahead, evenly_spread
from ..training.interruption import Interruption
from ..training.progress import Progress, check_tracker
from ..training.run_folder import RunFolder
from .record import describe_history, told_settings, write_record_and_card

__all__ = ["Run", "open_run"]

logger = logging.getLogger("diffusers_dino")

_VALIDATED = "validated"
# How long a run is, which a card tells in updates.
_LENGTH = ("max_train_steps", "num_train_epochs")
# Of what there must be some, if the flag is given.
_COUNTS = ("max_train_steps", "checkpoints_total_limit", "train_batch_size", "gradient_accumulation_steps")
_COUNTS += ("logging_steps", "num_statistics_images")
# Flags whose values are not what a run reads.
_NOT_READ = ("output_dir", "resume_from_checkpoint", "hub_model_id", "report_to", "tracker_project_name")


@contextmanager
def open_run(args: Any, script: logging.Logger, tracker: str | None = None) -> Iterator[Run]:
    """Set up processes, precision, seed and logging, and hold the output folder while the training runs.

    `args` are `RunArguments` and `ImageArguments`; `script` is the script's own logger. What the tracker writes goes
    to `logs/` in the output folder. A ValueError if a flag is out of range, a RunFolderError if the folder holds
    another run and nobody said what to do.
    """
    _check(args)
    folder = make_writable_folder(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=check_tracker(tracker),
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for chatty in (logger, script):
        chatty.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    run = Run(args, accelerator)
    try:
        run.find()
        yield run
    finally:
        run.close()


def _check(args: Any) -> None:
    """Refuse what would fail later, when the folder was touched or even trained in."""
    for name in _COUNTS:
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if args.max_train_steps is None and args.num_train_epochs <= 0:
        raise ValueError(f"--num_train_epochs must be positive, got {args.num_train_epochs}.")
    SchedulerType(args.lr_scheduler)


class Run:
    """What a training keeps beside its models: `find`, `begin`, `resume`, then `save` now and then.

    Attributes:
        args: The flags.
        accelerator: Of this process.
        interruption: Of this process; only that of the main process has a clock.
        history: Which settings were changed, after how many updates.
        found: The checkpoint that the run goes on from, or None.
        unseen: Whether a validation that was due at the checkpoint was cut off, so that it comes first.
    """

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.interruption = Interruption(
            args.checkpointing_minutes if accelerator.is_main_process else 0, starting=True
        )
        self.history: list[dict[str, Any]] = []
        self.unseen = False
        self.found: Checkpoint | None = None
        self._notes: dict[str, Any] = {}
        self._folder: RunFolder | None = None
        if accelerator.is_main_process:
            given = {name: value for name, value in asdict(args).items() if name not in _NOT_READ}
            texts = [text for value in given.values() for text in (value if isinstance(value, list) else [value])]
            inputs = [Path(text) for text in texts if isinstance(text, str) and os.path.exists(text)]
            resume, overwrite = args.resume_from_checkpoint, args.overwrite_output_dir
            self._folder = RunFolder(args.output_dir, resume, overwrite, inputs)

    def close(self) -> None:
        """Let other runs into the folder."""
        if self._folder is not None:
            self._folder.close()

    def find(self) -> None:
        """Find the checkpoint to go on from; RunFolderError if the folder holds another run."""
        found: list[Any] = [None, None, False]
        if self._folder is not None:
            checkpoint = self._folder.claim()
            seen = checkpoint is None or (checkpoint.path / _VALIDATED).exists()
            found = [checkpoint, self._folder.run, not seen]
        self.found, identity, self.unseen = broadcast_object_list(found)
        self._notes["run"] = identity
        if self.args.resume_from_checkpoint:
            logger.info(
                f"Continuing from {self.found.path}" if self.found else "There is no checkpoint: starting anew"
            )

    def begin(self, images: data.ImageDataset, **settings: Any) -> None:
        """Make the folder this run's, once all that it needs is there and fits the checkpoint that it goes on from.

        `settings` are those that cannot change when a run goes on: they are refused by name. What else was changed is
        taken up, said, and noted in `history`.
        """
        args = self.args
        self._notes |= as_json(
            {
                "seed": args.seed,
                "preprocessing": images.preprocessing.fingerprint(),
                "shuffle_window_shards": args.shuffle_window_shards or None,
                "images": {
                    "number": len(images),
                    "hash of the keys": hash_of("\n".join(images.keys))[:16],
                    "hash of some of them": hash_of(*evenly_spread(images, 16))[:16],
                },
                **settings,
                "flags": {**told_settings(args), **{name: getattr(args, name) for name in _LENGTH}},
            }
        )
        if self.found is not None:
            info = self.found.info
            fixed = {name: value for name, value in self._notes.items() if name not in ("run", "flags")}
            if "models" in fixed and "encoders" not in info and args.pretrained_pipeline:
                fixed["models"] = _as_noted(fixed["models"], info.get("models", {}))
            checkpoints.require_same_run(self.found, fixed)
            self.history = list(info.get("history", ()))
            before, now = dict(info.get("flags", ())), self._notes["flags"]
            changes = {name: [before[name], now[name]] for name in now if name in before and before[name] != now[name]}
            if changes:
                self.history.append({"updates": self.found.step, "changes": changes})
                logger.info(f"Changed on resuming: {describe_history(self.history[-1:])}")
        self._notes["history"] = self.history
        if self._folder is not None:
            self._folder.begin()
        self.accelerator.wait_for_everyone()

    def resume(self, state: Resumable) -> tuple[int, int]:
        """Load the checkpoint that was found. Returns the number of updates, and of images shown, so far."""
        if self.found is not None and "position" not in self.found.info:
            raise checkpoints.CheckpointError(f"{self.found.path} does not say where in the run it is.")
        if self.found is not None:
            checkpoints.load_run(self.accelerator, self.found, state)
        if self._folder is not None:
            self._folder.note(asdict(self.args))
            if self.found is not None and (keep := self.args.checkpoints_total_limit):
                checkpoints.delete_old_checkpoints(self.args.output_dir, keep, self.found.path)  # or a kill left one
        return (self.found.step, self.found.info["position"]) if self.found is not None else (0, 0)

    def open_cache(
        self, views: data.TrainingViews, vae: VAE | None, conditioner: DinoImageConditioner, num_views: int = 0
    ) -> CachedViews:
        """Views whose features are in `--feature_cache`; call it before the models are cast, which are compared.

        Without a VAE only the tokens are opened. `num_views` 0 takes as many views as there are. Sets
        `args.cache_views` to their number, which cards and checkpoints tell.
        """
        recipe = Recipe.of(vae, conditioner, views, num_views)
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        cached = open_feature_cache(
            self.args.feature_cache, recipe, views.images, only_tokens=vae is None, share=share
        )
        self.args.cache_views = cached.num_views
        return cached

    def load_batches(
        self, views: Views, position: int, encode: FeatureEncoder | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of this process without end, from the place in the global order after `position` images.

        Given what encodes them, a GPU does so ahead of training, by `encode_ahead`. They stay out of
        `accelerator.prepare`: the order already gives each process its own share.
        """
        args, accelerator = self.args, self.accelerator
        sampler = data.GlobalBatchSampler(
            len(views),
            args.train_batch_size,
            args.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            start=position,
            order=views.images.order(args.shuffle_window_shards),
        )
        batches = data.load_batches(views, sampler, args.dataloader_num_workers, accelerator.device)
        return batches if encode is None else encode_ahead(batches, encode)

    @property
    def images_per_update(self) -> int:
        """Over all processes and accumulated batches."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def count_updates(self, num_images: int) -> int:
        """Of the whole run, on this many images: as many as `--max_train_steps`, or those of the epochs."""
        return self.args.max_train_steps or math.ceil(self.args.num_train_epochs * num_images / self.images_per_update)

    def open_trackers(self) -> None:
        """Those of `--report_to`, which get to know what a card may tell."""
        told = {name: str(value) for name, value in told_settings(self.args).items()}
        self.accelerator.init_trackers(self.args.tracker_project_name, told)

    def open_progress(self, step: int, total: int) -> Progress:
        """What shows and logs the updates after `step`, which begin now."""
        self.interruption.saved()
        return Progress(
            self.accelerator,
            Path(self.args.output_dir, "train_log.jsonl"),
            total,
            start=step,
            images_per_step=self.images_per_update,
            every=self.args.logging_steps,
        )

    def save(self, state: Resumable, step: int, position: int, **info: Any) -> Path:
        """Write a checkpoint, which notes `info`; every process must call this."""
        written = checkpoints.save_run(
            self.accelerator,
            self.args.output_dir,
            step,
            state,
            info={"position": position, **info, **self._notes},
            keep=self.args.checkpoints_total_limit,
        )
        self.interruption.saved()
        return written

    def write_card(self, num_images: int, updates: int, base_models: Iterable[str | None]) -> None:
        """Write the record and the card of the finished model, and upload it where `--push_to_hub` says so.

        `updates` are those of its weights, and `base_models` what it was made from; None is skipped.
        """
        name = getattr(self.args, "hub_model_id", None) or Path(self.args.output_dir).resolve().name
        write_record_and_card(self.args, name, num_images, updates, base_models, self.history)
        if getattr(self.args, "push_to_hub", False):
            push_folder(self.args.output_dir, name, private=True)

    def say_stopped(self, step: int) -> None:
        """Say after how many updates the run was stopped, and how it goes on."""
        logger.info(f"Stopped after {step} updates. Go on with --resume_from_checkpoint=latest.")

    def note_validated(self, step: int) -> None:
        """Note in the checkpoint of this update, if there is one, that its validation need not be done again."""
        checkpoint = Path(self.args.output_dir, f"checkpoint-{step}")
        if self._folder is not None and checkpoint.is_dir():
            (checkpoint / _VALIDATED).touch()


def _as_noted(models: dict[str, Any], noted: dict[str, Any]) -> dict[str, Any]:
    """What a run with `--pretrained_pipeline` must keep, where it was begun with an older version.

    That noted flags of a new denoiser, or of statistics, which changed nothing, in place of what the pipeline has.
    """
    told = ("qk_init_scale", "standardised by")
    return models | {name: was for name, was in noted.items() if name in models and any(x in str(was) for x in told)}
