"""Forwards that reach their weights by other ways than the module tree; the kernel is that of the live module."""

import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from torch_eft import measure
from torch_eft.measure.forward.isolation import isolated


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel_by_loops(model, x):
    """One sample and one output at a time, on the live module in evaluation mode."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sample in x:
        outputs = model(sample[None])[0]
        rows.append(
            torch.stack(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
                    for value in outputs
                ]
            )
        )
    J = torch.stack(rows)
    return torch.einsum("aip,bjp->abij", J, J)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def replaced_by_a_closure():
    model = base()
    old = model[0].forward
    model[0].forward = lambda x: 1.5 * old(x)
    return model


def replaced_by_a_partial():
    model = base()
    model[0].forward = functools.partial(lambda layer, x: F.linear(x, 2 * layer.weight, layer.bias), model[0])
    return model


def wrapped_as_a_whole():
    model = base()
    inner = model.forward  # its dropout follows the mode of the modules that it calls

    @functools.wraps(inner)
    def forward(x):
        return 2 * inner(x)

    model.forward = forward
    return model


def adapted_by_a_hook():
    model = base()
    model.adapter = nn.Linear(4, 4, bias=False).double()
    model[0].register_forward_hook(lambda module, args, output: output + model.adapter(output).tanh())
    model.forward = lambda x: model[3](model[1](model[0](x)))
    return model


class Listed(nn.Module):
    """Its weights are taken from a list, a dict and a tuple."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.weights = [self.a.weight]
        self.others = {"b": (self.b.weight, self.b.bias)}

    def forward(self, x):
        return F.linear(F.linear(x, self.weights[0], self.a.bias).tanh(), *self.others["b"])


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return checkpoint(lambda h: self.b(h.tanh()).tanh(), self.a(x), use_reentrant=False)


class WithAGradient(nn.Module):
    """An energy model: its output is a force."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 4).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.scale * self.a(x).tanh().square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


WAYS = [
    *(replaced_by_a_closure, replaced_by_a_partial, wrapped_as_a_whole, adapted_by_a_hook),
    *(Listed, Checkpointed, WithAGradient),
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double(),
    lambda: nn.DataParallel(base()),
]


@pytest.mark.parametrize("make", WAYS)
def test_the_kernel_is_that_of_the_live_module(make):
    model, x = make().train(), randn(3, 3)
    with parametrize.cached():  # as some trainings surround their steps
        found = measure.ntk(model, x)
    torch.testing.assert_close(found, kernel_by_loops(model, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", WAYS)
def test_other_parameters_take_every_way_too(make):
    model, x = make().eval(), randn(3, 3)
    theta = {name: value.detach() + 0.1 * randn(1, *value.shape)[0] for name, value in model.named_parameters()}
    with isolated(model) as network:
        moved = network.at(theta)
        found, outputs = measure.ntk(moved, x), measure.output(moved, x)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(theta[name])
    torch.testing.assert_close(found, kernel_by_loops(model, x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(outputs, model(x))


def test_a_trainable_tensor_from_outside_is_refused():
    outside = nn.Linear(3, 3).double()
    model = base()
    model[0].register_forward_pre_hook(lambda module, args: outside(args[0]))
    with pytest.raises(ValueError, match=r"not among its parameters.*register it"):
        measure.ntk(model, randn(3, 3))
    with pytest.raises(ValueError, match="not among its parameters"):  # without gradients, too
        measure.output(model, randn(3, 3))
    outside.requires_grad_(False)
    torch.testing.assert_close(measure.ntk(model, randn(3, 3)), kernel_by_loops(model, randn(3, 3)))


def test_memory_of_a_parameter_follows_it_without_its_gradient():
    class Gated(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.constant = self.layer.weight.data[:part]

        def forward(self, x):
            return self.layer(x) * self.constant.sum()

    model, x = Gated(3), randn(2, 3)
    torch.testing.assert_close(measure.ntk(model, x), kernel_by_loops(model, x))
    with isolated(model) as network:
        doubled = network.at({"layer.weight": 2 * model.layer.weight, "layer.bias": model.layer.bias})
        found = measure.output(doubled, x)
    with torch.no_grad():
        model.layer.weight.mul_(2)
    torch.testing.assert_close(found, model(x))
    with pytest.raises(ValueError, match=r"a part of the memory of 'layer.weight'"):
        measure.output(Gated(2), x)


def test_an_activation_of_an_earlier_forward_is_refused():
    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(3, 2).double(), None

        def forward(self, x):
            last, self.last = self.last, self.layer(x)
            return self.last if last is None else self.last + last.sum()

    model, x = Delayed(), randn(2, 3)
    model(x)
    with pytest.raises(ValueError, match="kept by an earlier forward"):
        measure.output(model, x)


class Islands(nn.Module):
    """Casts to less than its precision on the way."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), way

    def forward(self, x):
        return self.b(self.way(self.a(x)))


