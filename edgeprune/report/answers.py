"""What a person needs to hear beside the headline, each with the figures behind it. Plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeprune.units import format_bytes

Row = Mapping[str, Any]

# beyond either, a candidate has lost what a reader notices at once
KEPT_KL = 0.5  # nats per token
KEPT_PERPLEXITY = 1.5  # times the dense model's
WORTH_A_MODE = 1.1  # times the speed of the mode in use
SPEED_NOISE = 0.10  # as in selection: speeds closer than this are one speed
LARGE_FLOATS = ("F16", "F32", "BF16")


def answers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every answer that holds for a report, most important first: `code`, `text` and `figures`."""
    chosen = next((c for c in report["candidates"] if c["id"] == report["selected"]), None)
    out: list[dict[str, Any] | None] = []
    if chosen is None:
        out.append(_nothing_fits(report))
    elif chosen["ratio"] == 0:
        out += [_do_not_prune(report, chosen), _use_instead(report, chosen)]
    else:
        out.append(_prune(report, chosen))
    if chosen is not None:
        out += [
            _for_objective(report, chosen),
            *_unchecked(report, chosen),
            _quality_lost(report, chosen),
            _near_the_floor(report, chosen),
            _confidence(report, chosen),
            _speed_confidence(report, chosen),
            _maybe_better(report, chosen),
            _power_mode(report),
            _speed_unknown(report, chosen),
        ]
    return [one for one in out if one is not None]


def _answer(code: str, text: str, **figures: Any) -> dict[str, Any]:
    return {"code": code, "text": text, "figures": figures}


# ---------------------------------------------------------------- candidates


def _able(report: Mapping[str, Any]) -> list[Row]:
    return [
        c
        for c in report["candidates"]
        if c["error"] is None and c["quality"] is not None and c["meets"] and all(c["meets"].values())
    ]


def _kl(candidate: Row) -> float:
    return float(candidate["quality"]["kl"])


def _pm(candidate: Row) -> str:
    return f"KL {_kl(candidate):.4f}±{candidate['quality']['kl_stderr']:.4f}"


def _file(candidate: Row) -> int:
    found = candidate["artifact"]["bytes"] if candidate["artifact"] else candidate["predicted"]["file_bytes"]
    return int(found)


def _objective(report: Mapping[str, Any]) -> str:
    return str(report.get("objective") or "quality")


def _speed(candidate: Row) -> float:
    """Decode tokens/s, measured before predicted; 0 where neither is known."""
    measured = (candidate["measured"] or {}).get("decode_tps")
    return float(measured if measured is not None else candidate["predicted"]["decode_tps"] or 0.0)


def _speed_text(candidate: Row) -> str:
    measured = (candidate["measured"] or {}).get("decode_tps") is not None
    return f"{_speed(candidate):.1f} {'measured' if measured else 'predicted'} tokens/s"


def _rank(report: Mapping[str, Any]) -> Callable[[Row], tuple[float, ...]]:
    """What the run chose by; lower is better."""
    objective = _objective(report)
    if objective == "speed":
        return lambda c: (-_speed(c), _kl(c))
    if objective == "size":
        return lambda c: (_file(c), _kl(c))
    return lambda c: (_kl(c),)


def _best(report: Mapping[str, Any]) -> str:
    """How the best by the objective is called."""
    return {"speed": "fastest", "size": "smallest"}.get(_objective(report), "best")


def _told(report: Mapping[str, Any], candidate: Row) -> str:
    """A candidate's figures that the objective looks at."""
    text = f"{_pm(candidate)} nats per token"
    if _objective(report) == "speed":
        return f"{_speed_text(candidate)} at {text}"
    if _objective(report) == "size":
        return f"a file of {format_bytes(_file(candidate))} at {text}"
    return text


def _best_pruned(report: Mapping[str, Any]) -> Row | None:
    pruned = [c for c in _able(report) if c["ratio"] > 0]
    return min(pruned, key=_rank(report)) if pruned else None


