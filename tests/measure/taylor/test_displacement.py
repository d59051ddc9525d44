"""The terms of a displacement: against brute force, and their errors against powers of the displacement."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from torch_eft import measure
from torch_eft.measure.taylor.displacement import displacement_terms

F64 = torch.float64


def small(activation=nn.Tanh):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 2)).double()
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    d = {name: 0.1 * torch.randn_like(p) for name, p in theta.items()}
    lambdas = {name: 0.5 + 0.3 * index for index, name in enumerate(theta)}
    return model, theta, d, torch.randn(3, 3, dtype=F64), lambdas


def flat_jacobian(model, lambdas, x, theta):
    """(N C, P), whitened by sqrt(lambda)."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    rows = []
    for value in functional_call(model, leaves, (x,)).flatten():
        gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        rows.append(torch.cat([math.sqrt(lambdas[n]) * g.flatten() for n, g in zip(leaves, gradient, strict=True)]))
    return torch.stack(rows)


def along(model, lambdas, x, theta, d):
    """f and H as functions of s, for autograd in s."""

    def H(s):
        at = {name: value + s * d[name] for name, value in theta.items()}
        rows = []
        for value in functional_call(model, at, (x,)).flatten():
            gradient = torch.autograd.grad(value, list(at.values()), create_graph=True)
            rows.append(torch.cat([math.sqrt(lambdas[n]) * g.flatten() for n, g in zip(at, gradient, strict=True)]))
        J = torch.stack(rows)
        return J @ J.T

    def f(s):
        return functional_call(model, {name: value + s * d[name] for name, value in theta.items()}, (x,))

    return f, H


def derivatives(function, orders):
    """Derivatives of a function of one number at 0, entry by entry, by reverse mode of reverse mode."""
    s = torch.zeros((), dtype=F64, requires_grad=True)
    values = function(s)
    found = []
    for entry in values.flatten():
        row, current = [], entry
        for _ in range(orders):
            (current,) = torch.autograd.grad(current, s, create_graph=True)
            row.append(current.detach())
        found.append(torch.stack(row))
    return torch.stack(found, 1).unflatten(1, values.shape)


