"""Group-wise fine-tuning: the weights are quantized first, then the minima of their blocks are trained.

Implemented from a reconstructed specification; the paper is SAAP (see `recovery._grouped` for what is whose).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgeprune import checkpoint, graph
from edgeprune.errors import ConfigError
from edgeprune.families import _gguf as tables
from edgeprune.families.base import MATRICES
from edgeprune.recovery import _grouped
from edgeprune.recovery._grouped import BITS, GroupLinear
from edgeprune.recovery.methods.base import Attached, Group, Method, Packed, Setting, Trained, freeze_


def attach(model: nn.Module, setting: Setting) -> Attached:
    """Quantize every matrix to its type in the file, and put adapters on those whose blocks have minima."""
    _grouped.check_type(setting.quantization)
    return _Groups(model, setting)


class _Groups(Trained):
    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__(model, [])
        options = setting.options
        rank, alpha = round(float(options["rank"])), float(options["alpha"])
        self._family = graph.find_family(setting.dims.family)
        self._dims = setting.dims
        assert setting.quantization is not None
        types = self._types = tables.hf_types(self._family, setting.dims, setting.quantization)
        self._init = options["init"].removeprefix("weighted-")
        self._inputs = (setting.inputs or {}) if options["init"].startswith("weighted-") else {}
        freeze_(model)
        self._packed: dict[str, Packed] = {}
        self._fix_()
        generator = torch.Generator().manual_seed(setting.seed)
        layers = model.get_decoder().layers  # type: ignore[operator]
        for index, role, name in self._matrices():
            if types[name] not in BITS:
                continue
            linear = checkpoint.role_module(layers[index], self._family, role)
            assert isinstance(linear, nn.Linear)
            quantized = self._quantize(linear.weight, name)
            adapter = GroupLinear(
                linear,
                quantized,
                rank=rank,
                alpha=alpha,
                scales=options["scales"] == "yes",
                generator=generator,
            )
            checkpoint.set_role(layers[index], self._family, role, adapter)
        if not self._named():
            raise ConfigError(
                f"recovery method 'group': no matrix of this model becomes {setting.quantization}; "
                "their rows do not fill blocks of 32",
                "choose another --recovery method",
            )

    def _matrices(self) -> list[tuple[int, str, str]]:
        """(layer, role, Hugging Face name) of every matrix of the decoder layers, fused ones once."""
        found = []
        for index, shape in enumerate(self._dims.layers):
            for role in self._family.layer_roles(shape):
                if role in MATRICES and role == self._family.fused_with(role)[0]:
                    found.append((index, role, self._family.tensor(role, index)))
        return found

    def _quantize(self, weight: torch.Tensor, name: str) -> _grouped.Quantized:
        importance = self._inputs.get(name)
        return _grouped.quantize(weight, self._types[name], init=self._init, importance=importance, name=name)

    @torch.no_grad()
    def _fix_(self) -> None:
        """Round what is not tuned to what the file will hold."""
        tuned = {name for _, _, name in self._matrices() if self._types[name] in BITS}
        for name, kind in self._types.items():
            if name in tuned or kind == "F32":  # norms and biases
                continue
            parameter = self.model.get_parameter(name)
            if kind in BITS:
                quantized = self._quantize(parameter, name)
                raw, values = _grouped.pack(quantized), quantized.values()
            else:
                raw, decoded = _grouped.as_stored(parameter, kind, name=name)
                values = torch.from_numpy(decoded)
            parameter.copy_(values)
            self._keep(name, kind, raw, parameter)

    def _keep(self, name: str, kind: str, raw: np.ndarray, weight: torch.Tensor) -> None:
        self._packed[name] = Packed(type=kind, shape=(weight.shape[0], weight.shape[1]), data=raw)

    def groups(self) -> list[Group]:
        named = self._named()
        minima = [p for name, p in named.items() if not name.endswith(".stretch")]
        scales = [p for name, p in named.items() if name.endswith(".stretch")]
        found = [Group(name="minima", params=minima, decay=False)]
        if scales:
            # relative to the scale itself; minima move in whole steps
            found.append(Group(name="scales", params=scales, scale=SCALE_RATE, decay=False))
        return found

    @torch.no_grad()
    def merge_(self) -> None:
        layers = self.model.get_decoder().layers  # type: ignore[operator]
        for index, role, name in self._matrices():
            adapter = checkpoint.role_module(layers[index], self._family, role)
            if not isinstance(adapter, GroupLinear):
                continue
            merged = adapter.merged()
            values = merged.values()
            rows, columns = values.shape
            linear = nn.Linear(columns, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(values, requires_grad=False)
            linear.bias = adapter.bias
            checkpoint.set_role(layers[index], self._family, role, linear)
            self._keep(name, merged.type, _grouped.pack(merged), values)

    def packed(self) -> dict[str, Packed]:
        return self._packed


SCALE_RATE = 0.1
METHOD = Method(
    name="group",
    summary="quantize, then train what the blocks of Q4_1 or Q5_1 can hold: the file is the tuned model",
    reference="SAAP, arXiv:2412.15127; QA-LoRA, arXiv:2309.14717",
    attach=attach,
    rate=1e-2,
    switches={"rank": "0", "alpha": "16", "init": "weighted-least-squares", "scales": "no"},
    ranges={"rank": (0, 4096), "alpha": (0, 1e6)},
    choices={"init": ("weighted-least-squares", *_grouped.INITS), "scales": ("yes", "no")},
    quantized=True,
    check=_grouped.check_type,
)
