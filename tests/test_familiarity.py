"""Whether an image is like those that a model knows: statistics of tokens, and what carries them."""

import pytest
import torch
from PIL import Image

import scripts
import tiny
from diffusers_dino import DinoDiffusionPipeline, DinoImageConditioner
from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.familiarity import MIN_IMAGES, UNLIKE, TokenStatistics
from diffusers_dino.hub import TrainingRecord
from diffusers_dino.hub.cards import dataset_card, folder_card
from diffusers_dino.hub.folder import model_files
from diffusers_dino.metrics.auroc import label_auroc
from diffusers_dino.seeds import generator_for
from diffusers_dino.synthesis import SynthesisSettings, plan_reconstruction, synthesise

MODEL = scripts.EXAMPLES / "data/tiny-diffusion"
PHANTOMS = scripts.EXAMPLES / "data/phantom-cxr/phantom-cxr-test-*.tar"
LAYOUT = {"settings": "", "statistics": []}


def fitted(count=200, width=12, **options):
    return TokenStatistics.of(tiny.gaussian(count, width), LAYOUT, **options)


@pytest.fixture(scope="module")
def conditioner():
    made = tiny.tiny_conditioner()
    made.fit_familiarity(made.encode(batch) for batch in tiny.random_images(100).split(16))
    return made


def test_images_like_those_of_the_training_have_each_familiarity_equally_often():
    found = fitted(2000).familiarity(tiny.gaussian(4000, 12, seed=1))
    for share in (0.01, 0.1, 0.5, 0.9):
        assert (found < share).double().mean().item() == pytest.approx(share, abs=0.03)


def test_what_is_farther_is_less_familiar_also_beyond_all_that_is_known():
    away = torch.linspace(0, 50, 200, dtype=torch.float64)[:, None] * torch.ones(12, dtype=torch.float64)
    found = fitted().familiarity(away)
    assert ((found > 0) & (found < 1)).all()
    assert (found.diff() <= 0).all()
    far = found < UNLIKE
    assert far.sum() > 100
    assert (found[far].diff() < 0).all()


def test_groups_stay_on_one_side():
    base = tiny.gaussian(50, 40).repeat_interleave(4, 0)  # four copies of each image
    apart = TokenStatistics.of(base, LAYOUT, [number // 4 for number in range(200)])
    mixed = TokenStatistics.of(base, LAYOUT)
    assert apart.distances.mean() > 1.05 * mixed.distances.mean()  # copies of what was fitted seem near


def test_channels_that_never_vary_do_no_harm():
    features = torch.cat([tiny.gaussian(100, 3), torch.ones(100, 5, dtype=torch.float64)], 1)
    found = TokenStatistics.of(features, LAYOUT)
    assert found.familiarity(features).isfinite().all()
    assert found.familiarity(features[:1] + torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])).item() < UNLIKE


@pytest.mark.parametrize("count", [0, MIN_IMAGES - 1])
def test_few_images_are_refused(count):
    with pytest.raises(ValueError, match=f"at least {MIN_IMAGES} images"):
        fitted(count)


def test_bad_tokens_and_groups_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        TokenStatistics.of(torch.full((100, 3), torch.nan), LAYOUT)
    with pytest.raises(ValueError, match="one group an image"):
        fitted(groups=[0, 1])
    held_out = torch.randperm(5, generator=generator_for("familiarity"))[0]  # one of five patients
    groups = [patient for patient in range(5) for _ in range(1 if patient == held_out else 20)]
    with pytest.raises(ValueError, match="calibrated by one image"):
        TokenStatistics.of(tiny.gaussian(81, 3), LAYOUT, groups)


@pytest.mark.parametrize("tokens", ["global", "cls", "patch", "all"])
def test_each_choice_of_tokens_is_measured(tokens):
    made = tiny.tiny_conditioner(tokens=tokens)
    images = tiny.random_images(100)
    made.fit_familiarity(made.encode(batch) for batch in images.split(32))
    found = made.familiarity([*images[:3], torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))])
    assert found.shape == (4,)
    assert found[3] < found[:3].min()


