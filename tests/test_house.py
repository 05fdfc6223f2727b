"""The house rules that a machine can hold: imports run downward, public names are declared, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_dino"
EXAMPLES = Path(__file__).parents[1] / "examples"

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
        "figures",
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
    {"training.validation", "synthesis", "protocols", "model_folder"},
    {"measured", "hub"},
    {
        "model_card",
        "plots",
        "plots_memorization",
        "plots_augmentation",
        "plots_fidelity",
        "plots_labels",
        "plots_segmentation",
        "report",
    },
]
SAME_LAYER = {
    ("latents", "pixels"),
    ("conditioner", "encoders"),
    ("training.checkpoints", "data"),
    ("protocols", "synthesis"),
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


def test_nothing_in_the_library_knows_an_argument_parser():
    for path in PACKAGE.rglob("*.py"):
        assert "argparse" not in path.read_text(), f"{path} parses arguments: that is the scripts' work."


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
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
