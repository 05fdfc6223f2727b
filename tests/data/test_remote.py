"""Shards behind a URL, on real servers: HTTP with and without ranges, and one that speaks S3."""

import json
import logging
import subprocess
import sys
import traceback
from itertools import islice

import fsspec
import pytest
import torch

from diffusers_dino.data import (
    Augmentation,
    GlobalBatchSampler,
    Preprocessing,
    TrainingViews,
    load_batches,
    open_images,
)
from diffusers_dino.data.stores import remote as remote_module
from diffusers_dino.data.stores.archives import write_index
from diffusers_dino.data.stores.remote import RemoteFileSystem, add_suffix, redact
from hub_server import HubServer
from range_server import RangeServer
from shard_files import write_manifest, write_shards

PREPARE = Preprocessing(16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote_module, "RETRY_DELAYS", (0.01, 0.01))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path):
    paths = write_shards(tmp_path / "shards")
    write_index(paths[0])
    return paths[0].parent


@pytest.fixture
def server(shards):
    pytest.importorskip("aiohttp")
    with RangeServer(shards) as server:
        yield server


@pytest.fixture(scope="module")
def s3_server():
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, shards, monkeypatch):
    settings = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    if not s3.exists("cxr"):
        s3.mkdir("cxr")
    s3.put(str(shards) + "/", "cxr/train/", recursive=True)
    return "s3://cxr/train"


def assert_same_samples(one, other):
    assert one.keys == other.keys
    for first, second in zip(one, other, strict=True):
        assert first["key"] == second["key"]
        assert torch.equal(first["image"], second["image"])


@pytest.mark.parametrize("form", ["", "/", "/x-*.tar", "/x-{000000..000002}.tar"])
def test_every_form_of_a_url_gives_what_the_folder_gives(server, shards, form):
    remote, local = open_images(server.url + form, PREPARE), open_images(shards, PREPARE)
    assert_same_samples(remote, local)
    assert json.loads(remote.companion(1, "json")) == {"labels": ["1"]}


def test_each_sample_travels_once_however_many_processes_share_an_epoch(server, shards):
    dataset = open_images(server.url + "/x-*.tar", PREPARE)
    server.requests.clear()
    server.body_bytes = 0
    for process in range(2):
        sampler = GlobalBatchSampler(24, 4, num_processes=2, process_index=process)
        for _ in islice(load_batches(TrainingViews(dataset, None), sampler), 3):
            pass
    asked = [(path, asked) for method, path, asked in server.requests]
    assert len(asked) == len(set(asked)) == 24
    assert server.body_bytes == sum(int(size) for size in dataset.store._index.sizes[dataset.store._image])


@pytest.mark.parametrize("window", [0, 2])
def test_other_workers_go_on_where_a_run_stopped(server, window):
    dataset = open_images(server.url + "/x-*.tar", PREPARE)
    views = TrainingViews(dataset, Augmentation())

    def batches(start: int, count: int, workers: int):
        sampler = GlobalBatchSampler(24, 5, seed=3, start=start, order=dataset.order(window))
        return list(islice(load_batches(views, sampler, workers), count))

    whole = batches(0, 7, 0)
    for workers in (1, 3):
        for expected, batch in zip(whole[2:], batches(10, 5, workers), strict=True):
            assert batch["key"] == expected["key"]
            assert batch["position"] == expected["position"]
            assert torch.equal(batch["image"], expected["image"])
    assert dataset[0]["key"] == "set-000000"  # the connections of this process outlive its workers


def test_a_shard_without_an_index_is_read_whole_once(server, own_cache):
    open_images(server.url, PREPARE)
    assert len(list((own_cache / "diffusers-dino" / "indexes").iterdir())) == 2
    assert server.asked_for("x-000000.tar") == ["bytes=1-1"]  # it has an index: only whether ranges work was asked
    assert len(server.asked_for("x-000001.tar")) == 1
    server.requests.clear()
    open_images(server.url, PREPARE)
    assert server.asked_for("x-000001.tar") == server.asked_for("x-000002.tar") == []


def test_a_changed_shard_is_indexed_anew(server, shards):
    open_images(server.url + "/x-000001.tar", PREPARE)
    (shards / "x-000001.tar").write_bytes((shards / "x-000000.tar").read_bytes() + bytes(10240))
    assert open_images(server.url + "/x-000001.tar", PREPARE).keys[0] == "set-000000"


def test_a_cache_that_cannot_be_written_is_done_without(server, own_cache, caplog):
    own_cache.write_text("a file where the folder would be")
    assert len(open_images(server.url, PREPARE)) == 24
    assert "Cannot keep" in caplog.text


def test_passing_failures_are_tried_again(server, caplog):
    dataset = open_images(server.url + "/x-000000.tar", PREPARE)
    server.failures = 2
    assert dataset[3]["key"] == "set-000003"
    assert caplog.text.count("Trying again") == 2
    assert not dataset.unreadable


