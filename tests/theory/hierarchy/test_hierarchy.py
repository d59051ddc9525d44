"""Orders 0 and 1 of the hierarchy: against the update equations of PDLT, brute-force Taylor models, exact maps."""

import pytest
import torch
from torch.nn import functional

from tests.oracles.naive_operator import simulate
from tests.oracles.two_layer_linear import two_layer_linear_differentials, two_layer_linear_map
from torch_eft import Training
from torch_eft.theory.hierarchy.evolution import train_hierarchy
from torch_eft.theory.training.optimizer import Loss, SGDState

F64 = torch.float64


class Tiny:
    """z(theta) = z + J d + d2 d d / 2 + d3 d d d / 6 with random derivatives, N = 3 samples, C = 2; lambda = 1."""

    def __init__(self, N=3, C=2, P=4, seed=0):
        g = torch.Generator().manual_seed(seed)

        def symmetric(order):
            value = torch.randn(N * C, *[P] * order, dtype=F64, generator=g)
            if order == 2:
                return (value + value.mT) / 2
            axes = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 3, 2, 1)]
            return sum(value.permute(order) for order in axes) / 6

        self.N, self.C = N, C
        self.z = torch.randn(N * C, dtype=F64, generator=g)
        self.J = torch.randn(N * C, P, dtype=F64, generator=g)
        self.d2, self.d3 = symmetric(2), symmetric(3)
        self.y = torch.randn(N - 1, C, dtype=F64, generator=g)
        self.train = [2, 0]  # sample 1 is only looked at

    def tensors(self):
        J, d2, d3 = self.J, self.d2, self.d3
        u = torch.einsum("amn,cn->acm", d2, J)
        H = J @ J.T
        dH = torch.einsum("acm,bm->abc", u, J)
        ddI = torch.einsum("amnr,bm,cn,dr->abcd", d3, J, J, J)
        ddII = torch.einsum("acm,bdm->abcd", u, u)
        return H, dH, ddI, ddII

    def split(self, value):
        order = value.ndim
        value = value.reshape((self.N, self.C) * order)
        return value.permute([*range(0, 2 * order, 2), *range(1, 2 * order, 2)])

    def forecast(self, training=None, tensors=None, y=None, **keywords):
        parts = [self.split(value) for value in tensors or self.tensors()]
        y = self.y if y is None else y
        return train_hierarchy(self.z.view(self.N, self.C), *parts, self.train, y, training, **keywords)


def errors_of(tiny, loss, z, batch):
    """E on all outputs, 0 off the training samples."""
    e = torch.zeros(tiny.N, tiny.C, dtype=F64)
    return e.index_put((torch.tensor(tiny.train),), loss.error(z.view(tiny.N, tiny.C)[tiny.train], batch)).flatten()


def direct(tiny, loss, optimizer, eps, tensors):
    """The updates of z, H and dH at a step of gradient descent (PDLT 11.1, chapter infinity), with eps."""
    H, dH, ddI, ddII = tensors
    z, dH, ddI, ddII = tiny.z, eps * dH, eps * ddI, eps * ddII
    zs, Hs = [z], [H]
    for step in range(optimizer.steps):
        rate, e = optimizer.learning_rates[step], errors_of(tiny, loss, z, optimizer.batch(step))
        z_new = (
            z
            - rate * H @ e
            + rate**2 / 2 * torch.einsum("abc,b,c->a", dH, e, e)
            - rate**3 / 6 * torch.einsum("abcd,b,c,d->a", ddI, e, e, e)
        )
        both = dH + dH.transpose(0, 1)
        second = ddI + ddI.transpose(0, 1) + 2 * ddII
        H_new = H - rate * both @ e + rate**2 / 2 * torch.einsum("abcd,c,d->ab", second, e, e)
        dH = dH - rate * torch.einsum("abcd,d->abc", ddI + ddII + ddII.transpose(1, 2), e)
        z, H = z_new, H_new
        zs.append(z)
        Hs.append(H)
    return torch.stack(zs), torch.stack(Hs)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_equals_the_direct_hierarchy_at_first_order(loss):
    """Its derivative by eps at 0, by forward mode through every step, to rounding."""
    tiny = Tiny()
    y = tiny.y if loss == "mse" else torch.tensor([1, 0])
    batches = [[0, 1], [0], [1, 0], [1]]
    optimizer = Training(loss=loss, schedule=lambda step: 0.05 / (1 + 0.1 * step), steps=25, batches=batches)
    loss = Loss(loss, y, "mean")
    eps = torch.zeros((), dtype=F64)
    values, derivatives = torch.func.jvp(
        lambda eps: direct(tiny, loss, optimizer, eps, tiny.tensors()), (eps,), (torch.ones_like(eps),)
    )
    found = tiny.forecast(optimizer, y=y)
    ours = found.z0.flatten(1), found.z1.flatten(1), torch.stack([_whole(value) for value in found.H1])
    for value, expected in zip(ours, (values[0], *derivatives), strict=True):
        assert float(expected.abs().max()) > 0.01
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def _whole(H):
    return H.permute(0, 2, 1, 3).reshape(H.shape[0] * H.shape[2], -1)


