"""Run one ONNX job in this process: `python -m edgeprune.runtimes._onnx_worker JOBFILE`.

The job file is JSON: `job`, `engine` ('genai' or 'ort'), `folder`, `model` (the .onnx file), `result`
(where the answer goes), `parent` (process id) and the job's own arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from edgeprune.runtimes._job import JobError, serve


class Engine(Protocol):
    """One open model with one cache. `load_ns` is the time to open it."""

    load_ns: int
    vocab: int

    def clear(self, context: int) -> None:
        """Start again with an empty cache for `context` tokens."""
        ...

    def feed(self, tokens: Sequence[int]) -> None:
        """Compute these tokens behind those in the cache."""
        ...

    def last_logits(self) -> Any:
        """[vocab] float32 of the last token fed."""
        ...


class Genai:
    """onnxruntime-genai; keys and values of all tokens stay in one buffer of the context's size."""

    def __init__(self, args: dict[str, Any], *, threads: int, chunk: int) -> None:
        import onnxruntime_genai as lib

        self.lib: Any = lib
        config = lib.Config(args["folder"])
        config.overlay(
            json.dumps(
                {
                    "model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}},
                    "search": {"chunk_size": chunk},
                }
            )
        )
        began = time.perf_counter_ns()
        self.model = lib.Model(config)
        self.load_ns = time.perf_counter_ns() - began
        with open(os.path.join(args["folder"], "genai_config.json"), encoding="utf-8") as f:
            self.vocab = int(json.load(f)["model"]["vocab_size"])
        self.generator: Any = None

    def clear(self, context: int) -> None:
        self.generator = None  # its buffers go before new ones come
        params = self.lib.GeneratorParams(self.model)
        params.set_search_options(max_length=context, do_sample=False)
        self.generator = self.lib.Generator(self.model, params)

    def feed(self, tokens: Sequence[int]) -> None:
        import numpy as np

        self.generator.append_tokens(np.asarray(tokens, dtype=np.int32))

    def last_logits(self) -> Any:
        return self.generator.get_logits().reshape(-1, self.vocab)[-1]


class Ort:
    """Plain ONNX Runtime; the cache is handed from call to call without being copied to numpy."""

    def __init__(self, args: dict[str, Any], *, threads: int, chunk: int) -> None:
        import onnxruntime as lib

        self.lib: Any = lib
        self.chunk = chunk
        options = lib.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        began = time.perf_counter_ns()
        self.session = lib.InferenceSession(args["model"], options, providers=["CPUExecutionProvider"])
        self.load_ns = time.perf_counter_ns() - began
        self.inputs = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.vocab = int(self.session.get_outputs()[0].shape[-1])
        self.cache: dict[str, Any] = {}
        self.position = 0
        self.logits: Any = None

    def clear(self, context: int) -> None:
        import numpy as np

        value = self.lib.OrtValue.ortvalue_from_numpy
        self.position = 0
        self.cache = {
            name: value(
                np.zeros(
                    (1, i.shape[1], 0, i.shape[3]), np.float16 if i.type == "tensor(float16)" else np.float32
                )
            )
            for name, i in self.inputs.items()
        }

    def feed(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self.chunk):
            self.run(tokens[start : start + self.chunk])

    def run(self, tokens: Sequence[int]) -> Any:
        """Logits [tokens, vocab] of one call."""
        import numpy as np

        value = self.lib.OrtValue.ortvalue_from_numpy
        self.position += len(tokens)
        feeds = {
            "input_ids": value(np.asarray([tokens], dtype=np.int64)),
            "attention_mask": value(np.ones((1, self.position), dtype=np.int64)),
            **self.cache,
        }
        found = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feeds), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.inputs}
        self.logits = found["logits"].numpy()[0]
        return self.logits

    def last_logits(self) -> Any:
        return self.logits[-1]


ENGINES: dict[str, Callable[..., Any]] = {"genai": Genai, "ort": Ort}


