"""LoRA files that are broken, of another model or not there: refused, and nothing is left behind."""

import importlib.util
import json
import sys

import pytest
import torch

import tiny
from diffusers_dino import DinoDiffusionPipeline

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)


from adapters import TARGETS, adapter, predict, save_adapter


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


def test_files_without_lora_weights_of_a_unet(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"text_encoder.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"no LoRA weights of a UNet.*text_encoder"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no LoRA weights"):
        pipe.load_lora_weights({"unet.conv_in.weight": torch.zeros(2)})


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
