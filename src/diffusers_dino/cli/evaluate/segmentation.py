r"""Zero-shot segmentation, measured: the paper's Table 2 and Figs 9-12, and what goes beyond DiffSeg, on your images.

    diffusers-dino evaluate segmentation --pipeline outputs/model --data /data/lungs --output_dir outputs/segmentation

`--data` takes folders with `images` and `masks`, webdataset tars, or `NAME=FOLDER`, where NAME may be a data set of
the catalogue (jsrt, montgomery, shenzhen). `--pipeline` takes pipelines, checkpoints of a training run, or
`NAME=PATH`, where paths of one name are checkpoints of one model. Segments are kept in `--output_dir`: the same
command continues after a kill. What is chosen with the help of masks is chosen on other patients than it is scored on.
Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from ...conditioner import DinoImageConditioner
from ...data import Preprocessing, sources
from ...data.sources.masks import MaskedImages, open_masked_images
from ...devices import device_of
from ...evaluation import Sweep, evaluate_segmentation
from ...evaluation.generation import Model, load_models
from ...evaluation.segmentation.plot import draw_segmentation
from ...evaluation.segmentation.protocol import file_name
from ...evaluation.segmentation.table import format_segmentation_table
from ...evaluation.table_text import write_tables
from ...pipelines import DiffSegPipeline
from ...pipelines.preparation import preparation_for, stored_preparation
from ..arguments import flag, name_and_path, settings_of
from ..console import hold_output, show_messages
from ..image_flags import BORDERS


@dataclass
class Arguments:
    pipeline: list[str] = flag([], "DinoDiffusionPipelines or checkpoints, as PATH or NAME=PATH.", group="Models")
    stable_diffusion: str | None = flag(None, "A Stable Diffusion to show beside them, with the empty prompt.")
    encoder: list[str] = flag([], "Encoders that segment without a diffusion model, as PATH or NAME=PATH.")
    untrained: bool = flag(True, "Show each model's UNet before training beside it.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "Type of the weights.")
    data: list[str] = flag([], "Images and masks, as FOLDER, TARS or NAME=FOLDER.", group="Data")
    max_samples: int | None = flag(None, "Use only the first images of a data set.")
    remove_borders: bool | None = flag(
        None, f"{BORDERS} Borders stay on for models that do not say, and Stable Diffusion."
    )
    mask_size: int = flag(256, "Side in pixels that Dice coefficients are taken at.")
    size: int | None = flag(None, "Side in pixels that the models see images at; by default their own.", group="Sweep")
    methods: list[str] = flag(["diffseg"], "Among diffseg, walk, cut, clusters: each makes rows of its own.")
    features: list[str] = flag(["encoder"], "Of cut and clusters: unet, encoder, unet+encoder.")
    timesteps: list[int] = flag([1, 50, 100, 300], "Timesteps of the attention that is read.")
    thresholds: list[float] = flag([0.2, 0.25, 0.3, 0.35, 0.4, 0.5], "Merge thresholds of diffseg.")
    cut_thresholds: list[float] = flag([0.1, 0.2, 0.3, 0.5, 0.7], "Largest costs of a cut, for walk and cut.")
    num_clusters: list[int] = flag([*range(4, 13)], "Numbers of clusters, of which the most stable one is taken.")
    encoder_size: int | None = flag(None, "Side in pixels that encoders see for features; by default their own.")
    encoder_layer: int | None = flag(None, "Layer of encoders that gives features; by default at 3/4 of the depth.")
    absolute_thresholds: bool = flag(False, "Thresholds in nats, not in units of the mean divergence of an image.")
    layers: list[str] = flag(["all"], "Attention layers: `all`, or names of layers or blocks joined by +.")
    num_merges: int = flag(3, "Passes of merging.")
    refine: bool = flag(True, "Refine segments by k-means.")
    add_noise: bool = flag(False, "Show the model noised latents in place of clean ones.")
    seed: int = flag(0, "Of the split in halves, the bootstrap, k-means and noise.")
    batch_size: int = flag(8, "Images in a unit of work.")
    output_dir: str = flag("segmentation", "Where segments, results, tables and figures go.", group="Output")
    num_examples: int = flag(6, "Best and worst images to draw of each model; 0 draws no patient.")


def main(args: Arguments) -> None:
    show_messages("diffusers_dino.evaluation")
    if not args.data or not (args.pipeline or args.stable_diffusion or args.encoder):
        raise ValueError("Give --data, and --pipeline, --encoder or --stable_diffusion.")
    if args.num_examples < 0:
        raise ValueError(f"--num_examples must not be negative, got {args.num_examples}.")
    with hold_output(args.output_dir) as output_dir:
        preparation = prepare_as_in_training(args)
        data_sets = {name: open_data(name, path, args, preparation) for name, path in map(name_and_path, args.data)}
        if len(data_sets) < len(args.data):
            raise ValueError(f"Two of {args.data} have one name: give them as NAME=PATH.")
        sweeps = make_sweeps(args)
        results = []
        for name, images in data_sets.items():
            folder = output_dir / file_name(name)
            study = evaluate_segmentation(
                (checked(model, images) for model in open_models(args)),
                images,
                folder / "segments",
                sweeps,
                dataset=name,
                untrained=args.untrained,
                batch_size=args.batch_size,
                seed=args.seed,
            )
            study.result.save(folder / "result.json")
            draw_segmentation(study, images, folder, args.num_examples)
            results.append(study.result)
        print(write_tables(output_dir, lambda style: format_segmentation_table(results, style)))


def make_sweeps(args: Arguments) -> list[Sweep]:
    """One for each method, and of cuts and clusters for each kind of features."""
    sweeps, relative = [], not args.absolute_thresholds
    for method in args.methods:
        thresholds = args.cut_thresholds if method in ("walk", "cut") else args.thresholds
        for features in args.features if method in ("cut", "clusters") else args.features[:1]:
            kinds = features.split("+") if method in ("cut", "clusters") else ["encoder"]
            own = {"method": method, "features": kinds, "thresholds": thresholds}
            sweeps.append(settings_of(Sweep, args, relative=relative, **own))
    return sweeps


def prepare_as_in_training(args: Arguments) -> Preprocessing:
    """How the first model was trained to see images, at the size of masks; ValueError if the flag contradicts it."""
    stored = stored_preparation(next(open_models(args)).pipe) if args.pipeline else None
    if stored is None:
        return Preprocessing(args.mask_size, bool(args.remove_borders))
    return preparation_for(stored, args.mask_size, args.remove_borders)


def open_data(name: str, path: str, args: Arguments, preparation: Preprocessing) -> MaskedImages:
    """A data set of the catalogue if the name is one of its, else a folder or tars."""
    known = name in sources.source_names() and Path(path).is_dir() and not (Path(path) / "images").is_dir()
    source = sources.open_source(name, path) if known else path
    return open_masked_images(source, args.mask_size, args.mask_size, args.max_samples, preparation)


def checked(model: Model, images: MaskedImages) -> Model:
    """Refuse a model that was trained on images prepared in another way than the first one's."""
    if (stored := stored_preparation(model.pipe)) is not None:
        preparation_for(stored, images.size, images.preprocessing.remove_borders)
    return model


def open_models(args: Arguments) -> Iterator[Model]:
    """All models, one in memory at a time."""
    device = torch.device(device_of(0, args.device))
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    named = [name_and_path(text) for text in args.pipeline]
    names = [name for name, _ in named]
    for model, (name, path) in zip(load_models(named, device=device, dtype=dtype), named, strict=True):
        yield model._replace(checkpoint=Path(path).name if names.count(name) > 1 else "")
    for name, path in map(name_and_path, args.encoder):
        conditioner = DinoImageConditioner.from_encoder(path, tokens="patch").to(device)
        yield Model(name, DiffSegPipeline(conditioner=conditioner if dtype is None else conditioner.to(dtype)))
    if args.stable_diffusion:
        options = {} if dtype is None else {"dtype": dtype}
        pipe = DiffusionPipeline.from_pretrained(args.stable_diffusion, use_safetensors=True, **options)
        yield Model("Stable Diffusion", pipe.to(device))