def _peak(candidate: Row) -> tuple[int, str]:
    """Memory that counts against the limit, and whether it was measured."""
    predicted, measured = candidate["predicted"], candidate["measured"]
    if measured is not None and measured["peak_memory_bytes"] is not None:
        return measured["peak_memory_bytes"] + predicted.get("runtime_bytes", 0), "measured"
    return predicted["peak_memory_bytes"], "predicted"


def _smallest_dense(report: Mapping[str, Any]) -> Row | None:
    dense = [c for c in report["candidates"] if c["ratio"] == 0 and c["error"] is None]
    return min(dense, key=lambda c: _peak(c)[0]) if dense else None


# ---------------------------------------------------------------- what to do


def _figures(chosen: Row, rival: Row | None = None) -> dict[str, Any]:
    """What was selected and its distance to dense; beside it those of the one that lost."""
    found = {"selected": chosen["id"], "kl": _kl(chosen), "kl_stderr": chosen["quality"]["kl_stderr"]}
    if rival is not None:
        found |= {
            "rival": rival["id"],
            "rival_kl": _kl(rival),
            "rival_kl_stderr": rival["quality"]["kl_stderr"],
        }
    return found


def _do_not_prune(report: Mapping[str, Any], chosen: Row) -> dict[str, Any]:
    rival = _best_pruned(report)
    if rival is None:
        return _answer(
            "do-not-prune",
            f"Do not prune: {chosen['id']} meets every limit ({_brief(report, chosen)}). "
            "No pruned candidate was measured that does.",
            **_figures(chosen),
        )
    return _answer(
        "do-not-prune",
        f"Do not prune: {chosen['id']} has {_told(report, chosen)}; the {_best(report)} pruned candidate "
        f"that meets the limits, {rival['id']}, has {_brief(report, rival)}.",
        **_figures(chosen, rival),
    )


def _brief(report: Mapping[str, Any], candidate: Row) -> str:
    return _told(report, candidate).removesuffix(" nats per token")


