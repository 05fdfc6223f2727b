"""Each family of feature extractors against the library it stands for, on random weights; and bad weights."""

import hashlib
import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitImageProcessor, ViTConfig, ViTModel

import scripts
from diffusers_dino.metrics import FeatureExtractor, FeatureSpec, open_extractor, pixel_features
from diffusers_dino.metrics.extractors import inception, xrv
from diffusers_dino.metrics.extractors.files import checked_sha256
from diffusers_dino.metrics.extractors.xrv import convert_xrv_weights
from folders import Planted
from tiny import random_images, seeded, tiny_encoder

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spec(**changes):
    values = {"extractor": "mine", "layer": "last", "dim": 3, "input_size": 8, "pixel_range": "gray, [0, 1]"}
    return FeatureSpec(**{**values, "resize": "none", "weights_sha256": None, **changes})


@pytest.fixture(scope="module")
def xrv_model():
    models = pytest.importorskip("torchxrayvision").models
    with seeded(0):
        model = models.DenseNet(num_classes=18).eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.8, 1.5)
    return model


@pytest.fixture(scope="module")
def xrv_weights(xrv_model, tmp_path_factory):
    """The model as its authors published theirs, a pickle, and converted."""
    folder = tmp_path_factory.mktemp("xrv")
    torch.save(xrv_model, folder / "model.pt")
    convert_xrv_weights(folder / "model.pt", folder / "xrv.safetensors", sha256(folder / "model.pt"))
    return folder / "xrv.safetensors"


@pytest.mark.parametrize(("channels", "size"), [(1, 224), (1, 64), (3, 300)])
def test_xrv_is_features2_of_torchxrayvision(xrv_model, xrv_weights, channels, size):
    from torchxrayvision.utils import fix_resolution, normalize

    images = random_images(1, channels, size)
    gray = images.mean(dim=1, keepdim=True)
    with torch.no_grad():
        pixels = fix_resolution(torch.from_numpy(normalize((255 * gray).numpy(), 255)), 224, xrv_model)
        expected = xrv_model.features2(pixels)
    extractor = open_extractor("xrv", xrv_weights)
    resize, found = "bilinear, antialiased", sha256(xrv_weights)
    assert extractor.spec == FeatureSpec("xrv", "features2", 1024, 224, "gray, [-1024, 1024]", resize, found)
    features = extractor(images)
    assert features.shape == (1, 1024)
    assert expected.std() > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_command_converts_xrv_to_the_same_bytes_each_time(xrv_weights, tmp_path, capsys):
    pickled, again = xrv_weights.with_name("model.pt"), tmp_path / "xrv.safetensors"
    scripts.call_script("convert-xrv", weights=pickled, output=again, sha256=sha256(pickled))
    assert again.read_bytes() == xrv_weights.read_bytes()
    assert capsys.readouterr().out == f"{sha256(again)}  {again}\n"
    assert (tmp_path / "xrv.safetensors.sha256").read_text() == f"{sha256(again)}  xrv.safetensors\n"


