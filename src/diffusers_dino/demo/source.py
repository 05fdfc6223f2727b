"""Where an image is dropped or chosen, and what goes when another one comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from .. import DinoDiffusionPipeline
from . import tasks
from .calls import KEPT, QUIET, explain_errors
from .reading import DISPLAY, fitted, open_image
from .visitors import Visitors

__all__ = ["BUTTONS", "PICTURE", "WINDOWED", "Input", "Results", "accept_images", "image_input"]

BUTTONS = ["download", "fullscreen"]  # and not the one that uploads to a forum
PICTURE = {"show_label": False, "format": "png", "interactive": False, "elem_classes": "picture"}  # not a lossy format
WINDOWED = PICTURE | {"elem_classes": "picture windowed"}
UNLIKE = (
    "⚠ **Unlike the images that the model was trained on** (familiarity {:.1g}; theirs are below 0.01 once in a "
    "hundred times). What it makes of this image looks like its training images all the same."
)
Results = dict[gr.components.Component, Any]  # what a tab shows, and what it shows before there is a result


class Input(NamedTuple):
    """Where an image is dropped or chosen. The state holds it, 8 bits deep, only in the server's memory."""

    image: gr.State
    picture: gr.Image
    file: gr.File
    notice: gr.Markdown
    choices: gr.Gallery | None
    examples: Sequence[Image.Image]


def image_input(examples: Sequence[Image.Image], columns: int) -> Input:
    """A place for an image, the first of the examples to begin with; `accept_images` brings it to life."""
    first = examples[0] if examples else None
    image = gr.State(first, time_to_live=KEPT)
    picture = gr.Image(first, label="Source", height=240, buttons=["fullscreen"], **WINDOWED)
    notice = gr.Markdown(elem_classes="notice")
    file = gr.File(show_label=False, height=60, elem_classes="drop")
    gr.Markdown("PNG, JPEG, TIFF, NumPy or DICOM" + (", or one of these:" if examples else ""), elem_classes="note")
    choices = None
    if examples:
        choices = gr.Gallery(
            list(examples), label="Examples", columns=columns, allow_preview=False, buttons=[], **PICTURE
        )
    return Input(image, picture, file, notice, choices, examples)


def accept_images(pipe: DinoDiffusionPipeline, place: Input, results: Results, visitors: Visitors) -> None:
    """Let an image be dropped and chosen. What was made of the one before goes, also if the new one cannot be read.

    An image unlike the training images is used all the same, and a notice says so.
    """
    results = {place.notice: "", **results}
    shown, cleared = [place.image, place.picture, *results], list(results.values())

    def clear(request: gr.Request):
        visitors.replace_image(request.session_hash)
        return None, None, *cleared

    @explain_errors
    def read(path):
        if path is None:
            return gr.skip()
        try:
            opened = open_image(path, gr.Warning)
        finally:
            Path(path).unlink(missing_ok=True)
        return opened, fitted(opened, DISPLAY)

    def choose(event: gr.SelectData, request: gr.Request):
        visitors.replace_image(request.session_hash)
        return place.examples[event.index], place.examples[event.index], *cleared

    def judge(image):
        familiarity = None if image is None else tasks.unlike(pipe, image)
        return "" if familiarity is None else UNLIKE.format(familiarity)

    opened = place.file.upload(clear, None, shown, **QUIET).then(
        read, place.file, [place.image, place.picture], api_visibility="private"
    )
    for done in (opened.success, opened.failure):  # then free the place for the next file, also after a broken one
        done(None, None, place.file, js="() => null")
    opened.success(judge, place.image, place.notice, **QUIET)
    if place.choices is not None:
        place.choices.select(choose, None, shown, **QUIET)
