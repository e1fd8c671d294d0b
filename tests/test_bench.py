"""llama-bench rows and statistics from raw times worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgeprune import bench
from edgeprune.records import BenchResult, Environment, LaunchFlags, dumps, loads

# what llama-bench prints and other programs read, from its tools/llama-bench/README.md
LLAMA_BENCH_FIELDS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type",
    "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers",
    "flash_attn", "use_mmap", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip


def _result(**changes: object) -> BenchResult:
    values: dict[str, object] = {
        "artifact_sha256": "ab",
        "device": "here",
        "runtime": "llama-cpp",
        "runtime_version": "0.3.36",
        "simulated": False,
        "n_threads": 2,
        "flags": LaunchFlags(context_tokens=2048, ubatch=128, kv_type="q8_0", mmap=False),
        "n_prompt": 100,
        "n_gen": 20,
        "prefill_ns": (1_000_000_000, 500_000_000),
        "decode_ns": (1_000_000_000, 2_000_000_000, 4_000_000_000),
        "load_ns": 1,
        "thread_sweep": {"1": 10.0, "2": 18.0},
        "environment": Environment(
            cpu="Test CPU", n_cpus=2, governor=None, temperature_c=None, load_average=0.0, power_mode=None
        ),
        "key": "k",
        "model_type": "llama 1B Q4_0",
        "model_bytes": 7,
        "model_params": 9,
        "n_batch": 512,
        "build_commit": "0c1e570",
        "test_time": "2025-01-02T03:04:05Z",
        **changes,
    }
    return BenchResult(**values)  # type: ignore[arg-type]


def test_rows_have_llama_bench_fields() -> None:
    rows = bench.to_llama_bench(_result(), model_filename="m.gguf")
    assert len(rows) == 2
    for row in rows:
        assert set(row) >= LLAMA_BENCH_FIELDS
    pp, tg = rows
    assert (pp["n_prompt"], pp["n_gen"], pp["n_depth"]) == (100, 0, 0)
    assert (tg["n_prompt"], tg["n_gen"], tg["n_depth"]) == (0, 20, 100)
    assert (pp["type_k"], pp["type_v"], pp["use_mmap"], pp["flash_attn"]) == ("q8_0", "q8_0", False, 1)
    assert (pp["model_size"], pp["model_n_params"], pp["n_ubatch"], pp["n_batch"]) == (7, 9, 128, 512)
    assert (pp["cpu_info"], pp["model_filename"], pp["backends"]) == ("Test CPU", "m.gguf", "CPU")


def test_row_statistics_by_hand() -> None:
    pp, tg = bench.to_llama_bench(_result(), model_filename="m.gguf")
    # 100 tokens in 1 s and 0.5 s: 100 and 200 tokens/s
    assert pp["samples_ts"] == [100.0, 200.0]
    assert pp["avg_ts"] == 150.0
    assert pp["stddev_ts"] == pytest.approx(70.7106781)
    assert pp["avg_ns"] == 750_000_000
    assert pp["stddev_ns"] == 353_553_391
    # 20 tokens in 1, 2 and 4 s: 20, 10, 5 tokens/s
    assert tg["samples_ts"] == [20.0, 10.0, 5.0]
    assert tg["samples_ns"] == [1_000_000_000, 2_000_000_000, 4_000_000_000]


def test_helper_statistics() -> None:
    ns = (1_000_000_000, 2_000_000_000, 4_000_000_000)
    assert bench.median_tps(20, ns) == 10.0
    assert bench.mean_tps(20, ns) == pytest.approx(35 / 3)
    # deviations from 35/3: 25/3, -5/3, -20/3 -> variance (625+25+400)/9/2
    assert bench.stdev_tps(20, ns) == pytest.approx((1050 / 18) ** 0.5)
    assert bench.stdev_tps(20, ns[:1]) == 0.0


def test_thread_counts_end_with_all() -> None:
    assert bench.thread_counts(1) == (1,)
    assert bench.thread_counts(4) == (1, 2, 3, 4)
    assert bench.thread_counts(13) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13)


def test_result_survives_json_and_older_records_still_read() -> None:
    result = _result()
    assert loads(BenchResult, dumps(result)) == result
    later = ("model_type", "model_bytes", "model_params", "n_batch", "build_commit", "test_time", "doubts")
    later += ("joules_per_token", "meter")
    old = json.loads(dumps(result))
    assert set(later) <= set(old)
    older = {name: value for name, value in old.items() if name not in later}
    assert loads(BenchResult, json.dumps(older)).n_batch == 0


# ---------------------------------------------------------------- doubts

CALM = Environment(
    cpu="Test CPU",
    n_cpus=4,
    governor="performance",
    temperature_c=40.0,
    load_average=0.0,
    power_mode="15W",
    throttled="0x50000",  # it was throttled once, long ago
    throttle_count=7,
    on_battery=False,
    busy_s=1000.0,
)


def doubts(spread: float | None = 0.02, own_s: float = 10.0, **after: object) -> tuple[str, ...]:
    """What is said of 10 seconds in which the measurement took one processor."""
    changed: dict[str, object] = {"busy_s": 1010.0, **after}
    return bench.doubts(
        CALM,
        dataclasses.replace(CALM, **changed),  # type: ignore[arg-type]
        elapsed_s=10.0,
        own_s=own_s,
        spread=spread,
    )


def test_a_quiet_measurement_is_not_doubted() -> None:
    assert doubts() == ()
    # 0.4 of 4 processors: just under the tenth that others may take
    assert doubts(busy_s=1013.9) == () and doubts(spread=0.1) == ()


def test_every_doubt() -> None:
    assert doubts(throttled="0x50004") == ("the processor was throttled",)
    assert doubts(throttle_count=8) == ("the processor was throttled",)
    assert doubts(on_battery=True) == ("on battery",)
    assert doubts(power_mode="MAXN") == ("the power mode changed from 15W to MAXN",)
    assert doubts(governor="powersave") == ("the governor changed from performance to powersave",)
    # 25 s taken in 10 s, 10 of them ours: 1.5 processors of others
    assert doubts(busy_s=1025.0) == ("other programs used 1.5 of 4 processors",)
    assert doubts(spread=0.144) == ("the repeats spread by 14%",)
    assert len(doubts(spread=0.5, on_battery=True, throttled="0x1", busy_s=1090.0, power_mode=None)) == 5


def test_what_a_system_does_not_tell_raises_no_doubt() -> None:
    silent = dataclasses.replace(
        CALM,
        governor=None,
        power_mode=None,
        throttled=None,
        throttle_count=None,
        on_battery=None,
        busy_s=None,
    )
    assert bench.doubts(silent, silent, elapsed_s=10.0, own_s=0.0) == ()
    odd = dataclasses.replace(silent, throttled="unknown")
    assert bench.doubts(odd, odd, elapsed_s=0.0, own_s=0.0) == ()


def test_another_build_is_told_from_the_latest() -> None:
    old = _result(key="old", build_commit="aaa")
    new = [_result(key=f"new{i}", build_commit="bbb", test_time=f"2026-01-0{i}T00:00:00Z") for i in (1, 2)]
    assert bench.other_builds([]) == {} and bench.other_builds(new) == {}
    assert bench.other_builds([old, *new]) == {
        "old": "timed with llama-cpp 0.3.36 (build aaa), others with llama-cpp 0.3.36 (build bbb)"
    }


def test_doubts_travel_with_the_row() -> None:
    found = _result(doubts=("on battery",))
    assert loads(BenchResult, dumps(found)) == found
    assert [row["doubts"] for row in bench.to_llama_bench(found, model_filename="m.gguf")] == [
        ["on battery"]
    ] * 2
    # a record of before has none
    plain = json.loads(dumps(_result()))
    del plain["doubts"], plain["environment"]["on_battery"]
    assert loads(BenchResult, json.dumps(plain)) == _result()
