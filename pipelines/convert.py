"""Job: every image as NIfTI, exactly as the reader sees it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medssl.data.image import Image
from medssl.data.manifest import Item, build_manifest
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import ReadError
from medssl.data.writers.nifti import write_nifti
from pipelines.cli import plain
from pipelines.console import progress, say
from pipelines.journal import write_whole


def convert(
    path: Path,
    out: Path,
    *,
    on_gap: Literal["error", "insert_nan", "resample", "keep"] = "error",
    on_duplicate: Literal["error", "first", "last"] = "error",
    resample_tilt: bool = False,
    voi_window: tuple[float, float] | str | None = None,
    select: str | None = None,
) -> dict[str, Any]:
    """Write each image under a path as float32 NIfTI, with a JSON of how it came to be.

    What a viewer shows of it is what a model would get. Several volumes over time are one 4D file,
    colors the fifth axis; a picture without a place in a patient has neither sform nor qform.
    Files are named by the item ids that `inspect` shows. Where pixels are invalid (padding, gaps),
    ITEM_valid.nii.gz has 0.

    Args:
        path: a folder, a file, or a manifest.
        out: folder for ITEM.nii.gz and ITEM.json; made where there is none.
        on_gap: what to do where slices are missing: insert_nan, resample or keep.
        on_duplicate: which of different slices at one position to take: first or last.
        resample_tilt: make volumes with gantry tilt rectangular.
        voi_window: show values through a window instead: a name such as brain, dicom for the
            header's own, or centre and width.
        select: an expression over manifest columns; only these images are converted.
    """
    manifest = build_manifest(path)
    images = (manifest if select is None else manifest.select(select)).images
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with progress(len(images), "converting") as bar:
        for item in images:
            try:
                image = read_image(
                    Path(item.path),
                    series=item.series,
                    on_gap=on_gap if item.kind == "dicom" else "error",
                    on_duplicate=on_duplicate,
                    resample_tilt=resample_tilt,
                    voi_window=voi_window if item.kind == "dicom" else None,
                    hashes=True,
                )
                rows.append(_written(out, item, image))
            except ReadError as error:
                rows.append(_row(item, error=f"{type(error).__name__}: {error}"))
            bar.advance(1)
    failed = [row for row in rows if row["error"]]
    for row in failed:
        say(f"{row['item']}: {row['error']}")
    say(f"{len(rows) - len(failed)} of {len(rows)} images written to {out}")
    return {"images": rows, "failed": len(failed)}


def _written(out: Path, item: Item, image: Image) -> dict[str, Any]:
    file = out / f"{item.item}.nii.gz"
    write_nifti(image, file)
    if image.valid is not None:
        valid = replace(
            image,
            pixels=image.valid.float()[None],
            axes=image.axes.removeprefix("T"),
            times_s=None,
            channels=(),
        )
        write_nifti(valid, out / f"{item.item}_valid.nii.gz", dtype="uint8")
    row = _row(item, image=image)
    told = json.dumps(plain(row | {"file": file.name}), indent=1, allow_nan=False)
    write_whole(out / f"{item.item}.json", told)
    return row | {"file": file}


def _row(item: Item, *, image: Image | None = None, error: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"item": item.item, "series": item.series, "file": None, "error": error}
    if image is None:
        return row
    return row | {
        "modality": image.modality.value,
        "axes": f"C{image.axes}",
        "shape": list(image.pixels.shape),
        "frame": image.frame,
        "spacing_mm": image.spacing,
        "affine": image.affine.tolist(),
        "times_s": image.times_s,
        "units": image.units,
        "value_range": image.value_range,
        "provenance": dict(image.provenance),
    }
