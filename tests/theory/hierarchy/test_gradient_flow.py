"""Gradient flow in closed form, against small steps of gradient descent."""

import pytest
import torch

from tests.theory.hierarchy.test_hierarchy import Tiny
from torch_eft.theory.hierarchy.contractions import path_tensors, with_joint_indices
from torch_eft.theory.hierarchy.gradient_flow import eigenmodes, first_order_flow, frozen_flow


def setting(seed=2):
    tiny = Tiny(P=12, seed=seed)
    parts = [with_joint_indices(tiny.split(value)) for value in tiny.tensors()]
    train = torch.tensor([4, 5, 0, 1])
    targets = tiny.y.flatten()
    modes = eigenmodes(parts[0][train][:, train], tiny.z[train] - targets, 1.0)
    tensors = path_tensors(*parts[1:], train, torch.arange(6), modes.basis, modes.dual)
    return tiny, parts[0][:, train], train, targets, modes, tensors


def test_small_steps_of_gradient_descent_tend_to_it_linearly():
    """Halving eta halves the error of every part, with the next order a part in 2^8 of the first."""
    tiny, H, train, targets, modes, tensors = setting()
    time, steps = 0.05, 4
    times = time * torch.arange(steps + 1)
    z0 = frozen_flow(tiny.z, H, train, targets, modes, times)
    first = first_order_flow(tiny.z, H, train, targets, tensors, modes, time, steps)
    assert float(first.z[-1].abs().max()) > 0.1 < float(first.H[-1].abs().max())
    errors = []
    for parts in (128, 256):
        found = tiny.forecast(learning_rate=time / parts, steps=steps * parts, reduction="sum")
        H1 = found.H1.permute(0, 1, 3, 2, 4).reshape(-1, 6, 6)
        pairs = ((z0, found.z0.flatten(1)), (first.z, found.z1.flatten(1)), (first.H, H1))
        errors.append([float((value - other[::parts]).abs().max()) for value, other in pairs])
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine == pytest.approx(2, rel=0.05)


def test_one_large_step_is_many_small_ones():
    tiny, H, train, targets, modes, tensors = setting()
    many = first_order_flow(tiny.z, H, train, targets, tensors, modes, 0.01, 20)
    one = first_order_flow(tiny.z, H, train, targets, tensors, modes, 0.2, 1)
    torch.testing.assert_close(one.z[-1], many.z[-1], rtol=0, atol=1e-12 * float(many.z.abs().max()))
    torch.testing.assert_close(one.H[-1], many.H[-1], rtol=0, atol=1e-12 * float(many.H.abs().max()))


def test_order_0_learns_everything_in_the_limit():
    tiny, H, train, targets, modes, _ = setting()
    ends = frozen_flow(tiny.z, H, train, targets, modes, torch.tensor([torch.inf], dtype=torch.float64))
    torch.testing.assert_close(ends[0, train], targets, rtol=0, atol=1e-12)


def test_modes_that_do_not_move_are_left_out_exactly():
    """An error in one eigenvector: one mode is all of it."""
    tiny, H, train, _, modes, whole = setting()
    targets = tiny.z[train] - 0.7 * modes.vectors[:, 2]
    parts = [with_joint_indices(tiny.split(value)) for value in tiny.tensors()]
    few = eigenmodes(H[train], tiny.z[train] - targets, 1.0, tolerance=1e-10)
    assert few.basis.shape == (1, 4)
    assert few.left_out < 1e-10
    tensors = path_tensors(*parts[1:], train, torch.arange(6), few.basis, few.dual)
    found = first_order_flow(tiny.z, H, train, targets, tensors, few, 0.05, 3)
    expected = first_order_flow(tiny.z, H, train, targets, whole, modes, 0.05, 3)
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.H, expected.H, rtol=0, atol=1e-12)
