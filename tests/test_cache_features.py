"""`diffusers-dino cache` and training from what it makes, in this process and as others."""

import json
from pathlib import Path

import pytest
import yaml

import scripts
from diffusers_dino import DinoImageConditioner
from folders import contents
from scripts import losses


@pytest.fixture
def flags(tmp_path) -> dict:
    """Flags of a training run whose features are to be cached."""
    return scripts.tiny_training(tmp_path, count=12) | {
        "max_train_steps": 8,  # two epochs and a half
        "cache_views": 2,
        "cache_batch_size": 8,
        "validation_steps": 4,
        "num_validation_variations": 1,
        "validation_inference_steps": 1,
    }


@pytest.fixture
def config(flags, tmp_path) -> Path:
    """The flags as the YAML file that both programs read."""
    path = tmp_path / "my_training.yaml"
    path.write_text(yaml.safe_dump({name: str(value) for name, value in flags.items()}))
    return path


def test_training_from_disk_equals_training_from_memory(flags, config, tmp_path):
    cache = tmp_path / "features"
    scripts.call_script("cache", config, feature_cache=cache, storage_dtype="float32")
    runs = {
        "memory": {},
        "disk": {"feature_cache": cache, "cache_views": 0},
        "workers": {"feature_cache": cache, "dataloader_num_workers": 2},
        "made": {"feature_cache": cache, "conditioner": cache / "conditioner"},
    }
    for name, changes in runs.items():
        scripts.call_script("train_dino.py", **{**flags, **changes, "output_dir": tmp_path / name})
    for name in ("disk", "workers", "made"):
        assert losses(tmp_path / name) == losses(tmp_path / "memory")
        assert scripts.same_weights(tmp_path / name / "unet", tmp_path / "memory" / "unet")
        assert (tmp_path / name / "validation" / "0000008.png").is_file()
    with pytest.raises(ValueError, match=r"shear was 0\.05, is 0\.2"):
        scripts.call_script("train_dino.py", **{**flags, "feature_cache": cache, "shear": 0.2})
    with pytest.raises(ValueError, match="--feature_cache"):
        scripts.call_script("cache", config)


def test_the_conditioner_of_a_start_that_was_given_up_is_replaced(flags, config, tmp_path):
    kept = tmp_path / "features" / "conditioner"
    wanted = DinoImageConditioner.from_pretrained(flags["conditioner"])
    wanted.with_tokens("cls").save_pretrained(kept)
    scripts.call_script("cache", config, feature_cache=kept.parent)
    assert DinoImageConditioner.from_pretrained(kept).config["tokens"] == wanted.config["tokens"] != "cls"


@pytest.mark.slow
def test_two_processes_change_no_byte(config, tmp_path):
    flags = {"samples_per_shard": 4}
    folders = {processes: tmp_path / f"{processes}" for processes in (1, 2)}
    for processes, folder in folders.items():
        options = {"processes": processes, "threads": 1}
        scripts.run_script("cache", config, **options, **flags, feature_cache=folder)
    whole = contents(folders[1])
    assert contents(folders[2]) == whole
    assert [shard["samples"] for shard in json.loads(whole["manifest.json"])["shards"]] == [4, 4, 4]
