"""Preconditioned kernels: the parts of a step add up to the step that is taken, and H_P is J lambda P J^T."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from torch_eft import measure


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                b1, b2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((b1 * m + (1 - b1) * p.grad).sign(), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "heavy ball": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "Nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximizing": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, weight_decay=0.1),
    "RMSprop, centered, momentum": lambda p: RMSprop(p, lr=0.01, momentum=0.8, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2),
    "Adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "Adam, amsgrad, maximizing": lambda p: Adam(p, lr=0.01, amsgrad=True, maximize=True),
    "Adam, single tensors": lambda p: Adam(p, lr=torch.tensor(0.01, dtype=torch.float64), foreach=False),
    "Adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    "AdamW, amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: NAdam(p, lr=0.01, weight_decay=0.1),
    "NAdam, decoupled": lambda p: NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": lambda p: Adamax(p, lr=0.01, weight_decay=0.1),
    "Lion": lambda p: Lion(p, weight_decay=0.1),
    "two groups": lambda p: AdamW([{"params": p[:1], "lr": 0.003}, {"params": p[1:], "betas": (0.5, 0.9)}], lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def steps(name, count=4):
    """(model, optimizer, gradients) before every step, which is taken if another one follows."""
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(count):
        if step:
            optimizer.step()
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x).square().mean() + model(x).sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        yield model, optimizer, gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_add_up_to_the_step(name):
    for model, optimizer, gradients in steps(name):
        state = copy.deepcopy(optimizer.state_dict())
        before = {parameter: p.detach().clone() for parameter, p in model.named_parameters()}
        step = measure.optimizer_step(model, optimizer, gradients)
        assert str(optimizer.state_dict()) == str(state)  # read, not written
        twin = copy.deepcopy((model, optimizer))
        for p, g in zip(twin[0].parameters(), gradients.values(), strict=True):
            p.grad = g.clone()
        twin[1].step()
        for parameter, p in twin[0].named_parameters():
            rounding = 1e-6 if name.startswith("NAdam") else 1e-9  # torch keeps NAdam's mu_product in single precision
            taken = p.detach() - before[parameter]
            torch.testing.assert_close(step.total[parameter], taken, rtol=rounding, atol=1e-12)
            P = step.preconditioner[parameter]
            fresh = step.learning_rate * step.share[parameter] * P * gradients[parameter]
            assert torch.allclose(fresh.abs(), step.fresh[parameter].abs(), rtol=1e-12)
        if name != "Lion":  # after the step its state alone tells P
            ahead = measure.preconditioner(twin[0], twin[1])
            for parameter, P in step.preconditioner.items():
                torch.testing.assert_close(torch.as_tensor(ahead[parameter]), torch.as_tensor(P), rtol=1e-12, atol=0.0)


def jacobian(model, x):
    z = model(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])
        for value in z.flatten()
    ]
    return torch.stack(rows), z.shape


def by_hand(model, x, lambdas):
    J, (N, C) = jacobian(model, x)
    scale = torch.cat([torch.as_tensor(lambdas[name]).expand_as(p).flatten() for name, p in model.named_parameters()])
    return ((J * scale) @ J.T).view(N, C, N, C).permute(0, 2, 1, 3)


def test_the_kernel_is_that_of_the_jacobian():
    model, optimizer, _ = list(steps("two groups"))[-1]
    x = torch.randn(4, 3, dtype=torch.float64)
    H_P = measure.ntk(model, x, preconditioner=optimizer)
    expected = by_hand(model, x, measure.preconditioner(model, optimizer))
    torch.testing.assert_close(H_P, expected, rtol=1e-12, atol=1e-12)
    trace = measure.ntk(model, x, preconditioner=optimizer, trace=True)
    torch.testing.assert_close(trace, expected.diagonal(dim1=2, dim2=3).mean(-1), rtol=1e-12, atol=1e-12)
    network_of = measure.Network(model, x, preconditioner=optimizer)
    assert torch.equal(network_of.ntk(), H_P)
    parts = measure.ntk(model, x, preconditioner=optimizer, per="parameter")
    torch.testing.assert_close(sum(parts.values()), H_P, rtol=1e-12, atol=1e-12)


class Grouped(nn.Module):
    """Grouped and transposed convolutions, a table, and a weight used at several places."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        h = torch.tanh(self.grouped(self.table(tokens).mT))
        h = self.norm(self.up(h).mT)
        return self.head(torch.tanh(h)).mean(1)


