"""The prior's conditions, its arithmetic, and how it knows its conditioner."""

import math

import pytest
import torch

import priors
import tiny
from diffusers_dino import DinoPrior
from diffusers_dino.prior import PriorConditions, describe_conditioner, require_conditioner
from diffusers_dino.prior.conditions import as_sets
from diffusers_dino.prior.flow import add_noise, draw_for_prior, gaussian_velocity
from diffusers_dino.prior.table import Columns, read_facts

WORDS = PriorConditions(
    priors.LABELS, ("No Finding",), {"age": (50, 20)}, {"view": ("AP", "PA")}
)  # as `tiny_prior` knows them


def test_what_is_not_named_is_unknown_and_not_absent():
    condition = WORDS.encode(["Edema"], ["Nodule"], {"age": 70, "view": "PA"})
    assert condition.labels.tolist() == [[0, 1, -1]]
    assert condition.numbers.tolist() == [[1]]
    assert condition.categories.tolist() == [[2]]
    nothing = WORDS.encode(metadata={"age": None, "view": None})
    assert nothing.labels.eq(0).all()
    assert nothing.numbers.isnan().all()
    assert nothing.categories.eq(0).all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"present": ["Edma"]}, "nearest one is 'Edema'"),
        ({"present": ["edema"]}, "nearest one is 'Edema'"),
        ({"absent": ["Nodul"]}, "nearest one is 'Nodule'"),
        ({"present": ["Edema"], "absent": ["Edema"]}, "present and absent at once"),
        ({"present": ["No Finding", "Edema"]}, "contradicts 'Edema'"),
        ({"metadata": {"age": "old"}}, "must be a finite number"),
        ({"metadata": {"age": math.nan}}, "must be a finite number"),
        ({"metadata": {"view": "LL"}}, "value of 'view'"),
        ({"metadata": {"sex": "F"}}, "'sex' is not a metadata"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        WORDS.encode(**asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"labels": ("a", "a")}, "name of its own"),
        ({"labels": ("a",), "exclusive": ("b",)}, "'b' is not"),
        ({"numbers": {"age": (1, 0)}}, "positive standard deviation"),
        ({"categories": {"view": ()}}, "different values"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        PriorConditions(**words)


def test_labels_as_users_give_them():
    assert as_sets(None) is None
    assert as_sets("a") == as_sets(["a"]) == as_sets((("a",),)) == [["a"]]
    assert as_sets(["a", "b"]) == [["a", "b"]]
    assert as_sets([["a"], None]) == [["a"], None]
    for empty in ([], [[]], [["a"], ()]):
        with pytest.raises(ValueError, match="does not say whether"):
            as_sets(empty)
    for odd in ([1], [["a"], "b"], [[1]]):
        with pytest.raises(TypeError, match="names"):
            as_sets(odd)


def test_noise_and_velocity_lead_from_noise_to_the_token():
    tokens, noise = tiny.gaussian(3, 2, 4), tiny.gaussian(3, 2, 4, seed=1)
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy = add_noise(tokens, noise, times)
    assert torch.equal(noisy[0], tokens[0])
    assert torch.equal(noisy[2], noise[2])
    assert torch.allclose(noisy - times.view(-1, 1, 1) * (noise - tokens), tokens)


def test_gaussian_velocity_is_the_regression_of_the_velocity_on_the_noisy_token():
    variances = torch.tensor([4.0, 0.25, 0.5, 0.5], dtype=torch.float64)
    tokens = tiny.gaussian(200_000, 4) * variances.sqrt()
    noise, time = tiny.gaussian(200_000, 4, seed=1), 0.4
    noisy = 0.6 * tokens + time * noise
    predicted = gaussian_velocity(
        noisy, torch.full((len(noisy),), time), torch.eye(4)[:2].double(), variances[:2], variances[2]
    )
    slope = (noisy * (noise - tokens)).mean(0) / noisy.square().mean(0)
    assert torch.allclose(predicted, noisy * slope, atol=0.05)


def test_draws_depend_only_on_the_position():
    together = draw_for_prior([5, 6, 7], (2, 3), num_labels=4, seed=1)
    alone = draw_for_prior([6], (2, 3), num_labels=4, seed=1)
    assert all(torch.equal(many[1:2], one) for many, one in zip(together, alone, strict=True))
    for kind in ("uniform", "logit-normal"):
        times = draw_for_prior(range(500), (1, 1), times=kind).times
        assert 0 < times.min() < 0.1
        assert abs(times.mean() - 0.5) < 0.05
    with pytest.raises(ValueError, match="'cosine'"):
        draw_for_prior([0], (1, 1), times="cosine")


def test_an_untrained_prior_is_the_gaussian_of_the_tokens():
    pipe = priors.tiny_prior_pipeline(trained=False, num_components=63)
    options = {"num_inference_steps": 30, "generator": tiny.generators(0)[0]}
    drawn = pipe(num_images_per_prompt=2000, **options).image_embeds.flatten(1)
    tokens = priors.tiny_tokens().flatten(1)
    assert torch.allclose(drawn.mean(0), tokens.mean(0), atol=0.25)
    assert torch.allclose(drawn.T.cov().diagonal(), tokens.T.cov().diagonal(), rtol=0.25)
    directions = torch.linalg.svd(tokens - tokens.mean(0))[2][:20]
    spread = ((drawn - tokens.mean(0)) @ directions.T).std(0) / ((tokens - tokens.mean(0)) @ directions.T).std(0)
    assert torch.allclose(spread, torch.ones(20), atol=0.1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(20, 4, 32), "Expected tokens"),
        (torch.zeros(15, 5, 32), "at least 16"),
        (torch.full((20, 5, 32), math.nan), "20 of 20"),
    ],
)
def test_tokens_that_cannot_be_fitted_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        priors.tiny_prior().fit_tokens(tokens)


