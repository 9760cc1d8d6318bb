"""Maps on disk against masks: pixels, lesions and whole cases, with intervals."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anomaly.aupimo import aupimo
from anomaly.calibration import Calibration
from anomaly.dice import Overlap, dice_intervals, overlap
from anomaly.froc import FROC, RATES, Findings, find
from anomaly.metrics import PixelScores
from anomaly.streaming import StreamingPixelScores
from medssl.data.geometry import resample
from medssl.data.manifest import Item, Manifest, load_sample
from medssl.data.readers.any import read_image
from medssl.metrics import Interval, OneClassError, bootstrap
from pipelines.clouds import read_values
from pipelines.tables import Row, why_no_verdict

KEPT_PIXELS = 1 << 28
"""Pixels of maps that are kept in memory, some 1.3 GB; those past them are read in each pass."""
PIXEL_BUDGET = 1 << 26
"""Pixels of all maps together that are sorted; of more they are counted in bins."""
CANDIDATE_SHARE = 0.01
"""Findings of the FROC curve begin at the score that this share of the normal pixels exceeds."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How intervals are drawn; groups: patient or part of each item."""

    groups: Sequence[str]
    repeats: int
    seed: int

    def of(self, places: Sequence[int]) -> "Draws":
        """The same for some of the items."""
        return Draws([self.groups[place] for place in places], self.repeats, self.seed)


class ScoredMaps:
    """Raw maps and masks of scored items on the source's grid, as often as asked for.

    Kept in memory up to `KEPT_PIXELS`; those after that are read anew. An item without a mask has
    None.

    min_finding: mm3 in volumes, mm2 in pictures; see `findings`.
    """

    def __init__(
        self,
        manifest: Manifest,
        chosen: Sequence[tuple[Item, Row]],
        folder: Path,
        *,
        min_finding: float = 0.0,
    ) -> None:
        self.manifest, self.chosen, self.folder = manifest, chosen, folder
        self.min_finding = min_finding
        self.spacings: dict[int, tuple[float, ...]] = {}
        self.kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.last: tuple[int, tuple[Tensor, Tensor | None]] | None = None
        self.num_kept = 0
        self.maps, self.masks = _Column(self, 0), _Column(self, 1)

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor | None]:
        """Map and mask (*spatial) of one item."""
        if place in self.kept:
            return self.kept[place]
        if self.last is not None and self.last[0] == place:
            return self.last[1]
        pair = _read(self.manifest, *self.chosen[place], self.folder)
        if self.num_kept + pair[0].numel() <= KEPT_PIXELS:
            self.kept[place] = pair
            self.num_kept += pair[0].numel()
        self.last = place, pair
        return pair

    def findings(self, place: int, threshold: float) -> Findings:
        """What the map of one item shows above a threshold, of at least `min_finding`.

        Raises ValueError where findings are to be measured and the item has no spacing in mm.
        """
        if self.min_finding == 0:
            return find(*self[place], threshold=threshold)
        if place not in self.spacings:
            self.spacings[place] = spacing_in_mm(self.manifest, self.chosen[place][0])
        spacing, least = self.spacings[place], self.min_finding
        return find(*self[place], threshold=threshold, spacing=spacing, min_volume_mm3=least)


class _Column:
    """Maps or masks alone; the two may be iterated in step."""

    def __init__(self, pairs: ScoredMaps, side: int) -> None:
        self.pairs, self.side = pairs, side

    def __iter__(self) -> Iterator[Any]:
        return (pair[self.side] for pair in self.pairs)


def spacing_in_mm(manifest: Manifest, item: Item) -> tuple[float, ...]:
    """Of the source's grid, on which the map lies; raises ValueError where it has none."""
    image = None if item.kind == "points" else load_sample(manifest, item).images["image"]
    if image is None or image.spacing is None:
        raise ValueError(
            f"--min-finding is in mm, and item {item.item} has no distance between its pixels; "
            "leave it out"
        )
    return image.spacing


def with_truth(
    manifest: Manifest, items: Sequence[Item], rows: Sequence[Row]
) -> tuple[list[int], str | None]:
    """Places of the items that maps are judged on, or why they are not judged at all.

    Normal items count as unmarked, anomalous ones without a mask do not count.
    """
    if any(row["map_path"] is None for row in rows):
        return [], "a classifier gives no maps"
    places = [
        place
        for place, item in enumerate(items)
        if item.label == 0 or manifest.mask_of(item) is not None
    ]
    if not any(items[place].label for place in places):
        return [], "no anomalous item has a mask"
    return places, None


def pixel_scores(maps: ScoredMaps, num_pixels: int) -> PixelScores | StreamingPixelScores:
    """Exact within the budget, else from bins."""
    form = PixelScores if num_pixels <= PIXEL_BUDGET else StreamingPixelScores
    return form(maps.maps, maps.masks)


