"""Free clouds from a folder to scores, colored points, metrics and a report."""

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from far_points import FarPoints
from PIL import Image as Pillow
from sklearn.metrics import average_precision_score, roc_auc_score

from medssl.data.geometry_steps import Geometry
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.points import read_points
from pipelines.evaluate import evaluate
from pipelines.fit import fit
from pipelines.score import read_rows, score
from pipelines.scoring import OutsideDomainError, Scorer

CLOUDS = Preprocessing(geometry=Geometry())


def ball(seed, bump=0.0, count=300):
    """A noisy unit ball beside a table of five far points; the first 20 points may stick out."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    points = points * (1 + 0.02 * torch.rand(count, 1, generator=generator))
    points[:20] *= 1 + bump
    return points


def write_pcd(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(" ".join(f"{value:.9g}" for value in point) for point in points.tolist())
    path.write_text(
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA ascii\n{rows}\n"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return balls(tmp_path / "balls")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder of clouds, a model and its evaluated scores; not to be changed."""
    place = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        fitted(balls(place / "balls"), place)
        found = evaluate(place / "balls", str(place / "model"), place / "out", device="cpu")
    return place, found


def balls(root):
    for i in range(6):
        write_pcd(root / f"train/{i}_template.pcd", ball(i))
    for i in range(2):
        write_pcd(root / f"test/{i}_good.pcd", ball(10 + i))
        points = ball(20 + i, bump=0.005 + 0.1 * i)
        write_pcd(root / f"test/{i}_bulge.pcd", points)
        (root / "gt").mkdir(exist_ok=True)
        labels = torch.zeros(len(points), 1)
        labels[:20] = 1
        np.savetxt(root / f"gt/{i}_bulge.txt", torch.cat([points, labels], 1).numpy(), fmt="%.9g")
    return root


def radius(root):
    """The largest distance in all training clouds."""
    clouds = [read_points(file).points for file in (root / "train").glob("*.pcd")]
    return torch.cat(clouds).norm(dim=1).max()


def fitted(root, tmp_path, **given):
    return fit(root, FarPoints(), tmp_path / "model", preprocessing=CLOUDS, device="cpu", **given)


def test_six_normal_clouds_are_fitted_on_and_not_calibrated(folder, tmp_path, capfd):
    result = fitted(folder, tmp_path)
    assert (result["num_fitted"], result["calibrated"], result["failed"]) == (6, False, 0)
    assert "not calibrated: 32 more normal" in capfd.readouterr().out
    card = (tmp_path / "model/card.md").read_text()
    assert "- number of points: 300\n" in card
    assert "Not calibrated" in card


def test_every_point_of_a_file_gets_its_value_in_ply_and_csv(done):
    place, found = done
    assert (found["ok"], found["anomalous"]) == (4, None)
    limit = radius(place / "balls")
    for row in read_rows(place / "out"):
        source = read_points(Path(row["path"])).points
        expected = (source.norm(dim=1) - limit).numpy()
        written = place / "out" / row["map_path"]
        table = np.loadtxt(written.with_suffix(".csv"), delimiter=",", skiprows=1)
        assert np.allclose(table[:, :3], source.numpy(), atol=0, rtol=1e-7)
        assert np.allclose(table[:, 3], expected, atol=1e-6)
        assert torch.equal(read_points(written).points, source)
        assert row["score"] == pytest.approx(expected.max(), abs=1e-6)
        told = [row[name] for name in ("modality", "boxes", "volume_mm3", "anomalous")]
        assert told == ["POINTS", None, None, None]


def test_point_metrics_are_those_of_all_points_of_the_test_side(done):
    place, found = done
    values, labels = [], []
    for file in sorted((place / "balls/test").glob("*.pcd")):
        values.append(read_points(file).points.norm(dim=1))
        labels.append(torch.zeros(300))
        labels[-1][:20] = "bulge" in file.name
    pooled = torch.cat(labels).numpy(), torch.cat(values).numpy()
    assert found["point_auroc"]["value"] == pytest.approx(roc_auc_score(*pooled), abs=1e-6)
    expected = average_precision_score(*pooled)
    assert 0 < expected < 1
    assert found["point_average_precision"]["value"] == pytest.approx(expected, abs=1e-6)
    assert not {"aupro", "dice", "aupimo", "froc_mean_recall", "pixel_auroc"} & found.keys()
    assert "on no grid" in found["skipped"]["AUPRO, AUPIMO, Dice and FROC"]


