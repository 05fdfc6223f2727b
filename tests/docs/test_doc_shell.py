"""The shell blocks of README and documentation run in this process, shortened: two updates, tiny models, few images.

A block that cannot run here has a comment directly above it: `<!-- not run: why -->`.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

import commands
import tiny
from diffusers_dino.cli import COMMANDS, split_command
from pages import REPOSITORY, Block, blocks, name_of, pages
from scripts import call_argv

REASON = re.compile(r"<!-- not run[^:]*: \S.*-->\s*$")
WIDTH = tiny.TOKEN_DIM
TRAINING = {
    "train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 2, "lr_warmup_steps": 0,
    "dataloader_num_workers": 0, "mixed_precision": "no", "resolution": 32, "checkpointing_steps": 2,
}  # fmt: skip
UNET = {
    **TRAINING, "max_train_samples": 16, "use_8bit_adam": False, "validation_steps": 0, "metric_num_images": 2,
    "metric_steps": 2, "validation_inference_steps": 2, "metric_features": "pixels", "metric_weights": None,
    "qk_init_scale": 1, "normalize_tokens": None,
}  # fmt: skip
CLASSIFIER = {
    "classifier": "test_resnet", "size": 32, "train_batch_size": 4, "max_train_steps": 2, "validation_steps": 1,
    "validation_fraction": 0, "bootstrap_repeats": 10, "num_workers": 0, "num_labels": 2, "num_folds": 2,
}  # fmt: skip
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1}
# Flags that replace those of a command or join them; None takes a flag away.
SHORT = {
    "train_dino.py": UNET,
    "train_vae.py": {**TRAINING, "num_validation_images": 2, "block_out_channels": ["8", "8"], "norm_num_groups": 4},
    "pretrain_dino.py": {
        **TRAINING, "hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 1, "num_prototypes": 8,
        "head_hidden_size": 8, "head_bottleneck_size": 4, "num_statistics_images": 16, "min_effective_rank": 0,
    },
    "train_prior.py": {"train_batch_size": 4, "max_train_steps": 2, "validation_steps": 0, "checkpointing_steps": 0},
    "distill_dino.py": {**TRAINING, "max_train_samples": 16, "validation_steps": 0},
    "shards": {"size": 32, "num_workers": 0},
    "cache": {"resolution": 32, "max_train_samples": 16},
    "synthesise": {
        **SAMPLING, "ratio": None, "num_images": 6, "batch_size": 2, "threads": 1, "num_drawn": 1,
        "max_left_out": 1.0, "max_attempts": 2,
    },
    "evaluate fidelity": {
        **SAMPLING, "features": "pixels", "weights": None, "num_images": 4, "num_reference": 4,
        "bootstrap_repeats": 2, "neighbors": 2,
    },
    "evaluate memorization": {"size": 32, "false_alarms": 0.5, "num_pairs": 2, "num_planted": 2},
    "evaluate interpolation": {**SAMPLING, "num_pairs": 2},
    "evaluate labels": {**CLASSIFIER, "num_folds": 3},
    "filter": {**CLASSIFIER, "num_folds": 3},
    "evaluate augmentation": {
        **CLASSIFIER, "regimes": ["4"], "ratios": ["1"], "strategies": ["reconstruction"], "classifier_options": None,
        "num_inference_steps": 2,
    },
    "evaluate segmentation": {
        "max_samples": 2, "timesteps": ["100"], "thresholds": ["0.3"], "num_examples": 1, "untrained": False,
    },
    "extract": {"extractor": "pixels", "weights": None},
    "splice": {"num_inference_steps": 2},
}  # fmt: skip
SHELL = [page for page in pages() if any(blocks(page, "bash"))]


def reason_of(block: Block) -> str | None:
    """The comment directly above a block that says why it does not run, if there is one."""
    before = block.page.read_text(encoding="utf-8").splitlines()[: block.line - 2]
    return before[-1] if before and REASON.search(before[-1]) else None


RUN, SEEN = [], set()
for block in (block for page in SHELL for block in blocks(page, "bash") if not reason_of(block)):
    if block.code not in SEEN:  # the same block on two pages runs once
        SEEN.add(block.code)
        RUN.append(block)


def shortened(words: list[str]) -> tuple[str, list[str]]:
    """The script or command that the words of a shell's line start, and its arguments, shortened.

    Raises:
        AssertionError: If it is neither: such a block needs a reason above it.
    """
    place = next((i for i, word in enumerate(words) if re.match(r"examples/\w+\.py$", word)), None)
    own = next((i for i, word in enumerate(words[:-1]) if word in {"diffusers-dino", "diffusers_dino"}), None)
    assert place is not None or own is not None, f"{' '.join(words)!r}: say above the block why it is not run"
    if place is not None:
        name, arguments = Path(words[place]).name, words[place + 1 :]
    else:
        name, arguments = split_command(words[own + 1 :])
    known = fields_of(name)
    if "--projection_dim" in arguments:
        arguments[arguments.index("--projection_dim") + 1] = str(WIDTH)
    for flag, value in SHORT.get(name, {}).items():
        arguments = without(arguments, flag)
        if value is not None and flag in known:
            arguments += [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
    return name, [at_hand(word) for word in arguments]


def fields_of(name: str) -> set[str]:
    if name in COMMANDS:
        return set(COMMANDS[name].load().Arguments.__dataclass_fields__)
    from importlib import import_module

    return set(import_module(Path(name).stem).Arguments.__dataclass_fields__)


def without(arguments: list[str], flag: str) -> list[str]:
    """The arguments less a flag and its values."""
    if f"--{flag}" not in arguments:
        return arguments
    first = arguments.index(f"--{flag}")
    last = next((i for i in range(first + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    return arguments[:first] + arguments[last:]


def at_hand(word: str) -> str:
    """`/data/...` of a page is `data/...` in the reader's folder; of the training phantoms a shard will do."""
    return re.sub(r"(^|=)/data/", r"\1data/", word).replace("phantom-cxr-train-*.tar", "phantom-cxr-train-000000.tar")


