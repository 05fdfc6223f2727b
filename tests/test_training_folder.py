"""One folder, one run: reused folders, going on with other settings, and kills at any moment leave nothing mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import scripts
import tiny
from checkpoints import save_transformers
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.data.sources import describe_source
from diffusers_dino.files import lock_folder, sha256_of
from diffusers_dino.hub import TrainingRecord
from diffusers_dino.training.checkpoints import newest_checkpoint
from diffusers_dino.training.run_folder import RunFolder, RunFolderError
from folders import contents as everything
from folders import full_disk
from kills import Killed, kills
from scripts import losses


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Flags that name tiny models and 16 images; the UNet is half of the others', as many runs are compared."""
    flags = scripts.tiny_training(tmp_path_factory.mktemp("parts"), count=16)
    tiny.tiny_unet(**tiny.ONE_LEVEL).save_config(flags["unet_config"])
    return {**flags, "max_train_steps": 2, "checkpointing_steps": 1}


@pytest.fixture
def train(settings, tmp_path):
    def run(**changes) -> Path:
        flags = {**settings, "output_dir": tmp_path / "out", **changes}
        scripts.call_script("train_dino.py", **flags)
        return Path(flags["output_dir"])

    return run


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """A run to copy: of two updates, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    scripts.call_script("train_dino.py", **{**settings, "output_dir": folder})
    return folder


@pytest.fixture(scope="module")
def begun(settings, tmp_path_factory) -> Path:
    """A run to copy, of one update."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    scripts.call_script("train_dino.py", **{**settings, "max_train_steps": 1, "output_dir": folder})
    return folder


