"""Measured by several processes together: the same numbers as by one, and a failure of one is a failure of all."""

import warnings

import pytest
import torch
from torch import nn

from tests.reliability.processes import spread
from torch_eft import measure
from torch_eft.measure.network.ranks import PeerError, Ranks
from torch_eft.measure.network.sharded import full_copy, sharded_ntk, sharded_snapshot

pytestmark = pytest.mark.reliability


class Tied(nn.Module):
    """Tokens, a tied matrix and a parameter whose use is not recognized."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.register_buffer("seen", torch.tensor(True))

    def forward(self, x):
        z = self.embedding((x[:, :4].abs() * 3).long().clamp_max(6)).mean(1) @ self.embedding.weight.T
        return torch.cat([z[:, :2] * self.scale.prod(), z[:, 2:3]], 1)


def network(name):
    torch.manual_seed(0)
    if name == "batch norm, dense":
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    elif name == "batch norm, convolution":
        net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
        )
    else:
        net = Tied()
    return net.double()


def inputs(count):
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


NETWORKS = ["batch norm, dense", "batch norm, convolution", "tokens, tied, unrecognized use"]
COUNTS = [1, 7, 8]
PLAN = measure.Plan(ntk=True, hidden=True)
TIMEOUT = 137  # seconds, that of the process group


def cases(rank):
    """Networks by numbers of samples, measured together."""
    found = {}
    for name in NETWORKS:
        net = network(name)
        net.train()
        for _ in range(1 + rank):  # running statistics that differ between the ranks
            if "norm" in name:
                net(inputs(8) * (1 + rank) + rank)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        for count in COUNTS:
            snapshot = sharded_snapshot(net, measure.Probe(inputs(count)), PLAN)
            small = sharded_ntk(net, inputs(count), memory=_little(net, count))
            traced = sharded_ntk(net, inputs(count), trace=True)
            values = (snapshot.output, snapshot.ntk, small, traced, *snapshot.hidden.values())
            found[name, count] = [value.numpy() for value in values]
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    return found


def _little(net, count):
    """Memory in which the factors of all samples do not fit."""
    estimate = measure.ntk_estimate(net, inputs(count))
    return estimate.total if count < 3 else estimate.kernels + 4 * estimate.sample


def everything(rank):
    """All of two processes, for importing torch in each takes longer than the work."""
    return cases(rank), sharded_parameters(rank), failing(rank)


@pytest.fixture(scope="module")
def two():
    """What each of two processes found: cases, sharded parameters, failures."""
    return list(zip(*spread(2, everything, seconds=TIMEOUT), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_kernel_is_that_of_one_process(size, request):
    found = request.getfixturevalue("two")[0] if size == 2 else spread(size, cases)
    for name in NETWORKS:
        net = network(name)
        if "norm" in name:
            net.train()(inputs(8))  # rank 0's running statistics
        for count in COUNTS:
            alone = measure.take_snapshot(net, measure.Probe(inputs(count)), PLAN)
            trace = measure.ntk(net, inputs(count), trace=True)
            expected = (alone.output, alone.ntk, alone.ntk, trace, *alone.hidden.values())
            for rank in range(size):
                for value, wanted in zip(found[rank][name, count], expected, strict=True):
                    assert value.shape == wanted.shape
                    error = (torch.from_numpy(value) - wanted).norm() / wanted.norm()
                    assert error <= 1e-12, (name, count, rank)


def failing(rank):
    """Return what each rank says after mistakes of rank 1; after each, both measure."""
    said = []
    net = network("batch norm, dense")

    def tried(action):
        try:
            action()
            said.append("measured")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    def output_fn(z):
        if rank == 1:
            raise OSError("no such luck")
        return z

    tried(lambda: sharded_snapshot(net, measure.Probe(inputs(5)), PLAN, lambdas=None, output_fn=output_fn))
    frozen = network("batch norm, dense")
    if rank == 1:
        frozen[0].weight.data[0, 0] = float("nan")
    tried(lambda: sharded_ntk(frozen, inputs(5)))
    other = network("batch norm, dense")
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-9 * rank
    tried(lambda: sharded_ntk(other, inputs(5)))
    tried(lambda: sharded_ntk(net, inputs(5 + rank)))
    lazy = nn.Sequential(nn.LazyLinear(3)) if rank == 1 else nn.Sequential(nn.Linear(6, 3).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried(lambda: sharded_ntk(lazy, inputs(5)))
    tried(lambda: sharded_ntk(net, inputs(5)))
    said.append(Ranks().timeout)
    return said


def test_a_failure_on_one_rank_is_one_on_all_and_nobody_waits(two):
    first, second = two[2]
    assert first[0].startswith("PeerError: rank 1 failed")
    assert "no such luck" in second[0]
    assert all("'0.weight'" in said[1] and "differs between the ranks" in said[1] for said in (first, second))
    assert first[2] == second[2] and "the parameter '0.weight' (its norm) differs between the ranks" in first[2]
    assert first[3] == second[3] and "of the probe (its norm) differs" in first[3]
    assert first[4].startswith("PeerError") and "not initialized yet" in second[4]
    assert first[5] == second[5] == "measured"
    assert first[6] == second[6] == TIMEOUT


def test_without_a_process_group_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"no process group; call torch.distributed.init_process_group"):
        sharded_ntk(network("batch norm, dense"), inputs(3))
    assert issubclass(PeerError, RuntimeError)


def sharded_parameters(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network("batch norm, dense")
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    said = []
    for action in (lambda: measure.ntk(net, inputs(5)), lambda: sharded_ntk(net, inputs(5))):
        try:
            action()
        except Exception as error:
            said.append(str(error))
    wrong = nn.Linear(6, 3).double()
    for twin in (wrong, wrong if rank == 1 else network("batch norm, dense")):
        try:
            full_copy(net, twin)
        except (ValueError, PeerError) as error:
            said.append(str(error))
    twin = full_copy(net, nn.Sequential(*[type(m)(*_like(m)) for m in network("batch norm, dense")]).double())
    return said, sharded_ntk(twin, inputs(5)).numpy(), measure.ntk(twin, inputs(5)).numpy()


def _like(module):
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.num_features,) if isinstance(module, nn.BatchNorm1d) else ()


def test_sharded_parameters_are_refused_or_measured_by_a_plain_twin(two):
    expected = measure.ntk(network("batch norm, dense"), inputs(5))
    found = two[1]
    for said, _, _ in found:
        assert "is sharded over processes (FSDP, DTensor)" in said[0] and "full_copy" in said[0]
        assert said[0] == said[1]
        assert "'0.bias' is (8,) in the model and missing in the unsharded one" in said[2]
    (first, _, _), (second, _, _) = found
    assert first[3] == "rank 1 failed (its own message says why); all ranks skip the measurement with it"
    assert "'0.bias' is (8,) in the model and missing in the unsharded one" in second[3]
    for _, together, alone in found:
        for H in (together, alone):
            assert (torch.from_numpy(H) - expected).norm() <= 1e-12 * expected.norm()
