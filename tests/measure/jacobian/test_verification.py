"""Plans that stop to hold, and what the check against ordinary passes finds, against loops of ``autograd.grad``."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.measure.zoo import randn
from torch_eft import measure
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import as_probe
from torch_eft.measure.jacobian import fallback
from torch_eft.measure.jacobian.engine import JacobianGram
from torch_eft.measure.jacobian.gram import OuterProductFactor
from torch_eft.measure.jacobian.verification import Verification

DTYPES = (torch.float32, torch.float64)


def jacobian(model, x):
    """(N, C, P) of the live module, one sample and one output at a time."""
    parameters = list(model.parameters())
    inputs = x if isinstance(x, tuple) else (x,)
    rows = []
    for a in range(len(inputs[0])):
        z = model(*(tensor[a : a + 1] for tensor in inputs))[0]
        gradients = [
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in z
        ]
        rows.append(torch.stack([torch.cat([part.flatten() for part in row]) for row in gradients]))
    return torch.stack(rows)


def assert_right(model, x, other=None):
    H = measure.ntk(model, x, other=other)
    J = jacobian(model, x)
    expected = torch.einsum("aip,bjp->abij", J, J if other is None else jacobian(model, other))
    torch.testing.assert_close(H, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


class Sorted(nn.Module):
    """Works on the samples in an order of its own, and returns them in theirs."""

    def __init__(self, outputs=2):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, outputs)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.body(x[order])))[order.argsort()]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_forward_that_sorts_the_batch(count):
    torch.manual_seed(0)
    for outputs in (1, 3):
        model, x = Sorted(outputs).double(), randn(count, 4, seed=count)
        assert_right(model, x)
        torch.testing.assert_close(
            measure.ntk(model, x, trace=True), measure.as_trace(measure.ntk(model, x)), rtol=0, atol=1e-12
        )


class Heads(nn.Module):
    """A head by sample, each used in a way that no rule knows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.heads = nn.ParameterList(nn.Parameter(torch.randn(3, 2)) for _ in range(3))

    def forward(self, x, task):
        h = torch.tanh(self.body(x))
        return torch.stack([row @ self.heads[int(t)].exp() for row, t in zip(h, task, strict=True)])


def test_parameters_that_only_later_samples_use():
    torch.manual_seed(0)
    model, x = Heads().double(), randn(6, 4)
    for tasks in ([0, 0, 0, 1, 2, 1], [2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]):
        assert_right(model, (x, torch.tensor(tasks)))


class Experts(nn.Module):
    """Every sample goes through the linear layer that a gate chooses."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(1).max(1)
        z = x.new_zeros(len(x), 2)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            z = z.index_add(0, rows, weights[rows, None] * expert(x[rows]))
        return z


def test_routing_by_the_samples_values():
    torch.manual_seed(1)
    model, x = Experts().double(), randn(8, 4)
    assert set(model.gate(x).argmax(1).tolist()) == {0, 1, 2}
    assert_right(model, x)
    assert_right(model, x.flip(0))
    H = measure.ntk(model, x)
    estimate = measure.ntk_estimate(model, x)
    blocks = measure.ntk(model, x, memory=estimate.kernels + 4 * estimate.sample)
    torch.testing.assert_close(blocks, H, rtol=0, atol=1e-12)


class Switched(nn.Module):
    """Takes a square weight as it stands, or transposed as well, and has a gate that begins at 0."""

    def __init__(self):
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(4, 4) / 2), nn.Parameter(torch.zeros(1))
        self.gain, self.head = nn.Parameter(torch.randn(2)), nn.Linear(4, 2)
        self.transposes, self.amplifies = False, False

    def forward(self, x):
        h = torch.tanh(x @ self.weight) + self.gate * torch.tanh(F.linear(x, self.weight))
        h = torch.tanh(F.linear(h, self.weight) if self.transposes else h @ self.weight)
        return self.head(h) * self.gain.exp() if self.amplifies else self.head(h)


def test_a_forward_that_changes_between_measurements():
    torch.manual_seed(0)
    model, x = Switched().double(), randn(5, 4)
    assert_right(model, x)
    with torch.no_grad():
        model.gate.fill_(0.7)
    assert_right(model, x)
    for transposes, amplifies in ((True, False), (True, True), (False, True), (False, False)):
        model.transposes, model.amplifies = transposes, amplifies
        assert_right(model, x)


class TimeFirst(nn.Module):
    """Samples on the second axis inside."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("counts", [(1, 4), (4, 1), (1, 1), (5, 3)])
def test_crossed_kernels_have_one_plan(counts):
    torch.manual_seed(0)
    model, x = TimeFirst().double(), randn(8, 4, 3)
    assert_right(model, x[: counts[0]], x[8 - counts[1] :])
    model, x = Sorted().double(), randn(8, 4)
    assert_right(model, x[: counts[0]], x[8 - counts[1] :])


def test_equal_inputs_are_no_reason_to_refuse():
    """With signs, u . J of two equal samples can cancel to rounding; with real numbers it does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.ones(2, 3)
    for _ in range(20):
        H = measure.ntk(copy.deepcopy(model), x)
        torch.testing.assert_close(H, H[:1, :1].expand(2, 2, 1, 1), rtol=1e-5, atol=0)


def test_samples_that_begin_to_see_each_other_are_found():
    """While the head is 0 they change nothing but the output's zero."""

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            h = self.body(x)
            return self.head(h - h.mean(0))

    model, x = Normalized().double(), randn(5, 4)
    with isolated(model) as network:  # planned while nothing shows
        JacobianGram(network, as_probe(x))
    with torch.no_grad():
        model.head.weight.normal_()
    with pytest.raises(ValueError, match="depends on the other samples of the batch"):
        measure.ntk(model, x)