def test_statistics_are_saved_with_the_pipeline_and_other_tokens_have_none(conditioner, tmp_path):
    pipe = tiny.tiny_pipeline(conditioner=conditioner)
    pipe.save_pretrained(tmp_path)
    loaded = DinoDiffusionPipeline.from_pretrained(tmp_path).conditioner
    image = tiny.random_images(2, seed=1)
    torch.testing.assert_close(loaded.familiarity(image), conditioner.familiarity(image), rtol=1e-3, atol=0)
    assert loaded.with_tokens("cls").token_statistics is None
    loaded.fit_normalization([tiny.random_images(20)])
    assert loaded.token_statistics is None


def test_a_model_without_statistics_loads_and_says_so(tmp_path):
    tiny.tiny_conditioner().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("familiarity*"))
    with pytest.raises(ValueError, match="no statistics of its training images"):
        DinoImageConditioner.from_pretrained(tmp_path).familiarity(tiny.random_images(1))


def test_statistics_of_other_tokens_and_damaged_ones_are_refused(conditioner, tmp_path):
    tiny.tiny_conditioner(tokens="cls").save_pretrained(tmp_path)
    conditioner.token_statistics.save(tmp_path)
    with pytest.raises(ValueError, match="other tokens"):
        DinoImageConditioner.from_pretrained(tmp_path)
    (tmp_path / "familiarity.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged"):
        DinoImageConditioner.from_pretrained(tmp_path)


def test_the_bundled_model_tells_its_phantoms_from_noise_and_blank_images():
    conditioner = DinoImageConditioner.from_pretrained(MODEL, subfolder="conditioner")
    images = open_images(PHANTOMS, Preprocessing(128, remove_borders=False))
    phantoms = conditioner.familiarity([images[number]["image"] for number in range(0, len(images), 2)])
    noise = torch.rand(20, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    blank = torch.linspace(0, 1, 20)[:, None, None, None].expand(-1, 1, 128, 128)
    for other in (noise, blank):
        unlike = conditioner.familiarity(other)
        scores = torch.cat([phantoms, unlike])
        is_phantom = torch.arange(len(scores)) < len(phantoms)
        assert label_auroc(scores[:, None].numpy(), is_phantom[:, None].numpy()) > 0.99
    assert (phantoms < UNLIKE).double().mean() < 0.1


def test_cards_and_synthetic_sets_tell_of_it(conditioner, tmp_path):
    pipe = tiny.tiny_pipeline(conditioner=conditioner)
    pipe.save_pretrained(tmp_path / "model")
    assert "conditioner/familiarity.safetensors" in model_files(tmp_path / "model")
    assert "familiarity.safetensors" in model_files(tmp_path / "model/conditioner")
    assert "conditioner.familiarity(image)" in str(folder_card(tmp_path / "model", "org/model", TrainingRecord({})))

    folder = scripts.image_folder(tmp_path / "images", 3, size=40)
    noise = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    Image.fromarray((noise * 255).byte().numpy()).save(folder / "003.png")
    images = open_images(folder, Preprocessing(tiny.IMAGE_SIZE))
    plan = plan_reconstruction(images.keys, ratio=1, settings=SynthesisSettings(num_inference_steps=1, threads=1))
    made = synthesise(plan, pipe, images, tmp_path / "set", progress=False)
    unlike = int((conditioner.familiarity([sample["image"] for sample in images]) < UNLIKE).sum())
    assert unlike > 0
    told = made.manifest["lineage"]["sources"]
    assert (told["unlike"], told["count"], told["familiarity_below"]) == (unlike, 4, UNLIKE)
    assert f"{unlike} (familiarity below {UNLIKE})" in str(dataset_card(made))
