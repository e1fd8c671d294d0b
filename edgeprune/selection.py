"""Choose one candidate from what was measured. A pure reduction: no model, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgeprune.records import Budget, Candidate, Limit, Selection, make_key
from edgeprune.units import format_bytes

# speeds closer than this are one speed: the machine's own noise
SPEED_NOISE = 0.10

Tie = Callable[[str, str], bool]


def check_limits(budget: Budget, candidate: Candidate) -> dict[str, bool]:
    """Which limits the candidate meets, on measured numbers; speed falls back to predicted off the board."""
    out: dict[str, bool] = {}
    measured, quality = candidate.measured, candidate.quality
    if measured is not None and measured.peak_memory_bytes is not None:
        # a board's own part is known by prediction only, until the file is measured there
        needed = measured.peak_memory_bytes + candidate.predicted.runtime_bytes
        out["memory"] = needed <= budget.memory_bytes.value
    if budget.file_bytes is not None and candidate.artifact is not None:
        out["file"] = candidate.artifact.bytes <= budget.file_bytes.value
    if budget.decode_tps is not None and measured is not None:
        speed = measured.decode_tps if measured.decode_tps is not None else candidate.predicted.decode_tps
        out["decode_speed"] = speed is not None and speed >= budget.decode_tps.value
    if budget.first_token_ms is not None and measured is not None and measured.first_token_ms is not None:
        out["first_token"] = measured.first_token_ms <= budget.first_token_ms.value
    if budget.kl is not None and quality is not None:
        out["kl"] = quality.kl <= budget.kl.value
    return out


def _limit_text(limit: Limit) -> str:
    return format_bytes(limit.value) if limit.unit == "bytes" else f"{limit.value:g} {limit.unit}"


def misses(budget: Budget, candidate: Candidate) -> list[tuple[str, float]]:
    """Missed limits as (sentence, how far beyond as a fraction of the limit), measured before predicted."""
    out = []
    measured = candidate.measured
    peak = measured.peak_memory_bytes if measured and measured.peak_memory_bytes is not None else None
    own = candidate.predicted.runtime_bytes
    if peak is None:
        peak, own = candidate.predicted.peak_memory_bytes, 0
        shown = f"{format_bytes(peak)} predicted"
    else:
        shown = f"{format_bytes(peak)} measured"
        shown += f" and {format_bytes(own)} predicted for the target's runtime" if own else ""
    if peak + own > budget.memory_bytes.value:
        over = peak + own - budget.memory_bytes.value
        out.append(
            (
                f"memory: {shown}, {format_bytes(over)} over {_limit_text(budget.memory_bytes)}",
                over / budget.memory_bytes.value,
            )
        )
    if budget.file_bytes is not None:
        size = candidate.artifact.bytes if candidate.artifact else candidate.predicted.file_bytes
        word = "measured" if candidate.artifact else "predicted"
        if size > budget.file_bytes.value:
            over = size - budget.file_bytes.value
            out.append(
                (
                    f"file: {format_bytes(size)} {word}, {format_bytes(over)} over "
                    f"{_limit_text(budget.file_bytes)}",
                    over / budget.file_bytes.value,
                )
            )
    if budget.decode_tps is not None:
        speed = measured.decode_tps if measured and measured.decode_tps is not None else None
        word = "measured" if speed is not None else "predicted"
        speed = candidate.predicted.decode_tps if speed is None else speed
        if speed is None or speed < budget.decode_tps.value:
            shown = "unknown" if speed is None else f"{speed:.1f} tokens/s {word}"
            short = 1.0 if speed is None else 1 - speed / budget.decode_tps.value
            out.append((f"decode speed: {shown}, limit {_limit_text(budget.decode_tps)}", short))
    if budget.first_token_ms is not None and measured is not None and measured.first_token_ms is not None:
        late = measured.first_token_ms - budget.first_token_ms.value
        if late > 0:
            out.append(
                (
                    f"first token: {measured.first_token_ms:.0f} ms measured, "
                    f"limit {_limit_text(budget.first_token_ms)}",
                    late / budget.first_token_ms.value,
                )
            )
    if budget.kl is not None and candidate.quality is not None and candidate.quality.kl > budget.kl.value:
        over = candidate.quality.kl / budget.kl.value - 1
        out.append((f"quality: KL {candidate.quality.kl:.3f}, limit {budget.kl.value:g}", over))
    return out


def select(budget: Budget, candidates: Sequence[Candidate], tie: Tie) -> Selection:
    """Best measured quality among those that meet every limit; ties by speed, then by size.

    `tie(a, b)` says whether the quality of two candidate ids cannot be told apart on the same text.
    """
    able = [
        c
        for c in candidates
        if c.error is None and c.quality is not None and c.meets and all(c.meets.values())
    ]
    reasons: dict[str, str] = {}
    key = make_key(
        "selection", budget.key, [[c.id, c.key, c.error, to_quality(c), dict(c.meets)] for c in candidates]
    )
    if not able:
        nearest, missed = _nearest(budget, candidates)
        for c in candidates:
            reasons[c.id] = _why_not(budget, c)
        headline = _nothing(candidates, nearest, missed)
        return Selection(
            selected=None,
            ties=(),
            headline=headline,
            nearest=nearest.id if nearest else None,
            missed=tuple(missed),
            reasons=reasons,
            key=key,
        )
    best = min(able, key=lambda c: (quality_of(c), c.id))
    ties = [c for c in able if c.id == best.id or tie(c.id, best.id)]
    winner = _fastest(ties, best)
    for c in candidates:
        if c.id == winner.id:
            reasons[c.id] = _why(winner, best, ties)
        elif c in ties:
            reasons[c.id] = f"tie: quality cannot be told from {winner.id} on this text, but it is not faster"
        elif c in able:
            reasons[c.id] = f"meets every limit; KL {quality_of(c):.4f}, {_times(c, winner)}"
        else:
            reasons[c.id] = _why_not(budget, c)
    return Selection(
        selected=winner.id,
        ties=tuple(c.id for c in ties if c.id != winner.id),
        headline=_headline(winner, able),
        nearest=None,
        missed=(),
        reasons=reasons,
        key=key,
    )


def quality_of(candidate: Candidate) -> float:
    assert candidate.quality is not None
    return candidate.quality.kl


def _times(candidate: Candidate, winner: Candidate) -> str:
    if quality_of(winner) < 1e-4:  # nothing was lost: a ratio says nothing
        return f"{winner.id} has {quality_of(winner):.4f}"
    return f"{quality_of(candidate) / quality_of(winner):.1f}x that of {winner.id}"


def to_quality(candidate: Candidate) -> float | None:
    return None if candidate.quality is None else candidate.quality.kl


def _speed(candidate: Candidate) -> float:
    if candidate.measured is not None and candidate.measured.decode_tps is not None:
        return candidate.measured.decode_tps
    return candidate.predicted.decode_tps or 0.0


def _fastest(ties: Sequence[Candidate], best: Candidate) -> Candidate:
    top = max(_speed(c) for c in ties)
    fast = [c for c in ties if _speed(c) >= (1 - SPEED_NOISE) * top]
    if best in fast:
        return best
    return min(fast, key=lambda c: (quality_of(c), c.id))


def _why(winner: Candidate, best: Candidate, ties: Sequence[Candidate]) -> str:
    if winner.id != best.id:
        return (
            f"selected: quality cannot be told from the best ({best.id}), and it decodes faster "
            f"({_speed(winner):.0f} against {_speed(best):.0f} tokens/s)"
        )
    if len(ties) > 1:
        return "selected: best measured quality; others tie with it and none is clearly faster"
    return "selected: best measured quality among those that meet every limit"


def _why_not(budget: Budget, candidate: Candidate) -> str:
    if candidate.error is not None:
        return f"failed: {candidate.error}"
    if candidate.measured is None and candidate.quality is None:
        return candidate.reason
    missed = [text for text, _ in misses(budget, candidate)]
    return "misses " + "; ".join(missed) if missed else candidate.reason


def _nothing(candidates: Sequence[Candidate], nearest: Candidate | None, missed: Sequence[str]) -> str:
    failed = [c for c in candidates if c.error is not None]
    why = f" {len(failed)} failed, the first, {failed[0].id}: {failed[0].error}." if failed else ""
    if nearest is None:
        return f"No candidate could be measured.{why}"
    return f"Nothing fits the budget. Nearest: {nearest.id}; missed {'; '.join(missed)}.{why}"


def _nearest(budget: Budget, candidates: Sequence[Candidate]) -> tuple[Candidate | None, list[str]]:
    best: tuple[float, Candidate, list[str]] | None = None
    for c in candidates:
        if c.error is not None:
            continue
        found = misses(budget, c)
        if not found:
            continue  # not measured, so nothing is known that it misses
        worst = max(size for _, size in found)
        if best is None or worst < best[0]:
            best = (worst, c, [text for text, _ in found])
    return (None, []) if best is None else (best[1], best[2])


def _headline(winner: Candidate, able: Sequence[Candidate]) -> str:
    pruned = [c for c in able if c.ratio > 0]
    dense = [c for c in able if c.ratio == 0]
    if winner.ratio == 0:
        text = f"Do not prune: the dense model at {winner.quantization} is the best that fits"
        if pruned:
            rival = min(pruned, key=quality_of)
            text += (
                f" (KL {quality_of(winner):.4f}; the best pruned candidate, {rival.id}, "
                f"reaches {quality_of(rival):.4f})"
            )
        return text + "."
    text = (
        f"Prune {100 * winner.ratio:.1f}% of the decoder layers and quantize to {winner.quantization} "
        f"(KL {quality_of(winner):.4f}"
    )
    if dense:
        rival = min(dense, key=quality_of)
        text += f"; the best dense model that fits, {rival.quantization}, reaches {quality_of(rival):.4f}"
    else:
        text += "; no dense model fits the budget"
    return text + ")."
