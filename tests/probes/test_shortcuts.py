"""The audit against closed forms, planted shortcuts and data without any."""

import dataclasses
import math

import pytest
import torch
from scipy.stats import binom, norm
from scipy.stats.contingency import association

from medssl.metrics import OneClassError
from medssl.probes.shortcut_report import ShortcutReport
from medssl.probes.shortcuts import audit

REPEATS = 159  # the fewest for two values


@dataclasses.dataclass(kw_only=True)
class Study:
    """Features of patients at two sites, the first of which is told by the finding (axis 0).

    prevalence: of the finding at either site. site_shift: how different the sites look (axis 1).
    mark: how far a marker moves what is anomalous at site A (axis 2), along which features vary by
    `noise` otherwise. easier: how much plainer the finding is at site A. items: of every patient,
    who have features in common if more than one.
    """

    seed: int
    patients: int = 120
    size: int = 8
    prevalence: tuple[float, float] = (0.5, 0.5)
    effect: float = 1.2
    site_shift: float = 0.0
    mark: float = 0.0
    noise: float = 1.0
    easier: float = 0.0
    items: int = 1

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        site = torch.rand(self.patients, generator=generator) < 0.5
        chance = torch.tensor(self.prevalence)[site.long()]
        finding = torch.rand(self.patients, generator=generator) < chance
        owners = torch.arange(self.patients).repeat_interleave(self.items)
        own = torch.randn(self.patients, self.size, generator=generator)
        features = torch.randn(len(owners), self.size, generator=generator)
        features += own[owners] * (self.items > 1)
        site, finding = site[owners], finding[owners]
        features[:, 0] += (self.effect + self.easier * ~site) * finding
        features[:, 1] += self.site_shift * site
        features[:, 2] *= self.noise
        features[:, 2] += self.mark * (finding & ~site)
        self.features, self.finding = features, finding.long()
        self.sites = ["B" if other else "A" for other in site]
        self.owners = [str(owner) for owner in owners.tolist()]

    def audit(self, repeats: int = REPEATS) -> ShortcutReport:
        return audit(
            self.features, self.finding, self.sites, self.owners, seed=self.seed, repeats=repeats
        )


SOUND = {
    "a site that looks different": {"site_shift": 4.0},
    "a rare finding": {"site_shift": 4.0, "prevalence": (0.15, 0.15)},
    "a site that has it more often": {"prevalence": (0.1, 0.9)},
    "several items per patient": {"site_shift": 4.0, "items": 3},
    "nothing to be told": {"site_shift": 4.0, "effect": 0.0},
}


def alarms(runs: int, **kind) -> int:
    return sum(Study(seed=seed, **kind).audit().alarm for seed in range(runs))


def most_by_chance(runs: int) -> int:
    return int(binom.ppf(0.999, runs, 0.05))


@pytest.mark.parametrize("kind", SOUND)
def test_sound_data_raise_no_more_alarms_than_chance(kind):
    assert alarms(20, **SOUND[kind]) <= most_by_chance(20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOUND)
def test_sound_data_raise_no_more_alarms_than_chance_in_many_runs(kind):
    assert alarms(400, **SOUND[kind]) <= most_by_chance(400)


@pytest.mark.parametrize("seed", range(5))
def test_a_site_that_has_the_finding_more_often_and_is_seen_is_a_shortcut(seed):
    report = Study(seed=seed, prevalence=(0.25, 0.75), site_shift=4.0).audit()
    assert report.alarm
    assert report.balanced.value < report.finding.value
    assert "within values of the attribute" in report.verdict


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_a_marker_on_one_class_of_one_site_is_a_shortcut_at_that_site(seed, noise):
    """Also where nothing but the marker moves features in its direction."""
    report = Study(seed=seed, patients=200, site_shift=1.0, mark=5.0, noise=noise).audit()
    site_a, site_b = report.values
    assert report.alarm
    assert report.mark_p(site_a) <= 0.025 < report.mark_p(site_b)
    assert site_a.unseen < site_a.within - 0.1
    assert report.verdict.startswith("shortcut at 'A'")