def in_parameter_space(tiny, loss, optimizer, delta):
    """torch.optim.SGD's rule on theta of the cubic Taylor model with d2 -> delta d2, d3 -> delta^2 d3."""
    d2, d3 = delta * tiny.d2, delta**2 * tiny.d3

    def jacobian(d):
        return tiny.J + torch.einsum("amn,n->am", d2, d) + torch.einsum("amnr,n,r->am", d3, d, d) / 2

    d = torch.zeros(tiny.J.shape[1], dtype=F64)
    velocity, zs, Hs = None, [], []
    m = optimizer.momentum
    for step in range(optimizer.steps + 1):
        z = (
            tiny.z
            + tiny.J @ d
            + torch.einsum("amn,m,n->a", d2, d, d) / 2
            + torch.einsum("amnr,m,n,r->a", d3, d, d, d) / 6
        )
        J = jacobian(d)
        zs.append(z)
        Hs.append(J @ J.T)
        if step == optimizer.steps:
            break
        g = J.T @ errors_of(tiny, loss, z, optimizer.batch(step))
        velocity = g if velocity is None else m * velocity + (1 - optimizer.dampening) * g
        d = d - optimizer.learning_rates[step] * (g + m * velocity if optimizer.nesterov else velocity)
    return torch.stack(zs), torch.stack(Hs)


OPTIMIZERS = {
    "gradient descent": dict(),
    "heavy ball": dict(momentum=0.7),
    "dampened": dict(momentum=0.7, dampening=0.3),
    "nesterov": dict(momentum=0.6, nesterov=True),
    "minibatches": dict(momentum=0.5, batches=[[0], [1], [0, 1]]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["mse", "logistic"])
def test_equals_brute_force_training_of_the_taylor_model_in_parameter_space(name, kind):
    """theta itself is trained, and differentiated by delta at 0 through every step. With d2 ~ delta and d3 ~ delta^2,
    dH is of order delta, ddI and ddII of order delta^2, at which dH is met twice, too: that part is taken off by the
    second derivative of the coefficient form that is fed into itself. What is left is what order 1 claims."""
    tiny = Tiny(seed=1)
    loss = "mse" if kind == "mse" else _logistic
    optimizer = Training(loss=loss, reduction="sum", learning_rate=0.02, steps=8, **OPTIMIZERS[name])
    loss = Loss(loss, tiny.y, "sum")
    one, zero = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)

    def train(delta):
        return in_parameter_space(tiny, loss, optimizer, delta)

    def slope(delta):
        return torch.func.jvp(train, (delta,), (one,))[1]

    H, dH, ddI, ddII = tiny.tensors()
    none = torch.zeros_like(ddI)
    first, second = torch.func.jvp(slope, (zero,), (one,))
    by_dH = tiny.forecast(optimizer, (H, dH, none, none))
    compare(by_dH, first)

    def coefficients(alpha, beta):
        return self_consistent(tiny, loss, optimizer, (H, alpha * dH, beta * ddI, beta * ddII))

    in_dH = torch.func.jvp(lambda a: torch.func.jvp(lambda b: coefficients(b, zero), (a,), (one,))[1], (zero,), (one,))
    by_dd = tiny.forecast(optimizer, (H, torch.zeros_like(dH), ddI, ddII))
    compare(by_dd, [(value - part) / 2 for value, part in zip(second, in_dH[1], strict=True)])


def compare(found, expected):
    for value, wanted in zip((found.z1.flatten(1), torch.stack([_whole(H) for H in found.H1])), expected, strict=True):
        assert float(wanted.abs().max()) > 1e-3
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


def _logistic(z, y):
    return functional.softplus(-z * y.sign()).sum()


def self_consistent(tiny, loss, optimizer, tensors):
    """The coefficient form fed into its own errors: p, q, r, s driven by z(t) of all orders. Only a yardstick."""
    return simulate(
        tiny.z,
        *tensors,
        lambda z, step: errors_of(tiny, loss, z, optimizer.batch(step)),
        optimizer,
        range(optimizer.steps + 1),
    )


def test_two_layer_linear_map_at_first_order():
    """The exact map f - eta H e + eta^2 f e^2 / n, H -> ..., with 1/n the counting parameter.

    H starts at a fixed lam: then f and H of the map depend on n through these terms only, and the difference to order
    1 falls as 1/n^2: fourfold when n doubles, with the next order a part in n beneath."""
    f, lam, y, rate, steps = torch.tensor(0.9, dtype=F64), torch.tensor(1.7, dtype=F64), 0.2, 0.2, 30
    errors = []
    for n in (1000, 2000):
        H, dH, ddI, ddII = two_layer_linear_differentials(f, lam, n)
        parts = [value.expand((1,) * 2 * order) for value, order in ((H, 2), (dH, 3), (ddI, 4), (ddII, 4))]
        training = Training(reduction="sum", learning_rate=rate, steps=steps)
        found = train_hierarchy(f.view(1, 1), *parts, [0], torch.full((1, 1), y, dtype=F64), training)
        outputs, ntks = two_layer_linear_map(f, lam, rate, n, steps, target=y)
        frozen = y + (f - y) * (1 - rate * lam) ** torch.arange(steps + 1)
        torch.testing.assert_close(found.z0.flatten(), frozen, rtol=0, atol=1e-14)
        errors.append(
            [
                float((found.z0 + found.z1).flatten().sub(outputs).abs().max()),
                float((lam + found.H1.flatten() - ntks).abs().max()),
            ]
        )
        assert float((found.z0.flatten() - outputs).abs().max()) > 50 * errors[-1][0]
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.02)


