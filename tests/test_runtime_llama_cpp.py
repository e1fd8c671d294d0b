"""The llama.cpp jobs on tiny random models written here, each in its own process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")

from safetensors.numpy import load_file, save_file  # noqa: E402

from edgeprune import bench, quality  # noqa: E402
from edgeprune.costs.gguf_header import read_header  # noqa: E402
from edgeprune.devices import local  # noqa: E402
from edgeprune.errors import ConfigError, StageError  # noqa: E402
from edgeprune.records import BenchProtocol, LaunchFlags  # noqa: E402
from edgeprune.runtimes import llama_cpp  # noqa: E402

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 96, 64, 4, 2, 16, 96, 2
FLAGS = LaunchFlags(context_tokens=64, ubatch=16, kv_type="f16", mmap=True)
WINDOWS = np.random.default_rng(3).integers(0, VOCAB, (3, 24))


def write_tiny(path: Path, *, seed: int = 0, vocab: int = VOCAB, noise: float = 0.0) -> Path:
    """A random llama in F32; `noise` shifts the weights of a seed."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    for add in (w.add_key_length, w.add_value_length, w.add_rope_dimension_count):
        add(HEAD_DIM)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns)) + noise * other.standard_normal((rows, columns))
        w.add_tensor(name, (values * 0.3).astype(np.float32))

    matrix("token_embd.weight", vocab, HIDDEN)
    w.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        block = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"{block}{norm}.weight", np.ones(HIDDEN, np.float32))
        matrix(block + "attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        matrix(block + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(block + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(block + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        matrix(block + "ffn_gate.weight", FFN, HIDDEN)
        matrix(block + "ffn_up.weight", FFN, HIDDEN)
        matrix(block + "ffn_down.weight", HIDDEN, FFN)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def parent(folder: Path) -> Path:
    return write_tiny(folder / "parent.gguf")


@pytest.fixture(scope="module")
def reference(folder: Path, parent: Path) -> llama_cpp.Reference:
    return llama_cpp.make_reference(parent, WINDOWS, folder / "reference.json", flags=FLAGS)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------- bench and memory


def test_bench_returns_raw_times_of_every_repeat(parent: Path) -> None:
    got = llama_cpp.bench(
        parent, flags=FLAGS, n_prompt=24, n_gen=8, repeats=3, threads=None, sweep=(1, 2), sweep_tokens=8
    )
    assert len(got.prefill_ns) == len(got.decode_ns) == 3
    assert all(isinstance(t, int) and t > 0 for t in got.prefill_ns + got.decode_ns)
    assert set(got.sweep) == {"1", "2"}
    assert str(got.threads) == max(got.sweep, key=lambda n: got.sweep[n])
    assert got.load_ns > 0
    per_layer = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + 3 * HIDDEN * FFN + 2 * HIDDEN
    assert got.model_params == VOCAB * HIDDEN + HIDDEN + LAYERS * per_layer
    assert got.model_bytes == 4 * got.model_params


def test_bench_keeps_the_threads_it_is_given(parent: Path) -> None:
    got = llama_cpp.bench(parent, flags=FLAGS, n_prompt=8, n_gen=4, repeats=1, threads=1)
    assert (got.threads, got.sweep) == (1, {})


def test_bench_refuses_more_tokens_than_the_context_holds(parent: Path) -> None:
    with pytest.raises(StageError, match=r"60 \+ 8 tokens do not fit into a context of 64 tokens"):
        llama_cpp.bench(parent, flags=FLAGS, n_prompt=60, n_gen=8, repeats=1, threads=1)


def test_memory_fills_the_whole_context_and_counts_the_cache(parent: Path) -> None:
    short = llama_cpp.memory(parent, flags=FLAGS)
    assert short.tokens_filled == 64
    assert short.peak_bytes > parent.stat().st_size
    long = llama_cpp.memory(parent, flags=dataclasses.replace(FLAGS, context_tokens=4096, kv_type="f32"))
    assert long.tokens_filled == 4096
    # 2 * 4096 tokens * 2 layers * 2 heads * 16 * 4 bytes = 2.1 MB; tables of cells come on top
    cache = 2 * 4096 * LAYERS * KV_HEADS * HEAD_DIM * 4
    assert cache < long.peak_bytes - short.peak_bytes < cache + 6_000_000


def test_records_of_a_measured_file(parent: Path) -> None:
    protocol = BenchProtocol(prompt_tokens=16, new_tokens=4, repeats=2)
    common = {"sha256": "ab", "flags": FLAGS, "device_name": "here", "key": "k"}
    timed = bench.bench_artifact(parent, protocol=protocol, threads=None, **common)
    assert (timed.device, timed.runtime, timed.artifact_sha256) == ("here", "llama-cpp", "ab")
    assert len(timed.prefill_ns) == len(timed.decode_ns) == 2
    assert str(timed.n_threads) in timed.thread_sweep
    assert timed.environment.n_cpus == local.available_threads()
    pp, tg = bench.to_llama_bench(timed, model_filename=parent.name)
    assert (pp["n_prompt"], tg["n_gen"], pp["model_n_params"]) == (16, 4, timed.model_params)
    assert bench.measure_memory(parent, **common).tokens_filled == 64


# ---------------------------------------------------------------- logits and quality


def test_logits_do_not_depend_on_how_the_file_is_read(folder: Path, parent: Path) -> None:
    read = dataclasses.replace(FLAGS, mmap=False)
    mapped = llama_cpp.logits(parent, WINDOWS, folder / "a.f32", flags=FLAGS)
    assert mapped.shape == (3, 24, VOCAB)
    np.testing.assert_array_equal(mapped, llama_cpp.logits(parent, WINDOWS, folder / "b.f32", flags=read))


def test_logits_do_not_depend_on_the_micro_batch(folder: Path, parent: Path) -> None:
    exact = dataclasses.replace(FLAGS, kv_type="f32")
    whole = llama_cpp.logits(parent, WINDOWS, folder / "c.f32", flags=dataclasses.replace(exact, ubatch=64))
    pieces = llama_cpp.logits(parent, WINDOWS, folder / "d.f32", flags=dataclasses.replace(exact, ubatch=5))
    np.testing.assert_allclose(whole, pieces, atol=2e-4)
    # windows do not see each other
    alone = llama_cpp.logits(
        parent, WINDOWS[2:], folder / "e.f32", flags=dataclasses.replace(exact, ubatch=64)
    )
    np.testing.assert_allclose(whole[2], alone[0], atol=2e-4)


def test_reference_holds_the_parents_distributions(
    folder: Path, parent: Path, reference: llama_cpp.Reference
) -> None:
    full = llama_cpp.logits(parent, WINDOWS, folder / "f.f32", flags=FLAGS)[:, :-1]
    stored = np.fromfile(reference.logits, dtype="<u2").reshape(3, 23, VOCAB) * (-24.0 / 65535)
    expected = np.maximum(full - full.max(axis=-1, keepdims=True), -24.0)
    assert np.abs(stored - expected).max() <= 1.85e-4  # half a step
    log_p = log_softmax(full)
    targets = WINDOWS[:, 1:, None]
    np.testing.assert_allclose(reference.nll, -np.take_along_axis(log_p, targets, -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(reference.argmax, full.argmax(-1))


def test_a_file_agrees_with_itself(folder: Path, parent: Path, reference: llama_cpp.Reference) -> None:
    got = llama_cpp.quality(parent, WINDOWS, reference, folder / "self.safetensors", flags=FLAGS)
    assert got.kl.shape == (3, 23)
    assert np.abs(got.kl).max() < 1e-5
    np.testing.assert_allclose(got.nll, reference.nll, atol=1e-6)
    assert quality.agreement(got.argmax, reference.argmax).value == 1.0


def test_kl_of_another_model_equals_the_full_computation(
    folder: Path, parent: Path, reference: llama_cpp.Reference
) -> None:
    changed = write_tiny(folder / "changed.gguf", noise=0.2)
    got = llama_cpp.quality(changed, WINDOWS, reference, folder / "changed.safetensors", flags=FLAGS)
    log_p = log_softmax(llama_cpp.logits(parent, WINDOWS, folder / "p.f32", flags=FLAGS)[:, :-1])
    log_q = log_softmax(llama_cpp.logits(changed, WINDOWS, folder / "q.f32", flags=FLAGS)[:, :-1])
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert expected.mean() > 0.01
    np.testing.assert_allclose(got.kl, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        got.nll, -np.take_along_axis(log_q, WINDOWS[:, 1:, None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_array_equal(got.argmax, log_q.argmax(-1))
    np.testing.assert_array_equal(load_file(folder / "changed.safetensors")["kl"], got.kl)


def test_quality_refuses_other_tokens_and_other_vocabularies(
    folder: Path, parent: Path, reference: llama_cpp.Reference
) -> None:
    out = folder / "refused.safetensors"
    with pytest.raises(ConfigError, match="made from other tokens"):
        llama_cpp.quality(parent, WINDOWS + 0 * 1 - (WINDOWS > 0), reference, out, flags=FLAGS)
    wider = write_tiny(folder / "wider.gguf", vocab=VOCAB + 32)
    with pytest.raises(StageError, match="a vocabulary of 128 tokens, the parent 96"):
        llama_cpp.quality(wider, WINDOWS, reference, out, flags=FLAGS)
    assert not out.exists()


def test_a_damaged_reference_is_refused(folder: Path, parent: Path) -> None:
    header = folder / "damaged.json"
    whole = llama_cpp.make_reference(parent, WINDOWS[:1], header, flags=FLAGS)
    assert llama_cpp.load_reference(header).vocab == VOCAB
    os.truncate(whole.logits, 100)
    with pytest.raises(ConfigError, match="cut short"):
        llama_cpp.load_reference(header)


# ---------------------------------------------------------------- quantize


def test_quantize_takes_the_override_and_the_importance_matrix(folder: Path, parent: Path) -> None:
    plain, weighted = folder / "plain.gguf", folder / "weighted.gguf"
    overrides = [(r"^blk\.0\.attn_q\.weight$", int(gguf.GGMLQuantizationType.Q8_0))]
    llama_cpp.quantize(parent, plain, ftype=2, overrides=overrides, imatrix=None, threads=1)
    types = {t.name: t.type.name for t in read_header(plain).tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.1.attn_q.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"

    matrix = folder / "imatrix.safetensors"
    heavy = np.full(HIDDEN, 1e-3, np.float32)
    heavy[:4] = 100.0
    save_file({f"blk.{i}.ffn_up.weight": heavy for i in range(LAYERS)}, matrix)
    llama_cpp.quantize(parent, weighted, ftype=2, overrides=overrides, imatrix=matrix, threads=1)
    errors = []
    for path in (plain, weighted):
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        up = tensors["blk.0.ffn_up.weight"]
        source = {t.name: t for t in gguf.GGUFReader(parent).tensors}["blk.0.ffn_up.weight"].data
        errors.append(np.square(gguf.dequantize(up.data, up.tensor_type) - source)[:, :4].mean())
    assert errors[1] < 0.5 * errors[0]  # the columns that matter are kept better


def test_an_importance_matrix_with_holes_is_refused(folder: Path, parent: Path) -> None:
    matrix, out = folder / "holes.safetensors", folder / "holes.gguf"
    save_file({"blk.0.ffn_up.weight": np.array([1.0, np.nan], np.float32)}, matrix)
    with pytest.raises(StageError, match="one finite number per column"):
        llama_cpp.quantize(parent, out, ftype=2, overrides=[], imatrix=matrix, threads=1)
    assert not out.exists()


@pytest.mark.parametrize("ftype", [1, 2, 7], ids=["F16", "Q4_0", "Q8_0"])
def test_widening_changes_no_value(folder: Path, parent: Path, ftype: int) -> None:
    narrow, wide = folder / f"narrow{ftype}.gguf", folder / f"wide{ftype}.gguf"
    llama_cpp.quantize(parent, narrow, ftype=ftype, overrides=[], imatrix=None, threads=1)
    llama_cpp.widen(narrow, wide, threads=1)
    before = {t.name: t for t in gguf.GGUFReader(narrow).tensors}
    after = {t.name: t for t in gguf.GGUFReader(wide).tensors}
    assert before.keys() == after.keys()
    assert {t.tensor_type.name for t in after.values()} == {"F32"}
    assert any(t.tensor_type.name != "F32" for t in before.values())
    for name, tensor in after.items():
        old = before[name]
        assert np.array_equal(tensor.data, gguf.dequantize(old.data, old.tensor_type)), name


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("damage", ["text", "cut header", "cut data", "missing"])
def test_a_bad_file_is_one_clear_line(folder: Path, parent: Path, damage: str) -> None:
    data = parent.read_bytes()
    content = {"text": b"hello" * 100, "cut header": data[:300], "cut data": data[:-4096], "missing": None}[
        damage
    ]
    bad = folder / f"bad-{damage.replace(' ', '-')}.gguf"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(StageError) as caught:
        llama_cpp.memory(bad, flags=FLAGS)
    message = str(caught.value)
    assert bad.name in message
    assert "\n" not in message
    assert "Traceback" not in message
    expected = {
        "text": "invalid magic",
        "cut header": "failed to read",
        "cut data": "corrupted or incomplete",
        "missing": "there is no file",
    }[damage]
    assert expected in message


def test_a_refused_context_says_why(parent: Path) -> None:
    odd = dataclasses.replace(FLAGS, kv_type="q8_0")
    with pytest.raises(StageError, match="block size 32 does not divide n_embd_head_k=16"):
        llama_cpp.memory(parent, flags=odd)
    with pytest.raises(StageError, match="unknown KV cache type 'q9'"):
        llama_cpp.memory(parent, flags=dataclasses.replace(FLAGS, kv_type="q9"))


def test_a_crash_of_the_library_ends_only_the_job(folder: Path, parent: Path) -> None:
    out = folder / "crash.gguf"
    with pytest.raises(StageError, match=r"^llama\.cpp quantize crashed \(SIG[A-Z]+\): [^\n]*$"):
        # a type number that ggml has removed: the library divides by its block size of zero
        llama_cpp.quantize(parent, out, ftype=2, overrides=[(".*", 31)], imatrix=None, threads=1)
    assert not list(folder.glob("*crash.gguf*"))
    assert llama_cpp.memory(parent, flags=FLAGS).tokens_filled == 64


def test_a_fault_of_the_worker_carries_its_last_line() -> None:
    with pytest.raises(StageError, match=r"stopped with exit code 1: .*KeyError: 'no such job'"):
        llama_cpp._run("no such job", {}, timeout_s=30)


def test_a_job_that_takes_too_long_is_stopped(parent: Path) -> None:
    with pytest.raises(StageError, match="did not finish within"):
        llama_cpp.memory(parent, flags=FLAGS, timeout_s=0.01)


def test_a_token_outside_the_vocabulary_is_refused(folder: Path, parent: Path) -> None:
    windows = np.full((1, 4), VOCAB)
    with pytest.raises(StageError, match="token 96 is not in the model's vocabulary of 96"):
        llama_cpp.logits(parent, windows, folder / "outside.f32", flags=FLAGS)


def test_the_runtime_describes_itself() -> None:
    runtime = llama_cpp.RUNTIME
    assert (runtime.name, runtime.formats, runtime.extra) == ("llama-cpp", ("gguf",), "gguf")
    assert runtime.available() is None
    assert runtime.version().count(".") >= 2
