"""lambda, read off optimizers: one number for every parameter, or a refusal."""

import copy

import pytest
import torch
from torch import nn

from torch_eft.measure import read_learning_rates


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr)


def test_what_is_in_no_optimizer_does_not_move():
    model = net()
    rates = read_learning_rates(model, [sgd(model[0].parameters(), 0.2), sgd([model[2].bias], 0.1)])
    assert rates.learning_rate == 0.2
    assert rates.lambdas == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 0.0, "2.bias": 0.5}


@pytest.mark.parametrize("other", [copy.deepcopy, torch.optim.swa_utils.AveragedModel], ids=["copy", "average"])
def test_a_copy_of_the_trained_network_is_refused(other):
    model = net()
    with pytest.raises(ValueError, match=r"holds none of the parameters of this .* which is an average or a copy"):
        read_learning_rates(other(model), [sgd(model.parameters(), 0.1)])


def test_a_parameter_in_two_optimizers_needs_one_lambda():
    model = net()
    everything = list(model.parameters())
    rates = read_learning_rates(model, [sgd(everything, 0.1), torch.optim.LBFGS(everything, 1.0)])
    assert rates.learning_rate == 0.1 and set(rates.lambdas.values()) == {1.0}
    groups = [{"params": everything[:1], "lr": 0.1}, {"params": everything[1:], "lr": 0.2}]
    for second in (sgd(everything[1:], 0.1), torch.optim.SGD(groups)):
        with pytest.raises(ValueError, match=r"two of them train '0\.\w+', at other ratios"):
            read_learning_rates(model, [sgd(everything, 0.1), second])
