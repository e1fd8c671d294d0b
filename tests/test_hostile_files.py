"""Files from strangers: each ends in its exit code and one line, in time, in memory, inside the folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from builders import tiny_model_with_tokenizer
from hostile import MOST_BYTES, MOST_SECONDS, Gguf, guarded, safetensors, text, u32, u64, value
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the caps are read from /proc")

LAYERS = "edgeprune_layers"


class Place:
    """A copy of a tiny model, its plan and its scores, to damage."""

    def __init__(self, folder: Path, made: Path) -> None:
        self.folder, self.made = folder, made
        self.model = Path(shutil.copytree(made / "model", folder / "model"))
        self.weights = self.model / "model.safetensors"
        self.out = folder / "out"

    def inspect(self) -> list[Any]:
        return ["inspect", self.model]

    def export(self) -> list[Any]:
        return ["export", self.model, "--quantization", "F16", "--out", self.out / "a.gguf", "--no-verify"]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def json(self, name: str, **over: Any) -> None:
        """Replace some keys of a JSON file of the model."""
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **over}))

    def tokenizer(self, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.model / "tokenizer.json"
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its scores and a plan, made by the verbs; loads every library before a cap is set."""
    from edgeprune.cli.main import run

    root = tmp_path_factory.mktemp("made")
    model = str(tiny_model_with_tokenizer(root / "model"))
    scores, plan = str(root / "scores.safetensors"), str(root / "plan.json")
    assert run(["score", model, "--metric", "magnitude", "--out", scores]) == 0
    assert run(["plan", model, "--scores", scores, "--ratio", "0.2", "--out", plan]) == 0
    assert run(["prune", model, "--plan", plan, "--out", str(root / "pruned")]) == 0
    out = str(root / "a.gguf")
    assert run(["export", model, "--quantization", "F16", "--out", out, "--no-verify"]) == 0
    assert run(["inspect", out]) == 0
    good = root / "good.gguf"
    good.write_bytes(Gguf().bytes())
    assert run(["inspect", str(good)]) == 0
    return root