def test_every_kind_of_factor_takes_a_number_for_every_number():
    torch.manual_seed(1)
    model, tokens = Grouped().double(), torch.randint(0, 7, (3, 5))
    lambdas = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    lambdas["head.bias"] = 0.5
    assert not measure.coverage(model, tokens).fallback
    expected = by_hand(model, tokens, lambdas)
    for options in ({}, {"memory": 2**15}):  # all at once, and block by block
        torch.testing.assert_close(
            measure.ntk(model, tokens, lambdas=lambdas, **options), expected, rtol=1e-11, atol=1e-12
        )
    e = torch.randn(3, 2, dtype=torch.float64)
    product = measure.ntk_vector_product(model, tokens, e, lambdas=lambdas)
    torch.testing.assert_close(product, torch.einsum("abij,bj->ai", expected, e), rtol=1e-11, atol=1e-12)


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.Conv2d(4, 4, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        self.x = torch.randn(6, 1, 6, 6, dtype=torch.float64)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.x = torch.randint(0, 7, (6, 4))

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


class Perceptron(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.x = torch.randn(6, 3, dtype=torch.float64)


def halved(step):
    parts = {part: {name: value / 2 for name, value in getattr(step, part).items()} for part in PARTS}
    return replace(step, learning_rate=step.learning_rate / 2, **parts)


PARTS = ("fresh", "momentum", "decay")


@pytest.mark.parametrize("network_of", [Perceptron, Convolutional, Attending])
def test_one_step_of_the_outputs_is_the_sum_of_its_parts_to_second_order(network_of):
    """For every optimizer, after three steps: the error is that of linearizing, which falls as the square of eta."""
    torch.manual_seed(0)
    start = network_of().double()
    for name, make in OPTIMIZERS.items():
        model = copy.deepcopy(start)
        optimizer = make(list(model.parameters()))
        for count in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(model.x), torch.arange(6) % 3).backward()
            if count < 3:
                optimizer.step()
        step = measure.optimizer_step(model, optimizer, {key: p.grad for key, p in model.named_parameters()})
        with measure.Network(model, model.x) as bound:
            found, half = (measure.output_step(bound.current, model.x, each) for each in (step, halved(step)))
        errors = [float((each.change - each.predicted).norm()) for each in (found, half)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.35), name
        assert sum(found.shares.values()) == pytest.approx(1) and found.error < 0.5
        for part in PARTS:  # J times the part, by hand
            if network_of is Perceptron:
                J, shape = jacobian(model, model.x)
                vector = torch.cat([getattr(step, part)[key].flatten() for key, _ in model.named_parameters()])
                torch.testing.assert_close(getattr(found, part), (J @ vector).view(shape), rtol=1e-9, atol=1e-12)
        before = model(model.x).detach()
        optimizer.step()
        torch.testing.assert_close(model(model.x).detach() - before, found.change, rtol=1e-5, atol=1e-7)


def test_the_fresh_part_is_the_preconditioned_kernel_times_the_errors():
    """-eta c H_P e, with the batch's own samples as columns."""
    model, optimizer, gradients = list(steps("AdamW"))[-1]
    step = measure.optimizer_step(model, optimizer, gradients)
    x = torch.randn(4, 3, dtype=torch.float64)
    batch = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z = model(batch).detach().requires_grad_()
    (z.square().mean() + z.sum()).backward()
    H_P = measure.ntk(model, x, other=batch, lambdas=step.preconditioner)
    expected = -step.learning_rate * step.share["0.weight"] * torch.einsum("abij,bj->ai", H_P, z.grad)
    torch.testing.assert_close(measure.output_step(model, x, step).fresh, expected, rtol=1e-10, atol=1e-12)


def test_heavy_ball_is_stable_below_its_bound_and_not_above():
    """On a quadratic with P frozen, by iterating."""
    for make, b1 in ((lambda p, lr: SGD(p, lr=lr, momentum=0.9), None), (lambda p, lr: Adam(p, lr=lr), 0.9)):
        optimizer = make([torch.zeros(1, requires_grad=True)], 0.1)
        bound = measure.stability_bound(optimizer)
        for factor, stable in ((0.98, True), (1.02, False)):
            z, m = 1.0, 0.0
            for _ in range(3000):
                g = factor * bound * z
                m = 0.9 * m + (g if b1 is None else (1 - b1) * g)
                z -= 0.1 * m
                if abs(z) > 1e6:
                    break
            assert (abs(z) < 1) is stable


@pytest.mark.parametrize("name", ["AdamW", "heavy ball", "RMSprop"])
def test_sharpness_is_the_largest_eigenvalue_of_the_preconditioned_curvature(name):
    """In parameter space, P^1/2 J^T L'' J P^1/2, with L'' of the cross-entropy in closed form."""
    model, optimizer, _ = list(steps(name))[-1]
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    found = measure.sharpness(model, x, lambda z: nn.functional.cross_entropy(z, y), optimizer)
    J, (N, _) = jacobian(model, x)
    p = model(x).detach().softmax(1)
    curvature = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / N
    P = measure.preconditioner(model, optimizer)
    root = torch.cat([torch.as_tensor(P[name]).expand_as(q).flatten() for name, q in model.named_parameters()]).sqrt()
    matrix = root[:, None] * (J.T @ curvature @ J) * root
    assert found.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9)
    assert found.bound == measure.stability_bound(optimizer) and found.ratio == found.eigenvalue / found.bound
    assert "these 4 samples" in found.validity.reason


