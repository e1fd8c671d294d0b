"""Decode and prefill speed of llama.cpp on a device: always a value with an 80% interval.

Decoding reads every weight once per token and runs every layer, so for each token

    t = sum over types of bytes / rate(type) + kv_bytes(context) / bandwidth + layers * layer_time

A rate has two limits that act together: what the memory delivers (a share of its peak) and what the
cores unpack and multiply (threads times a rate per core and type; streaming multiprocessors times
clock on a GPU). rate = (memory**-3 + compute**-3)**(-1/3): the smaller one wins, near the crossing
both cost. So a wide memory bus behind few threads is thread-bound, and types that are slow to unpack
are slow only where unpacking is the limit. Prefill is bound by arithmetic: two operations per
parameter and token.

`CONSTANTS` were fitted on 2026-11-22 to 94 published llama.cpp rows with `benchmarks/predictor.py
--fit`, which also says how far off they are for devices and sources that were left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeprune.costs import gguf_types
from edgeprune.costs.memory import KV_ELEMENT_BYTES, kv_bytes
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.records import DeviceTarget, LaunchFlags, ModelDims, PowerMode, SpeedModel
from edgeprune.registry import suggest

REFERENCE = "Q4_K_M"  # what a speed model's bandwidth is stated for
_SHARPNESS = 3.0
_MOST_THREADS = 32  # more do not help one token; published servers fall off
_SERVER_CORES = 32
_FEW_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Few numbers with a physical meaning; bytes per second in GB/s, times in milliseconds."""

    memory_share: float  # of the peak bandwidth that a CPU's cores reach together
    x86: float  # GB/s one core works off, Q4_0
    arm: float  # the same, with dot product instructions
    arm_basic: float  # the same, without them
    apple: float
    cpu_layer_ms: float  # barriers and small operations of one layer
    gpu_share: float
    gpu_rate: float  # GB/s per (streaming multiprocessor x GHz), Q4_K_M
    gpu_layer_ms: float  # kernel launches of one layer
    gpu_q8: float  # Q8_0 against Q4_K_M, bytes per unit of GPU work
    cpu_error: float  # 80% half width of log(predicted / measured), device known by its facts only
    gpu_error: float


CONSTANTS = Constants(
    memory_share=0.794,
    x86=7.00,
    arm=4.13,
    arm_basic=1.10,
    apple=26.8,
    cpu_layer_ms=0.0368,
    gpu_share=0.688,
    gpu_rate=6.58,
    gpu_layer_ms=0.0876,
    gpu_q8=1.52,
    cpu_error=0.34,
    gpu_error=0.30,  # three published devices: too few for a quantile of their own (0.10)
)

# bytes one core works off per second, relative to Q4_0: NEON with dot product from the published
# llama-bench sweep over types on an M2 Max with 4 threads (thread-bound: 26 of 100 GB/s a thread)
_NEON = {
    **dict.fromkeys(("F32", "BF16", "F16"), 1.13),
    "Q8_0": 1.07,
    "Q4_0": 1.0,
    "IQ4_NL": 0.98,
    "Q4_1": 0.95,
    "Q4_K": 0.75,
    "Q6_K": 0.685,
    "IQ4_XS": 0.638,
    "Q5_K": 0.614,
    "Q5_0": 0.612,
    "Q5_1": 0.612,
    "Q3_K": 0.365,
    "Q2_K": 0.375,
}
# measured 2026-11-22 with calibrate-device on two cores of an AMD EPYC (Zen 5, AVX-512 VNNI), rounded
_X86 = {
    **dict.fromkeys(("F32", "BF16", "F16"), 1.5),
    "Q8_0": 1.2,
    "Q4_0": 1.0,
    "IQ4_NL": 1.0,
    "Q4_K": 1.0,
    "Q6_K": 0.9,
    "Q4_1": 0.65,
    "Q5_K": 0.7,
    "Q5_0": 0.7,
    "Q5_1": 0.7,
    "Q2_K": 0.55,
    "IQ4_XS": 0.55,
    "Q3_K": 0.45,
}
# relative to Q4_K; two and three bits reach 0.5 to 0.9 of four bits' efficiency in published CUDA rows
_CUDA = {
    **dict.fromkeys(("F32", "BF16", "F16"), 2.5),
    "Q8_0": 1.52,
    "Q4_0": 1.1,
    "Q4_1": 1.1,
    "IQ4_NL": 1.0,
    "IQ4_XS": 0.95,
    "Q4_K": 1.0,
    "Q5_K": 1.0,
    "Q5_0": 1.0,
    "Q5_1": 1.0,
    "Q6_K": 1.0,
    "Q3_K": 0.75,
    "Q2_K": 0.65,
}
# which tensor types a llama.cpp file of this name holds, as shares of its bytes
MIXES: Mapping[str, Mapping[str, float]] = {
    "Q2_K": {"Q2_K": 0.6, "Q3_K": 0.3, "Q6_K": 0.1},
    "Q3_K_S": {"Q3_K": 0.9, "Q6_K": 0.1},
    "Q3_K_M": {"Q3_K": 0.55, "Q4_K": 0.25, "Q5_K": 0.1, "Q6_K": 0.1},
    "Q4_K_S": {"Q4_K": 0.87, "Q5_K": 0.03, "Q6_K": 0.1},
    "Q4_K_M": {"Q4_K": 0.7, "Q6_K": 0.3},
    "Q5_K_S": {"Q5_K": 0.9, "Q6_K": 0.1},
    "Q5_K_M": {"Q5_K": 0.7, "Q6_K": 0.3},
}

