"""What the showcase model reaches on patients that no stage has seen: retrieval, distances, copies, and a picture.

    python benchmarks/showcase.py --model outputs/showcase/model --shards shards --dino facebook/dinov2-small

`shards` are those of its training, whose test split is measured on. Each distance is given as a multiple of what real
images of other patients reach: the unseen patients are halved, variations of one half stand against the other half.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.cli.arguments import flag, parse_arguments
from diffusers_dino.cli.training_flags import patients_of
from diffusers_dino.data import ImageDataset, Preprocessing, open_images
from diffusers_dino.evaluation import evaluate_memorization, evaluate_reconstruction
from diffusers_dino.evaluation.generation import embed_images, generate_variations, stack_images
from diffusers_dino.evaluation.table_text import markdown_table, with_interval
from diffusers_dino.files import make_writable_folder, write_json
from diffusers_dino.metrics import extract_features, open_extractor
from diffusers_dino.metrics.distances import frechet_of_samples
from diffusers_dino.pixels import unit_to_vae, vae_to_unit
from diffusers_dino.sheets import contact_sheet

NUM_RETRIEVED = 64


@dataclass
class Arguments:
    model: str = flag("examples/data/showcase", "The pipeline.")
    shards: str | None = flag(None, "Folder of shards of its training.")
    dino: str | None = flag(None, "Encoder for the second distance: a folder in transformers' format.")
    seeds: list[int] = flag([0, 1, 2], "Noise seeds that retrieval is averaged over.")
    guidance_scale: float = flag(2.0, "For retrieval and copies; distances are given with and without it.")
    guidance_rescale: float = flag(0.0, "Against over-exposure by guidance.")
    num_inference_steps: int = flag(20, "Steps of the model's own scheduler.")
    num_copies: int = flag(500, "Variations of training images that are searched for copies.")
    output_dir: str = flag("outputs/showcase_figures", "Where figures and pictures go.")


def main() -> None:
    args = parse_arguments(Arguments, description=__doc__)
    if args.shards is None:
        raise ValueError("Give the shards of the model's training as --shards.")
    folder = make_writable_folder(args.output_dir)
    pipe = DinoDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    preprocessing = Preprocessing(pipe.vae.config["sample_size"], remove_borders=False)
    training, unseen = (open_images(args.shards, preprocessing, split=split) for split in ("train", "test"))
    figures = {"model": args.model, "seeds": args.seeds}
    figures |= {"guidance": args.guidance_scale, "guidance rescale": args.guidance_rescale}
    figures |= {"training images": len(training), "unseen images": len(unseen)}
    first = first_of_each_patient(unseen)
    spread = unseen.select([first[i * len(first) // NUM_RETRIEVED] for i in range(NUM_RETRIEVED)])
    draw(pipe, stack_images(spread), args, folder)
    reconstruction = evaluate_reconstruction(
        pipe,
        spread,
        training,
        seeds=args.seeds,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
    )
    figures["reconstruction"] = asdict(reconstruction)
    rows = [
        [
            name.replace("_", " "),
            *(f"{getattr(by, name):.3f}" for by in (reconstruction.by_encoder, reconstruction.by_pixels)),
        ]
        for name in ("generated", "shuffled", "untrained", "nearest_training_image")
    ]
    print(markdown_table(["top-1 of 64 unseen patients", "by the encoder", "by 16 x 16 pixels"], rows))
    figures["frechet"] = measure_distances(args, pipe, unseen)
    print(markdown_table(["Fréchet distance over real against real", *figures["frechet"]], distance_rows(figures)))
    figures["copies"] = search_copies(args, pipe, training, unseen)
    print(markdown_table([f"{args.num_copies} variations of training images", ""], list(figures["copies"].items())))
    write_json(folder / "showcase.json", figures)


def first_of_each_patient(images: ImageDataset) -> list[str]:
    first = {}
    for patient, key in zip(patients_of(images), images.keys, strict=True):
        first.setdefault(patient, key)
    return list(first.values())


def draw(pipe: DinoDiffusionPipeline, sources: Tensor, args: Arguments, folder: Path) -> None:
    """A row for each of eight unseen patients: the source, what the autoencoder keeps of it, four variations."""
    chosen = sources[:: len(sources) // 8][:8]
    start = time.perf_counter()
    variations = pipe(
        chosen,
        num_images_per_prompt=4,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
        generator=torch.Generator().manual_seed(0),
    ).images
    print(f"{(time.perf_counter() - start) / len(variations):.2f} s an image")
    contact_sheet(chosen, reconstruct(pipe, chosen), variations).save(folder / "variations.png")


@torch.no_grad()
def reconstruct(pipe: DinoDiffusionPipeline, images: Tensor) -> Tensor:
    """What the autoencoder keeps of images, `(N, C, H, W)` in [0, 1]."""
    channels = pipe.vae.config["in_channels"]
    return torch.cat([vae_to_unit(pipe.vae(unit_to_vae(batch, channels)).sample) for batch in images.split(16)])


def halves_of(images: ImageDataset) -> tuple[ImageDataset, ImageDataset]:
    """Two halves of the patients."""
    patients = patients_of(images)
    order = sorted(set(patients))
    chosen = {order[i] for i in torch.randperm(len(order), generator=torch.Generator().manual_seed(0))[::2].tolist()}
    halves: tuple[list[str], list[str]] = ([], [])
    for patient, key in zip(patients, images.keys, strict=True):
        halves[patient in chosen].append(key)
    return images.select(halves[0]), images.select(halves[1])


def measure_distances(
    args: Arguments, pipe: DinoDiffusionPipeline, unseen: ImageDataset
) -> dict[str, dict[str, float]]:
    """By feature space: the distance of real halves, and of what is made of one half from the other."""
    sources, reference = halves_of(unseen)
    tokens = embed_images(pipe, sources)
    sets = {"real": stack_images(sources)}
    sets["autoencoder"] = reconstruct(pipe, sets["real"])
    for scale in (1.0, args.guidance_scale):
        sets[f"guidance {scale:g}"] = generate_variations(
            pipe,
            tokens,
            seed=0,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=scale,
            guidance_rescale=args.guidance_rescale,
        )
    found = {}
    for name in ["tiny", *([args.dino] if args.dino else [])]:
        extractor = open_extractor(name)
        theirs = extract_features(extractor, reference)
        found[Path(name).name] = {
            key: frechet_of_samples(extract_features(extractor, images).features, theirs.features)
            for key, images in sets.items()
        } | {"num_images": len(sources), "num_reference": len(reference)}
    return found


def distance_rows(figures: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    spaces = figures["frechet"].values()
    kinds = [name for name in next(iter(spaces)) if name == "autoencoder" or name.startswith("guidance")]
    return [[kind, *(f"{space[kind] / space['real']:.2f}" for space in spaces)] for kind in kinds]


def search_copies(
    args: Arguments, pipe: DinoDiffusionPipeline, training: ImageDataset, unseen: ImageDataset
) -> dict[str, str]:
    """Variations of training images, which are the likeliest to be copies, and unseen images as a control."""
    chosen = training.select(training.keys[:: max(1, len(training) // args.num_copies)][: args.num_copies])
    variations = generate_variations(
        pipe,
        embed_images(pipe, chosen),
        seed=0,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        guidance_rescale=args.guidance_rescale,
    )
    result = evaluate_memorization(
        training,
        variations,
        unseen,
        training_groups=patients_of(training),
        held_out_groups=patients_of(unseen),
        progress=False,
    ).result
    figures = {
        "copies of training images, at 1 % false alarms": result.synthetic,
        "the same of unseen images": result.held_out,
    }
    rows = {name: with_interval(found.share, found.low, found.high, ".1%") for name, found in figures.items()}
    return rows | {f"planted copies found, {planted.change}": f"{planted.found:.0%}" for planted in result.planted}


if __name__ == "__main__":
    main()
