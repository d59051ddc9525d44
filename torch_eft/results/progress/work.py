"""Long computations say how much work they have done, to whoever listens; where nobody does, it costs nothing.

Loops call ``worked`` with the multiplications of what they just did, so often that no two calls are long apart. A
bar of progress listens; nothing is printed here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[float], None] | None] = ContextVar("torch_eft_work", default=None)


@contextmanager
def listening(listener: Callable[[float], None]) -> Iterator[None]:
    """Call ``listener`` with the multiplications of every piece of work that is done inside.

    Example:
        >>> from torch_eft.results.progress.work import listening, worked
        >>> done = []
        >>> with listening(done.append):
        ...     worked(1e6)
        >>> worked(1e6)  # nobody listens
        >>> done
        [1000000.0]
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def worked(multiplications: float) -> None:
    """Say that a piece of work is done."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(multiplications)


def listened() -> bool:
    """Return whether somebody listens."""
    return _LISTENER.get() is not None
