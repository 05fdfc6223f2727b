r"""A page in the browser: variations of an image, blends of two, segments. It needs no network.

    diffusers-dino demo
    diffusers-dino demo --model org/name-or-path --device cuda --dtype bfloat16

Without flags it starts on the bundled tiny model of phantom radiographs. docs/demo.md says how to serve it to others.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .. import DinoDiffusionPipeline
from ..demo import tasks as app_tasks
from ..devices import device_of
from ..training.models import load_trained_pipeline
from .arguments import flag

DATA = Path("examples/data")  # in a clone; elsewhere --model says which model


@dataclass
class Arguments:
    model: str = flag(
        str(DATA / "tiny-diffusion"), "A pipeline's folder or Hub id, or a checkpoint of train_dino.py.", group="Model"
    )
    lora: str | None = flag(None, "A LoRA of its UNet, folder or Hub id.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    examples: str | None = flag(
        str(DATA / "phantom-cxr" / "phantom-cxr-test-*.tar"), "Folder or tars of images to choose from; '' for none."
    )
    server_name: str = flag("127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.", group="Server")
    server_port: int | None = flag(None, "Port; by default the first free one from 7860 on.")
    auth_file: str | None = flag(None, "File with a line NAME:PASSWORD for each who may enter; by default all may.")
    share: bool = flag(False, "Publish the page through Gradio's servers. Never with images of patients.")


def main(args: Arguments) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder of uploads goes with the program
    with private_gradio():
        try:
            from ..demo.page import LOOK, build_page  # reads the environment that was just set
        except ImportError as error:
            raise ImportError("The demo needs Gradio: pip install diffusers-dino[demo]") from error
        pipe = load_pipeline(args)
        examples = app_tasks.example_images(args.examples, app_tasks.model_size(pipe), 6) if args.examples else []
        page = build_page(pipe, Path(args.model).name, examples)
        _, address, public = page.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            auth=read_logins(args.auth_file),
            share=args.share,
            max_file_size="200mb",
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            **LOOK,
        )
        print(f"Open {public or address} in a browser; Ctrl+C ends the demo.", flush=True)
        page.block_thread()


def load_pipeline(args: Arguments) -> DinoDiffusionPipeline:
    """The model with its LoRA, on its device."""
    pipe = load_trained_pipeline(args.model, None if args.dtype == "float32" else getattr(torch, args.dtype))
    if args.lora:
        pipe.load_lora_weights(args.lora)
    return pipe.to(device_of(0, args.device))


def read_logins(path: str | None) -> list[tuple[str, str]] | None:
    """Names and passwords, one `NAME:PASSWORD` a line."""
    if path is None:
        return None
    logins = [tuple(line.split(":", 1)) for line in Path(path).read_text().splitlines() if line.strip()]
    if not logins or not all(len(login) == 2 and all(login) for login in logins):
        raise ValueError(f"{path} must have a line NAME:PASSWORD for each who may enter.")
    return logins


@contextmanager
def private_gradio() -> Iterator[None]:
    """Gradio's settings, which it reads when it is imported: no telemetry, and a folder that nobody else may read.

    Uploads and results are in that folder, which is deleted at the end; Gradio's own default outlives the program.
    """
    with tempfile.TemporaryDirectory(prefix="diffusers-dino-demo-", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
        for name in ("no_proxy", "NO_PROXY"):  # Gradio calls itself at the start, not through a hospital's proxy
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1")))
        yield
