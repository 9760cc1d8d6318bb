"""Reports as sentences."""

import pytest

from medssl.data.sentences import sentences, wording


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("No finding.", ["No finding."]),
        (
            "Heart size 1.5 times. Is it new? Yes!",
            ["Heart size 1.5 times.", "Is it new?", "Yes!"],
        ),
        ("FINDINGS\n\n1. A mass\n2. No effusion", ["FINDINGS", "A mass", "No effusion"]),
        ("  \n--- \n 3. ", []),
        ("", []),
    ],
)
def test_sentences(report: str, expected: list[str]):
    assert sentences(report) == expected


def test_wording_is_of_letters_and_digits_in_order():
    assert wording("No acute  finding.") == wording("no acute finding")
    assert wording("No acute finding") != wording("Acute finding no")
