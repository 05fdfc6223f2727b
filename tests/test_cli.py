"""The command line: what it says of itself, and of what it does not understand."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml

import diffusers_dino.cli
from diffusers_dino.cli import COMMANDS
from diffusers_dino.cli.arguments import flag, name_and_path, parse_arguments
from scripts import EXAMPLES

TRAINING_CONFIGS = [*EXAMPLES.glob("configs/paper_*.yaml"), EXAMPLES / "configs/quickstart.yaml"]


@pytest.fixture
def ends(capsys):
    """Run a command line that ends before it does any work; gives what it printed."""

    def run(*words: str, code: int) -> str:
        with pytest.raises(SystemExit) as end:
            diffusers_dino.cli.main(words)
        printed = capsys.readouterr()
        assert end.value.code == code, printed
        return printed.out if code == 0 else printed.err

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_an_example_and_its_flags(ends, name):
    text = ends(*name.split(), "--help", code=0)
    example = text.partition("options:")[0]
    assert f"diffusers-dino {name} " in example.partition("\n")[2] or f"-m diffusers_dino {name} " in example
    assert all(f"--{field}" in text for field in COMMANDS[name].load().Arguments.__dataclass_fields__)


def test_all_commands_and_those_of_a_group_are_listed_without_importing_torch():
    script = "import sys\nfrom diffusers_dino.cli import main\ntry:\n    main(['--help'])\n"
    script += "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_programs_set_how_threads_wait_and_imports_do_not():
    script = "import os\nimport diffusers_dino.cli.arguments\nprint(os.environ.get('OMP_WAIT_POLICY'))\n"
    script += "import diffusers_dino.cli.early\nprint(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["None", "PASSIVE"]


def test_module_and_group_help():
    command = [sys.executable, "-m", "diffusers_dino", "evaluate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ")[1] for line in done.stdout.splitlines() if line.startswith("  evaluate")}
    assert listed == {name for name in COMMANDS if name.startswith("evaluate ")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard", "--help"], "there is no command 'shard'. Did you mean `shards`?"),
        (["evaluate", "fidelty"], "there is no command 'evaluate fidelty'. Did you mean `evaluate fidelity`?"),
        (["nothing-like-it"], "there is no command 'nothing-like-it'.\n"),
        (["shards", "--output_dri", "x"], "diffusers-dino shards: error: there is no flag --output_dri. Did you mean"),
        (["shards", "--guidance_scale=2"], "no flag --guidance_scale. It is a flag of `diffusers-dino "),
        (["shards", "nowhere.yaml"], "cannot read the config nowhere.yaml: "),
        (["shards", "--config"], "--config needs the path of a YAML file"),
    ],
)
def test_a_wrong_command_line_names_what_is_nearest(ends, words, message):
    assert message in ends(*words, code=2)


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        ("shards", {"output_dri": "x"}, "config.yaml: there is no flag output_dri. Did you mean output_dir?"),
        ("extract", {"guidance_scale": 2.0}, "no flag guidance_scale. It is a flag of `diffusers-dino synthesise`"),
        ("cache", {"max_train_steps": 5, "resolutoin": 64}, "no flag resolutoin. Did you mean resolution?"),
        ("cache", {"cache_batch_size": "many"}, "invalid int value: 'many'"),
        ("cache", {"tokens": "globl"}, "invalid choice"),
        ("shards", ["a", "b"], "must be a mapping of flags to values"),
        ("shards", "a: [", "cannot read the config"),
    ],
)
def test_a_wrong_key_of_a_config_names_the_right_one_or_its_command(ends, tmp_path, command, config, message):
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    assert message in ends(command, str(path), code=2)


@dataclass
class Arguments:
    rate: float = flag(1.0, "A rate.")
    name: str | None = flag("x", "A name.")
    augment: bool = flag(False, "A switch.")
    widths: list[int] = flag([1], "Widths.")
    steps: int = flag(0, "Steps.")


@pytest.mark.parametrize("place", ["{}", "--config {}", "--config={}"])
def test_values_of_a_config_get_the_types_of_the_flags_and_the_command_line_wins(tmp_path, place):
    path = tmp_path / "config.yaml"
    path.write_text("rate: -1e-3\nname: null\naugment: true\nwidths: [8, 16]\nsteps: 3\n")
    args = parse_arguments(Arguments, [*place.format(path).split(), "--steps", "2"])
    assert args == Arguments(rate=-1e-3, name="x", augment=True, widths=[8, 16], steps=2)


def test_a_path_with_a_sign_in_it_is_not_a_name():
    assert name_and_path("mine=runs/lr=1e-4") == ("mine", "runs/lr=1e-4")
    assert name_and_path("runs/lr=1e-4/model") == ("model", "runs/lr=1e-4/model")


@pytest.mark.parametrize("config", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_a_cache_takes_the_config_of_a_training(monkeypatch, capsys, config):
    module, seen = COMMANDS["cache"].load(), []
    monkeypatch.setattr(module, "main", seen.append)
    diffusers_dino.cli.main(["cache", str(config), "--seed", "3"])
    (args,), keys = seen, yaml.safe_load(config.read_text())
    left_out = capsys.readouterr().err.strip().partition("for this command: ")[2].split(", ")
    assert set(left_out) == set(keys) - set(module.Arguments.__dataclass_fields__)
    assert {name: value for name, value in vars(args).items() if name in keys} == {
        name: value for name, value in keys.items() if name not in left_out
    }
    assert args.seed == 3
