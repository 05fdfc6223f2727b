import json
import math

import pytest
import torch
from accelerate import Accelerator

import tiny
from checkpoints import save_transformers
from diffusers_dino.cli.record import told_settings
from diffusers_dino.training.models import adapt_for_training
from diffusers_dino.training.optim import make_adamw
from diffusers_dino.training.state import TrainingState
from diffusers_dino.training.validation import (
    FeatureMetric,
    Validator,
    generate_for_validation,
    measure,
    open_metric,
)
from train_dino import Arguments


@pytest.fixture
def state(pipe) -> TrainingState:
    accelerator = Accelerator(cpu=True)
    optimizer = make_adamw(adapt_for_training(pipe, accelerator.device), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return TrainingState(accelerator, pipe.unet, optimizer, schedule, ema_decay=0.5)


@pytest.fixture
def dataset() -> list[dict]:
    return [{"key": str(i), "image": image} for i, image in enumerate(tiny.random_images(5, channels=1))]


def test_variations_depend_on_seed_and_index_alone(pipe):
    sources = tiny.random_images(3, channels=1)
    options = {"num_variations": 2, "num_inference_steps": 2, "guidance_scale": 2.0}
    together = generate_for_validation(pipe, sources, [4, 5, 6], batch_size=16, **options)
    assert together.shape == (3, 2, 1, 32, 32)
    one_by_one = generate_for_validation(pipe, sources[1:], [5, 6], batch_size=1, **options)
    torch.testing.assert_close(together[1:], one_by_one, atol=1e-4, rtol=0)
    assert not torch.allclose(together[0, 0], together[0, 1])
    assert not torch.allclose(together, generate_for_validation(pipe, sources, [4, 5, 6], seed=1, **options))


def test_distance_of_the_generated_to_the_real(pipe, dataset):
    accelerator = Accelerator(cpu=True)
    real = [sample["image"] for sample in dataset]
    value = measure(open_metric(), pipe, real, accelerator, num_inference_steps=1, guidance_scale=1.0)
    assert 0 < value < math.inf
    broken = FeatureMetric("broken", lambda images: images.flatten(1) * math.nan, lambda a, b: 0.0)
    assert math.isnan(measure(broken, pipe, real, accelerator, num_inference_steps=1, guidance_scale=1.0))


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
@pytest.mark.filterwarnings("ignore:The Fréchet distance")
def test_any_distance_in_the_space_of_any_extractor(pipe, dataset, distance):
    metric = open_metric(distance, "pixels")
    assert (metric.name, metric.spec.extractor) == (f"{distance}_pixels", "pixels")
    real = [sample["image"] for sample in dataset]
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    values = [measure(metric, pipe, real, Accelerator(cpu=True), batch, **options) for batch in (16, 2)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)  # whatever the batch
    with pytest.raises(ValueError, match="one of frechet, kernel, not 'fid'"):
        open_metric("fid")
    with pytest.raises(ValueError, match="no feature extractor 'vgg'"):
        open_metric(distance, "vgg")


def test_a_metric_is_not_called_by_its_folder(tmp_path):
    folder = save_transformers(tiny.tiny_encoder(), tmp_path / "alice" / "features")
    metric = open_metric("kernel", str(folder))
    assert metric.name == f"kernel_{metric.spec.extractor}" == "kernel_dinov2_with_registers"
    args = Arguments(train_data_dir=str(tmp_path), metric_features=str(folder))
    assert told_settings(args)["metric_features"] == "features"


@pytest.fixture
def make_validator(pipe, state, dataset, tmp_path):
    def make(metric: FeatureMetric | None = None, num_metric_images: int = 3, **options) -> Validator:
        options = {"num_metric_images": num_metric_images, "num_inference_steps": 1, **options}
        return Validator(pipe, state, tmp_path, dataset, metric=metric or open_metric(), **options)

    return make


def test_a_best_value_of_other_features_is_not_compared(make_validator, tmp_path):
    other = FeatureMetric("frechet_pixels", lambda images: images.flatten(1), lambda generated, real: -1.0)
    for metric, expected in ((other, None), (open_metric(), "pixels")):
        validator = make_validator(metric=metric, grid_steps=0, metric_steps=1)
        validator.run(1, lambda message: None)
        features = json.loads((tmp_path / "best" / "metric.json").read_text())["features"]
        assert (features and features["extractor"]) == expected


def test_a_best_value_on_other_images_is_not_compared(make_validator, dataset, tmp_path):
    values = iter([1.0, 9.0, 8.0, 7.0])
    metric = FeatureMetric("given", lambda images: images.flatten(1), lambda generated, real: next(values))
    kept = []
    for step, num_images in enumerate((3, 3, 4, 4)):
        if step == 3:
            dataset.reverse()
        validator = make_validator(metric=metric, grid_steps=0, metric_steps=1, num_metric_images=num_images)
        validator.run(step, lambda message: None)
        kept.append(json.loads((tmp_path / "best" / "metric.json").read_text())["value"])
    assert kept == [1, 1, 8, 7]


def test_lowest_value_is_kept(make_validator, tmp_path):
    values = iter([3.0, 5.0, math.nan, 2.0])
    metric = FeatureMetric("given", lambda images: images.flatten(1), lambda generated, real: next(values))
    validator = make_validator(metric=metric, grid_steps=0, metric_steps=10, num_metric_images=4)
    said = []
    kept = []
    for step in (5, 10, 20, 30, 40):
        validator.run(step, said.append)
        file = tmp_path / "best" / "metric.json"
        kept.append(json.loads(file.read_text())["step"] if file.exists() else None)
    assert kept == [None, 10, 10, 10, 40]
    assert len(said) == 4
    assert "3 (4 images; the best so far" in said[0]
    assert "best so far 3" in said[1]


def test_looking_leaves_weights_and_mode_as_they_were(pipe, state, make_validator, tmp_path):
    with torch.no_grad():
        for parameter in state.trainable.values():
            parameter.add_(0.1)
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    validator = make_validator(grid_steps=1, num_sources=2, num_variations=1, metric_steps=1)
    pipe.unet.train()
    validator.run(1, lambda message: None)
    assert all(torch.equal(before[name], p) for name, p in state.trainable.items())
    assert pipe.unet.training
    assert (tmp_path / "validation" / "0000001.png").is_file()


def test_averaged_weights_are_in_place_inside_also_when_nested(state):
    with torch.no_grad():
        for parameter in state.trainable.values():
            parameter.add_(1.0)
    name = "conv_in.bias"
    raw = state.trainable[name].detach().clone()
    with state.averaged_weights():
        with state.averaged_weights():
            inner = state.trainable[name].detach().clone()
        assert torch.equal(inner, state.trainable[name])
        torch.testing.assert_close(inner, raw - 1)
    assert torch.equal(state.trainable[name], raw)
