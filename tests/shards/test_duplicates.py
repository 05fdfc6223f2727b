import itertools

import numpy as np
import pytest
from PIL import Image

from diffusers_dino.data.sharding.duplicates import (
    MAX_DISTANCE,
    Duplicates,
    find_duplicates,
    near_pairs,
    perceptual_hash,
    pixel_digest,
)
from shard_runs import picture


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def flip(row: np.ndarray, bits: np.ndarray) -> np.ndarray:
    changed = np.unpackbits(row)
    changed[bits] ^= 1
    return np.packbits(changed)


def brute_force(hashes: np.ndarray, limit: int) -> dict[tuple[int, int], int]:
    bits = np.unpackbits(hashes, axis=1)
    pairs = itertools.combinations(range(len(hashes)), 2)
    distances = {(i, j): int((bits[i] != bits[j]).sum()) for i, j in pairs}
    return {pair: distance for pair, distance in distances.items() if distance <= limit}


@pytest.mark.parametrize("limit", [0, 4, MAX_DISTANCE])
def test_near_pairs_are_those_of_brute_force(limit):
    rng = np.random.default_rng(1)
    hashes = list(random_hashes(60))
    for source in range(30):  # differing bits anywhere: none may hide from the bands
        for distance in (1, 4, 5, MAX_DISTANCE, MAX_DISTANCE + 1):
            hashes.append(flip(hashes[source], rng.choice(256, distance, replace=False)))
    hashes = np.stack(hashes)[rng.permutation(210)]
    pairs, distance = near_pairs(hashes, limit)
    expected = brute_force(hashes, limit)
    assert {tuple(pair): d for pair, d in zip(pairs.tolist(), distance.tolist(), strict=True)} == expected
    assert len(expected) > (30 if limit else -1)


def test_the_worst_spread_of_bits_is_found():
    """One differing bit in each of 15 bands, whichever they are, leaves one band equal."""
    one = random_hashes(1)[0]
    for spared in range(16):
        other = flip(one, np.delete(16 * np.arange(16), spared))  # the first bit of row b is in band b
        pairs, distance = near_pairs(np.stack([one, other]), MAX_DISTANCE)
        assert pairs.tolist() == [[0, 1]]
        assert distance.tolist() == [15]


def test_many_equal_hashes_take_one_pair_each():
    hashes = np.concatenate([np.zeros((5000, 32), np.uint8), random_hashes(10)])
    pairs, distance = near_pairs(hashes, MAX_DISTANCE)
    assert pairs.tolist() == [[0, number] for number in range(1, 5000)]
    assert not distance.any()
    assert near_pairs(hashes[:0], 3)[0].shape == (0, 2)


@pytest.mark.parametrize("limit", [-1, MAX_DISTANCE + 1])
def test_a_distance_that_would_miss_pairs_is_refused(limit):
    with pytest.raises(ValueError, match=rf"\[0, 15\] bits, got {limit}"):
        near_pairs(random_hashes(2), limit)


def test_equal_images_are_exact_and_paired_with_the_first():
    digests = ["b", "a", "b", "c", "b"]
    hashes = random_hashes(5)
    hashes[2] = hashes[4] = hashes[0]
    hashes[3] = flip(hashes[1], np.arange(3))
    found = find_duplicates(digests, hashes)
    assert found.pairs.tolist() == [[0, 2], [0, 4], [1, 3]]
    assert found.distance.tolist() == [-1, -1, 3]
    assert found.exact.tolist() == [True, True, False]


def test_copies_are_left_out_and_the_first_stays():
    # 0 = 2 (exact), 0 ~ 1, 1 ~ 3 but not 0 ~ 3, 4 alone, 3 = 5 (exact).
    pairs = np.array([[0, 1], [0, 2], [1, 3], [3, 5]])
    found = Duplicates(pairs, np.array([2, -1, 7, -1]))
    assert found.copies() == {2, 5}
    assert found.copies(near=True) == {1, 2, 5}


def test_of_two_with_one_hash_both_are_copies_of_a_third():
    hashes = random_hashes(3)
    hashes[1] = hashes[2] = flip(hashes[0], np.arange(3))
    assert find_duplicates(["a", "b", "c"], hashes).copies(near=True) == {1, 2}


def test_digest_sees_shape_type_and_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    others = [image.reshape(4, 3), image.astype(np.uint16), image + 1]
    assert len({pixel_digest(other) for other in [image, *others]}) == 4
    assert pixel_digest(image.T.copy().T) == pixel_digest(image)


def test_saving_again_keeps_the_hash_and_another_picture_does_not():
    image = picture(0, 128)
    smaller = np.asarray(Image.fromarray(image).resize((61, 61)))
    brighter = (255 * (image / 255) ** 0.9).astype(np.uint8)
    colour = np.stack([image] * 3, axis=2)
    same = np.frombuffer(b"".join(map(perceptual_hash, (image, smaller, brighter, colour))), np.uint8).reshape(-1, 32)
    assert (np.unpackbits(same ^ same[:1], axis=1).sum(axis=1) <= MAX_DISTANCE).all()
    other = np.frombuffer(perceptual_hash(picture(1, 128)), np.uint8)
    assert np.unpackbits(same[0] ^ other).sum() > 3 * MAX_DISTANCE
