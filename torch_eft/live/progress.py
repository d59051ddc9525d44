"""Progress of a training, in optimizer steps."""

from dataclasses import dataclass

from torch_eft.live.config.schedule import Curve


@dataclass
class Progress:
    """The observer's step counter: the observer advances it, recorder and measurements read it.

    Args:
        step: Steps taken so far.
        first_step: Where this training started, or went on.
        origin: Steps taken at theta_0.
        total_steps: Steps of the whole training, if their number is known.
        full_batch: Whether every step is known to take the same batch.
        quiet: Step before which the schedule asks for nothing.
        starting: Whether no measurement has been made after the first step yet: the start is not within the budget.
    """

    step: int = 0
    first_step: int = 0
    origin: int = 0
    total_steps: int | None = None
    full_batch: bool = False
    quiet: int = 0
    starting: bool = True

    @property
    def at_start(self) -> bool:
        """True before the first step of this training."""
        return self.step == self.first_step

    @property
    def fraction(self) -> float | None:
        """The share of the planned steps already taken; None if their number is not known."""
        if self.total_steps is None or self.total_steps <= self.first_step:
            return None
        return (self.step - self.first_step) / (self.total_steps - self.first_step)

    @property
    def curve(self) -> Curve:
        """The steps at which measurements draw a curve, at any budget."""
        return Curve(self.origin, self.total_steps)
