"""Mixes of tensor types by class: names, bytes and logits of real files, and the verbs that take them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.costs import gguf_types, speed
from edgeprune.errors import ConfigError
from edgeprune.graph import find_family
from edgeprune.records import LayerShape, ModelDims

ROOT = Path(__file__).resolve().parents[1]
LLAMA = find_family("llama")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("Q4_0", "Q4_0"),
        ("Q4_0+embedding=Q8_0+attention=Q5_1", "Q4_0+embedding=Q8_0+attention=Q5_1"),
        ("Q4_0+attention=Q5_1+embedding=Q8_0", "Q4_0+embedding=Q8_0+attention=Q5_1"),
        ("Q4_K_M+ffn=IQ4_XS+attention=Q6_K+embedding=F16", "Q4_K_M+embedding=F16+attention=Q6_K+ffn=IQ4_XS"),
        # not the same as Q4_0, whose first layers get Q4_1 with an importance matrix
        ("Q4_0+ffn=Q4_0", "Q4_0+ffn=Q4_0"),
    ],
)
def test_names(name: str, same: str) -> None:
    assert gguf_types.canonical(name) == gguf_types.canonical(same) == same
    assert gguf_types.parts(name) == gguf_types.parts(same)
    assert gguf_types.is_mix(name) == (name != "Q4_0")


def test_parts() -> None:
    found = gguf_types.parts("Q5_K_M+ffn=Q4_K+embedding=Q8_0")
    assert found == gguf_types.Parts("Q5_K_M", (("embedding", "Q8_0"), ("ffn", "Q4_K")))
    assert found.name == "Q5_K_M+embedding=Q8_0+ffn=Q4_K"
    # the file says what its base would say
    assert gguf_types.check_quantization(found.name) == (17, "Q5_K")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Q4_O+ffn=Q8_0", "unknown GGUF quantization 'Q4_O' in 'Q4_O+ffn=Q8_0' (did you mean 'Q4_1'?)"),
        (
            "Q4_0+embeding=Q8_0",
            "unknown class 'embeding' in 'Q4_0+embeding=Q8_0' (did you mean 'embedding'?)",
        ),
        ("Q4_0+FFN=Q8_0", "unknown class 'FFN' in 'Q4_0+FFN=Q8_0'"),
        ("Q4_0+ffn=q8_0", "unknown type 'q8_0' for ffn in 'Q4_0+ffn=q8_0' (did you mean 'Q8_0'?)"),
        ("Q4_0+ffn=Q4_K_M", "unknown type 'Q4_K_M' for ffn in 'Q4_0+ffn=Q4_K_M' (did you mean 'Q4_K'?)"),
        ("Q4_0+ffn=IQ2_XXS", "unknown type 'IQ2_XXS' for ffn in 'Q4_0+ffn=IQ2_XXS' (did you mean 'IQ4_XS'?)"),
        ("Q4_0+ffn=", "unknown type '' for ffn in 'Q4_0+ffn='"),
        ("Q4_0+ffn", "'ffn' in 'Q4_0+ffn' is not class=TYPE"),
        ("Q4_0+", "'' in 'Q4_0+' is not class=TYPE"),
        ("Q4_0 +ffn=Q8_0", "unknown GGUF quantization 'Q4_0 ' in 'Q4_0 +ffn=Q8_0' (did you mean 'Q4_0'?)"),
        ("+ffn=Q8_0", "unknown GGUF quantization '' in '+ffn=Q8_0'"),
        ("Q4_0+ffn=Q8_0+ffn=Q5_1", "'Q4_0+ffn=Q8_0+ffn=Q5_1' names ffn twice"),
        ("F16+ffn=Q8_0", "F16 is not quantized and takes no types by class, as in 'F16+ffn=Q8_0'"),
        (
            "BF16+embedding=Q8_0",
            "BF16 is not quantized and takes no types by class, as in 'BF16+embedding=Q8_0'",
        ),
    ],
)
def test_bad_names(name: str, line: str) -> None:
    for refuse in (gguf_types.canonical, gguf_types.check_quantization, gguf_types.block_size):
        with pytest.raises(ConfigError) as error:
            refuse(name)
        assert str(error.value) == line
        assert error.value.hint


def test_all_mixes_come_back() -> None:
    """Every base with every choice of types, each as written and backwards."""
    bases = [name for name in gguf_types.QUANTIZATIONS if name not in gguf_types.FLOATS]
    choices = [None, *gguf_types.OVERRIDES]
    n = 0
    for base, *kinds in itertools.product(bases, choices, choices, choices):
        own = [(part, kind) for part, kind in zip(gguf_types.CLASSES, kinds, strict=True) if kind]
        name = gguf_types.Parts(base, tuple(own)).name
        backwards = "+".join([base, *(f"{part}={kind}" for part, kind in reversed(own))])
        assert gguf_types.parts(backwards) == gguf_types.parts(name) == gguf_types.Parts(base, tuple(own))
        # a file name of an artifact holds it
        assert len(name) <= 56 and "/" not in name
        n += 1
    assert n == 13 * 13**3


@given(
    st.lists(st.sampled_from(["Q4_0", "F16", "+", "=", "ffn", "attention", "Q8_0", " ", "x", ""]), max_size=9)
)
def test_any_text_is_a_name_or_one_line(pieces: list[str]) -> None:
    name = "".join(pieces)
    try:
        found = gguf_types.canonical(name)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert gguf_types.canonical(found) == found and sorted(found.split("+")) == sorted(name.split("+"))


def test_every_override_is_a_type_that_some_quantization_makes() -> None:
    made = {kind for _, kind in gguf_types.QUANTIZATIONS.values()}
    assert set(gguf_types.OVERRIDES) == made - {"F32", "BF16"}


def test_block_sizes() -> None:
    # a row must suit the layers' own matrices; what the embedding has does not matter to widths
    assert gguf_types.block_size("Q4_0+embedding=Q6_K") == 32
    assert gguf_types.block_size("Q4_0+attention=Q6_K") == 256
    assert gguf_types.block_size("Q4_K_M+attention=Q8_0") == 256
    assert gguf_types.block_size("Q4_K_M+attention=Q8_0+ffn=Q5_1") == 32


def test_classes_of_tensors() -> None:
    classes = {
        "embedding": ["token_embd.weight", "output.weight"],
        "attention": [f"blk.3.attn_{x}.weight" for x in ("q", "k", "v", "qkv", "output")],
        "ffn": [f"blk.12.ffn_{x}.weight" for x in ("gate", "up", "down")],
    }
    for part, names in classes.items():
        assert {gguf_types.tensor_class(name) for name in names} == {part}
    others = (
        "output_norm.weight",
        "rope_freqs.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_q.bias",
        "output",
    )
    assert {gguf_types.tensor_class(name) for name in others} == {None}


def test_types_by_hand() -> None:
    """Hidden 96, FFN 256 wide: the layers' own exceptions go, rows that do not fill blocks fall back."""
    tensors = [
        ("token_embd.weight", (64, 96)),
        *((f"blk.{i}.attn_v.weight", (96, 96)) for i in range(8)),
        *((f"blk.{i}.ffn_down.weight", (96, 256)) for i in range(8)),
        *((f"blk.{i}.ffn_up.weight", (256, 96)) for i in range(8)),
        ("output_norm.weight", (96,)),
    ]

    def types(name: str) -> dict[str, str]:
        return gguf_types.choose_types(name, tensors, n_layers=8, n_gqa=2, has_imatrix=True)

    plain = types("Q4_0")
    assert [plain[f"blk.{i}.ffn_down.weight"] for i in (0, 1, 7)] == ["Q4_1", "Q4_0", "Q4_0"]
    assert plain["token_embd.weight"] == "Q8_0"
    even = types("Q4_0+ffn=Q4_0")
    assert {even[n] for n, _ in tensors if ".ffn_" in n} == {"Q4_0"}
    assert {n: t for n, t in even.items() if ".ffn_" not in n} == {
        n: t for n, t in plain.items() if ".ffn_" not in n
    }
    mixed = types("Q4_0+embedding=Q5_0+attention=Q6_K+ffn=Q5_K")
    assert mixed["token_embd.weight"] == "Q5_0"
    assert {mixed[f"blk.{i}.attn_v.weight"] for i in range(8)} == {"Q8_0"}
    assert {mixed[f"blk.{i}.ffn_down.weight"] for i in range(8)} == {"Q5_K"}
    assert {mixed[f"blk.{i}.ffn_up.weight"] for i in range(8)} == {"Q5_1"}
    assert mixed["output_norm.weight"] == "F32"


