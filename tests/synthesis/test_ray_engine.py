"""Ray makes the files that one process makes, also where that process began and where workers die on the way."""

import os
import pickle
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import priors
import tiny
from diffusers_dino.data.stores.walk import RECORDS
from diffusers_dino.prior import describe_conditioner
from diffusers_dino.synthesis import (
    PriorTokens,
    RayResources,
    SynthesisError,
    SynthesisSettings,
    bind,
    plan_interpolation,
    plan_prior,
    prepare_folder,
    synthesise,
    synthesise_with_ray,
)
from diffusers_dino.synthesis.ray_engine import _count_fitting, _Job, _portable, _Worker
from diffusers_dino.synthesis.tokens import TOKENS

LABELS = [{"mass"}, {"mass", "nodule"}, {"nodule"}, {"mass"}, {"nodule"}]
SETTINGS = SynthesisSettings(num_inference_steps=2, batch_size=4, shard_size=4, threads=1)


class DeadlyGate:
    """Lets everything pass, but a process that asks it dies as if it was killed, or the user presses Ctrl-C.

    Each file in the folder `deadly` is one process that dies.
    """

    def __init__(self, folder: Path):
        self.deadly, self.interrupting = folder / "deadly", folder / "interrupting"
        self.deadly.mkdir()

    def arm(self, deaths: int):
        for number in range(deaths):
            (self.deadly / str(number)).touch()

    def __call__(self, images):
        if self.interrupting.exists():
            raise KeyboardInterrupt
        for file in self.deadly.iterdir():
            with suppress(FileNotFoundError):  # of two processes one succeeds
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(len(images), dtype=torch.bool)

    def fingerprint(self):
        return "everything passes"


@pytest.fixture(scope="module")
def plan(sources):
    return plan_interpolation(sources.keys, LABELS, num_images=15, settings=SETTINGS)


@pytest.fixture
def job(plan, pipe, sources, tmp_path):
    bound = bind(plan, pipe, sources)
    job = _Job(bound, sources, None, prepare_folder(bound, tmp_path / "set"), {}, "cpu")
    pipe.save_pretrained(job.place("model"))
    return job


def ask(job, kind, number):
    return pickle.loads(_Worker(job, kind).answer(number))


@pytest.mark.slow
def test_ray_goes_on_with_what_one_process_began_and_replaces_a_worker_that_is_killed(
    plan, pipe, sources, tmp_path, capfd, monkeypatch
):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusers-dino[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # workers import the gate from here
    gate = DeadlyGate(tmp_path)
    whole = synthesise(plan, pipe, sources, tmp_path / "whole", gate=gate, progress=False)
    begun = prepare_folder(bind(plan, pipe, sources, gate), tmp_path / "set")
    gate.interrupting.touch()
    with pytest.raises(KeyboardInterrupt):
        synthesise(plan, pipe, sources, begun, gate=gate, progress=False)
    gate.interrupting.unlink()
    shard = begun / whole.manifest["shards"][1]["name"]
    for found in whole.folder.rglob(f"{shard.name}*"):  # this one the interrupted run has finished
        (begun / found.relative_to(whole.folder)).write_bytes(found.read_bytes())
    written = shard.stat().st_mtime_ns
    for tokens in (begun / TOKENS).iterdir():
        tokens.unlink()
    gate.arm(1)
    made = synthesise_with_ray(
        plan, pipe, sources, begun, gate=gate, resources=RayResources(num_workers=2), progress=False
    )
    assert not list(gate.deadly.iterdir())
    assert capfd.readouterr().out.count("A worker died while it made") == 1
    assert shard.stat().st_mtime_ns == written
    files = {str(path.relative_to(whole.folder)) for path in whole.folder.rglob("*") if path.is_file()}
    assert len(files) > 3 * 4
    assert files == {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    different = [name for name in files if (whole.folder / name).read_bytes() != (made.folder / name).read_bytes()]
    assert not different


@pytest.mark.slow
def test_a_shard_that_ends_its_worker_every_time_is_given_up(plan, pipe, sources, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusers-dino[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    gate, folder = DeadlyGate(tmp_path), tmp_path / "set"
    gate.arm(9)
    with pytest.raises(SynthesisError, match="4 workers died one after the other of shard 0"):
        synthesise_with_ray(plan, pipe, sources, folder, gate=gate, resources=RayResources(1), progress=False)
    assert len(list(gate.deadly.iterdir())) == 9 - 4
    assert not list(folder.glob("*.tar"))


def test_a_worker_answers_with_what_it_made(job):
    assert ask(job, "part", 0).result == []
    answer = ask(job, "shard", 1)
    assert (answer.result, answer.error) == (0, None)
    assert (job.folder / "synthetic-000001.tar").is_file()


def test_a_machine_with_another_folder_or_model_is_refused(job, tmp_path):
    with pytest.raises(SynthesisError, match="does not see"):
        raise ask(replace(job, folder=tmp_path / "nowhere"), "part", 0).error
    tiny.tiny_pipeline(vae=tiny.tiny_vae(scaling_factor=0.25)).save_pretrained(job.place("model"))
    with pytest.raises(SynthesisError, match=r"(?s)begun with other settings.*vae"):
        raise ask(job, "part", 0).error


def test_errors_arrive_as_they_are(job):
    ask(job, "part", 0)
    shutil.rmtree(job.folder / RECORDS)
    error = ask(job, "shard", 0).error
    assert isinstance(error, FileNotFoundError)

    class LocalError(Exception):
        pass

    assert _portable(OSError(28, "No space left on device")).errno == 28
    assert str(_portable(LocalError("too hot"))) == "LocalError: too hot"


@pytest.mark.slow
def test_an_actor_draws_the_tokens_of_a_prior_as_one_process_does(pipe, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'diffusers-dino[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    drawn = priors.tiny_prior_pipeline(conditioner=describe_conditioner(pipe.conditioner))
    drawn.prior.fit_tokens(pipe.encode_image(tiny.random_images(32)))
    prior = PriorTokens(drawn, guidance_scale=2.0, num_inference_steps=3)
    plan = plan_prior(["a", "b"], [{"Edema"}, {"Nodule"}], num_images=10, settings=SETTINGS)
    whole = synthesise(plan, pipe, None, tmp_path / "whole", prior=prior, progress=False)
    folder = tmp_path / "set"
    made = synthesise_with_ray(plan, pipe, None, folder, prior=prior, resources=RayResources(1), progress=False)
    assert made.manifest == whole.manifest  # it has the SHA-256 of every shard
    assert not (folder / ".work").exists()
    with pytest.raises(SynthesisError, match="needs one"):
        synthesise_with_ray(plan, pipe, None, tmp_path / "none", progress=False)


def test_workers_are_counted_by_what_a_machine_has():
    machine = {"Alive": True, "Resources": {"CPU": 9.0, "GPU": 2.0}}
    assert _count_fitting([machine, machine], 4, 0) == 4
    assert _count_fitting([machine], 2, 0.5) == 4
    assert _count_fitting([machine], 4, 0.5) == 2
    assert _count_fitting([{"Alive": True, "Resources": {"CPU": 8.0}}], 4, 1) == 0
    assert _count_fitting([{**machine, "Alive": False}], 1, 0) == 0


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_gpus": -1.0}, {"num_gpus": 1.5}])
def test_impossible_resources_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RayResources(**options)


def test_without_ray_the_extra_is_named(plan, pipe, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"diffusers-dino\[ray\]"):
        synthesise_with_ray(plan, pipe, sources, tmp_path / "set")
    assert not (tmp_path / "set").exists()
