"""From a folder of images to a model that follows its condition: three scripts, timed, and the figures they reach.

    python benchmarks/from_scratch.py --data_dir /data/nih --table /data/nih.csv --output_dir outputs/from_scratch

Autoencoder, encoder and UNet start from random weights; with `--encoder` a pretrained encoder takes the place of the
second. Patients are held out of all trainings; one image of each is what the figures are measured on. The table is a
CSV file with the columns `file` and, where it is known, `patient`; `variations.png` shows a few unseen images with
variations of them.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from PIL.Image import Image
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from diffusers_dino.data import ImageDataset, Preprocessing, open_images
from diffusers_dino.evaluation import ReconstructionResult, evaluate_reconstruction
from diffusers_dino.latents import decode_latents, encode_to_moments
from diffusers_dino.pixels import unit_to_vae, vae_to_unit
from diffusers_dino.sheets import contact_sheet
from diffusers_dino.training.autoencoder import psnr

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

STAGES = {"vae": "train_vae.py", "dino": "pretrain_dino.py", "unet": "train_dino.py"}


@dataclass
class Arguments:
    data_dir: Path = field(metadata={"help": "Folder of images."})
    table: Path = field(metadata={"help": "CSV file with the columns `file` and, where it is known, `patient`."})
    output_dir: Path = field(default=Path("outputs/from_scratch"), metadata={"help": "Models, times and figures."})
    configs: str = field(
        default=str(EXAMPLES / "configs" / "from_scratch"), metadata={"help": "Configs, before `_vae.yaml` and so on."}
    )
    encoder: str | None = field(default=None, metadata={"help": "Pretrained encoder, in place of training one."})
    encoder_size: int = field(default=98, metadata={"help": "Side in pixels of the images that --encoder sees."})
    encoder_tokens: Literal["global", "all"] = field(
        default="global", metadata={"help": "Which of its tokens: all, at a small side, where layout counts."}
    )
    resolution: int = field(default=64, metadata={"help": "Side of the images in pixels."})
    held_out_patients: int = field(default=64, metadata={"help": "Patients that no stage sees."})
    training_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "The chain runs once for each."})
    noise_seeds: int = field(default=3, metadata={"help": "Noise seeds that a model's figures are averaged over."})
    guidance_scale: float = field(default=2.0, metadata={"help": "For retrieval; the distances are without."})
    in_channels: int = field(default=1, metadata={"help": "Channels of the images: 3 for colour."})
    longer: float = field(default=1.0, metadata={"help": "Factor of the updates that the configs ask for."})
    max_train_steps: int | None = field(default=None, metadata={"help": "In place of the configs', for a trial."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    training_keys, test_keys = split_by_patient(args.table, args.held_out_patients)
    keys_file = args.output_dir / "training_keys.txt"
    keys_file.write_text("\n".join(training_keys) + "\n")
    images = open_images(args.data_dir, Preprocessing(args.resolution, remove_borders=False), in_memory=True)
    training, test = (stack(images.select(keys)) for keys in (training_keys, test_keys))
    runs = []
    for seed in args.training_seeds:
        folder = args.output_dir / f"seed-{seed}"
        seconds = train(args, folder, keys_file, seed)
        pipe = DinoDiffusionPipeline.from_pretrained(folder / "unet")
        pipe.set_progress_bar_config(disable=True)
        noise_seeds = range(args.noise_seeds)
        draw(pipe, test[:: len(test) // 4][:4], args.guidance_scale).save(folder / "variations.png")
        figures = evaluate_reconstruction(pipe, test, training, seeds=noise_seeds, guidance_scale=args.guidance_scale)
        runs.append({"seed": seed, "seconds": seconds, "psnr": vae_quality(pipe, test), "figures": asdict(figures)})
        (args.output_dir / "from_scratch.json").write_text(json.dumps(runs, indent=2) + "\n")
        print_run(seed, seconds, runs[-1]["psnr"], figures)


def split_by_patient(table: Path, held_out: int) -> tuple[list[str], list[str]]:
    """Keys of all images of the patients to train on, and of the first image of each patient held out."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    by_patient: dict[str, list[str]] = {}
    for row in rows:
        by_patient.setdefault(row.get("patient") or row["file"], []).append(row["file"].rpartition(".")[0])
    if not 1 < held_out < len(by_patient):
        raise ValueError(f"--held_out_patients {held_out} of {len(by_patient)} patients cannot be held out.")
    patients = sorted(by_patient)
    random.Random(0).shuffle(patients)
    training = [key for patient in patients[held_out:] for key in by_patient[patient]]
    return sorted(training), sorted(by_patient[patient][0] for patient in patients[:held_out])


