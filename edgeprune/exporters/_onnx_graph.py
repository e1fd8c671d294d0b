"""The ONNX graph of a decoder with its own widths in every layer. Weights are named here, not read.

Operators and their attributes follow ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from edgeprune import registry
from edgeprune.errors import UnsupportedModelError
from edgeprune.exporters._onnx_blocks import BLOCK, n_blocks
from edgeprune.families import gemma3, smollm3
from edgeprune.families.base import Family, config_int, text_config
from edgeprune.records import ModelDims

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
ALIGNMENT = 64

# weight bits, float type, and the name ending that transformers.js finds the file by
QUANTIZATIONS: dict[str, tuple[int, str, str]] = {
    "fp32": (32, "float32", ""),
    "fp16": (16, "float16", "_fp16"),
    "int8": (8, "float32", "_int8"),
    "int4": (4, "float32", "_q4"),
}


def library(name: str) -> ModuleType:
    """Import a library of the `onnx` extra. Raises MissingExtraError."""
    return registry.library(name, "onnx")


# ---------------------------------------------------------------- what a layer does


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraits:
    """What config.json says about the attention of one layer beyond its widths."""

    rope: str | None = "full"  # which rotary table, or None for no rotation
    window: int = -1  # of sliding attention, -1: everything
    scale: float = 0.0  # of the attention scores, 0: one over the root of the head size


def traits_of(config: Mapping[str, Any], dims: ModelDims) -> tuple[LayerTraits, ...]:
    """Windows, rotary tables and score scales, layer by layer. Raises UnsupportedModelError."""
    plain = text_config(dict(config))
    scalar = plain.get("query_pre_attn_scalar")
    scale = float(scalar) ** -0.5 if scalar else 0.0
    layers = range(len(dims.layers))
    if dims.family == "gemma3_text":
        window = config_int(plain, "sliding_window", 4096)
        local = [kind == "sliding_attention" for kind in gemma3.layer_types(plain)]
        return tuple(
            LayerTraits(rope="local" if local[i] else "full", window=window if local[i] else -1, scale=scale)
            for i in layers
        )
    turns = smollm3.rotary(plain) if dims.family == "smollm3" else [True] * len(dims.layers)
    # the other families' context ends where a window would begin to matter
    return tuple(LayerTraits(rope="full" if turns[i] else None, scale=scale) for i in layers)


# ---------------------------------------------------------------- weights


# (HF tensor, first row, rows) of a matrix; a fused tensor holds several
Source = tuple[str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One stretch of the data file and what it is made from.

    Attributes:
        kind: 'plain' (as stored), 'transposed', 'packed' or 'scales' of a quantized matrix, 'cos', 'sin'.
        sources: joined along their rows; for rotary tables the name is the table's.
        add: added to every value, for norms that store their weight less one.
    """

    kind: str
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    dtype: str
    offset: int
    n_bytes: int
    bits: int = 0
    add: float = 0.0


