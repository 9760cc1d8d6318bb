"""How a patient lay and which side is shown: told, never used for geometry (PS3.3 C.7.3.1.1.2)."""

from typing import Any

_KNOWN = {
    "patient_position": (
        ("PatientPosition",),
        "HFS HFP HFDR HFDL FFS FFP FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL SITTING",
    ),
    "laterality": (("ImageLaterality", "Laterality"), "L R B U"),
    "view_position": (
        ("ViewPosition",),
        "AP PA LL RL RLD LLD RLO LLO CC MLO ML LM LMO XCCL XCCM FB SIO ISO",
    ),
}
_ANATOMIC = frozenset("APRLHF")  # of a row, then of a column: to which side of the body it runs


def positioning(dataset: Any) -> dict[str, str]:
    """What a header says, in the standard's codes; anything else might be a name and stays."""
    told = {}
    for name, (keywords, codes) in _KNOWN.items():
        values = [str(dataset.get(keyword) or "") for keyword in keywords]
        value = next(filter(None, values), "")
        if value in codes.split():
            told[name] = value
    sides = dataset.get("PatientOrientation")
    if sides and not isinstance(sides, str) and all(map(_is_direction, sides)):
        told["patient_orientation"] = "\\".join(sides)
    return told


def _is_direction(side: str) -> bool:
    return 1 <= len(side) <= 3 and _ANATOMIC.issuperset(side)  # RALPH is none
