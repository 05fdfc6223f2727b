"""What a visitor starts: one call of the model at a time, with its progress, its errors and its files."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from . import tasks
from .visitors import GoneError, Visitors

__all__ = ["KEPT", "NOT_YET", "ONE_AT_A_TIME", "PROGRESS", "QUIET", "chosen", "explain_errors", "offered", "steps_of"]

KEPT = 3600  # seconds that a visitor's images and files are kept
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}  # for all visitors
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
PROGRESS = gr.Progress()  # as a default: Gradio then gives the function one of the call
NOT_YET = gr.update(value=None, interactive=False)  # of a download


def steps_of(visitors: Visitors, request: gr.Request, progress: gr.Progress) -> tasks.OnStep:
    """What a call of the model tells of its steps: the page shows them, and the call ends when nobody wants it."""
    check = visitors.begin(request.session_hash)

    def on_step(done: float) -> None:
        check()
        progress(done)

    return on_step


def chosen(image: Image.Image | None) -> Image.Image:
    """The image, or an error that tells the visitor to choose one."""
    if image is None:
        raise ValueError("Drop an image, or choose an example.")
    return image


def offered(name: str, content: bytes) -> Any:
    """A download of a file, which Gradio deletes after `KEPT` seconds like all files in its folder."""
    path = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name
    path.write_bytes(content)
    return gr.update(value=str(path), interactive=True)


def explain_errors(function: Callable) -> Callable:
    """Show the visitor why a call cannot work; any other error is a bug and goes to the log.

    A call that nobody waits for changes nothing. Afterwards its memory goes back to the system.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except GoneError:
            return gr.skip()
        except torch.OutOfMemoryError as error:
            raise gr.Error("The device has no memory left: ask for fewer images.", print_exception=False) from error
        except (ValueError, TypeError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            tasks.release_memory()

    return wrapped
