"""Re-identification: variations of known patients are found, unseen people are not, and what it lacks is said."""

import pytest
import torch

import tiny
from diffusers_dino.evaluation import ReidentificationResult, evaluate_reidentification
from diffusers_dino.evaluation.reidentification.protocol import _figures, _Pairs

OPTIONS = {"num_folds": 2, "max_steps": 40, "bootstrap_repeats": 50, "progress": False}
PEOPLE = 36


def films(people: torch.Tensor, seed: int) -> torch.Tensor:
    """Another film of each person: their picture with other noise."""
    noise = torch.randn(people.shape, generator=torch.Generator().manual_seed(seed))
    return (people + 0.05 * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def people() -> torch.Tensor:
    return tiny.random_images(PEOPLE + 24, channels=1, size=64, seed=5)


@pytest.fixture(scope="module")
def sets(people) -> dict:
    """Two films of each of 36 training patients, and one of each of 12 others."""
    known, unseen = people[:PEOPLE], people[PEOPLE : PEOPLE + 12]
    return {
        "training": torch.cat([films(known, 1), films(known, 2)]),
        "training_patients": [f"p{i}" for i in range(PEOPLE)] * 2,
        "held_out": films(unseen, 3),
        "held_out_patients": [f"q{i}" for i in range(12)],
    }


@pytest.fixture(scope="module")
def found(sets, people) -> ReidentificationResult:
    sources = {str(i): str(i) for i in range(PEOPLE)}
    return evaluate_reidentification(synthetic=films(people[:PEOPLE], 4), sources=sources, **sets, **OPTIONS)


def test_variations_that_show_their_patients_are_found(found, tmp_path):
    assert found.knows_patients
    assert found.reidentifies
    assert found.synthetic.auroc > 0.9
    assert found.others.auroc > 0.9  # other films of these patients
    assert (found.synthetic.num_pairs, found.synthetic.num_patients, found.num_known) == (PEOPLE, PEOPLE, PEOPLE)
    assert not found.stands_in


def test_it_depends_on_its_arguments_only(found, sets, people):
    sources = {str(i): str(i) for i in range(PEOPLE)}
    assert found == evaluate_reidentification(synthetic=films(people[:PEOPLE], 4), sources=sources, **sets, **OPTIONS)


def test_networks_of_different_seeds_and_folds_have_nothing_in_common(sets, people):
    """After one update the weights are nearly those at the start, and so are the scores of equal starts."""
    options = {**OPTIONS, "sources": {str(i): str(i) for i in range(PEOPLE)}, "max_steps": 1, "num_pairs": PEOPLE}
    made = films(people[:PEOPLE], 4)
    results = [evaluate_reidentification(synthetic=made, seed=seed, **sets, **options) for seed in (0, 1)]
    first, second = ({pair.key: pair.score for pair in result.closest} for result in results)
    assert min(abs(first[key] - second[key]) for key in first) > 1e-3


def test_what_is_found_has_a_higher_score_than_99_percent_of_the_strangers():
    pairs = _Pairs()
    pairs.near = [(147.6, "a"), (148.5, "b")]  # above 148 and above 149 of 150
    pairs.strangers = [(float(score), f"p{score}") for score in range(150)]
    assert _figures("pairs", [pairs], repeats=10, seed=0).found == 0.5


def test_other_people_are_not_taken_for_their_sources(sets, people):
    strangers = people[-12:]
    sources = {str(i): str(i) for i in range(12)}
    result = evaluate_reidentification(synthetic=films(strangers, 4), sources=sources, **sets, **OPTIONS)
    assert not result.reidentifies
    assert result.synthetic.found < 0.2


def test_the_nearest_training_image_stands_in_for_a_source(sets, people):
    honest = evaluate_reidentification(synthetic=films(people[-12:], 4), **sets, **OPTIONS)
    copied = evaluate_reidentification(synthetic=sets["training"][:24] * 0.98 + 0.01, **sets, **OPTIONS)
    assert honest.stands_in
    assert copied.reidentifies
    assert not honest.reidentifies
    assert copied.synthetic.auroc > honest.synthetic.auroc


def test_what_it_lacks_is_said(sets, people):
    made = films(people[:4], 4)
    few = {**sets, "training_patients": [f"p{i}" for i in range(2 * PEOPLE)]}
    with pytest.raises(ValueError, match=r"two images or more: there are 0, and it takes 30\. Give more images"):
        evaluate_reidentification(synthetic=made, **few, **OPTIONS)
    twice = {**sets, "training": sets["training"][:PEOPLE].repeat(2, 1, 1, 1)}  # each film is stored twice
    with pytest.raises(ValueError, match="two images or more: there are 0"):
        evaluate_reidentification(synthetic=made, **twice, **OPTIONS)
    with pytest.raises(ValueError, match="one patient an image"):
        evaluate_reidentification(synthetic=made, **{**sets, "held_out_patients": ["q"]}, **OPTIONS)
    with pytest.raises(ValueError, match="None of 4 generated images has its source"):
        evaluate_reidentification(synthetic=made, sources={"0": "nobody"}, **sets, **OPTIONS)
    with pytest.raises(ValueError, match="one set is empty"):
        evaluate_reidentification(synthetic=made[:0], **sets, **OPTIONS)
