"""Identifiers leave a reader only as salted hashes."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PROVENANCE = frozenset(
    {
        *("reader", "transfer_syntax", "codec", "file_sha256", "pixel_sha256", "modality"),
        *("objects_skipped", "files_skipped", "duplicates_dropped", "slices_missing"),
        *("slice_positions_mm", "on_gap", "on_duplicate", "resample_tilt", "voi_window"),
        *("sheared", "inverted", "varies", "burned_in_text", "shows_face", "ultrasound_regions"),
        *("affine_from", "qform_differs_mm", "alpha", "converted_from", "rotated_deg"),
        *("format", "encoding", "missing", "duplicates", "extent_suspicious", "doubts"),
        *("patient_position", "patient_orientation", "laterality", "view_position"),
    }
)
"""All that a reader may tell of an image beside its pixels and geometry."""


def leaving(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What leaves a reader; it is an error of ours where a name is not on the list."""
    unknown = sorted(set(provenance) - PROVENANCE)
    if unknown:
        raise RuntimeError(f"metadata {unknown} are not on the list of what may leave a reader")
    return dict(provenance)


def salted(value: str, *, length: int = 12) -> str:
    """A short identifier that cannot be turned back without this user's key.

    Equal values give equal identifiers under one key, and unrelated ones under another.
    """
    return hmac.new(_key(key_file()), value.encode(), hashlib.sha256).hexdigest()[:length]


def key_fingerprint() -> str:
    """Names the key without revealing it; identifiers of different keys must not be compared."""
    return hashlib.sha256(b"medssl key " + _key(key_file())).hexdigest()[:12]


def key_file() -> Path:
    """The file of this user's key: MEDSSL_KEY_FILE, or ~/.config/medssl/key."""
    named = os.environ.get("MEDSSL_KEY_FILE")
    return Path(named) if named else Path.home() / ".config" / "medssl" / "key"


@cache
def _key(file: Path) -> bytes:
    """The key, made with mode 0600 on first use; two processes at once agree on one."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        try:
            os.link(fresh, file)  # fails where another process was first
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    key = file.read_text().strip()
    if len(key) < 32:
        raise ValueError(
            f"the key file {file} is too short to be a key; restore it, or remove it to make a new "
            "one (identifiers will change)"
        )
    return key.encode()
