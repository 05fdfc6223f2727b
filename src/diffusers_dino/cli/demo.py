"""A page in the browser: variations of an image, blends of two, segments, findings drawn. It needs no network.

    diffusers-dino demo
    diffusers-dino demo --model org/name-or-path --device cuda --dtype bfloat16

In a clone of the repository it starts on the bundled model of real radiographs; elsewhere give --model.
docs/demo.md says how to serve it to others.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..demo import launch, read_logins
from .arguments import flag

MODEL, PRIOR = "examples/data/showcase", "examples/data/showcase-prior"
EXAMPLES = "examples/data/kermany"


@dataclass
class Arguments:
    model: str = flag(MODEL, "A pipeline's folder or Hub id, or a checkpoint of train_dino.py.", group="Model")
    lora: str | None = flag(None, "A LoRA of its UNet, folder or Hub id.")
    gate: str | None = flag(
        None,
        "gate.safetensors of `evaluate memorization`, by default the one in the model's folder: the nearest training "
        "image is shown beside each variation, and near-copies are labelled as such.",
    )
    training_images: str | None = flag(
        None,
        "Folder or tars of the gate's images, shown in place of its small pictures; one is made of them if need be.",
    )
    prior: str | None = flag(None, "Its DinoPriorPipeline, for a tab that draws findings; the bundled model has one.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    examples: str = flag(EXAMPLES, "Folder or tars of images to choose from; '' for none.")
    server_name: str = flag("127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.", group="Server")
    server_port: int | None = flag(None, "Port; by default the first free one from 7860 on.")
    auth_file: str | None = flag(None, "File with a line NAME:PASSWORD for each who may enter; by default all may.")
    share: bool = flag(False, "Publish the page through Gradio's servers. Never with images of patients.")


def main(args: Arguments) -> None:
    if args.model == MODEL and not Path(MODEL).is_dir():
        raise FileNotFoundError(f"The bundled model is only in a clone of the repository ({MODEL}): give --model.")
    bundled = args.examples == EXAMPLES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder of uploads goes with the program
    launch(
        args.model,
        lora=args.lora,
        gate=args.gate,
        training_images=args.training_images,
        prior=PRIOR if args.prior is None and args.model == MODEL and Path(PRIOR).is_dir() else args.prior,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        examples=None if bundled and not Path(EXAMPLES).parent.is_dir() else args.examples,
        server_name=args.server_name,
        server_port=args.server_port,
        logins=args.auth_file and read_logins(args.auth_file),
        share=args.share,
    )