def test_one_step_of_the_two_layer_linear_map_is_exact():
    """One step has no feedback: order 1 is the map itself."""
    f, lam, n, rate = torch.tensor(1.3, dtype=F64), torch.tensor(2.0, dtype=F64), 7, 0.3
    H, dH, ddI, ddII = two_layer_linear_differentials(f, lam, n)
    parts = [value.expand((1,) * 2 * order) for value, order in ((H, 2), (dH, 3), (ddI, 4), (ddII, 4))]
    y, training = torch.zeros(1, 1, dtype=F64), Training(reduction="sum", learning_rate=rate, steps=1)
    found = train_hierarchy(f.view(1, 1), *parts, [0], y, training)
    outputs, ntks = two_layer_linear_map(f, lam, rate, n, 1)
    torch.testing.assert_close((found.z0 + found.z1).flatten(), outputs, rtol=0, atol=1e-15)
    torch.testing.assert_close(lam + found.H1.flatten(), ntks, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "options", [dict(momentum=0.9), dict(momentum=0.8, dampening=0.2), dict(momentum=0.7, nesterov=True), {}]
)
def test_coefficients_move_as_torch_moves_parameters(options):
    g = torch.Generator().manual_seed(3)
    gradients = torch.randn(6, 5, dtype=F64, generator=g)
    parameter = torch.zeros(5, dtype=F64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.1, **options)
    coefficients = SGDState(Training(learning_rate=0.1, steps=6, **options), torch.zeros(5, dtype=F64))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        sgd.step()
        coefficients.update(gradient)
    torch.testing.assert_close(coefficients.values[0], parameter.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [dict(momentum=0.9), dict(momentum=0.9, nesterov=True), {}])
def test_stability_bound(options):
    """A single mode: just within the bound it decays, just beyond it grows."""
    optimizer = Training(learning_rate=1.0, steps=1, **options)
    for factor, smaller in ((0.98, True), (1.02, False)):
        rate = factor * optimizer.largest_stable
        training = Training(reduction="sum", learning_rate=rate, steps=400, **options)
        nothing = [torch.zeros((1,) * 2 * order, dtype=F64) for order in (3, 4, 4)]
        one = torch.ones(1, 1, dtype=F64)
        found = train_hierarchy(one, one.view(1, 1, 1, 1), *nothing, [0], 0 * one, training)
        assert (float(found.z0[-20:].abs().max()) < float(found.z0[100:120].abs().max())) == smaller


def test_losses_are_torchs():
    g = torch.Generator().manual_seed(5)
    z, y = torch.randn(2, 4, 3, dtype=F64, generator=g)
    classes = torch.tensor([2, 0, 1, 1])
    leaf = z.clone().requires_grad_()
    for value, loss in (
        (functional.mse_loss(leaf, y), Loss("mse", y)),
        ((leaf - y).square().sum() / 2, Loss("mse", y, "sum")),
        (functional.cross_entropy(leaf, classes), Loss("cross_entropy", classes)),
        (functional.huber_loss(leaf, y), Loss(functional.huber_loss, y)),
    ):
        torch.testing.assert_close(loss.error(z), torch.autograd.grad(value, leaf)[0], rtol=0, atol=1e-15)
    batch = torch.tensor([3, 1])
    expected = torch.zeros_like(z)
    expected[batch] = torch.autograd.grad(functional.mse_loss(leaf[batch], y[batch]), leaf)[0][batch]
    torch.testing.assert_close(Loss("mse", y).error(z, batch), expected, rtol=0, atol=1e-15)


def test_unusable_arguments_are_named():
    tiny = Tiny()
    with pytest.raises(ValueError, match="dynamics: 'gradient_flow' given"):
        tiny.forecast(learning_rate=0.1, steps=5, dynamics="gradient_flow")
    with pytest.raises(ValueError, match="train: 2 samples given for 1 targets"):
        tiny.forecast(learning_rate=0.1, steps=5, y=tiny.y[:1])
    with pytest.raises(ValueError, match=r"batches: \[4\] given"):
        tiny.forecast(learning_rate=0.1, steps=5, batches=[[4]])
    with pytest.raises(ValueError, match=r"dH: .* given; z asks for"):
        H, _, ddI, ddII = tiny.tensors()
        tiny.forecast(tensors=(H, H, ddI, ddII), learning_rate=0.1, steps=5)
    with pytest.raises(ValueError, match=r"memory: .* GiB needed for the differentials of 6 outputs"):
        tiny.forecast(learning_rate=0.1, steps=5, memory=1000)
