"""Feed damaged input to every parser of ours: an error of ours or a result, never a traceback, soon.

Each case starts from good input and is damaged by bytes, by words, or as JSON. A case is a number, so any
of them can be had again: --parser NAME --case N prints it.

    benchmarks/fuzz.py --parser all --cases 100000
    benchmarks/fuzz.py --parser tokenizer --cases 1000000 --minutes 10
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import ROOT, write_results

from edgeprune import graph, languages, locate, records, tokenizer, vocabulary
from edgeprune.bundle import manifest
from edgeprune.config import profiles, targets
from edgeprune.costs.gguf_header import read_header
from edgeprune.devices import _agent, _answers, _session
from edgeprune.errors import EdgepruneError
from edgeprune.units import parse_bytes

SLOW_S = 1.0
OURS = (EdgepruneError, _agent.JobError)


@dataclass(frozen=True)
class Parser:
    seeds: Sequence[bytes]
    read: Callable[[bytes, Path], Any]  # the input and a folder to write it to
    json: bool = False  # damage it as JSON too


# ---------------------------------------------------------------- damage

_WORDS = [
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'"',
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"18446744073709551615",
    b"../../etc/passwd",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"\n",
    b"=",
    b"[[x]]",
    "\u202e\u0130\u00df".encode(),
]
_ODD: list[Any] = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**70, -(2**40), 1e308, float("inf")]
_ODD += [
    float("nan"),
    "",
    "a",
    "\ud800",
    "../x",
    "\x00",
    "x" * 5000,
    [],
    [[]],
    {},
    {"": None},
    ["a", 1, None],
]


def damage(seed: bytes, rng: random.Random, as_json: bool) -> bytes:
    """One damaged copy of `seed`."""
    if as_json and rng.random() < 0.6:
        plain = json.loads(seed)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            plain = _damage_json(plain, rng)
        return json.dumps(plain).encode()
    out = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] = rng.randrange(256)
        elif kind == 1:
            out[at : at + rng.choice((0, 1, 8, 40))] = rng.choice(_WORDS)
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            part = out[at : at + rng.choice((1, 8, 60))]
            to = rng.randrange(len(out) + 1)
            out[to:to] = part
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)))
    return bytes(out)


def _damage_json(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return {**value, rng.choice(("", "x", "\x1b", "__class__")): rng.choice(_ODD)}
        return {**value, key: _damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value, value[at]]
        return [*value[:at], _damage_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(_ODD)


# ---------------------------------------------------------------- good input


def example(kind: Any) -> Any:
    """Plain values of any record's type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return example(next(o for o in typing.get_args(kind) if o is not type(None)))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {f.name: example(hints[f.name]) for f in dataclasses.fields(kind)}
    if origin is tuple:
        return [example(typing.get_args(kind)[0])] * 2
    if origin is dict:
        return {"a": example(typing.get_args(kind)[1])}
    return {str: "a", int: 2, float: 0.5, bool: True}[kind]


def record_kinds() -> list[type]:
    found = vars(records).values()
    return [c for c in found if isinstance(c, type) and dataclasses.is_dataclass(c) and hasattr(c, "kind")]


def _tokenizers() -> list[bytes]:
    letters = [chr(c) for c in range(33, 127)] + ["\u0120"]
    vocab = {c: i for i, c in enumerate(letters)} | {"ab": len(letters), "abc": len(letters) + 1}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocab), "content": "<s>", **special}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]], "ignore_merges": False}
    first = {**common, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None}
    first |= {"decoder": byte_level, "model": model}
    pieces = {
        "<unk>": 0,
        **{f"<0x{i:02X}>": i + 1 for i in range(256)},
        "\u2581": 257,
        "a": 258,
        "\u2581a": 259,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    second = {**common, "added_tokens": [], "pre_tokenizer": None, "post_processor": None, "decoder": None}
    second["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace],
    }
    second["model"] = {
        **{"type": "BPE", "vocab": pieces, "merges": ["\u2581 a"], "unk_token": "<unk>", "fuse_unk": True},
        "byte_fallback": True,
    }
    return [json.dumps(t).encode() for t in (first, second)]


CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "edgeprune_layers": [[4, 2, 128], [2, 1, 64]],
}


def _safetensors() -> bytes:
    header = {"__metadata__": {"format": "pt"}}
    for i in range(3):
        header[f"t{i}"] = {"dtype": "F16", "shape": [2, 4], "data_offsets": [16 * i, 16 * i + 16]}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(48)


