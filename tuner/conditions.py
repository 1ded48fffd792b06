"""Conditions over a configuration's fields, such as `zero_stage < 3 or micro_batch_size >= 8`: parsed, never evaluated.

Python's grammar with names, whole numbers, words in quotes, lists, + - * // %, comparisons, `in`, `and`, `or`, `not`.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}

_WHAT_THERE_IS = "names, whole numbers, words in quotes, lists, + - * // %, comparisons, in, and, or, not"

MOST_LEVELS = 100
"""Deep enough for anything that a person writes, and far from where Python gives up."""


class Condition:
    """One condition."""

    def __init__(self, text: str, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: it is no condition over these names; the text says why.
        """
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            is_deep = _levels(self._tree) > MOST_LEVELS
        except (SyntaxError, ValueError):
            raise ValueError(f"{text!r} is no condition; it is made of {_WHAT_THERE_IS}") from None
        except (RecursionError, MemoryError):
            is_deep = True
        if is_deep:
            raise ValueError(f"{text[:60]!r}… is nested too deeply; write several conditions")
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and node.id not in names:
                near = difflib.get_close_matches(node.id, names, n=1)
                hint = f"; is {near[0]} meant?" if near else ""
                raise ValueError(f"{text!r}: there is no {node.id}{hint} (words are put in quotes)")
        if not isinstance(self._tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
            raise ValueError(f"{text!r} is no condition: it compares nothing")
        self._check(self._tree)

    def holds(self, values: Mapping[str, int | str]) -> bool:
        """Whether it is true of these values, one for each name.

        Raises:
            ValueError: it compares what cannot be compared, or divides by zero.
        """
        try:
            return bool(self._evaluate(self._tree, values))
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{self.text!r}: {error}") from None

    def _check(self, node: ast.expr) -> None:
        """Refuses everything that `_evaluate` does not know."""
        match node:
            case ast.Name():
                return
            case ast.Constant(value=int() | str()):
                return
            case ast.Constant(value=float() as value) if value.is_integer():
                return
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.BoolOp(values=parts):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                parts = [operand]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                parts = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARISONS for op in ops):
                parts = [left, *rest]
            case _:
                raise ValueError(f"{self.text!r}: {ast.unparse(node)} is not understood; there are {_WHAT_THERE_IS}")
        for part in parts:
            self._check(part)

    def _evaluate(self, node: ast.expr, values: Mapping[str, int | str]) -> Any:
        match node:
            case ast.Name(id=name):
                return values[name]
            case ast.Constant(value=float() as value):
                return int(value)  # 5e8
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._evaluate(part, values) for part in parts]
            case ast.BoolOp(op=op, values=parts):
                decide = all if isinstance(op, ast.And) else any
                return decide(self._evaluate(part, values) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._evaluate(operand, values)
            case ast.UnaryOp(operand=operand):
                return -self._evaluate(operand, values)
            case ast.BinOp(left=left, op=op, right=right):
                one, other = self._evaluate(left, values), self._evaluate(right, values)
                if not isinstance(one, int) or not isinstance(other, int):  # Python would repeat and format words
                    raise TypeError(f"{ast.unparse(node)} is no arithmetic of whole numbers")
                return _ARITHMETIC[type(op)](one, other)
            case ast.Compare(left=left, ops=ops, comparators=rest):
                sides = [self._evaluate(part, values) for part in (left, *rest)]
                pairs = zip(ops, sides, sides[1:], strict=False)
                return all(_COMPARISONS[type(op)](one, other) for op, one, other in pairs)
        raise AssertionError(ast.dump(node))  # `_check` has refused it


def _levels(tree: ast.AST) -> int:
    """How deep a tree is, counted without recursion."""
    count, level = 0, [tree]
    while level:
        count, level = count + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return count
