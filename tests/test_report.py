"""The report: predicted and measured apart, figures with units, noise said out loud."""

from __future__ import annotations

import copy

import pytest

from edgeprune.records import LaunchFlags
from edgeprune.report.build import launch_line
from edgeprune.report.terminal import render_table

FLAGS = {"context_tokens": 512, "ubatch": 64, "kv_type": "q8_0", "mmap": False, "flash_attention": True}
CANDIDATE = {
    "id": "uniform-9.4@Q8_0",
    "ratio": 0.0937,
    "artifact": {"bytes": 134_200_000, "path": "artifacts/x.gguf"},
    "predicted": {
        "file_bytes": 134_200_000,
        "peak_memory_bytes": 189_000_000,
        "decode_tps": 250.0,
        "decode_tps_low": 100.0,
        "decode_tps_high": 400.0,
    },
    "measured": {
        "decode_tps": 150.25,
        "decode_tps_stdev": 3.5,
        "noisy": False,
        "peak_memory_bytes": 191_000_000,
    },
    "quality": {"kl": 0.2781, "kl_stderr": 0.0154, "perplexity": 13.15, "perplexity_stderr": 0.9},
    "meets": {"memory": True},
    "error": None,
}
REPORT = {
    "headline": "Prune 9.4%.",
    "model": {"id": "tiny", "parameters": 134_515_008, "decoder_parameters": 106_202_880},
    "target": {"name": "laptop-cpu", "local": True},
    "profile": {"name": "chat-2k", "workload": {"context_tokens": 2048}},
    "budget": {"memory": {"value": 200e6, "unit": "bytes", "from": "command line"}},
    "candidates": [CANDIDATE],
    "selected": "uniform-9.4@Q8_0",
    "ties": [],
    "evaluation": None,
    "dense_perplexity": None,
    "launch": "llama-server -m artifacts/x.gguf",
}


def row(report: dict) -> list[str]:
    return next(line for line in render_table(report).splitlines() if "@" in line).split()


def test_predicted_and_measured_have_columns_of_their_own() -> None:
    cells = row(REPORT)
    assert cells == [
        ">",
        "uniform-9.4@Q8_0",
        "9.4",
        "134.2",
        "189",
        "191",
        "100-400",
        "150.2±3.5",
        "0.2781±0.0154",
        "13.15±0.90",
        "met",
    ]
    units = next(line for line in render_table(REPORT).splitlines() if "MB pred." in line)
    assert units.split("  ")[0] == "" and "MB meas." in units and "t/s pred." in units


def test_a_noisy_bench_is_marked_and_explained() -> None:
    report = copy.deepcopy(REPORT)
    report["candidates"][0]["measured"]["noisy"] = True
    assert row(report)[7] == "~150.2±3.5"
    assert "~ the repeats spread by more than 10%" in render_table(report)
    assert "~" not in render_table(REPORT)


def test_doubtful_conditions_are_said() -> None:
    report = copy.deepcopy(REPORT)
    report["candidates"][0]["measured"]["doubts"] = ["on battery", "the repeats spread by 20%"]
    assert "uniform-9.4@Q8_0 was timed in doubtful conditions: on battery\n" in render_table(report) + "\n"
    assert "doubtful" not in render_table(REPORT)


def test_a_predicted_size_is_not_shown_among_the_files() -> None:
    report = copy.deepcopy(REPORT)
    report["candidates"][0] |= {"artifact": None, "error": "failed"}
    assert row(report)[3] == "-"


def test_missing_limits_are_named() -> None:
    report = copy.deepcopy(REPORT)
    report["candidates"][0]["meets"] = {"memory": False}
    assert row(report)[-2:] == ["misses", "memory"]


def test_several_missed_limits_make_lines_not_width() -> None:
    report = copy.deepcopy(REPORT)
    report["candidates"][0]["meets"] = {"memory": True, "decode_speed": False, "agreement": False}
    lines = render_table(report).splitlines()
    at = next(i for i, line in enumerate(lines) if "@" in line)
    assert lines[at].endswith("  misses speed,") and lines[at + 1].strip() == "agreement"
    assert max(map(len, lines)) < 125 and "…" not in "".join(lines)


def test_another_device_says_predicted() -> None:
    report = copy.deepcopy(REPORT)
    report["target"] = {"name": "raspberry-pi-5-8gb", "local": False}
    report["candidates"][0]["measured"]["decode_tps"] = None
    report["evaluation"] = {"n_samples": 4, "n_tokens": 64, "origin": "sampled from the model", "seed": 7919}
    text = render_table(report)
    assert "speed on raspberry-pi-5-8gb is predicted" in text
    assert "board's runtime" not in text
    report["candidates"][0]["predicted"]["runtime_bytes"] = 367_000_000
    assert "includes 367 MB for the board's runtime" in render_table(report)
    assert row(report)[7] == "-"


@pytest.mark.parametrize(("mmap", "ending"), [(True, ""), (False, " -lm none")])
def test_launch_line_carries_the_measured_flags(mmap: bool, ending: str) -> None:
    flags = LaunchFlags(context_tokens=512, ubatch=64, kv_type="q8_0", mmap=mmap)
    assert launch_line("a.gguf", flags) == (
        f"llama-server -m a.gguf -c 512 -ub 64 -b 64 -ctk q8_0 -ctv q8_0 -fa on{ending} "
        "-np 1 --cache-ram 0 --ctx-checkpoints 0"
    )
