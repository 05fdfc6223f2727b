"""`examples/train_dino.py` as a user runs it, with tiny components: most runs in this process, some as processes."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline
from diffusers_dino.training.checkpoints import newest_checkpoint
from folders import full_disk
from forks import Forks
from hub_server import HubServer
from range_server import RangeServer
from scripts import losses
from shard_files import write_shards


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Flags that name tiny models and 24 images, which lie in one folder."""
    return scripts.tiny_training(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def parts(settings) -> Path:
    """This folder, with a whole pipeline and a UNet in it, too."""
    folder = settings["vae"].parent
    tiny.tiny_unet().save_pretrained(folder / "unet")
    tiny.tiny_pipeline().save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture
def flags(settings, tmp_path) -> dict:
    return {**settings, "max_train_steps": 4, "output_dir": tmp_path / "out"}


@pytest.fixture
def train(flags):
    """Run the script in this process with the flags and some changes; gives the folder of the run."""

    def run(**changes) -> Path:
        scripts.call_script("train_dino.py", **{**flags, **changes})
        return Path({**flags, **changes}["output_dir"])

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert scripts.same_weights(one / "unet", other / "unet")


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory) -> Path:
    """A run of four updates with averaged weights."""
    folder = tmp_path_factory.mktemp("plain")
    scripts.call_script("train_dino.py", **{**settings, "max_train_steps": 4, "use_ema": True, "output_dir": folder})
    return folder


def test_result_is_a_pipeline_that_generates(plain, parts):
    pipe = DinoDiffusionPipeline.from_pretrained(plain)
    source = Image.open(parts / "images" / "000.png")
    image = pipe(source, num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (32, 32)
    assert pipe.scheduler.config["beta_schedule"] == "scaled_linear"
    assert not pipe.scheduler.config["clip_sample"]
    assert len(losses(plain)) == 4
    card = (plain / "README.md").read_text()
    assert "pipe = DinoDiffusionPipeline.from_pretrained" in card
    assert "| updates | 4 |" in card
    assert json.loads((plain / "training_record.json").read_text())["facts"]["updates"] == 4
    assert str(plain.parent) not in card
    assert not any(path.name.startswith("checkpoint") for path in plain.iterdir())


def test_training_learns(train):
    curve = losses(train(max_train_steps=60, learning_rate=3e-3, condition_dropout=0.0))
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_memory": True},
        {"dataloader_num_workers": 2},
        {"validation_steps": 1, "validation_inference_steps": 1, "checkpointing_steps": 1},
        {"exchange_steps": 3},
    ],
    ids=["again", "in memory", "loader workers", "looked at", "losses read later"],
)
def test_what_must_not_change_the_run(plain, train, changes):
    assert_same_run(plain, train(use_ema=True, **changes))


def test_batch_size_and_accumulation_give_the_same_run_and_another_seed_another(train, tmp_path):
    whole = losses(train(train_batch_size=8))
    parts = losses(train(train_batch_size=2, gradient_accumulation_steps=4, output_dir=tmp_path / "parts"))
    assert max(abs(a - b) for a, b in zip(whole, parts, strict=True)) < 1e-5
    assert whole != losses(train(train_batch_size=8, seed=1, output_dir=tmp_path / "seed"))


def test_cached_views_are_those_that_training_would_make(train, tmp_path):
    options = {"max_train_steps": 9, "learning_rate": 1e-4}  # a view and a half of 24 images
    online = losses(train(**options, output_dir=tmp_path / "online"))
    cached = losses(train(**options, cache_views=2))
    assert max(abs(a - b) for a, b in zip(online, cached, strict=True)) < 1e-5
    one_view = losses(train(**options, cache_views=1, output_dir=tmp_path / "one"))
    assert max(abs(a - b) for a, b in zip(online[:6], one_view[:6], strict=True)) < 1e-5
    assert max(abs(a - b) for a, b in zip(online[6:], one_view[6:], strict=True)) > 1e-5


