"""Kill a training run again and again, resume it each time, and compare its end with that of a run left alone.

    python benchmarks/kill_and_resume.py --output_dir outputs/kill_and_resume --kills 20 --processes 1 2

The moments are drawn from --seed. A third of them are inside a checkpoint: the process is killed while the folder
that is being written is there. Some are while a run starts or resumes, the others anywhere. SIGKILL goes to all
processes of the run, which are forks of one that has imported what they need. Prints a table, writes
kill_and_resume.json, and fails unless weights, averaged weights, optimizer and losses are the same bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import HfArgumentParser

from diffusers_dino.training.plain_state import OPTIMIZER
from forks import Forks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/kill_and_resume"), metadata={"help": "Must be empty or not exist."})
    kills: int = field(default=20, metadata={"help": "Kills for each number of processes."})
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of processes to try."})
    max_train_steps: int = field(default=120, metadata={"help": "Length of the run."})
    checkpointing_steps: int = field(default=3, metadata={"help": "Updates between checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of the moments."})
    threads: int = field(default=1, metadata={"help": "OMP_NUM_THREADS: sums depend on how they are shared out."})


@dataclass
class Kill:
    """One kill: what was aimed at, and what was hit.

    Attributes:
        aim: `"checkpoint"`, `"start"` or `"anywhere"`.
        after: Number of updates to wait for; not for `"start"`.
        delay: Fraction in [0, 1) of the time that a checkpoint, a start or an update takes.
        updates: How many updates the log told of.
        unfinished: Checkpoint that was being written.
        newest: Newest complete checkpoint, from which the next process goes on.
    """

    aim: str
    after: int
    delay: float
    updates: int = 0
    unfinished: str = ""
    newest: str = ""


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if args.max_train_steps % args.checkpointing_steps:
        raise SystemExit(
            "--max_train_steps must be a multiple of --checkpointing_steps: the last checkpoint is compared."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if any(args.output_dir.iterdir()):
        raise SystemExit(f"{args.output_dir} is not empty: runs in it would be resumed.")
    results = [try_kills(args, processes) for processes in args.processes]
    report = {"torch": torch.__version__, "arguments": {k: str(v) for k, v in asdict(args).items()}, "runs": results}
    (args.output_dir / "kill_and_resume.json").write_text(json.dumps(report, indent=1))
    if not all(all(result["identical"].values()) for result in results):
        raise SystemExit("A resumed run ended differently.")


def try_kills(args: Arguments, processes: int) -> dict[str, Any]:
    """Run once undisturbed, once with all kills, and compare."""
    whole, cut = (args.output_dir / f"{name}-{processes}" for name in ("whole", "cut"))
    start = time.perf_counter()
    with Run(args, processes, whole) as run:
        while run.updates() < 1:
            run.wait_a_moment()
        start_time = time.perf_counter() - start
        run.finish()
    kills = plan_kills(args)
    print(f"\n{processes} process(es), {args.max_train_steps} updates, a checkpoint every {args.checkpointing_steps}")
    print(f"{'aim':>12} {'updates':>8} {'unfinished':>16} {'goes on from':>16}")
    for kill in kills:
        with Run(args, processes, cut) as run:
            strike(run, kill, start_time)
        print(f"{kill.aim:>12} {kill.updates:>8} {kill.unfinished:>16} {kill.newest:>16}", flush=True)
    with Run(args, processes, cut) as run:
        run.finish()
    identical = compare(whole, cut, args.max_train_steps)
    inside = sum(bool(kill.unfinished) for kill in kills)
    print(f"{len(kills)} kills, {inside} of them inside a checkpoint; bit-identical: {identical}", flush=True)
    return {"processes": processes, "kills": [asdict(kill) for kill in kills], "identical": identical}


def plan_kills(args: Arguments) -> list[Kill]:
    """Moments in the order of the run; the last checkpoint is left for the end."""
    rng = random.Random(args.seed)
    after = sorted(rng.randrange(args.max_train_steps - 2 * args.checkpointing_steps) for _ in range(args.kills))
    aims = ["checkpoint", "anywhere", "anywhere", "checkpoint", "start", "anywhere"]
    return [Kill(aims[number % len(aims)], step, rng.random()) for number, step in enumerate(after)]


def strike(run: Run, kill: Kill, start_time: float) -> None:
    """Wait for the moment, kill, and note what was hit."""
    if kill.aim == "start":
        time.sleep(kill.delay * start_time)
    else:
        while run.updates() < kill.after:
            run.wait_a_moment()
        if kill.aim == "checkpoint":
            while not run.unfinished():
                run.wait_a_moment()
            time.sleep(kill.delay * run.saving_time())
        else:
            time.sleep(kill.delay * 0.2)
    run.kill()
    kill.updates, kill.unfinished = run.updates(), run.unfinished()
    kill.newest = max(run.folder.glob("checkpoint-*"), key=_step, default=Path("the beginning")).name


class Run:
    """The training script, as processes of their own that go on from the newest checkpoint."""

    def __init__(self, args: Arguments, processes: int, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "train_log.jsonl"
        self.former_log = self._log_identity()
        self.started = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "ACCELERATE_USE_CPU": "true"}
        self.forks = Forks("train_dino.py", flags(args, processes, folder), environment, processes)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def updates(self) -> int:
        """Updates that the log tells of, once this process has taken it over."""
        if self._log_identity() in (self.former_log, None):  # None: a run that begins anew has removed it
            return 0
        return len(self.log.read_text().splitlines())

    def unfinished(self) -> str:
        """The checkpoint that this run is writing, or was when it was killed; not one that an earlier run left."""
        for path in self.folder.glob(".checkpoint-*.partial"):
            try:
                if path.stat().st_mtime >= self.started:
                    return path.name
            except FileNotFoundError:  # renamed in this moment
                continue
        return ""

    def saving_time(self) -> float:
        """Seconds that the last checkpoint took, from its first file to its last."""
        last = max(self.folder.glob("checkpoint-*"), key=_step, default=None)
        times = [path.stat().st_mtime for path in last.rglob("*") if path.is_file()] if last else [0.0, 0.1]
        return max(times) - min(times)

    def wait_a_moment(self) -> None:
        if self.forks.poll() is not None:
            raise SystemExit(f"The run ended too early:\n{self.forks.communicate()[0]}")
        time.sleep(0.001)

    def finish(self) -> None:
        if self.forks.wait():
            raise SystemExit(f"The run failed:\n{self.forks.communicate()[0]}")

    def kill(self) -> None:
        self.forks.kill()
        self.forks.wait()

    def _log_identity(self) -> int | None:
        """Changes when a run takes the log over, which it does by replacing the file."""
        return self.log.stat().st_ino if self.log.is_file() else None


def flags(args: Arguments, processes: int, folder: Path) -> list[str]:
    """A small run on the bundled phantoms and models that has all that a checkpoint must restore."""
    config = args.output_dir / "unet"
    if not config.exists():
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **blocks
        ).save_config(config)
    settings = {
        "train_data_dir": EXAMPLES / "data/phantom-cxr/phantom-cxr-train-000000.tar",
        "max_train_samples": 40,
        "resolution": 64,
        "vae": EXAMPLES / "data/tiny-diffusion/vae",
        "conditioner": EXAMPLES / "data/tiny-diffusion/conditioner",
        "unet_config": config,
        "train_batch_size": 8 // processes,
        "max_train_steps": args.max_train_steps,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "learning_rate": 1e-3,
        "use_ema": True,
        "ema_decay": 0.95,
        "validation_steps": 0,
        "checkpointing_steps": args.checkpointing_steps,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
        "output_dir": folder,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def compare(whole: Path, cut: Path, steps: int) -> dict[str, bool]:
    """What of the two runs is the same, bit for bit."""
    last = f"checkpoint-{steps}"

    def same_tensors(name: str) -> bool:
        one, other = (load_file(folder / name) for folder in (whole, cut))
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    weights = "unet/diffusion_pytorch_model.safetensors"
    return {
        "weights": same_tensors(f"{last}/trainable.safetensors"),
        "averaged weights": same_tensors(weights) and same_tensors(f"{last}/{weights}"),
        "optimizer": same_tensors(f"{last}/{OPTIMIZER}"),
        "losses": (whole / "train_log.jsonl").read_text() == (cut / "train_log.jsonl").read_text(),
    }


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


if __name__ == "__main__":
    main()
