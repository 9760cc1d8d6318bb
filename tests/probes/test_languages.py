"""Names in several languages, in a space where every word has a known direction."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.models.text import SharedSpace, TextEncoder
from medssl.probes.languages import read_translations, run
from medssl.probes.zero_shot import zero_shot


def on_circle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


class Words(nn.Module):
    """Stands where a shared space stands; a word lies on the unit circle."""

    def __init__(self, **degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def sentences(self, texts: Sequence[str]) -> torch.Tensor:
        return on_circle(*(self.degrees[text] for text in texts))


# classes normal, opacity, fracture lie at 0, 90 and 180 degrees; so do the English words
SPACE = Words(
    normal=0, opacity=90, fracture=180, gesund=0, verschattung=30, bruch=180, tache=90, sain=0
)
ENGLISH = {0: ["normal"], 1: ["opacity"], 2: ["fracture"]}
GERMAN = {0: ["gesund"], 1: ["verschattung"], 2: ["bruch"]}
IMAGES = on_circle(-10, 10, 20, 40, 80, 100, 120, 130, 170, 190)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
GROUPS = [f"patient{row}" for row in range(10)]


def asked(translations: dict, **changes) -> dict:
    parts = {"images": IMAGES, "labels": LABELS, "space": SPACE, "groups": GROUPS, "repeats": 50}
    return run(translations=translations, **{**parts, **changes})


def test_a_turned_word_costs_what_its_turn_costs():
    """Turned from 90 to 30 degrees, a word takes the images from 15 to 105 degrees: of normal
    those at 20 and 40, and of its own it loses 120 and 130."""
    found = asked({"en": ENGLISH, "de": GERMAN})
    english, german = found["en"], found["de"]
    assert english.metrics["accuracy"].value == 1
    assert german.metrics["accuracy"].value == pytest.approx(6 / 10)
    assert german.metrics["balanced_accuracy"].value == pytest.approx((2 / 4 + 2 / 4 + 1) / 3)
    assert german.gap["accuracy"].value == pytest.approx(-4 / 10)
    assert german.gap["accuracy"].low < -0.4 < german.gap["accuracy"].high <= 0
    assert german.reference == english.metrics
    assert (german.classes, german.images) == (3, 10)
    assert "auroc" not in german.metrics


def test_the_gap_of_equal_words_is_zero_in_every_draw():
    noise = torch.nn.functional.normalize(
        torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), dim=1
    )
    found = asked({"en": ENGLISH, "british": dict(ENGLISH)}, images=noise)["british"]
    assert 0 < found.metrics["accuracy"].value < 1
    for gap in found.gap.values():
        assert (gap.value, gap.low, gap.high) == (0, 0, 0)


def test_the_reference_is_measured_on_the_classes_of_the_language():
    """French has no word for a fracture; without this class the one at 130 is still an opacity,
    and with it English would lose the image at 140."""
    images, labels = torch.cat([IMAGES, on_circle(140)]), torch.cat([LABELS, torch.tensor([1])])
    french = {0: ["sain"], 1: ["tache"]}
    found = asked(
        {"en": ENGLISH, "fr": french}, images=images, labels=labels, groups=[*GROUPS, "last"]
    )
    assert found["en"].metrics["accuracy"].value == pytest.approx(10 / 11)
    assert found["fr"].reference["accuracy"].value == 1
    assert found["fr"].gap["accuracy"].value == 0
    assert (found["fr"].classes, found["fr"].images) == (2, 9)


def test_two_classes_have_the_auroc_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(1)
    images = torch.nn.functional.normalize(torch.randn(40, 2, generator=generator), dim=1)
    labels = torch.tensor([0, 1] * 20)
    german = {label: GERMAN[label] for label in (0, 1)}
    english = {label: ENGLISH[label] for label in (0, 1)}
    found = asked({"en": english, "de": german}, images=images, labels=labels, groups=[None] * 40)[
        "de"
    ]
    values = []
    for words in (german, english):
        normal, opacity = (SPACE.sentences(words[label])[0] for label in (0, 1))
        values.append(roc_auc_score(labels.numpy(), (images @ (opacity - normal)).numpy()))
    assert found.metrics["auroc"].value == pytest.approx(values[0])
    assert found.gap["auroc"].value == pytest.approx(values[0] - values[1])


def test_labels_need_not_be_those_of_the_table_in_its_order():
    """Classes 0 and 2 only, in a table that names 2 first."""
    words = {2: ["fracture"], 0: ["normal"]}
    found = asked({"en": words})["en"]
    assert found.metrics["accuracy"].value == 1
    assert found.metrics["auroc"].value == 1
    assert found.images == 6


def test_several_prompts_of_a_class_lie_at_their_mean_direction():
    """Prompts at 30 and 90 degrees lie at 60, whose borders are at 30 and 120: the images at 40
    and 130 are lost."""
    mixed = {**ENGLISH, 1: ["verschattung", "opacity"]}
    angles = [-10, 10, 20, 40, 80, 100, 130, 170, 190]
    images, labels = on_circle(*angles), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    found = asked({"en": ENGLISH, "mixed": mixed}, images=images, labels=labels, groups=GROUPS[:9])[
        "mixed"
    ]
    assert found.metrics["accuracy"].value == pytest.approx(7 / 9)


def test_words_of_one_place_are_right_about_nothing():
    same = {label: ["normal"] for label in range(3)}
    found = asked({"en": ENGLISH, "unknown": same})["unknown"]
    assert found.metrics["accuracy"].value == 0
    assert found.gap["accuracy"].value == -1


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_have_images():
    """No image is of an opacity, but some are taken for one."""
    from sklearn.metrics import recall_score

    images, labels = IMAGES[LABELS != 1], LABELS[LABELS != 1]
    found = asked({"en": GERMAN}, images=images, labels=labels, groups=GROUPS[:6])["en"]
    prompts = [GERMAN[label] for label in range(3)]
    guessed = zero_shot(images, prompts, SPACE).argmax(1)  # type: ignore[arg-type]
    expected = recall_score(labels.numpy(), guessed.numpy(), labels=[0, 2], average="macro")
    assert found.metrics["balanced_accuracy"].value == pytest.approx(expected)


def test_the_gap_is_drawn_by_patients_and_in_pairs():
    """Patient a is right in German and wrong in English, b the other way: the gap is -1 to 1."""
    turned = Words(**{**SPACE.degrees, "gesund": 90, "verschattung": 0})
    images = on_circle(0, 0, 0, 90)
    labels = torch.tensor([0, 0, 0, 0])
    two = {0: ["normal"], 1: ["opacity"]}
    german = {0: ["gesund"], 1: ["verschattung"]}
    found = asked(
        {"en": two, "de": german}, images=images, labels=labels, space=turned, groups="bbba"
    )["de"]
    assert found.gap["accuracy"].value == pytest.approx(1 / 4 - 3 / 4)
    assert (found.gap["accuracy"].low, found.gap["accuracy"].high) == (-1, 1)
    assert "auroc" not in found.gap


def test_a_shared_space_that_is_being_trained_goes_on_training():
    torch.manual_seed(0)
    text = TextEncoder(vocabulary_size=300, width=16, depth=1, heads=2, length=8)
    text.learn(["normal", "opacity"])
    space = SharedSpace(text, embedding_dim=4, dim=2)
    first = asked({"en": ENGLISH}, space=space)
    assert asked({"en": ENGLISH}, space=space) == first  # without dropout
    assert space.training


def written(folder: Path, *lines: str) -> Path:
    file = folder / "names.csv"
    file.write_text("\n".join(("class,language,text", *lines)) + "\n", encoding="utf-8-sig")
    return file


def test_a_table_is_read_into_prompts_by_language_and_label(tmp_path: Path):
    file = written(
        tmp_path,
        "opacity,de,eine Verschattung",
        "normal,de, unauffällig ",
        'opacity,de,"Verschattung, unscharf"',
        "normal,en,normal",
        "opacity,en,an opacity",
    )
    assert read_translations(file, ["normal", "opacity"]) == {
        "de": {1: ["eine Verschattung", "Verschattung, unscharf"], 0: ["unauffällig"]},
        "en": {0: ["normal"], 1: ["an opacity"]},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nodule,de,Knoten", r"line 4: the class 'nodule' is none of \['normal', 'opacity'\]"),
        ("normal,de, ", "line 4: language and text must not be empty"),
        ("normal,,gesund", "line 4: language and text must not be empty"),
        ("normal,de", "line 4: language and text must not be empty"),
        ("normal,en,normal", "line 4: 'normal' is there twice for 'normal' in en"),
        ("normal,de,gesund", r"two classes at least; \['de'\] have fewer"),
    ],
)
def test_a_row_that_means_nothing_is_named(tmp_path: Path, line: str, message: str):
    file = written(tmp_path, "normal,en,normal", "opacity,en,opacity", line)
    with pytest.raises(ValueError, match=message):
        read_translations(file, ["normal", "opacity"])


def test_a_table_without_a_column_is_refused(tmp_path: Path):
    file = tmp_path / "names.csv"
    file.write_text("class,text\nnormal,normal\n")
    with pytest.raises(ValueError, match=r"without \['language'\]"):
        read_translations(file, ["normal"])


@pytest.mark.parametrize(
    ("translations", "changes", "message"),
    [
        ({"de": GERMAN}, {}, r"'en' must name every class, and lacks \[0, 1, 2\]; there are"),
        ({"en": {0: ["normal"], 1: ["opacity"]}, "de": GERMAN}, {}, r"and lacks \[2\]"),
        ({}, {}, r"and lacks \[\]; there are the languages \[\]"),
        ({"en": {0: ["normal"]}}, {}, r"\['en'\] have fewer"),
        ({"en": ENGLISH}, {"groups": GROUPS[1:]}, "one label and group per image"),
        ({"en": ENGLISH}, {"labels": LABELS + 5}, "no image is of a class that is named in 'en'"),
        ({"en": ENGLISH}, {"images": IMAGES * math.nan}, "are NaN; look at the embeddings"),
    ],
)
def test_what_cannot_be_compared_is_refused(translations, changes, message):
    with pytest.raises(ValueError, match=message):
        asked(translations, **changes)
