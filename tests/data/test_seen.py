import json

import pytest

from medssl.data.manifest import Item
from medssl.data.privacy import key_fingerprint
from medssl.data.seen import Seen


def item(name, group=None):
    return Item(item=name, kind="picture", path=f"/data/{name}.png", group=group)


@pytest.fixture
def seen():
    return Seen.of([item("a", "p1"), item("b"), item("c", "p2")], {"a": "1", "b": "2", "c": "3"})


def test_equal_pixels_and_other_pictures_of_a_patient_are_known_and_nothing_else(seen):
    assert seen.knows(item("copy"), "2")
    assert seen.knows(item("other", "p1"), "9")
    assert not seen.knows(item("other", "p3"), "9")
    assert not seen.knows(item("b"), "9")  # no patient is not one patient
    assert not Seen().knows(item("a", "p1"), "1")


def test_it_survives_json_and_holds_no_item(seen):
    text = json.dumps(seen.to_dict())
    assert Seen.from_dict(json.loads(text)) == seen
    assert '"a"' not in text


def test_groups_salted_with_another_key_are_not_compared(seen):
    foreign = Seen(pixels=seen.pixels, groups=seen.groups, key="another")
    assert not foreign.knows(item("other", "p1"), "9")
    assert foreign.knows(item("copy"), "1")
    both = seen | Seen(pixels=frozenset({"7"}), groups=frozenset({"p9"}), key="another")
    assert both.key == key_fingerprint()
    assert both.pixels == {"1", "2", "3", "7"}
    assert both.groups == {"p1", "p2"}


def test_the_union_with_nothing_is_the_same(seen):
    assert Seen() | seen == seen | Seen() == seen