def map_metrics(
    maps: ScoredMaps, thresholds: Sequence[float | None], draws: Draws, skipped: dict[str, str]
) -> dict[str, Any]:
    """Every metric of maps; those that are missing are in `skipped`, with the reason.

    thresholds: the calibrated map threshold of each item, None without one.
    """
    overlaps, findings, num_pixels = _above_thresholds(maps, thresholds)
    try:
        pixels = pixel_scores(maps, num_pixels)
        found: dict[str, Any] = dict(
            pixels.intervals(draws.groups, repeats=draws.repeats, seed=draws.seed)
        )
    except OneClassError as error:
        skipped["pixel metrics"] = str(error)
        return {}
    found["pixel_form"] = "exact" if isinstance(pixels, PixelScores) else "binned"
    if len(overlaps) == len(maps):
        found |= _try("dice", skipped, lambda: _dice(overlaps, draws))
        found |= _try("lesion_recall", skipped, lambda: _lesions(findings, draws))
    else:
        reason = why_no_verdict([row for _, row in maps.chosen])
        skipped |= dict.fromkeys(("dice", "lesion_recall"), reason)
    found |= _try("aupimo", skipped, lambda: _aupimo(maps, draws))
    found |= _try("froc_mean_recall", skipped, lambda: _froc(maps, pixels, draws))
    return {
        name: value.to_dict() if isinstance(value, Interval) else value
        for name, value in found.items()
    }


def point_metrics(maps: ScoredMaps, draws: Draws, skipped: dict[str, str]) -> dict[str, Any]:
    """Every metric of the points of free clouds; those that are missing are in `skipped`."""
    try:
        points = pixel_scores(maps, sum(values.numel() for values in maps.maps))
        found = points.intervals(draws.groups, repeats=draws.repeats, seed=draws.seed)
    except OneClassError as error:
        skipped["point metrics"] = str(error)
        return {}
    skipped["AUPRO, AUPIMO, Dice and FROC"] = "points lie on no grid on which regions touch"
    names = ("auroc", "average_precision")
    return {f"point_{name}": found[f"pixel_{name}"].to_dict() for name in names}


def map_thresholds(calibration: Calibration | None, rows: Sequence[Row]) -> list[float | None]:
    """Of each item, that of its site where the calibration is by site."""
    if calibration is None:
        return [None] * len(rows)
    return [calibration.of_site(row.get("site")).map_threshold for row in rows]


def _try(
    name: str, skipped: dict[str, str], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    try:
        return measure()
    except OneClassError as error:
        skipped[name] = str(error)
        return {}


def _above_thresholds(
    maps: ScoredMaps, thresholds: Sequence[float | None]
) -> tuple[list[Overlap], list[Findings], int]:
    """Of the items with a threshold; and the number of pixels of all."""
    overlaps, findings, num_pixels = [], [], 0
    for place, threshold in enumerate(thresholds):
        values, mask = maps[place]
        num_pixels += values.numel()
        if threshold is not None:
            overlaps.append(overlap(values, mask, threshold=threshold))
            findings.append(maps.findings(place, threshold))
    return overlaps, findings, num_pixels


def _dice(overlaps: Sequence[Overlap], draws: Draws) -> dict[str, Any]:
    return dict(dice_intervals(overlaps, draws.groups, repeats=draws.repeats, seed=draws.seed))


def _lesions(findings: Sequence[Findings], draws: Draws) -> dict[str, Any]:
    """At the calibrated map threshold."""
    recall, false = FROC(findings).intervals_of_last(
        draws.groups, repeats=draws.repeats, seed=draws.seed
    )
    return {"lesion_recall": recall, "false_findings": false}


def _aupimo(maps: ScoredMaps, draws: Draws) -> dict[str, Any]:
    values = aupimo(maps.maps, maps.masks)
    places = (~values.isnan()).nonzero()[:, 0].tolist()
    groups = draws.of(places).groups
    mean = bootstrap(_mean, values[places], groups=groups, repeats=draws.repeats, seed=draws.seed)
    return {"aupimo": mean}


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _froc(
    maps: ScoredMaps, pixels: PixelScores | StreamingPixelScores, draws: Draws
) -> dict[str, Any]:
    threshold = pixels.level(CANDIDATE_SHARE)
    froc = FROC([maps.findings(place, threshold) for place in range(len(maps))])
    mean = froc.interval(draws.groups, repeats=draws.repeats, seed=draws.seed)
    curve = {"false_findings": list(RATES), "recall": froc.recalls(), "from_score": threshold}
    return {"froc_mean_recall": mean, "froc": curve}


def _read(manifest: Manifest, item: Item, row: Row, folder: Path) -> tuple[Tensor, Tensor | None]:
    file = folder / row["map_path"]
    values = read_values(file) if item.kind == "points" else read_image(file).pixels[0]
    if manifest.mask_of(item) is None:
        return values, None
    sample = load_sample(manifest, item)
    if item.kind == "points":
        return values, sample.point_labels
    assert sample.mask is not None
    marked = resample(sample.mask, to=sample.images["image"], mode="nearest", outside=0.0)
    return values, marked.pixels[0].reshape(values.shape) > 0.5
