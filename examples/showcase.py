"""From unlabelled radiographs to a model worth showing: autoencoder, encoder and UNet in six stages, one command.

    python examples/showcase.py --train_data_dir shards --teacher facebook/dinov2-small --setting cpu

`shards` is what `diffusers-dino shards --size 128 --no_remove_borders ...` made; only its training patients are used.
The teacher, a DINO encoder, is distilled into a small one. With `--setting cpu` it takes a few hours on two cores,
with `gpu` some minutes on a large GPU. Stopped at any moment, the same command goes on where it was. The pipeline in
half precision is `--output_dir`/model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.console import run
from diffusers_dino.cli.launch import launch_training
from diffusers_dino.files import save_atomically
from diffusers_dino.hub import TrainingRecord, write_model_card

EXAMPLES = Path(__file__).resolve().parent
SCRIPTS = {
    "vae": "train_vae.py",
    "decoder": "train_vae.py",  # sharp, against a discriminator
    "detail": "train_vae.py",  # the decoder, true to what the teacher sees
    "encoder": "distill_encoder.py",
    "unet": "train_dino.py",
    "tokens": "train_dino.py",  # the UNet, true to its condition
}

# What a card does otherwise than the configs, which are for two cores.
ON_A_GPU = {
    "vae": ["--train_batch_size=64", "--max_train_steps=6000", "--crop_size=128"],
    "decoder": ["--train_batch_size=64", "--max_train_steps=6000"],
    "detail": ["--train_batch_size=32", "--max_train_steps=600"],
    "encoder": ["--teacher_size=224", "--cache_views=4", "--max_train_steps=6000"],
    "unet": [
        *("--torch_compile", "--channels_last", "--cache_views=8"),
        *("--train_batch_size=64", "--max_train_steps=12000"),
    ],
    "tokens": ["--channels_last", "--cache_views=8", "--train_batch_size=64", "--max_train_steps=2000"],
}


@dataclass
class Arguments:
    train_data_dir: str | None = flag(None, "Folder of shards of radiographs.")
    teacher: str = flag("facebook/dinov2-small", "Encoder to distil: Hub id or folder.")
    setting: Literal["cpu", "gpu"] = flag("cpu", "Two cores and hours, or one large GPU and minutes.")
    mixed_precision: Literal["no", "bf16"] | None = flag(
        None, "bf16 on a GPU; on a CPU it is faster where there are bfloat16 units, and much slower elsewhere."
    )
    output_dir: str = flag("outputs/showcase", "Where a folder for each stage goes, and the model.")
    seed: int = flag(0, "Seed of everything random.")
    max_train_steps: int | None = flag(None, "Updates of each stage, in place of the configs', for a trial.")
    max_train_samples: int | None = flag(None, "Train only on the first images, for a trial.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.train_data_dir is None:
        raise ValueError("Give the shards of radiographs as --train_data_dir.")
    output_dir = Path(args.output_dir).resolve()
    for stage in SCRIPTS:
        if not finished_file(output_dir, stage).exists():
            train(args, stage, output_dir)
    pack(output_dir)


def train(args: Arguments, stage: str, output_dir: Path) -> None:
    """Run the script of a stage in a process of its own, from its newest checkpoint if there is one."""
    flags = [f"examples/configs/showcase_{stage}.yaml"]
    flags += [f"--train_data_dir={Path(args.train_data_dir).resolve()}", f"--output_dir={output_dir / stage}"]
    flags += [f"--seed={args.seed}", "--resume_from_checkpoint=latest"]
    teacher = Path(args.teacher).resolve() if Path(args.teacher).exists() else args.teacher
    flags += {
        "vae": [],
        "decoder": [f"--vae={output_dir / 'vae'}"],
        "detail": [f"--vae={output_dir / 'decoder'}", f"--perceptual_encoder={teacher}"],
        "encoder": [f"--teacher={teacher}"],
        "unet": [f"--vae={output_dir / 'detail'}", f"--conditioner={output_dir / 'encoder'}"],
        "tokens": [f"--pretrained_pipeline={output_dir / 'unet'}"],
    }[stage]
    flags += [f"--mixed_precision={args.mixed_precision or ('bf16' if args.setting == 'gpu' else 'no')}"]
    if args.setting == "gpu":
        flags += ON_A_GPU[stage]
    for name in ("max_train_steps", "max_train_samples"):
        if getattr(args, name) is not None:
            flags += [f"--{name}={getattr(args, name)}"]
    launch_training(EXAMPLES / SCRIPTS[stage], flags, EXAMPLES.parent, finished_file(output_dir, stage))


def finished_file(output_dir: Path, stage: str) -> Path:
    """What a stage writes last."""
    return output_dir / stage / ("model_index.json" if SCRIPTS[stage] == "train_dino.py" else "config.json")


def pack(output_dir: Path) -> None:
    """Save the pipeline in half precision, with its card; statistics of the tokens stay in single precision."""
    pipe = DinoDiffusionPipeline.from_pretrained(output_dir / "tokens", dtype=torch.float16)
    with save_atomically(output_dir / "model") as folder:
        pipe.save_pretrained(folder)
        record = TrainingRecord.load(output_dir / "tokens")
        record.save(folder)
        write_model_card(folder, output_dir.name, record)
    size = sum(path.stat().st_size for path in (output_dir / "model").rglob("*") if path.is_file())
    print(f"The model is in {output_dir / 'model'}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main, resumable=True)
