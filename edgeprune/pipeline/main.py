"""The main job: model x target x profile in, a chosen artifact and a report out."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from edgeprune import bench, compensation, data, planner, quality, registry, rundir, selection
from edgeprune.config import budget as budgets
from edgeprune.config.targets import read_calibration, with_calibration
from edgeprune.costs import speed
from edgeprune.costs.gguf_types import block_size, canonical
from edgeprune.devices import local
from edgeprune.errors import ConfigError, InfeasibleError, MissingExtraError, StageError
from edgeprune.exporters import gguf
from edgeprune.pipeline import (
    bundling,
    costing,
    device_loop,
    findings,
    light,
    prepare,
    refine,
    scoring,
    searching,
    trimming,
)
from edgeprune.pipeline import lane as lanes
from edgeprune.pipeline.parent import Parent, open_parent, with_query_heads
from edgeprune.pipeline.samples import prompts_for
from edgeprune.planner import Lane
from edgeprune.progress import Progress
from edgeprune.records import (
    BenchResult,
    Budget,
    Candidate,
    DeviceTarget,
    Measured,
    Predicted,
    Profile,
    PrunePlan,
    QualitySummary,
    SampleSet,
    Selection,
    make_key,
)
from edgeprune.recovery.recipe import RecoveryRecipe
from edgeprune.report import build as report_build
from edgeprune.report import page
from edgeprune.search import BASES, Goal, Rung, SearchSpace, mixes

# what only late stages import: said before anything is worked out
_NEEDED = (("transformers", "torch"), ("tokenizers", "torch"), ("gguf", "gguf"), ("llama_cpp", "gguf"))


TEXT_SEED_OFFSET = 104_729  # what matrices are solved on is neither calibration nor held-out text


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The command line of the main job, parsed."""

    target: str
    budget_bytes: int | None
    model: str | None
    profile: str
    device: str
    out: Path
    file_bytes: int | None
    min_tps: float | None
    max_kl: float | None
    metric: str | None
    calibration: str | None
    eval_text: str | None
    seed: int
    threads: int | None
    max_candidates: int | None
    quantizations: tuple[str, ...]
    mode: str | None
    command: tuple[str, ...]
    metric_options: dict[str, str] = field(default_factory=dict)
    allocators: tuple[str, ...] = ()  # empty: the profile's
    compensation: str | None = None  # None: the profile's
    calibration_seeds: int = 1  # draws with seed, seed + 1, …; scores are averaged
    ssh_config: Path | None = None
    device_python: str | None = None
    llama_bench: str | None = None  # on the device
    keep_remote: bool = False
    recovery: RecoveryRecipe | None = None  # None: pruned plans are not trained
    sustained_s: float = 60.0  # of decoding on a device, behind the repeats
    eval_suite: str | None = None  # of `edgeprune eval`, for the selected file
    eval_data: Path | None = None
    trim_vocab: tuple[str, ...] = ()  # texts or languages whose tokens stay; empty: all stay
    trim_check: str | None = None
    query_heads: bool = False  # attention gives up query heads, not KV groups
    max_first_token_ms: float | None = None
    max_energy_j: float | None = None  # per generated token
    min_agreement: float | None = None
    objective: str = "quality"  # quality, speed or size: what the best within the limits is best in
    minutes: float | None = None  # no candidate is begun after so many of measuring
    grid: tuple[tuple[float, str], ...] = ()  # measure these (ratio, quantization) pairs instead of searching
    label: str | None = None  # of a further target in the same run folder: part of its report's name


