import json
import math
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from safetensors.torch import save_file

from diffusers_dino.training import plain_state
from diffusers_dino.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    delete_old_checkpoints,
    describe_file,
    find_checkpoint,
    load_run,
    newest_checkpoint,
    read_checkpoint,
    save_run,
)
from diffusers_dino.training.plain_state import read_state, write_state
from diffusers_dino.training.state import ModelState
from folders import Planted


class Written:
    """A state of two files."""

    def __init__(self, text: str = "weights"):
        self.text = text

    def save(self, folder):
        (folder / "unet").mkdir()
        (folder / "unet" / "model.bin").write_text(self.text)
        (folder / "optimizer.bin").write_text("moments")


def save(folder, step: int, state=None):
    return save_run(Accelerator(cpu=True), folder, step, state or Written(), info={"position": step * 4})


def resume(folder, state, name=None):
    """The checkpoint that was loaded: the newest, or the one of a name."""
    checkpoint = find_checkpoint(folder, name) if name else newest_checkpoint(folder)
    load_run(Accelerator(cpu=True), checkpoint, state)
    return checkpoint


def test_saved_checkpoint_is_found_with_its_facts(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    found = newest_checkpoint(tmp_path)
    assert (found.path.name, found.step, found.info) == ("checkpoint-10", 10, {"position": 40})
    assert find_checkpoint(tmp_path, "checkpoint-2").step == 2
    assert find_checkpoint("elsewhere", str(tmp_path / "checkpoint-2")).step == 2
    assert newest_checkpoint(tmp_path / "empty") is None


def test_nothing_appears_when_writing_fails(tmp_path):
    class Full:
        def save(self, folder):
            raise OSError("No space left on device")

    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="checkpoint-2 could not be written"):
        save(tmp_path, 2, Full())
    assert newest_checkpoint(tmp_path).step == 1
    assert not (tmp_path / "checkpoint-2").exists()


