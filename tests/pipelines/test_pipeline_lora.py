"""LoRA of the UNet through peft, in every pipeline: loaded, weighed, combined, swapped, fused, saved."""

import importlib.util
import json
import sys

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

from adapters import TARGETS, adapter, save_adapter

PIPELINES = [DinoDiffusionPipeline, DinoInterpolationPipeline, DiffSegPipeline]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A scanner's and a ward's adapter, of ranks 4 and 2."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "scanner": save_adapter(root / "scanner", 0),
        "ward": save_adapter(root / "ward", 1, rank=2),
        "dora": save_adapter(root / "dora", 2, use_dora=True),
    }


@pytest.fixture
def adapted(pipe, folders):
    for name in ("scanner", "ward"):
        pipe.load_lora_weights(folders[name], adapter_name=name)
    return pipe


def predict(pipe, images, **options):
    """One prediction of the UNet."""
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = pipe.encode_image(images)
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=embeds, cross_attention_kwargs=options or None).sample


def fused_weight(pipe):
    pipe.fuse_lora()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    weight = attention.to_q.base_layer.weight.detach().clone()
    pipe.unfuse_lora()
    return weight


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


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_adapters_load_under_offloading(pipe, images, folders, method):
    pipe.load_lora_weights(folders["scanner"])
    expected = generate(pipe, images)
    offloaded = tiny.tiny_pipeline()
    getattr(offloaded, method)()
    offloaded.load_lora_weights(folders["scanner"])
    assert np.abs(generate(offloaded, images) - expected).mean() < 2e-3


def test_files_without_lora_weights_of_a_unet(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"text_encoder.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"no LoRA weights of a UNet.*text_encoder"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no LoRA weights"):
        pipe.load_lora_weights({"unet.conv_in.weight": torch.zeros(2)})


@pytest.fixture(scope="module")
def whole():
    """A pipeline that no test changes."""
    return tiny.tiny_pipeline()


@pytest.fixture(scope="module")
def first_pair():
    """Weights of an adapter, its config, and the names of the two matrices of its first layer."""
    layers, config = adapter(0)
    weights = {f"unet.{name}": weight.contiguous() for name, weight in layers.items()}
    return weights, config, [name for name in weights if "down_blocks.0" in name and "attn1.to_q" in name]


def _write(folder, weights, metadata=None):
    from safetensors.torch import save_file

    save_file(weights, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt", **(metadata or {})})
    return folder


BROKEN = {
    "NaN": (lambda down, up: (down * float("nan"), up), "NaN or infinity"),
    "infinity": (lambda down, up: (down, up - float("inf")), "NaN or infinity"),
    "NaN in half precision": (lambda down, up: ((down * float("nan")).half(), up), "NaN or infinity"),
    "no second matrix": (lambda down, up: (down, None), "not whole"),
    "no first matrix": (lambda down, up: (None, up), "not whole"),
    "two ranks": (lambda down, up: (down, torch.zeros(16, 8)), "not whole"),
    "rank 0": (lambda down, up: (down[:0], up[:, :0]), "not whole"),
    "a vector": (lambda down, up: (torch.zeros(4), up), "not whole"),
    "a number": (lambda down, up: (torch.zeros(()), up), "not whole"),
    "three axes": (lambda down, up: (down[..., None], up), "not whole"),
    "integers": (lambda down, up: (down.long(), up), "floating tensors"),
    "truth values": (lambda down, up: (down.bool(), up), "floating tensors"),
    "another width": (lambda down, up: (torch.zeros(4, 17), up), "of another UNet"),
}


@pytest.mark.parametrize("change", BROKEN)
@pytest.mark.parametrize("with_metadata", [False, True])
def test_broken_weights_are_refused_and_leave_nothing(whole, first_pair, tmp_path, change, with_metadata):
    before = {name: weight.clone() for name, weight in whole.unet.state_dict().items()}
    weights, config, (down, up) = dict(first_pair[0]), *first_pair[1:]
    function, message = BROKEN[change]
    for name, weight in zip((down, up), function(weights.pop(down), weights.pop(up)), strict=True):
        weights |= {} if weight is None else {name: weight.contiguous()}
    said = {
        f"unet.{name}": sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    metadata = {"lora_adapter_metadata": json.dumps(said, default=str)} if with_metadata else None
    for source in (_write(tmp_path, weights, metadata), weights):
        with pytest.raises(ValueError, match=message):
            whole.load_lora_weights(source)
        after = whole.unet.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "metadata",
    [
        *("{no JSON", "[1]", '"text"', "1", "[" * 50_000, '{"unet.unknown": 1}', '{"unet.target_modules": null}'),
        *(f'{{"unet.r": {value}}}' for value in ("0", "-1", '"4"', "8", "null", "4.5", "true")),
        *(f'{{"unet.lora_alpha": {value}}}' for value in ("NaN", "Infinity", '"8"', "[]", "null")),
        *(
            f'{{"unet.{name}": {value}}}'
            for name in ("rank_pattern", "alpha_pattern")
            for value in ("[1]", '{"a": NaN}')
        ),
        *(
            '{"unet.rank_pattern": {"to_q": 99}}',
            '{"unet.alpha_pattern": {"(": 1}}',
            '{"unet.modules_to_save": ["a"]}',
        ),
    ],
)
def test_malformed_metadata_is_refused(whole, first_pair, tmp_path, metadata):
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": TARGETS}
    if metadata.startswith('{"'):
        metadata = json.dumps(said | json.loads(metadata))
    before = whole.unet.state_dict().keys()
    with pytest.raises(ValueError, match=r"LoRA|must be"):
        whole.load_lora_weights(_write(tmp_path, first_pair[0], {"lora_adapter_metadata": metadata}))
    assert not whole.get_list_adapters()
    assert whole.unet.state_dict().keys() == before


def test_what_was_refused_is_not_in_the_way_of_others(pipe, first_pair, folders, images, tmp_path):
    pipe.load_lora_weights(folders["scanner"])
    expected = predict(pipe, images)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="metadata"):
        pipe.load_lora_weights(_write(tmp_path, first_pair[0], {"lora_adapter_metadata": '{"unet.r": 8}'}))
    pipe.load_lora_weights(folders["scanner"])
    assert torch.allclose(predict(pipe, images), expected, atol=1e-6)


