"""The model card: metadata that huggingface_hub accepts, and facts without what must stay private."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from diffusers_dino.hub import LORA_FILE, model_card, push_folder, write_model_card

TRAINING = {"steps": 1240, "learning rate": 1e-4, "resolution": "64 px", "note": "two\nlines | a bar", "unused": None}


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_metadata_survives_a_round_trip(tmp_path):
    options = {
        "base_model": "facebook/dino-vitb16",
        "datasets": ["org/chest"],
        "license": "apache-2.0",
        "tags": ["cxr"],
    }
    path = write_model_card(tmp_path, "org/name", TRAINING, **options)
    assert path == tmp_path / "README.md"
    data = ModelCard.load(path).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "image-to-image"
    assert data.base_model == ["facebook/dino-vitb16"]
    assert data.datasets == ["org/chest"]
    assert data.license == "apache-2.0"
    assert {"diffusers-dino", "dino", "diffusers:DinoDiffusionPipeline", "cxr"} <= set(data.tags)


def test_facts_are_a_table():
    text = model_card("org/name", TRAINING).text
    assert "| steps | 1240 |" in text
    assert "| learning rate | 0.0001 |" in text
    assert r"| note | two lines \| a bar |" in text
    assert "unused" not in text
    assert "Nothing is on record." in model_card("org/name", {}).text


def test_what_has_no_value_is_not_declared():
    data = model_card("name", {}).data.to_dict()
    assert not {"license", "base_model", "datasets"} & set(data)


def test_every_section_is_there():
    headings = re.findall(r"^## (.+)$", model_card("org/name", TRAINING).text, flags=re.MULTILINE)
    assert headings == [
        "Usage",
        "How it was trained",
        "Intended use",
        "Limits",
        "Privacy",
        "Citation",
    ]


def test_local_folders_are_not_published(tmp_path):
    (tmp_path / "ward7" / "vae").mkdir(parents=True)
    secret = tmp_path / "ward7" / "vae"
    card = model_card(
        "org/name",
        {"output": secret, "list": [str(secret)], "windows": r"C:\Users\someone\scans"},
        base_model=[str(secret), "facebook/dino-vitb16"],
        datasets=["/mnt/hospital/patients", "~/scans"],
    )
    for private in (str(tmp_path), "ward7", "hospital", "someone", "~"):
        assert private not in str(card)
    assert "| made from | vae, facebook/dino-vitb16 |" in card.text
    assert "| data | patients, scans |" in card.text
    assert card.data.base_model == ["facebook/dino-vitb16"]
    assert card.data.datasets is None


@pytest.mark.parametrize("lora", [False, True])
def test_usage_names_the_concrete_class(lora):
    card = model_card("org/name", {}, base_model="org/base", lora=lora)
    (usage,) = code_blocks(card.text, "python")
    tree = ast.parse(usage)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert "DinoDiffusionPipeline" in imported
    assert f'from_pretrained("{"org/base" if lora else "org/name"}")' in usage
    assert ('load_lora_weights("org/name")' in usage) == lora
    assert ("lora" in card.data.tags) == lora


def test_citations():
    (bibtex,) = code_blocks(model_card("org/name", {}).text, "bibtex")
    assert re.findall(r"^@\w+\{(\w+),", bibtex, flags=re.MULTILINE) == [
        "jimenezperez2024dinodiffusion",
        "caron2021emerging",
        "rombach2022high",
    ]
    assert bibtex.count("{") == bibtex.count("}")


def test_a_folder_without_a_model_is_not_pushed(tmp_path):
    (tmp_path / "README.md").write_text("nothing else")
    with pytest.raises(FileNotFoundError, match=rf"model_index\.json.*{LORA_FILE}"):
        push_folder(tmp_path, "org/name")


def test_a_card_in_a_folder_that_is_not_there(tmp_path):
    path = write_model_card(tmp_path / "new", "org/name", {})
    assert path.is_file()
