import io
import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from diffusers_dino.training.progress import Progress, peak_memory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_plain_lines_now_and_then(accelerator, tmp_path):
    stream = io.StringIO()
    progress = Progress(accelerator, tmp_path / "log.jsonl", total=7, images_per_step=4, every=3, stream=stream)
    for step in range(7):
        progress.update(loss=step, lr=1e-4)
    progress.say("a remark")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/7", "step 3/7", "step 6/7", "step 7/7", "a remark"]
    assert "loss 2.0000, lr 1.00e-04, images/s" in lines[1]
    assert "GiB" in lines[1]


def test_bar_on_a_terminal(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_dino.training.progress.tqdm", partial(tqdm, disable=False))  # tests have no bars
    stream = Terminal()
    progress = Progress(accelerator, tmp_path / "log.jsonl", total=2, stream=stream)
    progress.update(0.5, 1e-4)
    progress.say("a remark")
    progress.update(0.25, 1e-4)
    progress.close()
    assert "2/2" in stream.getvalue()
    assert "a remark" in stream.getvalue()


def test_log_of_a_resumed_run_has_each_update_once(accelerator, tmp_path):
    file = tmp_path / "log.jsonl"
    first = Progress(accelerator, file, total=9, stream=io.StringIO())
    for step in range(5):
        first.update(step, 0.1)
    first.close()
    with open(file, "a") as log:
        log.write('{"step": 6, "lo')
    second = Progress(accelerator, file, total=9, start=3, stream=io.StringIO())
    second.update(30.0, 0.1)
    second.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0), (2, 1), (3, 2), (4, 30.0)]
    Progress(accelerator, file, total=9, stream=io.StringIO()).close()
    assert file.read_text() == ""


def test_memory_is_that_of_the_process():
    assert 0.05 < peak_memory(torch.device("cpu")) < 64
