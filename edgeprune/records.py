"""The records the stages pass to each other: frozen, plain values, JSON both ways.

Every record that a stage writes has a `key`: a hash of the parameters it was made with and of the
keys it was made from. Resume, caching and provenance all come from `key`. Names end in their unit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from edgeprune.errors import ConfigError
from edgeprune.registry import suggest

SCHEMA = 1

T = TypeVar("T")


# ---------------------------------------------------------------- targets, profiles, budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedModel:
    """Speed of one (runtime, power mode): t = bytes / (bandwidth * factor) + layers * layer_ns + token_ns."""

    runtime: str
    mode: str
    bandwidth_bytes_per_s: float  # reached on Q4_K_M weights
    layer_ns: float
    compute_flops: float | None
    relative_error: float  # the 80% band is value / (1 + e) to value * (1 + e)
    source: str
    backend: str = "cpu"  # cpu or gpu
    basis: str = "profile"  # facts, profile (published rows of this device), calibrated (measured on it)
    threads: int | None = None  # it holds for this many; None: the target's own
    token_ns: float = 0.0  # per token, whatever the model
    prefill_error: float | None = None  # as relative_error; None: the same
    type_factors: dict[str, float] = field(default_factory=dict)  # tensor type -> share of the bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerMode:
    name: str
    bandwidth_peak_bytes_per_s: float
    source: str
    gpu_sm_ghz: float | None = None  # streaming multiprocessors in use times their clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One figure of a target file with where it comes from."""

    field: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTarget:
    """Facts of a device, true whatever model runs on it."""

    kind: ClassVar[str] = "device_target"
    name: str
    title: str
    family: str | None
    arch: str
    isa: tuple[str, ...]
    cores: int
    memory_bytes: int  # what the system reports
    usable_bytes: int  # sensible budget for weights + KV + compute
    bandwidth_peak_bytes_per_s: float
    power_modes: tuple[PowerMode, ...]
    default_mode: str | None
    formats: tuple[str, ...]  # export formats, the default one first
    runtime_overhead_bytes: int  # what a runtime allocates beside the model, e.g. a CUDA context
    speeds: tuple[SpeedModel, ...]
    local: bool  # this very machine
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]
    key: str
    threads: int | None = None  # that decode best; None: as many as cores
    core: str | None = None  # class of the cores where architecture and instructions do not say it
    gpu_sm_ghz: float | None = None  # of a GPU that llama.cpp uses, where no power mode says it


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCalibration:
    """What `calibrate-device` measured on one device: the user's own, kept outside the package."""

    kind: ClassVar[str] = "device_calibration"
    target: str
    cpu: str
    device: str  # local, ssh://…
    runtime_version: str
    date: str  # UTC, ISO 8601
    speeds: tuple[SpeedModel, ...]
    samples: tuple[dict[str, float], ...]  # one row per probe file: bytes by type, layers, ns per token
    key: str
    doubts: tuple[str, ...] = ()  # why the times may not be the device's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    prompt_tokens: int
    new_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    metric: str
    allocators: tuple[str, ...]
    calibration_samples: int
    calibration_tokens: int
    eval_samples: int
    eval_tokens: int
    formats: tuple[str, ...]
    quantizations: tuple[str, ...]
    ratios: tuple[float, ...]  # where nothing has to be pruned, what the first of these costs is shown
    max_measured: int
    mixes: bool = False  # types by class of matrix beside the quantizations named
    compensation: str = "none"  # ridge, bias or none; of every plan
    finalists: str = "none"  # ridge or none; of the best pruned plans only, where `compensation` is none
    compensation_samples: int = 64  # windows that the ridge is solved on
    compensation_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchProtocol:
    prompt_tokens: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A use case: workload, limits, recipe. No hardware numbers."""

    kind: ClassVar[str] = "profile"
    name: str
    title: str
    workload: Workload
    min_decode_tps: float | None
    max_first_token_ms: float | None
    max_kl: float | None
    recipe: Recipe
    bench: BenchProtocol
    key: str
    max_energy_j: float | None = None  # per generated token
    min_agreement: float | None = None  # share of tokens with the dense model's first choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    value: float
    unit: str
    source: str  # "command line", "profile chat-2k", "target laptop-cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The resolved limits of one run; for each the stricter of target, profile and command line."""

    kind: ClassVar[str] = "budget"
    memory_bytes: Limit
    file_bytes: Limit | None
    decode_tps: Limit | None  # at least
    first_token_ms: Limit | None  # at most
    kl: Limit | None  # at most
    key: str
    energy_j: Limit | None = None  # per generated token, at most
    agreement: Limit | None = None  # at least
    objective: str = "quality"  # what the best within the limits is best in: quality, speed or size


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRule:
    """What a runtime allows for one kind of unit."""

    uniform_across_layers: bool
    multiple_of: int
    min_keep: int
    fixed: bool
    whole: bool = False  # the block may go altogether; attention stays in the first layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Legal shapes of one export format, known before anything is cut."""

    kind: ClassVar[str] = "constraints"
    format: str
    ffn: UnitRule
    kv: UnitRule
    reasons: tuple[str, ...]
    q: UnitRule | None = None  # single query heads, beside what KV groups ask for; None: as `kv`


