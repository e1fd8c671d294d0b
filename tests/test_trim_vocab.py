# ruff: noqa: RUF001 (letters of many alphabets)
"""A trimmed vocabulary: the same tokens for its text, every other text still written, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import llama_cpp as llama_cpp_library
import numpy as np
import torch
from builders import logits, tiny_llama, tiny_model_with_tokenizer
from candidates import small_profile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_end_to_end import command, events, finished, report_of, start
from test_tokenizer import CORPUS, NASTY, llama_ids, train_bpe, train_json_bpe, train_sentencepiece

import edgeprune
from edgeprune import languages, records, rundir, tokenizer, vocabulary
from edgeprune.costs.gguf_header import KeyValue, read_header
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.pipeline import trimming
from edgeprune.pipeline.parent import open_parent
from edgeprune.progress import Silent
from edgeprune.records import LaunchFlags, VocabTrimming
from edgeprune.runtimes import llama_cpp

TEXT = CORPUS[0] + "\n\n" + CORPUS[3] + "\nAgain, the lazy fox.\n"
KINDS = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "json-llama", "json-gemma", "sentencepiece"]


def make_tokenizer(folder: Path, kind: str) -> Path:
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
        train_sentencepiece(folder)
        (folder / "config.json").write_text(json.dumps({"vocab_size": 464, "bos_token_id": 1}))
        return folder
    if kind.startswith("json-"):
        return train_json_bpe(folder, kind.removeprefix("json-"))
    return train_bpe(folder, kind)


class Trimmed:
    """A tokenizer before and after; `after` is what write_folder makes."""

    def __init__(self, tmp_path: Path, kind: str, text: str = TEXT, codes: tuple[str, ...] = ()) -> None:
        root = make_tokenizer(tmp_path / "hf", kind)
        self.kvs = tokenizer.kvs_from_hf(root)
        self.before = root
        if not (root / "tokenizer.json").is_file():
            self.before = tmp_path / "json"
            self.before.mkdir()
            tokenizer.write_hf(self.kvs, self.before)
        self.of = vocabulary.Vocabulary(self.before, self.kvs)
        config = json.loads((root / "config.json").read_text())
        self.choice = vocabulary.choose(self.of, [text] if text else [], codes, [config])
        self.kept = self.choice.kept
        self.after = tmp_path / "after"
        self.after.mkdir()
        vocabulary.write_folder(self.of, self.kept, root, self.after)
        self.new_kvs = vocabulary.trim_kvs(self.kvs, self.kept)

    def ids(self, text: str) -> list[int]:
        """Ids of the trimmed tokenizer, as the parent's."""
        return [self.kept[i] for i in tokenizer.encode(self.after, text)]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_the_corpus_is_cut_up_as_before(tmp_path: Path, kind: str) -> None:
    made = Trimmed(tmp_path, kind)
    assert len(made.kept) < len(made.of.tokens)
    for text in (TEXT, *TEXT.splitlines(), CORPUS[0], "the lazy fox"):
        assert made.ids(text) == tokenizer.encode(made.before, text), text
    # llama.cpp, from its own metadata, with and without the trimming
    theirs = llama_ids(made.new_kvs, tmp_path / "a.gguf", [TEXT, CORPUS[3]])
    before = llama_ids(made.kvs, tmp_path / "b.gguf", [TEXT, CORPUS[3]])
    assert [[made.kept[i] for i in row] for row in theirs] == before