@pytest.fixture(scope="module")
def gone_on(settings, begun) -> Path:
    """The same after three updates, with the settings that it was begun with."""
    folder = shutil.copytree(begun, begun.with_name("gone on"))
    flags = {**settings, "max_train_steps": 3, "resume_from_checkpoint": "latest", "output_dir": folder}
    scripts.call_script("train_dino.py", **flags)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Hash by name of all that a run has made, but for what tells one run from another."""
    own = ("run.json", "manifest.json", "lock", "training_arguments.json", "README.md", "validated")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in own)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


SCRIPTS = {
    "train_dino.py": {},
    "train_vae.py": {"block_out_channels": [8, 8], "norm_num_groups": 4, "num_validation_images": 2},
    "pretrain_dino.py": {
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_register_tokens": 1,
        "local_crops": 0,
        "num_prototypes": 16,
        "head_hidden_size": 16,
        "head_bottleneck_size": 8,
        "min_effective_rank": 0,
        "num_statistics_images": 16,
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_holds_a_run_is_refused_without_a_word(settings, tmp_path, script):
    shared = ("train_data_dir", "resolution", "train_batch_size", "max_train_steps", "checkpointing_steps")
    flags = settings if script == "train_dino.py" else {name: settings[name] for name in shared}
    flags = {**flags, **SCRIPTS[script], "output_dir": tmp_path / "out"}
    scripts.call_script(script, **{**flags, "max_train_steps": 3})
    before = everything(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds another run .*--resume_from_checkpoint.*--overwrite_output_dir"):
        scripts.call_script(script, **flags, seed=1)
    assert everything(tmp_path / "out") == before
    with lock_folder(tmp_path / "out"), pytest.raises(ValueError, match="Another run is at work in"):
        scripts.call_script(script, **flags, resume_from_checkpoint="latest")
    assert everything(tmp_path / "out") == before
    scripts.call_script(script, **flags, seed=1, overwrite_output_dir=True)
    scripts.call_script(script, **{**flags, "output_dir": tmp_path / "fresh" / "out"}, seed=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh" / "out")


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "checkpoint-7", "best", "unet", "config.json", "pytorch_lora_weights.safetensors", "vae"],
)
def test_whatever_a_run_may_have_left_is_refused(train, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    for options in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(RunFolderError, match=name):
            train(**options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != "lock") == [name]


def test_images_in_a_folder_that_is_named_as_one_of_a_run_stay(train, tmp_path):
    (tmp_path / "cxr").mkdir()
    images = scripts.image_folder(tmp_path / "cxr" / "validation", 2, size=40)
    with pytest.raises(RunFolderError, match=r"files of such names \(validation\)"):
        train(output_dir=tmp_path / "cxr")
    assert len(list(images.iterdir())) == 2


def test_the_sources_of_a_pipeline_are_those_of_what_is_made_from_it(train, finished, tmp_path):
    pipeline = shutil.copytree(finished, tmp_path / "pipeline")
    TrainingRecord({"updates": 2}, datasets=["org/chest"], sources=[describe_source("padchest")]).save(pipeline)
    folder = train(pretrained_pipeline=pipeline, vae=None, conditioner=None, unet_config=None, max_train_steps=1)
    record = TrainingRecord.load(folder)
    assert record.sources == [describe_source("padchest")]
    assert record.datasets == ["org/chest"]


def test_other_files_and_a_start_that_failed_do_not_stand_in_the_way(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a multiple"):
        train(resolution=34)
    assert (train(max_train_steps=1) / "notes.txt").read_text() == "mine"
    for wrong, message in (
        ({"lr_scheduler": "straight"}, "not a valid SchedulerType"),
        ({"metric_features": "vgg"}, "no feature extractor 'vgg'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**wrong, overwrite_output_dir=True)
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(train, tmp_path):
    train(max_train_steps=1)
    with pytest.raises(RunFolderError, match="holds another run"):
        train(vae=tmp_path / "nowhere", train_data_dir=tmp_path / "nowhere")


def test_a_run_of_an_older_version_that_noted_flags_beside_a_pipeline_goes_on(train, tmp_path):
    pipeline = train(max_train_steps=1, output_dir=tmp_path / "pipeline")
    options = {"pretrained_pipeline": pipeline, "vae": None, "conditioner": None, "normalize_tokens": 16}
    folder = train(**options, max_train_steps=1)
    manifest = folder / "checkpoint-1/manifest.json"
    content = json.loads(manifest.read_text())
    del content["info"]["encoders"]
    noted = {"unet at the start": {"config": {}, "qk_init_scale": 1.0}, "conditioner": "standardised by 16 images"}
    content["info"]["models"] |= noted
    manifest.write_text(json.dumps(content))
    assert len(losses(train(**options, resume_from_checkpoint="latest"))) == 2


def test_what_a_run_reads_is_not_overwritten_by_it(train):
    folder = train()
    before = everything(folder)
    for changes in (
        {"vae": folder / "vae"},
        {"conditioner": folder / "conditioner"},
        {"unet": folder / "vae" / ".." / "unet", "unet_config": None},
        {"pretrained_pipeline": folder, "vae": None, "conditioner": None, "unet_config": None},
    ):
        with pytest.raises(RunFolderError, match="would replace it"):
            train(**changes, overwrite_output_dir=True)
    assert everything(folder) == before


def test_checkpoints_of_another_run_are_never_taken(train, tmp_path, caplog):
    other = train(output_dir=tmp_path / "other", seed=1, max_train_steps=6)
    folder = train()
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-6")
    with pytest.raises(RunFolderError, match=r"checkpoint-6 is of another run"):
        train(resume_from_checkpoint="checkpoint-6")
    train(resume_from_checkpoint="latest", max_train_steps=4, checkpoints_total_limit=2)
    assert "checkpoint-6 is of another run" in caplog.text
    assert newest_checkpoint(folder).step == 4
    assert contents(folder / "unet") == contents(train(max_train_steps=4, output_dir=tmp_path / "whole") / "unet")


def test_going_on_from_an_older_checkpoint_sets_later_ones_aside(train, caplog):
    folder = train(max_train_steps=4, metric_steps=1, validation_inference_steps=1)
    options = {"metric_steps": 1, "validation_inference_steps": 1}
    train(**options, resume_from_checkpoint="checkpoint-1", max_train_steps=3, checkpoints_total_limit=1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert {"checkpoint-2", "checkpoint-3", "checkpoint-4"} <= {path.name for path in (folder / "set-aside").iterdir()}
    assert "moved to set-aside" in caplog.text
    assert len(losses(folder)) == 3


def test_the_best_weights_of_a_path_that_was_left_are_set_aside_also_without_a_later_checkpoint(train):
    folder = train(max_train_steps=4, checkpointing_steps=2, metric_steps=3, validation_inference_steps=1)
    shutil.rmtree(folder / "checkpoint-4")
    options = {"checkpointing_steps": 2, "metric_steps": 9, "validation_inference_steps": 1}
    train(**options, resume_from_checkpoint="checkpoint-2", max_train_steps=3)
    assert json.loads((folder / "set-aside" / "best" / "metric.json").read_text())["step"] == 3
    assert not (folder / "best").exists()


def test_other_encoders_are_refused_where_only_statistics_stand_for_a_conditioner(train, tmp_path):
    encoder, options = tiny.tiny_encoder(), {"conditioner": None, "normalize_tokens": 16}
    one = save_transformers(encoder, tmp_path / "one")
    encoder.layernorm.weight.data *= 2
    other = save_transformers(encoder, tmp_path / "other")
    train(**options, encoder=[one])
    options |= {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    with pytest.raises(ValueError, match="encoders: weights was"):
        train(**options, encoder=[other])
    with pytest.raises(ValueError, match="encoders: tokens was global, is cls"):
        train(**options, encoder=[one], tokens="cls")


def test_a_checkpoint_of_elsewhere_begins_a_run_of_its_own(train, tmp_path):
    other = train(output_dir=tmp_path / "other")
    folder = train(resume_from_checkpoint=other / "checkpoint-1", max_train_steps=3)
    whole = train(output_dir=tmp_path / "whole", max_train_steps=3)
    assert contents(folder / "unet") == contents(whole / "unet")
    identities = [json.loads((each / "run.json").read_text())["run"] for each in (other, folder)]
    assert identities[0] != identities[1]
    with pytest.raises(RunFolderError, match="holds another run"):
        train(resume_from_checkpoint=other / "checkpoint-1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-4}, "learning rate 0.001 to 0.0001"),
        ({"lr_scheduler": "linear", "max_train_steps": 8}, "lr scheduler constant_with_warmup to linear"),
        ({"adam_weight_decay": 0.0}, "adam weight decay 0.01 to 0.0"),
        ({"snr_gamma": 5.0}, "snr gamma None to 5.0"),
        ({"condition_dropout": 0.5, "shear": 0.2}, "shear 0.05 to 0.2, condition dropout 0.1 to 0.5"),
        ({"train_batch_size": 2}, "train batch size 4 to 2"),
    ],
)
def test_what_is_asked_for_on_resuming_is_taken_up_and_told(train, begun, gone_on, tmp_path, changes, named):
    shutil.copytree(begun, tmp_path / "out")
    folder = train(**{"resume_from_checkpoint": "latest", "max_train_steps": 3, **changes})
    assert (folder / "train_log.jsonl").read_text().startswith((begun / "train_log.jsonl").read_text())
    told = json.loads((folder / "training_record.json").read_text())["facts"]["changed on resuming"]
    assert told.startswith(f"after 1 updates: {named}")
    assert told.split(": ")[1].split(",")[0] in (folder / "README.md").read_text()
    rates = [json.loads(line)["lr"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
    if "learning_rate" in changes:
        assert rates == [1e-3, 1e-4, 1e-4]
    if "lr_scheduler" in changes:
        assert rates[1:] == pytest.approx([1e-3 * (8 - step) / 8 for step in range(1, 8)])
    assert contents(folder / "unet") != contents(gone_on / "unet")


def test_a_longer_run_says_that_it_was_prolonged_only_once(train):
    folder = train(max_train_steps=1)
    train(max_train_steps=2, resume_from_checkpoint="latest")
    train(max_train_steps=2, resume_from_checkpoint="latest")
    told = json.loads((folder / "training_record.json").read_text())["facts"]["changed on resuming"]
    assert told == "after 1 updates: max train steps 1 to 2"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_data_dir": "other"}, "hash of some of them was"),
        ({"train_data_dir": "fewer"}, "images: number was 16, is 15"),
        ({"max_train_samples": 12}, "images: number was 16, is 12"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"remove_borders": False}, "preprocessing was"),
        ({"tokens": "cls"}, "models: conditioner was"),
        ({"vae": "vae"}, "models: vae was"),
        ({"prediction_type": "v_prediction"}, "noise schedule: prediction_type was epsilon, is v_prediction"),
        ({"qk_init_scale": 2.0}, "unet at the start: qk_init_scale was 1.0, is 2.0"),
        ({"unet": "unet", "unet_config": None}, "unet at the start was"),
        ({"use_ema": True}, "another setting of averaged weights"),
        ({"use_8bit_adam": True}, "use_8bit_adam was False, is True"),
    ],
)
def test_what_cannot_change_on_resuming_is_refused_by_name(train, finished, tmp_path, changes, named):
    if changes.get("use_8bit_adam"):
        pytest.importorskip("bitsandbytes")
    images = scripts.image_folder(tmp_path / "other", 17, size=40)  # of the same names
    (images / "000.png").unlink()
    for number in range(16):
        (images / f"{number + 1:03d}.png").rename(images / f"{number:03d}.png")
    shutil.copytree(images, tmp_path / "fewer")
    (tmp_path / "fewer" / "015.png").unlink()
    tiny.tiny_vae(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    tiny.tiny_unet().save_pretrained(tmp_path / "unet")
    folder = shutil.copytree(finished, tmp_path / "out")
    before = everything(folder)
    files = {name: tmp_path / value for name, value in changes.items() if value in ("other", "fewer", "vae", "unet")}
    with pytest.raises(ValueError, match=named):
        train(resume_from_checkpoint="latest", **{**changes, **files})
    after = everything(folder)
    assert {name: after[name] for name in before if "run.json" not in name} == {
        name: value for name, value in before.items() if "run.json" not in name
    }


def test_a_card_tells_settings_that_are_off_or_zero(train):
    folder = train(max_train_steps=1, condition_dropout=0.0, random_flip=False, adam_weight_decay=0)
    facts = json.loads((folder / "training_record.json").read_text())["facts"]
    expected = {"condition dropout": 0.0, "random flip": False, "use ema": False, "seed": 0, "noise offset": 0.0}
    assert {name: facts[name] for name in expected} == expected
    card = (folder / "README.md").read_text()
    assert all(f"| {name} |" in card for name in expected)


WITH_BEST = {"metric_steps": 1, "validation_inference_steps": 1, "use_ema": True, "checkpoints_total_limit": 2}


@pytest.mark.slow
def test_kills_at_every_rename_and_unlink_end_as_no_kill(train, tmp_path):
    """Killed at each change in turn, and gone on with: the same files, `best/` included, and no leftovers."""
    options = {**WITH_BEST, "resume_from_checkpoint": "latest", "checkpoints_total_limit": 1}
    whole = contents(train(**options, output_dir=tmp_path / "whole"))
    folder = tmp_path / "out"
    for number in kills(lambda: train(**options)):
        assert loads_or_says_that_it_does_not(folder)
        assert contents(train(**options)) == whole, number
        shutil.rmtree(folder)
    assert number > 20


def loads_or_says_that_it_does_not(folder: Path) -> bool:
    if (folder / "model_index.json").is_file():
        pipe = DinoDiffusionPipeline.from_pretrained(folder)
        saved = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        return all(torch.equal(value, saved[name]) for name, value in pipe.unet.state_dict().items())
    with pytest.raises(OSError, match="model_index"):
        DinoDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return True


@pytest.mark.slow
def test_a_killed_new_run_never_mixes_with_the_finished_model_in_its_folder(train, tmp_path):
    first = train(output_dir=tmp_path / "first", tokens="global", max_train_steps=1)
    cls = {"tokens": "cls", "max_train_steps": 1, "overwrite_output_dir": True}
    second = train(output_dir=tmp_path / "second", **cls)
    wholes = [contents(each) for each in (first, second)]
    shutil.copytree(first, tmp_path / "out")
    for number in kills(lambda: train(**cls)):
        folder = tmp_path / "out"
        if (folder / "model_index.json").is_file():
            parts = {name: value for name, value in contents(folder).items() if name.split("/")[0] in PARTS}
            assert parts in [{n: v for n, v in whole.items() if n.split("/")[0] in PARTS} for whole in wholes], number
        if number % 5 == 0:
            assert contents(train(**cls)) == wholes[1]
        shutil.rmtree(folder)
        shutil.copytree(first, folder)
    assert number > 10


PARTS = {"unet", "vae", "conditioner", "scheduler", "model_index.json"}


def test_a_validation_that_a_kill_cut_off_comes_first_on_resuming(train, tmp_path, monkeypatch):
    from diffusers_dino.training.validation import Validator

    whole = contents(train(**WITH_BEST, validation_steps=1, output_dir=tmp_path / "whole"))
    options = {**WITH_BEST, "validation_steps": 1, "resume_from_checkpoint": "latest"}
    original = Validator.run

    def killed(self, step, say=print):
        if step == 1:
            raise Killed
        original(self, step, say)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "run", killed)
        with pytest.raises(Killed):
            train(**options)
    folder = train(**options)
    assert contents(folder) == whole
    looked = (folder / "validation" / "0000002.png").stat().st_mtime_ns
    train(**options)  # it was noted: nothing is looked at twice
    assert (folder / "validation" / "0000002.png").stat().st_mtime_ns == looked


def test_a_full_disk_while_the_best_weights_are_written(train, tmp_path):
    whole = contents(train(**WITH_BEST, output_dir=tmp_path / "whole"))
    options = {**WITH_BEST, "resume_from_checkpoint": "latest"}
    from diffusers_dino.training.state import TrainingState

    original = TrainingState.save_for_use

    def on_a_full_disk(self, folder):
        with full_disk(1024) if ".best" in str(folder) else nullcontext():
            original(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "save_for_use", on_a_full_disk)
        with pytest.raises(ValueError, match=r"best could not be written to .* GiB free\)"):
            train(**options)
    assert contents(train(**options)) == whole


def test_images_are_held_out_by_patient_to_measure_on(train, tmp_path, caplog):
    folder = tmp_path / "images"
    for number, image in enumerate(tiny.random_images(60, channels=1, size=40)):
        place = folder / f"p{number // 5:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(place / f"{number}.png")
    out = train(train_data_dir=folder, metric_steps=1, validation_inference_steps=1)
    assert "5 of 60 images, by patient (1 of 12)" in caplog.text
    assert json.loads((out / "best" / "metric.json").read_text())["num_images"] == 5
    assert json.loads((out / "training_record.json").read_text())["facts"]["training images"] == 55
    train(train_data_dir=folder, metric_steps=1, validation_inference_steps=1, resume_from_checkpoint="latest")


@pytest.mark.parametrize("name", ["paper_dinov1", "paper_dinov2"])
def test_the_papers_recipe_trains_without_validation_images(settings, train, tmp_path, name):
    """The command of the README, with tiny models."""
    recipe = yaml.safe_load((scripts.EXAMPLES / "configs" / f"{name}.yaml").read_text())
    ours = {name: value for name, value in recipe.items() if name not in ("encoder", "pretrained_model_name_or_path")}
    changes = {"max_train_steps": 2, "metric_steps": 2, "checkpointing_steps": 1, "validation_steps": 0}
    changes |= {"gradient_accumulation_steps": 1, "use_8bit_adam": False, "mixed_precision": "no"}
    out = train(**{**{n: v for n, v in ours.items() if n not in settings}, **changes, "validation_inference_steps": 1})
    assert json.loads((out / "best" / "metric.json").read_text())["num_images"] == 2
    assert json.loads((out / "training_record.json").read_text())["facts"]["training images"] == 14


@pytest.mark.slow
def test_two_processes_in_one_folder_and_a_lock_that_dies_with_its_holder(settings, tmp_path):
    flags = {**settings, "output_dir": tmp_path / "out", "max_train_steps": 10_000, "dataloader_num_workers": 2}
    run = scripts.start_script("train_dino.py", **flags)
    scripts.wait_until((tmp_path / "out" / "checkpoint-1").exists, run)
    for changes in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        with pytest.raises(ValueError, match="Another run is at work in"):
            scripts.call_script("train_dino.py", **{**flags, "max_train_steps": 1, **changes})
    run.kill()  # its loader's workers live on for some seconds
    run.wait()
    RunFolder(tmp_path / "out").close()


@pytest.mark.slow
def test_training_outlives_the_reader_of_its_output(settings, tmp_path):
    flags = {**settings, "output_dir": tmp_path / "out", "max_train_steps": 12, "logging_steps": 1}
    command = [sys.executable, str(scripts.EXAMPLES / "train_dino.py"), *scripts.command_line(None, flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.stdout.readline()
    run.stdout.close()  # as `| head -n 1`
    assert run.wait(timeout=120) == 0
    assert len(losses(tmp_path / "out")) == 12
    DinoDiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_a_signal_before_training_leaves_with_a_word(settings, tmp_path, seconds):
    flags = {**settings, "output_dir": tmp_path / "out", "max_train_steps": 9999}
    run = scripts.start_script("train_dino.py", fresh=True, **flags)
    time.sleep(seconds)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert "Stopped" in output
    assert "Traceback" not in output