@dataclass(slots=True)
class Graph:
    """Nodes and initializers under construction; `blocks` lie behind each other in the data file."""

    data_name: str
    float_type: str
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    data_bytes: int = 0
    known: set[str] = field(default_factory=set)

    # ------------------------------------------------ building blocks

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **at: Any,
    ) -> str:
        """Add a node; its first output, called like the node unless `outputs` says otherwise."""
        made = list(outputs) or [name]
        self.nodes.append(
            library("onnx").helper.make_node(op, list(inputs), made, name=name, domain=domain, **at)
        )
        return made[0]

    def constant(self, name: str, values: Any, dtype: str = "int64") -> str:
        """A small constant inside the model file."""
        if name not in self.known:
            import numpy as np

            array = np.asarray(values, dtype=dtype)
            self.initializers.append(library("onnx").numpy_helper.from_array(array, name))
            self.known.add(name)
        return name

    def stored(
        self, name: str, shape: tuple[int, ...], dtype: str, kind: str, sources: Sequence[Source], **more: Any
    ) -> str:
        """An initializer in the data file; asked for twice, it is stored once."""
        if name in self.known:
            return name
        n_bytes = _item_bytes(dtype)
        for size in shape:
            n_bytes *= size
        offset = -(-self.data_bytes // ALIGNMENT) * ALIGNMENT
        self.blocks.append(
            Block(
                kind=kind,
                sources=tuple(sources),
                shape=shape,
                dtype=dtype,
                offset=offset,
                n_bytes=n_bytes,
                **more,
            )
        )
        self.data_bytes = offset + n_bytes
        self._refer(name, shape, dtype, offset, n_bytes)
        return name

    def _refer(self, name: str, shape: tuple[int, ...], dtype: str, offset: int, n_bytes: int) -> None:
        onnx = library("onnx")
        tensor = onnx.TensorProto(name=name, data_type=_onnx_type(dtype), dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.data_name), ("offset", offset), ("length", n_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.known.add(name)


def _item_bytes(dtype: str) -> int:
    return {"float32": 4, "float16": 2, "uint8": 1}[dtype]


def _onnx_type(dtype: str) -> int:
    onnx = library("onnx")
    return int(
        {
            "float32": onnx.TensorProto.FLOAT,
            "float16": onnx.TensorProto.FLOAT16,
            "uint8": onnx.TensorProto.UINT8,
            "int64": onnx.TensorProto.INT64,
        }[dtype]
    )


# ---------------------------------------------------------------- the decoder


def model_file(quantization: str) -> str:
    """Name of the model file inside the artifact folder."""
    return f"model{QUANTIZATIONS[quantization][2]}.onnx"


def attention_layers(dims: ModelDims) -> list[int]:
    """Layers that have a KV cache, in the order of its numbers."""
    return [i for i, s in enumerate(dims.layers) if s.n_kv_heads]


@dataclass(slots=True)
class _Decoder:
    """Writes one decoder into a graph, layer by layer."""

    graph: Graph
    family: Family
    dims: ModelDims
    traits: tuple[LayerTraits, ...]
    bits: int
    context: int
    rotary: int  # elements of a head that are rotated
    stream: str = ""
    pending: str | None = None  # branch that is still to be added to the stream

    # ------------------------------------------------ pieces

    def linear(self, x: str, roles: Sequence[str], layer: int, name: str) -> str:
        """x [.., columns] times the transpose of the roles' matrices joined along their rows, plus biases."""
        g = self.graph
        sources = self.sources(roles, layer)
        rows, columns = sum(s[2] for s in sources), self.family.columns(self.dims, roles[0], layer)
        if self.bits in (4, 8):
            out = self.matmul_bits(x, sources, rows, columns, name, self.bits)
        else:
            weight = g.stored(f"{name}.weight", (columns, rows), g.float_type, "transposed", sources)
            out = g.node("MatMul", (x, weight), f"{name}/MatMul")
        if self.family.has_bias(self.dims, roles[0]):
            biases = self.sources(roles, layer, "bias")
            bias = g.stored(f"{name}.bias", (rows,), g.float_type, "plain", biases)
            out = g.node("Add", (out, bias), f"{name}/Add")
        return out

    def sources(self, roles: Sequence[str], layer: int, suffix: str = "weight") -> list[Source]:
        parts = [self.family.part(self.dims, role, layer, suffix) for role in roles]
        return [(p.tensor, p.offset, p.block) for p in parts]

    def quantized(
        self, sources: Sequence[Source], rows: int, columns: int, name: str, bits: int
    ) -> tuple[str, str]:
        """Names of the packed values and the scales of a quantized matrix."""
        g, blocks = self.graph, n_blocks(columns)
        size = (rows, blocks, BLOCK * bits // 8)
        packed = g.stored(f"{name}.weight", size, "uint8", "packed", sources, bits=bits)
        scales = g.stored(f"{name}.scales", (rows, blocks), "float32", "scales", sources, bits=bits)
        return packed, scales

    def matmul_bits(
        self, x: str, sources: Sequence[Source], rows: int, columns: int, name: str, bits: int
    ) -> str:
        packed, scales = self.quantized(sources, rows, columns, name, bits)
        return self.graph.node(
            "MatMulNBits",
            (x, packed, scales),
            f"{name}/MatMul_Q{bits}",
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=4,  # activations in int8, as llama.cpp does
        )

    def norm_weight(self, tensor: str, size: int) -> str:
        add = self.family.norm_offset
        source = ((tensor, 0, size),)
        return self.graph.stored(tensor, (size,), self.graph.float_type, "plain", source, add=add)

    def norm(self, x: str, tensor: str, size: int, name: str) -> str:
        """RMS norm over the last axis."""
        weight = self.norm_weight(tensor, size)
        return self.graph.node(
            "SimplifiedLayerNormalization",
            (x, weight),
            f"{name}/SimplifiedLayerNorm",
            axis=-1,
            epsilon=self.dims.rms_eps,
            stash_type=1,
        )

    def stream_norm(self, tensor: str, name: str) -> str:
        """Add what is pending to the stream and return the stream, normed."""
        if self.pending is None:
            return self.norm(self.stream, tensor, self.dims.hidden, name)
        weight = self.norm_weight(tensor, self.dims.hidden)
        normed, total = f"{name}/SkipLayerNorm", f"{name}/sum"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            (self.stream, self.pending, weight),
            normed,
            outputs=(normed, "", "", total),
            domain=CONTRIB,
            epsilon=self.dims.rms_eps,
        )
        self.stream, self.pending = total, None
        return normed

    def branch(self, x: str, layer: int, role: str) -> None:
        """Hold a branch for the next norm; some families norm it first."""
        if role in self.family.roles:
            x = self.norm(x, self.family.tensor(role, layer), self.dims.hidden, f"/layers.{layer}/{role}")
        self.pending = x

    # ------------------------------------------------ parts of the model

    def embedding(self) -> None:
        g, dims = self.graph, self.dims
        tensor = self.family.tensor("embed")
        source = ((tensor, 0, dims.vocab),)
        if self.head_bits == 8:
            # common operators: GatherBlockQuantized is missing from ONNX Runtime's build for browsers
            name = "lm_head" if dims.tied else "embed"
            packed, scales = self.quantized(source, dims.vocab, dims.hidden, name, self.head_bits)
            rows = g.node("Gather", (packed, "input_ids"), "/embed/Gather", axis=0)
            levels = g.node("Cast", (rows,), "/embed/Cast", to=_onnx_type("float32"))
            zero = g.constant("zero_point", 1 << (self.head_bits - 1), "float32")
            levels = g.node("Sub", (levels, zero), "/embed/Sub")
            steps = g.node("Gather", (scales, "input_ids"), "/embed/Gather_scales", axis=0)
            steps = g.node("Unsqueeze", (steps, g.constant("axis_last", [-1])), "/embed/Unsqueeze")
            values = g.node("Mul", (levels, steps), "/embed/Mul")
            width = n_blocks(dims.hidden) * BLOCK
            out = g.node("Reshape", (values, g.constant("row", [0, 0, width])), "/embed/Reshape")
            if width != dims.hidden:
                cut = [
                    g.constant(f"cut_{k}", [v]) for k, v in (("from", 0), ("to", dims.hidden), ("axis", 2))
                ]
                out = g.node("Slice", (out, *cut), "/embed/Slice")
        else:
            table = g.stored(tensor, (dims.vocab, dims.hidden), g.float_type, "plain", source)
            out = g.node("Gather", (table, "input_ids"), "/embed/Gather", axis=0)
        if self.family.scaled_embedding:
            scale = g.constant("embed_scale", self.family.embed_scale(dims), g.float_type)
            out = g.node("Mul", (out, scale), "/embed/Scale")
        self.stream = out

    @property
    def head_bits(self) -> int:
        """Bits of embedding and output layer."""
        return HEAD_BITS.get(self.bits, self.bits)

    def lengths(self) -> None:
        """Cache length per sequence and total length, from the attention mask."""
        g = self.graph
        onnx = library("onnx")
        one, axis = g.constant("one", 1), g.constant("axis_1", [1])
        total = g.node("ReduceSum", ("attention_mask", axis), "/mask/ReduceSum", keepdims=0)
        last = g.node("Sub", (total, one), "/mask/Sub")
        g.node("Cast", (last,), "seqlens_k", to=onnx.TensorProto.INT32)
        shape = g.node("Shape", ("attention_mask",), "/mask/Shape")
        length = g.node("Gather", (shape, one), "/mask/Gather", axis=0)
        g.node("Cast", (length,), "total_length", to=onnx.TensorProto.INT32)

    def attention(self, layer: int, cache: int) -> None:
        g, dims, family = self.graph, self.dims, self.family
        shape, dh, at = dims.layers[layer], dims.head_dim, f"/layers.{layer}/attn"
        traits = self.traits[layer]
        x = self.stream_norm(family.tensor("attn_norm", layer), f"/layers.{layer}/attn_norm")
        sizes = (shape.n_heads * dh, shape.n_kv_heads * dh, shape.n_kv_heads * dh)
        q = self.linear(x, ("q", "k", "v"), layer, f"{at}/qkv")
        k = v = ""
        if "q_norm" in family.roles:
            parts = [f"{at}/{role}" for role in ("q", "k", "v")]
            sizes_name = g.constant(f"split_{sizes[0]}_{sizes[1]}", sizes)
            g.node("Split", (q, sizes_name), f"{at}/Split", outputs=parts, axis=-1)
            q = self.head_norm(parts[0], family.tensor("q_norm", layer), sizes[0], f"{at}/q_norm")
            k = self.head_norm(parts[1], family.tensor("k_norm", layer), sizes[1], f"{at}/k_norm")
            v = parts[2]
        tables: tuple[str, ...] = ("", "")
        if traits.rope is not None:
            size = (self.context, self.rotary // 2)
            tables = tuple(
                g.stored(f"{kind}_{traits.rope}", size, g.float_type, kind, ((traits.rope, 0, 0),))
                for kind in ("cos", "sin")
            )
        past = [f"past_key_values.{cache}.{kind}" for kind in ("key", "value")]
        present = [f"present.{cache}.{kind}" for kind in ("key", "value")]
        out = f"{at}/GroupQueryAttention"
        more: dict[str, Any] = {}
        if traits.window > 0:
            more["local_window_size"] = traits.window
        if traits.scale:
            more["scale"] = traits.scale
        g.node(
            "GroupQueryAttention",
            _trim((q, k, v, *past, "seqlens_k", "total_length", *tables)),
            out,
            outputs=(out, *present),
            domain=CONTRIB,
            num_heads=shape.n_heads,
            kv_num_heads=shape.n_kv_heads,
            do_rotary=int(traits.rope is not None),
            rotary_interleaved=0,
            **more,
        )
        made = self.linear(out, ("o",), layer, f"{at}/o")
        self.branch(made, layer, "attn_post_norm")

    def head_norm(self, x: str, tensor: str, size: int, name: str) -> str:
        """RMS norm over each head of x [batch, tokens, size]."""
        g, dh = self.graph, self.dims.head_dim
        heads = g.node("Reshape", (x, g.constant("by_head", [0, 0, -1, dh])), f"{name}/Reshape_1")
        normed = self.norm(heads, tensor, dh, name)
        return g.node("Reshape", (normed, g.constant(f"flat_{size}", [0, 0, size])), f"{name}/Reshape_2")

    def feed_forward(self, layer: int) -> None:
        g, at = self.graph, f"/layers.{layer}/ffn"
        x = self.stream_norm(self.family.tensor("ffn_norm", layer), f"/layers.{layer}/ffn_norm")
        gate = self.linear(x, ("gate",), layer, f"{at}/gate")
        up = self.linear(x, ("up",), layer, f"{at}/up")
        if self.family.activation == "silu":
            sigmoid = g.node("Sigmoid", (gate,), f"{at}/Sigmoid")
            gate = g.node("Mul", (gate, sigmoid), f"{at}/Silu")
        else:
            gate = g.node("Gelu", (gate,), f"{at}/Gelu", approximate="tanh")
        both = g.node("Mul", (gate, up), f"{at}/Mul")
        made = self.linear(both, ("down",), layer, f"{at}/down")
        self.branch(made, layer, "ffn_post_norm")

    def head(self) -> None:
        g, dims, family = self.graph, self.dims, self.family
        onnx = library("onnx")
        x = self.stream_norm(family.tensor("final_norm"), "/final_norm")
        sources = ((family.tensor("embed" if dims.tied else "head"), 0, dims.vocab),)
        if self.head_bits == 8:
            out = self.matmul_bits(x, sources, dims.vocab, dims.hidden, "lm_head", self.head_bits)
        elif dims.tied:
            table = g.stored(sources[0][0], (dims.vocab, dims.hidden), g.float_type, "plain", sources)
            out = g.node("FusedMatMul", (x, table), "/lm_head/MatMul", domain=CONTRIB, transB=1)
        else:
            weight = g.stored(
                "lm_head.weight", (dims.hidden, dims.vocab), g.float_type, "transposed", sources
            )
            out = g.node("MatMul", (x, weight), "/lm_head/MatMul")
        # always float32: samplers of all clients read that
        if g.float_type == "float32":
            g.nodes[-1].output[0] = "logits"
        else:
            g.node("Cast", (out,), "logits", to=onnx.TensorProto.FLOAT)


# Bits of the embedding and the output layer, which llama.cpp keeps at 8 for Q4_0 as well. SmolLM2-135M: 0.32
# nats per token to the dense model with 8, 0.49 with 4, for 14 MB of 104 and a tenth of the speed.
HEAD_BITS = {4: 8, 8: 8}


def _trim(names: Sequence[str]) -> list[str]:
    out = list(names)
    while out and not out[-1]:
        out.pop()
    return out


def check_family(family: Family) -> None:
    if family.activation not in ("silu", "gelu_tanh"):
        raise UnsupportedModelError(f"ONNX: activation '{family.activation}' is not covered")


def build(
    family: Family,
    dims: ModelDims,
    config: Mapping[str, Any],
    quantization: str,
    *,
    context: int,
    name: str = "model",
) -> tuple[Any, Graph]:
    """The ModelProto (weights only referred to) and the layout of its data file.

    Raises UnsupportedModelError for what the operators do not cover.
    """
    onnx = library("onnx")
    bits, float_type, _ = QUANTIZATIONS[quantization]
    check(dims)
    check_family(family)
    graph = Graph(data_name=f"{model_file(quantization)}_data", float_type=float_type)
    decoder = _Decoder(
        graph=graph,
        family=family,
        dims=dims,
        traits=traits_of(config, dims),
        bits=bits,
        context=context,
        rotary=rotary_size(config, dims),
    )
    decoder.lengths()
    decoder.embedding()
    cache = 0
    for layer, shape in enumerate(dims.layers):
        if shape.n_kv_heads:
            decoder.attention(layer, cache)
            cache += 1
        if shape.n_ff:
            decoder.feed_forward(layer)
    decoder.head()

    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info(
            "attention_mask", onnx.TensorProto.INT64, ["batch_size", "total_sequence_length"]
        ),
    ]
    outputs = [
        helper.make_tensor_value_info(
            "logits", onnx.TensorProto.FLOAT, ["batch_size", "sequence_length", dims.vocab]
        )
    ]
    for cache, layer in enumerate(attention_layers(dims)):
        heads = dims.layers[layer].n_kv_heads
        for kind in ("key", "value"):
            for where, prefix, length in (
                (inputs, "past_key_values", "past_sequence_length"),
                (outputs, "present", "total_sequence_length"),
            ):
                where.append(
                    helper.make_tensor_value_info(
                        f"{prefix}.{cache}.{kind}",
                        _onnx_type(float_type),
                        ["batch_size", heads, length, dims.head_dim],
                    )
                )
    made = helper.make_graph(graph.nodes, name, inputs, outputs, graph.initializers)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        producer_name="edgeprune",
    )
    model.ir_version = IR_VERSION
    return model, graph


def rotary_size(config: Mapping[str, Any], dims: ModelDims) -> int:
    """Elements of each head that are rotated."""
    config = text_config(dict(config))
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    partial = scaling.get("partial_rotary_factor") if isinstance(scaling, Mapping) else None
    partial = partial or config.get("partial_rotary_factor") or 1.0
    return int(dims.head_dim * float(partial))


def check(dims: ModelDims) -> None:
    """Raises UnsupportedModelError for shapes the operators cannot run."""
    if not attention_layers(dims):
        raise UnsupportedModelError("ONNX: a decoder without any attention is not covered", "keep a KV head")
    if dims.head_dim % 8:
        raise UnsupportedModelError(f"ONNX: head size {dims.head_dim} is not a multiple of 8")