# arithmetic of one core in prefill, operations per second: medians over the published llama-bench rows
# (x86 26 to 100, arm 53, Apple 174 to 460); without dot product assumed a tenth
_PREFILL_GFLOPS = {"x86": 55.0, "arm": 53.0, "arm-basic": 5.0, "apple": 190.0}
# tensor cores do 2048 F16 operations per cycle and multiprocessor; llama.cpp reaches about a quarter
_PREFILL_GPU_GFLOPS = 550.0
PREFILL_ERROR = 0.75  # log; the published rows spread by that much around the medians
PREFILL_GPU_ERROR = 0.9  # no published row to fit: assumed

CACHE = "KV"  # stands among the tensor types for the cache
BACKENDS = ("cpu", "gpu")
# why a model type that llama.cpp may run is not predicted
UNCOVERED = {
    "mixture of experts": (
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen2moe",
        "qwen3moe",
        "qwen3_5_moe",
        "olmoe",
        "deepseek2",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "gpt-oss",
        "granitemoe",
        "phimoe",
        "llama4",
        "dbrx",
        "grok",
        "glm4_moe",
        "glm4moe",
        "ernie4_5_moe",
    ),
    "state-space or convolution layers": (
        "mamba",
        "mamba2",
        "falcon_mamba",
        "falcon_h1",
        "falcon-h1",
        "jamba",
        "bamba",
        "zamba2",
        "granitemoehybrid",
        "granitehybrid",
        "nemotron_h",
        "lfm2",
        "lfm2_moe",
        "lfm2moe",
        "rwkv6",
        "rwkv7",
        "recurrent_gemma",
        "qwen3_next",
        "qwen3next",
        "qwen3_5",
        "plamo2",
    ),
    "per-layer embeddings": ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
}


def check_family(name: str) -> None:
    """Refuse, by name, a model type whose speed does not follow from the bytes it reads per token."""
    for why, names in UNCOVERED.items():
        if name.lower() in names:
            raise UnsupportedModelError(
                f"no speed can be predicted for '{name}': {why}",
                "the predictor covers dense decoders only, which read all their weights for every token",
            )


# ---------------------------------------------------------------- rates


def check_quantization(name: str) -> None:
    """Raises ConfigError for a quantization without a known rate; every type in a mix by class has one."""
    known = {*_NEON, *MIXES}
    if gguf_types.is_mix(name):
        gguf_types.check_quantization(name)
    elif name not in known:
        raise ConfigError(
            f"no speed is known for quantization '{name}'{suggest(name, known)}",
            f"known: {', '.join(sorted(known))}",
        )


def mix_of(quantization: str) -> Mapping[str, float]:
    """Shares of tensor types in a file of this quantization. Raises ConfigError for a mix by class."""
    check_quantization(quantization)
    if gguf_types.is_mix(quantization):
        raise ConfigError(
            f"how many bytes of each type a file of '{quantization}' holds depends on the model",
            "name the model's folder or the file itself",
        )
    return MIXES.get(quantization, {quantization: 1.0})


