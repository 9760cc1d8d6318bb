"""The table of a folder: the same as the serial one, resumed after a kill, hashed, told apart."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from medssl.data.image import Image
from medssl.data.layouts.parallel import Parts, find_images_in_parallel
from medssl.data.layouts.plain import find_images
from medssl.data.manifest import build_manifest, load_sample, read_manifest
from medssl.data.modality import Modality
from medssl.data.synthetic.dicom_series import write_dicom_series
from pipelines.manifest import manifest


def scan(value=0.0) -> Image:
    affine = torch.diag(torch.tensor([2.0, 0.5, 0.8, 1.0], dtype=torch.float64))[[2, 1, 0, 3]]
    return Image(
        pixels=torch.full((1, 3, 8, 8), value),
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=(2.0, 0.5, 0.8),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for number in range(6):
        file = root / f"p{number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Pillow.fromarray(np.full((4, 5), number % 4, np.uint8)).save(file)
    for name in ("one", "two"):
        write_dicom_series(scan(), root / name, name=name)
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    (root / "notes.md").write_text("nothing")
    return root


def in_parallel(root, parts):
    done = []
    found = find_images_in_parallel(root, workers=2, parts=Parts(parts), on_part=done.append)
    return found, done


def test_the_parallel_listing_is_the_serial_one_and_so_is_the_resumed(folder, tmp_path):
    found, done = in_parallel(folder, tmp_path / "parts")
    assert found == find_images(folder)
    assert sum(done) == 14
    again, _ = in_parallel(folder, tmp_path / "parts")
    assert again == found


def test_a_finished_part_is_taken_and_a_changed_folder_listed_again(tmp_path):
    root = tmp_path / "set"
    write_dicom_series(scan(), root / "one", name="one")
    in_parallel(root, tmp_path / "parts")
    (part,) = (tmp_path / "parts").iterdir()
    kept = json.loads(part.read_text())
    part.write_text(json.dumps({**kept, "skipped": 77}))
    assert in_parallel(root, tmp_path / "parts")[0].skipped == 77
    write_dicom_series(scan(), root / "two", name="two")
    found, _ = in_parallel(root, tmp_path / "parts")
    assert (len(found.entries), found.skipped) == (2, 0)


def test_parts_hold_no_identifier(folder, tmp_path):
    in_parallel(folder, tmp_path / "parts")
    text = "".join(file.read_text() + file.name for file in (tmp_path / "parts").iterdir())
    assert "PHANTOM" not in text
    assert "1.2.826" not in text


def test_hashes_find_the_same_pixels_under_other_names(folder, tmp_path):
    result = manifest(folder, tmp_path / "m.parquet", hash=True, workers=2)
    found = read_manifest(tmp_path / "m.parquet")
    plain = build_manifest(folder)
    assert [item.item for item in found.items] == [item.item for item in plain.items]
    for item in found.images:
        if item.kind == "dicom" or item.path.endswith("0.png"):
            image = load_sample(plain, item, hashes=True).images["image"]
            assert item.pixel_sha256 == image.provenance["pixel_sha256"]
            assert item.file_sha256 == image.provenance["file_sha256"]
    copies = {frozenset(same["items"]): same for same in result["duplicates"]}
    by_end = {item.path.removeprefix(f"{folder}/"): item.item for item in found.images}
    pictures = frozenset({by_end["p0/0.png"], by_end["p0/4.png"]})
    scans = frozenset({by_end["one"], by_end["two"]})  # other patients, UIDs and names
    assert pictures in copies
    assert copies[scans]["across_groups"]
    assert result["failed"] == 1  # broken.png, which stays in the table without a hash
    assert not (tmp_path / "m.parquet.work").exists()


def test_hashes_already_known_are_kept(folder, tmp_path, monkeypatch):
    manifest(folder, tmp_path / "m.parquet", hash=True, workers=2)
    first = read_manifest(tmp_path / "m.parquet")
    monkeypatch.setattr("pipelines.manifest._hash", None)  # nothing sound may be read again
    good = first.where(kind="dicom")
    good.write(tmp_path / "good.parquet")
    manifest(tmp_path / "good.parquet", tmp_path / "again.parquet", hash=True, workers=2)
    assert read_manifest(tmp_path / "again.parquet").items == good.items


def test_a_killed_run_goes_on_and_nothing_is_lost(tmp_path):
    root = tmp_path / "set"
    for number in range(40):
        write_dicom_series(scan(float(number)), root / str(number), name=f"s{number}")
    code = (
        "import time, medssl.data.layouts.parallel as p\n"
        "p._PART_FILES = 6\n"
        "save = p.Parts.save\n"
        "def slow(self, *a):\n    save(self, *a)\n    time.sleep(0.05)\n"
        "p.Parts.save = slow\n"
        "from pathlib import Path\nfrom pipelines.manifest import manifest\n"
        f"if __name__ == '__main__':\n"
        f"    manifest(Path({str(root)!r}), Path({str(tmp_path / 'm.parquet')!r}), workers=1)\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    parts = tmp_path / "m.parquet.work" / "list"
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(parts.glob("*.json")))
    assert 3 <= done < 20
    assert not (tmp_path / "m.parquet").exists()
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)
    assert read_manifest(tmp_path / "m.parquet").items == build_manifest(root).items


def test_the_table_must_be_parquet(folder, tmp_path):
    with pytest.raises(ValueError, match=r"\.parquet"):
        manifest(folder, tmp_path / "m.csv")
