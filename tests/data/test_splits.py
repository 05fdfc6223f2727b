from collections import Counter, defaultdict

import numpy as np
import pytest

from diffusers_dino.data.splits import SplitRule, assign_splits, link_patients

NO_LINKS = np.empty((0, 2), np.int64)


def cohort(count: int = 3000, seed: int = 0) -> list[str]:
    """The patient of each image: some have one, some have many."""
    return [f"{number:016x}" for number in np.random.default_rng(seed).integers(0, count // 3, count)]


def split_of(patients: list[str], links: np.ndarray = NO_LINKS, official=None, rule: SplitRule | None = None):
    official = official or [None] * len(patients)
    return assign_splits(patients, official, link_patients(patients, links), rule or SplitRule(0.1, 0.2))


def test_no_patient_straddles_in_any_order():
    patients = cohort()
    splits = dict(zip(range(len(patients)), split_of(patients), strict=True))
    seen = defaultdict(set)
    for number, patient in enumerate(patients):
        seen[patient].add(splits[number])
    assert all(len(found) == 1 for found in seen.values())
    order = np.random.default_rng(1).permutation(len(patients))
    shuffled = split_of([patients[i] for i in order])
    assert [splits[i] for i in order] == shuffled


def test_fractions_are_honoured():
    patients = [f"{number:016x}" for number in range(20_000)]
    share = Counter(split_of(patients))
    # Three standard deviations of a fair draw.
    assert abs(share["validation"] / 20_000 - 0.1) < 0.0064
    assert abs(share["test"] / 20_000 - 0.2) < 0.0085
    assert set(split_of(patients[:50], rule=SplitRule(0, 0))) == {"train"}


def test_a_patient_keeps_the_split_when_others_come():
    patients = cohort()
    alone = split_of(patients[:1000])
    assert split_of(patients)[:1000] == alone
    other_seed = split_of(patients[:1000], rule=SplitRule(0.1, 0.2, seed=1))
    assert other_seed != alone


def test_patients_who_share_a_picture_stay_together():
    patients = [f"{number:016x}" for number in range(400)]
    links = np.array([[i, i + 1] for i in range(0, 90, 3)] + [[i, i + 2] for i in range(0, 90, 3)])
    groups = link_patients(patients, links)
    assert len(set(groups.tolist())) == 400 - 60
    apart, together = split_of(patients), split_of(patients, links)
    assert all(len(set(together[i : i + 3])) == 1 for i in range(0, 90, 3))
    assert any(len(set(apart[i : i + 3])) > 1 for i in range(0, 90, 3))
    assert together[90:] == apart[90:]
    # A link never makes training data of what was kept aside.
    assert all(b != "train" for a, b in zip(apart, together, strict=True) if a != "train")


def test_official_splits_are_kept_if_asked():
    patients = [f"{number:016x}" for number in range(300)]
    official = ["train"] * 100 + ["test"] * 100 + [None] * 100
    drawn = split_of(patients)
    kept = split_of(patients, official=official, rule=SplitRule(0.1, 0.2, official=True))
    assert kept[:200] == official[:200]
    assert kept[200:] == drawn[200:]
    assert split_of(patients, official=official) == drawn


def test_the_test_split_wins_where_a_patient_has_two():
    official = ["train", "test", "validation", "train"]
    rule = SplitRule(0, 0, official=True)
    assert split_of(["a", "a", "b", "b"], official=official, rule=rule) == ["test", "test", "validation", "validation"]
    assert split_of(list("abcd"), np.array([[0, 3], [2, 3]]), official, rule)[0] == "validation"


def test_no_images_have_no_splits():
    assert split_of([]) == []


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (0, -0.1), (0.5, 0.5), (0, 1)])
def test_bad_fractions(validation, test):
    with pytest.raises(ValueError, match="leave some for training"):
        SplitRule(validation, test)
