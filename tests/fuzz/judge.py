"""Every measuring function is asked about a case and its answers are judged: right, told, refused, wrong or a crash."""

import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy
import torch
from torch.nn.utils import parametrize

from tests.fuzz import truth
from tests.fuzz.compose import called
from tests.fuzz.hazards import OUTSIDE
from torch_eft import measure
from torch_eft.measure import NTKDerivatives

OURS = re.compile(r"^(model|probe|output_fn|direction|theta_0|theta|lambdas|memory|num_eigenpairs|layers)\b[^:]*: ")
"""How sentences of ours begin: with the argument that they are about."""
ENVIRONMENTS = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "parametrize.cached": parametrize.cached,
}


@dataclass
class Answer:
    """What one function said about one case.

    Args:
        question: Name of the function.
        outcome: ``right``, ``told`` (not the derivative of a first derivative, and ``.validity`` or a warning says so),
            ``undecided`` (the differences did not converge), ``refused``, ``wrong``, ``crash`` or ``touched``.
        text: Errors, or the words of the refusal.
    """

    question: str
    outcome: str
    text: str = ""


@dataclass
class Compared:
    """A number, what it should be, and the error allowed."""

    label: str
    got: torch.Tensor
    want: torch.Tensor
    allowed: float
    undecided: bool = False
    flagged: bool = False


@dataclass
class Examined:
    """A case and what is right about it, computed when first asked for."""

    case: object
    r: random.Random
    z: torch.Tensor = None
    J: torch.Tensor = None
    lines: dict = field(default_factory=dict)

    def __post_init__(self):
        case, r = self.case, self.r
        with truth.evaluated(case):
            self.z, self.J = truth.jacobian(case, case.x)
        self.N, self.C, self.P = self.J.shape
        self.names = list(truth.trainable(case))
        self.sizes = [p.numel() for p in truth.trainable(case).values()]
        kind = r.choice(["none", "one", "each", "some"])
        values = {"none": 1.0, "one": 0.7}.get(kind)
        self.lambdas = None if kind == "none" else values
        if values is None:
            self.lambdas = {
                name: 0.0 if kind == "some" and r.random() < 0.3 else r.uniform(0.3, 2) for name in self.names
            }
            if not any(self.lambdas.values()):
                self.lambdas[self.names[0]] = 1.0
        each = [1.0 if kind == "none" else values if values is not None else self.lambdas[name] for name in self.names]
        self.scale = torch.cat(
            [torch.full((size,), value, dtype=torch.float64) for size, value in zip(self.sizes, each, strict=True)]
        )
        generator = torch.Generator().manual_seed(case.seed)
        self.weights = torch.randn(2, self.N, self.C, generator=generator, dtype=torch.float64)
        self.e = torch.randn(self.N, self.C, generator=generator, dtype=torch.float64)
        self.options = {"lambdas": self.lambdas, "output_fn": case.output_fn}
        theta = truth.flattened(case, truth.trainable(case))
        v = torch.randn(self.P, generator=generator, dtype=torch.float64)
        self.v = 0.2 * v * (theta.norm() + 0.1) / v.norm()

    def gram(self, left, right, lambdas=True):
        return torch.einsum("aip,p,bjp->abij", left, self.scale if lambdas else torch.ones_like(self.scale), right)

    def rounding(self, value):
        """Ten thousand roundings of double precision, some of coarser ones, of the largest number."""
        factor = 1e4 if self.case.eps == 2.0**-52 else 32
        return factor * self.case.eps * float(value.abs().max()) + 1e-14

    def line(self, v):
        key = v.numpy().tobytes()
        if key not in self.lines:
            with truth.evaluated(self.case):
                self.lines[key] = truth.along(self.case, v, self.weights)
        return self.lines[key]


