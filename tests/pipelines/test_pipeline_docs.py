"""The page of `DinoDiffusionPipeline`: its code runs, and the messages it explains are those that are raised."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image

import tiny

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/pipelines/dino_diffusion.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the page's code reads: a pipeline, a LoRA for it, and radiographs."""
    peft = pytest.importorskip("peft")
    pipe = tiny.tiny_pipeline()
    pipe.save_pretrained(tmp_path / "outputs/quickstart/model")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path / "outputs/scanner-lora", layers)
    for name in ("radiograph", *(f"radiograph_{i}" for i in range(8))):
        Image.new("L", (40, 48), 90).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_page_runs_from_top_to_bottom(folder):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "dino_diffusion.md", "exec"), names)
    assert len(names["variations"]) == 4
    assert len(names["sources"]) == 8
    assert names["embeds"].shape == (1, 5, tiny.TOKEN_DIM)
    assert torch.is_tensor(names["embeds"])


def test_the_messages_of_the_page_are_those_of_the_code():
    table = PAGE.split("## What it refuses")[1].split("## Reference")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, flags=re.MULTILINE)[2:]
    package = REPOSITORY / "src/diffusers_dino"
    source = " ".join(path.read_text() for path in package.rglob("*.py"))
    assert len(rows) >= 5
    for row in rows:
        assert row.split("…")[0].strip() in source, row
