"""A safe expression over the columns of a manifest: `split == 'train' and label == 0`."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Test = Callable[[Row], Any]

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda left, right: left < right,
    ast.LtE: lambda left, right: left <= right,
    ast.Gt: lambda left, right: left > right,
    ast.GtE: lambda left, right: left >= right,
}
_EQUAL: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda left, right: left == right,
    ast.NotEq: lambda left, right: left != right,
    ast.Is: lambda left, right: left is right,
    ast.IsNot: lambda left, right: left is not right,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


def compile_selection(expression: str, columns: Mapping[str, type]) -> Callable[[Row], bool]:
    """A test of one row, from comparisons of columns joined with `and`, `or` and `not`.

    columns: the type of each column's values; any value may also be None. An order comparison with
        None is False; `== None` and `is None` ask for it.

    Raises ValueError for anything else in the expression, for an unknown column, and for a
    comparison that can never hold (a number column with a text).
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"cannot understand the selection {expression!r} ({error.msg}); "
            "write for example \"split == 'train' and label == 0\""
        ) from None
    test = _test(tree.body, columns)
    return lambda row: bool(test(row))


def _test(node: ast.expr, columns: Mapping[str, type]) -> Test:
    """What is true or false: a comparison, or tests joined."""
    if isinstance(node, ast.BoolOp):
        tests = [_test(value, columns) for value in node.values]
        joined = all if isinstance(node.op, ast.And) else any
        return lambda row: joined(test(row) for test in tests)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _test(node.operand, columns)
        return lambda row: not inner(row)
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        links = [
            _comparison(left, operator, right, columns)
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False)
        ]
        return lambda row: all(link(row) for link in links)
    raise ValueError(
        f"a selection is made of comparisons joined with and, or, not; got {ast.unparse(node)!r}"
    )


def _comparison(
    left: ast.expr, operator: ast.cmpop, right: ast.expr, columns: Mapping[str, type]
) -> Test:
    _check_types(left, operator, right, columns)
    first, second = _value(left, columns), _value(right, columns)
    if type(operator) in _EQUAL:
        equal = _EQUAL[type(operator)]
        return lambda row: equal(first(row), second(row))
    order = _ORDER[type(operator)]

    def ordered(row: Row) -> bool:
        low, high = first(row), second(row)
        return low is not None and high is not None and order(low, high)

    return ordered


def _value(node: ast.expr, columns: Mapping[str, type]) -> Test:
    """A column's value or a constant."""
    if isinstance(node, ast.Name):
        name = node.id
        if name not in columns:
            raise ValueError(
                f"unknown column {name!r}; the manifest has {', '.join(columns)} "
                "(texts need quotes)"
            )
        return lambda row: row[name]
    constant = _constant(node)
    return lambda row: constant


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(
            f"a selection compares columns with numbers, texts and lists of them; "
            f"got {ast.unparse(node)!r}"
        ) from None


def _check_types(
    left: ast.expr, operator: ast.cmpop, right: ast.expr, columns: Mapping[str, type]
) -> None:
    """Raises ValueError where a column meets a constant that none of its values can equal."""
    contains = isinstance(operator, ast.In | ast.NotIn)
    if contains and not isinstance(right, ast.List | ast.Tuple | ast.Set):
        raise ValueError(f"`in` needs a list on its right, got {ast.unparse(right)!r}")
    for column, other in ((left, right), (right, left)):
        if not isinstance(column, ast.Name) or isinstance(other, ast.Name):
            continue
        wanted = columns.get(column.id)
        constant = _constant(other)
        values = constant if contains else [constant]
        wrong = [value for value in values if value is not None and not _fits(value, wanted)]
        if wanted is not None and wrong:
            raise ValueError(
                f"column {column.id!r} holds {'numbers' if wanted is int else 'texts'}, and "
                f"{wrong[0]!r} is none"
            )


def _fits(value: Any, wanted: type | None) -> bool:
    return isinstance(value, int | float) if wanted is int else isinstance(value, str)
