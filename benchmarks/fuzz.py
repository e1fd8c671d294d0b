"""Feed damaged input to every parser of ours: an error of ours or a result, never a traceback, soon.

Each case starts from good input and is damaged by bytes, by words, or as JSON. A case is a number, so any
of them can be had again: --parser NAME --case N prints it.

    benchmarks/fuzz.py --parser all --cases 100000
    benchmarks/fuzz.py --parser tokenizer --cases 1000000 --minutes 10
    benchmarks/fuzz.py --parser all --cases 20000 --guided     # coverage-guided
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _common import RESULTS, ROOT, write_results

from edgeprune import graph, languages, locate, records, tokenizer, vocabulary
from edgeprune.bundle import manifest
from edgeprune.config import budget, profiles, targets
from edgeprune.costs.gguf_header import read_header
from edgeprune.devices import _agent, _answers, _session
from edgeprune.errors import EdgepruneError
from edgeprune.tokenizer import sentencepiece_file
from edgeprune.units import parse_bytes

SLOW_S = 1.0
HANG_S = 10.0  # of this process's own time
MOST_BYTES = 512 << 20  # more than the process held before the first case
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


def _model() -> bytes:
    values = struct.pack("<8e", 1, -2, 0.5, 0, 3, 4, 5, 6)
    header = {
        f"t{i}": {"dtype": d, "shape": [2, 4] if d == "F16" else [4], "data_offsets": [16 * i, 16 * i + 16]}
        for i, d in enumerate(("F16", "F32", "F16"))
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + values + struct.pack("<4f", 1, 2, 3, 4) + values


def _gguf() -> bytes:
    sys.path.insert(0, str(ROOT / "tests"))
    from hostile import Gguf, value

    file = Gguf()
    file.metadata["tokenizer.ggml.merges"] = value("STRING[]", ["t 0", "t 1"])
    return file.bytes()


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
            records.loads(kind, text(raw))


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


def read_budget(raw: bytes, folder: Path) -> None:
    """The limits of a command line, as its options read them, against one target and one profile."""
    del folder
    try:
        words = json.loads(text(raw))
        given = {str(k): str(v) for k, v in words.items()} if isinstance(words, dict) else {}
        names = ("decode_tps", "first_token_ms", "kl", "energy_j", "agreement")
        numbers = {k: float(given[k]) for k in names if k in given}
    except (ValueError, RecursionError):
        raise EdgepruneError("refused by the command line") from None
    sizes = {k: parse_bytes(given[k]) for k in ("memory_bytes", "file_bytes") if k in given}
    wanted = given.get("objective", "quality")
    budget.resolve_budget(*_LIMITED, **sizes, **numbers, objective=wanted)  # type: ignore[arg-type]


def read_report(raw: bytes, folder: Path) -> None:
    # loads numpy and the like
    from edgeprune.pipeline import light
    from edgeprune.report import build

    with contextlib.suppress(ValueError, RecursionError):
        plain = json.loads(text(raw))
        if isinstance(plain, dict):
            # what was damaged is sealed again, else the digest would hide everything behind it
            raw = json.dumps(build.sealed(plain)).encode()
    at(folder, "report.json", raw)
    light.load_report(folder)
    light.reselect(folder, memory_bytes=10**9)


def read_gguf_model(raw: bytes, folder: Path) -> None:
    """Config, graph and tokenizer of a GGUF file, and the tokenizer written as a folder has it."""
    from edgeprune.pipeline import light

    header = light.open_header(str(at(folder, "a.gguf", raw)))
    out = folder / "written"
    out.mkdir(exist_ok=True)
    tokenizer.write_hf(header.tokenizer_kvs, out)


def read_weights(raw: bytes, folder: Path) -> None:
    """Every tensor of a model folder, finite or refused."""
    from edgeprune import checkpoint

    at(folder, "config.json", json.dumps(CONFIG).encode())
    at(folder, "model.safetensors", raw)
    source = checkpoint.SafetensorsSource(folder)
    for name in source.names():
        checkpoint.finite(source.tensor(name), name)
    source.close()


def read_plan(raw: bytes, folder: Path) -> None:
    from edgeprune.pipeline import light

    light.load_plan(at(folder, "plan.json", raw), _graph())


def read_scores(raw: bytes, folder: Path) -> None:
    from edgeprune.pipeline import light

    at(folder, "s.safetensors", _safetensors())
    at(folder, "s.json", raw)
    light.load_scores(folder / "s.safetensors")


def read_items(raw: bytes, folder: Path) -> None:
    from edgeprune.evaluation import localdata

    at(folder, "val-labels.lst", b"0\n")
    refused = []
    for task in localdata._FILES:
        name = "val.txt" if raw[:1] != b"{" else "val.jsonl"
        try:
            localdata.read_task(at(folder, name, raw), task)
        except EdgepruneError as error:
            refused.append(error)
    if len(refused) == len(localdata._FILES):
        raise refused[0]


def read_suite(raw: bytes, folder: Path) -> None:
    from edgeprune.evaluation import suites

    suites.find(str(at(folder, "own.toml", raw)))


def read_sentencepiece(raw: bytes, folder: Path) -> None:
    """Our own walk over the protobuf of tokenizer.model; what is a BPE is opened by the library."""
    sentencepiece_file.model_type(at(folder, "tokenizer.model", raw))


def read_template(raw: bytes, folder: Path) -> None:
    """What the process of a template does, here: starting one for each case would take days."""
    del folder
    from edgeprune import chat_templates
    from edgeprune.bundle import chat
    from edgeprune.chat_templates import _child

    template = _child.Template(text(raw), {"bos_token": "", "eos_token": "</s>"}, None)

    def render(messages: Sequence[dict[str, str]], *, go_on: bool) -> str:
        asked = {"what": "render", "messages": messages, "go_on": go_on, "most": chat_templates.MOST_TEXT}
        return str(chat_templates.result(_child.answer(template, asked), "the chat template"))

    chat.pieces_of(render)


def read_address(raw: bytes, folder: Path) -> None:
    del folder
    from edgeprune.devices import adb, ssh

    refused = []
    for device in (adb, ssh):
        try:
            made = device.transport(text(raw))
        except EdgepruneError as error:
            refused.append(error)
            continue
        # one word for the remote side; nothing of the address became an option
        assert made.argv("true")[-1] == "true"
        assert "--" in made.argv("true") or device is adb
    if len(refused) == 2:
        raise refused[0]


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


def _report() -> bytes:
    sys.path.insert(0, str(ROOT / "tests"))
    import candidates

    from edgeprune import selection

    floor = candidates.limit(0.2, "nats/token")
    limits = candidates.budget(200e6, kl=floor, energy_j=candidates.limit(1.0, "J/token"), objective="speed")
    guess = (0.1, 0.05, 0.2)
    rows = [
        candidates.candidate("a"),
        candidates.candidate("b", ratio=0.2, memory=None, predicted_tps=90.0, predicted_kl=guess),
        candidates.candidate("c", joules=0.5, tps=48.0),
    ]
    rows = [dataclasses.replace(c, meets=selection.check_limits(limits, c)) for c in rows]
    with tempfile.TemporaryDirectory() as made:
        candidates.write_report(
            Path(made) / "run",
            rows,
            target=_LIMITED[0],
            profile=_LIMITED[1],
            limits=limits,
            chosen=selection.select(limits, rows, lambda a, b: False),
        )
        return (Path(made) / "run" / "report.json").read_bytes()


@functools.cache
def _graph() -> records.ModelGraph:
    return graph.build(CONFIG)


def _plan() -> bytes:
    import numpy as np

    from edgeprune import planner
    from edgeprune.pipeline import light

    space = planner.PlanSpace(
        graph=_graph(),
        scores={a.name: np.arange(a.n_units, dtype=np.float32) for a in _graph().axes},
        poolable=True,
        constraints=light.hand_constraints(16),
        metric="magnitude",
    )
    return records.dumps(planner.plan_ratio(space, "uniform", 0.2)).encode()


def _scores() -> bytes:
    from edgeprune.pipeline import light

    plain = example(light.ScoreFile)
    plain["scores"]["arrays_sha256"] = hashlib.sha256(_safetensors()).hexdigest()
    return json.dumps(plain).encode()


def _items() -> list[bytes]:
    choices = {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}
    rows: list[dict[str, Any]] = [
        {"question": "q", "passage": "p", "label": True, "idx": 0},
        {"goal": "g", "sol1": "a", "sol2": "b"},
        {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": 1},
        {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"},
        {"id": "1", "question": choices, "answerKey": "A"},
    ]
    return [*(json.dumps(row).encode() for row in rows), b"Cooking: He eats. She\n1\na\nb\nc\nd\n"]


def _sentencepiece() -> bytes:
    def field(number: int, body: bytes) -> bytes:
        return bytes([number << 3 | 2, len(body)]) + body

    pieces = [field(1, w.encode()) + b"\x15" + struct.pack("<f", -1.0) + b"\x18\x01" for w in ("a", "b")]
    return b"".join(field(1, piece) for piece in pieces) + field(2, b"\x18\x02\x20\x03")


_TEMPLATE = (
    b"{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    b"{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_LIMITED = (
    targets.read_target(ROOT / "targets" / "laptop-cpu.toml"),
    profiles.read_profile(ROOT / "profiles" / "chat-2k.toml"),
)
_BUDGET = {
    **{"memory_bytes": "200MB", "file_bytes": "1.5GiB", "decode_tps": "5"},
    **{"first_token_ms": "900.5", "kl": "0.05", "energy_j": "0.5", "agreement": "0.9", "objective": "size"},
}
_SUITE = b'texts = ["wikitext2"]\nwindows = [128, 2048]\ntasks = ["boolq"]\nitems = 5\ntokens = 1000\n'
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
        "budgets": Parser([json.dumps(_BUDGET).encode()], read_budget, json=True),
        "report": Parser([_report()], read_report, json=True),
        "plan": Parser([_plan()], read_plan, json=True),
        "scores": Parser([_scores()], read_scores, json=True),
        "gguf-model": Parser([_gguf()], read_gguf_model),
        "weights": Parser([_model()], read_weights),
        "sentencepiece": Parser([_sentencepiece()], read_sentencepiece),
        "chat-template": Parser([_TEMPLATE], read_template),
        # adb's addresses are refused where there is no adb
        "addresses": Parser(
            [b"ssh://me@board.local:2222", *([b"adb://R58-1:5555"] if shutil.which("adb") else [])],
            read_address,
        ),
        "suites": Parser([_SUITE], read_suite),
        "benchmark-items": Parser(_items(), read_items),
        "texts": Parser([json.dumps(d).encode() for d in (*_DOCUMENTS, _DOCUMENTS)], read_text, json=True),
    }


def case(parser: Parser, number: int) -> bytes:
    rng = random.Random(number)
    return damage(parser.seeds[number % len(parser.seeds)], rng, parser.json)


class Hang(BaseException):
    """A case used up its time; no `except Exception` may hide it."""


def _alarm(_number: int, _frame: object) -> None:
    raise Hang(f"more than {HANG_S:g} s")


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A case of more than HANG_S is a Hang, one that takes MOST_BYTES more than now a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGPROF, _alarm)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Watch:
    """What reading inputs came to: the counts, every kind of traceback once, the slowest."""

    refused: int = 0
    done: int = 0
    slow: int = 0
    slowest_s: float = 0.0
    slowest_case: int = 0
    hangs: int = 0
    faults: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def feed(self, parser: Parser, raw: bytes, folder: Path, number: int) -> str | None:
        """Read one input; the kind of traceback it gave, or None."""
        began, where = time.process_time(), None
        try:
            signal.setitimer(signal.ITIMER_PROF, HANG_S)
            try:
                parser.read(raw, folder)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except OURS as error:
            self.refused += 1
            str(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.hangs += isinstance(error, Hang)
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            row = self.faults.setdefault(where, {"case": number, "text": f"{error!s:.120}", "times": 0})
            row["times"] += 1
        took = time.process_time() - began
        self.slow += took > SLOW_S
        if took > self.slowest_s:
            self.slowest_s, self.slowest_case = took, number
        self.done += 1
        return where


@contextlib.contextmanager
def place(parser: Parser) -> Iterator[tuple[Path, Path]]:
    """A folder to read in and the one around it; what a parser imports is loaded before limits are set."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-fuzz-") as made:
        folder = Path(made, "deep", "in")
        folder.mkdir(parents=True)
        for seed in parser.seeds:
            with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as warm:
                parser.read(seed, Path(warm))
        with _limited():
            yield folder, Path(made)


