"""Models over the Hub, both ways: the real client, in processes of its own, against a server on loopback."""

import json
import shutil

import numpy as np
import pytest
import torch

import tiny
from diffusers_dino import DiffSegPipeline, DinoInterpolationPipeline
from diffusers_dino.hub import TrainingRecord, files_to_push, push_folder
from diffusers_dino.hub.folder import variant_of
from diffusers_dino.hub.upload import replaced_weights
from hub_server import TOKEN, HubServer, run_client

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREAMBLE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner, DinoInterpolationPipeline
from diffusers_dino.hub import TrainingRecord, files_to_push, push_files, push_folder, write_model_card

folder = Path(sys.argv[1])
image = np.load(folder / "image.npy")

def save(name, result):
    np.save(folder / f"{name}.npy", np.asarray(result))

def generate(name, pipe, *images, **options):
    generator = torch.Generator().manual_seed(0)
    images = images or (image,)
    save(name, pipe(*images, generator=generator, num_inference_steps=2, output_type="np", **options).images)

def load(name, **options):
    return DinoDiffusionPipeline.from_pretrained(name, **options)

def conditioner(name, **options):
    return DinoImageConditioner.from_pretrained(name, **options)
"""

PUSH = """
for name in ("dino", "vae", "lora", "sharded"):
    push_folder(folder / name, f"org/{name}")
load(folder / "first").push_to_hub("org/pushed")
conditioner(folder / "dino").push_to_hub("org/direct")
DinoInterpolationPipeline.from_pretrained(folder / "sharded").push_to_hub("org/between")
DiffSegPipeline.from_pretrained(folder / "sharded").push_to_hub("org/diffseg")
write_model_card(folder / "trained", "org/trained", TrainingRecord({"steps": 3}))
(folder / "repo_id").write_text(push_folder(folder / "trained", "org/trained", also=["samples/*.png"]))
push_folder(folder / "dino", "org/private", private=True)
push_folder(folder / "cls", "org/dino", revision="cls")
asked = push_files(files_to_push(folder / "cls"), "org/vae", create_pr=True)
(folder / "pr_url").write_text(asked.pr_url)
push_folder(folder / "sharded", "org/replaced")
push_folder(folder / "second", "org/replaced")
"""

FETCH = """
import huggingface_hub

assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.safetensors")), "nothing is downloaded yet"

