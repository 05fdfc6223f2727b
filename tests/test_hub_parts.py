"""Conditioners, autoencoders, LoRA, shards and the other pipelines over the Hub, both ways; what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers

import tiny
from diffusers_dino import DiffSegPipeline, DinoInterpolationPipeline
from diffusers_dino.hub import TrainingRecord, files_to_push, push_folder
from diffusers_dino.hub.folder import variant_of
from diffusers_dino.hub.upload import replaced_weights
from hub_server import TOKEN, HubServer, run_client

PREAMBLE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner, DinoInterpolationPipeline

folder = Path(sys.argv[1])
image = np.load(folder / "image.npy")

def save(name, result):
    np.save(folder / f"{name}.npy", np.asarray(result))

def generate(name, pipe, *images, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    save(name, pipe(*images, generator=generator, num_inference_steps=2, output_type="np", **options).images)
"""

PUSH = """
from diffusers_dino.hub import push_files, push_folder, files_to_push

for name in ("dino", "vae", "lora", "sharded"):
    push_folder(folder / name, f"org/{name}")
DinoImageConditioner.from_pretrained(folder / "dino").push_to_hub("org/direct")
DinoInterpolationPipeline.from_pretrained(folder / "sharded").push_to_hub("org/between")
DiffSegPipeline.from_pretrained(folder / "sharded").push_to_hub("org/diffseg")
push_folder(folder / "dino", "org/private", private=True)
push_folder(folder / "cls", "org/dino", revision="cls")
asked = push_files(files_to_push(folder / "cls"), "org/vae", create_pr=True)
(folder / "pr_url").write_text(asked.pr_url)
push_folder(folder / "sharded", "org/replaced")
push_folder(folder / "whole", "org/replaced")
"""

FETCH = """
import huggingface_hub
from diffusers_dino.hub import push_folder
from huggingface_hub import snapshot_download

def attempt(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def conditioner(name, **options):
    return DinoImageConditioner.from_pretrained(name, **options)

save("tokens", conditioner("org/dino", cache_dir=folder / "cache").encode(image))
save("direct", conditioner("org/direct").encode(image))
save("cls", conditioner("org/dino", revision="cls").encode(image))
save("private", conditioner("org/private").encode(image))
vae = AutoencoderKL.from_pretrained("org/vae")
save("vae", vae.decode(torch.zeros(1, 4, 8, 8)).sample.detach())
pipe = DinoDiffusionPipeline.from_pretrained("org/sharded")
generate("sharded", pipe, image)
generate("replaced", DinoDiffusionPipeline.from_pretrained("org/replaced"), image)
between = DinoInterpolationPipeline.from_pretrained("org/between")
generate("between", between, image, image[::-1].copy(), fractions=[0.5])
save("masks", DiffSegPipeline.from_pretrained("org/diffseg")(image, timestep=300, merge_threshold=0.5).masks)
pipe.load_lora_weights("org/lora")
generate("lora", pipe, image)
snapshot_download("org/sharded", local_dir=folder / "carried")
snapshot_download("org/dino", local_dir=folder / "carried_dino")
messages = {
    "revision": attempt(lambda: conditioner("org/dino", revision="v9")),
    "variant": attempt(lambda: conditioner("org/dino", variant="fp16")),
    "pipeline variant": attempt(lambda: DinoDiffusionPipeline.from_pretrained("org/replaced", variant="fp16")),
    "lora": attempt(lambda: pipe.load_lora_weights("org/vae")),
    "token": attempt(lambda: conditioner("org/private", token="hf_wrong", cache_dir=folder / "empty")),
    "push": attempt(lambda: DinoImageConditioner.from_pretrained(folder / "dino").push_to_hub("org/x", token="hf_no")),
    "push_folder": attempt(lambda: push_folder(folder / "dino", "org/x", token="hf_no")),
}
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"  # where nothing listens
messages["unreachable"] = attempt(lambda: push_folder(folder / "dino", "org/x"))
(folder / "messages.json").write_text(json.dumps(messages))
"""

