"""`diffusers-dino publish` as a user runs it: what it shows, uploads, writes to carry, and refuses."""

import hashlib
import io
import json
import shutil
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.data.sources import describe_source
from diffusers_dino.files import lock_folder
from diffusers_dino.hub import TrainingRecord, model_files, write_files
from diffusers_dino.metrics.copy_gate import CopyGate
from hub_server import HubServer
from kills import kills
from results import RECONSTRUCTION

PHANTOMS = scripts.EXAMPLES / "data" / "phantom-cxr"
publish = partial(scripts.call_script, "publish")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pipeline as training leaves it, with results beside it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.tiny_pipeline().save_pretrained(folder / "model")
    for stray in ("train_log.jsonl", "training_arguments.json", "validation/3.png", "samples/patient.png"):
        (folder / "model" / stray).parent.mkdir(exist_ok=True)
        (folder / "model" / stray).write_text("{}")
    record = TrainingRecord({"updates": 3}, ["org/vae"], sources=[describe_source("nih_chest_xray14")])
    record.save(folder / "model")
    (folder / "results").mkdir()
    RECONSTRUCTION.save(folder / "results" / "reconstruction.json")
    (folder / "results" / "other.json").write_text("[]")
    return folder


@pytest.fixture
def flags(trained):
    """Of a run that asks for everything, at toy size."""
    return {
        "model": trained / "model",
        "results": trained / "results",
        "evaluated_on": "phantoms",
        "samples": f"{PHANTOMS}/phantom-cxr-test-*.tar",
        "num_samples": 2,
        "num_variations": 2,
        "num_inference_steps": 1,
        "license": "apache-2.0",
    }


@pytest.mark.slow
def test_a_trained_folder_is_published_in_one_command(flags, trained, tmp_path):
    with HubServer() as hub:
        environment = {**hub.client_environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        output = scripts.run_script(
            "publish",
            fresh=True,
            environment=environment,
            **flags,
            repo_id="org/model",
            variant="fp16",
            private="true",
        )
        repository = hub.repositories["org/model"]
    assert repository.private
    assert f"{hub.url}/org/model/commit/" in output
    weights = [f"{part}/diffusion_pytorch_model" for part in ("conditioner", "unet", "vae")]
    full, half = ({f"{name}{end}" for name in weights} for end in (".safetensors", ".fp16.safetensors"))
    configs = {f"{part}/config.json" for part in ("conditioner", "unet", "vae")} | {"scheduler/scheduler_config.json"}
    assert set(repository.files()) == {"README.md", "model_index.json", "samples/samples.png"} | configs | full | half
    assert all(repository.files()[path] == (trained / "model" / path).read_bytes() for path in full)
    for path, content in repository.files().items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    for path in full:
        (tmp_path / "model" / path).unlink()
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path / "model", variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == loaded.conditioner.dtype == torch.float16
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].dataset_name == "phantoms"
    assert "| updates | 3 |" in card.text
    assert "NIH ChestX-ray14" in card.text
    assert "![Left: 2 images" in card.text
    assert str(trained) not in str(card)
    sheet = Image.open(io.BytesIO(repository.files()["samples/samples.png"]))
    assert sheet.size == (3 * tiny.IMAGE_SIZE, 2 * tiny.IMAGE_SIZE)


