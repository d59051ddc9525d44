"""The registry of logged quantities: title, formula, unit, source, and value at infinite width.

The only place where titles and explanations live: charts, pages, the run info and the README's table read them here.
The order is that in which they are drawn. ``register_quantity`` adds those of a user's own instruments.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

KERNELS, DERIVATIVES, OUTPUTS = "NTK and hidden kernels", "Derivatives of the NTK", "Outputs against the ensemble"
FORECAST, INTERVALS = "One network's own forecast", "From one measurement to the next"
TAYLOR, COST, OTHERS = "Taylor orders", "Cost", "Other quantities"

HEADLINES = (("ntk_drift",), ("dntk", "dntk_along_gradient"), ("representation_change",))
"""The quantities that the tab shows first and large: of each tuple, the first one that a run predicts or measures."""


@dataclass(frozen=True)
class Quantity:
    """A logged quantity.

    Args:
        title: Title of its charts.
        formula: In the field's symbols; H is the NTK on the probe with the learning-rate tensor lambda, K a hidden
            layer's kernel, z the outputs; index 0 means theta_0.
        unit: Its unit; ``"1"`` for a pure number.
        source: PDLT, a paper, or ``"derived here"``.
        at_infinite_width: Its value or law at infinite width, as a phrase.
        group: Title of the group in which the EFT tab shows it.
        among_the_first: Show its measured values in the group ``eft`` of the scalars tab; at most 12 quantities are
            there, the others are in ``eft-more``.
        drawn: Whether the tab and reports have a chart of it; others are logged, and no more.

    Example:
        >>> from torch_eft.tensorboard import QUANTITIES
        >>> QUANTITIES["ntk_drift"].formula
        '||H - H_0||_F / ||H_0||_F'
    """

    title: str
    formula: str
    unit: str
    source: str
    at_infinite_width: str
    group: str = OTHERS
    among_the_first: bool = False
    drawn: bool = True

    def to_dict(self) -> dict[str, str]:
        """Title, formula, unit, source, value at infinite width and group, by name."""
        names = ("title", "formula", "unit", "source", "at_infinite_width", "group")
        return {name: getattr(self, name) for name in names}


QUANTITIES: dict[str, Quantity] = {
    "output_projection": Quantity(
        "Output along its predicted first direction",
        "sum_{a,i} c_{i;a} z_{i;a}, with c = Theta_{PA} (y - E z) normalized to |c| = 1",
        "unit of the output",
        "derived here, from PDLT 10.2",
        "Gaussian over initializations, with the mean and the sigma that are drawn",
        OUTPUTS,
        among_the_first=True,
    ),
    "output_chi_squared": Quantity(
        "Outputs: squared deviation in units of the variance",
        "mean over probe and outputs of (z - E z)^2 / Var z",
        "1",
        "derived here, from PDLT 10.2",
        "1, with sigma = sqrt(2 tr(R^2) / C) / N, R the correlations over the probe",
        OUTPUTS,
        among_the_first=True,
    ),
    "ntk_trace": Quantity(
        "NTK: mean diagonal",
        "(1 / N C) sum_{a,i} H_{ii;aa}",
        "(unit of the output)^2 / unit of the loss's rate",
        "PDLT 8.0; its mean 9.1",
        "its value at initialization, the same for every network",
        KERNELS,
        among_the_first=True,
    ),
    "ntk_drift": Quantity(
        "NTK drift",
        "||H - H_0||_F / ||H_0||_F",
        "1",
        "PDLT 11.2 (the dNTK moves H at order 1/n)",
        "0: the NTK is frozen",
        KERNELS,
        among_the_first=True,
    ),
    "representation_change": Quantity(
        "Representation change",
        "mean over hidden layers of ||K - K_0||_F / ||K_0||_F",
        "1",
        "PDLT 11.4",
        "0: representations do not change",
        KERNELS,
        among_the_first=True,
    ),
    "ntk_batch_norm_share": Quantity(
        "NTK: share of BatchNorm's statistics in its drift",
        "||H - H(theta; statistics of theta_0)|| / ||H - H_0||, statistics of the same inputs at theta and at theta_0",
        "1",
        "derived here",
        "undefined: nothing changes",
        KERNELS,
    ),
    "ntk_preconditioned_drift": Quantity(
        "Preconditioned NTK: drift",
        "||H_P - H_P at the first step|| / ||H_P at the first step||, H_P = J lambda P J^T, P of the optimizer",
        "1",
        "derived here",
        "that of P alone: J is frozen",
        KERNELS,
    ),
    "ntk_preconditioned_shares": Quantity(
        "Preconditioned NTK: shares of P and J in its drift",
        "<part, change> / ||change||^2; by P: [J dP J^T + J' dP J'^T] / 2 and the rest by J",
        "1",
        "derived here",
        "all of it by P: J is frozen",
        KERNELS,
    ),
    "ntk_kernel_distance": Quantity(
        "NTK: change of direction",
        "1 - <H, H_0> / (||H|| ||H_0||)",
        "1",
        "Fort et al. 2020 (arXiv:2010.15110)",
        "0: the NTK is frozen",
        KERNELS,
        among_the_first=True,
    ),
    "ntk_top_eigenvalue": Quantity(
        "NTK: largest eigenvalue",
        "largest eigenvalue of H as an (N C, N C) matrix",
        "that of H",
        "PDLT 10.1 (it bounds the stable step)",
        "its value at initialization, the same for every network",
        KERNELS,
        among_the_first=True,
    ),
    "ntk_spectrum": Quantity(
        "NTK: eigenvalues in decades",
        "log10 of the eigenvalues of H as an (N C, N C) matrix, those below rounding left out",
        "log10 of that of H",
        "PDLT 10.1 (training's rates in the kernel regime)",
        "frozen",
        KERNELS,
    ),
    "representation_cka_distance": Quantity(
        "Hidden kernels: change of similarities (CKA)",
        "mean over hidden layers of 1 - linear CKA(K, K_0)",
        "1",
        "Kornblith et al. 2019 (arXiv:1905.00414)",
        "0: representations do not change",
        KERNELS,
    ),
    "ntk_mean_drift": Quantity(
        "NTK: drift along the ensemble's mean drift",
        "<H - H_0, D> / (||D|| ||Theta||), D = E[H - H_0], averaged over outputs; order 1: ||D|| / ||Theta||",
        "1",
        "derived here, from the GD hierarchy of PDLT chapter infinity",
        "0: the NTK is frozen",
        KERNELS,
    ),
    "representation_mean_drift": Quantity(
        "Hidden kernels: drift along the ensemble's mean drift, mean over layers",
        "mean over hidden layers of <K - K_0, D> / (||D|| ||K||), D = E[K - K_0]; order 1: of ||D|| / ||K||",
        "1",
        "derived here, from PDLT 11.4",
        "0: representations do not change",
        KERNELS,
    ),
    "instance_output": Quantity(
        "Output of this network along its own forecast",
        "<z - z(0), u> / sqrt(N C), u the direction of the motion with the NTK frozen; order 1: with dNTK and ddNTK",
        "unit of the output",
        "derived here, from PDLT chapter infinity",
        "order 0: the NTK at theta_0 says it all",
        FORECAST,
        among_the_first=True,
    ),
    "instance_output_error": Quantity(
        "Output of this network: error of its own forecast",
        "||z - forecast|| / max_{s <= t} ||z_0(s) - z(0)||, z_0 with the NTK frozen; order 1: with dNTK and ddNTK",
        "1",
        "derived here, from PDLT chapter infinity",
        "0 at order 0",
        FORECAST,
    ),
    "instance_ntk_error": Quantity(
        "NTK of this network: error of its own forecast",
        "||H - forecast|| / ||H_0||; order 0: H_0 itself; order 1: with dNTK and ddNTK along the frozen path",
        "1",
        "derived here, from PDLT chapter infinity",
        "0 at order 0",
        FORECAST,
    ),
    "ntk_rate": Quantity(
        "NTK: change over the last interval, a step",
        "<H' - H, P> / (||P|| ||H|| steps), P the change that dNTK and ddNTK along the real displacement predict; "
        "order 1: ||P|| / (||H|| steps)",
        "1 / step",
        "derived here, from PDLT 11.1 and chapter infinity",
        "0: dNTK and ddNTK vanish as 1/n",
        INTERVALS,
        drawn=False,
    ),
    "interval_ntk_error": Quantity(
        "NTK: error of its predicted change over the last interval",
        "||H' - H - P|| / ||H' - H||; order 0: P = 0; order 1: P by dNTK and ddNTK along the real displacement",
        "1",
        "derived here, from PDLT 11.1 and chapter infinity",
        "undefined: nothing changes",
        INTERVALS,
        drawn=False,
    ),
    "replay_output": Quantity(
        "Outputs: change over the next steps",
        "||z' - z|| / sqrt(N C) over T steps; order k: of the Taylor model of order k about the start, trained by a "
        "copy of the optimizer on the same batches (1: frozen NTK; 2: with dNTK; 3: with dNTK and ddNTK); band: "
        "order 3 +- ||order 3 - order 2||",
        "unit of the output",
        "derived here, from PDLT chapter infinity",
        "order 1: the linear model is the network",
        INTERVALS,
        among_the_first=True,
    ),
    "replay_output_error": Quantity(
        "Outputs: error of that change, by order",
        "||(z_k' - z) - (z' - z)|| / ||z' - z||, z_k' of the Taylor model of order k; 1: as bad as nothing predicted",
        "1",
        "derived here, from PDLT chapter infinity",
        "0 at order 1",
        INTERVALS,
    ),
    "replay_ntk": Quantity(
        "NTK: change over the next steps",
        "||H' - H|| / ||H|| over T steps; order 1: 0; order 2: by dNTK, order 3: by dNTK and ddNTK, at the "
        "displacement of the Taylor model of order 3; band: order 3 +- ||order 3 - order 2||",
        "1",
        "derived here, from PDLT chapter infinity",
        "0",
        INTERVALS,
    ),
    "replay_ntk_error": Quantity(
        "NTK: error of that change, by order",
        "||predicted - (H' - H)|| / ||H' - H||; order 1 predicts no change: 1",
        "1",
        "derived here, from PDLT chapter infinity",
        "1 at order 1",
        INTERVALS,
    ),
    "step_output": Quantity(
        "Outputs: change by the next step",
        "||z' - z|| / sqrt(N C) over one step; order 1: of J dtheta, dtheta by the optimizer's own rule",
        "unit of the output",
        "derived here, from the rules of torch.optim",
        "order 1: outputs are linear in the parameters",
        INTERVALS,
    ),
    "step_shares": Quantity(
        "Outputs: what the next step's change is made of",
        "<J dtheta_part, J dtheta> / ||J dtheta||^2, part: fresh gradient (-eta c H_P e of the batch), momentum, decay",
        "1",
        "derived here, from the rules of torch.optim",
        "the same: the shares add up to 1",
        INTERVALS,
    ),
    "step_output_error": Quantity(
        "Outputs: error of that sum",
        "||z' - z - J dtheta|| / ||z' - z||",
        "1",
        "derived here",
        "0: outputs are linear in the parameters",
        INTERVALS,
    ),
    "interval_output": Quantity(
        "Output: what the frozen Jacobian leaves of its change over the last interval",
        "<z' - z - J d, c> / (||c|| ||J d||), c the Taylor terms of order 2 and 3 in the real displacement d; order 1: "
        "||c|| / ||J d||",
        "1",
        "derived here, from PDLT 0.5 and chapter infinity",
        "0: outputs are linear in the parameters",
        INTERVALS,
        drawn=False,
    ),
    "interval_output_error": Quantity(
        "Output: error of its predicted change over the last interval",
        "||z' - z - forecast|| / ||z' - z||; order 0: J d; order 1: with the Taylor terms of order 2 and 3 in d",
        "1",
        "derived here, from PDLT 0.5 and chapter infinity",
        "0 at order 0",
        INTERVALS,
        drawn=False,
    ),
    "dntk": Quantity(
        "dNTK along the real displacement",
        "(||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N C)), v the displacement over the last interval, at its "
        "start: relative change of the NTK per unit of rms change of the outputs",
        "1 / unit of the output",
        "PDLT 11.1; the contraction derived here",
        "0: dNTK vanishes as 1/n",
        DERIVATIVES,
        among_the_first=True,
    ),
    "ddntk": Quantity(
        "ddNTK along the real displacement",
        "(||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / N C), v as for the dNTK",
        "1 / (unit of the output)^2",
        "PDLT chapter infinity; the contraction derived here",
        "0: ddNTK vanishes as 1/n",
        DERIVATIVES,
    ),
    "dntk_along_gradient": Quantity(
        "dNTK along the training gradient",
        "(||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N C)), v = lambda grad L",
        "1 / unit of the output",
        "PDLT 11.1; the contraction derived here",
        "0: dNTK vanishes as 1/n",
        DERIVATIVES,
    ),
    "ddntk_along_gradient": Quantity(
        "ddNTK along the training gradient",
        "(||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / N C), v = lambda grad L",
        "1 / (unit of the output)^2",
        "PDLT chapter infinity; the contraction derived here",
        "0: ddNTK vanishes as 1/n",
        DERIVATIVES,
    ),
    "expansion_gauge": Quantity(
        "Expansion about theta_0: ddNTK's change of the NTK over dNTK's",
        "||ddI d d + transpose + 2 ddII d d|| / (2 ||dH d + transpose||) at theta_0, d = theta - theta_0; beyond 0.5 "
        "the expansion is not drawn",
        "1",
        "derived here, from PDLT 11.1 and chapter infinity",
        "undefined: both vanish as 1/n",
        TAYLOR,
    ),
    "expansion_radius": Quantity(
        "Expansion about theta_0: its radius m*",
        "rms motion J d / sqrt(N C) of the outputs at which the gauge is 0.5, d along the optimizer's first step",
        "unit of the output",
        "derived here, from PDLT 11.1 and chapter infinity",
        "undefined: H does not change",
        TAYLOR,
    ),
    "expansion_response": Quantity(
        "Expansion about theta_0: its response r_0",
        "(||dH d + transpose|| / ||H_0||) / (||J d|| / sqrt(N C)), d along the optimizer's first step",
        "1 / unit of the output",
        "PDLT 11.1; the contraction derived here",
        "0: dNTK vanishes as 1/n",
        TAYLOR,
    ),
    "ntk_expansion_error": Quantity(
        "NTK: error of its change since theta_0 by dNTK, and by dNTK and ddNTK",
        "||H - H_0 - P|| / ||H - H_0||; order 0: P = 0; P by the derivatives at theta_0 along theta - theta_0",
        "1",
        "derived here, from PDLT 11.1 and chapter infinity",
        "undefined: nothing changes",
        TAYLOR,
    ),
    "representation_expansion_error": Quantity(
        "Hidden kernels: error of their change since theta_0 by its first and second order",
        "mean over hidden layers of ||K - K_0 - P|| / ||K - K_0||; order 0: P = 0; P by the derivatives at theta_0 "
        "along theta - theta_0",
        "1",
        "derived here, from PDLT 11.4",
        "undefined: nothing changes",
        TAYLOR,
    ),
    "taylor_remainder": Quantity(
        "What Taylor terms up to order 3 leave of the outputs' change",
        "||f - sum_{k <= 3} f_k|| / ||f - f_0||, f_k the Taylor term of order k in theta - theta_0",
        "1",
        "PDLT 0.5",
        "0, and at order 1/n too: it is of order 1/n^2",
        TAYLOR,
        among_the_first=True,
    ),
    "taylor_terms": Quantity(
        "Taylor terms of the outputs' change, by order",
        "||f_k|| / ||f - f_0||, f_k the Taylor term of order k in theta - theta_0",
        "1",
        "PDLT 0.5",
        "1 for order 1, 0 for the others: of order 1/n",
        TAYLOR,
    ),
    "taylor_orders_needed": Quantity(
        "Taylor orders that this network needs",
        "smallest k with ||f - sum_{j <= k} f_j|| <= 0.05 ||f - f_0||; 4 means more than 3",
        "1",
        "derived here, from PDLT 0.5",
        "1: the network is linear in its parameters",
        TAYLOR,
    ),
    "shadow_output": Quantity(
        "Output along the motion of its linear shadow",
        "<z - z(0), u> / sqrt(N C), u the direction of motion of the Taylor model of order 1, trained alike (order 0); "
        "order 1: of the Taylor model of order 3",
        "unit of the output",
        "derived here, from PDLT 0.5",
        "order 0: the linear model is the network",
        TAYLOR,
    ),
    "shadow_output_error": Quantity(
        "Output: error of its shadows",
        "||z - z_k|| / max ||z_1 - z(0)||, z_k of the Taylor models of order 1 (order 0), 3 (order 1), trained alike",
        "1",
        "derived here, from PDLT 0.5",
        "0 at order 0",
        TAYLOR,
    ),
    "overhead_percent": Quantity(
        "Time spent measuring, % of the training's own",
        "100 (time in torch_eft) / (time since the start - time in torch_eft)",
        "%",
        "wall clock",
        "says nothing about width",
        COST,
        among_the_first=True,
    ),
}


_BUILT_IN = frozenset(QUANTITIES)


def register_quantity(
    name: str,
    *,
    title: str,
    formula: str,
    unit: str = "1",
    source: str = "user's own",
    at_infinite_width: str = "not known",
) -> Quantity:
    """Add a quantity of your own, so that an instrument may log it and charts have its title.

    Register it in every process that logs it; TensorBoard reads title and formula from the run itself.

    Args:
        name: Name in tags, of letters, digits and underscores: ``"my_quantity"`` is logged as
            ``eft-more/my_quantity/measured``.
        title: Title of its charts.
        formula: How it is computed.
        unit: Its unit; ``"1"`` for a pure number.
        source: Where it comes from.
        at_infinite_width: Its value at infinite width, as a phrase.

    Returns:
        The registered ``Quantity``. Registering a name of your own again replaces it.

    Raises:
        ValueError: If the name is not usable in a tag, or is one of the package's own.

    Example:
        >>> from torch_eft.tensorboard import register_quantity, tag
        >>> _ = register_quantity("weight_norm", title="Norm of the weights", formula="||theta||")
        >>> tag("weight_norm")
        'eft-more/weight_norm/measured'
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(f"name: {name!r} given; use letters, digits and underscores, as in 'my_quantity'")
    if name in _BUILT_IN:
        raise ValueError(f"name: {name!r} is a quantity of torch_eft itself ({QUANTITIES[name].title}); choose another")
    QUANTITIES[name] = Quantity(title, formula, unit, source, at_infinite_width)
    return QUANTITIES[name]


def is_drawn(quantity: str) -> bool:
    """Return whether the tab and reports have a chart of a quantity."""
    return quantity not in QUANTITIES or QUANTITIES[quantity].drawn


def documented(quantities: Mapping[str, object] | list[str]) -> dict[str, dict[str, str]]:
    """Entries of some quantities as plain dicts, in the order of the registry."""
    wanted = set(quantities)
    return {name: quantity.to_dict() for name, quantity in QUANTITIES.items() if name in wanted}
