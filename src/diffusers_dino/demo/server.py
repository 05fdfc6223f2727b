"""Serve the demo: a model, example images, and Gradio with settings that keep images on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data import Preprocessing, open_images
from ..devices import device_of
from ..extras import require
from ..metrics.copy_gate import CopyGate
from ..pipelines import DinoPriorPipeline
from ..pipelines.checks import image_size
from ..pipelines.preparation import stored_preparation
from ..training.models import load_trained_pipeline
from .nearest import TrainingImages
from .reading import example_images

__all__ = ["launch", "read_logins"]

GATE = "gate.safetensors"  # as `evaluate memorization` calls it
VISITORS = 100  # whose images are kept; the one who was here longest ago has to drop an image again


def launch(
    model: str | Path,
    *,
    lora: str | Path | None = None,
    gate: str | Path | None = None,
    training_images: str | Path | None = None,
    prior: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    examples: str | Path | None = None,
    server_name: str = "127.0.0.1",
    server_port: int | None = None,
    logins: Sequence[tuple[str, str]] | None = None,
    share: bool = False,
) -> None:
    """Serve the page, print its address, and return when the process is interrupted.

    Args:
        model: A pipeline's folder or Hub id, or a checkpoint of a training.
        lora: A LoRA of its UNet, folder or Hub id.
        gate: File of a `CopyGate` of the training images, by default `gate.safetensors` in the model's folder if that
            is there. Beside each variation is then the nearest training image, and whether it is a near-copy.
        training_images: Folder or tars of these images, which every visitor may see, in place of the gate's small
            pictures. Without a gate one is calibrated on them, which takes a while and at least 299 images.
        prior: A DinoPriorPipeline of the model, for a tab that draws images of labels; folder or Hub id.
        device: Where to compute; by default a GPU if there is one.
        dtype: Type of the weights.
        examples: Folder or tars of images to choose from, which every visitor may see.
        server_name: Address to listen at; `"0.0.0.0"` lets other machines in.
        server_port: By default the first free one from 7860 on.
        logins: Names and passwords of those who may enter, as `read_logins` reads them; by default all may.
        share: Publish the page through Gradio's servers. Never with images of patients.
    """
    # Uploads and results lie in a folder that only this user can read and that is deleted at the end; Gradio's own
    # default outlives the program. Gradio reads its settings when it is imported.
    with tempfile.TemporaryDirectory(prefix="diffusers-dino-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
        for name in ("no_proxy", "NO_PROXY"):  # Gradio calls itself at the start, not through a hospital's proxy
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1")))
        require("gradio", "demo", "The demo needs Gradio")
        from starlette.middleware import Middleware

        from .page import LOOK, build_page

        pipe = load_trained_pipeline(model, None if dtype == torch.float32 else dtype)
        if lora:
            pipe.load_lora_weights(lora)
        pipe.to(device_of(0, device))
        drawer = None if prior is None else DinoPriorPipeline.from_pretrained(prior).to(device_of(0, device))
        if drawer is not None:
            drawer.check_conditioner(pipe.conditioner)
        shown = example_images(examples, image_size(pipe), count=6) if examples else []
        preparation = stored_preparation(pipe) or Preprocessing(remove_borders=False)
        known = known_images(model, gate, training_images, replace(preparation, size=image_size(pipe)))
        page, visitors = build_page(pipe, Path(model).name, shown, known, drawer)
        _, address, public = page.launch(
            server_name=server_name,
            server_port=server_port,
            auth=logins,
            share=share,
            max_file_size="200mb",
            state_session_capacity=VISITORS,
            app_kwargs={"middleware": [Middleware(visitors.watch)]},
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            **LOOK,
        )
        print(f"Open {public or address} in a browser; Ctrl+C ends the demo.", flush=True)
        page.block_thread()


def known_images(
    model: str | Path, gate: str | Path | None, source: str | Path | None, preparation: Preprocessing
) -> TrainingImages | None:
    """What variations are compared with: a gate's file, training images, both, or nothing; for `launch`."""
    beside = Path(model) / GATE
    path = gate or (beside if beside.is_file() else None)
    images = None
    if source:
        images = open_images(source, preparation, local_files_only=True)
    if path:
        return TrainingImages(CopyGate.load(path), images)
    return images and TrainingImages(CopyGate.calibrate(images), images)


def read_logins(path: str | Path) -> list[tuple[str, str]]:
    """Names and passwords from a file of lines `NAME:PASSWORD`; a file of none, which would let all in, is refused."""
    logins = [tuple(line.split(":", 1)) for line in Path(path).read_text().splitlines() if line.strip()]
    if not logins or not all(len(login) == 2 and all(login) for login in logins):
        raise ValueError(f"{path} must have a line NAME:PASSWORD for each who may enter.")
    return logins
