"""Few labels: repeated draws of training rows, whole patients at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-9  # what counts as nearer


def draws(
    labels: Tensor,
    groups: Sequence[str | None],
    *,
    repeats: int,
    seed: int,
    share: float | None = None,
    shots: int | None = None,
    minimum: int = 2,
) -> Iterator[Tensor]:
    """Draw rows whose labels may be seen, `repeats` times; each draw is sorted row numbers.

    A draw holds whole groups only and at least `minimum` rows of each class. Groups are taken in
    random order while they fit; then groups are added, left out or exchanged until no one exchange
    brings the draw nearer to what was asked for: the sum, over the classes and once more for all
    rows together, of the rows too many or missing. The draws are independent of each other, and
    one seed gives the same draws under any names of the groups.

    labels: (S,) int64 classes of the training rows, 0 to K - 1.
    groups: patient or part of each row; a row without one is its own.
    share: of the rows of each class, in (0, 1]; or else
    shots: rows of each class.

    Raises ValueError where a class has fewer rows than it must have.
    """
    if labels.ndim != 1 or len(labels) != len(groups) or len(labels) == 0:
        raise ValueError(
            f"one group per label (S,): got {tuple(labels.shape)} labels and {len(groups)} groups"
        )
    classes = F.one_hot(labels.cpu().long()).double()  # (S, K)
    wanted, least = _asked_for(classes.sum(0), share, shots, minimum)
    owners = _numbered(groups)
    members = classes.new_zeros(int(owners.max()) + 1, classes.shape[1])
    members.index_add_(0, owners, classes)  # (G, K), rows of each class in each group
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        order = torch.randperm(len(members), generator=generator).tolist()
        chosen = _chosen(members, order, wanted, least)
        return torch.isin(owners, chosen).nonzero()[:, 0].to(labels.device)

    return (draw() for _ in range(repeats))


def _asked_for(
    counts: Tensor, share: float | None, shots: int | None, minimum: int
) -> tuple[Tensor, Tensor]:
    """Rows of each class (K,) that are wanted, and that must be there at least."""
    if minimum < 1:
        raise ValueError(f"minimum must be at least 1, got {minimum}")
    if share is not None and shots is None:
        if not 0 < share <= 1:
            raise ValueError(f"share must lie above 0 and be at most 1, got {share}")
        needed, wanted = minimum, (counts * share).clamp(min=minimum)
    elif shots is not None and share is None:
        if shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        needed, wanted = shots, torch.full_like(counts, shots)
    else:
        raise ValueError(f"give either share or shots, got {share} and {shots}")
    rarest = int(counts.argmin())
    if counts[rarest] < needed:
        raise ValueError(
            f"a draw needs {needed} rows of each class, and class {rarest} has "
            f"{int(counts[rarest])}; ask for fewer, or leave the class out"
        )
    return wanted, wanted.clamp(max=minimum)


def _chosen(members: Tensor, order: Sequence[int], wanted: Tensor, least: Tensor) -> Tensor:
    """Numbers of the groups drawn; the first in `order` of those with the same rows per class."""
    like: dict[tuple[float, ...], list[int]] = {}  # rows per class -> groups, in order
    rows = members.tolist()
    for group in order:
        like.setdefault(tuple(rows[group]), []).append(group)
    kinds = members.new_tensor(list(like))  # (U, K)
    place = {kind: number for number, kind in enumerate(like)}
    taken = [0] * len(like)
    have, fits = torch.zeros_like(wanted), [True] * len(like)
    for group in order:
        kind = place[tuple(rows[group])]
        if fits[kind]:
            fits[kind] = bool((have + kinds[kind] <= wanted).all())
            taken[kind] += fits[kind]
            have += kinds[kind] * fits[kind]
    taken = _exchanged(kinds, taken, [len(groups) for groups in like.values()], wanted, least)
    lists = zip(like.values(), taken, strict=True)
    return torch.tensor([group for groups, count in lists for group in groups[:count]])


def _exchanged(
    kinds: Tensor, taken: list[int], most: list[int], wanted: Tensor, least: Tensor
) -> list[int]:
    """How many groups of each kind (U, K) to take, after exchanges of one for one or for none."""
    kinds = torch.cat([kinds, torch.zeros_like(kinds[:1])])  # the last kind is no group at all
    counts = torch.tensor([*taken, 1])
    room = torch.tensor([*most, 2]) - counts
    have = counts.double() @ kinds
    given, idle = 0, 0  # idle: kinds in a row whose giving away helped nothing
    while idle < len(kinds):
        if counts[given] > 0:
            distance = _distance(have - kinds[given] + kinds, wanted, least)
            distance = distance.where(room > 0, torch.inf)
            best = int(distance.argmin())
            if distance[best] < _distance(have, wanted, least) - _LEAST:
                have = have - kinds[given] + kinds[best]
                for kind, change in ((given, -1), (best, 1)):
                    if kind < len(kinds) - 1:
                        counts[kind] += change
                        room[kind] -= change
                idle = 0
                continue
        given, idle = (given + 1) % len(kinds), idle + 1
    return counts[:-1].tolist()


def _distance(have: Tensor, wanted: Tensor, least: Tensor) -> Tensor:
    """How many rows per class (..., K) are too many or missing; below the least counts most."""
    off = (have - wanted).abs().sum(-1) + (have.sum(-1) - wanted.sum()).abs()
    return off + 1e9 * (least - have).clamp(min=0).sum(-1)


def _numbered(groups: Sequence[str | None]) -> Tensor:
    """(S,) int64 in order of first sight; a row without a group has a number of its own."""
    names = [(row,) if group is None else group for row, group in enumerate(groups)]
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names])
