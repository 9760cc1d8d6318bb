"""Pictures with xyz beside them, from a folder to verdicts; one may be missing."""

import numpy as np
import pytest
import tifffile
from far_points import DarkAndDeep
from PIL import Image as Pillow

from medssl.data.geometry_steps import Geometry
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from pipelines.evaluate import evaluate
from pipelines.fit import choose_preprocessing, fit
from pipelines.score import read_rows
from pipelines.scoring import Scorer

SIZE = (8, 12)
PICTURES = Preprocessing(size=SIZE, intensity="range", mean=(0.0,), std=(1.0,))
BOTH = Preprocessing(
    size=SIZE, intensity="range", mean=(0.0,), std=(1.0,), geometry=Geometry(unit="mm")
)


def write_part(place, name, level, depth_m):
    for folder in ("rgb", "xyz"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", SIZE[::-1], (level,) * 3).save(place / "rgb" / f"{name}.png")
    rows, columns = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    xyz = np.stack([columns / 1000, rows / 1000, np.full(SIZE, depth_m)], -1).astype(np.float32)
    tifffile.imwrite(place / "xyz" / f"{name}.tiff", xyz, photometric="rgb")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A category in meters with two incomplete test items, a calibrated model, and its scores."""
    place = tmp_path_factory.mktemp("rgbd")
    root = place / "bagel"
    for i in range(10):
        write_part(root / "train/good", f"{i}", 100 + i, 0.5 + 0.001 * i)
    write_part(root / "train/good", "colorless", 100, 0.5)
    (root / "train/good/rgb/colorless.png").unlink()
    for name in ("whole", "colorless", "flat"):
        write_part(root / "test/good", name, 51, 0.505)
    (root / "test/good/rgb/colorless.png").unlink()
    (root / "test/good/xyz/flat.tiff").unlink()
    write_part(root / "test/deep", "0", 120, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        fitted = fit(
            root, DarkAndDeep(), place / "model", preprocessing=BOTH, rate=0.3, device="cpu"
        )
        found = evaluate(root, str(place / "model"), place / "out", device="cpu")
    return place, fitted, found


def rows_of(place):
    return {row["path"].partition("/test/")[2]: row for row in read_rows(place / "out")}


def test_a_normal_item_without_a_picture_is_left_out_of_the_fit(done):
    _, fitted, _ = done
    assert fitted["num_fitted"] + fitted["num_calibration"] == 10
    assert [error["reason"] for error in fitted["errors"]] == [
        "a picture with xyz beside it is needed, as others have"
    ]


def test_both_modalities_reach_the_detector_in_its_own_units(done):
    """Scores of two items differ by their depths in mm and their levels of 255."""
    place, _, _ = done
    rows = rows_of(place)
    whole, deep = rows["good/rgb/whole.png"], rows["deep/rgb/0.png"]
    assert deep["score"] - whole["score"] == pytest.approx(600 - 505 - (120 - 51) / 255, abs=1e-3)
    assert deep["anomalous"]
    assert deep["missing"] is None


def test_what_is_missing_is_told_and_there_is_no_verdict(done):
    place, _, found = done
    rows = rows_of(place)
    assert rows["good/rgb/whole.png"]["threshold"] is not None
    for path, what in (("good/xyz/colorless.tiff", "color"), ("good/rgb/flat.png", "geometry")):
        row = rows[path]
        told = [row[name] for name in ("status", "missing", "anomalous", "p_value", "threshold")]
        assert told == ["ok", what, None, None, None]
        assert row["no_verdict"].startswith(f"{what} missing")
        assert row["boxes"] is None
        assert row["map_path"] is not None
    assert found["num_without_verdict"] == 2
    page = (place / "out/report.html").read_text()
    assert "color missing" in page
    assert "geometry missing" in page


def test_the_console_counts_items_without_a_modality(done, capfd, monkeypatch):
    from pipelines.score import score

    place, _, _ = done
    monkeypatch.chdir(place)
    root, model = place / "bagel", str(place / "model")
    score(root, model, place / "again", select="split == 'test'", device="cpu")
    assert "1 items scored without a verdict: color missing" in capfd.readouterr().out


def test_an_item_without_a_picture_scores_as_in_a_batch_of_others(done):
    place, _, _ = done
    scorer = Scorer(place / "model", device="cpu")
    manifest = build_manifest(place / "bagel").select("split == 'test'")
    samples = [load_sample(manifest, item) for item in manifest.images]
    together = [one.score for one in scorer.score(samples)]
    assert together == [scorer.score([sample])[0].score for sample in samples]


def test_what_is_unlike_in_one_modality_alone_is_refused(done, tmp_path):
    write_part(tmp_path / "bagel/test/good", "0", 100, 0.5)
    tifffile.imwrite(
        tmp_path / "bagel/test/good/xyz/0.tiff",
        np.ones((30, 40, 3), np.float32),
        photometric="rgb",
    )
    (tmp_path / "bagel/test/good/rgb/0.png").unlink()
    manifest = build_manifest(tmp_path / "bagel")
    scorer = Scorer(done[0] / "model", device="cpu")
    with pytest.raises(ValueError, match="size 30 x 40 pixels"):
        scorer.check(load_sample(manifest, manifest.images[0]))


def test_geometry_may_be_added_to_the_preprocessing_of_an_encoder_and_nothing_changed():
    from medssl.models.timm_encoder import TimmEncoder

    encoder = TimmEncoder("test_resnet", in_channels=3)
    encoder.preprocessing = PICTURES
    detector = DarkAndDeep()
    detector.encoder = encoder
    assert choose_preprocessing(detector, BOTH) == BOTH
    other = Preprocessing(size=(9, 9), intensity="range", geometry=Geometry())
    with pytest.raises(ValueError, match="size"):
        choose_preprocessing(detector, other)