@pytest.mark.parametrize("kind", KINDS)
def test_both_runtimes_agree_on_any_other_text(tmp_path: Path, kind: str) -> None:
    made = Trimmed(tmp_path, kind)
    texts = [t for t in NASTY if t]
    for text, expected in zip(texts, llama_ids(made.new_kvs, tmp_path / "a.gguf", texts), strict=True):
        assert tokenizer.encode(made.after, text) == expected, text
    # and the metadata made from the folder alone is the same tokenizer
    (made.after / "config.json").write_text(
        json.dumps({"vocab_size": len(made.kept), "bos_token_id": made.kept.index(1)})
    )
    again = tokenizer.kvs_from_hf(made.after)
    assert llama_ids(again, tmp_path / "b.gguf", texts) == llama_ids(made.new_kvs, tmp_path / "c.gguf", texts)


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe", "json-gemma", "json-llama"])
def test_any_text_is_encoded_and_comes_back(tmp_path: Path, kind: str) -> None:
    made = Trimmed(tmp_path, kind)
    before = tokenizer.load(made.before / "tokenizer.json")
    after = tokenizer.load(made.after / "tokenizer.json")

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def check(text: str) -> None:
        ids = after.encode(text, add_special_tokens=False).ids
        assert all(0 <= i < len(made.kept) for i in ids)
        whole = before.encode(text, add_special_tokens=False).ids
        assert after.decode(ids, skip_special_tokens=False) == before.decode(whole, skip_special_tokens=False)
        if kind in ("gpt-2", "llama-bpe"):
            assert after.decode(ids, skip_special_tokens=False) == text
        assert len(ids) >= len(whole)

    check()


def test_what_always_stays(tmp_path: Path) -> None:
    made = Trimmed(tmp_path, "gpt-2")
    left = {made.of.tokens[i] for i in made.kept}
    alphabet = set(vocabulary._BYTE_OF)
    assert len(alphabet) == 256 and alphabet <= left
    assert {"<|im_start|>", "<|im_end|>"} <= left
    assert len(made.kept) % vocabulary.ROWS_MULTIPLE == 0
    assert list(made.kept) == sorted(set(made.kept))
    assert sum(made.choice.why.values()) == len(made.kept)
    # every token that stays can still be made: its parts are there
    ids = made.of.ids
    for token in left:
        assert made.of.parts(token) <= left, token
    # padding rows of the embedding go
    assert max(made.kept) < len(ids) <= 600 < len(made.of.tokens) == 640


def test_parts_of_a_token_by_hand(tmp_path: Path) -> None:
    data = {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "ca": 6, "cb": 7},
            "merges": ["b c", "a b", "a bc", "ab c", "c a"],
        },
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    kvs = [
        KeyValue("tokenizer.ggml.model", "STRING", "gpt2"),
        KeyValue("tokenizer.ggml.tokens", "ARRAY", ("a", "b", "c", "ab", "bc", "abc", "ca", "cb"), "STRING"),
        KeyValue("tokenizer.ggml.merges", "ARRAY", ("b c", "a b", "a bc", "ab c", "c a"), "STRING"),
        KeyValue("tokenizer.ggml.eos_token_id", "UINT32", 7),
        KeyValue("tokenizer.ggml.padding_token_id", "UINT32", 3),
        KeyValue("tokenizer.huggingface.json", "STRING", "{}"),
    ]
    of = vocabulary.Vocabulary(tmp_path, kvs)
    assert of.parts("abc") == {"a", "b", "c", "bc", "abc"}  # 'b c' comes first, so 'ab' is never passed
    assert of.parts("cb") == set()  # no merge makes it
    assert of.used("abc") == {5} and of.used("abab") == {3}
    new = {kv.key.rpartition(".")[2]: kv.value for kv in vocabulary.trim_kvs(kvs, [0, 1, 2, 4, 5, 7])}
    assert new == {
        "model": "gpt2",
        "tokens": ("a", "b", "c", "bc", "abc", "cb"),
        "merges": ("b c", "a bc"),
        "eos_token_id": 5,
    }


def test_ids_in_configs_follow() -> None:
    config = {
        "vocab_size": 9,
        "bos_token_id": 4,
        "eos_token_id": [4, 6, 7],
        "pad_token_id": 3,
        "suppress_tokens": [1, 6],
        "num_hidden_layers": 6,
        "image_token_index": 6,
        "nested": {"eos_token_id": 7},
    }
    assert vocabulary.remap(config, [0, 4, 6, 7]) == {
        "vocab_size": 9,
        "bos_token_id": 1,
        "eos_token_id": [1, 2, 3],
        "pad_token_id": None,
        "suppress_tokens": [2],
        "num_hidden_layers": 6,
        "image_token_index": 2,
        "nested": {"eos_token_id": 3},
    }


