"""One case after another, each asked some of the questions."""

import random
import warnings

from tests.fuzz.compose import Case, compose
from tests.fuzz.judge import ENVIRONMENTS, Answer, Examined, Watched, ask, questions
from tests.fuzz.truth import agrees_with_the_batch, evaluated, flattened, put, trainable, unflattened

FIRST_ORDER = {"output", "ntk", "trace", "parts", "cross", "product", "vjp", "eigenpairs", "change", "representation"}
"""Questions that need no second derivatives."""


def examine(seed: int, only: str | None = None, every: bool = False) -> tuple[Case, list[Answer]]:
    """Ask three questions about a case, or every one.

    Of some cases the parameters are moved in between, as a training does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _examine(compose(seed, only), random.Random(seed), every)


def _examine(case: Case, r: random.Random, every: bool) -> tuple[Case, list[Answer]]:
    at = Examined(case, r)
    with evaluated(case):
        if not agrees_with_the_batch(case, at.J, at.weights[0]):
            return case, [Answer("truth", "undecided", "torch's gradients of one sample and of the batch differ")]
    names = list(questions(at, Watched(case.net)))
    if "coarse" in case.notes:
        names = [name for name in names if name in FIRST_ORDER]
    asked = names if every else [r.choice(["ntk", "trace", "parts", "cross"]), *r.sample(names, 2)]
    environment = r.choice(list(ENVIRONMENTS)) if r.random() < 0.3 else "plain"
    answers = []
    for number, name in enumerate(asked):
        if number == 2 and r.random() < 0.3:
            values = unflattened(case, flattened(case, trainable(case)) + at.v)
            put([(p, values[name]) for name, p in trainable(case).items()])
            at = Examined(case, r)
        answers.append(ask(at, name, environment))
    return case, answers
