"""The card of a fitted detector: what it learnt from, what it promises, what it is not for."""

from collections.abc import Mapping, Sequence
from typing import Any

from anomaly.base import Detector
from anomaly.calibration import Calibration
from medssl.data.preprocess import Preprocessing
from medssl.models.encoder import Encoder

_CALIBRATION = "## Calibration"


def detector_card(
    detector: Detector,
    *,
    preprocessing: Preprocessing,
    domain: Mapping[str, Any],
    calibration: Calibration,
    num_fitted: int,
    num_groups: int,
    origin: str,
) -> str:
    """Markdown for people; it names no file, folder, patient or machine.

    num_fitted: normal items the detector was fitted on.
    num_groups: patients or parts they come from.
    origin: how it came to be fitted on them, such as "seed 0".
    """
    encoders = [module for module in detector.modules() if isinstance(module, Encoder)]
    about = "".join(f" on features of {_named(encoder)}" for encoder in encoders[:1])
    lines = [
        f"# {type(detector).__name__}",
        "",
        f"An anomaly detector{about}. Larger scores and map values are more anomalous; they are "
        "raw and have no unit.",
        "",
        "## Fitted on",
        "",
        f"- {num_fitted} normal items of {num_groups} patients or parts, {origin}",
        *_domain_lines(domain),
        "",
        _refused(domain),
        "",
        *_note_lines(detector.notes),
        "## Preprocessing",
        "",
        *_preprocessing_lines(preprocessing),
        "",
        _CALIBRATION,
        "",
        *_calibration_lines(calibration),
        "",
        "## Use and limits",
        "",
        "For research and engineering: it points at images, and places in them, that differ from "
        "the normal ones it was fitted on. It does not say what the difference is, and it misses "
        "what its features do not show. It is no medical device and no substitute for a "
        "diagnosis; measure it on data of the place where it is to be used, and calibrate it "
        "again where scanner, protocol, camera or population change.",
    ]
    return "\n".join(lines) + "\n"


def recalibrated_card(card: str, calibration: Calibration) -> str:
    """The card with what another calibration says; the rest stays as it is."""
    before, _, rest = card.partition(f"{_CALIBRATION}\n")
    after = rest[max(0, rest.find("\n## ")) :]
    return "\n".join([f"{before}{_CALIBRATION}", "", *_calibration_lines(calibration), after])


def flat_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested notes under dotted names; the entries of a list are numbered."""
    found: dict[str, Any] = {}
    for name, value in notes.items():
        if isinstance(value, (list, tuple)):
            value = {str(place): entry for place, entry in enumerate(value)}
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": entry for inner, entry in flat_notes(value).items()}
        else:
            found[name] = value
    return found


def _note_lines(notes: Mapping[str, Any]) -> list[str]:
    """What the fit chose; nothing where it made no choice."""
    if not notes:
        return []
    lines = [
        f"- {name}: {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in flat_notes(notes).items()
    ]
    return ["## Chosen in the fit, without labels", "", *lines, ""]


def _preprocessing_lines(preprocessing: Preprocessing) -> list[str]:
    """What was set; of clouds alone nothing that belongs to pictures."""
    told = preprocessing.to_dict()
    names = told if preprocessing.size is not None else ["geometry"]
    return [f"- {name}: {told[name]}" for name in names if told[name]]


def _named(encoder: Encoder) -> str:
    name = getattr(encoder, "name", None)
    return f"{type(encoder).__name__} ({name})" if name else type(encoder).__name__


def _domain_lines(domain: Mapping[str, Any]) -> list[str]:
    if domain["axes"] == "points":
        return [
            f"- free point clouds in the unit: {', '.join(domain['unit'])}",
            f"- number of points: {_range(domain['num_points'])}",
            f"- extent in that unit: {_range(domain['extent'])}",
        ]
    lines = [
        f"- modality: {', '.join(domain['modality'])}",
        f"- axes: {domain['axes']}, channels: {', '.join(map(str, domain['channels']))}",
        f"- size in pixels: {_range(domain['size'])}",
    ]
    if domain["spacing_mm"] is not None:
        lines.append(f"- spacing in mm: {_range(domain['spacing_mm'])}")
    if "units" in domain:
        lines.append(f"- unit: {', '.join(domain['units'])}")
    if "xyz" in domain:
        lines += ["", "and xyz beside the picture:", "", *_domain_lines(domain["xyz"])]
    return lines


def _refused(domain: Mapping[str, Any]) -> str:
    if domain["axes"] == "points":
        return (
            "An item unlike these is refused: another unit, or a number of points or an extent "
            "more than a factor of two beyond the range."
        )
    return (
        "An item unlike these is refused: another modality, axes or number of channels, or a "
        "spacing or size more than a factor of two beyond the range."
    )


def _range(seen: Mapping[str, Sequence[float]]) -> str:
    low, high = (" x ".join(f"{value:g}" for value in seen[end]) for end in ("min", "max"))
    return low if low == high else f"{low} to {high}"


def _calibration_lines(calibration: Calibration) -> list[str]:
    held_out = f"- held-out normal items: {len(calibration.scores)} ({calibration.method})"
    if calibration.by is not None:
        return [
            f"- false-alarm rate: {calibration.rate:g}, for each {calibration.by} by itself",
            held_out,
            *(
                f"- {calibration.by} {name}: {_site(site)}"
                for name, site in calibration.sites.items()
            ),
            "",
            calibration.guarantee,
        ]
    if not calibration.calibrated:
        return [
            f"Not calibrated for a false-alarm rate of {calibration.rate:g}: scores have no "
            f"threshold and no p-value. {calibration.missing} more held-out normal items are "
            "needed."
        ]
    return [
        f"- false-alarm rate: {calibration.rate:g}",
        held_out,
        f"- threshold of the score: {calibration.threshold:.6g}",
        f"- threshold of the map: {calibration.map_threshold:.6g}",
        "",
        calibration.guarantee,
    ]


def _site(calibration: Calibration) -> str:
    if not calibration.calibrated:
        return f"{len(calibration.scores)} held-out items, {calibration.missing} too few"
    return (
        f"{len(calibration.scores)} held-out items, threshold of the score "
        f"{calibration.threshold:.6g}, of the map {calibration.map_threshold:.6g}"
    )
