"""Batch-size invariance: the trajectory per example does not depend on the batch size (MATHS 17)."""

from __future__ import annotations

import copy

import pytest
import torch
from models import half_square_mean, randn
from torch import nn
from torch.nn.utils import parameters_to_vector

import perexample as px

WARM, LENGTH, ETA = 1600, 192, 2e-5
INPUTS = randn(WARM + LENGTH, 6)
TARGETS = torch.tanh(INPUTS @ randn(6, 3, seed=1)) + randn(WARM + LENGTH, 3, seed=2)


def steps(model: nn.Module, opt: px.optim.Adam, batch: int, start: int, stop: int) -> list[torch.Tensor]:
    """One pass over examples `start` to `stop`; the parameters as one vector before it and after each step."""
    points = [parameters_to_vector(model.parameters()).detach().clone()]
    for first in range(start, stop, batch):
        half_square_mean(model(INPUTS[first : first + batch]), TARGETS[first : first + batch]).backward()
        opt.step()
        opt.zero_grad()
        points.append(parameters_to_vector(model.parameters()).detach().clone())
    return points


def train(batch: int, kind: str) -> dict[float, list[torch.Tensor]]:
    """The trajectory for each learning rate; averages are plain means over all examples seen (MATHS 11).

    They are filled with WARM examples at learning rate 0, so that none of what follows starts from nothing.
    """
    torch.manual_seed(0)
    model = px.convert(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    opt = px.optim.Adam(model.parameters(), lr=0.0, n_g=WARM + LENGTH, n_s=WARM + LENGTH, second_moment=kind)
    steps(model, opt, batch, 0, WARM)
    trajectories = {}
    for eta in (ETA, ETA / 2):
        twin, other = copy.deepcopy((model, opt))
        other.param_groups[0]["lr"] = eta
        trajectories[eta] = steps(twin, other, batch, WARM, WARM + LENGTH)
    return trajectories


@pytest.fixture(scope="module")
def runs():
    """(kind, batch, eta) -> trajectory."""
    return {
        (kind, batch, eta): trajectory
        for kind, batches in (("per_example", (1, 8, 64)), ("per_batch", (8, 64)))
        for batch in batches
        for eta, trajectory in train(batch, kind).items()
    }


def distance(runs, kind: str, batch: int) -> tuple[float, float]:
    """How far batch size `batch` ends from batch size 1, and how far that is allowed to be.

    Write Φ(η) = Φ₀ + η D + η² E + O(η³). D is the sum, over examples, of the update u_n = g̃_n / (√s_n + ε) with the
    gradients of Φ₀. A batch of B takes B times the u of its last example in place of the u of each of them. If the
    averages at that example do not depend on B, which is the claim, |D_B - D_1| <= (B - 1) Σ_n |u_{n+1} - u_n|, where
    η u_n are the steps of the run at B = 1. The rest is η² (E_B - E_1), and η² E is twice Φ(η) - Φ₀ - 2 (Φ(η/2) - Φ₀),
    read off each run.
    """
    one, other = runs["per_example", 1, ETA], runs[kind, batch, ETA]
    updates = torch.stack(one).diff(dim=0)
    variation = float(updates.diff(dim=0).norm(dim=1).sum())

    def curvature(key: tuple[str, int]) -> float:
        whole, halved = runs[(*key, ETA)], runs[(*key, ETA / 2)]
        return 2 * float((whole[-1] - whole[0] - 2 * (halved[-1] - halved[0])).norm())

    allowed = (batch - 1) * variation + curvature(("per_example", 1)) + curvature((kind, batch))
    return float((other[-1] - one[-1]).norm()), allowed


@pytest.mark.parametrize("batch", [8, 64])
def test_the_trajectory_does_not_depend_on_the_batch_size(runs, batch):
    found, allowed = distance(runs, "per_example", batch)
    one = runs["per_example", 1, ETA]
    assert found <= allowed
    assert allowed < 0.5 * float((one[-1] - one[0]).norm()), "the bound says nothing"


@pytest.mark.parametrize("batch", [8, 64])
def test_with_squares_of_the_batch_gradient_it_does(runs, batch):
    found, allowed = distance(runs, "per_batch", batch)
    assert found > 2 * allowed


@pytest.mark.parametrize("batch", [8, 64])
def test_in_the_limit_of_a_small_learning_rate_only_the_sampling_of_the_averages_is_left(runs, batch):
    """Extrapolated to η₀ = 0, what is left of the relative deviation is the choice of u alone, within its bound."""
    updates = torch.stack(runs["per_example", 1, ETA]).diff(dim=0)
    deviation = [
        (runs["per_example", batch, eta][-1] - runs["per_example", 1, eta][-1]) / eta for eta in (ETA, ETA / 2)
    ]
    limit = 2 * deviation[1] - deviation[0]
    assert limit.norm() <= (batch - 1) * updates.diff(dim=0).norm(dim=1).sum() / ETA
