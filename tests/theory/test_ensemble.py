"""The ensemble: values per layer, the aspect ratio, and errors that name the argument."""

import pytest

from torch_eft.theory import MLPEnsemble


def test_scalars_are_spread_over_layers():
    ensemble = MLPEnsemble([3, 4, 5], "tanh", C_b=0.5, C_W=[1.0, 2.0])
    assert ensemble.C_b == (0.5, 0.5)
    assert ensemble.C_W == (1.0, 2.0)
    assert ensemble.depth == 2
    assert str(ensemble) == "MLP 3-4-5, tanh"


def test_aspect_ratio_is_depth_over_the_harmonic_mean_width():
    assert MLPEnsemble([64, 128, 128, 10], "tanh").aspect_ratio == pytest.approx(3 / 128)
    assert MLPEnsemble([64, 100, 50, 10], "tanh").aspect_ratio == pytest.approx(3 * (1 / 100 + 1 / 50) / 2)
    assert MLPEnsemble([64, 10], "tanh").aspect_ratio == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(C_W=-1.0), r"C_W: -1 given; it must be finite and > 0"),
        (dict(C_W=0.0), r"C_W: 0 given"),
        (dict(C_b=-0.1), r"C_b: -0.1 given; it must be finite and >= 0"),
        (dict(C_b=float("nan")), r"C_b: nan given"),
        (dict(lambda_W=[1.0, 1.0, 1.0]), r"lambda_W: 3 values given for 2 layers"),
        (dict(lambda_b=-1), r"lambda_b: -1 given"),
        (dict(activation="tahn"), r"activation: 'tahn' given \(did you mean 'tanh'"),
        (dict(widths=[3]), r"widths: \(3,\) given; give at least two positive integers"),
        (dict(widths=[3, 0, 1]), r"widths: \(3, 0, 1\) given"),
    ],
)
def test_unusable_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLPEnsemble(**{"widths": [3, 4, 5], "activation": "tanh"} | arguments)


def test_standard_errors_travel_with_the_ensemble_and_do_not_make_it_another():
    errors = {"C_b": [0.0, 0.1], "C_W": (0.2, 0.3)}
    plain, read = MLPEnsemble([3, 4, 5], "tanh"), MLPEnsemble([3, 4, 5], "tanh", errors=errors)
    assert plain.errors is None
    assert read.errors == {"C_b": (0.0, 0.1), "C_W": (0.2, 0.3)}
    assert plain == read and hash(plain) == hash(read)
    with pytest.raises(ValueError, match="did you mean 'C_W'"):
        MLPEnsemble([3, 4, 5], "tanh", errors={"C_w": [0.1, 0.1]})
    with pytest.raises(ValueError, match="errors: 1 values of C_b given for 2 layers"):
        MLPEnsemble([3, 4, 5], "tanh", errors={"C_b": [0.1]})