def _limit(memory: float, compute: float) -> float:
    p = _SHARPNESS
    return float((memory**-p + compute**-p) ** (-1 / p))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the formula needs to know of a device: memory in GB/s, and cores or multiprocessors."""

    peak: float
    threads: int
    core: str
    gpu_sm_ghz: float | None = None  # multiprocessors x GHz; None: the CPU computes

    def rate(self, mix: Mapping[str, float], constants: Constants = CONSTANTS) -> float:
        """GB/s of weights of these types."""
        cost = sum(share / self._rate(kind, constants) for kind, share in mix.items())
        return sum(mix.values()) / cost

    def _rate(self, kind: str, constants: Constants) -> float:
        if self.gpu_sm_ghz is not None:
            factor = constants.gpu_q8 if kind == "Q8_0" else _CUDA.get(kind, 0.6)
            return _limit(constants.gpu_share * self.peak, constants.gpu_rate * self.gpu_sm_ghz * factor)
        core = {
            "x86": constants.x86,
            "arm": constants.arm,
            "arm-basic": constants.arm_basic,
            "apple": constants.apple,
        }
        table = _X86 if self.core == "x86" else _NEON
        compute = min(self.threads, _MOST_THREADS) * core[self.core] * table.get(kind, 0.35)
        return _limit(constants.memory_share * self.peak, compute)

    def layer_ns(self, constants: Constants = CONSTANTS) -> float:
        return 1e6 * (constants.cpu_layer_ms if self.gpu_sm_ghz is None else constants.gpu_layer_ms)

    def prefill_flops(self) -> float:
        if self.gpu_sm_ghz is not None:
            return 1e9 * _PREFILL_GPU_GFLOPS * self.gpu_sm_ghz
        return 1e9 * _PREFILL_GFLOPS[self.core] * self.threads


def core_of(target: DeviceTarget) -> str:
    """Class of the cores: what the target says, else from architecture and instructions."""
    if target.core is not None:
        return target.core
    if target.arch in ("x86_64", "amd64"):
        return "x86"
    return "arm" if "dotprod" in {i.lower() for i in target.isa} else "arm-basic"


def power_mode(target: DeviceTarget, mode: str | None) -> PowerMode | None:
    """The named mode, the default one for None. Raises ConfigError for a mode the target has not."""
    wanted = target.default_mode if mode is None else mode
    for row in target.power_modes:
        if row.name == wanted:
            return row
    if mode is not None:
        known = ", ".join(m.name for m in target.power_modes) or "none"
        raise ConfigError(
            f"target {target.name} has no power mode '{mode}'"
            f"{suggest(mode, [m.name for m in target.power_modes])}",
            f"power modes: {known}",
        )
    return None


def default_backend(target: DeviceTarget) -> str:
    """gpu where llama.cpp runs on one by default, which a mode's `gpu_sm_ghz` says."""
    return "gpu" if any(m.gpu_sm_ghz for m in target.power_modes) or target.gpu_sm_ghz else "cpu"


def hardware(
    target: DeviceTarget, *, mode: str | None = None, backend: str | None = None, threads: int | None = None
) -> Hardware:
    """Hardware facts of a target in a power mode. Raises ConfigError for a GPU it has not."""
    row = power_mode(target, mode)
    backend = backend or default_backend(target)
    sm_ghz = None
    if backend == "gpu":
        sm_ghz = row.gpu_sm_ghz if row is not None and row.gpu_sm_ghz else target.gpu_sm_ghz
        if sm_ghz is None:
            raise ConfigError(f"target {target.name} describes no GPU", "use --backend cpu")
    peak = row.bandwidth_peak_bytes_per_s if row is not None else target.bandwidth_peak_bytes_per_s
    best = target.threads or target.cores
    return Hardware(
        peak=peak / 1e9, threads=best if threads is None else threads, core=core_of(target), gpu_sm_ghz=sm_ghz
    )


