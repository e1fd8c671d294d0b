"""Read models lazily, one tensor at a time, and put weights into transformers modules. Safetensors only."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgeprune import graph as graphs
from edgeprune.errors import ConfigError, StageError, UnsupportedModelError
from edgeprune.families.base import LAYER_LIST_KEY, Family
from edgeprune.locate import check_tensors, find_tensors, read_config
from edgeprune.records import LayerShape, ModelDims, ModelGraph

# torch reads this at its first allocation: large buffers on huge pages, a few percent of every pass
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# asking the system to take back a smaller layer costs more time than its memory is worth
_GIVE_BACK_BYTES = 64 << 20


class Source(Protocol):
    """A checkpoint whose tensors are read one by one."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    def close(self) -> None:
        """Let go of mapped files, so that their pages leave memory; the next tensor opens them again."""
        ...


class View:
    """A source seen through a change of its tensors, which `tensor` of a subclass makes."""

    def __init__(self, source: Source, config: dict[str, Any] | None = None) -> None:
        self._source = source
        self._config = source.config if config is None else config

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def tensor(self, name: str) -> torch.Tensor:
        return self._source.tensor(name)

    def close(self) -> None:
        self._source.close()


def _file_fingerprint(path: Path, digest: Any) -> None:
    # whole small files, header and 64 spread samples of large ones: seconds instead of minutes for 15 GB
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as f:
        if size <= 256 << 20:
            while block := f.read(1 << 20):
                digest.update(block)
            return
        for i in range(64):
            f.seek(i * (size - (1 << 16)) // 63)
            digest.update(f.read(1 << 16))


class SafetensorsSource:
    """A Hugging Face folder, sharded or not. Tensors are read lazily and checked against the config."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ConfigError(f"model folder {folder} does not exist")
        self._config = read_config(folder)
        found = find_tensors(folder)
        self._files = {name: path for name, (path, _, _) in found.items()}
        self._shapes = {name: shape for name, (_, shape, _) in found.items()}
        self._stored_as = {name: stored for name, (_, _, stored) in found.items()}
        self._open: dict[Path, Any] = {}
        self._fingerprint: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self._config, sort_keys=True).encode())
            for path in sorted(set(self._files.values())):
                _file_fingerprint(path, digest)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def names(self) -> list[str]:
        return list(self._files)

    def check(self, graph: ModelGraph) -> None:
        """Every tensor the graph needs is there with its shape. Raises ConfigError naming up to five."""
        check_tensors(self.folder, self._shapes, graph)

    def _handle(self, name: str) -> Any:
        path = self._files.get(name)
        if path is None:
            raise ConfigError(f"{self.folder}: tensor {name} is missing")
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, OSError, ValueError) as error:
                raise ConfigError(f"{path} is damaged or truncated: {error}", "download it again") from None
        return self._open[path]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ConfigError(f"{self.folder}: tensor {name} is missing")
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._handle(name).get_tensor(self._stored_as[name])
        except (SafetensorError, ValueError) as error:
            raise ConfigError(f"{self.folder}: tensor {name} cannot be read: {error}") from None
        if not tensor.is_floating_point():
            raise ConfigError(f"{self.folder}: tensor {name} is {tensor.dtype}, expected floating point")
        return tensor

    def close(self) -> None:
        """Unmap the shards, so that their pages leave the resident set."""
        self._open.clear()


def finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the tensor; raises ConfigError when it holds NaN or infinity."""
    # a sum of finite numbers may overflow, but one bad number always shows in it, at a tenth of the price
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"tensor {name} holds NaN or infinite values", "the checkpoint is damaged")
    return tensor


# ---------------------------------------------------------------- modules


