import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from anomaly.base import AnomalyMap, Detector
from anomaly.calibration import conformal_threshold
from medssl.data.manifest import NoDataError, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.seen import Seen
from medssl.models.timm_encoder import TimmEncoder
from pipelines.fit import fit

PLAIN = Preprocessing(size=(8, 8), intensity="range", mean=(0.0,), std=(1.0,))


class MeanDetector(Detector):
    """How far the mean grey lies from that of the normals; the map is twice that."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean_", torch.empty(0))
        self.fits = []

    def fit(self, normal, *, workdir=None):
        assert workdir.is_dir()
        samples = [sample for batch in normal.batches() for sample in batch.items]
        self.fits.append(samples)
        pixels = torch.cat([batch.images["image"].pixels for batch in normal.batches()])
        self.mean_ = pixels.mean()[None]
        return self

    def predict(self, batch):
        pixels = batch.images["image"].pixels
        score = (pixels.mean((1, 2, 3)) - self.mean_).abs()
        return AnomalyMap(score=score, maps={"image": 2 * (pixels[:, 0] - self.mean_).abs()})


@pytest.fixture
def folder(tmp_path):
    """40 normal grey pictures of 40 levels, and test pictures nobody could read."""
    root = tmp_path / "data"
    greys(root / "train" / "good", range(100, 140))
    for kind in ("good", "crack"):
        (root / "test" / kind).mkdir(parents=True)
        (root / "test" / kind / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return root


def greys(folder, levels, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels, start):
        Picture.fromarray(np.full((20, 30), level, np.uint8)).save(folder / f"{i:03d}.png")


def fitted(data, tmp_path, detector=None, **arguments):
    """The detector, what `fit` returned, and its calibration.json."""
    detector = detector or MeanDetector()
    out = tmp_path / "model"
    result = fit(data, detector, out, **{"preprocessing": PLAIN, "seed": 3, **arguments})
    return detector, result, json.loads((out / "calibration.json").read_text())


def levels(data, **selection):
    """Grey level in [0, 1] by item."""
    manifest = build_manifest(data)
    items = manifest.where(split="train").images or manifest.images
    return {item.item: float(np.asarray(Picture.open(item.path)).mean()) / 255 for item in items}


def test_the_threshold_is_the_quantile_of_the_held_out_scores(folder, tmp_path):
    detector, result, calibration = fitted(folder, tmp_path, rate=0.05)
    level = levels(folder)
    seen = detector.fits[-1]
    mean = np.mean([level[item] for item in seen])
    scores = sorted(abs(level[item] - mean) for item in level if item not in seen)

    assert (result["num_fitted"], result["num_calibration"]) == (21, 19)  # 19 for 5 %, not 12
    assert calibration["scores"] == pytest.approx(scores, abs=1e-6)
    assert calibration["map_maxima"] == pytest.approx([2 * score for score in scores], abs=1e-6)
    assert result["threshold"] == calibration["scores"][18]
    assert result["map_threshold"] == calibration["map_maxima"][18]
    assert result["calibrated"]
    assert result["missing"] == 0


def test_thirty_percent_are_held_out_where_that_reaches_the_rate(folder, tmp_path):
    _, result, _ = fitted(folder, tmp_path, rate=0.1)
    assert (result["num_fitted"], result["num_calibration"]) == (28, 12)


def test_the_test_side_is_never_opened(folder, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "medssl.data.manifest.read_image",
        lambda path, **options: opened.append(path) or read_image(path, **options),
    )
    from medssl.data.readers.any import read_image

    _, result, _ = fitted(folder, tmp_path)
    assert result["failed"] == 0
    assert opened
    assert {path.parent.name for path in opened} == {"good"}
    assert {path.parent.parent.name for path in opened} == {"train"}


def test_fitted_hashes_are_those_of_the_fitted_items_only(folder, tmp_path):
    detector, _, calibration = fitted(folder, tmp_path)
    manifest = build_manifest(folder)
    hashes = {
        item.item: load_sample(manifest, item, hashes=True).images["image"].provenance
        for item in manifest.where(split="train").images
    }
    expected = {hashes[item]["pixel_sha256"] for item in detector.fits[-1]}
    assert set(calibration["fitted_on"]) == expected


def test_calibration_items_share_no_group_with_fitted_ones(tmp_path):
    greys(tmp_path / "data", range(100, 160))
    rows = [f"{i:03d}.png,patient{i // 4}" for i in range(60)]
    (tmp_path / "data" / "groups.csv").write_text("\n".join(["path,patient", *rows]))
    detector, result, calibration = fitted(
        tmp_path / "data", tmp_path, groups="groups.csv:patient", calibration="split"
    )
    groups = "groups.csv:patient"
    group = {
        item.item: item.group for item in build_manifest(tmp_path / "data", groups=groups).images
    }
    seen = {group[item] for item in detector.fits[-1]}
    assert len(seen) * 4 == result["num_fitted"]
    assert result["num_calibration"] == 60 - result["num_fitted"] >= 19
    assert "patients or parts" in calibration["guarantee"]


def test_copies_of_fitted_pictures_calibrate_nothing(tmp_path):
    greys(tmp_path / "data", [100, 101] * 30)
    _, result, calibration = fitted(tmp_path / "data", tmp_path)
    assert not result["calibrated"]
    assert calibration["scores"] == []


def test_cross_scores_every_item_once_and_ends_with_all(folder, tmp_path):
    detector, result, calibration = fitted(folder, tmp_path, calibration="cross")
    level = levels(folder)
    *folds, last = detector.fits
    scores = []
    for fold in folds:
        mean = np.mean([level[item] for item in fold])
        scores += [abs(level[item] - mean) for item in level if item not in fold]
    assert len(folds) == 5
    assert set(last) == set(level)
    assert calibration["scores"] == pytest.approx(sorted(scores), abs=1e-6)
    assert (result["num_fitted"], result["num_calibration"]) == (40, 40)
    assert "no bound" in result["guarantee"]


def test_a_folder_of_further_normals_calibrates_a_fit_on_all(folder, tmp_path):
    greys(tmp_path / "more", range(60, 80))
    detector, result, calibration = fitted(folder, tmp_path, calibration=tmp_path / "more")
    mean = np.mean(list(levels(folder).values()))
    scores = sorted(abs(level / 255 - mean) for level in range(60, 80))
    assert len(detector.fits) == 1
    assert result["num_fitted"] == 40
    assert calibration["scores"] == pytest.approx(scores, abs=1e-6)
    assert calibration["method"] == "path"


def test_calibration_normals_that_were_fitted_on_are_counted_and_refused(folder, tmp_path):
    greys(tmp_path / "more", [*range(60, 77), 100, 101, 102])  # the last three are in train
    with pytest.raises(ValueError, match="3 of 20 have the same pixels"):
        fitted(folder, tmp_path, calibration=tmp_path / "more")
    assert not (tmp_path / "model").exists()


def test_calibration_normals_of_a_fitted_patient_are_refused(tmp_path):
    greys(tmp_path / "data", range(100, 120))
    greys(tmp_path / "more", range(60, 80))
    rows = [f"data/{i:03d}.png,data{i}" for i in range(20)]
    rows += [f"more/{i:03d}.png,{'data' if i < 2 else 'more'}{i}" for i in range(20)]
    (tmp_path / "groups.csv").write_text("\n".join(["path,patient", *rows]))
    with pytest.raises(ValueError, match="2 are of the same patient"):
        fitted(
            tmp_path / "data",
            tmp_path,
            calibration=tmp_path / "more",
            groups="groups.csv:patient",
        )


class Pretrained(MeanDetector):
    """With an encoder inside."""

    def __init__(self):
        super().__init__()
        self.encoder = TimmEncoder("test_resnet", in_channels=1)


def pretrained_on(data, count, **options):
    """A detector whose encoder has seen the first pictures of a folder."""
    manifest = build_manifest(data, **options)
    items = (manifest.where(split="train").images or manifest.images)[:count]
    hashes = {
        item.item: load_sample(manifest, item, hashes=True).images["image"].provenance
        for item in items
    }
    detector = Pretrained()
    hashes = {name: found["pixel_sha256"] for name, found in hashes.items()}
    detector.encoder.seen = Seen.of(items, hashes)
    return detector, [item.item for item in items]


@pytest.mark.parametrize("calibration", ["split", "cross"])
def test_what_the_encoder_was_pretrained_on_is_fitted_on_and_never_calibrates(
    folder, tmp_path, capsys, calibration
):
    detector, seen = pretrained_on(folder, 20)
    level = levels(folder)
    _, result, saved = fitted(folder, tmp_path, detector, calibration=calibration)
    assert "20 of the 40 normal images" in capsys.readouterr().out
    assert result["calibrated"]
    assert result["num_calibration"] == {"split": 19, "cross": 20}[calibration]
    fits = detector.fits if calibration == "split" else detector.fits[:-1]
    scores = []
    for fit_items in fits:
        mean = np.mean([level[item] for item in fit_items])
        scores += [abs(level[i] - mean) for i in level if i not in seen and i not in fit_items]
    assert saved["scores"] == pytest.approx(sorted(scores), abs=1e-6)
    assert set(saved["fitted_on"]) >= detector.encoder.seen.pixels


def test_an_encoder_that_has_seen_every_normal_leaves_nothing_to_calibrate_with(folder, tmp_path):
    detector, _ = pretrained_on(folder, 40)
    _, result, saved = fitted(folder, tmp_path, detector)
    assert (result["calibrated"], result["num_fitted"]) == (False, 40)
    assert saved["scores"] == []


def test_calibration_normals_that_the_encoder_was_pretrained_on_are_refused(folder, tmp_path):
    greys(tmp_path / "more", range(60, 80))
    detector, _ = pretrained_on(tmp_path / "more", 4)
    with pytest.raises(ValueError, match="4 were seen when its encoder was pretrained"):
        fitted(folder, tmp_path, detector, calibration=tmp_path / "more")


def test_another_picture_of_a_pretrained_patient_never_calibrates(tmp_path):
    greys(tmp_path / "data", range(100, 160))
    rows = [f"{i:03d}.png,patient{i // 3}" for i in range(60)]
    (tmp_path / "data" / "groups.csv").write_text("\n".join(["path,patient", *rows]))
    detector, seen = pretrained_on(tmp_path / "data", 31, groups="groups.csv:patient")
    check_nothing_of_these_patients_calibrates(tmp_path, detector, seen)


def test_patients_are_kept_together_where_only_pictures_were_known_in_pretraining(tmp_path):
    greys(tmp_path / "data", range(100, 180))
    rows = [f"{i:03d}.png,patient{i % 40}" for i in range(80)]
    (tmp_path / "data" / "groups.csv").write_text("\n".join(["path,patient", *rows]))
    detector, seen = pretrained_on(tmp_path / "data", 20)  # without groups
    check_nothing_of_these_patients_calibrates(tmp_path, detector, seen)


def check_nothing_of_these_patients_calibrates(tmp_path, detector, seen):
    manifest = build_manifest(tmp_path / "data", groups="groups.csv:patient")
    group = {item.item: item.group for item in manifest.images}
    _, result, _ = fitted(tmp_path / "data", tmp_path, detector, groups="groups.csv:patient")
    scored = set(group) - set(detector.fits[-1])
    assert len(scored) == result["num_calibration"] >= 19
    assert not {group[item] for item in scored} & {group[item] for item in seen}
    assert not {group[item] for item in scored} & {group[item] for item in detector.fits[-1]}


@pytest.mark.parametrize(
    ("count", "calibration", "missing"), [(30, "split", 8), (18, "cross", 1), (40, "none", 19)]
)
def test_too_few_normals_are_all_fitted_on_and_the_lack_is_told(
    tmp_path, capsys, count, calibration, missing
):
    greys(tmp_path / "data", range(100, 100 + count))
    _, result, saved = fitted(tmp_path / "data", tmp_path, calibration=calibration)
    assert (tmp_path / "model" / "model.yaml").is_file()
    assert result["num_fitted"] == count
    assert (result["calibrated"], result["threshold"], result["missing"]) == (False, None, missing)
    assert saved["scores"] == []
    told = capsys.readouterr().out
    assert "not calibrated" in told
    if calibration != "none":
        assert f"{missing} more normal images are needed" in told


@pytest.mark.parametrize("calibration", ["split", "cross", "none"])
def test_required_calibration_fails_before_anything_is_read(tmp_path, calibration):
    greys(tmp_path / "data", range(100, 118))
    detector = MeanDetector()
    with pytest.raises(ValueError, match="takes 19"):
        fitted(
            tmp_path / "data",
            tmp_path,
            detector,
            calibration=calibration,
            require_calibration=True,
        )
    assert detector.fits == []
    assert not (tmp_path / "model").exists()


def test_required_calibration_fails_before_the_fit_where_files_turn_out_broken(tmp_path):
    greys(tmp_path / "data", range(100, 138))
    (tmp_path / "data" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    detector = MeanDetector()
    with pytest.raises(ValueError, match="1 more normal image"):
        fitted(tmp_path / "data", tmp_path, detector, require_calibration=True)
    assert detector.fits == []


def test_unreadable_normals_are_named_and_the_rest_is_used(folder, tmp_path):
    broken = folder / "train" / "good" / "007.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    _, result, _ = fitted(folder, tmp_path)
    [item] = [item.item for item in build_manifest(folder).images if item.path == str(broken)]
    assert result["failed"] == 1
    assert result["errors"][0]["item"] == item
    assert result["errors"][0]["reason"]
    assert str(tmp_path) not in json.dumps(result["errors"])
    assert result["num_fitted"] + result["num_calibration"] == 39


def test_nothing_readable_is_no_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(NoDataError, match="none of the 1 normal images can be used; the first: "):
        fitted(tmp_path / "data", tmp_path)


def test_a_folder_without_normals_is_no_data(folder, tmp_path):
    with pytest.raises(NoDataError, match="normal training image"):
        fitted(folder, tmp_path, select="split == 'test'")


def test_anomalous_images_are_never_fitted_on(tmp_path):
    greys(tmp_path / "data" / "train" / "good", range(100, 110))
    greys(tmp_path / "data" / "test" / "good", [99])
    manifest = build_manifest(tmp_path / "data")
    items = [
        type(item)(**{name: getattr(item, name) for name in item.__slots__} | {"label": 1})
        if i < 4
        else item
        for i, item in enumerate(manifest.where(split="train").images)
    ]
    type(manifest)(items=tuple(items), key=manifest.key).write(tmp_path / "items.parquet")
    detector, result, _ = fitted(tmp_path / "items.parquet", tmp_path, calibration="none")
    assert result["num_fitted"] == 6
    assert set(detector.fits[0]) == {item.item for item in items[4:]}


def test_max_train_is_a_choice_of_the_seed(folder, tmp_path):
    chosen, digests = [], []
    for run, seed in enumerate([0, 0, 1]):
        detector, result, _ = fitted(
            folder, tmp_path / str(run), max_train=7, seed=seed, calibration="none"
        )
        assert result["num_fitted"] == 7
        chosen.append(detector.fits[0])
        digests.append(result["digest"])
    assert chosen[0] == chosen[1] != chosen[2]
    assert digests[0] == digests[1] != digests[2]


def test_an_existing_or_unwritable_out_is_refused_before_the_data_are_looked_at(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists"):
        fit(tmp_path / "nothing", MeanDetector(), tmp_path / "file", preprocessing=PLAIN)
    with pytest.raises(PermissionError, match="cannot write into"):
        fit(tmp_path / "nothing", MeanDetector(), tmp_path / "file" / "x", preprocessing=PLAIN)


class WithEncoder(MeanDetector):
    """Stands on an encoder that says what it was trained with."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


