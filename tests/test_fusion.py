"""Several encoders under one denoiser: their type embeddings, subsets of them, and training with some left out."""

import shutil

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from safetensors.torch import load_file

import scripts
import tiny
from diffusers_dino import DiffSegPipeline, DinoDiffusionPipeline, DinoImageConditioner, DinoInterpolationPipeline
from diffusers_dino.fusion import TokenFusion
from diffusers_dino.training.models import load_trained_pipeline
from diffusers_dino.training.objective import draw_encoders, drop_encoders
from tiny import generate

IMAGES = tiny.random_images(4)
FUSION = "fusion/diffusion_pytorch_model.safetensors"


def two_encoders(*sources: str) -> DinoImageConditioner:
    """An encoder at 32 px beside one of other weights at 16 px: 5 global tokens each."""
    sources = sources or ("org/dinov2-tiny", "org/rad-dino")
    with tiny.seeded(7):
        other = type(tiny.tiny_encoder())(tiny.tiny_encoder().config).eval()
    parts = [
        DinoImageConditioner.from_model(model, size=size, mean=(0.5,) * 3, std=(0.25,) * 3, source=source)
        for model, size, source in zip((tiny.tiny_encoder(), other), (32, 16), sources, strict=True)
    ]
    built = DinoImageConditioner(
        encoders=[part.config["encoders"][0] for part in parts],
        tokens="global",
        projection_dim=None,
        projection_seed=0,
    )
    for encoder, part in zip(built.image_encoders, parts, strict=True):
        encoder.load_state_dict(part.image_encoders[0].state_dict())
    built.null_tokens.copy_(tiny.gaussian(*built.null_tokens.shape, dtype=torch.float32))
    return built


