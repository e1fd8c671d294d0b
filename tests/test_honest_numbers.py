"""Report and page of a real run, walked: each number says its unit, predicted and measured never meet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from builders import tiny_model_with_tokenizer
from candidates import small_profile

PROFILE = small_profile(bench=(32, 8, 2), quantizations=["Q8_0", "Q4_0"])
SUFFIXES = re.compile(
    r"_(bytes|tps|ms|s|ns|per_s|flops|hz|ghz|tokens|params|parameters|kl)(_low|_high|_stdev|_stderr|_predicted|_measured)?$"
)
# the name is the unit, or the number has none
NAMED = {
    "bytes": "bytes",
    "seconds": "seconds",
    "tokens": "tokens",
    "parameters": "parameters",
    "threads": "threads",
    "cores": "cores",
    "layers": "heads, KV heads and FFN channels of each layer",
    "steps": "steps",
    "repeats": "repeats",
    "samples": "windows",
    "kl": "nats per token",
    "perplexity": "a ratio",
    "agreement": "a share",
    "ratio": "a share",
    "ratio_all": "a share",
    "difference": "nats per token",
    "low": "nats per token",
    "high": "nats per token",
    "ubatch": "tokens",
    "max_abs_diff": "logits",
    "same_argmax": "positions",
    "explained_argmax": "positions",
    "seed": "none",
    "schema": "none",
    "max_measured": "candidates",
    "considered": "candidates",
    "measured": "candidates",
    "round": "none",
    "stderr": "as the value beside it",
    "kl_low": "nats per token",
    "kl_high": "nats per token",
    "joules_per_token": "joules",
    "max_energy_j": "joules",
    "min_agreement": "a share",
    "relative_error": "a share",
    "prefill_error": "a share",
    "type_factors": "a share",
    "ratios": "shares",
}
DERIVED = re.compile(
    r"^(n_|requested_|dense_|calibration_|eval_|compensation_)|_(before|after|stderr|samples)$"
)


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float, Any]]:
    """(path of keys, number, the table it is in)."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(inner, int | float) and not isinstance(inner, bool):
                yield (*path, name), inner, value
            else:
                yield from numbers(inner, (*path, name))
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, int | float) and not isinstance(inner, bool):
                yield path, inner, value
            else:
                yield from numbers(inner, path)


class Tables(HTMLParser):
    """The tables of a page as grids of (text, class, is a heading), spans filled in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str, bool]]]] = []
        self._grid: dict[tuple[int, int], list[Any]] = {}
        self._row = -1
        self._cells: list[Any] | None = None
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._grid, self._row, self._inside = {}, -1, True
        elif tag == "tr":
            self._row += 1
        elif tag in ("td", "th") and self._inside:
            at = 0
            while (self._row, at) in self._grid:
                at += 1
            self._cells = ["", given.get("class") or "", tag == "th" and given.get("scope") != "row"]
            if tag == "td" and int(given.get("colspan") or 1) > 1:
                self._cells[1] += " note"
            for down in range(int(given.get("rowspan") or 1)):
                for right in range(int(given.get("colspan") or 1)):
                    self._grid[self._row + down, at + right] = self._cells
        elif tag == "br" and self._cells is not None:
            self._cells[0] += " "

    def handle_data(self, data: str) -> None:
        if self._cells is not None:
            self._cells[0] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cells = None
        elif tag == "table":
            self._inside = False
            n_rows = max(r for r, _ in self._grid) + 1
            self.tables.append(
                [
                    [
                        (cell[0].strip(), cell[1], cell[2])
                        for (r, _), cell in sorted(self._grid.items())
                        if r == row
                    ]
                    for row in range(n_rows)
                ]
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for two targets: this machine, measured, and a board whose speed is predicted."""
    from edgeprune.cli.main import run as call

    folder = tmp_path_factory.mktemp("honest")
    tiny_model_with_tokenizer(folder / "tiny", hidden=128, heads=4, kv_heads=2, ff=512, layers=3)
    (folder / "p.toml").write_text(PROFILE)
    args = ["--target", "laptop-cpu", "--target", "jetson-orin", "--budget", "1GB", "--threads", "1"]
    args += ["--model", str(folder / "tiny"), "--profile", str(folder / "p.toml")]
    assert call([*args, "--out", str(folder / "run")]) == 0
    return folder / "run"


