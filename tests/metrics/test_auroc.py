"""AUROC and comparison of classifiers: independent implementations, and a null hypothesis that is true."""

import logging
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffusers_dino.metrics.auroc import (
    auroc_draws,
    check_classes,
    corrected_t_test,
    draw_weights,
    holm,
    label_auroc,
    macro_auroc,
    stratified_auroc,
)

NAMES = ("Edema", "Effusion", "No Finding")


def coarse_predictions(n: int = 80, labels: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and targets that they say something about."""
    random = np.random.default_rng(seed)
    targets = random.random((n, labels)) < 0.3
    return np.round(random.normal(size=(n, labels)) + targets, 1), targets


def delong_difference(first: np.ndarray, second: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Difference of two AUROCs on the same images and its standard error (DeLong et al. 1988), pair by pair."""
    fields = []
    for scores in (first, second):
        gap = scores[targets][:, None] - scores[~targets][None]
        wins = (gap > 0) + 0.5 * (gap == 0)
        fields.append((wins.mean(axis=1), wins.mean(axis=0)))
    over_positive, over_negative = (fields[0][i] - fields[1][i] for i in (0, 1))
    variance = over_positive.var(ddof=1) / len(over_positive) + over_negative.var(ddof=1) / len(over_negative)
    return over_positive.mean(), variance**0.5


def test_auroc_is_that_of_sklearn_for_each_draw(monkeypatch):
    scores, targets = coarse_predictions()
    weights = np.random.default_rng(1).integers(0, 4, (5, len(scores)))
    figures = auroc_draws(scores, targets, weights)
    monkeypatch.setattr("diffusers_dino.metrics.auroc._CHUNK", 2 * len(scores))  # in pieces
    np.testing.assert_array_equal(auroc_draws(scores, targets, weights), figures)
    for draw, label in np.ndindex(*figures.shape):
        expected = roc_auc_score(targets[:, label], scores[:, label], sample_weight=weights[draw])
        assert figures[draw, label] == pytest.approx(expected, abs=1e-12)
    plain = [roc_auc_score(targets[:, i], scores[:, i]) for i in range(2)]
    assert label_auroc(scores, targets) == pytest.approx(plain, abs=1e-12)
    assert macro_auroc(scores, targets) == pytest.approx(np.mean(plain), abs=1e-12)


def test_closed_cases_of_auroc():
    targets = np.array([[True], [True], [False], [False]])
    for scores, expected in (([3, 2, 1, 0], 1.0), ([0, 1, 2, 3], 0.0), ([5, 5, 5, 5], 0.5), ([3, 0, 1, 2], 0.5)):
        assert auroc_draws(np.array(scores, float)[:, None], targets).item() == expected
    one_class = np.array([[1, 1, 0, 0], [1, 0, 1, 1]])
    np.testing.assert_array_equal(auroc_draws(np.zeros((4, 1)), targets, one_class), [[np.nan], [0.5]])


def test_bootstrap_of_a_paired_difference_agrees_with_delong():
    random = np.random.default_rng(3)
    targets = random.random(400) < 0.4
    shared = random.normal(size=400) + targets
    first, second = (shared + random.normal(size=400) * noise for noise in (0.5, 1.0))
    weights = draw_weights(np.arange(400), np.zeros(400, int), repeats=2000)
    draws = [auroc_draws(scores[:, None], targets[:, None], weights)[:, 0] for scores in (first, second)]
    difference, error = delong_difference(first, second, targets)
    assert (draws[0] - draws[1]).mean() == pytest.approx(difference, abs=0.002)
    assert (draws[0] - draws[1]).std() == pytest.approx(error, rel=0.08)


def test_stratified_auroc_compares_only_within_strata():
    random = np.random.default_rng(0)
    strata, targets = np.repeat([0, 1, 2], 30), random.random((90, 2)) < 0.4
    scores = random.normal(size=(90, 2)) + targets
    figures = stratified_auroc(scores, targets, strata)[0]
    for label in range(2):
        wins = pairs = 0
        for stratum in range(3):
            t, s = targets[strata == stratum, label], scores[strata == stratum, label]
            number = t.sum() * (~t).sum()
            wins, pairs = wins + number * roc_auc_score(t, s), pairs + number
        assert figures[label] == pytest.approx(wins / pairs)
    shifted = scores + 100 * strata[:, None]  # scales of judges do not matter
    np.testing.assert_allclose(stratified_auroc(shifted, targets, strata)[0], figures)
    weights = random.integers(0, 3, (4, 90))
    rows = np.repeat(np.arange(90), weights[2])
    expected = stratified_auroc(scores[rows], targets[rows], strata[rows])[0]
    np.testing.assert_allclose(stratified_auroc(scores, targets, strata, weights)[2], expected)
    targets[strata == 0] = True  # a stratum of one class does not count
    np.testing.assert_allclose(
        stratified_auroc(scores, targets, strata), stratified_auroc(scores[30:], targets[30:], strata[30:])
    )
    assert np.isnan(stratified_auroc(scores, np.ones_like(targets), strata)).all()


def test_patients_are_drawn_whole_and_folds_keep_their_size():
    folds = np.repeat([0, 1, 2], 12)
    patients = [f"{fold}-{i // 2}" for i, fold in enumerate(folds)]  # two images of each
    weights = draw_weights(patients, folds, repeats=50, seed=4)
    np.testing.assert_array_equal(weights[:, 0::2], weights[:, 1::2])
    for fold in range(3):
        assert (weights[:, folds == fold].sum(axis=1) == 12).all()
    assert len(np.unique(weights, axis=0)) == 50
    some = folds > 0  # the draws of a fold do not depend on the others
    np.testing.assert_array_equal(draw_weights(np.array(patients)[some], folds[some], 50, 4), weights[:, some])


def test_the_corrected_test_is_the_published_one_and_without_correction_the_paired_t_test():
    random = np.random.default_rng(5)
    values = random.normal(0.3, 1, 7)
    plain = stats.ttest_1samp(values, 0)
    test = corrected_t_test(values, num_folds=10**12)  # test sets of no size
    low, high = plain.confidence_interval(0.95)
    assert (test.mean, test.p) == pytest.approx((values.mean(), plain.pvalue))
    assert (test.low, test.high) == pytest.approx((low, high))
    # that for five folds is the published one
    values = [0.03, 0.01, 0.02, 0.05, -0.01]
    t = np.mean(values) / (np.std(values, ddof=1) * np.sqrt(1 / 5 + 1 / 4))
    assert corrected_t_test(values, 5).p == pytest.approx(2 * (1 - stats.t.cdf(t, 4)))
    assert corrected_t_test([0.0] * 5, 5) == (0, 0, 0, 1)


def false_positives(trials: int, num_train: int) -> dict[str, float]:
    """How often two equally good classifiers are told apart, by three tests.

    Two classifiers see ten features each, equally informative; each fold trains anew on a part of its training images.
    """
    random = np.random.default_rng(6)
    n, folds, found = 150, np.arange(150) % 5, {"corrected": [], "paired t": [], "bootstrap": []}
    weights = draw_weights(np.arange(n), folds, repeats=200)
    for _ in range(trials):
        targets = random.random(n) < 0.5
        views = random.normal(size=(2, n, 10)) + 0.3 * targets[:, None]
        differences, draws = [], []
        for fold in range(5):
            train, test = random.permutation(np.flatnonzero(folds != fold))[:num_train], folds == fold
            direction = [x[train][targets[train]].mean(0) - x[train][~targets[train]].mean(0) for x in views]
            scores = np.stack([x[test] @ w for x, w in zip(views, direction, strict=True)], axis=1)
            both = np.repeat(targets[test, None], 2, axis=1)
            differences.append(-np.diff(auroc_draws(scores, both)[0]).item())
            draws.append(-np.diff(auroc_draws(scores, both, weights[:, test]), axis=1)[:, 0])
        low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
        found["corrected"].append(corrected_t_test(differences, 5).p < 0.05)
        found["paired t"].append(corrected_t_test(differences, 10**12).p < 0.05)
        found["bootstrap"].append(low > 0 or high < 0)
    return {name: float(np.mean(hits)) for name, hits in found.items()}


@pytest.mark.parametrize("num_train", [120, 40])
def test_equal_classifiers_are_told_apart_no_more_often_than_allowed(num_train):
    """Of 300 trials at 5 %, 28 findings or more have a chance below 0.2 %."""
    found = false_positives(300, num_train)
    assert 0 < found["corrected"] < 28 / 300
    assert found["corrected"] < found["paired t"]  # the correction is what keeps it there
    assert found["corrected"] < found["bootstrap"]  # which takes trained classifiers as given


def test_a_real_difference_is_found():
    random = np.random.default_rng(7)
    ps = [corrected_t_test(random.normal(0.05, 0.01, 5), 5).p for _ in range(200)]
    assert np.mean(np.array(ps) < 0.05) > 0.95


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis falls if every set of hypotheses that holds it does (Marcus et al. 1976)."""
    for ps in ([0.01, 0.04, 0.03, 0.005, 0.9], [0.5, 0.5, 0.001], [0.2]):
        sets = [s for size in range(1, len(ps) + 1) for s in combinations(range(len(ps)), size)]
        expected = [max(min(1, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(len(ps))]
        assert holm(ps) == pytest.approx(expected)
    # a test that was not made counts
    first, missing, last = holm([0.01, None, 0.02])
    assert (first, last) == pytest.approx(holm([0.01, 1.0, 0.02])[::2])
    assert missing is None
    assert holm([]) == ()


def test_bad_input_is_named():
    scores, targets = coarse_predictions()
    some_nan = np.where(np.arange(len(scores))[:, None] < 3, [np.nan, 0], scores)
    for message, function, arguments in (
        ("boolean targets of their shape", auroc_draws, (scores, targets[:, :1])),
        ("int64", auroc_draws, (scores, targets.astype(int))),
        ("3 scores are NaN", auroc_draws, (some_nan, targets)),
        (r"weights \(R, 80\)", auroc_draws, (scores, targets, np.ones((2, 79)))),
        ("two of them or more", corrected_t_test, ([0.1], 5)),
        ("finite", corrected_t_test, ([0.1, np.nan], 5)),
        ("p values", holm, ([0.1, 1.2],)),
        ("a patient and a fold", draw_weights, (["a"], [0, 1])),
        ("two", draw_weights, (["a", "a", "b", "c"], [0, 0, 1, 1])),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_a_label_with_a_single_class_is_named_counted_and_left_out(caplog):
    scores, targets = coarse_predictions(60, 3)
    assert check_classes(targets, NAMES, "fold 0") == ()
    assert not caplog.text
    targets[:, 1] = False
    with caplog.at_level(logging.WARNING):
        assert check_classes(targets, NAMES, "fold 3") == ("Effusion",)
    assert "1 of 3 labels have a single class among the 60 images of fold 3" in caplog.text
    assert "Effusion" in caplog.text
    per_label = label_auroc(scores, targets)
    assert np.isnan(per_label).tolist() == [False, True, False]
    assert macro_auroc(scores, targets) == pytest.approx((per_label[0] + per_label[2]) / 2)
    # nothing to score is an error
    targets[:] = [True, False, True]
    with pytest.raises(ValueError, match=r"No label of Edema, Effusion, No Finding has both .* 60 of fold 0"):
        check_classes(targets, NAMES, "fold 0")
    assert np.isnan(macro_auroc(scores, targets))
    with pytest.raises(ValueError, match=r"targets \(N, 3\)"):
        check_classes(targets[:, :2], NAMES, "fold 0")