# ---------------------------------------------------------------- speed and time


def test_a_speed_follows_from_the_bytes_of_each_type_only() -> None:
    speed.check_quantization("Q4_0+attention=Q8_0")
    with pytest.raises(ConfigError, match="unknown class 'atention'"):
        speed.check_quantization("Q4_0+atention=Q8_0")
    with pytest.raises(ConfigError, match=r"a file of 'Q4_0\+attention=Q8_0' holds depends on the model"):
        speed.mix_of("Q4_0+attention=Q8_0")
    # every type a mix can name has a rate of its own
    for kind in gguf_types.OVERRIDES:
        assert speed.mix_of(kind) == {kind: 1.0}


def big_dims() -> ModelDims:
    """The shape of SmolLM2-135M."""
    return ModelDims(
        family="llama", vocab=49152, hidden=576, head_dim=64, max_context=8192, tied=True, qkv_bias=False,
        o_bias=False, mlp_bias=False, rms_eps=1e-5,
        layers=(LayerShape(n_heads=9, n_kv_heads=3, n_ff=1536),) * 30,
    )  # fmt: skip


def test_bytes_by_hand_and_fast() -> None:
    from edgeprune.exporters import gguf as exporter

    dims, cost = big_dims(), exporter.FileCost(LLAMA, {}, [])
    norms = (30 * 2 + 1) * 576 * 4
    attention, ffn = 30 * (576 * 576 * 2 + 192 * 576 * 2), 30 * 3 * 576 * 1536
    embedding = 49152 * 576
    found = cost.weight_bytes(dims, "Q4_0+embedding=Q5_0+attention=Q8_0+ffn=Q4_1")
    assert found == embedding // 32 * 22 + attention // 32 * 34 + ffn // 32 * 20 + norms
    # 576 fills no block of 256, 1536 does: gate and up fall back to Q5_0, down is Q4_K
    found = cost.weight_bytes(dims, "Q8_0+ffn=Q4_K")
    assert (
        found == (embedding + attention) // 32 * 34 + ffn // 3 * 2 // 32 * 22 + ffn // 3 // 256 * 144 + norms
    )
    kinds = ("Q8_0", "Q6_K", "Q5_1", "Q4_1", "Q4_0", "IQ4_NL")
    names = [f"Q4_0+embedding={e}+attention={a}+ffn={f}" for e in kinds for a in kinds for f in kinds]
    began = time.process_time()
    sizes = [cost.file_bytes(dims, name) for name in names]
    assert (time.process_time() - began) / len(names) < 0.001  # measured: 0.003 ms
    began = time.process_time()
    rows = [cost.tensors(dims, name) for name in names]
    assert (time.process_time() - began) / len(names) < 0.001  # measured: 0.007 ms
    header = sizes[0] - sum(-(-n // 32) * 32 for *_, n in rows[0])
    assert sizes == [header + sum(-(-n // 32) * 32 for *_, n in found) for found in rows]


def test_one_cost_for_many_plans() -> None:
    """More plans than are kept, twice: what is kept changes no number, and no caller can change it."""
    from edgeprune.exporters import gguf as exporter

    cost = exporter.FileCost(LLAMA, {}, [])
    names = ("Q4_0", "Q4_0+ffn=Q8_0", "Q4_K_M+attention=Q8_0")

    def plan(i: int) -> ModelDims:
        return dataclasses.replace(big_dims(), layers=(LayerShape(n_heads=9, n_kv_heads=3, n_ff=32 * i),) * 2)

    first = [cost.file_bytes(plan(i), name) for i in range(1, 100) for name in names]
    cost.tensors(plan(99), "Q4_0").clear()
    assert first == [cost.file_bytes(plan(i), name) for i in range(1, 100) for name in names]
    assert first[:3] == [exporter.FileCost(LLAMA, {}, []).file_bytes(plan(1), name) for name in names]
    assert len(cost._plans) == 64


# ---------------------------------------------------------------- real files

MIXES = (
    "Q4_0+embedding=Q8_0",
    "Q4_0+attention=Q5_1",
    "Q4_0+ffn=Q4_0",
    "Q4_0+embedding=Q5_0+attention=Q6_K+ffn=IQ4_XS",
    "Q4_K_M+embedding=F16+ffn=Q3_K",
    "Q8_0+attention=Q4_K",
    "IQ4_NL+embedding=Q4_1+ffn=Q5_K",
)
SHAPES: dict[str, tuple[list[tuple[int, int, int]], dict[str, Any]]] = {
    "dense-64": ([(4, 2, 128)] * 8, {"bias": True}),
    "per-layer-64": ([(4, 2, 128), (2, 1, 96), (0, 0, 64), (4, 2, 40), (4, 2, 0)], {"tied": True}),
    "short-64": ([(4, 2, 128)] * 2, {}),
    "dense-256": ([(4, 2, 512)] * 3, {"hidden": 256, "tied": True}),
    "per-layer-256": ([(4, 2, 512), (2, 1, 256), (4, 2, 288), (4, 2, 0)], {"hidden": 256}),
}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 96, 100)]


def made(
    layers: list[tuple[int, int, int]], **over: Any
) -> tuple[Any, dict[str, Any], ModelDims, Callable[[str], np.ndarray], dict[str, np.ndarray]]:
    """(torch model, config, sizes, reader, importance matrix) of a random model."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    from builders import uneven_model

    from edgeprune import graph
    from edgeprune.exporters import gguf as exporter

    model, config = uneven_model(layers, **over)
    dims = graph.build(config).dims
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    rng = np.random.default_rng(0)
    stats = {"head_in": rng.random(dims.hidden, np.float32)}
    for index, shape in enumerate(dims.layers):
        widths = {"attn_in": dims.hidden, "ffn_in": dims.hidden, "down_in": shape.n_ff}
        widths["o_in"] = shape.n_heads * dims.head_dim
        stats |= {f"layers.{index}.{k}": rng.random(n, np.float32) for k, n in widths.items()}
    return model, config, dims, state.__getitem__, exporter.imatrix_names(LLAMA, dims, stats)


@pytest.mark.parametrize("name", SHAPES)
def test_predicted_bytes_and_types_are_real(tmp_path: Path, name: str) -> None:
    """`export` reads each file back: types and metadata as planned. Half with an importance matrix."""
    layers, over = SHAPES[name]
    _, config, dims, read, imatrix = made(layers, **over)
    from edgeprune.costs.gguf_header import read_header
    from edgeprune.exporters import gguf as exporter

    master = tmp_path / "master.gguf"
    exporter.write(master, LLAMA, dims, config, [], read)
    for index, quantization in enumerate(MIXES):
        importance = imatrix if (index + len(layers)) % 2 else None
        cost = exporter.FileCost(LLAMA, config, [], has_imatrix=importance is not None)
        out = tmp_path / f"{quantization}.gguf"
        n = exporter.export(
            out, family=LLAMA, dims=dims, config=config, tokenizer_kvs=[], read_tensor=read,
            quantization=quantization, imatrix=importance, master=master,
        )  # fmt: skip
        assert n == out.stat().st_size == cost.file_bytes(dims, quantization), quantization
        header = read_header(out)
        assert cost.weight_bytes(dims, quantization) == sum(t.n_bytes for t in header.tensors)
        base = gguf_types.parts(quantization).base
        assert header.values()["general.file_type"] == gguf_types.QUANTIZATIONS[base][0]
        for tensor in header.tensors:
            own = dict(gguf_types.parts(quantization).overrides)
            part = gguf_types.tensor_class(tensor.name)
            if part in own:
                assert tensor.type.name == gguf_types.fit(own[part], tensor.dims[0]), tensor.name


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3 untied", "gemma3", "smollm3", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family_has_a_class(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    import builders

    from edgeprune import checkpoint
    from edgeprune.costs.gguf_header import read_header
    from edgeprune.exporters import gguf as exporter

    assert set(FAMILIES) == set(builders.FAMILIES)
    source, whole = builders.opened(builders.tiny_family(tmp_path / "m", family))
    own = {"embedding": "Q8_0", "attention": "Q5_1", "ffn": "IQ4_NL"}
    name = "+".join(["Q4_0", *(f"{part}={kind}" for part, kind in own.items())])
    found = find_family(whole.dims.family)
    out = tmp_path / "m.gguf"
    n = exporter.export(
        out, family=found, dims=whole.dims, config=source.config, tokenizer_kvs=[], quantization=name,
        read_tensor=lambda tensor: checkpoint.to_float32(source.tensor(tensor)),
    )  # fmt: skip
    assert n == exporter.FileCost(found, source.config, [], has_imatrix=False).file_bytes(whole.dims, name)
    seen: dict[str | None, set[str]] = {}
    for tensor in read_header(out).tensors:
        if gguf_types.may_quantize(tensor.name, tensor.shape):
            seen.setdefault(gguf_types.tensor_class(tensor.name), set()).add(tensor.type.name)
    assert seen == {part: {kind} for part, kind in own.items()}


def distance(path: Path, expected: np.ndarray) -> float:
    """Standard deviation of the logits' error in that of the logits."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    model.eval(TOKENS)
    found = np.array(model.scores[: len(TOKENS)])
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


@pytest.mark.parametrize("name", ["short-64", "per-layer-256"])
def test_logits_lie_between_those_of_the_pure_types(tmp_path: Path, name: str) -> None:
    """More bits for a class bring the file nearer to torch; all three classes at once are the pure type."""
    layers, over = SHAPES[name]
    model, config, dims, read, imatrix = made(layers, **over)
    from builders import logits

    from edgeprune.exporters import gguf as exporter

    expected = logits(model, TOKENS)
    master = tmp_path / "master.gguf"
    exporter.write(master, LLAMA, dims, config, [], read)

    def error(quantization: str) -> float:
        out = tmp_path / "out.gguf"
        exporter.export(
            out, family=LLAMA, dims=dims, config=config, tokenizer_kvs=[], read_tensor=read,
            quantization=quantization, imatrix=imatrix, master=master,
        )  # fmt: skip
        return distance(out, expected)

    low, high = error("Q8_0"), error("Q4_0+embedding=Q4_0")
    assert 0.01 < low < 0.1 and 5 * low < high < 0.8
    for part in ("attention", "ffn"):
        assert low < error(f"Q4_0+embedding=Q4_0+{part}=Q8_0") < high, part
        assert low < error(f"Q8_0+{part}=Q4_0") < high, part
    assert error("Q4_0+embedding=Q8_0+attention=Q8_0+ffn=Q8_0") == pytest.approx(low, rel=1e-6)


# ---------------------------------------------------------------- the verbs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`, the profile `seconds.toml` and a text."""
    pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    from builders import tiny_model_with_tokenizer
    from candidates import small_profile

    folder = tmp_path_factory.mktemp("mixes")
    tiny_model_with_tokenizer(folder / "tiny", hidden=64, heads=4, kv_heads=2, ff=256, layers=2)
    (folder / "seconds.toml").write_text(small_profile(quantizations=["Q4_0+ffn=Q5_1+embedding=Q5_0"]))
    lines = [f"The lazy dog number {i} jumps over fox {7 * i % 31} again and again." for i in range(80)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def test_export_and_predict(run_cli: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    asked, name = "Q4_0+attention=Q5_1+embedding=Q8_0", "Q4_0+embedding=Q8_0+attention=Q5_1"
    ran = run_cli(
        *("export", place / "tiny", "--quantization", asked, "--out", out),
        *("--imatrix-calibration", place / "text.txt"),
    )
    assert ran.code == 0, ran.err
    lines = dict(line.split(None, 1) for line in ran.out.splitlines() if not line.startswith("written"))
    assert lines["quantization"] == f"{name} with importance matrix"
    assert lines["predicted"] == lines["real"] == f"{out.stat().st_size:,} bytes"
    target = ("predict", "--target", "raspberry-pi-5-8gb", "--format", "json")
    by_folder = json.loads(run_cli(*target, "--model", place / "tiny", "--quantization", asked).out)
    by_file = json.loads(run_cli(*target, "--artifact", out).out)
    for field in ("read_bytes", "kv_bytes", "decode_tps", "prefill_tps"):
        assert by_folder[field] == by_file[field], field
    slower = json.loads(run_cli(*target, "--model", place / "tiny", "--quantization", "Q4_0+ffn=F16").out)
    assert slower["read_bytes"] > 1.5 * by_file["read_bytes"]
    assert slower["decode_tps"]["value"] < by_file["decode_tps"]["value"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("export", "{}", "--quantization", "Q4_0+ffn=Q8"), "unknown type 'Q8' for ffn in 'Q4_0+ffn=Q8'"),
        (
            ("export", "{}", "--quantization", "Q4_0+ffn=Q8_0", "--format", "onnx"),
            "unknown ONNX quantization 'Q4_0+ffn=Q8_0'",
        ),
        (
            *(("predict", "--target", "laptop-cpu", "--read-bytes", "5", "--layers", "1", "--kv-dim", "1"),),
            "how many bytes of each type a file of 'Q4_0+ffn=Q8_0' holds depends on the model",
        ),
        (
            ("--model", "{}", "--target", "laptop-cpu", "--recovery", "group"),
            "recovery method 'group' tunes one type, and Q4_0+ffn=Q8_0 is a mix",
        ),
        (
            ("--model", "{}", "--target", "laptop-cpu", "--quantization", "Q4_0+fnn=Q8_0"),
            "unknown class 'fnn' in 'Q4_0+fnn=Q8_0' (did you mean 'ffn'?)",
        ),
    ],
)
def test_what_is_refused(
    run_cli: Callable[..., Any], place: Path, tmp_path: Path, args: tuple[str, ...], line: str
) -> None:
    given = [a.format(place / "tiny") for a in args]
    if "--quantization" not in given:
        given += ["--quantization", "Q4_0+ffn=Q8_0"]
    if given[0] != "predict":
        given += ["--out", str(tmp_path / "out.gguf" if given[0] == "export" else tmp_path / "run")]
    ran = run_cli(*given)
    assert ran.code == 2, ran.err
    assert ran.err.splitlines()[0] == f"Error: {line}" or ran.err.startswith(f"Error: {line} (did you mean")
    assert not (tmp_path / "out.gguf").exists()


def test_plan_for_a_mix(run_cli: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    ran = run_cli(
        *("score", place / "tiny", "--metric", "magnitude", "--calibration", place / "text.txt"),
        *("--out", scores),
    )
    assert ran.code == 0, ran.err
    base = ("plan", place / "tiny", "--scores", scores, "--ratio", "0.3", "--out", plan)
    ran = run_cli(*base, "--quantization", "Q4_0+ffn=Q8_0+embedding=Q4_K")
    assert ran.code == 0, ran.err
    widths = {layer["n_ff"] for layer in json.loads(plan.read_text())["dims"]["layers"]}
    assert all(width % 32 == 0 for width in widths) and max(widths) < 256


def test_the_main_job(run_cli: Callable[..., Any], place: Path) -> None:
    """A mix in the profile, and two by hand of which one is named twice."""
    out = place / "run"
    base = ("--model", place / "tiny", "--target", "laptop-cpu", "--profile", place / "seconds.toml")
    base += ("--out", out, "--threads", "1", "--budget", "100MB")
    ran = run_cli(*base)
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    name = "Q4_0+embedding=Q5_0+ffn=Q5_1"
    assert {c["quantization"] for c in report["candidates"]} == {name}
    assert report["selected"].endswith(f"@{name}")
    (dense,) = (c for c in report["candidates"] if c["plan"] == "dense")
    assert dense["artifact"]["path"].endswith(f"-{name}.gguf")
    assert (
        dense["artifact"]["bytes"]
        == dense["predicted"]["file_bytes"]
        == (out / dense["artifact"]["path"]).stat().st_size
    )
    assert dense["quality"]["kl"] > 0 and dense["measured"]["decode_tps"] > 0
    page = (out / "report.html").read_text()
    # a narrow screen may break the name before each type
    assert "Q4_0<wbr>+embedding=Q5_0<wbr>+ffn=Q5_1</span>" in page
    bundle = json.loads((out / "bundle" / "manifest.json").read_text())
    assert bundle["model"]["quantization"] == name
    assert name in (out / "bundle" / "README.md").read_text()

    other = (
        "--quantization",
        "Q4_0+ffn=Q8_0+attention=Q8_0",
        "--quantization",
        "Q4_0+attention=Q8_0+ffn=Q8_0",
    )
    ran = run_cli(*base, *other, "--quantization", "Q8_0", "--max-candidates", "2")
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert {c["quantization"] for c in report["candidates"]} == {"Q4_0+attention=Q8_0+ffn=Q8_0", "Q8_0"}


def test_long_names_fit_a_phone(run_cli: Callable[..., Any], place: Path) -> None:
    import chromium

    browser = chromium.find()
    if browser is None:
        pytest.skip("no Chromium: install it (Debian: apt install chromium), or set CHROMIUM to its path")
    name = "Q4_K_M+embedding=IQ4_NL+attention=IQ4_NL+ffn=IQ4_XS"
    ran = run_cli(
        *("--model", place / "tiny", "--target", "laptop-cpu", "--profile", place / "seconds.toml"),
        *("--out", place / "long", "--threads", "1", "--budget", "100MB", "--quantization", name),
    )
    assert ran.code == 0, ran.err
    with chromium.open_page(browser) as tab:
        tab.look(390)
        tab.open(place / "long" / "report.html")
        tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.problems == []
        assert tab.run("document.documentElement.scrollWidth") == 390
        wider = (
            "[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length"
            " && !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.tagName + ' ' + e.textContent)"
        )
        assert tab.run(wider) == []
        # the column of names leaves room for a figure beside it
        widths = "[...document.querySelectorAll('tbody th')].map(e => e.getBoundingClientRect().width)"
        assert 60 < max(tab.run(widths)) < 260


# ---------------------------------------------------------------- errors of the types


def test_more_bits_lose_less() -> None:
    error = gguf_types.relative_error
    for family in (
        ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32"),
        ("Q4_0", "Q5_0", "Q8_0"),
        ("Q4_1", "Q5_1", "Q8_0"),
        ("IQ3_S", "IQ4_XS", "IQ4_NL"),
    ):
        values = [error(kind) for kind in family]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values), family
    assert error("F32") == 0.0
    # a bit more is a quarter of the squared error, if the blocks stay as they are
    assert error("Q4_0") / error("Q5_0") == pytest.approx(4, rel=0.15)
    assert error("Q4_1") / error("Q5_1") == pytest.approx(4, rel=0.15)
    assert set(gguf_types.OVERRIDES) <= set(gguf_types.RELATIVE_ERRORS)
    with pytest.raises(ConfigError, match=r"no error is known for type 'Q4_K_M' \(did you mean 'Q4_K'"):
        error("Q4_K_M")


def test_errors_are_those_of_real_files(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    script = pytest.importorskip(
        "type_errors", reason="the benchmarks are not part of the source distribution"
    )
    kinds = ("Q4_0", "Q6_K", "IQ4_XS")
    found = script.errors(tmp_path, kinds, size=256, seed=11, spread=0.02)
    for kind in kinds:
        assert found[kind] == pytest.approx(gguf_types.relative_error(kind), rel=0.1), kind


def test_the_constants_are_those_of_the_script() -> None:
    results = ROOT / "benchmarks" / "results" / "type_errors.json"
    if not results.is_file():
        pytest.skip("the benchmarks are not part of the source distribution")
    rows = {row["type"]: row["error"] for row in json.loads(results.read_text())["rows"]["types"]}
    for kind, value in rows.items():
        assert gguf_types.relative_error(kind) == pytest.approx(value, rel=0.005), kind