class Eventful(nn.Module):
    """Leaves traces of every kind in itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.outputs, self.notes, self.latest = 0, [], {"shapes": {(1, 1)}}, None

    def forward(self, x):
        self.calls += 1
        self.seen += len(x)
        z = self.layer(x)
        self.outputs.append(z)
        self.notes["shapes"].add(tuple(z.shape))
        self.notes[len(self.notes)] = self.latest = z
        return z


def test_the_module_itself_is_left_as_it_was():
    torch.manual_seed(0)
    model, x = Eventful().double().train(), randn(5, 4)
    state = torch.get_rng_state()
    for _ in range(2):
        H = measure.ntk(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.calls, model.outputs, model.latest) == (0, [], None)
    assert model.notes == {"shapes": {(1, 1)}} and float(model.seen) == 0 and model.training and model.layer.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(H, measure.ntk(model.layer, x), rtol=0, atol=1e-13)


def test_a_copy_that_is_another_network_is_found():
    class Elsewhere(nn.Module):
        """Its copies leave a factor behind."""

        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 2), 3.0

        def __getstate__(self):
            return {**vars(self), "scale": 1.0}

        def forward(self, x):
            return self.scale * self.layer(x)

    with pytest.raises(ValueError, match="cannot be trusted"):
        measure.ntk(Elsewhere().double(), randn(3, 4))


def test_a_wrong_batching_rule_is_gone_round(monkeypatch):
    """The fallback goes through samples in a loop where ``vmap`` gives another Jacobian than ordinary passes."""
    right = fallback.vmap

    def wrong(function, in_dims):
        return lambda own, inputs: {name: 1.1 * J for name, J in right(function, in_dims)(own, inputs).items()}

    torch.manual_seed(0)
    model, x = Sorted().double(), randn(5, 4)
    monkeypatch.setattr(fallback, "vmap", wrong)
    assert_right(model, x)
    assert_right(model, x)  # as remembered


@pytest.mark.parametrize(("gain", "depth"), [(2.0, 20), (3.0, 10), (1.5, 30)])
def test_a_network_deep_in_chaos_is_not_taken_for_one_with_cut_gradients(gain, depth):
    """It changes over lengths of |theta| / gain^depth: differences over wider steps say nothing of derivatives."""
    torch.manual_seed(3)
    layers = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=gain / 4)
    x, e = randn(4, 16).float(), randn(4, 1).float()
    single, double = (measure.ntk_derivatives(model.to(dtype), x.to(dtype), e.to(dtype)) for dtype in DTYPES)
    for found in (single, double):
        assert found.validity.flag == "valid", str(found.validity)
    for name in ("dH", "ddI", "ddII"):
        a, b = getattr(single, name), getattr(double, name)
        assert (a - b).abs().max() < 1e-2 * b.abs().max()


def test_a_kernel_that_is_put_together_wrongly_is_found(monkeypatch):
    """Right factors, wrong products of one weight: then the fallback, whose products are others, is right."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), randn(5, 3)
    expected = measure.ntk(model, x)
    right = OuterProductFactor.add_gram

    def wrong(self, *arguments):
        right(self, *arguments)
        right(self, *arguments)

    monkeypatch.setattr(OuterProductFactor, "add_gram", wrong)
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(measure.ntk(other, x), expected, rtol=1e-12, atol=0)
    assert "disagrees with ordinary backward passes" in str(measure.coverage(other, x))


def test_jacobian_and_kernel_are_compared_in_one_wait_for_the_device(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    waits, inside = [], []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *, name=name, original=original):
            waits.extend([name] * len(inside))
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    mismatches = Verification.mismatches

    def watched(self, block, kernels=(), lambdas=None):
        assert len(kernels) == 1
        inside.append(True)
        found = mismatches(self, block, kernels, lambdas)
        inside.clear()
        return found

    monkeypatch.setattr(Verification, "mismatches", watched)
    for _ in range(2):
        measure.ntk(model, x)
        assert waits == ["tolist"]
        waits.clear()


class Raised(nn.Module):
    """PReLU behind a parameter whose use is not recognized."""

    def __init__(self):
        super().__init__()
        self.body, self.power, self.head = nn.Linear(4, 24), nn.Parameter(torch.zeros(24)), nn.Linear(24, 2)
        self.act = nn.Sequential(nn.Unflatten(1, (6, 4)), nn.PReLU(), nn.Flatten())

    def forward(self, x):
        return self.head(self.act(self.body(x) * self.power.exp()))


@pytest.mark.parametrize("wrong", [False, True])
def test_batching_rules_that_are_wrong(wrong, monkeypatch):
    """torch's of PReLU is not used; where another one is found out, every sample goes alone, at once."""
    ways, own, right = [], fallback._first_order, fallback.vmap

    def watched(*arguments):
        ways.append(arguments[-1])
        return own(*arguments)

    def doubled(*arguments, **options):
        return lambda *given: {name: 2 * J for name, J in right(*arguments, **options)(*given).items()}

    monkeypatch.setattr(fallback, "_first_order", watched)
    if wrong:
        monkeypatch.setattr(fallback, "vmap", doubled)
    torch.manual_seed(0)
    model, x = Raised().double(), randn(2, 4)  # as many as outputs: torch takes one for the other
    assert_right(model, x)
    assert set(measure.coverage(model, x).fallback) == {"power"}
    assert (ways[:2] == [False, True] and all(ways[1:])) if wrong else not any(ways)


def test_an_activation_that_writes_to_a_view():
    """A layer's output (N, T, C) is one, of the product that it is computed by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2)).double()
    assert_right(model, randn(3, 2, 3))
    assert not measure.coverage(model, randn(3, 2, 3)).fallback
