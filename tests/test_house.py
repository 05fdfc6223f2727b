"""The house rules that a machine can hold: imports run downward, public names are declared, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_dino"
EXAMPLES = Path(__file__).parents[1] / "examples"
# What the scripts share, from the ground up: `plots` reads results of `protocols`, and so on.
SHARED = ("duplicates", "sources", "staging", "protocols", "plots", "report", "measured")

# Each layer may import from the layers above it in this list, and within its own package.
LAYERS = [
    {
        "pixels",
        "seeds",
        "fingerprints",
        "registration",
        "embeddings",
        "segmentation",
        "selection",
        "cards",
        "quantization",
    },
    {
        "latents",
        "encoders",
        "conditioner",
        "attention",
        "sheets",
        "data",
        "metrics",
        "training.objective",
        "training.checkpoints",
        "training.interruption",
        "training.reconstruction",
        "training.self_distillation",
    },
    {"pipelines"},
    {"training.components", "training.features", "training.progress", "training.state"},
    {"training.feature_cache"},
    {"training.validation", "synthesis", "model_folder"},
    {"hub"},
    {"model_card"},
]
SAME_LAYER = {
    ("latents", "pixels"),
    ("conditioner", "encoders"),
    ("training.checkpoints", "data"),
    ("metrics", "data"),
    ("metrics", "encoders"),
}


def room(module: str) -> str:
    """The name that LAYERS knows a module by: its package, but for `training`, whose files sit on different floors."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "training" and len(parts) > 1 else parts[0]


def floor(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports at run time or for its annotations."""
    package = list(path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "diffusers_dino":
                base = []
            else:
                continue
            tail = (node.module or "").removeprefix("diffusers_dino").strip(".").split(".") if node.module else []
            target = base + [part for part in tail if part]
            rooms |= {".".join(target)} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {
                alias.name.removeprefix("diffusers_dino.") for alias in node.names if "diffusers_dino." in alias.name
            }
    return {room(name) for name in rooms if not name.startswith("__")}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    own = room(module)
    if own == "training":  # the package's own file names its rooms
        return
    assert floor(own) is not None, f"{own} has no floor in the house: add it to LAYERS."
    for other in imported_rooms(path) - {own}:
        assert floor(other) is not None, f"{own} imports {other}, which has no floor in the house."
        below = floor(other) < floor(own) or (own, other) in SAME_LAYER
        assert below, f"{own} imports {other}, which is not below it."


def test_the_rule_sees_an_upward_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    bad = tmp_path / "pixels.py"
    bad.write_text("from .pipelines import DinoDiffusionPipeline\n")
    assert imported_rooms(bad) == {"pipelines"}
    assert floor("pipelines") > floor("pixels")


def shared_files(name: str) -> list[Path]:
    return sorted((EXAMPLES / name).rglob("*.py")) or [EXAMPLES / f"{name}.py"]


def example_modules() -> set[str]:
    """Scripts and packages of `examples`, by the names that they are imported by."""
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    return scripts | {path.parent.name for path in EXAMPLES.glob("*/__init__.py")}


def modules_imported(path: Path) -> set[str]:
    """First names of all absolute imports of a file."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", SHARED)
def test_what_scripts_share_knows_no_script(name):
    above = example_modules() - set(SHARED[: SHARED.index(name) + 1])
    for path in shared_files(name):
        assert not modules_imported(path) & above, f"{path} imports what is above it."


def test_the_library_knows_nothing_of_the_examples():
    for path in PACKAGE.rglob("*.py"):
        assert not modules_imported(path) & example_modules(), f"{path} imports from examples/, which no wheel holds."


def test_nothing_in_the_library_knows_an_argument_parser():
    for path in [*PACKAGE.rglob("*.py"), *(path for name in SHARED for path in shared_files(name))]:
        assert "argparse" not in path.read_text(), f"{path} parses arguments: that is the scripts' work."


@pytest.mark.parametrize(
    "path",
    [*MODULES, *(path for name in SHARED for path in shared_files(name))],
    ids=lambda path: str(path.relative_to(PACKAGE if PACKAGE in path.parents else EXAMPLES)),
)
def test_public_modules_declare_their_names(path):
    names = [
        target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in names or path.name.startswith("_")


def test_the_training_script_can_be_read_in_one_sitting():
    assert len((EXAMPLES / "train_dino.py").read_text().splitlines()) <= 350
