"""The page of a model's mistakes, and what comes of it once people have filled it in."""

import base64
import csv
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as Pillow
from pyarrow import parquet
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from medssl.data.manifest import NoDataError, build_manifest
from pipelines.cli import main
from pipelines.review import review
from pipelines.verdicts import CATEGORIES, VERDICTS, cohen_kappa, krippendorff_alpha

ROWS = [
    ("0001", "cat", "cat", 0.9),
    ("0002", "cat", "dog", 0.8),
    ("0003", "<script>alert(1)</script>", "a 'b' & \"c\"", 0.7),
    ("0004", "dog", "dog", 0.6),
    ("0005", "dough", "bagel", 0.5),
    ("0006", "cat", "fox", 0.4),
]
MISTAKES = ["0002", "0003", "0005", "0006"]


class Page(HTMLParser):
    """What the page consists of, as a browser reads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "h2":
            self.titles.append(data.strip())

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def table(tmp_path: Path, rows=ROWS, name: str = "predictions.csv") -> Path:
    file = tmp_path / name
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("item", "label", "predicted", "score"), *rows])
    return file


def fill(tmp_path: Path, name: str, **answers: str) -> Path:
    """A page filled in: i0002="minor fine_grained" for item 0002."""
    page = Page((tmp_path / "out" / "review.html").read_text()).of("main")[0]["data-page"]
    told = {}
    for item, answer in answers.items():
        verdict, _, category = answer.partition(" ")
        told[item[1:]] = {"verdict": verdict or None, "category": category or None, "comment": "?"}
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"page": page, "answers": told}))
    return file


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The table of predictions, its page written."""
    predictions = table(tmp_path)
    review(predictions, tmp_path / "out")
    return predictions


def test_every_mistake_is_on_the_page_once_and_nothing_else(written, tmp_path):
    page = Page((tmp_path / "out" / "review.html").read_text())
    assert [one["data-item"] for one in page.of("article")] == MISTAKES
    choices = [one for one in page.of("input") if one.get("type") == "radio"]
    asked = {(one["name"], one["value"]) for one in choices}
    assert len(choices) == len(asked) == len(MISTAKES) * (len(VERDICTS) + len(CATEGORIES))
    assert len({name for name, _ in asked}) == 2 * len(MISTAKES)
    assert len(page.of("textarea")) == len(MISTAKES)


def test_names_are_escaped(written, tmp_path):
    page = Page((tmp_path / "out" / "review.html").read_text())
    assert len(page.of("script")) == 1
    shown = "Labelled <script>alert(1)</script>, predicted a 'b' & \"c\""
    assert "".join(page.titles).count(shown) == 1


