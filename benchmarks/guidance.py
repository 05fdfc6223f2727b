"""Ways of guiding one model, on the bundled phantoms: classifier-free, in an interval, guiders, autoguidance.

    python benchmarks/guidance.py --guide outputs/tiny-diffusion/checkpoint-500 --output_dir outputs/guidance

The guide is an earlier checkpoint of the model's run: train as examples/data/tiny-diffusion/README.md says, with
`--checkpointing_steps 500`, and stop after it. Each row generates a variation of each test phantom for each seed.
Retrieval is the share whose nearest test phantom, by the encoder's tokens, is their source; Fréchet distance and
coverage are in the features of `tiny`, against the training phantoms.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders import BaseGuidance

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.evaluation.generation import embed_images, generate_batches, stack_images
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics import open_extractor, retrieval_accuracy
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.metrics.manifolds import manifold_figures
from diffusers_dino.training.models import load_denoiser

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


@dataclass
class Arguments:
    model: str = flag(str(DATA / "tiny-diffusion"), "DinoDiffusionPipeline.")
    guide: str | None = flag(None, "Earlier checkpoint of its run; without it, no row of autoguidance.")
    training: str = flag(f"{DATA}/phantom-cxr/phantom-cxr-train-*.tar", "Its training images.")
    test: str = flag(f"{DATA}/phantom-cxr/phantom-cxr-test-*.tar", "Images that it has not seen.")
    ways: list[str] | None = flag(None, "Rows to measure; all by default.")
    size: int = flag(128, "Side of the images in pixels.")
    seeds: list[int] = flag([0, 1, 2], "Of the noise.")
    num_inference_steps: int = flag(20, "Of the model's scheduler.")
    batch_size: int = flag(32, "Images generated at once.")
    output_dir: str = flag("outputs/guidance", "Where guidance.json goes.")


def ways(with_guide: bool) -> dict[str, tuple[BaseGuidance | None, dict[str, float]]]:
    """The guider and the arguments of the call, by the name of the row."""
    found: dict[str, tuple[BaseGuidance | None, dict[str, float]]] = {
        "none": (None, {"guidance_scale": 1.0}),
        "classifier-free, 2": (None, {"guidance_scale": 2.0}),
        "classifier-free, 3": (None, {"guidance_scale": 3.0}),
        "classifier-free, 3, steps 20 % to 80 %": (
            None,
            {"guidance_scale": 3.0, "guidance_start": 0.2, "guidance_end": 0.8},
        ),
        "AdaptiveProjectedGuidance, 3": (
            AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.0),
            {},
        ),
        "ClassifierFreeZeroStarGuidance, 3": (ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), {}),
    }
    for scale in (1.5, 2.0) if with_guide else ():
        found[f"autoguidance, {scale:g}"] = (None, {"guidance_scale": 1.0, "autoguidance_scale": scale})
    if with_guide:
        both = {"guidance_scale": 2.0, "autoguidance_scale": 1.5}
        found["classifier-free, 2, and autoguidance, 1.5"] = (None, both)
    return found


def measure(
    args: Arguments, pipe: DinoDiffusionPipeline, test: torch.Tensor, reference: torch.Tensor, call: dict[str, float]
) -> dict[str, Any]:
    """Figures of each seed, and seconds an image."""
    extractor, tokens = open_extractor("tiny"), embed_images(pipe, test)
    found: dict[str, list[float]] = {"retrieval": [], "frechet": [], "coverage": [], "seconds": []}
    for seed in args.seeds:
        start = time.perf_counter()
        batches = generate_batches(
            pipe,
            tokens,
            range(len(tokens)),
            (seed, "variation"),
            args.batch_size,
            progress=False,
            num_inference_steps=args.num_inference_steps,
            **call,
        )
        images = torch.cat([batch.cpu() for batch in batches])
        found["seconds"].append((time.perf_counter() - start) / len(images))
        features = extractor(images)
        found["retrieval"].append(retrieval_accuracy(embed_images(pipe, images).flatten(1), tokens.flatten(1)))
        found["frechet"].append(float(frechet_of_samples(features, reference)))
        found["coverage"].append(manifold_figures(features, reference).coverage)
    return found


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    folder = make_writable_folder(args.output_dir)
    pipe = DinoDiffusionPipeline.from_pretrained(args.model)
    if args.guide:
        pipe = DinoDiffusionPipeline.from_pipe(pipe, guide=load_denoiser(args.guide))
    training, test = (
        stack_images(open_images(source, Preprocessing(args.size, remove_borders=False)))
        for source in (args.training, args.test)
    )
    reference = open_extractor("tiny")(training)
    figures: dict[str, Any] = {}
    print(f"{len(test)} unseen images, {len(training)} of training, seeds {args.seeds}: mean (lowest to highest)")
    print("| guidance | retrieval | Fréchet distance | coverage | seconds an image |\n| --- | --- | --- | --- | --- |")
    known = ways(args.guide is not None)
    if unknown := set(args.ways or ()) - set(known):
        raise ValueError(f"There is no row {sorted(unknown)[0]!r}: give some of {', '.join(map(repr, known))}.")
    for name in args.ways or known:
        pipe.guider, call = known[name]
        figures[name] = measure(args, pipe, test, reference, call)
        cells = [
            f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
            for values, form in zip(figures[name].values(), (".2f", ".0f", ".2f", ".2f"), strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        write_json(folder / "guidance.json", {"num_images": len(test), "seeds": args.seeds, "ways": figures}, indent=2)


if __name__ == "__main__":
    main()
