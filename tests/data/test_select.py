import pytest

from medssl.data.select import compile_selection

COLUMNS = {"split": str, "label": int, "category": str}
ROWS = [
    {"split": "train", "label": 0, "category": "nut"},
    {"split": "train", "label": 1, "category": "bolt"},
    {"split": "test", "label": 0, "category": "bolt"},
    {"split": "test", "label": 1, "category": None},
    {"split": None, "label": None, "category": "nut"},
]


def chosen(expression):
    matches = compile_selection(expression, COLUMNS)
    return [number for number, row in enumerate(ROWS) if matches(row)]


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("split == 'train' and label == 0", [0]),
        ("split == 'train' or label == 0", [0, 1, 2]),
        ("not split == 'train'", [2, 3, 4]),
        ("split != 'train'", [2, 3, 4]),
        ("category in ['nut', 'screw']", [0, 4]),
        ("category not in ('nut', 'screw')", [1, 2, 3]),
        ("label >= 1", [1, 3]),
        ("label < 1", [0, 2]),
        ("0 < label <= 1", [1, 3]),
        ("label is None", [4]),
        ("category == None", [3]),
        ("category is not None and (label == 1 or split == 'test')", [1, 2]),
        ("category > 'c'", [0, 4]),
        ("label > -1", [0, 1, 2, 3]),
    ],
)
def test_an_expression_chooses_the_rows_that_a_reader_would(expression, rows):
    assert chosen(expression) == rows


def test_an_unknown_column_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="unknown column 'spilt'.*split, label, category"):
        compile_selection("spilt == 'train'", COLUMNS)


def test_a_text_without_quotes_is_pointed_out():
    with pytest.raises(ValueError, match="unknown column 'train'.*need quotes"):
        compile_selection("split == train", COLUMNS)


@pytest.mark.parametrize("expression", ["label == '0'", "split == 1", "label in [0, 'one']"])
def test_a_comparison_that_never_holds_is_refused(expression):
    with pytest.raises(ValueError, match="holds"):
        compile_selection(expression, COLUMNS)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true') == 0",
        "split.upper() == 'TRAIN'",
        "(lambda: label)() == 0",
        "label + 1 == 2",
        "label",
        "[label == 0 for label in [0]]",
        "split == 'train' if label else label == 0",
        "'rai' in split",
    ],
)
def test_anything_but_comparisons_is_refused(expression):
    with pytest.raises(ValueError, match="comparisons|compares|a list on its right"):
        compile_selection(expression, COLUMNS)


def test_a_single_equals_sign_is_explained():
    with pytest.raises(ValueError, match="cannot understand.*split == 'train'"):
        compile_selection("split = 'train'", COLUMNS)
