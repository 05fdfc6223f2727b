"""The pages on publishing and on machines without a network: their code and commands run, as a reader runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tiny
from adapters import save_adapter
from hub_server import HubServer, run_client
from pages import REPOSITORY, blocks
from results import RECONSTRUCTION

PUBLISH, AIR_GAPPED = REPOSITORY / "docs/publish.md", REPOSITORY / "docs/hospitals.md"
WITHOUT_NETWORK = """
from diffusers.utils import load_image

from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner

pipe = DinoDiffusionPipeline.from_pretrained("outputs/quickstart/model")
assert len(pipe(load_image("radiograph.png"), num_images_per_prompt=2).images) == 2
DinoImageConditioner.from_pretrained("outputs/quickstart/model/conditioner")
pipe.load_lora_weights("outputs/scanner-lora")
"""
NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"the network was asked for: {arguments[1:]}")

sys.addaudithook(refuse)
"""


def code_of(page):
    return "\n".join(block.code for block in blocks(page, "python"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages name."""
    root = tmp_path_factory.mktemp("reader")
    (root / "examples").symlink_to(REPOSITORY / "examples")
    tiny.tiny_pipeline().save_pretrained(root / "outputs/quickstart/model")
    save_adapter(root / "outputs/scanner-lora", seed=5)
    RECONSTRUCTION.save(root / "outputs/quickstart/reconstruction.json")
    Image.new("L", (40, 48), 90).save(root / "radiograph.png")
    return root


@pytest.fixture(scope="module")
def hub(folder):
    """After the code of the page on publishing, and after its `hf download`."""
    with HubServer() as server:
        environment = server.client_environment(folder / "home")
        code = f"import os; os.chdir({str(folder)!r})\n{code_of(PUBLISH)}"
        run_client(code, environment)
        lines = [line for block in blocks(PUBLISH, "bash") for line in block.code.splitlines()]
        for line in (line for line in lines if line.startswith("hf ")):
            program = Path(sys.executable).parent / line.split()[0]
            subprocess.run([program, *line.split()[1:]], env=environment, cwd=folder, check=True, capture_output=True)
        yield server


@pytest.mark.slow
def test_the_code_of_the_page_on_publishing_uploads_and_loads(hub):
    assert set(hub.repositories) == {"org/name", "org/scanner-lora", "org/same", "org/encoder"}
    assert {name for name, repository in hub.repositories.items() if repository.private} == {"org/name", "org/same"}
    card = hub.repositories["org/name"].files()["README.md"].decode()
    assert "N = 64" in card
    assert "license: apache-2.0" in card


def test_a_downloaded_folder_loads_without_a_network(hub, folder, tmp_path):
    """As it was published, by `hf download --local-dir`: a path is never looked up on the Hub."""
    files = {path.relative_to(folder / "model").as_posix() for path in (folder / "model").rglob("*.safetensors")}
    assert files == {path for path in hub.repositories["org/name"].files() if path.endswith(".safetensors")}
    shutil.copytree(folder / "model", tmp_path / "outputs/quickstart/model")
    shutil.copytree(folder / "outputs/scanner-lora", tmp_path / "outputs/scanner-lora")
    shutil.copy(folder / "radiograph.png", tmp_path)
    code = f"{NO_NETWORK}import os; os.chdir({str(tmp_path)!r})\n{WITHOUT_NETWORK}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": hub.url}
    asked = len(hub.requests)
    run_client(code, environment)
    assert len(hub.requests) == asked


def test_the_checksums_of_the_page_find_a_change(folder, tmp_path):
    write, check = (block.code for block in blocks(AIR_GAPPED, "bash") if "sha256sum" in block.code)
    shutil.copytree(folder / "outputs/quickstart", tmp_path / "carried")
    subprocess.run(["bash", "-c", write], cwd=tmp_path, check=True)
    assert subprocess.run(["bash", "-c", check], cwd=tmp_path / "carried").returncode == 0
    (tmp_path / "carried" / "model" / "unet" / "config.json").write_text("{}")
    assert subprocess.run(["bash", "-c", check], cwd=tmp_path / "carried", capture_output=True).returncode == 1
