"""The page of the demo: an image, and tabs. `server` sets Gradio up before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from .. import DinoDiffusionPipeline, DinoPriorPipeline
from .calls import KEPT
from .nearest import TrainingImages
from .source import accept_images, image_input
from .tabs import blend_tab, findings_tab, segments_tab, variations_tab
from .visitors import Visitors

__all__ = ["LOOK", "build_page"]

WAITING = 24  # jobs of all visitors

NOTE = (
    "What is generated here is **synthetic**. This is not a medical device: nothing it makes may be used to diagnose "
    "or treat a patient. Images stay on the machine that serves this page and are deleted after an hour."
)
LOOK = {
    # The system's fonts: a page behind a firewall cannot fetch others
    "theme": gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # contrasts of 4.5 and more
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued_dark="*neutral_300",
    ),
    "css_paths": Path(__file__).with_name("page.css"),
    "js": Path(__file__).with_name("page.js").read_text(encoding="utf-8"),
}

# In the browser: brightness b of what is shown becomes (b - level) / window + 1/2. Pixels stay as they are.
WINDOW = """<svg width="0" height="0" aria-hidden="true"><filter id="window" color-interpolation-filters="sRGB">
<feComponentTransfer><feFuncR type="linear"/><feFuncG type="linear"/><feFuncB type="linear"/></feComponentTransfer>
</filter></svg>"""
SET_WINDOW = """(width, level) => document.querySelectorAll("#window [type=linear]").forEach(part => {
    part.setAttribute("slope", 100 / width);
    part.setAttribute("intercept", 0.5 - level / width);
})"""
ZOOM = """<div id="zoom" role="group" aria-label="Zoom of all pictures" title="All pictures in step; also by Ctrl and
the wheel over a picture, and by dragging it">
<label>Zoom <input type="range" name="zoom" min="1" max="8" step="0.1" value="1"></label>
<label>Across <input type="range" name="across" min="0" max="100" value="50"></label>
<label>Down <input type="range" name="down" min="0" max="100" value="50"></label>
</div>"""


def build_page(
    pipe: DinoDiffusionPipeline,
    model: str,
    examples: Sequence[Image.Image],
    known: TrainingImages | None = None,
    prior: DinoPriorPipeline | None = None,
) -> tuple[gr.Blocks, Visitors]:
    """The page on a pipeline, which it calls `model`, and who is to watch its server.

    The first of the examples is chosen already. Beside each variation is the nearest one of the known training images,
    and whether a gate takes it for a copy. With a prior of the model there is a tab that draws images of labels and of
    no image.
    """
    visitors = Visitors()
    with gr.Blocks(title="diffusers-dino", delete_cache=(60, KEPT), analytics_enabled=False) as page:
        about = "A diffusion model that sees an image through its DINO tokens."
        gr.Markdown(f"# diffusers-dino\n{about} Model: `{model}`")
        with gr.Row():
            with gr.Column(scale=2, elem_id="source"):
                source = image_input(examples, 6)
                viewing()
            with gr.Column(scale=3):
                with gr.Tab("Variations", elem_id="variations-tab"):
                    results = variations_tab(pipe, model, source.image, visitors, known)
                with gr.Tab("Blend", elem_id="blend-tab"):
                    target, blended = blend_tab(pipe, model, source.image, examples[::-1], visitors)
                with gr.Tab("Segments", elem_id="segments-tab"):
                    results |= segments_tab(pipe, source.image, visitors)
                if prior is not None:
                    with gr.Tab("Findings", elem_id="findings-tab"):
                        findings_tab(pipe, prior, model, visitors, known)
        gr.Markdown(NOTE, elem_classes="note")
        accept_images(pipe, source, results | blended, visitors)
        accept_images(pipe, target, blended, visitors)
    visitors.model_calls = {number for number, fn in page.fns.items() if fn.concurrency_id == "model"}
    return page.queue(max_size=WAITING, api_open=False), visitors


def viewing() -> None:
    """How all pictures are shown, in the browser: nothing changes in what is computed and downloaded."""
    with gr.Accordion("Window and level", open=False):
        width = gr.Slider(1, 100, 100, step=1, label="Window", info="% of the range. Only what is shown changes")
        level = gr.Slider(0, 100, 50, step=1, label="Level", info="% of the range that becomes middle gray")
    gr.HTML(WINDOW + ZOOM, padding=False)
    for slider in (width, level):
        slider.change(None, [width, level], None, js=SET_WINDOW)
