"""The page of error messages: what it quotes of ours is in the sources, and errors that are provoked are on it."""

import ast
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner, DinoInterpolationPipeline
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.data.sharding.manifest import read_manifest
from diffusers_dino.files import make_writable_folder
from diffusers_dino.metrics import open_extractor
from diffusers_dino.training.checkpoints import find_checkpoint
from pages import REPOSITORY
from scripts import call_script, image_folder

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
    """Folders of a beginner: a pipeline, an empty one, pictures, and a text that calls itself a picture."""
    root = tmp_path_factory.mktemp("beginner")
    tiny.tiny_pipeline().save_pretrained(root / "model")
    for name in ("empty", "texts"):
        (root / name).mkdir()
    image_folder(root / "pictures", 3, 40)
    (root / "texts/a.png").write_text("no picture")
    weights = Path(shutil.copytree(root / "model", root / "cut")) / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(root / "model", root / "damaged")
    (root / "damaged/model_index.json").write_text("{")
    (root / "a file").write_text("")
    return root


def train(place, **flags):
    folders = {"train_data_dir": "pictures", "output_dir": "run", "pretrained_pipeline": "model"}
    call_script("train_dino.py", None, **{**{flag: place / name for flag, name in folders.items()}, **flags})


def segment(**options):
    return DiffSegPipeline.from_pipe(tiny.tiny_pipeline())(tiny.random_images(1), **options)


MISTAKES = {
    "the generic class": lambda place: DiffusionPipeline.from_pretrained(place / "model"),
    "a folder that is not there": lambda place: DinoDiffusionPipeline.from_pretrained("outputs/no/model"),
    "a typo without a network": lambda place: DinoDiffusionPipeline.from_pretrained("no-org/no-model"),
    "an empty model folder": lambda place: DinoDiffusionPipeline.from_pretrained(place / "empty"),
    "weights that were cut off": lambda place: DinoDiffusionPipeline.from_pretrained(place / "cut"),
    "a damaged config": lambda place: DinoDiffusionPipeline.from_pretrained(place / "damaged"),
    "a pipeline for a conditioner": lambda place: DinoImageConditioner.from_pretrained(place / "model"),
    "tokens of another width": lambda place: tiny.tiny_pipeline(conditioner=tiny.tiny_conditioner(projection_dim=48)),
    "weights of half precision": lambda place: DinoDiffusionPipeline.from_pretrained(place / "model", variant="fp16"),
    "an encoder that the Hub has not": lambda place: DinoImageConditioner.from_encoder("no-org/no-encoder"),
    "a text for a prompt": lambda place: tiny.tiny_pipeline()(prompt="a chest radiograph"),
    "a path for an image": lambda place: tiny.tiny_pipeline()("radiograph.png"),
    "no image": lambda place: tiny.tiny_pipeline()(),
    "pixels of 0 to 255 as floats": lambda place: tiny.tiny_pipeline()(255 * torch.rand(3, 32, 32)),
    "NaN": lambda place: tiny.tiny_pipeline()(torch.full((3, 32, 32), torch.nan)),
    "an odd height": lambda place: tiny.tiny_pipeline()(tiny.random_images(1), height=33),
    "tokens without a batch": lambda place: tiny.tiny_pipeline()(image_embeds=torch.zeros(5, tiny.TOKEN_DIM)),
    "too few generators": lambda place: tiny.tiny_pipeline()(tiny.random_images(2), generator=[torch.Generator()]),
    "a source without target": lambda place: DinoInterpolationPipeline.from_pipe(tiny.tiny_pipeline())(
        tiny.random_images(3), tiny.random_images(2)
    ),
    "a timestep past the end": lambda place: segment(timestep=1000),
    "attention of a side that is not there": lambda place: segment(sides=[64]),
    "a layer that is not there": lambda place: segment(layers=["up"]),
    "an empty folder of images": lambda place: open_images(place / "empty", Preprocessing(32)),
    "a file for a folder": lambda place: open_images(place / "a file", Preprocessing(32)),
    "a text for an image": lambda place: open_images(place / "texts", Preprocessing(32), in_memory=True),
    "a pattern without shards": lambda place: open_images(place / "train-*.tar", Preprocessing(32)),
    "shards that are not complete": lambda place: read_manifest(place / "pictures"),
    "a checkpoint that is not there": lambda place: find_checkpoint(place, "checkpoint-7"),
    "a file where the output should go": lambda place: make_writable_folder(place / "a file"),
    "weights that must be at hand": lambda place: open_extractor("xrv"),
    "a flag with a typo": lambda place: train(place, lerning_rate=1),
    "no condition": lambda place: call_script("train_dino.py"),
    "two conditions": lambda place: train(place, encoder="facebook/dino-vitb16"),
    "no images": lambda place: train(place, train_data_dir=None, dataset_name=None),
    "a resolution that does not fit": lambda place: train(place, resolution=30),
    "no salt": lambda place: call_script("shards", source=place / "pictures", output_dir=place / "shards"),
    "a model folder for evaluation": lambda place: call_script(
        "evaluate segmentation", pipeline=place / "empty", data=place / "pictures", output_dir=place / "scores"
    ),
    "interpolation without labels": lambda place: call_script(
        "synthesise", model=place / "model", data_dir=place / "pictures",
        strategy="interpolation", output_dir=place / "set",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_beginner_finds_the_message(mistake, place, capsys, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_DINO_SALT", raising=False)
    with pytest.raises((Exception, SystemExit)) as caught:
        MISTAKES[mistake](place)
    message = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert entry_of(message), f"The page does not know {type(caught.value).__name__}: {message}"


def test_an_unknown_message_is_not_found():
    assert entry_of("The moon is too far away: wait.") is None