def test_asking_for_a_checkpoint_that_is_not_there(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint checkpoint-7, .* There: checkpoint-2, checkpoint-10\."):
        find_checkpoint(tmp_path, "checkpoint-7")
    with pytest.raises(CheckpointError, match=r"There: none\."):
        find_checkpoint(tmp_path / "empty", "checkpoint-7")


def test_old_checkpoints_and_leftovers_go(tmp_path):
    for step in (1, 2, 30):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-4.partial")
    (tmp_path / "checkpoint-best").mkdir()
    delete_old_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-30", "checkpoint-best"]
    with pytest.raises(ValueError, match="At least one"):
        delete_old_checkpoints(tmp_path, 0)


def test_a_step_can_be_saved_again_and_after_a_killed_save(tmp_path):
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "stale").write_text("x")
    save(tmp_path, 1)
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    save(tmp_path, 1, Written("second"))
    assert (read_checkpoint(tmp_path / "checkpoint-1").path / "unet" / "model.bin").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def train_a_little(kind=torch.optim.AdamW, steps: int = 3, **options):
    """A model, its optimizer and schedule after a few updates, as the state of a run."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 300)
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=9)
    state = ModelState(model, optimizer, schedule, (torch.nn.BatchNorm1d(3),))
    update(state, steps)
    return state


def update(state: ModelState, steps: int) -> None:
    for _ in range(steps):
        state.model(torch.ones(2, 16)).square().mean().backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.optimizer.zero_grad()


def bits(state: ModelState) -> bytes:
    return pickle.dumps([p.detach().numpy().tobytes() for p in state.model.parameters()])


def adam8bit(parameters, **options):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, min_8bit_size=1, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": False, "amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (adam8bit, {}),
    ],
    ids=["fused", "amsgrad", "sgd", "8-bit"],
)
def test_any_optimizer_goes_on_from_safetensors_to_the_same_bits(tmp_path, kind, options):
    whole = train_a_little(kind, **options)
    written = save(tmp_path, 3, whole)
    assert {path.suffix for path in written.iterdir()} <= {".safetensors", ".json"}
    after = torch.rand(3)
    cut = train_a_little(kind, steps=0, **options)
    assert resume(tmp_path, cut).step == 3
    assert torch.equal(torch.rand(3), after)
    for state in (whole, cut):
        update(state, 4)
    assert bits(whole) == bits(cut)


def test_a_resumed_optimizer_takes_what_is_asked_for_now(tmp_path):
    save(tmp_path, 3, train_a_little())
    other = train_a_little(steps=0, weight_decay=0.5, betas=(0.5, 0.5))
    other.lr_scheduler.base_lrs = [1e-3]
    resume(tmp_path, other)
    (group,) = other.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.5))
    factor = other.lr_scheduler.lr_lambdas[0](3)
    assert other.lr_scheduler.get_last_lr() == [group["lr"]] == [1e-3 * factor]


def save_as_before(folder, state: ModelState) -> None:
    """A checkpoint as accelerate writes it, of which older versions of this package made theirs."""
    accelerator = Accelerator(cpu=True)
    accelerator._models, accelerator._optimizers = [state.model], [state.optimizer]
    accelerator.register_for_checkpointing(state.lr_scheduler, *state.companions)
    checkpoint = folder / "checkpoint-3"
    accelerator.save_state(str(checkpoint))
    files = {path.name: describe_file(path) for path in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "step": 3, "info": {"seed": 0}, "files": files}))


def test_older_checkpoints_are_read(tmp_path):
    whole, cut = train_a_little(), train_a_little(steps=0)
    save_as_before(tmp_path, whole)
    assert resume(tmp_path, cut).step == 3
    for state in (whole, cut):
        update(state, 4)
    assert bits(whole) == bits(cut)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "optimizer.bin", "random_states_0.pkl", "scaler.pt"]
)
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "zip"])
def test_resuming_runs_no_code_of_a_checkpoint(tmp_path, name, older, dump):
    state = train_a_little()
    if older:
        save_as_before(tmp_path, state)
    else:
        save(tmp_path, 3, state)
    checkpoint = tmp_path / "checkpoint-3"
    with open(checkpoint / name, "wb") as file:
        dump({"state": Planted(tmp_path / "ran")}, file)
    with pytest.raises(CheckpointError):
        resume(tmp_path, state, "checkpoint-3")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = describe_file(checkpoint / name)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="could run code"):
        resume(tmp_path, state)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "state",
    [{"key": object()}, [torch.zeros(2), {1, 2}], {"f": print}, (b"bytes",)],
    ids=["object", "set", "f", "bytes"],
)
def test_only_plain_state_is_written(tmp_path, state):
    with pytest.raises(TypeError, match="only tensors, numbers and texts"):
        write_state(tmp_path / "state.safetensors", state)


def test_plain_state_comes_back_as_it_was(tmp_path):
    table = torch.arange(6.0)
    state = {
        3: [table, table, table.view(2, 3).T, torch.tensor(2), torch.zeros(0, 4), torch.tensor([True])],
        "x": (1, 1.5, math.inf, None, True, "text", {"items": [], "tensor": "0"}),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    write_state(tmp_path / "state.safetensors", state)
    read = read_state(tmp_path / "state.safetensors")
    assert (read["x"], list(read)) == (state["x"], list(state))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(read[3], state[3], strict=True))
    assert torch.equal(read["half"], state["half"])


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100], ids=["empty", "json", "zeros"])
def test_what_is_no_state_is_refused(tmp_path, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the state"):
        read_state(tmp_path / "state.safetensors")
    save_file({"0": torch.zeros(1)}, tmp_path / "state.safetensors", {"state": "[" * 100_000})
    with pytest.raises(ValueError, match="does not hold the state"):
        read_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.bin", None),
        ("unet/model.bin", b"weigh"),
        ("unet/model.bin", b"Weights"),
        (MANIFEST, None),
        (MANIFEST, {"step": 1e30}),
        (MANIFEST, {"step": "2"}),
        (MANIFEST, {"step": -2}),
        (MANIFEST, {"step": True}),
        (MANIFEST, {"step": 7}),
        (MANIFEST, {"step": None}),
        (MANIFEST, {"info": {"position": -8}}),
        (MANIFEST, {"info": {"position": "8"}}),
        (MANIFEST, {"info": {"position": 8.0}}),
        (MANIFEST, {"info": []}),
        (MANIFEST, {"files": []}),
        (MANIFEST, {"files": {"../outside": {"size": 1, "sha256": "x"}}}),
        (MANIFEST, {"files": {"/etc/passwd": {"size": 1, "sha256": "x"}}}),
        (MANIFEST, {"files": {"optimizer.bin": 3}}),
        (MANIFEST, {"files": {}}),
        (MANIFEST, {"format": 99}),
        (MANIFEST, {"format": "1"}),
        (MANIFEST, b"[]"),
        (MANIFEST, b"[" * 100_000),
        (MANIFEST, b'"{}"'),
        (MANIFEST, b"{"),
        (MANIFEST, b""),
        (MANIFEST, b"\xff\xfe"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_latest_takes_the_one_before(tmp_path, caplog, name, content):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / name
    if content is None:
        damaged.unlink()
    elif isinstance(content, dict):
        damaged.write_text(json.dumps({**json.loads(damaged.read_text()), **content}))
    else:
        damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        find_checkpoint(tmp_path, "checkpoint-2")
    assert newest_checkpoint(tmp_path).step == 1
    assert "checkpoint-2" in caplog.text


def test_moments_follow_the_memory_format_of_their_weights(tmp_path):
    """Fused AdamW goes through memory: contiguous moments of channels-last weights would be others' moments."""

    def make():
        weight = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(weight)], lr=0.1, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def step(optimizer):
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.linspace(-1, 1, 24).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        optimizer.step()
        return weight.detach().clone()

    one, schedule = make()
    kept = step(one)
    plain_state.save_optimizer(tmp_path, one, schedule)
    expected = step(one)
    other, schedule = make()
    other.param_groups[0]["params"][0].data.copy_(kept)
    plain_state.load_optimizer(other, schedule, plain_state.read_state(tmp_path / plain_state.OPTIMIZER))
    assert torch.equal(step(other), expected)