def run(
    name: str, parser: Parser, cases: int, *, first: int = 0, minutes: float | None = None
) -> dict[str, Any]:
    """Feed the cases; what came back, every kind of traceback once, and the slowest case."""
    began, watch = time.monotonic(), Watch(slowest_case=first)
    with place(parser) as (folder, outer):
        for number in range(first, first + cases):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            watch.feed(parser, case(parser, number), folder, number)
        outside = [str(p) for p in outer.rglob("*") if p.is_file() and folder not in p.parents]
    return result(name, watch, outside, began)


class Steps:
    """Steps between lines of our code that were taken so far, and whether the last input took a new one."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self.new = False
        self._ours = str(ROOT / "edgeprune")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.new = False
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: Any, _event: str, _arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._ours):
            return None
        code, last = id(frame.f_code), 0

        def line(frame: Any, event: str, _arg: Any) -> Any:
            nonlocal last
            if event == "line":
                step = (code, last, frame.f_lineno)
                last = frame.f_lineno
                if step not in self.seen:
                    self.seen.add(step)
                    self.new = True
            return line

        return line


MOST_KEPT_BYTES = 1 << 16


def run_guided(
    name: str, parser: Parser, cases: int, *, first: int = 0, minutes: float | None = None
) -> dict[str, Any]:
    """As `run`, but an input that takes a new step through our code is damaged further.

    What a case is depends on those before it: an input that fails is written out whole.
    """
    began, watch, steps = time.monotonic(), Watch(slowest_case=first), Steps()
    kept = list(parser.seeds)
    with place(parser) as (folder, outer):
        for number in range(first, first + cases):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            rng = random.Random(number)
            # the newest more often: they are where nobody has been
            chosen = kept[-1 - int(len(kept) * rng.random() ** 2)]
            raw = (
                parser.seeds[number] if number < len(parser.seeds) else damage_kept(chosen, rng, parser.json)
            )
            with steps.watched():
                where = watch.feed(parser, raw, folder, number)
            if where is not None:
                watch.faults[where].setdefault("input", repr(raw[:2000]))
            elif steps.new and len(raw) <= MOST_KEPT_BYTES:
                kept.append(raw)
        outside = [str(p) for p in outer.rglob("*") if p.is_file() and folder not in p.parents]
    found = result(name, watch, outside, began)
    return {**found, "guided": True, "steps_seen": len(steps.seen), "inputs_kept": len(kept)}


def damage_kept(raw: bytes, rng: random.Random, as_json: bool) -> bytes:
    """`damage` of an input that may be no JSON any more."""
    try:
        return damage(raw, rng, as_json)
    except (ValueError, RecursionError):
        return damage(raw, rng, False)


def result(name: str, watch: Watch, outside: list[str], began: float) -> dict[str, Any]:
    return {
        "parser": name,
        "cases": watch.done,
        "refused": watch.refused,
        "tracebacks": sum(row["times"] for row in watch.faults.values()) - watch.hangs,
        "hangs": watch.hangs,
        "kinds": watch.faults,
        "slowest_s": round(watch.slowest_s, 4),
        "slowest_case": watch.slowest_case,
        "slower_than_1s": watch.slow,
        "written_outside": outside,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "seconds": round(time.monotonic() - began, 1),
    }


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These rows in place of what the file held of the same parsers."""
    path = RESULTS / "fuzz.json"
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    known = {(row["parser"], row.get("guided", False)): row for row in (*old, *rows)}
    return [known[key] for key in sorted(known)]


