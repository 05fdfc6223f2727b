from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dino.data import GlobalBatchSampler, ImageDataset, Preprocessing, Slot, TrainingViews, load_batches
from diffusers_dino.data.stores import ImageStore
from diffusers_dino.seeds import derive_seed, generator_for


def slots(count: int, **options) -> list[Slot]:
    sampler = GlobalBatchSampler(**options)
    return [slot for batch in islice(iter(sampler), count) for slot in batch]


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_processes_share_one_global_order(num_samples, batch_size, num_processes, start, seed):
    common = {"num_samples": num_samples, "seed": seed, "start": start}
    whole = slots(3, batch_size=batch_size * num_processes, **common)
    shares = [
        slots(3, batch_size=batch_size, num_processes=num_processes, process_index=rank, **common)
        for rank in range(num_processes)
    ]
    assert sorted(slot for share in shares for slot in share) == whole
    assert [slot.position for slot in whole] == list(range(start, start + len(whole)))


def test_every_epoch_shows_every_sample_once_in_another_order():
    shown = slots(15, num_samples=10, batch_size=4)
    by_epoch = [[slot.index for slot in shown if slot.epoch == epoch] for epoch in range(6)]
    assert all(sorted(indices) == list(range(10)) for indices in by_epoch)
    assert len({tuple(indices) for indices in by_epoch}) == 6


def test_start_continues_the_same_order():
    assert slots(5, num_samples=7, batch_size=2, start=6) == slots(8, num_samples=7, batch_size=2)[6:]


def test_without_shuffling():
    assert [slot.index for slot in slots(3, num_samples=4, batch_size=2, shuffle=False)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 0, "batch_size": 1},
        {"num_samples": 1, "batch_size": 0},
        {"num_samples": 1, "batch_size": 1, "start": -1},
        {"num_samples": 1, "batch_size": 1, "num_processes": 2, "process_index": 2},
    ],
)
def test_bad_numbers(options):
    with pytest.raises(ValueError, match=r"num_samples|process_index"):
        GlobalBatchSampler(**options)


class Memory(ImageStore):
    """A source of random images."""

    def __init__(self, count: int) -> None:
        self.keys = [f"k{i}" for i in range(count)]

    def read(self, index: int):
        return torch.randint(256, (9, 9), generator=generator_for(index), dtype=torch.uint8).numpy()


def test_workers_load_the_same_batches_in_the_same_order():
    views = TrainingViews(ImageDataset(Memory(10), Preprocessing(8)), None)
    sampler = GlobalBatchSampler(10, 3)
    state = torch.random.get_rng_state()
    runs = [list(islice(load_batches(views, sampler, workers), 5)) for workers in (0, 2)]
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(*runs, strict=True):
        assert one["key"] == other["key"]
        assert one["position"] == other["position"]
        assert torch.equal(one["image"], other["image"])
    assert Counter(key for batch in runs[0] for key in batch["key"]).most_common()[0][1] <= 2


def test_seeds_are_stable_and_tell_their_parts_apart():
    assert derive_seed(0, "noise", 5) == 7221915482823673852
    parts = [(1, 2), (2, 1), ("1", 2), (1, "2"), (12,), ("12",), (1, 2, "")]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
