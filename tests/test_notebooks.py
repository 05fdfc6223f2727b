"""The notebooks: stored with their outputs, runnable from any folder of a clone, and their figures hold together."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from diffusers_dino.evaluation import ReconstructionResult

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@by_name
def test_a_notebook_is_stored_with_its_outputs(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 300_000, "docs/store_notebooks.py keeps the pictures small"
    for cell in notebook.cells:
        assert not cell.metadata, "cells are without tags and states"
        if cell.cell_type == "code":
            assert cell.execution_count
            assert not [
                output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
            ]
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/jpeg" in output.get("data", {})
    ]
    assert len(pictures) >= 5
    assert notebook.metadata.kernelspec.name == "python3"
    written = "".join(part for cell in notebook.cells for part in (cell.source, *printed_of(cell)))
    assert not re.search(r"/(?:home|Users|root|tmp|work|mnt)/|[A-Z]:\\\\", written), "no path of anybody's machine"


def printed_of(cell) -> list[str]:
    return [output.text for output in cell.get("outputs", []) if "text" in output]


@by_name
def test_the_links_of_a_notebook_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert links
    for link in links:
        assert (path.parent / link).exists(), link


@pytest.fixture
def clone(tmp_path):
    """A repository of links to this one, so that what a notebook writes is elsewhere."""
    examples = tmp_path / "clone/examples"
    (examples / "notebooks").mkdir(parents=True)
    for entry in EXAMPLES.iterdir():
        if entry.name != "notebooks":
            (examples / entry.name).symlink_to(entry)
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, examples / "notebooks")
    return examples.parent


@by_name
@pytest.mark.parametrize("folder", [".", "examples", "examples/notebooks"])
def test_a_notebook_finds_the_repository(path, folder, clone, monkeypatch):
    monkeypatch.chdir(clone / folder)
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names = {}
    exec(compile(cells[0], path.name, "exec"), names)
    assert names["ROOT"] == clone
    assert names["MODEL"].is_dir()
    assert clone in names["OUTPUT"].parents


def execute(name: str, folder: Path, **constants: object) -> tuple[str, int]:
    """Run a notebook with `folder` as the current one, and other values of some constants of its first cell.

    Returns what it printed, and how many pictures it showed.
    """
    notebook = nbformat.read(EXAMPLES / f"notebooks/{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for constant, value in constants.items():
        first.source, count = re.subn(
            rf"^({constant} =) [^#\n]*", rf"\g<1> {value}  ", first.source, flags=re.MULTILINE
        )
        assert count == 1
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_first_hour(clone):
    printed, pictures = execute("first_hour", clone / "examples/notebooks", NUM_STEPS=5, NUM_UPDATES=25)
    results = clone / "outputs/first_hour"
    assert pictures == 9
    assert (results / "lora/pytorch_lora_weights.safetensors").is_file()

    def figures(name):
        row = next(line for line in printed.splitlines() if line.startswith(name))
        return [float(number) for number in row.removeprefix(name).replace("to", " ").split()]

    width, shuffled = figures("width of the body")
    assert width > 0.4 > 0.2 > shuffled
    effusion, _, high = figures("Effusion")
    assert effusion > high  # more than shuffled labels reach
    frame = {label: float(value) for value, label in re.findall(r"^(\d\.\d+) (bundled|with)", printed, re.MULTILINE)}
    assert frame["with"] < frame["bundled"] / 2  # the LoRA has learnt the frame of the other scanner
    result = ReconstructionResult.load(results / "reconstruction.json")
    assert figures("generated") == pytest.approx([result.by_encoder.generated, result.by_pixels.generated], abs=0.01)
    assert result.by_pixels.generated > result.by_pixels.nearest_training_image
    assert result.by_encoder.generated > 10 * max(result.by_encoder.shuffled, 1 / result.num_images)


@pytest.mark.slow
def test_from_dicom_to_a_segmentation(clone):
    printed, pictures = execute("dicom_to_segmentation", clone, TIMESTEPS=(1, 300))
    results = clone / "outputs/dicom_to_segmentation"
    assert pictures == 5
    assert "dicom   129 of 129 names" in printed  # the search finds what is there
    assert "shards    0 of 129 names" in printed
    assert "patients in both: 0" in printed
    dices = json.loads((results / "dice.json").read_text())
    means = {name: sum(values) / len(values) for name, values in dices.items()}
    for name, mean in means.items():
        assert f"{name:32} {mean:.2f} (" in printed
        assert len(dices[name]) == 18
    best, named = means["DiffSeg, best pair of segments"], means["DiffSeg, named without a mask"]
    assert best > means["untrained UNet, best pair"]
    assert best > means["Otsu"]
    assert best >= named > 0.4
    assert means["mean mask of the training split"] > 0.75  # masks and images still belong together
    with Image.open(results / "overlays.png") as overlays:
        assert overlays.width > 1000
