"""Choose one candidate from what was measured. A pure reduction: no model, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    if budget.energy_j is not None and measured is not None and measured.joules_per_token is not None:
        out["energy"] = measured.joules_per_token <= budget.energy_j.value
    if budget.agreement is not None and quality is not None:
        out["agreement"] = quality.agreement >= budget.agreement.value
    return out


def unchecked(budget: Budget, candidate: Candidate) -> tuple[str, ...]:
    """Limits that a measured candidate could not be held against: nothing there measures the figure."""
    asked = {"first_token": budget.first_token_ms, "energy": budget.energy_j}
    return tuple(n for n, limit in asked.items() if limit is not None and n not in candidate.meets)


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
    joules = None if measured is None else measured.joules_per_token
    if budget.energy_j is not None and joules is not None and joules > budget.energy_j.value:
        text = f"energy: {joules:.3g} J/token measured, limit {_limit_text(budget.energy_j)}"
        out.append((text, joules / budget.energy_j.value - 1))
    if budget.agreement is not None and candidate.quality is not None:
        share, least = candidate.quality.agreement, budget.agreement.value
        if share < least:
            text = f"quality: first choice of the dense model at {100 * share:.1f}% of the tokens"
            out.append((f"{text}, limit {100 * least:g}%", 1 - share / least))
    return out


def select(budget: Budget, candidates: Sequence[Candidate], tie: Tie) -> Selection:
    """The best by the budget's objective among those that meet every limit.

    quality: best measured quality; ties by speed, then by size. speed: highest decode speed; speeds within
    the noise are one speed, then quality. size: smallest file, then quality. `tie(a, b)` says whether the
    quality of two candidate ids cannot be told apart on the same text.
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
        return Selection(
            selected=None,
            ties=(),
            headline=_nothing(budget, candidates, nearest, missed),
            nearest=nearest.id if nearest else None,
            missed=tuple(missed),
            reasons=reasons,
            key=key,
        )
    goal = _GOALS[budget.objective](able, tie)
    winner = goal.winner
    for c in candidates:
        if c.id == winner.id:
            reasons[c.id] = goal.why + _except(unchecked(budget, winner))
        elif c in able:
            reasons[c.id] = goal.why_not(c)
        else:
            reasons[c.id] = _why_not(budget, c)
    return Selection(
        selected=winner.id,
        ties=tuple(c.id for c in goal.ties if c.id != winner.id),
        headline=_headline(winner, able, goal),
        nearest=None,
        missed=(),
        reasons=reasons,
        key=key,
    )


def _except(names: Sequence[str]) -> str:
    """What a reason adds where a limit could not be checked."""
    shown = " and ".join(name.replace("_", " ") for name in names)
    return f"; the limit on {shown} could not be checked" if names else ""


# ---------------------------------------------------------------- figures


def quality_of(candidate: Candidate) -> float:
    assert candidate.quality is not None
    return candidate.quality.kl


def to_quality(candidate: Candidate) -> float | None:
    return None if candidate.quality is None else candidate.quality.kl


def speed_of(candidate: Candidate) -> float:
    """Decode tokens/s, measured before predicted; 0 where neither is known."""
    if candidate.measured is not None and candidate.measured.decode_tps is not None:
        return candidate.measured.decode_tps
    return candidate.predicted.decode_tps or 0.0


def size_of(candidate: Candidate) -> int:
    """Bytes of the file, measured before predicted."""
    return candidate.artifact.bytes if candidate.artifact else candidate.predicted.file_bytes


def _speed_text(candidate: Candidate) -> str:
    measured = candidate.measured is not None and candidate.measured.decode_tps is not None
    return f"{speed_of(candidate):.1f} tokens/s {'measured' if measured else 'predicted'}"


def _times(candidate: Candidate, winner: Candidate) -> str:
    if quality_of(winner) < 1e-4:  # nothing was lost: a ratio says nothing
        return f"{winner.id} has {quality_of(winner):.4f}"
    return f"{quality_of(candidate) / quality_of(winner):.1f}x that of {winner.id}"


