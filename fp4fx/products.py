"""Products of two tensors, in every spelling: which axes they share, sum over and give back.

`matmul`, `mm`, `bmm`, `addmm`, `baddbmm`, `einsum` and grouped products are one op here, in which axes have names.
"""

from __future__ import annotations

import string
from typing import Any, NamedTuple

from torch.fx import Node

from fp4fx.dataflow import argument, op_name

RIGHT = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "addbmm": 1, "baddbmm": 1}
"""Where the left factor stands among the arguments; the right one follows."""
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Products of the rows of x, in runs, with one matrix of a stack each."""


class Factor(NamedTuple):
    """One of the two tensors of a product."""

    node: Node
    reduced: int | None
    """The one axis that is summed over, counted from the end (-1 is the last); None if there are several or none."""


class Terms(NamedTuple):
    """A product in the notation of einsum: a letter for each axis of the factors and of the result."""

    left: str
    right: str
    result: str


def factors(node: Node) -> tuple[Factor, Factor] | None:
    """The factors of a product, left and right; None for any other node."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method"):
        return None
    if name == "einsum":
        return _of_einsum(node)
    at = 0 if name in GROUPED else RIGHT.get(name)
    if at is None:
        return None
    left, right = argument(node, at), argument(node, at + 1)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return Factor(left, -1), Factor(right, -2)


def _of_einsum(node: Node) -> tuple[Factor, Factor] | None:
    operands = einsum_operands(node)
    if operands is None:
        return None
    terms = _terms(str(node.args[0]))
    left, right = operands
    if terms is None:
        return Factor(left, None), Factor(right, None)
    return Factor(left, _reduced(terms.left, terms)), Factor(right, _reduced(terms.right, terms))


def einsum_operands(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of an einsum; None if it has another number of them or no equation."""
    if not node.args or not isinstance(node.args[0], str):
        return None
    operands: tuple[Any, ...] = tuple(node.args[1:])
    if len(operands) >= 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not all(isinstance(operand, Node) for operand in operands):
        return None
    return operands[0], operands[1]


def _terms(equation: str) -> Terms | None:
    """The letters of an equation of two factors, `...` as the one letter `.`; None if an axis occurs twice in one."""
    inputs, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    left, comma, right = inputs.partition(",")
    if not comma or "," in right:
        return None
    if not arrow:
        both = left + right
        dots = "." if "." in both else ""
        result = dots + "".join(sorted(letter for letter in set(both) - {"."} if both.count(letter) == 1))
    if any(len(set(term)) != len(term) for term in (left, right, result)):
        return None
    return Terms(left, right, result)


def _reduced(term: str, terms: Terms) -> int | None:
    summed = [
        letter for letter in term if letter in terms.left and letter in terms.right and letter not in terms.result
    ]
    if len(summed) != 1 or summed[0] == ".":
        return None
    at = term.index(summed[0])
    return None if "." in term[at:] else at - len(term)


def terms_of(node: Node, ranks: tuple[int, int]) -> Terms | None:
    """The terms of a product whose factors have these ranks; None where they are not those of one product.

    Grouped products have none: which matrix a row meets depends on data.
    """
    name = op_name(node)
    if name == "einsum":
        terms = _terms(str(node.args[0]))
        return None if terms is None else _without_dots(terms, ranks)
    if name in GROUPED or name == "addbmm" or min(ranks) < 1:
        return None
    left, right = ranks
    shared = string.ascii_lowercase[: max(left, right, 2) - 2]
    a = "K" if left == 1 else shared[len(shared) - (left - 2) :] + "MK"
    b = "K" if right == 1 else shared[len(shared) - (right - 2) :] + "KN"
    return Terms(a, b, shared + "M" * (left > 1) + "N" * (right > 1))


def _without_dots(terms: Terms, ranks: tuple[int, int]) -> Terms | None:
    """The terms with letters in the place of `...`, which are shared from the last one on."""
    counts = [rank - len(term) + 1 if "." in term else 0 for term, rank in zip(terms[:2], ranks, strict=True)]
    free = [letter for letter in string.ascii_letters if letter not in "".join(terms)]
    dots = "".join(free[: max(counts)])
    if min(counts) < 0 or len(dots) < max(counts):
        return None
    left, right = (t.replace(".", dots[len(dots) - n :] if n else "") for t, n in zip(terms[:2], counts, strict=True))
    result = terms.result.replace(".", dots)
    fits = (len(left), len(right)) == ranks and set(result) <= set(left) | set(right)
    return Terms(left, right, result) if fits else None