class NoAttention(nn.Module):
    """Stands where an attention block was removed: adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where an FFN block was removed."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class SplitLinear(nn.Module):
    """A fused matrix as one Linear per role, so that each can be watched; outputs are put side by side."""

    def __init__(self, fused: nn.Module, sizes: dict[str, int]) -> None:
        super().__init__()
        columns, bias = fused.weight.shape[1], fused.bias is not None  # type: ignore[union-attr, index]
        self.sizes = sizes
        for role, rows in sizes.items():
            self.add_module(role, nn.Linear(columns, rows, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.get_submodule(role)(x) for role in self.sizes], dim=-1)


def hf_config(config: dict[str, Any]) -> Any:
    """config.json as a transformers configuration, without our own keys. Raises UnsupportedModelError."""
    from transformers import AutoConfig

    plain = {k: v for k, v in config.items() if k not in (LAYER_LIST_KEY, "auto_map")}
    heads = {k: plain[k] for k in ("num_attention_heads", "num_key_value_heads") if k in plain}
    if plain.get("head_dim"):
        # heads that do not divide the hidden size are refused on construction, although nothing is derived
        # from the quotient once the head size is given
        plain.update(dict.fromkeys(heads, 1))
    try:
        made = AutoConfig.for_model(**{"model_type": "", **plain})
    except Exception as error:  # transformers validates with its own and huggingface_hub's classes
        raise UnsupportedModelError(f"config.json is not accepted by transformers: {error!s:.200}") from None
    for name, value in heads.items():
        setattr(made, name, value)
    made._attn_implementation = "sdpa"
    return made


def skeleton(config: dict[str, Any], dims: ModelDims, *, split: bool = False) -> nn.Module:
    """A transformers model on the meta device whose layers have the widths of `dims`. No weights.

    With `split` fused matrices are SplitLinear, as calibration wants them; `fill_` knows how to fill both.
    """
    from transformers import AutoModelForCausalLM

    base = hf_config(config)
    family = graphs.find_family(dims.family)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(base, dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"transformers cannot build this config.json: {error!r:.200}"
            ) from None
        layers = model.get_decoder().layers
        layer_class = type(layers[0])
        for index, shape in enumerate(dims.layers):
            layers[index] = _make_layer(layer_class, base, family, shape, index)
            if split:
                _split_(layers[index], family, dims, index)
    # buffers such as rotary frequencies are computed, not loaded: make them for real
    decoder = model.get_decoder()
    for name, module in list(decoder.named_children()):
        if "rotary" in name:
            setattr(decoder, name, type(module)(config=base))
    embed = decoder.embed_tokens
    if family.scaled_embedding:
        scale = torch.tensor(family.embed_scale(dims), dtype=torch.float32)
        embed.register_buffer("embed_scale", scale, persistent=False)
    model.eval()
    return model


def _make_layer(layer_class: type, base: Any, family: Family, shape: LayerShape, index: int) -> nn.Module:
    own = copy.copy(base)
    if shape.n_kv_heads:
        own.num_attention_heads = shape.n_heads
        own.num_key_value_heads = shape.n_kv_heads
    if shape.n_ff:
        own.intermediate_size = shape.n_ff
    layer = layer_class(own, index)
    if not shape.n_kv_heads:
        layer.self_attn = NoAttention()
    if not shape.n_ff:
        layer.mlp = NoFeedForward()
    kept = family.layer_roles(shape)
    for role in ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"):
        if role in family.roles and role not in kept:
            set_role(layer, family, role, nn.Identity())
    return layer


def _split_(layer: nn.Module, family: Family, dims: ModelDims, index: int) -> None:
    """Replace fused matrices by SplitLinear."""
    for role in family.layer_roles(dims.layers[index]):
        roles = family.fused_with(role)
        if len(roles) > 1 and role == roles[0]:
            sizes = {r: family.part(dims, r, index).block for r in roles}
            set_role(layer, family, role, SplitLinear(role_module(layer, family, role), sizes))


def _inner_path(family: Family, role: str) -> str:
    return family.roles[role].split("{l}.", 1)[1]


def role_module(layer: nn.Module, family: Family, role: str) -> nn.Module:
    """The submodule of a decoder layer that plays a role ('q', 'down', 'ffn_norm', …).

    In a fused matrix that is not split it is the whole.
    """
    module = layer.get_submodule(_inner_path(family, role))
    return module.get_submodule(role) if isinstance(module, SplitLinear) else module


def set_role(layer: nn.Module, family: Family, role: str, module: nn.Module) -> None:
    parent, _, name = _inner_path(family, role).rpartition(".")
    setattr(layer.get_submodule(parent) if parent else layer, name, module)


def fill_(module: nn.Module, prefix: str, source: Source, dtype: torch.dtype, device: str = "cpu") -> None:
    """Load every parameter of `module` from `source`, names prefixed. Replaces meta parameters in place."""
    for name, part in list(module.named_modules()):
        if isinstance(part, SplitLinear):
            path = f"{prefix}{name}"
            for leaf in ("weight", "bias") if next(part.children()).bias is not None else ("weight",):
                rows = source.tensor(f"{path}.{leaf}").split(list(part.sizes.values()))
                for role, value in zip(part.sizes, rows, strict=True):
                    value = finite(value, f"{path}.{leaf}").to(device=device, dtype=dtype)
                    setattr(part.get_submodule(role), leaf, nn.Parameter(value, requires_grad=False))
    for name, parameter in list(module.named_parameters()):
        if isinstance(module.get_submodule(".".join(name.split(".")[:-2])), SplitLinear):
            continue
        full = prefix + name
        value = finite(source.tensor(full), full).to(device=device, dtype=dtype)
        if value.shape != parameter.shape:
            raise ConfigError(
                f"tensor {full} has shape {list(value.shape)}, expected {list(parameter.shape)}",
                "config.json and the weights do not belong together",
            )
        owner, _, leaf = name.rpartition(".")
        setattr(
            module.get_submodule(owner) if owner else module, leaf, nn.Parameter(value, requires_grad=False)
        )


@contextlib.contextmanager
def resident_layer(
    model: nn.Module, index: int, source: Source, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Iterator[nn.Module]:
    """Yield decoder layer `index` with its weights in memory; they are dropped again afterwards."""
    layer = model.get_decoder().layers[index]  # type: ignore[operator]
    fill_(layer, f"model.layers.{index}.", source, dtype, device)
    try:
        yield layer
    finally:
        held = sum(p.numel() * p.element_size() for p in layer.parameters())
        layer.to("meta")
        if held >= _GIVE_BACK_BYTES:
            _give_back()


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between live blocks, 0.1 GB a 7B layer."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A working transformers model for any folder edgeprune writes, evenly pruned or not."""
    source = SafetensorsSource(folder)
    graph = graphs.build(source.config)
    source.check(graph)
    model = assemble(source, graph.dims, dtype=dtype, device=device)
    source.close()
    return model


