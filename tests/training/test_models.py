import json

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict

import tiny
from diffusers_dino.training import models, optim


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")
    tiny.tiny_pipeline().save_pretrained(folder / "pipeline")
    tiny.tiny_taesd().save_pretrained(folder / "taesd")
    tiny.tiny_unet().save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="linear", prediction_type="sample").save_config(folder / "schedule")
    return folder


def test_parts_load_from_their_folder_and_from_a_pipeline(folder):
    assert isinstance(models.load_denoiser(str(folder / "unet")), UNet2DConditionModel)
    assert isinstance(models.load_denoiser(str(folder / "pipeline")), UNet2DConditionModel)
    assert isinstance(models.load_vae(str(folder / "taesd")), AutoencoderTiny)
    assert models.load_vae(str(folder / "pipeline")).config["latent_channels"] == tiny.LATENT_CHANNELS


def test_trained_pipelines_load_from_pipelines_and_checkpoints(folder, tmp_path):
    """A run is a folder with all parts but the UNet, which its checkpoints hold; or a LoRA for another pipeline."""
    whole = models.load_trained_pipeline(folder / "pipeline")
    for name in ("vae", "conditioner", "scheduler"):
        getattr(whole, name).save_pretrained(tmp_path / "run" / name)
    trained = tiny.tiny_unet()
    torch.nn.init.constant_(trained.conv_in.bias, 3.0)
    trained.save_pretrained(tmp_path / "run/checkpoint-1/unet")
    loaded = models.load_trained_pipeline(tmp_path / "run/checkpoint-1", torch.float16)
    assert loaded.unet.conv_in.bias.eq(3).all()
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.conditioner.dtype} == {torch.float16}
    with pytest.raises(FileNotFoundError, match=r"not a pipeline .* and not a checkpoint"):
        models.load_trained_pipeline(tmp_path / "run/vae")


def test_a_checkpoint_beside_the_conditioner_of_another_training_is_refused(folder, tmp_path):
    pipe = models.load_trained_pipeline(folder / "pipeline")
    pipe.conditioner = pipe.conditioner.with_tokens("cls")  # a new choice, which training notes
    models.adapt_for_training(pipe, torch.device("cpu"), torch.bfloat16)
    pipe.unet.save_pretrained(tmp_path / "checkpoint-1/unet")
    for name in ("vae", "conditioner", "scheduler"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    assert models.load_trained_pipeline(tmp_path / "checkpoint-1").conditioner.num_tokens == 1
    tiny.tiny_conditioner().save_pretrained(tmp_path / "conditioner")
    with pytest.raises(ValueError, match="do not belong together"):
        models.load_trained_pipeline(tmp_path / "checkpoint-1")


def test_a_trained_lora_is_fused_into_its_pipeline(folder, tmp_path):
    pipe = models.load_trained_pipeline(folder / "pipeline")
    before = pipe.unet.state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    kept = before[name].clone()
    models.add_lora(pipe.unet, rank=2)
    for key, parameter in pipe.unet.named_parameters():
        if "lora_B" in key:
            torch.nn.init.constant_(parameter, 0.5)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path / "run/checkpoint-1", unet_lora_layers=layers)
    (tmp_path / "run/training_arguments.json").write_text(
        json.dumps({"pretrained_pipeline": str(folder / "pipeline")})
    )
    fused = models.load_trained_pipeline(tmp_path / "run/checkpoint-1").unet.state_dict()
    assert not torch.equal(fused[name], kept)
    assert fused.keys() == tiny.tiny_unet().state_dict().keys()


def test_parts_of_the_wrong_kind_or_missing(folder, tmp_path):
    with pytest.raises(ValueError, match="UNet2DConditionModel, but the VAE"):
        models.load_vae(str(folder / "unet"))
    with pytest.raises(ValueError, match="AutoencoderTiny cannot be used as a denoiser"):
        models.load_denoiser(str(folder / "taesd"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.load_denoiser(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the Hub gave no vae"):
        models.load_vae("org/missing")


def test_new_unet_fits_its_neighbours(folder):
    vae = tiny.tiny_vae(latent_channels=8)
    unet = models.new_denoiser(str(folder / "unet"), vae, token_width=48, resolution=64)
    config = unet.config
    assert (config["in_channels"], config["out_channels"], config["sample_size"]) == (8, 8, 16)
    assert config["cross_attention_dim"] == 48
    assert config["block_out_channels"] == [16, 32]


def test_query_and_key_weights_are_scaled_and_no_others(folder):
    made = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        made.append(models.new_denoiser(str(folder / "unet"), tiny.tiny_vae(), 32, 32, scale).state_dict())
    for name, weight in made[0].items():
        factor = 2 if ".to_q." in name or ".to_k." in name else 1
        assert torch.equal(weight * factor, made[1][name]), name


def test_the_default_schedule_is_stable_diffusions():
    scheduler = models.make_scheduler()
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scheduler.alphas_cumprod, reference.alphas_cumprod)
    assert not scheduler.config["clip_sample"]


def test_schedule_from_elsewhere_and_its_changes(folder):
    from_config = models.make_scheduler(str(folder / "schedule"))
    assert (from_config.config["beta_schedule"], from_config.config["prediction_type"]) == ("linear", "sample")
    from_file = models.make_scheduler(str(folder / "schedule" / "scheduler_config.json"))
    assert from_file.config["beta_schedule"] == "linear"
    assert models.make_scheduler(str(folder / "pipeline")).config["beta_schedule"] == "scaled_linear"
    zero = models.make_scheduler(prediction_type="v_prediction", zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.config["timestep_spacing"] == "trailing"
    with pytest.raises(ValueError, match="v_prediction"):
        models.make_scheduler(zero_snr=True)


def test_resolution_must_be_halved_as_often_as_the_models_do():
    assert models.latent_shape(tiny.tiny_vae(), tiny.tiny_unet(), 64) == (4, 16, 16)
    with pytest.raises(ValueError, match="multiple of 8"):
        models.latent_shape(tiny.tiny_vae(), tiny.tiny_unet(), 60)


def test_trained_weights_are_float32_and_the_others_frozen():
    pipe = tiny.tiny_pipeline()
    models.add_lora(pipe.unet, rank=2)
    trained = models.adapt_for_training(pipe, torch.device("cpu"), torch.bfloat16)
    assert 0 < len(trained) < len(list(pipe.unet.parameters()))
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = {p.dtype for p in pipe.unet.parameters() if not p.requires_grad}
    assert frozen == {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in [*pipe.vae.parameters(), *pipe.conditioner.parameters()])
    assert pipe.conditioner.null_tokens.dtype == torch.float32


def test_optimizer_takes_its_options():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.make_adamw([weight], lr=0.1, weight_decay=0.0, betas=(0.5, 0.6), eps=1e-6)
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9), atol=1e-5, rtol=0)


def test_eight_bit_optimizer_is_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = optim.make_adamw([torch.nn.Parameter(torch.ones(3))], eight_bit=True, lr=0.1)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