def test_a_lasting_failure_ends_the_run_and_names_the_sample(server):
    dataset = open_images(server.url + "/x-000000.tar", PREPARE)
    server.failures = 100
    with pytest.raises(ConnectionError, match=r"x-000000\.tar' after 3 attempts.*503.*set-000003"):
        dataset[3]
    assert not dataset.unreadable  # nothing takes its place: the run is resumed when the server is back


def test_refused_credentials_are_not_tried_again(server):
    dataset = open_images(server.url + "/x-000000.tar", PREPARE)
    server.failures, server.status = 1, 403
    with pytest.raises(PermissionError, match=r"credentials.*x-000000\.tar"):
        dataset[3]


def test_no_message_shows_a_secret(server, caplog):
    url = server.url.replace("//", "//user:hunter2@") + "/x-000000.tar?X-Amz-Signature=hunter2"
    dataset = open_images(url, PREPARE)
    with caplog.at_level(logging.WARNING):
        server.failures = 100
        with pytest.raises(ConnectionError) as lasting:
            dataset[0]
    server.failures = 0
    with pytest.raises(FileNotFoundError) as missing:
        open_images(url.replace("x-000000", "x-000009"), PREPARE)
    server.ranges = False
    with pytest.raises(ValueError, match="whole files only") as whole:
        open_images(url, PREPARE)
    shown = ["".join(traceback.format_exception(error.value)) for error in (lasting, missing, whole)]
    for text in (caplog.text, dataset.store.describe(0), *shown):
        assert "127.0.0.1" in text
        assert "hunter2" not in text


def test_urls_of_companions_keep_their_signature():
    assert add_suffix("https://host/x.tar?sig=1", ".index.npz") == "https://host/x.tar.index.npz?sig=1"
    assert add_suffix("s3://bucket/x?.tar", ".index.npz") == "s3://bucket/x?.tar.index.npz"
    assert redact("https://a:b@host:80/x.tar?c=d#e") == "https://host:80/x.tar"


def test_a_shard_that_vanishes_is_replaced_and_counted(server, shards):
    dataset = open_images(server.url, PREPARE, max_unreadable=0.2)
    (shards / "x-000001.tar").unlink()
    assert dataset[8]["key"] not in dataset.keys[8:16]
    assert "gone" in dataset.unreadable[8]


def test_a_manifest_names_the_shards_where_nothing_can_be_listed_and_those_that_are_missing(server, shards, caplog):
    write_manifest(shards)
    (shards / "x-000001.tar").unlink()
    whole = 24
    dataset = open_images(server.url, PREPARE, max_unreadable=0.5)
    assert len(dataset) == whole
    assert "x-000001.tar is missing: 8 of 8 samples are lost" in caplog.text
    assert set(dataset.unreadable) == set(range(8, 16))
    with pytest.raises(ValueError, match=r"8 of 24 images cannot be read.*x-000001\.tar"):
        open_images(server.url, PREPARE)


@pytest.mark.parametrize("form", ["", "/x-*.tar"])
def test_s3(bucket, shards, form):
    assert_same_samples(open_images(bucket + form, PREPARE), open_images(shards, PREPARE))


def test_s3_with_workers_and_after_them(bucket, shards):
    remote, local = open_images(bucket, PREPARE), open_images(shards, PREPARE)
    sampler = GlobalBatchSampler(24, 5, order=remote.order(2))
    expected = islice(load_batches(TrainingViews(local, Augmentation()), sampler), 6)
    got = islice(load_batches(TrainingViews(remote, Augmentation()), sampler, 2), 6)
    for one, other in zip(expected, got, strict=True):
        assert one["key"] == other["key"]
        assert torch.equal(one["image"], other["image"])
    assert torch.equal(remote[0]["image"], local[0]["image"])


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://cxr/nothing", "No .tar file"), ("s3://cxr/train/y-*.tar", "No shard"), ("s3://cxr/x.tar", "No shard")],
)
def test_what_is_not_in_a_bucket(bucket, url, message):
    with pytest.raises(FileNotFoundError, match=message):
        open_images(url, PREPARE)


def test_the_hub(shards, tmp_path):
    script = """
import sys
from diffusers_dino.data import Preprocessing, open_images
remote, local = open_images(sys.argv[1], Preprocessing(16)), open_images(sys.argv[2], Preprocessing(16))
assert remote.keys == local.keys and len(remote) == 24
assert all((remote[i]["image"] == local[i]["image"]).all() for i in range(24))
"""
    with HubServer() as hub:
        hub.add_folder("org/shards", shards)
        environment = hub.client_environment(tmp_path / "home")
        arguments = [sys.executable, "-c", script, "hf://org/shards/x-*.tar", str(shards)]
        subprocess.run(arguments, env=environment, check=True, timeout=120)
    images = [size for path, size in hub.ranges if path == "x-000000.tar"]
    assert len(images) == 8  # it has an index: nothing but its images travels
    assert sum(images) < (shards / "x-000000.tar").stat().st_size / 2


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"gs://bucket/x\.tar.*diffusers-dino\[remote\]"):
        RemoteFileSystem("gs://bucket/x.tar")
