"""Features on disk: the same as in memory, restartable, and refused where they do not match."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import scripts
import tiny
from diffusers_dino.data import Augmentation, ImageDataset, Preprocessing, Slot, TrainingViews, open_images
from diffusers_dino.training.feature_cache import FeatureCacheError, Recipe, open_feature_cache, write_feature_cache
from diffusers_dino.training.features import CachedViews, FeatureEncoder, cache_in_memory
from kills import kills

COUNT, VIEWS = 11, 3
SHARDS = ["features-000000.safetensors", "features-000001.safetensors", "features-000002.safetensors"]


@pytest.fixture(scope="module")
def vae():
    return tiny.tiny_vae()


@pytest.fixture(scope="module")
def conditioner():
    return tiny.tiny_conditioner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return scripts.image_folder(tmp_path_factory.mktemp("images"), COUNT, size=40)


@pytest.fixture
def images(folder) -> ImageDataset:
    return open_images(folder, Preprocessing(32))


@pytest.fixture
def views(images) -> TrainingViews:
    return TrainingViews(images, Augmentation())


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def write(vae, conditioner, accelerator, tmp_path):
    """Write a cache of views; four samples in a shard."""

    def run(views: TrainingViews, place: Path = tmp_path, num_views: int = VIEWS, **options) -> dict:
        recipe = Recipe.of(vae, conditioner, views, num_views)
        encoder = FeatureEncoder(vae, conditioner, "cpu")
        options = {"dtype": torch.float32, "samples_per_shard": 4, "batch_size": 2 * num_views, **options}
        return write_feature_cache(place, recipe, views, encoder, accelerator, **options)

    return run


@pytest.fixture
def reopen(vae, conditioner, tmp_path):
    """Open the cache of some views to train on images, by default on those of the views."""

    def run(views: TrainingViews, images: ImageDataset | None = None, place: Path = tmp_path) -> CachedViews:
        return open_feature_cache(place, Recipe.of(vae, conditioner, views, VIEWS), images or views.images)

    return run


def slots(count: int = COUNT, epochs: int = VIEWS + 1) -> list[Slot]:
    return [Slot(position, epoch, (7 * position) % count) for epoch in range(epochs) for position in range(count)]


def test_disk_holds_what_memory_holds(write, reopen, vae, conditioner, images):
    views = TrainingViews(images, Augmentation(), seed=5)
    manifest = write(views)
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 3]
    encoder = FeatureEncoder(vae, conditioner, "cpu")
    memory = cache_in_memory(views, encoder, VIEWS, batch_size=2 * VIEWS)
    one, other = memory.__getitems__(slots()), reopen(views).__getitems__(slots())
    assert all(torch.equal(a, b) for a, b in zip(one["features"], other["features"], strict=True))
    assert (one["key"], one["position"]) == (other["key"], other["position"])
    # and both hold the views that training would make, epoch K being view 0 again
    online = encoder(views.__getitems__([slot._replace(epoch=slot.epoch % VIEWS) for slot in slots()]))
    for cached, now in zip(encoder(other), online, strict=True):
        torch.testing.assert_close(cached, now, atol=1e-5, rtol=1e-5)


def test_half_precision_rounds_by_one_part_in_two_thousand(write, reopen, vae, conditioner, views, tmp_path):
    features = []
    for dtype in (torch.float32, torch.float16):
        place = tmp_path / str(dtype)
        place.mkdir()
        write(views, place, dtype=dtype)
        features.append(FeatureEncoder(vae, conditioner, "cpu")(reopen(views, place=place).__getitems__(slots())))
    for one, other in zip(*features, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().max() <= one.abs().max() * 2**-11


def test_stopped_writing_goes_on_and_ends_with_the_same_bytes(write, views, tmp_path):
    write(views)
    whole = {name: (tmp_path / name).read_bytes() for name in [*SHARDS, "keys.txt", "manifest.json"]}
    for name in ("manifest.json", "keys.txt", SHARDS[1]):
        (tmp_path / name).unlink()
    (tmp_path / SHARDS[2]).write_bytes(whole[SHARDS[2]][:-1])
    (tmp_path / f".{SHARDS[1]}.123.partial").write_bytes(b"half")
    untouched = (tmp_path / SHARDS[0]).stat().st_mtime_ns
    said: list[str] = []
    write(views, say=said.append)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    assert (tmp_path / SHARDS[0]).stat().st_mtime_ns == untouched
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(whole)
    assert len(said) == 3
    write(views, say=said.append)
    assert len(said) == 3  # a complete cache is left alone


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_with_other_features_is_not_written_to(write, views, images, tmp_path, complete):
    write(views)
    if not complete:
        (tmp_path / "manifest.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FeatureCacheError, match="seed was 0, is 1"):
        write(TrainingViews(images, Augmentation(), seed=1))
    with pytest.raises(FeatureCacheError, match=r"samples' keys was (.|\n)*give another output folder"):
        write(TrainingViews(images.select(images.keys[1:]), Augmentation()))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_differs_is_named(write, vae, conditioner, views, images, folder, tmp_path):
    write(views)
    recipe = Recipe.of(vae, conditioner, views, VIEWS)
    larger, wider = open_images(folder, Preprocessing(64)), Augmentation(scale=(0.9, 1.5))
    others = {
        "vae was .*, is ": Recipe.of(tiny.tiny_vae(scaling_factor=0.7), conditioner, views, 0),
        r"conditioner was .*, is (.|\n)* were made with is in .*/conditioner": Recipe.of(
            vae, tiny.tiny_conditioner(tokens="cls"), views, 0
        ),
        "preprocessing: size was 32, is 64": Recipe.of(vae, conditioner, TrainingViews(larger, None), 0),
        r"augmentation: scale was \[0.9, 1.4\], is \[0.9, 1.5\]": Recipe.of(
            vae, conditioner, TrainingViews(images, wider), 0
        ),
        "augmentation was .*, is None": Recipe.of(vae, conditioner, TrainingViews(images, None), 0),
        "num_views was 3, is 2": replace(recipe, num_views=2),
    }
    for message, other in others.items():
        with pytest.raises(FeatureCacheError, match=message) as refused:
            open_feature_cache(tmp_path, other, images)
        named = [line for line in str(refused.value).splitlines() if line.startswith("- ")]
        assert {line.split()[1].rstrip(":") for line in named} <= {message.split()[0].rstrip(":"), "augmentation"}
    open_feature_cache(tmp_path, replace(recipe, seed=9, num_views=0), images)  # runs of several seeds share views


def test_other_images_under_the_same_names_are_noticed(write, reopen, images, tmp_path):
    views = TrainingViews(images, None)
    write(views)
    other = tmp_path / "other"
    other.mkdir()
    for key in images.keys:
        Image.linear_gradient("L").save(other / f"{key}.png")
    with pytest.raises(FeatureCacheError, match="shows something else"):
        reopen(views, open_images(other, images.preprocessing))
    Image.linear_gradient("L").save(other / "new.png")
    with pytest.raises(FeatureCacheError, match="samples: 1 of 12 are not there, such as new"):
        reopen(views, open_images(other, images.preprocessing))


def test_incomplete_or_damaged_folders_are_named(write, reopen, views, tmp_path):
    with pytest.raises(FeatureCacheError, match=r"not hold complete features: it has no manifest\.json"):
        reopen(views)
    write(views)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shard = tmp_path / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FeatureCacheError, match=rf"{SHARDS[1]} is missing or cut short"):
        reopen(views)
    shards = manifest["shards"]
    for change, message in (
        ("{", "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ([], "damaged"),
        ({"format": 99}, "of format 99"),
        ({"recipe": 3}, "damaged"),
        ({"shards": [{**shards[0], "name": "../outside.safetensors"}, *shards[1:]]}, "named or counted"),
        ({"shards": [{**shards[0], "name": "/etc/passwd"}, *shards[1:]]}, "named or counted"),
        ({"shards": shards[::-1]}, "named or counted"),
        ({"shards": shards[:2]}, "do not add up"),
        ({"shards": [{**shards[0], "samples": 10**15}, *shards[1:]]}, "do not add up"),
        ({"shards": [{**shards[0], "size": "4"}, *shards[1:]]}, "named or counted"),
        ({"probes": []}, "hashes, substitutes or probes"),
        ({"keys_sha256": "0" * 64}, "keys.txt was changed"),
    ):
        text = change if isinstance(change, str) else json.dumps({**manifest, **change} if change else change)
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FeatureCacheError, match=message):
            reopen(views)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("place", [0, -1, 20_000 % 997])
def test_a_changed_byte_is_never_trained_on_and_writing_again_mends_it(write, reopen, views, tmp_path, name, place):
    write(views)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damaged = bytearray(whole[name])
    damaged[place] ^= 1
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(FeatureCacheError, match=rf"{name} is missing or cut short, or was changed"):
        reopen(views)
    said: list[str] = []
    write(views, say=said.append)
    assert f"{tmp_path / name} is damaged and is made anew" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    reopen(views)


def test_each_process_checks_its_share_of_the_files(write, views, vae, conditioner, images, tmp_path):
    write(views)
    shard = tmp_path / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    recipe = Recipe.of(vae, conditioner, views, VIEWS)
    open_feature_cache(tmp_path, recipe, images, share=(0, 2))
    with pytest.raises(FeatureCacheError, match=SHARDS[1]):
        open_feature_cache(tmp_path, recipe, images, share=(1, 2))


def test_keys_that_were_edited_are_noticed(write, reopen, views, tmp_path):
    write(views)
    keys = (tmp_path / "keys.txt").read_text().splitlines()
    for text in ("\n".join([keys[1], keys[0], *keys[2:], ""]), "", "\xff"):
        (tmp_path / "keys.txt").write_bytes(text.encode("latin-1"))
        with pytest.raises(FeatureCacheError, match=r"keys\.txt"):
            reopen(views)


def test_kills_at_every_rename_and_unlink_of_writing_change_no_byte(write, views, tmp_path):
    write(views, tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    place, number = tmp_path / "cut", -1
    place.mkdir()
    for number in kills(lambda: write(views, place)):
        write(views, place)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == whole, number
        shutil.rmtree(place)
        place.mkdir()
    assert number >= len(SHARDS)


def test_part_of_the_samples_in_their_own_order(write, reopen, views, images):
    write(views)
    part = images.select(["008", "001", "010"])
    some, everything = reopen(views, part), reopen(views)
    for index, key in enumerate(part.keys):
        one = some[Slot(0, 2, index)]
        other = everything[Slot(0, 2, images.keys.index(key))]
        assert one["key"] == other["key"] == [key]
        assert all(torch.equal(a, b) for a, b in zip(one["features"], other["features"], strict=True))


def test_unreadable_images_are_noted_and_no_sample_of_another_set_stands_in(write, reopen, tmp_path):
    mixed, cache = tmp_path / "mixed", tmp_path / "cache"
    cache.mkdir()
    scripts.image_folder(mixed, COUNT, size=40)
    (mixed / "004.png").write_bytes(b"damaged")
    images = open_images(mixed, Preprocessing(32), max_unreadable=0.5)
    views = TrainingViews(images, None)
    manifest = write(views, cache)
    noted = {key: used for shard in manifest["shards"] for key, used in shard["substitutes"].items()}
    assert list(noted) == ["004"]
    part = images.select([key for key in images.keys if key != noted["004"]])
    place = part.keys.index("004")
    shown = part[place]["key"]
    assert shown not in ("004", noted["004"])
    opened = reopen(views, part, cache)
    one, other = opened[Slot(0, 0, place)], opened[Slot(0, 0, part.keys.index(shown))]
    assert all(torch.equal(a, b) for a, b in zip(one["features"], other["features"], strict=True))


def test_values_that_cannot_be_stored(vae, write, images):
    views = TrainingViews(images, None)
    factor = vae.config["scaling_factor"]
    try:
        vae.register_to_config(scaling_factor=1e8)
        with pytest.raises(FeatureCacheError, match=r"does not fit into torch\.float16: store float32"):
            write(views, dtype=torch.float16)
        vae.register_to_config(scaling_factor=float("nan"))
        with pytest.raises(ValueError, match="The features of 000 are not finite"):
            write(views)
    finally:
        vae.register_to_config(scaling_factor=factor)


def test_samples_of_one_name_are_refused(write, images):
    images.store.keys[1] = images.store.keys[0]
    with pytest.raises(ValueError, match="1 samples have the key of another one"):
        write(TrainingViews(images, None))


def test_reading_takes_no_memory_of_its_own_and_travels_to_spawned_workers(write, reopen, views):
    write(views)
    opened = reopen(views)
    before = opened.__getitems__(slots())
    sent = pickle.dumps(opened.shards)
    assert len(sent) < 1000  # paths, no tensors
    opened.shards = pickle.loads(sent)
    after = opened.__getitems__(slots())
    assert all(torch.equal(a, b) for a, b in zip(before["features"], after["features"], strict=True))
    address, maps = opened.shards[0].mean.data_ptr(), Path("/proc/self/maps").read_text()
    assert any(SHARDS[0] in line and _covers(line, address) for line in maps.splitlines())


def _covers(line: str, address: int) -> bool:
    start, _, end = line.split()[0].partition("-")
    return int(start, 16) <= address < int(end, 16)
