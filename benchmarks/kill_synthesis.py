"""One plan of 256 images, made by one process, by two, on Ray, and by runs that are killed: are the bytes the same?

    python benchmarks/kill_synthesis.py --kills 5

`diffusers-dino synthesise` interpolates between phantoms with a small untrained model; the files are what matters
here. SIGKILL falls while sources are encoded or images sampled: on all processes of a run, or on one of two, whereupon
the launcher must end the run by itself. Each time the same command goes on, with one process or two. Ends with an
error unless all files of all folders are equal, byte for byte.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bundled import untrained_pipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from killed_commands import check, contents, differing, start_command, wait_for_orphans

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "norm_num_groups": 4,
}


@dataclass
class Arguments:
    kills: int = flag(5, "How often a run is killed.")
    num_images: int = flag(256, "Images of the plan.")
    shard_size: int = flag(16, "Images in a shard.")
    seed: int = flag(0, "Seed of the moments.")
    ray: bool = flag(importlib.util.find_spec("ray") is not None, "Try Ray, too.")
    output: str | None = flag(None, "JSON file of what was found.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        untrained_pipeline(**UNET).save_pretrained(root / "model")
        runs = {"one process": ("one", 1, "local"), "two processes": ("two", 2, "local")}
        runs |= {"Ray": ("ray", 1, "ray")} if args.ray else {}
        for title, (name, processes, engine) in runs.items():
            started = time.perf_counter()
            check(start(root, name, args, processes, engine), root)
            print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)
        kills = [kill_once(root, args, rng) for _ in range(args.kills)]
        check(start(root, "killed", args, rng.choice((1, 2))), root)
        whole = contents(root / "one")
        names = [*(name for name, _, _ in runs.values()), "killed"]
        others = {name: contents(root / name) for name in names[1:]}
    different = {name: differing(whole, found) for name, found in others.items()}
    shards = sum(name.endswith(".tar") for name in whole)
    report = {"images": args.num_images, "shards": shards, "files": len(whole), "kills": kills, "different": different}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if any(different.values()):
        sys.exit(f"files differ from those of one process: {different}")
    print(
        f"{args.num_images} images in {shards} shards: {', '.join(others)} equal one process in all {len(whole)} files"
    )


def start(root: Path, name: str, args: Arguments, processes: int, engine: str = "local") -> subprocess.Popen:
    """Start the script as one or several processes."""
    options = {"model": root / "model", "data_dir": EXAMPLES / "data/phantom-cxr", "labels": "stored", "threads": 1}
    options |= {"strategy": "interpolation", "num_images": args.num_images, "shard_size": args.shard_size}
    options |= {"num_inference_steps": 4, "batch_size": 8, "num_drawn": 4, "engine": engine, "output_dir": root / name}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "diffusers_dino", "synthesise"]
    return start_command(root, command, options, ACCELERATE_USE_CPU="true")


def kill_once(root: Path, args: Arguments, rng: random.Random) -> dict[str, object]:
    """Kill a run when it has made some more files; what remains of it must end by itself."""
    processes, victim = rng.choice(((1, "the process"), (2, "both processes"), (2, "one of two")))
    shards = -(-args.num_images // args.shard_size)
    goal = count_finished(root) + rng.randint(0, max(1, shards // args.kills - 1))
    process, delay = start(root, "killed", args, processes), rng.uniform(0, 1)
    while process.poll() is None and (count_finished(root) < goal or not (root / "killed/plan.json").exists()):
        time.sleep(0.01)
    time.sleep(delay)
    if process.poll() is not None:
        sys.exit(f"the run ended before it was killed:\n{(root / 'log').read_text()}")
    started = psutil.Process(process.pid)
    family = [one for one in started.children(recursive=True) if "synthesise" in one.cmdline()]
    for one in [rng.choice(family)] if victim == "one of two" else [started, *family]:
        one.kill()
    if process.wait(300) == 0:
        sys.exit("the run says that all is well though it was killed")
    wait_for_orphans(root / "killed")
    found = {"victim": victim, "shards": count_finished(root)}
    print(f"killed {found['victim']} after {found['shards']} of {shards} shards", flush=True)
    return found


def count_finished(root: Path) -> int:
    return len(list((root / "killed/.records").glob("*.json")))


if __name__ == "__main__":
    main()
