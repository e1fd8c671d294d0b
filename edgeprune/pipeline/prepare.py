"""From a parent model to scores: token windows, calibration, metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file, save_file

import edgeprune
from edgeprune import calibration, data, gradients, registry, rundir, surgery, tokenizer
from edgeprune.metrics.base import Metric
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.records import (
    CalibrationStats,
    ImportanceScores,
    TokenSet,
    make_key,
)

EVAL_SEED_OFFSET = 7_919  # held-out text comes from another random stream


def save_arrays(run: rundir.RunDir, relative: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Write arrays beside the records; returns their sha256."""
    path = run.path(relative)
    with rundir.atomic_path(path) as temporary:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
    return rundir.sha256_file(path)


class Tokens:
    """Calibration and held-out windows; the model is loaded once for both when it has to write them."""

    def __init__(
        self,
        run: rundir.RunDir,
        parent: Parent,
        progress: Progress,
        *,
        together: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """`together` lists (samples, tokens, seed) of sets that one pass over the weights can write."""
        self._run = run
        self._parent = parent
        self._progress = progress
        self._together = tuple(together) if len({tokens for _, tokens, _ in together}) == 1 else ()
        self._written: dict[tuple[int, int], np.ndarray] = {}

    def _sample(self, n_samples: int, n_tokens: int, seed: int) -> np.ndarray:
        wanted = (n_samples, seed)
        if wanted not in self._written:
            sets = [wanted]
            if (n_samples, n_tokens, seed) in self._together:
                sets = [(n, s) for n, _, s in self._together]
            model = surgery.load(self._parent.folder)
            arrays = data.sample_sets(model, sets, n_tokens=n_tokens, progress=self._progress)
            self._written.update(zip(sets, arrays, strict=True))
        return self._written[wanted]

    def get(
        self, text: str | None, *, n_samples: int, n_tokens: int, seed: int
    ) -> tuple[TokenSet, np.ndarray]:
        """Windows [n_samples, n_tokens] from `text` (file or data set), or sampled from the model."""
        run, parent = self._run, self._parent
        origin = "sampled from the model" if text is None else text
        content = None
        if text is not None:
            content = data.read_text(text)
            key_text = rundir.sha256_bytes(content.encode())
        else:
            key_text = "self"
        n_tokens = min(n_tokens, parent.graph.dims.max_context)
        beside = [list(one) for one in self._together if (n_samples, n_tokens, seed) in self._together]
        key = make_key("token_set", parent.key, key_text, n_samples, n_tokens, seed, beside)
        relative = f"arrays/tokens-{key}.safetensors"

        def compute() -> TokenSet:
            if content is None:
                windows = self._sample(n_samples, n_tokens, seed)
            else:
                windows = data.windows(
                    content,
                    lambda t: tokenizer.encode(parent.folder, t),
                    n_samples=n_samples,
                    n_tokens=n_tokens,
                    seed=seed,
                    where=origin,
                )
            save_arrays(run, relative, {"tokens": windows})
            return TokenSet(
                origin=origin,
                seed=seed,
                n_samples=n_samples,
                n_tokens=n_tokens,
                sha256=rundir.sha256_bytes(windows.tobytes()),
                path=relative,
                key=key,
            )

        record = run.stage(TokenSet, key, compute, name="tokens", valid=lambda t: self._read(t) is not None)
        windows = self._read(record)
        assert windows is not None
        return record, windows

    def _read(self, record: TokenSet) -> np.ndarray | None:
        path = self._run.path(record.path)
        if not path.is_file():
            return None
        windows = load_file(path)["tokens"]
        return windows if rundir.sha256_bytes(windows.tobytes()) == record.sha256 else None


def calibrate(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: Mapping[str, str],
    tokens: TokenSet,
    windows: np.ndarray,
    *,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], ImportanceScores, dict[str, np.ndarray]]:
    """Collect statistics and score every axis; returns (statistics, record, scores by axis)."""
    needs = metric.needs(options) | calibration.IMATRIX_NEEDS
    names = tuple(sorted(n.value for n in needs))
    backward = frozenset(n for n in needs if n.gradient)
    drawn = seed if backward else None  # forward statistics do not depend on the seed
    key = make_key("calibration_stats", parent.key, tokens.key, list(names), drawn, edgeprune.__version__)
    relative = f"arrays/calibration-{key}.safetensors"

    def collect() -> CalibrationStats:
        given = (parent.source, parent.graph, windows)
        arrays = calibration.collect(*given, needs - backward, progress=progress)
        if backward:
            arrays |= gradients.collect(*given, backward, seed=seed, progress=progress)
        return CalibrationStats(
            needs=names,
            tokens=int(windows.size),
            data_sha256=tokens.sha256,
            arrays=relative,
            arrays_sha256=save_arrays(run, relative, arrays),
            key=key,
        )

    def intact(stored: CalibrationStats | ImportanceScores) -> bool:
        path = run.path(stored.arrays)
        return path.is_file() and rundir.sha256_file(path) == stored.arrays_sha256

    stats = run.stage(CalibrationStats, key, collect, name="calibrate", valid=intact)
    arrays = load_file(run.path(stats.arrays))
    score_key = make_key("importance_scores", key, metric.name, dict(options), seed)
    score_path = f"arrays/scores-{score_key}.safetensors"

    def score() -> ImportanceScores:
        values = calibration.score(
            metric, options, parent.source, parent.graph, arrays, seed=seed, progress=progress
        )
        return ImportanceScores(
            metric=metric.name,
            options=dict(options),
            poolable=metric.poolable(options),
            arrays=score_path,
            arrays_sha256=save_arrays(run, score_path, values),
            key=score_key,
        )

    record = run.stage(ImportanceScores, score_key, score, name="score", valid=intact)
    return arrays, record, load_file(run.path(record.arrays))


def load_metric(name: str, given: Mapping[str, str]) -> tuple[Metric, dict[str, str]]:
    metric: Metric = registry.load("metrics", name, "METRIC")
    return metric, metric.resolve(given)