@pytest.fixture
def at(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path / "place", made)
    monkeypatch.setenv("TMPDIR", str(place.folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(place.folder)
    return place


Case = tuple[Callable[[Place], Any], int, str]


def check(run_cli: Callable[..., Any], at: Place, case: Case) -> None:
    """`case` is what to do (None from it: inspect the model), the exit code, one regex for the one line."""
    make, code, line = case
    args = make(at)
    args = args if isinstance(args, list) else at.inspect()
    before = {p: p.lstat().st_mtime_ns for p in at.folder.rglob("*")}
    with guarded(at.folder) as cost:
        ran = run_cli(*args)
    assert "Traceback" not in ran.err
    found = [x.removeprefix("Error: ") for x in ran.err.splitlines() if x.startswith("Error: ")]
    assert ran.code == code, ran.err
    assert ran.out == "" and found, ran
    assert re.search(line, found[0]), f"{found[0]!r} does not match {line!r}"
    assert all(len(x) < 500 for x in found) and len(found) <= 10
    assert all(x.isprintable() for x in ran.err.splitlines()), ran.err
    # what the case was is said once: the other lines name further tensors of the same file
    assert cost.written == []
    assert cost.seconds < MOST_SECONDS and cost.bytes < MOST_BYTES
    after = {p: p.lstat().st_mtime_ns for p in at.folder.rglob("*")}
    changed = {p for p in after if after[p] != before.get(p)} - {at.folder, *at.out.rglob("*"), at.out}
    assert changed == set() and before.keys() <= after.keys()
    assert not [p for p in after if p.suffix == ".part"]


# ---------------------------------------------------------------- GGUF


def gguf(change: Callable[[Gguf], Any]) -> Callable[[Place], list[Any]]:
    def make(at: Place) -> list[Any]:
        file = Gguf()
        raw = change(file)
        return ["inspect", at.file("bad.gguf", raw if isinstance(raw, bytes) else file.bytes())]

    return make


def meta(key: str, kind: str, of: Any) -> Callable[[Place], list[Any]]:
    return gguf(lambda f: f.metadata.update({key: value(kind, of)}))


def raw_meta(key: str, raw: bytes) -> Callable[[Place], list[Any]]:
    return gguf(lambda f: f.metadata.update({key: raw}))


def tensor(name: str, column: int, to: Any) -> Callable[[Place], list[Any]]:
    return gguf(lambda f: f.row(name).__setitem__(column, to))


def many_tokens(n: int) -> Callable[[Place], list[Any]]:
    """A GGUF file whose vocabulary has `n` entries, all of them there: empty texts are holes of the file."""

    def make(at: Place) -> list[Any]:
        file = Gguf()
        del file.metadata["tokenizer.ggml.tokens"]
        file.more = text("tokenizer.ggml.tokens") + u32(9) + u32(8) + u64(n)
        file.n_metadata = len(file.metadata) + 1
        path = at.file("bad.gguf", file.bytes())
        os.truncate(path, 8 * n + (1 << 20))
        return ["inspect", path]

    return make


def big_tokenizer(n: int) -> Callable[[Place], None]:
    """tokenizer.json with a vocabulary of `n` entries."""

    def make(at: Place) -> None:
        with (at.model / "tokenizer.json").open("w") as f:
            f.write('{"model": {"type": "BPE", "merges": [], "vocab": {"a": 0')
            for start in range(1, n, 100_000):
                f.write("".join(f',"t{i}":{i}' for i in range(start, min(n, start + 100_000))))
            f.write("}}}")

    return make


GGUF: dict[str, Case] = {
    "ten million tokens": (many_tokens(10_000_000), 2, "'tokenizer.ggml.tokens' claims 10000000 items"),
    "more tensors than bytes": (gguf(lambda f: setattr(f, "n_tensors", 2**60)), 2, "claims .* more than it"),
    "counts that overflow": (gguf(lambda f: setattr(f, "n_metadata", 2**64 - 1)), 2, "claims .* more than"),
    "one tensor too many": (gguf(lambda f: setattr(f, "n_tensors", 13)), 2, r"bad\.gguf: "),
    "version 0": (gguf(lambda f: setattr(f, "version", 0)), 2, "version 0 is not supported"),
    "big endian": (gguf(lambda f: setattr(f, "version", 3 << 24)), 2, "version 50331648 is not"),
    "string of 2^63 bytes": (raw_meta("a", u32(8) + u64(2**63)), 2, "ends inside 'a'"),
    "array of 2^62 numbers": (raw_meta("a", u32(9) + u32(4) + u64(2**62)), 2, "'a' claims 46116860184273"),
    "array of 2^24 strings": (raw_meta("a", u32(9) + u32(8) + u64(2**24)), 2, "'a' claims 16777216 items"),
    "array of 2^22 strings": (raw_meta("a", u32(9) + u32(8) + u64(2**22)), 2, "ends inside 'a'"),
    "arrays in arrays": (
        raw_meta("a", u32(9) + (u32(9) + u64(1)) * 1000),
        2,
        "array of unknown value type 9",
    ),
    "unknown value type": (raw_meta("a", u32(99)), 2, "'a' has unknown value type 99"),
    "key of 70,000 letters": (meta("k" * 70_000, "BOOL", True), 2, "a metadata key is not a name"),
    "key twice": (
        gguf(
            lambda f: (
                setattr(f, "n_metadata", 16),
                setattr(f, "more", text("general.name") + u32(8) + u64(0)),
            )
        ),
        2,
        "'general.name' appears twice",
    ),
    "key that steers a terminal": (raw_meta("\x1b]0;x\x07\n\x1b[2J", u32(77)), 2, r"\\x1b\]0;x\\x07\\n"),
    "tensor name that steers a terminal": (tensor("output", 0, "\x1b[2J"), 4, r"tensor '\\x1b\[2J' is not"),
    "tensor twice": (tensor("output", 0, "output_norm.weight"), 2, "a tensor name appears twice"),
    "tensor without a name": (tensor("output", 0, ""), 2, "a tensor name is not a name"),
    "tensor name that is no text": (tensor("output", 0, b"\xff\xfe"), 2, "a tensor name is not a name"),
    "tensor of no dimension": (tensor("output", 1, []), 2, "'output.weight' has 0 dimensions"),
    "tensor of five dimensions": (tensor("output", 1, [2] * 5), 2, "'output.weight' has 5 dimensions"),
    "tensor of no rows": (tensor("output", 1, [32, 0]), 2, r"impossible shape \(32, 0\)"),
    "tensor of 2^80 items": (tensor("output", 1, [2**40, 2**40]), 2, "beyond the end of the file"),
    "tensor whose size overflows": (tensor("output", 1, [2**32, 2**32, 4, 4]), 2, "beyond the end"),
    "tensor far away": (tensor("output", 3, 2**63), 2, "beyond the end of the file"),
    "tensor beside the alignment": (tensor("output", 3, 5), 2, "beyond the end|lies beside"),
    "tensors on top of each other": (tensor("output", 3, 0), 2, "overlap"),
    "unknown tensor type": (tensor("output", 2, 4711), 2, "type number 4711"),
    "row that fills no block": (tensor("output_norm", 2, 12), 2, "of type Q4_K has the impossible shape"),
    "alignment 0": (meta("general.alignment", "UINT32", 0), 2, "alignment 0 is not a power of two"),
    "alignment 2^31": (meta("general.alignment", "UINT32", 2**31), 2, "alignment 2147483648 is not"),
    "alignment of text": (meta("general.alignment", "STRING", "32"), 2, "alignment '32' is not"),
    "cut in the weights": (gguf(lambda f: f.bytes()[:-100]), 2, "beyond the end of the file"),
    "cut in a key": (gguf(lambda f: f.bytes()[:40]), 2, r"bad\.gguf: claims 12 tensors"),
    "a million layers": (meta("llama.block_count", "UINT32", 10**6), 2, "block_count' is 1000000"),
    "layers that are text": (meta("llama.block_count", "STRING", "many"), 2, "block_count' is 'many'"),
    "heads of 2^31": (
        meta("llama.attention.head_count", "UINT32", 2**31),
        2,
        r"head_count' is \[2147483648\]",
    ),
    "no heads": (meta("llama.attention.head_count", "UINT32", 0), 4, "no layer has attention"),
    "hidden size 0": (meta("llama.embedding_length", "UINT32", 0), 2, "embedding_length' is 0"),
    "eps NaN": (
        meta("llama.attention.layer_norm_rms_epsilon", "FLOAT32", float("nan")),
        2,
        "is nan, expected",
    ),
    "eps below zero": (
        meta("llama.attention.layer_norm_rms_epsilon", "FLOAT32", -1.0),
        2,
        "is -1.0, expected",
    ),
    "theta infinite": (meta("llama.rope.freq_base", "FLOAT32", float("inf")), 2, "freq_base' is inf"),
    "widths of the wrong number": (
        meta("llama.feed_forward_length", "UINT32[]", [64] * 5),
        2,
        "expected a width, or a list of 1",
    ),
    "architecture with a path": (
        meta("general.architecture", "STRING", "../../../etc"),
        4,
        "'../../../etc' is not supported",
    ),
    "architecture of a megabyte": (meta("general.architecture", "STRING", "a" * 10**6), 4, "'aaaa.* is not"),
    "a directory as a file": (
        lambda at: ((at.folder / "bad.gguf").mkdir(), ["inspect", at.folder / "bad.gguf"])[1],
        2,
        r"bad\.gguf/config\.json",
    ),
    "a pipe as a file": (
        lambda at: (os.mkfifo(at.folder / "bad.gguf"), ["inspect", at.folder / "bad.gguf"])[1],
        2,
        r"bad\.gguf",
    ),
    "bench of a cut file": (
        lambda at: ["bench", at.file("bad.gguf", Gguf().bytes()[:-4])],
        2,
        "beyond the end of the file",
    ),
    "bundle of a cut file": (
        lambda at: ["bundle", at.file("bad.gguf", Gguf().bytes()[:-4]), "--out", at.out],
        2,
        "beyond the end of the file",
    ),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, GGUF[name])


# ---------------------------------------------------------------- safetensors


def one(shape: Any, offsets: Any, dtype: Any = "F32", *, data: int = 0) -> bytes:
    return safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(data))


def weights(raw: bytes) -> Callable[[Place], None]:
    return lambda at: at.weights.write_bytes(raw) and None


def two(first: list[int], second: list[int], data: int) -> bytes:
    row = {"dtype": "F32", "shape": [2]}
    return safetensors(
        {"a": {**row, "data_offsets": first}, "b": {**row, "data_offsets": second}}, bytes(data)
    )


def retyped(at: Place) -> None:
    """The header of a good file with another type for one tensor."""
    raw = at.weights.read_bytes()
    at.weights.write_bytes(raw.replace(b'"F32"', b'"I32"', 1))


def with_values(name: str, change: Callable[[Any], Any]) -> Callable[[Place], list[Any]]:
    def make(at: Place) -> list[Any]:
        arrays = load_file(at.weights)
        arrays[name] = np.ascontiguousarray(change(arrays[name].copy()))
        save_file(arrays, at.weights, metadata={"format": "pt"})
        return at.export()

    return make


def spoil(x: Any, to: float) -> Any:
    x.flat[7] = to
    return x


DAMAGED = r"model\.safetensors is damaged or truncated"
SAFETENSORS: dict[str, Case] = {
    "header of 2^63 bytes": (weights(safetensors(b"{}", length=2**63)), 2, "do not hold its header"),
    "header of 101 MB in a file of holes": (
        lambda at: (at.weights.write_bytes(u64(101 << 20)), os.truncate(at.weights, 300 << 20), None)[2],
        2,
        "do not hold its header",
    ),
    "seven bytes": (weights(b"\0" * 7), 2, "7 bytes do not hold"),
    "header that is a list": (weights(safetensors(b"[1,2,3]")), 2, "does not describe tensors"),
    "header that is a number": (weights(safetensors(b"7")), 2, "does not describe tensors"),
    "header cut in a string": (weights(safetensors(b'{"a":{"dty')), 2, "is not JSON"),
    "header of text that is no UTF-8": (weights(safetensors(b'{"\xff":1}')), 2, "is not JSON"),
    "tensor that is a list": (weights(safetensors({"a": [1]})), 2, "does not describe tensors"),
    "offsets missing": (weights(safetensors({"a": {"dtype": "F32", "shape": [1]}})), 2, "does not describe"),
    "one offset": (weights(one([1], [0])), 2, "does not describe tensors"),
    "offsets of text": (weights(one([1], ["0", "4"], data=4)), 2, "does not describe tensors"),
    "offsets backwards": (weights(one([1], [4, 0], data=4)), 2, DAMAGED),
    "offsets below zero": (weights(one([1], [-4, 0])), 2, "does not describe tensors"),
    "offsets of 2^70": (weights(one([2**68], [0, 2**70])), 2, DAMAGED),
    "offset infinite": (
        weights(safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}')),
        2,
        "does not describe tensors",
    ),
    "shape below zero": (weights(one([-1], [0, 4], data=4)), 2, "does not describe tensors"),
    "shape of halves": (weights(one([1.5], [0, 4], data=4)), 2, "does not describe tensors"),
    "shape of text": (weights(one("11", [0, 4], data=4)), 2, "does not describe tensors"),
    "shape that is not the bytes": (weights(one([2**40], [0, 4], data=4)), 2, "'a' does not fill"),
    "shape whose product overflows": (weights(one([2**32, 2**32], [0, 0])), 2, "'a' does not fill"),
    "type that does not exist": (weights(one([1], [0, 4], "F33", data=4)), 2, "'a' has the type 'F33'"),
    "type that is a list": (weights(one([1], [0, 4], [], data=4)), 2, r"'a' has the type \[\]"),
    "tensors on top of each other": (weights(two([0, 8], [4, 12], 12)), 2, "overlap"),
    "the same bytes twice": (weights(two([0, 8], [0, 8], 8)), 2, "overlap"),
    "a hole between tensors": (weights(two([0, 8], [16, 24], 24)), 2, "overlap or leave a hole"),
    "bytes behind the last tensor": (weights(one([1], [0, 4], data=400)), 2, "its header says"),
    "name twice": (
        weights(safetensors(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}')),
        2,
        "'a' appears twice",
    ),
    "a name that steers a terminal": (
        weights(safetensors({"\x1b[2J": {"dtype": "?", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))),
        2,
        r"'\\x1b\[2J' has the type",
    ),
    "whole numbers": (lambda at: (retyped(at), at.export())[1], 2, "is torch.int32, expected floating point"),
    "NaN": (
        with_values("model.layers.0.mlp.up_proj.weight", lambda x: spoil(x, np.nan)),
        6,
        "up_proj.weight holds values that are not finite",
    ),
    "infinity": (
        with_values("model.norm.weight", lambda x: spoil(x, np.inf)),
        6,
        "model.norm.weight holds values that are not finite",
    ),
    "tensor of no rows": (with_values("model.norm.weight", lambda x: x[:0]), 2, r"has shape \[0\], config"),
    "tensor of one row": (with_values("model.norm.weight", lambda x: x[:1]), 2, r"has shape \[1\], config"),
    "a pipe": (lambda at: (at.weights.unlink(), os.mkfifo(at.weights), None)[2], 2, "is not a plain file"),
    "an endless device": (
        lambda at: (at.weights.unlink(), at.weights.symlink_to("/dev/zero"), None)[2],
        2,
        "is not a plain file",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, SAFETENSORS[name])


# ---------------------------------------------------------------- shards


def index(of: Any) -> Callable[[Place], None]:
    return lambda at: (
        at.file("model/model.safetensors.index.json", of if isinstance(of, bytes) else json.dumps(of)),
        None,
    )[1]


def mapped(name: Any) -> Callable[[Place], None]:
    def make(at: Place) -> None:
        names = dict.fromkeys(load_file(at.weights), "model.safetensors")
        index({"weight_map": {**names, "model.norm.weight": name}})(at)

    return make


def only(name: str) -> Callable[[Place], None]:
    return lambda at: (at.weights.unlink(), at.file(f"model/{name}", b"\x80\x04cos\nsystem\n"), None)[2]


SHARDS: dict[str, Case] = {
    "missing": (mapped("model-00002-of-00002.safetensors"), 2, "shard .*00002.safetensors is missing"),
    "above the folder": (mapped("../../secret.safetensors"), 2, "is not a plain .safetensors file name"),
    "of 5,000 letters": (mapped("a" * 5000 + ".safetensors"), 2, "is not a plain .safetensors file name"),
    "absolute": (mapped("/etc/passwd"), 2, "is not a plain .safetensors file name"),
    "in a folder": (mapped("a/b.safetensors"), 2, "is not a plain"),
    "with a NUL": (mapped("model\0.safetensors"), 2, "is missing|is not a plain"),
    "that is the index": (mapped("model.safetensors.index.json"), 2, "is not a plain .safetensors"),
    "that is a number": (mapped(7), 2, "shard name 7 is not a plain"),
    "that is a list": (mapped(["model.safetensors"]), 2, "is not a plain"),
    "that does not hold it": (
        lambda at: (at.file("model/b.safetensors", one([1], [0, 4], data=4)), mapped("b.safetensors")(at))[1],
        2,
        "which does not hold it",
    ),
    "that is a folder": (
        lambda at: ((at.model / "b.safetensors").mkdir(), mapped("b.safetensors")(at))[1],
        2,
        "shard .* is missing",
    ),
    "that links to itself": (
        lambda at: ((at.model / "b.safetensors").symlink_to("b.safetensors"), mapped("b.safetensors")(at))[1],
        2,
        "shard .* is missing",
    ),
    "the same tensor in two": (
        lambda at: shutil.copy(at.weights, at.model / "model-2.safetensors"),
        2,
        "is in model.safetensors and in model-2.safetensors",
    ),
    "no map": (index({"metadata": {}}), 2, "has no 'weight_map'"),
    "a map that is a list": (index({"weight_map": ["a"]}), 2, "has no 'weight_map'"),
    "an index of brackets": (index(b"[" * 200_000), 2, "cannot read .*index.json"),
    "an index that is a pipe": (
        lambda at: (os.mkfifo(at.model / "model.safetensors.index.json"), None)[1],
        2,
        "is not a plain file",
    ),
    "only a .bin": (only("pytorch_model.bin"), 2, "holds only pytorch_model.bin, a pickle"),
    "only a .pt": (only("model.pt"), 2, "holds only model.pt, a pickle"),
    "nothing": (lambda at: at.weights.unlink(), 2, "holds no .safetensors file"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, SHARDS[name])


# ---------------------------------------------------------------- config.json


def config(**over: Any) -> Callable[[Place], None]:
    return lambda at: at.json("config.json", **over)


def whole_config(raw: str | bytes) -> Callable[[Place], None]:
    return lambda at: (at.file("model/config.json", raw), None)[1]


CONFIG: dict[str, Case] = {
    "layers 10^12": (config(num_hidden_layers=10**12), 4, "'num_hidden_layers' is 1000000000000, beyond"),
    "hidden 2^62": (config(hidden_size=2**62), 4, "'hidden_size' is 4611686018427387904, beyond"),
    "vocabulary 10^15": (config(vocab_size=10**15), 4, "'vocab_size' is 1000000000000000, beyond"),
    "number of 5,000 digits": (
        lambda at: at.file(
            "model/config.json",
            (at.model / "config.json")
            .read_text()
            .replace('"hidden_size": 64', '"hidden_size": ' + "9" * 5000),
        ),
        2,
        "cannot read .*config.json",
    ),
    "hidden infinite": (config(hidden_size=float("inf")), 4, "'hidden_size'"),
    "hidden NaN": (config(hidden_size=float("nan")), 4, "'hidden_size'"),
    "hidden true": (config(hidden_size=True), 4, "'hidden_size' is True"),
    "hidden a list": (config(hidden_size=[64] * 10**5), 4, "'hidden_size' is"),
    "hidden below zero": (config(hidden_size=-64), 4, "'hidden_size' is -64"),
    "heads 0": (config(num_attention_heads=0), 4, "'num_attention_heads' is 0"),
    "heads a half": (config(num_attention_heads=2.5), 4, "'num_attention_heads' is 2.5"),
    "more KV heads than heads": (config(num_key_value_heads=3), 4, "cannot be shared by 3 KV heads"),
    "head size 0": (config(head_dim=0), 4, "'head_dim'"),
    "eps NaN": (config(rms_norm_eps=float("nan")), 4, "'rms_norm_eps' is nan"),
    "family with a path": (config(model_type="../../tmp/evil"), 4, "'../../tmp/evil' is not supported"),
    "family that is a module": (config(model_type="base"), 4, "family 'base' is not supported"),
    "family that is private": (config(model_type="_gguf"), 4, "family '_gguf' is not supported"),
    "family with dots": (config(model_type="llama.os"), 4, "family 'llama.os' is not supported"),
    "family that is a table": (config(model_type={"a": 1}), 4, r"family \{'a': 1\} is not supported"),
    "family of a megabyte": (config(model_type="x" * 10**6), 4, "model family 'xxx"),
    "layer list too short": (config(**{LAYERS: [[4, 2, 128]]}), 4, "must list"),
    "layer list of text": (config(**{LAYERS: "wide"}), 4, "must list"),
    "layer list below zero": (config(**{LAYERS: [[4, 2, -1]] * 3}), 4, "must list"),
    "layer list of 2^62": (config(**{LAYERS: [[4, 2, 2**62]] * 3}), 4, "must list"),
    "a list": (whole_config("[]"), 2, "does not hold a JSON object"),
    "empty": (whole_config(""), 2, "cannot read .*config.json"),
    "no UTF-8": (whole_config(b"\xff\xfe{}"), 2, "cannot read .*config.json"),
    "brackets": (whole_config(b'{"a":' * 100_000), 2, "cannot read .*config.json"),
    "an empty table": (whole_config("{}"), 4, "model family None is not supported"),
    "300 MB of holes": (
        lambda at: os.truncate(at.model / "config.json", 300 << 20),
        2,
        "more than 64 MiB",
    ),
    "a pipe": (
        lambda at: ((at.model / "config.json").unlink(), os.mkfifo(at.model / "config.json"), None)[2],
        2,
        "is not a plain file",
    ),
    "an endless device": (
        lambda at: (
            (at.model / "config.json").unlink(),
            (at.model / "config.json").symlink_to("/dev/zero"),
            None,
        )[2],
        2,
        "is not a plain file",
    ),
    "a link to itself": (
        lambda at: (
            (at.model / "config.json").unlink(),
            (at.model / "config.json").symlink_to("config.json"),
            None,
        )[2],
        2,
        r"cannot read .*config\.json",
    ),
}


@pytest.mark.parametrize("name", CONFIG)
def test_config(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, CONFIG[name])


# ---------------------------------------------------------------- tokenizers


def tok(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], None]:
    return lambda at: at.tokenizer(change)


def exported(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], list[Any]]:
    """The same for what only GGUF refuses: inspect goes on."""

    def make(at: Place) -> list[Any]:
        at.tokenizer(change)
        return at.export()

    return make


def deep(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    for _ in range(depth):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


TOKENIZER: dict[str, Case] = {
    "ten million tokens": (big_tokenizer(10_000_000), 2, r"tokenizer\.json has more than 64 MiB"),
    "300 MB of holes": (
        lambda at: os.truncate(at.model / "tokenizer.json", 300 << 20),
        2,
        "tokenizer.json has more than",
    ),
    "an id of 2^40": (tok(lambda t: t["model"]["vocab"].update(far=2**40)), 2, r"tokenizer\.json: "),
    "an id below zero": (tok(lambda t: t["model"]["vocab"].update(low=-5)), 2, r"tokenizer\.json: "),
    "an id of text": (tok(lambda t: t["model"]["vocab"].update(a="1")), 2, r"tokenizer\.json: "),
    "an id that is a half": (tok(lambda t: t["model"]["vocab"].update(half=7.5)), 2, r"tokenizer\.json: "),
    "a vocabulary that is a list": (tok(lambda t: t["model"].update(vocab=["a"])), 2, r"tokenizer\.json: "),
    "an empty vocabulary": (
        tok(lambda t: (t["model"].update(vocab={}), t.update(added_tokens=[]))),
        2,
        r"tokenizer\.json: ",
    ),
    "more tokens than rows": (
        tok(lambda t: t["model"]["vocab"].update({f"x{i}": 300 + i for i in range(100)})),
        2,
        "has 400 tokens, but the model's embedding has 300 rows",
    ),
    "merges of numbers": (tok(lambda t: t["model"].update(merges=[1, 2])), 2, r"tokenizer\.json: "),
    "merges of unknown tokens": (
        tok(lambda t: t["model"]["merges"].append(["nowhere", "here"])),
        2,
        r"tokenizer\.json: .*",
    ),
    "merges that are a table": (tok(lambda t: t["model"].update(merges={"a": 1})), 2, r"tokenizer\.json: "),
    "added tokens that are text": (tok(lambda t: t.update(added_tokens="abc")), 2, r"tokenizer\.json: "),
    "an added token of 2^31": (
        tok(lambda t: t["added_tokens"].append({"id": 2**31, "content": "z", "special": True})),
        2,
        "but the model's embedding has 300 rows",
    ),
    "an added token without content": (tok(lambda t: t["added_tokens"].append({"id": 3})), 2, "damaged"),
    "a pre-tokenizer that is text": (tok(lambda t: t.update(pre_tokenizer="ByteLevel")), 2, "damaged"),
    "a pre-tokenizer in 400 others": (
        tok(lambda t: t.update(pre_tokenizer=deep(400))),
        2,
        r"tokenizer\.json",
    ),
    "a sequence without children": (
        tok(lambda t: t.update(pre_tokenizer={"type": "Sequence"})),
        2,
        "damaged",
    ),
    "a pattern that never ends": (
        exported(
            lambda t: t.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            )
        ),
        4,
        "no GGUF name is known for this pre-tokenizer",
    ),
    "a post-processor that knows none of its tokens": (
        tok(
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                    "special_tokens": {},
                }
            )
        ),
        2,
        r"tokenizer\.json: no entry found for key",
    ),
    "another kind": (exported(lambda t: t["model"].update(type="WordLevel")), 4, "not a BPE tokenizer"),
    "a model that is a list": (exported(lambda t: t.update(model=[])), 4, "not a BPE tokenizer"),
    "settings that are a list": (
        lambda at: at.file("model/tokenizer_config.json", "[]"),
        2,
        "tokenizer_config.json",
    ),
    "a template that is no text": (
        lambda at: at.file("model/chat_template.jinja", b"\xff\xfe\xff"),
        2,
        "chat_template.jinja",
    ),
    "a template of 300 MB": (
        lambda at: (
            at.file("model/chat_template.jinja", b""),
            os.truncate(at.model / "chat_template.jinja", 300 << 20),
        ),
        2,
        "chat_template.jinja has more than",
    ),
    "a SentencePiece file of noise": (
        lambda at: (
            (at.model / "tokenizer.json").unlink(),
            at.file("model/tokenizer.model", b"\x0a\xff\xff\xff\xff\x7f" * 9),
        ),
        2,
        "tokenizer.model: not a SentencePiece model",
    ),
}


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizer(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, TOKENIZER[name])


# ---------------------------------------------------------------- what else is read


def plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], list[Any]]:
    def make(at: Place) -> list[Any]:
        plain = json.loads((at.made / "plan.json").read_text())
        change(plain)
        path = at.file("plan.json", json.dumps(plain))
        return ["prune", at.model, "--plan", path, "--out", at.out / "pruned"]

    return make