# ---------------------------------------------------------------- models and plans


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Widths of one decoder layer. n_kv_heads 0: no attention. n_ff 0: no FFN."""

    n_heads: int
    n_kv_heads: int
    n_ff: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes that describe one decoder, pruned or not."""

    kind: ClassVar[str] = "model_dims"
    family: str
    vocab: int
    hidden: int
    head_dim: int
    max_context: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rms_eps: float
    layers: tuple[LayerShape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """Unit i owns rows `offset + i*block … + block` of `tensor` along `dim`."""

    tensor: str
    dim: int
    block: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """All units of one kind ('ffn', 'kv' or 'q') in one layer, and the slices that are cut together."""

    name: str  # "layers.3.ffn"
    unit: str
    layer: int
    n_units: int
    unit_params: int
    slices: tuple[TensorSlice, ...]
    groups: int = 1  # equal runs of units that each keep the same number


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph:
    """Axes and tensor shapes of a model: built from its config alone, no weights."""

    kind: ClassVar[str] = "model_graph"
    dims: ModelDims
    axes: tuple[Axis, ...]
    shapes: dict[str, tuple[int, ...]]  # HF tensor name -> shape
    decoder_params: int  # parameters of the decoder layers
    total_params: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """Token ids used for calibration or evaluation, [n_samples, n_tokens], beside the record."""

    kind: ClassVar[str] = "token_set"
    origin: str  # "sampled from the model" or a file name
    seed: int
    n_samples: int
    n_tokens: int
    sha256: str
    path: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStats:
    """Where the arrays of one calibration pass lie, and what was collected."""

    kind: ClassVar[str] = "calibration_stats"
    needs: tuple[str, ...]
    tokens: int
    data_sha256: str
    arrays: str
    arrays_sha256: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStability:
    """Spearman correlation of one unit kind's scores between calibration seeds, per axis, over its axes."""

    unit: str
    axes: int
    mean: float
    minimum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceScores:
    """One float per unit and axis, higher = keep; the arrays lie beside the record."""

    kind: ClassVar[str] = "importance_scores"
    metric: str
    options: dict[str, str]
    poolable: bool  # scores of different layers and kinds may be compared with each other
    arrays: str
    arrays_sha256: str
    key: str
    seeds: tuple[int, ...] = ()  # calibration draws that were averaged; empty: one draw
    stability: tuple[RankStability, ...] = ()  # between those draws


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """Which units stay. `kept` lists sorted indices for every axis that loses something."""

    kind: ClassVar[str] = "prune_plan"
    id: str
    metric: str
    allocator: str
    requested_ratio: float
    ratio: float  # of decoder-layer parameters, reached
    ratio_all: float  # of all parameters, reached
    uniform: bool
    kept: dict[str, tuple[int, ...]]
    dims: ModelDims  # after the cut
    binding: str | None  # what stopped the plan short of the requested ratio
    key: str
    why: dict[str, str] = field(default_factory=dict)  # axis -> why it got its width
    compensation: str = "none"  # ridge: o and down solved anew; bias: biases give back the mean
    steps: int = 1  # small cuts with new scores in between


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPoint:
    """The model on held-out rows after some steps of training."""

    step: int
    tokens: int  # read in training so far
    seconds: float
    kl: float  # nats per token to the dense parent, on its most likely tokens
    loss: float  # of the language model, nats per token


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryTry:
    """A candidate of --recovery auto and how far it came."""

    method: str
    options: dict[str, str]
    rate: float
    seconds: float
    tokens: int
    kl: float  # best on the held-out rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryResult:
    """What training after the cut came to; `kept` False: it made things worse, the weights are as before."""

    kind: ClassVar[str] = "recovery_result"
    method: str
    options: dict[str, str]
    objective: str
    text: str  # origin of the training text
    quantization: str | None  # type whose rounding was trained through
    seed: int
    rate: float
    steps: int
    tokens: int
    seconds: float
    stopped: str  # why training ended
    validation_tokens: int
    kl_before: float
    kl_after: float  # of the weights that were kept
    kept: bool
    note: str
    points: tuple[RecoveryPoint, ...]
    weights: str | None  # changed tensors, relative to the run folder
    weights_sha256: str | None
    key: str
    tried: tuple[RecoveryTry, ...] = ()
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGrowth:
    """One text under the parent's tokenizer and under the trimmed one."""

    text: str  # language code of the built-in sample, or file name
    tokens_before: int
    tokens_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabTrimming:
    """Which tokens of the parent stay. Row i of the trimmed embedding is the parent's row `kept[i]`."""

    kind: ClassVar[str] = "vocab_trimming"
    sources: tuple[str, ...]  # text files, data sets, languages:en,de
    rows_before: int  # of the embedding
    rows_after: int
    why: dict[str, int]  # reason -> tokens that stay for it first
    params_removed: int
    bytes_removed: int  # of the weights as the parent's checkpoint stores them
    growth: tuple[TokenGrowth, ...]
    kept: str  # ids of the parent as runs: 0-16,20
    key: str


# ---------------------------------------------------------------- artifacts and measurements


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    kind: ClassVar[str] = "artifact"
    path: str  # relative to the run folder
    format: str
    quantization: str
    bytes: int
    sha256: str
    made_from: str  # key of the parent record
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFlags:
    """Flags that change what a runtime needs; measured and shipped with the artifact."""

    context_tokens: int
    ubatch: int
    kv_type: str  # f16, q8_0, q4_0
    mmap: bool
    flash_attention: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """The exported file against torch on the same tokens."""

    kind: ClassVar[str] = "verify_result"
    tokens: int
    kl: float
    max_abs_diff: float
    same_argmax: int  # of `tokens`
    explained_argmax: int  # differences where torch's own top two are closer than the noise
    passed: bool
    reason: str | None
    note: str | None = None  # what was found on a second look
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """State of the machine that measured."""

    cpu: str
    n_cpus: int
    governor: str | None
    temperature_c: float | None
    load_average: float
    power_mode: str | None
    throttled: str | None = None  # bits as vcgencmd says them; "0x0" is nothing
    throttle_count: int | None = None  # of the processor, since it started
    on_battery: bool | None = None
    busy_s: float | None = None  # processor seconds that all programs took since the machine started


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Raw times of one artifact on one device. Prefill and decode apart, warm-up left out."""

    kind: ClassVar[str] = "bench_result"
    artifact_sha256: str
    device: str
    runtime: str
    runtime_version: str
    simulated: bool
    n_threads: int
    flags: LaunchFlags
    n_prompt: int
    n_gen: int
    prefill_ns: tuple[int, ...]
    decode_ns: tuple[int, ...]  # whole run of n_gen tokens, one per repeat
    load_ns: int
    thread_sweep: dict[str, float]  # threads -> decode tokens/s
    environment: Environment
    key: str
    # what llama-bench's JSON names beside the times
    model_type: str = ""
    model_bytes: int = 0
    model_params: int = 0
    n_batch: int = 0
    build_commit: str = ""
    test_time: str = ""  # UTC, ISO 8601
    doubts: tuple[str, ...] = ()  # why these times may not be the device's own
    joules_per_token: float | None = None  # of the sustained run, by the tokens it generated; None: no meter
    meter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryResult:
    """Peak memory of a fresh process with the whole context filled, less its value before the model."""

    kind: ClassVar[str] = "memory_result"
    artifact_sha256: str
    device: str
    flags: LaunchFlags
    peak_bytes: int  # VmHWM at the end minus before
    before_bytes: int
    tokens_filled: int
    load_ns: int
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityResult:
    """Quality of the exported artifact through its runtime, against the dense F16 parent."""

    kind: ClassVar[str] = "quality_result"
    artifact_sha256: str
    text: str  # what was read: origin of the tokens
    tokens: int
    kl: float  # nats per token
    kl_stderr: float
    perplexity: float
    perplexity_stderr: float
    agreement: float  # share of positions with the parent's argmax
    dense_perplexity: float
    kl_arrays: str  # per-token KL beside the record, for paired comparison
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """What a predicted peak is made of; the parts add up to it."""

    weights_bytes: int
    copies_bytes: int  # weights held a second time in another layout
    kv_bytes: int
    compute_bytes: int
    runtime_bytes: int  # tokenizer, graph and tables of the library
    target_bytes: int  # the target's own, such as a CUDA context


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    file_bytes: int
    peak_memory_bytes: int  # with `runtime_bytes`
    runtime_bytes: int = 0  # the target's own part, such as a CUDA context; cannot be measured off the board
    decode_tps: float | None
    decode_tps_low: float | None
    decode_tps_high: float | None
    flags: LaunchFlags | None
    memory: MemoryParts | None = None
    kl: float | None = None  # to the dense parent, nats per token; from the candidates measured so far
    kl_low: float | None = None  # 80% interval
    kl_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    on: str  # which machine
    decode_tps: float | None
    decode_tps_stdev: float | None
    noisy: bool  # the repeats spread by more than 10% at every try: other load on the machine
    prefill_tps: float | None
    first_token_ms: float | None  # at the profile's prompt length
    peak_memory_bytes: int | None
    load_s: float | None
    flags: LaunchFlags | None
    doubts: tuple[str, ...] = ()  # why the speeds may not be the device's own
    joules_per_token: float | None = None  # None: the device has no meter
    meter: str | None = None  # RAPL, tegrastats


@dataclass(frozen=True, slots=True, kw_only=True)
class QualitySummary:
    kl: float
    kl_stderr: float
    perplexity: float
    perplexity_stderr: float
    agreement: float
    tokens: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One (plan, quantization) through its lane."""

    kind: ClassVar[str] = "candidate"
    id: str
    plan: str
    ratio: float
    ratio_all: float
    metric: str | None
    allocator: str | None
    quantization: str
    uniform: bool
    artifact: Artifact | None
    predicted: Predicted
    measured: Measured | None
    quality: QualitySummary | None
    verify: VerifyResult | None
    meets: dict[str, bool]
    error: str | None
    reason: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleText:
    """What a model wrote behind one prompt, always taking the most likely token."""

    prompt: str
    text: str
    tokens: int
    ended: bool  # the model stopped by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """Greedy outputs of one exported file, through the runtime it ships for."""

    kind: ClassVar[str] = "sample_set"
    source: str  # candidate id, or what the file is
    chat: bool  # prompts were put into the model's chat template
    rows: tuple[SampleText, ...]
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedKL:
    """KL of a candidate less that of the selected one, on the same tokens, with its 95% interval."""

    difference: float  # nats per token; above 0: worse than the selected one
    low: float
    high: float
    paired: bool  # token by token; else from the two standard errors

    @property
    def tie(self) -> bool:
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeSpeed:
    """Predicted decode speed of one artifact in a power mode of the target, with its 80% band."""

    mode: str
    current: bool
    decode_tps: float
    decode_tps_low: float
    decode_tps_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    kind: ClassVar[str] = "selection"
    selected: str | None
    ties: tuple[str, ...]
    headline: str
    nearest: str | None
    missed: tuple[str, ...]
    reasons: dict[str, str]
    key: str


# ---------------------------------------------------------------- JSON


def to_plain(value: Any) -> Any:
    """Turn a record into JSON values; top-level records carry `kind` and `schema`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        kind = getattr(type(value), "kind", None)
        if kind is not None:
            out["kind"] = kind
            out["schema"] = SCHEMA
        for field in dataclasses.fields(value):
            out[field.name] = to_plain(getattr(value, field.name))
        return out
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"records hold finite numbers only, not {value}")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"records hold plain values only, not {type(value).__name__}")


def dumps(value: Any) -> str:
    return json.dumps(to_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def make_key(kind: str, *parts: Any) -> str:
    """Hash of a kind and its parameters; records and containers of plain values are accepted."""
    text = json.dumps([kind, SCHEMA, to_plain(list(parts))], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_plain(cls: type[T], data: Any, *, where: str = "record") -> T:
    """Build a record from JSON values, strictly. Raises ConfigError listing every problem."""
    problems: list[str] = []
    value = _build(cls, data, where, problems)
    if problems:
        raise ConfigError(problems)
    return typing.cast(T, value)


def loads(cls: type[T], text: str, *, where: str = "record") -> T:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    return from_plain(cls, data, where=where)


def _build(kind: Any, data: Any, where: str, problems: list[str]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if data is None and type(None) in options:
            return None
        rest = [o for o in options if o is not type(None)]
        return _build(rest[0], data, where, problems)
    if dataclasses.is_dataclass(kind):
        return _build_record(typing.cast(type, kind), data, where, problems)
    if origin is tuple:
        if not isinstance(data, list):
            problems.append(f"{where}: expected a list")
            return ()
        item = typing.get_args(kind)[0]
        return tuple(_build(item, v, f"{where}[{i}]", problems) for i, v in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            problems.append(f"{where}: expected a table")
            return {}
        item = typing.get_args(kind)[1]
        return {str(k): _build(item, v, f"{where}.{k}", problems) for k, v in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind in (str, int, float, bool):
        if type(data) is not kind:
            problems.append(f"{where}: expected {kind.__name__}, found {data!r:.60}")
            return kind()
        if kind is float and not math.isfinite(data):
            problems.append(f"{where}: expected a finite number")
        return data
    raise TypeError(f"{where}: field type {kind} is not supported")


def _build_record(cls: type, data: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        problems.append(f"{where}: expected a table")
        return None
    data = dict(data)
    kind = getattr(cls, "kind", None)
    if kind is not None:
        if "schema" in data and data.pop("schema") != SCHEMA:
            problems.append(f"{where}: written with another schema; this version reads schema {SCHEMA}")
        if "kind" in data and data.pop("kind") != kind:
            problems.append(f"{where}: not a {kind} record")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name in data:
        if name not in fields:
            problems.append(f"{where}: unknown key '{name}'{suggest(name, fields)}")
    for name, one in fields.items():
        if name in data:
            values[name] = _build(hints[name], data[name], f"{where}.{name}", problems)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            problems.append(f"{where}: missing key '{name}'")
    if problems:
        return None
    return cls(**values)
