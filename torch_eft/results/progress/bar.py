"""The bar that moves while something long is computed: what it is, how far it is, and how long it will take."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from torch_eft.results.progress.work import listened, listening

SILENT = 2.0
"""Seconds of work, counted or passed, up to which nothing is shown."""

MULTIPLICATIONS_PER_SECOND = 12e9
"""Of what long loops report as they go, on one core of a common machine; only bars depend on it."""

_EACH = 0.1
_SHOWN: ContextVar[bool] = ContextVar("torch_eft_bar", default=False)
"""True inside a bar: what is computed there is part of what that one shows."""

T = TypeVar("T")


class Bar:
    """Shows how far a computation is, on stderr: a bar in a terminal, elsewhere one line if it takes long.

    Bars of training, such as Lightning's, stay where they are: in a terminal this one is tqdm's, in a line of its own
    that it clears.

    Args:
        what: What is computed.
        stream: Where it is shown; None: stderr.
        clock: Seconds, for what is shown; no decision depends on it.
    """

    def __init__(self, what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._stream, self._clock = what, stream or sys.stderr, clock
        self._bar: Any = None
        self._told = False
        self._outer = False
        self._begun = self._latest = clock()

    def begin(self) -> None:
        """The computation begins."""
        self._begun = self._clock()
        self._outer = _SHOWN.get()
        _SHOWN.set(True)

    def close(self) -> None:
        """It has ended: the bar is cleared."""
        _SHOWN.set(self._outer)
        if self._bar is not None:
            self._bar.close()

    def show(self, share: float | None, *, part: str = "", planned: float = 0.0, note: str = "") -> None:
        """Show how far it is.

        Args:
            share: The share that is done; None if the whole is not known.
            part: What is being computed.
            planned: Seconds that were counted for the whole.
            note: What else is to be known.
        """
        passed = self._clock() - self._begun
        if max(planned, passed) < SILENT:
            return
        note = f" ({note})" if note else ""
        if not self._stream.isatty():
            if not self._told:
                whole = "" if share is None else self._expected(passed, share, planned)
                print(f"torch_eft: {self._what}{', ' * bool(whole)}{whole}{note}", file=self._stream, flush=True)
                self._told = True
            return
        if self._bar is not None and passed - self._latest < _EACH and (share or 0.0) < 1:
            return
        self._latest = passed
        detail = f": {part}" if part else ""
        if share is None:
            line = f"torch_eft: {self._what}, {passed:.0f} s so far{detail}{note}"
        else:
            whole = self._expected(passed, share, planned)
            line = f"torch_eft: {self._what} [{{bar:20}}] {passed:.0f} s{' of ' * bool(whole)}{whole}{detail}{note}"
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=1.0,
                initial=share or 0.0,
                bar_format=line,
                ascii="-#",
                leave=False,
                dynamic_ncols=True,
                mininterval=0.0,
                file=self._stream,
            )
            return
        self._bar.n, self._bar.bar_format = share or 0.0, line
        self._bar.refresh()

    @staticmethod
    def _expected(passed: float, share: float, planned: float) -> str:
        """The whole time: what was counted, until what has passed says how fast this machine is."""
        known = share > 0 if planned == 0 else share > 0.1 and passed > SILENT
        whole = passed / share if known else planned
        return f"~{max(whole, passed):.0f} s" if whole else ""


def counted(what: str, each: Iterable[T], count: int) -> Iterator[T]:
    """Go through ``count`` pieces of work of about the same size, with a bar if they take more than two seconds.

    Inside another bar, or where somebody listens to the work already, nothing is shown.

    Args:
        what: What is computed.
        each: The pieces.
        count: Their number.

    Yields:
        The pieces.

    Example:
        >>> from torch_eft.results.progress.bar import counted
        >>> sum(counted("computing a sum", range(4), 4))
        6
    """
    if _SHOWN.get() or listened():
        yield from each
        return
    bar = Bar(what)
    bar.begin()
    try:
        for done, piece in enumerate(each):
            bar.show(done / count, part=f"{done} of {count}")
            yield piece
    finally:
        bar.close()


@contextmanager
def working(what: str, seconds: float | None = None) -> Iterator[None]:
    """Show a bar while what is computed inside says how much work it has done (``work.worked``).

    Args:
        what: What is computed.
        seconds: The whole of it, counted in seconds of one core; None if it is not known.

    Yields:
        Nothing.

    Example:
        >>> from torch_eft.results.progress.bar import working
        >>> with working("computing a sum", seconds=0.1):
        ...     sum(range(4))
        6
    """
    if _SHOWN.get() or listened():
        yield
        return
    bar, done = Bar(what), 0.0

    def listener(multiplications: float) -> None:
        nonlocal done
        done += multiplications / MULTIPLICATIONS_PER_SECOND
        share = None if seconds is None else min(0.99, done / max(seconds, 1e-9))
        bar.show(share, planned=seconds or 0.0)

    bar.begin()
    try:
        with listening(listener):
            yield
    finally:
        bar.close()
