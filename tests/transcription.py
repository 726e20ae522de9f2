"""Adam written a second time, from the equations alone, and training with it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from models import randn

from perexample.testing import assert_within_budget, oracle

X, Y = randn(64, 5), torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))
BATCHES = [4, 8, 1, 7, 20, 3, 16, 16, 2]


class Transcription:
    """Adam in plain float64, example by example: written from MATHS, not from the library."""

    def __init__(self, model, lr, n_g, n_s, eps=1e-8, weight_decay=0.0, per_example=True, maximize=False):
        self.model = copy.deepcopy(model).double()
        self.lr, self.n_g, self.n_s, self.eps, self.weight_decay = lr, n_g, n_s, eps, weight_decay
        self.per_example, self.sign, self.seen = per_example, -1.0 if maximize else 1.0, 0
        self.m = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

    def step(self, x, y):
        batch = len(x)
        self.seen += batch
        kappa_g = min(1.0, batch / min(self.seen, self.n_g))
        kappa_s = min(1.0, batch / min(self.seen, self.n_s))
        # The oracle of a mean loss knows c_b = g_b / B: the mean gradient is their sum, and mean g_b² is B sum c_b².
        moments = oracle(self.model, F.cross_entropy, x, y)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                mean = self.sign * moments[name].grad
                square = batch * moments[name].sum_grad_squared if self.per_example else mean**2
                self.m[name] = (1 - kappa_g) * self.m[name] + kappa_g * mean
                self.v[name] = (1 - kappa_s) * self.v[name] + kappa_s * square
                update = self.m[name] / (self.v[name].sqrt() + self.eps)
                p.copy_((1 - batch * self.lr * self.weight_decay) * p - batch * self.lr * update)


def assert_close(model, reference, opt=None):
    """Parameters (and state) equal `reference`'s up to the rounding of a few dozen steps."""
    for (name, p), q in zip(model.named_parameters(), reference.model.parameters(), strict=True):
        assert_within_budget(p.detach(), q.detach(), q.detach(), p.dtype, name)
        if opt is not None:
            state = opt.state[p]
            assert_within_budget(state["exp_avg"], reference.m[name], reference.m[name], p.dtype, f"{name} exp_avg")
            assert_within_budget(
                state["exp_avg_sq"], reference.v[name], reference.v[name], p.dtype, f"{name} exp_avg_sq"
            )
            assert state["examples"].item() == reference.seen


def run(model, opt, x, y, batches=BATCHES, loss_fn=F.cross_entropy, **options):
    start = 0
    for batch in batches:
        rows = torch.arange(start, start + batch) % len(x)
        loss_fn(model(x[rows]), y[rows]).backward()
        opt.step(**({name: batch for name in options}))
        opt.zero_grad()
        start += batch
        yield rows