def questions(at: Examined, measure) -> dict[str, Callable[[], Iterator[Compared]]]:
    case, r = at.case, at.r
    net, x, fn = case.net, case.x, case.output_fn

    def exact(label, got, want, scale=None):
        return Compared(label, got.double(), want, at.rounding(want if scale is None else scale))

    def output():
        yield exact("output", measure.output(net, x, output_fn=fn), at.z)

    def ntk():
        yield exact("H", measure.ntk(net, x, **at.options), at.gram(at.J, at.J))

    def trace():
        H = at.gram(at.J, at.J)
        yield exact("trace", measure.ntk(net, x, trace=True, **at.options), torch.einsum("abii->ab", H) / at.C, H)

    def parts():
        per = r.choice(["layer", "parameter"])
        found = measure.ntk(net, x, per=per, **at.options)
        total = at.gram(at.J, at.J)
        want = {}
        for name, J, scale in zip(at.names, at.J.split(at.sizes, -1), at.scale.split(at.sizes), strict=True):
            if float(scale[0]) > 0:
                key = name if per == "parameter" else name.rpartition(".")[0] or name
                want[key] = want.get(key, 0) + torch.einsum("aip,p,bjp->abij", J, scale, J)
        for name in {*want, *found}:
            zero = torch.zeros_like(total)
            yield exact(f"H of {name}", found.get(name, zero), want.get(name, zero), total)

    def cross():
        with truth.evaluated(case):
            _, J = truth.jacobian(case, case.others)
        want = at.gram(at.J, J)
        yield exact(
            "H(x, other)",
            measure.ntk(net, x, other=case.others, **at.options),
            want,
            at.gram(at.J, at.J).abs().max() + want,
        )

    def product():
        want = torch.einsum("abij,bj->ai", at.gram(at.J, at.J), at.e)
        yield exact(
            "H v", measure.ntk_vector_product(net, x, at.e, **at.options), want, at.gram(at.J, at.J) * at.e.norm()
        )

    def vjp():
        want = at.scale * torch.einsum("aip,ai->p", at.J, at.e)
        yield exact("J^T e", truth.flattened(case, measure.ntk_vjp(net, x, at.e, **at.options)), want)

    def eigenpairs():
        M = at.N * at.C
        k = r.randint(1, M)
        H = at.gram(at.J, at.J).permute(0, 2, 1, 3).reshape(M, M)
        found = measure.ntk_eigenpairs(net, x, k, tolerance=1e-10, **at.options)
        V = found.vectors.reshape(k, M).double()
        values = torch.linalg.eigvalsh(H).flip(0)
        # The residual bounds the distance to an eigenvalue; reached is the tolerance, or the rounding.
        allowed = 1e-9 * float(values[0].abs()) + at.rounding(H)
        yield Compared("eigenvalues", found.values.double(), values[:k], allowed)
        yield Compared("residuals", V @ H, found.values.double()[:, None] * V, allowed)
        yield Compared("orthonormal", V @ V.T, torch.eye(k, dtype=torch.float64), 1e-9 + 32 * case.eps)

    def line_products(v, masked=True):
        """w J_1 lambda J_0^T and so on for the two w, and the errors of the differences."""
        line = at.line(v)
        J = at.J.reshape(-1, at.P)
        size = (J * at.scale).norm(dim=1).max()
        return line, J, size

    def derivatives_of(found, v, trace):
        line, J, size = line_products(v)
        told = found.validity.flag == "invalid"
        orders = {"dH": (found.dH, line.first, line.first_error, 1.0)}
        if found.ddI is not None:
            orders["ddI"] = (found.ddI, line.second, line.second_error, 1.0)
        for label, (got, change, error, factor) in orders.items():
            for k in range(2):
                want = factor * (change[k] * at.scale) @ J.T  # w . J_n lambda J_0^T
                got_k = torch.einsum("ai,abij->bj", at.weights[k], got.double()).reshape(-1) if not trace else None
                if trace:
                    continue
                yield decided(label, got_k, want, float(error[k] * size), told)
        if found.ddII is not None and not trace:
            got = torch.einsum("kai,abij,lbj->kl", at.weights, found.ddII.double(), at.weights)
            want = torch.einsum("kp,p,lp->kl", line.first, at.scale, line.first)
            error = 2 * float(line.first_error.max() * (line.first * at.scale).norm(dim=1).max())
            yield decided("ddII", got, want, error, told)

    def decided(label, got, want, error, told=False, scale=None):
        size = float(want.abs().max()) if scale is None else scale
        floor = at.rounding(at.gram(at.J, at.J) * at.v.norm() + at.z.abs().max())
        allowed = 4 * error + 1e-7 * size + 1e3 * floor
        natural = float(at.gram(at.J, at.J).abs().max() * (at.v.norm() + at.v.norm() ** 2))
        return Compared(
            label,
            got,
            want,
            allowed,
            undecided=error > 1e-2 * size + 1e-6 * natural,
            flagged=told and "cut" in case.notes,
        )

    def derivatives():
        order = r.choice([1, 2])
        if r.random() < 0.5:
            v = at.v * (at.scale > 0)
            direction = truth.unflattened(case, at.v)
        else:
            e = at.e / (at.scale * torch.einsum("aip,ai->p", at.J, at.e)).norm().clamp_min(1e-6) * at.v.norm()
            v, direction = at.scale * torch.einsum("aip,ai->p", at.J, e), e
        found = measure.ntk_derivatives(net, x, direction, derivatives=order, **at.options)
        yield exact("H", found.H, at.gram(at.J, at.J))
        yield from derivatives_of(found, v, False)

    def derivatives_of_trace():
        v = at.v * (at.scale > 0)
        direction = truth.unflattened(case, at.v)
        whole = measure.ntk_derivatives(net, x, direction, **at.options)
        found = measure.ntk_derivatives(net, x, direction, trace=True, **at.options)
        yield from derivatives_of(whole, v, False)
        for name in ("H", "dH", "ddI", "ddII"):
            full, traced = getattr(whole, name).double(), getattr(found, name).double()
            allowed = at.rounding(full) + 1e3 * at.rounding(at.gram(at.J, at.J) * (1 + at.v.norm() ** 2))
            yield Compared(f"trace of {name}", traced, torch.einsum("abii->ab", full) / at.C, allowed)

    def whole():
        if at.N * at.C > 6 or at.P > 80:
            yield exact("output", measure.output(net, x, output_fn=fn), at.z)
            return
        e = at.e / (at.scale * torch.einsum("aip,ai->p", at.J, at.e)).norm().clamp_min(1e-6) * at.v.norm()
        v = at.scale * torch.einsum("aip,ai->p", at.J, e)
        dH, ddI, ddII = measure.dntk(net, x, **at.options), None, None
        if r.random() < 0.5 and at.N * at.C <= 4:
            ddI, ddII = measure.ddntk(net, x, **at.options)
        found = NTKDerivatives(
            None,
            torch.einsum("abcijk,ck->abij", dH.double(), e),
            None if ddI is None else torch.einsum("abcdijkl,ck,dl->abij", ddI.double(), e, e),
            None if ddII is None else torch.einsum("abcdijkl,ck,dl->abij", ddII.double(), e, e),
            (),
            "",
        )
        yield from derivatives_of(found, v, False)

    def moved():
        with truth.evaluated(case), truth.displaced(case, at.v, 1.0):
            return truth.jacobian(case, x)

    def there():
        return truth.unflattened(case, truth.flattened(case, truth.trainable(case)) + at.v)

    def terms_of(terms, told):
        """f' d, f'' d d / 2 and f''' d d d / 6 against the line's differences."""
        if "cut" in case.notes and not told:  # they are the function's own
            with truth.evaluated(case):
                own, errors = truth.polynomial(case, at.v)
            for degree, term in enumerate(terms, 1):
                yield decided(f"Taylor term {degree}", term.double(), own[degree], float(errors[degree]))
            return
        line = at.line(at.v)
        if not told:
            yield exact("f' d", terms[0], torch.einsum("aip,p->ai", at.J, at.v), at.J.abs().max() * at.v.norm())
        for degree, (change, error) in enumerate(((line.first, line.first_error), (line.second, line.second_error)), 2):
            if len(terms) < degree:
                break
            factor = 2 if degree == 2 else 6
            got = (at.weights * terms[degree - 1].double()).sum((1, 2))
            want = change @ at.v / factor
            bound = float(error.max() * at.v.norm() / factor)
            yield decided(f"Taylor term {degree}", got, want, bound, told)

    def taylor():
        order = r.choice([1, 2, 3, 3])
        found = measure.taylor_series(net, x, net, there(), taylor_order=order, output_fn=fn)
        value, _ = moved()
        yield exact("f", found.terms[0], at.z)
        yield exact("f(theta)", found.value, value)
        told = bool(found.cut)
        yield from terms_of(found.terms[1:], told)

    def change():
        distance = r.choice([1.0, 0.1])
        found = measure.ntk_change(net, x, net, there(), distance=distance, **at.options)
        _, J = moved()
        want = (at.gram(J, J) - at.gram(at.J, at.J)) / distance
        yield exact(
            "secant", found.value, want, (at.gram(J, J).abs().max() + at.gram(at.J, at.J).abs().max()) / distance
        )

    def displacement():
        order = r.choice([1, 2])
        found = measure.displacement_terms(net, x, net, there(), derivatives=order, **at.options)
        z, J = moved()
        told = found.validity.flag == "invalid"
        yield exact("output", found.output, at.z)
        yield exact("change of the output", found.output_change, z - at.z, z.abs().max() + at.z.abs().max())
        scale = at.gram(J, J).abs().max() + at.gram(at.J, at.J).abs().max()
        yield exact("change of H", found.ntk_change, at.gram(J, J) - at.gram(at.J, at.J), scale)
        yield from terms_of(found.output_terms, told)
        line = at.line(at.v * (at.scale > 0))
        g = torch.einsum("kai,aip->kp", at.weights, at.J) * at.scale
        w = at.weights
        got = torch.einsum("ai,sabij,bj->s", w[0], found.ntk_terms.double(), w[1])
        firsts = line.first[0] @ g[1] + line.first[1] @ g[0]
        seconds = (line.second[0] @ g[1] + line.second[1] @ g[0]) / 2 + (line.first[0] * at.scale) @ line.first[1]
        size = float(g.norm(dim=1).max())
        yield decided("dNTK's change", got[0], firsts, 2 * float(line.first_error.max()) * size, told)
        if order == 2:
            both = float(line.second_error.max()) * size + 2 * float(line.first_error.max()) * float(
                (line.first.abs() * at.scale).sum(1).max()
            )
            yield decided("ddNTKs' change", got[1], seconds, both, told)

    def representation():
        names = [name for name, _ in net.named_children() if name == "head"]
        names += [f"stages.{k}" for k in range(len(net.stages))]
        seen = {}

        def keep(name):
            return lambda module, inputs, output: seen.__setitem__(name, output.detach().clone())

        modules = dict(net.named_modules())
        names = [name for name in names if not isinstance(modules[name], torch.jit.ScriptModule)]  # takes no hooks
        handles = [modules[name].register_forward_hook(keep(name)) for name in names]
        try:
            with truth.evaluated(case):
                called(net, x, fn)
        finally:
            for handle in handles:
                handle.remove()
        found = measure.representation(net, x, layers=names, output_fn=fn)
        for name in names:
            s = seen[name].flatten(1).double()
            yield exact(f"K of {name}", found.K[name], s @ s.T / s.shape[1])

    return {
        **{"output": output, "ntk": ntk, "trace": trace, "parts": parts, "cross": cross, "product": product},
        **{"vjp": vjp, "eigenpairs": eigenpairs, "derivatives": derivatives, "whole": whole},
        **{"derivatives of the trace": derivatives_of_trace, "taylor": taylor, "change": change},
        **{"displacement": displacement, "representation": representation},
    }


