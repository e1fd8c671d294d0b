"""The processes of a run, through accelerate: one, or as many as a launcher started."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState

_WAIT = timedelta(hours=24)  # one process writes text while the others wait


def state() -> PartialState:
    """Which process this is. Without an accelerator several processes talk over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_WAIT)


def accelerator() -> Accelerator:
    state()
    return Accelerator()
