"""What a model has seen, and whether images that must be new to it are among that.

Images are the same where their stored pixels are (`pixel_sha256`), also renamed, re-packed or
re-anonymized, and related where they are of one patient or part.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from medssl.data.manifest import Item, Manifest
from medssl.data.privacy import key_fingerprint
from medssl.data.seen import Seen
from medssl.models.folder import ModelFolderError
from pipelines.console import say
from pipelines.normals import read_hashes

FILE = "fitted.json"
_MOST_NAMED = 5


class LeakageError(ValueError):
    """Images that must be new to a model, and are not."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is kept of an image that a model has seen.

    group: salted patient or part. key: fingerprint of the key that salted it.
    """

    pixel_sha256: str
    group: str | None = None
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class History:
    """What a saved detector has seen, and what for; `fitted.json` in its folder.

    fitted: by item id, all that `fit` was given, whatever it held out to choose with included.
    calibration: by item id, the images whose scores gave the threshold.
    pretrained: what its encoders were pretrained on.
    """

    fitted: Mapping[str, Trace] = field(default_factory=dict)
    calibration: Mapping[str, Trace] = field(default_factory=dict)
    pretrained: Seen = field(default_factory=Seen)

    @property
    def learnt_from(self) -> frozenset[str]:
        """Pixel hashes of what a fit or a pretraining saw, which calibrates nothing."""
        return self.pretrained.pixels | {trace.pixel_sha256 for trace in self.fitted.values()}

    @property
    def num_groups(self) -> int:
        """Patients or parts among the fitted images; one without is its own."""
        return len({trace.group or f"item {name}" for name, trace in self.fitted.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "fitted": _plain(self.fitted),
            "calibration": _plain(self.calibration),
            "pretrained": self.pretrained.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            fitted={name: Trace(**told) for name, told in values["fitted"].items()},
            calibration={name: Trace(**told) for name, told in values["calibration"].items()},
            pretrained=Seen.from_dict(values["pretrained"]),
        )


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Which images a model knows already, as item ids in the order of the images.

    compared: how many images were looked at.
    copies: with the pixels of one that it was fitted on.
    related: others of a patient or part that it was fitted on.
    pretrained: seen, they or others of their patient or part, when its encoder was pretrained.
    calibrated: gave its threshold, they or others of their patient or part.
    foreign: patients or parts were salted with another key, so that only pixels were compared.
    ungrouped: images without a patient or part, where the model knows those of its own.
    """

    compared: int = 0
    copies: tuple[str, ...] = ()
    related: tuple[str, ...] = ()
    pretrained: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    foreign: bool = False
    ungrouped: int = 0

    @property
    def items(self) -> list[str]:
        """Each item that is known, once."""
        found = (*self.copies, *self.related, *self.pretrained, *self.calibrated)
        return list(dict.fromkeys(found))

    @property
    def told(self) -> str:
        """The account in words."""
        named = ", ".join(self.items[:_MOST_NAMED])
        more = ", ..." if len(self.items) > _MOST_NAMED else ""
        return (
            f"{len(self.copies)} of {self.compared} have the same pixels as an image it was fitted "
            f"on, {len(self.related)} are of the same patient or part, {len(self.pretrained)} were "
            f"seen when its encoder was pretrained, and {len(self.calibrated)} gave its threshold "
            f"(items {named}{more})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Counts, for the result of a job."""
        counts = {
            entry.name: len(getattr(self, entry.name))
            for entry in fields(self)
            if entry.name not in ("compared", "foreign", "ungrouped")
        }
        by_group = not self.foreign and not self.ungrouped
        return {"compared": self.compared, **counts, "groups_compared": by_group}

    def tell_doubts(self) -> None:
        """Say what could not be compared."""
        if self.foreign:
            say(
                "the model's patients or parts were salted with another key (MEDSSL_KEY_FILE): "
                "only its pictures are compared with yours, not its patients"
            )
        elif self.ungrouped:
            say(
                f"{self.ungrouped} of {self.compared} images have no patient or part, so only "
                "their pixels are compared; name it with --groups"
            )

    def refuse(self, what: str, advice: str) -> None:
        """Raises LeakageError where a model knows any of `what`, with what to do about it."""
        if self.items:
            raise LeakageError(f"{what} must be new to the model: {self.told}; {advice}")


def demand_new(found: Overlap, what: str, *, allow_seen: bool) -> None:
    """Raises LeakageError where a model knows any of `what`; says so where that is allowed."""
    if allow_seen and found.items:
        say(f"warning: {what} are not new to the model: {found.told}")
    elif not allow_seen:
        found.refuse(what, "leave them out with --select, or go on with --allow-seen")


def without_copies(
    items: Sequence[Item], hashes: Mapping[str, str], errors: list[dict[str, str]]
) -> list[Item]:
    """One of each picture, the first; what has the same pixels is added to `errors`.

    A promise of a false-alarm rate counts pictures, and a second copy is none.
    """
    first: dict[str, str] = {}
    kept = []
    for item in items:
        earlier = first.setdefault(hashes[item.item], item.item)
        if earlier == item.item:
            kept.append(item)
        else:
            reason = f"the same pixels as item {earlier}, which counts once"
            errors.append({"item": item.item, "reason": reason})
    return kept


def traces(items: Iterable[Item], hashes: Mapping[str, str]) -> dict[str, Trace]:
    """What is kept of these images; hashes: pixel hash by item id."""
    return {
        item.item: Trace(
            pixel_sha256=hashes[item.item],
            group=item.group,
            key="" if item.group is None else key_fingerprint(),
        )
        for item in items
    }


def read_history(model_folder: Path) -> History:
    """What a saved detector has seen; of an older folder the pixels it was fitted on alone.

    Raises ModelFolderError where the file is damaged.
    """
    file, older = model_folder / FILE, model_folder / "calibration.json"
    try:
        if file.is_file():
            return History.from_dict(json.loads(file.read_text()))
        if not older.is_file():
            return History()
        pixels = json.loads(older.read_text())["fitted_on"]
        return History(fitted={pixel: Trace(pixel_sha256=pixel) for pixel in pixels})
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{model_folder.name} has a damaged {FILE}") from error


def compare(items: Sequence[Item], hashes: Mapping[str, str], history: History) -> Overlap:
    """Which of the images a model with this history knows.

    hashes: pixel hash by item id; of an image without one only the patient or part is compared.
    """
    known = {item.item: hashes.get(item.item, "") for item in items}
    fitted, calibration = _seen(history.fitted), _seen(history.calibration)
    copies = [item.item for item in items if known[item.item] in fitted.pixels]
    related = fitted.known(items, known) - set(copies)

    def in_order(names: set[str]) -> tuple[str, ...]:
        return tuple(item.item for item in items if item.item in names)

    return Overlap(
        compared=len(items),
        copies=tuple(copies),
        related=in_order(related),
        pretrained=in_order(history.pretrained.known(items, known)),
        calibrated=in_order(calibration.known(items, known)),
        foreign=history.pretrained.foreign or _foreign(history),
        ungrouped=sum(item.group is None for item in items) if _has_groups(history) else 0,
    )


def overlap_with(model_folder: Path, manifest: Manifest) -> Overlap:
    """Which images of a manifest a saved model knows; reads those that have no pixel hash yet."""
    history = read_history(model_folder)
    if history == History():
        say("the model does not tell what it was fitted on, so nothing is compared with that")
        return Overlap()
    hashes = read_hashes(manifest.images, "comparing with what the model saw", errors=[])
    found = compare(manifest.images, hashes, history)
    found.tell_doubts()
    return found


def _seen(kept: Mapping[str, Trace]) -> Seen:
    """Under the key of this user; groups under another say nothing."""
    key = key_fingerprint()
    groups = {trace.group for trace in kept.values() if trace.key == key} - {None}
    return Seen(
        pixels=frozenset(trace.pixel_sha256 for trace in kept.values()),
        groups=frozenset(group for group in groups if group is not None),
        key=key,
    )


def _foreign(history: History) -> bool:
    keys = {trace.key for trace in (*history.fitted.values(), *history.calibration.values())}
    return bool(keys - {"", key_fingerprint()})


def _has_groups(history: History) -> bool:
    kept = (*history.fitted.values(), *history.calibration.values())
    return bool(history.pretrained.groups) or any(trace.group is not None for trace in kept)


def _plain(kept: Mapping[str, Trace]) -> dict[str, dict[str, str]]:
    """Without what is not known, for pictures mostly have no group."""
    return {
        name: {key: value for key, value in asdict(trace).items() if value}
        for name, trace in kept.items()
    }
