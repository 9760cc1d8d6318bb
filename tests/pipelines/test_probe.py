"""The probe job: what it measures, saves and does not do twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medssl.data.preprocess import Preprocessing
from medssl.models.cost import Cost
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.models.timm_encoder import TimmEncoder
from medssl.probes.knn import KNN
from medssl.probes.nearest_mean import NearestMean
from medssl.probes.task import Task
from pipelines import contest
from pipelines.contest import Contender, balanced_accuracy, macro_auroc
from pipelines.probe import probe
from pipelines.score import read_rows, score

PREPARE = Preprocessing(size=(32, 32), intensity="range", channels=1)


def write_pictures(folder: Path, count: int = 40) -> Path:
    """Dark and bright pictures, two of each patient; a site that says nothing."""
    folder.mkdir(parents=True)
    lines = ["path,finding,patient,split,site"]
    for number in range(count):
        generator = np.random.default_rng(number)
        bright = number // 2 % 2
        pixels = generator.integers(0, 120, (24, 24)) + 100 * bright
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        split, site = ("test" if number >= count // 2 else "train"), "ab"[number // 4 % 2]
        lines.append(f"{number}.png,{'bright' if bright else 'dark'},p{number // 2},{split},{site}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def encoder(seed: int) -> TimmEncoder:
    torch.manual_seed(seed)
    return TimmEncoder("test_resnet", in_channels=1).eval()


def folders(place: Path, count: int) -> list[Path]:
    found = []
    for seed in range(count):
        folder = place / f"encoder{seed}"
        save_model(
            folder,
            encoder(seed),
            kind="encoder",
            preprocessing=PREPARE,
            domain={},
            card="",
            noise=selftest_noise((2, 1, 32, 32)),
        )
        found.append(folder)
    return found


def task(data: Path) -> Task:
    names = {name: f"labels.csv:{name}" for name in ("finding", "patient", "split", "site")}
    return Task(
        data=data,
        target=names["finding"],
        groups=names["patient"],
        split=names["split"],
        columns=[names["site"]],
    )


@pytest.fixture
def arguments(tmp_path: Path):
    encoders = {
        "two seeds": Contender(folders=folders(tmp_path, 2)),
        "a network": Contender(network=encoder(7), preprocessing=PREPARE),
    }
    return {
        "out": tmp_path / "out",
        "encoders": encoders,
        "tasks": {"brightness": task(write_pictures(tmp_path / "data"))},
        "probes": {"knn": KNN(neighbours=3), "mean": NearestMean()},
        "shares": (0.2, 1.0),
        "draws": 2,
        "device": "cpu",
    }


def test_every_encoder_is_asked_by_every_probe_at_every_share(arguments):
    found = probe(**arguments)
    told = {(one["encoder"], one["probe"], one["share"]) for one in found["results"]}
    assert len(told) == len(found["results"]) == 2 * 2 * 2
    shown = {one["share"]: one["shown"] for one in found["results"]}
    assert shown == {0.2: 4, 1.0: 20}
    everything = [one for one in found["results"] if one["share"] == 1]
    assert all(one["auroc"]["value"] > 0.9 for one in everything)
    assert {one["name"] for one in found["standings"]} == set(arguments["encoders"])
    assert found["cost"]["a network"]["parameters"] > 0
    written = json.loads((arguments["out"] / "results.json").read_text())
    assert written["results"] == found["results"]
    with PIL.Image.open(found["plot"]) as plot:
        assert plot.size[0] > 300
    text = Path(found["table"]).read_text()
    assert "| a network | knn |" in text


def test_what_is_behind_a_result_is_told_by_column(arguments):
    arguments["encoders"].pop("two seeds")
    (behind,) = probe(**arguments)["details"]
    groups = {one["name"]: one for one in behind["groups"]["site"]["groups"]}
    assert set(groups) == {"a", "b"}
    assert {one["items"] for one in groups.values()} == {8, 12}
    assert behind["scaling"] == {}  # one share below 1 tells no law


def test_the_best_encoder_is_kept_as_a_classifier_that_scores_pictures(arguments, tmp_path: Path):
    task = replace(arguments["tasks"]["brightness"], normal="dark")
    arguments["tasks"] = {"brightness": task}
    arguments["encoders"].pop("two seeds")
    folder = Path(probe(**arguments)["classifiers"]["brightness"])
    score(task.data, str(folder), tmp_path / "scored", select="label is None", device="cpu")
    rows = read_rows(tmp_path / "scored")
    predicted = {Path(row["path"]).stem: row["predicted"] for row in rows}
    assert len(predicted) == 40
    for name, found in predicted.items():
        assert found == ("bright" if int(name) // 2 % 2 else "dark")


def test_a_law_is_fitted_where_four_shares_were_drawn(arguments):
    arguments["encoders"].pop("two seeds")
    arguments |= {"shares": (0.2, 0.3, 0.5, 0.8), "draws": 2, "probes": {"mean": NearestMean()}}
    (behind,) = probe(**arguments)["details"]
    assert behind["scaling"]["mean"]["largest"] == 16
    assert behind["scaling"]["mean"]["answer"].startswith("Twice the data, 32 items")


def test_a_second_run_computes_nothing_and_says_the_same(arguments, monkeypatch):
    arguments["encoders"].pop("two seeds")  # loading a folder runs its self-test
    first = probe(**arguments)

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(contest, "scores_of", never)
    monkeypatch.setattr(TimmEncoder, "forward", lambda *_: never())
    cost = Cost(parameters=1, gflop=1.0, images_per_second=1.0, device="cpu")
    monkeypatch.setattr("pipelines.probe._cost", lambda *_: cost)
    assert probe(**arguments)["results"] == first["results"]


def test_an_unreadable_picture_is_named_and_left_out(arguments, capsys):
    data = arguments["tasks"]["brightness"].data
    (data / "3.png").write_bytes(b"no picture")
    arguments["encoders"].pop("two seeds")
    found = probe(**arguments)
    assert "left out: item" in capsys.readouterr().out
    assert max(one["shown"] for one in found["results"]) == 19


def test_macro_auroc_and_balanced_accuracy_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    scores = torch.softmax(torch.randn(60, 3, generator=generator), dim=1)
    ones = torch.ones(1, 60, dtype=torch.int64)
    wanted = roc_auc_score(labels.numpy(), scores.numpy(), multi_class="ovr")
    assert macro_auroc(scores, labels, ones).item() == pytest.approx(wanted, abs=1e-6)
    wanted = balanced_accuracy_score(labels.numpy(), scores.argmax(1).numpy())
    assert balanced_accuracy(scores, labels, ones).item() == pytest.approx(wanted)
    two = labels.clamp(max=1)
    wanted = roc_auc_score(two.numpy(), (scores[:, 1] - scores[:, 0]).numpy())
    found = macro_auroc(scores[:, :2], two, ones).item()
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folders": [Path("x")], "network": encoder(0)}, "not both"),
        ({}, "not both"),
        ({"network": encoder(0)}, "needs preprocessing"),
    ],
)
def test_an_encoder_is_given_in_one_way(changes, message: str):
    with pytest.raises(ValueError, match=message):
        next(Contender(**changes).members())


def test_another_preprocessing_than_the_encoders_own_is_refused(tmp_path: Path):
    (folder,) = folders(tmp_path, 1)
    other = Preprocessing(size=(16, 16), intensity="range", channels=1)
    with pytest.raises(ValueError, match="was trained with"):
        next(Contender(folders=[folder], preprocessing=other).members())
    assert load_model(folder).preprocessing == PREPARE
