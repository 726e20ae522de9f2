"""The number of examples as a gradient (MATHS 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["count_examples"]


class _CountExamples(Function):
    """The identity on the model's outputs; each backward pass adds `batch` to the count and 1 to the passes."""

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, passes: Tensor, batch: int, note: Callable[[int], None] | None, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.note = note
        ctx.batch, ctx.dtype, ctx.device = batch, count.dtype, count.device
        ctx.set_materialize_grads(False)
        # An alias made by detach() is not a view to autograd, so the caller may go on to change it in place.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.note is not None:
            # once_differentiable, which the layers have, says nothing where no gradient that arrives requires grad.
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "a backward pass with create_graph=True went to a converted model, whose layers have no double "
                    "backward; make a gradient that is differentiated again (a gradient penalty, say) of a forward "
                    "pass under px.no_moments()"
                )
            ctx.note(ctx.batch)
        examples = torch.full((), ctx.batch, dtype=ctx.dtype, device=ctx.device)
        return examples, torch.ones((), device=ctx.device), None, None, *grads


def count_examples(
    count: Tensor, passes: Tensor, batch: int, outputs: Sequence[Tensor], note: Callable[[int], None] | None = None
) -> tuple[Tensor, ...]:
    """`outputs` unchanged; when any is backpropagated, `count` receives the gradient `batch`, and `passes` 1.

    `note` is called with `batch` at the beginning of that.
    """
    return _CountExamples.apply(count, passes, batch, note, *outputs)
