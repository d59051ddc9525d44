"""``python -m tests.fuzz FIRST [COUNT]``, or ``python -m tests.fuzz block "NAME" [COUNT]``: answers in words."""

import sys
import time
from collections import Counter

from tests.fuzz.run import examine

if __name__ == "__main__":
    arguments = sys.argv[1:]
    only = arguments[1] if arguments[0] == "block" else None
    first, count = (0, int((*arguments, 3)[2])) if only else (int(arguments[0]), int((*arguments, 1)[1]))
    counts, start = Counter(), time.perf_counter()
    for seed in range(first, first + count):
        case, answers = examine(seed, only, every=count == 1 or only is not None)
        counts.update(answer.outcome for answer in answers)
        for answer in answers:
            if answer.outcome != "right" or count == 1:
                print(f"{case} | {answer.question}: {answer.outcome} {answer.text}", flush=True)
    print(dict(counts), f"{(time.perf_counter() - start) / count:.3f} s a case")
