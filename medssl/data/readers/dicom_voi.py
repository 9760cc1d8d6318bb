"""The display window of a DICOM header, and windows given by hand (PS3.3 C.11.2)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.data.modality import CT_WINDOWS, Modality, ct_window
from medssl.data.readers.dicom_frames import group
from medssl.data.readers.errors import UnsupportedFormatError

Window = str | tuple[float, float]
"""A name in `CT_WINDOWS`, "dicom" for the header's own, or (centre, width) in the image's unit."""

Curve = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Values in the modality's unit to [0, 1]."""


def check_window(window: Window | None) -> None:
    """Raises ValueError for a name that is none and for a width that is not positive."""
    if isinstance(window, str):
        if window != "dicom" and window not in CT_WINDOWS:
            raise ValueError(
                f'voi_window must be "dicom", (centre, width) or one of {", ".join(CT_WINDOWS)}; '
                f"got {window!r}"
            )
    elif window is not None and not (len(window) == 2 and window[1] > 0):
        raise ValueError(f"voi_window needs a centre and a positive width, got {window}")


def given_window(window: Window, modality: Modality) -> Curve:
    """The curve of a name or of numbers: 0 at centre - width / 2, 1 at centre + width / 2.

    Raises UnsupportedFormatError for a name, which is in HU, and another modality than CT.
    """
    if isinstance(window, str) and modality is not Modality.CT:
        raise UnsupportedFormatError(
            f"the window {window!r} is in HU, and this is {modality}; give (centre, width)"
        )
    center, width = ct_window(window)
    return _linear(center - width / 2, width)


def header_window(dataset: Any, frame: int) -> Curve:
    """The curve that the header wants its pixels shown with; the first where it gives several.

    A VOI table goes before a window. Raises UnsupportedFormatError where there is neither.
    """
    found = group(dataset, frame, "FrameVOILUTSequence")
    holder = dataset if found is None else found
    if holder.get("VOILUTSequence"):
        return _table(holder.get("VOILUTSequence")[0])
    center, width = (_first(holder.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        raise UnsupportedFormatError(
            'the header has no window; give voi_window=(centre, width) instead of "dicom"'
        )
    function = str(holder.get("VOILUTFunction") or "LINEAR")
    if not (width >= 1 if function == "LINEAR" else width > 0):
        raise UnsupportedFormatError(
            f"the header's window has the width {width:g}, which has no meaning; give "
            "voi_window=(centre, width)"
        )
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(-4 * (values - np.float32(center)) / width))
    if function == "LINEAR_EXACT":
        return _linear(center - width / 2, width)
    return _linear(center - 0.5 - (width - 1) / 2, max(width - 1, 1e-6))


def _linear(low: float, width: float) -> Curve:
    return lambda values: ((values - np.float32(low)) / np.float32(width)).clip(0, 1)


def _table(table: Any) -> Curve:
    """PS3.3 C.11.2.1.1: values below the first mapped one take the first entry, and so on."""
    entries, first, bits = (int(value) for value in table.get("LUTDescriptor"))
    data = table.get("LUTData")
    words = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
    words = words[: entries or 1 << 16].astype(np.float32) / np.float32(2**bits - 1)
    return lambda values: words[np.rint(values - first).clip(0, len(words) - 1).astype(np.int64)]


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, (int, float, str)) else value[0])
