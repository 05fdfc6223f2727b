"""`examples/distill_dino.py` as a user runs it, with tiny components."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import load_file

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoInterpolationPipeline
from diffusers_dino.hub import draw_samples
from diffusers_dino.synthesis import load_plan
from scripts import losses


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("parts")
    tiny.tiny_pipeline().save_pretrained(folder / "teacher")
    return {
        "pretrained_pipeline": folder / "teacher",
        "train_data_dir": scripts.image_folder(folder / "images", 24, size=40),
        "resolution": 32,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "checkpointing_steps": 0,
        "max_train_steps": 2,
        "cache_views": 1,
        "guidance_width": 32,
    }


@pytest.fixture
def distil(flags, tmp_path):
    def run(**changes):
        scripts.call_script("distill_dino.py", **{**flags, "output_dir": tmp_path / "out", **changes})
        return tmp_path / "out"

    return run


@pytest.fixture(scope="module")
def distilled_folder(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    scripts.call_script("distill_dino.py", **{**flags, "output_dir": folder})
    return folder


@pytest.fixture
def distilled(distilled_folder) -> DinoDiffusionPipeline:
    return DinoDiffusionPipeline.from_pretrained(distilled_folder)


def generate(pipe, count=2, **options):
    return pipe(
        tiny.random_images(count), generator=tiny.generators(*range(count)), output_type="pt", **options
    ).images


def test_four_steps_of_one_pass_are_the_default(distilled):
    assert isinstance(distilled.scheduler, TCDScheduler)
    batches = []
    hook = distilled.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    generate(distilled, guidance_scale=3.0)
    hook.remove()
    assert batches == [2] * 4
    assert not torch.equal(generate(distilled, guidance_scale=3.0), generate(distilled, guidance_scale=1.0))


def test_its_card_and_synthesis_know_of_the_four_steps(distilled_folder, tmp_path):
    card = (distilled_folder / "README.md").read_text()
    assert "4 steps by default, at most 8" in card
    assert "| max guidance | 4.0 |" in card
    images = scripts.image_folder(tmp_path / "sources", 3, size=32)
    flags = {"model": distilled_folder, "data_dir": images, "output_dir": tmp_path / "set", "num_images": 3}
    scripts.call_script("synthesise", **flags, num_drawn=0, batch_size=3)
    assert load_plan(tmp_path / "set").settings.num_inference_steps == 4


def test_images_depend_only_on_their_generator_and_paths_end_in_them(distilled):
    together = generate(distilled)
    torch.testing.assert_close(generate(distilled, count=1), together[:1], atol=1e-4, rtol=0)
    between = DinoInterpolationPipeline.from_pipe(distilled)
    images = tiny.random_images(2)
    path = between(images[:1], images[1:], [0.0], generator=tiny.generators(0), output_type="pt").images
    assert torch.equal(path, generate(distilled, count=1))


def test_the_student_learns_to_agree_with_itself(distil):
    curve = losses(distil(max_train_steps=60, learning_rate=3e-3))
    assert sum(curve[-10:]) < sum(curve[:10])


def test_resumed_it_ends_with_the_same_bits(distil, tmp_path):
    whole = distil(max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=5)
    weights = load_file(whole / "unet/diffusion_pytorch_model.safetensors")
    for path in whole.iterdir():  # as if it had been killed after the second update
        if path.name not in ("checkpoint-2", "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = distil(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    again = load_file(resumed / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_in_half_precision_it_takes_cached_features_too(distil, flags, tmp_path):
    shared = {"pretrained_pipeline", "train_data_dir", "resolution"}
    made = {name: flags[name] for name in shared} | {"cache_views": 1, "feature_cache": tmp_path / "features"}
    scripts.call_script("cache", **made)
    folder = distil(**{**made, "cache_views": 0}, mixed_precision="bf16")
    assert "| cache views | 1 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("phases", "kind"), [(4, TCDScheduler), (1, LCMScheduler)])
def test_a_lora_makes_the_teacher_fast(distil, flags, phases, kind):
    folder = distil(rank=2, phases=phases)
    pipe = DinoDiffusionPipeline.from_pretrained(
        flags["pretrained_pipeline"], scheduler=kind.from_pretrained(folder, subfolder="scheduler")
    )
    plain = generate(pipe, guidance_scale=1.0)
    pipe.load_lora_weights(folder)
    assert not torch.equal(generate(pipe, guidance_scale=1.0), plain)
    card = (folder / "README.md").read_text()
    assert f'{kind.__name__}.from_pretrained("{folder.name}", subfolder="scheduler")' in card
    assert "4 steps by default, at most 8" in card
    samples = {"num_samples": 1, "num_variations": 1, "lora_base": flags["pretrained_pipeline"]}
    assert draw_samples(folder, scripts.EXAMPLES / "data/phantom-cxr", **samples).size == (64, 32)
    with pytest.raises(ValueError, match="than 8"):
        draw_samples(folder, scripts.EXAMPLES / "data/phantom-cxr", **samples, num_inference_steps=9)


def test_more_steps_than_were_distilled_are_refused(distilled):
    with pytest.raises(ValueError, match="than 8"):
        generate(distilled, num_inference_steps=9)
    distilled.scheduler = LCMScheduler.from_config(distilled.scheduler.config, original_inference_steps=50)
    with pytest.raises(ValueError, match="50"):
        generate(distilled, num_inference_steps=51)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pretrained_pipeline": None}, "--pretrained_pipeline"),
            ({"min_guidance": 3.0, "max_guidance": 2.0}, "--min_guidance <= --max_guidance"),
            ({"min_guidance": 0.5}, "1 <= --min_guidance"),
            ({"rank": 2, "max_guidance": 4.0}, "A LoRA has no input"),
            ({"lora_alpha": 4.0}, "give --rank, too"),
            ({"rank": 0}, "--rank must be at least 1"),
            ({"rank": 2, "lora_alpha": 0.0}, "--lora_alpha must be positive"),
            ({"teacher_steps": 0}, "teacher's steps"),
            ({"teacher_steps": 50}, "multiple of 4"),
            ({"resolution": 30}, "30"),
        ],
    )
    def test_settings(self, distil, changes, message):
        with pytest.raises(ValueError, match=message):
            distil(**changes)

    def test_a_student_is_no_teacher(self, distil, distilled, tmp_path):
        distilled.save_pretrained(tmp_path / "student")
        with pytest.raises(ValueError, match="distilled already"):
            distil(pretrained_pipeline=tmp_path / "student")

    def test_a_flow_has_no_such_schedule(self, distil, tmp_path):
        tiny.tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
        with pytest.raises(ValueError, match="flow"):
            distil(pretrained_pipeline=tmp_path / "flow")

    def test_guidance_that_the_teacher_does_not_know(self, distil, tmp_path):
        tiny.tiny_pipeline().save_pretrained(tmp_path / "teacher")
        record = {"facts": {"updates": 3, "condition dropout": 0.0}}
        (tmp_path / "teacher/training_record.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match="knows no guidance"):
            distil(pretrained_pipeline=tmp_path / "teacher")
        distil(pretrained_pipeline=tmp_path / "teacher", min_guidance=1.0, max_guidance=1.0)
