"""Three ways to score tokens: torch folders, GGUF files through llama.cpp, ONNX folders through ONNX Runtime.

Each reads the artifact's own tokenizer: what ships is what is scored.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeprune import locate, rundir
from edgeprune.costs.gguf_header import MAGIC, read_header
from edgeprune.errors import ConfigError, MissingExtraError
from edgeprune.evaluation.groups import Group, Store, line_of
from edgeprune.records import LaunchFlags, make_key
from edgeprune.runtimes import llama_cpp

Advance = Callable[[int], None]

KINDS = ("torch", "gguf", "onnx")
_TORCH_ROWS = 4096  # tokens computed together
_SECONDS_PER_TOKEN = 20.0  # of one group of tokens at worst, so that a hung runtime ends some day


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an artifact is run; what changes a score is part of its key."""

    threads: int = 1
    dtype: str = "float32"  # torch
    device: str = "cpu"  # torch
    kv_type: str = "f16"  # llama.cpp
    exact: bool = False  # llama.cpp: the file's weights and everything else in float32, as torch computes
    max_length: int | None = None  # None: what the model was trained for


class Engine(Protocol):
    """One artifact that can be tokenized for and scored."""

    kind: str
    key: str  # of the artifact and everything that changes its scores
    max_length: int
    prefix_token: int

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of (text, with the tokenizer's own special tokens) pairs."""
        ...

    def score(self, groups: Sequence[Group], store: Store, advance: Advance) -> None:
        """Append the groups to the store as they are finished, longest first."""
        ...


def kind_of(path: Path) -> str:
    """'torch', 'gguf' or 'onnx'. Raises ConfigError for anything else."""
    if path.is_file():
        with path.open("rb") as f:
            if f.read(len(MAGIC)) == MAGIC:
                return "gguf"
        raise ConfigError(f"{path} is no GGUF file", "give a GGUF file, a model folder or an ONNX folder")
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if any(path.glob("onnx/*.onnx")) or any(path.glob("*.onnx")):
        return "onnx"
    if (path / "config.json").is_file():
        return "torch"
    raise ConfigError(
        f"{path} is neither a Hugging Face folder nor an ONNX folder",
        "give a folder with config.json, an ONNX folder or a GGUF file",
    )


def open_engine(path: Path, settings: Settings) -> Engine:
    """Raises ConfigError for what is no artifact, MissingExtraError for a missing library."""
    kind = kind_of(path)
    if kind == "gguf":
        return Gguf(path, settings)
    return Onnx(path, settings) if kind == "onnx" else Torch(path, settings)


def _folder_digest(folder: Path) -> str:
    names = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in (".safetensors", ".json", ".onnx", ".model")
    )
    names += sorted(folder.rglob("*.onnx_data"))
    return rundir.sha256_bytes(
        "\n".join(f"{p.relative_to(folder)} {rundir.sha256_file(p)}" for p in names).encode()
    )


def _by_length(groups: Sequence[Group]) -> list[Group]:
    # the longest first: what does not fit fails at once, and the time left is over- not underestimated
    return sorted(groups, key=lambda g: (-g.length, -g.tokens, g.h))


class _HubTokenizer:
    """transformers' tokenizer of a folder, used as the harness uses it."""

    def __init__(self, folder: Path) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtraError("transformers", "torch") from None
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False
            )
        except Exception as error:  # any damage has the same remedy
            raise ConfigError(
                f"{folder} has no tokenizer that can be read: {error!s:.120}", "is the folder complete?"
            ) from None

    @property
    def prefix_token(self) -> int:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        found = bos if bos is not None else eos
        return 0 if found is None else int(found)

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        out = []
        for text, special in texts:
            options = {} if special else {"add_special_tokens": False}
            out.append([int(t) for t in self._tokenizer.encode(text, verbose=False, **options)])
        return out


def _length(config: dict[str, Any], settings: Settings) -> int:
    trained = config.get("max_position_embeddings")
    return settings.max_length or (int(trained) if isinstance(trained, int) else 2048)


@dataclass(slots=True)
class _Artifact:
    """What every engine knows of its artifact; `_open` of a subclass finds it out."""

    path: Path
    settings: Settings
    kind: str = ""
    key: str = ""
    max_length: int = 0
    prefix_token: int = 0
    _tokenizer: Any = None

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        return self._tokenizer.encode(texts)


