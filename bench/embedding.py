"""Embedding: both moments of the table against the stock gradient. `python -m bench.embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _gate, _kernels

TITLE = "Embedding table, both moments ÷ aten.embedding_dense_backward"
_op = torch.ops.perexample.embedding_moments
_stock = torch.ops.aten.embedding_dense_backward
_stock_bag = torch.ops.aten._embedding_bag_dense_backward


def _check(dy: Tensor, indices: Tensor, rows: int) -> None:
    """At full size, on the rows that occur; all others have to be zero."""
    seen, position = torch.unique(indices, return_inverse=True)
    for result in _op(dy, indices, rows):
        unseen = torch.ones(rows, dtype=torch.bool).index_fill_(0, seen, False)
        if result[unseen].any():
            raise _gate.RedGate(f"embedding_moments: a row that no index names is not zero (V={rows})")
    narrowed = (dy, position, len(seen))
    _gate.kernel_gate("embedding_moments", (dy, indices, rows), narrowed, lambda results: [r[seen] for r in results])


def _case(batch: int, positions: int, rows: int, width: int) -> _kernels.Case:
    return _kernels.Case(
        f"B={batch} T={positions} V={rows} D={width}",
        lambda: (torch.randn(batch, positions, width), torch.randint(rows, (batch, positions))),
        lambda dy, indices: _stock(dy, indices, rows, -1, False),
        lambda dy, indices: _op(dy, indices, rows),
        lambda dy, indices: _check(dy, indices, rows),
        1.15,
    )


def _bag_case(bags: int, length: int, rows: int, width: int) -> _kernels.Case:
    """Sums over bags of one length: all positions of a bag have its gradient."""

    def make() -> tuple[Tensor, ...]:
        indices, dy = torch.randint(rows, (bags, length)), torch.randn(bags, width)
        flat, offsets = indices.flatten(), torch.arange(0, bags * length, length)
        _, _, sizes, largest = torch.embedding_bag(torch.randn(rows, width), flat, offsets)
        bag_of = torch.arange(bags).repeat_interleave(length)
        return dy, dy.unsqueeze(1).expand(bags, length, width), indices, flat, bag_of, sizes, largest

    return _kernels.Case(
        f"bags B={bags} T={length} V={rows} D={width}",
        make,
        lambda dy, positions, indices, flat, bag_of, sizes, largest: _stock_bag(
            dy, flat, bag_of, sizes, largest, rows, False, 0, None
        ),
        lambda dy, positions, indices, *rest: _op(positions, indices, rows),
        lambda dy, positions, indices, *rest: _check(positions, indices, rows),
        1.15,
    )


def cases(full: bool) -> list[_kernels.Case]:
    """The default shapes, and with `full` more of them."""
    small = [_case(8, 128, 1024, 512), _case(8, 128, 50257, 768)]
    large = [
        _case(8, 1024, 50257, 768),
        _case(64, 64, 256, 256),
        _case(128, 1, 10000, 64),
        _bag_case(64, 32, 10000, 64),
    ]
    return small + large if full else small


if __name__ == "__main__":
    _kernels.main("embedding", TITLE, cases)