OFFLINE = """
pipe = DinoDiffusionPipeline.from_pretrained(folder / "carried")
generate("carried", pipe, image)
pipe.load_lora_weights("org/lora")
generate("lora_offline", pipe, image)
save("carried_dino", DinoImageConditioner.from_pretrained(folder / "carried_dino").encode(image))
save("offline", DinoImageConditioner.from_pretrained("org/direct").encode(image))
vae = AutoencoderKL.from_pretrained("org/vae", local_files_only=True)
save("vae_offline", vae.decode(torch.zeros(1, 4, 8, 8)).sample.detach())
"""


def save_lora(pipe, folder):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'diffusers-dino[train]'")
    with tiny.seeded(5):
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    pipe.save_lora_weights(folder, convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet)))
    pipe.unet.delete_adapters("default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders as trainings leave them, and what the models in them give."""
    path = tmp_path_factory.mktemp("parts")
    image = tiny.random_images(1)[0].movedim(0, -1).numpy()
    np.save(path / "image.npy", image)
    pipe = tiny.tiny_pipeline()
    pipe.conditioner.save_pretrained(path / "dino")
    pipe.conditioner.with_tokens("cls").save_pretrained(path / "cls")
    pipe.vae.save_pretrained(path / "vae")
    pipe.save_pretrained(path / "sharded", max_shard_size="60KB")
    save_lora(pipe, path / "lora")
    for name in ("dino", "vae", "lora"):
        for stray in (
            "training_arguments.json",
            "diagnosis.json",
            "reconstructions.png",
            "checkpoint-5/state.safetensors",
        ):
            (path / name / stray).parent.mkdir(exist_ok=True)
            (path / name / stray).write_text("{}")
    with torch.no_grad():
        expected = {
            "tokens": pipe.conditioner.encode(image),
            "cls": pipe.conditioner.with_tokens("cls").encode(image),
            "vae": pipe.vae.decode(torch.zeros(1, 4, 8, 8)).sample,
        }
    expected |= {
        "sharded": tiny.generate(pipe, image, num_inference_steps=2),
        "between": tiny.generate(
            DinoInterpolationPipeline.from_pipe(pipe), image, num_inference_steps=2,
            target=image[::-1].copy(), fractions=[0.5],
        ),
        "masks": DiffSegPipeline.from_pipe(pipe)(image, timestep=300, merge_threshold=0.5).masks,
    }  # fmt: skip
    pipe.load_lora_weights(path / "lora")
    expected["lora"] = tiny.generate(pipe, image, num_inference_steps=2)
    pipe.unload_lora_weights()
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    pipe.save_pretrained(path / "whole")
    expected["replaced"] = tiny.generate(pipe, image, num_inference_steps=2)
    for name, value in expected.items():
        np.save(path / f"expected_{name}.npy", np.asarray(value))
    return path


@pytest.fixture(scope="module")
def hub(folder):
    """One process uploads, another with an empty cache downloads, a third has its cache and no network."""
    with HubServer() as server:
        run_client(PREAMBLE + PUSH, server.client_environment(folder / "home_1"), folder)
        run_client(PREAMBLE + FETCH, server.client_environment(folder / "home_2"), folder)
        asked = len(server.requests)
        offline = {**server.client_environment(folder / "home_2"), "HF_HUB_OFFLINE": "1"}
        run_client(PREAMBLE + OFFLINE, offline, folder)
        assert len(server.requests) == asked
        yield server


def same(folder, name, expected):
    return np.array_equal(np.load(folder / f"{name}.npy"), np.load(folder / f"expected_{expected}.npy"))


@pytest.mark.parametrize("name", ["tokens", "cls", "vae", "sharded", "replaced", "between", "masks", "lora"])
def test_what_was_uploaded_comes_back_the_same_to_the_bit(hub, folder, name):
    assert same(folder, name, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("direct", "tokens"),
        ("private", "tokens"),
        ("carried", "sharded"),
        ("carried_dino", "tokens"),
        ("offline", "tokens"),
        ("lora_offline", "lora"),
        ("vae_offline", "vae"),
    ],
)
def test_other_ways_lead_to_the_same_bits(hub, folder, name, expected):
    assert same(folder, name, expected)


