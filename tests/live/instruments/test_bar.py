"""The bar of a forecast: nothing if it is short, one line outside of a terminal, and a bar that moves in one."""

import io

from torch_eft.forecast.comparison.work import Allowance
from torch_eft.live.instruments.forecasts.bar import ForecastBar
from torch_eft.results.progress.work import worked


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(terminal, parts, seconds=20.0, each=1.0):
    """What is shown while parts are made, with ``each`` second between what they say."""
    stream, clock, allowance = Stream(terminal), Clock(), Allowance(seconds)
    allowance.plan(parts)
    with ForecastBar(allowance, stream, clock):
        for name in parts:
            if allowance.covers(name):
                with allowance.working(name):
                    for _ in range(4):
                        clock.now += each
                        worked(1e9)
    assert allowance.report is None
    return stream.getvalue()


def test_a_short_forecast_shows_nothing():
    assert shown(True, {"the NTK": 0.5}, each=0.1) == shown(False, {"the NTK": 0.5}, each=0.1) == ""


def test_outside_of_a_terminal_it_is_one_line_at_the_beginning():
    text = shown(False, {"the NTK": 12.0, "the mean output": 40.0})
    assert text == (
        "torch_eft: computing the forecast, ~12 s (left out: the mean output; forecast_seconds=53 brings it)\n"
    )
    assert shown(False, {"the NTK": 0.5}) == "torch_eft: computing the forecast, ~2 s\n"  # longer than was counted


def test_in_a_terminal_a_bar_moves_and_is_cleared():
    text = shown(True, {"the NTK": 1.0, "hidden kernels": 3.0, "the mean output": 40.0})
    frames = text.split("\r")
    assert any(
        "torch_eft: computing the forecast [--------------------] 0 s of ~4 s: the NTK" in each for each in frames
    )
    assert any("[#####---------------]" in each and "hidden kernels" in each for each in frames)
    assert "(left out: the mean output; forecast_seconds=45 brings it)" in text
    assert len({each.split("]")[0] for each in frames if "[" in each}) > 3
    assert "\n" not in text.strip("\r\n ") and not frames[-1].strip()