@dataclass(slots=True)
class Torch(_Artifact):
    """A Hugging Face folder, pruned or not, in this process."""

    _model: Any = None
    _window: int = 0  # of sliding attention; 0: none

    def _open(self) -> None:
        self.kind = "torch"
        config = locate.read_config(self.path)
        self.max_length = _length(config, self.settings)
        self._tokenizer = _HubTokenizer(self.path)
        self.prefix_token = self._tokenizer.prefix_token
        window = config.get("sliding_window")
        self._window = int(window) if isinstance(window, int) else 0
        self.key = make_key(
            "eval_engine",
            *("torch", _folder_digest(self.path), self.settings.dtype, self.max_length),
            importlib.metadata.version("torch"),
        )

    def score(self, groups: Sequence[Group], store: Store, advance: Advance) -> None:
        import torch

        from edgeprune import surgery

        if self._model is None:
            dtype = getattr(torch, self.settings.dtype)
            self._model = surgery.load(self.path, dtype=dtype, device=self.settings.device).eval()
        with store.open() as out, torch.inference_mode():
            for batch in _batches(_by_length(groups)):
                for group, scored in zip(batch, self._batch(batch), strict=True):
                    out.write(line_of(group.h, *scored))
                out.flush()
                advance(len(batch))

    def _batch(self, batch: Sequence[Group]) -> list[tuple[list[float], list[bool]]]:
        """One row per group: the prefix, then the tails one behind the other, each blind to the others."""
        import torch

        if any(self._window and g.length >= self._window and len(g.tails) > 1 for g in batch):
            return [self._apart(g) for g in batch]
        width = max(g.tokens for g in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        branched = len(batch) > 1 or len(batch[0].tails) > 1
        sees = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1) if branched else None
        for r, group in enumerate(batch):
            at = len(group.prefix)
            flat = [*group.prefix, *(t for tail in group.tails for t in tail)]
            ids[r, : len(flat)] = torch.tensor(flat)
            positions[r, :at] = torch.arange(at)
            if sees is not None:
                sees[r, :at, :at] = torch.ones(at, at, dtype=torch.bool).tril()
            for tail in group.tails:
                n = len(tail)
                positions[r, at : at + n] = torch.arange(len(group.prefix), len(group.prefix) + n)
                if sees is not None:
                    sees[r, at : at + n, : len(group.prefix)] = True
                    sees[r, at : at + n, at : at + n] = torch.ones(n, n, dtype=torch.bool).tril()
                at += n
        hidden = self._hidden(ids, positions, sees)
        return [self._read(hidden[r], group) for r, group in enumerate(batch)]

    def _apart(self, group: Group) -> tuple[list[float], list[bool]]:
        """A sliding window ends inside the group: each choice in a row of its own, with a plain mask."""
        ll, greedy = [], []
        for c, tail in enumerate(group.tails):
            alone = Group(
                h=group.h,
                prefix=group.prefix + tail,
                tails=((),),
                starts=(group.starts[c],),
                targets=(group.targets[c],),
            )
            found = self._batch([alone])[0]
            ll += found[0]
            greedy += found[1]
        return ll, greedy

    def _hidden(self, ids: Any, positions: Any, sees: Any) -> Any:
        """Last hidden states [rows, tokens, width]."""
        import torch

        model, device = self._model, self.settings.device
        mask = None
        if sees is not None:
            mask = sees[:, None].to(device)
            if model.config._attn_implementation == "eager":
                kind = next(model.parameters()).dtype
                mask = torch.zeros(mask.shape, dtype=kind, device=device).masked_fill(
                    ~mask, torch.finfo(kind).min
                )
        return (
            model.get_decoder()(
                input_ids=ids.to(device),
                position_ids=positions.to(device),
                attention_mask=mask,
                use_cache=False,
            )
        ).last_hidden_state

    def _read(self, hidden: Any, group: Group) -> tuple[list[float], list[bool]]:
        import torch

        shared = len(group.prefix)
        begins = [shared + sum(map(len, group.tails[:c])) for c in range(len(group.tails))]
        ll, greedy = [], []
        for start, targets, begin in zip(group.starts, group.targets, begins, strict=True):
            places = [p if p < shared else begin + p - shared for p in range(start, start + len(targets))]
            total, same = 0.0, True
            # logits of a long window are large: a few rows at once
            for first in range(0, len(places), 512):
                part = torch.tensor(places[first : first + 512], device=hidden.device)
                wanted = torch.tensor(targets[first : first + 512], device=hidden.device)
                logits = self._logits(hidden[part])
                chances = torch.log_softmax(logits, dim=-1)
                total += float(chances.gather(1, wanted[:, None]).double().sum())
                same = same and bool((logits.argmax(dim=-1) == wanted).all())
            if total != total:
                raise ConfigError(f"{self.path}: the model gives logits that are not finite")
            ll.append(total)
            greedy.append(same)
        return ll, greedy

    def _logits(self, hidden: Any) -> Any:
        import torch

        logits = self._model.lm_head(hidden).float()
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits


