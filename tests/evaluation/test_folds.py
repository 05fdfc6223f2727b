import numpy as np
import pytest

from diffusers_dino.evaluation.folds import assign_folds

SHARES = np.array([0.5, 0.3, 0.1, 0.02])  # of the labels


def cohort(count: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((count, len(SHARES))) < SHARES, rng.integers(0, count // 2, count)


def test_patients_stay_whole_and_labels_are_shared_out_evenly():
    targets, patients = cohort()
    folds = assign_folds(targets, patients, 5, seed=3)
    for patient in set(patients):
        assert len(set(folds[patients == patient])) == 1
    assert np.ptp(np.bincount(folds, minlength=5)) <= 4
    counts = np.array([targets[folds == fold].sum(0) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= 4).all()
    drawn = np.random.default_rng(0).integers(0, 5, patients.max() + 1)[patients]  # what a plain draw would do
    plain = np.array([targets[drawn == fold].sum(0) for fold in range(5)])
    assert np.ptp(counts, axis=0).sum() < np.ptp(plain, axis=0).sum() / 4


def test_folds_follow_only_from_seed_and_contents():
    targets, patients = cohort()
    folds = assign_folds(targets, patients, 5)
    order = np.random.default_rng(1).permutation(len(patients))
    assert (assign_folds(targets[order], patients[order], 5) == folds[order]).all()
    assert (assign_folds(targets[:, ::-1], patients, 5) == folds).all()
    assert (assign_folds(targets, patients, 5, seed=1) != folds).any()


def test_images_without_labels_are_shared_out_too():
    folds = assign_folds(np.zeros((30, 0), bool), list(range(30)), 3)
    assert np.bincount(folds).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("targets", "groups", "num_folds", "message"),
    [
        (np.zeros((3, 1), bool), ["a", "a", "b"], 3, "2 patients cannot be shared out to 3 folds"),
        (np.zeros((3, 1), bool), ["a", "b"], 2, "targets"),
        (np.zeros((2, 1), bool), ["a", "b"], 1, "two folds or more"),
    ],
)
def test_what_cannot_be_folded_is_refused(targets, groups, num_folds, message):
    with pytest.raises(ValueError, match=message):
        assign_folds(targets, groups, num_folds)