@pytest.fixture(scope="session")
def stocked(template, tmp_path_factory) -> Path:
    """The reader's folder with all that commands name: more images, a run with checkpoints, sets, models of folds."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("shell") / "reader")
    (root / "examples").symlink_to(REPOSITORY / "examples")
    rows = (root / "data/cxr.csv").read_text(encoding="utf-8").splitlines()[1:]
    with open(root / "data/cxr.csv", "a", encoding="utf-8") as table:  # 16 more images, with labels of the first ones
        for number, row in enumerate(rows, start=16):
            shutil.copy(root / f"data/generated/{number - 16:03d}.png", root / f"data/cxr/{number:03d}.png")
            table.write(f"{number:03d}.png,{row.split(',')[1]},p{number // 2}\n")
    for name in ("cxr-unseen", "archive", "tiles", "our-scanner", "shards", "cxr-real"):
        shutil.copytree(root / "data/cxr", root / "data" / name)
    (root / "training_keys.txt").write_text("\n".join(f"{number:03d}" for number in range(20)) + "\n")
    (root / "test.txt").write_text("030\n031\n")
    from tiny_text import stable_diffusion

    stable_diffusion().save_pretrained(root / "stable-diffusion-v1-5/stable-diffusion-v1-5")
    before = Path.cwd()
    os.chdir(root)
    try:
        run = (
            "python examples/train_dino.py --train_data_dir data/cxr --pretrained_pipeline my-model --output_dir a-run"
        )
        call_argv(*shortened(run.split()))
        shutil.rmtree("my-model")
        Path("a-run").rename("my-model")
        for fold in range(2):
            shutil.copytree("my-model", f"models/fold-{fold}")
        for name in ("reconstruction", "interpolation"):
            make = f"diffusers-dino synthesise --output_dir sets/{name} --strategy {name} --model my-model"
            call_argv(*shortened(f"{make} --data_dir data/cxr --labels data/cxr.csv".split()))
        shutil.copytree("sets/reconstruction", "outputs/synthetic")
        shutil.copytree("sets/reconstruction", "drawn")
        call_argv(
            *shortened(
                ["diffusers-dino", "evaluate", "memorization", "--training", "data/cxr", "--output_dir", "gate"]
            )
        )
    finally:
        os.chdir(before)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs(block, stocked, tmp_path, monkeypatch):
    root = shutil.copytree(stocked, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    for config in blocks(block.page, "yaml"):
        Path("my_shards.yaml").write_text(re.sub(r"(?<=[\[ ])/data/", "data/", config.code))
    for words in commands.commands(block.code):
        if not words:
            continue
        name, arguments = shortened(words)
        out = arguments[arguments.index("--output_dir") + 1] if "--output_dir" in arguments else None
        if out and (name.endswith(".py") or name == "synthesise"):
            shutil.rmtree(out, ignore_errors=True)  # the stocked one
        call_argv(name, arguments)
        assert out is None or any(Path(out).iterdir()), f"{block}: {name} left nothing in {out}"


def test_a_block_without_a_program_of_ours_needs_a_reason():
    with pytest.raises(AssertionError, match="say above the block"):
        shortened(["pip", "install", "diffusers-dino"])
    name, arguments = shortened(["diffusers-dino", "extract", "--weights", "xrv.safetensors", "--data", "/data/cxr"])
    assert (name, arguments) == ("extract", ["--data", "data/cxr", "--extractor", "pixels"])


def test_reasons_stand_directly_above_their_blocks():
    for page in SHELL:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- not run") == sum(reason_of(block) is not None for block in blocks(page)), name_of(page)