def kept(units: Any, axis: str = "layers.1.ffn") -> Callable[[Place], list[Any]]:
    return plan(lambda p: p["kept"].update({axis: units}))


def bundle(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], list[Any]]:
    """A bundle whose manifest was changed by somebody who knows its form."""

    def make(at: Place) -> list[Any]:
        from edgeprune.bundle import manifest

        root = at.file("bundle/a.bin", "aaaa").parent
        at.file("secret", "secret")
        manifest.write(root, {"parent": {"id": "x", "license": None}})
        plain = json.loads((root / manifest.FILE_NAME).read_text())
        change(plain)
        plain["digest"] = manifest._digest(plain)
        (root / manifest.FILE_NAME).write_text(manifest._render(plain))
        return ["verify", root]

    return make


def row(**over: Any) -> Callable[[Place], list[Any]]:
    return bundle(lambda m: m["files"][0].update(over))


def board(raw: str | bytes) -> Callable[[Place], list[Any]]:
    return lambda at: ["targets", "show", at.file("board.toml", raw)]


def texts(raw: str | bytes, name: str = "a.jsonl") -> Callable[[Place], list[Any]]:
    return lambda at: [
        *("score", at.model, "--metric", "wanda-sp", "--samples", "2", "--length", "16"),
        *("--calibration", at.file(name, raw), "--out", at.out / "s.safetensors"),
    ]