def speed_model(
    target: DeviceTarget, *, mode: str | None = None, backend: str | None = None, threads: int | None = None
) -> SpeedModel:
    """Speed of a target: its calibration or profile where it has one, else from its hardware facts.

    A profile was fitted for one thread count and one mix of types; other ones follow it by the ratio
    that the hardware facts give.
    """
    row = power_mode(target, mode)
    backend = backend or default_backend(target)
    facts = hardware(target, mode=mode, backend=backend, threads=threads)
    base = hardware(target, mode=mode, backend=backend)
    reference = mix_of(REFERENCE)
    name = "" if row is None else row.name
    found = [s for s in target.speeds if s.mode == name and s.backend == backend]
    found = [s for s in found if s.basis == "calibrated"] or found
    scale = facts.rate(reference) / base.rate(reference)
    kinds = {k: facts.rate({k: 1.0}) / facts.rate(reference) for k in _NEON}
    if found:
        best = found[0]
        measured = dict(best.type_factors) if threads in (None, best.threads) else {}
        if best.threads is not None and threads is not None and best.basis == "calibrated":
            scale = facts.rate(reference) / dataclasses.replace(facts, threads=best.threads).rate(reference)
        near = 0.0 if scale == 1.0 else 0.15
        return dataclasses.replace(
            best,
            bandwidth_bytes_per_s=best.bandwidth_bytes_per_s * scale,
            compute_flops=None
            if best.compute_flops is None
            else best.compute_flops * facts.threads / (best.threads or base.threads),
            type_factors={**kinds, **measured},
            relative_error=best.relative_error + near,
        )
    error = CONSTANTS.cpu_error if backend == "cpu" else CONSTANTS.gpu_error
    what = f"{facts.threads} threads" if backend == "cpu" else f"{facts.gpu_sm_ghz:.1f} SM x GHz"
    if backend == "cpu" and (target.cores > _SERVER_CORES or facts.threads < _FEW_THREADS):
        # sockets and meshes: the published servers miss by this much; and no published row says what a
        # core reaches that has the memory almost for itself (here twice the constant)
        error *= 2
    return SpeedModel(
        runtime="llama-cpp",
        mode=name,
        backend=backend,
        basis="facts",
        bandwidth_bytes_per_s=1e9 * facts.rate(reference),
        layer_ns=facts.layer_ns(),
        compute_flops=facts.prefill_flops(),
        relative_error=math.expm1(error),
        prefill_error=math.expm1(PREFILL_ERROR if backend == "cpu" else PREFILL_GPU_ERROR),
        type_factors=kinds,
        source=f"hardware facts only: {facts.peak:.1f} GB/s peak, {what}; constants fitted on published rows",
    )


# ---------------------------------------------------------------- predictions


def decode_ns(read: Mapping[str, float], cache_bytes: float, layers: int, speed: SpeedModel) -> float:
    """Nanoseconds per token; `read` maps tensor types (or a quantization) to bytes read per token."""
    seconds = cache_bytes / (speed.bandwidth_bytes_per_s * speed.type_factors.get(CACHE, 1.0))
    for kind, n_bytes in read.items():
        for part, share in MIXES.get(kind, {kind: 1.0}).items():
            factor = speed.type_factors.get(part, 1.0)
            seconds += n_bytes * share / (speed.bandwidth_bytes_per_s * factor)
    return 1e9 * seconds + speed.layer_ns * layers + speed.token_ns


def cache_bytes(*, layers: int, kv_dim: int, context_tokens: int, kv_type: str = "f16") -> float:
    """Bytes of the cache read per token: keys and values of `kv_dim` numbers in every layer."""
    return 2 * layers * kv_dim * context_tokens * KV_ELEMENT_BYTES[kv_type]


def predict_decode(
    dims: ModelDims,
    *,
    read: Mapping[str, float],
    flags: LaunchFlags,
    context_tokens: int,
    speed: SpeedModel,
) -> tuple[float, float, float]:
    """Decode tokens per second with its 80% interval: (value, low, high).

    `read` maps tensor types to the bytes of all tensors of the file less `token_embd` when the head is
    untied. `context_tokens` is how full the cache is.
    """
    cache = kv_bytes(dims, context_tokens, flags.kv_type)
    return band(1e9 / decode_ns(read, cache, len(dims.layers), speed), speed.relative_error)


def predict_prefill(
    *, params: int, speed: SpeedModel, lookup_params: int = 0
) -> tuple[float, float, float] | None:
    """Prefill tokens per second with its interval, or None when the device's arithmetic rate is unknown.

    `params` are all parameters; `lookup_params` those that are only looked up (an untied embedding).
    The output head is counted although only the last token of a prompt needs it: a cautious figure.
    """
    if speed.compute_flops is None:
        return None
    error = speed.relative_error if speed.prefill_error is None else speed.prefill_error
    return band(speed.compute_flops / (2 * (params - lookup_params)), error)


def first_token_ms(prompt_tokens: int, prefill_tps: float, decode_tps: float) -> float:
    """Milliseconds until the first new token: the prompt, then one decode step."""
    return 1e3 * (prompt_tokens / prefill_tps + 1 / decode_tps)


def band(value: float, relative_error: float) -> tuple[float, float, float]:
    """The value with its interval; a factor both ways, so that a rate cannot fall to zero."""
    return value, value / (1 + relative_error), value * (1 + relative_error)


def by_type(tensors: Iterable[tuple[str, str, int]], *, tied: bool) -> dict[str, float]:
    """Bytes read per token, by tensor type, of (name, type, bytes); an untied embedding is only looked up."""
    out: dict[str, float] = {}
    for name, kind, n_bytes in tensors:
        if tied or name != "token_embd.weight":
            out[kind] = out.get(kind, 0.0) + n_bytes
    return out
