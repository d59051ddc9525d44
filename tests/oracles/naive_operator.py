"""The ensemble at order 1/n, the long way: a differential operator on the trained network as a function of its tensors.

Combined indices a = (input x, output i) throughout, no reduction of any kind. ``simulate`` trains one network given
z, H, dH, ddI, ddII at initialization, in the coefficient form: theta_t - theta_0 = p J + q u + r v + s w. The mean over
initializations to order 1/n is a sum of derivatives of its results, one for each cumulant, at
(z ~ N(0, K), H = Theta, 0, 0, 0), under any optimizer as torch defines it; all of them are polynomials in z of degree
four at most, whose Gaussian mean a cubature of degree five takes exactly.
"""

import itertools
import math

import torch
from torch.func import grad, jvp, vmap

from torch_eft.theory.training.optimizer import SGDState


def simulate(z, H, dH, ddI, ddII, errors, descent, record):
    """Outputs and NTK at the recorded steps, (R, M) and (R, M, M); ``errors`` gives e = dLoss/dz, 0 on probes."""
    M = len(z)
    coefficients = SGDState(descent, *(z.new_zeros([M] * order) for order in (1, 2, 3, 3)))
    outputs, kernels = [], []
    for step in range(descent.steps + 1):
        p, q, r, s = coefficients.values
        now = (
            z
            + H @ p
            + torch.einsum("bac,bc->a", dH, q)
            + torch.einsum("abc,b,c->a", dH, p, p) / 2
            + torch.einsum("bcda,bcd->a", ddI, r)
            + torch.einsum("bcad,bcd->a", ddII, s)
            + torch.einsum("acbd,b,cd->a", ddII, p, q)
            + torch.einsum("abcd,b,c,d->a", ddI, p, p, p) / 6
        )
        if step in record:
            half = torch.einsum("abc,c->ab", dH, p)
            half = half + torch.einsum("acbd,cd->ab", ddII, q) + torch.einsum("abcd,c,d->ab", ddI, p, p) / 2
            outputs.append(now)
            kernels.append(H + half + half.T + torch.einsum("abcd,c,d->ab", ddII, p, p))
        if step < descent.steps:
            e = errors(now, step)
            cubic = torch.einsum("b,c,d->bcd", e, p, p) / 2, torch.einsum("b,cd->bcd", e, q)
            coefficients.update(e, torch.outer(e, p), *cubic)
    return torch.stack(outputs), torch.stack(kernels)


def with_outputs(tensors, outputs):
    """Vertices (N, N, ..) to cumulants on combined indices (x, i): a list of (tensor, pairs of equal outputs).

    Args:
        tensors: ``[(vertex, printed labels, pairs)]``, e.g. ``(P, (0, 1, 2, 3), ((0, 3), (1, 2)))``.
        outputs: n_L.
    """
    N, total = tensors[0][0].shape[0], None
    eye = torch.eye(outputs, dtype=torch.float64)
    for vertex, printed, pairs in tensors:
        order = len(printed)
        labels = "abcd"[:order]
        array = vertex.permute([printed.index(slot) for slot in range(order)])
        colors = "ijkl"[:order]
        deltas = ",".join(colors[first] + colors[second] for first, second in pairs)
        out = "".join(labels[slot] + colors[slot] for slot in range(order))
        term = torch.einsum(f"{labels},{deltas}->{out}", array, *[eye] * len(pairs))
        term = term.reshape([N * outputs] * order)
        total = term if total is None else total + term
    return total