def attempt(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

generate("pushed", load("org/pushed"))
generate("trained", load("org/trained"))
generate("latest", load("org/name"))
generate("by_tag", load("org/name", revision="v1"))
generate("by_commit", load("org/name", revision=sys.argv[2]))
generate("cached", load("org/name", local_files_only=True))
generate("half", load("org/half", variant="fp16", dtype=torch.float16))
save("tokens", conditioner("org/dino", cache_dir=folder / "cache").encode(image))
save("direct", conditioner("org/direct").encode(image))
save("cls", conditioner("org/dino", revision="cls").encode(image))
save("private", conditioner("org/private").encode(image))
vae = AutoencoderKL.from_pretrained("org/vae")
save("vae", vae.decode(torch.zeros(1, 4, 8, 8)).sample.detach())
pipe = load("org/sharded")
generate("sharded", pipe)
generate("replaced", load("org/replaced"))
between = DinoInterpolationPipeline.from_pretrained("org/between")
generate("between", between, image, image[::-1].copy(), fractions=[0.5])
save("masks", DiffSegPipeline.from_pretrained("org/diffseg")(image, timestep=300, merge_threshold=0.5).masks)
pipe.load_lora_weights("org/lora")
generate("lora", pipe)
huggingface_hub.snapshot_download("org/sharded", local_dir=folder / "carried")
huggingface_hub.snapshot_download("org/dino", local_dir=folder / "carried_dino")
messages = {
    "pickles": attempt(lambda: load("org/pickles")),
    "missing": attempt(lambda: load("org/missing")),
    "revision": attempt(lambda: conditioner("org/dino", revision="v9")),
    "variant": attempt(lambda: conditioner("org/dino", variant="fp16")),
    "pipeline variant": attempt(lambda: load("org/replaced", variant="fp16")),
    "lora": attempt(lambda: pipe.load_lora_weights("org/vae")),
    "token": attempt(lambda: conditioner("org/private", token="hf_wrong", cache_dir=folder / "empty")),
    "push": attempt(lambda: conditioner(folder / "dino").push_to_hub("org/x", token="hf_no")),
    "push_folder": attempt(lambda: push_folder(folder / "dino", "org/x", token="hf_no")),
    "public": attempt(lambda: push_folder(folder / "cls", "org/vae", private=True)),
}
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"  # where nothing listens
messages["unreachable"] = attempt(lambda: push_folder(folder / "dino", "org/x"))
(folder / "messages.json").write_text(json.dumps(messages))
"""

OFFLINE = """
generate("offline", load("org/name"))
generate("half_offline", load("org/half", variant="fp16", dtype=torch.float16))
pipe = load(folder / "carried")
generate("carried", pipe)
pipe.load_lora_weights("org/lora")
generate("lora_offline", pipe)
save("carried_dino", conditioner(folder / "carried_dino").encode(image))
save("dino_offline", conditioner("org/direct").encode(image))
vae = AutoencoderKL.from_pretrained("org/vae", local_files_only=True)
save("vae_offline", vae.decode(torch.zeros(1, 4, 8, 8)).sample.detach())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders as trainings leave them, and what the models in them give."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'diffusers-dino[train]'")
    from adapters import save_adapter

    path = tmp_path_factory.mktemp("hub")
    image = tiny.random_images(1)[0].movedim(0, -1).numpy()
    np.save(path / "image.npy", image)
    pipe = tiny.tiny_pipeline()
    pipe.conditioner.save_pretrained(path / "dino")
    pipe.conditioner.with_tokens("cls").save_pretrained(path / "cls")
    pipe.vae.save_pretrained(path / "vae")
    pipe.save_pretrained(path / "first")
    pipe.save_pretrained(path / "sharded", max_shard_size="60KB")
    shutil.copytree(path / "first", path / "trained")
    save_adapter(path / "lora", 5)
    strays = ("validation/step_3.png", "samples/0.png", "checkpoint-5/state.safetensors", "training_arguments.json")
    for place in (path / name / stray for name in ("dino", "vae", "lora", "trained") for stray in strays):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    options = {"num_inference_steps": 2}
    between = {"target": image[::-1].copy(), "fractions": [0.5], **options}
    with torch.no_grad():
        expected = {
            "tokens": pipe.conditioner.encode(image),
            "cls": pipe.conditioner.with_tokens("cls").encode(image),
            "vae": pipe.vae.decode(torch.zeros(1, 4, 8, 8)).sample,
            "first": tiny.generate(pipe, image, **options),
            "between": tiny.generate(DinoInterpolationPipeline.from_pipe(pipe), image, **between),
            "masks": DiffSegPipeline.from_pipe(pipe)(image, timestep=300, merge_threshold=0.5).masks,
        }
        pipe.load_lora_weights(path / "lora")
        expected["lora"] = tiny.generate(pipe, image, **options)
        pipe.unload_lora_weights()
        pipe.unet.conv_out.weight.mul_(2)
        pipe.save_pretrained(path / "second")
        expected["second"] = tiny.generate(pipe, image, **options)
    pipe.save_pretrained(path / "pickles", safe_serialization=False)
    type(pipe).from_pretrained(path / "second", dtype=torch.float16).save_pretrained(path / "half", variant="fp16")
    assert not np.array_equal(expected["first"], expected["second"]), "revisions are the same: nothing is compared"
    assert not np.array_equal(expected["first"], expected["lora"])
    for name, value in expected.items():
        np.save(path / f"expected_{name}.npy", np.asarray(value))
    return path


