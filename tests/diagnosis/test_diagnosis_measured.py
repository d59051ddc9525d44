"""The diagnosis of networks that are no MLP: what is measured, against what is known of it."""

import json

import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.oracles.models import ConvNet, Recurrent
from torch_eft.diagnosis import MeasuredDiagnosis
from torch_eft.measure import as_matrix, ntk, top_eigenvalue
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics


def images(count=5):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def narrow(depth, gain):
    layers = [nn.Conv2d(1, 6, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 2))
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            draw(layer, gain)
    return model


def draw(layer, gain):
    nn.init.normal_(layer.weight, std=(gain / layer.weight[0].numel()) ** 0.5)
    nn.init.zeros_(layer.bias)


def test_step_size_and_shares_are_those_of_the_ntk():
    torch.manual_seed(0)
    model, x = ConvNet(), images()
    found = eft.diagnose(model, x, num_networks=3)
    assert isinstance(found, MeasuredDiagnosis)
    with isolated(model) as network:
        network = with_batch_statistics(network, Probe(x), batch_norms(model))
        H = ntk(network, x)
        head = {name: float(name.startswith("head")) for name in network.params}
        head, whole = ntk(network, x[:4], lambdas=head, trace=True), ntk(network, x[:4], trace=True)
    assert found.lambda_max == pytest.approx(float(top_eigenvalue(H)), rel=1e-3)
    assert found.largest_learning_rate == pytest.approx(len(as_matrix(H)) / found.lambda_max)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["head"] == pytest.approx(float(head.trace() / whole.trace()), rel=1e-5)


def test_the_result_is_json_and_the_model_untouched():
    torch.manual_seed(0)
    model = Recurrent().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = eft.diagnose(model, torch.randn(4, 5, 3), num_networks=4)
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["kind"] == "measured"
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.details.count("measured") > 5


def biased(module, gain):
    for layer in module:
        if hasattr(layer, "weight"):
            draw(layer, gain)
            nn.init.normal_(layer.bias, std=0.3)


@pytest.mark.parametrize(
    ("depth", "gain", "code"), [(10, 0.4, "gradients vanish"), (4, 0.4, ""), (6, 8.0, "gradients explode")]
)  # ReLU is critical at 2
def test_vanishing_and_exploding_gradients_are_found(depth, gain, code):
    """Small gradients alone are no fault: the shallow network trains."""
    torch.manual_seed(0)
    model = narrow(depth, gain)
    biased(model, gain)
    found = eft.diagnose(model, images(), num_networks=6, initialize=lambda m: biased(m, gain))
    assert {"gradients vanish", "gradients explode"} & {finding.code for finding in found.warnings} == {code} - {""}
    assert (found.gradient_growth < 0.1) == (gain < 2)
    if code:
        assert found.status == 1
        assert "residual connections" in found.advice[0] and "a normalization" in found.advice[0]


def test_what_the_network_has_is_not_advised_and_silent_branches_are_no_fault():
    class Block(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.norm, self.inner, self.outer = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
            draw(self.outer, gain)
            draw(self.inner, 2.0)

        def forward(self, x):
            return x + self.outer(self.inner(self.norm(x)).relu())

    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 16), *[Block(60.0) for _ in range(4)], nn.Linear(16, 2))
    found = eft.diagnose(model, x, num_networks=0)
    assert "gradients explode" in {finding.code for finding in found.warnings}
    assert not any("normalization" in sentence or "residual" in sentence for sentence in found.advice)
    model = nn.Sequential(nn.Linear(8, 16), *[Block(0.0) for _ in range(4)], nn.Linear(16, 2))
    found = eft.diagnose(model, x, num_networks=0)
    assert "frozen layer" not in {finding.code for finding in found.warnings}
    assert any("no gradient at the start reaches" in remark for remark in found.remarks)


def pooled(size, gain, depth=6, width=16):
    """A CNN that is critical at gain 2 (ReLU), with global average pooling."""
    layers = []
    for index in range(depth):
        layers += [nn.Conv2d(width if index else 1, width, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AvgPool2d(size), nn.Flatten(), nn.Linear(width, 2))
    initialize(model, gain)
    return model, torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(0))


def initialize(module, gain=2.0):
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            draw(part, gain)


@pytest.mark.parametrize("size", [4, 12])
def test_pixels_that_are_averaged_are_not_taken_for_depth(size):
    """He et al. 2015: every layer keeps the sum of squares; the average over P pixels divides it by P, at any depth."""
    torch.manual_seed(0)
    model, x = pooled(size, 2.0)
    found = eft.diagnose(model, x, num_networks=4, initialize=initialize)
    assert "keep their size" in found.gradients
    # Six layers of width 16: each ratio of a network scatters by about sqrt(5 / 16), here over 4 networks.
    assert abs(torch.tensor(found.gradient_growth).log()) < 3 * (6 * 5 / 16 / 4) ** 0.5
    assert all(abs(block.chi - 1) < 0.5 for block in found.blocks[:-1])
    plain = found.blocks[0].gradient / found.blocks[-1].gradient
    assert plain == pytest.approx(1 / size**2, rel=1.0)
    assert any("averaging over positions" in remark for remark in found.remarks)


