"""The page of the demo: an image, and tabs over `tasks`. `server` sets Gradio up before."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image

from .. import DinoDiffusionPipeline, DinoPriorPipeline
from ..pipelines.pipeline_dino_interpolation import METHODS
from . import tasks
from .visitors import GoneError, Visitors

__all__ = ["LOOK", "build_page"]

KEPT = 3600  # seconds that a visitor's images and files are kept
POINTS = 9  # images on a path
WAITING = 24  # jobs of all visitors

ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}  # for all visitors
QUIET = {"show_progress": "hidden", "api_visibility": "private"}

PROGRESS = gr.Progress()  # as a default: Gradio then gives the function one of the call
BUTTONS = ["download", "fullscreen"]  # and not the one that uploads to a forum
PICTURE = {"show_label": False, "format": "png", "interactive": False, "elem_classes": "picture"}  # not a lossy format
WINDOWED = PICTURE | {"elem_classes": "picture windowed"}
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

# In the browser: the image of the strip at a fraction of its length. No server is asked, so it is there at once.
SHOW_POINT = "(fraction, strip) => strip?.length ? strip[Math.round(fraction * (strip.length - 1))].image : null"

# In the browser, too: brightness b of what is shown becomes (b - level) / window + 1/2. Pixels stay as they are.
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

NOT_YET = gr.update(value=None, interactive=False)  # of a download
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


def build_page(
    pipe: DinoDiffusionPipeline,
    model: str,
    examples: Sequence[Image.Image],
    known: tasks.TrainingImages | None = None,
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


def variations_tab(
    pipe: DinoDiffusionPipeline, model: str, image: gr.State, visitors: Visitors, known: tasks.TrainingImages | None
) -> Results:
    with gr.Row():
        count = gr.Slider(1, tasks.MOST_VARIATIONS, 4, step=1, label="Number of variations")
        run = gr.Button("Make variations", variant="primary")
    sampling = sampling_inputs()
    gallery = gallery_of("variations", "Variations", known)
    download = gr.DownloadButton("Download all (ZIP)", interactive=False)

    @explain_errors
    def make(image, count, steps, guidance, seed, scheduler, request: gr.Request, progress=PROGRESS):
        on_step = steps_of(visitors, request, progress)
        sampling = tasks.SamplerSettings(steps, guidance, seed, scheduler)
        made = tasks.vary(pipe, chosen(image), count, sampling, on_step)
        on_step(1)
        files = {f"variation_seed_{number}": picture for number, picture in enumerate(made, seed)}
        shown, facts = told(made, seed, known)
        return shown, offered("variations.zip", tasks.archive(files, model, sampling, task="variations", **facts))

    run.click(make, [image, count, *sampling], [gallery, download], **ONE_AT_A_TIME)
    return {gallery: None, download: NOT_YET}


def gallery_of(name: str, label: str, known: tasks.TrainingImages | None) -> gr.Gallery:
    """Where generated images are shown; in pairs with their nearest training images where those are known."""
    gallery = gr.Gallery(elem_id=name, label=label, columns=4 if known else 2, buttons=BUTTONS, **WINDOWED)
    if known is not None:
        gr.Markdown(
            "Right of each is the nearest training image, with its distance from 0 to 1: the gate calls what is below "
            f"{known.gate.threshold:.2f} a near-copy.",
            elem_classes="note",
        )
    return gallery


def told(
    made: Sequence[Image.Image], seed: int, known: tasks.TrainingImages | None
) -> tuple[list[tuple[Image.Image, str]], dict[str, Any]]:
    """What a gallery shows, with captions, and what the archive tells besides: seeds, and what is near each image."""
    captions = [f"seed {number}" for number in range(seed, seed + len(made))]
    if known is None:
        return list(zip(made, captions, strict=True)), {}
    shown, found = [], known.nearest(made)
    for picture, caption, near in zip(made, captions, found, strict=True):
        verdict = f"{'NEAR-COPY' if near.is_copy else 'nearest: no copy'} ({near.distance:.2f})"
        if near.picture is None:
            shown.append((picture, f"{caption}, {verdict}"))
        else:
            shown += [(picture, caption), (near.picture, verdict)]
    return shown, {
        "near_copies": [number for number, near in enumerate(found, seed) if near.is_copy],
        "distance_to_training_images": [round(near.distance, 4) for near in found],
    }


def findings_tab(
    pipe: DinoDiffusionPipeline,
    prior: DinoPriorPipeline,
    model: str,
    visitors: Visitors,
    known: tasks.TrainingImages | None,
) -> None:
    gr.Markdown("Drawn by a prior from only these names; the image on the left is not used.")
    present = gr.CheckboxGroup(list(prior.labels), label="Draw images with", info="None: of anything")
    absent = gr.CheckboxGroup(list(prior.labels), label="and without", info="What is in neither may be there")
    with gr.Row():
        strength = gr.Slider(1, 5, 2, step=0.1, label="How plainly", info="Guidance of the prior; 1 is none")
        count = gr.Slider(1, tasks.MOST_VARIATIONS, 4, step=1, label="Number of images")
        run = gr.Button("Draw", variant="primary")
    sampling = sampling_inputs()
    gallery = gallery_of("drawn", "Drawn images", known)
    download = gr.DownloadButton("Download all (ZIP)", interactive=False)

    @explain_errors
    def make(present, absent, strength, count, steps, scale, seed, scheduler, request: gr.Request, progress=PROGRESS):
        on_step = steps_of(visitors, request, progress)
        sampling = tasks.SamplerSettings(steps, scale, seed, scheduler)
        made = tasks.draw(pipe, prior, present, absent, strength, count, sampling, on_step)
        on_step(1)
        files = {f"drawn_seed_{number}": picture for number, picture in enumerate(made, seed)}
        shown, facts = told(made, seed, known)
        facts |= {"present": present, "absent": absent, "prior_guidance": strength}
        return shown, offered("drawn.zip", tasks.archive(files, model, sampling, task="findings", **facts))

    run.click(make, [present, absent, strength, count, *sampling], [gallery, download], **ONE_AT_A_TIME)


def blend_tab(
    pipe: DinoDiffusionPipeline, model: str, source: gr.State, examples: Sequence[Image.Image], visitors: Visitors
) -> tuple[Input, Results]:
    with gr.Row():
        with gr.Column(scale=2, min_width=160):
            gr.Markdown("From the image on the left to:")
            target = image_input(examples, 3)
            method = gr.Radio(METHODS, value="lerp", label="Between the tokens", info="Straight, or on an arc")
            sampling = sampling_inputs()
            run = gr.Button("Blend", variant="primary")
        with gr.Column(scale=3):
            picture = gr.Image(elem_id="blend", label="Between", height=400, buttons=BUTTONS, **WINDOWED)
            fraction = gr.Slider(0, 1, 0.5, step=1 / (POINTS - 1), label="Fraction of the way")
    strip = gr.Gallery(
        elem_id="path", label="From one to the other", columns=POINTS, allow_preview=False, buttons=[], **WINDOWED
    )
    download = gr.DownloadButton("Download all (ZIP)", interactive=False)

    @explain_errors
    def make(source, target, method, steps, guidance, seed, scheduler, request: gr.Request, progress=PROGRESS):
        on_step = steps_of(visitors, request, progress)
        sampling = tasks.SamplerSettings(steps, guidance, seed, scheduler)
        made = tasks.blend(pipe, chosen(source), chosen(target), POINTS, method, sampling, on_step)
        on_step(1)
        files = {f"blend_{place / (POINTS - 1):.3f}": picture for place, picture in enumerate(made)}
        return made, offered("blend.zip", tasks.archive(files, model, sampling, task="blend", method=method))

    def choose(event: gr.SelectData):
        return event.index / (POINTS - 1)

    show = {"fn": None, "inputs": [fraction, strip], "outputs": picture, "js": SHOW_POINT}
    run.click(make, [source, target.image, method, *sampling], [strip, download], **ONE_AT_A_TIME).success(**show)
    fraction.change(**show)
    strip.select(choose, None, fraction, **QUIET)
    return target, {picture: None, strip: None, download: NOT_YET}


def segments_tab(pipe: DinoDiffusionPipeline, image: gr.State, visitors: Visitors) -> Results:
    segmenter = tasks.Segmenter(pipe)
    first, last = segmenter.settings, segmenter.last_timestep
    with gr.Row():
        with gr.Column(scale=2, min_width=160):
            threshold = gr.Slider(
                *(0.02, max(1, first.merge_threshold), first.merge_threshold),
                step=0.01,
                label="Merge threshold",
                info="Higher: fewer segments",
            )
            timestep = gr.Slider(
                0, last, first.timestep, step=1, label="Timestep", info="Of the noise that the model expects"
            )
            layer = gr.Dropdown(segmenter.layers, value=segmenter.layer, label="Self-attention of")
            run = gr.Button("Segment", variant="primary")
        with gr.Column(scale=3):
            picture = gr.Image(elem_id="segments", label="Segments", height=480, buttons=BUTTONS, **PICTURE)
            summary = gr.Markdown()
            opacity = gr.Slider(0, 1, 0.35, step=0.05, label="Opacity")
            with gr.Row():
                mask = gr.DownloadButton("Download mask (PNG)", interactive=False)
                overlay = gr.DownloadButton("Download overlay (PNG)", interactive=False)
    segmented = gr.State(time_to_live=KEPT)  # image and maps, which belong together

    @explain_errors
    def segment(image, threshold, timestep, layer, opacity, request: gr.Request):
        check = visitors.begin(request.session_hash)
        maps = segmenter.segment(chosen(image), int(timestep), threshold, layer)
        check()
        return (image, maps), f"{len(maps)} segment{'s' * (len(maps) > 1)}", *paint((image, maps), opacity)

    def paint(segmented, opacity):
        """The picture at once; the files follow it, and are not offered until they fit."""
        off = gr.update(interactive=False)
        if segmented is None:
            return None, off, off
        shown = tasks.fitted(segmented[0], tasks.DISPLAY)
        return tasks.overlay(shown, tasks.labels_of(segmented[1], shown), opacity), off, off

    @explain_errors
    def files(segmented, opacity):
        if segmented is None:
            return gr.skip(), gr.skip()
        image, maps = segmented
        labels = tasks.labels_of(maps, image)
        numbers, painted = tasks.png(tasks.mask_image(labels)), tasks.png(tasks.overlay(image, labels, opacity))
        return offered("mask.png", numbers), offered("overlay.png", painted)

    inputs, outputs = [image, threshold, timestep, layer, opacity], [segmented, summary]
    shown = [picture, mask, overlay]
    latest = {"trigger_mode": "always_last"}  # while a slider moves
    triggers = run.click, threshold.change, timestep.change, layer.change
    events = [trigger(segment, inputs, outputs + shown, **latest, **ONE_AT_A_TIME) for trigger in triggers]
    events.append(opacity.change(paint, [segmented, opacity], shown, **latest, **QUIET))
    for event in events:
        event.success(files, [segmented, opacity], [mask, overlay], **QUIET)
    return {segmented: None, summary: "", picture: None, mask: NOT_YET, overlay: NOT_YET}


def image_input(examples: Sequence[Image.Image], columns: int) -> Input:
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
            opened = tasks.open_image(path, gr.Warning)
        finally:
            Path(path).unlink(missing_ok=True)
        return opened, tasks.fitted(opened, tasks.DISPLAY)

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


def viewing() -> None:
    """How all pictures are shown, in the browser: nothing changes in what is computed and downloaded."""
    with gr.Accordion("Window and level", open=False):
        width = gr.Slider(1, 100, 100, step=1, label="Window", info="% of the range. Only what is shown changes")
        level = gr.Slider(0, 100, 50, step=1, label="Level", info="% of the range that becomes middle gray")
    gr.HTML(WINDOW + ZOOM, padding=False)
    for slider in (width, level):
        slider.change(None, [width, level], None, js=SET_WINDOW)


def sampling_inputs() -> list[gr.components.Component]:
    """What `tasks.SamplerSettings` takes, in its order."""
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(1, tasks.MOST_STEPS, 20, step=1, label="Steps"),
            gr.Slider(1, 10, 2, step=0.1, label="Guidance", info="1 is none"),
            gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed"),
            gr.Dropdown(list(tasks.SCHEDULERS), value=tasks.SamplerSettings().scheduler, label="Scheduler"),
        ]


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