@given(st.sets(st.integers(0, 300)))
def test_runs_come_back(ids: set[int]) -> None:
    assert vocabulary.read_runs(vocabulary.write_runs(sorted(ids))) == tuple(sorted(ids))


def test_runs_by_hand() -> None:
    assert vocabulary.write_runs([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    with pytest.raises(ConfigError, match="not written as"):
        vocabulary.read_runs("0-2,x")


def test_a_long_text_in_pieces_uses_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{line} {i}. So\n\n{line.upper()},\n" for i, line in enumerate(CORPUS * 3)]
    text = "".join(lines)
    for kind in ("gpt-2", "qwen2", "json-gemma", "json-llama"):
        (tmp_path / kind).mkdir()
        of = Trimmed(tmp_path / kind, kind).of
        whole = of.used(text)
        monkeypatch.setattr(vocabulary, "_PIECE", 100)
        pieces = list(of._pieces(text))
        # in the tiny SentencePiece vocabularies tokens reach over the end of a line: one piece
        assert len(pieces) > 5 if of.byte_level else pieces == [text]
        assert whole <= of.used(text), kind
        monkeypatch.undo()


def test_free_places_go_and_the_template_stays(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = make_tokenizer(tmp_path / "hf", "gpt-2")
    path = folder / "tokenizer.json"
    tok = Tokenizer.from_file(str(path))
    tok.add_special_tokens(["<unused7>", "<|reserved_special_token_12|>", "<|think|>", "<special_9>"])
    tok.save(str(path))
    settings_path = folder / "tokenizer_config.json"
    named = json.loads(settings_path.read_text())
    named |= {
        "chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['role'] }} number {{ m['content'] }}"
        "{% endfor %}{{ '<special_9>' }}",
        "additional_special_tokens": ["<unused7>", "<|think|>"],
    }
    settings_path.write_text(json.dumps(named))
    kvs = tokenizer.kvs_from_hf(folder)
    of = vocabulary.Vocabulary(folder, kvs)
    kept = vocabulary.choose(of, ["fox"], (), [{}]).kept
    left = {of.tokens[i] for i in kept}
    assert {"<|think|>", "<special_9>"} <= left
    assert not {"<unused7>", "<|reserved_special_token_12|>"} & left
    assert of.used(" number") <= set(kept) and len(of.used(" number")) < len(" number")
    (tmp_path / "after").mkdir()
    vocabulary.write_folder(of, kept, folder, tmp_path / "after")
    written = json.loads((tmp_path / "after" / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<|think|>"]
    transformers = pytest.importorskip("transformers")
    (tmp_path / "after" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "after")
    assert len(auto) == len(kept) and auto.eos_token_id == kept.index(1)


def test_unigram_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    kvs = [KeyValue("tokenizer.ggml.model", "STRING", "t5")]
    with pytest.raises(UnsupportedModelError, match="vocabulary of a Unigram tokenizer cannot be trimmed"):
        vocabulary.Vocabulary(tmp_path, kvs)


# ---------------------------------------------------------------- languages


@pytest.mark.parametrize(
    ("codes", "yes", "no"),
    [
        (
            "en",
            ["The 3 cats, naively: 99% of \u201cit\u201d \U0001f680", "caf"],
            ["café", "Katze ß", "да", "猫", "هر"],
        ),
        ("de", ["Größe Übermut STRAẞE", "x = 1;"], ["garçon", "señor", "да"]),
        ("en,fr", ["garçon œuvre ÉTÉ"], ["señor", "ö"]),
        ("ru", ["Паром ёлка 12"], ["ferry", "їжак"]),
        ("uk,en", ["їжак ferry"], ["ёлка"]),
        ("zh", ["猫。渡轮，"], ["cat", "フェリー", "배"]),
        ("ja", ["フェリーは猫"], ["배", "cat"]),
        ("ko", ["배가 떠나서"], ["猫"]),
        ("hi", ["नाव साढ़े"], ["নৌকা"]),
        ("ar", ["العبارة في"], ["פרה"]),
        ("tr", ["İstanbul ığdır"], ["señor"]),
    ],
)
def test_alphabets(codes: str, yes: list[str], no: list[str]) -> None:
    alphabet = languages.Alphabet(languages.parse(codes))
    assert [t for t in yes if not alphabet.writes(t)] == []
    assert [t for t in no if alphabet.writes(t)] == []


def test_unknown_languages_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        languages.parse("en,xx,qq")
    assert list(caught.value.problems) == ["unknown language 'qq'", "unknown language 'xx'"]
    with pytest.raises(ConfigError, match="no language"):
        languages.parse(" , ")


@pytest.mark.parametrize("code", [c for c in languages.SAMPLES if c != "code"])
def test_each_sample_is_written_in_its_own_letters(code: str) -> None:
    assert languages.Alphabet((code,)).writes(languages.SAMPLES[code])


def test_languages_keep_their_own_tokens(tmp_path: Path) -> None:
    made = Trimmed(tmp_path, "gpt-2", text="", codes=("en",))
    left = {made.of.tokens[i] for i in made.kept}
    assert "\u0120again" in left and made.choice.why["languages"] > 100
    assert made.ids("the lazy fox jumps again") == tokenizer.encode(made.before, "the lazy fox jumps again")
    gone = {made.of.tokens[i] for i in made.of.ids.values()} - left
    assert gone and all(not vocabulary_text(made.of, t).isascii() for t in gone)


def vocabulary_text(of: vocabulary.Vocabulary, token: str) -> str:
    text = of._text(token)
    return "\u00ff" if text is None else text


# ---------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama of 600 tokens."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama(folder, vocab=640, hidden=64, heads=4, kv_heads=2, ff=128, layers=2)
    train_bpe(folder / "tok", "gpt-2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tok" / name).rename(folder / name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 0, "eos_token_id": [1, 599], "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join([TEXT, *(f"{CORPUS[3]} {i}" for i in range(40))]), encoding="utf-8")
    return path


def test_logits_of_kept_rows_are_the_same_bits(model: Path, text: Path, tmp_path: Path) -> None:
    with rundir.RunDir(tmp_path / "run") as run:
        parent = open_parent(str(model), run)
        new = trimming.trim(run, parent, trimming.Trim((str(text),)), Silent())
        record = new.vocabulary
        assert record is not None and new.key != parent.key
        kept = vocabulary.read_runs(record.kept)
        assert (record.rows_before, record.rows_after) == (640, len(kept))
        assert record.params_removed == 2 * (640 - len(kept)) * 64
        assert record.bytes_removed == 4 * record.params_removed
        assert new.source.config["eos_token_id"][0] == kept.index(1)
        ids = tokenizer.encode(parent.folder, TEXT)[:60]
        mine = tokenizer.encode(new.folder, TEXT)[:60]
        before = logits(edgeprune.load(model), ids)
        after = logits(edgeprune.load(new.folder), mine)
        assert np.array_equal(after, before[:, list(kept)])
        # the same again is found, not made
        n = len(events(tmp_path / "run"))
        again = trimming.trim(run, parent, trimming.Trim((str(text),)), Silent())
        assert again.key == new.key
        assert [e["event"] for e in events(tmp_path / "run")[n:]] == ["skip"]
        other = trimming.trim(run, parent, trimming.Trim((str(text), "languages:en")), Silent())
        assert other.key != new.key and other.graph.dims.vocab >= new.graph.dims.vocab


def test_trimming_alone(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "trimmed"
    ran = run_cli("prune", model, "--ratio", "0", "--trim-vocab", text, "--out", out, "--format", "json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    record = records.loads(VocabTrimming, (out / trimming.RECORD_FILE).read_text())
    kept = list(vocabulary.read_runs(record.kept))
    figures = said["vocabulary"]
    assert (figures["tokens_before"], figures["tokens_after"]) == (640, len(kept))
    assert said["ratio"] == 0 and "scores" not in said
    assert said["parameters_before"] - said["parameters"] == record.params_removed
    assert said["ratio_all"] == pytest.approx(record.params_removed / said["parameters_before"])
    grown = {row["text"]: row["percent"] for row in figures["growth"]}
    assert (
        set(grown) == set(languages.SAMPLES) and all(p >= 0 for p in grown.values()) and max(grown.values())
    )
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in after.items():
        expected = before[name][kept] if name.startswith(("model.embed", "lm_head")) else before[name]
        assert torch.equal(tensor, expected), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto = AutoTokenizer.from_pretrained(out)
    assert auto(TEXT, add_special_tokens=False)["input_ids"] == [
        kept.index(i) for i in tokenizer.encode(model, TEXT)
    ]
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(kept)


def test_pruned_and_trimmed(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    ran = run_cli(
        *("prune", model, "--ratio", "0.3", "--metric", "magnitude", "--allocator", "uniform"),
        *("--width-multiple", "32", "--compensation", "none", "--trim-vocab", text, "--trim-check", text),
        *("--out", out),
    )
    assert ran.code == 0, ran.err
    assert "corpus.txt +0.0%" in ran.out  # the text itself does not grow
    loaded = edgeprune.load(out)
    plan = json.loads((out / "edgeprune_plan.json").read_text())
    assert plan["ratio"] > 0.2 and plan["dims"]["vocab"] == loaded.config.vocab_size < 640


def file_logits(path: Path, ids: list[int], out: Path) -> np.ndarray:
    flags = LaunchFlags(
        context_tokens=max(len(ids), 32), ubatch=64, kv_type="f32", mmap=True, flash_attention=False
    )
    return np.array(llama_cpp.logits(path, np.array([ids], np.int32), out, flags=flags, threads=1))[0]


def test_gguf_has_the_predicted_bytes_and_the_same_logits(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    whole, small = tmp_path / "whole.gguf", tmp_path / "small.gguf"
    assert run_cli("export", model, "--quantization", "F32", "--no-verify", "--out", whole).code == 0
    ran = run_cli("export", model, "--quantization", "F32", "--trim-vocab", text, "--out", small)
    assert ran.code == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    bytes_of = {
        words[0]: int(words[1].replace(",", "")) for words in lines if words[0] in ("predicted", "real")
    }
    assert bytes_of["predicted"] == bytes_of["real"] == small.stat().st_size < whole.stat().st_size
    values = read_header(small).values()
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == values["llama.vocab_size"] % 640 < 640
    ids = tokenizer.encode(model, TEXT)[:40]
    old = read_header(whole).values()["tokenizer.ggml.tokens"]
    kept = [old.index(t) for t in tokens]
    mine = llama_cpp_library.Llama(str(small), vocab_only=True, verbose=False).tokenize(
        TEXT.encode(), add_bos=False, special=True
    )[:40]
    assert [kept[i] for i in mine] == ids
    found = file_logits(small, mine, tmp_path / "a.f32")
    expected = file_logits(whole, ids, tmp_path / "b.f32")[:, kept]
    assert np.abs(found - expected).max() < 1e-5


def test_gguf_parent(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent.gguf"
    assert run_cli("export", model, "--quantization", "F16", "--no-verify", "--out", parent).code == 0
    out = tmp_path / "q.gguf"
    ran = run_cli("export", parent, "--quantization", "Q8_0", "--trim-vocab", text, "--out", out)
    assert ran.code == 0, ran.err
    values, before = read_header(out).values(), read_header(parent).values()
    tokens = values["tokenizer.ggml.tokens"]
    assert tokens[values["tokenizer.ggml.eos_token_id"]] == "<|im_end|>" and len(tokens) < 640
    assert set(tokens) < set(before["tokenizer.ggml.tokens"])
    assert set(values["tokenizer.ggml.merges"]) < set(before["tokenizer.ggml.merges"])


def test_onnx_has_the_same_logits(
    run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    from edgeprune.exporters import onnx
    from edgeprune.runtimes import onnxruntime

    out = tmp_path / "onnx"
    ran = run_cli(
        *("export", model, "--format", "onnx", "--quantization", "fp32"),
        *("--trim-vocab", text, "--out", out),
    )
    assert ran.code == 0, ran.err  # 256 tokens against torch, 64 decoded ones, predicted bytes
    old = {t: i for t, i in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].items()}
    new = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    old |= {t["content"]: t["id"] for t in added}
    ids = tokenizer.encode(model, TEXT)[:40]
    mine = tokenizer.encode(out, TEXT)[:40]
    window = np.array([mine], np.int32)
    found = np.array(onnxruntime.logits(onnx.find_model(out).parents[1], window, tmp_path / "l", threads=1))[
        0
    ]
    expected = logits(edgeprune.load(model), ids)
    for token, i in new.items():
        assert np.abs(found[:, i] - expected[:, old[token]]).max() < 1e-3
    config = json.loads((out / "genai_config.json").read_text())["model"]
    assert config["vocab_size"] == found.shape[1] < 640


def test_refusals(run_cli: Callable[..., Any], model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    base = ("prune", model, "--ratio", "0", "--out", out)
    ran = run_cli(*base, "--trim-vocab", "languages:en,elvish")
    assert ran.code == 2 and "unknown language 'elvish'" in ran.err and not out.exists()
    ran = run_cli(*base, "--trim-vocab", tmp_path / "none.txt")
    assert ran.code == 2 and "does not exist" in ran.err
    ran = run_cli(*base, "--trim-check", text)
    assert ran.code == 2 and "--trim-check without --trim-vocab" in ran.err
    ran = run_cli("prune", model, "--plan", text, "--trim-vocab", text, "--out", out)
    assert ran.code == 2 and "leave out --trim-vocab" in ran.err


# ---------------------------------------------------------------- the main job


@pytest.mark.slow
def test_main_job_is_killed_and_goes_on(tmp_path: Path) -> None:
    """One run is killed after the trimming; the next one makes none of it again."""
    tiny_model_with_tokenizer(tmp_path / "tiny", hidden=128, heads=4, kv_heads=2, ff=256, layers=2, vocab=420)
    profile = small_profile(bench=(32, 8, 5), quantizations=["Q8_0"], ratios=[0.1, 0.25, 0.5], max_measured=1)
    (tmp_path / "seconds.toml").write_text(profile)
    text = tmp_path / "text.txt"
    text.write_text("The lazy dog jumps. " * 3)
    args = command(tmp_path, tmp_path / "run", "--trim-vocab", text)
    first = start(args)
    while first.poll() is None and finished(tmp_path / "run") < 3:
        pass
    first.kill()
    first.wait()
    done_before = [e["key"] for e in events(tmp_path / "run") if e["event"] == "done"]
    assert done_before
    second = start(args)
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    report = report_of(tmp_path / "run")
    figures = report["vocabulary"]
    assert figures["tokens_after"] < figures["tokens_before"] == 420
    assert figures["sources"] == [str(text)]
    for candidate in report["candidates"]:
        assert "as given" not in candidate["id"]
        if candidate["measured"]:
            assert candidate["artifact"]["bytes"] == candidate["predicted"]["file_bytes"]
            path = tmp_path / "run" / candidate["artifact"]["path"]
            if path.exists():
                assert len(read_header(path).values()["tokenizer.ggml.tokens"]) == figures["tokens_after"]
    done = [e["key"] for e in events(tmp_path / "run") if e["event"] == "done"]
    assert len(done) == len(set(done))
    vocab = json.loads((tmp_path / "run" / "bundle" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocab) <= figures["tokens_after"]
