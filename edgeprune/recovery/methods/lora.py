"""Low-rank adapters by peft, with a larger rank and rate where more was cut.

LoRA is of arXiv:2106.09685. A matrix whose layer lost the share c of its channels (or KV groups) gets
the rank `rank * (1 + more * c / mean c)` rounded, and its learning rate is scaled by the square root of
the same factor [ours]; an uncut layer of a cut model keeps `rank`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from edgeprune import checkpoint
from edgeprune import graph as graphs
from edgeprune.errors import MissingExtraError
from edgeprune.families.base import MATRICES
from edgeprune.recovery.methods.base import Attached, Group, Method, Setting, Trained, freeze_

_UNIT = {"q": "kv", "k": "kv", "v": "kv", "o": "kv", "gate": "ffn", "up": "ffn", "down": "ffn"}


def factors(setting: Setting, more: float) -> dict[tuple[int, str], float]:
    """(layer, unit) to how much more of everything it gets: 1 where nothing is known or cut."""
    places = [(i, unit) for i in range(len(setting.dims.layers)) for unit in ("kv", "ffn")]
    lost = {place: setting.lost(*place) for place in places}
    cut = [share for share in lost.values() if share > 0]
    mean = sum(cut) / len(cut) if cut else 0.0
    return {place: 1.0 + more * share / mean if mean else 1.0 for place, share in lost.items()}


class _Adapters(Trained):
    """peft's layers inside the model; they stand where the Linear modules were."""

    def merge_(self) -> None:
        from peft.tuners.lora import LoraLayer

        found = [(name, m) for name, m in self.model.named_modules() if isinstance(m, LoraLayer)]
        for name, module in found:
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module.get_base_layer())
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        freeze_(self.model)


def attach(model: nn.Module, setting: Setting) -> Attached:
    """Adapters on every matrix of the decoder layers, or on those that read what was cut."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "torch") from None

    rank, more, alpha, dropout = (float(setting.options[k]) for k in ("rank", "more", "alpha", "dropout"))
    family = graphs.find_family(setting.dims.family)
    of_place = factors(setting, more)
    names = {id(m): name for name, m in model.named_modules()}
    wanted: dict[str, tuple[int, str]] = {}  # module -> place; a fused one takes the place of its first role
    for index, layer in enumerate(model.get_decoder().layers):  # type: ignore[operator]
        for role in MATRICES:
            if role in family.layer_roles(setting.dims.layers[index]):
                module = checkpoint.role_module(layer, family, role)
                wanted.setdefault(names[id(module)], (index, _UNIT[role]))
    ranks = {name: max(1, round(rank * of_place[place])) for name, place in wanted.items()}
    config = LoraConfig(
        r=round(rank),
        lora_alpha=alpha * rank,
        lora_dropout=dropout,
        target_modules=list(wanted),
        rank_pattern={f"^{name}$".replace(".", r"\."): r for name, r in ranks.items()},
        # alpha / r is what an adapter's output is multiplied by: the same everywhere
        alpha_pattern={f"^{name}$".replace(".", r"\."): alpha * r for name, r in ranks.items()},
    )
    freeze_(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        inject_adapter_in_model(config, model)
    groups = []
    for place in sorted({*wanted.values()}):
        inside = [name for name, where in wanted.items() if where == place]
        params = [
            p
            for name in inside
            for leaf, p in model.get_submodule(name).named_parameters()
            if "lora_" in leaf and p.requires_grad
        ]
        groups.append(
            Group(name=f"layers.{place[0]}.{place[1]}", params=params, scale=math.sqrt(of_place[place]))
        )
    return _Adapters(model, groups)


METHOD = Method(
    name="lora",
    summary="low-rank adapters on every matrix, larger where more was cut; merged at the end",
    reference="arXiv:2106.09685",
    attach=attach,
    rate=2e-3,
    ranges={"rank": (1, 4096), "alpha": (0.01, 1000), "more": (0, 16), "dropout": (0, 0.9)},
    switches={"rank": "16", "alpha": "2", "more": "1", "dropout": "0"},
)
