"""LoRA of the UNet through peft, in every pipeline: loaded, weighed, combined, swapped, fused, saved."""

import importlib.util

import numpy as np
import pytest
import torch

import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoInterpolationPipeline
from tiny import generate

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict

from adapters import adapter, predict

PIPELINES = [DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline]


def test_loading_restores_rank_and_alpha(pipe, folders):
    pipe.load_lora_weights(folders["scanner"], adapter_name="scanner")
    config = pipe.unet.peft_config["scanner"]
    assert (config.r, config.lora_alpha) == (4, 8)
    loaded = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="scanner"))
    saved, _ = adapter(0)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_file_and_a_state_dict_load_as_the_folder_does(pipe, images, folders):
    state_dict, _ = pipe.lora_state_dict(folders["scanner"])  # which does not hold the adapter's alpha
    sources = None, folders["scanner"], folders["scanner"] / "pytorch_lora_weights.safetensors", state_dict
    predictions = []
    for source in sources:
        if source is not None:
            pipe.load_lora_weights(source)
        predictions.append(predict(pipe, images))
        pipe.unload_lora_weights()
    plain, folder, file, state = predictions
    assert torch.equal(file, folder)
    assert (state - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_is_not_saved_under_an_adapter(adapted, tmp_path, kind):
    made = kind.from_pipe(adapted)
    for prepare in (lambda: None, made.fuse_lora):
        prepare()
        with pytest.raises(ValueError, match=r"unet has LoRA adapters.*unload_lora_weights"):
            made.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    made.unload_lora_weights()
    made.save_pretrained(tmp_path / "made")
    loaded = kind.from_pretrained(tmp_path / "made")
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), made.unet.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_adapters_load_under_offloading(pipe, images, folders, method):
    pipe.load_lora_weights(folders["scanner"])
    expected = generate(pipe, images)
    offloaded = tiny.tiny_pipeline()
    getattr(offloaded, method)()
    offloaded.load_lora_weights(folders["scanner"])
    assert np.abs(generate(offloaded, images) - expected).mean() < 2e-3


def test_names_weights_and_the_scale_of_a_call(adapted, images):
    assert adapted.get_list_adapters() == {"unet": ["scanner", "ward"]}
    adapted.set_adapters(["scanner", "ward"], [0.8, 0.4])
    assert adapted.get_active_adapters() == ["scanner", "ward"]
    half = predict(adapted, images, scale=0.5)
    both = generate(adapted, images)
    adapted.set_adapters(["scanner", "ward"], [0.4, 0.2])
    assert torch.allclose(predict(adapted, images), half, atol=1e-5)
    assert np.abs(generate(adapted, images) - both).max() > 1e-4
    adapted.set_adapters(["scanner", "ward"], 0.4)  # one number for all
    assert not torch.allclose(predict(adapted, images), half, atol=1e-4)


