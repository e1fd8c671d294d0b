"""Run one llama.cpp job in this process: `python -m edgeprune.runtimes._llama_worker JOBFILE`.

The job file is JSON: `job`, `result` (where the JSON answer goes), `parent` (process id) and the
job's own arguments. llama.cpp may abort the process; that is why nothing else runs in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgeprune.runtimes._job import JobError, serve

KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "iq4_nl": 20,
}

# nats below a row's maximum that a stored reference logit can express
SPAN_NATS = 24.0
_LEVELS = 65535


class _Engine:
    """llama_cpp's ctypes functions, and the errors the library logged."""

    def __init__(self, *, timed: bool = False) -> None:
        # a backtrace through gdb would hide the message, and can hang
        os.environ["GGML_NO_BACKTRACE"] = "1"
        if not timed:
            # spinning threads crawl when other programs share the cores; timings keep the default
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import llama_cpp.llama_cpp as lib

        self.lib: Any = lib
        self.errors: list[str] = []

        @lib.llama_log_callback
        def log(level: int, text: bytes, _data: Any) -> None:
            if level == 4 and len(self.errors) < 50:  # 4: error
                self.errors.append(text.decode("utf-8", "replace").strip())

        self._log = log
        lib.llama_log_set(log, ctypes.c_void_p(0))
        lib.llama_backend_init()

    def why(self) -> str:
        """Return the first thing the library complained about; later lines only repeat it."""
        return self.errors[0] if self.errors else "no reason given by the library"