def _use_instead(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    quantization = chosen["quantization"]
    if quantization in LARGE_FLOATS:
        return None
    if quantization.endswith(" as given"):
        return _answer(
            "keep-the-file",
            f"Keep the file as it is: {quantization.removesuffix(' as given')} already fits, and "
            "quantizing it again only loses quality.",
            quantization=quantization,
            file_bytes=_file(chosen),
        )
    rival = _best_pruned(report)
    text = f"Use {quantization} instead of pruning: a file of {format_bytes(_file(chosen))}"
    if rival is not None:
        text += f", where {rival['id']} takes {format_bytes(_file(rival))}"
    return _answer(
        "use-quantization",
        text + ".",
        quantization=quantization,
        file_bytes=_file(chosen),
        rival=None if rival is None else rival["id"],
        rival_file_bytes=None if rival is None else _file(rival),
    )


def _prune(report: Mapping[str, Any], chosen: Row) -> dict[str, Any]:
    dense = [c for c in _able(report) if c["ratio"] == 0]
    if dense:
        rival = min(dense, key=_rank(report))
        return _answer(
            "prune",
            f"Prune: {chosen['id']} has {_told(report, chosen)}; the {_best(report)} dense candidate that "
            f"meets the limits, {rival['id']}, has {_brief(report, rival)}.",
            **_figures(chosen, rival),
        )
    text = f"Prune: {chosen['id']} has {_told(report, chosen)}; no dense candidate meets the limits."
    figures: dict[str, Any] = {}
    smallest = _smallest_dense(report)
    limit = report["budget"].get("memory")
    if smallest is not None and limit is not None:
        peak, how = _peak(smallest)
        if peak > limit["value"]:
            text += (
                f" The smallest, {smallest['id']}, needs {format_bytes(peak)} ({how}), "
                f"{format_bytes(peak - limit['value'])} more than the limit."
            )
            figures = {"smallest_dense": smallest["id"], "smallest_dense_bytes": peak, "bytes_are": how}
    return _answer("prune", text, **_figures(chosen), rival=None, **figures)


def _nothing_fits(report: Mapping[str, Any]) -> dict[str, Any]:
    limit = report["budget"].get("memory")
    working = [c for c in report["candidates"] if c["error"] is None]
    smallest = min(working, key=lambda c: _peak(c)[0], default=None)
    text, figures = "Nothing fits the limits.", dict[str, Any]()
    if _objective(report) != "quality":
        text = f"Nothing fits the limits, so there is no {_best(report)} candidate."
    if smallest is not None and limit is not None:
        peak, how = _peak(smallest)
        figures = {"smallest": smallest["id"], "smallest_bytes": peak, "bytes_are": how}
        if peak > limit["value"]:
            text += f" The smallest candidate, {smallest['id']}, needs {format_bytes(peak)} ({how})."
        dense = _smallest_dense(report)
        if dense is not None and _peak(dense)[0] > limit["value"]:
            needs, how = _peak(dense)
            text += f" The smallest without pruning, {dense['id']}, needs {format_bytes(needs)} ({how})."
            figures |= {"smallest_dense": dense["id"], "smallest_dense_bytes": needs}
    return _answer("nothing-fits", text, nearest=report.get("nearest"), **figures)


# ---------------------------------------------------------------- the objective, its floor, and the limits


def _floor(report: Mapping[str, Any]) -> str:
    """The floor of quality in words."""
    kl, agreement = (report["budget"].get(name) for name in ("kl", "agreement"))
    parts = [] if kl is None else [f"KL at most {kl['value']:g}"]
    parts += [] if agreement is None else [f"agreement of at least {100 * agreement['value']:g}%"]
    return " and ".join(parts)


def _for_objective(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    """What speed or size was bought with: the best in quality that meets the same limits."""
    objective = _objective(report)
    if objective == "quality":
        return None
    floor = f" above the floor of quality ({_floor(report)})" if _floor(report) else ""
    text = f"Chosen for {objective}{floor}: {_told(report, chosen)}"
    best = min(_able(report), key=lambda c: (_kl(c), c["id"]))
    figures: dict[str, Any] = {"objective": objective, "selected": chosen["id"], "kl": _kl(chosen)}
    figures |= {"decode_tps": _speed(chosen) or None, "file_bytes": _file(chosen)}
    if best["id"] == chosen["id"]:
        text += ". It is the best in quality as well."
    else:
        text += f". The best in quality within the same limits, {best['id']}, has {_brief(report, best)}."
        figures |= {"best_quality": best["id"], "best_kl": _kl(best)}
        figures |= {"best_decode_tps": _speed(best) or None, "best_file_bytes": _file(best)}
    return _answer("for-objective", text, **figures)


_WHY_UNCHECKED = {
    "energy": "nothing on {on} meters it",
    "first_token": "its speed was not measured on the target",
}


def unchecked(report: Mapping[str, Any], candidate: Row) -> list[str]:
    """Limits that were asked for and that a candidate could not be held against."""
    return [n for n in _WHY_UNCHECKED if n in report["budget"] and n not in candidate["meets"]]


def _unchecked(report: Mapping[str, Any], chosen: Row) -> list[dict[str, Any]]:
    out = []
    for name in unchecked(report, chosen):
        limit, why = report["budget"][name], _WHY_UNCHECKED[name]
        on = (chosen["measured"] or {}).get("on") or "this machine"
        shown = f"{limit['value']:g} {limit['unit']}"
        text = f"The limit on {name.replace('_', ' ')} ({shown}, from {limit['from']}) could not be checked: "
        text += f"{why.format(on=on)}. Whether {chosen['id']} meets it is not known."
        out.append(_answer("not-checked", text, limit=name, value=limit["value"], selected=chosen["id"]))
    return out


def _near_the_floor(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    limit, quality = report["budget"].get("kl"), chosen["quality"]
    if limit is None:
        return None
    high = quality["kl"] + 1.96 * quality["kl_stderr"]
    if high <= limit["value"]:
        return None
    return _answer(
        "near-the-floor",
        f"KL of {chosen['id']} may lie beyond the limit: the 95% interval of {_pm(chosen)} ends at "
        f"{high:.4f}, the limit is {limit['value']:g}.",
        kl=quality["kl"],
        kl_stderr=quality["kl_stderr"],
        high=high,
        limit=limit["value"],
    )


# ---------------------------------------------------------------- what to expect


def _quality_lost(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    quality, dense = chosen["quality"], report["dense_perplexity"]
    times = None if not dense else quality["perplexity"] / dense
    if quality["kl"] <= KEPT_KL and (times is None or times <= KEPT_PERPLEXITY):
        return None
    text = "This budget is below what keeps quality: expect "
    if _objective(report) != "quality":
        text = f"Taken for its {_objective(report)}, {chosen['id']} has lost what a reader notices: expect "
    if times is not None:
        text += f"perplexity {quality['perplexity']:.2f} where the dense model has {dense:.2f} "
        text += f"({times:.1f} times), and "
    other = 100 * (1 - quality["agreement"])
    text += f"another first choice than the dense model's at {other:.0f}% of the tokens."
    better = _would_keep(report)
    figures: dict[str, Any] = {}
    if better is not None:
        peak, how = _peak(better)
        figures = {"dense": better["id"], "dense_bytes": peak, "bytes_are": how}
        text += f" Without pruning, {better['id']} needs {format_bytes(peak)} of memory ({how})."
    return _answer(
        "below-quality",
        text,
        kl=quality["kl"],
        perplexity=quality["perplexity"],
        dense_perplexity=dense,
        agreement=quality["agreement"],
        kept_below_kl=KEPT_KL,
        kept_below_times_perplexity=KEPT_PERPLEXITY,
        **figures,
    )


def _would_keep(report: Mapping[str, Any]) -> Row | None:
    """The smallest dense candidate beyond the memory limit."""
    limit = report["budget"].get("memory")
    smallest = _smallest_dense(report)
    if limit is None or smallest is None or _peak(smallest)[0] <= limit["value"]:
        return None
    return smallest


def _confidence(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    """How sure the order of quality is, against the nearest candidate that meets the limits."""
    against: Mapping[str, Row] = report.get("against_selected") or {}
    rivals = [c for c in _able(report) if c["id"] in against]
    if not rivals:
        return None
    tied = [c for c in rivals if against[c["id"]]["low"] <= 0 <= against[c["id"]]["high"]]
    nearest = min(tied or rivals, key=lambda c: abs(against[c["id"]]["difference"]))
    pair = against[nearest["id"]]
    span = f"KL difference {pair['difference']:+.4f}, 95% interval {pair['low']:+.4f} to {pair['high']:+.4f}"
    text = f"on {chosen['quality']['tokens']} tokens"
    figures = {
        "rival": nearest["id"],
        **{name: pair[name] for name in ("difference", "low", "high", "paired")},
        "tokens": chosen["quality"]["tokens"],
    }
    if tied:
        names = _names([c["id"] for c in tied])
        return _answer(
            "cannot-tell",
            f"Quality of {chosen['id']} and {names} cannot be told apart {text}: "
            f"against {nearest['id']}, {span}.",
            tied=[c["id"] for c in tied],
            **figures,
        )
    word = "worse" if pair["difference"] > 0 else "better"
    return _answer(
        "sure",
        f"The nearest in quality, {nearest['id']}, is {word} beyond the error {text}: {span}.",
        **figures,
    )


def _speed_confidence(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    """Where speed decides: who is as fast within the error."""
    if _objective(report) != "speed" or not _speed(chosen):
        return None
    low, high, how = _speed_interval(chosen)
    rivals = []
    for c in _able(report):
        least, most, _ = _speed_interval(c)
        near = abs(_speed(c) - _speed(chosen)) <= SPEED_NOISE * max(_speed(c), _speed(chosen))
        if c["id"] != chosen["id"] and (near or (least <= high and low <= most)):
            rivals.append(c)
    if not rivals:
        return None
    nearest = min(rivals, key=lambda c: abs(_speed(c) - _speed(chosen)))
    least, most, other = _speed_interval(nearest)
    return _answer(
        "cannot-tell-speed",
        f"Speed of {chosen['id']} and {_names([c['id'] for c in rivals])} cannot be told apart: "
        f"{low:.1f} to {high:.1f} tokens/s ({how}) against {least:.1f} to {most:.1f} ({other}) of "
        f"{nearest['id']}; closer than {100 * SPEED_NOISE:.0f}% counts as the same.",
        tied=[c["id"] for c in rivals],
        rival=nearest["id"],
        low=low,
        high=high,
        rival_low=least,
        rival_high=most,
    )


def _speed_interval(candidate: Row) -> tuple[float, float, str]:
    """Decode tokens/s from, to, and what the two are."""
    measured, predicted = candidate["measured"] or {}, candidate["predicted"]
    if measured.get("decode_tps") is not None:
        half = 1.96 * (measured.get("decode_tps_stdev") or 0.0)
        return measured["decode_tps"] - half, measured["decode_tps"] + half, "95% of the repeats"
    if predicted["decode_tps"] is None:
        return 0.0, 0.0, "not known"
    return predicted["decode_tps_low"], predicted["decode_tps_high"], "80% band, predicted"


def _maybe_better(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    """Candidates that were only predicted, and that are expected to beat the selected one."""
    half = 1.96 * chosen["quality"]["kl_stderr"]
    limit, objective = report["budget"].get("kl"), _objective(report)
    # almost every interval reaches below the best of many: what counts is where its middle is
    end = "kl" if objective == "quality" else "kl_low"
    if objective == "quality":
        most = _kl(chosen) + half
    else:  # no worse than the limit, or without one than the worst that was measured to meet the others
        most = limit["value"] if limit is not None else max(_kl(c) for c in _able(report))
    rivals = []
    for c in report["candidates"]:
        predicted = c["predicted"]
        if c["quality"] is not None or c["error"] is not None or predicted.get("kl_low") is None:
            continue
        better = {
            "speed": (predicted["decode_tps"] or 0.0) > (1 + SPEED_NOISE) * _speed(chosen),
            "size": predicted["file_bytes"] < _file(chosen),
        }.get(objective, True)
        if better and predicted[end] <= most and _may_fit(report, c):
            rivals.append(c)
    if not rivals:
        return None
    wanted: dict[str, Callable[[Row], float]] = {
        "speed": lambda c: -float(c["predicted"]["decode_tps"]),
        "size": lambda c: float(c["predicted"]["file_bytes"]),
    }
    rivals.sort(key=wanted.get(objective, lambda c: float(c["predicted"]["kl"])))
    near = rivals[0]
    p = near["predicted"]
    interval = f"KL {p['kl']:.4f}, 80% interval {p['kl_low']:.4f} to {p['kl_high']:.4f}"
    text = f"{_names([c['id'] for c in rivals])} {'was' if len(rivals) == 1 else 'were'} not measured and may"
    if objective == "quality":
        text += f" be better: predicted for {near['id']} are {interval}, which overlaps {chosen['id']}"
        text += f" ({_pm(chosen)})"
    elif objective == "speed":
        text += f" be faster: predicted for {near['id']} are {p['decode_tps']:.1f} tokens/s at {interval}"
    else:
        text += f" be smaller: predicted for {near['id']} are {format_bytes(p['file_bytes'])} at {interval}"
    return _answer(
        "maybe-better",
        text + ". Measuring more candidates would tell.",
        rivals=[c["id"] for c in rivals],
        nearest=near["id"],
        kl=p["kl"],
        kl_low=p["kl_low"],
        kl_high=p["kl_high"],
        selected_kl=_kl(chosen),
        selected_kl_high=_kl(chosen) + half,
    )


def _may_fit(report: Mapping[str, Any], candidate: Row) -> bool:
    """Whether nothing that is predicted for a candidate speaks against a limit."""
    limits, p = report["budget"], candidate["predicted"]
    for name, value in (("memory", p["peak_memory_bytes"]), ("file", p["file_bytes"])):
        if name in limits and value > limits[name]["value"]:
            return False
    slowest = limits.get("decode_speed")
    return slowest is None or p["decode_tps_high"] is None or p["decode_tps_high"] >= slowest["value"]


def _names(names: Sequence[str]) -> str:
    shown = list(names[:3]) + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _power_mode(report: Mapping[str, Any]) -> dict[str, Any] | None:
    modes: Sequence[Row] = report.get("power_modes") or ()
    now = next((m for m in modes if m["current"]), None)
    if now is None:
        return None
    best = max(modes, key=lambda m: float(m["decode_tps"]))
    times = best["decode_tps"] / now["decode_tps"]
    if times < WORTH_A_MODE:
        return None

    def speed(mode: Row) -> str:
        return (
            f"{mode['decode_tps']:.0f} ({mode['decode_tps_low']:.0f}-{mode['decode_tps_high']:.0f}) tokens/s"
        )

    overlap = best["decode_tps_low"] <= now["decode_tps_high"]
    text = (
        f"The board would decode {times:.1f}x as fast in power mode {best['mode']}: {speed(best)} predicted, "
        f"against {speed(now)} in {now['mode']}"
    )
    text += ". The 80% bands overlap: measure before relying on it." if overlap else " (80% bands)."
    return _answer(
        "power-mode",
        text,
        mode=best["mode"],
        times=times,
        predicted_tps=best["decode_tps"],
        predicted_tps_low=best["decode_tps_low"],
        predicted_tps_high=best["decode_tps_high"],
        current_mode=now["mode"],
        current_predicted_tps=now["decode_tps"],
        bands_overlap=overlap,
    )


def _speed_unknown(report: Mapping[str, Any], chosen: Row) -> dict[str, Any] | None:
    measured, predicted = chosen["measured"], chosen["predicted"]
    if measured is None or measured["decode_tps"] is not None or predicted["decode_tps"] is None:
        return None
    low, high = predicted["decode_tps_low"], predicted["decode_tps_high"]
    return _answer(
        "speed-predicted",
        f"Speed was not measured on {report['target']['name']}: {low:.0f} to {high:.0f} tokens/s are "
        "predicted (80% band). With --device ssh://user@host the board itself is measured.",
        predicted_tps=predicted["decode_tps"],
        predicted_tps_low=low,
        predicted_tps_high=high,
    )


def search_line(report: Mapping[str, Any]) -> str | None:
    """How the candidates were found, in one sentence; None where a run did not search."""
    found = report.get("search")
    if not found:
        return None
    rounds = len(found.get("rounds") or ())
    text = f"Searched {found['considered']:,} candidates by prediction, measured {found['measured']:,}"
    text += f" in {rounds} round{'' if rounds == 1 else 's'}" if rounds else ""
    stopped = str(found.get("stopped") or "").rstrip(".")
    return text + (f"; stopped because {stopped.removeprefix('because ')}." if stopped else ".")


def doubt_lines(report: Mapping[str, Any]) -> list[str]:
    """Each candidate whose speeds may not be the device's own, with why."""
    out = []
    for c in report["candidates"]:
        # said by the mark already
        found = (c["measured"] or {}).get("doubts") or ()
        shown = [d for d in found if not d.startswith("the repeats spread")]
        if shown:
            out.append(f"{c['id']} was timed in doubtful conditions: {'; '.join(shown)}")
    return out