@pytest.fixture
def fused() -> DinoDiffusionPipeline:
    """A pipeline of two encoders whose embeddings are not zero."""
    conditioner = two_encoders()
    fusion = TokenFusion.of(conditioner, encoder_dropout=0.3)
    fusion.type_embeddings.data.normal_(generator=torch.Generator().manual_seed(0))
    return tiny.tiny_pipeline(conditioner=conditioner, fusion=fusion)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("parts")
    flags = scripts.tiny_training(folder, count=12)
    two_encoders().save_pretrained(folder / "conditioner")
    return {**flags, "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True}


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    changes = {"fuse_encoders": True, "encoder_dropout": 0.5, "output_dir": folder}
    scripts.call_script("train_dino.py", **{**settings, **changes})
    return folder


def test_a_new_fusion_changes_no_bit_and_a_trained_one_does(fused):
    plain = DinoDiffusionPipeline.from_pipe(fused, fusion=None)
    new = DinoDiffusionPipeline.from_pipe(fused, fusion=TokenFusion.of(fused.conditioner))
    expected = generate(plain, IMAGES)
    assert (generate(new, IMAGES) == expected).all()
    assert (generate(fused, IMAGES) != expected).any()


def test_the_embedding_is_added_to_what_the_denoiser_is_given(fused):
    types = fused.fusion.type_embeddings.detach().repeat_interleave(5, dim=0)
    tokens = fused.encode_image(IMAGES)
    null = fused.conditioner.null_tokens.clone()
    given = generate(fused, IMAGES)
    fused.register_modules(fusion=None)
    fused.conditioner.null_tokens.copy_(null + types)
    assert (generate(fused, image_embeds=tokens + types) == given).all()


def test_saved_and_loaded_it_generates_the_same_bits(fused, tmp_path):
    fused.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.fusion.config["encoder_dropout"] == 0.3
    assert (generate(loaded, IMAGES) == generate(fused, IMAGES)).all()


def test_other_pipelines_take_it_along(fused):
    path = DinoInterpolationPipeline.from_pipe(fused)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    ends = path(IMAGES[:1], IMAGES[1:2], [0.0, 1.0], generator=torch.Generator().manual_seed(0), **options).images
    start = fused(IMAGES[:1], generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(ends[:1], start)
    segments = DiffSegPipeline.from_pipe(fused)
    maps = segments.attention_maps(IMAGES[:1])
    tokens = segments.conditioner(segments.conditioner.preprocess(IMAGES[:1], crop=False))
    assert torch.equal(segments.attention_maps(IMAGES[:1], image_embeds=tokens), maps)
    segments.register_modules(fusion=None)
    assert not torch.equal(segments.attention_maps(IMAGES[:1]), maps)


def test_a_subset_has_the_null_condition_in_place_of_the_others(fused):
    whole, null = fused.encode_image(IMAGES), fused.conditioner.null_condition(4)
    for name in ("rad-dino", "org/rad-dino"):
        some = fused.encode_image(IMAGES, encoders=[name])
        assert torch.equal(some[:, :5], null[:, :5])
        assert torch.equal(some[:, 5:], whole[:, 5:])
    assert torch.equal(fused.encode_image(IMAGES, encoders=["rad-dino", "dinov2-tiny"]), whole)
    assert torch.equal(fused.conditioner.encode(IMAGES, encoders=["rad-dino"]), some)
    fused.enable_fixed_batch(2)
    assert torch.equal(fused.encode_image(IMAGES[:1])[0], fused.encode_image(IMAGES)[0])
    fused.disable_fixed_batch()


def test_encoders_of_one_name_are_numbered():
    conditioner = two_encoders("org/vit", "other/vit")
    assert conditioner.encoder_names == ["vit", "vit-2"]
    same = two_encoders("vit", "vit")
    assert torch.equal(same.encode(IMAGES, encoders=["vit"])[:, 5:], same.null_condition(4)[:, 5:])


@pytest.mark.parametrize(
    ("encoders", "error", "message"),
    [
        (["rad-dion"], ValueError, "did you mean 'rad-dino'"),
        ([], ValueError, "empty"),
        ("rad-dino", TypeError, r"\['rad-dino'\]"),
    ],
)
def test_a_wrong_choice_of_encoders_is_refused(fused, encoders, error, message):
    with pytest.raises(error, match=message):
        fused.encode_image(IMAGES, encoders=encoders)


def test_a_subset_is_warned_of_where_none_was_trained(fused):
    fused.fusion.register_to_config(encoder_dropout=0.0)
    with pytest.warns(UserWarning, match="not trained with a dropout of encoders"):
        fused.encode_image(IMAGES, encoders=["rad-dino"])


def test_what_does_not_fit_is_refused(fused):
    with pytest.raises(ValueError, match="was trained for the encoders"):
        DinoDiffusionPipeline.from_pipe(fused, conditioner=two_encoders("org/a", "org/b"))
    narrow = TokenFusion(encoder_names=["a", "b"], tokens_per_encoder=[5, 5], token_dim=8)
    with pytest.raises(ValueError, match="width 8"):
        DinoDiffusionPipeline.from_pipe(fused, fusion=narrow)
    with pytest.raises(ValueError, match="two or more"):
        TokenFusion(encoder_names=["a"], tokens_per_encoder=[5], token_dim=8)
    with pytest.raises(ValueError, match="probability"):
        TokenFusion.of(fused.conditioner, encoder_dropout=1.0)


def test_draws_depend_on_seed_and_place_and_keep_one_encoder():
    kept = draw_encoders(range(4000), 3, 0.5)
    assert torch.equal(kept[10:20], draw_encoders(range(10, 20), 3, 0.5))
    assert not torch.equal(kept, draw_encoders(range(4000), 3, 0.5, seed=1))
    assert kept.any(dim=1).all()
    share = (1 - 0.5) + 0.5**3 / 3  # kept by itself, or as the last of all
    torch.testing.assert_close(kept.double().mean(0), torch.full((3,), share, dtype=torch.float64), atol=0.03, rtol=0)
    assert draw_encoders(range(10), 3, 0.0).all()


def test_tokens_of_encoders_that_are_left_out_are_null(fused):
    fusion = TokenFusion.of(fused.conditioner, encoder_dropout=0.5)
    counts = fusion.config["tokens_per_encoder"]
    tokens = tiny.gaussian(20, sum(counts), 3)
    dropped = drop_encoders(tokens, torch.zeros(1, 1, 3), range(5, 25), fusion, seed=2)
    kept = draw_encoders(range(5, 25), len(counts), 0.5, seed=2)
    assert 20 < kept.sum() < 20 * len(counts)
    for sample, changed, flags in zip(tokens.split(counts, 1), dropped.split(counts, 1), kept.T, strict=True):
        assert torch.equal(changed, sample * flags[:, None, None])


def test_it_is_trained_averaged_and_saved_with_the_unet(trained):
    final, early = (load_trained_pipeline(trained / part) for part in ("", "checkpoint-2"))
    assert final.fusion.config["encoder_dropout"] == 0.5
    assert final.fusion.type_embeddings.abs().sum(dim=1).gt(0).all()
    assert not torch.equal(final.fusion.type_embeddings, early.fusion.type_embeddings)
    raw = load_file(trained / "checkpoint-4/trainable.safetensors")["fusion.type_embeddings"]
    average = load_file(trained / "checkpoint-4" / FUSION)["type_embeddings"]
    assert torch.equal(average, final.fusion.type_embeddings)
    assert not torch.equal(raw, average)


@pytest.mark.parametrize("use_ema", [True, False])
def test_resumed_it_ends_with_the_same_bits(settings, trained, tmp_path, use_ema):
    flags = {**settings, "fuse_encoders": True, "encoder_dropout": 0.5, "use_ema": use_ema}
    whole = trained
    if not use_ema:
        whole = tmp_path / "whole"
        scripts.call_script("train_dino.py", **{**flags, "output_dir": whole})
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("checkpoint-2", "vae", "conditioner", "scheduler"):
        shutil.copytree(whole / name, folder / name)
    scripts.call_script("train_dino.py", **{**flags, "output_dir": folder, "resume_from_checkpoint": "latest"})
    assert all(scripts.same_weights(whole / part, folder / part) for part in ("unet", "fusion"))
    with pytest.raises(ValueError, match="fusion at the start"):
        scripts.call_script(
            "train_dino.py",
            **{**flags, "encoder_dropout": 0.1, "output_dir": folder, "resume_from_checkpoint": "latest"},
        )


def test_a_lora_keeps_its_pipelines_fusion(settings, trained, tmp_path):
    given = {name: value for name, value in settings.items() if name not in ("vae", "conditioner", "unet_config")}
    changes = {"pretrained_pipeline": trained, "rank": 2, "max_train_steps": 1, "checkpointing_steps": 1}
    scripts.call_script("train_dino.py", **{**given, **changes, "output_dir": tmp_path / "lora"})
    assert not (tmp_path / "lora/fusion").exists()
    pipe, before = load_trained_pipeline(tmp_path / "lora/checkpoint-1"), load_trained_pipeline(trained)
    assert torch.equal(pipe.fusion.type_embeddings, before.fusion.type_embeddings)


def test_trained_further_it_keeps_the_fusion_and_leaves_guides_behind(settings, trained, tmp_path):
    pipe = DinoDiffusionPipeline.from_pretrained(trained, guider=ClassifierFreeGuidance(2.0), guide=tiny.tiny_unet())
    pipe.save_pretrained(tmp_path / "guided")
    given = {name: value for name, value in settings.items() if name not in ("vae", "conditioner", "unet_config")}
    changes = {"pretrained_pipeline": tmp_path / "guided", "max_train_steps": 1, "output_dir": tmp_path / "further"}
    scripts.call_script("train_dino.py", **{**given, **changes})
    further = DinoDiffusionPipeline.from_pretrained(tmp_path / "further")
    assert further.guider is further.guide is None
    assert not torch.equal(further.fusion.type_embeddings, pipe.fusion.type_embeddings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_dropout": 0.3}, "with --fuse_encoders"),
        ({"fuse_encoders": True, "encoder_dropout": 1.5}, "probability"),
        (
            {"fuse_encoders": True, "rank": 2, "pretrained_pipeline": "somewhere", "conditioner": None, "vae": None},
            "leave --fuse_encoders out",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(settings, tmp_path, changes, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        scripts.call_script("train_dino.py", **{**settings, **changes, "output_dir": tmp_path})


def test_one_encoder_has_nothing_to_fuse(settings, tmp_path):
    tiny.tiny_conditioner().save_pretrained(tmp_path / "one")
    changes = {"conditioner": tmp_path / "one", "fuse_encoders": True, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="has one"):
        scripts.call_script("train_dino.py", **{**settings, **changes})