@pytest.fixture(scope="module")
def hub(folder):
    """One process uploads and downloads, another has its cache and no network.

    `org/name` has two versions from the start, `org/half` also fp16 weights, and `org/pickles` only pickles.
    """
    with HubServer() as server:
        first_commit = server.add_folder("org/name", folder / "first")
        server.repositories["org/name"].references["v1"] = first_commit
        for name, source in (("name", "second"), ("half", "second"), ("half", "half"), ("pickles", "pickles")):
            server.add_folder(f"org/{name}", folder / source)
        online = server.client_environment(folder / "home")
        run_client(PREAMBLE + PUSH + FETCH, online, folder, first_commit)
        asked = len(server.requests)
        run_client(PREAMBLE + OFFLINE, {**online, "HF_HUB_OFFLINE": "1"}, folder)
        assert len(server.requests) == asked
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in ("tokens", "cls", "vae", "between", "masks", "lora")),
        *((name, "first") for name in ("pushed", "trained", "sharded", "by_tag", "by_commit", "carried")),
        *((name, "second") for name in ("latest", "cached", "offline", "replaced")),
        *((name, "tokens") for name in ("direct", "private", "carried_dino", "dino_offline")),
        ("lora_offline", "lora"),
        ("vae_offline", "vae"),
    ],
)
def test_what_comes_back_is_the_same_to_the_bit(hub, folder, name, expected):
    assert np.array_equal(np.load(folder / f"{name}.npy"), np.load(folder / f"expected_{expected}.npy"))


def test_a_variant_downloads_only_its_weights(hub, folder):
    half, offline = np.load(folder / "half.npy"), np.load(folder / "half_offline.npy")
    assert np.abs(half - np.load(folder / "expected_second.npy")).mean() < 0.02
    assert np.array_equal(half, offline)
    weights = [
        request for request in hub.requests if "org/half/resolve/" in request and request.endswith(".safetensors")
    ]
    assert weights
    asked = "HEAD /org/half/resolve/main/conditioner/familiarity.safetensors"  # whether it has statistics: it has none
    assert not [request for request in weights if not request.endswith(".fp16.safetensors") and request != asked]
    (cached,) = (folder / "cache" / "models--org--dino/snapshots").rglob("*.safetensors")  # where it was asked for
    assert cached.read_bytes() == (folder / "dino" / cached.name).read_bytes()


def test_nothing_but_the_model_is_uploaded(hub, folder):
    files = {name: repository.files() for name, repository in hub.repositories.items()}
    assert set(files["org/dino"]) == set(files["org/vae"]) == {"config.json", WEIGHTS}
    assert set(files["org/lora"]) == {"pytorch_lora_weights.safetensors"}
    parts = {f"{part}/{name}" for part in ("conditioner", "unet", "vae") for name in ("config.json", WEIGHTS)}
    pipeline = parts | {"README.md", "model_index.json", "scheduler/scheduler_config.json"}
    assert set(files["org/pushed"]) == pipeline
    assert set(files["org/trained"]) == pipeline | {"samples/0.png"}
    assert b"| steps | 3 |" in files["org/trained"]["README.md"]
    assert (folder / "repo_id").read_text() == "org/trained"


def test_shards_are_uploaded_with_their_index_and_leave_with_it(hub):
    shards = [name for name in hub.repositories["org/sharded"].files() if name.startswith("unet/")]
    assert f"unet/{WEIGHTS}.index.json" in shards
    assert sum("-of-" in name for name in shards) > 1
    replaced = hub.repositories["org/replaced"].files()
    assert [name for name in replaced if name.startswith("unet/")] == ["unet/config.json", f"unet/{WEIGHTS}"]


