"""Pipelines over the Hub, both ways: the real client, in processes of its own, against a server on loopback."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from hub_server import HubServer, run_client

PREAMBLE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from diffusers_dino import DinoDiffusionPipeline

folder = Path(sys.argv[1])

def generate(name, source, **options):
    pipe = DinoDiffusionPipeline.from_pretrained(source, **options)
    pipe.set_progress_bar_config(disable=True)
    image = np.load(folder / "image.npy")
    generator = torch.Generator().manual_seed(0)
    images = pipe(image, generator=generator, num_inference_steps=2, output_type="np").images
    np.save(folder / f"{name}.npy", images)

def attempt(action):
    try:
        action()
    except Exception as error:
        return str(error)
"""

ONLINE = """
from diffusers_dino.hub import TrainingRecord, push_folder, write_model_card

DinoDiffusionPipeline.from_pretrained(folder / "first").push_to_hub("org/pushed")
generate("pushed", "org/pushed")
write_model_card(folder / "trained", "org/trained", TrainingRecord({"steps": 3}))
(folder / "repo_id").write_text(push_folder(folder / "trained", "org/trained", also=["samples/*.png"]))
generate("trained", "org/trained")
generate("latest", "org/name")
generate("by_tag", "org/name", revision="v1")
generate("by_commit", "org/name", revision=sys.argv[2])
generate("cached", "org/name", local_files_only=True)
generate("half", "org/half", variant="fp16", dtype=torch.float16)
"""

OFFLINE = """
generate("offline", "org/name")
generate("offline_half", "org/half", variant="fp16", dtype=torch.float16)
"""

FAILURES = """
pipe = DinoDiffusionPipeline.from_pretrained(folder / "first")
messages = {
    "pickles": attempt(lambda: generate("pickles", "org/pickles")),
    "missing": attempt(lambda: generate("missing", "org/missing")),
    "unauthorized": attempt(lambda: pipe.push_to_hub("org/unauthorized")),
}
(folder / "messages.json").write_text(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder):
    """A Hub on which `org/name` has two versions, `org/half` also fp16 weights, `org/pickles` nothing but pickles."""
    pipe = tiny.tiny_pipeline()
    np.save(folder / "image.npy", tiny.random_images(1)[0].movedim(0, -1).numpy())
    with HubServer() as server:
        for version in ("first", "second"):
            pipe.save_pretrained(folder / version)
            np.save(folder / f"expected_{version}.npy", expected(pipe, folder))
            commit = server.add_folder("org/name", folder / version)
            server.repositories["org/name"].references.setdefault("v1", commit)
            with torch.no_grad():
                pipe.unet.conv_out.weight.mul_(2)
        shutil.copytree(folder / "first", folder / "trained")  # as a training leaves it
        for name in ("validation/step_3.png", "samples/0.png", "checkpoints/3/state.pt", "training_arguments.json"):
            (folder / "trained" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "trained" / name).write_bytes(b"content")
        pipe.save_pretrained(folder / "pickles", safe_serialization=False)
        server.add_folder("org/pickles", folder / "pickles")
        server.add_folder("org/half", folder / "second")
        half = type(pipe).from_pretrained(folder / "second", dtype=torch.float16)
        half.save_pretrained(folder / "half", variant="fp16")
        server.add_folder("org/half", folder / "half")
        yield server


@pytest.fixture(scope="module")
def online(hub, folder):
    """What a client with an empty cache brings about."""
    first_commit = hub.repositories["org/name"].references["v1"]
    run_client(PREAMBLE + ONLINE, hub.client_environment(folder / "home"), folder, first_commit)
    return folder


@pytest.fixture(scope="module")
def failures(hub, folder):
    """Error messages of what must not work."""
    environment = {**hub.client_environment(folder / "home_of_another"), "HF_TOKEN": "hf_wrong"}
    run_client(PREAMBLE + FAILURES, environment, folder)
    return json.loads((folder / "messages.json").read_text())


def expected(pipe, folder):
    image = np.load(folder / "image.npy")
    return tiny.generate(pipe, image, num_inference_steps=2)


def load(folder, name):
    return np.load(folder / f"{name}.npy")


def test_downloaded_pipelines_generate_the_same_bits(hub, online):
    assert np.array_equal(load(online, "latest"), load(online, "expected_second"))
    assert any("org/name/resolve/" in request for request in hub.requests)


def test_a_revision_is_a_tag_or_a_commit(online):
    assert not np.array_equal(load(online, "expected_first"), load(online, "expected_second"))
    for name in ("by_tag", "by_commit"):
        assert np.array_equal(load(online, name), load(online, "expected_first"))


def test_a_variant_downloads_its_weights_alone(hub, online):
    assert np.abs(load(online, "half") - load(online, "expected_second")).mean() < 0.02
    weights = [r for r in hub.requests if "org/half/resolve/" in r and r.endswith(".safetensors")]
    assert weights
    assert all(request.endswith(".fp16.safetensors") for request in weights)


def test_the_cache_serves_without_a_network(hub, online):
    asked = len(hub.requests)
    environment = {**hub.client_environment(online / "home"), "HF_HUB_OFFLINE": "1"}
    run_client(PREAMBLE + OFFLINE, environment, online)
    assert len(hub.requests) == asked
    assert np.array_equal(load(online, "offline"), load(online, "latest"))
    assert np.array_equal(load(online, "cached"), load(online, "latest"))
    assert np.array_equal(load(online, "offline_half"), load(online, "half"))


def test_a_pushed_pipeline_is_whole(hub, online):
    files = hub.repositories["org/pushed"].files()
    assert set(files) >= {
        "README.md",
        "model_index.json",
        "conditioner/config.json",
        "conditioner/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not any(path.endswith((".bin", ".pkl", ".pt")) for path in files)
    assert np.array_equal(load(online, "pushed"), load(online, "expected_first"))


def test_a_pushed_training_folder_is_the_model_its_card_and_nothing_else(hub, online):
    files = hub.repositories["org/trained"].files()
    assert set(files) == set(hub.repositories["org/pushed"].files()) | {"samples/0.png"}
    assert b"| steps | 3 |" in files["README.md"]
    assert (online / "repo_id").read_text() == "org/trained"
    assert np.array_equal(load(online, "trained"), load(online, "expected_first"))


def test_pickles_are_not_even_downloaded_unasked(hub, failures):
    assert "safetensors" in failures["pickles"]
    assert not any(request.endswith(".bin") for request in hub.requests)


def test_failures_name_the_repository_or_the_reason(hub, failures):
    assert "org/missing" in failures["missing"]
    assert "401" in failures["unauthorized"]
    assert "org/unauthorized" not in hub.repositories


def test_the_suite_itself_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