def test_revisions_and_adapters_are_others(folder):
    """Else the comparisons above would show nothing."""
    values = {name: np.load(folder / f"expected_{name}.npy") for name in ("sharded", "replaced", "lora")}
    assert not np.array_equal(values["sharded"], values["replaced"])
    assert not np.array_equal(values["sharded"], values["lora"])
    assert np.load(folder / "expected_cls.npy").shape != np.load(folder / "expected_tokens.npy").shape


def test_the_cache_is_where_it_was_asked_for(hub, folder):
    (weights,) = (folder / "cache" / "models--org--dino").rglob("*.safetensors")
    assert weights.stat().st_size == (folder / "dino" / weights.name).stat().st_size


def test_nothing_but_the_model_is_uploaded(hub):
    weights = "diffusion_pytorch_model.safetensors"
    assert set(hub.repositories["org/dino"].files()) == {"config.json", weights}
    assert set(hub.repositories["org/vae"].files()) == {"config.json", weights}
    assert set(hub.repositories["org/lora"].files()) == {"pytorch_lora_weights.safetensors"}


def test_shards_are_uploaded_with_their_index_and_leave_with_it(hub):
    shards = [name for name in hub.repositories["org/sharded"].files() if name.startswith("unet/")]
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in shards
    assert sum("-of-" in name for name in shards) > 1
    replaced = hub.repositories["org/replaced"].files()
    assert [name for name in replaced if name.startswith("unet/")] == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_private_branches_and_pull_requests(hub, folder):
    assert hub.repositories["org/private"].private
    assert not hub.repositories["org/dino"].private
    assert set(hub.repositories["org/dino"].references) == {"main", "cls"}
    assert (folder / "pr_url").read_text().endswith("/org/vae/discussions/1")
    asked = hub.repositories["org/vae"]
    assert asked.files("refs/pr/1")["config.json"] != asked.files()["config.json"]


def test_failures_say_what_is_missing(hub, folder):
    messages = json.loads((folder / "messages.json").read_text())
    assert "v9" in messages["revision"]
    assert "diffusion_pytorch_model.fp16.safetensors" in messages["variant"]
    assert "fp16" in messages["pipeline variant"]
    assert "no LoRA weights of a UNet" in messages["lora"]
    assert "org/private is not a local folder" in messages["token"]
    assert "hf auth login" in messages["token"] or "`token`" in messages["token"]
    assert "401" in messages["push"]
    assert "PermissionError: The Hub does not let you write to org/x: log in" in messages["push_folder"]
    assert "cannot be reached" in messages["unreachable"]
    assert not [name for name, message in messages.items() if not message or TOKEN in message]
    assert "org/x" not in hub.repositories


def test_a_folder_without_a_model_is_not_pushed(tmp_path):
    (tmp_path / "README.md").write_text("nothing else")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json.*pytorch_lora_weights"):
        push_folder(tmp_path, "org/name")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(FileNotFoundError, match="found a UNet2DModel"):
        push_folder(tmp_path, "org/name")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        push_folder(tmp_path, "org/name")


def test_a_folder_that_lacks_a_part_is_not_pushed(folder, tmp_path):
    pipe = tiny.tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="60KB")
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


def test_a_card_with_a_folder_of_this_machine_is_not_pushed(tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("Trained on /home/anna/scans")
    with pytest.raises(ValueError, match=r"README\.md holds what should stay on this machine: /home/anna/scans"):
        push_folder(tmp_path, "org/name")


def test_the_record_of_a_training_stays_at_home(tmp_path):
    tiny.tiny_vae().save_pretrained(tmp_path)
    TrainingRecord({"updates": 3}).save(tmp_path)
    assert set(files_to_push(tmp_path, also=["*.png"])) == {"config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model.safetensors.index.json", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
    ],
)
def test_weights_give_way_to_those_of_their_own_variant(name, variant):
    assert variant_of(name) == variant
    new = {f"unet/{name}": b""}
    there = ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "README.md"]
    there += [
        "unet/diffusion_pytorch_model-00001-of-00003.safetensors",
        "unet/diffusion_pytorch_model.fp16-1.safetensors",
    ]
    assert replaced_weights(there, new) == [there[3] if variant is None else there[4]]
