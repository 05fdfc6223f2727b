"""LoRA of the UNet through peft: load, save, weigh, combine, fuse."""

import importlib.util

import numpy as np
import pytest
import torch

import tiny
from diffusers_dino.pipelines import lora
from tiny import generate

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

from adapters import adapter, save_adapter
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict


@pytest.fixture
def folders(tmp_path):
    """Two saved adapters."""
    return [save_adapter(tmp_path / f"lora{seed}", seed) for seed in (0, 1)]


def test_a_saved_adapter_changes_the_images_and_leaves_again(pipe, images, folders):
    plain = generate(pipe, images)
    assert [path.name for path in folders[0].iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe.load_lora_weights(folders[0])
    adapted = generate(pipe, images)
    assert np.abs(adapted - plain).max() > 1e-2
    pipe.disable_lora()
    assert np.array_equal(generate(pipe, images), plain)
    pipe.enable_lora()
    assert np.array_equal(generate(pipe, images), adapted)
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe, images), plain)


def test_loading_restores_rank_and_alpha(pipe, folders):
    pipe.load_lora_weights(folders[0], adapter_name="scanner")
    config = pipe.unet.peft_config["scanner"]
    assert (config.r, config.lora_alpha) == (4, 8)
    loaded = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="scanner"))
    saved, _ = adapter(0)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_file_and_a_state_dict_load_as_the_folder_does(pipe, images, folders):
    pipe.load_lora_weights(folders[0])
    from_folder = generate(pipe, images)
    pipe.unload_lora_weights()
    state_dict, _ = pipe.lora_state_dict(folders[0])
    for source in (folders[0] / "pytorch_lora_weights.safetensors", state_dict):
        pipe.load_lora_weights(source)
        assert np.abs(generate(pipe, images) - generate(tiny.tiny_pipeline(), images)).max() > 1e-2
        pipe.unload_lora_weights()
    pipe.load_lora_weights(folders[0] / "pytorch_lora_weights.safetensors")
    assert np.array_equal(generate(pipe, images), from_folder)


def test_fused_weights_give_the_same_images(pipe, images, folders):
    plain = generate(pipe, images)
    pipe.load_lora_weights(folders[0])
    adapted = generate(pipe, images)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    np.testing.assert_allclose(generate(pipe, images), adapted, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(generate(pipe, images), plain, atol=1e-4)


def test_scale_of_one_call(pipe, images, folders):
    plain = generate(pipe, images)
    pipe.load_lora_weights(folders[0])
    full = generate(pipe, images)
    half = generate(pipe, images, cross_attention_kwargs={"scale": 0.5})
    np.testing.assert_allclose(generate(pipe, images, cross_attention_kwargs={"scale": 0.0}), plain, atol=1e-5)
    assert np.abs(half - full).max() > 1e-3
    assert np.array_equal(generate(pipe, images), full)


def test_adapters_are_weighed_and_combined(pipe, images, folders):
    for name, folder in zip(("a", "b"), folders, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    results = {}
    for label, (names, weights) in {
        "a": (["a"], [1.0]),
        "b": (["b"], [1.0]),
        "both": (["a", "b"], [0.5, 0.5]),
        "a again": (["a", "b"], [1.0, 0.0]),
    }.items():
        pipe.set_adapters(names, adapter_weights=weights)
        results[label] = generate(pipe, images)
    np.testing.assert_allclose(results["a"], results["a again"], atol=1e-5)
    for label in ("b", "both"):
        assert np.abs(results["a"] - results[label]).max() > 1e-3
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"unet": ["a"]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_adapters_load_under_offloading(pipe, images, folders, method):
    pipe.load_lora_weights(folders[0])
    expected = generate(pipe, images)
    offloaded = tiny.tiny_pipeline()
    getattr(offloaded, method)()
    offloaded.load_lora_weights(folders[0])
    assert np.abs(generate(offloaded, images) - expected).mean() < 2e-3


def test_files_without_lora_weights_of_a_unet(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"text_encoder.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"no LoRA weights of a UNet.*text_encoder"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no LoRA weights"):
        pipe.load_lora_weights({"unet.conv_in.weight": torch.zeros(2)})


def test_pickled_adapters_are_not_read_unasked(pipe, images, tmp_path):
    layers, _ = adapter(0)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_lora_weights(tmp_path)


def test_a_missing_peft_names_the_extra(pipe, folders, monkeypatch):
    monkeypatch.setattr(lora, "USE_PEFT_BACKEND", False)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[train\]"):
        pipe.load_lora_weights(folders[0])
