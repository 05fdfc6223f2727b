"""Commands that write data leave the folders of models, trainings and synthetic sets as they are."""

import pytest

import scripts
import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny.tiny_pipeline().save_pretrained(root / "model")
    scripts.image_folder(root / "images", 4, 32)
    return root


@pytest.mark.parametrize("command", ["shards", "cache", "synthesise"])
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "config.json",
        "pytorch_lora_weights.safetensors",
        "training_arguments.json",
        "run.json",
    ],
)
def test_what_holds_something_else_is_refused_and_stays(command, name, data, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_DINO_SALT", "grains of salt " * 4)
    images, folder = data / "images", tmp_path / "taken"
    flags = {
        "shards": {"source": images, "output_dir": folder},
        "cache": {
            "train_data_dir": images,
            "feature_cache": folder,
            "vae": data / "model/vae",
            "conditioner": data / "model/conditioner",
            "resolution": 32,
        },
        "synthesise": {"data_dir": images, "output_dir": folder, "model": data / "model", "ratio": 1},
    }
    folder.mkdir()
    for path in (folder / name, folder / "README.md"):
        path.write_text("of somebody")
    with pytest.raises((ValueError, OSError), match=rf"taken holds (something else \()?({name}|README)"):
        scripts.call_script(command, **flags[command])
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "README.md"])
    assert (folder / "README.md").read_text() == "of somebody"