def value(budget: Budget, candidate: Candidate) -> float:
    """What the budget's objective makes of a measured candidate; smaller is better."""
    if budget.objective == "size":
        return float(candidate.artifact.bytes if candidate.artifact else candidate.predicted.file_bytes)
    if budget.objective == "speed" and speed_of(candidate):
        return 1.0 / speed_of(candidate)
    return quality_of(candidate)


# ---------------------------------------------------------------- objectives


@dataclass(frozen=True, slots=True)
class _Goal:
    """What one objective chose, and how it says so."""

    winner: Candidate
    ties: Sequence[Candidate]  # with the winner
    why: str
    why_not: Callable[[Candidate], str]  # of another one that meets every limit
    rank: Callable[[Candidate], tuple[float, ...]]  # lower is better
    is_best: str  # of the dense model, in a headline
    best_of: str  # of a rival
    figure: Callable[[Candidate], str]


def _for_quality(able: Sequence[Candidate], tie: Tie) -> _Goal:
    best = min(able, key=lambda c: (quality_of(c), c.id))
    ties = [c for c in able if c.id == best.id or tie(c.id, best.id)]
    winner = _fastest(ties, best)

    def why_not(c: Candidate) -> str:
        if c in ties:
            return f"tie: quality cannot be told from {winner.id} on this text, but it is not faster"
        return f"meets every limit; KL {quality_of(c):.4f}, {_times(c, winner)}"

    return _Goal(
        winner,
        ties,
        _why(winner, best, ties),
        why_not,
        lambda c: (quality_of(c),),
        "the best that fits",
        "best",
        lambda c: f"KL {quality_of(c):.4f}",
    )


def _for_speed(able: Sequence[Candidate], tie: Tie) -> _Goal:
    top = max(speed_of(c) for c in able)
    fast = [c for c in able if speed_of(c) >= (1 - SPEED_NOISE) * top]
    winner = min(fast, key=lambda c: (quality_of(c), -speed_of(c), c.id))
    ties = [c for c in fast if c.id == winner.id or tie(c.id, winner.id)]
    within = f"within {100 * SPEED_NOISE:.0f}%"
    if not top:
        why = "selected: no speed is known, measured or predicted, so best measured quality"
    elif len(fast) > 1:
        why = f"selected: best measured quality among the {len(fast)} fastest, whose speeds are one {within}"
    else:
        why = "selected: fastest decode among those that meet every limit"

    def why_not(c: Candidate) -> str:
        if c in ties:
            return f"tie: neither speed, {within}, nor quality can be told from {winner.id}"
        shown = f"{_speed_text(c)}, KL {quality_of(c):.4f}"
        if c in fast:
            return f"meets every limit; as fast as {winner.id} {within}, but worse: {shown}"
        return f"meets every limit; {speed_of(c) / speed_of(winner):.2f}x the speed of {winner.id}: {shown}"

    return _Goal(
        winner,
        ties,
        why,
        why_not,
        lambda c: (-speed_of(c), quality_of(c)),
        "the fastest that meets every limit",
        "fastest",
        lambda c: f"{_speed_text(c)}, KL {quality_of(c):.4f}",
    )


def _for_size(able: Sequence[Candidate], tie: Tie) -> _Goal:
    least = min(size_of(c) for c in able)
    small = [c for c in able if size_of(c) == least]
    winner = min(small, key=lambda c: (quality_of(c), c.id))
    ties = [c for c in small if c.id == winner.id or tie(c.id, winner.id)]

    def why_not(c: Candidate) -> str:
        if c in ties:
            return f"tie: a file of the same size, and quality cannot be told from {winner.id}"
        shown = f"a file of {format_bytes(size_of(c))}, KL {quality_of(c):.4f}"
        if c in small:
            return f"meets every limit; a file of the same size, but worse: KL {quality_of(c):.4f}"
        return f"meets every limit; {shown}, {size_of(c) / size_of(winner):.2f}x the bytes of {winner.id}"

    return _Goal(
        winner,
        ties,
        "selected: smallest file among those that meet every limit",
        why_not,
        lambda c: (size_of(c), quality_of(c)),
        "the smallest that meets every limit",
        "smallest",
        lambda c: f"a file of {format_bytes(size_of(c))}, KL {quality_of(c):.4f}",
    )


