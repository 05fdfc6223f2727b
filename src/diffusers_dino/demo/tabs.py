"""The tabs of the page: variations of an image, what lies between two, segments, and images of findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from .. import DinoDiffusionPipeline, DinoPriorPipeline
from ..pipelines.pipeline_dino_interpolation import METHODS
from . import segments, tasks
from .calls import KEPT, NOT_YET, ONE_AT_A_TIME, PROGRESS, QUIET, chosen, explain_errors, offered, steps_of
from .nearest import TrainingImages
from .reading import DISPLAY, fitted
from .source import BUTTONS, PICTURE, WINDOWED, Input, Results, image_input
from .visitors import Visitors

__all__ = ["blend_tab", "findings_tab", "segments_tab", "variations_tab"]

POINTS = 9  # images on a path

# In the browser: the image of the strip at a fraction of its length. No server is asked, so it is there at once.
SHOW_POINT = "(fraction, strip) => strip?.length ? strip[Math.round(fraction * (strip.length - 1))].image : null"


def variations_tab(
    pipe: DinoDiffusionPipeline, model: str, image: gr.State, visitors: Visitors, known: TrainingImages | None
) -> Results:
    """Images generated from the tokens of the one that was chosen."""
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
        return shown_and_offered(made, "variation", "variations.zip", model, sampling, known, task="variations")

    run.click(make, [image, count, *sampling], [gallery, download], **ONE_AT_A_TIME)
    return {gallery: None, download: NOT_YET}


def gallery_of(name: str, label: str, known: TrainingImages | None) -> gr.Gallery:
    """Where generated images are shown; in pairs with their nearest training images where those are known."""
    gallery = gr.Gallery(elem_id=name, label=label, columns=4 if known else 2, buttons=BUTTONS, **WINDOWED)
    if known is not None:
        gr.Markdown(
            "Right of each is the nearest training image, with its distance from 0 to 1: the gate calls what is below "
            f"{known.gate.threshold:.2f} a near-copy.",
            elem_classes="note",
        )
    return gallery


def shown_and_offered(
    made: Sequence[Image.Image],
    picture_name: str,
    archive_name: str,
    model: str,
    sampling: tasks.SamplerSettings,
    known: TrainingImages | None,
    task: str,
    **asked: Any,
) -> tuple[list[tuple[Image.Image, str]], Any]:
    """Generated images for their gallery, and the archive of them for its button."""
    shown, nearness = told(made, sampling.seed, known)
    files = {f"{picture_name}_seed_{number}": picture for number, picture in enumerate(made, sampling.seed)}
    return shown, offered(archive_name, tasks.archive(files, model, sampling, task=task, **nearness, **asked))


def told(
    made: Sequence[Image.Image], seed: int, known: TrainingImages | None
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
    known: TrainingImages | None,
) -> None:
    """Images of labels, whose tokens a prior draws."""
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
        asked = {"present": present, "absent": absent, "prior_guidance": strength}
        return shown_and_offered(made, "drawn", "drawn.zip", model, sampling, known, task="findings", **asked)

    run.click(make, [present, absent, strength, count, *sampling], [gallery, download], **ONE_AT_A_TIME)


def blend_tab(
    pipe: DinoDiffusionPipeline, model: str, source: gr.State, examples: Sequence[Image.Image], visitors: Visitors
) -> tuple[Input, Results]:
    """Images between the one that was chosen and another, for which there is a place here."""
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
    """Segments of the image that was chosen, drawn over it."""
    segmenter = segments.Segmenter(pipe)
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
        shown = fitted(segmented[0], DISPLAY)
        return segments.overlay(shown, segments.labels_of(segmented[1], shown), opacity), off, off

    @explain_errors
    def files(segmented, opacity):
        if segmented is None:
            return gr.skip(), gr.skip()
        image, maps = segmented
        labels = segments.labels_of(maps, image)
        numbers, painted = tasks.png(segments.mask_image(labels)), tasks.png(segments.overlay(image, labels, opacity))
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


def sampling_inputs() -> list[gr.components.Component]:
    """What `tasks.SamplerSettings` takes, in its order."""
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(1, tasks.MOST_STEPS, 20, step=1, label="Steps"),
            gr.Slider(1, 10, 2, step=0.1, label="Guidance", info="1 is none"),
            gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed"),
            gr.Dropdown(list(tasks.SCHEDULERS), value=tasks.SamplerSettings().scheduler, label="Scheduler"),
        ]
