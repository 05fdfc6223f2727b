"""Images with masks: folders, shards and records, one geometry, and each thing that can be wrong with a mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dino.data import Preprocessing, UnreadableImageError, read_image
from diffusers_dino.data.images.encoding import Encoding
from diffusers_dino.data.sharding.parts import Item, prepare
from diffusers_dino.data.sources import Record
from diffusers_dino.data.sources.masks import open_masked_images, to_mask
from shard_files import write_prepared

PHANTOMS = "examples/data/phantom-cxr/phantom-cxr-test-000000.tar"


def save(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def disc(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y - height / 3) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 5) ** 2) * 255


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", disc(60, 80) // 2 + 20)
    save(tmp_path / "masks" / "a.png", disc(60, 80))
    save(tmp_path / "masks" / "b_mask.png", disc(60, 80) // 255)
    return tmp_path


def test_a_mask_lies_where_its_image_shows_the_structure(folder):
    images = open_masked_images(folder, size=32, mask_size=32)
    assert images.keys == images.patients == ["a", "b"]
    for other in ("a.txt", "b_mask.xml", ".a.png"):  # beside the masks
        (folder / "masks" / other).write_text("notes")
    images = open_masked_images(folder, size=32, mask_size=32)
    for sample in images:
        assert sample.image.shape == (1, 32, 32)
        assert sample.mask.dtype == torch.bool
        bright = sample.image[0] > sample.image.mean() * 1.5
        assert (bright == sample.mask).float().mean() > 0.98
    assert images.resized(16).image(0).shape == (1, 16, 16)
    assert len(open_masked_images(folder, 32, max_samples=1)) == 1


def test_companions_and_shards_hold_masks_too(tmp_path):
    save(tmp_path / "x.png", disc(40, 40))
    save(tmp_path / "x.mask.png", disc(40, 40))
    assert open_masked_images(tmp_path, 16, 16)[0].mask.any()
    phantom = open_masked_images(PHANTOMS, 32, 64)[0]
    assert phantom.image.shape[-1] == 32
    assert 0.05 < phantom.mask.float().mean() < 0.6


def test_masks_of_records_are_united_and_may_be_of_half_the_size(tmp_path):
    image, left, right = np.zeros((40, 40)), np.zeros((40, 40)), np.zeros((40, 40))
    left[5:30, 22:35] = right[5:30, 5:18] = 255
    for name, array in (("image", image), ("left", left), ("right", right)):
        save(tmp_path / f"{name}.png", array)
    masks = (tmp_path / "left.png", tmp_path / "right.png")
    record = Record("montgomery", tmp_path / "image.png", "MCU_1", patient="7", masks=masks)
    without = Record("montgomery", tmp_path / "image.png", "MCU_2", patient="8")
    images = open_masked_images([record, without], 40, 40)
    assert images.keys == ["MCU_1"]
    assert images.patients == ["7"]
    assert torch.equal(images.mask(0), torch.from_numpy(left + right > 0))
    save(tmp_path / "left.png", disc(20, 20))
    half = Record("jsrt", tmp_path / "image.png", "JPCLN001", patient="1", masks=masks[:1])
    assert open_masked_images([half], 20, 20).mask(0).any()


def test_borders_are_cut_off_image_and_mask_alike(tmp_path):
    scan = (np.indices((60, 80)).sum(0) % 7 + 20) + disc(60, 80) // 2
    for name, pad in (("plain", (0, 0)), ("framed", (10, 24))):
        padding = (pad, (6, 30) if name == "framed" else (0, 0))
        save(tmp_path / f"{name}.png", np.pad(scan, padding))
        save(tmp_path / f"{name}.mask.png", np.pad(disc(60, 80), padding))
    removed = open_masked_images(tmp_path, 60, 60, preprocessing=Preprocessing())
    plain = open_masked_images(tmp_path, 60, 60)
    framed, whole = (removed.keys.index(name) for name in ("framed", "plain"))
    assert torch.equal(removed.image(framed), plain.image(whole))
    assert torch.equal(removed.mask(framed), plain.mask(whole))
    assert not torch.equal(plain.mask(framed), plain.mask(whole))
    save(tmp_path / "half.png", np.pad(disc(60, 80), ((10, 24), (6, 30)))[::2, ::2])
    half = Record("jsrt", tmp_path / "framed.png", "JPCLN001", patient="1", masks=(tmp_path / "half.png",))
    smaller = open_masked_images([half], 60, 60, preprocessing=Preprocessing()).mask(0)
    assert (smaller == plain.mask(whole)).float().mean() > 0.98
    kept = removed.resized(30).select(["framed"])
    assert kept.preprocessing == Preprocessing(30)


def test_prepared_shards_lose_nothing_of_image_and_mask_a_second_time(tmp_path):
    image, lungs = np.random.default_rng(0).integers(0, 256, (40, 80), np.uint8), disc(40, 40) > 0
    image[:, 20:28] = 255  # a band at the side of the square that is kept
    shards = write_prepared(tmp_path, {"a": image}, Preprocessing(40), a=lungs)
    sample = open_masked_images(shards, 20, 40, preprocessing=Preprocessing())[0]
    assert torch.equal(sample.mask, torch.from_numpy(lungs))
    expected = Preprocessing(20, remove_borders=False)(image[:, 20:60])
    assert np.array_equal(sample.image[0].mul(255).round().byte(), expected)


def test_shards_and_evaluation_take_the_same_masks(tmp_path):
    save(tmp_path / "image.png", np.random.default_rng(0).integers(0, 256, (32, 32)))
    record = Record("own", tmp_path / "image.png", "image", patient="1", masks=(tmp_path / "mask.png",))
    for mask, message in (
        (np.where(disc(32, 32), 255, 200), None),
        (np.where(disc(16, 16), 7, 3), None),
        (disc(24, 24), None),
        (np.arange(32 * 32).reshape(32, 32) % 200, "this one has 200"),
        (np.full((32, 32), 9), "its only value is 9"),
        (disc(24, 32), "is 32 x 24 pixels, but its image is 32 x 32"),
    ):
        save(tmp_path / "mask.png", mask)
        item = Item("key", "patient", record)
        if message is None:
            stored = read_image(prepare(item, Encoding(Preprocessing(32)), "a salt of 16 bytes")[1]["mask.png"]) > 0
            assert torch.equal(open_masked_images([record], 32, 32).mask(0), torch.from_numpy(stored))
            assert 0 < stored.mean() < 0.5
        else:
            with pytest.raises(UnreadableImageError, match=message):
                open_masked_images([record], 32).mask(0)
            with pytest.raises(UnreadableImageError, match=f"its mask.*{message}"):
                prepare(item, Encoding(Preprocessing(32)), "a salt of 16 bytes")


def test_a_missing_mask_is_named(folder, tmp_path):
    (folder / "masks" / "b_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png has no mask: expected .*masks/b\.png or .*b_mask\.png"):
        open_masked_images(folder, 32)
    (folder / "masks").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*masks of masks"):
        open_masked_images(folder, 32)
    with pytest.raises(FileNotFoundError, match=r"a\.png has no mask: expected KEY\.mask\.png beside it"):
        open_masked_images(folder / "images", 32)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        open_masked_images("nowhere", 32)
    record = Record("jsrt", folder / "images" / "a.png", "a", patient="a", masks=(folder / "gone.png",))
    with pytest.raises(FileNotFoundError, match=r"1 masks are missing, such as .*gone\.png"):
        open_masked_images([record], 32)
    with pytest.raises(ValueError, match="None of the records has a mask"):
        open_masked_images([], 32)


def test_a_mask_of_another_size_is_refused(folder):
    save(folder / "masks" / "a.png", disc(80, 60))
    with pytest.raises(ValueError, match=r"a\.png is 60 x 80 pixels, but its image is 80 x 60"):
        open_masked_images(folder, 32)[0]
    save(folder / "masks" / "a.png", disc(30, 40))  # only a provider's data set may have masks of half the size
    with pytest.raises(ValueError, match="its image is 80 x 60"):
        open_masked_images(folder, 32).mask(0)


def test_a_mask_with_more_than_two_values_is_refused(folder):
    Image.fromarray(disc(60, 80).astype(np.uint8)).save(folder / "masks" / "a.jpg", quality=50)
    (folder / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.jpg: a mask has two values, this one has \d+"):
        open_masked_images(folder, 32)[0]


def test_the_two_values_may_be_any():
    expected = torch.tensor([[False, True], [True, False]])
    for low, high in ((0, 1), (0, 255), (3, 7), (-1.0, 0.5)):
        assert torch.equal(to_mask(np.where(expected, high, low)), expected)
    assert torch.equal(to_mask(expected), expected)
    assert not to_mask(np.zeros((2, 2))).any()
    assert to_mask(np.full((2, 2), 255)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(4).reshape(2, 2), "this one has 4"),
        (np.full((2, 2), 9), "its only value is 9"),
        (np.zeros(4), r"a mask is \(H, W\)"),
        (np.zeros((0, 4)), r"a mask is \(H, W\)"),
        (np.array([[0.0, np.nan], [0.0, 0.0]]), "not finite"),
    ],
)
def test_other_arrays_are_no_masks(values, message):
    with pytest.raises(ValueError, match=message):
        to_mask(values)
