"""No recovery: the pruned model as it is."""

from __future__ import annotations

from torch import nn

from edgeprune.recovery.methods.base import Attached, InPlace, Method, Setting


def attach(model: nn.Module, setting: Setting) -> Attached:
    return InPlace(model, [])


METHOD = Method(name="none", summary="train nothing", reference="-", attach=attach, rate=0.0)
