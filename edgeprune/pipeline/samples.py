"""Sample outputs of exported files: a few fixed prompts, greedy, so that a person can see what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeprune import rundir
from edgeprune.bundle import chat
from edgeprune.costs.gguf_header import KeyValue
from edgeprune.records import LaunchFlags, SampleSet, SampleText, make_key
from edgeprune.runtimes import llama_cpp

# a fact, an instruction, a story: short, so that a small model has a chance
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "List three things to pack for a day in the mountains.",
    "Write two sentences about a cat who finds a letter.",
)
PLAIN = (
    "The capital of France is",
    "Three things to pack for a day in the mountains are",
    "A cat found a letter under the door. She",
)
N_NEW = 48
CONTEXT = 512


def prompts_for(kvs: Sequence[KeyValue], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what a person reads, what the model is given): in the chat template where that is a plain one.

    Raises ConfigError, with `name` in it, for a template that takes too much time, memory or text.
    """
    values = {kv.key: kv.value for kv in kvs}
    template = _text(values.get("tokenizer.chat_template"))
    pieces = chat.read(template, eos=_token(values, "eos"), name=name) if template else None
    if pieces is None:
        return PLAIN, PLAIN
    return PROMPTS, tuple(pieces.render([("user", prompt)]) for prompt in PROMPTS)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _token(values: dict[str, object], name: str) -> str:
    tokens, number = values.get("tokenizer.ggml.tokens"), values.get(f"tokenizer.ggml.{name}_token_id")
    if isinstance(tokens, (list, tuple)) and type(number) is int and 0 <= number < len(tokens):
        return _text(tokens[number])
    return ""


def take(
    run: rundir.RunDir,
    file: Callable[[], Path],
    *,
    source: str,
    made_from: str,
    parent: str,
    kvs: Sequence[KeyValue],
    max_context: int,
    kv_type: str,
    threads: int,
) -> SampleSet:
    """Samples of one file, taken once; only then `file` is called. `made_from` identifies the content.

    `parent` names the model in errors.
    """
    shown, given = prompts_for(kvs, parent)
    flags = LaunchFlags(context_tokens=min(CONTEXT, max_context), ubatch=128, kv_type=kv_type, mmap=True)
    n_new = max(1, min(N_NEW, flags.context_tokens // 4))
    key = make_key("sample_set", source, made_from, list(given), n_new, flags, llama_cpp.RUNTIME.version())

    def compute() -> SampleSet:
        found = llama_cpp.generate(file(), given, n_new=n_new, flags=flags, threads=threads)
        rows = (
            SampleText(prompt=prompt, text=one.text, tokens=one.tokens, ended=one.ended)
            for prompt, one in zip(shown, found, strict=True)
        )
        return SampleSet(source=source, chat=given is not shown, rows=tuple(rows), key=key)

    return run.stage(SampleSet, key, compute, name=f"samples {source}")
