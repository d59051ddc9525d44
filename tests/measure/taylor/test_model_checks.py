"""A Taylor model leaves the network and the random state alone, and refuses what it cannot stand for."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.measure.taylor.shadowed import (
    DTYPE,
    batches,
    deep_linear,
    seeded,
    train,
)
from tests.oracles.models import ConvNet, Recurrent, Tied, TwoInputs, mlp
from torch_eft.measure.jets.jet import NoJetRuleError
from torch_eft.measure.taylor.model import TaylorModel
from torch_eft.measure.taylor.perturbative import PerturbativeTaylorModel


def test_optimizers_that_are_not_linear_in_the_gradient_are_refused():
    model = seeded(deep_linear)
    shadow = PerturbativeTaylorModel(model)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        with pytest.raises(ValueError, match=rf"^optimizer: {kind.__name__} given; .* linear in the gradient"):
            shadow.optimizer_like(kind(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^optimizer: Adam given"):
        shadow.step(torch.ones(2, 4, dtype=DTYPE), torch.sum, torch.optim.Adam(shadow.parameters()))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("build", [lambda: mlp((4, 6, 3), nn.Tanh), ConvNet, Recurrent, Tied, TwoInputs])
def test_the_network_and_the_random_state_are_left_alone(build, order):
    model = seeded(build).eval()
    shapes = {ConvNet: (3, 1, 8, 8), Recurrent: (3, 4, 3)}
    x = torch.randn(shapes.get(build, (3, 4)), dtype=DTYPE)
    inputs = {"a": x[:, :3].clone(), "b": x} if build is TwoInputs else x
    model.train()
    if build is ConvNet:
        model.eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    kept, state = copy.deepcopy(inputs), torch.get_rng_state()
    shadow = TaylorModel(
        model, taylor_order=order, output_fn=(lambda out: out["logits"]) if build is TwoInputs else None
    )
    theta_0 = copy.deepcopy(shadow.theta_0)
    own = shadow.optimizer_like(torch.optim.AdamW(model.parameters(), lr=0.01))
    for _ in range(3):
        shadow.step(inputs, lambda z: z.square().mean() + F.dropout(z, 0.5).mean(), own)
    shadow.check(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in shadow.network.modules())
    assert all(torch.equal(value, theta_0[name]) for name, value in shadow.theta_0.items())
    assert any(not torch.equal(value, theta_0[name]) for name, value in shadow.theta.items())
    for tensor, other in zip(
        [*inputs.values()] if isinstance(inputs, dict) else [inputs],
        [*kept.values()] if isinstance(kept, dict) else [kept],
        strict=True,
    ):
        assert torch.equal(tensor, other)


def test_a_batch_that_the_forward_changes_in_place_is_left_alone():
    shadow = TaylorModel(seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))))
    x = batches(1)[0][0]
    kept = x.clone()
    for _ in range(2):  # the first batch is looked at more closely
        shadow(x)
        assert torch.equal(x, kept)


def test_another_loss_terms_parameters_get_no_gradient_and_the_real_optimizer_is_refused():
    model = seeded(deep_linear)
    real = torch.optim.SGD(model.parameters(), lr=0.1)
    shadow = TaylorModel(model)
    scale = torch.ones((), dtype=DTYPE, requires_grad=True)
    x = batches(1)[0][0]
    shadow.step(x, lambda z: (scale * z).square().mean() + model(x).sum(), shadow.optimizer_like(real))
    assert scale.grad is None and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"^optimizer: it holds parameters other than this Taylor model's"):
        shadow.step(x, lambda z: z.sum(), real)


def test_checkpoints_modes_precision_and_graphs():
    model = mlp((4, 6, 3)).half()
    shadow = TaylorModel(model)
    assert all(p.dtype == torch.float32 for p in shadow.parameters())
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert shadow(x.half()).dtype == torch.float32
    with torch.no_grad():
        value = shadow(x)
    with torch.inference_mode():
        assert torch.equal(shadow.eval()(x), value)
    assert not value.requires_grad and shadow.train()(x).requires_grad
    train(shadow, torch.optim.SGD(shadow.parameters(), lr=0.1), [(x, torch.randn(5, 3))])
    again = TaylorModel(mlp((4, 6, 3)))
    again.load_state_dict(shadow.state_dict())
    assert torch.equal(again(x), shadow(x)) and torch.equal(copy.deepcopy(shadow)(x), shadow(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        z = self.linear(x)
        return {"logits": z, "others": (z.tanh(), x)}


def test_the_outputs_keep_their_structure():
    model = seeded(Pair)
    shadow = TaylorModel(model)
    x = batches(1)[0][0]
    value = shadow(x=x)
    torch.testing.assert_close(value["logits"], model(x)["logits"])
    assert type(value["others"]) is tuple and torch.equal(value["others"][1], x)
    with pytest.raises(ValueError, match=r"^output_fn: the outputs are dict, not a tensor"):
        PerturbativeTaylorModel(model).terms(x)


class Depth(nn.Module):
    """Skips its branch at random while it is trained."""

    def __init__(self, always=False):
        super().__init__()
        self.linear, self.always = nn.Linear(4, 4), always

    def forward(self, x):
        keep = torch.rand(()) < 0.5 if self.training or self.always else 0.5
        return x + keep * self.linear(x)


def test_networks_that_are_no_one_function_are_refused():
    x = torch.randn(3, 1, 8, 8, dtype=DTYPE)
    model = seeded(ConvNet)
    with pytest.raises(ValueError, match=r"^model: 'norm' \(BatchNorm2d\) normalizes with the statistics of the batch"):
        TaylorModel(model)
    model.norm.eval()
    with pytest.raises(ValueError, match=r"^model: 'dropout' \(Dropout\) drops out"):
        TaylorModel(model)
    model.dropout.p = 0.0
    torch.testing.assert_close(TaylorModel(model)(x), model(x))
    x = batches(1)[0][0]
    with pytest.raises(ValueError, match=r"^model: in training mode it computes something else"):
        TaylorModel(seeded(Depth))(x)
    with pytest.raises(ValueError, match=r"^model: its forward draws random numbers in evaluation"):
        TaylorModel(seeded(lambda: Depth(True)).eval())(x)
    assert TaylorModel(seeded(Depth).eval())(x).shape == x.shape


class Solving(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.solve(torch.eye(4) * 3 + self.linear.weight, x.T).T


def test_what_has_no_rule_or_cannot_be_evaluated_is_said():
    x = torch.randn(3, 4)
    with pytest.raises(NoJetRuleError, match=r"solve"):
        TaylorModel(Solving())(x)
    with pytest.raises(ValueError, match=r"^probe: .* rejects"):
        TaylorModel(mlp((4, 6, 3))).check(x[:, :3])
    with pytest.raises(ValueError, match=r"^probe: .*NaN"):
        TaylorModel(mlp((4, 6, 3))).check(x * math.nan)


def test_compiled_and_copied_networks():
    model = seeded(lambda: mlp((4, 6, 4)))
    data = batches(5)
    shadows = [
        TaylorModel(model),
        TaylorModel(torch.compile(model, backend="eager")),
        copy.deepcopy(TaylorModel(model)),
    ]
    for shadow in shadows:
        own = shadow.optimizer_like(torch.optim.Adam(model.parameters(), lr=0.1))
        for x, y in data:
            shadow.step(x, lambda z: F.mse_loss(z, y), own)
    for shadow in shadows[1:]:
        assert torch.equal(shadow(x), shadows[0](x)) and not torch.allclose(shadow(x), model(x))


def test_bad_orders_and_models():
    model = deep_linear()
    assert "not consistent by itself" in TaylorModel(model, taylor_order=2).check(torch.eye(3)).reason
    for order in (0, 4, True, 1.5, "3"):
        with pytest.raises(ValueError, match=r"^taylor_order: .* given; it must be 1"):
            TaylorModel(model, taylor_order=order)
    with pytest.raises(ValueError, match=r"^model: it has no trainable parameter"):
        TaylorModel(nn.Tanh())