def cumulants(t, outputs):
    """All cumulants that enter, on combined indices, from vertices ``{name: tensor}`` in printed order.

    E_zzzz .. E_ddII, where they are given, where all four outputs are one.
    """
    one_two, one_three, one_four = ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))

    def of(*terms):
        return with_outputs(terms, outputs)

    found = {
        "G1": of((t["G1"], (0, 1), ((0, 1),))),
        "Theta1": of((t["Theta1"], (0, 1), ((0, 1),))),
        "HH": of((t["A"], (0, 1, 2, 3), one_two), (t["B"], (0, 2, 1, 3), one_three), (t["B"], (0, 3, 1, 2), one_four)),
        "zzH": of((t["D"], (0, 1, 2, 3), one_two), (t["F"], (0, 2, 1, 3), one_three), (t["F"], (0, 3, 1, 2), one_four)),
        # Slots 0, 1, 2 of dH and 3 of z.
        "dHz": of((t["P"], (0, 1, 2, 3), one_four), (t["Q"], (0, 1, 2, 3), one_two), (t["Q"], (0, 2, 1, 3), one_three)),
        "ddI": of((t["R"], (0, 1, 2, 3), one_two), (t["R"], (0, 2, 3, 1), one_three), (t["R"], (0, 3, 1, 2), one_four)),
        "ddII": of(
            (t["S"], (0, 1, 2, 3), one_two), (t["T"], (0, 2, 1, 3), one_three), (t["U"], (0, 3, 1, 2), one_four)
        ),
        "zzzz": of(
            (t["V"], (0, 1, 2, 3), one_two), (t["V"], (0, 2, 1, 3), one_three), (t["V"], (0, 3, 1, 2), one_four)
        ),
    }
    for name in ("zzzz", "zzH", "HH", "dHz", "ddI", "ddII"):
        if f"E_{name}" in t:
            found[name] = found[name] + of((t[f"E_{name}"], (0, 1, 2, 3), ((0, 1), (1, 2), (2, 3))))
    return found


def gaussian_nodes(K):
    """The 2 M^2 + 1 nodes and weights of a rule for N(0, K), exact to degree 5 (McNamee & Stenger 1967)."""
    values, vectors = torch.linalg.eigh(K)
    M, eye = len(K), torch.eye(len(K), dtype=K.dtype)
    single = [sign * eye[a] for a in range(M) for sign in (1, -1)]
    double = [
        first * eye[a] + second * eye[b]
        for a, b in itertools.combinations(range(M), 2)
        for first, second in itertools.product((1, -1), repeat=2)
    ]
    nodes = [0 * eye[:1], math.sqrt(M + 2) * torch.stack(single), math.sqrt((M + 2) / 2) * torch.stack(double)]
    sizes = (2 / (M + 2), (4 - M) / (2 * (M + 2) ** 2), 1 / (M + 2) ** 2)
    weights = torch.cat([K.new_full((len(some),), size) for some, size in zip(nodes, sizes, strict=True)])
    return torch.cat(nodes) @ (vectors * values.clamp_min(0).sqrt()).T, weights


