import os
import stat
import subprocess
import sys

import pytest

from medssl.data import privacy


def ask(key_file, code):
    environment = {**os.environ, "MEDSSL_KEY_FILE": str(key_file)}
    command = [sys.executable, "-c", f"from medssl.data import privacy; print({code})"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def test_one_key_gives_one_identifier_and_another_key_another(tmp_path):
    first = ask(tmp_path / "a" / "key", "privacy.salted('patient 1')")
    assert ask(tmp_path / "a" / "key", "privacy.salted('patient 1')") == first
    assert ask(tmp_path / "b", "privacy.salted('patient 1')") != first
    assert len(first) == 12


def test_the_key_file_is_for_its_owner_only(tmp_path):
    ask(tmp_path / "key", "privacy.key_fingerprint()")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_the_fingerprint_reveals_nothing_of_the_key(tmp_path):
    fingerprint = ask(tmp_path / "key", "privacy.key_fingerprint()")
    assert fingerprint not in (tmp_path / "key").read_text()


def test_processes_that_start_at_once_agree_on_one_key(tmp_path):
    environment = {**os.environ, "MEDSSL_KEY_FILE": str(tmp_path / "key")}
    command = [
        sys.executable,
        "-c",
        "from medssl.data import privacy; print(privacy.key_fingerprint())",
    ]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert len({process.communicate()[0] for process in running}) == 1


def test_a_broken_key_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("short")
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "key"))
    try:
        privacy.salted("x")
    except ValueError as error:
        assert "too short to be a key" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a short key was accepted")


def test_metadata_that_is_not_on_the_list_does_not_leave_a_reader():
    assert privacy.leaving({"reader": "dicom", "sheared": True}) == {
        "reader": "dicom",
        "sheared": True,
    }
    with pytest.raises(RuntimeError, match="SeriesDescription"):
        privacy.leaving({"reader": "dicom", "SeriesDescription": "Knee of Mr Miller"})
