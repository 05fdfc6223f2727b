"""The card of a synthetic set says how it was made, from what, and what was not measured; it keeps folders private."""

import re
import shutil

import pytest
from huggingface_hub import DatasetCard

import tiny
from diffusers_dino.data import Preprocessing, collate, open_images
from diffusers_dino.data.sharding import recorded_sources, require_synthetic
from diffusers_dino.data.sharding.manifest import write_manifest
from diffusers_dino.evaluation import evaluate_memorization
from diffusers_dino.hub import dataset_card, write_dataset_card
from diffusers_dino.hub.measurements import describe_result
from diffusers_dino.synthesis import SynthesisSettings, plan_interpolation, plan_reconstruction, synthesise

LABELS = [{"mass"}, {"mass", "nodule"}, {"mass"}, {"effusion"}, {"effusion"}]
SETTINGS = SynthesisSettings(num_inference_steps=1, batch_size=4, shard_size=4, threads=1, guidance_scale=1.5)
NIH = {
    "name": "nih_chest_xray14",
    "title": "NIH ChestX-ray14",
    "licence": "No restriction of use",
    "citation": "Wang et al., 2017",
    "url": "https://nihcc.app.box.com/v/ChestXray-NIHCC",
    "contains": ["chest_xray8"],
    "samples": 5,
}


@pytest.fixture(scope="module")
def made(pipe, sources, tmp_path_factory):
    plan = plan_interpolation(sources.keys, LABELS, num_images=6, seed=7, settings=SETTINGS)
    return synthesise(plan, pipe, sources, tmp_path_factory.mktemp("ward7") / "set", progress=False)