@torch.autocast("cpu", dtype=torch.bfloat16)
def under_autocast(h):
    return (h @ torch.eye(4, dtype=h.dtype)).tanh().double()


@pytest.mark.parametrize(
    "way",
    [
        lambda h: h.float().tanh().to(h.dtype),
        lambda h: h.softmax(-1, dtype=torch.float32).type_as(h),
        lambda h: F.softmax(h, -1, dtype=torch.float32).double(),
        under_autocast,
    ],
)
def test_one_precision_throughout(way):
    """Islands of less precision only add rounding: the kernel is that of the same function without them."""
    smooth = torch.tanh if "softmax" not in way.__code__.co_names else lambda h: h.softmax(-1)
    found = measure.ntk(Islands(way), randn(3, 3))
    torch.testing.assert_close(found, kernel_by_loops(Islands(smooth), randn(3, 3)), rtol=1e-12, atol=1e-13)


def test_a_module_of_two_precisions_is_measured_in_the_finer_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.b(self.a(x.float()).tanh().double())

    model, x = Two(), randn(3, 3)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain.load_state_dict({f"{2 * 'ab'.index(name[0])}{name[1:]}": value for name, value in model.state_dict().items()})
    torch.testing.assert_close(measure.ntk(model, x), kernel_by_loops(plain, x), rtol=1e-12, atol=1e-13)


def test_half_precision_with_casts_of_its_own():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2).bfloat16()

        def forward(self, x):
            return self.layer(x.to(torch.bfloat16)).tanh()

    model = Half()
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    plain[0].load_state_dict(model.layer.state_dict())
    x = randn(3, 3).float()
    torch.testing.assert_close(measure.ntk(model, x).double(), kernel_by_loops(plain, x.double()), rtol=1e-5, atol=1e-6)


def test_gradients_switched_off_by_the_mode_are_refused():
    class Switched(nn.Module):
        def __init__(self, always):
            super().__init__()
            self.body, self.head, self.always = nn.Linear(3, 3), nn.Linear(3, 2), always

        def forward(self, x):
            with torch.set_grad_enabled(self.training and not self.always):
                x = self.body(x)
            return self.head(x)

    with pytest.raises(ValueError, match=r"'body\.\w+', which is trained, with gradients off in evaluation mode"):
        measure.ntk(Switched(False), torch.randn(2, 3))
    H = measure.ntk(Switched(True), torch.randn(2, 3))  # a frozen body, in training as well
    assert bool(H.isfinite().all())

    class Off(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match=r"with gradients off \(torch.no_grad\)"):
        measure.ntk(Off(3, 2), torch.randn(2, 3))


