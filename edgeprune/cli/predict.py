"""`edgeprune predict`: decode and prefill speed of a model on a device, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edgeprune import graph, locate
from edgeprune.cli._output import echo_json, echo_pairs, format_option
from edgeprune.config.targets import load_target, with_calibration
from edgeprune.costs import speed as speed_costs
from edgeprune.costs.gguf_header import Header, read_header
from edgeprune.costs.gguf_types import TYPES
from edgeprune.costs.memory import KV_ELEMENT_BYTES
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.records import DeviceTarget
from edgeprune.registry import suggest

RUNTIMES = ("llama.cpp", "llama-cpp")
# parts of tensor names that only models without a plain dense decoder have
_FOREIGN = {
    "_exps.": "mixture of experts",
    ".ssm_": "state-space layers",
    ".shortconv": "convolution layers",
    ".time_mix": "recurrent layers",
    "per_layer": "per-layer embeddings",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What one token reads."""

    name: str
    read: Mapping[str, float]  # tensor type or quantization -> bytes
    layers: int
    kv_dims: tuple[int, ...]  # numbers of one key, per layer that has attention
    params: int | None  # that take part in a product


@click.command()
@click.option("--target", required=True, metavar="NAME|FILE", help="Device, see 'edgeprune targets'.")
@click.option("--mode", metavar="NAME", help="Power mode of the target. Default: the target's.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="llama.cpp",
    show_default=True,
    help="Engine that runs the model.",
)
@click.option(
    "--backend",
    type=click.Choice(speed_costs.BACKENDS),
    help="Where layers are computed. Default: the GPU of a Jetson, else the CPU.",
)
@click.option("--model", metavar="FOLDER", help="Model folder with a config.json; needs --quantization.")
@click.option("--artifact", type=click.Path(path_type=Path), metavar="FILE", help="GGUF file.")
@click.option(
    "--read-bytes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Bytes of weights read per token, for a model known only by published figures.",
)
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Decoder layers, with --read-bytes.")
@click.option(
    "--kv-dim",
    type=click.IntRange(min=0),
    metavar="N",
    help="KV heads times head size, with --read-bytes.",
)
@click.option(
    "--params",
    type=click.IntRange(min=1),
    metavar="N",
    help="Parameters, with --read-bytes. Default: what the bytes hold.",
)
@click.option("--family", metavar="NAME", help="Model type, with --read-bytes; refused if not covered.")
@click.option(
    "--quantization",
    metavar="TYPE",
    help="Such as Q4_K_M; with --model also a mix. An artifact says its own.",
)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens in the cache while decoding.",
)
@click.option("--kv-type", metavar="TYPE", default="f16", show_default=True, help="Type of the KV cache.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="T", help="CPU threads. Default: the target's best."
)
@click.option("--published", is_flag=True, help="Leave out your own calibration of this device.")
@format_option
def command(
    target: str,
    mode: str | None,
    runtime: str,
    backend: str | None,
    model: str | None,
    artifact: Path | None,
    read_bytes: int | None,
    layers: int | None,
    kv_dim: int | None,
    params: int | None,
    family: str | None,
    quantization: str | None,
    context: int,
    kv_type: str,
    threads: int | None,
    published: bool,
    form: str,
) -> None:
    """Predict decode and prefill speed of llama.cpp, with an 80% band and what it is based on.

    Name the model by one of --model, --artifact or --read-bytes.

    \b
    Examples:
      edgeprune predict --target raspberry-pi-5-8gb --artifact model.gguf --context 2048
      edgeprune predict --target jetson-orin-nano-8gb --mode 25W --quantization Q4_K_M \\
        --read-bytes 808000000 --layers 16 --kv-dim 512 --context 128
    """
    if family is not None:
        speed_costs.check_family(family)
    if kv_type not in KV_ELEMENT_BYTES:
        raise ConfigError(
            f"unknown KV cache type '{kv_type}'{suggest(kv_type, KV_ELEMENT_BYTES)}",
            f"known: {', '.join(KV_ELEMENT_BYTES)}",
        )
    load = _load(model, artifact, read_bytes, layers, kv_dim, params, quantization)
    device, took = load_target(target)
    device = _with_own_facts(device, published)
    speed = speed_costs.speed_model(device, mode=mode, backend=backend, threads=threads)
    cache = sum(
        speed_costs.cache_bytes(layers=1, kv_dim=dim, context_tokens=context, kv_type=kv_type)
        for dim in load.kv_dims
    )
    decode = speed_costs.band(
        1e9 / speed_costs.decode_ns(load.read, cache, load.layers, speed), speed.relative_error
    )
    prefill = speed_costs.predict_prefill(params=load.params, speed=speed) if load.params else None
    used = speed_costs.hardware(device, mode=mode, backend=backend, threads=threads)
    answer: dict[str, Any] = {
        "target": device.name,
        "mode": speed.mode or None,
        "runtime": "llama.cpp",
        "backend": speed.backend,
        "threads": (threads or speed.threads or used.threads) if speed.backend == "cpu" else None,
        "model": load.name,
        "quantization": quantization,
        "context": context,
        "read_bytes": round(sum(load.read.values())),
        "kv_bytes": round(cache),
        "layers": load.layers,
        "decode_tps": _rounded(decode),
        "prefill_tps": None if prefill is None else _rounded(prefill),
        "band": 0.8,
        "basis": speed.basis,
        "based_on": speed.source,
        "note": took,
    }
    if form == "json":
        echo_json(answer)
        return
    pairs = [
        ("device", " ".join(filter(None, (device.name, speed.mode, speed.backend)))),
        ("model", f"{load.name}, {sum(load.read.values()) / 1e6:.0f} MB read per token"),
        ("decode", _phrase(decode)),
        ("prefill", "unknown" if prefill is None else _phrase(prefill)),
        ("based on", speed.source),
    ]
    echo_pairs(pairs + ([("note", took)] if took else []))


