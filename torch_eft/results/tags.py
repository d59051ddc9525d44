"""The names under which results are logged.

* ``eft/<quantity>/measured``: what this network does; quantities beyond the first twelve as
  ``eft-more/<quantity>/measured``;
* ``eft-theory/<quantity>/<series>``: what the theory says of it, by order, with its band (``SERIES``);
* ``eft-layers/<quantity>/<layer>``: a measured quantity of one layer, where asked for;
* ``eft-layers-theory/<quantity>/<layer>/<series>``: what the theory says of that layer.

In TensorBoard the first group alone, twelve tags at most, is in the Scalars tab; the tab EFT has all of them.
Quantities are those of ``QUANTITIES``.
"""

from collections.abc import Iterable, Mapping
from sys import intern  # a history has every tag once a step: as many names, one string each

from torch_eft.results.choices import nearest
from torch_eft.results.quantities import QUANTITIES

PREFIX, MORE, THEORY, LAYERS = "eft", "eft-more", "eft-theory", "eft-layers"
LAYERS_THEORY = "eft-layers-theory"
_GROUPS = (PREFIX, MORE, THEORY, LAYERS, LAYERS_THEORY)

MEASURED = "measured"
BAND = ("minus_sigma", "plus_sigma")
ORDERS = {"order_0": "order 0 (infinite width)", "order_1": "order 1 (finite width)"}
BAND_68, BAND_90 = ("band_68_low", "band_68_high"), ("band_90_low", "band_90_high")
GIVEN_START, GIVEN_START_BAND = "given_start", ("given_start_low", "given_start_high")
QUANTILE = "quantile"
ERROR = ("error_low", "error_high")
SEEDS, SEEDS_BAND = "seeds_median", ("seeds_low", "seeds_high")
EXPANSIONS = {
    "taylor_1": "expansion about theta_0 along the realized path, with dNTK",
    "taylor_2": "expansion about theta_0 along the realized path, with dNTK and ddNTK",
}
SERIES = {
    **ORDERS,
    **EXPANSIONS,
    "order_2": "Taylor model of order 2 about the interval's start, with dNTK",
    "order_3": "Taylor model of order 3 about the interval's start, with dNTK and ddNTK",
    "truncation_low": "order 3 minus its distance from order 2, an estimate of what it leaves out",
    "truncation_high": "order 3 plus its distance from order 2, an estimate of what it leaves out",
    "band_68_low": "16 % of networks, drawn with other seeds, lie below this",
    "band_68_high": "16 % of networks, drawn with other seeds, lie above this",
    "band_90_low": "5 % of networks, drawn with other seeds, lie below this",
    "band_90_high": "5 % of networks, drawn with other seeds, lie above this",
    "given_start": "median of the networks that start with this network's outputs on the training inputs",
    "given_start_low": "5 % of the networks that start with this network's outputs lie below this",
    "given_start_high": "5 % of the networks that start with this network's outputs lie above this",
    "quantile": "share of networks, drawn with other seeds, that lie below the measured value, 0 .. 1",
    "seeds_median": "median of networks drawn anew and trained beside this one, as measured",
    "seeds_low": "lowest of the networks drawn anew and trained beside this one, as measured",
    "seeds_high": "highest of the networks drawn anew and trained beside this one, as measured",
    "minus_sigma": "the highest order there is, minus one standard deviation over initializations",
    "plus_sigma": "the highest order there is, plus one standard deviation over initializations",
    "truncation": "estimated size of what the next order would add",
    "z_score": "(measured - theory) / sigma",
    "error_low": "lower end of the error bar of the measured value, estimated from random directions of the outputs",
    "error_high": "upper end of the error bar of the measured value, estimated from random directions of the outputs",
    "ratio": "measured / theory, where there is no sigma",
}
TRUNCATION = ("truncation_low", "truncation_high")
SPECTRUM = "eft/ntk_spectrum/log10_eigenvalues"


def tag(quantity: str, series: str = MEASURED) -> str:
    """Return ``eft/<quantity>/measured`` (or ``eft-more/...``), or ``eft-theory/<quantity>/<series>``.

    Args:
        quantity: A registered name.
        series: ``"measured"``, or one of ``SERIES``.

    Returns:
        The tag.

    Raises:
        ValueError: If the quantity is not registered or the series unknown.

    Example:
        >>> from torch_eft.tensorboard import tag
        >>> tag("ntk_drift"), tag("ntk_drift", "order_1")
        ('eft/ntk_drift/measured', 'eft-theory/ntk_drift/order_1')
    """
    _check_registered(quantity)
    if series == MEASURED:
        return intern(f"{PREFIX if QUANTITIES[quantity].among_the_first else MORE}/{quantity}/{MEASURED}")
    _check_series(series, MEASURED)
    return intern(f"{THEORY}/{quantity}/{series}")


