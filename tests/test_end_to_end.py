"""The main job on a tiny model: what it writes, what it chooses, and what rough treatment does to it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer
from candidates import small_profile
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]

PROFILE = small_profile(
    bench=(32, 8, 5),
    quantizations=["F16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL"],
    ratios=[0.1, 0.25, 0.5],
    max_measured=8,
)
# per layer: q and o of 128 x 128, k and v of 64 x 128; gate, up, down of 1024 x 128; two norms
DECODER = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 1024 * 128 + 2 * 128)
TOTAL = DECODER + 2 * 300 * 128 + 128


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny`, the profile `seconds.toml` and a text."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model_with_tokenizer(folder / "tiny", hidden=128, heads=4, kv_heads=2, ff=1024, layers=4)
    (folder / "seconds.toml").write_text(PROFILE)
    lines = [f"The lazy dog number {i} jumps over fox {7 * i % 31} again and again." for i in range(80)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def command(place: Path, out: Path, *more: str | Path, **over: str | Path) -> list[str]:
    given: dict[str, str | Path] = {
        "target": "laptop-cpu",
        "budget": "100MB",
        "model": place / "tiny",
        "profile": place / "seconds.toml",
        "out": out,
        "threads": "1",
        "format": "json",
    }
    given.update({k.replace("_", "-"): v for k, v in over.items()})
    return [*(str(x) for k, v in given.items() for x in (f"--{k}", v)), *map(str, more)]


def start(args: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def events(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def finished(folder: Path) -> int:
    return sum(e["event"] == "done" for e in events(folder))


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def by_id(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in report["candidates"] if c["id"] == name)


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in report["candidates"] if c["measured"]]


@pytest.fixture(scope="module")
def calm(place: Path) -> Path:
    """The run folder of an undisturbed run."""
    done = start(command(place, place / "calm"))
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert json.loads(out) == report_of(place / "calm")
    assert "Traceback" not in err and "Warning" not in err
    return place / "calm"


# ---------------------------------------------------------------- the search


def test_time_ends_the_search_and_more_time_goes_on(place: Path, calm: Path) -> None:
    def run(*more: str) -> dict[str, Any]:
        done = start(command(place, place / "timed", *more))
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    short = run("--minutes", "0.0001")
    assert len(measured(short)) == 1
    assert short["search"]["stopped"] == "the time for measuring is over"
    again = run("--minutes", "0.0001")
    assert again["candidates"] == short["candidates"] and again["selected"] == short["selected"]
    whole = run()
    assert [c["id"] for c in measured(whole)] == [c["id"] for c in measured(report_of(calm))]
    assert whole["search"]["rounds"] == report_of(calm)["search"]["rounds"]
    assert whole["selected"] == report_of(calm)["selected"]


def test_what_is_expected_of_candidates(calm: Path) -> None:
    report = report_of(calm)
    found = report["search"]
    assert found["measured"] == len(measured(report)) == 6
    assert [r["proposed"] for r in found["rounds"]] == [
        [f"dense@{q}" for q in ("F16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL")],
        ["uniform-11.1@Q8_0"],
    ]
    assert found["rounds"][1]["why"].startswith("shows what pruning costs: KL ")
    guessed = by_id(report, "uniform-11.1@Q8_0")["predicted"]
    assert 0 < guessed["kl_low"] < guessed["kl"] < guessed["kl_high"]
    assert by_id(report, "dense@F16")["predicted"]["kl"] is None  # the first round is not predicted
    terms = found["model"]["terms"]
    assert set(terms) == {
        *("embedding", "attention", "ffn", "cache", "activations"),
        *("cut uniform", "cut uniform squared"),
    }
    assert all(t["value"] >= 0 and t["stderr"] > 0 and t["unit"] == "nats/token" for t in terms.values())


# ---------------------------------------------------------------- one whole run


def test_every_field_of_the_report(calm: Path) -> None:
    report = report_of(calm)
    assert (report["kind"], report["schema"]) == ("report", 1)
    assert report["command"][:3] == ["edgeprune", "--target", "laptop-cpu"]
    assert {"edgeprune", "python", "torch", "transformers", "gguf", "llama-cpp-python"} <= set(
        report["versions"]
    )
    model = report["model"]
    assert (model["id"], model["family"]) == ("tiny", "llama")
    assert (model["parameters"], model["decoder_parameters"]) == (TOTAL, DECODER)
    assert report["budget"]["memory"] == {"value": 1e8, "unit": "bytes", "from": "command line"}
    assert report["target"]["name"] == "laptop-cpu" and report["profile"]["name"] == "seconds"
    for c in report["candidates"]:
        assert {"id", "ratio", "ratio_all", "metric", "quantization", "uniform", "artifact", "error"} <= set(
            c
        )
        assert {"file_bytes", "peak_memory_bytes", "decode_tps", "decode_tps_low", "decode_tps_high"} <= set(
            c["predicted"]
        )
        assert c["reason"] and c["error"] is None
        assert all(type(ok) is bool for ok in c["meets"].values())
        if c["measured"]:
            assert {"decode_tps", "decode_tps_stdev", "prefill_tps", "peak_memory_bytes", "load_s"} <= set(
                c["measured"]
            )
            assert {"kl", "kl_stderr", "perplexity", "tokens"} <= set(c["quality"])
            assert c["quality"]["tokens"] == 4 * 63
            assert set(c["artifact"]) >= {"path", "format", "bytes", "sha256"}
            assert "memory" in c["meets"]


def test_files_are_what_was_predicted(calm: Path) -> None:
    report = report_of(calm)
    found = measured(report)
    dense = [f"dense@{q}" for q in ("F16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL")]
    assert [c["id"] for c in found] == [*dense, "uniform-11.1@Q8_0"]
    for c in found:
        path = calm / c["artifact"]["path"]
        assert not Path(c["artifact"]["path"]).is_absolute()
        data = path.read_bytes()
        assert c["predicted"]["file_bytes"] == len(data) == c["artifact"]["bytes"]
        assert hashlib.sha256(data).hexdigest() == c["artifact"]["sha256"]
        verify = c["verify"]
        assert verify["passed"] and verify["tokens"] == 64
        if c["quantization"] == "F16":
            assert verify["same_argmax"] + verify["explained_argmax"] == 64 and verify["kl"] <= 1e-3
    on_disk = {p.name for p in (calm / "artifacts").glob("*.gguf")}
    assert on_disk == {Path(c["artifact"]["path"]).name for c in found}  # no master is left over
    assert {c["quantization"] for c in found} == {"F16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL"}
    assert {c["ratio"] for c in found} > {0.0}


def test_measured_is_not_predicted(calm: Path) -> None:
    report = report_of(calm)
    for c in measured(report):
        p, m = c["predicted"], c["measured"]
        assert m["peak_memory_bytes"] != p["peak_memory_bytes"]
        assert m["decode_tps"] != p["decode_tps"]
        assert p["decode_tps_low"] < p["decode_tps"] < p["decode_tps_high"]
        assert m["decode_tps"] > 0 and m["prefill_tps"] > 0 and m["decode_tps_stdev"] >= 0 and m["load_s"] > 0
    chosen = by_id(report, report["selected"])
    # nothing equals the parent but the parent's own F16 file
    assert chosen["id"] == "dense@F16" and abs(chosen["quality"]["kl"]) < 1e-4
    assert chosen["measured"]["peak_memory_bytes"] <= report["budget"]["memory"]["value"]
    assert f"-m {chosen['artifact']['path']} " in report["launch"]
    kl = {c["id"]: c["quality"]["kl"] for c in measured(report)}
    assert kl["dense@Q8_0"] < kl["dense@Q5_0"] < kl["dense@Q4_0"]


def test_the_same_again_does_nothing(run_cli: Callable[..., Any], place: Path, calm: Path) -> None:
    before, was = report_of(calm), len(events(calm))
    files = {p: p.stat().st_mtime_ns for p in calm.rglob("*.gguf")}
    ran = run_cli(*command(place, calm))
    assert ran.code == 0
    assert [e["stage"] for e in events(calm)[was:] if e["event"] != "skip"] == []
    after = json.loads(ran.out)
    assert {k: v for k, v in after.items() if v != before[k]} == {}
    assert files == {p: p.stat().st_mtime_ns for p in calm.rglob("*.gguf")}


def test_another_budget_in_the_same_folder_measures_only_what_is_new(
    run_cli: Callable[..., Any], place: Path, calm: Path
) -> None:
    """A budget between two candidates takes the one below it; scores and most files are there already."""
    report = report_of(calm)
    peaks = {c["id"]: c["measured"]["peak_memory_bytes"] for c in measured(report)}
    predicted = {c["id"]: c["predicted"]["peak_memory_bytes"] for c in measured(report)}
    limit = max(round(predicted["dense@Q8_0"] / 0.97) + 50_000, peaks["dense@Q8_0"])
    assert limit < predicted["dense@F16"] / 0.97 and limit < peaks["dense@F16"]
    shutil.copytree(calm, place / "tighter")
    ran = run_cli(*command(place, place / "tighter", budget=f"{limit}B"))
    assert ran.code == 0
    tighter = json.loads(ran.out)
    chosen = by_id(tighter, tighter["selected"])
    assert chosen["quantization"] != "F16" or chosen["ratio"] > 0
    assert chosen["measured"]["peak_memory_bytes"] <= limit
    assert by_id(tighter, "dense@F16")["id"] != tighter["selected"]
    assert "memory" in by_id(tighter, "dense@F16")["reason"]
    begun = {e["stage"] for e in events(place / "tighter")[len(events(calm)) :] if e["event"] == "start"}
    assert not begun & {"tokens", "calibrate", "score", "reference", "export dense Q8_0"}


def test_nothing_meets_the_budget(run_cli: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    ran = run_cli(*command(place, tmp_path / "run", budget="1MB"))
    assert ran.code == 3
    report = report_of(tmp_path / "run")
    assert report["selected"] is None and report["launch"] is None
    lines = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"Error: Nothing fits the budget. Nearest: {report['nearest']}; missed memory: "
    )
    assert "over 1.00 MB" in lines[0]
    assert report["missed"] and report["missed"][0] in lines[0]
    assert by_id(report, report["nearest"])["predicted"]["peak_memory_bytes"] == min(
        c["predicted"]["peak_memory_bytes"] for c in report["candidates"]
    )


# ---------------------------------------------------------------- targets, parents, limits, texts


def test_a_board_that_is_not_here(run_cli: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    args = command(place, tmp_path / "run", target="jetson-orin", budget="3GB", max_candidates="2")
    ran = run_cli(*args)
    assert ran.code == 0
    report = json.loads(ran.out)
    assert (
        report["target"]["name"].startswith("jetson-orin-") and "took jetson-orin-" in report["target_choice"]
    )
    assert len(measured(report)) == 2
    for c in measured(report):
        assert c["measured"]["decode_tps"] is None and c["measured"]["prefill_tps"] is None
        assert c["measured"]["peak_memory_bytes"] > 1e6
        assert (
            c["predicted"]["decode_tps_low"]
            < c["predicted"]["decode_tps"]
            < c["predicted"]["decode_tps_high"]
        )
        assert "not the target" in c["measured"]["on"]
    modes = {m["mode"]: m for m in report["power_modes"]}
    assert set(modes) == {m["name"] for m in report["target"]["power_modes"]}
    now = report["target"]["default_mode"]
    assert [name for name, m in modes.items() if m["current"]] == [now]
    chosen = by_id(report, report["selected"])["predicted"]
    assert modes[now]["decode_tps"] == pytest.approx(chosen["decode_tps"])
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000
    table = run_cli(*args, "--format", "table").out
    assert f"speed on {report['target']['name']} is predicted" in table
    assert "memory was measured on this machine" in table
    row = next(line for line in table.splitlines() if " dense@F16 " in f" {line} " and "±" in line)
    assert row.count("±") == 2  # KL and perplexity; no measured speed


def test_a_gguf_parent_is_a_candidate_as_given(
    run_cli: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.gguf"
    assert run_cli("export", place / "tiny", "--quantization", "Q8_0", "--out", own, "--no-verify").code == 0
    ran = run_cli(*command(place, tmp_path / "run", model=own, max_candidates="3"))
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    given = by_id(report, "dense@Q8_0 as given")
    assert (tmp_path / "run" / given["artifact"]["path"]).read_bytes() == own.read_bytes()
    assert given["predicted"]["file_bytes"] == given["artifact"]["bytes"] == own.stat().st_size
    assert given["measured"] and given["verify"]["passed"] and given["quality"]["kl"] < 0.01
    assert given["ratio"] == 0.0 and len(measured(report)) == 3
    assert report["model"]["id"] == "own"
    assert own.is_file()


def test_shards_give_the_same_files(
    run_cli: Callable[..., Any], place: Path, calm: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(place / "tiny", tmp_path / "tiny"))
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({n: arrays[n] for n in held}, folder / file)
    weight_map = {n: file for file, held in parts.items() for n in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ran = run_cli(*command(place, tmp_path / "run", model=folder, max_candidates="1"))
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    (only,) = measured(report)
    assert only["artifact"]["sha256"] == by_id(report_of(calm), only["id"])["artifact"]["sha256"]


def test_limits_on_file_speed_and_quality(
    run_cli: Callable[..., Any], place: Path, calm: Path, tmp_path: Path
) -> None:
    size = {c["quantization"]: c["artifact"]["bytes"] for c in measured(report_of(calm)) if c["ratio"] == 0}
    shutil.copytree(calm, tmp_path / "run")
    limit = size["Q5_0"] + 1000
    ran = run_cli(
        *command(place, tmp_path / "run", "--max-file", f"{limit}B", "--max-kl", "9", "--min-tps", "1")
    )
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert {k: v["value"] for k, v in report["budget"].items()} == {
        "memory": 1e8,
        "file": limit,
        "decode_speed": 1.0,
        "kl": 9.0,
    }
    chosen = by_id(report, report["selected"])
    assert chosen["artifact"]["bytes"] <= limit
    assert chosen["meets"] == {"memory": True, "file": True, "decode_speed": True, "kl": True}
    for c in measured(report):
        assert c["meets"]["file"] == (c["artifact"]["bytes"] <= limit)
    assert not by_id(report, "dense@F16")["measured"]

    ran = run_cli(*command(place, tmp_path / "run", "--min-tps", "1e9"))
    assert ran.code == 3
    assert "missed decode speed: " in ran.err and "limit 1e+09 tokens/s" in ran.err
    assert report_of(tmp_path / "run")["selected"] is None

    few = ("--quantization", "Q4_0", "--quantization", "Q4_0", "--max-candidates", "1")
    ran = run_cli(*command(place, tmp_path / "run", *few, "--max-kl", "0.000001"))
    assert ran.code == 3
    assert "Nearest: dense@Q4_0; missed quality: KL " in ran.err
    assert [c["id"] for c in report_of(tmp_path / "run")["candidates"]].count("dense@Q4_0") == 1


def test_given_texts_are_used(run_cli: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    text = place / "text.txt"
    other = tmp_path / "other.jsonl"
    lines = [
        json.dumps({"text": f"Over the brown fox {i} jumps the dog {i * i}, quickly."}) for i in range(90)
    ]
    other.write_text("\n".join(lines))
    args = command(place, tmp_path / "run", calibration=text, eval_text=other, max_candidates="1")
    ran = run_cli(*args, "--calibration-seeds", "2")
    assert ran.code == 0, ran.err
    assert "sample" not in ran.err
    report = json.loads(ran.out)
    assert report["calibration"]["origin"] == str(text)
    scores = report["scores"]
    assert (scores["metric"], scores["seeds"]) == ("llm-bip", [0, 1])
    stability = {row["unit"]: row for row in scores["rank_stability"]}
    assert stability["ffn"]["axes"] == 4 and 0 < stability["ffn"]["minimum"] <= stability["ffn"]["mean"] < 1
    assert report["evaluation"]["origin"] == str(other)
    assert measured(report)[0]["quality"]["text"] == str(other)
    from edgeprune import tokenizer
    from edgeprune.data import read_text

    windows = load_file(tmp_path / "run" / report["evaluation"]["path"])["tokens"]
    ids = tokenizer.encode(place / "tiny", read_text(str(other)))
    stream = " ".join(map(str, ids))
    assert windows.shape == (4, 64)
    assert all(" ".join(map(str, row)) in stream for row in windows.tolist())


# ---------------------------------------------------------------- rough treatment

MARK = "EDGEPRUNE_TEST_MARK"
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


def marked(mark: str) -> set[int]:
    """Process ids that inherited the mark."""
    out = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                out.add(int(path.parent.name))
        except OSError:
            continue
    return out


def until(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def scrap(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test started; whatever still runs is ended."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
@linux
def test_killed_ten_times(
    place: Path, calm: Path, tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    rough, rng, mark = tmp_path / "rough", random.Random(2), uuid.uuid4().hex
    hit = []
    for _ in range(10):
        was = finished(rough)
        process = start(command(place, rough), **{MARK: mark})
        running.append(process)
        # starting Python takes longer than the work, so a moment is a number of stages and a little time
        more = rng.randrange(9)
        assert until(lambda n=was + more, p=process: finished(rough) >= n or p.poll() is not None)
        time.sleep(rng.uniform(2.0, 4.0) if more == 0 else rng.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
        hit.append(events(rough)[-1]["stage"] if events(rough) else "nothing")
        assert until(lambda: not marked(mark), 5), "a worker outlived the run"
    assert len(set(hit)) >= 5, hit
    process = start(command(place, rough), **{MARK: mark})
    running.append(process)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["selected"] == report_of(calm)["selected"]
    assert {c["id"] for c in measured(json.loads(out))} == {c["id"] for c in measured(report_of(calm))}
    kl = [{c["id"]: c["quality"]["kl"] for c in measured(report_of(f))} for f in (calm, rough)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-6)
    done = Counter((e["stage"], e["key"]) for e in events(rough) if e["event"] == "done")
    assert [name for name, n in done.items() if n > 1] == []
    assert scrap(rough) == []
    names = {p.relative_to(calm) for p in (calm / "artifacts").rglob("*")}
    assert names == {p.relative_to(rough) for p in (rough / "artifacts").rglob("*")}


@linux
def test_no_worker_outlives_the_run(
    place: Path, tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    mark = uuid.uuid4().hex
    process = start(command(place, tmp_path / "run"), **{MARK: mark})
    running.append(process)
    assert until(lambda: len(marked(mark)) > 1), "no worker was seen"
    process.kill()
    process.communicate()
    assert until(lambda: not marked(mark), 5)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_asked_to_stop(
    place: Path, tmp_path: Path, running: list[subprocess.Popen[str]], number: int, code: int, word: str
) -> None:
    """Ctrl-C reaches the whole group, a service manager's SIGTERM the main process."""
    run = tmp_path / "run"
    process = start(command(place, run))
    running.append(process)
    assert until(lambda: any(e["stage"].startswith("verify") for e in events(run)))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    lines = err.splitlines()
    assert lines[-1] == f"{word}; run the same command again to continue"
    assert "" not in lines and "Traceback" not in err and "Error" not in err
    assert not (run / "report.json").exists()
    assert scrap(run) == []


@linux
def test_ctrl_c_twice(place: Path, tmp_path: Path, running: list[subprocess.Popen[str]]) -> None:
    """The second ends the program at once, whatever it is busy with; no process of it stays."""
    mark, run = uuid.uuid4().hex, tmp_path / "run"
    process = start(command(place, run), **{MARK: mark})
    running.append(process)
    assert until(lambda: any(e["stage"].startswith("verify") for e in events(run)))
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    # the two may arrive as one
    assert process.returncode in (130, -signal.SIGINT) and out == ""
    assert "Traceback" not in err
    assert not (run / "report.json").exists()
    assert until(lambda: not marked(mark), 10)
    # what is left can be read by the next run: whole records, or none
    for path in (run / "records").glob("*.json"):
        assert json.loads(path.read_text())["kind"]


def test_two_runs_in_one_folder(
    run_cli: Callable[..., Any], place: Path, tmp_path: Path, running: list[subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = start(command(place, run))
    running.append(process)
    assert until(lambda: len(events(run)) > 0)
    ran = run_cli(*command(place, run))
    assert process.poll() is None
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"Error: another edgeprune run is using {run}\n"
        "Hint: wait for it, or choose another folder with --out\n"
    )
