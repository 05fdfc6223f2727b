r"""Search a synthetic set for copies of training images, and make a gate that keeps them out of the next one.

    diffusers-dino evaluate memorization --training /data/cxr --training_keys training_keys.txt \
        --held_out /data/cxr --held_out_keys held_out_keys.txt --synthetic outputs/synthetic \
        --patients /data/cxr.csv --output_dir outputs/memorization

Images are folders or webdataset tars. Without `--synthetic` the search is set up and checked, and `gate.safetensors`
is written, which `synthesise --gate` takes. With `--model` the condition tokens of all images are compared, too, and
with `--prior` those that it drew for a set of `synthesise --strategy prior`. Writes `memorization.json`,
`report.html`, `distances.png` and, where patients may be shown, `pairs.png`. Reports name images by their keys and
nothing else.
Needs the extra `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ...conditioner import DinoImageConditioner
from ...data import Preprocessing, open_images
from ...evaluation import evaluate_memorization
from ...evaluation.memorization.plot import draw_closest_pairs, plot_memorization
from ...evaluation.memorization.table import make_report, table_of_sets
from ...fingerprints import fingerprint_model
from ...metrics import open_extractor
from ...pipelines import DinoPriorPipeline
from ...synthesis import PriorTokens, load_plan
from ..arguments import flag
from ..console import hold_output
from ..image_flags import HeldOutArguments, check_arguments, open_training_and_held_out, read_patients


@dataclass
class Arguments(HeldOutArguments):
    synthetic: str | None = flag(None, "What the generator made, likewise.", group="Images")
    size: int = flag(128, "Side in pixels that images are prepared at.")
    extractor: str = flag("local-contrast", "Feature space: not the generator's own encoder.", group="Search")
    weights: str | None = flag(None, "Weights of the extractor, if it has any.")
    false_alarms: float = flag(0.01, "Share of real images that may be called copies; 0.01 takes 299 images.")
    calibrate_on: Literal["training", "held out"] = flag("training", "Real images that the threshold comes from.")
    num_planted: int = flag(50, "Training images tampered with in each way, to see what the search finds.")
    model: str | None = flag(None, "Generator, or only its conditioner: compares condition tokens, too.")
    prior: str | None = flag(None, "Prior that drew the tokens of --synthetic: compares those; needs --model.")
    batch_size: int = flag(64, "Images computed at once.")
    device: str = flag("cpu", "Where features are computed, such as cuda.")
    output_dir: str = flag("outputs/memorization", "Where the report and the gate go.", group="Output")
    num_pairs: int = flag(12, "Closest pairs to list.")
    draw_pairs: bool = flag(True, "Show them as pictures; no, where the report must not show patients.")


def main(args: Arguments) -> None:
    check_arguments(args)
    with hold_output(args.output_dir) as output_dir:
        whole = None if args.model is None or is_only_conditioner(args.model) else args.model
        training, held_out = open_training_and_held_out(args, args.size, whole)
        prepared = Preprocessing(args.size, remove_borders=False)  # as what was generated is already
        synthetic = open_images(args.synthetic, prepared) if args.synthetic else None
        conditioner = open_conditioner(args)
        result, gate = evaluate_memorization(
            training,
            synthetic,
            held_out,
            extractor=open_extractor(args.extractor, args.weights, args.device),
            training_groups=read_patients(args, training),
            held_out_groups=read_patients(args, held_out),
            false_alarms=args.false_alarms,
            calibrate_on=args.calibrate_on,
            num_pairs=args.num_pairs,
            num_planted=args.num_planted,
            conditioner=conditioner,
            drawn=draw_again(args, conditioner) if args.prior else None,
            batch_size=args.batch_size,
        )
        result.save(output_dir / "memorization.json")
        gate.save(output_dir / "gate.safetensors")
        figure = plot_memorization(result)
        figure.savefig(output_dir / "distances.png", dpi=150, bbox_inches="tight")
        report = make_report(result)
        report.add_figure(figure, "Relative distance to the nearest training image.")
        if result.closest and args.draw_pairs:
            pairs = draw_closest_pairs(result, synthetic, training)
            pairs.save(output_dir / "pairs.png")
            report.add_image(pairs, "Closest pairs, nearest first: synthetic | its nearest training image.")
        report.save(output_dir / "report.html")
        for row in table_of_sets(result)[1]:
            print(*row, sep=" | ")
        print(f"Report: {output_dir / 'report.html'}\nGate:   {output_dir / 'gate.safetensors'}")


def open_conditioner(args: Arguments) -> DinoImageConditioner | None:
    """The conditioner of `--model`, which is a folder or a repository of a pipeline, or a folder of only that."""
    if not args.model:
        return None
    subfolder = None if is_only_conditioner(args.model) else "conditioner"
    return DinoImageConditioner.from_pretrained(args.model, subfolder=subfolder).to(args.device)


def is_only_conditioner(model: str) -> bool:
    return Path(model, "config.json").is_file()


def draw_again(args: Arguments, conditioner: DinoImageConditioner | None) -> Tensor:
    """The tokens that the prior drew first for each image of a synthetic set, whatever a gate said."""
    if not args.synthetic or conditioner is None:
        raise ValueError("--prior needs --synthetic, a set that it made, and --model, which it is for.")
    plan, pipe = load_plan(args.synthetic), DinoPriorPipeline.from_pretrained(args.prior).to(args.device)
    pipe.check_conditioner(conditioner)
    if plan.strategy != "prior" or plan.made_with["model"]["prior"] != fingerprint_model(pipe.prior):
        raise ValueError(f"{args.prior} is not the prior that {args.synthetic} was made with.")
    return PriorTokens(pipe, **plan.made_with["prior"]).of(plan).draw(range(len(plan.sources))).cpu()