def _open(args: dict[str, Any], *, threads: int) -> Any:
    name = os.path.basename(args["folder"])
    try:
        return ENGINES[args["engine"]](args, threads=threads, chunk=max(1, int(args["flags"]["ubatch"])))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # both libraries raise their own classes
        raise JobError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _pseudo_stream(vocab: int, seed: int = 1) -> Iterator[int]:
    """Yield token ids that repeat in every run: a linear congruence, no imports."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (state >> 33) % vocab


def _pseudo_tokens(n: int, vocab: int, seed: int = 1) -> list[int]:
    return list(itertools.islice(_pseudo_stream(vocab, seed), n))


# ---------------------------------------------------------------- jobs


def bench(args: dict[str, Any]) -> dict[str, Any]:
    """Time prefill on an empty cache and then one-token decoding, `repeats` times."""
    n_prompt, n_gen, flags = args["n_prompt"], args["n_gen"], args["flags"]
    context = flags["context_tokens"]
    if n_prompt + n_gen > context:
        raise JobError(f"{n_prompt} + {n_gen} tokens do not fit into a context of {context} tokens")
    sweep: dict[str, float] = {}
    threads = args["threads"]
    for n in args["sweep"]:
        sweep[str(n)] = _decode_rate(_open(args, threads=n), args["sweep_tokens"])
    if threads is None:
        threads = max((int(n) for n in sweep), key=lambda n: sweep[str(n)], default=1)
    engine: Engine = _open(args, threads=threads)
    prompt = _pseudo_tokens(n_prompt, engine.vocab)
    generated = _pseudo_tokens(n_gen, engine.vocab, seed=2)

    def once() -> tuple[int, int]:
        engine.clear(context)
        began = time.perf_counter_ns()
        engine.feed(prompt)
        between = time.perf_counter_ns()
        for token in generated:
            engine.feed([token])
        return between - began, time.perf_counter_ns() - between

    once()  # warm-up
    timed = [once() for _ in range(args["repeats"])]
    return {
        "threads": threads,
        "sweep": sweep,
        "prefill_ns": [a for a, _ in timed],
        "decode_ns": [b for _, b in timed],
        "load_ns": engine.load_ns,
        "n_batch": min(flags["ubatch"], context),
    }


def _decode_rate(engine: Engine, n: int) -> float:
    """Tokens per second over n one-token steps, after four that do not count."""
    tokens = _pseudo_tokens(n + 4, engine.vocab, seed=3)
    engine.clear(n + 8)
    for token in tokens[:4]:
        engine.feed([token])
    began = time.perf_counter_ns()
    for token in tokens[4:]:
        engine.feed([token])
    return n * 1e9 / (time.perf_counter_ns() - began)


def _peak_bytes() -> int:
    """Largest resident size of this process so far."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(args: dict[str, Any]) -> dict[str, Any]:
    """Fill the whole context and report how far the peak resident size rose from before the model."""
    context, chunk = args["flags"]["context_tokens"], args["flags"]["ubatch"]
    if context < 16:
        raise JobError(f"a context of {context} tokens is too short to measure")
    # the library itself is not the model's
    import numpy  # noqa: F401

    __import__("onnxruntime_genai" if args["engine"] == "genai" else "onnxruntime")
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts again at the present size
    before = _peak_bytes()
    engine = _open(args, threads=args["threads"])
    engine.clear(context)
    stream = _pseudo_stream(engine.vocab)
    for start in range(0, context - 8, chunk):
        engine.feed(list(itertools.islice(stream, min(chunk, context - 8 - start))))
    for token in itertools.islice(stream, 8):
        engine.feed([token])
    return {
        "before_bytes": before,
        "peak_bytes": _peak_bytes() - before,
        "tokens_filled": context,
        "load_ns": engine.load_ns,
    }


