"""What a model remembers of its images, and that jobs refuse to test or calibrate with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mean_distance import MeanDistance
from PIL import Image as Picture

from medssl.data.manifest import Item, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.seen import Seen
from medssl.models.folder import ModelFolderError
from pipelines.cli import main
from pipelines.evaluate import evaluate
from pipelines.fit import fit
from pipelines.leakage import History, LeakageError, Trace, compare, read_history, traces

PLAIN = Preprocessing(size=(8, 8), intensity="range", mean=(0.0,), std=(1.0,))


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr("pipelines.evaluate.REPEATS", 20)


def greys(folder, levels, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels, start):
        Picture.fromarray(np.full((20, 30), level, np.uint8)).save(folder / f"{i:03d}.png")


@pytest.fixture
def data(tmp_path):
    """12 training pictures of 12 levels; 4 good and 4 cracked test pictures of other levels."""
    root = tmp_path / "data"
    greys(root / "train" / "good", range(100, 112))
    greys(root / "test" / "good", range(112, 116))
    greys(root / "test" / "crack", range(200, 204))
    return root


def fitted(data, tmp_path, **options):
    given = {"preprocessing": PLAIN, "rate": 0.2, "device": "cpu"}
    return fit(data, MeanDistance(), tmp_path / "model", **{**given, **options})


def level_of(item):
    return int(np.asarray(Picture.open(item.path)).flat[0])


def item(name, group=None):
    return Item(item=name, path=f"/{name}.png", kind="picture", group=group)


def test_an_item_is_told_by_its_pixels_its_patient_and_what_it_was_used_for():
    fitted_on = traces([item("a", "p1"), item("b", "p2")], {"a": "A", "b": "B"})
    gave = traces([item("c", "p3")], {"c": "C"})
    history = History(
        fitted=fitted_on, calibration=gave, pretrained=Seen(pixels=frozenset({"D", "A"}))
    )
    asked = [
        item("copy", "p9"),  # of a, which the encoder saw too
        item("friend", "p9"),  # of the patient of a copy
        item("second", "p2"),
        item("calibrating", "p3"),
        item("pretraining"),
        item("new", "p7"),
        item("unread"),
    ]
    hashes = dict(zip([one.item for one in asked], ["A", "X", "Y", "Z", "D", "V"], strict=False))
    found = compare(asked, hashes, history)
    assert found.copies == ("copy",)
    assert found.related == ("friend", "second")
    assert found.calibrated == ("calibrating",)
    assert found.pretrained == ("copy", "friend", "pretraining")
    assert found.items == ["copy", "friend", "second", "pretraining", "calibrating"]
    assert found.ungrouped == 2
    assert found.to_dict() == {
        "compared": 7,
        "copies": 1,
        "related": 2,
        "pretrained": 3,
        "calibrated": 1,
        "groups_compared": False,  # of two the patient is not known
    }
    [told] = [compare([one], hashes, history).to_dict() for one in asked[:1]]
    assert told["groups_compared"]


def test_patients_under_another_key_are_not_compared_and_that_is_told():
    foreign = History(fitted={"a": Trace(pixel_sha256="A", group="p1", key="of another hospital")})
    found = compare([item("b", "p1"), item("c")], {"b": "B", "c": "A"}, foreign)
    assert (found.copies, found.related, found.foreign) == (("c",), (), True)
    assert not found.to_dict()["groups_compared"]


def test_the_refusal_names_the_counts_and_five_items_at_most():
    history = History(
        fitted=traces([item(f"i{k}") for k in range(7)], {f"i{k}": "A" for k in range(7)})
    )
    found = compare([item(f"n{k}") for k in range(9)], {f"n{k}": "A" for k in range(7)}, history)
    with pytest.raises(LeakageError) as refused:
        found.refuse("pictures", "do something")
    text = str(refused.value)
    assert "7 of 9 have the same pixels" in text
    assert "n0, n1, n2, n3, n4, ..." in text
    assert "n5" not in text
    assert text.endswith("do something")
    compare([item("x")], {"x": "X"}, history).refuse("pictures", "")


def test_the_folder_remembers_every_image_by_pixels_and_patient(data, tmp_path):
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    rows = [f"{name},{name if 'train' not in name else i // 2}" for i, name in enumerate(names)]
    (tmp_path / "parts.csv").write_text("\n".join(["path,part", *rows]))
    groups = f"{tmp_path / 'parts.csv'}:part"
    result = fitted(data, tmp_path, groups=groups)
    history = read_history(tmp_path / "model")
    manifest = build_manifest(data, groups=groups)
    expected = {
        one.item: (
            load_sample(manifest, one, hashes=True).images["image"].provenance["pixel_sha256"],
            one.group,
        )
        for one in manifest.where(split="train").images
    }
    told = {**history.fitted, **history.calibration}
    assert {name: (trace.pixel_sha256, trace.group) for name, trace in told.items()} == expected
    assert len(history.fitted) == result["num_fitted"]
    assert len(history.calibration) == result["num_calibration"]
    assert history.num_groups == len({trace.group for trace in history.fitted.values()})
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


def test_an_older_folder_tells_the_pixels_of_its_calibration_file(data, tmp_path):
    fitted(data, tmp_path)
    before = read_history(tmp_path / "model")
    (tmp_path / "model" / "fitted.json").unlink()
    older = read_history(tmp_path / "model")
    assert older.learnt_from == before.learnt_from
    (tmp_path / "model" / "fitted.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="damaged"):
        read_history(tmp_path / "model")


@pytest.mark.parametrize("role", ["fitted", "calibration"])
def test_evaluate_refuses_renamed_copies_before_it_scores_anything(data, tmp_path, role):
    fitted(data, tmp_path)
    known = getattr(read_history(tmp_path / "model"), role)
    pictures = [one for one in build_manifest(data).images if one.item in known]
    levels = [level_of(one) for one in pictures[:2]]
    greys(data / "test" / "good", levels, start=500)
    out = tmp_path / "out"
    told = "2 of 10 have the same pixels" if role == "fitted" else "and 2 gave its threshold"
    with pytest.raises(LeakageError, match=f"evaluate on must be new to the model.*{told}"):
        evaluate(data, str(tmp_path / "model"), out)
    assert not out.exists()


def test_evaluate_goes_on_where_it_is_told_to_and_says_what_is_known(data, tmp_path, capsys):
    fitted(data, tmp_path, calibration="none")
    clean = evaluate(data, str(tmp_path / "model"), tmp_path / "clean")
    assert clean["overlap"] == {
        "compared": 8,
        "copies": 0,
        "related": 0,
        "pretrained": 0,
        "calibrated": 0,
        "groups_compared": True,
    }
    greys(data / "test" / "good", [100], start=500)
    found = evaluate(data, str(tmp_path / "model"), tmp_path / "out", allow_seen=True)
    assert "1 of 9 have the same pixels" in capsys.readouterr().out
    assert found["overlap"]["copies"] == 1
    assert found["num_normal"] == 5
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["overlap"] == found["overlap"]


def test_evaluate_refuses_another_picture_of_a_fitted_part(data, tmp_path):
    fit_on = tmp_path / "parts"
    greys(fit_on, range(100, 112))
    for folder, names in ((fit_on, "abcdefghijkl"), (data, None)):
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        parts = names or [f"part{i}" if i else "c" for i in range(len(files))]
        rows = [f"{file},{part}" for file, part in zip(files, parts, strict=True)]
        (folder / "parts.csv").write_text("\n".join(["path,part", *rows]))
    fitted(fit_on, tmp_path, groups="parts.csv:part", calibration="none")
    greys(data / "train" / "good", range(20, 32))  # only the part is the same, not the pixels
    with pytest.raises(LeakageError, match="0 of 8 have .* 1 are of the same patient or part"):
        evaluate(data, str(tmp_path / "model"), tmp_path / "out", groups="parts.csv:part")


def test_a_masks_fault_hides_no_copy(data, tmp_path):
    fitted(data, tmp_path, calibration="none")
    greys(data / "test" / "crack", [100], start=900)
    mask = data / "ground_truth" / "crack" / "900_mask.png"
    mask.parent.mkdir(parents=True)
    Picture.fromarray(np.zeros((3, 3), np.uint8)).save(mask)
    with pytest.raises(LeakageError, match="1 of 9"):
        evaluate(data, str(tmp_path / "model"), tmp_path / "out")


def test_fit_refuses_a_part_on_both_sides_and_reads_no_test_image_for_that(data, tmp_path):
    files = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    rows = [f"{name},{'same' if i in (0, 15) else i}" for i, name in enumerate(files)]
    assert "test" in files[0]
    assert "train" in files[15]
    (data / "parts.csv").write_text("\n".join(["path,part", *rows]))
    for file in (data / "test").rglob("*.png"):
        file.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(LeakageError, match="test images .* 1 are of the same patient or part"):
        fitted(data, tmp_path, groups="parts.csv:part")
    assert not (tmp_path / "model").exists()
    result = fitted(data, tmp_path, groups="parts.csv:part", allow_seen=True)
    assert result["overlap"]["related"] == 1


def test_fit_refuses_copies_on_the_test_side_where_the_manifest_has_hashes(data, tmp_path):
    greys(data / "test" / "good", [100, 101], start=500)
    assert fitted(data, tmp_path)["overlap"]["copies"] == 0  # without hashes nobody knows
    assert main(["manifest", str(data), "--out", str(tmp_path / "items.parquet"), "--hash",
                 "--workers", "1"]) == 0  # fmt: skip
    with pytest.raises(LeakageError, match="2 of 10 have the same pixels"):
        fit(tmp_path / "items.parquet", MeanDistance(), tmp_path / "b", preprocessing=PLAIN)


def test_the_command_line_refuses_with_a_usage_error_and_a_flag_goes_on(data, tmp_path, capsys):
    fitted(data, tmp_path)
    greys(data / "test" / "good", [103], start=500)
    arguments = ["evaluate", str(data), "--model", str(tmp_path / "model"), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "1 of 9" in told or "1 gave its threshold" in told
    assert "--allow-seen" in told
    assert str(data) not in told
    assert main([*arguments, str(tmp_path / "out"), "--allow-seen"]) == 0


def test_a_model_that_tells_nothing_is_evaluated_with_a_word_about_that(data, tmp_path, capsys):
    fitted(data, tmp_path)
    for name in ("fitted.json", "calibration.json"):
        (tmp_path / "model" / name).unlink()
    found = evaluate(data, str(tmp_path / "model"), tmp_path / "out")
    assert "does not tell what it was fitted on" in capsys.readouterr().out
    assert found["overlap"]["compared"] == 0


def test_what_the_encoder_saw_is_kept_with_the_detector(data, tmp_path):
    from medssl.models.timm_encoder import TimmEncoder

    class Pretrained(MeanDistance):
        def __init__(self):
            super().__init__()
            self.encoder = TimmEncoder("test_resnet", in_channels=1)

    manifest = build_manifest(data)
    test = manifest.where(split="test").images
    hashes = {
        one.item: load_sample(manifest, one, hashes=True).images["image"].provenance["pixel_sha256"]
        for one in test
    }
    detector = Pretrained()
    detector.encoder.seen = Seen.of(test[:3], hashes)
    fit(data, detector, tmp_path / "model", preprocessing=PLAIN, calibration="none")
    found = compare(test, hashes, read_history(tmp_path / "model"))
    assert found.pretrained == tuple(one.item for one in test[:3])
    assert found.copies == ()
    hashed = replace(
        manifest,
        items=tuple(replace(one, pixel_sha256=hashes.get(one.item)) for one in manifest.items),
    )
    hashed.write(tmp_path / "items.parquet")
    with pytest.raises(LeakageError, match="3 were seen when its encoder was pretrained"):
        fit(tmp_path / "items.parquet", detector, tmp_path / "b", preprocessing=PLAIN)


def test_a_copy_among_further_normals_does_not_calibrate_a_fit_twice(data, tmp_path):
    greys(tmp_path / "more", [60, 61, 61, 62, 63, 60])
    result = fitted(data, tmp_path, calibration=tmp_path / "more")
    assert (result["num_calibration"], result["failed"]) == (4, 2)
    pictures = {level_of(item) for item in build_manifest(tmp_path / "more").images}
    assert len(read_history(tmp_path / "model").calibration) == len(pictures)
    assert all("counts once" in error["reason"] for error in result["errors"])
