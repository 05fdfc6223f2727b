"""The model card: metadata that huggingface_hub accepts, and facts without what must stay private."""

import ast
import json
import math
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

import tiny
from diffusers_dino.data.sources import describe_source, source_names
from diffusers_dino.hub import Measurement, TrainingRecord, model_card, write_model_card
from diffusers_dino.hub.markdown import needs_agreement, table
from diffusers_dino.hub.measurements import describe_result
from diffusers_dino.hub.privacy import private_traces
from diffusers_dino.hub.record import RECORD_FILE
from results import RECONSTRUCTION, RETRIEVAL

FACTS = {"updates": 1240, "learning rate": 1e-4, "resolution": "64 px", "note": "two\nlines | a bar", "unused": None}
FACTS |= {"random flip": False, "noise offset": 0.0}


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def section(card, heading):
    return card.text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained pipeline."""
    path = tmp_path_factory.mktemp("ward7") / "model"
    tiny.tiny_pipeline().save_pretrained(path)
    return path


def test_metadata_survives_a_round_trip(folder):
    record = TrainingRecord(FACTS, ["facebook/dino-vitb16"], ["org/chest"])
    measured = [describe_result(RECONSTRUCTION, "phantoms")]
    path = write_model_card(folder, "org/name", record, license="apache-2.0", tags=["cxr"], measurements=measured)
    assert path == folder / "README.md"
    data = ModelCard.load(path).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "image-to-image"
    assert data.base_model == ["facebook/dino-vitb16"]
    assert data.datasets == ["org/chest"]
    assert data.license == "apache-2.0"
    assert {"diffusers-dino", "dino", "diffusers:DinoDiffusionPipeline", "cxr"} <= set(data.tags)
    by_encoder, by_pixels = data.eval_results
    assert by_pixels.metric_value == 0.5
    assert "N = 64" in by_pixels.metric_name
    assert by_encoder.metric_args["num_images"] == 64
    assert by_encoder.dataset_name == "phantoms"


def test_facts_are_a_table():
    text = model_card("org/name", TrainingRecord(FACTS)).text
    assert "| updates | 1240 |" in text
    assert "| learning rate | 0.0001 |" in text
    assert "| random flip | False |" in text
    assert "| noise offset | 0.0 |" in text
    assert r"| note | two lines \| a bar |" in text
    assert "unused" not in text


def test_figures_that_are_no_numbers_are_not_declared():
    lost = replace(RECONSTRUCTION, by_pixels=replace(RETRIEVAL, generated=math.nan))
    card = model_card("org/name", TrainingRecord(), measurements=[describe_result(lost)])
    assert [round(one.metric_value, 2) for one in card.data.eval_results] == [0.5]


def test_what_is_not_known_is_said_and_not_declared():
    card = model_card("org/name", TrainingRecord())
    assert not {"license", "base_model", "datasets", "model-index"} & set(card.data.to_dict())
    assert "Nothing is on record." in card.text
    assert "Nothing was measured." in section(card, "What was measured")
    assert "**not measured**" in section(card, "Privacy")
    assert "not on record" in section(card, "What it was trained on")


def test_parts_and_preprocessing_are_those_of_the_folder(folder):
    card = ModelCard.load(write_model_card(folder, "org/name", TrainingRecord()))
    parts = section(card, "Preprocessing and parts")
    assert "| encoder sees | the central square at 32 px, bicubic, antialiased |" in parts
    assert "| encoder mean, std | 0.5, 0.5, 0.5, 0.25, 0.25, 0.25 |" in parts
    assert "4 px to a latent of 4 channels" in parts
    assert "prediction_type epsilon" in parts
    assert "dinov2" in card.text.split("## Citation")[1].lower()
    assert "ward7" not in card.text


def test_sources_come_with_their_licences_and_what_has_to_be_signed():
    sources = [describe_source("phantom_cxr"), describe_source("mimic_cxr_jpg")]
    origin = section(model_card("org/name", TrainingRecord(sources=sources)), "What it was trained on")
    assert "| [MIMIC-CXR-JPG](https://physionet.org/content/mimic-cxr-jpg/) | PhysioNet Credentialed" in origin
    assert "**Credentialed data.** MIMIC-CXR-JPG (PhysioNet" in origin
    assert "Phantom chest radiographs" not in origin.split("**Credentialed data.**")[1]
    signed = {name for name in source_names() if needs_agreement(describe_source(name))}
    assert {"mimic_cxr_jpg", "vindr_cxr", "brax", "chexpert", "padchest"} <= signed
    assert not {"nih_chest_xray14", "montgomery", "shenzhen"} & signed


def test_local_folders_are_not_published(tmp_path):
    (tmp_path / "ward7" / "vae").mkdir(parents=True)
    secret = tmp_path / "ward7" / "vae"
    card = model_card(
        "org/name",
        TrainingRecord(
            {"output": secret, "list": [str(secret)], "windows": r"C:\Users\someone\scans"},
            base_models=[str(secret), "gone/from/here/unet", "facebook/dino-vitb16"],
            datasets=["/mnt/hospital/patients", "~/scans"],
        ),
    )
    for private in (str(tmp_path), "ward7", "hospital", "someone", "~", "gone", "scans |"):
        assert private not in str(card).replace("| windows | scans |", "")
    assert "| made from | vae, unet, facebook/dino-vitb16 |" in card.text
    assert card.data.base_model == ["facebook/dino-vitb16"]
    assert card.data.datasets is None


@pytest.mark.parametrize(
    ("text", "traces"),
    [
        ("see /home/anna/scans/1.png and", ["/home/anna/scans/1.png"]),
        (r"C:\\Users\\anna\\x", [r"C:\\Users\\anna\\x"]),
        ("file:///data/x", ["file:///data/x"]),
        ("study 1.2.840.113619.2.55.3", ["1.2.840.113619.2.55.3"]),
        ("torch 2.8.0, p = 0.05, https://huggingface.co/home/of, 1.2.3.4", []),
    ],
)
def test_private_traces_are_known_by_their_form(text, traces):
    assert private_traces(text) == traces


@pytest.mark.parametrize(
    ("kind", "loads"),
    [
        ("DinoDiffusionPipeline", 'DinoDiffusionPipeline.from_pretrained("org/name")'),
        ("DinoInterpolationPipeline", 'DinoInterpolationPipeline.from_pretrained("org/name")'),
        ("DiffSegPipeline", 'DiffSegPipeline.from_pretrained("org/name")'),
        ("lora", 'load_lora_weights("org/name")'),
        ("conditioner", 'DinoImageConditioner.from_pretrained("org/name")'),
        ("AutoencoderKL", 'AutoencoderKL.from_pretrained("org/name")'),
    ],
)
def test_usage_names_the_concrete_class(kind, loads):
    card = model_card("org/name", TrainingRecord(base_models=["org/base"]), kind=kind)
    (usage,) = code_blocks(card.text, "python")
    ast.parse(usage)
    assert loads in usage
    assert ('DinoDiffusionPipeline.from_pretrained("org/base")' in usage) == (kind == "lora")
    assert ("lora" in card.data.tags) == (kind == "lora")
    with pytest.raises(ValueError, match="not 'Unet'"):
        model_card("org/name", TrainingRecord(), kind="Unet")


def test_citations_are_of_what_was_used():
    def cited(**options):
        (bibtex,) = code_blocks(model_card("org/name", TrainingRecord(), **options).text, "bibtex")
        assert bibtex.count("{") == bibtex.count("}")
        return set(re.findall(r"^@\w+\{(\w+),", bibtex, flags=re.MULTILINE))

    always = {"jimenezperez2024dinodiffusion", "caron2021emerging", "rombach2022high"}
    assert cited() == always
    assert cited(kind="DiffSegPipeline") == always | {"tian2024diffuse"}
    xrv = replace(describe_result(RECONSTRUCTION), works=("cohen2022torchxrayvision",))
    assert cited(measurements=[xrv]) == always | {"cohen2022torchxrayvision"}


def test_a_record_goes_to_a_file_and_back(tmp_path):
    record = TrainingRecord({"updates": 3}, ["org/vae"], ["org/chest"], [describe_source("padchest")])
    record.save(tmp_path)
    assert TrainingRecord.load(tmp_path) == record
    assert TrainingRecord.load(tmp_path / "nothing") == TrainingRecord()
    (tmp_path / RECORD_FILE).write_text(json.dumps({"updates": 3}))
    with pytest.raises(ValueError, match="not a record of a training"):
        TrainingRecord.load(tmp_path)


def test_html_and_links_in_names_are_shown_and_do_nothing():
    bad = '<script>alert(1)</script><img src="x" onerror="y">'
    link = "[click](javascript:alert(1)) ![](https://example.org/seen.png)"
    source = {"title": bad, "licence": f"credentialed {link}", "citation": bad, "url": f"javascript:{bad}"}
    others = {"title": link, "licence": bad, "url": "https://example.org/a b)<script>"}
    measured = [Measurement(bad, f"| {bad} |"), Measurement("Copies", bad, is_privacy=True)]
    record = TrainingRecord({bad: link, "list": [bad, link]}, [bad], sources=[source, others])
    card = model_card(f"org/{bad}", record, measurements=measured, parts={link: bad}, samples={"a.png": bad})
    text = str(card)
    assert "&lt;script>" in text
    assert not re.findall(r"<\w+", text)
    assert "](javascript" not in text
    assert "](https://example.org/seen" not in text
    assert "](https://example.org/a b" not in text


@pytest.mark.parametrize("text", ["a|b", "a\\|b", "|", "a\\\\|"])
def test_a_bar_does_not_end_a_cell(text):
    (_, _, row) = table(["name", "value"], [[text, 1]]).splitlines()
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3