def test_private_branches_and_pull_requests(hub, folder):
    assert hub.repositories["org/private"].private
    assert not hub.repositories["org/dino"].private
    assert set(hub.repositories["org/dino"].references) == {"main", "cls"}
    assert (folder / "pr_url").read_text().endswith("/org/vae/discussions/1")
    asked = hub.repositories["org/vae"]
    assert asked.files("refs/pr/1")["config.json"] != asked.files()["config.json"]


def test_failures_say_what_is_missing(hub, folder):
    messages = json.loads((folder / "messages.json").read_text())
    assert "safetensors" in messages["pickles"]
    assert not any(request.endswith(".bin") for request in hub.requests)  # not even downloaded
    assert "org/missing" in messages["missing"]
    assert "v9" in messages["revision"]
    assert "diffusion_pytorch_model.fp16.safetensors" in messages["variant"]
    assert "fp16" in messages["pipeline variant"]
    assert "no LoRA weights of a UNet" in messages["lora"]
    assert "org/private is not a local folder" in messages["token"]
    assert "hf auth login" in messages["token"] or "`token`" in messages["token"]
    assert "401" in messages["push"]
    assert "PermissionError: The Hub does not let you write to org/x: log in" in messages["push_folder"]
    assert "PermissionError: org/vae is there already and is public" in messages["public"]
    assert "cannot be reached" in messages["unreachable"]
    assert not [name for name, message in messages.items() if not message or TOKEN in message]
    assert "org/x" not in hub.repositories


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", "nothing else", r"model_index\.json.*pytorch_lora_weights"),
        ("config.json", '{"_class_name": "UNet2DModel"}', "found a UNet2DModel"),
        ("config.json", "{", "config.json is damaged"),
    ],
)
def test_a_folder_without_a_model_is_not_pushed(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        push_folder(tmp_path, "org/name")


def test_a_folder_that_lacks_a_part_is_not_pushed(tmp_path):
    tiny.tiny_pipeline().save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted((tmp_path / "unet").glob("*-of-*"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is not there"):
        push_folder(tmp_path, "org/name")
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"unet/{shard.name} is damaged"):
        push_folder(tmp_path, "org/name")
    shard.write_bytes(content)
    for path in (tmp_path / "vae").glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights as safetensors"):
        push_folder(tmp_path, "org/name")


def test_configs_forget_where_they_were_loaded_from(tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path / "ward7" / "vae")
    pipe = tiny.tiny_pipeline(vae=type(tiny.tiny_vae()).from_pretrained(tmp_path / "ward7" / "vae"))
    pipe.save_pretrained(tmp_path / "model")
    assert "ward7" in (tmp_path / "model" / "vae" / "config.json").read_text()
    config = json.loads(files_to_push(tmp_path / "model")["vae/config.json"])
    assert "_name_or_path" not in config
    assert config["latent_channels"] == tiny.LATENT_CHANNELS


def test_what_is_private_stays_at_home(tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path)
    TrainingRecord({"updates": 3}).save(tmp_path)
    assert set(files_to_push(tmp_path, also=["*.png"])) == {"config.json", WEIGHTS}
    (tmp_path / "README.md").write_text("Trained on /home/anna/scans")
    with pytest.raises(ValueError, match=r"README\.md holds what should stay on this machine: /home/anna/scans"):
        push_folder(tmp_path, "org/name")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (WEIGHTS, None),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        (f"{WEIGHTS}.index.json", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        (f"{WEIGHTS}.index.fp16.json", "fp16"),
    ],
)
def test_weights_give_way_to_those_of_their_own_variant(name, variant):
    assert variant_of(name) == variant
    others = ["unet/config.json", f"vae/{WEIGHTS}", "README.md"]
    full = "unet/diffusion_pytorch_model-00001-of-00003.safetensors"
    half = "unet/diffusion_pytorch_model.fp16-1.safetensors"
    assert replaced_weights([*others, full, half], {f"unet/{name}": b""}) == [full if variant is None else half]