def test_preprocessing_comes_from_the_encoder_and_may_not_differ(folder, tmp_path):
    encoder = TimmEncoder("test_resnet", in_channels=1)
    out = tmp_path / "model"
    with pytest.raises(ValueError, match="no preprocessing"):
        fit(folder, WithEncoder(encoder), out)
    encoder.preprocessing = PLAIN
    other = Preprocessing(size=(16, 16), intensity="range", mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match=r"size \(16, 16\) against \(8, 8\)"):
        fit(folder, WithEncoder(encoder), out, preprocessing=other)
    fit(folder, WithEncoder(encoder), out, calibration="none")
    assert "size:\n  - 8\n  - 8\n" in (out / "model.yaml").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 0.0}, "between 0 and 1"),
        ({"calibration": "half"}, "split, cross, none or a Path"),
        ({"max_train": 0}, "max_train must be at least 1"),
        ({"device": "cuda:99"}, "no such GPU"),
        ({"device": "gpu"}, "auto, cpu, cuda"),
    ],
)
def test_wrong_arguments_are_refused_before_the_fit(folder, tmp_path, wrong, message):
    detector = MeanDetector()
    with pytest.raises(ValueError, match=message):
        fitted(folder, tmp_path, detector, **wrong)
    assert detector.fits == []