def state(net):
    """Everything that a measurement has to leave alone; a dict whose values can be compared."""
    values = [*net.named_parameters(), *net.named_buffers()]
    return {
        "values": [(name, value.detach().clone()) for name, value in values],
        "versions": [
            (name, value._version, id(value), value.data_ptr()) for name, value in values if not value.is_inference()
        ],
        "gradients": [(name, value.grad, value.requires_grad) for name, value in values],
        "modes": [module.training for module in net.modules()],
        "attributes": [{name: id(value) for name, value in vars(module).items()} for module in net.modules()],
        "plain attributes": [
            {name: value for name, value in vars(module).items() if isinstance(value, int | str)}
            for module in net.modules()
        ],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()],
        "outside": list(OUTSIDE),
        "random": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "process": (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
        ),
    }


def touched(before, after):
    """Names of what differs."""
    return [name for name in before if not _same(before[name], after[name])]


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


class Watched:
    """The functions of ``measure``, called in an environment; what they touch is noted."""

    def __init__(self, net, environment="plain"):
        self.net, self.environment, self.touched = net, environment, []

    def __getattr__(self, name):
        function = getattr(measure, name)

        def call(*arguments, **options):
            before = state(self.net)
            try:
                with ENVIRONMENTS[self.environment]():
                    return function(*arguments, **options)
            finally:
                self.touched += touched(before, state(self.net))

        return call


