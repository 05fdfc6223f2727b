"""Clusters over a data set, cuts of one image, and which of their segments are lungs: on features made for it."""

import pytest
import torch

import tiny
from diffusers_dino.diffseg import (
    FeatureClusters,
    centered,
    cut_features,
    feature_affinity,
    fit_clusters,
    lung_prior,
    mean_maps,
    name_lung_clusters,
    recursive_cut,
    stack_features,
    walk_affinity,
)

SIDE, WIDTH, COUNT = 16, 12, 10


def structures() -> torch.Tensor:
    """`(COUNT, SIDE, SIDE)`: lungs (1) that move a little from image to image, a bright middle (2), the rest (0)."""
    lungs = lung_prior(SIDE)
    images = torch.stack([lungs.roll(i % 3 - 1, 0) for i in range(COUNT)]).long()
    images[:, 2:14, 7:9] = 2
    return images


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """A vector for each structure, an offset for each image, noise."""
    vectors = tiny.gaussian(3, WIDTH, seed=1, dtype=torch.float32)
    clean = vectors[structures()].permute(0, 3, 1, 2)
    offset = 5 * tiny.gaussian(COUNT, WIDTH, 1, 1, seed=2, dtype=torch.float32)
    return clean + offset + 0.2 * tiny.gaussian(*clean.shape, seed=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def clusters(features) -> FeatureClusters:
    return fit_clusters(features.split(4), (2, 3, 6), settings={"features": ["encoder"]})


def test_the_most_stable_number_of_clusters_is_that_of_the_structures(clusters):
    assert len(clusters) == 3
    assert set(clusters.stability) == {2, 3, 6}
    assert clusters.stability[3] == max(clusters.stability.values()) > 0.95


def test_a_cluster_is_the_same_structure_in_every_image(clusters, features):
    likely = clusters.assign(features)
    assert likely.shape == (COUNT, 3, SIDE, SIDE)
    assert torch.allclose(likely.sum(1), torch.ones(COUNT, SIDE, SIDE), atol=1e-5)
    found, true = likely.argmax(1), structures()
    for structure in range(3):
        numbers, counts = found[true == structure].unique(return_counts=True)
        assert counts.max() > 0.95 * counts.sum(), numbers


def test_lungs_are_the_dark_clusters_inside_the_ellipses(clusters, features):
    found, true = clusters.assign(features).argmax(1), structures()
    gray = torch.tensor([0.5, 0.2, 0.9])[true]
    gray = torch.nn.functional.interpolate(gray[:, None], scale_factor=3)[:, 0]
    lungs = name_lung_clusters(found, gray)
    assert (torch.isin(found, torch.tensor(lungs)) == (true == 1)).float().mean() > 0.95
    assert name_lung_clusters(found, 1 - gray) != lungs
    with pytest.raises(ValueError, match="Expected segments"):
        name_lung_clusters(found, gray[0])


def test_clusters_are_saved_whole(clusters, features, tmp_path):
    named = clusters.named("lungs", [1])
    named.save(tmp_path / "clusters.safetensors")
    loaded = FeatureClusters.load(tmp_path / "clusters.safetensors")
    assert torch.equal(loaded.assign(features), clusters.assign(features))
    assert (loaded.names, loaded.settings, loaded.stability) == (
        {"lungs": (1,)},
        clusters.settings,
        clusters.stability,
    )
    assert fit_clusters(features.split(4), 3).stability == {}


def test_a_damaged_file_is_refused(clusters, tmp_path):
    path = tmp_path / "clusters.safetensors"
    clusters.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is not a file of clusters, or is damaged"):
        FeatureClusters.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureClusters.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 1}, "two clusters or more"),
        ({"num_clusters": []}, "two clusters or more"),
        ({"features": [torch.zeros(1, 3, 4, 4)]}, "two images or more"),
        ({"features": [torch.full((2, 3, 4, 4), float("nan"))]}, "not finite"),
        ({"features": [torch.rand(2, 3, 2, 2)], "num_clusters": 9}, "too few for 9 clusters"),
    ],
)
def test_what_cannot_be_clustered(features, change, message):
    with pytest.raises(ValueError, match=message):
        fit_clusters(**{"features": [features], "num_clusters": 3, **change})