def train(args: Arguments, folder: Path, keys_file: Path, seed: int) -> dict[str, float]:
    """Run the scripts as a user does. Returns the wall time of each, start-up and saving included."""
    seconds = {}
    if args.encoder:
        conditioner = DinoImageConditioner.from_encoder(
            args.encoder, size=args.encoder_size, tokens=args.encoder_tokens
        )
        conditioner.save_pretrained(folder / "dino")
    for stage, script in STAGES.items():
        if stage == "dino" and args.encoder:
            continue
        config = f"{args.configs}_{stage}.yaml"
        planned = yaml.safe_load(Path(config).read_text())
        steps = args.max_train_steps or round(args.longer * planned["max_train_steps"])
        command = [sys.executable, str(EXAMPLES / script), config, "--seed", str(seed)]
        command += ["--train_data_dir", str(args.data_dir), "--keys_file", str(keys_file)]
        command += ["--resolution", str(args.resolution), "--max_train_steps", str(steps)]
        command += ["--output_dir", str(folder / stage), "--overwrite_output_dir"]
        if stage == "unet":
            command += ["--vae", str(folder / "vae"), "--conditioner", str(folder / "dino")]
            command += ["--unet_config", str(EXAMPLES.parent / planned["unet_config"])]
        if stage == "vae":
            command += ["--in_channels", str(args.in_channels)]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds[stage] = time.perf_counter() - start
    return seconds


def stack(images: ImageDataset) -> Tensor:
    """`(N, C, size, size)` in [0, 1]."""
    return torch.stack([images[i]["image"] for i in range(len(images))])


def draw(pipe: DinoDiffusionPipeline, sources: Tensor, guidance_scale: float) -> Image:
    """A row for each source: the source, then four variations."""
    variations = pipe(
        sources,
        num_images_per_prompt=4,
        num_inference_steps=20,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
    ).images
    return contact_sheet(sources, variations)


@torch.no_grad()
def vae_quality(pipe: DinoDiffusionPipeline, images: Tensor) -> float:
    """Mean PSNR in dB of reconstructions of images `(N, C, H, W)` in [0, 1]."""
    pixels = unit_to_vae(images, pipe.vae.config["in_channels"])
    reconstructions = decode_latents(pipe.vae, encode_to_moments(pipe.vae, pixels)[0])
    return psnr(vae_to_unit(reconstructions), vae_to_unit(pixels)).mean().item()


def print_run(seed: int, seconds: dict[str, float], quality: float, result: ReconstructionResult) -> None:
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    print(f"\nseed {seed}: {sum(seconds.values()):.0f} s ({stages}), VAE {quality:.1f} dB")
    print(f"{'top-1 of ' + str(result.num_images):28}{'by encoder':>12}{'by pixels':>12}")
    for name in ("generated", "shuffled", "untrained", "nearest_training_image"):
        by_encoder, by_pixels = (getattr(space, name) for space in (result.by_encoder, result.by_pixels))
        print(f"{name.replace('_', ' '):28}{by_encoder:12.3f}{by_pixels:12.3f}")
    print(
        f"Frechet distance of 16 x 16 pixels: generated {result.frechet_generated:.2f}, untrained UNet "
        f"{result.frechet_untrained:.2f}, training images {result.frechet_training_images:.2f}"
    )


if __name__ == "__main__":
    main()
