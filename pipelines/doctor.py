"""Job: is everything here that medssl needs, and what to do where it is not?"""

import os
import platform
import stat
from pathlib import Path
from typing import Any

from medssl.data.privacy import key_file
from pipelines.console import say, table
from pipelines.provenance import versions
from pipelines.record import sqlite_file, store_uri

_SYNTAXES = (
    *("ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"),
    *("DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGBaseline8Bit", "JPEGExtended12Bit"),
    *("JPEGLossless", "JPEGLosslessSV1", "JPEGLSLossless", "JPEGLSNearLossless"),
    *("JPEG2000Lossless", "JPEG2000", "HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K"),
)


def doctor() -> dict[str, Any]:
    """Check packages, decoders, GPU, tracking store and key; every problem says what to do."""
    checks = {
        "packages": {"python": platform.python_version(), **versions()},
        "decoders": _decoders(),
        "device": _device(),
        "store": _store(),
        "key": _key(),
        "data": _data(),
    }
    problems = _problems(checks)
    _tell(checks)
    for problem in problems:
        say(f"problem: {problem}")
    say(f"problems  {len(problems) or 'none'}")
    return {**checks, "problems": problems, "failed": len(problems)}


def _decoders() -> dict[str, str | None]:
    """DICOM transfer syntax -> None, or what its decoding lacks."""
    import pydicom.uid
    from pydicom.pixels import get_decoder

    found: dict[str, str | None] = {}
    for keyword in _SYNTAXES:
        decoder = get_decoder(getattr(pydicom.uid, keyword))
        missing = "; ".join(decoder.missing_dependencies) or "no decoder exists"
        found[keyword] = None if decoder.is_available else missing
    return found


def _device() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": gpu.name, "memory_gib": gpu.total_memory / 2**30} for gpu in gpus],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _store() -> dict[str, Any]:
    """Where runs go, without credentials, and what is wrong with it."""
    from urllib.parse import urlsplit

    uri = store_uri()
    database, parts = sqlite_file(uri), urlsplit(uri)
    if database is not None:
        writable = os.access(database if database.exists() else database.absolute().parent, os.W_OK)
        problem = None if writable else "not writable"
        return {"kind": "sqlite", "exists": database.exists(), "problem": problem}
    found = {"kind": parts.scheme, "host": parts.hostname, "exists": None}
    return {**found, "problem": _unhealthy(uri) if parts.scheme in ("http", "https") else None}


def _unhealthy(uri: str) -> str | None:
    """Why a tracking server does not answer within three seconds."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=3) as answer:
            return None if answer.status == 200 else f"answers {answer.status}"
    except (URLError, TimeoutError) as error:
        return f"does not answer ({type(error).__name__})"


def _key() -> dict[str, Any]:
    file = key_file()
    if not file.exists():
        return {"exists": False, "mode": None}
    return {"exists": True, "mode": oct(stat.S_IMODE(file.stat().st_mode))}


def _data() -> dict[str, Any]:
    named = os.environ.get("MEDSSL_DATA")
    return {"set": named is not None, "exists": named is not None and Path(named).is_dir()}


def _problems(checks: dict[str, Any]) -> list[str]:
    absent = [name for name, version in checks["packages"].items() if version == "absent"]
    found = [f"{name} is not installed; install it with pip" for name in absent]
    found += [
        f"DICOM {syntax} cannot be decoded: {missing}"
        for syntax, missing in checks["decoders"].items()
        if missing
    ]
    if checks["store"]["problem"]:
        found.append(
            f"the tracking store is {checks['store']['problem']}; work in a writable folder, start "
            "the server, or change MLFLOW_TRACKING_URI"
        )
    if checks["key"]["exists"] and checks["key"]["mode"] != "0o600":
        found.append(
            f"the key file has mode {checks['key']['mode']}, so others may read it; chmod 600 it "
            "(MEDSSL_KEY_FILE, or ~/.config/medssl/key)"
        )
    if checks["data"]["set"] and not checks["data"]["exists"]:
        found.append("MEDSSL_DATA names no folder; set it to the test data, or unset it")
    return found


def _tell(checks: dict[str, Any]) -> None:
    table(("package", "version"), [*checks["packages"].items()])
    decoders = checks["decoders"]
    good = [syntax for syntax, missing in decoders.items() if not missing]
    device, store, key = checks["device"], checks["store"], checks["key"]
    gpus = [f"{gpu['name']}, {gpu['memory_gib']:.0f} GiB" for gpu in device["gpus"]]
    kept = {True: "ready", False: "made by the first run", None: store.get("host")}
    say(f"decoders  {len(good)} of {len(decoders)} DICOM transfer syntaxes")
    say(f"gpu       {'; '.join(gpus) or 'none'}")
    say(f"threads   {device['threads']} on {device['cores']} cores")
    say(f"store     {store['kind']}, {kept[store['exists']]}")
    say(f"key       {'mode ' + key['mode'] if key['exists'] else 'made on first use'}")
    say(f"data      {'set' if checks['data']['set'] else 'MEDSSL_DATA is not set'}")