def test_depth_shows_behind_an_average_all_the_same():
    torch.manual_seed(0)
    model, x = pooled(4, 0.7)
    found = eft.diagnose(model, x, num_networks=3, initialize=lambda module: initialize(module, 0.7))
    assert found.gradient_growth == pytest.approx((0.7 / 2) ** 6, rel=1.0)  # 0.7 / 2 for each layer from the second
    assert "gradients shrink" in found.gradients


def test_a_mean_over_tokens_is_an_average_and_one_token_is_none():
    class Tokens(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 2)
            self.mean = mean

        def forward(self, x):
            h = self.second(self.first(x).relu()).relu()
            return self.head(h.mean(1) if self.mean else h[:, 0])

    torch.manual_seed(0)
    x, growth = torch.randn(3, 40, 6), {}
    for mean in (True, False):
        found = eft.diagnose(Tokens(mean), x, num_networks=4, initialize=initialize)
        growth[mean] = found.gradient_growth
        assert any("averaging over positions" in remark for remark in found.remarks) == mean
    assert growth[True] == pytest.approx(growth[False], rel=1.0)


def test_deep_and_narrow_networks_have_a_large_effective_epsilon():
    torch.manual_seed(0)

    def initialize(module):
        for part in module:
            if hasattr(part, "weight"):
                draw(part, 2.0)

    deep = eft.diagnose(narrow(10, 2.0), images(), num_networks=24, initialize=initialize)
    shallow = eft.diagnose(narrow(1, 2.0), images(), num_networks=24, initialize=initialize)
    # A sample variance of 24 logarithms is good to sqrt(2 / 23) = 0.29.
    assert deep.ntk_log_variance * (1 - 2 * 0.29) > shallow.ntk_log_variance * (1 + 2 * 0.29)
    assert {"edge", "spread", "too deep"} & {finding.code for finding in deep.warnings}


def test_dead_networks_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = eft.diagnose(model, images(), num_networks=0)
    assert found.gradient_growth == 0
    assert "in 1 of 1 networks no gradient reaches the first place" in found.details
    assert found.verdict == "dead: no gradient reaches the first layers"


def test_a_frozen_layer_is_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        model[3].weight.mul_(1e-3)
    found = eft.diagnose(model, images(), num_networks=0)
    assert "frozen layer" in {finding.code for finding in found.warnings}
    assert "'0' makes" in found.details


def test_gradients_in_front_of_batch_norm_are_not_judged():
    """The outputs do not depend on the size of weights there, and the gradients grow as they shrink."""

    def found(gain):
        torch.manual_seed(0)
        normed = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh()]
        model = nn.Sequential(*normed, nn.Flatten(), nn.Linear(96, 2))
        draw(model[0], gain)
        return eft.diagnose(model, images(), num_networks=0)

    small, large = found(0.01), found(1.0)
    assert small.gradient_growth > 50 * large.gradient_growth
    assert small.output_scale == pytest.approx(large.output_scale, rel=0.01)
    assert not any(finding.code == "gradients explode" for finding in (*small.warnings, *large.warnings))
    assert (
        "not judged: BatchNorm" in small.verdict
        and "not judged" not in large.verdict
        and "is not judged" in small.details
    )


def test_remarks_say_what_limits_the_measurement():
    torch.manual_seed(0)

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)
            self.position = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return self.head((self.embedding(x) + self.position).mean(1))

    found = eft.diagnose(Positions(), torch.randint(0, 5, (4, 3)))
    assert "no other seeds were drawn" in found.details
    assert found.epsilon_ntk is None
    normed = eft.diagnose(ConvNet(), images(), num_networks=0)
    assert any("BatchNorm in evaluation mode" in remark for remark in normed.remarks)


def test_the_page_of_a_monitored_network_is_measured_and_leaves_it_alone():
    from torch_eft.live import TrainingStart
    from torch_eft.live.instruments.forecasts.theory import _measured_page
    from torch_eft.measure import Network

    torch.manual_seed(0)
    model, random = ConvNet().train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = TrainingStart(model, Network(model, images()), [], 0, fresh=True, obstacle=None)
    page = _measured_page(start, "not an MLP: for the test")
    assert page.startswith("### ConvNet, ") and "measured, not derived: not an MLP" in page
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    large = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 20_000))
    start = TrainingStart(large, Network(large, images()), [], 0, fresh=True, obstacle=None)
    assert _measured_page(start, "a reason").startswith(
        "No diagnosis: a reason. `torch_eft.diagnose(model, x)` measures"
    )


def test_output_fn_and_bad_inputs():
    class Dictionary(ConvNet):
        def forward(self, x):
            return {"logits": super().forward(x)}

    found = eft.diagnose(Dictionary(), images(), output_fn=lambda out: out["logits"], num_networks=0)
    assert found.inputs == 5
    with pytest.raises(ValueError, match="output_fn"):
        eft.diagnose(Dictionary(), images(), num_networks=0)
    with pytest.raises(ValueError, match="probe"):
        eft.diagnose(ConvNet(), torch.randn(3, 1, 5, 5))
