"""Random networks: every number is right or refused in words, nothing crashes, nothing of the training is touched.

Which networks changes by day; a failure prints how to see one again. Answers are judged in ``judge.py``, what is right
is computed in ``truth.py``.
"""

import re
from collections import Counter
from datetime import date

import pytest

from tests.fuzz.kinds import BLOCKS
from tests.fuzz.run import examine

FAST, SLOW = 100, 2000
BAGS = ("sum of a bag", "mean of a bag", "bag of bounded norm")
SAMPLED = ("spatial transformer", "grid sample")
JUSTIFIED = {
    "torch has no such derivative": (
        r"has no derivative of order \d",
        (*BAGS, *SAMPLED, "once differentiable", "transposed 1"),
    ),
    "whole tensors carry no validity": (r"cut from the gradient, or has a backward of its own", None),
    "torch's second derivative is NaN": (r"not finite|by nan from", ("cumulative logsumexp",)),
}
"""Kinds of refusals: the words that they contain, and the blocks of which one is there (None: those noted as cut)."""


def kind_of(case, answer):
    """Why a refusal is justified, or None."""
    for kind, (words, blocks) in JUSTIFIED.items():
        there = set(case.blocks) & set(blocks) if blocks else "cut" in case.notes
        if there and re.search(words, answer.text):
            return kind
    return None


def seed_of_the_day():
    return date.today().toordinal() * SLOW


def asked(cases):
    """The answers about cases, ``(seed, block or None)``, as ``[(case, how to see it again, answer)]``."""
    answers = []
    for seed, only in cases:
        case, found = examine(seed, only)
        again = f"python -m tests.fuzz {seed}" if only is None else f'python -m tests.fuzz block "{only}" {seed + 1}'
        answers += [(case, again, answer) for answer in found]
    return answers


@pytest.fixture(scope="module")
def hundred():
    return asked([(seed_of_the_day() + number, None) for number in range(FAST)])


@pytest.fixture(scope="module")
def thousand():
    alone = [(0, name) for name in BLOCKS]
    return asked(alone + [(seed_of_the_day() + number, None) for number in range(FAST, SLOW - len(alone))])


@pytest.fixture(params=["hundred", pytest.param("thousand", marks=pytest.mark.slow)])
def answers(request):
    return request.getfixturevalue(request.param)


def shown(answers, outcome):
    return "\n".join(
        f"{case} | {again}\n    {a.question}: {a.text}" for case, again, a in answers if a.outcome == outcome
    )


@pytest.mark.parametrize("outcome", ["wrong", "crash", "touched"])
def test_nothing_is(answers, outcome):
    assert not shown(answers, outcome), f"seed of the day {seed_of_the_day()}\n{shown(answers, outcome)}"


def test_refusals_are_few_and_justified(answers):
    kinds = Counter(kind_of(case, answer) for case, _, answer in answers if answer.outcome == "refused")
    assert None not in kinds, shown(answers, "refused")
    assert sum(kinds.values()) <= 0.03 * len(answers), (kinds, shown(answers, "refused"))


def test_most_is_decided(answers):
    undecided = [answer for _, _, answer in answers if answer.outcome == "undecided"]
    assert len(undecided) <= 0.03 * len(answers), shown(answers, "undecided")