def test_what_is_not_known_is_refused_in_words():
    model, x = network(), torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="Adam has taken no step, so that its P is not known yet; give gradients="):
        measure.ntk(model, x, preconditioner=Adam(model.parameters()))
    with pytest.raises(ValueError, match="depends on the coming gradient; give gradients="):
        measure.preconditioner(model, Lion(model.parameters()))
    with pytest.raises(ValueError, match=r"preconditioner of torch\.optim.lbfgs\.LBFGS is not known"):
        measure.preconditioner(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="holds none of the trainable parameters"):
        measure.preconditioner(network(), Adam(model.parameters()))
    with pytest.raises(ValueError, match="give one of the two"):
        measure.ntk(model, x, preconditioner=SGD(model.parameters(), lr=0.1), lambdas=2.0)
    with pytest.raises(ValueError, match="a tensor of the shape of the parameter, \\(5, 3\\)"):
        measure.ntk(model, x, lambdas={name: torch.ones(5) for name, _ in model.named_parameters()})
    with pytest.raises(ValueError, match="it must be finite and >= 0"):
        measure.ntk(model, x, lambdas={name: -torch.ones_like(p) for name, p in model.named_parameters()})
    with pytest.raises(ValueError, match="no stability bound"):
        measure.stability_bound(NAdam(model.parameters()))

    class Own(Adam):
        def step(self, closure=None):
            return super().step(closure)

    with pytest.raises(ValueError, match=r"preconditioner of .*Own is not known"):
        measure.preconditioner(model, Own(model.parameters()))


