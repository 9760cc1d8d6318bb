"""The order of samples and their views: the seed alone decides."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from medssl.data.sample import Sample
from medssl.stream import Stream, batches, generator_for

PAIRS = [Sample(item=f"i{n}", group=f"g{n // 2}", study=f"s{n // 2}") for n in range(12)]


def numbered_noise(sample: Sample, generator: torch.Generator) -> dict[str, torch.Tensor]:
    number = float(sample.item[1:])
    return {"view": torch.cat([torch.tensor([number]), torch.randn(3, generator=generator)])}


def read(workers: int, start: int = 0, stop: int = 30) -> list:
    stream = Stream(PAIRS, batch_size=4, one_per="item", seed=5)
    size = {"batch_size": 4, "workers": workers, "pin_memory": False}
    return list(batches(PAIRS, numbered_noise, stream, start=start, stop=stop, **size))


def test_the_number_of_workers_changes_nothing():
    for (names, alone), (others, together) in zip(read(0), read(2), strict=True):
        assert names == others
        assert all(torch.equal(alone[key], together[key]) for key in alone)


def test_a_stream_entered_later_goes_on_as_the_whole_one():
    later = read(0, start=8)
    for (names, whole), (others, part) in zip(read(0)[2:], later, strict=True):
        assert names == others
        assert torch.equal(whole["view"], part["view"])


def test_another_key_gives_the_same_views():
    """Item, study and patient are salted with the user's key; what is learned must not be."""
    salted = [
        Sample(item=f"k{n}", group=f"other{n // 2}", study=f"other{n // 2}") for n in range(12)
    ]
    size = {"start": 0, "stop": 30, "batch_size": 4, "workers": 0, "pin_memory": False}
    for unit in ("item", "patient"):
        ours, theirs = (
            batches(
                samples,
                numbered_noise,
                Stream(samples, batch_size=4, one_per=unit, seed=5),
                **size,
            )
            for samples in (PAIRS, salted)
        )
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            assert torch.equal(mine["view"], other["view"])


def test_every_item_comes_once_per_epoch_in_an_order_of_its_own():
    stream = Stream(PAIRS, batch_size=5, one_per="item", seed=0)
    epochs = [[stream.at(12 * epoch + i)[1] for i in range(12)] for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_views_of_an_item_differ_between_epochs_and_items():
    draws = {
        torch.randn(1, generator=generator_for(seed, epoch, index)).item()
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1)
    }
    assert len(draws) == 8


@pytest.mark.parametrize("unit", ["study", "patient"])
def test_a_batch_holds_one_of_each_study_or_patient_and_all_items_come_in_time(unit):
    stream = Stream(PAIRS, batch_size=4, one_per=unit, seed=0)
    assert stream.per_epoch == 4  # 6 pairs, of which 2 wait
    seen = set()
    for start in range(0, 400, 4):
        rows = [stream.at(position)[1] for position in range(start, start + 4)]
        assert len({PAIRS[row].group for row in rows}) == 4
        seen |= set(rows)
    assert seen == set(range(12))


def test_more_rows_than_patients_are_refused():
    with pytest.raises(ValueError, match="there are only 6; lower the batch size"):
        Stream(PAIRS, batch_size=7, one_per="patient", seed=0)


def test_a_batch_says_who_is_in_it_and_who_belongs_together():
    names, views = read(0)[0]
    rows = [int(name[1:]) for name in names]
    assert [int(number) for number in views["view"][:, 0]] == rows
    for one in range(4):
        for other in range(4):
            together = rows[one] // 2 == rows[other] // 2
            assert bool(views["group"][one] == views["group"][other]) == together
            assert bool(views["study"][one] == views["study"][other]) == together
            assert bool(views["item"][one] == views["item"][other]) == (one == other)
    assert views["item"].dtype == torch.int64


def test_worker_processes_end_with_the_batches_and_not_with_the_interpreter(monkeypatch):
    """They ignore SIGTERM: one left over, as something still holds it, keeps a job from ending."""
    held = []
    begin = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: held.append(begin(self)) or held[-1])
    stream = Stream(PAIRS, batch_size=4, one_per="item", seed=5)
    size = {"start": 0, "stop": 40, "batch_size": 4, "workers": 2, "pin_memory": False}
    parts = batches(PAIRS, numbered_noise, stream, **size)
    next(parts)
    assert len(multiprocessing.active_children()) == 2
    parts.close()
    assert multiprocessing.active_children() == []
