"""The Space as the Hub runs it: its program in a process of its own, and one request."""

import importlib.util
import os
import socket
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

import scripts

if importlib.util.find_spec("gradio") is None:  # found, not imported, which takes seconds in each process
    pytest.skip("The demo needs Gradio: pip install diffusers-dino[demo]", allow_module_level=True)
from demo_page import Page

SPACE = scripts.EXAMPLES / "space"


def start(**environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=SPACE,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_it_makes_a_variation(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(tmp_path))
    try:
        scripts.address_of(process)
        page = Page(f"http://127.0.0.1:{port}")
        assert page.vary("ann").status_code == 200
        with page.listening("ann") as heard:
            result = page.result(heard)
        assert result["success"], result
        assert len(result["output"]["data"][0]) == 1
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_card_names_what_the_hub_needs():
    _, header, _ = (SPACE / "README.md").read_text().split("---", 2)
    card = yaml.safe_load(header)
    assert (card["sdk"], (SPACE / card["app_file"]).is_file()) == ("gradio", True)
    assert len(card["short_description"]) <= 60
    project = (SPACE.parents[1] / "pyproject.toml").read_text()
    demo = next(line for line in project.splitlines() if line.startswith("demo = "))
    assert Requirement(demo.split('"')[1]).specifier.contains(card["sdk_version"])
    (needed,) = (SPACE / "requirements.txt").read_text().split()
    assert Requirement(needed).extras >= {"demo"}
