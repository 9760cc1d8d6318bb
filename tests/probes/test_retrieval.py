"""Searches, against cases done by hand and scikit-learn."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from medssl.probes import retrieval
from medssl.probes.retrieval import (
    Items,
    average_precision,
    by_class,
    by_study,
    composed,
    first_rank,
    matching,
    precision_at,
    ranked,
    recall_at,
    run,
    search,
)

SIMILARITY = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.8], [0.4, 0.4, 0.4]])


def test_the_own_partner_counts():
    own = torch.eye(3, dtype=torch.bool)
    assert recall_at(1, SIMILARITY, own).tolist() == [1, 0, 0]
    assert recall_at(2, SIMILARITY, own).tolist() == [1, 1, 0]  # a tie is lost
    assert recall_at(3, SIMILARITY, own).tolist() == [1, 1, 1]


def test_any_relevant_candidate_will_do():
    relevant = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    assert recall_at(1, SIMILARITY, relevant).tolist() == [0, 1, 1]


def test_one_similarity_for_all_finds_nothing():
    same = torch.ones(4, 4)
    assert recall_at(1, same, torch.eye(4, dtype=torch.bool)).sum() == 0


@pytest.mark.parametrize(
    ("k", "relevant"), [(0, torch.eye(3) > 0), (1, torch.eye(4) > 0), (1, torch.zeros(3, 3) > 0)]
)
def test_what_cannot_be_asked_is_refused(k, relevant):
    with pytest.raises(ValueError, match="similarity and relevant need|no relevant candidate"):
        recall_at(k, SIMILARITY, relevant)


def random_search(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities without ties, and what belongs to each of 30 queries."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randperm(30 * 20, generator=generator).reshape(30, 20) / 600
    relevant = torch.rand(30, 20, generator=generator) < 0.2
    relevant[torch.arange(30), torch.randint(20, (30,), generator=generator)] = True
    return similarity, relevant


def on_circle(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def items(embeddings: torch.Tensor, **changes) -> Items:
    """Every row with its own study and patient, all of one class."""
    names = [f"study{row}" for row in range(len(embeddings))]
    labels = torch.zeros(len(embeddings), dtype=torch.int64)
    parts = {"embeddings": embeddings, "labels": labels, "studies": names, "groups": names}
    return Items(**{**parts, **changes})


def test_a_ranking_puts_wrong_ones_first_where_similarities_tie():
    relevant = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert ranked(SIMILARITY, relevant).tolist() == [
        [True, True, False],
        [False, True, False],
        [False, True, True],
    ]


def test_measures_of_one_ranking_are_as_done_by_hand():
    found = torch.tensor([[False, True, False, True], [True, False, False, False]])
    assert precision_at(2, found).tolist() == [0.5, 0.5]
    assert precision_at(5, found).tolist() == pytest.approx([0.4, 0.2])  # 4 candidates only
    assert average_precision(found).tolist() == [0.5, 1]
    assert first_rank(found).tolist() == [2, 1]


def test_average_precision_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score

    similarity, relevant = random_search(0)
    found = average_precision(ranked(similarity, relevant))
    expected = [
        average_precision_score(right.numpy(), near.numpy())
        for near, right in zip(similarity, relevant, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_precision_and_first_rank_are_those_of_sorted_lists(k: int):
    similarity, relevant = random_search(1)
    found = ranked(similarity, relevant)
    for row, (near, right) in enumerate(zip(similarity, relevant, strict=True)):
        order = sorted(range(20), key=lambda column, near=near: -near[column])
        hits = [bool(right[column]) for column in order]
        assert precision_at(k, found)[row].item() == pytest.approx(sum(hits[:k]) / k)
        assert first_rank(found)[row].item() == hits.index(True) + 1
    torch.testing.assert_close(recall_at(k, similarity, relevant), found[:, :k].any(1).float())


def test_blocks_do_not_change_a_ranking(monkeypatch):
    whole = ranked(*random_search(2))
    monkeypatch.setattr(retrieval, "_BLOCK", 7)
    assert torch.equal(ranked(*random_search(2)), whole)


def test_what_is_excluded_is_neither_right_nor_wrong():
    near = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9]])
    relevant = torch.tensor([[True, False, True, False]]).expand(2, 4)
    excluded = torch.tensor([[True, True, False, False], [False, False, True, True]])
    found = search(near, relevant=relevant, excluded=excluded, groups=["a", "b"], ks=(1,))
    # of the first query 0.7 (right), 0.6 are left; of the second 0.7 (wrong), 0.6 (right)
    assert found.metrics["recall_at_1"].value == 0.5
    assert found.metrics["mean_average_precision"].value == pytest.approx((1 + 0.5) / 2)
    assert found.metrics["median_rank"].value == 1.5


def test_a_query_whose_class_no_other_patient_has_is_left_out_and_counted():
    labels = torch.tensor([0, 0, 1, 1])
    found = by_class(*[items(on_circle(0, 10, 20, 30), labels=labels, groups="aabc")] * 2, ks=(1,))
    assert (found.queries, found.left_out) == (2, 2)
    lonely = items(on_circle(0, 10), labels=torch.tensor([0, 0]), groups="aa")
    with pytest.raises(ValueError, match="to none of 2 queries belongs a candidate"):
        by_class(lonely, lonely)


def test_an_image_does_not_find_its_own_patient():
    """Patient a has two near images; the nearest of another patient is of the other class."""
    labels = torch.tensor([0, 0, 1, 0, 1])
    images = items(on_circle(0, 1, 10, 40, 80), labels=labels, groups="aabcd")
    found = by_class(images, images, ks=(1,))
    # queries at 0, 1 and 10 find 10, 1, 1; those at 40 and 80 find 10 and 40
    assert found.metrics["recall_at_1"].value == 0
    strangers = by_class(replace(images, groups="abcde"), replace(images, groups="abcde"), ks=(1,))
    assert strangers.metrics["recall_at_1"].value == pytest.approx(2 / 5)


def test_the_own_study_is_found_among_those_of_other_patients():
    """The patient's other study lies nearer, and does not count."""
    studies, groups = ["s1", "s2", "s3"], ["a", "a", "b"]
    images = items(on_circle(0, 20, 90), studies=studies, groups=groups)
    reports = items(on_circle(15, 1, 80), studies=studies, groups=groups)
    found = by_study(images, reports, ks=(1,))
    assert found.metrics["recall_at_1"].value == 1
    mixed = replace(images, groups=["a", "c", "b"]), replace(reports, groups=["a", "c", "b"])
    assert by_study(*mixed, ks=(1,)).metrics["recall_at_1"].value == pytest.approx(1 / 3)


