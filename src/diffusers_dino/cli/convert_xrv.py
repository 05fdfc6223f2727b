r"""Turn TorchXRayVision's published weights into safetensors, once, and print their SHA-256.

    diffusers-dino convert-xrv --weights nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-...-best.pt \
        --output xrv.safetensors

Nothing is downloaded: fetch `densenet121-res224-all` from torchxrayvision's release v1 yourself. The hash also goes to
OUTPUT.sha256, and is checked whenever the file is used. docs/metrics.md says more.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..metrics.extractors.xrv import convert_xrv_weights
from .arguments import flag


@dataclass
class Arguments:
    weights: str | None = flag(None, "torchxrayvision's file.")
    output: str = flag("xrv.safetensors", "File to write.")
    sha256: str | None = flag(None, "Of another file of the same network that you trust.")


def main(args: Arguments) -> None:
    if args.weights is None:
        raise ValueError("Name torchxrayvision's file: --weights FILE.")
    print(f"{convert_xrv_weights(args.weights, args.output, args.sha256)}  {args.output}")