def _batches(groups: Sequence[Group]) -> list[list[Group]]:
    """Rows of similar length, together at most _TORCH_ROWS tokens with their padding."""
    out: list[list[Group]] = []
    for group in sorted(groups, key=lambda g: -g.tokens):
        if out and out[-1][0].tokens * (len(out[-1]) + 1) <= _TORCH_ROWS:
            out[-1].append(group)
        else:
            out.append([group])
    return out


class _InChild(_Artifact):
    """Groups go to a fresh process, which appends to the store itself."""

    def _start(self, groups: Path, out: Path, timeout_s: float, poll: Callable[[], None]) -> None:
        raise NotImplementedError

    def score(self, groups: Sequence[Group], store: Store, advance: Advance) -> None:
        end = store.size()

        def poll() -> None:
            nonlocal end
            done, end = store.count(end)
            if done:
                advance(done)

        # not in the system's folder, which may be memory: a widened model can lie here
        with tempfile.TemporaryDirectory(prefix=".edgeprune-", dir=store.path.parent) as folder:
            given = Path(folder, "groups.jsonl")
            given.write_text("".join(g.line() + "\n" for g in _by_length(groups)), encoding="utf-8")
            self._start(given, store.path, _SECONDS_PER_TOKEN * sum(g.tokens for g in groups) + 600, poll)
        poll()


def _context(path: Path) -> int:
    """What a GGUF file says its model was trained for."""
    values = read_header(path).values()
    found = values.get(f"{values.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found > 0 else 2048


class Gguf(_InChild):
    """A GGUF file through llama.cpp, with the tokenizer inside the file."""

    def _open(self) -> None:
        self.kind = "gguf"
        _, facts = llama_cpp.tokenize(self.path, [])
        self.max_length = self.settings.max_length or _context(self.path)
        self.prefix_token = facts["bos"] if facts["bos"] >= 0 else max(0, facts["eos"])
        self.key = make_key(
            "eval_engine",
            *("gguf", rundir.sha256_file(self.path), *self._arithmetic(), self.max_length),
            llama_cpp.RUNTIME.version(),
        )

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        return llama_cpp.tokenize(self.path, texts)[0]

    def _arithmetic(self) -> tuple[str, bool, bool]:
        """(KV cache, flash attention, weights widened).

        llama.cpp rounds an F32 cache to F16 for flash attention, and activations to F16 for F16 weights.
        """
        if self.settings.exact:
            return "f32", False, True
        return self.settings.kv_type, self.settings.kv_type != "f32", False

    def _start(self, groups: Path, out: Path, timeout_s: float, poll: Callable[[], None]) -> None:
        kv_type, flash, widen = self._arithmetic()
        flags = LaunchFlags(
            context_tokens=min(self.max_length, 2048),
            ubatch=512,
            kv_type=kv_type,
            mmap=True,
            flash_attention=flash,
        )
        path, threads = self.path, self.settings.threads
        if widen:
            path = groups.with_name("widened.gguf")
            llama_cpp.widen(self.path, path, threads=threads)
        llama_cpp.score(path, groups, out, flags=flags, threads=threads, timeout_s=timeout_s, poll=poll)


class Onnx(_InChild):
    """An ONNX folder through plain ONNX Runtime, with the tokenizer files beside it."""

    def _open(self) -> None:
        from edgeprune.runtimes import onnxruntime

        reason = onnxruntime.RUNTIME.available()
        if reason is not None:
            raise MissingExtraError("onnxruntime", onnxruntime.RUNTIME.extra)
        self.kind = "onnx"
        self._tokenizer = _HubTokenizer(self.path)
        self.prefix_token = self._tokenizer.prefix_token
        self.max_length = _length(locate.read_config(self.path), self.settings)
        self.key = make_key(
            "eval_engine",
            *("onnx", _folder_digest(self.path), self.max_length),
            onnxruntime.RUNTIME.version(),
        )

    def _start(self, groups: Path, out: Path, timeout_s: float, poll: Callable[[], None]) -> None:
        from edgeprune.runtimes import onnxruntime

        onnxruntime.score(
            self.path, groups, out, threads=self.settings.threads, timeout_s=timeout_s, poll=poll
        )
