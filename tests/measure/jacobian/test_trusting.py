"""Higher derivatives that are compared with differences at their first use alone."""

import pytest
import torch
from torch import nn

from torch_eft import measure
from torch_eft.measure.forward.checks import trusting_derivatives
from torch_eft.measure.jacobian import verification
from torch_eft.measure.taylor import series

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(cls=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), cls(), nn.Linear(5, 2)).double()


@pytest.fixture
def compared(monkeypatch):
    """The orders at which derivatives were compared with differences."""
    orders = []
    genuine, checked = verification.Verification.differs_from_differences, series._checked

    def jacobian(self, direction, order, *rest):
        orders.append(order)
        return genuine(self, direction, order, *rest)

    def terms(*arguments):
        orders.append("series")
        return checked(*arguments)

    monkeypatch.setattr(verification.Verification, "differs_from_differences", jacobian)
    monkeypatch.setattr(series, "_checked", terms)
    return orders


def test_they_are_compared_once_by_network_order_and_kind_of_inputs(compared):
    model = net()
    theta = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    with trusting_derivatives():
        once = measure.displacement_terms(model, X, model, theta, derivatives=1)
        assert compared == ["series", 1]
        again = measure.displacement_terms(model, X, model, theta, derivatives=1)
        assert compared == ["series", 1]
        assert torch.equal(once.ntk_terms, again.ntk_terms)
        measure.displacement_terms(model, X, model, theta)  # a higher order
        assert compared == ["series", 1, 1, 2]
        measure.displacement_terms(model, X, model, theta, derivatives=1)
        with trusting_derivatives(False):
            measure.displacement_terms(model, X, model, theta, derivatives=1)
        assert compared == ["series", 1, 1, 2, "series", 1]
        measure.displacement_terms(net(), X, model, theta, derivatives=1)  # another module
        assert compared[6:] == ["series", 1]
    measure.displacement_terms(model, X, model, theta, derivatives=1)
    assert compared[8:] == ["series", 1]


def test_a_direction_along_which_nothing_moves_proves_nothing(compared):
    model = net()
    still = {name: p.detach() for name, p in model.named_parameters()}
    moved = {name: 1.1 * p for name, p in still.items()}
    with trusting_derivatives():
        measure.displacement_terms(model, X, still, still, derivatives=1)
        compared.clear()
        measure.displacement_terms(model, X, still, moved, derivatives=1)
    assert compared == ["series", 1]


class Detached(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x).detach()


def test_what_was_found_to_be_cut_is_remembered():
    model = net(Detached)
    theta = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    with trusting_derivatives():
        first, second = (measure.displacement_terms(model, X, model, theta) for _ in range(2))
    assert first.cut and second.cut == first.cut


class Switching(nn.Module):
    """Uses another weight from some time on."""

    def __init__(self):
        super().__init__()
        self.first, self.late, self.on = nn.Linear(3, 2), nn.Linear(3, 2), False

    def forward(self, x):
        return torch.tanh(self.first(x)) + (self.late(x) if self.on else 0.0)


def test_the_jacobian_is_compared_every_time():
    torch.manual_seed(0)
    model = Switching().double()
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with trusting_derivatives():
        measure.ntk_derivatives(model, X, v, derivatives=1)
        model.on = True
        found = measure.ntk_derivatives(model, X, v, derivatives=1)
    fresh = Switching().double()
    fresh.load_state_dict(model.state_dict())
    fresh.on = True
    expected = measure.ntk_derivatives(fresh, X, v, derivatives=1)
    assert torch.allclose(found.H, expected.H) and torch.allclose(found.dH, expected.dH)
