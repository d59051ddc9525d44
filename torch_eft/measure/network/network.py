"""One network bound once, isolated once, and measured as often as wanted."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.measure.forward.isolation import IsolatedModel, Model, Parameters, isolated
from torch_eft.measure.forward.output import output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.blocks import Estimate
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.jacobian.plan import Lambdas
from torch_eft.measure.kernels.dntk import DDNTK, Direction, NTKDerivatives, ddntk, dntk, ntk_derivatives
from torch_eft.measure.kernels.ntk import Coverage, Per, coverage, ntk, ntk_estimate
from torch_eft.measure.kernels.preconditioner import lambdas_of
from torch_eft.measure.kernels.products import Eigenpairs, ntk_eigenpairs, ntk_vector_product, ntk_vjp
from torch_eft.measure.kernels.random_outputs import projection, random_outputs
from torch_eft.measure.network.expansion import SnapshotExpansion, expand_snapshot
from torch_eft.measure.network.snapshot import Plan, Snapshot, take_snapshot
from torch_eft.measure.representations.hidden_kernels import Representation, hidden_kernels, representation
from torch_eft.measure.taylor.displacement import DisplacementTerms, RelativeDNTK, displacement_terms, relative_dntk
from torch_eft.measure.taylor.secant import NTKChange, ntk_change
from torch_eft.measure.taylor.series import TaylorSeries, taylor_series


class Network:
    """A network on fixed inputs, with its learning-rate tensor: every measurement as a method.

    As a context manager it isolates the network once (a copy that shares the parameters, the random and backend state
    saved) for all measurements inside; outside of ``with`` every method isolates it for itself. Parameters are read
    when the network is isolated: after a training step, enter it anew.

    Args:
        model: Any module, or one that is already isolated.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: See ``ntk``.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed, see ``ntk``; None for the default of 1 GiB.
        preconditioner: An optimizer in place of ``lambdas``, see ``ntk``; read at every measurement.
        prepare: Done to the isolated network at other parameters before it is measured there, as to this one before it
            was given: taking the statistics of BatchNorm.
        outputs: Random directions of the outputs for the NTK and its derivatives, see ``ntk``; ``output`` and all else
            are of all outputs.

    Attributes:
        model: The module.
        probe: The inputs, checked.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> network = measure.Network(torch.nn.Linear(3, 2, bias=False), torch.eye(3))
        >>> with network:
        ...     H, hidden = network.ntk(), network.representation(layers=[]).K
        >>> H.shape, bool((H[0, 0] == torch.eye(2)).all())
        (torch.Size([3, 3, 2, 2]), True)
    """

    def __init__(
        self,
        model: Model,
        x: Any,
        *,
        lambdas: Lambdas = None,
        output_fn: OutputFn | None = None,
        memory: int | None = None,
        preconditioner: Optimizer | None = None,
        prepare: Callable[[IsolatedModel], IsolatedModel] | None = None,
        outputs: str | None = None,
    ) -> None:
        self.model, self.probe = model, as_probe(x)
        self._lambdas, self.preconditioner, self.output_fn = lambdas, preconditioner, output_fn
        self.memory = DEFAULT_MEMORY if memory is None else memory
        self.prepare, self.outputs, self._directions = prepare, outputs, random_outputs(outputs)
        self._open: IsolatedModel | None = None
        self._context: AbstractContextManager[IsolatedModel] | None = None
        self._depth = 0

    def __enter__(self) -> "Network":
        if self._depth == 0:
            context = isolated(self.model, self.output_fn)
            self._open = context.__enter__()
            self._context = context
        self._depth += 1  # inside, another `with` is the same isolated copy
        return self

    def __exit__(self, *error: Any) -> None:
        if self._depth == 0:
            raise RuntimeError("network: __exit__ without __enter__; write `with network:`")
        self._depth -= 1
        if self._depth == 0:
            context, self._context, self._open = self._context, None, None
            assert context is not None
            context.__exit__(*error)

    def __repr__(self) -> str:
        """Name the module and the inputs."""
        current = self.current
        module, state = current, "not isolated"
        if isinstance(current, IsolatedModel):
            module, state = current.origin, "isolated" if current.isolation.open else "no longer isolated"
        return f"Network({type(module).__name__} on {self.probe.description}, {state})"

    @property
    def lambdas(self) -> Lambdas:
        """The learning-rate tensor; of an optimizer's preconditioner that of now."""
        current = self.current
        module = current.origin if isinstance(current, IsolatedModel) else current
        return lambdas_of(module, self._lambdas, self.preconditioner)

    @property
    def current(self) -> Model:
        """The isolated network inside ``with``, else the module: what any function of ``measure`` takes."""
        return self.model if self._open is None else self._open

    def on(self, x: Any, *, lambdas: Lambdas = None) -> "Network":
        """Return the same network on other inputs; inside ``with`` it shares the isolated copy.

        Made inside, it measures inside only: later its methods raise a ``RuntimeError``.

        Args:
            x: As for the class.
            lambdas: Another learning-rate tensor; None keeps this one.

        Returns:
            The network on these inputs.
        """
        kept: dict[str, Any] = {"lambdas": self._lambdas, "preconditioner": self.preconditioner}
        kept = kept if lambdas is None else {"lambdas": lambdas}
        options: dict[str, Any] = {"output_fn": self.output_fn, "memory": self.memory, "prepare": self.prepare}
        return Network(self.current, x, outputs=self.outputs, **kept, **options)

    def at(self, theta: Parameters) -> "Network":
        """Return the same network at other parameters, inside ``with`` only.

        Args:
            theta: ``{name of a trainable parameter: tensor}``; those left out are the network's own.

        Returns:
            A network that is open as long as this one is: later its methods raise a ``RuntimeError``.

        Raises:
            RuntimeError: Outside of ``with``.
        """
        if self._open is None:
            raise RuntimeError("at: the network is not isolated; use it inside `with network:`")
        moved = self._open.at(theta)
        prepared = moved if self.prepare is None else self.prepare(moved)
        options = self._options | {"memory": self.memory, "outputs": self.outputs}
        return Network(prepared, self.probe, prepare=self.prepare, **options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"lambdas": self.lambdas, "output_fn": self.output_fn}

    @property
    def _within(self) -> dict[str, Any]:
        """Options of what the directions of the outputs concern."""
        own = self.output_fn
        if self._directions is not None:
            if isinstance(self.current, IsolatedModel):
                own = own or self.current.output_fn
            own = projection(own, self._directions)
        return {"lambdas": self.lambdas, "output_fn": own, "memory": self.memory}

    def output(self) -> Tensor:
        """Return the outputs, (N, C); see ``measure.output``."""
        return output(self.current, self.probe, output_fn=self.output_fn)

    @overload
    def ntk(self, *, trace: bool = ..., per: None = ..., other: Any = ...) -> Tensor: ...

    @overload
    def ntk(self, *, trace: bool = ..., per: Per, other: Any = ...) -> dict[str, Tensor]: ...

    def ntk(self, *, trace: bool = False, per: Per | None = None, other: Any = None) -> Tensor | dict[str, Tensor]:
        """Return the NTK, (N, N, C, C); see ``measure.ntk``."""
        return ntk(self.current, self.probe, trace=trace, per=per, other=other, **self._within)

    def dntk(self, direction: Direction | None = None) -> Tensor:
        """Return the dNTK, whole or contracted; see ``measure.dntk``."""
        return dntk(self.current, self.probe, direction, **self._within)

    def ddntk(self, direction: Direction | None = None) -> DDNTK:
        """Return the two ddNTKs, whole or contracted; see ``measure.ddntk``."""
        return ddntk(self.current, self.probe, direction, **self._within)

    def derivatives(
        self, direction: Direction, *, derivatives: int = 2, trace: bool = False, kernel: bool = True
    ) -> NTKDerivatives:
        """Return H, dH and the ddNTKs contracted with a direction; see ``measure.ntk_derivatives``."""
        return ntk_derivatives(
            self.current,
            self.probe,
            direction,
            derivatives=derivatives,
            trace=trace,
            kernel=kernel,
            **self._within,
        )

    def vector_product(self, direction: Tensor) -> Tensor:
        """Return H v, (N, C); see ``measure.ntk_vector_product``."""
        return ntk_vector_product(self.current, self.probe, direction, **self._options)

    def vjp(self, direction: Tensor) -> dict[str, Tensor]:
        """Return lambda J^T e by parameter; see ``measure.ntk_vjp``."""
        return ntk_vjp(self.current, self.probe, direction, **self._options)

    def eigenpairs(self, num_eigenpairs: int, *, tolerance: float = 1e-5, num_matvecs: int | None = None) -> Eigenpairs:
        """Return the leading eigenpairs of H; see ``measure.ntk_eigenpairs``."""
        return ntk_eigenpairs(
            self.current, self.probe, num_eigenpairs, tolerance=tolerance, num_matvecs=num_matvecs, **self._options
        )

    def taylor(
        self, theta_0: Parameters, theta: Parameters, *, taylor_order: int = 3, check: bool = True
    ) -> TaylorSeries:
        """Return the Taylor terms of the output about theta_0 at theta; see ``measure.taylor_series``."""
        options: dict[str, Any] = {"taylor_order": taylor_order, "output_fn": self.output_fn, "check": check}
        return taylor_series(self.current, self.probe, theta_0, theta, **options)

    def displacement_terms(
        self,
        theta_0: Parameters,
        theta: Parameters,
        *,
        derivatives: int = 2,
        trace: bool = False,
        kernels: tuple[Tensor, Tensor] | None = None,
        ntk: bool = True,
    ) -> DisplacementTerms:
        """Return changes of outputs and NTK from theta_0 to theta; see ``measure.displacement_terms``."""
        return displacement_terms(
            self.current,
            self.probe,
            theta_0,
            theta,
            derivatives=derivatives,
            trace=trace,
            kernels=kernels,
            ntk=ntk,
            **self._within,
        )

    def relative_dntk(
        self,
        gradient: Mapping[str, Tensor],
        *,
        theta: Parameters | None = None,
        derivatives: int = 2,
        trace: bool = False,
    ) -> RelativeDNTK | None:
        """Return the sizes of dNTK and ddNTK along a gradient; see ``measure.relative_dntk``."""
        options: dict[str, Any] = {"theta": theta, "derivatives": derivatives, "trace": trace}
        return relative_dntk(self.current, self.probe, gradient, **options, **self._within)

    def ntk_change(
        self, theta_0: Parameters, theta: Parameters, *, distance: float = 1.0, trace: bool = False
    ) -> NTKChange:
        """Return the realized change of the NTK; see ``measure.ntk_change``."""
        return ntk_change(self.current, self.probe, theta_0, theta, distance=distance, trace=trace, **self._within)

    def expansion(
        self, theta_0: Parameters, theta: Parameters, plan: Plan, start: Snapshot, end: Snapshot
    ) -> SnapshotExpansion | None:
        """Expand the change of a snapshot from theta_0 to theta to second order about theta_0, inside ``with`` only.

        Args:
            theta_0: Every trainable parameter at the start, ``{name: tensor}`` or a module that holds them.
            theta: Every trainable parameter at the end, likewise.
            plan: What the snapshots hold; the NTK is in it.
            start: The snapshot at theta_0.
            end: The snapshot at theta.

        Returns:
            The realized change and its terms of first and second order; None where H has changed by little more than
            rounding.

        Raises:
            RuntimeError: Outside of ``with``.
            ValueError: As ``at``; if a parameter is missing.
        """
        if self._open is None:
            raise RuntimeError("expansion: the network is not isolated; use it inside `with network:`")
        first = self._open.complete(theta_0, "theta_0", every=True)
        last = self._open.complete(theta, "theta", every=True)

        def snapshot_at(t: float) -> Snapshot:
            return self.at({name: value + t * (last[name] - value) for name, value in first.items()}).snapshot(plan)

        return expand_snapshot(snapshot_at, start, end)

    def representation(
        self, *, targets: Tensor | None = None, layers: Sequence[str] | None = None, keep: bool = False
    ) -> Representation:
        """Return the hidden layers; see ``measure.representation``."""
        return representation(
            self.current, self.probe, targets=targets, layers=layers, output_fn=self.output_fn, keep=keep
        )

    def hidden_kernels(self, *, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the kernels of hidden layers; see ``measure.hidden_kernels``."""
        return hidden_kernels(self.current, self.probe, layers=layers, output_fn=self.output_fn)

    def coverage(self) -> Coverage:
        """Return how each parameter's Jacobian is computed; see ``measure.coverage``."""
        return coverage(self.current, self.probe, lambdas=self.lambdas, output_fn=self._within["output_fn"])

    def estimate(self, *, trace: bool = False, seconds: bool = False) -> Estimate:
        """Return the memory that ``ntk`` takes, and the time; see ``measure.ntk_estimate``."""
        return ntk_estimate(self.current, self.probe, trace=trace, seconds=seconds, **self._within)

    def snapshot(self, plan: Plan) -> Snapshot:
        """Return what a plan asks for; see ``measure.take_snapshot``."""
        return take_snapshot(self.current, self.probe, plan, memory=self.memory, **self._options)