def test_xrv_is_converted_from_a_state_dict_too(xrv_model, xrv_weights, tmp_path):
    torch.save(xrv_model.state_dict(), tmp_path / "state.pt")
    convert_xrv_weights(tmp_path / "state.pt", tmp_path / "xrv.safetensors", sha256(tmp_path / "state.pt"))
    expected, found = load_file(xrv_weights), load_file(tmp_path / "xrv.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_xrv_runs_no_code_of_a_pickle(tmp_path):
    pytest.importorskip("torchxrayvision")
    torch.save({"features.conv0.weight": Planted(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a model of torchxrayvision, or more than one"):
        convert_xrv_weights(tmp_path / "evil.pt", tmp_path / "xrv.safetensors", sha256(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_xrv_reads_the_published_file_even_if_torch_calls_it_unsafe(xrv_weights, tmp_path, monkeypatch):
    """Whole models as torch 1.5 pickled them need the full unpickler, which the published file's hash allows."""
    model = torch.load(xrv_weights.with_name("model.pt"), weights_only=False)
    for module in model.modules():
        del module._non_persistent_buffers_set
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a model of torchxrayvision"):
        convert_xrv_weights(tmp_path / "old.pt", tmp_path / "xrv.safetensors", sha256(tmp_path / "old.pt"))
    monkeypatch.setattr(xrv, "PUBLISHED_SHA256", sha256(tmp_path / "old.pt"))
    convert_xrv_weights(tmp_path / "old.pt", tmp_path / "xrv.safetensors")
    images = random_images(1, 1, 64)
    assert torch.equal(
        open_extractor("xrv", tmp_path / "xrv.safetensors")(images), open_extractor("xrv", xrv_weights)(images)
    )


def test_xrv_refuses_other_files_and_networks(xrv_weights, tmp_path):
    pickled = xrv_weights.with_name("model.pt")
    for message, expected in (("published densenet121-res224-all", None), ("asked for is 0000", "0" * 64)):
        with pytest.raises(ValueError, match=message):
            convert_xrv_weights(pickled, tmp_path / "xrv.safetensors", expected)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="convert_xrv"):
        open_extractor("xrv", pickled)
    torch.save({"features.conv0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another network"):
        convert_xrv_weights(tmp_path / "other.pt", tmp_path / "xrv.safetensors", sha256(tmp_path / "other.pt"))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another network"):
        open_extractor("xrv", tmp_path / "other.safetensors")


def test_changed_weights_are_refused(xrv_weights, tmp_path):
    copy = tmp_path / "xrv.safetensors"
    content = bytearray(xrv_weights.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        open_extractor("xrv", copy, sha256=sha256(xrv_weights))
    copy.with_name("xrv.safetensors.sha256").write_text(f"{sha256(xrv_weights)}  xrv.safetensors\n")
    with pytest.raises(ValueError, match=r"xrv\.safetensors\.sha256 says"):
        open_extractor("xrv", copy)
    copy.with_name("xrv.safetensors.sha256").unlink()
    copy.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged"):
        open_extractor("xrv", copy)


@pytest.mark.parametrize("name", ["xrv", "rad-dino", "dinov2", "inception", "timm/resnet10t"])
def test_nothing_is_downloaded(name, tmp_path):
    with pytest.raises(ValueError, match="nothing is downloaded"):
        open_extractor(name)
    with pytest.raises(FileNotFoundError, match="no weights"):
        open_extractor(name, tmp_path / "missing")


def write_checkpoint(folder, model, size):
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


@pytest.mark.parametrize("name", ["rad-dino", "dinov2"])
def test_dinov2_is_the_class_token_with_the_checkpoints_own_preprocessing(name, tmp_path):
    model = tiny_encoder()
    write_checkpoint(tmp_path, model, 32)
    images = random_images(2, 1)
    extractor = open_extractor(name, tmp_path)
    normalized = (images.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model(normalized).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), expected)
    assert extractor.spec.weights_sha256 == sha256(tmp_path / "model.safetensors")
    assert (extractor.spec.extractor, extractor.spec.dim, extractor.spec.input_size) == (name, 32, 32)
    assert extractor.spec.pixel_range == f"RGB, (x - {MEAN}) / {STD}"


def test_a_folder_opens_by_what_its_config_says(tmp_path):
    with seeded(0):
        config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = ViTModel(ViTConfig(**config, image_size=32, patch_size=8), add_pooling_layer=False)
    write_checkpoint(tmp_path, model, 32)
    extractor = open_extractor(str(tmp_path))
    assert extractor.spec.extractor == "vit"
    assert extractor(random_images(2, 3, 48)).shape == (2, 32)
    with pytest.raises(ValueError, match="not both"):
        open_extractor(str(tmp_path), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_extractor(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\xff", '{"architecture": 7}'])
def test_a_damaged_configuration_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    (tmp_path / "model.safetensors").touch()
    for name, weights in ((str(tmp_path), None), ("timm/resnet10t", tmp_path)):
        with pytest.raises(ValueError, match=r"config\.json is"):
            open_extractor(name, weights)


@pytest.mark.parametrize("name", ["xrv", "inception", "tiny", "dinov2", "timm/resnet10t"])
def test_weights_are_files_and_a_hash_beside_them_is_read_whatever_it_is(name, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileNotFoundError):
        open_extractor(name, tmp_path / "pipe.safetensors")
    (tmp_path / "weights.safetensors").touch()
    for content in (b"", b"\xff\xfe", b"0" * 64):
        (tmp_path / "weights.safetensors.sha256").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.safetensors\.sha256 says"):
            checked_sha256(tmp_path / "weights.safetensors")


def test_a_checkpoint_in_several_files_has_one_hash(tmp_path):
    write_checkpoint(tmp_path, tiny_encoder(), 32)
    (tmp_path / "model.safetensors").unlink()
    tiny_encoder().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    first = open_extractor("dinov2", tmp_path).spec.weights_sha256
    assert open_extractor("dinov2", tmp_path, sha256=first).spec.weights_sha256 == first
    with pytest.raises(ValueError, match="asked for is"):
        open_extractor("dinov2", tmp_path, sha256="0" * 64)


def test_timm_gives_the_features_before_the_classifier(tmp_path):
    with seeded(0):
        model = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    config = {"architecture": "resnet10t", "num_classes": 7, "num_features": 512}
    own = {"input_size": [3, 48, 48], "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    cfg = {**own, "classifier": "fc", "first_conv": "conv1.0", "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = random_images(2, 3, 48)
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(normalized), pre_logits=True)
    by_name, by_folder = open_extractor("timm/resnet10t", tmp_path), open_extractor(str(tmp_path))
    torch.testing.assert_close(by_name(images), expected)
    assert by_name.spec == by_folder.spec
    assert by_name.spec.input_size == 48
    with pytest.raises(ValueError, match="not resnet18"):
        open_extractor("timm/resnet18", tmp_path)


def test_timm_takes_a_bare_file_with_the_preprocessing_that_timm_knows(tmp_path):
    with seeded(0):
        model = timm.create_model("resnet10t.c3_in1k", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    extractor = open_extractor("timm/resnet10t.c3_in1k", tmp_path / "weights.safetensors")
    assert extractor.spec.input_size == model.pretrained_cfg["input_size"][-1]
    assert extractor(random_images(1, 1)).shape == (1, 512)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        open_extractor("timm/resnet10t.c3_in1k", tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights of torch-fidelity's network, which can only be made from a file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    torch.save({}, path)
    with seeded(0):
        torch.save(Untrained("any", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(inception, "_PUBLISHED_SHA256", sha256(inception_weights))
    images = (random_images(1, 1) * 255).round() / 255
    network = FeatureExtractorInceptionV3("any", ["2048"], feature_extractor_weights_path=str(inception_weights))
    expected = network((images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1))[0]
    extractor = open_extractor("inception", inception_weights)
    assert torch.equal(extractor(images), expected)
    assert extractor.spec.resize.endswith("not antialiased")


def test_inception_refuses_other_weights(inception_weights, tmp_path):
    with pytest.raises(ValueError, match="SHA-256"):
        open_extractor("inception", inception_weights)
    torch.save({"fc.weight": Planted(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="does not hold the weights"):
        open_extractor("inception", tmp_path / "evil.pth", sha256=sha256(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_pixels_are_thumbnails_of_area_means():
    extractor = open_extractor("pixels")
    images = random_images(3)
    assert torch.equal(extractor(images), pixel_features(images))
    assert extractor.spec.dim == 256
    assert extractor(images[:0]).shape == (0, 256)
    ramp = torch.linspace(0, 1, 64)
    features = pixel_features(ramp.expand(2, 3, 64, 64), side=16).view(2, 16, 16)
    assert torch.allclose(features[0, 3, 1:-1], ramp.view(16, 4).mean(1)[1:-1], atol=1e-5)
    with pytest.raises(ValueError, match="16 x 16"):
        pixel_features(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="has no weights"):
        open_extractor("pixels", "weights.safetensors")
    with pytest.raises(ValueError, match="give one of pixels, "):
        open_extractor("resnet")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 8, 8), float("nan")), "finite"),
        (torch.full((2, 1, 8, 8), 255.0), r"must be in \[0, 1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "floating images"),
        (torch.zeros(2, 2, 8, 8), "1 or 3"),
        (torch.zeros(2, 1, 8, 9), "square"),
        (torch.zeros(1, 8, 8), "square"),
        ("image.png", "got str"),
    ],
)
def test_images_that_cannot_be_measured_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(spec(), lambda x: x.mean(dim=(2, 3)).expand(-1, 3))(images)


def test_networks_are_frozen_and_bad_features_refused():
    images = random_images(2, 1, 8)
    dropout = FeatureExtractor(spec(dim=64), nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 64)))
    assert torch.equal(dropout(images), dropout(images))
    assert not dropout(images).requires_grad
    with pytest.raises(ValueError, match="first for image 1"):
        FeatureExtractor(spec(), lambda x: torch.tensor([[0.0, 0, 0], [0, float("inf"), 0]]))(images)
    with pytest.raises(ValueError, match="gives 3 features"):
        FeatureExtractor(spec(), lambda x: x.flatten(1))(images)


def test_a_description_goes_to_json_and_back():
    assert FeatureSpec.from_dict(json.loads(json.dumps(spec().to_dict()))) == spec()
    with pytest.raises(ValueError, match="colour"):
        FeatureSpec.from_dict({**spec().to_dict(), "colour": "red"})
    spec().require_same(spec())
    with pytest.raises(ValueError, match=r"layer: 'last' and 'first'; weights_sha256: None and 'ab'"):
        spec().require_same(spec(layer="first", weights_sha256="ab"))