def run(options: RunOptions, progress: Progress) -> dict[str, Any]:
    """Run the whole pipeline in `options.out` and return the report (schema 1) as plain values.

    Finished stages are found by their key and not run again. Raises InfeasibleError after the report
    was written when nothing meets the budget.
    """
    target, took, profile = budgets.load_inputs(
        options.target, options.profile, memory_bytes=options.budget_bytes
    )
    if options.allocators:
        recipe = dataclasses.replace(profile.recipe, allocators=tuple(dict.fromkeys(options.allocators)))
        profile = dataclasses.replace(profile, recipe=recipe)
    if options.compensation is not None:
        recipe = dataclasses.replace(profile.recipe, compensation=options.compensation)
        profile = dataclasses.replace(profile, recipe=recipe)
    if options.eval_text is not None and options.eval_text == options.calibration:
        progress.say("--eval-text is the calibration text: quality will look better than it is")
    metric, metric_options = prepare.load_metric(
        options.metric or profile.recipe.metric, options.metric_options
    )
    asked_types = options.quantizations or profile.recipe.quantizations
    quantizations = tuple(dict.fromkeys(canonical(name) for name in asked_types))
    _check_recipe(profile)
    for text in (options.calibration, options.eval_text):
        if text is not None:
            data.read_text(text)  # a wrong name is found now, not after the model has been read
    trim = trimming.Trim(options.trim_vocab, options.trim_check)
    trimming.check(trim)
    for library, extra in _NEEDED:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)
    _check_mode(target, options.mode)
    asked = scoring.open_suite(options.eval_suite, options.eval_data)
    options = dataclasses.replace(options, recovery=_for_one_type(options.recovery, quantizations))
    with (
        rundir.RunDir(options.out) as folder,
        device_loop.connect(
            options.device,
            folder,
            target,
            mode=options.mode,
            ssh_config=options.ssh_config,
            python=options.device_python,
            llama_bench=options.llama_bench,
            keep=options.keep_remote,
            sustained_s=options.sustained_s,
            say=progress.say,
        ) as device,
    ):
        if device.local or not target.local:
            target = _with_machine(folder, target)
        budget = budgets.resolve_budget(
            target,
            profile,
            memory_bytes=options.budget_bytes,
            file_bytes=options.file_bytes,
            decode_tps=options.min_tps,
            first_token_ms=options.max_first_token_ms,
            kl=options.max_kl,
            energy_j=options.max_energy_j,
            agreement=options.min_agreement,
            objective=options.objective,
        )
        if took:
            progress.say(took)
        parent = trimming.trim(folder, open_parent(options.model, folder), trim, progress)
        if options.query_heads:
            parent = with_query_heads(parent, metric, metric_options)
        if profile.workload.context_tokens > parent.graph.dims.max_context:
            raise ConfigError(
                f"profile {profile.name} needs a context of {profile.workload.context_tokens} tokens, "
                f"{parent.name} was trained for {parent.graph.dims.max_context}",
                "choose another profile with --profile",
            )
        # a chat template without an end is refused before the slow part
        prompts_for(parent.tokenizer_kvs, parent.name)
        job = _Job(
            options=options,
            folder=folder,
            target=target,
            profile=profile,
            budget=budget,
            parent=parent,
            quantizations=quantizations,
            progress=progress,
            device=device,
        )
        candidates, chosen, context = job.work(metric, metric_options)
        report = report_build.build(
            command=options.command,
            seed=options.seed,
            target=target,
            profile=profile,
            budget=budget,
            name=parent.name,
            graph=parent.graph,
            license_name=parent.license_name,
            parent_key=parent.key,
            candidates=candidates,
            chosen=chosen,
            context={**context, "target_choice": took},
        )
        scored = scoring.of_selected(
            *(asked, folder, parent, candidates, chosen.selected),
            seed=options.seed,
            threads=options.threads,
            progress=progress,
        )
        if scored is not None:
            report = {**report, "benchmarks": scored}
        report = report_build.write(folder, report, options.label)
        bundling.refresh(folder.root, report, parent.folder, options.label)
        page.write(folder.root, report, options.label, say=progress.say)
    if chosen.selected is None and chosen.nearest is None:
        raise StageError(chosen.headline, "report.json holds what each one said")
    if chosen.selected is None:
        raise InfeasibleError(
            chosen.headline, "raise the limit it missed, or ask for a shorter context (--profile tiny-512)"
        )
    return report


def _with_machine(folder: rundir.RunDir, target: DeviceTarget) -> DeviceTarget:
    """Facts of this machine, detected once per run folder: a probe's noise must not change a resumed run."""
    if not target.local:
        return with_calibration(target)
    calibrated = read_calibration(target.name)
    key = make_key("detected", target.key, None if calibrated is None else calibrated.key)
    found = folder.find(DeviceTarget, key, kind="detected")
    if found is not None:
        return found
    detected = local.describe(target)
    detected = dataclasses.replace(detected, key=key)
    folder.write(detected, kind="detected")
    return detected


def _check_recipe(profile: Profile) -> None:
    """Refuse names in a profile that no plug-in has, before the slow part."""
    refine.check_compensation(profile.recipe.compensation)
    for name in profile.recipe.allocators:
        if planner.load_allocator(name).measures:
            raise ConfigError(
                f"the {name} allocator runs the model many times for each plan, and this job makes dozens",
                "use sensitivity here, or search with 'edgeprune prune'",
            )
    for name in profile.recipe.formats:
        registry.load("exporters", name, "EXPORTER")


