"""Whatever a forward or a hook writes to, a measurement leaves it as it was; hooks that only look do not run."""

import array
import collections
import dataclasses
import functools
import types

import numpy
import pytest
import torch
from torch import nn

from torch_eft import measure
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.isolation.hooks import only_looks
from torch_eft.measure.forward.isolation.live import LiveWriteError, live

SEEN, COUNTS = [], {"calls": 0}
TOTAL = 0


def measure_everything(model, x):
    measure.take_snapshot(model, x, measure.Plan(ntk=True, hidden=True))
    measure.output(model, x)
    measure.coverage(model, x)


def tokens():
    return torch.tensor([[0, 1, 2], [3, 4, 5]])


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Replaced(nn.Linear):
    def forward(self, x):
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return super().forward(x)


class Averaged(nn.Linear):
    """Writes to a tensor that is no buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.average = torch.zeros(3)

    def forward(self, x):
        self.average.mul_(0.9).add_(x.detach().mean(0))
        return super().forward(x)


def embedded(table, width):
    return nn.Sequential(table, nn.Flatten(), nn.Linear(width, 2)), tokens()


@pytest.mark.parametrize(
    "make",
    [
        lambda: embedded(nn.Embedding(6, 4, max_norm=0.1), 12),
        lambda: embedded(nn.EmbeddingBag(6, 4, max_norm=0.1), 4),
        lambda: (Clamped(3, 2), torch.randn(2, 3)),
        lambda: (Replaced(3, 2), torch.randn(2, 3)),
        lambda: (Averaged(3, 2), torch.randn(2, 3)),
    ],
)
def test_what_a_forward_writes_does_not_reach_the_training(make):
    torch.manual_seed(0)
    model, x = make()
    tensors = [*model.parameters(), *[value for value in vars(model).values() if isinstance(value, torch.Tensor)]]
    before = [(t, t.detach().clone(), t._version, t.data_ptr()) for t in tensors]
    measure_everything(model, x)
    for tensor, value, version, place in before:
        assert torch.equal(tensor, value) and tensor._version == version and tensor.data_ptr() == place
    written = model[0].weight if isinstance(model, nn.Sequential) else next(iter(model.parameters()))
    model(x)  # does write
    assert isinstance(model, Averaged) or not torch.equal(written, before[0][1])


def test_large_tensors_are_shared_and_not_written_to():
    class Cached(nn.Linear):
        def forward(self, x):
            self.cache[: len(x)].copy_(x)
            return super().forward(self.cache[: len(x)])

    model, x = Cached(3, 2), torch.ones(2, 3)
    for rows, refused in ((10, False), (10**5, True)):
        model.cache = torch.zeros(rows, 3)
        if refused:
            with pytest.raises(ValueError, match=r"writes to 'cache' in place.*register_buffer"):
                measure.output(model, x)
        else:
            torch.testing.assert_close(measure.output(model, x), nn.Linear.forward(model, x))
        assert not model.cache.any() and model.cache._version == 0


class Counting(nn.Module):
    """Counts its calls everywhere a program can."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer, self.history = nn.Linear(3, 2), []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        global TOTAL
        TOTAL += 1
        Counting.calls += 1
        self.count += 1
        self.history.append(x)
        COUNTS["calls"] += 1
        return self.helped(x)

    def helped(self, x):
        SEEN.append(x)
        return self.layer(x)


def counted():
    return TOTAL, Counting.calls, COUNTS["calls"], len(SEEN)


def test_counters_are_put_back():
    model, x = Counting(), torch.randn(2, 3)
    model(x)
    before = counted()
    assert min(before) == 1
    measure_everything(model, x)
    with isolated(model) as network, live(network) as run:
        run(x)
    assert counted() == before
    assert float(model.count) == len(model.history) == 1


@dataclasses.dataclass(slots=True)
class Count:
    n: int = 0


def _count(holder):
    holder.n += 1
    return holder.n


def _add(numbers):
    numbers[0] += 1
    return numbers[0]


@pytest.mark.parametrize(
    ("make", "advance", "read"),
    [
        (Count, _count, lambda holder: holder.n),
        (lambda: types.SimpleNamespace(n=0), _count, lambda holder: holder.n),
        (lambda: numpy.zeros(3), _add, lambda numbers: numbers[0]),
        (lambda: numpy.zeros(2**18 + 1), _add, lambda numbers: numbers[0]),
        (lambda: bytearray(3), _add, lambda numbers: numbers[0]),
        (lambda: array.array("d", [0.0]), _add, lambda numbers: numbers[0]),
        (lambda: numpy.random.RandomState(0), lambda r: r.rand(), lambda r: r.get_state()[2]),
    ],
    ids=["slots", "namespace", "numbers", "many numbers", "bytes", "array", "random state"],
)
def test_values_of_other_kinds_are_put_back(make, advance, read):
    """In evaluation mode they are advanced, too, but change nothing: no output tells."""

    class Counting(nn.Linear):
        def forward(self, x):
            advanced = advance(self.held)
            return super().forward(x) + (advanced if self.training else 0)

    model, x = Counting(3, 2), torch.randn(4, 3)
    model.held = make()
    before = read(model.held)
    try:
        measure_everything(model, x)
    except ValueError as error:
        assert "read-only" in str(error)  # what is too large to be kept is refused
    assert read(model.held) == before
    model(x)
    assert read(model.held) != before