def test_a_dry_run_shows_all_and_sends_nothing(flags, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    publish(**flags, repo_id="org/model", dry_run=True)
    shown = capsys.readouterr().out
    assert "unet/diffusion_pytorch_model.safetensors" in shown
    assert "samples/samples.png" in shown
    assert "5 other files of the folder stay here" in shown
    assert "| updates | 3 |" in shown
    assert "Nothing was uploaded" in shown
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_a_folder_to_carry_is_whole_and_says_so(flags, tmp_path):
    publish(**{**flags, "samples": None}, output_dir=tmp_path / "carried")
    lines = [line.split("  ") for line in (tmp_path / "carried" / "SHA256SUMS").read_text().splitlines()]
    written = {path.relative_to(tmp_path / "carried").as_posix() for path in (tmp_path / "carried").rglob("*.*")}
    assert {name for _, name in lines} == written
    assert all(hashlib.sha256((tmp_path / "carried" / name).read_bytes()).hexdigest() == sha for sha, name in lines)
    DinoDiffusionPipeline.from_pretrained(tmp_path / "carried")


@pytest.mark.parametrize("kind", ["vae", "conditioner"])
def test_parts_are_published_alone(kind, trained, tmp_path):
    samples = {"samples": PHANTOMS, "num_samples": 2} if kind == "vae" else {}
    publish(model=trained / "model" / kind, output_dir=tmp_path / "out", variant="fp16", **samples)
    names = {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == names | {"README.md"} | ({"samples/samples.png"} if samples else set())
    (expected,) = {"vae", "conditioner"} & set(ModelCard.load(tmp_path / "out" / "README.md").data.tags)
    assert expected == kind


def test_samples_of_what_may_be_patients_are_refused(flags, tmp_path):
    scripts.image_folder(tmp_path / "ward7", 4, size=40)
    with pytest.raises(ValueError, match="nothing says that these images are synthetic"):
        publish(**{**flags, "samples": tmp_path / "ward7"}, dry_run=True)
    phantoms = tmp_path / "phantoms"
    phantoms.mkdir()
    (phantoms / "phantom-cxr.json").write_bytes((PHANTOMS / "phantom-cxr.json").read_bytes())
    (phantoms / "phantom-cxr-test-000000.tar").write_bytes(b"exchanged")
    with pytest.raises(ValueError, match=r"phantom-cxr-test-000000\.tar has changed"):
        publish(**{**flags, "samples": phantoms}, dry_run=True)
    with pytest.raises(ValueError, match="is remote"):
        publish(**{**flags, "samples": "https://example.org/shards"}, dry_run=True)


def test_samples_that_are_near_copies_are_refused(flags, trained, tmp_path):
    gate = CopyGate.calibrate(tiny.random_images(60, channels=1, size=32), false_alarms=0.05)
    gate.threshold = 1.0  # every image is a copy
    gate.save(tmp_path / "strict.safetensors")
    with pytest.raises(ValueError, match="4 of 4 samples are near-copies"):
        publish(**flags, gate=tmp_path / "strict.safetensors", dry_run=True)


def test_a_card_with_other_pictures_is_refused(flags, trained, tmp_path):
    kept = {**flags, "results": None, "samples": None, "keep_card": True, "dry_run": True}
    for picture in (
        "![x](validation/3.png)",
        '<img width=9 src="https://example.org/a.png">',
        "![](data:image/png;base64,AAAA)",
    ):
        (trained / "model" / "README.md").write_text(f"# Mine\n\n{picture}\n")
        with pytest.raises(ValueError, match="The card shows"):
            publish(**kept)
    (trained / "model" / "README.md").write_text("# Mine\n\nSee /home/anna/scans.\n")
    with pytest.raises(ValueError, match=r"README\.md holds what should stay"):
        publish(**kept)
    (trained / "model" / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="--keep_card"):
        publish(**kept)


def test_credentialed_sources_are_not_made_public_unasked(flags):
    signed = {**flags, "samples": None, "sources": "mimic_cxr_jpg", "repo_id": "org/model"}
    with pytest.raises(ValueError, match=r"MIMIC-CXR-JPG.*--private"):
        publish(**signed)
    with pytest.raises(ValueError, match="Did you mean"):
        publish(**{**signed, "sources": "mimic_cxr"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "--model has to be the folder"),
        ({"repo_id": None}, "--repo_id org/name, or --output_dir"),
        ({"repo_id": "a/b/c"}, "Repo id must"),
        ({"variant": "int8"}, "fp16 or bf16"),
        ({"num_samples": 1000}, "1000 samples were asked for"),
    ],
)
def test_what_is_wrong_is_said(flags, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        publish(**{**flags, "repo_id": "org/model", **changes})


def test_the_samples_of_a_lora_need_its_pipeline(flags, trained, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'diffusers-dino[train]'")
    from adapters import save_adapter

    lora = {**flags, "model": save_adapter(tmp_path / "lora", seed=0)}
    with pytest.raises(ValueError, match="give lora_base"):
        publish(**lora, dry_run=True)
    with pytest.raises(ValueError, match="A LoRA has no variants"):
        publish(**lora, variant="fp16", dry_run=True)
    publish(**lora, lora_base=trained / "model", base_model="org/base", output_dir=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'DinoDiffusionPipeline.from_pretrained("org/base")' in card
    assert (tmp_path / "out" / "samples" / "samples.png").is_file()
    assert json.loads((trained / "model" / "training_record.json").read_text())["facts"] == {"updates": 3}


def test_a_folder_to_carry_is_whole_or_refused(trained, tmp_path):
    files, out = model_files(trained / "model"), tmp_path / "out"
    write_files(files, tmp_path / "whole")
    expected = {path: (tmp_path / "whole" / path).read_bytes() for path in [*files, "SHA256SUMS"]}

    def content():
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    for _ in kills(lambda: write_files(files, out)):
        write_files(files, out)
        assert content() == expected
        shutil.rmtree(out)
    with pytest.raises(FileExistsError, match="out is not empty"):
        write_files(files, out)

    (out / "lock").touch()  # as a killed run leaves it
    (out / "SHA256SUMS").unlink()
    (out / "model_index.json").write_bytes(b"{")
    with lock_folder(out), pytest.raises(FileExistsError, match="Another run is at work in"):
        write_files(files, out)
    (out / "strange.txt").touch()
    with pytest.raises(FileExistsError, match="out is not empty"):
        write_files(files, out)
    assert (out / "model_index.json").read_bytes() == b"{"
    (out / "strange.txt").unlink()
    write_files(files, out)
    assert content() == expected
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="mine is not empty"):
        write_files(files, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
