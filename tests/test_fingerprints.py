import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from transformers import CLIPTextConfig, CLIPTextModel

import tiny
from diffusers_dino import DinoImageConditioner
from diffusers_dino.fingerprints import fingerprint_model, fingerprint_pipeline


def text_encoder(**settings):
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=16, max_position_embeddings=8, **size, **settings))


def test_fingerprints_survive_saving(tmp_path):
    for model, load in (
        (tiny.tiny_conditioner(), DinoImageConditioner.from_pretrained),
        (tiny.tiny_vae(), type(tiny.tiny_vae()).from_pretrained),
        (text_encoder(), CLIPTextModel.from_pretrained),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        assert fingerprint_model(load(folder)) == fingerprint_model(model)


def test_fingerprints_see_every_change():
    changed = tiny.tiny_vae()
    with torch.no_grad():
        changed.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    models = [
        tiny.tiny_vae(),
        changed,
        tiny.tiny_vae(latents_mean=[0.1] * 4),
        tiny.tiny_taesd(),
        tiny.tiny_conditioner(),
        tiny.tiny_conditioner(size=64),
        text_encoder(),
        text_encoder(hidden_act="gelu"),
        text_encoder().half(),
    ]
    assert len({fingerprint_model(model) for model in models}) == len(models)


def test_a_pipeline_is_known_by_its_models():
    pipe = tiny.tiny_pipeline()
    found = fingerprint_pipeline(pipe)
    assert set(found) == {"unet", "vae", "conditioner"}
    assert found["vae"] == fingerprint_model(pipe.vae)


def test_a_pipeline_is_known_by_what_guides_it():
    guiders = (None, ClassifierFreeGuidance(2.0), ClassifierFreeGuidance(3.0), AdaptiveProjectedGuidance(3.0))
    found = [fingerprint_pipeline(tiny.tiny_pipeline(guider=guider)) for guider in guiders]
    assert len(set(map(str, found))) == len(guiders)


def test_a_model_is_known_by_the_weights_of_its_adapters(tmp_path):
    pytest.importorskip("peft")
    from adapters import save_adapter

    pipe = tiny.tiny_pipeline()
    pipe.load_lora_weights(save_adapter(tmp_path, 0), adapter_name="ward")
    found = [fingerprint_model(pipe.unet)]
    for weight in (0.5, 1.0):
        pipe.set_adapters("ward", weight)
        found.append(fingerprint_model(pipe.unet))
    pipe.disable_lora()
    found.append(fingerprint_model(pipe.unet))
    assert found[0] == found[2]
    assert len(set(found)) == 3
    pipe.unload_lora_weights()
    assert fingerprint_model(pipe.unet) == fingerprint_model(tiny.tiny_unet())
