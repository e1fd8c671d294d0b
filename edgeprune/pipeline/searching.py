"""The rounds of the main job: measure, learn, propose, until nothing better is expected."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from edgeprune import damage, search
from edgeprune.pipeline import lane as lanes
from edgeprune.planner import Lane
from edgeprune.progress import Progress, Stage
from edgeprune.records import PrunePlan
from edgeprune.rundir import RunDir
from edgeprune.search import Goal, Option, Rung, SearchSpace

SHOWN = 24  # options that were not measured, in the report
FINALISTS = 2  # plans that the slow part is done for
SOLVED_PART = 0.5  # most of a cut's cost that solving anew has been seen to take away

USUAL_SLOPE = 0.55  # changed first choices over the root of the KL, as on SmolLM2-135M

NOTHING_BETTER = "nothing left is expected to be better"
NO_OPTION = "there is nothing else to try"
ENOUGH_MEASURED = "as many candidates were measured as asked for"
TIME_IS_OVER = "the time for measuring is over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One candidate that was taken up: where it stands, in which round, and what was expected."""

    id: str
    plan: str
    allocator: str
    block: int
    quantization: str
    round: int
    why: str
    kl: float | None = None  # predicted, nats per token
    kl_low: float | None = None
    kl_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLog:
    """What was taken up so far, written before each candidate: a resumed run takes up the same ones."""

    kind: ClassVar[str] = "search_log"
    steps: tuple[Step, ...] = ()
    stopped: str | None = None
    seconds: float = 0.0  # spent on measuring, over all sessions
    considered: int = 0
    key: str