def logits(args: dict[str, Any]) -> dict[str, Any]:
    """Write the logits of every position of token windows, float32 [n*T, vocab], little-endian."""
    import numpy as np

    if args["engine"] != "ort":
        raise JobError("logits of all positions need plain ONNX Runtime")
    windows = np.fromfile(args["tokens"], dtype="<i4").reshape(args["shape"])
    engine = _open(args, threads=args["threads"])
    step = max(1, min(engine.chunk, (64 << 20) // (4 * engine.vocab)))
    with open(args["out"], "wb") as f:
        for row in windows.tolist():
            engine.clear(len(row))
            for start in range(0, len(row), step):
                f.write(engine.run(row[start : start + step]).astype("<f4", copy=False).tobytes())
    return {"rows": int(windows.size), "vocab": engine.vocab}


def greedy(args: dict[str, Any]) -> dict[str, Any]:
    """Most likely next token, `n_new` times behind `prompt`; no token ends it."""
    engine: Engine = _open(args, threads=args["threads"])
    prompt, out = list(args["prompt"]), []
    if any(not 0 <= t < engine.vocab for t in prompt):
        raise JobError(f"a token is not in the model's vocabulary of {engine.vocab}")
    engine.clear(len(prompt) + args["n_new"])
    engine.feed(prompt)
    for _ in range(args["n_new"]):
        out.append(int(engine.last_logits().argmax()))
        if len(out) < args["n_new"]:
            engine.feed([out[-1]])
    return {"tokens": out}


def score(args: dict[str, Any]) -> dict[str, Any]:
    """Append one JSON line per group: summed log-likelihoods, and whether every target was the likeliest."""
    if args["engine"] != "ort":
        raise JobError("logits of all positions need plain ONNX Runtime")
    engine = _open(args, threads=args["threads"])
    with open(args["groups"], encoding="utf-8") as f, open(args["out"], "a", encoding="utf-8") as out:
        n = 0
        for line in f:
            group = json.loads(line)
            n += 1
            sums, greedy = _score_group(engine, group)
            out.write(json.dumps({"h": group["h"], "ll": sums, "greedy": greedy}) + "\n")
            out.flush()
    return {"groups": n, "vocab": engine.vocab}


def _score_group(engine: Any, group: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """The prefix once; every tail goes on from its cache, which the runtime does not change."""
    import numpy as np

    prefix, tails, starts = group["prefix"], group["tails"], group["starts"]
    sums, greedy = [0.0] * len(tails), [True] * len(tails)

    def read(first: int, rows: Any, choices: Sequence[int]) -> None:
        for choice in choices:
            targets = group["targets"][choice]
            begin = max(first, starts[choice])
            end = min(first + len(rows), starts[choice] + len(targets))
            if begin >= end:
                continue
            part = rows[begin - first : end - first].astype(np.float32, copy=False)
            wanted = np.asarray(targets[begin - starts[choice] : end - starts[choice]])
            peak = part.max(axis=1)
            if not np.isfinite(peak).all():
                raise JobError("the model gives logits that are not finite")
            total = peak + np.log(np.exp(part - peak[:, None]).sum(axis=1, dtype=np.float64))
            sums[choice] += float((part[np.arange(len(wanted)), wanted] - total).sum())
            greedy[choice] = greedy[choice] and bool((part.argmax(axis=1) == wanted).all())

    def feed(tokens: Sequence[int], choices: Sequence[int]) -> None:
        step = max(1, min(engine.chunk, (64 << 20) // (4 * engine.vocab)))
        for start in range(0, len(tokens), step):
            at = engine.position
            read(at, engine.run(tokens[start : start + step]), choices)

    if any(not 0 <= t < engine.vocab for part in (prefix, *tails, *group["targets"]) for t in part):
        raise JobError(f"a token is not in the model's vocabulary of {engine.vocab}")
    engine.clear(0)
    feed(prefix, range(len(tails)))
    cache, position = engine.cache, engine.position
    for choice, tail in enumerate(tails):
        engine.cache, engine.position = cache, position
        feed(tail, [choice])
    return sums, greedy


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "score": score,
    "bench": bench,
    "memory": memory,
    "logits": logits,
    "greedy": greedy,
}


def _explain(job: str, error: Exception) -> dict[str, Any]:
    """The libraries' own classes, and the disk's."""
    return {"error": f"ONNX Runtime failed in {job}: {_first_line(error)}"}


if __name__ == "__main__":
    serve(sys.argv[1], JOBS, _explain)