class _Session:
    """One open model and context. `load_ns` is the time to open the model."""

    def __init__(
        self,
        engine: _Engine,
        path: str,
        flags: dict[str, Any],
        *,
        threads: int,
        n_ctx: int | None = None,
        n_batch: int | None = None,
        logits_bytes: int | None = None,
        n_seq: int = 1,
    ) -> None:
        lib = self.lib = engine.lib
        self.engine = engine
        if not os.path.isfile(path):
            raise JobError(f"there is no file {path}")
        if flags["kv_type"] not in KV_TYPES:
            raise JobError(f"unknown KV cache type '{flags['kv_type']}'; known: {', '.join(KV_TYPES)}")
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if flags["mmap"] else lib.LLAMA_LOAD_MODE_NONE
        began = time.perf_counter_ns()
        self.model = lib.llama_model_load_from_file(os.fsencode(path), model_params)
        self.load_ns = time.perf_counter_ns() - began
        if not self.model:
            raise JobError(f"llama.cpp cannot load {os.path.basename(path)}: {engine.why()}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.n_ctx = int(n_ctx or flags["context_tokens"])
        self.n_batch = int(n_batch or min(self.n_ctx, 2048))
        if logits_bytes is not None:
            self.n_batch = min(self.n_batch, max(16, logits_bytes // (4 * self.vocab)))
        context_params = lib.llama_context_default_params()
        context_params.n_ctx = self.n_ctx
        context_params.n_batch = self.n_batch
        context_params.n_ubatch = min(int(flags["ubatch"]), self.n_batch)
        context_params.n_seq_max = n_seq
        context_params.kv_unified = n_seq > 1  # sequences that share a prefix
        context_params.n_threads = context_params.n_threads_batch = threads
        context_params.type_k = context_params.type_v = KV_TYPES[flags["kv_type"]]
        context_params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flags["flash_attention"]
            else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        context_params.no_perf = True
        self.context = lib.llama_init_from_model(self.model, context_params)
        if not self.context:
            raise JobError(f"llama.cpp cannot open a context of {self.n_ctx} tokens: {engine.why()}")
        self.batch = lib.llama_batch_init(self.n_batch, 0, n_seq)
        self.position = 0

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.position = 0

    def set_threads(self, n: int) -> None:
        self.lib.llama_set_n_threads(self.context, n, n)

    def feed(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        """Decode at most n_batch tokens; logits of all of them, or of the last one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab:
                raise JobError(f"token {token} is not in the model's vocabulary of {self.vocab}")
            batch.token[i] = token
            batch.pos[i] = self.position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits
        batch.logits[len(tokens) - 1] = True
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise JobError(f"llama.cpp failed to decode at position {self.position} (code {code})")
        self.lib.llama_synchronize(self.context)
        self.position += len(tokens)

    def prompt(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self.n_batch):
            self.feed(tokens[start : start + self.n_batch])

    def logits(self, rows: int) -> Any:
        """View the logits of the last call as [rows, vocab]; valid until the next one."""
        import numpy as np

        pointer = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab))


def _pseudo_stream(vocab: int, seed: int = 1) -> Iterator[int]:
    """Yield token ids that repeat in every run: a linear congruence, no imports."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (state >> 33) % vocab


def _pseudo_tokens(n: int, vocab: int, seed: int = 1) -> list[int]:
    return list(itertools.islice(_pseudo_stream(vocab, seed), n))


# ---------------------------------------------------------------- bench


def bench(args: dict[str, Any]) -> dict[str, Any]:
    """Time prefill on an empty cache and then one-token decoding, `repeats` times."""
    n_prompt, n_gen, repeats = args["n_prompt"], args["n_gen"], args["repeats"]
    flags = args["flags"]
    if n_prompt + n_gen > flags["context_tokens"]:
        raise JobError(
            f"{n_prompt} + {n_gen} tokens do not fit into a context of {flags['context_tokens']} tokens"
        )
    engine = _Engine(timed=True)
    session = _Session(engine, args["path"], flags, threads=args["threads"] or 1)
    prompt = _pseudo_tokens(n_prompt, session.vocab)
    generated = _pseudo_tokens(n_gen, session.vocab, seed=2)

    sweep: dict[str, float] = {}
    threads = args["threads"]
    for n in args["sweep"]:
        session.set_threads(n)
        sweep[str(n)] = _decode_rate(session, args["sweep_tokens"])
    if threads is None:
        threads = max((int(n) for n in sweep), key=lambda n: sweep[str(n)], default=1)
    session.set_threads(threads)

    def once() -> tuple[int, int]:
        session.clear()
        began = time.perf_counter_ns()
        session.prompt(prompt)
        between = time.perf_counter_ns()
        for token in generated:
            session.feed([token])
        return between - began, time.perf_counter_ns() - between

    once()  # warm-up
    timed = [once() for _ in range(repeats)]
    lib = engine.lib
    text = ctypes.create_string_buffer(256)
    lib.llama_model_desc(session.model, text, 256)
    return {
        "threads": threads,
        "sweep": sweep,
        "prefill_ns": [a for a, _ in timed],
        "decode_ns": [b for _, b in timed],
        "load_ns": session.load_ns,
        "n_batch": session.n_batch,
        "model_type": text.value.decode("utf-8", "replace"),
        "model_bytes": int(lib.llama_model_size(session.model)),
        "model_params": int(lib.llama_model_n_params(session.model)),
        "build_commit": _build_commit(),
    }


def _decode_rate(session: _Session, n: int) -> float:
    """Tokens per second over n one-token steps, after four that do not count."""
    tokens = _pseudo_tokens(n + 4, session.vocab, seed=3)
    session.clear()
    for token in tokens[:4]:
        session.feed([token])
    began = time.perf_counter_ns()
    for token in tokens[4:]:
        session.feed([token])
    return n * 1e9 / (time.perf_counter_ns() - began)


def _build_commit() -> str:
    try:
        from llama_cpp._ggml import libggml

        libggml.ggml_commit.restype = ctypes.c_char_p
        return str(libggml.ggml_commit().decode())
    except (ImportError, AttributeError, UnicodeDecodeError):
        return "unknown"


# ---------------------------------------------------------------- memory


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
    flags = args["flags"]
    n_ctx = flags["context_tokens"]
    if n_ctx < 16:
        raise JobError(f"a context of {n_ctx} tokens is too short to measure")
    engine = _Engine()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts again at the present size
    before = _peak_bytes()
    session = _Session(engine, args["path"], flags, threads=args["threads"])
    # drawn piece by piece: a list of all tokens would be counted as the model's
    stream = _pseudo_stream(session.vocab)
    for start in range(0, n_ctx - 8, session.n_batch):
        session.feed(list(itertools.islice(stream, min(session.n_batch, n_ctx - 8 - start))))
    for token in itertools.islice(stream, 8):
        session.feed([token])
    return {
        "before_bytes": before,
        "peak_bytes": _peak_bytes() - before,
        "tokens_filled": session.position,
        "load_ns": session.load_ns,
    }


# ---------------------------------------------------------------- logits, reference, quality


def _open_windows(args: dict[str, Any]) -> tuple[_Session, Any]:
    """Open a model sized for the token windows; returns it with the windows, int32 [n, T]."""
    import numpy as np

    windows = np.fromfile(args["tokens"], dtype="<i4").reshape(args["shape"])
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise JobError("token windows must have the shape [n, T] with T of at least 2")
    n_ctx = -(-windows.shape[1] // 256) * 256
    n_batch = max(1, min(args["flags"]["ubatch"], windows.shape[1]))
    session = _Session(
        _Engine(),
        args["path"],
        args["flags"],
        threads=args["threads"],
        n_ctx=n_ctx,
        n_batch=n_batch,
        logits_bytes=64 << 20,
    )
    return session, windows


def _each_chunk(session: _Session, windows: Any) -> Iterator[tuple[int, int, Any]]:
    """Yield (window, first position, logits [rows, vocab]) over all windows, in order."""
    for w, row in enumerate(windows.tolist()):
        session.clear()
        for start in range(0, len(row), session.n_batch):
            chunk = row[start : start + session.n_batch]
            session.feed(chunk, all_logits=True)
            yield w, start, session.logits(len(chunk))


def logits(args: dict[str, Any]) -> dict[str, Any]:
    """Write the logits of every position, float32 [n*T, vocab], little-endian."""
    session, windows = _open_windows(args)
    with open(args["out"], "wb") as f:
        for _, _, rows in _each_chunk(session, windows):
            f.write(rows.astype("<f4", copy=False).tobytes())
    return {"rows": int(windows.size), "vocab": session.vocab}


def _log_sum_exp(shifted: Any) -> Any:
    """Log of the sum of exp over rows whose maximum is 0; float32 in, float64 out."""
    import numpy as np

    return np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))


def reference(args: dict[str, Any]) -> dict[str, Any]:
    """Store the parent's distributions: per row uint16 steps below the maximum, [n*(T-1), vocab].

    A step is 24/65535 nats, so a stored logit is off by at most 1.8e-4 nats; what lies more than
    24 nats below the maximum is stored as 24 (each such token then has less than 4e-11).
    """
    import numpy as np

    session, windows = _open_windows(args)
    n, length = windows.shape
    step = SPAN_NATS / _LEVELS
    nll = np.zeros((n, length - 1), dtype=np.float32)
    argmax = np.zeros((n, length - 1), dtype=np.int32)
    with open(args["out"], "wb") as f:
        for w, start, block in _each_chunk(session, windows):
            for r in range(0, block.shape[0], 8):
                first = start + r
                rows = block[r : r + min(8, length - 1 - first)]
                if rows.shape[0] == 0:
                    continue
                peak = rows.max(axis=1, keepdims=True)
                if not np.isfinite(peak).all():
                    raise JobError(f"the parent model gives logits that are not finite in window {w}")
                shifted = rows - peak
                steps = np.rint(np.minimum(shifted * np.float32(-1 / step), _LEVELS))
                f.write(steps.astype("<u2").tobytes())
                here = slice(first, first + rows.shape[0])
                target = windows[w, first + 1 : first + 1 + rows.shape[0]]
                chosen = shifted[np.arange(rows.shape[0]), target]
                nll[w, here] = _log_sum_exp(shifted) - chosen
                argmax[w, here] = rows.argmax(axis=1)
    _save_arrays(args["arrays"], {"nll": nll, "argmax": argmax})
    return {"vocab": session.vocab, "rows": int(nll.size), "span_nats": SPAN_NATS, "levels": _LEVELS}


def quality(args: dict[str, Any]) -> dict[str, Any]:
    """Stream the candidate's distributions against the stored ones; per-token arrays [n, T-1]."""
    import numpy as np

    session, windows = _open_windows(args)
    n, length = windows.shape
    if session.vocab != args["vocab"]:
        raise JobError(
            f"the candidate has a vocabulary of {session.vocab} tokens, the parent {args['vocab']}: "
            "their distributions cannot be compared"
        )
    row_bytes = 2 * session.vocab
    if os.path.getsize(args["reference"]) != n * (length - 1) * row_bytes:
        raise JobError(f"{args['reference']} does not hold {n} windows of {length} tokens")
    step = np.float32(-args["span_nats"] / args["levels"])
    kl = np.zeros((n, length - 1), dtype=np.float32)
    nll = np.zeros_like(kl)
    argmax = np.zeros((n, length - 1), dtype=np.int32)
    with open(args["reference"], "rb") as f:
        for w, start, block in _each_chunk(session, windows):
            for r in range(0, block.shape[0], 8):
                first = start + r
                rows = block[r : r + min(8, length - 1 - first)]
                k = rows.shape[0]
                if k == 0:
                    continue
                stored = np.frombuffer(f.read(k * row_bytes), dtype="<u2").reshape(k, session.vocab)
                p = stored * step
                q = rows - rows.max(axis=1, keepdims=True)
                if not np.isfinite(q).all():
                    raise JobError(f"the model gives logits that are not finite in window {w}")
                weights = np.exp(p)
                total = weights.sum(axis=1, dtype=np.float64)
                mean = np.einsum("ij,ij->i", weights, p - q, dtype=np.float64) / total
                lse_q = _log_sum_exp(q)
                here = slice(first, first + k)
                target = windows[w, first + 1 : first + 1 + k]
                # sum p (log p - log q), with log p = p' - log sum exp p'
                kl[w, here] = mean - np.log(total) + lse_q
                nll[w, here] = lse_q - q[np.arange(k), target]
                argmax[w, here] = rows.argmax(axis=1)
    _save_arrays(args["arrays"], {"kl": kl, "nll": nll, "argmax": argmax})
    return {"vocab": session.vocab, "rows": int(nll.size)}


def _save_arrays(path: str, arrays: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(arrays, path)


# ---------------------------------------------------------------- generate


def generate(args: dict[str, Any]) -> dict[str, Any]:
    """Continue each prompt greedily, at most `n_new` tokens; an end-of-text token ends one sooner."""
    flags = args["flags"]
    session = _Session(_Engine(), args["path"], flags, threads=args["threads"])
    room = session.n_ctx - args["n_new"]
    rows = []
    for text in args["prompts"]:
        tokens = _tokenize(session, text)
        if not 0 < len(tokens) <= room:
            raise JobError(f"a prompt of {len(tokens)} tokens does not fit into {room} tokens")
        session.clear()
        session.prompt(tokens)
        pieces, ended = [], False
        for _ in range(args["n_new"]):
            token = int(session.logits(1)[0].argmax())
            if session.lib.llama_vocab_is_eog(_vocabulary(session), token):
                ended = True
                break
            pieces.append(_piece(session, token))
            session.feed([token])
        text = b"".join(pieces).decode("utf-8", "replace")
        rows.append({"text": text, "tokens": len(pieces), "ended": ended})
    return {"rows": rows}


def _vocabulary(session: _Session) -> Any:
    return session.lib.llama_model_get_vocab(session.model)


def _tokenize(session: _Session, text: str) -> list[int]:
    data = text.encode()
    room = (session.lib.llama_token * (len(data) + 8))()
    n = session.lib.llama_tokenize(_vocabulary(session), data, len(data), room, len(room), True, True)
    if n < 0:
        raise JobError("llama.cpp cannot tokenize a prompt")
    return list(room[:n])


def _piece(session: _Session, token: int) -> bytes:
    room = ctypes.create_string_buffer(512)
    n = session.lib.llama_token_to_piece(_vocabulary(session), token, room, len(room), 0, False)
    return room.raw[: max(0, n)]


# ---------------------------------------------------------------- score

_MOST_SEQUENCES = 32
_PACK_TOKENS = 512  # groups that are computed together; each token looks at all cells in use


def _nodes(group: dict[str, Any], first_seq: int) -> Iterator[tuple[int, int, list[int], list[Any]]]:
    """Yield (token, position, sequences, wanted) of a group: its prefix once, then each tail.

    `wanted` lists (choice, target token) pairs whose probability is read behind this token.
    """
    prefix, tails = group["prefix"], group["tails"]
    starts, targets = group["starts"], group["targets"]
    everyone = [first_seq + c for c in range(len(tails))]

    def wanted(choice: int, at: int) -> list[Any]:
        k = at - starts[choice]
        return [(choice, targets[choice][k])] if 0 <= k < len(targets[choice]) else []

    for at, token in enumerate(prefix):
        yield token, at, everyone, [w for c in range(len(tails)) for w in wanted(c, at)]
    for choice, tail in enumerate(tails):
        for i, token in enumerate(tail):
            at = len(prefix) + i
            yield token, at, [everyone[choice]], wanted(choice, at)


def score(args: dict[str, Any]) -> dict[str, Any]:
    """Append one JSON line per group: summed log-likelihoods, and whether every target was the likeliest."""
    with open(args["groups"], encoding="utf-8") as f:
        groups = [json.loads(line) for line in f]
    sizes = [len(g["prefix"]) + sum(len(t) for t in g["tails"]) for g in groups]
    pack = max([*sizes, _PACK_TOKENS])
    session = _Session(
        _Engine(),
        args["path"],
        args["flags"],
        threads=args["threads"],
        n_ctx=-(-pack // 256) * 256,
        n_batch=_PACK_TOKENS,
        n_seq=max(_MOST_SEQUENCES, *(len(g["tails"]) for g in groups)),
    )
    # rows of logits held at once
    most_rows = max(1, (64 << 20) // (4 * session.vocab))
    most_seqs = max(_MOST_SEQUENCES, *(len(g["tails"]) for g in groups))
    with open(args["out"], "a", encoding="utf-8") as out:
        held: list[dict[str, Any]] = []
        tokens = seqs = 0
        for group, size in zip(groups, sizes, strict=True):
            if held and (tokens + size > _PACK_TOKENS or seqs + len(group["tails"]) > most_seqs):
                _score_pack(session, held, most_rows, out)
                held, tokens, seqs = [], 0, 0
            held.append(group)
            tokens += size
            seqs += len(group["tails"])
        if held:
            _score_pack(session, held, most_rows, out)
    return {"groups": len(groups), "vocab": session.vocab}


def _score_pack(session: _Session, groups: list[dict[str, Any]], most_rows: int, out: Any) -> None:
    """Compute groups side by side in one cache and write their lines."""
    import numpy as np

    sums = [[0.0] * len(g["tails"]) for g in groups]
    greedy = [[True] * len(g["tails"]) for g in groups]
    session.clear()
    batch, lib = session.batch, session.lib
    held: list[tuple[int, list[Any]]] = []  # (group, wanted) of each row of logits
    n = 0

    def flush() -> None:
        nonlocal held, n
        batch.n_tokens = n
        # the library wants at least one row
        spare = not held
        if spare:
            batch.logits[n - 1] = True
        code = lib.llama_decode(session.context, batch)
        if code != 0:
            raise JobError(f"llama.cpp failed to score {n} tokens (code {code})")
        lib.llama_synchronize(session.context)
        rows = session.logits(max(1, len(held)))
        for r, (g, wanted) in enumerate(held):
            row = rows[r]
            peak = row.max()
            if not np.isfinite(peak):
                raise JobError("the model gives logits that are not finite")
            total = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
            best = int(row.argmax())
            for choice, target in wanted:
                sums[g][choice] += float(row[target]) - total
                greedy[g][choice] = greedy[g][choice] and best == target
        held, n = [], 0

    first = 0
    for g, group in enumerate(groups):
        for token, at, seqs, wanted in _nodes(group, first):
            if not 0 <= token < session.vocab:
                raise JobError(f"token {token} is not in the model's vocabulary of {session.vocab}")
            if n == session.n_batch or (wanted and len(held) == most_rows):
                flush()
            batch.token[n] = token
            batch.pos[n] = at
            batch.n_seq_id[n] = len(seqs)
            for k, seq in enumerate(seqs):
                batch.seq_id[n][k] = seq
            batch.logits[n] = bool(wanted)
            n += 1
            if wanted:
                held.append((g, wanted))
        first += len(group["tails"])
    if n:
        flush()
    for g, group in enumerate(groups):
        out.write(json.dumps({"h": group["h"], "ll": sums[g], "greedy": greedy[g]}) + "\n")
    out.flush()


def tokenize(args: dict[str, Any]) -> dict[str, Any]:
    """Token ids of texts with the file's own tokenizer; and what its vocabulary says of itself."""
    engine = _Engine()
    lib = engine.lib
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(args["path"]), params)
    if not model:
        raise JobError(f"llama.cpp cannot load {os.path.basename(args['path'])}: {engine.why()}")
    vocab = lib.llama_model_get_vocab(model)
    with open(args["texts"], encoding="utf-8") as f:
        texts = json.load(f)
    room = 64
    buffer = (ctypes.c_int32 * room)()
    ids: list[list[int]] = []
    for text, special in texts:
        data = text.encode("utf-8")
        if len(data) + 8 > room:
            room = len(data) + 8
            buffer = (ctypes.c_int32 * room)()
        n = lib.llama_tokenize(vocab, data, len(data), buffer, room, special, True)
        if n < 0:
            raise JobError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        ids.append(list(buffer[:n]))
    with open(args["out"], "w", encoding="utf-8") as f:
        json.dump(ids, f)
    return {
        "vocab": lib.llama_vocab_n_tokens(vocab),
        "bos": lib.llama_vocab_bos(vocab),
        "eos": lib.llama_vocab_eos(vocab),
    }


# ---------------------------------------------------------------- quantize


def quantize(args: dict[str, Any]) -> dict[str, Any]:
    """Quantize `master` into `out`, with types per tensor and an importance matrix."""
    if not os.path.isfile(args["master"]):
        raise JobError(f"there is no file {args['master']}")
    engine = _Engine()
    lib = engine.lib
    params = lib.llama_model_quantize_default_params()
    params.ftype = args["ftype"]
    params.nthread = args["threads"]
    params.allow_requantize = args["allow_requantize"]
    overrides = [(pattern.encode(), kind) for pattern, kind in args["overrides"]]
    # the library reads both lists up to an entry without a name
    override_list = (lib.llama_model_tensor_override * (len(overrides) + 1))()
    for slot, (pattern, kind) in zip(override_list, overrides, strict=False):
        slot.pattern, slot.type = pattern, kind
    if overrides:
        params.tt_overrides = override_list
    kept: list[Any] = []
    if args["imatrix"]:
        import numpy as np
        from safetensors.numpy import load_file

        columns = {
            k: np.ascontiguousarray(v, dtype=np.float32) for k, v in load_file(args["imatrix"]).items()
        }
        for name, values in columns.items():
            if values.ndim != 1 or not np.isfinite(values).all():
                raise JobError(f"the importance matrix of {name} must be one finite number per column")
        imatrix = (lib.llama_model_imatrix_data * (len(columns) + 1))()
        for slot, (name, values) in zip(imatrix, columns.items(), strict=False):
            slot.name = name.encode()
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            slot.size = values.size
        kept = [columns, imatrix]
        params.imatrix = imatrix
    code = lib.llama_model_quantize(
        os.fsencode(args["master"]), os.fsencode(args["out"]), ctypes.byref(params)
    )
    if code != 0:
        name = os.path.basename(args["master"])
        raise JobError(f"llama.cpp cannot quantize {name} (code {code}): {engine.why()}")
    return {"bytes": os.path.getsize(args["out"]), "imatrix_tensors": len(kept[0]) if kept else 0}


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bench": bench,
    "memory": memory,
    "logits": logits,
    "reference": reference,
    "quality": quality,
    "score": score,
    "tokenize": tokenize,
    "quantize": quantize,
    "generate": generate,
}


def _explain(_: str, error: Exception) -> dict[str, Any] | None:
    """The disk's own errors have their number: the run folder turns them into advice."""
    if isinstance(error, OSError):
        return {"error": f"{error.strerror or error}: {error.filename}", "errno": error.errno}
    return None


if __name__ == "__main__":
    serve(sys.argv[1], JOBS, _explain)