def _for_one_type(asked: RecoveryRecipe | None, quantizations: tuple[str, ...]) -> RecoveryRecipe | None:
    """The recipe, checked; one that trains through a quantization is told which. Raises ConfigError."""
    if asked is None:
        return None
    from edgeprune.pipeline import recovering

    if asked.method == "group":
        if len(quantizations) != 1:
            raise ConfigError(
                "--recovery group trains through one quantization, and this job tries several",
                "name one with --quantization Q4_1",
            )
        asked = dataclasses.replace(asked, quantization=quantizations[0])
    recovering.check_recipe(asked)
    return asked


def _check_mode(target: DeviceTarget, mode: str | None) -> None:
    if mode is not None and mode not in [m.name for m in target.power_modes]:
        known = ", ".join(m.name for m in target.power_modes) or "none"
        raise ConfigError(f"target {target.name} has no power mode '{mode}'", f"power modes: {known}")


@dataclass(slots=True, kw_only=True)
class _Job:
    options: RunOptions
    folder: rundir.RunDir
    target: DeviceTarget
    profile: Profile
    budget: Budget
    parent: Parent
    quantizations: tuple[str, ...]
    progress: Progress
    device: device_loop.DeviceBench
    parent_sample: SampleSet | None = None

    @property
    def on_target(self) -> bool:
        """Measurements are the target's own."""
        return self.target.local or not self.device.local

    def work(
        self, metric: Any, metric_options: dict[str, str]
    ) -> tuple[list[Candidate], Selection, dict[str, Any]]:
        recipe, options = self.profile.recipe, self.options
        # one set of scores serves all rungs of the ladder
        metric_options = prepare.dense_options(metric, metric_options, self.progress)
        space = planner.PlanSpace(
            graph=self.parent.graph,
            scores={},
            poolable=metric.poolable(metric_options),
            constraints=costing.widest_constraints(
                gguf.constraints, self.parent.family, self.parent.graph.dims, self.quantizations
            ),
            metric=metric.name,
        )
        cost = self._cost_model()
        # what can be refused is refused before the slow part
        for allocator in recipe.allocators:
            planner.check_ratio(space, allocator, 0.0)
        for quantization in self.quantizations:
            cost(self.parent.graph.dims, quantization)
        held_out = options.seed + prepare.EVAL_SEED_OFFSET
        seeds = range(options.seed, options.seed + options.calibration_seeds)
        wanted = (
            *((recipe.calibration_samples, recipe.calibration_tokens, seed) for seed in seeds),
            (recipe.eval_samples, recipe.eval_tokens, held_out),
        )
        refined = recipe.compensation != "none" or any(
            planner.load_allocator(name).curves for name in recipe.allocators
        )
        solving = (recipe.compensation_samples, recipe.compensation_tokens, options.seed + TEXT_SEED_OFFSET)
        written = options.calibration is None and options.eval_text is None
        together = (*wanted, solving) if refined else wanted
        tokens = prepare.Tokens(self.folder, self.parent, self.progress, together=together if written else ())
        drawn = [
            tokens.get(options.calibration, n_samples=n, n_tokens=t, seed=seed) for n, t, seed in wanted[:-1]
        ]
        calibration_set = drawn[0][0]
        eval_set, eval_windows = tokens.get(
            options.eval_text, n_samples=wanted[-1][0], n_tokens=wanted[-1][1], seed=wanted[-1][2]
        )
        scored = []
        stats: dict[str, np.ndarray] = {}  # of the first draw: quantization wants one
        for seed, (chosen_set, windows) in zip(seeds, drawn, strict=True):
            found, record, values = prepare.calibrate(
                *(self.folder, self.parent, metric, metric_options, chosen_set, windows),
                seed=seed,
                progress=self.progress,
            )
            stats = stats or found
            scored.append((record, values))
        scores_record, scores = prepare.over_seeds(
            self.folder, self.parent, metric, metric_options, seeds, scored, self.progress
        )
        space = dataclasses.replace(
            space, scores=scores, poolable=scores_record.poolable, scores_key=scores_record.key
        )

        def solved_on() -> refine.Text:
            samples, length, seed = solving
            return refine.text_for(
                *(tokens, self.parent, options.calibration),
                samples=samples,
                length=length,
                seed=seed,
                trained_on=options.recovery is not None and options.recovery.data == options.calibration,
            )

        text = solved_on() if refined else None
        if text is not None and any(planner.load_allocator(name).curves for name in recipe.allocators):
            space = refine.with_curves(
                *(self.folder, self.parent, space, text),
                compensated=recipe.compensation == "ridge",
                measures=False,
                progress=self.progress,
            )
        ladders = self._search_space(space, cost)
        dense = ladders.make(ladders.dense)
        shop = lanes.Workshop(
            run=self.folder,
            parent=self.parent,
            stats=stats,
            stats_key=make_key("imatrix", self.parent.key, calibration_set.key),
            eval_set=eval_set,
            eval_windows=eval_windows,
            threads=options.threads or local.available_threads(),
            protocol=self.profile.bench,
            device_name=local_name() if self.device.local else self.device.name,
            device=None if self.device.local else self.device,
            measure_speed=self.on_target,
            memory_limit=self.budget.memory_bytes.value - self.target.runtime_overhead_bytes,
            flag_choices=cost.flag_choices(),
            bench_threads=options.threads,
            text=text,
            recovery=options.recovery,
            progress=self.progress,
        )
        search = self._search(shop, ladders, dense, cost, text)
        self._open_reference(shop, dense)
        results = search.measure()
        if recipe.finalists != "none" and options.compensation is None and recipe.compensation == "none":
            close = search.worth_solving()
            if close:
                shop.text = text = text or solved_on()
                made = functools.partial(_solved, recipe.finalists, text.key)
                search.again(close, made, "solved anew")
        if options.recovery is not None:
            search.again(search.finalists(), functools.partial(self._trained, shop), "after training")
        results = search.close()
        builds = bench.other_builds([r.bench for r in results if r.bench is not None])
        others = (*self._missed(dense, cost), *(lane for lane, _ in search.unmeasured()))
        left = [lanes.LaneResult(lane=lane) for lane in others]
        expected = search.predicted()
        candidates = [self._candidate(shop, r, builds, expected) for r in (*_in_order(results), *left)]
        candidates = [
            dataclasses.replace(c, meets=selection.check_limits(self.budget, c)) for c in candidates
        ]
        candidates, chosen = self._select(shop, results, candidates)
        candidates = [dataclasses.replace(c, reason=chosen.reasons.get(c.id, c.reason)) for c in candidates]
        self.folder.write(chosen)
        context = {
            "metric_options": metric_options,
            "scores": light.describe_scores(scores_record),
            "calibration": calibration_set,
            "evaluation": eval_set,
            "threads": shop.bench_threads,
            "dense_perplexity": next(
                (r.quality.dense_perplexity for r in results if r.quality is not None), None
            ),
            "plans": _plans([dense, *(r.lane.plan for r in (*results, *left))]),
            "search": search.describe(),
            "recoveries": self._described(shop),
            "vocabulary": trimming.describe(self.parent.vocabulary) if self.parent.vocabulary else None,
            **self._findings(shop, results, candidates, chosen),
        }
        return candidates, chosen, context

    def _findings(
        self,
        shop: lanes.Workshop,
        results: list[lanes.LaneResult],
        candidates: list[Candidate],
        chosen: Selection,
    ) -> dict[str, Any]:
        """What the report says beside the choice."""
        judged = {r.lane.id: r.quality for r in results if r.quality is not None}
        arrays = {name: load_file(shop.kl_arrays(q))["kl"] for name, q in judged.items()}
        taken = next((c for c in candidates if c.id == chosen.selected), None)
        dims = next((r.lane.plan.dims for r in results if r.lane.id == chosen.selected), None)
        path = self.folder.path(taken.artifact.path) if taken and taken.artifact else None
        modes = (
            findings.power_modes(self.target, self.options.mode, taken, path, dims, self.profile.workload)
            if dims is not None
            else ()
        )
        outputs = [self.parent_sample] if self.parent_sample else []
        for c in findings.shown(candidates, chosen):
            assert c.artifact is not None and c.measured is not None and c.measured.flags is not None
            found = findings.sample(
                *(self.folder, self.parent, self.progress),
                functools.partial(self.folder.path, c.artifact.path),
                source=c.id,
                made_from=c.artifact.sha256,
                kv_type=c.measured.flags.kv_type,
                threads=shop.threads,
            )
            outputs += [found] if found else []
        return {
            "against_selected": light.against_selected(candidates, chosen.selected, arrays),
            "power_modes": modes,
            "samples": outputs,
        }

    def _trained(self, shop: lanes.Workshop, plan: PrunePlan) -> PrunePlan:
        """The same plan under a name and key that say how its weights are trained."""
        from edgeprune.pipeline import recovering

        asked = self.options.recovery
        assert asked is not None
        key = recovering.recipe_key(self.parent, plan.key, asked)
        shop.trained.add(key)
        return dataclasses.replace(plan, id=f"{plan.id}-{asked.method}", key=key)

    def _described(self, shop: lanes.Workshop) -> dict[str, Any]:
        """What recovery came to, by plan."""
        if not shop.recoveries:
            return {}
        from edgeprune.pipeline import recovering

        return {name: recovering.describe(result) for name, result in shop.recoveries.items()}

    def _search_space(self, space: planner.PlanSpace, cost: costing.CostModel) -> SearchSpace:
        """Ladders whose widths fill the blocks of each type, and every mix that may be used."""
        recipe, dims = self.profile.recipe, self.parent.graph.dims
        names = list(self.quantizations)
        if recipe.mixes and not self.options.quantizations:
            names += [name for name in mixes(BASES) if name not in names]
        plans = {}
        for block in sorted({block_size(name) for name in names}):
            alike = [name for name in names if block_size(name) == block]
            rules = costing.widest_constraints(gguf.constraints, self.parent.family, dims, alike)
            fitting = dataclasses.replace(space, constraints=rules)
            if space.curves:
                # what is saved are bytes, and a mix gives some tensors more bits than others
                bytes_of = costing.unit_bytes(fitting, alike[-1], cost)
                fitting = dataclasses.replace(fitting, unit_costs=bytes_of)
            plans[block] = fitting
        return SearchSpace(
            plans=plans,
            allocators=recipe.allocators,
            quantizations=names,
            price=cost,
            rows=cost.files.tensors,
            caches=costing.cache_types(dims),
            finish=compensation.compensated_dims if recipe.compensation == "bias" else lambda cut: cut,
        )

    def _search(
        self,
        shop: lanes.Workshop,
        space: SearchSpace,
        dense: PrunePlan,
        cost: costing.CostModel,
        text: refine.Text | None,
    ) -> searching.Search:
        recipe, options = self.profile.recipe, self.options
        given = self._given_lane(dense, cost)
        lanes_ = [lane for lane in self._dense_lanes(dense, cost) if lane.measure]
        made: dict[str, PrunePlan] = {}

        def plan_of(rung: Rung) -> PrunePlan:
            if rung.id not in made:
                plan = space.make(rung)
                kind = recipe.compensation
                if kind != "none" and text is not None:
                    plan = refine.compensated_plan(plan, kind, text.key)
                made[rung.id] = plan
            return made[rung.id]

        goal = Goal(
            objective=self.budget.objective,
            most_kl=None if self.budget.kl is None else self.budget.kl.value,
            least_agreement=None if self.budget.agreement is None else self.budget.agreement.value,
        )
        first = [lane for lane in (given, *lanes_) if lane is not None and lane.measure]
        most = options.max_candidates or recipe.max_measured
        if options.grid:
            first = _grid(space, options.grid, plan_of)
            most = len(first)
        described = [self.parent.key, self.target.key, self.budget.key, goal.objective]
        shapes = [list(recipe.allocators), list(space.quantizations), list(recipe.ratios), list(options.grid)]
        return searching.Search(
            run=self.folder,
            shop=shop,
            space=space,
            goal=goal,
            first=first,
            compared=recipe.ratios[0] if recipe.ratios else None,
            plan_of=plan_of,
            value_of=functools.partial(self._value_of, shop),
            most=most,
            seconds=None if options.minutes is None else 60 * options.minutes,
            key=make_key(
                "search_log",
                *(described, shapes, plan_of(space.dense).key, recipe.compensation),
                *(text.key if text else None, space.scores_key, shop.stats_key, shop.eval_set.key),
                *(options.mode, self.device.name if not self.device.local else "local"),
            ),
            progress=self.progress,
        )

    def _dense_lanes(self, dense: PrunePlan, cost: costing.CostModel) -> list[Lane]:
        """The parent at every type of the profile, the largest file first."""
        out = []
        for name in self.quantizations:
            price = cost(dense.dims, name)
            why = "the dense model at every type that fits"
            if not price.fits:
                why = f"predicted to miss {', '.join(price.misses)}"
            out.append(Lane(plan=dense, quantization=name, cost=price, measure=price.fits, why=why))
        return sorted(out, key=lambda lane: -lane.cost.file_bytes)

    def _missed(self, dense: PrunePlan, cost: costing.CostModel) -> list[Lane]:
        return [lane for lane in self._dense_lanes(dense, cost) if not lane.measure]

    def _value_of(self, shop: lanes.Workshop, result: lanes.LaneResult) -> float | None:
        """What the objective makes of a result, smaller is better; None when it misses a limit."""
        candidate = self._candidate(shop, result, {}, {})
        meets = selection.check_limits(self.budget, candidate)
        if result.error is not None or candidate.quality is None or not meets or not all(meets.values()):
            return None
        return selection.value(self.budget, candidate)

    def _select(
        self, shop: lanes.Workshop, results: list[lanes.LaneResult], candidates: list[Candidate]
    ) -> tuple[list[Candidate], Selection]:
        """The best candidate that also lives under a hard limit of its budget; one that is killed is out."""
        while True:
            chosen = selection.select(self.budget, candidates, self._tie(shop, results))
            taken = next((c for c in candidates if c.id == chosen.selected), None)
            if taken is None or taken.artifact is None or taken.measured is None:
                return candidates, chosen
            assert taken.measured.flags is not None
            killed = device_loop.hold(
                self.device,
                self.folder.path(taken.artifact.path),
                sha256=taken.artifact.sha256,
                flags=taken.measured.flags,
                limit_bytes=shop.memory_limit,
                threads=min(shop.threads, self.device.threads()),
            )
            if killed is None:
                return candidates, chosen
            self.progress.say(f"candidate {taken.id} failed: {killed}")
            out = dataclasses.replace(taken, error=killed, meets={**taken.meets, "memory": False})
            candidates = [out if c.id == taken.id else c for c in candidates]

    def _cost_model(self) -> costing.CostModel:
        parent = self.parent
        return costing.CostModel(
            files=gguf.FileCost(
                parent.family,
                parent.source.config,
                parent.gguf_tokenizer(),
                name=parent.name,
                license_name=parent.license_name,
                has_imatrix=True,
            ),
            target=self.target,
            budget=self.budget,
            workload=self.profile.workload,
            speed=speed.speed_model(self.target, mode=self.options.mode, threads=self.options.threads),
            tokenizer=costing.tokenizer_kind(parent.gguf_tokenizer()),
        )

    def _given_lane(self, dense: Any, cost: costing.CostModel) -> Lane | None:
        """The user's own quantized file is what they would ship without us: always a candidate."""
        parent = self.parent
        if parent.given is None or parent.given_quantization in ("F16", "F32", None):
            return None
        tensors = costing.stored_tensors(parent.given)
        price = cost.price(parent.graph.dims, parent.given.stat().st_size, tensors)
        return Lane(
            plan=dense,
            quantization=f"{parent.given_quantization}{lanes.AS_GIVEN}",
            cost=price,
            measure=price.fits,
            why="the file as it was given" if price.fits else f"predicted to miss {', '.join(price.misses)}",
        )

    def _open_reference(self, shop: lanes.Workshop, dense: PrunePlan) -> None:
        shop.make_reference(dense)
        # taken now: the F16 file may be gone once its lanes are done
        self.parent_sample = findings.sample(
            *(self.folder, self.parent, self.progress),
            lambda: self.folder.path(shop.verified_master(dense).path),
            source=findings.PARENT,
            made_from=self.parent.key,
            kv_type="f16",
            threads=shop.threads,
        )

    def _candidate(
        self,
        shop: lanes.Workshop,
        result: lanes.LaneResult,
        builds: Mapping[str, str],
        expected: Mapping[str, tuple[float, float, float]],
    ) -> Candidate:
        lane, plan = result.lane, result.lane.plan
        kl, kl_low, kl_high = expected.get(lane.id, (None, None, None))
        measured = None
        if result.memory is not None:
            timed = result.bench
            decode = spread = prefill = first = None
            if timed is not None:
                decode = bench.median_tps(timed.n_gen, timed.decode_ns)
                spread = bench.stdev_tps(timed.n_gen, timed.decode_ns)
                prefill = bench.median_tps(timed.n_prompt, timed.prefill_ns)
                first = 1000 * self.profile.workload.prompt_tokens / prefill
            measured = Measured(
                on=shop.device_name if self.on_target else f"{shop.device_name} (not the target)",
                decode_tps=decode,
                decode_tps_stdev=spread,
                noisy=timed is not None and bench.spread(timed) > bench.QUIET_SPREAD,
                prefill_tps=prefill,
                first_token_ms=first,
                peak_memory_bytes=result.memory.peak_bytes,
                load_s=result.memory.load_ns / 1e9,
                flags=result.memory.flags,
                doubts=() if timed is None else _doubts(timed, builds),
                joules_per_token=None if timed is None else timed.joules_per_token,
                meter=None if timed is None else timed.meter,
            )
        summary = None
        if result.quality is not None:
            q = result.quality
            summary = QualitySummary(
                kl=q.kl,
                kl_stderr=q.kl_stderr,
                perplexity=q.perplexity,
                perplexity_stderr=q.perplexity_stderr,
                agreement=q.agreement,
                tokens=q.tokens,
                text=q.text,
            )
        price = lane.cost
        dense = not plan.kept
        return Candidate(
            id=lane.id,
            plan=plan.id,
            ratio=plan.ratio,
            ratio_all=plan.ratio_all,
            metric=None if dense else plan.metric,
            allocator=None if dense else plan.allocator,
            quantization=lane.quantization,
            uniform=plan.uniform,
            artifact=result.artifact,
            predicted=Predicted(
                file_bytes=price.file_bytes,
                peak_memory_bytes=price.peak_bytes,
                runtime_bytes=self.target.runtime_overhead_bytes,
                decode_tps=price.decode_tps,
                decode_tps_low=price.decode_tps_low,
                decode_tps_high=price.decode_tps_high,
                flags=price.flags,
                memory=price.memory,
                kl=kl,
                kl_low=kl_low,
                kl_high=kl_high,
            ),
            measured=measured,
            quality=summary,
            verify=result.verify,
            meets={},
            error=result.error,
            reason=lane.why,
            key=make_key("candidate", plan.key, lane.quantization),
        )

    def _tie(self, shop: lanes.Workshop, results: list[lanes.LaneResult]) -> selection.Tie:
        by_id = {r.lane.id: r.quality for r in results if r.quality is not None}
        arrays: dict[str, np.ndarray] = {}

        def per_token(name: str) -> np.ndarray:
            if name not in arrays:
                arrays[name] = load_file(shop.kl_arrays(by_id[name]))["kl"]
            return arrays[name]

        return lambda a, b: quality.paired_difference(per_token(a), per_token(b)).tie