REPORTS = ("report", "report-jetson-orin")


@pytest.mark.parametrize("name", REPORTS)
def test_every_number_has_its_unit(run: Path, name: str) -> None:
    report = json.loads((run / f"{name}.json").read_text())
    seen, without = 0, []
    for path, _, table in numbers(report):
        last = path[-1]
        seen += 1
        if last == "value":
            assert table["unit"] in ("bytes", "tokens/s", "ms", "nats/token", "J/token", "of tokens")
            continue
        plain = DERIVED.sub("", last)
        if not (SUFFIXES.search(last) or last in NAMED or plain in NAMED or path[-2:-1] == ("type_factors",)):
            without.append(".".join(path))
    assert seen > 150
    assert sorted(set(without)) == []


@pytest.mark.parametrize("name", REPORTS)
def test_predicted_and_measured_are_apart_in_the_report(run: Path, name: str) -> None:
    report = json.loads((run / f"{name}.json").read_text())
    both = [path for path, _, _ in numbers(report) if "predicted" in path and "measured" in path]
    assert both == []
    # a speed or a peak stands where it is said which it is; modes of power are only ever predicted
    stray = {
        ".".join(path)
        for path, _, _ in numbers(report)
        if re.search(r"(_tps|peak_memory_bytes)", path[-1])
        and not {"predicted", "measured", "power_modes"} & set(path)
        and "predicted" not in path[-1]
        and "measured" not in path[-1]
    }
    assert stray <= {"profile.min_decode_tps"}
    tried = [c for c in report["candidates"] if c["measured"]]
    assert len(tried) >= 1
    for c in tried:
        assert c["measured"]["peak_memory_bytes"] != c["predicted"]["peak_memory_bytes"]
        assert (c["measured"]["decode_tps"] is None) == (name != "report")


@pytest.mark.parametrize("name", REPORTS)
def test_predicted_and_measured_are_apart_on_the_page(run: Path, name: str) -> None:
    tables = Tables((run / f"{name}.html").read_text(encoding="utf-8")).tables
    judged = 0
    for grid in tables:
        width = max(map(len, grid))
        rows = [row for row in grid if len(row) == width]
        heads = [[row[i][0] for row in rows if row[i][2]] for i in range(width)]
        for i, head in enumerate(heads):
            words = " ".join(head)
            predicted = "predicted" in words
            assert not (predicted and "measured" in words), words
            for row in rows:
                text, kind, is_head = row[i]
                if is_head or text in ("", "-") or "note" in kind.split():
                    continue
                if "predicted" in words or "measured" in words:
                    judged += 1
                    assert ("predicted" in kind.split()) == predicted, (words, text)
    assert judged > 20


def test_the_page_shows_the_reports_figures_in_their_columns(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    tables = Tables((run / "report.html").read_text(encoding="utf-8")).tables
    wanted = {c["id"]: c for c in report["candidates"] if c["measured"]}
    found = 0
    for grid in tables:
        heads = [" ".join(cell[0] for cell in column) for column in zip(*grid[:2], strict=False)]
        if not any("predicted memory, MB" in head for head in heads):
            continue
        memory = {word: heads.index(f"{word} memory, MB") for word in ("predicted", "measured")}
        for row in grid[2:]:
            c = wanted.get(row[0][0])
            if c is None:
                continue
            for word, at in memory.items():
                assert float(row[at][0]) == pytest.approx(c[word]["peak_memory_bytes"] / 1e6, abs=0.51)
                found += 1
    assert found == 2 * len(wanted) > 0


def test_the_table_of_the_terminal(run: Path, run_cli: Callable[..., Any]) -> None:
    shown = run_cli("report", run).out.splitlines()
    at = next(i for i, line in enumerate(shown) if "MB pred." in line)
    assert shown[at].count("pred.") >= 2 and shown[at].count("meas.") >= 2
