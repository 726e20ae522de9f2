"""What the device found wrong with a step, on its way to the host without a sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Flags"]


class _Entry(NamedTuple):
    kind: str
    flags: Tensor  # on the host, if it has arrived
    event: torch.cuda.Event | None  # says when; None: it has
    params: list[Tensor]


class Flags:
    """Flags that are raised on the device, one for each of some parameters."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def note(self, kind: str, flags: Tensor, params: list[Tensor]) -> None:
        """Fetch `flags`, one for each of `params`; on CUDA they travel without a sync."""
        if flags.device.type == "cuda":
            if not torch.cuda.is_current_stream_capturing():
                event = torch.cuda.Event()
                arriving = flags.to("cpu", non_blocking=True)
                event.record()
                self._entries.append(_Entry(kind, arriving, event, params))
        elif flags.device.type != "meta":  # on which nothing has a value
            self._entries.append(_Entry(kind, flags, None, params))

    def arrived(self) -> dict[str, list[Tensor]]:
        """The flagged parameters for each kind, as far as the host knows; once there are any, the rest is forgotten."""
        waiting = []
        flagged: dict[str, list[Tensor]] = {}
        for entry in self._entries:
            if entry.event is not None and not entry.event.query():
                waiting.append(entry)
            elif bool(entry.flags.any()):
                raised = entry.flags.nonzero().flatten().tolist()
                flagged.setdefault(entry.kind, []).extend(entry.params[i] for i in raised)
        self._entries = [] if flagged else waiting
        return flagged
