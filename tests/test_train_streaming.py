"""`examples/train_dino.py` on shards behind a URL: the same model as from the same shards on the disk."""

import pytest
import torch
from safetensors.torch import load_file

import scripts
import tiny
from range_server import RangeServer
from shard_files import write_shards


def test_a_streamed_run_resumed_with_other_workers_gives_the_model_of_a_local_run(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shards = tmp_path / "shards"
    write_shards(shards)
    tiny.tiny_vae().save_pretrained(tmp_path / "vae")
    tiny.tiny_conditioner().save_pretrained(tmp_path / "conditioner")
    tiny.tiny_unet().save_config(tmp_path / "unet_config")
    flags = {name: tmp_path / name for name in ("vae", "conditioner", "unet_config")}
    flags |= {"resolution": 32, "train_batch_size": 5, "learning_rate": 1e-3, "lr_warmup_steps": 0}
    flags |= {"validation_steps": 0, "shuffle_window_shards": 2, "checkpointing_steps": 4}

    def train(source: object, name: str, steps: int, **changes: object) -> dict[str, torch.Tensor]:
        output = tmp_path / name
        run = {**flags, "train_data_dir": source, "output_dir": output, "max_train_steps": steps, **changes}
        scripts.call_script("train_dino.py", **run)
        return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")

    local = train(shards, "local", 8)
    with RangeServer(shards) as server:
        url = f"{server.url}/x-*.tar"
        train(url, "streamed", 4, dataloader_num_workers=1)
        streamed = train(url, "streamed", 8, dataloader_num_workers=2, resume_from_checkpoint="latest")
    assert local.keys() == streamed.keys()
    assert all(torch.equal(local[name], streamed[name]) for name in local)
    with pytest.raises(ValueError, match="shuffle_window_shards was 2, is None"):
        train(shards, "local", 9, shuffle_window_shards=0, resume_from_checkpoint="latest")
