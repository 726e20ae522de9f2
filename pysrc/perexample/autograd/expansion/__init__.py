"""One copy of a parameter per example (MATHS 8), and what a model may do with it.

`PerExample` stands for a parameter while the module that owns it computes. It has the parameter's shape and values, and
carries ``copies`` (B, *shape), an expanded view with one copy per example, whose gradient arrives as (B, *shape). Every
torch function that it meets is replaced by the one that gives each example its own copy:

- of copies alone (and constants): the function is mapped over them, and the result is a `PerExample` again;
- with tensors that carry the batch and a gradient: elementwise, the copies are aligned with the batch dimension; for
  a layer's function it is mapped over the examples, each a batch of one. The result is a plain tensor. A `PerExample`
  that has grown a batch dimension itself (``cls.expand(B, -1, -1)``) gives row b of example b's copy.

Both are exact by construction, because each function in the tables below treats the rows of its batch apart. Any
other function is refused by name. A tensor without gradient may be the batch or a constant that happens to have as
many rows; so the result stays a `PerExample` until it meets a gradient, and only then its rows are taken. A layer takes
the rows and returns a `PerExample` again, which computes what it makes of the copies only where that is asked for.
"""

from __future__ import annotations

from .per_example import Origin, PerExample, appearance, axis_of, batched, plain, refuse

__all__ = ["Origin", "PerExample", "appearance", "axis_of", "batched", "plain", "refuse"]
