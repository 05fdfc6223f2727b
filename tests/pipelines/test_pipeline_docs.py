"""The pages of the pipelines: their code runs, and the messages they explain are those that are raised."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image

import tiny
from tiny_text import stable_diffusion

REPOSITORY = Path(__file__).parents[2]


def read_page(name):
    return (REPOSITORY / f"docs/pipelines/{name}.md").read_text()


def run_code(name):
    """The names that the code of a page leaves, run from top to bottom."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", read_page(name), flags=re.DOTALL):
        exec(compile(block, f"{name}.md", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the page's code reads: a pipeline, a LoRA for it, a Stable Diffusion, and radiographs."""
    peft = pytest.importorskip("peft")
    pipe = tiny.tiny_pipeline()
    pipe.save_pretrained(tmp_path / "outputs/quickstart/model")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path / "outputs/scanner-lora", layers)
    stable_diffusion().save_pretrained(tmp_path / "stable-diffusion")
    for name in ("radiograph", *(f"radiograph_{i}" for i in range(8))):
        Image.new("L", (40, 48), 90).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_diffusion_page_runs(folder):
    names = run_code("dino_diffusion")
    assert len(names["variations"]) == 4
    assert len(names["sources"]) == 8
    assert names["embeds"].shape == (1, 5, tiny.TOKEN_DIM)
    assert torch.is_tensor(names["embeds"])


def test_the_code_of_the_interpolation_page_runs(folder):
    names = run_code("dino_interpolation")
    assert len(names["path"]) == 5
    assert len(names["paths"]) == 12
    assert names["sheet"].size == (6 * tiny.IMAGE_SIZE, 3 * tiny.IMAGE_SIZE)
    assert len(names["mixtures"]) == 3
    assert names["label"] <= {"Effusion", "Nodule", "No Finding"}


def test_the_code_of_the_segmentation_page_runs(folder):
    names = run_code("diffseg")
    assert names["masks"].shape == names["baseline"].shape == (1, 48, 40)
    assert names["swept"].masks.shape == (1, 48, 40)
    assert names["sides"] == [4, 8]


@pytest.mark.parametrize("name", ["dino_diffusion", "dino_interpolation", "diffseg"])
def test_the_messages_of_the_page_are_those_of_the_code(name):
    table = read_page(name).split("## What it refuses")[1].split("## Reference")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, flags=re.MULTILINE)[2:]
    package = REPOSITORY / "src/diffusers_dino"
    source = " ".join(path.read_text() for path in package.rglob("*.py"))
    assert len(rows) >= 5
    for row in rows:
        assert row.split("…")[0].strip() in source, row
