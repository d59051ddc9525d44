"""Long computations show how far they are, once, and short ones nothing."""

import io

import pytest
import torch

import torch_eft as eft
from torch_eft.results.progress import bar
from torch_eft.results.progress.bar import Bar, counted, working
from torch_eft.results.progress.work import listening, worked


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal


@pytest.fixture
def shown(monkeypatch):
    """Bars on a stream of ours, on a clock that goes on by one second with every look."""

    def start(terminal):
        stream, now = Stream(terminal), [0.0]

        def clock():
            now[0] += 1.0
            return now[0]

        class Ours(Bar):
            def __init__(self, what):
                super().__init__(what, stream, clock)

        monkeypatch.setattr(bar, "Bar", Ours)
        return stream

    return start


def test_pieces_are_counted(shown):
    stream = shown(terminal=True)
    assert list(counted("drawing", iter("abcdefgh"), 8)) == list("abcdefgh")
    text = stream.getvalue()
    assert "torch_eft: drawing [#####---------------] 3 s of ~12 s: 2 of 8" in text
    assert not text.split("\r")[-1].strip(), "the bar is cleared"


def test_outside_of_a_terminal_it_is_one_line(shown):
    stream = shown(terminal=False)
    list(counted("drawing", range(8), 8))
    assert stream.getvalue() == "torch_eft: drawing, ~16 s\n"


def test_work_is_shown_with_or_without_its_whole(shown):
    stream = shown(terminal=True)
    with working("predicting", seconds=10.0):
        for _ in range(5):
            worked(12e9)
    assert "torch_eft: predicting [######--------------] 3 s of ~10 s" in stream.getvalue()
    stream = shown(terminal=True)
    with working("predicting"):
        for _ in range(4):
            worked(12e9)
    assert "torch_eft: predicting, 4 s so far" in stream.getvalue()


def test_what_is_inside_another_bar_shows_none_of_its_own(shown):
    stream = shown(terminal=False)
    for _ in counted("outer", range(3), 3):
        for _ in counted("inner", range(8), 8):
            with working("innermost"):
                worked(1e12)
    assert "inner" not in stream.getvalue()
    assert [text for text in ("inner", "innermost") if text in stream.getvalue()] == []
    list(counted("after", range(8), 8))
    assert "torch_eft: after" in stream.getvalue()


def test_where_somebody_listens_nothing_is_shown_and_all_is_heard(shown):
    stream, heard = shown(terminal=False), []
    with listening(heard.append), working("inner"):
        for _ in counted("inner", range(8), 8):
            worked(1.0)
    assert heard == [1.0] * 8 and not stream.getvalue()


def test_a_bar_ends_with_what_it_shows(shown):
    stream = shown(terminal=False)
    with pytest.raises(RuntimeError), working("failing"):
        raise RuntimeError
    for _ in counted("left early", range(8), 8):
        break
    list(counted("after", range(8), 8))
    assert stream.getvalue() == "torch_eft: after, ~16 s\n"


X, Y = torch.eye(5, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64)
MODEL = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
CONVOLUTION = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 1))
ENSEMBLE = eft.theory.MLPEnsemble([5, 16, 2], "tanh")
DATA, SGD, FEW = (X, Y, X[:1]), {"learning_rate": 0.01, "steps": 3}, {"num_samples": 64}
CLASSES = (X, torch.tensor([0, 1, 1, 0, 1]), X[:1])
BY_DRAWS = {"loss": "cross_entropy", "order": 0, "num_draws": 256}

LONG = [
    ("predicting the training", lambda: eft.theory.predict_training(ENSEMBLE, *DATA, **SGD, **FEW)),
    ("predicting hidden layers", lambda: eft.theory.predict_representation(ENSEMBLE, *DATA, **SGD, **FEW)),
    ("predicting the drift", lambda: eft.theory.predict_drift(ENSEMBLE, *DATA, **SGD, **FEW)),
    ("measuring dNTK and ddNTK along the path", lambda: eft.predict_from_network(MODEL, *DATA, **SGD)),
    (
        "forecasting networks",
        lambda: eft.predict_from_networks(lambda: torch.nn.Linear(5, 2).double(), *DATA, **SGD, num_networks=4),
    ),
    (
        "measuring networks of other seeds",
        lambda: eft.measure.statistics_over_seeds(MODEL, X[:1], num_networks=4, statistics=("K",)),
    ),
    ("measuring networks of other seeds", lambda: eft.diagnose(CONVOLUTION, torch.randn(2, 1, 4), num_networks=3)),
]
SLOWER = [
    ("diagnosing the network", lambda: eft.diagnose(ENSEMBLE)),
    (
        "predicting the training by draws",
        lambda: eft.theory.predict_training(ENSEMBLE, *CLASSES, **SGD, **BY_DRAWS),
    ),
]


@pytest.mark.parametrize(
    ("name", "call"), [*LONG, *(pytest.param(*case, marks=pytest.mark.slow, id=case[0]) for case in SLOWER)]
)
def test_long_calls_of_the_package_have_bars(name, call, shown, monkeypatch):
    """What a user calls and what may take more than two seconds says so, in one line outside of a terminal."""
    monkeypatch.setattr(bar, "SILENT", 0.0)
    stream = shown(terminal=False)
    call()
    assert stream.getvalue().startswith(f"torch_eft: {name}") and stream.getvalue().count("\n") == 1
