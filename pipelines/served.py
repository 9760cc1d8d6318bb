"""The registered model as MLflow runs it: pictures, scans and clouds in, a verdict per row out.

MLflow keeps a copy of this file with each registered model and runs it when the model is loaded.
"""

import base64
import binascii
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

COLUMNS = ("score", "p_value", "threshold", "anomalous", "no_verdict", "status", "error")
"""no_verdict: why a calibrated model does not say whether the item is anomalous."""
CLASS_COLUMNS = ("predicted", "class_scores")
"""What a classifier tells besides; class_scores is JSON text."""


class ServedModel(PythonModel):
    """A fitted detector or classifier behind `mlflow.pyfunc`; see `Scored` for what it says."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder that was registered."""
        from pipelines.scoring import Scorer

        self.scorer = Scorer(Path(context.artifacts["model"]))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """Score each row by itself; a bad row gets status "error" or "refused" and a reason.

        model_input: a DataFrame with the column `content` (the bytes of a picture, NIfTI, DICOM,
            PLY or PCD file, as they are or in base64), or `path`, a file below the folder that the
            variable MEDSSL_SERVE_ROOT names where the model runs; and `site`, the name of each
            item's site as the calibration's table has it, where the model was calibrated by site;
            and `unit`, "m" or "mm" of points, where the model was fitted on points of a known one.
        Returns a DataFrame of `COLUMNS`, of a classifier also `CLASS_COLUMNS`, with the index of
            the input.
        """
        columns = COLUMNS if self.scorer.classes is None else COLUMNS + CLASS_COLUMNS
        # None in every empty cell: NaN is no JSON
        rows = [
            {**dict.fromkeys(columns), **self._row(row)} for row in model_input.to_dict("records")
        ]
        return pandas.DataFrame(rows, columns=columns, index=model_input.index, dtype=object)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        from medssl.data.readers.errors import ReadError
        from pipelines.scoring import OutsideDomainError

        try:
            return self._verdict(row)
        except OutsideDomainError as error:
            return {"status": "refused", "error": str(error)}
        except (ReadError, ValueError) as error:
            return {"status": "error", "error": str(error)}
        except Exception as error:  # one row never takes the others down; a message may hold a path
            return {"status": "error", "error": f"scoring failed with {type(error).__name__}"}

    def _verdict(self, row: dict[str, Any]) -> dict[str, Any]:
        from medssl.data.sample import Sample

        if _given(row.get("content")):
            with tempfile.TemporaryDirectory(prefix="medssl-") as work:
                file = Path(work, "content")
                file.write_bytes(_bytes(row["content"]))
                found = _read(file, row.get("unit"))
        elif _given(row.get("path")):
            found = _read(_below_root(row["path"]), row.get("unit"))
        else:
            raise ValueError("a row needs content (the bytes of a file) or path, got neither")
        sites = {"row": row["site"]} if _given(row.get("site")) else None
        scored = self.scorer.score([Sample(item="row", **found)], sites=sites)[0]
        told = {
            "score": scored.score,
            "p_value": scored.p_value,
            "threshold": scored.threshold,
            "anomalous": scored.anomalous,
            "no_verdict": scored.no_verdict,
            "status": "ok",
        }
        if scored.class_scores is not None:
            scores = json.dumps(scored.class_scores)
            told |= {"predicted": scored.predicted, "class_scores": scores}
        return told


def _read(file: Path, unit: Any) -> dict[str, Any]:
    """What a sample gets from a file: a cloud where it holds free points, else an image."""
    from medssl.data.image import PointCloud
    from medssl.data.readers.any import read_image, sniff
    from medssl.data.readers.points import read_points

    if sniff(file) != "points":
        return {"images": {"image": read_image(file)}}
    found = read_points(file, unit=unit if _given(unit) else None)
    return {"points": found} if isinstance(found, PointCloud) else {"images": {"image": found}}


def _given(value: Any) -> bool:
    return isinstance(value, (str, bytes, bytearray)) and len(value) > 0


def _bytes(content: str | bytes) -> bytes:
    if not isinstance(content, str):
        return bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError("content is text but not base64; send the file's bytes") from error


def _below_root(path: str) -> Path:
    """The file, if it lies below the one folder the server may read."""
    root = os.environ.get("MEDSSL_SERVE_ROOT")
    if not root:
        raise ValueError("no local path is read where MEDSSL_SERVE_ROOT is not set; send content")
    file = Path(root, path).resolve()
    if not file.is_relative_to(Path(root).resolve()):
        raise ValueError("the path is not below MEDSSL_SERVE_ROOT; only files there are read")
    if not file.exists():
        raise ValueError("there is no such file below MEDSSL_SERVE_ROOT")
    return file


set_model(ServedModel())
