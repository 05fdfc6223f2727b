"""Run the notebooks and store them with their outputs: pictures as JPEG, no progress bars, no path of this machine.

python docs/store_notebooks.py --folder /tmp/notebooks

It runs copies in a folder of links to this clone, so that what they write is elsewhere, then replaces the originals.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="A new folder, to run in.")
    args = parser.parse_args()
    notebooks = args.folder / "examples/notebooks"
    notebooks.mkdir(parents=True)
    for entry in EXAMPLES.iterdir():
        if entry.name != "notebooks":
            (args.folder / "examples" / entry.name).symlink_to(entry)
    for path in sorted((EXAMPLES / "notebooks").glob("*.ipynb")):
        copy = Path(shutil.copy(path, notebooks))
        notebook = nbformat.read(copy, as_version=4)
        resources = {"metadata": {"path": str(notebooks)}}
        NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
        nbformat.write(slimmed(notebook, args.folder), path)


def slimmed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook as it is stored: only what a reader looks at."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    lines = output.text.replace(f"{folder.resolve()}/", "").splitlines(keepends=True)
                    output.text = "".join(line for line in lines if "it/s]" not in line)
                if "image/png" in output.get("data", {}):
                    output.data = {"image/jpeg": as_jpeg(output.data["image/png"]), "text/plain": "<picture>"}
                    output.metadata = {}
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


def as_jpeg(png: str) -> str:
    """A picture, in base64, at most 900 pixels wide."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((900, 1200))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=62, optimize=True)
    return base64.b64encode(data.getvalue()).decode()


if __name__ == "__main__":
    main()