def test_a_finding_that_is_easier_to_see_at_one_site_carries_over_and_is_no_shortcut():
    report = Study(seed=0, patients=600, easier=1.5).audit()
    site_a = report.values[0]
    assert site_a.lead_p < 0.01
    assert site_a.carried > 0.7
    assert not report.alarm


def test_a_marker_is_found_at_one_of_three_sites_that_are_told_apart_and_differ_in_prevalence():
    """The classifier reads the site as well; without its shift, site B still stands out."""
    generator = torch.Generator().manual_seed(0)
    site = torch.arange(600) % 3
    finding = (torch.rand(600, generator=generator) < torch.tensor([0.2, 0.5, 0.8])[site]).long()
    features = torch.randn(600, 4, generator=generator)
    features[:, 0] += 1.2 * finding
    features[:, 1] += 3.0 * site
    features[:, 2] += 2.5 * finding * (site == 1)
    sites = ["ABC"[number] for number in site]
    report = audit(features, finding, sites, [None] * 600, seed=0, repeats=239)
    assert report.confounding_p < 0.01
    assert [report.mark_p(value) < 0.025 for value in report.values] == [False, True, False]
    assert report.verdict.count("shortcut") == 2


def test_the_units_of_features_do_not_matter():
    study = Study(seed=0, site_shift=2.0)
    scale = torch.logspace(-3, 3, study.size)
    report = audit(
        study.features * scale, study.finding, study.sites, study.owners, seed=0, repeats=REPEATS
    )
    assert report.finding.value == pytest.approx(study.audit().finding.value, abs=1e-3)
    assert report.attribute == pytest.approx(study.audit().attribute, abs=1e-3)


def test_both_aurocs_have_their_closed_forms():
    """One feature, 1.0 apart between the classes and 2.0 between the sites."""
    generator = torch.Generator().manual_seed(0)
    site = torch.arange(4000) % 2
    prevalence = torch.tensor([0.2, 0.6])[site]
    finding = (torch.rand(4000, generator=generator) < prevalence).long()
    values = torch.randn(4000, generator=generator) + finding + 2.0 * site
    sites = [str(number) for number in site.tolist()]
    report = audit(values[:, None], finding, sites, [None] * 4000, seed=0, repeats=REPEATS)

    anomalous, normal = (0.25, 0.75), (2 / 3, 1 / 3)  # shares of the sites in each class
    whole = sum(
        anomalous[i] * normal[j] * norm.cdf((1 + 2 * (i - j)) / math.sqrt(2))
        for i in (0, 1)
        for j in (0, 1)
    )
    assert report.finding.value == pytest.approx(whole, abs=0.015)
    assert report.balanced.value == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.015)
    of_site = sum(
        share * norm.cdf((2 + difference) / math.sqrt(2))
        for share, difference in ((0.6 * 0.8, 1), (0.6 * 0.2 + 0.4 * 0.8, 0), (0.4 * 0.2, -1))
    )
    assert report.attribute == pytest.approx(of_site, abs=0.015)
    for value in report.values:
        assert value.within == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.02)
    assert report.balanced.low < report.balanced.value < report.balanced.high


def test_association_is_scipys_cramers_v():
    study = Study(seed=3, prevalence=(0.3, 0.6))
    table = torch.zeros(2, 2, dtype=torch.int64)
    for label, site in zip(study.finding.tolist(), study.sites, strict=True):
        table[label, "AB".index(site)] += 1
    assert study.audit().association == pytest.approx(association(table.numpy(), method="cramer"))


def test_a_patient_counts_once_in_the_association():
    study = Study(seed=3, prevalence=(0.3, 0.6))
    rows = torch.arange(120).repeat_interleave(1 + 9 * (torch.arange(120) < 20))
    report = audit(
        study.features[rows],
        study.finding[rows],
        [study.sites[row] for row in rows],
        [study.owners[row] for row in rows],
        seed=0,
        repeats=REPEATS,
    )
    assert report.association == pytest.approx(study.audit().association)