def sections(card):
    parts = re.split(r"^## (.+)$", card.text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_metadata_is_what_the_hub_reads(made):
    path = write_dataset_card(made, "Chests", license="cc-by-4.0", tags=["cxr"])
    assert path == made.folder / "README.md"
    data = DatasetCard.load(path).data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["pretty_name"] == "Chests"
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["image-classification"]
    assert {"synthetic", "webdataset", "cxr"} <= set(data["tags"])
    assert data["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    assert "license" not in dataset_card(made).data.to_dict()


def test_the_card_says_how_the_set_was_made_and_counts_its_labels(made):
    card = dataset_card(made, model=str(made.folder.parent / "chest-v2"))
    assert "ward7" not in str(card), "the card names a folder of this machine"
    found = sections(card)
    recipe = found["How it was made"]
    facts = {"model": "chest-v2", "strategy": "interpolation", "sampling steps": 1, "guidance": 1.5, "seed": 7}
    for name, value in facts.items():
        assert f"| {name} | {value} |" in recipe
    assert made.plan.digest in recipe
    labels = [label for planned in made.planned() for label in planned.labels]
    for label in set(labels):
        assert f"| {label} | {labels.count(label)} |" in found["Labels"]
    assert "nearer" in found["Labels"]


def test_what_is_not_known_is_said(made):
    found = sections(dataset_card(made))
    assert "not on record" in found["What it was made from"]
    assert "**not measured**" in found["Privacy"]
    assert "No gate" in found["Privacy"]


def test_sources_come_with_licence_and_lineage(made, tmp_path):
    write_manifest(tmp_path, Preprocessing(32), [], {"sources": [NIH, {**NIH, "title": "Unused", "samples": 0}]})
    sources = recorded_sources(tmp_path)
    assert [source["title"] for source in sources] == ["NIH ChestX-ray14"]
    assert recorded_sources(tmp_path / "train-*.tar") == sources
    row = f"| [NIH ChestX-ray14]({NIH['url']}) | No restriction of use | chest_xray8 | Wang et al., 2017 |"
    assert row in sections(dataset_card(made, sources=sources))["What it was made from"]
    assert "Credentialed" not in dataset_card(made, sources=sources).text
    signed = {"title": "MIMIC", "licence": "PhysioNet Credentialed Health Data"}
    card = dataset_card(made, sources=[{"name": "ours"}, signed])
    assert "| ours | not on record |" in card.text
    assert "**Credentialed data.** MIMIC (PhysioNet" in card.text


def test_sources_without_a_record_are_none(made, tmp_path):
    assert recorded_sources(tmp_path) == []
    assert recorded_sources("https://example.org/shards") == []
    (tmp_path / "manifest.json").write_text("{")
    assert recorded_sources(tmp_path) == []
    (synthetic,) = recorded_sources(made.folder)
    assert made.plan.digest[:16] in synthetic["title"]


def test_a_set_is_known_to_be_synthetic_as_long_as_it_is_what_was_written(made, tmp_path):
    require_synthetic(made.folder)
    write_manifest(tmp_path, Preprocessing(32), [], {"sources": [NIH]})
    with pytest.raises(ValueError, match="nothing says that these images are synthetic"):
        require_synthetic(tmp_path)
    changed = shutil.copytree(made.folder, tmp_path / "changed")
    (changed / "train-999999.tar").write_bytes(b"other images")
    with pytest.raises(ValueError, match=r"train-999999\.tar is not in the manifest"):
        require_synthetic(changed / "*.tar")


def test_privacy_figures_are_those_of_the_memorization_protocol(made):
    real = open_images(made.folder, Preprocessing(32))
    images = tiny.random_images(40, channels=1, seed=3)
    generated = collate([real[i] for i in range(6)])["image"]
    result, _ = evaluate_memorization(images[:30], generated, images[30:], false_alarms=0.1, num_planted=2)
    privacy = sections(dataset_card(made, measurements=[describe_result(result)]))["Privacy"]
    assert "| images compared with the training images | 6 |" in privacy
    assert f"| near-copies of training images | {result.synthetic.copies} (" in privacy
    assert f"| feature space | {result.spec.extractor} |" in privacy
    assert "not measured" not in privacy


def test_a_gate_and_what_it_refused_are_named(pipe, sources, tmp_path):
    class EveryOther:
        """Refuses images that are darker than half of the first ones."""

        least = None

        def __call__(self, images):
            means = images.mean((1, 2, 3))
            self.least = means.median() if self.least is None else self.least
            return means >= self.least

        def fingerprint(self):
            return "half of them"

    plan = plan_reconstruction(sources.keys, num_images=4, settings=SETTINGS)
    made = synthesise(plan, pipe, sources, tmp_path / "set", gate=EveryOther(), max_left_out=1.0, progress=False)
    found = sections(dataset_card(made))
    refused = made.manifest["lineage"]["gate"]["refused"]
    assert refused > 0
    assert f"A gate (`half of them`) refused {refused} drawn images" in found["Privacy"]
    assert "no labels" in found["Labels"]
    assert dataset_card(made).data.task_categories == ["unconditional-image-generation"]


def test_the_first_example_of_the_card_reads_the_set(made, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'diffusers-dino[train]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (example, _) = re.findall(r"```python\n(.*?)```", dataset_card(made).text, flags=re.DOTALL)
    monkeypatch.chdir(made.folder)
    namespace = {}
    exec(example, namespace)
    samples = list(namespace["images"])
    assert [sample["__key__"] for sample in samples] == [planned.key for planned in made.planned()]
    assert samples[0]["png"].size == (32, 32)


def test_labels_and_titles_are_text(pipe, sources, tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    labels = [{bad}, {"[a](javascript:alert(1))"}, {"![](https://example.org/seen.png)"}]
    plan = plan_reconstruction(sources.keys[:3], labels, ratio=1, settings=SETTINGS)
    made = synthesise(plan, pipe, sources, tmp_path / "set", progress=False)
    path = write_dataset_card(made, f"Chests {bad}\n# not a title", model=bad)
    text = path.read_text()
    assert "# Chests &lt;img src=x onerror=alert(1)> # not a title\n" in text
    assert "| &lt;img src=x onerror=alert(1)> | 1 |" in text
    assert not re.search(r"<[a-z]|\]\(javascript|\]\(https://example", text)