def test_terms_are_derivatives_along_the_displacement():
    """Reverse mode of reverse mode of f(theta + s d) and of the whole H(theta + s d), entry by entry."""
    model, theta, d, x, lambdas = small()
    end = {name: value + d[name] for name, value in theta.items()}
    found = displacement_terms(model, x, theta, end, lambdas=lambdas)
    f, H = along(model, lambdas, x, theta, d)
    df, dH = derivatives(f, 3), derivatives(H, 2)
    factorials = torch.tensor([1.0, 2.0, 6.0], dtype=F64)[:, None, None]
    torch.testing.assert_close(found.output_terms, df / factorials, rtol=1e-8, atol=1e-12)
    as_rows = torch.stack([measure.as_matrix(term) for term in found.ntk_terms])
    torch.testing.assert_close(as_rows, dH / factorials[:2], rtol=1e-8, atol=1e-12)
    J0, J1 = flat_jacobian(model, lambdas, x, theta), flat_jacobian(model, lambdas, x, end)
    change = measure.as_matrix(found.ntk_change)
    torch.testing.assert_close(change, (J1 @ J1.T - J0 @ J0.T).detach(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.output_change, model_at(model, end, x) - model_at(model, theta, x))
    traced = displacement_terms(model, x, theta, end, lambdas=lambdas, trace=True)
    torch.testing.assert_close(traced.ntk_terms[1], measure.as_trace(found.ntk_terms[1]))


def model_at(model, theta, x):
    return functional_call(model, theta, (x,)).detach()


def test_a_step_of_gradient_descent_is_minus_eta_H_e():
    """d = - eta lambda J^T e: f' d = - eta H e, and the NTK's first term is - eta (dH e + transpose)."""
    model, theta, _, x, lambdas = small()
    e, eta = torch.randn(3, 2, dtype=F64), 1e-3
    v = measure.ntk_vjp(model, x, e, lambdas=lambdas)
    end = {name: value - eta * v[name] for name, value in theta.items()}
    found = displacement_terms(model, x, theta, end, lambdas=lambdas)
    whole = torch.einsum("abij,bj->ai", measure.ntk(model, x, lambdas=lambdas), e)
    torch.testing.assert_close(found.output_terms[0], -eta * whole, rtol=1e-8, atol=1e-14)
    dH = torch.einsum("abcijk,ck->abij", measure.dntk(model, x, lambdas=lambdas), e)
    expected = -eta * (dH + dH.permute(1, 0, 3, 2))
    torch.testing.assert_close(found.ntk_terms[0], expected, rtol=1e-8, atol=1e-14)


def test_errors_fall_with_powers_of_the_displacement():
    """The remainder after terms of order k is of order k + 1: halved d, error / 2^(k+1), up to relative corrections of
    the size of the next term over this one, below 4 % here."""
    model, theta, d, x, lambdas = small()
    errors = []
    for scale in (1 / 8, 1 / 16):
        end = {name: value + scale * d[name] for name, value in theta.items()}
        found = displacement_terms(model, x, theta, end, lambdas=lambdas)
        f = [found.output_change - found.output_terms[:k].sum(0) for k in (1, 2, 3)]
        H = [found.ntk_change - found.ntk_terms[:k].sum(0) for k in (1, 2)]
        errors.append([float(error.norm()) for error in (*f, *H)])
    for coarse, fine, power in zip(*errors, (2, 3, 4, 2, 3), strict=True):
        assert coarse / fine == pytest.approx(2**power, rel=0.08)


def test_known_kernels_are_not_measured_again_and_first_order_alone_is_cheaper():
    model, theta, d, x, lambdas = small()
    end = {name: value + d[name] for name, value in theta.items()}
    kernels = torch.zeros(3, 3, 2, 2, dtype=F64), torch.ones(3, 3, 2, 2, dtype=F64)
    found = displacement_terms(model, x, theta, end, lambdas=lambdas, derivatives=1, kernels=kernels)
    assert torch.equal(found.ntk_change, torch.ones(3, 3, 2, 2, dtype=F64))
    assert len(found.ntk_terms) == 1
    assert displacement_terms(model, x, theta, end, ntk=False).ntk_terms is None


def test_what_the_numbers_do_not_say():
    model, theta, d, x, lambdas = small(nn.ReLU)
    end = {name: value + d[name] for name, value in theta.items()}
    assert "kinks (relu" in displacement_terms(model, x, theta, end, lambdas=lambdas).validity.reason
    lambdas["0.bias"] = 0.0
    found = displacement_terms(model, x, theta, end, lambdas=lambdas)
    share = float(d["0.bias"].norm() / torch.cat([part.flatten() for part in d.values()]).norm())
    assert found.frozen_moved == pytest.approx(share, rel=1e-12)
    assert "lambda = 0" in found.validity.reason
    with pytest.raises(ValueError, match="derivatives: 3 given"):
        displacement_terms(model, x, theta, end, derivatives=3)
    with pytest.raises(ValueError, match=r"theta_0: '0.weight' is missing"):
        displacement_terms(model, x, {}, end)


def test_every_number_may_have_its_own_lambda():
    model, theta, d, x, lambdas = small()
    end = {name: value + d[name] for name, value in theta.items()}
    tensors = {name: torch.full_like(theta[name], value) for name, value in lambdas.items()}
    one, each = (displacement_terms(model, x, theta, end, lambdas=given) for given in (lambdas, tensors))
    torch.testing.assert_close(each.ntk_terms, one.ntk_terms)
    assert each.frozen_moved == one.frozen_moved == 0
    first = next(iter(theta))
    tensors[first].view(-1)[0] = 0.0
    share = displacement_terms(model, x, theta, end, lambdas=tensors, ntk=False).frozen_moved
    whole = torch.cat([value.flatten() for value in d.values()]).norm()
    assert share == pytest.approx(float(d[first].view(-1)[0].abs() / whole), rel=1e-12)
