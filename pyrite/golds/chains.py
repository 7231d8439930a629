"""The math gold: does the answer evaluate an expression step by step, as a parser does."""

from __future__ import annotations

import re
from itertools import zip_longest

from pyrite.golds.scores import Scorer, each

FAILED = -200.0  # an expression that cannot be evaluated
_GROUP = re.compile(r"\([^()]*\)")
_FLAT = re.compile(r"[+-]*[0-9]+(?:[+*-][+-]*[0-9]+)*")  # a sum of products of signed numbers


def math_chain(*, strict: bool = False, repeat_negative: bool = False) -> Scorer:
    """Scorer: −Σ_i d(P_i, G_i) over steps i ≥ 1, at most 0: how far an answer is from the exact evaluation.

    P: the parts of prompt + response between the equals signs (other letters dropped), P_0 being the expression;
    G: `chain(P_0)`; d: `levenshtein`, in characters. A missing step counts as the empty text, steps beyond the last
    are free unless `strict`. An expression that cannot be evaluated scores −200. repeat_negative: a negative value must
    be written twice, as in the code of Singhal et al. 2024 (Math); here once is right.

    >>> math_chain()(["((5 + 6) + 3) = "] * 3, ["(11 + 3) = 14", "(11 + 3) = 15 = 15", "14"])
    tensor([ 0., -1., -9.])
    """

    def points(prompt: str, response: str) -> float:
        said = [part.strip() for part in re.sub(r"[^0-9()+*\-= ]", "", prompt + response).strip().split("=")]
        try:
            wanted = chain(said[0])
        except ValueError:
            return FAILED
        if repeat_negative and wanted[-1].startswith("-"):
            wanted.append(wanted[-1])
        steps = list(zip_longest(said, wanted, fillvalue=""))[1 : None if strict else len(wanted)]
        return float(-sum(levenshtein(a, b) for a, b in steps))

    return each(points)


def chain(expression: str) -> list[str]:
    """The expression, then every step of its evaluation: innermost groups one by one, from the left, until a number.

    Whole numbers, + − * and parentheses. Raises ValueError for anything else.

    >>> chain("((5 + 6) * (3 - 4))")
    ['((5 + 6) * (3 - 4))', '(11 * (3 - 4))', '(11 * -1)', '-11']
    """
    steps = [expression]
    while not re.fullmatch(r"-?[0-9]+", steps[-1]):
        groups = _GROUP.findall(steps[-1]) or [steps[-1]]
        for group in groups:
            steps.append(steps[-1].replace(group, str(evaluate(group)), 1))
    return steps


def evaluate(flat: str) -> int:
    """Value of whole numbers joined by + − *, products first, perhaps in one pair of parentheses.

    >>> evaluate("(2 - -3 * 4)")
    14
    """
    inside = flat[1:-1] if _GROUP.fullmatch(flat) else flat
    if re.search(r"[0-9]\s+[0-9]", inside) or not _FLAT.fullmatch(packed := "".join(inside.split())):
        raise ValueError(f"cannot evaluate {flat!r}: give whole numbers joined by + - *")
    total = 0
    for product in re.findall(r"[+-]*[0-9]+(?:\*[+-]*[0-9]+)*", packed):
        value = 1
        for factor in product.split("*"):
            value *= int(factor.lstrip("+-")) * (-1) ** factor.count("-")
        total += value
    return total


def levenshtein(a: str, b: str) -> int:
    """Fewest characters inserted, deleted or replaced that turn a into b.

    >>> levenshtein("(23 * 3)", "(24 * 30)")
    2
    """
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]