def test_resumed_run_equals_an_uninterrupted_one(train, tmp_path):
    options = {"use_ema": True, "checkpointing_steps": 2, "lr_scheduler": "cosine", "max_train_steps": 6}
    whole = train(**options)
    cut = tmp_path / "cut"
    train(**options, output_dir=cut)
    for name in ("checkpoint-4", "checkpoint-6", "unet"):
        (cut / name).rename(tmp_path / name)
    # what a killed process leaves behind: a log that is ahead of the checkpoint, and half a line
    with open(cut / "train_log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train(**options, output_dir=cut, resume_from_checkpoint="latest")
    assert_same_run(whole, cut)
    raw = "trainable.safetensors"
    one, other = (load_file(folder / "checkpoint-6" / raw) for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one_to_rounding_and_resumes_to_the_bit(train, parts, tmp_path):
    tiny.tiny_unet(**tiny.ONE_LEVEL).save_config(parts / "one_level")
    options = {"unet_config": parts / "one_level", "max_train_steps": 3, "learning_rate": 1e-4}
    eager = losses(train(**options))
    options |= {"torch_compile": True, "checkpointing_steps": 2, "output_dir": tmp_path / "compiled"}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    folder = train(**options)
    assert not torch._dynamo.utils.counters["graph_break"]
    whole, compiled = weights(folder), losses(folder)
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-5
    torch.compiler.reset()
    shutil.rmtree(folder / "unet")
    train(**options, resume_from_checkpoint="checkpoint-2")
    assert losses(folder) == compiled
    assert all(torch.equal(value, whole[name]) for name, value in weights(folder).items())


def test_resume_of_nothing_starts_anew_and_of_another_run_is_refused(train):
    folder = train(resume_from_checkpoint="latest", checkpointing_steps=2)
    assert len(losses(folder)) == 4
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(resume_from_checkpoint="latest", seed=1)
    with pytest.raises(ValueError, match="checkpoint-4 was begun with other settings:\n- preprocessing was"):
        train(resume_from_checkpoint="latest", remove_borders=False)
    with pytest.raises(ValueError, match="There is no checkpoint checkpoint-99"):
        train(resume_from_checkpoint="checkpoint-99")
    with pytest.raises(ValueError, match="another setting of averaged weights"):
        train(resume_from_checkpoint="checkpoint-2", use_ema=True, max_train_steps=6)


def test_the_newest_checkpoints_hold_the_averaged_weights_for_use(train):
    folder = train(checkpointing_steps=1, checkpoints_total_limit=2, use_ema=True, ema_decay=0.5)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    UNet2DConditionModel.from_pretrained(folder / "checkpoint-3" / "unet")
    average, raw = weights(folder / "checkpoint-4"), load_file(folder / "checkpoint-4" / "trainable.safetensors")
    name = "conv_in.weight"
    assert not torch.equal(average[name], raw[name])
    assert torch.equal(average[name], weights(folder)[name])


def test_pictures_and_the_best_weights(train, parts, tmp_path):
    scripts.image_folder(tmp_path / "unseen", 3, size=40)
    options = {"validation_steps": 2, "metric_steps": 2, "validation_data_dir": tmp_path / "unseen"}
    folder = train(**options, num_validation_variations=2, validation_inference_steps=2, report_to="tensorboard")
    pictures = sorted((folder / "validation").iterdir())
    assert [path.name for path in pictures] == ["0000002.png", "0000004.png"]
    assert Image.open(pictures[0]).size == (3 * 32, 3 * 32)
    best = json.loads((folder / "best" / "metric.json").read_text())
    assert (best["metric"], best["num_images"]) == ("frechet_pixels", 3)
    assert best["step"] in (2, 4)
    UNet2DConditionModel.from_pretrained(folder / "best" / "unet")
    assert list((folder / "logs").rglob("events*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_gamma": 5},
        {"prediction_type": "sample", "snr_gamma": 5, "noise_offset": 0.1},
        {"snr_gamma": 5, "condition_dropout": 1.0, "random_flip": True},
        {"token_weight": 1.0, "cache_views": 1, "mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "channels_last": True, "use_ema": True},
        {"unet_config": None, "unet": "unet", "lr_scheduler": "linear", "scale_lr": True, "augment": False},
        {"unet_config": None, "unet": "pipeline", "vae": "pipeline", "scheduler": "pipeline", "max_train_samples": 5},
        {"unet_config": None, "pretrained_pipeline": "pipeline", "vae": None, "conditioner": None},
        {"qk_init_scale": 2, "normalize_tokens": 16, "num_train_epochs": 0.5, "max_train_steps": None},
    ],
    ids=["v zero-SNR", "sample", "dropped", "tokens", "bf16", "unet", "subfolders", "continued", "normalised"],
)
def test_options_train(train, parts, changes):
    in_parts = {name: parts / value for name, value in changes.items() if value in ("unet", "pipeline")}
    folder = train(**{"max_train_steps": 2, **changes, **in_parts})
    assert all(math.isfinite(value) for value in losses(folder))
    pipe = DinoDiffusionPipeline.from_pretrained(folder)
    expected = changes.get("prediction_type", "epsilon")
    assert pipe.scheduler.config["prediction_type"] == expected
    assert all(parameter.dtype == torch.float32 for parameter in pipe.vae.parameters())


def test_keys_file_chooses_images(train, tmp_path):
    (tmp_path / "keys.txt").write_text("003\n005\n")
    train(keys_file=tmp_path / "keys.txt", max_train_steps=1)
    (tmp_path / "keys.txt").write_text("003\nmissing\n")
    with pytest.raises(KeyError, match="missing"):
        train(keys_file=tmp_path / "keys.txt", output_dir=tmp_path / "other")


def test_lora_of_a_pipeline(train, parts, tmp_path):
    pytest.importorskip("peft")
    options = {"pretrained_pipeline": parts / "pipeline", "vae": None, "conditioner": None, "unet_config": None}
    folder = train(**options, rank=2, learning_rate=1e-2, checkpointing_steps=2, use_ema=True, ema_decay=0.5)
    pipe = DinoDiffusionPipeline.from_pretrained(parts / "pipeline")
    tokens = torch.randn(1, 5, tiny.TOKEN_DIM)

    def generate() -> torch.Tensor:
        call = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        return pipe(image_embeds=tokens, guidance_scale=1.0, **call).images

    before = generate()
    pipe.load_lora_weights(folder)
    assert not torch.equal(before, generate())
    assert not (folder / "unet").exists()
    assert not (folder / "model_index.json").exists()
    whole = load_file(folder / "pytorch_lora_weights.safetensors")
    (folder / "checkpoint-4").rename(tmp_path / "gone")
    train(**options, rank=2, learning_rate=1e-2, use_ema=True, ema_decay=0.5, resume_from_checkpoint="latest")
    resumed = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_flags_of_other_models_are_taken_back_beside_a_pipeline(caplog):
    from train_dino import Arguments, check_arguments

    others = {"vae": "another", "tokens": "cls", "normalize_tokens": 8, "prediction_type": "sample"}
    args = Arguments(pretrained_pipeline="model", learning_rate=1e-3, **others)
    check_arguments(args)
    assert args == Arguments(pretrained_pipeline="model", learning_rate=1e-3)
    assert [record.getMessage().split()[0] for record in caplog.records] == [f"--{name}" for name in others]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_data_dir": "empty"}, FileNotFoundError, "No image in"),
        ({"train_data_dir": "nowhere"}, FileNotFoundError, "no folder"),
        ({"train_data_dir": None}, ValueError, "--train_data_dir or as --dataset_name"),
        ({"conditioner": None}, ValueError, "--conditioner"),
        ({"vae": None}, ValueError, "no VAE"),
        ({"unet_config": None}, ValueError, "no UNet"),
        ({"rank": 4}, ValueError, "--pretrained_pipeline"),
        ({"rank": 0}, ValueError, "--rank must be at least 1, got 0"),
        ({"token_weight": -1.0}, ValueError, "--token_guidance must not be negative"),
        ({"token_weight": 1.0, "condition_dropout": 0.0}, ValueError, "give --token_guidance 1"),
        ({"max_train_steps": 0}, ValueError, "--max_train_steps must be at least 1"),
        ({"logging_steps": 0}, ValueError, "--logging_steps must be at least 1"),
        ({"train_batch_size": 0}, ValueError, "--train_batch_size must be at least 1"),
        ({"num_train_epochs": 0, "max_train_steps": None}, ValueError, "--num_train_epochs must be positive"),
        ({"validation_steps": 1, "num_validation_variations": 0}, ValueError, "A validation needs sources"),
        ({"validation_data_dir": "cxr-unsen"}, FileNotFoundError, "no folder"),
        ({"metric_steps": 5, "max_train_samples": 1}, ValueError, "--validation_data_dir"),
        ({"resolution": 36}, ValueError, "must be a multiple of 8"),
        ({"output_dir": "file/out"}, NotADirectoryError, "there is a file of that name"),
        ({"rescale_betas_zero_snr": True}, ValueError, "v_prediction"),
        ({"max_scale": 0.5}, ValueError, "scale must be"),
        ({"vae": "unet"}, ValueError, "must be an AutoencoderKL"),
        ({"unet_config": None, "unet": "wide_unet"}, ValueError, "projection_dim=48"),
        ({"vae": "deep_vae", "unet_config": None, "unet": "unet"}, ValueError, "latents have 8 channels"),
    ],
)
def test_bad_input_is_refused_with_advice(train, parts, tmp_path, changes, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "unet").symlink_to(parts / "unet")
    if "wide_unet" in changes.values():
        tiny.tiny_unet(cross_attention_dim=48).save_pretrained(tmp_path / "wide_unet")
    if "deep_vae" in changes.values():
        tiny.tiny_vae(latent_channels=8).save_pretrained(tmp_path / "deep_vae")
    files = ("empty", "file/out", "unet", "wide_unet", "deep_vae")
    with pytest.raises(error, match=message):
        train(**{name: tmp_path / value if value in files else value for name, value in changes.items()})