def _gguf() -> bytes:
    sys.path.insert(0, str(ROOT / "tests"))
    from hostile import Gguf

    return Gguf().bytes()


def _answers_seeds() -> list[bytes]:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_devices_answers import GOOD

    return [f"EDGEPRUNE {json.dumps({'ok': answer})}\n".encode() for answer in GOOD.values()]


# ---------------------------------------------------------------- parsers


def at(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def read_records(raw: bytes, folder: Path) -> None:
    del folder
    for kind in record_kinds():
        with contextlib.suppress(EdgepruneError):
            records.from_plain(kind, json.loads(raw)) if raw[:1] == b"\x00" else records.loads(
                kind, text(raw)
            )


def read_tokenizer(raw: bytes, folder: Path) -> None:
    at(folder, "tokenizer.json", raw)
    at(folder, "config.json", b'{"vocab_size": 400}')
    kvs = tokenizer.kvs_from_hf(folder)
    out = folder / "written"
    out.mkdir(exist_ok=True)
    tokenizer.write_hf(kvs, out)


def read_settings(raw: bytes, folder: Path) -> None:
    at(folder, "tokenizer.json", _TOKENIZERS[0])
    at(folder, "tokenizer_config.json", raw)
    at(folder, "config.json", b'{"vocab_size": 400}')
    tokenizer.kvs_from_hf(folder)


def read_index(raw: bytes, folder: Path) -> None:
    at(folder, "model.safetensors", _safetensors())
    at(folder, "model.safetensors.index.json", raw)
    locate.find_tensors(folder)


def read_answer(raw: bytes, folder: Path) -> None:
    del folder
    answer = _session.answer_of(raw)
    if answer is not None and "ok" in answer:
        for job in _answers.FORMS:
            with contextlib.suppress(EdgepruneError):
                _answers.checked(job, answer["ok"], "board")


def read_text(raw: bytes, folder: Path) -> None:
    # these load torch
    from edgeprune import data
    from edgeprune.recovery import text as recovery_text

    for read, name in (
        (data.read_text, "a.jsonl"),
        (recovery_text.read, "a.jsonl"),
        (recovery_text.read, "a.json"),
    ):
        with contextlib.suppress(EdgepruneError):
            read(str(at(folder, name, raw)))


def read_manifest(raw: bytes, folder: Path) -> None:
    at(folder, "a.bin", b"aaaa")
    at(folder, manifest.FILE_NAME, raw)
    manifest.verify(folder)


def _manifest() -> bytes:
    with tempfile.TemporaryDirectory() as made:
        at(Path(made), "a.bin", b"aaaa")
        manifest.write(Path(made), {"parent": {"id": "x", "license": None}})
        return (Path(made) / manifest.FILE_NAME).read_bytes()


_TOKENIZERS = _tokenizers()
_ROW = {
    "n_threads": 4,
    "n_batch": 512,
    "model_size": 1,
    "model_n_params": 1,
    "model_type": "x",
    "samples_ns": [5, 6],
}
_BENCH = [{**_ROW, "n_prompt": 8, "n_gen": 0}, {**_ROW, "n_prompt": 0, "n_gen": 8}]
_SETTINGS = {"bos_token": {"content": "<s>"}, "eos_token": "a", "add_bos_token": True, "chat_template": "x"}
_DOCUMENTS = [
    {"text": "a b c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
]


def parsers() -> dict[str, Parser]:
    toml = {k: [p.read_bytes() for p in sorted((ROOT / k).glob("*.toml"))] for k in ("targets", "profiles")}
    weight_map = {"weight_map": {f"t{i}": "model.safetensors" for i in range(3)}}
    rows = [json.dumps(example(kind)).encode() for kind in record_kinds()]
    return {
        "targets": Parser(toml["targets"], lambda raw, f: targets.read_target(at(f, "board.toml", raw))),
        "profiles": Parser(toml["profiles"], lambda raw, f: profiles.read_profile(at(f, "use.toml", raw))),
        "units": Parser([b"6GB", b"512 MiB", b"1.5GiB"], lambda raw, f: parse_bytes(text(raw))),
        "records": Parser(rows, read_records, json=True),
        "config": Parser(
            [json.dumps(CONFIG).encode()],
            lambda raw, f: graph.build(locate.read_config(at(f, "config.json", raw).parent)),
            json=True,
        ),
        "safetensors": Parser(
            [_safetensors()], lambda raw, f: locate.safetensors_shapes(at(f, "a.safetensors", raw))
        ),
        "shards": Parser([json.dumps(weight_map).encode()], read_index, json=True),
        "gguf": Parser([_gguf()], lambda raw, f: read_header(at(f, "a.gguf", raw))),
        "tokenizer": Parser(_TOKENIZERS, read_tokenizer, json=True),
        "tokenizer-settings": Parser(
            [json.dumps(_SETTINGS).encode()],
            read_settings,
            json=True,
        ),
        "manifest": Parser([_manifest()], read_manifest, json=True),
        "agent": Parser(_answers_seeds(), read_answer),
        "llama-bench": Parser(
            [json.dumps(_BENCH).encode()], lambda raw, f: _agent.llama_bench_rows(raw), json=True
        ),
        "languages": Parser([b"en,de", b"ja, ko,en"], lambda raw, f: languages.parse(text(raw))),
        "token-runs": Parser([b"0-16,20,22-40"], lambda raw, f: vocabulary.read_runs(text(raw))),
        "texts": Parser([json.dumps(d).encode() for d in (*_DOCUMENTS, _DOCUMENTS)], read_text, json=True),
    }


def case(parser: Parser, number: int) -> bytes:
    rng = random.Random(number)
    return damage(parser.seeds[number % len(parser.seeds)], rng, parser.json)


def run(
    name: str, parser: Parser, cases: int, *, first: int = 0, minutes: float | None = None
) -> dict[str, Any]:
    """Feed the cases; what came back, every kind of traceback once, and the slowest case."""
    began, slowest, slowest_case, refused, slow = time.monotonic(), 0.0, first, 0, 0
    faults: dict[str, dict[str, Any]] = {}
    done = 0
    with tempfile.TemporaryDirectory(prefix="edgeprune-fuzz-") as made:
        outer = Path(made)
        folder = outer / "deep" / "in"
        folder.mkdir(parents=True)
        for number in range(first, first + cases):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            raw = case(parser, number)
            at_start = time.process_time()
            try:
                parser.read(raw, folder)
            except OURS as error:
                refused += 1
                str(error)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                row = faults.setdefault(where, {"case": number, "text": f"{error!s:.120}", "times": 0})
                row["times"] += 1
            took = time.process_time() - at_start
            slow += took > SLOW_S
            if took > slowest:
                slowest, slowest_case = took, number
            done += 1
        outside = [str(p) for p in outer.rglob("*") if p.is_file() and folder not in p.parents]
    return {
        "parser": name,
        "cases": done,
        "refused": refused,
        "tracebacks": sum(row["times"] for row in faults.values()),
        "kinds": faults,
        "slowest_s": round(slowest, 4),
        "slowest_case": slowest_case,
        "slower_than_1s": slow,
        "written_outside": outside,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    known = parsers()
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parser", choices=["all", *known], default="all")
    ask.add_argument("--cases", type=int, default=100_000, help="of each parser")
    ask.add_argument("--first", type=int, default=0, help="number of the first case")
    ask.add_argument("--minutes", type=float, help="end each parser after this time")
    ask.add_argument("--case", type=int, help="print one case and what reading it gives")
    ask.add_argument("--write", action="store_true", help="write benchmarks/results/fuzz.json")
    given = ask.parse_args()
    names = list(known) if given.parser == "all" else [given.parser]
    if given.case is not None:
        parser = known[names[0]]
        print(case(parser, given.case))
        with tempfile.TemporaryDirectory() as made:
            print(parser.read(case(parser, given.case), Path(made)))
        return
    rows = []
    for name in names:
        row = run(name, known[name], given.cases, first=given.first, minutes=given.minutes)
        rows.append(row)
        figures = (
            f"{row['refused']:>8} refused {row['tracebacks']:>6} tracebacks, slowest {row['slowest_s']:.3f} s"
        )
        print(
            f"{name:20}{row['cases']:>9} cases {figures} (case {row['slowest_case']}), {row['seconds']:.0f} s"
        )
        for where, fault in row["kinds"].items():
            print(f"    {where}: {fault['text']} ({fault['times']} times, first in case {fault['case']})")
        sys.stdout.flush()
    if given.write:
        write_results("fuzz", rows)
    sys.exit(1 if any(row["tracebacks"] or row["written_outside"] for row in rows) else 0)


if __name__ == "__main__":
    main()
