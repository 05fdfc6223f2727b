"""Self-attention maps of real UNets: what is captured, and that the model does not notice."""

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

import tiny
from diffusers_dino.diffseg import attention
from diffusers_dino.diffseg.attention import capture_self_attention, self_attention_layers
from diffusers_dino.diffseg.merging import aggregate_attention


def inputs(batch_size=2, side=8):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, tiny.LATENT_CHANNELS, side, side, generator=generator)
    return {
        "sample": latents,
        "timestep": 300,
        "encoder_hidden_states": torch.randn(batch_size, 5, tiny.TOKEN_DIM, generator=generator),
    }


def run(unet, **given):
    with torch.no_grad():
        return unet(**(given or inputs())).sample


def captured(unet, given=None, **options):
    """The maps of one pass, or of several."""
    with capture_self_attention(unet, **options) as maps:
        for each in [{}] if given is None else given:
            run(unet, **each)
    return maps


def maps_by_processor(unet, **given):
    """The published way: a processor in each layer's place that keeps all its probabilities."""
    kept = {}

    class Keep(AttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            tokens = hidden_states if hidden_states.ndim == 3 else hidden_states.flatten(2).transpose(1, 2)
            if attn.group_norm is not None:
                tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
            query, key = attn.head_to_batch_dim(attn.to_q(tokens)), attn.head_to_batch_dim(attn.to_k(tokens))
            probabilities = attn.get_attention_scores(query, key).view(len(tokens), attn.heads, *[tokens.shape[1]] * 2)
            kept.setdefault(round(tokens.shape[1] ** 0.5), []).append(probabilities)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    for layer in self_attention_layers(unet).values():
        layer.set_processor(Keep())
    run(unet, **given)
    return {side: torch.cat(parts, dim=1) for side, parts in kept.items()}  # (B, heads * layers, N, N)


def test_maps_are_the_mean_over_heads_and_layers():
    maps = captured(tiny.tiny_unet())
    expected = maps_by_processor(tiny.tiny_unet())
    assert set(maps) == set(expected) == {8, 4}
    for side in maps:
        assert maps[side].shape == (2, side**2, side**2)
        assert torch.allclose(maps[side], expected[side].mean(dim=1), atol=1e-6)
    one = aggregate_attention({side: both[:1] for side, both in maps.items()})
    assert torch.allclose(one, aggregate_attention({side: both[0] for side, both in expected.items()}), atol=1e-6)


def test_layers_count_by_their_heads():
    """A layer of 4 heads weighs twice one of 2, as in the mean over heads x layers."""
    unet = {"block_out_channels": (16, 16), "attention_head_dim": (2, 4)}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    maps = captured(tiny.tiny_unet(**unet, **blocks))
    expected = maps_by_processor(tiny.tiny_unet(**unet, **blocks))
    assert torch.allclose(maps[4], expected[4].mean(dim=1), atol=1e-6)


def test_an_unconditional_unet():
    given = {"sample": torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), "timestep": 10}
    with capture_self_attention(unet := tiny.tiny_unconditional_unet()) as maps:
        output = run(unet, **given)
    assert torch.equal(output, run(unet, **given))
    expected = maps_by_processor(tiny.tiny_unconditional_unet(), **given)
    assert set(maps) == set(expected) == {8}
    assert torch.allclose(maps[8], expected[8].mean(dim=1), atol=1e-6)


def test_chunks_do_not_matter(monkeypatch):
    unet = tiny.tiny_unet()
    maps = captured(unet)
    monkeypatch.setattr(attention, "_CHUNK_NUMEL", 1000)  # 3 of 64 queries at a time
    chunked = captured(unet)
    assert all(torch.allclose(maps[side], chunked[side], atol=1e-6) for side in maps)


def test_several_passes_are_averaged():
    unet, other = tiny.tiny_unet(), {**inputs(), "timestep": 700}
    first = captured(unet)
    second, both = captured(unet, [other]), captured(unet, [inputs(), other])
    assert all(torch.allclose(both[side], (first[side] + second[side]) / 2, atol=1e-6) for side in both)


