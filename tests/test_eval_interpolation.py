"""`diffusers-dino evaluate interpolation` as a user runs it."""

import pytest
from PIL import Image

import scripts
import tiny
from diffusers_dino.evaluation import InterpolationResult


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "images").mkdir()
    scripts.image_folder(tmp_path / "images", 9, size=40)
    tiny.tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "keys.txt").write_text("\n".join(f"{i:03d}" for i in range(5)))
    paths = {"model": tmp_path / "model", "data_dir": tmp_path / "images", "output_dir": tmp_path / "out"}
    return {**paths, "training_keys": tmp_path / "keys.txt", "num_points": 3, "num_inference_steps": 1}


def test_figures_and_pictures_of_unseen_images(flags, tmp_path, capsys):
    scripts.call_script("evaluate interpolation", **flags, num_drawn=2, seeds=[0, 1])
    result = InterpolationResult.load(tmp_path / "out/interpolation.json")
    assert (result.num_pairs, result.num_training_images, result.seeds) == (4, 5, (0, 1))
    assert result.fractions == (0, 0.5, 1)
    assert Image.open(tmp_path / "out/paths.png").size == ((3 + 2) * 32, 2 * 32)
    assert Image.open(tmp_path / "out/interpolation.png").width > 600
    printed = capsys.readouterr().out
    assert f"{result.by_pixels.generated.monotone_steps:.2f}" in printed


def test_what_was_trained_on_must_be_said_and_is_not_held_out(flags, tmp_path):
    keys = tmp_path / "held_out.txt"
    keys.write_text("004.png\n005\n")
    for message, changed in (
        ("Give --training_keys", {"training_keys": None}),
        ("such as 004", {"held_out_keys": keys}),
    ):
        with pytest.raises(ValueError, match=message):
            scripts.call_script("evaluate interpolation", **{**flags, **changed})
