"""From a parent model to scores: token windows, calibration, metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file, save_file

import edgeprune
from edgeprune import calibration, data, gradients, planner, registry, rundir, stability, surgery, tokenizer
from edgeprune.metrics.base import Metric, is_sequential
from edgeprune.pipeline.parent import Parent
from edgeprune.progress import Progress
from edgeprune.records import (
    CalibrationStats,
    ImportanceScores,
    RankStability,
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
        self, text: str | None, *, n_samples: int, n_tokens: int, seed: int, first: float = 1.0
    ) -> tuple[TokenSet, np.ndarray]:
        """Windows [n_samples, n_tokens] from `text` (file or data set), or sampled from the model.

        Of a text only the share `first` is used, from its beginning.
        """
        run, parent = self._run, self._parent
        origin = "sampled from the model" if text is None else text
        content = None
        if text is not None:
            content = data.read_text(text)
            content = content[: round(first * len(content))]
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

    stats = run.stage(CalibrationStats, key, collect, name="calibrate", valid=lambda r: _intact(run, r))
    arrays = load_file(run.path(stats.arrays))
    record, values = _store(
        run,
        metric,
        options,
        make_key("importance_scores", key, metric.name, dict(options), seed),
        lambda: calibration.score(
            metric, options, parent.source, parent.graph, arrays, seed=seed, progress=progress
        ),
    )
    return arrays, record, values


def _intact(run: rundir.RunDir, stored: CalibrationStats | ImportanceScores) -> bool:
    path = run.path(stored.arrays)
    return path.is_file() and rundir.sha256_file(path) == stored.arrays_sha256


def _store(
    run: rundir.RunDir,
    metric: Metric,
    options: Mapping[str, str],
    key: str,
    compute: Callable[[], Mapping[str, np.ndarray]],
    *,
    seeds: tuple[int, ...] = (),
    between: tuple[RankStability, ...] = (),
) -> tuple[ImportanceScores, dict[str, np.ndarray]]:
    """Scores under a key, computed only when they are not in the run folder yet."""
    path = f"arrays/scores-{key}.safetensors"

    def make() -> ImportanceScores:
        values = compute()
        return ImportanceScores(
            metric=metric.name,
            options=dict(options),
            poolable=metric.poolable(options),
            arrays=path,
            arrays_sha256=save_arrays(run, path, values),
            key=key,
            seeds=seeds,
            stability=between,
        )

    record = run.stage(ImportanceScores, key, make, name="score", valid=lambda r: _intact(run, r))
    return record, load_file(run.path(record.arrays))


def score_plain(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: Mapping[str, str],
    *,
    seed: int,
    progress: Progress,
) -> tuple[ImportanceScores, dict[str, np.ndarray]]:
    """Scores of a metric that wants no statistics."""
    return _store(
        run,
        metric,
        options,
        make_key("importance_scores", parent.key, metric.name, dict(options), seed),
        lambda: calibration.score(
            metric, options, parent.source, parent.graph, {}, seed=seed, progress=progress
        ),
    )


def score_in_order(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: Mapping[str, str],
    tokens: TokenSet,
    windows: np.ndarray,
    widths: Mapping[str, int],
    *,
    seed: int,
    progress: Progress,
) -> tuple[ImportanceScores, dict[str, np.ndarray]]:
    """Scores of a sequential metric: each layer sees the output of those before it, cut to `widths`."""
    return _store(
        run,
        metric,
        options,
        make_key("importance_scores", parent.key, tokens.key, metric.name, dict(options), seed, dict(widths)),
        lambda: (
            calibration.score_sequential(
                metric,
                options,
                parent.source,
                parent.graph,
                windows,
                lambda axis, scores: planner.best_units(scores, widths[axis.name], axis.groups),
                seed=seed,
                progress=progress,
            ).scores
        ),
    )


def over_seeds(
    run: rundir.RunDir,
    parent: Parent,
    metric: Metric,
    options: Mapping[str, str],
    seeds: Sequence[int],
    draws: Sequence[tuple[ImportanceScores, dict[str, np.ndarray]]],
    progress: Progress,
) -> tuple[ImportanceScores, dict[str, np.ndarray]]:
    """Mean scores of several calibration draws and how stable their ranks are; one draw stays as it is."""
    if len(draws) == 1:
        return draws[0]
    values = [scores for _, scores in draws]
    found = stability.rank_stability(values, parent.graph.axes)
    record, mean = _store(
        run,
        metric,
        options,
        make_key("importance_scores", "mean", [record.key for record, _ in draws]),
        lambda: stability.mean_scores(values, poolable=metric.poolable(options)),
        seeds=tuple(seeds),
        between=found,
    )
    progress.say(f"rank stability: {describe_stability(record)}")
    return record, mean


def describe_stability(record: ImportanceScores) -> str:
    """One line: Spearman between the calibration seeds, by kind of unit."""
    kinds = [f"{s.unit} {s.mean:.3f} (lowest axis {s.minimum:.3f})" for s in record.stability]
    return f"Spearman between {len(record.seeds)} seeds: {', '.join(kinds) or 'nothing to rank'}"


def dense_options(metric: Metric, options: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """The switches that hold where no widths are known yet, so that no layer can be cut before the next."""
    if not is_sequential(options):
        return dict(options)
    progress.say(
        f"{metric.name}: sequential=yes needs one ratio, as 'edgeprune prune' has; "
        "here the dense model's statistics are used (sequential=no)"
    )
    return {**options, "sequential": "no"}


def load_metric(name: str, given: Mapping[str, str]) -> tuple[Metric, dict[str, str]]:
    metric: Metric = registry.load("metrics", name, "METRIC")
    return metric, metric.resolve(given)
