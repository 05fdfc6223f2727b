"""Which denoiser learns most in the same time: UNets by noise, velocity and flow, and a transformer, on phantoms.

    python benchmarks/denoisers.py --seconds 600 --seed 0 --output_dir outputs/denoisers

Each arm is trained from random weights on cached features of the bundled phantoms, on one thread, until it has used
its seconds of processor time; all have about 1.1 M weights. What it has learned is measured on phantoms that it has
not seen. A finished arm is not run again, and the table is of all seeds in the folder.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import (
    Augmentation,
    GlobalBatchSampler,
    Preprocessing,
    TrainingViews,
    load_batches,
    open_images,
)
from diffusers_dino.denoisers import family_of
from diffusers_dino.evaluation.generation import embed_images, generate_variations, stack_images
from diffusers_dino.evaluation.table_text import markdown_table
from diffusers_dino.files import make_writable_folder, read_json, write_json
from diffusers_dino.metrics import extract_features, open_extractor, pixel_features
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.metrics.neighbours import retrieval_accuracy
from diffusers_dino.training import models, objective, optim
from diffusers_dino.training.features import CachedViews, FeatureEncoder, cache_in_memory

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
UNSEEN, GUIDANCE, STEPS, WARMUP = 64, 2.0, 20, 50
FIGURES = {
    "top1_tokens": ("top-1 by tokens", 2),
    "top1_pixels": ("top-1 by pixels", 2),
    "frechet": ("Fréchet distance", 1),
    "seconds_per_image": ("s an image", 2),
    "updates": ("updates", 0),
}


@dataclass(frozen=True)
class Arm:
    """What is trained; UNets learn at the rate of the quickstart, where it was tuned for velocity."""

    config: str
    prediction_type: str
    learning_rate: float
    qk_init_scale: float = 1.0


ARMS = {
    "UNet, epsilon": Arm("tiny_unet", "epsilon", 1.5e-3, 2.0),
    "UNet, v": Arm("tiny_unet", "v_prediction", 1.5e-3, 2.0),
    "UNet, flow": Arm("tiny_unet", "flow_prediction", 1.5e-3, 2.0),
    "SD3, flow": Arm("tiny_sd3", "flow_prediction", 1e-3),
}


@dataclass
class Arguments:
    seconds: float = flag(600.0, "Processor time of each arm's training.")
    seed: int = flag(0, "Of weights, order and noise; images are sampled with it too.")
    arms: list[str] | None = flag(None, "Arms to run; all by default.")
    learning_rate: float | None = flag(None, "In place of the arms' own, for trials.")
    batch_size: int = flag(16, "Images in an update.")
    ema_decay: float = flag(0.995, "Of the average of the weights, which is measured.")
    output_dir: str = flag("outputs/denoisers", "Where a JSON file an arm and the table go.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    torch.set_num_threads(1)
    folder = make_writable_folder(args.output_dir)
    if unknown := set(args.arms or ()) - set(ARMS):
        raise ValueError(f"There is no arm {sorted(unknown)[0]!r}: give some of {', '.join(map(repr, ARMS))}.")
    waiting = [name for name in args.arms or ARMS if not result_file(folder, name, args.seed).is_file()]
    if waiting:
        bundled = Bundled.load(args.seed)
    for name in waiting:
        arm = replace(ARMS[name], learning_rate=args.learning_rate or ARMS[name].learning_rate)
        pipe, training = train(args, arm, bundled)
        result = {"arm": name, "settings": asdict(arm), "arguments": asdict(args), **training}
        result |= measure(pipe, bundled, args.seed)
        write_json(result_file(folder, name, args.seed), result, indent=2)
        print(name, {figure: round(result[figure], 3) for figure in FIGURES}, flush=True)
    table = table_of([read_json(path) for path in sorted(folder.glob("*-seed*.json"))])
    (folder / "denoisers.md").write_text(table)
    print(table)


def result_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm.replace(', ', '-').lower()}-seed{seed}.json"


@dataclass
class Bundled:
    """The bundled frozen models, the features of the training phantoms, and unseen phantoms."""

    parts: Path
    views: CachedViews
    encode: FeatureEncoder
    training: Tensor
    unseen: Tensor

    @classmethod
    def load(cls, seed: int) -> Bundled:
        parts, phantoms = EXAMPLES / "data/tiny-diffusion", EXAMPLES / "data/phantom-cxr"
        vae = models.load_vae(str(parts)).requires_grad_(False)
        encode = FeatureEncoder(vae, DinoImageConditioner.from_pretrained(parts, subfolder="conditioner"), "cpu")
        training, unseen = (
            open_images(f"{phantoms}/phantom-cxr-{split}-*.tar", Preprocessing(128), in_memory=True)
            for split in ("train", "test")
        )
        augmentation = Augmentation(sharpness=0.0, scale=(0.9, 1.2))
        views = cache_in_memory(TrainingViews(training, augmentation, seed), encode, num_views=4)
        return cls(parts, views, encode, stack_images(training), stack_images(unseen)[:UNSEEN])


def train(args: Arguments, arm: Arm, bundled: Bundled) -> tuple[DinoDiffusionPipeline, dict[str, Any]]:
    """Train until the time is used up; the learning rate falls to zero with it, as a cosine."""
    torch.manual_seed(args.seed)
    pipe = models.build_pipeline(
        copy.deepcopy(bundled.encode.vae),
        bundled.encode.conditioner,
        resolution=128,
        denoiser_config=str(EXAMPLES / "configs" / f"{arm.config}.json"),
        qk_init_scale=arm.qk_init_scale,
        prediction_type=arm.prediction_type,
    )
    trainable = models.adapt_for_training(pipe, torch.device("cpu"))
    optimizer = optim.make_adamw(trainable, lr=arm.learning_rate)
    average = EMAModel(trainable, decay=args.ema_decay, foreach=True)
    sampler = GlobalBatchSampler(len(bundled.views), args.batch_size, args.seed)
    batches = load_batches(bundled.views, sampler, 0, torch.device("cpu"))
    step, losses, used, started = 0, [], 0.0, time.process_time()
    while used < args.seconds:
        rate = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * used / args.seconds))
        for group in optimizer.param_groups:
            group["lr"] = arm.learning_rate * rate
        loss = compute_loss(pipe, bundled.encode, next(batches), args.seed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(trainable)
        losses.append(loss.item())
        step, used = step + 1, time.process_time() - started
    average.copy_to(trainable)
    pipe.denoiser.eval().requires_grad_(False)
    last = losses[-100:]
    parameters = sum(parameter.numel() for parameter in trainable)
    return pipe, {"updates": step, "processor_seconds": used, "loss": sum(last) / len(last), "parameters": parameters}


def compute_loss(pipe: DinoDiffusionPipeline, encode: FeatureEncoder, batch: dict[str, Any], seed: int) -> Tensor:
    scheduler = pipe.scheduler
    mean, std, tokens = encode(batch)
    timesteps = scheduler.config["num_train_timesteps"]
    draws = objective.draw_for_training(batch["position"], mean.shape[1:], timesteps, seed)
    latents = mean + std * draws.latent_noise
    tokens = objective.drop_condition(tokens, pipe.conditioner.null_condition(1), draws.drop, 0.1)
    noisy, timesteps = objective.noisy_latents(scheduler, latents, draws)
    prediction = family_of(pipe.denoiser).predict(pipe.denoiser, noisy, timesteps, tokens)
    return objective.weighted_mse(prediction, objective.prediction_target(scheduler, latents, draws.noise, timesteps))


def measure(pipe: DinoDiffusionPipeline, bundled: Bundled, seed: int) -> dict[str, float]:
    """Figures of one guided image of each unseen phantom."""
    tokens = embed_images(pipe, bundled.unseen)
    started = time.process_time()
    images = generate_variations(
        pipe, tokens, seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE, progress=False
    )
    seconds = (time.process_time() - started) / len(images)
    extractor = open_extractor("tiny")
    generated, real = (
        extract_features(extractor, each, keys=[str(i) for i in range(len(each))]).features
        for each in (images, bundled.training)
    )
    return {
        "top1_tokens": retrieval_accuracy(embed_images(pipe, images).flatten(1), tokens.flatten(1)),
        "top1_pixels": retrieval_accuracy(pixel_features(images), pixel_features(bundled.unseen)),
        "frechet": frechet_of_samples(generated, real),
        "seconds_per_image": seconds,
    }


def table_of(results: list[dict[str, Any]]) -> str:
    """Mean over the seeds, and the range from the lowest to the highest."""
    rows = []
    for name in ARMS:
        found = [result for result in results if result["arm"] == name]
        if found:
            cells = [name, len(found), f"{found[0]['parameters'] / 1e6:.2f} M", found[0]["settings"]["learning_rate"]]
            rows.append([*cells, *(mean_and_range([r[key] for r in found], n) for key, (_, n) in FIGURES.items())])
    header = ["denoiser", "seeds", "weights", "learning rate", *(title for title, _ in FIGURES.values())]
    return markdown_table(header, rows) + "\n"


def mean_and_range(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
