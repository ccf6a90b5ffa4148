"""The loss around the anchor: against what a quadratic loss gives in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from hf_lsam.landscape import Plane, fractions, half_width, losses_on_line, scan, smoothed

CURVATURE = 3.0


def bowl(x):
    """1/2 k ||x||^2"""
    return 0.5 * CURVATURE * (x @ x).item()


def grid(half, points):
    return torch.linspace(-half, half, points, dtype=torch.float64).tolist()


def test_a_line_passes_through_the_anchor_and_the_worker():
    anchor, worker = torch.zeros(5), torch.full((5,), 2.0)
    at = fractions(17)
    assert at[0] == -0.5
    assert at[-1] == 1.5
    assert {0.0, 1.0} <= set(at)
    expected = [0.5 * CURVATURE * t * t * 20 for t in at]
    assert losses_on_line(bowl, anchor, worker, at) == pytest.approx(expected, rel=1e-5)


def test_a_plane_holds_the_anchor_and_both_workers():
    generator = torch.Generator().manual_seed(0)
    anchor, one, other = (torch.randn(50, generator=generator) for _ in range(3))
    plane = Plane.through(anchor, one, other)
    assert plane.first @ plane.second == pytest.approx(0.0, abs=1e-6)
    for point in (anchor, one, other):
        torch.testing.assert_close(plane.point(*plane.position(point)), point, rtol=1e-5, atol=1e-5)
    assert plane.position(one)[1] == pytest.approx(0.0, abs=1e-5)


def test_there_is_no_plane_through_three_points_of_a_line():
    anchor, one = torch.zeros(4), torch.ones(4)
    assert Plane.through(anchor, one, -2 * one) is None
    assert Plane.through(anchor, anchor, one) is None
    assert Plane.through(anchor, one, anchor) is None


def test_the_smoothed_bowl_is_the_wider_bowl_of_the_closed_form():
    strength = 5.0
    at = grid(6.0, 121)
    axis = torch.tensor(at, dtype=torch.float64)
    losses = 0.5 * CURVATURE * (axis[:, None] ** 2 + axis[None, :] ** 2)
    wide = CURVATURE * strength / (CURVATURE + strength)
    expected = losses / CURVATURE * wide + math.log1p(CURVATURE / strength)  # 2/2 log, of two dimensions
    middle = slice(30, 91)  # away from the edge, where part of the kernel is missing
    torch.testing.assert_close(smoothed(losses, at, strength)[middle, middle], expected[middle, middle])


def test_smoothing_tells_rows_from_columns():
    at = grid(6.0, 61)
    slope = torch.tensor(at, dtype=torch.float64)[None, :].expand(61, 61)  # f = a, along the columns
    flat = smoothed(slope, at, 4.0)
    expected = slope[30, 20:41] - 1 / 8  # -log E exp(-a) = a - variance / 2
    torch.testing.assert_close(flat[30, 20:41], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(flat[10, 20:41], flat[50, 20:41])


def test_a_loss_that_is_not_finite_has_no_probability():
    at = grid(1.0, 5)
    losses = torch.ones(5, 5)
    losses[0, 0], losses[4, 4] = math.nan, math.inf
    assert smoothed(losses, at, 2.0).isfinite().all()


def test_the_grid_reaches_past_the_workers_and_to_the_kernel_within_bounds():
    assert half_width(2.0, 0.0) == 3.0
    assert half_width(2.0, 1 / 9) == pytest.approx(6.0)
    assert half_width(2.0, 1e-6) == 12.0


def test_a_scan_holds_what_a_report_draws():
    anchor = torch.zeros(3)
    workers = {0: torch.tensor([1.0, 0, 0]), 1: torch.tensor([0, 2.0, 0]), 2: torch.tensor([0, 0, 1.0])}
    result = scan(bowl, anchor, workers, 9, 1.0)
    assert list(result["lines"]) == ["0", "1", "2"]
    assert result["distances"] == {"0": 1.0, "1": 2.0, "2": 1.0}
    plane = result["plane"]
    assert plane["workers"] == [0, 1]
    assert plane["positions"] == [(1.0, 0.0), (0.0, 2.0)]
    assert plane["losses"][4][4] == 0.0
    assert min(map(min, plane["smoothed"])) == plane["smoothed"][4][4]
    assert scan(bowl, anchor, {0: workers[0]}, 9, 1.0)["plane"] is None
    assert scan(bowl, anchor, workers, 9, 0.0)["plane"]["smoothed"] is None
