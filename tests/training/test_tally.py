"""When losses are exchanged, that the rest is as if they were exchanged each time, and what is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_dino.training.tally import Tally

QUIET = SimpleNamespace(wishes=lambda: (0.0, 0.0))


def make(every, interruption=QUIET, fused=True, mixed_precision="no"):
    """A layer of one weight, its optimizer, and their tally."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    return weight, optimizer, Tally(accelerator, optimizer, interruption, every)


def update(weight, optimizer, tally, step, loss=1.0, gradient=0.5, **options):
    """One update; gives what the tally tells."""
    weight.grad = torch.full_like(weight, gradient * step)
    known = tally.note(step, torch.tensor(loss), torch.tensor(gradient), 0.1, [f"image {step}"], **options)
    optimizer.step()
    return known


def test_losses_come_together_and_weights_do_not_notice():
    (one, *first), (ten, *second) = make(every=1), make(every=3)
    told = []
    for step in range(1, 9):
        assert [known.step for known in update(one, *first, step, loss=step / 7)] == [step]
        told.append(update(ten, *second, step, loss=step / 7, at_once=step == 8))
    assert torch.equal(one, ten)
    moments = [optimizer.state_dict()["state"][0] for optimizer, _ in (first, second)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert [[known.step for known in each] for each in told] == [[1], [], [], [2, 3, 4], [], [], [5, 6, 7], [8]]
    assert [known.loss for each in told for known in each] == pytest.approx([step / 7 for step in range(1, 9)])


@pytest.mark.parametrize("broken", [{"loss": math.nan}, {"gradient": math.inf}])
@pytest.mark.parametrize("every", [1, 5])
def test_what_is_not_finite_changes_no_weight_and_is_named(every, broken):
    weight, *rest = make(every)
    update(weight, *rest, 1)
    update(weight, *rest, 2)
    before = weight.detach().clone()
    first_unseen = 3 if every == 1 else 6
    for step in range(3, first_unseen):
        update(weight, *rest, step, **(broken if step == 3 else {}))
    with pytest.raises(FloatingPointError, match=r"Update 3: .*No weight was changed.*image 3"):
        update(weight, *rest, first_unseen, **(broken if every == 1 else {}))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("settings", [{"fused": False}, {"mixed_precision": "fp16"}, {"every": None}])
def test_who_cannot_leave_a_step_out_exchanges_each(settings, monkeypatch):
    if settings.get("mixed_precision"):
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # which a CPU does not offer
        settings = {}
    weight, *rest = make(**{"every": 7, **settings})
    assert all(len(update(weight, *rest, step)) == 1 for step in range(1, 4))


def test_wishes_are_heard_at_an_exchange():
    wishes = [0.0, 0.0]
    weight, *rest = make(every=4, interruption=SimpleNamespace(wishes=lambda: tuple(wishes)))
    update(weight, *rest, 1)
    wishes[:] = 1.0, 1.0
    for step in range(2, 6):
        assert not rest[1].stop
        update(weight, *rest, step)
    assert rest[1].stop
    assert rest[1].save
    update(weight, *rest, 6)  # one wish, one checkpoint
    assert not rest[1].save


def test_slow_updates_are_exchanged_more_often(monkeypatch):
    weight, *rest = make(every=10)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("diffusers_dino.training.tally.time.monotonic", lambda: next(clock))
    told = [len(update(weight, *rest, step)) for step in range(1, 8)]
    assert max(told) < 10
    with pytest.raises(ValueError, match="1 or more"):
        make(every=0)
