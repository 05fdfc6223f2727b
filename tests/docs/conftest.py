"""The folder that the code of the documentation runs in: what a reader has, at the smallest size.

What needs torch is imported where it is used: most tests of this folder read only text.
"""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pages import REPOSITORY

# Encoders that pages name by their id on the Hub: a folder of that name comes before the Hub.
ENCODERS = {"facebook/dino-vitb16": "dinov1", "microsoft/rad-dino": "dinov2", "facebook/dinov2-base": "dinov2"}

LABELS = ("No Finding", "Cardiomegaly", "Effusion", "Pneumothorax", "Consolidation", "Nodule")  # of the phantoms


def phantoms(count: int) -> list[tuple[bytes, dict]]:
    """PNG files of bundled phantoms, and what is known of each."""
    with tarfile.open(REPOSITORY / "examples/data/phantom-cxr/phantom-cxr-test-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".json")][:count]
        read = lambda name: tar.extractfile(name).read()  # noqa: E731
        return [(read(name.replace(".json", ".png")), json.loads(read(name))) for name in names]


def save_pipelines(root: Path) -> None:
    from diffusers import TCDScheduler
    from diffusers.utils import convert_state_dict_to_diffusers

    import checkpoints
    import priors
    import tiny
    from diffusers_dino.prior import describe_conditioner
    from tiny_text import stable_diffusion

    peft = pytest.importorskip("peft")
    pipe = tiny.tiny_pipeline()
    for name in ("outputs/quickstart/model", "my-model"):
        pipe.save_pretrained(root / name)
    prior = priors.tiny_prior_pipeline(labels=LABELS, conditioner=describe_conditioner(pipe.conditioner))
    prior.prior.fit_tokens(pipe.encode_image(tiny.random_images(32)))
    prior.save_pretrained(root / "my-prior")
    pipe.unet.save_pretrained(root / "my-model/checkpoint-500/unet")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    for name in ("scanner-lora", "ward-lora", "fast-lora"):
        pipe.save_lora_weights(root / "outputs" / name, layers)
    TCDScheduler.from_config(pipe.scheduler.config).save_pretrained(root / "outputs/fast-lora/scheduler")
    stable_diffusion().save_pretrained(root / "stable-diffusion")
    for name, family in ENCODERS.items():
        checkpoints.save_transformers(checkpoints.build(family), root / name)


def save_images(root: Path) -> None:
    from dicom_files import dicom_bytes
    from source_layouts import lay_out, picture, write

    found = phantoms(16)
    for number, (png, _) in enumerate(found[:8]):
        (root / f"radiograph_{number}.png").write_bytes(png)
    (root / "radiograph.png").write_bytes(found[8][0])
    (root / "other.png").write_bytes(found[9][0])
    pixels = np.asarray(Image.open(io.BytesIO(found[8][0]))).astype(np.uint16) << 4
    (root / "scan.dcm").write_bytes(dicom_bytes(pixels, bits=12))
    folder = root / "data/cxr"
    folder.mkdir(parents=True)
    with open(root / "data/cxr.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "findings", "patient"])
        for number, (png, facts) in enumerate(found):
            (folder / f"{number:03d}.png").write_bytes(png)
            table.writerow([f"{number:03d}.png", "|".join(facts["labels"]), f"p{number // 2}"])
    generated = root / "data/generated"
    generated.mkdir()
    for number, (png, _) in enumerate(phantoms(32)[16:]):
        (generated / f"{number:03d}.png").write_bytes(png)
    write(root / "data/mammograms/exams.csv", "exam;view;BI-RADS;mass;calcification\nm-7;L-MLO;4;1;2\n")
    picture(root / "data/mammograms/patients/p012/m-7.png")
    for name, layout in {"padchest": "padchest", "mimic": "mimic_cxr_jpg"}.items():
        lay_out(layout, root / "data" / name)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reader")
    save_pipelines(root)
    save_images(root)
    return root


@pytest.fixture
def folder(template, tmp_path, monkeypatch) -> Path:
    """The current folder of a reader, anew for each test, with `examples` as in the repository."""
    root = shutil.copytree(template, tmp_path / "reader")
    (root / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(root)
    return root
