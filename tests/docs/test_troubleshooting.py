"""The page of error messages: what it quotes of ours is in the sources, and errors that are provoked are on it."""

import ast
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from pages import REPOSITORY

PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
OF_OTHERS = "### Messages of diffusers, transformers and others"
_CODE = re.compile(r"(`+)(?!`) ?(.+?) ?(?<!`)\1(?!`)")


def quotes(text: str) -> list[str]:
    """The messages in the first column of tables whose header is `message`."""
    found, in_table = [], False
    for line in text.splitlines():
        in_table = line.startswith("| message |") or (in_table and line.startswith("|"))
        if in_table and not line.startswith(("| message |", "|---")):
            found += [match[2] for match in _CODE.finditer(line.split(" | ")[0])]
    return found


def section(title: str) -> tuple[str, str]:
    """The text of a section, and the rest of the page."""
    before, _, after = PAGE.partition(title + "\n")
    inside, _, rest = after.partition("\n## ")
    return inside, before + "\n## " + rest


@cache
def source_texts() -> list[str]:
    """All texts of package and scripts, with `…` where a value is filled in."""
    texts = []
    for path in sorted([*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")]):
        texts += [text for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if (text := _text(node))]
    return texts


@cache
def file_names() -> dict[str, str]:
    """Constants that messages name files by."""
    names = {}
    for path in sorted([*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")]):
        names |= dict(re.findall(r'^(_?[A-Z]+) = "([\w.]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
    return names


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdg]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        value = node.value
        return file_names().get(value.id, "…") if isinstance(value, ast.Name) else "…"
    return ""


def is_in_sources(quote: str) -> bool:
    parts = [part for part in quote.split("…") if part.strip()]
    wanted = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(wanted.search(text) for text in source_texts())


def test_our_messages_are_in_the_sources():
    ours = quotes(section(OF_OTHERS)[1])
    assert len(ours) > 80
    assert [quote for quote in ours if not is_in_sources(quote)] == []


def test_a_message_that_nobody_gives_is_seen():
    assert not is_in_sources("The moon must be a multiple of …")
    assert not is_in_sources("conditioner makes tokens of width … The UNet takes condition tokens of width …")


def entry_of(message: str) -> str | None:
    """The entry of the page that a reader with this message finds."""
    for quote in quotes(PAGE):
        if re.search(".*".join(map(re.escape, quote.split("…"))), message, re.DOTALL):
            return quote
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a beginner: a pipeline, an empty one, one that was cut off, and one with a damaged index."""
    root = tmp_path_factory.mktemp("beginner")
    tiny.tiny_pipeline().save_pretrained(root / "model")
    (root / "empty").mkdir()
    weights = Path(shutil.copytree(root / "model", root / "cut")) / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(root / "model", root / "damaged")
    (root / "damaged/model_index.json").write_text("{")
    return root


# What others' libraries say; that our own messages are in the sources is tested above.
MISTAKES = {
    "the generic class": lambda place: DiffusionPipeline.from_pretrained(place / "model"),
    "a folder that is not there": lambda place: DinoDiffusionPipeline.from_pretrained("outputs/no/model"),
    "a typo without a network": lambda place: DinoDiffusionPipeline.from_pretrained("no-org/no-model"),
    "an empty model folder": lambda place: DinoDiffusionPipeline.from_pretrained(place / "empty"),
    "weights that were cut off": lambda place: DinoDiffusionPipeline.from_pretrained(place / "cut"),
    "a damaged config": lambda place: DinoDiffusionPipeline.from_pretrained(place / "damaged"),
    "a pipeline for a conditioner": lambda place: DinoImageConditioner.from_pretrained(place / "model"),
    "weights of half precision": lambda place: DinoDiffusionPipeline.from_pretrained(place / "model", variant="fp16"),
    "a text for a prompt": lambda place: tiny.tiny_pipeline()(prompt="a chest radiograph"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_beginner_finds_the_message(mistake, place):
    with pytest.raises(Exception) as caught:
        MISTAKES[mistake](place)
    message = str(caught.value)
    assert entry_of(message), f"The page does not know {type(caught.value).__name__}: {message}"