def test_a_composed_query_is_the_weighted_mean_direction():
    image, text = on_circle(0), 3 * on_circle(90)
    torch.testing.assert_close(composed(image, text, weight=0.5), on_circle(45))
    torch.testing.assert_close(composed(image, text, weight=0), on_circle(0))
    torch.testing.assert_close(composed(image, text, weight=1), on_circle(90))
    slope = math.degrees(math.atan(0.2 / 0.8))
    torch.testing.assert_close(composed(image, text, weight=0.2), on_circle(slope))


def test_every_search_of_images_and_reports_is_run():
    generator = torch.Generator().manual_seed(3)
    drawn = [F.normalize(torch.randn(12, 5, generator=generator), dim=1) for _ in range(2)]
    images, reports = (items(part, labels=torch.arange(12) % 2) for part in drawn)
    both = replace(images, embeddings=F.normalize(0.3 * drawn[0] + 0.7 * drawn[1], dim=1))
    assert run(images, reports, weight=0.7, ks=(1,), repeats=20) == {
        "image -> image": by_class(images, images, ks=(1,), repeats=20),
        "image -> report": by_class(images, reports, ks=(1,), repeats=20),
        "report -> image": by_class(reports, images, ks=(1,), repeats=20),
        "image + report -> image": by_class(both, images, ks=(1,), repeats=20),
        "image -> own report": by_study(images, reports, ks=(1,), repeats=20),
        "report -> own image": by_study(reports, images, ks=(1,), repeats=20),
    }


def test_a_report_counts_once_however_many_images_its_study_has():
    images = items(on_circle(0, 5, 50), studies=["s1", "s1", "s2"], groups=["a", "a", "b"])
    reports = items(on_circle(45, 2), studies=["s2", "s1"], groups=["b", "a"])
    found = run(images, reports, ks=(1,), repeats=20)
    assert [search.queries for search in found.values()] == [3, 3, 2, 3, 3, 2]
    assert found["report -> own image"].metrics["recall_at_1"].value == 1
    assert found["image -> own report"].metrics["recall_at_1"].value == 1
    twice = items(on_circle(0, 5), studies=["s1", "s1"], groups=["a", "a"])
    with pytest.raises(ValueError, match="1 studies have none and 1 reports are of a study that"):
        run(images, twice)


def test_the_interval_draws_patients_and_not_images():
    """Two patients, one always found and one never: their mean is 0, 0.5 or 1 in every draw."""
    near = torch.tensor([[0.9, 0.1]] * 6)
    relevant = torch.tensor([[True, False]] * 5 + [[False, True]])
    nothing = torch.zeros(6, 2, dtype=torch.bool)
    found = search(near, relevant=relevant, excluded=nothing, groups="aaaaab", ks=(1,))
    recall = found.metrics["recall_at_1"]
    assert (recall.low, recall.high) == (0, 1)
    assert recall.value == pytest.approx(5 / 6)


def test_equal_embeddings_find_nothing_in_any_search():
    labels = torch.arange(6) % 2
    same = items(on_circle(*[30] * 6), labels=labels)
    for found in run(same, same, ks=(1,), repeats=20).values():
        assert found.metrics["recall_at_1"].value == 0


def test_embeddings_that_are_not_numbers_are_refused():
    broken = items(on_circle(0, math.nan))
    with pytest.raises(ValueError, match="3 similarities are NaN or infinite"):
        by_class(broken, broken)
    with pytest.raises(ValueError, match="3 similarities are NaN"):
        ranked(broken.embeddings @ broken.embeddings.mT, matching("ab", "ab"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: items(torch.zeros(2, 3), groups="a"), "one label, study and group per row"),
        (lambda: composed(torch.zeros(2, 3), torch.zeros(1, 3)), "one text per image"),
        (lambda: composed(on_circle(0), on_circle(0), weight=1.1), "within 0 and 1, got 1.1"),
        (lambda: ranked(torch.zeros(2, 3), torch.zeros(2, 2) > 0), "need one shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
