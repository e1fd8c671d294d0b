"""The contract of a recovery method: what it trains in a pruned model, and how that becomes plain weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from edgeprune.errors import ConfigError
from edgeprune.records import ModelDims
from edgeprune.registry import suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a method may know about the model it is attached to."""

    dims: ModelDims  # of the model at hand
    dense: ModelDims | None  # before the cut; None: nobody knows, treat all layers alike
    quantization: str | None  # GGUF type the tuned model will be stored in; None: not quantized
    seed: int
    options: Mapping[str, str]  # resolved by Method.resolve
    # mean squared input of each column, by the name of the matrix; given to methods that are `quantized`
    inputs: Mapping[str, torch.Tensor] | None = None

    def lost(self, layer: int, unit: str) -> float:
        """Share of the layer's channels ('ffn') or KV groups ('kv') that left, 0 to 1; 0 when unknown."""
        if self.dense is None or len(self.dense.layers) != len(self.dims.layers):
            return 0.0
        name = "n_ff" if unit == "ffn" else "n_kv_heads"
        before, after = getattr(self.dense.layers[layer], name), getattr(self.dims.layers[layer], name)
        return 1.0 - after / before if before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share a learning rate: the run's base rate times `scale`."""

    name: str
    params: list[nn.Parameter]
    scale: float = 1.0
    decay: bool = True  # weight decay applies


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor as the GGUF file stores it: `data` [out, bytes per row] uint8 in the blocks of `type`.

    Rows are in the order of the Hugging Face tensor [out, in]; the exporter permutes where its format wants
    another order.
    """

    type: str  # such as Q4_1
    shape: tuple[int, int]  # [out, in] of the decoded tensor
    data: npt.NDArray[np.uint8]


class Attached:
    """A method's hold on a model. `model` is the module given to `attach`, changed in place.

    Its forward keeps the transformers signature; parameters that are not in `groups` do not require
    gradients. Nothing here may draw random numbers but from generators seeded with `Setting.seed`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def groups(self) -> list[Group]:
        """What the optimizer gets, each parameter once, in an order that depends on the model alone."""
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        """The trained state only, by stable names: detached copies on the CPU in their own dtype."""
        raise NotImplementedError

    def load_(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave, in place, so that optimizers keep their parameters."""
        raise NotImplementedError

    def merge_(self) -> None:
        """Fold what was trained into plain weights: modules and names are then those from before `attach`.

        Called once, in float32, outside autocast, after the best state was put back.
        """
        raise NotImplementedError

    def packed(self) -> dict[str, Packed]:
        """After `merge_`: tensors whose exact quantized form is known, by Hugging Face name."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One file of this folder exposes one of these as METHOD."""

    name: str
    summary: str
    reference: str  # paper, or "-"
    attach: Callable[[nn.Module, Setting], Attached]
    """(float32 model of `checkpoint.load_model`, setting); raises ConfigError for options it cannot do."""
    rate: float  # base learning rate of AdamW
    switches: Mapping[str, str] = field(default_factory=dict)  # name -> default
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of switches that are a choice
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of switches that are numbers
    quantized: bool = False  # `attach` rounds the weights to Setting.quantization
    check: Callable[[str | None], object] | None = None  # ConfigError for a quantization it cannot do

    def resolve(self, given: Mapping[str, str]) -> dict[str, str]:
        """Switches with defaults filled in. Raises ConfigError naming every unknown one."""
        problems = []
        for name, value in given.items():
            if name not in self.switches:
                known = ", ".join(self.switches) or "none"
                problems.append(
                    f"recovery method {self.name} has no switch '{name}'{suggest(name, self.switches)} "
                    f"(known: {known})"
                )
            elif name in self.choices and value not in self.choices[name]:
                problems.append(f"{self.name}: {name}={value} is none of {', '.join(self.choices[name])}")
        if problems:
            raise ConfigError(problems)
        resolved = {**self.switches, **given}
        for name, (low, high) in self.ranges.items():
            number(resolved, name, low=low, high=high)
        return resolved


def number(options: Mapping[str, str], name: str, *, low: float, high: float) -> float:
    """A switch as a number. Raises ConfigError outside of [low, high]."""
    try:
        value = float(options[name])
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ConfigError(f"recovery switch {name}={options[name]} is not a number from {low:g} to {high:g}")
    return value


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A detached copy on the CPU of all of a parameter, also where processes hold a part each.

    Every process has to call it then.
    """
    value = parameter.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.to("cpu", copy=True)


@torch.no_grad()
def fill_(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Put a whole value into a parameter, or into the part of it that this process holds."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.detach().copy_(value)


def freeze_(model: nn.Module) -> None:
    """Nothing in the model requires gradients; methods then switch on what they train."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


class Trained(Attached):
    """Trains the parameters that require gradients, each under the name it has in the model."""

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model)
        self._groups = groups

    def groups(self) -> list[Group]:
        return self._groups

    def _named(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: whole(p) for name, p in self._named().items()}

    @torch.no_grad()
    def load_(self, state: Mapping[str, torch.Tensor]) -> None:
        named = self._named()
        if {n: p.shape for n, p in named.items()} != {n: t.shape for n, t in state.items()}:
            raise ConfigError("the saved recovery state belongs to another model or method")
        for name, parameter in named.items():
            fill_(parameter, state[name])


class InPlace(Trained):
    """Trains parameters of the model itself: nothing to attach, nothing to merge."""

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups)
        freeze_(model)
        for group in groups:
            for parameter in group.params:
                parameter.requires_grad_(True)

    def merge_(self) -> None:
        freeze_(self.model)
