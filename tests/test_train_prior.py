"""`examples/train_prior.py` as a user runs it: labels, metadata and text; resuming; early stopping; bad input."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scripts
import tiny
import tiny_text
from diffusers_dino import DinoPriorPipeline
from diffusers_dino.training.checkpoints import newest_checkpoint
from scripts import losses
from tiny import generators

NUM_IMAGES, STEPS = 96, 6
SETTINGS = {
    "resolution": 32,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_components": 8,
    "train_batch_size": 16,
    "validation_share": 0.3,
    "validation_steps": 2,
    "validation_draws": 2,
    "lr_warmup_steps": 1,
    "checkpointing_steps": 3,
    "max_train_steps": STEPS,
}


def write_table(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def some_rows() -> list[dict]:
    findings = ("No Finding", "Edema", "Edema|Nodule", "", "Nodule?")
    return [
        {
            "file": f"{number:03d}.png",
            "findings": findings[number % 5],
            "patient": f"p{number // 2}",
            "age": "" if number % 7 == 0 else 20 + number % 60,
            "view": ("PA", "AP", "")[number % 3],
            "report": ("a", "a a", "")[number % 3],
        }
        for number in range(NUM_IMAGES - 6)  # nothing is known of six images
    ]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("frozen")
    tiny.tiny_conditioner().save_pretrained(folder / "conditioner")
    text = folder / "text"
    tiny_text.text_encoder().save_pretrained(text)
    tiny_text.tokenizer().save_pretrained(text)
    return {
        "conditioner": folder / "conditioner",
        "train_data_dir": scripts.image_folder(folder / "images", NUM_IMAGES, size=40),
        "labels": write_table(folder / "table.csv", some_rows()),
        "text": text,
    }


@pytest.fixture
def flags(frozen, tmp_path) -> dict:
    own = {name: value for name, value in frozen.items() if name != "text"}
    return {**SETTINGS, **own, "output_dir": tmp_path / "prior"}


@pytest.fixture(scope="module")
def trained(frozen, tmp_path_factory) -> Path:
    """A finished run with everything there is to know."""
    folder = tmp_path_factory.mktemp("run") / "prior"
    everything = {
        "patient_column": "patient",
        "number_columns": ["age"],
        "category_columns": ["view"],
        "text_column": "report",
        "text_encoder": frozen["text"],
        "text_length": 7,
    }
    own = {name: value for name, value in frozen.items() if name != "text"}
    scripts.call_script("train_prior.py", **SETTINGS, **own, **everything, output_dir=folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "prior" / "diffusion_pytorch_model.safetensors")


def test_the_result_is_a_pipeline_that_knows_what_it_was_told(trained):
    pipe = DinoPriorPipeline.from_pretrained(trained)
    conditions = pipe.prior.conditions
    assert set(conditions.labels) == {"Edema", "Nodule", "No Finding"}
    assert conditions.exclusive == ("No Finding",)
    assert conditions.categories == {"view": ["AP", "PA"]}
    assert 20 < conditions.numbers["age"][0] < 80
    assert pipe.prior.config["text_encoder"].endswith("text")
    asked = {"labels": ["Edema"], "metadata": {"age": 60, "view": "PA"}, "text": "a"}
    tokens = pipe(**asked, generator=generators(0), num_inference_steps=2).image_embeds
    assert tokens.shape == (1, 5, tiny.TOKEN_DIM)
    pipe.check_conditioner(tiny.tiny_conditioner())
    with pytest.raises(ValueError, match="another conditioner"):
        pipe.check_conditioner(tiny.tiny_conditioner(tokens="cls"))


def test_a_run_leaves_log_card_looks_and_the_weights_of_the_best(trained):
    assert len(losses(trained)) == STEPS
    looks = json.loads((trained / "validation.json").read_text())
    assert [look["step"] for look in looks["looks"]] == [0, 2, 4, 6]
    best = min(looks["looks"], key=lambda look: look["loss"])
    assert json.loads((trained / "best" / "metric.json").read_text()) == best
    assert scripts.same_weights(trained / "prior", trained / "best/prior")
    card = (trained / "README.md").read_text()
    assert "Edema" in card
    assert "DinoPriorPipeline.from_pretrained" in card


@pytest.mark.parametrize("known", [{}, {"labels": None}])
def test_a_resumed_run_ends_with_the_same_bits(flags, known, tmp_path):
    flags |= known
    scripts.call_script("train_prior.py", **flags)
    again = tmp_path / "again"
    shutil.copytree(flags["output_dir"] / "checkpoint-3", again / "checkpoint-3")
    scripts.call_script("train_prior.py", **{**flags, "output_dir": again, "resume_from_checkpoint": "latest"})
    assert scripts.same_weights(again / "prior", flags["output_dir"] / "prior")
    for name in ("validation.json", "best/metric.json"):
        assert (again / name).read_bytes() == (flags["output_dir"] / name).read_bytes()
    assert losses(again) == losses(flags["output_dir"])[3:]
    other = {"output_dir": again, "resume_from_checkpoint": "latest", "num_components": 4}
    with pytest.raises(ValueError, match="num_components was 8, is 4"):
        scripts.call_script("train_prior.py", **{**flags, **other})


@pytest.mark.slow  # three starts of two processes each
def test_a_killed_run_of_two_processes_ends_with_the_same_bits(flags, tmp_path):
    flags |= {"processes": 2, "checkpointing_steps": 2, "max_train_steps": 20, "patience": 0, "train_batch_size": 8}
    scripts.run_script("train_prior.py", **flags)
    again = tmp_path / "again"
    killed = scripts.start_script("train_prior.py", **{**flags, "output_dir": again})
    scripts.wait_until(lambda: newest_checkpoint(again), killed)
    killed.kill()
    killed.wait()
    scripts.run_script("train_prior.py", **{**flags, "output_dir": again, "resume_from_checkpoint": "latest"})
    assert scripts.same_weights(again / "prior", flags["output_dir"] / "prior")
    assert losses(again) == losses(flags["output_dir"])


def test_training_stops_when_the_validation_loss_does_not_fall(flags):
    flags |= {"learning_rate": 0.5, "max_train_steps": 60, "patience": 2, "checkpointing_steps": 0, "use_ema": False}
    scripts.call_script("train_prior.py", **flags, weights_dtype="float16")
    looks = json.loads((flags["output_dir"] / "validation.json").read_text())["looks"]
    assert len(losses(flags["output_dir"])) == looks[-1]["step"] < 60
    best = min(looks, key=lambda look: look["loss"])
    assert looks[-1]["step"] == best["step"] + 4
    ours, theirs = weights(flags["output_dir"]), weights(flags["output_dir"] / "best")
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in theirs)
    assert ours["slots"].dtype == torch.float16
    assert ours["components"].dtype == torch.float32


def test_trains_on_a_feature_cache_and_on_other_images_without_a_share(flags, frozen, tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path / "vae")
    cached = {"resolution": 32, "train_data_dir": frozen["train_data_dir"], "conditioner": frozen["conditioner"]}
    scripts.call_script(
        "cache", **cached, vae=tmp_path / "vae", feature_cache=tmp_path / "cache", cache_views=2, augment=False
    )
    scripts.call_script("train_prior.py", **flags, feature_cache=tmp_path / "cache")
    on_cache = losses(flags["output_dir"])
    assert "| cache views | 2 |" in (flags["output_dir"] / "README.md").read_text()
    other = {"output_dir": tmp_path / "other", "validation_data_dir": frozen["train_data_dir"], "cache_views": 0}
    scripts.call_script("train_prior.py", **{**flags, **other})
    assert len(on_cache) == len(losses(tmp_path / "other")) == STEPS
    held = [
        json.loads((folder / "validation.json").read_text())["num_images"]
        for folder in (flags["output_dir"], other["output_dir"])
    ]
    assert held[0] < held[1] == NUM_IMAGES


def one_class(rows):
    return [{**row, "findings": "Edema"} for row in rows]


def contradictory(rows):
    return [{**rows[0], "findings": "No Finding|Edema"}, *rows[1:]]


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"label_column": "disease"}, None, "no column 'disease'; its columns are 'file'"),
        ({"number_columns": ["weight"]}, None, "no column 'weight'"),
        ({"text_column": "report"}, None, "--text_encoder"),
        ({"number_columns": ["view"]}, None, "must hold numbers"),
        ({}, one_class, "nothing to ask for"),
        ({}, contradictory, "'000' contradict"),
        ({}, lambda rows: [{**row, "findings": ""} for row in rows], "No training image has a label"),
        ({}, lambda rows: [{**row, "file": f"x{row['file']}"} for row in rows], "No row"),
        ({}, lambda rows: [*rows, rows[0]], "several rows"),
        ({"exclusive_labels": ["Edma"]}, None, "'Edma' is not"),
        ({"validation_share": 0.05}, None, "each needs 16"),
        ({"conditioner": None}, None, "Give one of --conditioner"),
        ({"labels": None, "number_columns": ["age"]}, None, "--labels"),
        ({"condition_dropout": 1.5}, None, "condition_dropout"),
        ({"labels": "stored"}, None, "No facts are stored"),
    ],
)
def test_bad_input_is_explained(flags, tmp_path, changes, edit, message):
    if edit is not None:
        changes = {**changes, "labels": write_table(tmp_path / "table.csv", edit(some_rows()))}
    with pytest.raises(ValueError, match=message):
        scripts.call_script("train_prior.py", **{**flags, **changes})