FILES: dict[str, Case] = {
    "plan with a unit beyond": (kept([0, 10**6]), 2, "'layers.1.ffn' does not list units of this model"),
    "plan with a unit below zero": (kept([-1, 0]), 2, "'layers.1.ffn' does not list units"),
    "plan with a unit twice": (kept([1, 1]), 2, "'layers.1.ffn' does not list units"),
    "plan with a unit of 2^70": (kept([2**70]), 2, "'layers.1.ffn' does not list units"),
    "plan with half a unit": (kept([0.5]), 2, "expected int, found 0.5"),
    "plan with an axis of another model": (kept([0], "layers.99.ffn"), 2, "'layers.99.ffn' does not list"),
    "plan with a path for an axis": (kept([0], "../../x"), 2, "'../../x' does not list units"),
    "plan of other sizes": (plan(lambda p: p["dims"].update(hidden=4096)), 2, "made for another model"),
    "plan of an older schema": (plan(lambda p: p.update(schema=0)), 2, "written with another schema"),
    "plan of a later schema": (plan(lambda p: p.update(schema=99)), 2, "written with another schema"),
    "plan that is another record": (plan(lambda p: p.update(kind="budget")), 2, "not a prune_plan record"),
    "plan with infinity": (plan(lambda p: p.update(ratio=float("inf"))), 2, "expected a finite number"),
    "plan of brackets": (
        lambda at: ["prune", at.model, "--plan", at.file("p.json", "[" * 10**5), "--out", at.out / "x"],
        2,
        "p.json: not JSON",
    ),
    "scores that were changed": (
        lambda at: (
            shutil.copy(at.made / "scores.json", at.folder / "s.json"),
            [
                *("plan", at.model, "--scores", at.file("s.safetensors", one([1], [0, 4], data=4))),
                *("--ratio", "0.2", "--out", at.out / "p.json"),
            ],
        )[1],
        2,
        "is not the file that",
    ),
    "manifest that leaves the bundle": (row(path="../secret"), 2, "'../secret' leaves the bundle"),
    "manifest with an absolute path": (row(path="/etc/passwd"), 2, "'/etc/passwd' is an absolute path"),
    "manifest with a drive": (row(path="C:/x"), 2, "'C:/x' is an absolute path"),
    "manifest without a digest of a file": (
        bundle(lambda m: m["files"][0].pop("sha256")),
        2,
        "a.bin: its sha256 is not the listed one",
    ),
    "manifest with half a character": (
        lambda at: (
            args := row()(at),
            (args[1] / "manifest.json").write_text(
                (args[1] / "manifest.json").read_text().replace("a.bin", "a\\udcff")
            ),
        )[0],
        2,
        "manifest.json: changed since it was written",
    ),
    "manifest with sizes of text": (row(bytes="4"), 2, "an entry of 'files' is no file"),
    "manifest of an older schema": (
        bundle(lambda m: m.update(schema=0)),
        2,
        "schema 0, this edgeprune reads",
    ),
    "target of brackets": (board("a = " + "[" * 10**5), 2, "board.toml: not valid TOML"),
    "target with a number of 5,000 digits": (board("a = " + "9" * 5000), 2, "board.toml: not valid TOML"),
    "target of 2 MB": (board("#" * (2 << 20)), 2, "board.toml: too large for a data file"),
    "target that is no text": (board(b"title = '\xff'"), 2, "board.toml: not UTF-8 text"),
    "target with a key that steers": (board('"\\u001b[2J" = 1'), 2, r"unknown key '\\x1b\[2J'"),
    "calibration of numbers": (texts('{"text": 5}\n'), 2, "a.jsonl:1: no 'text' string"),
    "calibration of brackets": (texts("[" * 10**5), 2, "a.jsonl:1: not JSON"),
    "calibration that is no text": (texts(b"\xff\xfe" * 99, "a.txt"), 2, "cannot read text file"),
    "calibration of nothing": (texts(" \n", "a.txt"), 2, "a.txt is empty"),
    "calibration that is a device": (
        lambda at: ["score", at.model, "--calibration", "/dev/zero", "--out", at.out / "s.safetensors"],
        2,
        "/dev/zero does not exist or is not a file",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files(run_cli: Callable[..., Any], at: Place, name: str) -> None:
    check(run_cli, at, FILES[name])


def test_the_corpus_is_large_enough() -> None:
    assert sum(map(len, (GGUF, SAFETENSORS, SHARDS, CONFIG, TOKENIZER, FILES))) >= 180


def test_code_beside_a_model_is_never_run(run_cli: Callable[..., Any], at: Place) -> None:
    """auto_map in both files, and modules that would leave a mark."""
    from edgeprune import tokenizer

    evil = f"import pathlib\npathlib.Path({str(at.folder / 'pwned')!r}).touch()\n"
    at.file("model/modeling_evil.py", evil)
    maps = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    at.json("config.json", auto_map=maps)
    at.json("tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", "modeling_evil.T"]})
    assert run_cli(*at.export()).code == 0
    ran = run_cli("score", at.model, "--metric", "magnitude", "--out", at.out / "s.safetensors")
    assert ran.code == 0, ran.err
    assert tokenizer.encode(at.model, "the fox")
    assert not (at.folder / "pwned").exists()