def layer_tag(quantity: str, layer: str) -> str:
    """Return ``eft-layers/<quantity>/<layer>``.

    Args:
        quantity: A registered name.
        layer: Name of the layer.

    Returns:
        The tag.

    Raises:
        ValueError: If the quantity is not registered.

    Example:
        >>> from torch_eft.tensorboard import layer_tag
        >>> layer_tag("representation_change", "layers.1")
        'eft-layers/representation_change/layers.1'
    """
    _check_registered(quantity)
    return intern(f"{LAYERS}/{quantity}/{layer}")


def layer_theory_tag(quantity: str, layer: str, series: str) -> str:
    """Return ``eft-layers-theory/<quantity>/<layer>/<series>``.

    Args:
        quantity: A registered name.
        layer: Name of the layer, as in ``layer_tag``.
        series: One of ``SERIES``.

    Returns:
        The tag.

    Raises:
        ValueError: If the quantity is not registered or the series unknown.

    Example:
        >>> from torch_eft.tensorboard import layer_theory_tag
        >>> layer_theory_tag("representation_change", "layers.1", "band_90_low")
        'eft-layers-theory/representation_change/layers.1/band_90_low'
    """
    _check_registered(quantity)
    _check_series(series)
    return intern(f"{LAYERS_THEORY}/{quantity}/{layer}/{series}")


def _check_series(series: str, *others: str) -> None:
    if series not in SERIES:
        named = [f"{other!r} or " for other in others]
        raise ValueError(f"series: {series!r} given; give {''.join(named)}one of {', '.join(SERIES)}")


def _check_registered(quantity: str) -> None:
    if quantity not in QUANTITIES:
        hint = nearest(quantity, QUANTITIES)
        raise ValueError(f"quantity: {quantity!r} is not registered{hint}; describe it by register_quantity first")


def in_scalars_tab(name: str) -> bool:
    """Return whether TensorBoard's Scalars tab shows a tag: those of the first group, and those that are not ours."""
    return name.partition("/")[0] not in _GROUPS[1:]


def quantity_of(name: str) -> str | None:
    """Return the quantity that a tag belongs to; None for tags of others."""
    parts = name.split("/", 2)
    known = len(parts) == 3 and parts[0] in _GROUPS and parts[1] in QUANTITIES
    return parts[1] if known else None


def split_tag(name: str) -> tuple[str, str] | None:
    """Return ``(quantity, series)`` of one of our tags, None for others.

    A layer's series is ``layer/<layer>``, and what the theory says of it ``layer-theory/<layer>/<series>``.
    Quantities need not be registered here: a file may come from another version or a user's own instrument.
    The tab's ``data/model.js`` reads the names that this function returns.
    """
    prefix, _, rest = name.partition("/")
    quantity, _, series = rest.partition("/")
    if prefix not in _GROUPS or not quantity or not series:
        return None
    part = {LAYERS: "layer/", LAYERS_THEORY: "layer-theory/"}.get(prefix, "")
    return quantity, part + series


def layer_theory(history: Mapping[int, Mapping[str, float]], quantity: str) -> dict[str, dict[str, dict[int, float]]]:
    """Return what a history says is predicted of a quantity's layers: ``{layer: {series: {step: value}}}``."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    prefix = f"{LAYERS_THEORY}/{quantity}/"
    for step, scalars in sorted(history.items()):
        for name, value in scalars.items():
            if name.startswith(prefix):
                layer, _, series = name.removeprefix(prefix).rpartition("/")
                found.setdefault(layer, {}).setdefault(series, {})[step] = value
    return found


def logged_tags(history: Mapping[int, Iterable[str]]) -> set[str]:
    """Return all tags of a history ``{step: {tag: value}}``."""
    return {name for scalars in history.values() for name in scalars}


def compared_quantities(history: Mapping[int, Iterable[str]]) -> list[str]:
    """Return the quantities of a history that are drawn with a theory beside them, in the order of the registry.

    Args:
        history: ``{step: {tag: value}}``, or ``{step: tags}``.

    Returns:
        Names out of ``QUANTITIES``.

    Example:
        >>> from torch_eft.tensorboard import compared_quantities
        >>> compared_quantities({0: {"eft/ntk_drift/measured": 0.0, "eft-theory/ntk_drift/order_0": 0.0}})
        ['ntk_drift']
    """
    logged = logged_tags(history)
    theory = (*ORDERS, *EXPANSIONS)
    compared = [quantity for quantity in QUANTITIES if any(tag(quantity, series) in logged for series in theory)]
    return [quantity for quantity in compared if QUANTITIES[quantity].drawn]


def theory_of(scalars: Mapping[str, float], quantity: str) -> float | None:
    """Return the theory's value of a quantity at the highest order that was logged."""
    for order in reversed(ORDERS):
        if (value := scalars.get(tag(quantity, order))) is not None:
            return value
    return None


def sigma_of(scalars: Mapping[str, float], quantity: str) -> float | None:
    """Return half the width of the band, one standard deviation over initializations; None without a band."""
    lower, upper = (scalars.get(tag(quantity, series)) for series in BAND)
    return None if lower is None or upper is None else (upper - lower) / 2
