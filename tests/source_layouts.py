"""Small folders with the layout that each data set has when it is downloaded, and the records that they must give.

The cells are made up; the names of files and columns, and how cells are written, are the providers'.
"""

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dicom_files import dicom_bytes

Expected = dict[str, dict]  # image id -> attributes of the record that differ from their defaults
LAYOUTS: dict[str, Callable[[Path], Expected]] = {}


def layout(build: Callable[[Path], Expected]) -> Callable[[Path], Expected]:
    LAYOUTS[build.__name__] = build
    return build


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def picture(path: Path, depth: int = 8, color: bool = False) -> None:
    """A tiny image of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".dcm", ".dicom"):
        path.write_bytes(dicom_bytes(np.arange(120, dtype=np.uint8).reshape(12, 10)))
        return
    values = np.random.default_rng(len(str(path))).integers(0, 2**depth, (12, 10, 3) if color else (12, 10))
    Image.fromarray(values.astype(np.uint16 if depth > 8 else np.uint8)).save(path)


CHEXPERT_LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


@layout
def mimic_cxr_jpg(root):
    rows = [("11111111", "50000001", "aa-1", "PA"), ("11111111", "50000001", "aa-2", "LATERAL")]
    rows += [("19000002", "50000002", "bb-1", "AP"), ("19000002", "50000003", "bb-2", "")]
    header = "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns\n"
    lines = [f'{image},{subject},{study},"CHEST, 2 VIEWS",{view},12,10' for subject, study, image, view in rows]
    write(root / "mimic-cxr-2.0.0-metadata.csv.gz", header + "\n".join(lines))
    names = sorted(CHEXPERT_LABELS.split(","))
    one = {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"}
    two = {"No Finding": "1.0"}
    studies = [("11111111", "50000001", one), ("19000002", "50000002", two)]
    lines = [",".join([subject, study, *(said.get(n, "") for n in names)]) for subject, study, said in studies]
    write(root / "mimic-cxr-2.0.0-chexpert.csv.gz", f"subject_id,study_id,{','.join(names)}\n" + "\n".join(lines))
    for subject, study, image, _ in rows:
        picture(root / f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg")
    said = {"labels": ("Edema",), "uncertain": ("Pneumonia",), "patient": "11111111", "split": "train"}
    return {
        "aa-1": said | {"view": "PA"},
        "aa-2": said | {"view": "LATERAL"},
        "bb-1": {"patient": "19000002", "split": "test", "view": "AP", "labels": ()},
        "bb-2": {"patient": "19000002", "split": "test"},
    }


@layout
def chexpert(root):
    header = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{CHEXPERT_LABELS}\n"
    one, two = "train/patient00001/study1/view1_frontal.jpg", "train/patient00001/study1/view2_lateral.jpg"
    three = "valid/patient64541/study1/view1_frontal.jpg"
    write(
        root / "train.csv",
        header
        + f"CheXpert-v1.0-small/{one},Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0\n"
        + f"CheXpert-v1.0-small/{two},Female,68,Lateral,,,,-1.0,1.0,,,,,,,,,,\n",
    )
    write(root / "valid.csv", header + f"CheXpert-v1.0-small/{three},Male,73,Frontal,PA" + ",0.0" * 14 + "\n")
    for name in (one, two, three):
        picture(root / name)
    return {
        one: {"patient": "patient00001", "labels": ("Support Devices",), "view": "AP", "split": "train"},
        two: {
            "patient": "patient00001",
            "labels": ("Lung Opacity",),
            "uncertain": ("Cardiomegaly",),
            "view": "LATERAL",
            "split": "train",
        },
        three: {"patient": "patient64541", "labels": (), "view": "PA", "split": "validation"},
    }


@layout
def padchest(root):
    header = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,Projection,Report,Labels,labelCUIS\n"
    lines = [
        "0,1_a.png,0,2014,11,p1,PA,sin hallazg,['normal'],[]",
        "1,1_b.png,0,2014,11,p1,L,\"report, with comma\",\"['pulmonary fibrosis', 'chronic changes']\",['C00' 'C01']",
        "2,2_c.png,54,2015,12,p2,AP_horizontal,r,['unchanged'],[]",
        "3,2_d.png,54,2015,12,p2,EXCLUDE,r,nan,",
        "4,3_e.png,54,2015,13,p3,COSTAL,r,\"['nodule', 'exclude', 'nodule', '']\",[]",
    ]
    write(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", header + "\n".join(lines))
    for name in ("0/1_a.png", "0/1_b.png", "54/2_c.png", "54/2_d.png", "54/3_e.png"):
        picture(root / name, depth=16)
    return {
        "1_a.png": {"patient": "p1", "labels": (), "view": "PA"},
        "1_b.png": {"patient": "p1", "labels": ("pulmonary fibrosis", "chronic changes"), "view": "LATERAL"},
        "2_c.png": {"patient": "p2", "view": "AP"},
        "2_d.png": {"patient": "p2"},
        "3_e.png": {"patient": "p3", "labels": ("nodule",), "view": "COSTAL"},
    }


@layout
def nih_chest_xray14(root):
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n"
    )
    rows = [("00000001_000.png", "Cardiomegaly|Emphysema", 1, "PA"), ("00000002_000.png", "No Finding", 2, "AP")]
    rows += [("00000002_001.png", "Hernia", 2, "PA")]
    lines = [f"{image},{found},0,{patient},57,M,{view},2682,2749,0.14,0.14" for image, found, patient, view in rows]
    write(root / "Data_Entry_2017_v2020.csv", header + "\n".join(lines))
    write(root / "train_val_list.txt", "00000001_000.png\n")
    write(root / "test_list.txt", "00000002_000.png\n00000002_001.png")
    for folder, (image, *_) in zip(("images_001", "images_001", "images_012"), rows, strict=True):
        picture(root / folder / "images" / image)
    return {
        "00000001_000.png": {"patient": "1", "labels": ("Cardiomegaly", "Emphysema"), "view": "PA", "split": "train"},
        "00000002_000.png": {"patient": "2", "labels": (), "view": "AP", "split": "test"},
        "00000002_001.png": {"patient": "2", "labels": ("Hernia",), "view": "PA", "split": "test"},
    }


@layout
def rsna_pneumonia(root):
    rows = "a-1,,,,,0\nb-2,264.0,152.0,213.0,379.0,1\nb-2,562.0,152.0,256.0,453.0,1\n"
    write(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target\n" + rows)
    for name in ("a-1", "b-2"):
        picture(root / f"stage_2_train_images/{name}.dcm")
    return {"a-1": {"labels": ()}, "b-2": {"labels": ("Lung Opacity",)}}


@layout
def siim_ptx(root):
    write(root / "train-rle.csv", "ImageId, EncodedPixels\n1.2.3,-1\n1.2.4, 557374 2 1015 8\n1.2.4, 7 2 1015 8\n")
    for name in ("1.2.3", "1.2.4"):
        picture(root / f"dicom-images-train/9.{name}/8.{name}/{name}.dcm")
    return {"1.2.3": {"labels": ()}, "1.2.4": {"labels": ("Pneumothorax",)}}


@layout
def vindr_cxr(root):
    readers = ["R8,1,0,1,0", "R9,1,0,0,0", "R10,0,1,0,0"]
    healthy = ["R1,0,0,0,1", "R2,0,0,0,1", "R3,1,0,0,0"]
    lines = [f"a1,{said}" for said in readers] + [f"b2,{said}" for said in healthy]
    header = "image_id,rad_id,Aortic enlargement,Pleural effusion,Other diseases,No finding\n"
    write(root / "annotations/image_labels_train.csv", header + "\n".join(lines))
    header = "image_id,Aortic enlargement,Pleural effusion,Other disease,No finding\n"
    write(root / "annotations/image_labels_test.csv", header + "c3,0,0,1,0\n")
    for name in ("train/a1", "train/b2", "test/c3"):
        picture(root / f"{name}.dicom")
    return {
        "a1": {"labels": ("Aortic enlargement",), "view": "PA", "split": "train"},
        "b2": {"labels": (), "view": "PA", "split": "train"},
        "c3": {"labels": ("Other diseases",), "view": "PA", "split": "test"},
    }


@layout
def vinbigdata(root):
    lines = ["a1,Cardiomegaly,3,R10,1,2,3,4", "a1,Cardiomegaly,3,R10,1,2,3,4", "a1,No finding,14,R8,,,,"]
    lines += ["a1,No finding,14,R9,,,,", "b2,ILD,5,R8,1,2,3,4", "b2,ILD,5,R9,1,2,3,4", "b2,Nodule/Mass,8,R10,1,2,3,4"]
    write(root / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n" + "\n".join(lines))
    for name in ("a1", "b2"):
        picture(root / f"train/{name}.dicom")
    return {"a1": {"labels": (), "view": "PA"}, "b2": {"labels": ("ILD",), "view": "PA"}}


@layout
def vindr_pcxr(root):
    header = "image_id,rad_ID,No finding,Bronchitis,Pneumonia\n"
    write(root / "image_labels_train.csv", header + "a1,R1,0,1,0\nb2,R2,1,0,0\n")
    write(root / "image_labels_test.csv", header + "c3,R1,0,1,1\n")
    for name in ("train/a1", "train/b2", "test/c3"):
        picture(root / f"{name}.dicom")
    return {
        "a1": {"labels": ("Bronchitis",), "split": "train"},
        "b2": {"labels": (), "split": "train"},
        "c3": {"labels": ("Bronchitis", "Pneumonia"), "split": "test"},
    }


@layout
def brax(root):
    names = ["images/id_1/Study_1.2/Series_3.4/image-5.png", "images/id_2/Study_1.3/Series_3.5/image-6.png"]
    header = f"DicomPath,PngPath,PatientID,PatientSex,AccessionNumber,StudyDate,{CHEXPERT_LABELS},ViewPosition\n"
    lines = [f"x.dcm,{names[0]},id_1,M,7,d,,,1,,,-1,,,,0,,,,,L", f"y.dcm,{names[1]},id_2,F,8,d,1" + "," * 13 + ",AP"]
    write(root / "master_spreadsheet_update.csv", header + "\n".join(lines))
    for name in names:
        picture(root / name, depth=16)
    return {
        names[0][:-4]: {
            "patient": "id_1",
            "labels": ("Cardiomegaly",),
            "uncertain": ("Edema",),
            "view": "LATERAL",
        },
        names[1][:-4]: {"patient": "id_2", "labels": (), "view": "AP"},
    }


@layout
def bimcv_covid19(root):
    one = "sub-S03047_ses-E06181_run-1_bp-chest_vp-ap_dx"
    two = "sub-S03047_ses-E06181_acq-2_run-1_bp-chest_vp-pa_cr"
    three = "sub-S03048_ses-E06200_run-1_bp-chest_dx"
    sessions = {one: "sub-S03047/ses-E06181", two: "sub-S03047/ses-E06181", three: "sub-S03048/ses-E06200"}
    for name, photometric in ((one, "MONOCHROME1"), (two, "MONOCHROME2"), (three, None)):
        folder = root / sessions[name] / "mod-rx"
        picture(folder / f"{name}.png", depth=16)
        header = {"00280004": {"Value": [photometric], "vr": "CS"}} if photometric else {}
        write(folder / f"{name}.json", json.dumps(header | {"00100010": {"Value": ["NAME^OF"]}}))
    labels = "\"['COVID 19'\t 'alveolar pattern']\""
    rows = f"0\tsub-S03047\tses-E06181\tinforme\t{labels}\n1\tsub-S03048\tses-E06200\tinforme\t['normal']\n"
    write(root / "derivatives/labels/labels_covid19_posi.tsv", "\tPatientID\tReportID\tReport\tLabels\n" + rows)
    said = {"patient": "sub-S03047", "labels": ("COVID 19", "alveolar pattern")}
    return {
        f"{one}.png": said | {"view": "AP", "invert": True},
        f"{two}.png": said | {"view": "PA", "invert": False},
        f"{three}.png": {"patient": "sub-S03048", "labels": ()},
    }


@layout
def openi(root):
    report = (
        '<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{uid}"/><MeSH>{mesh}</MeSH>'
        '<parentImage id="{uid}_IM-1-1001"/><parentImage id="{uid}_IM-1-2001"/></eCitation>'
    )
    major = "<major>Cardiomegaly/mild</major><major>Opacity/lung/base</major><automatic>heart</automatic>"
    write(root / "1.xml", report.format(uid="CXR1", mesh=major))
    write(root / "2.xml", report.format(uid="CXR2", mesh="<major>normal</major>"))
    with tarfile.open(root / "NLMCXR_reports.tgz", "w:gz") as tar:
        for name in ("1.xml", "2.xml"):
            tar.add(root / name, f"ecgen-radiology/{name}")
            (root / name).unlink()
    write(root / "nlmcxr_dicom_metadata.csv", "imageid,View Position\nCXR1_IM-1-1001,PA\nCXR1_IM-1-2001,LL\n")
    for uid in ("CXR1", "CXR2"):
        picture(root / f"{uid}_IM-1-1001.png")
        picture(root / f"{uid}_IM-1-2001.png")
    said = {"patient": "CXR1", "labels": ("Cardiomegaly", "Opacity")}
    return {
        "CXR1_IM-1-1001": said | {"view": "PA"},
        "CXR1_IM-1-2001": said | {"view": "LATERAL"},
        "CXR2_IM-1-1001": {"patient": "CXR2", "labels": ()},
        "CXR2_IM-1-2001": {"patient": "CXR2", "labels": ()},
    }


@layout
def montgomery(root):
    for name in ("MCUCXR_0001_0", "MCUCXR_0104_1"):
        picture(root / f"MontgomerySet/CXR_png/{name}.png")
        for side in ("left", "right"):
            picture(root / f"MontgomerySet/ManualMask/{side}Mask/{name}.png")
    masks = [f"MontgomerySet/ManualMask/{side}Mask/{{}}.png" for side in ("left", "right")]
    return {
        name: {
            "patient": name[:-2],
            "labels": ("Tuberculosis",) if name.endswith("1") else (),
            "view": "PA",
            "masks": tuple(root / mask.format(name) for mask in masks),
        }
        for name in ("MCUCXR_0001_0", "MCUCXR_0104_1")
    }


@layout
def shenzhen(root):
    for name in ("CHNCXR_0001_0", "CHNCXR_0327_1"):
        picture(root / f"ChinaSet_AllFiles/CXR_png/{name}.png", color=True)
    mask = root / "ChinaSet_AllFiles/mask/CHNCXR_0001_0_mask.png"
    picture(mask)
    return {
        "CHNCXR_0001_0": {"patient": "CHNCXR_0001", "labels": (), "view": "PA", "masks": (mask,)},
        "CHNCXR_0327_1": {"patient": "CHNCXR_0327", "labels": ("Tuberculosis",), "view": "PA"},
    }


@layout
def jsrt(root):
    for name in ("JPCLN001", "JPCNN001"):
        (root / "All247images").mkdir(exist_ok=True)
        rows = np.arange(2048, dtype=">u2") * 2  # dark at the bottom, since large values are dark here
        np.repeat(rows[:, None], 2048, axis=1).astype(">u2").tofile(root / f"All247images/{name}.IMG")
    masks = tuple(root / f"scratch/fold2/masks/{side} lung/JPCLN001.gif" for side in ("left", "right"))
    for mask in masks:
        picture(mask)
    return {
        "JPCLN001": {"labels": ("Nodule",), "view": "PA", "masks": masks},
        "JPCNN001": {"labels": (), "view": "PA"},
    }


@layout
def object_cxr(root):
    write(root / "train.csv", "image_name,annotation\n00001.jpg,0 1 2 3 4;2 1 2 3 4 5 6\n00002.jpg,\n")
    write(root / "dev.csv", "image_name,annotation\n00001.jpg,\n")
    for name in ("train/00001.jpg", "train/00002.jpg", "dev/00001.jpg"):
        picture(root / name)
    return {
        "train/00001.jpg": {"labels": ("Foreign object",), "view": "FRONTAL", "split": "train"},
        "train/00002.jpg": {"labels": (), "view": "FRONTAL", "split": "train"},
        "dev/00001.jpg": {"labels": (), "view": "FRONTAL", "split": "validation"},
    }


@layout
def tbx11k(root):
    names = ["health/h0001.png", "sick/s0001.png", "tb/tb0007.png", "test/test_0001.png", "extra/da+db/train/p1.png"]
    for name in names:
        picture(root / "imgs" / name, color=True)
    content = {
        "categories": [{"id": 1, "name": "ActiveTuberculosis"}, {"id": 2, "name": "ObsoletePulmonaryTuberculosis"}],
        "images": [{"id": 2, "file_name": "tb/tb0007.png"}, {"id": 601, "file_name": "health/h0001.png"}],
        "annotations": [{"id": 2, "image_id": 2, "category_id": 2}, {"id": 3, "image_id": 2, "category_id": 2}],
    }
    write(root / "annotations/json/TBX11K_trainval.json", json.dumps(content))
    write(root / "lists/all_train.txt", f"{names[0]}\n{names[2]}\n{names[4]}\n")
    write(root / "lists/all_val.txt", f"{names[1]}\n")
    write(root / "lists/all_test.txt", f"{names[3]}\n")
    return {
        names[0]: {"labels": (), "split": "train"},
        names[1]: {"labels": ("Sick without tuberculosis",), "split": "validation"},
        names[2]: {"labels": ("Tuberculosis", "ObsoletePulmonaryTuberculosis"), "split": "train"},
        names[3]: {"split": "test"},
        names[4]: {"split": "train"},
    }


@layout
def kermany(root):
    bacterial, viral = ("Pneumonia", "Bacterial pneumonia"), ("Pneumonia", "Viral pneumonia")
    expected = {
        "train/NORMAL/IM-0115-0001.jpeg": {"patient": "IM-0115", "labels": (), "split": "train"},
        "train/PNEUMONIA/person1_bacteria_1.jpeg": {
            "patient": "person1_bacteria",
            "labels": bacterial,
            "split": "train",
        },
        "train/PNEUMONIA/person1_bacteria_2.jpeg": {
            "patient": "person1_bacteria",
            "labels": bacterial,
            "split": "train",
        },
        "val/NORMAL/NORMAL2-IM-1427-0001.jpeg": {"patient": "NORMAL2-IM-1427", "labels": (), "split": "validation"},
        "test/PNEUMONIA/VIRUS-1008087-0001.jpeg": {"patient": "VIRUS-1008087", "labels": viral, "split": "test"},
    }
    for name in expected:
        picture(root / "chest_xray" / name)
    return {name: facts | {"view": "AP"} for name, facts in expected.items()}


@layout
def covid19_radiography(root):
    labels = {
        "COVID": ("COVID-19",),
        "Normal": (),
        "Lung_Opacity": ("Lung Opacity",),
        "Viral Pneumonia": ("Viral pneumonia",),
    }
    base = root / "COVID-19_Radiography_Dataset"
    for kind in labels:
        picture(base / kind / "images" / f"{kind}-1.png")
        picture(base / kind / "masks" / f"{kind}-1.png")
    return {f"{k}-1": {"labels": found, "masks": (base / k / "masks" / f"{k}-1.png",)} for k, found in labels.items()}


@layout
def covidgr(root):
    picture(root / "P/covid1.jpg")
    picture(root / "N/normal1.jpg")
    return {"P/covid1.jpg": {"labels": ("COVID-19",), "view": "PA"}, "N/normal1.jpg": {"labels": (), "view": "PA"}}


@layout
def ralo(root):
    header = "Subject_ID,Exam_DateTime,Total GEOGRAPHIC,Total OPACITY,Total GEOGRAPHIC,Total OPACITY\n"
    rows = "A1,20200401_1,3,2,4,2\nA1,20200402_1,5,4,5,4\n"
    write(root / "ralo-dataset-metadata.csv", ",,Reader 1,,Reader 2,\n" + header + rows)
    for number in range(2):
        picture(root / f"CXR_images_scored/{number}.jpg")
    return {str(n): {"patient": "A1", "labels": ("COVID-19",), "view": "AP"} for n in range(2)}


@layout
def covid_chestxray(root):
    rows = "2,M,Pneumonia/Viral/COVID-19,PA,X-ray,a.jpeg\n2,M,Pneumonia/Viral/COVID-19,Axial,CT,b.nii.gz\n"
    rows += "3,F,todo,AP Supine,X-ray,c.png\n4,F,No Finding,L,X-ray,d.jpg\n"
    write(root / "metadata.csv", "patientid,sex,finding,view,modality,filename\n" + rows)
    picture(root / "images/a.jpeg")
    picture(root / "images/c.png", color=True)
    picture(root / "images/d.jpg")
    return {
        "a.jpeg": {"patient": "2", "labels": ("Pneumonia", "Viral", "COVID-19"), "view": "PA"},
        "c.png": {"patient": "3", "view": "AP"},
        "d.jpg": {"patient": "4", "labels": (), "view": "LATERAL"},
    }