def assemble(
    source: Source, dims: ModelDims, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A whole transformers model with the widths of `dims` and the weights of `source`."""
    model = skeleton(source.config, dims)
    decoder = model.get_decoder()  # type: ignore[operator]
    for index in range(len(dims.layers)):
        fill_(decoder.layers[index], f"model.layers.{index}.", source, dtype, device)
    family = graphs.find_family(dims.family)
    fill_(decoder.embed_tokens, family.roles["embed"] + ".", source, dtype, device)
    fill_(decoder.norm, family.roles["final_norm"] + ".", source, dtype, device)
    if dims.tied:
        model.lm_head.weight = decoder.embed_tokens.weight
    else:
        fill_(model.lm_head, family.roles["head"] + ".", source, dtype, device)  # type: ignore[arg-type]
    model.to(device)
    left = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if left:
        raise StageError(f"no weights were found for {left[0]} and {len(left) - 1} more tensors")
    return model


def role_tensor(
    source: Source, family: Family, dims: ModelDims, role: str, layer: int, suffix: str = "weight"
) -> torch.Tensor:
    """The tensor that plays a role in a layer; its own rows where the checkpoint holds it fused."""
    whole = source.tensor(family.tensor(role, layer, suffix))
    if len(family.fused_with(role)) == 1:
        return whole
    part = family.part(dims, role, layer, suffix)
    return whole[part.offset : part.offset + part.block]


class Stream:
    """Runs the layers of a skeleton one at a time, each with the rotary table and mask of its kind."""

    def __init__(self, model: nn.Module, dims: ModelDims, n_tokens: int, device: str = "cpu") -> None:
        config: Any = model.config
        self._decoder: Any = model.get_decoder()  # type: ignore[operator]
        self._family, self._dims, self._device = graphs.find_family(dims.family), dims, device
        self._positions = torch.arange(n_tokens, device=device)[None]
        window = getattr(config, "sliding_window", None)
        self._kinds = getattr(config, "layer_types", None)
        if self._kinds is None:
            self._kinds = ["sliding_attention" if window else "full_attention"] * len(dims.layers)
        self._mask: torch.Tensor | None = None  # of sliding layers; None: causal, which the kernel knows
        if window and n_tokens > window:
            distance = self._positions[0][:, None] - self._positions[0][None]
            self._mask = ((distance >= 0) & (distance < window))[None, None]
        self._rotary: dict[str, Any] = {}

    def embed(self, source: Source, ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, [N, T, d] float32."""
        table = source.tensor(self._family.tensor("embed"))
        stream = table[ids].to(device=self._device, dtype=torch.float32)
        if self._family.scaled_embedding:
            stream = stream * self._family.embed_scale(self._dims)
        rotary = self._decoder.rotary_emb
        by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        for kind in set(self._kinds):
            more = {"layer_type": kind} if by_kind else {}
            self._rotary[kind] = rotary(stream[:1], position_ids=self._positions, **more)
        return stream

    def run(self, index: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Output of decoder layer `index` for x [n, T, d]."""
        kind = self._kinds[index]
        out: torch.Tensor = layer(
            x,
            attention_mask=self._mask if kind == "sliding_attention" else None,
            position_ids=self._positions,
            position_embeddings=self._rotary[kind],
        )
        return out


def to_float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float32).numpy()