def _solved(kind: str, text_key: str, plan: PrunePlan) -> PrunePlan:
    """The same plan, its weights made up for, under a name that says so."""
    return dataclasses.replace(refine.compensated_plan(plan, kind, text_key), id=f"{plan.id}-{kind}")


def _grid(
    space: SearchSpace, asked: Sequence[tuple[float, str]], plan_of: Callable[[Rung], PrunePlan]
) -> list[Lane]:
    """A lane for every pair that is predicted to fit; a ratio is the weakest rung that removes as much."""
    out = {}
    for ratio, quantization in asked:
        rung = space.dense if ratio == 0 else space.first_rung(quantization, ratio)
        if rung is None:
            continue
        option = space.option(rung, quantization)
        if option.cost.fits:
            lane = Lane(
                plan=plan_of(rung),
                quantization=quantization,
                cost=option.cost,
                measure=True,
                why="on the grid",
            )
            out[lane.id] = lane
    return list(out.values())


def _in_order(results: Sequence[lanes.LaneResult]) -> list[lanes.LaneResult]:
    """The dense model from large to small, then pruned plans as they were taken up."""
    dense = [r for r in results if not r.lane.plan.kept]
    return sorted(dense, key=lambda r: -r.lane.cost.file_bytes) + [r for r in results if r.lane.plan.kept]


def _plans(found: Sequence[PrunePlan]) -> tuple[PrunePlan, ...]:
    """Each plan once, from weak to strong."""
    return tuple(sorted({plan.id: plan for plan in found}.values(), key=lambda p: (p.ratio, p.id)))


def _doubts(timed: BenchResult, builds: Mapping[str, str]) -> tuple[str, ...]:
    other = builds.get(timed.key)
    return (*timed.doubts, other) if other else timed.doubts


def local_name() -> str:
    return local.environment().cpu
