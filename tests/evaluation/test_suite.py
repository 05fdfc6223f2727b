"""The suite: an honest set passes, planted faults are found, what cannot be asked is named, and work is kept."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from diffusers_dino.cli.evaluate import suite as command
from diffusers_dino.data import Preprocessing
from diffusers_dino.evaluation import ImageSet, SuiteResult, SuiteSettings, evaluate_suite, open_image_set
from diffusers_dino.evaluation.classifier import ClassifierSettings
from diffusers_dino.evaluation.generation import stack_images
from diffusers_dino.evaluation.suite.page import make_page
from diffusers_dino.evaluation.suite.table import format_suite_table

SIDE, COUNT = 64, 64
CLASSIFIER = ClassifierSettings(
    options='{"growth_rate": 4, "block_config": [1, 1]}', size=16, batch_size=16, max_steps=80, learning_rate=1e-2
)
SETTINGS = SuiteSettings(
    neighbors=3,
    fewest=10,
    false_alarms=0.1,
    num_planted=1,
    network_steps=30,
    timesteps=(60,),
    num_noises=1,
    classifier=CLASSIFIER,
    bootstrap_repeats=50,
)


def draw(labels: frozenset[str], person: int, film: int) -> np.ndarray:
    """A picture of a person that shows its labels."""
    image = 60 + 90 * tiny.random_images(1, 1, SIDE, seed=person)[0, 0].numpy()
    image += np.random.default_rng((person, film)).normal(0, 4, image.shape)
    y, x = np.mgrid[:SIDE, :SIDE]
    image += 90 * ("disc" in labels) * ((y - 20) ** 2 + (x - 20) ** 2 < 200)
    return (image + 90 * ("bar" in labels) * (abs(y - 48) < 7)).clip(0, 255).astype(np.uint8)


def write(folder: Path, first: int, count: int = COUNT) -> Path:
    """Two films each of people from `first` on, with a table beside the folder."""
    folder.mkdir(parents=True)
    kinds = [(), ("disc",), ("bar",), ("disc", "bar")]
    rows = []
    for i in range(count):
        person, labels = first + i // 2, kinds[i // 2 % 4]
        Image.fromarray(draw(frozenset(labels), person, i)).save(folder / f"{person}-{i}.png")
        rows.append((f"{person}-{i}.png", f"patient {person}", "|".join(labels)))
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    with open(f"{folder}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "patient", "findings"), *rows])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    for number, name in enumerate(("synthetic", "real", "training")):
        write(root / name, 1000 * number)
    return root


def opened(folder: Path, **options) -> ImageSet:
    return open_image_set(folder, Preprocessing(SIDE, remove_borders=False), f"{folder}.csv", **options)


@pytest.fixture(scope="module")
def sets(root) -> dict[str, ImageSet]:
    return {name: opened(root / name) for name in ("synthetic", "real", "training")}


@pytest.fixture(scope="module")
def asked() -> list:
    return []


@pytest.fixture(scope="module")
def honest(sets, root, asked) -> SuiteResult:
    """All questions, of another sample of the same people-making."""
    options = {"pipe": tiny.tiny_pipeline(), "settings": SETTINGS, "progress": asked.append}
    return evaluate_suite(folder=root / "honest", **sets, **options)


@pytest.mark.slow
def test_an_honest_pair_of_halves_passes(honest, asked):
    assert {x.question: x.verdict for x in honest.answers} == dict.fromkeys(
        ("fidelity", "copies", "reidentification", "membership", "labels", "utility"), "passed"
    )
    assert [state.done for state in asked] == [0, 1, 2, 3, 4, 5]
    assert [(one.name, one.num_images, one.num_patients) for one in honest.sets] == [
        (name, COUNT, COUNT // 2) for name in ("synthetic", "real", "training")
    ]
    assert {row.label for row in honest.fidelity.by_label} == {"disc", "bar"}


def test_what_is_done_is_not_asked_again(honest, sets, root):
    pipe, folder = tiny.tiny_pipeline(), root / "honest"
    before = (folder / "suite.json").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.json") if path.name != "suite.json"}
    (folder / "fidelity.json").unlink()
    again = evaluate_suite(folder=folder, **sets, pipe=pipe, settings=SETTINGS)
    assert again == honest == SuiteResult.load(folder / "suite.json")
    assert (folder / "suite.json").read_bytes() == before
    assert all(path.stat().st_mtime_ns == stamps[path] for path in stamps if path.name != "fidelity.json")
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        evaluate_suite(folder=folder, **sets, pipe=pipe, settings=replace(SETTINGS, seed=1))


def test_page_and_tables_show_every_question(honest, sets, tmp_path):
    make_page(honest, **sets).save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<dt>") == 6
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))
    for control in ("blind guess", "held out (false alarms)", "labels shuffled", "other images of one patient"):
        assert control in page
    private = make_page(honest, **sets, draw=False)
    private.save(tmp_path / "private.html")
    assert "image/png" not in (tmp_path / "private.html").read_text()
    for style in ("markdown", "latex", "csv"):
        table = format_suite_table(honest, style)
        assert all(x.question in table for x in honest.answers)


def test_planted_copies_and_shuffled_labels_are_found(root, sets, tmp_path):
    folder = write(tmp_path / "synthetic", 3000)
    made = sorted(path.name for path in folder.iterdir())
    for name, copied in zip(made[:8], sorted((root / "training").iterdir())[:8], strict=True):
        Image.open(copied).resize((60, 60)).save(folder / name)
    with open(f"{folder}.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = [rows[i][2] for i in np.random.default_rng(0).permutation(len(rows))]
    write_rows(folder, [(row[0], row[1], other) for row, other in zip(rows, labels, strict=True)])
    planted = {name: one._replace(patients=None) for name, one in {**sets, "synthetic": opened(folder)}.items()}
    result = evaluate_suite(folder=tmp_path / "out", **planted, settings=SETTINGS)
    assert {x.question for x in result.answers if x.verdict == "found"} >= {"copies", "labels"}
    assert {pair.key for pair in result.copies.closest} >= {name.removesuffix(".png") for name in made[:8]}
    patients = result.answer("reidentification").line
    assert "patients of the training and real images are not known: give a table" in patients


def test_images_that_were_made_from_one_patient_are_drawn_together(sets, tmp_path):
    few = {name: one.select(one.images.keys[:32]) for name, one in sets.items()}
    unknown = {**few, "synthetic": few["synthetic"]._replace(patients=None)}
    trained = few["training"].images.keys
    sources = {key: trained[i % 8] for i, key in enumerate(sorted(unknown["synthetic"].images.keys))}  # 4 patients
    settings = replace(SETTINGS, network_steps=1, classifier=replace(CLASSIFIER, max_steps=8))
    alone, together = (
        evaluate_suite(folder=tmp_path / str(len(known or ())), **unknown, sources=known, settings=settings)
        for known in (None, sources)
    )
    assert [one.fidelity.row("synthetic").by_patient for one in (alone, together)] == [False, True]
    assert alone.transfer.macro.synthetic.value == together.transfer.macro.synthetic.value
    widths = [one.transfer.macro.synthetic.high - one.transfer.macro.synthetic.low for one in (alone, together)]
    assert widths[1] != widths[0]
    assert alone.sets == together.sets


def test_a_model_that_knows_its_images_by_heart_is_found(tmp_path):
    sets = {}
    for seed, name in enumerate(("synthetic", "real", "training")):
        (tmp_path / name).mkdir()
        for number, image in enumerate(tiny.random_images(12, channels=1, seed=seed)):
            Image.fromarray((255 * image[0]).byte().numpy()).save(tmp_path / name / f"{name}-{number}.png")
        sets[name] = open_image_set(tmp_path / name, Preprocessing(tiny.IMAGE_SIZE, remove_borders=False))
    settings = replace(SETTINGS, timesteps=(60, 100), num_noises=2)
    pipe = tiny.overfitted_pipeline(stack_images(sets["training"].images))
    result = evaluate_suite(folder=tmp_path / "out", **sets, pipe=pipe, settings=settings)
    assert result.membership.combined.auroc >= 0.9
    assert result.answer("membership").verdict == "found"


def test_questions_that_cannot_be_asked_are_named(sets, tmp_path):
    bare = {name: one._replace(labels=None, patients=None) for name, one in sets.items()}
    few = bare["synthetic"].images.keys[:20]  # sets of different sizes
    bare["synthetic"] = bare["synthetic"].select(few)
    del bare["training"]
    result = evaluate_suite(folder=tmp_path / "out", **bare, settings=SETTINGS)
    reasons = {x.question: x.line for x in result.answers if x.verdict == "not asked"}
    assert set(reasons) == {"copies", "reidentification", "membership", "labels", "utility"}
    assert "training images are not given" in reasons["copies"]
    assert "model is not given" in reasons["membership"]
    assert "have no labels: give a table" in reasons["labels"]
    assert f"20 against {COUNT}" in result.answer("fidelity").line
    assert all(x.question in format_suite_table(result, "latex") for x in result.answers)
    make_page(result, **bare).save(tmp_path / "page.html")


def test_one_image_is_too_few(sets, tmp_path):
    one = {"synthetic": sets["synthetic"].select(sets["synthetic"].images.keys[:1]), "real": sets["real"]}
    result = evaluate_suite(folder=tmp_path / "out", **one, settings=SETTINGS)
    assert "more than 3 images of each, and one set has 1" in result.answer("fidelity").line
    assert {x.verdict for x in result.answers} == {"not asked"}
    make_page(result, **one).save(tmp_path / "page.html")


def test_real_images_are_not_scored_as_synthetic_ones(sets, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{COUNT} of the {COUNT} synthetic images are images of .*real: give the generated"
    ):
        evaluate_suite(sets["real"], sets["real"], tmp_path / "a", settings=SETTINGS)
    with pytest.raises(ValueError, match="All real images, or their patients, are among the training images"):
        evaluate_suite(sets["synthetic"], sets["real"], tmp_path / "b", training=sets["real"], settings=SETTINGS)


def test_other_vocabularies(sets, tmp_path):
    def renamed(names: dict[str, str]) -> ImageSet:
        one = sets["synthetic"]
        return one._replace(labels={k: frozenset(names[x] for x in own) for k, own in one.labels.items()})

    options = {"settings": SETTINGS}
    result = evaluate_suite(renamed({"disc": "Disc", "bar": "rod"}), sets["real"], tmp_path / "a", **options)
    assert [row.label for row in result.transfer.rows] == ["macro", "disc"]
    assert result.transfer.left_out == ("bar", "rod")
    assert "Left out: bar, rod" in result.answer("labels").line
    result = evaluate_suite(renamed({"disc": "x", "bar": "y"}), sets["real"], tmp_path / "b", **options)
    assert "No label is common to synthetic images (x, y) and real ones (bar, disc)" in result.answer("labels").line


def test_the_command_counts_what_cannot_be_read(root, tmp_path, capsys):
    folder = write(tmp_path / "synthetic", 3000, 40)
    (folder / "3000-0.png").write_bytes(b"no image")
    args = command.Arguments(
        synthetic=str(folder),
        synthetic_table=f"{folder}.csv",
        synthetic_label_column="findings",
        real=str(root / "real"),
        table=f"{root / 'real'}.csv",
        size=SIDE,
        classifier_steps=2,
        bootstrap_repeats=20,
        output_dir=str(tmp_path / "out"),
    )
    command.main(args)
    result = SuiteResult.load(tmp_path / "out" / "suite.json")
    assert (result.sets[0].num_images, result.sets[0].num_unreadable) == (39, 1)
    assert "training images are not given" in result.answer("copies").line
    assert "Report:" in capsys.readouterr().out
    for name in ("report.html", "table.tex", "table.md", "table.csv"):
        assert (tmp_path / "out" / name).is_file()
    with pytest.raises(ValueError, match="Give --real"):
        command.main(command.Arguments(synthetic=str(folder)))