def test_blocks_may_be_weighed_apart(adapted, images):
    adapted.set_adapters("scanner")
    whole = predict(adapted, images)
    adapted.set_adapters("scanner", {"unet": {"down": 1.0, "mid": 1.0, "up": 1.0}})
    assert torch.allclose(predict(adapted, images), whole, atol=1e-6)
    adapted.set_adapters("scanner", {"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}})
    assert torch.allclose(predict(adapted, images), predict(tiny.tiny_pipeline(), images), atol=1e-6)
    adapted.set_adapters("scanner", {"unet": {"down": 0.0, "mid": 0.0, "up": 1.0}})
    assert not torch.allclose(predict(adapted, images), whole, atol=1e-4)


def test_deleted_and_disabled_adapters_leave_nothing(adapted, images):
    plain = predict(tiny.tiny_pipeline(), images)
    adapted.set_adapters("ward")
    ward = predict(adapted, images)
    adapted.delete_adapters("scanner")
    assert adapted.get_list_adapters() == {"unet": ["ward"]}
    adapted.set_adapters("ward")
    assert torch.equal(predict(adapted, images), ward)
    adapted.disable_lora()
    assert torch.equal(predict(adapted, images), plain)
    adapted.enable_lora()
    assert torch.equal(predict(adapted, images), ward)
    with pytest.raises(ValueError, match="not in the list of present adapters"):
        adapted.set_adapters("scanner")


def test_an_adapter_is_swapped_in_place(pipe, folders, images):
    pipe.load_lora_weights(folders["ward"], adapter_name="ward")
    ward = predict(pipe, images)
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(folders["scanner"], adapter_name="site")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    matrix = layer.lora_A["site"]
    pipe.load_lora_weights(folders["ward"], adapter_name="site", hotswap=True)
    assert layer.lora_A["site"] is matrix
    assert torch.allclose(predict(pipe, images), ward, atol=1e-5)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        pipe.load_lora_weights(folders["ward"], adapter_name="other", hotswap=True)


@pytest.mark.parametrize("names", [["scanner"], ["scanner", "ward"]])
def test_a_fused_combination_is_saved_as_a_pipeline(adapted, images, tmp_path, names):
    adapted.set_adapters(names, [0.6] * len(names))
    expected = generate(adapted, images)
    adapted.fuse_lora(adapter_names=names)
    assert adapted.fused_loras == set(names)
    adapted.unload_lora_weights()
    np.testing.assert_allclose(generate(adapted, images), expected, atol=1e-4)
    adapted.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.get_list_adapters() == {}
    np.testing.assert_allclose(generate(loaded, images), expected, atol=1e-4)


def test_fusing_at_half_strength_is_a_weight_of_a_half(pipe, folders, images):
    pipe.load_lora_weights(folders["scanner"], adapter_name="scanner")
    pipe.set_adapters("scanner", 0.5)
    half = predict(pipe, images)
    pipe.set_adapters("scanner")
    whole = predict(pipe, images)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    pipe.unfuse_lora()
    assert torch.allclose(predict(pipe, images), whole, atol=1e-4)
    pipe.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert torch.allclose(predict(pipe, images), half, atol=1e-5)


def test_dora_is_loaded_as_it_was_saved(pipe, folders, images):
    plain = predict(pipe, images)
    pipe.load_lora_weights(folders["dora"], adapter_name="dora")
    assert pipe.unet.peft_config["dora"].use_dora
    magnitudes = [name for name in get_peft_model_state_dict(pipe.unet, adapter_name="dora") if "magnitude" in name]
    assert magnitudes
    adapted = predict(pipe, images)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    pipe.fuse_lora()
    assert torch.allclose(predict(pipe, images), adapted, atol=1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_pipeline_loads_and_shares_adapters(pipe, folders, images, kind):
    other = kind.from_pipe(tiny.tiny_pipeline())
    plain = predict(pipe, images)
    other.load_lora_weights(folders["scanner"], adapter_name="scanner")
    pipe.load_lora_weights(folders["scanner"], adapter_name="scanner")
    shared = kind.from_pipe(pipe)
    assert shared.get_active_adapters() == other.get_active_adapters() == ["scanner"]
    for source in (other, shared):
        adapted = predict(DinoDiffusionPipeline.from_pipe(source), images)
        assert torch.equal(adapted, predict(pipe, images))
        assert not torch.allclose(adapted, plain, atol=1e-3)
    shared.unload_lora_weights()
    assert torch.equal(predict(pipe, images), plain)


def test_segments_are_those_of_the_adapted_model(pipe, folders, images):
    diffseg = DiffSegPipeline.from_pipe(pipe)
    plain = diffseg.attention_maps(images[:1])
    diffseg.load_lora_weights(folders["scanner"])
    adapted = diffseg.attention_maps(images[:1])
    assert (adapted - plain).abs().max() > 1e-4
    diffseg.fuse_lora()
    assert torch.allclose(diffseg.attention_maps(images[:1]), adapted, atol=1e-5)


def test_adapters_go_where_the_pipeline_is_sent(adapted, images):
    adapted.to(torch.bfloat16)
    weights = [weight for name, weight in adapted.unet.named_parameters() if "lora_" in name]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert np.isfinite(generate(adapted, images)).all()
    adapted.set_lora_device(["ward"], "meta")
    devices = {
        name.split(".")[-2]: weight.device.type for name, weight in adapted.unet.named_parameters() if "lora_" in name
    }
    assert devices == {"scanner": "cpu", "ward": "meta"}


@pytest.mark.parametrize("method", ["model", "group"])
def test_adapters_load_under_offloading_of_any_kind(pipe, folders, images, method):
    pipe.load_lora_weights(folders["scanner"])
    expected = generate(pipe, images)
    offloaded = tiny.tiny_pipeline()
    if method == "model":
        offloaded.enable_model_cpu_offload(device="cpu")
        offloaded.remove_all_hooks()  # diffusers' loader puts hooks back on an accelerator, which there may not be
    else:
        cpu = torch.device("cpu")
        offloaded.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    offloaded.load_lora_weights(folders["scanner"])
    np.testing.assert_allclose(generate(offloaded, images), expected, atol=1e-5)
