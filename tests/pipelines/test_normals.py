import pytest

from medssl.data.manifest import Item
from medssl.data.readers.errors import ReadError
from medssl.data.seen import Seen
from pipelines.normals import Goal, left_out, make_plan

ITEMS = [Item(item=f"i{number}", path="", kind="picture") for number in range(24)]


@pytest.mark.parametrize("method", ["split", "cross"])
def test_no_picture_calibrates_twice_nor_after_it_was_fitted_on(method):
    hashes = {item.item: f"pixels{number // 2}" for number, item in enumerate(ITEMS)}  # in pairs
    counted = 0
    for seed in range(12):
        plan = make_plan(ITEMS, hashes, Goal(method, 0.5), seen=Seen(), seed=seed)
        parts = plan.folds or [(plan.fitted, plan.scored)]
        for fitted, scored in parts:
            pixels = [hashes[item.item] for item in scored]
            assert len(set(pixels)) == len(pixels)
            assert not set(pixels) & {hashes[item.item] for item in fitted}
        counted += len(plan.calibrating)
    assert counted > 0


def test_an_item_that_is_left_out_is_named_once():
    told = left_out(ITEMS[3], ReadError("item i3: the file is broken"))
    assert told == {"item": "i3", "reason": "the file is broken"}
