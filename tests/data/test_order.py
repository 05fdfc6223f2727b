import time
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dino.data import (
    GlobalBatchSampler,
    ImageDataset,
    ImageStore,
    Preprocessing,
    Slot,
    TrainingViews,
    load_batches,
)
from diffusers_dino.data.order import WindowedOrder
from diffusers_dino.seeds import derive_seed, generator_for


def slots(count: int, **options) -> list[Slot]:
    sampler = GlobalBatchSampler(**options)
    return [slot for batch in islice(iter(sampler), count) for slot in batch]


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_processes_share_one_global_order(num_samples, batch_size, num_processes, start, seed, windowed):
    order = WindowedOrder([num_samples // 3, 0, num_samples - num_samples // 3], 1 + seed) if windowed else None
    common = {"num_samples": num_samples, "seed": seed, "start": start, "order": order}
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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 14), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_windowed_epoch_shows_every_sample_once_and_few_shards_at_a_time(sizes, window, seed):
    order = WindowedOrder(sizes, window)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    epochs = [[order.index(seed, epoch, rank) for rank in range(len(order))] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(sum(sizes)))
        shown = [shard_of[index] for index in epoch]
        for place in range(len(shown)):  # shards whose samples are still to come and were shown already
            assert len(set(shown[:place]) & set(shown[place:])) <= window
    backwards = [order.index(seed, 1, rank) for rank in reversed(range(len(order)))]
    assert backwards == epochs[1][::-1]


def test_windowed_epochs_differ_and_mix_the_samples_of_a_window():
    order = WindowedOrder([50] * 6, 3)
    epochs = [[order.index(0, epoch, rank) for rank in range(300)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [order.index(1, 0, rank) for rank in range(300)]
    assert {index // 50 for index in epochs[0][:20]} == {index // 50 for index in epochs[0][:150]}


def test_a_selection_is_shuffled_within_the_shards_that_it_touches():
    images = ImageDataset(Memory(30), Preprocessing(8))
    images.store.shard_sizes = [10, 5, 15]
    chosen = images.select(["k2", "k9", "k12", "k29"])
    assert chosen.order(1).sizes == (2, 1, 1)
    assert chosen.order(0) is None


def test_bad_windows():
    with pytest.raises(ValueError, match="at least 1 shard"):
        WindowedOrder([3], 0)
    with pytest.raises(ValueError, match="order is of 3 samples"):
        GlobalBatchSampler(4, 1, order=WindowedOrder([3], 1))


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

    shard_sizes = ()

    def __init__(self, count: int) -> None:
        self.keys = [f"k{i}" for i in range(count)]

    def read(self, index: int):
        return torch.randint(256, (9, 9), generator=generator_for(index), dtype=torch.uint8).numpy()

    def describe(self, index: int) -> str:
        return self.keys[index]

    def companion(self, index: int, extension: str) -> bytes:
        raise KeyError(extension)


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_consumer_never_sees_a_batch_change_under_it(workers):
    """Workers reuse their memory: each batch must be whole when it is finished, however far they are ahead."""
    views = TrainingViews(ImageDataset(Memory(40), Preprocessing(8)), None)
    batches = load_batches(views, GlobalBatchSampler(40, 2, shuffle=False), workers)
    kept = []
    for _ in range(20):
        kept.append(next(batches)["image"])
        time.sleep(0.01)
    expected = views.finish(views.load([Slot(p, 0, p) for p in range(40)]))["image"]
    assert torch.equal(torch.cat(kept), expected)


def test_memory_of_a_batch_is_used_again_only_when_nothing_shows_it():
    views = TrainingViews(ImageDataset(Memory(8), Preprocessing(8)), None)
    one, other = (views.load([Slot(p, 0, p) for p in places]) for places in (range(4), range(4, 8)))
    batch = views.finish(one)["image"]
    place, row = batch.data_ptr(), batch[1]
    expected = row.clone()
    del batch
    kept = views.finish(other)["image"]
    assert kept.data_ptr() != place
    assert torch.equal(row, expected)
    del row
    assert views.finish(other)["image"].data_ptr() == place
    assert views.finish(views.load([Slot(0, 0, 0)]))["image"].shape == (1, 1, 8, 8)
    assert torch.equal(kept, views.finish(other)["image"])


def test_seeds_are_stable_and_tell_their_parts_apart():
    assert derive_seed(0, "noise", 5) == 7221915482823673852
    parts = [(1, 2), (2, 1), ("1", 2), (1, "2"), (12,), ("12",), (1, 2, "")]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
