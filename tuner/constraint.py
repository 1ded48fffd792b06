"""Constraints of a space file: a small language of comparisons, read with `ast` and evaluated here, never by Python."""

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from objectives.errors import UsageError
from objectives.knobs import Scalar
from objectives.trial import CORE_FIELDS, KNOBS

RANKS = "ranks"
"""The one name besides the fields of `TrialConfig`."""

NAMES = (*CORE_FIELDS, *KNOBS, RANKS)

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

ALLOWED = "a constraint has comparisons, and, or, not, + - * // %, names of fields, ranks, numbers and texts"


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """What every configuration of a space has to be, such as `zero_stage < 3 or compile == 'off'`."""

    text: str
    names: frozenset[str]
    """The fields, and perhaps `ranks`, that decide it."""
    _tree: ast.expr = dataclasses.field(compare=False)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether values, one for each of `names`, keep it.

        Raises:
            UsageError: it divides by zero there.
        """
        try:
            return bool(_value(self._tree, values))
        except ZeroDivisionError:
            where = ", ".join(f"{name} {values[name]}" for name in NAMES if name in self.names)
            raise UsageError(
                f"{self.text!r} divides by zero where there is {where}; say before it what to do then, "
                "such as activation_checkpointing == 0 or …"
            ) from None


def read_constraint(text: str) -> Constraint:
    """
    Raises:
        UsageError: it is not one; the sentence says why, and what to write instead.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        kind = _kind(tree)
    except (SyntaxError, ValueError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"{shown(text)} cannot be read ({' '.join(said.split())}); {ALLOWED}") from None
    except (RecursionError, MemoryError):
        raise UsageError(f"{shown(text)} is nested too deeply; write several constraints") from None
    except UsageError as error:
        raise UsageError(f"{shown(text)}: {error}") from None
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    if kind != "truth":
        raise UsageError(
            f"{shown(text)} is a {kind}, never true or false; compare it with something, such as zero_stage <= 2"
        )
    if not names - {RANKS}:
        raise UsageError(f"{shown(text)} is about no field, so that it holds for all or for none; leave it out")
    return Constraint(text, names, tree)


def shown(value: Any) -> str:
    """A value as it was written, in one line and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def likely(word: str, known: tuple[str, ...]) -> str:
    """What to write instead of a name that is not known."""
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be {', '.join(known)}"


def _kind(node: ast.expr) -> str:
    """`truth`, `number` or `text`; what is of none of them, or mixes them, is no constraint."""
    match node:
        case ast.Constant(value=bool()):
            raise UsageError("True and False say nothing; compare something, such as zero_stage <= 2")
        case ast.Constant(value=int() | float()):
            return "number"
        case ast.Constant(value=str()):
            return "text"
        case ast.Name(id=name):
            if name not in NAMES:
                raise UsageError(f"there is no {name}; {likely(name, NAMES)}")
            return "text" if name in KNOBS and isinstance(KNOBS[name].off, str) else "number"
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _need("number", [operand], "-")
            return "number"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _need("truth", [operand], "not")
            return "truth"
        case ast.BoolOp(op=op, values=operands):
            _need("truth", operands, "and" if isinstance(op, ast.And) else "or")
            return "truth"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _need("number", [left, right], "arithmetic")
            return "number"
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            _check_comparison([left, *others], ops)
            return "truth"
    raise UsageError(f"{shown(ast.unparse(node))[1:-1]} is not possible here; {ALLOWED}")


def _need(wanted: str, operands: list[ast.expr], word: str) -> None:
    for operand in operands:
        if (kind := _kind(operand)) != wanted:
            what = {"truth": "comparisons", "number": "numbers"}[wanted]
            raise UsageError(f"{word} is for {what}, and {ast.unparse(operand)} is a {kind}")


def _check_comparison(operands: list[ast.expr], ops: list[ast.cmpop]) -> None:
    """Texts are only equal or not; and to a text that its field never has, none ever is."""
    kinds = [_kind(operand) for operand in operands]
    for left, right, one, other, op in zip(operands, operands[1:], kinds, kinds[1:], ops, strict=False):
        if one != other or one == "truth":
            raise UsageError(
                f"{ast.unparse(left)} is a {one} and {ast.unparse(right)} a {other}; compare numbers with numbers and "
                "texts with texts"
            )
        if one == "text" and not isinstance(op, ast.Eq | ast.NotEq):
            raise UsageError(f"texts such as {ast.unparse(left)} have no order; compare them with == or !=")
        for field, text in ((left, right), (right, left)):
            if isinstance(field, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                known: tuple[Scalar, ...] = (KNOBS[field.id].off, *KNOBS[field.id].values)
                if text.value not in known:
                    listed = ", ".join(str(value) for value in known)
                    raise UsageError(f"{field.id} is never {shown(text.value)}; it may be {listed}")


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a tree that `_kind` accepted."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=op, operand=operand):
            return not _value(operand, values) if isinstance(op, ast.Not) else -_value(operand, values)
        case ast.BoolOp(op=op, values=operands):
            results = (_value(operand, values) for operand in operands)
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.BinOp(left=left, op=operation, right=right):
            return _ARITHMETIC[type(operation)](_value(left, values), _value(right, values))
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_value(each, values) for each in (left, *others)]
            return all(
                _COMPARISONS[type(op)](one, other) for op, one, other in zip(ops, sides, sides[1:], strict=False)
            )
    raise AssertionError(f"{ast.dump(node)} was let through")
