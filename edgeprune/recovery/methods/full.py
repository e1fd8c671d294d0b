"""Train the matrices of the decoder layers themselves; for small models."""

from __future__ import annotations

from torch import nn

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import ConfigError
from edgeprune.families.base import MATRICES
from edgeprune.recovery.methods.base import Attached, Group, InPlace, Method, Setting


def attach(model: nn.Module, setting: Setting) -> Attached:
    """One group per layer; norms and, with `embeddings=yes`, the embedding and the head have their own."""
    family = graphs.find_family(setting.dims.family)
    layers = model.get_decoder().layers  # type: ignore[operator]
    groups, norms = [], []
    for index, layer in enumerate(layers):
        roles = family.layer_roles(setting.dims.layers[index])
        if setting.options["layers"] == "cut" and not any(setting.lost(index, u) for u in ("ffn", "kv")):
            continue
        matrices = {
            id(m): m
            for role in MATRICES
            if role in roles
            for m in [checkpoint.role_module(layer, family, role)]
        }
        params = [p for module in matrices.values() for p in module.parameters()]
        if params:
            groups.append(Group(name=f"layers.{index}", params=params))
        inside = {id(p) for p in params}
        norms += [p for p in layer.parameters() if id(p) not in inside]
    if not groups:
        raise ConfigError("nothing was cut, so there is nothing to train", "use layers=all")
    groups.append(Group(name="norms", params=norms, decay=False))
    if setting.options["embeddings"] == "yes":
        tables = {id(p): p for m in (model.get_decoder().embed_tokens, model.lm_head) for p in m.parameters()}  # type: ignore[operator]
        groups.append(Group(name="embeddings", params=list(tables.values()), decay=False))
    return InPlace(model, groups)


METHOD = Method(
    name="full",
    summary="all matrices of the decoder layers",
    reference="-",
    attach=attach,
    rate=2e-4,
    switches={"layers": "all", "embeddings": "no"},
    choices={"layers": ("all", "cut"), "embeddings": ("no", "yes")},
)