def _with_own_facts(device: DeviceTarget, published: bool) -> DeviceTarget:
    if device.local:
        from edgeprune.devices import local

        found = local.describe(device)
        return found if not published else _without_calibration(found)
    return device if published else with_calibration(device)


def _without_calibration(device: DeviceTarget) -> DeviceTarget:
    import dataclasses

    return dataclasses.replace(device, speeds=tuple(s for s in device.speeds if s.basis != "calibrated"))


def _rounded(figure: tuple[float, float, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in zip(("value", "low", "high"), figure, strict=True)}


def _phrase(figure: tuple[float, float, float]) -> str:
    value, low, high = figure
    return f"{value:.1f} tokens/s, 80% band {low:.1f} to {high:.1f}"


# ---------------------------------------------------------------- what one token reads


def _load(
    model: str | None,
    artifact: Path | None,
    read_bytes: int | None,
    layers: int | None,
    kv_dim: int | None,
    params: int | None,
    quantization: str | None,
) -> _Load:
    given = [
        n
        for n, v in (("--model", model), ("--artifact", artifact), ("--read-bytes", read_bytes))
        if v is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given)} name the model twice" if given else "no model is named",
            "give one of --model FOLDER, --artifact FILE, or --read-bytes with --layers and --kv-dim",
        )
    if artifact is not None:
        return _of_file(artifact)
    if quantization is None:
        raise ConfigError(f"{given[0]} needs --quantization", "such as --quantization Q4_K_M")
    speed_costs.check_quantization(quantization)
    if model is not None:
        return _of_folder(Path(model), quantization)
    speed_costs.mix_of(quantization)
    if layers is None or kv_dim is None:
        raise ConfigError("--read-bytes needs --layers and --kv-dim", "both are in the model's config.json")
    assert read_bytes is not None
    return _Load(
        name="published figures",
        read={quantization: float(read_bytes)},
        layers=layers,
        kv_dims=(kv_dim,) * layers,
        params=params or _params_of(read_bytes, quantization),
    )


def _params_of(read_bytes: int, quantization: str) -> int:
    """Parameters that so many bytes of this quantization hold."""
    per_byte = 0.0
    for kind, share in speed_costs.mix_of(quantization).items():
        per_byte += share * TYPES[kind].block / TYPES[kind].block_bytes
    return round(read_bytes * per_byte)


def _of_folder(path: Path, quantization: str) -> _Load:
    # the exporter's own rules say which tensor gets which type
    from edgeprune.exporters import gguf

    if path.is_file():
        raise ConfigError(f"{path} is a file", "name a GGUF file with --artifact")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: there is no config.json", "name a model folder, or use --read-bytes")
    config = locate.read_json(path / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str):
        speed_costs.check_family(kind)
    built = graph.build(config)
    dims = built.dims
    cost = gguf.FileCost(
        graph.find_family(dims.family), config, (), name=path.name, license_name=None, has_imatrix=True
    )
    tensors = [(name, kind, n_bytes) for name, _, kind, n_bytes in cost.tensors(dims, quantization)]
    looked_up = 0 if dims.tied else dims.vocab * dims.hidden
    return _Load(
        name=path.resolve().name,
        read=speed_costs.by_type(tensors, tied=dims.tied),
        layers=len(dims.layers),
        kv_dims=tuple(layer.n_kv_heads * dims.head_dim for layer in dims.layers),
        params=built.total_params - looked_up,
    )


def _of_file(path: Path) -> _Load:
    if not path.is_file():
        raise ConfigError(f"file {path} does not exist", "give a GGUF file, such as one of edgeprune export")
    header = read_header(path)
    values = header.values()
    arch = _text(values.get("general.architecture"))
    speed_costs.check_family(arch)
    for tensor in header.tensors:
        for part, why in _FOREIGN.items():
            if part in tensor.name:
                raise UnsupportedModelError(
                    f"no speed can be predicted for '{arch}': {why}",
                    "the predictor covers dense decoders only, which read all their weights for every token",
                )
    layers = values.get(f"{arch}.block_count")
    if not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"{path}: '{arch}.block_count' is missing", "is this the file of a decoder LLM?")
    tied = all(t.name != "output.weight" for t in header.tensors)
    tensors = [(t.name, t.type.name, t.n_bytes) for t in header.tensors]
    counted = (t for t in header.tensors if tied or t.name != "token_embd.weight")
    return _Load(
        name=path.name,
        read=speed_costs.by_type(tensors, tied=tied),
        layers=layers,
        kv_dims=_kv_dims(header),
        params=sum(_size(t.shape) for t in counted),
    )


def _kv_dims(header: Header) -> tuple[int, ...]:
    """Width of the keys of every layer that has any: rows of its K matrix, or a third of a joint one."""
    out = []
    for tensor in header.tensors:
        if tensor.name.endswith(".attn_k.weight"):
            out.append(tensor.shape[0])
        elif tensor.name.endswith(".attn_qkv.weight"):
            out.append((tensor.shape[0] - tensor.shape[1]) // 2)
    return tuple(out)


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
