"""Results as cells of a notebook, pictures and tables."""

import sys

import pytest
import torch

from torch_eft import Validity, theory, trajectory_from_records
from torch_eft.live import RunHistory
from torch_eft.tensorboard import tag

OUTPUTS = [torch.zeros(2, 3), torch.ones(2, 3)]
NTKS = [torch.ones(2, 2, 3, 3), torch.full((2, 2, 3, 3), 1.5)]
RUN = trajectory_from_records([0, 10], OUTPUTS, "<a run>", Validity("caution", "1 < 2"), ntks=NTKS)
HISTORY = RunHistory({step: {tag("ntk_drift"): 0.01 * step, tag("ntk_trace"): 2.0} for step in (0, 5)})


def test_a_cell_shows_the_fields_and_the_verdict():
    html = RUN._repr_html_()
    assert "<b>Trajectory</b>" in html and ">caution</span>" in html and "(2, 2, 3) float32" in html
    assert "&lt;a run&gt;" in html and "1 &lt; 2" in html and "<a run>" not in html
    assert "0.05" in HISTORY._repr_html_() and "no measurement" in repr(RunHistory())


def test_a_trajectory_is_drawn_beside_others():
    drawing = RUN.plot(point=1, output=2, label="measured", beside={"again": RUN})
    outputs, drifts = drawing.axes
    assert [text.get_text() for text in outputs.get_legend().get_texts()] == ["measured", "again"]
    assert drifts.lines[0].get_ydata().tolist() == [0.0, 0.5]
    assert drawing._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="point: 5, output: 0 given; 'this' has 2 points, 3 outputs"):
        RUN.plot(point=5)


def test_a_history_is_drawn_from_its_first_quantities():
    assert [axes.get_title() for axes in HISTORY.plot().axes] == ["NTK drift"]
    assert len(HISTORY.plot("ntk_drift", "ntk_trace").axes) == 2
    with pytest.raises(ValueError, match="nothing was measured yet"):
        RunHistory().plot()


def test_the_mean_ntk_of_an_ensemble_is_called_so():
    x, y = torch.eye(2, 3).double(), torch.ones(2, 1).double()
    ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
    forecast = theory.predict_training(ensemble, x, y, x, learning_rate=0.1, steps=2, order=0)
    assert forecast.plot().axes[1].get_title() == "drift of the mean NTK"
    assert RUN.plot().axes[1].get_title() == "NTK drift"


def test_a_forecast_of_the_drift_is_drawn():
    x, y = torch.eye(2, 3), torch.ones(2, 1)
    forecast = theory.predict_drift(theory.MLPEnsemble([3, 64, 64, 1], "linear"), x, y, x, learning_rate=0.1, steps=4)
    (axes,) = forecast.plot().axes
    text = repr(forecast)
    assert len(text) < 1200 and f"ntk: {100 * float(forecast.ntk.relative_rms[-1]):.3g} % by the last step" in text
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["NTK", "hidden kernel 1", "hidden kernel 2"]
    assert axes.lines[0].get_ydata() == pytest.approx(forecast.ntk.relative_rms.tolist())
    banded = forecast.plot(bands=True).axes[0]
    assert len(banded.collections) == 3


def test_without_matplotlib_or_pandas_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result in (RUN, HISTORY):
        with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
            result.to_pandas()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib: pip install 'torch-eft\[demo\]'"):
        RUN.plot()


def test_tables():
    pytest.importorskip("pandas")
    table = RUN.to_pandas()
    assert table.index.names == ["step", "point", "output"] and len(table) == 12
    assert table.loc[(10, 1, 2)].to_dict() == {"output_mean": 1.0, "ntk_mean": 1.5, "ntk_change": 0.5}
    assert HISTORY.to_pandas()[tag("ntk_drift")].to_dict() == {0: 0.0, 5: 0.05}
    x, y = torch.eye(2, 3), torch.ones(2, 1)
    ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
    drift = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4).to_pandas()
    assert list(drift.index) == [0, 1, 2, 3, 4] and {"ntk_drift", "hidden_1", "hidden_2", "dntk"} <= set(drift.columns)
    forecast = theory.predict_training(ensemble, x, y, x, learning_rate=0.1, steps=2, order=0).to_pandas()
    assert {"output_mean", "output_sd", "ntk_mean"} <= set(forecast.columns)
