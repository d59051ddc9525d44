"""Networks of other seeds, trained beside one: by hand, with BatchNorm, and refused where they would be others."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import Pages, data, fit
from torch_eft import measure
from torch_eft.live import Observer, Obstacle
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.live.instruments.trained_beside.seeds import SeedsInstrument
from torch_eft.results.tags import tag

MINIBATCHES = Obstacle("mini-batches", minibatches=True)
LOW, MEDIAN, HIGH = (tag("ntk_drift", series) for series in ("seeds_low", "seeds_median", "seeds_high"))


def network(*parts, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), *parts, nn.Tanh(), nn.Linear(8, 2))


def initialize(module):
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            nn.init.normal_(part.bias, std=0.1)


def with_seeds(model, steps=4, make=torch.optim.AdamW, number=3, lr=0.01, instrument=None, **options):
    x, y, x_probe = data(12)
    optimizer = make(model.parameters(), lr=lr)
    instrument = instrument or SeedsInstrument(number, initialize=options.pop("initialize", None))
    instruments = [NTKInstrument(), RepresentationInstrument(), instrument]
    torch.manual_seed(5)
    return fit(model, instruments, steps, optimizer, x, y, x_probe, batch=6, obstacle=MINIBATCHES, **options)


def test_the_band_is_that_of_networks_trained_by_hand():
    observer, pages = with_seeds(network(), initialize=initialize)
    x, y, x_probe = data(12)
    drawn = [network() for _ in range(3)]
    torch.manual_seed(0)
    for other in drawn:
        initialize(other)
    starts = [measure.ntk(other, x_probe, lambdas=0.01) for other in drawn]
    optimizers = [torch.optim.AdamW(other.parameters(), lr=0.01) for other in drawn]
    torch.manual_seed(5)
    for step in range(1, 5):
        samples = torch.randperm(12)[:6]
        for other, optimizer in zip(drawn, optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(other(x[samples]), y[samples]).backward()
            optimizer.step()
        now = [measure.ntk(other, x_probe, lambdas=0.01) for other in drawn]
        drifts = sorted(float((H - H_0).norm() / H_0.norm()) for H, H_0 in zip(now, starts, strict=True))
        logged = observer.history[step]
        assert [logged[LOW], logged[MEDIAN], logged[HIGH]] == pytest.approx(drifts, rel=1e-4)
        assert LOW.replace("ntk_drift", "representation_change") in logged
    assert "another seed lies between the lowest and the highest with probability 2/4" in pages["seeds"][0][1]
    assert not observer.events and not observer.skipped


def test_batch_norm_trains_with_the_statistics_of_the_batch():
    model = network(nn.BatchNorm1d(8))
    observer, pages = with_seeds(model, make=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), lr=0.1)
    assert "cross" not in pages["seeds"][0][1] and "mean over samples and outputs" in pages["seeds"][0][1]
    assert all(0 < observer.history[step][LOW] < observer.history[step][HIGH] for step in (1, 2, 3, 4))


@pytest.mark.parametrize("part", [nn.Identity(), nn.BatchNorm1d(8)], ids=["plain", "BatchNorm"])
def test_training_ends_in_the_same_bits(part):
    def trained(watched):
        model = network(part if not isinstance(part, nn.BatchNorm1d) else nn.BatchNorm1d(8))
        x, y, x_probe = data(12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(5)
        fit(model, [SeedsInstrument(2)] if watched else None, 3, optimizer, x, y, x_probe, batch=6)
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, trained(True), trained(False)))


def refusal(model, **options):
    observer, pages = with_seeds(model, **options)
    assert all(LOW not in scalars for scalars in observer.history.values())
    return pages["seeds"][-1][1]


def test_what_would_train_other_networks_is_refused():
    assert "'1' (Dropout) drops out" in refusal(network(nn.Dropout(0.5)))
    assert "drawn by no reset_parameters" in refusal(Own())
    assert "gradient clipping" in refusal(network(), steps=1, instrument=Clipped(2))


class Own(nn.Module):
    """Nothing can draw its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x @ self.weight


class Clipped(SeedsInstrument):
    """Told that gradients are clipped."""

    def begin(self, start):
        return super().begin(replace(start, obstacle=Obstacle("gradient clipping at 0.1")))


def test_a_step_that_the_copies_do_not_take_ends_the_band():
    x, y, x_probe = data(12)
    model, pages = network(), Pages()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    instruments = [NTKInstrument(), SeedsInstrument(2)]
    observer = Observer(model, x_probe, optimizer, every=1, budget=None, instruments=instruments, sinks=[pages])
    observer.begin()
    for step in (1, 2, 3):
        observer.observe_batch((x, y))
        loss = F.mse_loss(model(x), y)
        observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        if step == 2:  # out of sight of the copies
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        observer.measure(step)
    observer.finish()
    assert LOW in observer.history[1] and LOW not in observer.history[2] and LOW not in observer.history[3]
    (event,) = observer.events
    assert event.step == 2 and "of it away from what a copy of it takes" in event.text


def test_a_step_that_only_some_could_take_ends_the_band():
    class NoMemory(SeedsInstrument):
        def before_step(self, step, optimizer):
            if step == 2:
                last = self._seeds._networks[-1][1]
                last.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
            return super().before_step(step, optimizer)

    observer, pages = with_seeds(network(), instrument=NoMemory(2, initialize=initialize))
    assert [step for step, scalars in observer.history.items() if LOW in scalars] == [1, 2]
    assert "end at step 2: RuntimeError: out of memory" in pages["seeds"][-1][1] and not observer.skipped


def test_they_train_as_long_as_asked():
    observer, pages = with_seeds(network(), instrument=SeedsInstrument(2, steps=2))
    assert not observer.events
    assert [step for step, scalars in observer.history.items() if LOW in scalars] == [1, 2]
    assert "2 steps were asked for" in pages["seeds"][-1][1]


def test_the_number_is_checked():
    with pytest.raises(ValueError, match="give a number of networks >= 2, such as 4"):
        SeedsInstrument(1)
