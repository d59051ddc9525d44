"""Lines and bands of one network's drift beside its training: the law of the theory, in units of this network."""

import math
import re

import pytest
import torch

from tests.live.instruments.loop import data, fit, mlp
from torch_eft import Training, measure, theory
from torch_eft.forecast.comparison.drift import NUM_DRAWS, NUM_GIVEN, DriftComparison, joint_points
from torch_eft.live import Observer
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.interval import IntervalInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.live.instruments.steps.dntk import DNTKInstrument
from torch_eft.results.tags import BAND_90, GIVEN_START, GIVEN_START_BAND, QUANTILE, layer_theory_tag, tag

X, Y, PROBE = data()
WIDTH, RATE, STEPS = 256, 0.01, 6


def instruments():
    found = NTKInstrument(), RepresentationInstrument(per_layer=True), IntervalInstrument(), DNTKInstrument()
    return [*found, TheoryInstrument(seconds=2.0)]


def run(model, steps=STEPS, momentum=0.0, rate=RATE, **keywords):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    return fit(model, instruments(), steps, optimizer, X, Y, PROBE, **keywords)


def law(ensemble, **keywords):
    training = Training(learning_rate=RATE * 2 / Y.numel(), steps=STEPS, reduction="sum", **keywords)
    options = {"at_steps": [0, STEPS], "hidden_ntk": False, "num_samples": 2048}
    return theory.predict_drift(ensemble, X, Y, PROBE, training, **options)


@pytest.fixture(scope="module")
def trained():
    """History, and the law of its ensemble, with the network's kernels and outputs at theta_0."""
    model = mlp(WIDTH)
    with torch.no_grad():
        start = model(X)
    ensemble = measure.read_ensemble(model, PROBE, optimizer=torch.optim.SGD(model.parameters(), lr=RATE))
    network = measure.Network(model, PROBE, lambdas=1.0)
    kernels = network.ntk(), network.hidden_kernels()
    observer, pages = run(model, every=lambda step: step in (2, 5))
    return observer, pages, law(ensemble), start, *kernels


def test_medians_and_bands_are_those_of_the_law_relative_to_the_networks_own_kernels(trained):
    observer, pages, predicted, start, H_0, hidden = trained
    history, seeds, given = observer.history, predicted.draws(NUM_DRAWS), predicted.given(start).draws(NUM_GIVEN)
    norm = predicted.ntk.reference.norm() * 2**0.5 / H_0.norm()
    q = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    series = [BAND_90[0], "order_1", BAND_90[1]]
    for step in (2, 5, 6):
        scalars = history[step]
        drawn = seeds.ntk_drift(step, full=True) * norm
        expected = torch.quantile(drawn, q).tolist()
        assert [scalars[tag("ntk_drift", name)] for name in series] == pytest.approx(expected, rel=1e-5)
        below = float((drawn < scalars[tag("ntk_drift")]).double().mean())
        assert scalars[tag("ntk_drift", QUANTILE)] == pytest.approx(below, abs=2 / NUM_DRAWS)
        conditional = float(given.ntk_drift(step, full=True).median() * norm)
        assert scalars[tag("ntk_drift", GIVEN_START)] == pytest.approx(conditional, rel=0.01)
        drawn = torch.stack([seeds.hidden_change(layer, step) for layer in (1, 2)])
        sizes = [float(predicted.hidden[layer].reference.norm()) for layer in (1, 2)]
        drawn *= torch.tensor([[size / float(K.norm())] for size, K in zip(sizes, hidden.values(), strict=True)])
        for values, name in ((drawn.mean(0), None), *zip(drawn, hidden, strict=True)):
            tags = [layer_theory_tag("representation_change", name, each) for each in series]
            if name is None:
                tags = [tag("representation_change", each) for each in series]
            assert [scalars[each] for each in tags] == pytest.approx(torch.quantile(values, q).tolist(), rel=1e-5)
    assert "bands over 600 networks" in pages["validity"][-1][1]