def test_the_card_tells_the_promise_and_no_path(folder, tmp_path):
    _, result, _ = fitted(folder, tmp_path)
    card = (tmp_path / "model" / "card.md").read_text()
    assert result["guarantee"] in card
    assert "21 normal items of 21 patients or parts" in card
    assert "PICTURE" in card
    assert "20 x 30" in card
    assert str(tmp_path) not in card


def test_patchcore_saved_scores_its_calibration_items_as_it_was_calibrated(folder, tmp_path):
    from anomaly.features.patchcore import PatchCore
    from pipelines.scoring import Scorer

    rng = np.random.default_rng(0)
    for file in (folder / "train" / "good").iterdir():
        Picture.fromarray(rng.integers(0, 255, (40, 30), np.uint8)).save(file)
    detector = PatchCore(TimmEncoder("test_resnet", in_channels=1), layers=["layer1"])
    preprocessing = Preprocessing(size=(32, 32), intensity="range")
    _, result, calibration = fitted(folder, tmp_path, detector, preprocessing=preprocessing)

    scorer = Scorer(Path(result["model"]), device="cpu")
    manifest = build_manifest(folder)
    held_out, maxima = [], []
    for item in manifest.where(split="train").images:
        sample = load_sample(manifest, item, hashes=True)
        if sample.images["image"].provenance["pixel_sha256"] not in calibration["fitted_on"]:
            [scored] = scorer.score([sample])
            held_out.append(scored.score)
            maxima.append(float(scored.map.pixels.nan_to_num(-math.inf).max()))
    assert sorted(held_out) == calibration["scores"]
    assert sorted(maxima) == calibration["map_maxima"]
    assert result["threshold"] == conformal_threshold(held_out, 0.05)


def test_the_run_is_recorded_and_the_model_registered(folder, tmp_path):
    from pipelines import record

    _, result, _ = fitted(folder, tmp_path, register="mean of greys")
    assert result["registered"] == 1
    [entry] = record.registered("mean of greys")
    assert entry["digest"] == result["digest"]
