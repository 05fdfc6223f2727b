import logging

import numpy as np
import pytest

from diffusers_dino.metrics.auroc import SingleClassError, check_classes, label_auroc, macro_auroc

NAMES = ("Edema", "Effusion", "No Finding")


@pytest.fixture
def predictions():
    """Scores with ties `(60, 3)`, and targets."""
    random = np.random.default_rng(0)
    return random.integers(0, 10, (60, 3)) / 10, random.random((60, 3)) < 0.3


def test_auroc_is_that_of_scikit_learn(predictions):
    from sklearn.metrics import roc_auc_score

    scores, targets = predictions
    expected = [roc_auc_score(targets[:, i], scores[:, i]) for i in range(3)]
    assert label_auroc(scores, targets) == pytest.approx(expected, abs=1e-12)
    assert macro_auroc(scores, targets) == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_label_with_a_single_class_is_named_counted_and_left_out(predictions, caplog):
    scores, targets = predictions
    targets[:, 1] = False
    with caplog.at_level(logging.WARNING):
        assert check_classes(targets, NAMES, "fold 3") == ("Effusion",)
    assert "1 of 3 labels have a single class among the 60 images of fold 3" in caplog.text
    assert "Effusion" in caplog.text
    per_label = label_auroc(scores, targets)
    assert np.isnan(per_label).tolist() == [False, True, False]
    assert macro_auroc(scores, targets) == pytest.approx((per_label[0] + per_label[2]) / 2)


def test_nothing_to_score_is_an_error(predictions):
    scores, targets = predictions
    targets[:] = [True, False, True]
    with pytest.raises(SingleClassError, match=r"No label of Edema, Effusion, No Finding has both .* 60 of fold 0"):
        check_classes(targets, NAMES, "fold 0")
    assert np.isnan(macro_auroc(scores, targets))
    with pytest.raises(ValueError, match=r"targets \(N, 3\)"):
        check_classes(targets[:, :2], NAMES, "fold 0")


def test_labels_with_both_classes_are_not_warned_of(predictions, caplog):
    assert check_classes(predictions[1], NAMES, "fold 0") == ()
    assert not caplog.text
