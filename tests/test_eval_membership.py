"""`evaluate membership` as a command: figures and tables of the bundled model, and what it asks for."""

import pytest

from diffusers_dino.cli.evaluate import membership
from diffusers_dino.evaluation import MembershipResult
from pages import REPOSITORY

PHANTOMS = REPOSITORY / "examples" / "data" / "phantom-cxr"


def test_the_command_writes_figures_and_tables(tmp_path, capsys):
    args = membership.Arguments(
        model=str(REPOSITORY / "examples" / "data" / "tiny-diffusion"),
        training=str(PHANTOMS / "phantom-cxr-train-000000.tar"),
        held_out=str(PHANTOMS / "phantom-cxr-test-000000.tar"),
        num_images=6,
        timesteps=[100],
        num_noises=1,
        bootstrap_repeats=20,
        output_dir=str(tmp_path),
    )
    membership.main(args)
    result = MembershipResult.load(tmp_path / "membership.json")
    assert (result.num_training, result.num_held_out) == (6, 6)
    for name in ("table.md", "table.tex", "table.csv"):
        assert "blind guess" in (tmp_path / name).read_text()
    assert "6 training and 6 held-out images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "training", "held_out"])
def test_what_is_missing_is_asked_for(name, tmp_path):
    given = {"model": "m", "training": "t", "held_out": "h", "output_dir": str(tmp_path / "new")}
    with pytest.raises(ValueError, match=f"Give --{name}"):
        membership.main(membership.Arguments(**{**given, name: None}))
    assert not (tmp_path / "new").exists()
