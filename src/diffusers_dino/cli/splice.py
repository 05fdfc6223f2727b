r"""Put patches of one image into another one's condition, and see where they come out (DiNO-Diffusion, appendix A.1).

    python examples/train_dino.py examples/configs/quickstart.yaml --tokens all --normalize_tokens 512 \
        --train_data_dir "examples/data/phantom-cxr/phantom-cxr-train-*.tar" --output_dir outputs/all-tokens
    diffusers-dino splice --model outputs/all-tokens

The model must have been trained on all tokens, or on patches. Writes two pictures, after the paper's Figs 6 and 7:
`reconstructions.png`, images beside what all of their tokens give from several noises, and `splices.png`.
`splices.json` says how much of the other image came along.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from .. import DinoDiffusionPipeline
from ..data.keys import find_keys
from ..data.sources.masks import MaskedImage, MaskedImages, open_masked_images
from ..evaluation.reconstruction.splicing import (
    draw_splices,
    generate_from_noises,
    patch_grid,
    splice_images,
    splice_masks,
)
from ..metrics.dice import dice
from ..pipelines.checks import image_size
from ..pipelines.preparation import stored_preparation
from ..sheets import contact_sheet
from .arguments import flag
from .console import hold_output


@dataclass
class Arguments:
    model: str = flag("outputs/all-tokens", "Pipeline trained with --tokens all.")
    data_dir: str = flag("examples/data/phantom-cxr/phantom-cxr-test-*.tar", "Images with lung masks.")
    source: str | None = flag(None, "Key of the image that is changed; by default the first.")
    other: str | None = flag(
        None, "Key of the image whose patches are taken; by default that whose lungs differ most."
    )
    num_noises: int = flag(4, "Images from each condition.")
    num_reconstructions: int = flag(4, "Images in reconstructions.png.")
    num_inference_steps: int = flag(20, "Sampling steps.")
    guidance_scale: float = flag(2.0, "Guidance.")
    seed: int = flag(0, "Seed of the noise.")
    output_dir: str = flag("outputs/patch-tokens", "Where the pictures go.")


def main(args: Arguments) -> None:
    if args.num_noises < 1 or args.num_reconstructions < 1:
        raise ValueError("--num_noises and --num_reconstructions must be at least 1.")
    with hold_output(args.output_dir) as output_dir:
        pipe = DinoDiffusionPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
        side, size = patch_grid(pipe.conditioner), image_size(pipe)
        preparation = stored_preparation(pipe)  # of older models, borders stay on
        samples = open_masked_images(args.data_dir, size, mask_size=size, preprocessing=preparation)
        call = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        call |= {"num_noises": args.num_noises, "seed": args.seed}
        first = torch.stack([samples.image(i) for i in range(min(args.num_reconstructions, len(samples)))])
        again = generate_from_noises(pipe, pipe.encode_image(first), **call)
        contact_sheet(first, again.flatten(0, 1)).save(output_dir / "reconstructions.png")
        named = [key for key in (args.source, args.other) if key]
        found = find_keys(named, samples.keys, f"of the keys are not in {args.data_dir}")
        places = dict(zip(named, found, strict=True))
        source = samples[places[args.source] if args.source else 0]
        other = samples[places[args.other]] if args.other else most_different(samples, source)
        splices = splice_images(pipe, source.image, other.image, splice_masks(side, source.mask | other.mask), **call)
        draw_splices(splices, source.image, other.image).save(output_dir / "splices.png")
        (output_dir / "splices.json").write_text(json.dumps(splices.shares, indent=2) + "\n")
        print(f"{'went to the other image':24}{'inside the mask':>16}{'outside':>16}")
        for name, values in splices.shares.items():
            print(f"{name:24}" + "".join(f"{value:16.2f}" for value in values.values()))


def most_different(samples: MaskedImages, source: MaskedImage) -> MaskedImage:
    """The sample whose lungs overlap least with the source's."""
    overlaps = [dice(samples.mask(i), source.mask).item() for i in range(len(samples))]
    return samples[overlaps.index(min(overlaps))]