def test_modules_that_a_forward_reaches_elsewhere_are_left_alone():
    other = nn.BatchNorm1d(3).requires_grad_(False).train()

    class Normalized(nn.Linear):
        def forward(self, x):
            return super().forward(other(x))

    model, x = Normalized(3, 2), torch.randn(4, 3)
    measure.output(model, x)
    assert not other.running_mean.any() and int(other.num_batches_tracked) == 0 and other.training


class Recorder:
    def __init__(self):
        self.values, self.latest, self.calls = collections.deque(maxlen=5), {}, 0

    def __call__(self, module, args, output):
        self.calls += 1
        self.latest["mean"] = output.mean()
        self.values.append(output)

    def before(self, module, args):
        self.calls += 1


def closure_with_a_counter():
    calls, kept = 0, []

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        kept.append(output)

    return hook, lambda: (calls, len(kept))


def doubling(module, args, output, factor=2.0):
    SEEN.append(output)
    return factor * output


def test_hooks_do_not_see_the_probe_but_change_what_they_change():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(3, 3).double()
    expected = measure.ntk(model, x)
    recorder, (hook, state) = Recorder(), closure_with_a_counter()
    model[1].register_forward_hook(recorder)
    model[0].register_forward_pre_hook(recorder.before)
    model[1].register_forward_hook(hook)
    model[1].register_forward_hook(lambda module, args, output: SEEN.append(output))
    model[1].register_full_backward_hook(lambda module, *gradients: SEEN.append(gradients))
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: SEEN.append(output))
    SEEN.clear()
    try:
        assert torch.equal(measure.ntk(model, x), expected)
        measure_everything(model, x)
        assert (recorder.calls, len(recorder.values), recorder.latest, state(), SEEN) == (0, 0, {}, (0, 0), [])
        model[2].register_forward_hook(functools.partial(doubling, factor=3.0))
        torch.testing.assert_close(measure.ntk(model, x), 9 * expected)
        assert SEEN == []
    finally:
        everywhere.remove()


def scales_in_place(module, args, output):
    output.mul_(2)


def sets_an_attribute(module, args, output):
    module.last = output


def fills(module, args, output):
    output[:, 0] = 0


def reports(module, args, output):
    if output.isnan().any():
        print("NaN")


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (Recorder(), True),
        (Recorder().before, True),
        (reports, True),
        (functools.partial(reports), True),
        (lambda module, args, output: SEEN.append(output.detach()), True),
        (lambda module, args, output: print(output.shape), True),
        (lambda module, args, output: None, True),
        (lambda module, args, output: SEEN.append(output) or 2 * output, False),
        (lambda module, args, output: doubling(module, args, SEEN.append(output)), False),
        (lambda module, args, output: output.relu(), False),
        (doubling, False),
        (functools.partial(doubling, factor=2.0), False),
        (scales_in_place, False),
        (sets_an_attribute, False),
        (fills, False),
        (nn.Tanh(), False),
    ],
)
def test_hooks_that_only_look_are_told_apart(hook, expected):
    assert only_looks(hook) == expected


def test_the_live_module_is_stopped_before_it_writes():
    torch.manual_seed(0)
    for model, x in ((nn.Embedding(6, 4, max_norm=0.1), tokens()), (Clamped(3, 2), torch.randn(2, 3))):
        before, version = model.weight.detach().clone(), model.weight._version
        refused = pytest.raises(LiveWriteError, match="writes to 'weight' in place")
        with isolated(model, lambda z: z.flatten(1)) as network, refused, live(network) as run:
            run(x)
        assert torch.equal(model.weight, before) and model.weight._version == version


def test_the_live_module_gives_its_own_gradients_and_is_left_alone():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(Counting(), nn.BatchNorm1d(2), nn.Dropout(), nn.Tanh()).double(),
        torch.randn(3, 3).double(),
    )
    model[1].eval()
    model[0].layer.weight.register_hook(lambda gradient: SEEN.append(gradient))
    model[3].register_full_backward_hook(lambda module, *gradients: (gradients[0][0] * 5,))
    state = {name: (value, value._version) for name, value in model.state_dict(keep_vars=True).items()}
    modes, before = [part.training for part in model.modules()], counted()
    with isolated(model) as network, live(network) as run:
        gradients = torch.autograd.grad(run(x).sum(), list(model.parameters()))
    model.eval()
    expected = torch.autograd.grad(network.origin[3].forward(model[:3](x)).sum(), list(model.parameters()))
    torch.testing.assert_close(gradients, expected)
    assert [part.training for part in [*model.modules()]] == [False] * len(modes)
    assert counted()[:3] == tuple(1 + count for count in before[:3])  # the one for what was expected
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is state[name][0]
        assert name.endswith("count") or value._version == state[name][1]


def test_the_live_module_has_its_own_buffers_and_hooks_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    kept = [(vars(part), dict(vars(part)), dict(part._buffers)) for part in model.modules()]
    measure.ntk(model, torch.randn(3, 3))
    for own, before, buffers in kept:
        assert own.keys() == before.keys() and all(own[name] is value for name, value in before.items())
        assert all(own["_buffers"][name] is buffer for name, buffer in buffers.items())