@pytest.mark.parametrize("make", [Adam, RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_what_never_had_a_gradient_does_not_count(make):
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    optimizer = make(model.parameters())
    x = torch.randn(2, 3, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    found = measure.preconditioner(model, optimizer)
    assert found.pop("unused") == 0.0 and all(bool((value > 0).all()) for value in found.values())
    torch.testing.assert_close(
        measure.ntk(model, x, preconditioner=optimizer), measure.ntk(model, x, lambdas=found | {"unused": 1.0})
    )


class Inherits(Adam):
    """The first of its kind writes ``step`` into this class."""


class Lookahead(torch.optim.Optimizer):
    """Every few steps the weights go half of the way back: none of the optimizer inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_whose_step_is_that_of_torch():
    model = network()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    own = Inherits(model.parameters())
    own.step()
    assert set(measure.preconditioner(model, own)) == {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match=r"preconditioner of .*Lookahead is not known"):
        measure.preconditioner(model, Lookahead(own))


def test_wrong_arguments_are_answered_in_words():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    parameters = dict(model.named_parameters())
    for wrong, words in (
        (torch.ones(3), r"lambdas: tensor\(.* given; give a number, or {parameter name"),
        (
            {key: torch.ones_like(p, dtype=torch.complex128) for key, p in parameters.items()},
            "a complex tensor given for",
        ),
        ({key: torch.ones_like(p).to_sparse() for key, p in parameters.items()}, "a sparse_coo tensor given for"),
    ):
        with pytest.raises(ValueError, match=words):
            measure.ntk(model, torch.ones(1, 3, dtype=torch.float64), lambdas=wrong)
    for wrong, words in ((None, "NoneType given"), ("adam", "str given"), (Adam, "the class Adam given")):
        with pytest.raises(TypeError, match=f"optimizer: {words}; give "):
            measure.preconditioner(model, wrong)
    with pytest.raises(TypeError, match="gradients: list given; give "):
        measure.optimizer_step(model, optimizer, [torch.ones(2)])
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(ValueError, match="gradients: 'x' is not a trainable parameter"):
        measure.optimizer_step(model, optimizer, {"x": torch.ones(2)})
    still = Adam(model.parameters(), eps=0.0)
    model(torch.zeros(1, 3, dtype=torch.float64)).sum().backward()  # no gradient in the first weights
    still.step()
    with pytest.raises(ValueError, match=f"P of '{name}' is not finite in float64: .* give the optimizer a larger eps"):
        measure.ntk(model, torch.ones(1, 3, dtype=torch.float64), preconditioner=still)


def test_the_drift_of_the_preconditioned_kernel_is_that_by_P_and_that_by_J():
    before, after = (list(steps("AdamW", count))[-1] for count in (2, 4))
    x = torch.randn(4, 3, dtype=torch.float64)
    P_0, P = (measure.preconditioner(model, optimizer) for model, optimizer, _ in (before, after))
    found = measure.preconditioned_drift(network(), x, before[0], after[0], P_0, P)
    H_P = [measure.ntk(model, x, lambdas=each) for (model, *_), each in ((before, P_0), (after, P))]
    torch.testing.assert_close(found.change, H_P[1] - H_P[0], rtol=1e-10, atol=1e-12)
    assert found.drift == pytest.approx(float(measure.relative_change(H_P[1], H_P[0])))
    assert sum(found.shares.values()) == pytest.approx(1)
    of_P = measure.preconditioned_drift(network(), x, before[0], before[0], P_0, P)
    of_J = measure.preconditioned_drift(network(), x, before[0], after[0], P_0, P_0)
    assert not of_P.by_jacobian.any() and not of_J.by_preconditioner.any()
    torch.testing.assert_close(of_J.change, measure.ntk(after[0], x, lambdas=P_0) - H_P[0], rtol=1e-9, atol=1e-12)


def test_gradient_noise_is_that_of_all_batches():
    """Every batch of 2 out of 5, each taken as a step of a network that is linear in its parameters."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y, x_probe = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1]), torch.randn(3, 3).double()
    noise = measure.gradient_noise(model, x_probe, x, lambda z: nn.functional.cross_entropy(z, y), 2, learning_rate=0.1)
    changes = []
    for batch in itertools.combinations(range(5), 2):
        moved = copy.deepcopy(model)
        optimizer = SGD(moved.parameters(), lr=0.1)
        nn.functional.cross_entropy(moved(x[list(batch)]), y[list(batch)]).backward()
        optimizer.step()
        changes.append((moved(x_probe) - model(x_probe)).detach())
        torch.testing.assert_close(noise.change(batch), changes[-1])
    flat = torch.stack(changes).flatten(1)
    options = (x_probe, x, lambda z: nn.functional.cross_entropy(z, y), list(itertools.combinations(range(5), 2)), 0.1)
    torch.testing.assert_close(measure.batch_changes(model, *options).flatten(1), flat)
    torch.testing.assert_close(noise.mean.flatten(), flat.mean(0))
    torch.testing.assert_close(noise.covariance, flat.T.cov(correction=0))
    curved = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    errors = []
    for eta in (0.02, 0.01):
        measured = measure.batch_changes(curved, *options[:4], eta).flatten(1)
        predicted = measure.gradient_noise(curved, *options[:3], 2, eta).covariance
        errors.append(float((measured.T.cov(correction=0) - predicted).norm() / predicted.norm()))
    assert errors[0] < 0.1 and errors[1] / errors[0] == pytest.approx(0.5, rel=0.1)  # of first order in eta
    assert not measure.gradient_noise(model, x_probe, x, lambda z: z.sum(), 5, 0.1).covariance.any()
    with pytest.raises(ValueError, match="batch_size: 6 given; the training set has 5 samples"):
        measure.gradient_noise(model, x_probe, x, lambda z: z.sum(), 6, 0.1)
    with pytest.raises(ValueError, match="as one number"):
        measure.gradient_noise(model, x_probe, x, lambda z: z, 2, 0.1)