def first_order(K, Theta, tensors, y, probes, outputs, descent, record, loss=None, rule=None):
    """n times the corrections of E z, E z z and E H at order 1/n, and the order-0 means of z and zz.

    With ``loss``, a function of the training outputs (N, n_L) and the step in the place of
    (1/2) sum (z - y)^2, V enters too, and
    ``rule`` is to give the (nodes, weights) of N(0, K) on combined indices.

    Returns:
        A dict of (R, M), (R, M, M), .. tensors on combined indices: ``"z"``, ``"zz"``, ``"H"`` of order 1/n, and
        ``"zzz"``, ``"zzzz"`` of one output (the latter without V unless ``loss`` is given); ``"z0"``, .. of order 0.
    """
    c = cumulants(tensors, outputs)
    eye = torch.eye(outputs, dtype=K.dtype)
    K, Theta = (torch.einsum("ab,ij->aibj", m, eye).reshape(len(m) * outputs, -1) for m in (K, Theta))
    M = len(K)
    train = torch.ones(M // outputs, outputs, dtype=K.dtype)
    train[:probes] = 0
    target = torch.zeros(M // outputs, outputs, dtype=K.dtype)
    target[probes:] = 0 if y is None else y
    zero = [K.new_zeros([M] * k) for k in (3, 4, 4)]
    basis = torch.eye(M, dtype=K.dtype)

    def errors(z, step):
        if loss is None:
            return (z - target.flatten()) * train.flatten()
        trained = z.reshape(-1, outputs)[probes:]
        return torch.cat([z.new_zeros(probes * outputs), grad(loss)(trained, step).flatten()])

    def observables(z, H, dH, ddI, ddII):
        out, kernel = simulate(z, H, dH, ddI, ddII, errors, descent, record)
        return torch.cat([moments(out), kernel.flatten()])

    def moments(out):
        both = torch.einsum("ra,rb->rab", out, out)
        return torch.cat([out.flatten(), both.flatten(), out.pow(3).flatten(), out.pow(4).flatten()])

    def derivative(function, direction):
        """A function's derivative along fixed tangents of (z, H, dH, ddI, ddII); None is zero."""

        def differentiated(*point):
            tangents = tuple(torch.zeros_like(p) if d is None else d for p, d in zip(point, direction, strict=True))
            return jvp(function, point, tangents)[1]

        return differentiated

    def along_z(function, direction):
        return lambda z: jvp(function, (z,), (direction,))[1]

    def along(z=None, H=None, dH=None, ddI=None, ddII=None):
        return (z, H, dH, ddI, ddII)

    values, vectors = torch.linalg.eigh(c["HH"].reshape(M * M, M * M))
    kept = values.abs() > 1e-14 * values.abs().max()
    values, pairs = values[kept], vectors.T[kept].reshape(-1, M, M)

    def correction(z):
        point = (z, Theta, *zero)
        total = derivative(observables, along(H=c["Theta1"]))(*point)
        total = total + derivative(observables, along(ddI=c["ddI"], ddII=c["ddII"]))(*point)

        def fluctuation(value, direction):
            first = derivative(observables, along(H=direction))
            return value / 2 * derivative(first, along(H=direction))(*point)

        total = total + vmap(fluctuation)(values, pairs).sum(0)

        def kernel(first, second, shift, direction):
            slope = derivative(derivative(observables, along(z=first)), along(z=second))
            curved = derivative(slope, along(H=direction))(*point)
            return shift / 2 * slope(*point) + curved / 2

        a, b = torch.triu_indices(M, M)
        twice = 2 - torch.eq(a, b).to(K)
        total = total + twice @ vmap(kernel)(basis[a], basis[b], c["G1"][a, b], c["zzH"][a, b])

        def cubic(first, direction):
            return derivative(derivative(observables, along(z=first)), along(dH=direction))(*point)

        total = total + vmap(cubic)(basis, c["dHz"].movedim(3, 0)).sum(0)
        if loss is None:  # of degree two in z at order 0
            return total

        def frozen(z):
            coefficients, outputs = SGDState(descent, torch.zeros_like(z)), []
            for step in range(descent.steps + 1):
                outputs.append(z + Theta @ coefficients.values[0])
                if step < descent.steps:
                    coefficients.update(errors(outputs[-1], step))
            out = torch.stack([outputs[step] for step in record])
            return torch.cat([moments(out), out.new_zeros(len(record) * M * M)])

        def quartic(indices):
            slope = frozen
            for index in indices.unbind():
                slope = along_z(slope, basis.index_select(0, index.reshape(1))[0])
            return slope(z)

        indices = torch.cartesian_prod(*[torch.arange(M)] * 4)
        return total + torch.tensordot(c["zzzz"].flatten() / 24, vmap(quartic)(indices), 1)

    nodes, weights = gaussian_nodes(K) if rule is None else rule(K)
    order_1 = vmap(correction)(nodes)
    order_0 = vmap(lambda z: observables(z, Theta, *zero))(nodes)
    R = len(record)
    parts = [(R * M, (R, M)), (R * M * M, (R, M, M)), *[(R * M, (R, M))] * 2, (R * M * M, (R, M, M))]

    def split(flat):
        return [
            piece.reshape(shape) for piece, (_, shape) in zip(flat.split([n for n, _ in parts]), parts, strict=True)
        ]

    names = ("z", "zz", "zzz", "zzzz", "H")
    corrections = dict(zip(names, split(weights @ order_1), strict=True))
    return corrections | {f"{name}0": value for name, value in zip(names, split(weights @ order_0), strict=True)}
