"""The memory model: hand-worked terms, and its prediction against a fresh llama.cpp process."""

from __future__ import annotations

import dataclasses

import pytest

from edgeprune.costs import memory
from edgeprune.errors import ConfigError
from edgeprune.records import LaunchFlags, LayerShape, ModelDims

DIMS = ModelDims(
    family="llama",
    vocab=1000,
    hidden=128,
    head_dim=32,
    max_context=2048,
    tied=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    rms_eps=1e-5,
    layers=(
        LayerShape(n_heads=4, n_kv_heads=2, n_ff=512),
        LayerShape(n_heads=2, n_kv_heads=1, n_ff=256),
        LayerShape(n_heads=0, n_kv_heads=0, n_ff=1024),
    ),
)
FLAGS = LaunchFlags(context_tokens=512, ubatch=64, kv_type="f16", mmap=False)


@pytest.mark.parametrize(
    # 2 * 512 tokens * 3 heads * 32 = 98304 elements
    ("kv_type", "expected"),
    [("f32", 393216), ("f16", 196608), ("q8_0", 104448), ("q4_0", 55296)],
)
def test_kv_cache_sums_over_layers(kv_type: str, expected: int) -> None:
    assert memory.kv_bytes(DIMS, 512, kv_type) == expected


def test_unknown_cache_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'q8_0'"):
        memory.kv_bytes(DIMS, 512, "q8")


def test_compute_buffer_by_hand() -> None:
    # FFN without the last layer: 14*512 + 8*128 = 8192; attention: 4*(128 + 3*128 + 2*64) = 2560
    # mask 2*512 = 1024: 64 * (8192 + 1024)
    assert memory.compute_bytes(DIMS, FLAGS) == 64 * 9216


def test_compute_buffer_without_flash_attention_holds_the_scores() -> None:
    flags = dataclasses.replace(FLAGS, flash_attention=False)
    # attention 2560 + 6*512*4 heads = 14848, now above the FFN
    assert memory.compute_bytes(DIMS, flags) == 64 * (14848 + 1024)


def test_the_micro_batch_never_exceeds_the_context() -> None:
    short = dataclasses.replace(FLAGS, context_tokens=32, ubatch=512)
    assert memory.compute_bytes(DIMS, short) == 32 * (8192 + 64)


def test_repacked_types_follow_the_instruction_set() -> None:
    assert memory.repacked_types(["avx2"]) == {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8}
    assert memory.repacked_types(["NEON"]) == {}
    assert memory.repacked_types(["neon", "dotprod", "fp16"])["Q8_0"] == 4


def test_repacked_copies_matrices_only_and_a_tied_head_twice() -> None:
    def stored(name: str, kind: str, rows: int, size: int) -> memory.StoredTensor:
        return memory.StoredTensor(name=name, type=kind, shape=(rows, 32), bytes=size)

    tensors = [
        stored("token_embd.weight", "Q4_0", 64, 1152),
        stored("blk.0.ffn_up.weight", "Q4_0", 16, 288),
        stored("blk.0.attn_k.weight", "Q4_0", 12, 216),  # 12 rows are no multiple of 8
        stored("blk.0.attn_v.weight", "Q8_0", 16, 544),
        memory.StoredTensor(name="blk.0.attn_norm.weight", type="F32", shape=(32,), bytes=128),
    ]
    tied = memory.repacked(tensors, ["avx2"])
    assert (tied.copied_bytes, tied.tied_bytes) == (1152 + 288, 1152)
    untied = memory.repacked([*tensors, stored("output.weight", "Q4_0", 64, 1152)], ["avx2"])
    assert (untied.copied_bytes, untied.tied_bytes) == (288 + 1152, 0)
    assert memory.repacked(tensors, []) == memory.Repacked(copied_bytes=0, tied_bytes=0)


def test_mmap_pays_for_every_copy_and_reading_only_for_the_tied_head() -> None:
    copies = memory.Repacked(copied_bytes=3_000_000, tied_bytes=1_000_000)

    def peak(flags: LaunchFlags, repacked: memory.Repacked | None) -> int:
        return memory.predict_peak_memory(DIMS, weight_bytes=10_000_000, flags=flags, repacked=repacked)

    mapped = dataclasses.replace(FLAGS, mmap=True)
    assert peak(mapped, copies) - peak(mapped, None) == 3_000_000
    assert peak(FLAGS, copies) - peak(FLAGS, None) == 1_000_000


def test_each_term_counts_once() -> None:
    base = memory.predict_peak_memory(DIMS, weight_bytes=10_000_000, flags=FLAGS)
    assert memory.predict_peak_memory(DIMS, weight_bytes=12_000_000, flags=FLAGS) - base == 2_000_000
    assert (
        memory.predict_peak_memory(DIMS, weight_bytes=10_000_000, flags=FLAGS, overhead_bytes=7) - base == 7
    )
    quarter = dataclasses.replace(FLAGS, kv_type="q4_0")
    smaller = memory.predict_peak_memory(DIMS, weight_bytes=10_000_000, flags=quarter)
    assert base - smaller == 196608 - 55296


def test_the_parts_add_up_to_the_peak() -> None:
    copies = memory.Repacked(copied_bytes=900, tied_bytes=30)
    given = {"weight_bytes": 10_000_000, "flags": FLAGS, "repacked": copies, "overhead_bytes": 7}
    parts = memory.predict_parts(DIMS, **given)
    assert memory.total(parts) == memory.predict_peak_memory(DIMS, **given)
    assert (parts.weights_bytes, parts.target_bytes) == (10_000_000, 7)
    assert parts.copies_bytes == (900 if FLAGS.mmap else 30)
    assert parts.kv_bytes == memory.kv_bytes(DIMS, FLAGS.context_tokens, FLAGS.kv_type)
    assert parts.compute_bytes == memory.compute_bytes(DIMS, FLAGS)
