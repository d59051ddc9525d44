"""BatchNorm with the statistics of a batch: what does not move does not drift, and the derivatives are those of it."""

import torch
from torch import nn

import torch_eft as eft
from torch_eft import measure
from torch_eft.live import Observer
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh(),
        nn.Linear(5, 2),
    )  # fmt: skip


def inputs(count=6):
    return 3 + 2 * torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def test_kernels_are_those_with_the_batchs_own_statistics():
    """By hand: a copy whose running statistics are set layer by layer, differentiated row by row."""
    model, x = normed().double(), inputs().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with isolated(model) as network:
        H = measure.ntk(with_batch_statistics(network, Probe(x), batch_norms(model)), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    in_training = model(x).detach()
    h = x
    for layer in model.eval():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            axes = [axis for axis in range(h.ndim) if axis != 1]
            layer.running_mean, layer.running_var = h.mean(axes).detach(), h.var(axes, correction=0).detach()
        h = layer(h)
    torch.testing.assert_close(h.detach(), in_training)
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = (J @ J.T).reshape(6, 2, 6, 2).permute(0, 2, 1, 3)
    torch.testing.assert_close(H, expected, rtol=1e-10, atol=1e-12)


def test_nothing_drifts_while_no_parameter_moves():
    model, x = normed(), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    observer = Observer(model, x, optimizer, preset="light", budget=None, every=1, on_error="raise")
    observer.begin()
    start = model[1].running_mean.clone()
    for step in (1, 2):
        model(inputs(16) + step).square().mean().backward()
        optimizer.step()
        seen = observer.measure(step)
        assert seen["eft/ntk_drift/measured"] == seen["eft/representation_change/measured"] == 0
    assert not torch.equal(model[1].running_mean, start)  # which are what the training left
    observer.finish()


def test_layers_that_training_does_not_update_keep_their_statistics():
    model = normed()
    model[1].eval()
    model[5] = nn.BatchNorm1d(5, track_running_stats=False)
    assert batch_norms(model) == ()
    with isolated(model.eval()) as network:
        assert with_batch_statistics(network, Probe(inputs()), batch_norms(model)) is network


def test_layers_that_share_their_statistics_have_the_mean_of_theirs():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model[3].running_mean, model[3].running_var = model[1].running_mean, model[1].running_var
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with isolated(model) as network:
        H = measure.ntk(with_batch_statistics(network, Probe(x), batch_norms(model)), x)
    first = model[0](x).detach()
    second = torch.tanh((first - first.mean(0)) / (first.var(0, correction=0) + model[1].eps).sqrt())
    with torch.no_grad():
        model[1].running_mean.copy_((first.mean(0) + second.mean(0)) / 2)
        model[1].running_var.copy_((first.var(0, correction=0) + second.var(0, correction=0)) / 2)
    torch.testing.assert_close(H, measure.ntk(model, x))


def test_one_sample_has_no_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with isolated(model) as network:
        assert with_batch_statistics(network, Probe(torch.ones(1, 3)), batch_norms(model)) is network
        assert not any(part.training for part in network.shadow.modules())


def test_the_diagnosis_takes_the_statistics_of_its_inputs():
    """Inputs of another scale make no difference behind a normalization."""
    model, x = normed(), inputs(8)
    first, second = (eft.diagnose(model, scale * x, num_networks=3) for scale in (1.0, 1e3))
    assert abs(second.output_scale / first.output_scale - 1) < 0.05
    assert any("statistics of the 8 inputs" in remark for remark in first.remarks)