@dataclass(slots=True, kw_only=True)
class Search:
    """The rounds.

    Attributes:
        first: lanes of the first round, the most important ones first.
        compared: share of the layers that is cut for comparison where nothing has to be.
        plan_of: the plan of a rung, with the key of what is done to its weights.
        value_of: a result's value for the goal, smaller is better; None when it misses a limit or failed.
        most: candidates to measure.
        seconds: none is begun after so many; None: no limit.
    """

    run: RunDir
    shop: lanes.Workshop
    space: SearchSpace
    goal: Goal
    first: Sequence[Lane]
    compared: float | None
    plan_of: Callable[[Rung], PrunePlan]
    value_of: Callable[[lanes.LaneResult], float | None]
    most: int
    seconds: float | None
    key: str
    progress: Progress
    results: dict[str, lanes.LaneResult] = field(default_factory=dict)
    log: SearchLog = field(default_factory=lambda: SearchLog(key=""))
    _options: list[Option] = field(default_factory=list)
    _began: float = 0.0
    _made_of: dict[str, str] = field(default_factory=dict)  # keys of finalists' plans to the plans' before
    _open: PrunePlan | None = None  # the pruned plan whose F16 file is there

    # ------------------------------------------------ rounds

    def measure(self) -> list[lanes.LaneResult]:
        """Every result, in the order they were taken up."""
        self.log = self.run.find(SearchLog, self.key) or SearchLog(key=self.key)
        self._began = time.monotonic() - self.log.seconds
        self._options = self.space.options(stronger=self.goal.objective != "quality")
        self._options += self._comparison()
        self.log = dataclasses.replace(self.log, considered=len(self._options))
        with self.progress.stage("measure candidates", self.most) as bar:
            for step in self.log.steps:  # of an earlier session
                lane = self._lane_of(step)
                if lane is not None:
                    self._take(lane, bar)
            self._first_round(bar)
            while (stopped := self._over()) is None:
                proposed = self._next()
                if isinstance(proposed, str):
                    stopped = proposed
                    break
                self._begin(*proposed, bar)
        self._write(stopped=stopped)
        return list(self.results.values())

    def _comparison(self) -> list[Option]:
        """Where a dense file fits, a small cut at the largest type: the report says what it costs."""
        dense = [o for o in self._options if o.rung.ratio == 0]
        if self.compared is None or not dense:
            return []
        largest = max(dense, key=lambda o: (o.features["activations"], o.cost.file_bytes))
        found = self.space.first_rung(largest.quantization, self.compared)
        option = None if found is None else self.space.option(found, largest.quantization)
        return [option] if option is not None and option.cost.fits else []

    def _first_round(self, bar: Stage) -> None:
        pruned = any(o.rung.ratio > 0 for o in self._options)
        missing = pruned and not any(lane.plan.kept for lane in self.first)
        room = self.most - 1 if missing and self.most > 1 else self.most
        for lane in self.first[:room]:
            if lane.id not in self.results and self._over() is None:
                self._begin(self._step(lane, None, 1, lane.why), lane, bar)

    def _over(self) -> str | None:
        if len(self.results) >= self.most:
            return ENOUGH_MEASURED
        if self.seconds is not None and self.results and time.monotonic() - self._began > self.seconds:
            return TIME_IS_OVER
        return None

    def _next(self) -> tuple[Step, Lane] | str:
        model, goal = self.model(), self._goal()
        values = [v for v in (self.value_of(r) for r in self.results.values()) if v is not None]
        best = min(values, default=None)
        # a plan whose F16 file differs from torch fails at every type
        broken = {r.lane.plan.id for r in self.results.values() if r.error and r.memory is None}
        left = [
            o
            for o in self._options
            if o.id not in self.results and o.cost.fits and (not o.rung.ratio or o.rung.id not in broken)
        ]
        if not left:
            return NO_OPTION
        pruned = [o for o in left if o.rung.ratio > 0]
        unpruned = not any(r.lane.plan.kept for r in self.results.values())
        found = search.propose(left, model, goal, best)
        why = "nothing that meets the limits was measured yet: " if best is None else ""
        if unpruned and pruned and (found is None or len(self.results) + 1 >= self.most):
            # what pruning costs is shown even where it is not expected to pay
            found, why = search.propose(pruned, model, goal, None), "shows what pruning costs: "
        if found is None:
            return NOTHING_BETTER
        expected = found.predicted
        why += f"KL {expected.kl:.3f} predicted ({expected.low:.3f}-{expected.high:.3f})"
        step = self._step(found.option, expected, self._round() + 1, why)
        return step, self.lane(found.option, why)

    def _goal(self) -> Goal:
        """With a floor of agreement, the KL that candidates so far had there."""
        floor = self.goal.least_agreement
        if floor is None or self.goal.objective == "quality":
            return self.goal
        judged = [r.quality for r in self.results.values() if r.quality is not None and r.quality.kl > 0]
        # the share of changed first choices grows with the root of the KL
        slopes = sorted((1 - q.agreement) / q.kl**0.5 for q in judged)
        slope = slopes[len(slopes) // 2] if slopes else USUAL_SLOPE
        limits = [((1 - floor) / max(slope, 1e-3)) ** 2]
        limits += [self.goal.most_kl] if self.goal.most_kl is not None else []
        return dataclasses.replace(self.goal, most_kl=min(limits))

    def _round(self) -> int:
        return max((step.round for step in self.log.steps), default=1)

    def model(self) -> damage.Model:
        """What the measured candidates teach; the user's own file and trained plans are of another kind."""
        seen = []
        for step in self.log.steps:
            result = self.results.get(step.id)
            rung = self.space.find(step.plan, step.allocator, step.block)
            if result is None or result.quality is None or result.memory is None or rung is None:
                continue
            if step.quantization.endswith(lanes.AS_GIVEN):
                continue
            features = self.space.option(rung, step.quantization).features
            kept = search.cache_error(result.memory.flags.kv_type)
            seen.append(
                damage.Seen(
                    features={**features, "cache": kept},
                    kl=result.quality.kl,
                    stderr=result.quality.kl_stderr,
                )
            )
        return damage.fit(self.space.priors(), seen)

    # ------------------------------------------------ finalists

    def finalists(self) -> list[lanes.LaneResult]:
        """The best pruned plans that meet the limits, each at the type it is best with."""
        ranked = [(v, r) for r in self.results.values() if (v := self.value_of(r)) is not None]
        best: dict[str, lanes.LaneResult] = {}
        for _, result in sorted(ranked, key=lambda pair: (pair[0], pair[1].lane.id)):
            if result.lane.plan.kept:
                key = result.lane.plan.key
                best.setdefault(self._made_of.get(key, key), result)
        return list(best.values())[:FINALISTS]

    def worth_solving(self) -> list[lanes.LaneResult]:
        """Finalists that would be the best if solving anew took away half of what the cut costs them."""
        values = [v for v in (self.value_of(r) for r in self.results.values()) if v is not None]
        costs = {term.name: term.value for term in self.model().terms if term.name.startswith("cut ")}
        out = []
        for result in self.finalists():
            rung = next((s for s in self._rungs() if s.id == result.lane.plan.id), None)
            if self.goal.objective != "quality" or rung is None or result.quality is None:
                out.append(result)
                continue
            features = self.space.option(rung, result.lane.quantization).features
            part = sum(cost * features.get(name, 0.0) for name, cost in costs.items())
            if result.quality.kl - SOLVED_PART * part <= min(values):
                out.append(result)
        return out

    def _rungs(self) -> list[Rung]:
        """Rungs of what was taken up; finalists' own plans are none."""
        found = (self.space.find(s.plan, s.allocator, s.block) for s in self.log.steps)
        return [rung for rung in found if rung is not None]

    def again(
        self, chosen: Sequence[lanes.LaneResult], made: Callable[[PrunePlan], PrunePlan], what: str
    ) -> list[lanes.LaneResult]:
        """Every result, with these once more after something was done to the plans' weights."""
        with self.progress.stage(f"finalists {what}", len(chosen)) as bar:
            for result in chosen:
                plan, key = made(result.lane.plan), result.lane.plan.key
                lane = dataclasses.replace(result.lane, plan=plan, why=f"{result.lane.id} {what}")
                self._made_of[plan.key] = self._made_of.get(key, key)
                begun = any(step.id == lane.id for step in self.log.steps)
                # what an earlier session has begun is not left out because time has passed since
                if begun:
                    self._take(lane, bar)
                elif self._over() != TIME_IS_OVER:
                    self._begin(self._step(lane, None, self._round() + 1, lane.why), lane, bar)
        self._write()
        return list(self.results.values())

    def close(self) -> list[lanes.LaneResult]:
        """Every result; F16 files that are no candidates go."""
        for plan in {r.lane.plan.key: r.lane.plan for r in self.results.values()}.values():
            self._drop(plan)
        return list(self.results.values())

    # ------------------------------------------------ one candidate

    def lane(self, option: Option, why: str, *, measure: bool = True) -> Lane:
        return Lane(
            plan=self.plan_of(option.rung),
            quantization=option.quantization,
            cost=option.cost,
            measure=measure,
            why=why,
        )

    def _step(self, of: Lane | Option, expected: damage.Estimate | None, number: int, why: str) -> Step:
        if isinstance(of, Option):
            plan, allocator, block = of.rung.id, of.rung.allocator, of.rung.block
        else:
            plan, allocator, block = of.plan.id, "", 0
        return Step(
            id=of.id,
            plan=plan,
            allocator=allocator,
            block=block,
            quantization=of.quantization,
            round=number,
            why=why,
            kl=None if expected is None else expected.kl,
            kl_low=None if expected is None else expected.low,
            kl_high=None if expected is None else expected.high,
        )

    def _lane_of(self, step: Step) -> Lane | None:
        found = next((lane for lane in self.first if lane.id == step.id), None)
        rung = self.space.find(step.plan, step.allocator, step.block)
        if found is not None or rung is None:
            return found
        return self.lane(self.space.option(rung, step.quantization), step.why)

    def _begin(self, step: Step, lane: Lane, bar: Stage) -> None:
        self._write(steps=(*self.log.steps, step))
        self._take(lane, bar)

    def _take(self, lane: Lane, bar: Stage) -> None:
        self.progress.say(f"candidate {lane.id}: {lane.why}")
        self._keep_masters(lane.plan)
        result = self.results[lane.id] = lanes.run_lane(self.shop, lane)
        if result.error:
            self.progress.say(f"candidate {lane.id} failed: {result.error}")
        elif result.quality is not None:
            self.progress.say(f"candidate {lane.id}: KL {result.quality.kl:.4f} measured")
        bar.advance()

    def _write(self, **changes: Any) -> None:
        spent = round(time.monotonic() - self._began, 1)
        self.log = dataclasses.replace(self.log, seconds=spent, **changes)
        self.run.write(self.log)

    # ------------------------------------------------ F16 files

    def _keep_masters(self, plan: PrunePlan) -> None:
        """The dense F16 file and that of one pruned plan stay: the next candidate may need them."""
        if self._open is not None and plan.kept and plan.key != self._open.key:
            self._drop(self._open)
        if plan.kept:
            self._open = plan

    def _drop(self, plan: PrunePlan) -> None:
        self.shop.learn_what_was_recovered(plan)
        measured = any(
            r.lane.plan.key == plan.key and r.lane.quantization == "F16" for r in self.results.values()
        )
        self.shop.drop_master(plan, keep=measured)

    # ------------------------------------------------ what is shown

    def unmeasured(self) -> list[tuple[Lane, damage.Estimate]]:
        """The options that came nearest, and what is expected of them."""
        model = self.model()
        left = [(o, model.predict(o.features)) for o in self._options if o.id not in self.results]
        left.sort(key=lambda pair: (self.goal.value(pair[1].kl, pair[0].cost), pair[0].id))
        return [
            (self.lane(o, "not measured: others promised more", measure=False), e) for o, e in left[:SHOWN]
        ]

    def describe(self) -> dict[str, Any]:
        """The `search` block of the report."""
        rounds: dict[int, list[Step]] = {}
        for step in self.log.steps:
            rounds.setdefault(step.round, []).append(step)
        return {
            "rounds": [
                {
                    "round": number,
                    "proposed": [step.id for step in steps],
                    "why": "the first round" if number == 1 else steps[0].why,
                }
                for number, steps in sorted(rounds.items())
            ],
            "considered": self.log.considered,
            "measured": len(self.results),
            "stopped": self.log.stopped,
            "seconds": self.log.seconds,
            "model": {
                "terms": {
                    t.name: {"value": t.value, "stderr": t.stderr, "unit": "nats/token"}
                    for t in self.model().terms
                }
            },
        }

    def predicted(self) -> dict[str, tuple[float, float, float]]:
        """What was expected of each candidate, measured since or not: KL with its 80% interval."""
        out = {lane.id: (e.kl, e.low, e.high) for lane, e in self.unmeasured()}
        for s in self.log.steps:
            if s.kl is not None and s.kl_low is not None and s.kl_high is not None:
                out[s.id] = s.kl, s.kl_low, s.kl_high
        return out
