"""The names under which results are logged.

* ``eft/<quantity>/measured``: what this network does; quantities beyond the first twelve as
  ``eft-more/<quantity>/measured``;
* ``eft-theory/<quantity>/<series>``: what the theory says of it, by order, with its band (``SERIES``);
* ``eft-layers/<quantity>/<layer>``: a measured quantity of one layer, where asked for.

Groups, so that the scalars tab shows few cards unless more are opened. Quantities are those of ``QUANTITIES``.
"""

from collections.abc import Iterable, Mapping
from sys import intern  # a history has every tag once a step: as many names, one string each

from torch_eft.results.choices import nearest
from torch_eft.results.quantities import QUANTITIES

PREFIX, MORE, THEORY, LAYERS = "eft", "eft-more", "eft-theory", "eft-layers"

MEASURED = "measured"
BAND = ("minus_sigma", "plus_sigma")
ORDERS = {"order_0": "order 0 (infinite width)", "order_1": "order 1 (finite width)"}
SERIES = {
    **ORDERS,
    "minus_sigma": "the highest order there is, minus one standard deviation over initializations",
    "plus_sigma": "the highest order there is, plus one standard deviation over initializations",
    "truncation": "estimated size of what the next order would add",
    "z_score": "(measured - theory) / sigma",
    "ratio": "measured / theory, where there is no sigma",
}
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
    if series not in SERIES:
        raise ValueError(f"series: {series!r} given; give {MEASURED!r} or one of {', '.join(SERIES)}")
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


def _check_registered(quantity: str) -> None:
    if quantity not in QUANTITIES:
        hint = nearest(quantity, QUANTITIES)
        raise ValueError(f"quantity: {quantity!r} is not registered{hint}; describe it by register_quantity first")


def quantity_of(name: str) -> str | None:
    """Return the quantity that a tag belongs to; None for tags of others."""
    parts = name.split("/", 2)
    known = len(parts) == 3 and parts[0] in (PREFIX, MORE, THEORY, LAYERS) and parts[1] in QUANTITIES
    return parts[1] if known else None


def split_tag(name: str) -> tuple[str, str] | None:
    """Return ``(quantity, series)`` of one of our tags, None for others; a layer's series is ``layer/<layer>``.

    Quantities need not be registered here: a file may come from another version or a user's own instrument.
    The tab's ``data/model.js`` reads the names that this function returns.
    """
    prefix, _, rest = name.partition("/")
    quantity, _, series = rest.partition("/")
    if prefix not in (PREFIX, MORE, THEORY, LAYERS) or not quantity or not series:
        return None
    return quantity, f"layer/{series}" if prefix == LAYERS else series


def logged_tags(history: Mapping[int, Iterable[str]]) -> set[str]:
    """Return all tags of a history ``{step: {tag: value}}``."""
    return {name for scalars in history.values() for name in scalars}


def compared_quantities(history: Mapping[int, Iterable[str]]) -> list[str]:
    """Return the quantities of a history that have a theory beside them, in the order in which they are drawn.

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
    return [quantity for quantity in QUANTITIES if any(tag(quantity, order) in logged for order in ORDERS)]


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
