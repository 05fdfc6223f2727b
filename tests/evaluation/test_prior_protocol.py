"""A prior's tokens against real ones: figures of known cases."""

import pytest
import torch

import priors
import tiny
from diffusers_dino.evaluation import PriorResult, evaluate_prior
from diffusers_dino.evaluation.prior.protocol import two_sample_accuracy


@pytest.fixture(scope="module")
def tokens():
    every = priors.tiny_tokens(400)
    return every[:320], every[320:]


def gaussian_prior(tokens):
    """An untrained prior is the Gaussian of the tokens that it was fitted to."""
    pipe = priors.tiny_prior_pipeline(trained=False, num_components=150)
    pipe.prior.fit_tokens(tokens)
    return pipe


def test_a_right_prior_is_told_from_real_tokens_no_better_than_training_tokens_are(tokens, tmp_path):
    result = evaluate_prior(gaussian_prior(tokens[0]), *tokens, num_sets=2, num_inference_steps=20)
    prior, training = result.row("prior"), result.row("training")
    assert prior.frechet < 1.3 * training.frechet
    assert abs(prior.two_sample - 0.5) < 0.15
    assert abs(training.two_sample - 0.5) < 0.15
    assert prior.num_tokens == 160
    assert prior.copies <= 0.03
    assert result.row("held out").frechet is None
    result.save(tmp_path / "prior.json")
    assert PriorResult.load(tmp_path / "prior.json") == result


def test_copies_of_training_tokens_are_found(tokens):
    pipe = gaussian_prior(tokens[0])
    training = pipe.prior.standardise(tokens[0])

    class Copying:
        """Draws training tokens with a little noise on them."""

        prior = pipe.prior

        def __call__(self, condition, generator, **options):
            noise = 0.05 * tiny.gaussian(len(generator), *priors.SHAPE, dtype=torch.float32)
            return type("Output", (), {"image_embeds": pipe.prior.restore(training[: len(generator)] + noise)})

    result = evaluate_prior(Copying(), *tokens, num_sets=1)
    assert result.row("prior").copies > 0.9
    assert result.row("prior").copies_low > 0.9
    assert result.row("gaussian").copies <= 0.03


def test_two_samples_of_one_kind_and_of_two():
    one, same, other = (tiny.gaussian(200, 4, seed=seed) for seed in range(3))
    assert abs(two_sample_accuracy(one, same) - 0.5) < 0.1
    assert two_sample_accuracy(one, other + 10) == 1.0


def test_too_few_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="twice as many"):
        evaluate_prior(gaussian_prior(tokens[0]), tokens[0][:20], tokens[1])
