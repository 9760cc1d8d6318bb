"""What encoders are worth on chest X-rays, blood cells and digits: the whole battle, one command.

python benchmarks/battle.py PNEUMONIA COVID CELLS WEIGHTS --out DIR [--seeds 3]

PNEUMONIA: pictures with labels.csv (path, finding, abnormal, patient_id, split). COVID: pictures
with reports.csv (path, text, view, sex, patient_id, split). CELLS: photographs with boxes.csv
(path, split, class, x1, y1, x2, y2). WEIGHTS: of mobilenetv2_100, on ImageNet. Digits come with
scikit-learn. DINO and LVM-Med are pretrained on the training pictures of PNEUMONIA and ConVIRT on
those of COVID, by the configs of the house; then `medssl probe` asks all of them about six tasks.
Started again with the same DIR it goes on where it was stopped.
"""

import argparse
import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.encoders_cxr import IMAGENET, METHODS, arguments
from medssl.data.preprocess import Preprocessing
from medssl.models.folder import save_model, selftest_noise
from medssl.models.timm_encoder import TimmEncoder
from medssl.probes.knn import KNN
from medssl.probes.ridge import Ridge
from medssl.probes.task import Task
from pipelines.contest import Contender
from pipelines.pretrain import pretrain
from pipelines.probe import probe

MOST = 600  # cells of one class, of thousands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pneumonia", "covid", "cells", "weights"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{given.out.absolute()}/mlflow.db")
    tasks = tasks_of(given)
    probes = {"20-NN": KNN(), "ridge": Ridge()}
    result = probe(given.out / "battle", contenders_of(given), tasks, probes)
    print(Path(result["table"]).read_text())


def contenders_of(given: argparse.Namespace) -> dict[str, Contender]:
    places = {
        "DINO, X-rays": ("dino_cxr", given.pneumonia),
        "LVM-Med, X-rays": ("lvm_med_cxr", given.pneumonia),
        "ConVIRT, X-rays": ("convirt_cxr", given.covid),
    }
    imagenet = TimmEncoder("mobilenetv2_100", weights=given.weights, options={"pad_type": "same"})
    found = {
        "random": Contender(folders=[untrained(given.out, seed) for seed in range(given.seeds)]),
        "ImageNet": Contender(network=imagenet, preprocessing=IMAGENET),
    }
    for name, (config, data) in places.items():
        folders = []
        for seed in range(given.seeds):
            folder = given.out / "encoders" / f"{name.replace(', ', '_')}_{seed}"
            groups = f"{data / 'labels.csv'}:patient_id" if data == given.pneumonia else None
            run = arguments(Path(f"configs/pretrain/{config}.yaml"), seed)
            pretrain(data, out=folder, groups=groups, resume=True, **run)
            folders.append(folder)
        found[name] = Contender(folders=folders)
    return found


def untrained(out: Path, seed: int) -> Path:
    """The network of DINO's config as it begins."""
    folder = out / "encoders" / f"random_{seed}"
    if not folder.exists():
        run = arguments(Path(f"configs/pretrain/{METHODS['DINO']}.yaml"), seed)
        prepared: Preprocessing = run["preprocessing"]
        encoder = run["objective"].encoder.eval()
        noise = selftest_noise(encoder.selftest_shape(prepared.size))
        about = {"preprocessing": prepared, "domain": {}, "card": "untrained"}
        save_model(folder, encoder, kind="encoder", noise=noise, **about)
    return folder


def tasks_of(given: argparse.Namespace) -> dict[str, Task]:
    xray = {"data": given.pneumonia, "groups": "labels.csv:patient_id", "split": "labels.csv:split"}
    adult = {"data": given.covid, "groups": "reports.csv:patient_id", "split": "reports.csv:split"}
    views = write_views(given.covid, given.out)
    platelets = write_platelets(given.cells, given.out)
    cells, digits = write_cells(given.cells, given.out), write_digits(given.out)
    return {
        "pneumonia": Task(target="labels.csv:abnormal", **xray),
        "finding": Task(target="labels.csv:finding", **xray),
        "view": Task(target=f"{views}:view", columns=[f"{views}:sex"], **adult),
        "platelets": Task(
            data=given.cells, target=f"{platelets}:platelet", split=f"{platelets}:split"
        ),
        "cell": Task(
            data=cells,
            target="labels.csv:class",
            groups="labels.csv:photo",
            split="labels.csv:split",
        ),
        "digit": Task(data=digits, target="labels.csv:digit"),
    }


def write_views(root: Path, out: Path) -> Path:
    """PA, or AP in any posture."""
    rows = [
        {"path": str(root / row["path"]), "view": row["view"][:2], "sex": row["sex"]}
        for row in read(root / "reports.csv")
    ]
    return write(out / "views.csv", rows)


def write_platelets(root: Path, out: Path) -> Path:
    """Whether a photograph shows a platelet."""
    seen: dict[str, dict[str, str]] = {}
    for box in read(root / "boxes.csv"):
        row = seen.setdefault(box["path"], {"platelet": "no", "split": box["split"]})
        if box["class"] == "Platelets":
            row["platelet"] = "yes"
    return write(out / "platelets.csv", [{"path": str(root / p), **row} for p, row in seen.items()])


def write_cells(root: Path, out: Path) -> Path:
    """Each box as a picture, at most `MOST` of a class; a photograph stays on one side."""
    folder, rows, count = out / "cells", [], Counter[str]()
    boxes = read(root / "boxes.csv")
    order = torch.randperm(len(boxes), generator=torch.Generator().manual_seed(0)).tolist()
    for number in order:
        box = boxes[number]
        left, top, right, bottom = (int(float(box[name])) for name in ("x1", "y1", "x2", "y2"))
        count[box["class"]] += 1
        if count[box["class"]] > MOST or min(right - left, bottom - top) < 8:
            continue
        file = folder / ("test" if box["split"] == "test" else "train") / f"{number}.png"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(root / box["path"]).crop((left, top, right, bottom)).save(file)
        side = file.parent.name
        rows.append({"path": f"{side}/{file.name}", "class": box["class"], "split": side,
                     "photo": Path(box["path"]).stem})  # fmt: skip
    write(folder / "labels.csv", rows)
    return folder


def write_digits(out: Path) -> Path:
    from sklearn.datasets import load_digits

    folder, digits, rows = out / "digits", load_digits(), []
    folder.mkdir(exist_ok=True)
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        rows.append({"path": f"{number}.png", "digit": str(label)})
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"{number}.png")
    write(folder / "labels.csv", rows)
    return folder


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


if __name__ == "__main__":
    main()