def test_tokens_that_do_not_vary_leave_a_finite_prior():
    prior = priors.tiny_prior()
    prior.fit_tokens(torch.ones(16, 5, 32))
    assert all(torch.isfinite(buffer).all() for buffer in prior.buffers())


@pytest.mark.parametrize(
    ("config", "message"),
    [({"width": 15}, "multiple"), ({"num_layers": 0}, "num_layers"), ({"num_components": 500}, "num_components")],
)
def test_a_prior_that_cannot_be_built_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        priors.tiny_prior(**config)


def test_every_condition_changes_the_prediction_and_statistics_stay_exact(tmp_path):
    prior = priors.tiny_prior(text_dim=8)
    noisy, times = priors.tiny_tokens(1), torch.tensor([500.0])
    asked = [WORDS.encode(**each) for each in ({}, {"present": ["Edema"]}, {"absent": ["Edema"]})]
    asked += [WORDS.encode(metadata=each) for each in ({"age": 80}, {"view": "PA"}, {"view": "AP"})]
    no_text = {"text": torch.zeros(1, 3, 8), "text_mask": torch.zeros(1, 3, dtype=torch.bool)}
    conditions = [each._replace(**no_text) for each in asked]
    conditions.append(asked[0]._replace(text=torch.ones(1, 3, 8), text_mask=torch.tensor([[True, True, False]])))
    predictions = torch.cat([prior(noisy, times, condition) for condition in conditions])
    assert torch.isfinite(predictions).all()
    assert torch.cdist(predictions.flatten(1), predictions.flatten(1)).fill_diagonal_(1).min() > 1e-4
    dropped = conditions[-1].drop(torch.tensor([True]))
    assert torch.equal(prior(noisy, times, dropped), predictions[:1])
    prior.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = DinoPrior.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.slots.dtype == torch.bfloat16
    for name in DinoPrior.exact_buffers:
        assert torch.equal(getattr(loaded, name), getattr(priors.tiny_prior(text_dim=8), name))


def test_a_prior_knows_its_conditioner():
    conditioner = tiny.tiny_conditioner()
    known = describe_conditioner(conditioner)
    require_conditioner(known, tiny.tiny_conditioner(source="elsewhere"))
    require_conditioner(None, conditioner)
    for dtype in (torch.bfloat16, torch.float16):
        require_conditioner(known, tiny.tiny_conditioner().to(dtype))
    conditioner.null_tokens.fill_(1)  # says nothing of an image's tokens
    require_conditioner(known, conditioner)


def other_weights() -> object:
    conditioner = tiny.tiny_conditioner()
    with torch.no_grad():
        for parameter in conditioner.image_encoders.parameters():
            parameter.mul_(1.5)
    return conditioner


def normalised() -> object:
    conditioner = tiny.tiny_conditioner()
    conditioner.fit_normalization([tiny.random_images(16)])
    return conditioner


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_weights, "weights"),
        (lambda: other_weights().to(torch.bfloat16), "weights"),
        (normalised, "normalisation"),
        (lambda: tiny.tiny_conditioner(tokens="cls"), "tokens was global, is cls"),
        (lambda: tiny.tiny_conditioner(mean=(0.4, 0.5, 0.5)), "preprocessing"),
    ],
)
def test_a_prior_refuses_another_conditioner_and_says_what_differs(make, message):
    known = describe_conditioner(tiny.tiny_conditioner())
    with pytest.raises(ValueError, match=message):
        require_conditioner(known, make())


def test_patients_of_a_table_that_are_spelt_in_two_ways_are_one(tmp_path):
    (tmp_path / "t.csv").write_text("file,patient\na,1\nb,1.0\nc,\n")
    facts = read_facts(tmp_path / "t.csv", ["a", "b", "c"], Columns("file", None, "patient"))
    assert [one.patient for one in facts] == ["1", "1", None]
