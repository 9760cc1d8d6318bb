"""The drift job: what it scores, what it compares, and what its verdict is."""

import json
from pathlib import Path

import numpy as np
import pytest
from mean_distance import save_mean_distance
from PIL import Image as Pillow

from anomaly.calibration import Calibration
from anomaly.drift import check_drift
from medssl.data.manifest import NoDataError, build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from pipelines.cli import main
from pipelines.drift import checked, drift
from pipelines.leakage import History, LeakageError, traces
from pipelines.score import read_rows, score

SIZE = (8, 10)
PICTURES = Preprocessing(size=SIZE, intensity="range", mean=(0.0,), std=(1.0,))
NORMAL = 100


def save_pictures(folder: Path, count: int, *, offset: int = 0, seed: int = 0) -> Path:
    """Pictures of one grey each, so that the score is how far it lies from 100."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        grey = NORMAL + int(rng.integers(0, 60)) + offset
        Pillow.fromarray(np.full(SIZE, grey, np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def held_out(count: int, seed: int = 9) -> list[float]:
    return (np.random.default_rng(seed).integers(0, 60, count) / 255).tolist()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_model(tmp_path, held_out(60))


def save_model(tmp_path: Path, scores: list[float], **more: object) -> str:
    fitted = tmp_path / "fitted"
    fitted.mkdir()
    Pillow.fromarray(np.full(SIZE, NORMAL, np.uint8)).save(fitted / "0.png")
    calibration = Calibration.from_scores(scores, scores, rate=0.1, method="split", **more)
    place = tmp_path / "model"
    return str(
        save_mean_distance(fitted, place, PICTURES, calibration=calibration, select="label is None")
    )


def result(out: Path) -> dict:
    return json.loads((out / "drift.json").read_text())


def test_normals_like_the_held_out_ones_are_no_drift(model, tmp_path, capsys):
    data = save_pictures(tmp_path / "data", 25)
    summary = drift(data, model, tmp_path / "out")
    assert (summary["drift"], summary["reasons"], summary["failed"]) == (False, [], 0)
    (check,) = result(tmp_path / "out")["checks"]
    assert (check["num_calibration"], check["num_new"], check["site"]) == (60, 25, None)
    assert "no drift found: 25 new normal items" in capsys.readouterr().out


def test_brighter_normals_are_drift_and_the_exit_code_stays_zero(model, tmp_path, capsys):
    data = save_pictures(tmp_path / "data", 25, offset=60)
    code = main(["drift", str(data), "--model", model, "--out", str(tmp_path / "out"), "--json"])
    told = capsys.readouterr()
    assert code == 0
    assert json.loads(told.out)["drift"] is True
    assert json.loads(told.out)["reasons"] == ["higher", "alarms", "sequence"]
    assert "drift: of 25 new normal items, scores are higher and too many" in told.err
    assert str(tmp_path) not in told.err


def test_the_check_is_that_of_the_scores_in_the_order_of_the_paths(model, tmp_path):
    data = save_pictures(tmp_path / "data", 25)
    drift(data, model, tmp_path / "out", alpha=0.3)
    scores = [row["score"] for row in read_rows(tmp_path / "out")]
    greys = [np.asarray(Pillow.open(file))[0, 0] for file in sorted(data.glob("*.png"))]
    assert scores == pytest.approx([(int(grey) - NORMAL) / 255 for grey in greys], abs=1e-6)
    calibration = Calibration.from_scores(held_out(60), held_out(60), rate=0.1, method="split")
    expected = check_drift(calibration, scores, alpha=0.3)
    (check,) = result(tmp_path / "out")["checks"]
    for name in ("higher", "lower", "alarms", "log10_wealth", "largest_log10_wealth", "alpha"):
        assert check[name] == getattr(expected, name)


def test_anomalous_and_training_pictures_are_left_out(model, tmp_path):
    data = tmp_path / "data"
    save_pictures(data / "train" / "good", 5, offset=90)
    save_pictures(data / "test" / "good", 25)
    save_pictures(data / "test" / "spot", 30, offset=90)
    assert drift(data, model, tmp_path / "fresh")["num_new"] == 25
    score(data, model, tmp_path / "scored", batch_size=3)
    before = (tmp_path / "scored" / "scores.jsonl").stat().st_mtime_ns
    assert drift(data, model, tmp_path / "scored")["num_new"] == 25
    assert (tmp_path / "scored" / "scores.jsonl").stat().st_mtime_ns == before
    fresh, scored = result(tmp_path / "fresh"), result(tmp_path / "scored")
    assert fresh == scored
    with pytest.raises(NoDataError, match="none of the 30 images is a new normal one"):
        drift(data, model, tmp_path / "out", select="defect == 'spot'")


def test_a_table_of_scores_gives_the_same_answer_and_takes_no_selection(model, tmp_path):
    data = save_pictures(tmp_path / "data", 25, offset=60)
    drift(data, model, tmp_path / "out")
    table = tmp_path / "out" / "scores.parquet"
    drift(table, model, tmp_path / "again")
    assert result(tmp_path / "again") == result(tmp_path / "out")
    with pytest.raises(ValueError, match="no --select"):
        drift(table, model, tmp_path / "other", select="label == 0")


def test_scores_of_another_model_are_refused(model, tmp_path):
    data = save_pictures(tmp_path / "data", 5)
    drift(data, model, tmp_path / "out")
    (tmp_path / "two").mkdir()
    other = save_model(tmp_path / "two", held_out(61))
    with pytest.raises(ValueError, match="of another model"):
        drift(tmp_path / "out" / "scores.parquet", other, tmp_path / "again")


def test_pictures_that_the_model_was_fitted_on_are_no_new_normals(tmp_path):
    data = save_pictures(tmp_path / "data", 25)
    image = read_image(data / "003.png", hashes=True)
    seen = [image.provenance["pixel_sha256"]]
    model = save_model(tmp_path, held_out(60), fitted_on=seen)
    with pytest.raises(LeakageError, match=r"normal items must be new to the model: \d of 25"):
        drift(data, model, tmp_path / "out")


def test_a_broken_picture_is_counted_as_failed_and_the_rest_is_compared(model, tmp_path):
    data = save_pictures(tmp_path / "data", 25)
    (data / "007.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    summary = drift(data, model, tmp_path / "out")
    assert (summary["failed"], summary["num_new"], summary["drift"]) == (1, 24, False)


def test_a_model_without_calibration_has_nothing_to_compare_with(tmp_path):
    model = save_model(tmp_path, [])
    with pytest.raises(ValueError, match="calibrate it with medssl calibrate"):
        drift(save_pictures(tmp_path / "data", 3), model, tmp_path / "out")


def by_site(**counts: int) -> Calibration:
    scores = [
        score for seed, count in enumerate(counts.values()) for score in held_out(count, seed)
    ]
    sites = [name for name, count in counts.items() for _ in range(count)]
    return Calibration.from_scores(
        scores, scores, rate=0.1, method="split", sites=sites, by="scanner"
    )


def rows(**shift_of: float) -> list[dict]:
    """Twenty rows per site, their scores shifted."""
    return [
        {"site": name, "score": score + shift}
        for seed, (name, shift) in enumerate(shift_of.items())
        for score in held_out(20, seed + 50)
    ]


def test_each_site_is_held_against_its_own_normals_with_its_share_of_alpha():
    found = checked(by_site(a=50, b=50), rows(a=0.0, b=0.2), alpha=0.02)
    assert found["drift"] is True
    told = {check["site"]: check for check in found["checks"]}
    assert (told["a"]["drift"], told["b"]["drift"]) == (False, True)
    assert [check["alpha"] for check in found["checks"]] == [0.01, 0.01]
    assert (told["a"]["num_new"], told["a"]["num_calibration"]) == (20, 50)


def test_a_site_without_held_out_normals_is_named_as_left_out():
    found = checked(by_site(a=50), rows(a=0.0, b=0.2), alpha=0.02)
    assert [check["site"] for check in found["checks"]] == ["a"]
    assert found["checks"][0]["alpha"] == 0.02
    (left,) = found["left_out"]
    assert (left["site"], left["num_new"]) == ("b", 20)
    assert "no held-out normal" in left["reason"]
    with pytest.raises(NoDataError, match="no scored item can be compared"):
        checked(by_site(a=50), rows(b=0.0))


def test_by_site_the_table_names_the_sites_and_what_is_said_does_not(tmp_path, capsys):
    sites = ["Mary"] * 40 + ["North"] * 40
    model = save_model(tmp_path, held_out(80), sites=sites, by="scanner")
    data = save_pictures(tmp_path / "data", 40)
    for number in range(20, 40):
        grey = np.full(SIZE, 190, np.uint8)
        Pillow.fromarray(grey).save(data / f"{number:03d}.png")
    names = [f"{number:03d}.png,{'Mary' if number < 20 else 'North'}" for number in range(40)]
    (data / "sites.csv").write_text("path,scanner\n" + "\n".join(names) + "\n")
    with pytest.raises(ValueError, match="--site FILE:scanner"):
        drift(data, model, tmp_path / "out")
    summary = drift(data, model, tmp_path / "out", site="sites.csv:scanner")
    told = capsys.readouterr()
    assert "drift (1 of 2 sites): of 40 new normal items" in told.out
    assert not any(name in f"{told}{summary}" for name in ("Mary", "North"))
    found = {check["site"]: check["drift"] for check in result(tmp_path / "out")["checks"]}
    assert found == {"Mary": False, "North": True}
    drift(tmp_path / "out" / "scores.parquet", model, tmp_path / "again")
    assert result(tmp_path / "again") == result(tmp_path / "out")


def test_rows_of_a_model_by_site_need_their_site():
    with pytest.raises(ValueError, match="name it with --site"):
        checked(by_site(a=50), [{"score": 0.1}])


def test_other_pictures_of_a_fitted_part_are_no_new_normals(tmp_path):
    data = save_pictures(tmp_path / "data", 25)
    old = save_pictures(tmp_path / "old", 1, seed=5)
    rows = [*(f"data/{number:03d}.png,part{number}" for number in range(25)), "old/000.png,part7"]
    (tmp_path / "parts.csv").write_text("path,part\n" + "\n".join(rows) + "\n")
    model = save_model(tmp_path, held_out(60))
    (item,) = build_manifest(old, groups="parts.csv:part").images
    history = History(fitted=traces([item], {item.item: "0" * 64}))
    Path(model, "fitted.json").write_text(json.dumps(history.to_dict()))
    assert drift(data, model, tmp_path / "out")["failed"] == 0
    with pytest.raises(LeakageError, match="1 are of the same patient or part"):
        drift(data, model, tmp_path / "again", groups="parts.csv:part")
    with pytest.raises(ValueError, match="no --groups"):
        drift(tmp_path / "out" / "scores.parquet", model, tmp_path / "t", groups="parts.csv:part")