def ask(at, name, environment="plain") -> Answer:
    """Ask one question, in an environment, and judge the answer."""
    watched = Watched(at.case.net, environment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            answer = _judged(name, list(questions(at, watched)[name]()))
        except (ValueError, TypeError) as error:
            kind = "refused" if OURS.match(str(error)) else "crash"
            answer = Answer(name, kind, f"{type(error).__name__}: {error}")
        except Exception as error:
            answer = Answer(name, "crash", f"{type(error).__name__}: {str(error)[:300]}")
    return Answer(name, "touched", ", ".join(watched.touched)) if watched.touched else answer


def _judged(name, compared):
    wrong, undecided, told = [], [], []
    for part in compared:
        if tuple(part.got.shape) != tuple(part.want.shape):
            wrong.append(f"{part.label}: shape {tuple(part.got.shape)} for {tuple(part.want.shape)}")
            continue
        error = float((part.got - part.want).abs().max())
        if error <= part.allowed:
            if part.undecided:
                undecided.append(part.label)
            continue
        size = float(part.want.abs().max())
        text = f"{part.label}: off by {error:.3g}, of {size:.3g}, allowed {part.allowed:.2g}"
        (undecided if part.undecided else told if part.flagged else wrong).append(text)
    for outcome, found in (("wrong", wrong), ("undecided", undecided), ("told", told)):
        if found:
            return Answer(name, outcome, "; ".join(found))
    return Answer(name, "right")