def test_the_page_needs_no_network_and_names_no_path(written, tmp_path):
    text = (tmp_path / "out" / "review.html").read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|<link|@import|url\(", text)
    assert str(tmp_path) not in text
    assert "predictions.csv" not in text


def test_only_the_four_columns_reach_the_page(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("item,label,predicted,path,patient\n1,a,b,/home/x.png,Jane Doe\n")
    review(file, tmp_path / "out")
    text = (tmp_path / "out" / "review.html").read_text()
    assert "Jane" not in text
    assert "x.png" not in text


def test_the_accuracy_has_wilsons_interval(tmp_path):
    found = review(table(tmp_path), tmp_path / "out")
    low, high = binomtest(2, 6).proportion_ci(0.95, method="wilson")
    assert found["accuracy"] == {"value": 2 / 6, "low": low, "high": high}
    assert (found["items"], found["mistakes"], found["failed"]) == (6, 4, 0)
    assert "corrected_accuracy" not in found


def test_what_most_reviewers_call_right_counts_as_right(written, tmp_path):
    a = fill(tmp_path, "a", i0002="right", i0003="right", i0005="right", i0006="minor fine_grained")
    b = fill(tmp_path, "b", i0002="right", i0003="major", i0005="minor", i0006="right")
    c = fill(tmp_path, "c", i0002="major spurious_correlation", i0003="", i0006="right")
    found = review(written, tmp_path / "out", filled=[a, b, c])
    # 0002 and 0006 by two of three; 0003 and 0005 are one to one, which is no majority
    assert (found["reviewers"], found["reviewed"], found["called_right"]) == (3, 4, 2)
    low, high = binomtest(4, 6).proportion_ci(0.95, method="wilson")
    assert found["corrected_accuracy"] == {"value": 4 / 6, "low": low, "high": high}
    assert found["accuracy"]["value"] == 2 / 6


def test_what_nobody_judged_stays_a_mistake_and_is_not_counted_in_a_category(written, tmp_path):
    answers = fill(tmp_path, "a", i0002="right", i0003="")  # of 0003 a comment alone
    found = review(written, tmp_path / "out", filled=[answers])
    assert (found["reviewed"], found["called_right"]) == (1, 1)
    assert found["corrected_accuracy"]["value"] == 3 / 6
    assert sum(sum(one.values()) for one in found["counts"].values()) == 0
    assert found["agreement"] is None


def test_severity_and_category_are_those_of_most_who_call_it_wrong(written, tmp_path):
    files = [
        fill(tmp_path, "a", i0002="major fine_grained", i0003="minor non_prototypical",
             i0005="minor", i0006="right"),
        fill(tmp_path, "b", i0002="major fine_grained", i0003="major non_prototypical",
             i0005="minor", i0006="major out_of_vocabulary"),
        fill(tmp_path, "c", i0002="minor spurious_correlation", i0003="right"),
    ]  # fmt: skip
    counts = review(written, tmp_path / "out", filled=files)["counts"]
    counted = {
        (category, severity): count
        for category, severities in counts.items()
        for severity, count in severities.items()
        if count
    }
    assert counted == {
        ("fine_grained", "major"): 1,
        ("non_prototypical", "undecided"): 1,  # minor once, major once
        ("undecided", "minor"): 1,  # nobody named a category
        ("out_of_vocabulary", "major"): 1,
    }


def test_a_category_beside_a_verdict_of_right_is_forgotten(written, tmp_path):
    a = fill(tmp_path, "a", i0002="right fine_grained", i0003="minor fine_grained")
    b = fill(tmp_path, "b", i0002="major non_prototypical", i0003="minor fine_grained")
    found = review(written, tmp_path / "out", filled=[a, b])
    assert found["agreement"]["category"] is None  # both named one class for one item


def test_two_reviewers_agree_by_cohens_kappa_on_what_both_judged(written, tmp_path):
    a = fill(tmp_path, "a", i0002="right", i0003="minor fine_grained",
             i0005="major fine_grained", i0006="right")  # fmt: skip
    b = fill(tmp_path, "b", i0002="right", i0003="minor fine_grained",
             i0005="minor out_of_vocabulary", i0006="major fine_grained")  # fmt: skip
    found = review(written, tmp_path / "out", filled=[a, b])["agreement"]
    assert found["statistic"] == "Cohen's kappa"
    expected = cohen_kappa_score([0, 1, 1, 0], [0, 1, 1, 1])
    assert found["mistake"] == pytest.approx(expected)
    assert found["severity"] == pytest.approx(cohen_kappa_score([0, 1], [0, 0]))
    assert found["category"] == pytest.approx(cohen_kappa_score([0, 0], [0, 1]))


def test_more_reviewers_agree_by_krippendorffs_alpha(written, tmp_path):
    files = [
        fill(tmp_path, "a", i0002="right", i0003="minor"),
        fill(tmp_path, "b", i0002="right", i0003="minor"),
        fill(tmp_path, "c", i0002="major", i0003="minor", i0005="major"),
    ]
    found = review(written, tmp_path / "out", filled=files)["agreement"]
    assert found["statistic"] == "Krippendorff's alpha"
    # two items of three answers, 2 right and 4 not: 2 pairs of 3 differ in one; 16 of 30 by chance
    assert found["mistake"] == pytest.approx(1 - 5 * (4 / 2) / 16)


def test_kappa_is_that_of_scikit_learn():
    rng = random.Random(0)
    for _ in range(20):
        first = [rng.choice("abc") for _ in range(12)]
        second = [rng.choice([name, *"abc"]) for name in first]
        expected = cohen_kappa_score(first, second)
        assert cohen_kappa(first, second) == pytest.approx(expected)
        assert cohen_kappa([*first, None, "a"], [*second, "a", None]) == pytest.approx(expected)
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert cohen_kappa([None], ["a"]) is None


@pytest.mark.parametrize(
    ("reviewers", "published"),
    [
        (["0100000000", "1110010100"], 0.095),  # part A: 14 zeros, 6 ones, 4 of 10 units differ
        (["123321412...", "1233224125..", ".33323422513", "12332441251."], 0.743),  # part C
    ],
)
def test_alpha_has_the_published_values(reviewers, published):
    told = [[None if one == "." else one for one in of_one] for of_one in reviewers]
    assert krippendorff_alpha(told) == pytest.approx(published, abs=5e-4)


def test_alpha_of_one_class_says_nothing():
    assert krippendorff_alpha([["a", "a"], ["a", "a"], ["a", None]]) is None
    assert krippendorff_alpha([["a", None], [None, "b"], [None, None]]) is None


def test_a_parquet_table_of_class_numbers_is_read_too(tmp_path):
    rows = {"item": ["x", "y", "z"], "label": [1, 2, 3], "predicted": [1, 3, 3]}
    parquet.write_table(pa.table(rows), tmp_path / "p.parquet")
    assert review(tmp_path / "p.parquet", tmp_path / "out")["mistakes"] == 1
    page = Page((tmp_path / "out" / "review.html").read_text())
    assert page.titles[0] == "Labelled 2, predicted 3"


def test_a_table_as_spreadsheets_save_it_is_read_too(tmp_path):
    (tmp_path / "p.csv").write_text("item,label,predicted\n1,köter,cat\n", encoding="utf-8-sig")
    assert review(tmp_path / "p.csv", tmp_path / "out")["mistakes"] == 1
    page = Page((tmp_path / "out" / "review.html").read_text(encoding="utf-8"))
    assert page.titles[0] == "Labelled köter, predicted cat"


def test_answers_belong_to_the_mistakes_in_any_order_and_to_no_others(written, tmp_path):
    answers = fill(tmp_path, "a", i0002="right")
    turned = table(tmp_path, ROWS[::-1], "turned.csv")
    assert review(turned, tmp_path / "out", filled=[answers])["called_right"] == 1
    other = table(tmp_path, [*ROWS[:-1], ("0006", "cat", "cow", 0.4)], "other.csv")
    with pytest.raises(ValueError, match="other predictions"):
        review(other, tmp_path / "out", filled=[answers])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no review.json"),
        ('{"answers": {}}', "is no review.json"),
        ('{"page": "0", "answers": []}', "is no review.json"),
        ('{"page": "0", "answers": {}}', "other predictions"),
    ],
)
def test_a_file_that_is_no_review_of_this_page_is_named(written, tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json {message}|a.json was filled in for {message}"):
        review(written, tmp_path / "out", filled=[tmp_path / "a.json"])


@pytest.mark.parametrize("answer", ["maybe", "minor dog"])
def test_an_answer_that_the_page_does_not_offer_is_refused(written, tmp_path, answer):
    with pytest.raises(ValueError, match="item 0002: expected a verdict of right, minor, major"):
        review(written, tmp_path / "out", filled=[fill(tmp_path, "a", i0002=answer)])


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("item,label,predicted\n", NoDataError, "no row"),
        ("item,label,predicted\n1,a,a\n", NoDataError, "nothing to review"),
        ("item,label\n1,a\n", ValueError, "lacks predicted"),
        ("item,label,predicted\n1,a,b\n1,a,c\n", ValueError, "item 1 comes 2 times"),
        ("item,label,predicted\n1,,b\n", ValueError, "leave items out whose label is not known"),
        ("item,label,predicted,score\n1,a,b,high\n", ValueError, "item 1: expected a number"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused(tmp_path, text, kind, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(kind, match=message):
        review(tmp_path / "p.csv", tmp_path / "out")
    with pytest.raises(ValueError, match=".csv or .parquet"):
        review(tmp_path / "p.txt", tmp_path / "out")


def test_pictures_of_the_mistakes_alone_are_on_the_page(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for grey in (10, 200, 90):
        Pillow.fromarray(np.full((400, 200), grey, np.uint8)).save(folder / f"{grey}.png")
    items = {Path(item.path).stem: item.item for item in build_manifest(folder).images}
    (folder / "90.png").write_bytes((folder / "90.png").read_bytes()[:60])
    rows = [(items["10"], "a", "a", ""), (items["200"], "a", "b", ""), (items["90"], "a", "b", "")]
    found = review(table(tmp_path, rows), tmp_path / "out", images=folder)
    assert (found["pictures"], found["failed"]) == (1, 1)
    text = (tmp_path / "out" / "review.html").read_text()
    pictures = Page(text).of("img")
    assert [one["alt"] for one in pictures] == [f"Item {items['200']}"]
    head, _, data = pictures[0]["src"].partition(",")
    assert head == "data:image/png;base64"
    shown = Pillow.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (112, 224)
    assert shown.getpixel((50, 100)) == (200, 200, 200)
    assert str(folder) not in text
    review(tmp_path / "predictions.csv", tmp_path / "out", filled=[fill(tmp_path, "a")])
    assert (tmp_path / "out" / "review.html").read_text() == text  # not written without pictures


def test_the_command_line_takes_several_reviews_and_says_what_came_of_it(written, tmp_path, capfd):
    a, b = fill(tmp_path, "a", i0002="right"), fill(tmp_path, "b", i0002="right")
    given = ["--predictions", str(written), "--out", str(tmp_path / "out")]
    assert main(["review", *given, "--filled+", str(a), "--filled+", str(b)]) == 0
    said = capfd.readouterr().out
    assert "as labelled  0.3333" in said
    assert "as reviewed  0.5 " in said
    assert main(["review", *given, "--filled", f"[{a},{b}]", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    summary = tmp_path / "out" / "summary.json"
    assert found.pop("summary") == str(summary)
    assert found["reviewers"] == 2
    assert json.loads(summary.read_text()) == found
    assert main(["review", *given, "--filled+", str(tmp_path / "gone.json")]) == 2
    (tmp_path / "right.csv").write_text("item,label,predicted\n1,a,a\n")
    given[1] = str(tmp_path / "right.csv")
    assert main(["review", *given]) == 3