def test_output_folder_that_is_not_writable(train, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    # root may write into any folder but those of the kernel
    folder = Path("/proc/diffusers-dino") if os.geteuid() == 0 else tmp_path / "out"
    with pytest.raises(PermissionError, match="not writable"):
        train(output_dir=folder)


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("xformers", {"enable_xformers_memory_efficient_attention": True}),
        ("tensorboard", {"report_to": "tensorboard"}),
    ],
)
def test_missing_extra_is_named(train, monkeypatch, module, changes):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*pip install diffusers-dino\["):
        train(**changes)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(flags, parts, tmp_path):
    flags |= {"max_train_steps": 20, "metric_steps": 10, "validation_data_dir": parts / "images"}
    flags |= {"validation_inference_steps": 2, "checkpointing_steps": 10, "use_ema": True, "cache_views": 2}
    for processes in (1, 2):
        changes = {"train_batch_size": 8 // processes, "output_dir": tmp_path / f"{processes}"}
        scripts.run_script("train_dino.py", processes=processes, threads=1, **{**flags, **changes})
    one, two = (losses(tmp_path / f"{processes}") for processes in (1, 2))
    assert len(one) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert sorted(p.name for p in (tmp_path / "2" / "checkpoint-20").glob("random_states*")) == [
        "random_states_0.safetensors",
        "random_states_1.safetensors",
    ]
    # A checkpoint of either goes on as the other: the place in the run counts images, not batches of a process.
    for first, then in ((1, 2), (2, 1)):
        crossed = tmp_path / f"{first} then {then}"
        shutil.copytree(tmp_path / f"{first}" / "checkpoint-10", crossed / "checkpoint-10")
        changes = {"train_batch_size": 8 // then, "output_dir": crossed, "resume_from_checkpoint": "latest"}
        scripts.run_script("train_dino.py", processes=then, threads=1, **{**flags, **changes})
        assert max(abs(a - b) for a, b in zip(one[10:], losses(crossed), strict=True)) < 1e-4


@pytest.mark.slow
def test_a_copy_of_the_script_by_itself_pushes_the_result_with_its_card_and_nothing_else(flags, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    script = shutil.copy(scripts.EXAMPLES / "train_dino.py", tmp_path / "elsewhere")
    with HubServer() as hub:
        flags |= {"push_to_hub": True, "hub_model_id": "org/trained", "checkpointing_steps": 2, "validation_steps": 4}
        environment = {**hub.client_environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        scripts.run_script(script, fresh=True, environment=environment, **flags)
        pushed = hub.repositories["org/trained"].files()
    assert len(losses(tmp_path / "out")) == 4
    DinoDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert {Path(name).parts[0] for name in pushed} - {".gitattributes"} == {
        "README.md",
        "conditioner",
        "model_index.json",
        "scheduler",
        "unet",
        "vae",
    }
    assert b"org/trained" in pushed["README.md"]
    assert str(tmp_path).encode() not in pushed["README.md"]


def wait_for_steps(run: Forks, folder: Path, count: int) -> None:
    log = folder / "train_log.jsonl"
    scripts.wait_until(lambda: log.is_file() and len(log.read_text().splitlines()) >= count, run)


@pytest.mark.slow
def test_one_signal_to_one_process_makes_all_save_and_stop(flags, tmp_path):
    flags |= {"max_train_steps": 10_000, "train_batch_size": 2, "output_dir": tmp_path / "out"}
    run = scripts.start_script("train_dino.py", processes=2, **flags)
    wait_for_steps(run, tmp_path / "out", 5)
    os.kill(run.members[1].pid, signal.SIGUSR1)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert "--resume_from_checkpoint=latest" in output
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert checkpoint.step == len(losses(tmp_path / "out"))
    assert checkpoint.info["position"] == 4 * checkpoint.step


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_stops(train, flags, tmp_path):
    options = {"max_train_steps": 60}
    cut = tmp_path / "cut"
    run = scripts.start_script("train_dino.py", **{**flags, **options, "output_dir": cut})
    wait_for_steps(run, cut, 5)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert len(list(cut.glob("checkpoint-*"))) == 1
    assert not (cut / "model_index.json").exists()
    options["max_train_steps"] = newest_checkpoint(cut).step + 2
    assert_same_run(train(**options), train(**options, output_dir=cut, resume_from_checkpoint="latest"))


def test_checkpoints_by_the_clock(train):
    folder = train(checkpointing_minutes=1e-6, checkpoints_total_limit=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(ValueError, match="must not be negative"):
        train(checkpointing_minutes=-1)


def test_full_disk_leaves_the_checkpoint_before(train, tmp_path):
    whole = train(max_train_steps=6, output_dir=tmp_path / "whole")
    folder = train(checkpointing_steps=2, max_train_steps=2)
    # Files may grow to what the frozen models need, which is less than the optimizer's state.
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    frozen = max(size for path, size in sizes.items() if path.parent.name in ("vae", "conditioner"))
    optimizer = next(size for path, size in sizes.items() if path.name == "optimizer.safetensors")
    assert frozen + 1024 < optimizer
    message = r"checkpoint-4 could not be written to .* GiB free\).*are untouched"
    with full_disk(frozen + 1024), pytest.raises(ValueError, match=message):
        train(checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest")
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    assert_same_run(whole, train(max_train_steps=6, resume_from_checkpoint="latest"))


def test_a_streamed_run_resumed_with_other_workers_gives_the_model_of_a_local_run(train, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_shards(tmp_path / "shards")
    options = {"train_batch_size": 5, "shuffle_window_shards": 2, "checkpointing_steps": 4}
    local = train(**options, train_data_dir=tmp_path / "shards", max_train_steps=8, output_dir=tmp_path / "local")
    with RangeServer(tmp_path / "shards") as server:
        options |= {"train_data_dir": f"{server.url}/x-*.tar"}
        train(**options, max_train_steps=4, dataloader_num_workers=1)
        options |= {"dataloader_num_workers": 2, "resume_from_checkpoint": "latest"}
        assert_same_run(local, train(**options, max_train_steps=8))
    with pytest.raises(ValueError, match="shuffle_window_shards was 2, is None"):
        train(**{**options, "train_data_dir": tmp_path / "shards", "shuffle_window_shards": 0})
