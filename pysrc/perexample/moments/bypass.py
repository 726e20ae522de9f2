"""Parameters that a forward pass uses besides their layers, where no second moment is made: autograd's graph knows.

A layer's Function takes a parameter together with its leaf. A node of the graph that takes the parameter, or what is
computed of the parameter alone, without the leaf is no layer's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .count import ExampleCount
from .leaf import moment_of
from .places import history
from .uses import Call, Uses

__all__ = ["refuse_bypass", "refuse_earlier"]


def refuse_bypass(outputs: Iterable[Tensor], examples: ExampleCount, used: dict[str, str], how: str) -> None:
    """Raise where a parameter that `used` notes as used `how` goes into `outputs` by another way than its layer.

    A function of a parameter alone that is an output itself (a penalty) is left to the step's guard. What runs inside
    of reentrant checkpoints and compiled code is not seen.
    """
    leaf_of = {id(m.leaf): m for ref in examples.moments if (m := ref()) is not None}
    sources: dict[Any, Any] = {}  # of nodes with one input: the variable that they depend on alone, or None

    def source(node: Any) -> Any:
        path = []
        while node not in sources:
            variable = getattr(node, "variable", None)
            before = [following for following, _ in node.next_functions if following is not None]
            if variable is not None or len(before) != 1:
                sources[node] = variable
                break
            path.append(node)
            node = before[0]
        for passed in path:
            sources[passed] = sources[node]
        return sources[node]

    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if source(node) is not None:
            continue
        variables = []
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = source(following)
            if variable is not None:
                variables.append(variable)
            elif following not in seen:
                seen.add(following)
                pending.append(following)
        leaves = {id(leaf_of[id(variable)]) for variable in variables if id(variable) in leaf_of}
        for variable in variables:
            moment = moment_of(variable)
            if moment is not None and moment.examples is examples and id(moment) not in leaves:
                if used.get(moment.name) == how:
                    _refuse(moment.name, node.name())


def _refuse(name: str, node: str) -> None:
    raise ValueError(
        f"{name}: this forward pass uses it besides its layer, where the examples' parts of its gradient cannot be "
        f"told apart; let a module of its own do that (other.weight = layer.weight makes both uses exact), detach it, "
        f"or add a penalty on weights outside of the model's forward. Found at '{node}'"
    )


def refuse_earlier(outputs: Iterable[Tensor], examples: ExampleCount, uses: Iterable[Uses]) -> None:
    """Raise where `outputs` hang on what a layer made in an earlier forward pass, and the model has kept.

    `uses` are those of this pass. Whatever came in through the output of a converted model has been counted there.
    """
    known = {id(use) for use in uses}
    for node in history(outputs, end="_CountExamplesBackward"):
        call = getattr(node, "call", None)
        for use in call.uses if isinstance(call, Call) else ():
            if use is not None and id(use) not in known and use.moment.examples is examples:
                raise ValueError(
                    f"{use.moment.name}: this forward pass uses what an earlier one computed with it (a state or a "
                    f"cache that the model keeps), so that one example's parts of its gradient come from two passes, "
                    f"and have to be added before squaring; detach what is kept, compute it anew in each pass, or make "
                    f"both passes inside of the forward of one converted model. Found at '{node.name()}'"
                )