def main() -> None:
    known = parsers()
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parser", choices=["all", *known], nargs="+", default=["all"])
    ask.add_argument("--cases", type=int, default=100_000, help="of each parser")
    ask.add_argument("--first", type=int, default=0, help="number of the first case")
    ask.add_argument("--minutes", type=float, help="end each parser after this time")
    ask.add_argument("--guided", action="store_true", help="damage further what reached new code")
    ask.add_argument("--case", type=int, help="print one case and what reading it gives")
    ask.add_argument("--write", action="store_true", help="write benchmarks/results/fuzz.json")
    given = ask.parse_args()
    names = list(known) if "all" in given.parser else given.parser
    if given.case is not None:
        parser = known[names[0]]
        print(case(parser, given.case))
        with tempfile.TemporaryDirectory() as made:
            print(parser.read(case(parser, given.case), Path(made)))
        return
    rows = []
    for name in names:
        work = run_guided if given.guided else run
        row = work(name, known[name], given.cases, first=given.first, minutes=given.minutes)
        rows.append(row)
        figures = (
            f"{row['refused']:>8} refused {row['tracebacks']:>6} tracebacks, {row['hangs']} hangs, slowest"
        )
        print(
            f"{name:20}{row['cases']:>9} cases {figures} {row['slowest_s']:.3f} s "
            f"(case {row['slowest_case']}), {row['seconds']:.0f} s"
        )
        for where, fault in row["kinds"].items():
            print(f"    {where}: {fault['text']} ({fault['times']} times, first in case {fault['case']})")
        sys.stdout.flush()
        if given.write:
            write_results("fuzz", merged(rows))
    sys.exit(1 if any(row["kinds"] or row["written_outside"] for row in rows) else 0)


if __name__ == "__main__":
    main()
