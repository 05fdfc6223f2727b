"""The generation of a data set as a user runs it."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import tiny
from diffusers_dino.data import Preprocessing, open_images, verify_shards
from diffusers_dino.data.labels import stored_labels
from diffusers_dino.synthesis import SynthesisError, SyntheticSet, load_plan
from folders import contents
from scripts import call_script, command_line, image_folder, run_script, start_script, wait_until
from shard_files import write_shards

SCRIPT = "synthesise"
COUNT = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, images and their labels."""
    root = tmp_path_factory.mktemp("data")
    tiny.tiny_pipeline().save_pretrained(root / "model")
    image_folder(root / "images", COUNT, 32)
    with open(root / "labels.csv", "w", newline="") as file:
        rows = [[f"{number:03d}.png", f"p{number // 2}", "a|b" if number % 3 else "b"] for number in range(COUNT)]
        csv.writer(file).writerows([["file", "patient", "findings"], *rows])
    return root


def flags(data, **options):
    given = {"model": data / "model", "data_dir": data / "images", "ratio": 1, "num_inference_steps": 1}
    return {**given, "batch_size": 4, "shard_size": 8, "threads": 1, **options}


def test_variations_need_no_labels(data, tmp_path, capsys):
    out = tmp_path / "out"
    call_script(SCRIPT, **flags(data, output_dir=out, num_drawn=3))
    assert f"{COUNT} of {COUNT} images in 3 shards" in capsys.readouterr().out
    assert verify_shards(out) == []
    assert Image.open(out / "examples.png").size == (64, 96)  # three rows of source | synthetic
    before = contents(out)
    call_script(SCRIPT, **flags(data, output_dir=out, num_drawn=3))
    assert contents(out) == before
    with pytest.raises(SynthesisError, match=r"guidance_scale was 2\.0, is 1\.0"):
        call_script(SCRIPT, **flags(data, output_dir=out, guidance_scale=1.0))
    with pytest.raises(ValueError, match="diffusers has no scheduler 'Euler'"):
        call_script(SCRIPT, **flags(data, output_dir=out, scheduler="Euler"))


def test_interpolation_takes_labels_of_a_table_and_a_gate_of_the_sources(data, tmp_path, capsys):
    out, gate = tmp_path / "out", tmp_path / "gate.safetensors"
    keys = [f"{number:03d}" for number in range(1, COUNT)]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    options = flags(data, labels=data / "labels.csv", keys_file=tmp_path / "keys.txt", strategy="interpolation")
    options |= {"ratio": None, "num_images": 9, "gate": gate, "gate_false_alarms": 0.2, "max_left_out": 1.0}
    call_script(SCRIPT, **options, output_dir=out)
    made = SyntheticSet.open(out)
    assert "The gate refused" in capsys.readouterr().out
    assert made.manifest["lineage"]["gate"]["fingerprint"]
    assert {key for image in made.planned() for key in image.sources} <= set(keys)
    assert {image.labels for image in made.planned()} <= {("a", "b"), ("b",)}
    assert stored_labels(made.images()).labels == tuple(frozenset(image.labels) for image in made.planned())
    calibrated = gate.read_bytes()
    call_script(SCRIPT, **options, output_dir=out)
    assert gate.read_bytes() == calibrated


def test_labels_stored_in_shards_are_enough(data, tmp_path):
    write_shards(tmp_path / "shards", shards=2)
    stored = {"data_dir": tmp_path / "shards", "labels": "stored", "strategy": "interpolation", "num_drawn": 0}
    call_script(SCRIPT, **flags(data, **stored, output_dir=tmp_path / "out", export="folder"))
    assert len(list((tmp_path / "out-folder" / "images").iterdir())) == len(SyntheticSet.open(tmp_path / "out"))
    plan = load_plan(tmp_path / "out")
    assert all(image.sources[0][-4:] == image.sources[1][-4:] for image in plan)  # the label is the number in a shard
    assert not (tmp_path / "out" / "examples.png").exists()


def test_a_plan_can_be_frozen_first_and_keeps_its_threads(data, tmp_path):
    options = flags(data, output_dir=tmp_path / "out", num_drawn=0)
    call_script(SCRIPT, **options, plan_only=True)
    assert not list((tmp_path / "out").glob("*.tar"))
    assert load_plan(tmp_path / "out").settings.threads == 1
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        call_script(SCRIPT, **options | {"threads": None})
    finally:
        torch.set_num_threads(before)
    assert len(open_images(tmp_path / "out", Preprocessing(32))) == COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "must be above 0"),
        ({"strategy": "interpolation"}, "give the labels"),
        ({"labels": "stored"}, "give a table of labels"),
        ({"labels": "LABELS", "label_column": "diagnosis"}, "no column 'diagnosis'"),
        ({"keys_file": "KEYS"}, "1 keys are not in the data set, such as 999. Check --keys_file"),
        ({"data_dir": "/nowhere"}, "no folder '/nowhere'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"export_dir": "elsewhere"}, "where --export goes: give both"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, options, message):
    (tmp_path / "keys.txt").write_text("000\n999\n")
    names = {"LABELS": data / "labels.csv", "KEYS": tmp_path / "keys.txt"}
    options = {name: names.get(value, value) for name, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        call_script(SCRIPT, **flags(data, output_dir=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_an_image_without_a_row_of_labels_is_named(data, tmp_path):
    lines = (data / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"1 images have no row in the labels, such as 023\. Check --keys_file"):
        call_script(SCRIPT, **flags(data, labels=tmp_path / "labels.csv", output_dir=tmp_path / "out"))


@pytest.mark.slow
def test_two_processes_and_a_worker_that_dies_change_nothing(data, tmp_path):
    options = flags(data, labels=data / "labels.csv", strategy="interpolation", ratio=2, num_drawn=2)
    options["num_inference_steps"] = 10
    run_script(SCRIPT, **options, output_dir=tmp_path / "one")
    half = start_script(SCRIPT, **options, processes=2, output_dir=tmp_path / "two")
    wait_until(lambda: any((tmp_path / "two" / ".records").glob("*.json")), half)
    half.members[1].kill()
    assert half.wait(timeout=200) != 0
    assert not (tmp_path / "two" / "manifest.json").exists()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "diffusers_dino", SCRIPT, *command_line(None, {**options, "output_dir": tmp_path / "two"})]
    subprocess.run([*launcher, *command], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["lineage"]["num_images"] == 2 * COUNT
