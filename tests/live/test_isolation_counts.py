"""One isolation per visit: the network is copied once for all instruments, and once when training begins."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_eft.live import Observer
from torch_eft.measure.forward.isolation import network


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 5)


def cnn():
    layers = [nn.Conv2d(1, 3, 3), nn.GELU(), nn.Conv2d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)]
    return nn.Sequential(*layers), torch.randn(4, 1, 6, 6)


@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_visit_isolates_the_network_once(monkeypatch, make, preset):
    genuine, count = network._shadow_of, [0]

    def counted(*arguments):
        count[0] += 1
        return genuine(*arguments)

    def isolations(action):
        count[0] = 0
        action()
        return count[0]

    monkeypatch.setattr(network, "_shadow_of", counted)
    torch.manual_seed(0)
    model, x = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    observer = Observer(model, x, optimizer, preset=preset, every=1, budget=None, on_error="raise")
    assert isolations(observer.check) == 1
    assert isolations(observer.begin) == 1
    for step in range(1, 4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), torch.ones(4, 2))
        observer.observe_batch((x, torch.ones(4, 2)))
        observer.observe_loss(loss)
        loss.backward()
        observer.before_step()
        optimizer.step()
        assert isolations(lambda step=step: observer.measure(step)) == 1
    assert isolations(observer.finish) == 0  # the last step is measured already