def test_dntk_is_predicted_along_the_interval_that_was_measured_and_along_the_gradient(trained):
    observer, _, predicted, _, H_0, _ = trained
    history, seeds = observer.history, predicted.draws(NUM_DRAWS)
    norm = float(predicted.ntk.reference.norm() * 2**0.5 / H_0.norm())
    for start, end in ((0, 2), (2, 5), (5, 6)):
        sizes = seeds.along_displacement(start, end, full=True)
        for quantity, drawn in zip(("dntk", "ddntk"), sizes, strict=True):
            assert history[end][tag(quantity, "order_1")] == pytest.approx(norm * float(drawn.quantile(0.5)), rel=1e-5)
            assert tag(quantity) in history[end]
    for step in (0, 2, 5):
        expected = norm * float(seeds.along_gradient(step, full=True)[0].quantile(0.5))
        assert history[step][tag("dntk_along_gradient", "order_1")] == pytest.approx(expected, rel=1e-5)
    assert tag("dntk_along_gradient", "order_1") not in history[6]
    assert tag("dntk", GIVEN_START) not in history[6] and tag("ntk_drift", GIVEN_START) in history[6]
    given = [tag("ntk_drift", GIVEN_START_BAND[0]), tag("representation_change", GIVEN_START_BAND[0])]
    assert [name in history[6] for name in given] == [True, False]
    assert [tag(name, BAND_90[0]) in history[6] for name in ("dntk", "ddntk")] == [True, False]


@pytest.mark.slow
def test_steps_that_a_scaler_leaves_out_are_none_of_the_lines(trained):
    """The same training with two steps that are counted and not taken, measured where the other is."""
    model, counted = mlp(WIDTH), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    take = optimizer.step

    def loss(z, y):
        counted.append(math.inf if len(counted) in (0, 4) else 1.0)
        return counted[-1] * torch.nn.functional.mse_loss(z, y)

    optimizer.step = lambda: take() if counted[-1] == 1 else None
    options = {"loss_function": loss, "every": lambda step: step in (3, 7)}
    observer, _ = fit(model, instruments(), STEPS + 2, optimizer, X, Y, PROBE, **options)
    for step, taken in ((3, 2), (7, 5), (8, 6)):
        for quantity in ("ntk_drift", "dntk", "dntk_along_gradient"):
            for name in (tag(quantity), tag(quantity, "order_1")):
                expected = trained[0].history[taken].get(name)
                assert observer.history[step].get(name) == (expected and pytest.approx(expected, rel=1e-5))
    assert tag("dntk_along_gradient") not in observer.history[0]


@pytest.mark.slow
def test_sizes_of_dntk_have_no_line_where_eigenvalues_vary_too_much():
    """Narrow: the NTK varies by 15 % over networks, and with it what is left to learn at step 5."""
    observer, pages = run(mlp(32), rate=0.15, every=lambda step: step in (1, 5))
    assert tag("dntk", "order_1") in observer.history[1] and tag("dntk", "order_1") not in observer.history[5]
    assert tag("dntk") in observer.history[5] and tag("ntk_drift", "order_1") in observer.history[5]
    assert re.search("as eigenvalues of the NTK vary by 1[0-9] % over networks", pages["validity"][-1][1])


@pytest.mark.slow
def test_networks_are_inside_their_bands():
    """Twenty networks, 18 expected inside 90 % with a standard deviation of 1.3: at least 14, 3 of them below."""
    inside = {"ntk_drift": 0, "representation_change": 0, "dntk": 0}
    for seed in range(20):
        observer, _ = run(mlp(WIDTH, seed=seed), every=lambda step: step == 3)
        for quantity in inside:
            low, high = (observer.history[STEPS][tag(quantity, name)] for name in BAND_90)
            inside[quantity] += low <= observer.history[STEPS][tag(quantity)] <= high
    print(inside)
    assert min(inside.values()) >= 14


