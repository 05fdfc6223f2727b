"""The baselines on real radiographs: what any model of lungs has to be compared with."""

from pathlib import Path

import pytest
import torch

from diffusers_dino.data.sources.masks import open_masked_images
from diffusers_dino.evaluation.segmentation.baselines import mean_mask_of_others, otsu_mask
from diffusers_dino.metrics.dice import dice

LUNGMASK = Path(__file__).parents[3] / "shared" / "cxr" / "lungmask"


@pytest.mark.cxr
@pytest.mark.skipif(not LUNGMASK.is_dir(), reason="../shared/cxr/lungmask is missing")
def test_baselines_of_lungmask():
    images = open_masked_images(LUNGMASK, 256, 256)
    samples = list(images)
    masks = torch.stack([sample.mask for sample in samples])
    assert len(masks) == 38
    otsu = torch.stack([otsu_mask(sample.image.mean(dim=0)) for sample in samples])
    figures = {"ones": torch.ones_like(masks), "otsu": otsu, "mean": mean_mask_of_others(masks, images.patients)}
    found = {name: dice(prediction, masks).mean().item() for name, prediction in figures.items()}
    assert found == pytest.approx({"ones": 0.611, "otsu": 0.695, "mean": 0.832}, abs=2e-3)