def test_data_held_by_the_module_are_not_copied():
    model = base()
    model.rows, model.table = [[i] for i in range(5000)], torch.zeros(2**19)
    model.data = torch.utils.data.TensorDataset(torch.zeros(10))
    with isolated(model) as network:
        assert network.shadow.rows is not model.rows and network.shadow.rows[7] is model.rows[7]
        assert network.shadow.table is model.table and network.shadow.data is model.data


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, functools.partial(nn.EmbeddingBag, mode="sum")])
def test_sparse_gradients_are_those_of_the_same_table(kind, sparse):
    def make(sparse):
        torch.manual_seed(0)
        return nn.Sequential(kind(7, 3, sparse=sparse), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()

    x = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
    model, reference = make(sparse), make(False)
    model(x), reference(x)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(measure.ntk(model, x), kernel_by_loops(reference, x), rtol=1e-12, atol=1e-13)
    e = randn(3, 2)
    vjp = measure.ntk_vjp(model, x, e)
    gradients = torch.autograd.grad((reference(x) * e).sum(), list(reference.parameters()))
    torch.testing.assert_close(list(vjp.values()), list(gradients))


def test_generators_are_left_where_they_were():
    drawn, own = random.Random(0), torch.Generator().manual_seed(0)

    class Drawing(nn.Linear):
        def forward(self, x):
            drawn.random(), torch.rand(1, generator=own)
            return super().forward(x)

    states = drawn.getstate(), own.get_state()
    measure.output(Drawing(3, 2), torch.ones(2, 3))
    assert drawn.getstate() == states[0] and torch.equal(own.get_state(), states[1])


class Remembering(nn.Module):
    """Keeps what it has computed from its weights wherever it can, and counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight, self.kept = nn.Linear(3, 2).double(), None, {}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.weight = 2 * self.layer.weight if self.weight is None else self.weight
        self.kept.setdefault("bias", 3 * self.layer.bias)
        self.calls += 1
        return (x @ self.weight.T + self.kept["bias"]) * self.calls


def test_every_forward_starts_from_the_same_state():
    model, x = Remembering(), randn(3, 3)
    theta = {name: 2 * value.detach() for name, value in model.named_parameters()}
    with isolated(model) as network:
        first, moved, again = (measure.output(part, x) for part in (network, network.at(theta), network))
        H = measure.ntk(network.at(theta), x)
    expected = x @ (2 * model.layer.weight).T + 3 * model.layer.bias
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(moved, 2 * expected)
    assert torch.equal(first, again)
    assert (float(model.calls), model.weight, model.kept) == (0, None, {})
    diagonal = 4 * x @ x.T + 9
    torch.testing.assert_close(H, diagonal[:, :, None, None] * torch.eye(2, dtype=x.dtype))


class Energetic(nn.Linear):
    def forward(self, x):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            z = super().forward(y).tanh()
            return torch.autograd.grad(z.square().sum(), y, create_graph=True)[0] + z.sum(1, keepdim=True)


def test_leaves_that_a_forward_makes_are_its_own():
    torch.manual_seed(0)
    model, x = Energetic(3, 2).double(), randn(3, 3)
    torch.testing.assert_close(measure.output(model, x), model(x))
    torch.testing.assert_close(measure.ntk(model, x), kernel_by_loops(model, x), rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_parts_are_copied_with_their_parameters():
    torch.manual_seed(0)
    part = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double())
    model, x = nn.Sequential(nn.Linear(3, 4).double(), part, nn.Linear(4, 2).double()), randn(3, 3)
    weight = part[0].weight
    before = weight.detach().clone(), weight.data_ptr(), weight._version
    theta = {name: value.detach() + 0.1 for name, value in model.named_parameters()}
    with isolated(model) as network:
        H = measure.ntk(network.at(theta), x)
    weight = part[0].weight
    assert torch.equal(weight, before[0]) and (weight.data_ptr(), weight._version) == before[1:]
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(theta[name])
    torch.testing.assert_close(H, kernel_by_loops(model, x), rtol=1e-12, atol=1e-13)


class Counting(nn.Module):
    """Its buffer may be another module's, too, and counts how often either was called."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(randn(3, 3))
        self.register_buffer("count", count)

    def forward(self, x):
        with torch.no_grad():
            self.count.add_(1)
        return torch.tanh(x @ self.weight) * self.count.clone()


@pytest.mark.parametrize("tied", [False, True])
def test_buffers_under_two_names_stay_one_and_every_forward_starts_from_them(tied):
    count = torch.ones(3, dtype=torch.float64)
    model = nn.Sequential(Counting(count), Counting(count if tied else count.clone()))
    x = randn(2, 3, seed=1)

    def restarted(module, args):
        for buffer in module.buffers():
            buffer.fill_(1)

    handle = model.register_forward_pre_hook(restarted)
    expected = kernel_by_loops(model, x)
    restarted(model, ())
    handle.remove()
    torch.testing.assert_close(measure.ntk(model, x, memory=2000), expected)  # in blocks
    torch.testing.assert_close(measure.ntk(model, x), expected)
    assert all(bool((buffer == 1).all()) for buffer in model.buffers())
