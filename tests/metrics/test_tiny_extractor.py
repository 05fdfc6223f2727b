"""The bundled encoder: that it is the one that was trained, and tells apart what it should."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffusers_dino.data import Preprocessing, open_images
from diffusers_dino.metrics import frechet_distance, open_extractor

DATA = Path(__file__).parents[2] / "examples" / "data"
PHANTOMS = DATA / "phantom-cxr"
NIH = Path(__file__).parents[3] / "shared" / "cxr" / "nih"


def load(source: Path | str, count: int) -> Tensor:
    """Gray images `(count, 1, 128, 128)`."""
    images = open_images(source, Preprocessing(128))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return torch.stack([images[i]["image"].mean(dim=0, keepdim=True) for i in order])


@pytest.fixture(scope="module")
def phantoms() -> Tensor:
    return load(f"{PHANTOMS}/phantom-cxr-test-*.tar", 64)


def noisy(images: Tensor, amount: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + amount * noise).clamp(0, 1)


def near_copies(images: Tensor) -> dict[str, Tensor]:
    return {
        "slightly blurred": gaussian_blur(images, 5, 0.8),
        "slightly noisy": noisy(images, 0.02),
        "moved": torch.nn.functional.pad(images, (3, 0, 0, 0), mode="replicate")[..., :128],
        "exposed": (1.1 * (images - 0.5) + 0.53).clamp(0, 1),
    }


def found(images: Tensor, copies: Tensor) -> float:
    """Share of copies whose nearest image is their own."""
    extractor = open_extractor("tiny")
    nearest = torch.cdist(extractor(copies), extractor(images)).argmin(dim=1)
    return (nearest == torch.arange(len(images))).double().mean().item()


def test_what_is_not_its_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        open_extractor("tiny", tmp_path / "missing")
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"first.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="does not hold the weights of the extractor tiny"):
            open_extractor("tiny", tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("kind", ["slightly blurred", "slightly noisy", "moved", "exposed"])
def test_near_copies_of_phantoms_find_their_originals(phantoms, kind):
    assert found(phantoms, near_copies(phantoms)[kind]) >= 0.9


def distance_ratios(images: Tensor, others: dict[str, Tensor]) -> dict[str, float]:
    """Fréchet distance of other images to one half, over that of the other half."""
    extractor = open_extractor("tiny")
    half = len(images) // 2
    first, control = extractor(images[:half]), frechet_distance(extractor(images[half:]), extractor(images[:half]))
    return {kind: frechet_distance(extractor(bad[half:]), first) / control for kind, bad in others.items()}


def static(images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(2))


def test_frechet_tells_phantoms_from_static_and_from_few_images(phantoms):
    repeated = phantoms[torch.arange(len(phantoms)) // 8 * 8]
    ratios = distance_ratios(phantoms, {"static": static(phantoms), "repeated": repeated})
    assert ratios["static"] > 3
    assert ratios["repeated"] > 1.4


@pytest.mark.cxr
@pytest.mark.skipif(not NIH.is_dir(), reason="../shared/cxr/nih is missing")
def test_it_is_of_use_on_radiographs_that_it_has_not_seen():
    images = load(NIH, 200)
    for kind, copies in near_copies(images).items():
        assert found(images, copies) >= 0.95, kind
    damages = {"static": static(images), "mixed": (images + images.roll(1, dims=0)) / 2, "noisy": noisy(images, 0.1)}
    damages["blurred"] = gaussian_blur(images, 13, 2.0)
    ratios = distance_ratios(images, damages)
    assert ratios["static"] > 8
    assert ratios["mixed"] > 1.3
    assert ratios["noisy"] > 1.1
    assert ratios["blurred"] > 1.1