@pytest.mark.slow
def test_momentum_is_covered_up_to_its_horizon():
    observer, _ = run(mlp(WIDTH), momentum=0.5, total_steps=4)
    expected = (
        law(measure.read_ensemble(mlp(WIDTH), PROBE), momentum=0.5).draws(NUM_DRAWS).ntk_drift(4, full=True).median()
    )
    assert observer.history[4][tag("ntk_drift", "order_1")] == pytest.approx(float(expected), rel=0.2)
    assert tag("ntk_drift", "order_1") not in observer.history[5]


def test_where_there_is_no_law_the_page_says_why():
    observer, pages = run(mlp(WIDTH, activation=torch.nn.ReLU), rate=RATE / 2)
    assert tag("ntk_drift", "order_1") not in observer.history[STEPS]
    assert observer.history[STEPS][tag("ntk_drift", "order_0")] == 0.0
    assert "relu has a kink" in pages["validity"][-1][1]
    unpredicted = observer.instruments[-1].facts().unpredicted
    assert set(unpredicted) == {"ntk_drift", "dntk", "representation_change"}
    assert unpredicted["dntk"].startswith("No prediction at finite width: activation: relu has a kink")


@pytest.mark.slow
def test_a_resumed_training_has_the_same_lines(trained):
    observer, *_ = trained
    (before,) = (each for each in observer.instruments if isinstance(each, TheoryInstrument))
    model, parts = mlp(WIDTH), instruments()
    parts[-1].load_state(before.state())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    resumed = Observer(model, PROBE, optimizer, budget=None, instruments=parts, on_error="raise")
    resumed.load_state_dict(observer.state_dict())
    resumed.begin(step=6)
    resumed.observe_batch((X, Y))
    loss = torch.nn.functional.mse_loss(model(X), Y)
    resumed.observe_loss(loss)
    loss.backward()
    resumed.before_step()
    optimizer.step()
    resumed.measure(7)
    resumed.finish()
    names = [tag("ntk_drift", name) for name in ("order_1", *BAND_90, GIVEN_START)]
    whole, _ = run(mlp(WIDTH), steps=7, every=lambda step: False)
    assert [resumed.history[7][name] for name in names] == pytest.approx([whole.history[7][name] for name in names])


def test_work_is_counted_and_says_what_would_bring_the_line():
    ensemble = theory.MLPEnsemble([3, 64, 64, 1], "tanh")
    assert joint_points(ensemble, 16, 8, 100.0) == 8
    assert joint_points(ensemble, 16, 1, 100.0) == 1
    assert joint_points(ensemble, 2, 2, 5.0) == 2
    few = joint_points(ensemble, 16, 16, 3.0)
    assert 2 <= few < 8 and joint_points(ensemble, 16, 16, 30.0) > few
    with pytest.raises(
        ValueError, match=r"64 training and 16 probe inputs takes about .* s of one core, .* forecast_seconds=\d+"
    ) as error:
        joint_points(ensemble, 64, 16, 3.0)
    assert joint_points(ensemble, 64, 16, float(str(error.value).rsplit("=", 1)[1])) >= 2
    with pytest.raises(ValueError, match="summed step by step, for up to 4000 steps; 5000"):
        training = Training(learning_rate=0.01, steps=5000, momentum=0.9)
        DriftComparison(ensemble, X, Y[:, :1], PROBE, training, torch.zeros(5, 1), seconds=math.inf)


@pytest.mark.slow
def test_forecasts_take_one_thread_and_give_the_trainings_threads_back(monkeypatch):
    during = []

    def failing(*arguments, **options):
        during.append(torch.get_num_threads())
        raise ValueError("no law today")

    monkeypatch.setattr("torch_eft.live.instruments.forecasts.theory.DriftComparison", failing)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, pages = run(mlp(WIDTH), steps=2)  # the second batch shows that it is the whole one
        assert during == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "no law today" in pages["validity"][-1][1]