def test_no_patient_is_scored_by_a_classifier_that_saw_it():
    """Ten equal items of each patient and more features than patients: seen is known by heart."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 200, generator=generator).repeat_interleave(10, 0)
    finding = (torch.arange(60) % 2).repeat_interleave(10)
    owners = [str(row // 10) for row in range(600)]
    sites = ["A" if row // 10 % 4 < 2 else "B" for row in range(600)]
    report = audit(features, finding, sites, owners, seed=0, repeats=REPEATS)
    assert report.finding.value < 0.7
    assert report.attribute < 0.7


def test_rare_and_unknown_values_are_left_out():
    study = Study(seed=0)
    study.sites[:9] = ["rare"] * 9
    study.sites[9:14] = [None] * 5
    report = study.audit()
    assert report.left_out == 14
    assert [value.name for value in report.values] == ["A", "B"]
    assert sum(value.items for value in report.values) == 106


def test_an_attribute_that_is_the_finding_itself_cannot_be_told_from_it():
    report = Study(seed=0, prevalence=(0.0, 1.0)).audit()
    assert report.balanced is None
    assert report.association == pytest.approx(1)
    assert not report.alarm
    assert report.verdict.startswith("cannot tell")


def test_the_seed_decides_everything():
    study = Study(seed=1)
    assert study.audit() == study.audit()


def report_with(**changes) -> ShortcutReport:
    report = Study(seed=0).audit()
    values = (
        dataclasses.replace(
            report.values[0],
            lead_p=changes.pop("lead_p", 0.9),
            carried=changes.pop("carried", 0.0),
        ),
        dataclasses.replace(report.values[1], lead_p=0.9, carried=None),
    )
    return dataclasses.replace(report, values=values, **changes)


@pytest.mark.parametrize(
    ("evidence", "p_value"),
    [
        ({"association_p": 0.001, "inflation_p": 0.9}, 1.0),  # does not use it
        ({"association_p": 0.9, "inflation_p": 0.001}, 1.0),  # harmless
        ({"association_p": 0.01, "inflation_p": 0.02}, 0.04),  # the larger, of two kinds
        ({"association_p": 0.01, "inflation_p": 0.03}, 0.06),
        ({"association_p": 0.9, "lead_p": 0.01, "carried": 0.6}, 0.04),  # two values, two kinds
        ({"association_p": 0.9, "lead_p": 0.01, "carried": 0.7}, 1.0),
        ({"association_p": 0.9, "lead_p": 0.02, "carried": 0.6}, 0.08),
    ],
)
def test_only_a_shortcut_of_either_kind_is_an_alarm(evidence, p_value):
    report = report_with(**{"inflation_p": 0.9, **evidence})
    assert report.p_value == pytest.approx(p_value)
    assert report.alarm == (p_value <= 0.05)
    assert report.verdict.startswith("shortcut") == report.alarm


def test_an_attribute_told_better_than_the_finding_is_a_warning():
    calm = {"association_p": 0.9, "inflation_p": 0.9}
    assert "tell the attribute better" in report_with(attribute=0.99, **calm).verdict
    assert "tell the attribute better" not in report_with(attribute=0.55, **calm).verdict


def test_what_cannot_be_audited_is_refused():
    study = Study(seed=0)
    with pytest.raises(ValueError, match="at least 160 repeats"):
        study.audit(repeats=100)
    with pytest.raises(ValueError, match="two or more values"):
        audit(study.features, study.finding, ["A"] * 120, study.owners, seed=0)
    with pytest.raises(ValueError, match="one finding, attribute and patient per row"):
        audit(study.features, study.finding, study.sites[1:], study.owners, seed=0)
    with pytest.raises(ValueError, match="must be finite"):
        audit(study.features * math.inf, study.finding, study.sites, study.owners, seed=0)
    with pytest.raises(OneClassError, match="must be 0 and 1"):
        audit(study.features, study.finding * 0, study.sites, study.owners, seed=0)
