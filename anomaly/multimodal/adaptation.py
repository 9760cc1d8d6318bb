"""What LSFA learns: an adaptor for each modality, from compactness and from alignment.

LSFA is by Tu et al. (ECCV 2024, https://arxiv.org/abs/2401.03145); InfoNCE by van den Oord et al.
(https://arxiv.org/abs/1807.03748).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.multimodal.modalities import ModalityName
from medssl.data.sample import Sample
from medssl.models.masked_transformer import NORM_EPS
from medssl.models.precision import full_precision
from medssl.schedule import Clock
from medssl.training import Trainable

MODALITIES: tuple[ModalityName, ...] = ("color", "geometry")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the loss of LSFA is made of, beside the compactness of cells, whose weight is 1.

    global_compactness: weight of the compactness of items (0.4 in the paper).
    local_alignment, global_alignment: weights lambda_1 and lambda_2 of the alignment of cells and
        of items.
    temperature: of both alignments; smaller punishes near misses harder.
    head_width: of the projections that are aligned.
    num_cells: drawn of each item and step for the local terms, and put into the memory.
    memory_cells, memory_items: rows of the memories of cells and of whole items.
    """

    global_compactness: float = 0.4
    local_alignment: float = 1.0
    global_alignment: float = 0.1
    temperature: float = 1.0
    head_width: int = 512
    num_cells: int = 512
    memory_cells: int = 16384
    memory_items: int = 256

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("head_width", "num_cells", "memory_cells", "memory_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Adaptor(nn.Module):
    """A transformer block, norms first, over the valid cells of an item; at first the identity.

    What it adds begins as zero. A head is `width / num_heads` wide, rounded up, so that any number
    of heads goes with any width. Places are not told to it.

    width: E.
    """

    def __init__(self, width: int, *, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * -(-width // num_heads)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for last in (self.project, cast(nn.Linear, self.mlp[2])):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """tokens: (B, N, E); valid: (B, N) bool, the cells that are looked at. Returns (B, N, E),
        of no meaning where not valid."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, E / heads)
            for part in self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        )
        shown = valid | ~valid.any(1, keepdim=True)  # of nothing the attention would be NaN
        attended = F.scaled_dot_product_attention(query, key, value, shown[:, None, None])
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class FeatureMemory(nn.Module):
    """The last features that were put in, and whose each is; a queue.

    size: rows M. width: E.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("owners", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))  # rows ever
        self.rows: Tensor
        self.owners: Tensor
        self.pushed: Tensor

    @torch.no_grad()
    def push(self, features: Tensor, owners: Tensor) -> None:
        """Put in features (n, E) of owners (n,); the oldest rows leave."""
        size = len(self.rows)
        order = torch.arange(len(features), device=features.device)[-size:]
        slots = (self.pushed + order) % size
        self.rows[slots], self.owners[slots] = features[order].to(self.rows.dtype), owners[order]
        self.pushed += len(features)

    def distance(self, features: Tensor, owners: Tensor) -> Tensor:
        """From features (n, E) to the nearest row of another owner, the mean; 0 where there is
        none. Its gradient is that of the features alone, at any distance but 0."""
        features = features.float()
        filled = min(int(self.pushed), len(self.rows))
        rows = self.rows[:filled]
        other = self.owners[:filled] != owners[:, None]  # (n, M)
        known = other.any(1)
        if not known.any():
            return 0 * features.sum()
        with torch.no_grad(), full_precision(features):
            squares = torch.addmm(rows.square().sum(1), features, rows.mT, alpha=-2)
            found = squares.masked_fill_(~other, torch.inf).argmin(1)  # less a constant of each row
        return (features - rows[found]).norm(dim=1)[known].mean()


class Adaptation(Trainable):
    """The adaptors of color and geometry, and the loss of LSFA.

    widths: features of a cell of color and of geometry. num_heads: of each adaptor.
    """

    accumulation = "refused"  # the cells of a batch are set against each other

    def __init__(self, widths: Mapping[ModalityName, int], *, num_heads: int, terms: Terms) -> None:
        super().__init__()
        self.views, self.terms = _Features(), terms
        self.adaptors, self.heads = nn.ModuleDict(), nn.ModuleDict()
        self.cells, self.items = nn.ModuleDict(), nn.ModuleDict()
        for name in MODALITIES:
            width = widths[name]
            self.adaptors[name] = Adaptor(width, num_heads=num_heads)
            self.heads[name] = nn.Linear(width, terms.head_width)
            self.cells[name] = FeatureMemory(terms.memory_cells, width)
            self.items[name] = FeatureMemory(terms.memory_items, width)
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(()))
        self._fresh: list[tuple[FeatureMemory, Tensor, Tensor]] = []

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn center and spread of each modality over the valid cells, and fill the memories.

        Raises ValueError where no cell has both modalities.
        """
        generator = torch.Generator()
        self._check_pairs(samples)
        for name in MODALITIES:
            every = (self.views(sample, generator) for sample in samples)
            mean, scale = _center(views[name][views[f"{name}_valid"]] for views in every)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_scale").copy_(scale)
        device = self.get_buffer("color_scale").device
        for sample in samples:
            views = self.views(sample, generator)
            self._adapt({key: value[None].to(device) for key, value in views.items()})
            self._refresh()

    def adapted(self, name: ModalityName, features: Tensor, valid: Tensor) -> Tensor:
        """Features (B, h, w, E) of a modality as they are compared, in units of their spread over
        normal cells. valid: (B, h, w) bool; zero elsewhere."""
        mean, scale = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_scale")
        known = valid.flatten(1)
        most = max(1, int(known.sum(1).max()))  # what is not valid costs time
        order = known.long().sort(dim=1, descending=True, stable=True).indices
        first, item = order[:, :most], torch.arange(len(known), device=known.device)[:, None]
        tokens, known = (features.flatten(1, 2)[item, first] - mean) / scale, known[item, first]
        tokens = self.adaptors[name](torch.where(known[..., None], tokens, 0.0), known)
        found = torch.zeros_like(features.flatten(1, 2), dtype=tokens.dtype)
        found[item, first] = torch.where(known[..., None], tokens, 0.0)
        return found.unflatten(1, valid.shape[1:])

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum of the four terms, and each of them."""
        adapted, near, near_items = self._adapt(views)
        both = views["color_valid"] & views["geometry_valid"]
        item, cell = draw_cells(both.flatten(1), self.terms.num_cells)
        paired = both.flatten(1).any(1)
        local, whole = {}, {}
        for name in MODALITIES:
            local[name] = self.heads[name](adapted[name].flatten(1, 2)[item, cell])
            whole[name] = self.heads[name](pooled(adapted[name], both)[paired])
        terms = self.terms
        alignment = contrast(local["color"], local["geometry"], terms.temperature)
        items_alignment = contrast(whole["color"], whole["geometry"], terms.temperature)
        total = (
            near
            + terms.global_compactness * near_items
            + terms.local_alignment * alignment
            + terms.global_alignment * items_alignment
        )
        return {
            "loss": total,
            "local_compactness": near,
            "global_compactness": near_items,
            "local_alignment": alignment,
            "global_alignment": items_alignment,
        }

    def after_step(self, clock: Clock) -> None:
        """The features of the batch take the place of the oldest in the memories."""
        self._refresh()

    def _adapt(
        self, views: Mapping[str, Tensor]
    ) -> tuple[dict[ModalityName, Tensor], Tensor, Tensor]:
        """Adapted features, and the compactness of drawn cells and of items, over both modalities.

        What was compared waits to be put into the memories.
        """
        self._fresh = []
        adapted: dict[ModalityName, Tensor] = {}
        near, near_items = views["color"].new_zeros(2)
        for name in MODALITIES:
            valid = views[f"{name}_valid"]
            adapted[name] = self.adapted(name, views[name], valid)
            item, cell = draw_cells(valid.flatten(1), self.terms.num_cells)
            cells = adapted[name].flatten(1, 2)[item, cell]
            there = valid.flatten(1).any(1)
            items = pooled(adapted[name], valid)[there]
            owners = views["owner"]
            near = near + self._compared(self.cells[name], cells, owners[item])
            near_items = near_items + self._compared(self.items[name], items, owners[there])
        return adapted, near, near_items

    def _compared(self, memory: nn.Module, features: Tensor, owners: Tensor) -> Tensor:
        known = cast(FeatureMemory, memory)
        self._fresh.append((known, features.detach(), owners))
        return known.distance(features, owners)

    def _refresh(self) -> None:
        for memory, features, owners in self._fresh:
            memory.push(features, owners)
        self._fresh = []

    def _check_pairs(self, samples: Sequence[Sample]) -> None:
        generator = torch.Generator()
        for sample in samples:
            views = self.views(sample, generator)
            if (views["color_valid"] & views["geometry_valid"]).any():
                return
        raise ValueError(
            f"none of the {len(samples)} normal items has color and geometry at one place, and "
            "they cannot be aligned; DoublePatchCore takes such items"
        )


def contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE between rows that belong together, the mean of both directions.

    Each row (n, E) of one side is to be found among all rows of the other, by cosines over the
    temperature; log n is chance, and what no rows give is 0. Under torchrun the rows are those of
    this process, which are not as many in each.
    """
    if len(first) == 0:
        return 0 * (first.sum() + second.sum())
    with full_precision(first):
        sides = [F.normalize(side.float(), dim=1) for side in (first, second)]
        logits = sides[0] @ sides[1].mT / temperature  # (n, n)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def pooled(features: Tensor, valid: Tensor) -> Tensor:
    """Mean (B, E) of features (B, h, w, E) over the valid cells (B, h, w); 0 where none is."""
    weight = valid.flatten(1).to(features.dtype)
    total = (features.flatten(1, 2) * weight[..., None]).sum(1)
    return total / weight.sum(1, keepdim=True).clamp_min(1)


def draw_cells(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` of the valid cells (B, N) of each item, none twice: item (n,) and cell (n,)."""
    luck = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, -1.0)
    best, cell = luck.topk(min(count, valid.shape[1]), dim=1)
    item, place = (best >= 0).nonzero(as_tuple=True)
    return item, cell[item, place]


@dataclass(frozen=True, slots=True)
class _Features:
    """The views of items whose pixels are features."""

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Of each modality its name (h, w, E) and "_valid" (h, w) bool; and "owner" (), a number
        for the part or, where no group is known, the item."""
        digest = hashlib.sha256((sample.group or sample.item).encode()).digest()
        owner = int.from_bytes(digest[:8], "little", signed=True)
        views = {"owner": torch.tensor(owner)}
        for name in MODALITIES:
            image = sample.images[name]
            assert image.valid is not None
            views[name], views[f"{name}_valid"] = image.pixels.movedim(0, -1), image.valid
        return views


def _center(cells: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (E,), and root mean square deviation of all features together (), of cells (n, E)."""
    number, total, squares = 0, torch.zeros((), dtype=torch.float64), 0.0
    for some in cells:
        number += len(some)
        total = total + some.double().sum(0)
        squares += float(some.double().square().sum())
    mean = total / number
    variance = squares / (number * len(mean)) - float(mean.square().mean())
    floor = 1e-12 + 1e-6 * float(mean.square().mean()) ** 0.5  # where all are equal
    return mean, torch.tensor(max(variance, 0.0) ** 0.5).clamp_min(floor)