_GOALS: Mapping[str, Callable[[Sequence[Candidate], Tie], _Goal]] = {
    "quality": _for_quality,
    "speed": _for_speed,
    "size": _for_size,
}


def _fastest(ties: Sequence[Candidate], best: Candidate) -> Candidate:
    top = max(speed_of(c) for c in ties)
    fast = [c for c in ties if speed_of(c) >= (1 - SPEED_NOISE) * top]
    if best in fast:
        return best
    return min(fast, key=lambda c: (quality_of(c), c.id))


def _why(winner: Candidate, best: Candidate, ties: Sequence[Candidate]) -> str:
    if winner.id != best.id:
        return (
            f"selected: quality cannot be told from the best ({best.id}), and it decodes faster "
            f"({speed_of(winner):.0f} against {speed_of(best):.0f} tokens/s)"
        )
    if len(ties) > 1:
        return "selected: best measured quality; others tie with it and none is clearly faster"
    return "selected: best measured quality among those that meet every limit"


# ---------------------------------------------------------------- sentences


def _why_not(budget: Budget, candidate: Candidate) -> str:
    if candidate.error is not None:
        return f"failed: {candidate.error}"
    if candidate.measured is None and candidate.quality is None:
        return candidate.reason
    missed = [text for text, _ in misses(budget, candidate)]
    return "misses " + "; ".join(missed) if missed else candidate.reason


def _nothing(
    budget: Budget, candidates: Sequence[Candidate], nearest: Candidate | None, missed: Sequence[str]
) -> str:
    failed = [c for c in candidates if c.error is not None]
    why = f" {len(failed)} failed, the first, {failed[0].id}: {failed[0].error}." if failed else ""
    if nearest is None:
        return f"No candidate could be measured.{why}"
    lost = {"speed": ", so there is no fastest", "size": ", so there is no smallest"}
    text = f"Nothing fits the budget{lost.get(budget.objective, '')}."
    return f"{text} Nearest: {nearest.id}; missed {'; '.join(missed)}.{why}"


def _nearest(budget: Budget, candidates: Sequence[Candidate]) -> tuple[Candidate | None, list[str]]:
    """The one that misses its worst limit by least; of several the better one by the objective."""
    ranks: Mapping[str, Callable[[Candidate], float]] = {
        "quality": lambda c: 0.0,
        "speed": lambda c: -speed_of(c),
        "size": size_of,
    }
    best: tuple[tuple[float, float], Candidate, list[str]] | None = None
    for c in candidates:
        if c.error is not None:
            continue
        found = misses(budget, c)
        if not found:
            continue  # not measured, so nothing is known that it misses
        worst = (max(size for _, size in found), ranks[budget.objective](c))
        if best is None or worst < best[0]:
            best = (worst, c, [text for text, _ in found])
    return (None, []) if best is None else (best[1], best[2])


def _headline(winner: Candidate, able: Sequence[Candidate], goal: _Goal) -> str:
    pruned = [c for c in able if c.ratio > 0]
    dense = [c for c in able if c.ratio == 0]
    if winner.ratio == 0:
        text = f"Do not prune: the dense model at {winner.quantization} is {goal.is_best}"
        if pruned:
            rival = min(pruned, key=goal.rank)
            text += (
                f" ({goal.figure(winner)}; the {goal.best_of} pruned candidate, {rival.id}, "
                f"{_reaches(goal.figure(rival))})"
            )
        elif goal.best_of != "best":
            text += f" ({goal.figure(winner)})"
        return text + "."
    text = (
        f"Prune {100 * winner.ratio:.1f}% of the decoder layers and quantize to {winner.quantization} "
        f"({goal.figure(winner)}"
    )
    if dense:
        rival = min(dense, key=goal.rank)
        text += f"; the {goal.best_of} dense model that fits, {rival.quantization}, "
        text += _reaches(goal.figure(rival))
    else:
        text += "; no dense model fits the budget"
    return text + ")."


def _reaches(figure: str) -> str:
    size = figure.removeprefix("a file of ")
    return f"takes {size}" if size != figure else f"reaches {figure.removeprefix('KL ')}"