@pytest.mark.parametrize(
    "source", [None, 5, ["a"], {1: torch.zeros(2)}, {"unet.lora_A.weight": None}, {"unet.lora": 1}]
)
def test_what_is_not_a_lora(pipe, source):
    with pytest.raises((TypeError, ValueError), match="LoRA"):
        pipe.load_lora_weights(source)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_in_the_format_of_kohya_that_is_not_finite(pipe, alpha):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {
        "lora_down.weight": torch.zeros(4, 16),
        "lora_up.weight": torch.zeros(16, 4),
        "alpha": torch.tensor(alpha),
    }
    with pytest.raises(ValueError, match="alpha` must be a finite number"):
        pipe.load_lora_weights({f"{layer}.{name}": tensor for name, tensor in parts.items()})
    with pytest.raises(ValueError, match="corrupt"):
        pipe.load_lora_weights({f"{layer}.lora_down.weight": torch.zeros(4, 16)})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, 3e38])
def test_a_strength_that_would_spoil_the_weights_is_not_fused(adapted, images, scale):
    adapted.set_adapters(["scanner", "ward"])
    before = predict(adapted, images)
    with pytest.raises(ValueError, match=r"must be a finite number|infinite or NaN"):
        adapted.fuse_lora(lora_scale=scale)
    adapted.set_adapters(["scanner", "ward"], [float("nan"), 1.0])
    with pytest.raises(ValueError, match="infinite or NaN"):
        adapted.fuse_lora()
    adapted.set_adapters(["scanner", "ward"])
    assert torch.equal(predict(adapted, images), before)


def test_pickled_adapters_are_not_read_unasked(pipe, images, tmp_path):
    layers, _ = adapter(0)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_lora_weights(tmp_path)


def test_a_missing_peft_names_the_extra(pipe, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install diffusers-dino\[train\]"):
        pipe.load_lora_weights(folders["scanner"])


def test_a_combination_is_linear_in_its_weights(adapted):
    names = ["scanner", "ward"]
    adapted.set_adapters(names, [0.0, 0.0])
    base = fused_weight(adapted)
    parts = []
    for name in names:
        adapted.set_adapters(name)
        parts.append(fused_weight(adapted) - base)
        assert parts[-1].abs().max() > 0.01
    for weights in ([0.3, 0.7], [1.0, 1.0], [-0.5, 2.0]):
        adapted.set_adapters(names, weights)
        expected = base + weights[0] * parts[0] + weights[1] * parts[1]
        assert torch.allclose(fused_weight(adapted), expected, atol=1e-5)


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
    loaded.set_progress_bar_config(disable=True)
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


WRONG = {
    "narrower": ({"block_out_channels": (32, 32)}, "32 inputs in the layer .* here is one with 16 inputs"),
    "deeper": (
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
        "here is none of that name",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_adapter_of_another_unet(pipe, images, tmp_path, wrong):
    overrides, message = WRONG[wrong]
    plain = predict(pipe, images)
    folder = save_adapter(tmp_path, 0, unet=tiny.tiny_unet(**overrides))
    with pytest.raises(ValueError, match=f"LoRA is of another UNet: .*{message}"):
        pipe.load_lora_weights(folder)
    assert pipe.get_list_adapters() == {}
    assert torch.equal(predict(pipe, images), plain)


def test_files_that_are_not_there_or_broken(pipe, folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder or file nor an id on the Hub"):
        pipe.load_lora_weights(tmp_path / "missing")
    with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors"):
        pipe.load_lora_weights(tmp_path)
    whole = (folders["scanner"] / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is corrupt, fetch it again"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_adapter(tmp_path / "pytorch_lora_weights.safetensors", 0)
    pipe.load_lora_weights(folders["scanner"], adapter_name="scanner")
    with pytest.raises(ValueError, match="scanner already in use"):
        pipe.load_lora_weights(folders["ward"], adapter_name="scanner")
    without = DinoDiffusionPipeline(**{**pipe.components, "unet": None})
    with pytest.raises(ValueError, match="no unet to load a LoRA into"):
        without.load_lora_weights(folders["scanner"])
