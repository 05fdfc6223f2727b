r"""All that can be asked of a set of synthetic images, in one report: fidelity, copies, patients, labels, utility.

    diffusers-dino evaluate suite --synthetic outputs/synthetic --real /data/test --training /data/train \
        --table /data/cxr.csv --model my-model --size 64 --output_dir outputs/suite

Images of any model are taken: folders, webdataset tars, sets of `synthesise` (whose labels and sources are known), or
`NAME=FOLDER` of `diffusers-dino sources`. Only --synthetic and --real are needed; a question that lacks something says
so, and what to give.
Writes `suite.json`, `report.html`, and tables for Markdown, LaTeX and spreadsheets. Stopped, the same command goes on.
Needs the extra `eval`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ...data import Preprocessing
from ...data.stores.folder import image_key
from ...data.tables import CsvTable
from ...devices import device_of
from ...evaluation.image_sets import ImageSet, open_image_set
from ...evaluation.suite.page import make_page
from ...evaluation.suite.protocol import SuiteProgress, SuiteSettings, evaluate_suite
from ...evaluation.suite.table import format_suite_table
from ...evaluation.table_text import write_tables
from ...metrics import open_extractor
from ...pipelines.preparation import preparation_for
from ...synthesis import SyntheticSet
from ...training.models import load_trained_pipeline
from ..arguments import flag, settings_of
from ..console import hold_output, show_messages
from ..image_flags import BORDERS, prepared_as_sources


@dataclass
class Arguments:
    synthetic: str | None = flag(None, "Generated images.", group="Images")
    real: str | None = flag(None, "Real images that the generator was not trained on.")
    training: str | None = flag(None, "Images that it was trained on.")
    table: str | None = flag(None, "CSV of labels and patients of real images, or `stored` beside them in shards.")
    training_table: str | None = flag(None, "The same of training images, where it is another file.")
    key_column: str = flag("file", "Its column of keys or file names.")
    label_column: str = flag("findings", "Its column of labels, joined by |.")
    patient_column: str = flag("patient", "Its column of patients.")
    synthetic_table: str | None = flag(
        None, "CSV of the synthetic images, or `stored`; sets of `synthesise` need none."
    )
    synthetic_key_column: str = flag("file", "Its column of keys or file names.")
    synthetic_label_column: str = flag("labels", "Its column of labels, joined by |.")
    source_column: str = flag("sources", "Its column of the training image that each was made from.")
    size: int = flag(128, "Side in pixels that images are prepared at.")
    remove_borders: bool | None = flag(None, BORDERS)
    max_unreadable: float = flag(0.05, "Largest tolerated share of images that cannot be read.")
    features: str = flag("tiny", "Feature extractor of fidelity: rad-dino, xrv, tiny, ...", group="Questions")
    weights: str | None = flag(None, "Its weights: a local file or folder.")
    model: str | None = flag(None, "The model, for membership inference.")
    fewest: int = flag(50, "Images of a label in both sets to score its fidelity by itself.")
    false_alarms: float = flag(0.01, "Share of real images that may be called copies; 0.01 takes 299 images.")
    network_steps: int = flag(300, "Updates of each network of re-identification.")
    classifier_steps: int = flag(300, "Updates of each classifier.")
    bootstrap_repeats: int = flag(200, "Draws of the intervals.")
    batch_size: int = flag(64, "Images at once.")
    seed: int = flag(0, "Of everything.")
    device: str | None = flag(None, "Where to compute; a GPU if there is one.")
    output_dir: str = flag("outputs/suite", "Where answers, page and tables go.", group="Output")
    draw: bool = flag(True, "Show images on the page; no, where it must not show patients.")
    style: Literal["markdown", "latex", "csv"] = flag("markdown", "Table to print.")


def main(args: Arguments) -> None:
    show_messages("diffusers_dino.evaluation")
    for name in ("synthetic", "real"):
        if not getattr(args, name):
            raise ValueError(f"Give --{name}: a folder of images, or webdataset tars.")
    with hold_output(args.output_dir, "suite.json") as output:
        device = device_of(0, args.device)
        columns = (args.key_column, args.label_column, args.patient_column)
        pipe = load_trained_pipeline(args.model).to(torch.device(device)) if args.model else None
        known = pipe or (prepared_as_sources([args.synthetic]) if is_made_by_us(args) else None)
        preprocessing = Preprocessing(args.size, args.remove_borders is not False)
        if known is not None:
            preprocessing = preparation_for(known, args.size, args.remove_borders)
        options = {"max_unreadable": args.max_unreadable}
        real = open_image_set(args.real, preprocessing, args.table, *columns, **options)
        training = None
        if args.training:
            table = args.training_table or args.table
            training = open_image_set(args.training, preprocessing, table, *columns, **options)
        synthetic, sources = open_synthetic(args)
        classifier = replace(SuiteSettings().classifier, max_steps=args.classifier_steps)
        result = evaluate_suite(
            synthetic,
            real,
            output,
            training=training,
            pipe=pipe,
            sources=sources,
            extractor=open_extractor(args.features, args.weights, device),
            settings=settings_of(SuiteSettings, args, classifier=classifier),
            device=device,
            progress=tell,
        )
        make_page(result, synthetic, real, training, args.draw).save(output / "report.html")
        texts = write_tables(output, lambda style: format_suite_table(result, style))
        print(texts if args.style == "markdown" else format_suite_table(result, args.style))
        for answer in result.answers:
            print(f"{answer.asks} {answer.verdict}: {answer.line}")
        print(f"Report: {output / 'report.html'}")


def tell(state: SuiteProgress) -> None:
    if state.question:
        print(f"[{state.done + 1}/{state.total}] {state.question}", flush=True)


def is_made_by_us(args: Arguments) -> bool:
    """Whether the synthetic images are a set of `synthesise`."""
    return (Path(args.synthetic) / "plan.json").is_file()


def open_synthetic(args: Arguments) -> tuple[ImageSet, dict[str, str] | None]:
    """The images with their labels, and the source of each where it is known: of two, the nearer one."""
    # what was generated has been prepared already
    preprocessing = Preprocessing(args.size, remove_borders=False)
    options = {"max_unreadable": args.max_unreadable}
    if is_made_by_us(args):
        made = SyntheticSet.open(args.synthetic)
        found = open_image_set(args.synthetic, preprocessing, **options)
        planned = list(made.planned())
        labels = {image.key: frozenset(image.labels) for image in planned if image.labels is not None}
        sources = {x.key: x.sources[-1 if x.fraction > 0.5 else 0] for x in planned if x.sources}
        return found._replace(labels=labels or None), sources or None
    table, column = args.synthetic_table, args.synthetic_label_column
    found = open_image_set(args.synthetic, preprocessing, table, args.synthetic_key_column, column, None, **options)
    return found._replace(patients=None), read_sources(args) if table and table != "stored" else None


def read_sources(args: Arguments) -> dict[str, str] | None:
    """The sources in the table of the synthetic images; None where there are none."""
    found, table = {}, CsvTable(args.synthetic_table)
    known = [column for column in (args.source_column, "fraction") if column in table.header]
    for _, row in table.rows([args.synthetic_key_column, *known]):
        names = (row.get(args.source_column) or "").split("|")
        nearer = names[-1 if float(row.get("fraction") or 0) > 0.5 else 0].strip()
        if nearer:
            found[image_key(row[args.synthetic_key_column].strip())] = image_key(nearer)
    return found or None