PROCESSORS = {
    "plain": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "sdpa": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "sliced": lambda unet: unet.set_attn_processor(SlicedAttnProcessor(1)),
    "fused": lambda unet: unet.fuse_qkv_projections(),
    "a module": lambda unet: unet.set_attn_processor(
        {name: CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False) for name in unet.attn_processors}
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_model_does_not_notice(name):
    unet = tiny.tiny_unet()
    expected = captured(unet)
    PROCESSORS[name](unet)
    before, alone = dict(unet.attn_processors), run(unet)
    with capture_self_attention(unet) as maps:
        assert torch.equal(run(unet), alone)
    assert all(unet.attn_processors[key] is processor for key, processor in before.items())
    assert torch.equal(run(unet), alone)
    assert all(torch.allclose(maps[side], expected[side], atol=1e-6) for side in expected)
    if name == "fused":
        assert any(isinstance(processor, FusedAttnProcessor2_0) for processor in before.values())


def test_adapters_are_seen():
    peft = pytest.importorskip("peft")
    unet = tiny.tiny_unet()
    before = captured(unet)
    with tiny.seeded(0):
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    alone = run(unet)
    with capture_self_attention(unet) as adapted:
        assert torch.equal(run(unet), alone)
    assert (adapted[8] - before[8]).abs().max() > 1e-3
    expected = maps_by_processor(unet)
    assert torch.allclose(adapted[8], expected[8].mean(dim=1), atol=1e-6)


def test_half_precision_is_reduced_in_float32():
    unet = tiny.tiny_unet().to(torch.bfloat16)
    given = {name: x.bfloat16() if torch.is_tensor(x) else x for name, x in inputs().items()}
    maps = captured(unet, [given])
    assert maps[8].dtype == torch.float32
    assert torch.allclose(maps[8].sum(dim=-1), torch.ones(2, 64), atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_read_eagerly():
    unet = tiny.tiny_unet()
    expected = captured(unet)
    unet.compile_repeated_blocks(backend="eager")
    run(unet)  # compiled before anything is captured
    maps = captured(unet)
    assert all(torch.equal(maps[side], expected[side]) for side in expected)


def hooks_of(unet):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def test_everything_is_given_back_after_an_exception():
    unet = tiny.tiny_unet()
    processors, before = dict(unet.attn_processors), run(unet)

    def fail():
        with capture_self_attention(unet):
            assert hooks_of(unet)
            run(unet)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    broken = {**inputs(), "encoder_hidden_states": torch.zeros(2, 5, 7)}
    with pytest.raises(RuntimeError), capture_self_attention(unet):
        run(unet, **broken)
    assert hooks_of(unet) == 0
    assert unet.attn_processors == processors
    assert torch.equal(run(unet), before)


def test_sides_and_layers_are_chosen():
    unet = tiny.tiny_unet()
    maps = captured(unet, sides=[4])
    assert set(maps) == {4}
    decoder = captured(unet, layers=["up_blocks.1"])
    assert set(decoder) == {8}
    every = captured(unet)
    assert not torch.allclose(decoder[8], every[8], atol=1e-4)


def test_what_is_not_there_is_refused():
    unet = tiny.tiny_unet()
    message = r"no self-attention of side 5, 64 for this input; it has \[4, 8\]"
    with pytest.raises(ValueError, match=message), capture_self_attention(unet, sides=[8, 5, 64]):
        run(unet)
    with pytest.raises(ValueError, match="it has run none"), capture_self_attention(unet, sides=[8]):
        pass
    convolutions = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    without = tiny.tiny_unet(**convolutions, mid_block_type=None)
    with pytest.raises(ValueError, match="no self-attention layers"), capture_self_attention(without):
        pass
    message = r"no self-attention in \['decoder'\]"
    with pytest.raises(ValueError, match=message), capture_self_attention(unet, layers=["decoder"]):
        pass
    with pytest.raises(TypeError, match="collection of names"), capture_self_attention(unet, layers="up_blocks"):
        pass


@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (2, 4, 4, 16)])
def test_latents_that_are_not_square_are_refused(shape):
    """4 x 16 latents have 64 positions, as many as 8 x 8."""
    unet, given = tiny.tiny_unet(), {**inputs(), "sample": torch.zeros(shape)}
    for arguments in ([], ["sample"]):
        positional = [given[name] for name in arguments] + ([given["timestep"]] if arguments else [])
        named = {name: x for name, x in given.items() if not arguments or name == "encoder_hidden_states"}
        with pytest.raises(ValueError, match="read as squares"), capture_self_attention(unet):
            unet(*positional, **named)


def test_a_processor_of_ones_own_that_hides_its_queries():
    class Silent(nn.Module):
        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    unet = tiny.tiny_unet()
    for layer in self_attention_layers(unet).values():
        layer.set_processor(Silent())
    message = r"Silent does not call.*set_default_attn_processor"
    with pytest.raises(ValueError, match=message), capture_self_attention(unet):
        run(unet)
