"""What runs on a device that is measured: one file, standard library only, Python 3.8 or newer.

`python3 agent.py serve` reads one job (a JSON line) from stdin and answers with JSON lines on stdout,
each behind the word EDGEPRUNE so that login messages cannot be taken for one: heartbeats while it works,
then one `ok` or `error`. Every further line on stdin is a sign of life from the other side; when they
stop, or stdin ends, the agent kills what it started and leaves. `receive` appends stdin to a file.

A measurement runs in a process of its own, so a crash, an out-of-memory kill or a hang is an answer. It
uses llama-cpp-python where this interpreter has it, else a llama-bench program.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import platform
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

MARK = "EDGEPRUNE "
BEAT_S = 1.0
SILENCE_S = 30.0


class JobError(Exception):
    """A reason for the user: `kind` is one word for the program."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


def _say(value):
    sys.stdout.write(MARK + json.dumps(value) + "\n")
    sys.stdout.flush()


def _read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read().strip("\x00 \n") or None
    except OSError:
        return None


def _output(*command):
    """Standard output of a short command, or None."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() or None


# ---------------------------------------------------------------- the device


def facts(job):
    """What the device is, and what it can run."""
    fields, info = {}, {}
    for line in (_read("/proc/meminfo") or "").splitlines():
        parts = line.split()
        if len(parts) > 1 and parts[1].isdigit():
            fields[parts[0].rstrip(":")] = int(parts[1]) * 1024
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            info.setdefault(name.strip(), value.strip())
    usage = shutil.disk_usage(job["folder"])
    bench = job.get("llama_bench") or shutil.which("llama-bench")
    return {
        "board": _read("/proc/device-tree/model"),
        "cpu": info.get("model name")
        or info.get("Model")
        or _read("/proc/device-tree/model")
        or platform.machine(),
        "arch": platform.machine(),
        "flags": (info.get("flags") or info.get("Features") or "").split(),
        "threads": _threads(),
        "memory_bytes": fields.get("MemTotal"),
        "available_bytes": fields.get("MemAvailable"),
        "disk_free_bytes": usage.free,
        "cache_bytes": _cache_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "power_mode": _power_mode(),
        "llama_cpp": _module_version("llama_cpp", "llama-cpp-python"),
        "llama_bench": bench if bench and os.access(bench, os.X_OK) else None,
        "onnxruntime_genai": _module_version("onnxruntime_genai", "onnxruntime-genai"),
    }


def _threads():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_bytes():
    """Size of the last level of cache that the first processor sees."""
    best = 0
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = _read(path) or ""
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            best = max(best, int(text[:-1]) * unit)
    return best


def _module_version(module, package):
    import importlib.util

    if importlib.util.find_spec(module) is None:
        return None
    try:
        import importlib.metadata

        return importlib.metadata.version(package)
    except Exception:
        return "unknown"


def _power_mode():
    """Name of the power mode as nvpmodel says it; its numbers differ between modules."""
    for line in (_output("nvpmodel", "-q") or "").splitlines():
        name, colon, value = line.partition(":")
        if colon and "Power Mode" in name:
            return value.strip()
    return _read("/sys/firmware/acpi/platform_profile")


def _on_battery():
    """A battery is being emptied; None where no battery is seen."""
    states = [_read(path) for path in glob.glob("/sys/class/power_supply/*/status")]
    states = [state for state in states if state]
    return any(state == "Discharging" for state in states) if states else None


def _busy_s():
    """Processor seconds of all programs since the machine started."""
    first = (_read("/proc/stat") or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 8:
        return None
    user, nice, system, _idle, _wait, irq, soft = map(int, first[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own_s():
    """Processor seconds of this process and of children that have ended."""
    import resource

    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in both)


def environment(_job=None):
    """State that changes what is measured: governor, clocks, temperature, throttling, load."""
    clocks = {}
    for path in sorted(glob.glob("/sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq")):
        text = _read(path)
        if text and text.isdigit():
            clocks[path.split("/")[-2]] = int(text) * 1000
    zones = {}
    for path in sorted(glob.glob("/sys/class/thermal/thermal_zone*")):
        text = _read(path + "/temp")
        if text and text.lstrip("-").isdigit():
            zones["{} {}".format(os.path.basename(path), _read(path + "/type") or "")] = int(text) / 1000
    throttled = _output("vcgencmd", "get_throttled")
    return {
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clocks_hz": clocks,
        "temperatures_c": zones,
        "throttled": None if throttled is None else throttled.partition("=")[2],
        "thermal_throttle_count": _read("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"),
        "power_mode": _power_mode(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "on_battery": _on_battery(),
        "busy_s": _busy_s(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
    }


def digest(job):
    """Size and sha256 of a file; zero bytes when there is none."""
    sha, size = hashlib.sha256(), 0
    try:
        with open(job["path"], "rb") as f:
            while True:
                block = f.read(1 << 20)
                if not block:
                    break
                sha.update(block)
                size += len(block)
    except FileNotFoundError:
        pass
    return {"bytes": size, "sha256": sha.hexdigest()}


def finish(job):
    """A complete copy gets its name; a wrong one is deleted."""
    found = digest({"path": job["part"]})
    if found["sha256"] != job["sha256"]:
        with contextlib.suppress(OSError):
            os.unlink(job["part"])
        raise JobError("damaged", "the copy on the device has another sha256; it was deleted")
    os.replace(job["part"], job["path"])
    return found


def receive(path, offset):
    """Append stdin to a file that must have `offset` bytes now."""
    with open(path, "ab") as f:
        f.truncate(offset)
        f.seek(offset)
        while True:
            block = os.read(0, 1 << 18)
            if not block:
                break
            f.write(block)
        f.flush()
        os.fsync(f.fileno())


def remove(job):
    """Delete a file, or the whole work folder."""
    path = job["path"]
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return {}


# ---------------------------------------------------------------- probe files

# type -> number in the file, elements and bytes of a block, where its 2-byte float scales lie
BLOCKS = {
    "F16": (1, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "Q2_K": (10, 256, 84, (80, 82)),
    "Q3_K": (11, 256, 110, (108,)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "IQ4_NL": (20, 32, 18, (0,)),
    "IQ4_XS": (23, 256, 136, (0,)),
}
_TILE_BLOCKS = 2048


def _tile(kind):
    """Random blocks with small finite scales: a rate depends on the bytes, not on their meaning."""
    _, _, size, scales = BLOCKS[kind]
    data = bytearray(
        random.Random(kind).getrandbits(8 * size * _TILE_BLOCKS).to_bytes(size * _TILE_BLOCKS, "little")
    )
    if kind == "F16":
        data[1::2] = bytes(0x20 | (b & 0x83) for b in data[1::2])  # about 0.01, both signs
    for at in scales:
        for start in range(at, len(data), size):
            data[start : start + 2] = b"\x01\x10"  # about 0.0005
    return bytes(data)


def probe_tensors(shape):
    """(name, type, [columns, rows]) of a llama-like model with one matrix type; norms are F32."""
    d, kv, ff = shape["hidden"], shape["kv_dim"], shape["ffn"]
    kind = shape["type"]
    out = [("token_embd.weight", shape.get("head_type", kind), (d, shape["vocab"]))]
    for i in range(shape["layers"]):
        b = f"blk.{i}."
        out.append((b + "attn_norm.weight", "F32", (d,)))
        out += [(b + "attn_q.weight", kind, (d, d)), (b + "attn_k.weight", kind, (d, kv))]
        out += [(b + "attn_v.weight", kind, (d, kv)), (b + "attn_output.weight", kind, (d, d))]
        out.append((b + "ffn_norm.weight", "F32", (d,)))
        out += [(b + "ffn_gate.weight", kind, (d, ff)), (b + "ffn_up.weight", kind, (d, ff))]
        out.append((b + "ffn_down.weight", kind, (ff, d)))
    out.append(("output_norm.weight", "F32", (d,)))
    return out


def _tensor_bytes(kind, dims):
    if kind == "F32":
        return 4 * dims[0]
    _, block, size, _ = BLOCKS[kind]
    if dims[0] % block:
        raise JobError("probe", f"a row of {dims[0]} does not fill {kind} blocks")
    return dims[0] // block * size * dims[1]


def probe(job):
    """Write a model of random weights; answers with the bytes one token reads, by type."""
    shape, path = job["shape"], job["path"]
    if shape["hidden"] % shape["head_dim"] or shape["kv_dim"] % shape["head_dim"]:
        raise JobError("probe", "widths must be multiples of the head size")

    def text(s):
        raw = s.encode()
        return struct.pack("<Q", len(raw)) + raw

    def u32(key, value):
        return text(key) + struct.pack("<II", 4, value)

    def string(key, value):
        return text(key) + struct.pack("<I", 8) + text(value)

    meta = [
        string("general.architecture", "llama"),
        string("general.name", "probe"),
        u32("llama.block_count", shape["layers"]),
        u32("llama.context_length", 32768),
        u32("llama.embedding_length", shape["hidden"]),
        u32("llama.feed_forward_length", shape["ffn"]),
        u32("llama.attention.head_count", shape["hidden"] // shape["head_dim"]),
        u32("llama.attention.head_count_kv", shape["kv_dim"] // shape["head_dim"]),
        u32("llama.rope.dimension_count", shape["head_dim"]),
        u32("llama.attention.key_length", shape["head_dim"]),
        u32("llama.attention.value_length", shape["head_dim"]),
        u32("llama.vocab_size", shape["vocab"]),
        text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
        string("tokenizer.ggml.model", "no_vocab"),
    ]
    tensors = probe_tensors(shape)
    table, offset, read = [], 0, {}
    for name, kind, dims in tensors:
        number = 0 if kind == "F32" else BLOCKS[kind][0]
        size = _tensor_bytes(kind, dims)
        table.append(
            text(name)
            + struct.pack("<I", len(dims))
            + b"".join(struct.pack("<Q", n) for n in dims)
            + struct.pack("<IQ", number, offset)
        )
        offset += -(-size // 32) * 32
        read[kind] = read.get(kind, 0) + size
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta)) + b"".join(meta) + b"".join(table)
    if shutil.disk_usage(os.path.dirname(path)).free < 1.1 * offset + (64 << 20):
        raise JobError("no-space", f"the device has no room for a probe file of {offset // 10**6} MB")
    tiles = {}
    with open(path, "wb") as f:
        f.write(head + b"\0" * (-len(head) % 32))
        for _, kind, dims in tensors:
            size = _tensor_bytes(kind, dims)
            if kind == "F32":
                f.write(struct.pack("<f", 1.0) * dims[0])
            else:
                tile = tiles.setdefault(kind, _tile(kind))
                for start in range(0, size, len(tile)):
                    f.write(tile[: min(len(tile), size - start)])
            f.write(b"\0" * (-size % 32))
    return {"bytes": os.path.getsize(path), "read": read}


# ---------------------------------------------------------------- measuring

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


def _tokens(n, vocab, seed):
    state, out = seed, []
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append((state >> 33) % vocab)
    return out


class _Llama:
    """llama-cpp-python's low-level functions, of old and new builds."""

    def __init__(self, job, threads):
        os.environ["GGML_NO_BACKTRACE"] = "1"
        import llama_cpp.llama_cpp as lib

        self.lib, self.errors = lib, []

        @lib.llama_log_callback
        def log(level, text, _data):
            if level == 4 and len(self.errors) < 20:
                self.errors.append(text.decode("utf-8", "replace").strip())

        self._log = log
        lib.llama_log_set(log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _limit_growth(job)
        flags = job["flags"]
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 999 if job.get("backend") == "gpu" else 0
        if hasattr(params, "load_mode"):
            params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if flags["mmap"] else lib.LLAMA_LOAD_MODE_NONE
        else:
            params.use_mmap = bool(flags["mmap"])
        began = time.perf_counter_ns()
        self.model = lib.llama_model_load_from_file(os.fsencode(job["path"]), params)
        self.load_ns = time.perf_counter_ns() - began
        if not self.model:
            raise JobError("load", f"llama.cpp cannot load the file: {self._why()}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        context = lib.llama_context_default_params()
        context.n_ctx = int(flags["context_tokens"])
        context.n_batch = min(context.n_ctx, 2048)
        context.n_ubatch = min(int(flags["ubatch"]), context.n_batch)
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = KV_TYPES[flags["kv_type"]]
        if hasattr(context, "flash_attn_type"):
            context.flash_attn_type = 1 if flags["flash_attention"] else 0
        elif hasattr(context, "flash_attn"):
            context.flash_attn = bool(flags["flash_attention"])
        self.n_batch = context.n_batch
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise JobError("load", f"llama.cpp cannot open a context: {self._why()}")
        self.batch = lib.llama_batch_init(self.n_batch, 0, 1)
        self.position = 0

    def _why(self):
        return self.errors[0] if self.errors else "no reason given by the library"

    def clear(self):
        lib = self.lib
        if hasattr(lib, "llama_memory_clear"):
            lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        else:
            lib.llama_kv_self_clear(self.context)
        self.position = 0

    def feed(self, tokens):
        for start in range(0, len(tokens), self.n_batch):
            part, batch = tokens[start : start + self.n_batch], self.batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = self.position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == len(part) - 1
            if self.lib.llama_decode(self.context, batch) != 0:
                raise JobError("decode", f"llama.cpp failed to decode at position {self.position}")
            self.lib.llama_synchronize(self.context)
            self.position += len(part)

    def set_threads(self, n):
        self.lib.llama_set_n_threads(self.context, n, n)


def _peak_rss(pid="self"):
    for line in (_read(f"/proc/{pid}/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limit_growth(job):
    """Put this process under the job's memory limit; what it takes from here on counts.

    Without a control group its data may grow by so much. That is stricter than resident memory, because
    what is reserved counts before it is touched; files that are mapped do not count at all.
    """
    limit = job.get("memory_limit_bytes")
    if not limit:
        return
    if job.get("group"):
        with open(os.path.join(job["group"], "cgroup.procs"), "w") as f:
            f.write(str(os.getpid()))
        return
    import resource

    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmData:"):
            limit += int(line.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _with_library(job):
    before = _peak_rss()
    sweep_counts = list(job.get("sweep") or [])
    engine = _Llama(job, job.get("threads") or 1)
    n_prompt, n_gen = job["n_prompt"], job["n_gen"]
    if n_prompt + n_gen > job["flags"]["context_tokens"]:
        raise JobError("config", "prompt and new tokens do not fit into the context")
    prompt, new = _tokens(n_prompt, engine.vocab, 1), _tokens(max(n_gen, 36), engine.vocab, 2)
    sweep = {}
    for n in sweep_counts:
        engine.set_threads(n)
        engine.clear()
        for token in new[:4]:
            engine.feed([token])
        began = time.perf_counter_ns()
        for token in new[4:20]:
            engine.feed([token])
        sweep[str(n)] = 16e9 / (time.perf_counter_ns() - began)
    threads = job.get("threads") or max((int(n) for n in sweep), key=lambda n: sweep[str(n)], default=1)
    engine.set_threads(threads)

    def once():
        engine.clear()
        began = time.perf_counter_ns()
        engine.feed(prompt)
        between = time.perf_counter_ns()
        engine.feed([new[0]])
        first = time.perf_counter_ns()
        for token in new[1:n_gen]:
            engine.feed([token])
        return between - began, time.perf_counter_ns() - between, first - began

    once()
    timed = [once() for _ in range(job["repeats"])]
    sustained = _sustained(job, lambda: once()[1] / 1e9)
    fill = None
    if job.get("fill"):
        engine.clear()
        fill = job["flags"]["context_tokens"]
        stream = _tokens(fill, engine.vocab, 3)
        engine.feed(stream[: fill - 4])
        for token in stream[fill - 4 :]:
            engine.feed([token])
    text = ctypes.create_string_buffer(256)
    engine.lib.llama_model_desc(engine.model, text, 256)
    return {
        "engine": "llama-cpp-python",
        "depth": n_prompt,
        "engine_version": _module_version("llama_cpp", "llama-cpp-python"),
        "threads": threads,
        "sweep": sweep,
        "prefill_ns": [t[0] for t in timed],
        "decode_ns": [t[1] for t in timed],
        "first_token_ns": [t[2] for t in timed],
        "sustained": sustained,
        "load_ns": engine.load_ns,
        "before_bytes": before,
        "peak_bytes": _peak_rss() - before,
        "tokens_filled": fill or engine.position,
        "n_batch": engine.n_batch,
        "model_type": text.value.decode("utf-8", "replace"),
        "model_bytes": int(engine.lib.llama_model_size(engine.model)),
        "model_params": int(engine.lib.llama_model_n_params(engine.model)),
        "build_commit": "unknown",
    }


def _sustained(job, step):
    """Decode again and again for `sustained_s`: tokens/s of every round, joules where metered."""
    seconds = job.get("sustained_s") or 0
    if not seconds:
        return None
    meter = _Meter()
    began, rounds = time.time(), []
    while time.time() - began < seconds:
        rounds.append(job["n_gen"] / step())
    joules, name = meter.stop()
    return {
        "tps": rounds,
        "seconds": time.time() - began,
        "joules": joules,
        "meter": name,
        "tokens": len(rounds) * job["n_gen"],
    }


class _Meter:
    """Energy from RAPL counters, or power from tegrastats added up; nothing where neither can be read."""

    def __init__(self):
        self.counters = {}
        for path in glob.glob("/sys/class/powercap/intel-rapl:[0-9]*/energy_uj"):
            text = _read(path)
            if text and text.isdigit() and path.count(":") == 1:
                self.counters[path] = int(text)
        self.process, self.watts = None, []
        if not self.counters and shutil.which("tegrastats"):
            self.process = subprocess.Popen(
                ["tegrastats", "--interval", "500"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
            )
            self.began = time.time()
            threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self):
        import re

        for line in self.process.stdout:
            found = re.search(r"(?:VDD_IN|POM_5V_IN|VIN_SYS_5V0) (\d+)mW", line.decode("utf-8", "replace"))
            if found:
                self.watts.append(int(found.group(1)) / 1000)

    def stop(self):
        if self.counters:
            total = 0.0
            for path, before in self.counters.items():
                after = int(_read(path) or before)
                if after < before:  # the counter went round
                    after += int(_read(os.path.join(os.path.dirname(path), "max_energy_range_uj")) or 0)
                total += (after - before) / 1e6
            return total, "RAPL"
        if self.process is not None:
            self.process.terminate()
            if self.watts:
                return sum(self.watts) / len(self.watts) * (time.time() - self.began), "tegrastats"
        return None, None


def llama_bench_rows(raw, prompt=True):
    """Rows (prompt, generation) of llama-bench's JSON; fields by name, for they change between builds."""

    def samples(row):
        values = row.get("samples_ns")
        return isinstance(values, list) and values and all(type(v) is int and v > 0 for v in values)

    def count(row, name):
        return row[name] if type(row.get(name)) is int else -1

    try:
        found = json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        found = None
    rows = [r for r in found if isinstance(r, dict) and samples(r)] if isinstance(found, list) else []
    pp = next((r for r in rows if count(r, "n_prompt") > 0 and count(r, "n_gen") == 0), None)
    tg = next((r for r in rows if count(r, "n_prompt") == 0 and count(r, "n_gen") > 0), None)
    if tg is None or (prompt and pp is None):
        raise JobError("crashed", "llama-bench printed no times: " + raw[:200].decode("utf-8", "replace"))
    for name in ("n_threads", "n_batch", "model_size", "model_n_params"):
        if name in tg and count(tg, name) < 0:
            raise JobError("crashed", f"llama-bench printed {name} {str(tg[name])[:60]!r}")
    return pp, tg


def _with_llama_bench(job):
    flags, program = job["flags"], job["llama_bench"]
    threads = job.get("threads") or _threads()

    _limit_growth(job)

    def run(n_prompt, n_gen, repeats):
        command = [program, "-m", job["path"], "-p", str(n_prompt), "-n", str(n_gen), "-r", str(repeats)]
        command += ["-t", str(threads), "-ub", str(flags["ubatch"]), "-ctk", flags["kv_type"]]
        command += ["-ctv", flags["kv_type"], "-fa", "1" if flags["flash_attention"] else "0", "-o", "json"]
        if job.get("backend") == "gpu":
            command += ["-ngl", "999"]
        else:
            command += ["-ngl", "0"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
            raise JobError("crashed", f"llama-bench ended with {done.returncode}: {' | '.join(tail)}")
        return done.stdout

    pp, tg = llama_bench_rows(run(job["n_prompt"], job["n_gen"], job["repeats"]))

    def step():
        _, row = llama_bench_rows(run(0, job["n_gen"], 1), prompt=False)
        return row["samples_ns"][0] / 1e9

    sustained = _sustained(job, step)
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "engine": "llama-bench",
        "depth": 0,
        "engine_version": str(tg.get("build_commit", "unknown")),
        "threads": int(tg.get("n_threads", threads)),
        "sweep": {},
        "prefill_ns": pp["samples_ns"],
        "decode_ns": tg["samples_ns"],
        "first_token_ns": [],
        "sustained": sustained,
        "load_ns": 0,
        "before_bytes": 0,
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "tokens_filled": job["n_prompt"],
        "n_batch": int(tg.get("n_batch", 0)),
        "model_type": str(tg.get("model_type", "")),
        "model_bytes": int(tg.get("model_size", 0)),
        "model_params": int(tg.get("model_n_params", 0)),
        "build_commit": str(tg.get("build_commit", "unknown")),
    }


def engine(job):
    """Measure in this process; `measure` starts it in one of its own."""
    if job.get("spin"):  # a hung engine, for tests of what happens then
        time.sleep(job["spin"])
    if job.get("llama_bench") and job.get("prefer_bench"):
        return _with_llama_bench(job)
    if _module_version("llama_cpp", "llama-cpp-python"):
        return _with_library(job)
    if job.get("llama_bench"):
        return _with_llama_bench(job)
    raise JobError("runtime", "the device has neither llama-cpp-python nor llama-bench")


class _Life:
    """Knows whether the other side is still there."""

    def __init__(self):
        self.last, self.gone = time.time(), False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            if not os.read(0, 4096):
                self.gone = True
                return
            self.last = time.time()

    def ended(self):
        return self.gone or time.time() - self.last > SILENCE_S


def measure(job, life):
    """Run the engine in a process group of its own, under a memory limit if asked; kill it when told to."""
    before, began, own = environment(), time.time(), _own_s()
    out = os.path.join(job["folder"], "result.json")
    with contextlib.suppress(OSError):
        os.unlink(out)
    limit = job.get("memory_limit_bytes")
    group = _memory_group(limit) if limit and job.get("limit_by") != "rlimit" else None
    work = dict(job, out=out, group=group)
    file = os.path.join(job["folder"], "job.json")
    with open(file, "w", encoding="utf-8") as f:
        json.dump(work, f)
    available = _available()
    env = dict(os.environ, LC_ALL="C")
    env.pop("OMP_WAIT_POLICY", None)

    errors = open(os.path.join(job["folder"], "stderr"), "wb+")  # noqa: SIM115
    child = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "engine", file],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=env,
        start_new_session=True,
    )
    deadline, lowest, said, hung = time.time() + job["timeout_s"], available or 0, 0.0, False
    try:
        while child.poll() is None:
            if life.ended():
                raise JobError("lost", "the other side went away")
            if time.time() > deadline:
                hung = True
                break
            if time.time() - said > BEAT_S:
                said = time.time()
                lowest = min(lowest, _available() or lowest)
                _say({"beat": round(said)})
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
    finally:
        if child.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        ooms = _group_kills(group)
    errors.seek(0)
    tail = [x.strip() for x in errors.read()[-4096:].decode("utf-8", "replace").splitlines() if x.strip()][
        -3:
    ]
    errors.close()
    if hung:
        raise JobError(
            "hung", f"the measurement did not finish within {job['timeout_s']:.0f} s and was killed"
        )
    answer = None
    with contextlib.suppress(OSError, ValueError), open(out, encoding="utf-8") as f:
        answer = json.load(f)
    if answer is None:
        code = child.returncode
        if ooms or code == -signal.SIGKILL:
            why = "over the memory limit" if limit else "most likely out of memory"
            raise JobError("killed", f"the measurement was killed ({why})")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise JobError(
            "crashed", "the measurement ended with {}: {}".format(name, " | ".join(tail) or "no message")
        )
    if "error" in answer:
        raise JobError(answer["kind"], answer["error"])
    return dict(
        answer["ok"],
        before=before,
        after=environment(),
        elapsed_s=max(0.0, time.time() - began),
        own_s=_own_s() - own,
        available_drop_bytes=None if available is None else max(0, available - lowest),
        memory_limit={"bytes": limit, "by": "cgroup" if group else "RLIMIT_DATA"} if limit else None,
    )


def _available():
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _memory_group(limit):
    """A control group with a hard limit (version 2, else 1), or None where this user may not make one."""
    own = {}
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            own[name] = path
    places = []
    if "" in own:
        for parent in ("/sys/fs/cgroup" + own[""], "/sys/fs/cgroup"):
            places.append((parent, "memory.max", "memory.swap.max", "0"))
    if "memory" in own:
        for parent in ("/sys/fs/cgroup/memory" + own["memory"], "/sys/fs/cgroup/memory"):
            places.append((parent, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", str(limit)))
    for parent, limit_file, swap_file, swap in places:
        path = os.path.join(parent, f"edgeprune-{os.getpid()}")
        try:
            os.mkdir(path)
        except OSError:
            continue
        try:
            # a folder that is no control group has no such file yet
            with open(os.path.join(path, limit_file), "r+") as f:
                f.write(str(limit))
            with contextlib.suppress(OSError), open(os.path.join(path, swap_file), "r+") as f:
                f.write(swap)
            return path
        except OSError:
            os.rmdir(path)
    return None


def _group_kills(group):
    if group is None:
        return 0
    text = _read(os.path.join(group, "memory.events")) or _read(os.path.join(group, "memory.oom_control"))
    events = dict(x.split() for x in (text or "").splitlines())
    for _ in range(20):
        try:
            os.rmdir(group)
            break
        except OSError:
            time.sleep(0.1)
    return int(events.get("oom_kill", 0))


# ---------------------------------------------------------------- the conversation

JOBS = {
    "facts": facts,
    "environment": environment,
    "digest": digest,
    "finish": finish,
    "remove": remove,
    "probe": probe,
}


def serve():
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([0], [], [], SILENCE_S)
        piece = os.read(0, 1) if ready else b""
        if not piece:
            return 1
        line += piece
    job = json.loads(line.decode())
    life = _Life()
    try:
        if job["job"] == "measure":
            answer = measure(job, life)
        else:
            beating = threading.Event()

            def beat():
                while not beating.wait(BEAT_S):
                    _say({"beat": round(time.time())})

            threading.Thread(target=beat, daemon=True).start()
            answer = JOBS[job["job"]](job)
            beating.set()
        _say({"ok": answer})
    except JobError as error:
        _say({"error": str(error), "kind": error.kind})
    except OSError as error:
        kind = "no-space" if error.errno in (28, 122) else "system"
        _say({"error": "{}: {}".format(error.strerror or error, error.filename or ""), "kind": kind})
    return 0


def main(args):
    if args[:1] == ["serve"]:
        code = serve()
        sys.stdout.flush()
        os._exit(code)
    if args[:1] == ["receive"]:
        try:
            receive(args[1], int(args[2]))
        except OSError as error:
            sys.stderr.write(f"{error.strerror or error}\n")
            return 28 if error.errno in (28, 122) else 1
        return 0
    if args[:1] == ["engine"]:
        with open(args[1], encoding="utf-8") as f:
            job = json.load(f)
        try:
            answer = {"ok": engine(job)}
        except JobError as error:
            answer = {"error": str(error), "kind": error.kind}
        except MemoryError:
            answer = {"error": "not enough memory", "kind": "killed"}
        with open(job["out"] + ".part", "w", encoding="utf-8") as f:
            json.dump(answer, f)
        os.replace(job["out"] + ".part", job["out"])
        os._exit(0)
    sys.stderr.write("usage: agent.py serve | receive PATH OFFSET\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