def test_features_of_another_model_or_numbers_of_no_cluster(clusters):
    with pytest.raises(ValueError, match="fitted with another model"):
        clusters.assign(torch.zeros(1, WIDTH + 1, 4, 4))
    with pytest.raises(ValueError, match="clusters are 0 to 2"):
        clusters.named("lungs", [3])


def test_equal_images_have_one_cluster_each_way():
    """Constant features say nothing, and are no reason to fail."""
    clusters = fit_clusters([torch.ones(3, WIDTH, 4, 4)], 2)
    assert torch.isfinite(clusters.assign(torch.ones(1, WIDTH, 4, 4))).all()


def test_a_cut_finds_the_structures_of_one_image(features):
    maps = cut_features(features[0], 0.5)
    found, true = maps.argmax(0), structures()[0]
    assert len(maps) == 3
    for structure in range(3):
        counts = found[true == structure].bincount()
        assert counts.max() > 0.95 * counts.sum()


def test_the_cut_is_the_cheapest_of_all():
    """Of four patches in two pairs, against every division into two."""
    affinity = torch.tensor([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.2, 0.1], [0.1, 0.2, 1, 0.8], [0.2, 0.1, 0.8, 1]])
    costs = {}
    for mask in range(1, 7):
        first = torch.tensor([bool(mask >> i & 1) for i in range(4)])
        between = affinity[first][:, ~first].sum()
        costs[tuple(first.tolist())] = float(between / affinity[first].sum() + between / affinity[~first].sum())
    cheapest = min(costs.values())
    assert recursive_cut(affinity, cheapest - 1e-3).tolist() == [0, 0, 0, 0]
    assert len(recursive_cut(affinity, cheapest + 1e-3).unique()) == 2
    segments = recursive_cut(affinity, cheapest + 1e-3)
    assert segments[0] == segments[1] != segments[2] == segments[3]
    assert len(recursive_cut(affinity, 2.0).unique()) == 4


def test_a_walk_makes_affinities_of_attention():
    rows = tiny.gaussian(16, 16, dtype=torch.float32).softmax(1)
    affinity = walk_affinity(rows.view(16, 4, 4), 3)
    cube = rows @ rows @ rows
    assert torch.allclose(affinity, (cube + cube.T) / 2, atol=1e-6)
    maps = mean_maps(rows.view(16, 4, 4), recursive_cut(affinity, 1.0))
    assert torch.allclose(maps.sum((1, 2)), torch.ones(len(maps)), atol=1e-5)


def test_affinities_are_powers_of_cosines(features):
    unit = torch.nn.functional.normalize(centered(features[:1])[0].flatten(1), dim=0)
    assert torch.allclose(feature_affinity(features[0], 3), (unit.T @ unit).clamp(0, 1) ** 3, atol=1e-6)


@pytest.mark.parametrize("threshold", [0, -1, 2.1, float("nan")])
def test_thresholds_of_cuts(threshold):
    with pytest.raises(ValueError, match="threshold of a cut"):
        recursive_cut(torch.ones(4, 4), threshold)
    with pytest.raises(ValueError, match="affinities"):
        recursive_cut(torch.ones(4, 3), 0.5)


def test_sources_weigh_alike_side_by_side(features):
    stacked = stack_features([features, 100 * features[:, :5, ::2, ::2]])
    assert stacked.shape == (COUNT, WIDTH + 5, SIDE, SIDE)
    shares = stacked.square().sum(1).mean((1, 2))
    assert (shares < 2.01).all()
    assert torch.allclose(stacked[:, :WIDTH].square().sum(1).mean((1, 2)), torch.ones(COUNT), atol=1e-5)