def test_the_report_shows_each_cloud_and_from_where_it_is_seen(done):
    place, _ = done
    page = (place / "out/report.html").read_text()
    assert page.count("seen from x") == 4
    assert page.count("data:image/jpeg") == 4
    assert "as PLY and CSV" in page
    for file in (place / "out/overlays").iterdir():
        assert np.asarray(Pillow.open(file)).std() > 10


def test_a_calibrated_detector_boxes_regions_in_coordinates_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        write_pcd(tmp_path / f"balls/{i}.pcd", ball(i))
    result = fitted(tmp_path / "balls", tmp_path, rate=0.3)
    assert result["calibrated"]
    points = ball(50)
    points[:3] = torch.tensor([[1.5, 0.0, 0.0], [1.5, 0.05, 0.0], [1.5, 0.0, 0.05]])
    write_pcd(tmp_path / "new/odd.pcd", points)
    manifest = build_manifest(tmp_path / "new")
    scorer = Scorer(tmp_path / "model", device="cpu")
    scored = scorer.score([load_sample(manifest, manifest.images[0])])[0]
    assert scored.anomalous
    assert scored.volume_mm3 is None
    assert scored.boxes[0] == pytest.approx((1.5, 0.0, 0.0, 1.5, 0.05, 0.05))


@pytest.mark.parametrize(
    ("points", "reason"),
    [(10 * ball(0), "extent 21.5"), (ball(0, count=601), "number of points 601")],
)
def test_clouds_unlike_the_normal_ones_are_refused(done, tmp_path, points, reason):
    write_pcd(tmp_path / "new/odd.pcd", points)
    manifest = build_manifest(tmp_path / "new")
    sample = load_sample(manifest, manifest.images[0])
    with pytest.raises(OutsideDomainError, match=reason):
        Scorer(done[0] / "model", device="cpu").score([sample])


def test_a_picture_among_the_clouds_is_left_out_and_refused(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed").mkdir()
    for i in range(2):
        write_pcd(tmp_path / f"mixed/{i}.pcd", ball(i))
    Pillow.new("RGB", (8, 8)).save(tmp_path / "mixed/a.png")
    result = fit(tmp_path / "mixed", FarPoints(), tmp_path / "two", preprocessing=CLOUDS)
    assert result["num_fitted"] == 2
    assert len(result["errors"]) == 1
    score(tmp_path / "mixed", str(done[0] / "model"), tmp_path / "out", device="cpu")
    refused = [row for row in read_rows(tmp_path / "out") if row["status"] == "refused"]
    assert [row["error"] for row in refused] == [
        "an image with axes HW, but the model was fitted on free point clouds"
    ]


def test_a_cloud_of_unknown_unit_is_refused_where_the_model_knows_millimeters(done):
    scorer = Scorer(done[0] / "model", device="cpu")
    scorer.preprocessing = Preprocessing(geometry=Geometry(unit="mm"))
    manifest = build_manifest(done[0] / "balls")
    with pytest.raises(OutsideDomainError, match="cannot become 'mm'"):
        scorer.check(load_sample(manifest, manifest.images[0]))


def test_copies_are_found_again_by_their_points(done, folder, tmp_path):
    assert done[1]["overlap"]["copies"] == 0
    write_pcd(folder / "test/9_good.pcd", ball(0))
    with pytest.raises(ValueError, match="1 of 5 have the same pixels"):
        evaluate(folder, str(done[0] / "model"), tmp_path / "again", device="cpu")


def test_a_served_model_takes_the_bytes_of_a_cloud(done):
    from pipelines.served import ServedModel

    place, _ = done
    model = ServedModel()
    model.scorer = Scorer(place / "model", device="cpu")
    row = read_rows(place / "out")[0]
    given = pandas.DataFrame({"content": [Path(row["path"]).read_bytes()], "unit": [""]})
    told = model.predict(None, given).iloc[0]
    assert (told["status"], told["score"]) == ("ok", row["score"])
    given["unit"] = ["mm"]
    told = model.predict(None, given).iloc[0]
    assert told["status"] == "refused"
    assert told["error"] == "unit mm, but the model was fitted on unknown"
