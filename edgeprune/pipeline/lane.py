"""One lane: a plan at a quantization becomes a file that is verified, measured and judged."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import edgeprune
from edgeprune import bench, calibration, checkpoint, quality, rundir, verify
from edgeprune.errors import EdgepruneError, StageError
from edgeprune.exporters import gguf
from edgeprune.pipeline import refine
from edgeprune.pipeline.device_loop import DeviceBench
from edgeprune.pipeline.parent import Parent
from edgeprune.planner import Lane
from edgeprune.progress import Progress, Silent
from edgeprune.records import (
    Artifact,
    BenchProtocol,
    BenchResult,
    LaunchFlags,
    MemoryResult,
    PrunePlan,
    QualityResult,
    RecoveryResult,
    TokenSet,
    VerifyResult,
    make_key,
)
from edgeprune.recovery.recipe import RecoveryRecipe
from edgeprune.runtimes import llama_cpp

VERIFY_TOKENS = 256
BENCH_TRIES = 3  # a noisy bench is run again; the quietest try counts
AS_GIVEN = " as given"


def verify_flags(n_tokens: int) -> LaunchFlags:
    """Flags that add no rounding of their own: flash attention works in F16 whatever the cache's type."""
    return LaunchFlags(
        context_tokens=max(n_tokens, 32), ubatch=128, kv_type="f32", mmap=True, flash_attention=False
    )


@dataclass(slots=True, kw_only=True)
class Workshop:
    """What every lane works with. Lanes never look at each other."""

    run: rundir.RunDir
    parent: Parent
    stats: Mapping[str, np.ndarray]  # calibration of the dense model, for importance matrices
    stats_key: str
    eval_set: TokenSet
    eval_windows: np.ndarray
    threads: int
    protocol: BenchProtocol
    device_name: str
    measure_speed: bool
    memory_limit: float
    flag_choices: list[LaunchFlags]
    text: refine.Text | None = None  # what plans with compensation are solved on
    recovery: RecoveryRecipe | None = None  # what plans are trained with
    trained: set[str] = dataclasses.field(default_factory=set)  # keys of the plans that are
    recoveries: dict[str, RecoveryResult] = dataclasses.field(default_factory=dict)  # by plan
    progress: Progress = dataclasses.field(default_factory=Silent)
    bench_threads: int | None = None
    device: DeviceBench | None = None  # where to measure, if not here
    reference: llama_cpp.Reference | None = None
    _sources: dict[str, checkpoint.Source] = dataclasses.field(default_factory=dict)

    # ------------------------------------------------ export

    def _pruned(self, plan: PrunePlan) -> checkpoint.Source:
        if plan.key not in self._sources:
            # one plan at a time is worked on, and what a source holds in memory is not small
            source = refine.source_of(self.run, self.parent, plan, self.text, self.progress)
            if self.recovery is not None and plan.key in self.trained:
                # help and the dense lanes must not load what trains
                from edgeprune.pipeline import recovering

                self.recoveries[plan.id], source = recovering.recovered(
                    self.run, self.parent, plan.dims, source, plan.key, self.recovery, self.progress
                )
            self._sources = {plan.key: source}
        return self._sources[plan.key]

    def learn_what_was_recovered(self, plan: PrunePlan) -> None:
        """A resumed run whose files are all there has not opened the plan; the report wants its record."""
        if plan.key in self.trained and plan.id not in self.recoveries:
            self._pruned(plan)

    def _export(self, path: Path, plan: PrunePlan, quantization: str, master: Path | None) -> int:
        source = self._pruned(plan)
        imatrix = None
        if quantization not in ("F16", "F32"):
            cut = calibration.imatrix(self.stats, self.parent.graph, plan.kept)
            imatrix = gguf.imatrix_names(self.parent.family, plan.dims, cut)
        return gguf.export(
            path,
            family=self.parent.family,
            dims=plan.dims,
            config=source.config,
            tokenizer_kvs=self.parent.gguf_tokenizer(),
            read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
            quantization=quantization,
            imatrix=imatrix,
            threads=self.threads,
            name=self.parent.name,
            license_name=self.parent.license_name,
            master=master,
            packed=getattr(source, "packed", None),
        )

    def artifact(self, plan: PrunePlan, quantization: str) -> Artifact:
        """Export one file, once. A quantized file starts from the plan's verified F16 file."""
        imatrix_key = None if quantization in ("F16", "F32") else self.stats_key
        key = make_key(
            "artifact",
            self.parent.key,
            plan.key,
            quantization,
            imatrix_key,
            edgeprune.__version__,
            llama_cpp.RUNTIME.version(),
        )
        relative = f"artifacts/{plan.id}-{key[:8]}-{quantization}.gguf"
        path = self.run.path(relative)

        def compute() -> Artifact:
            master = None
            if quantization not in ("F16", "F32"):
                master = self.run.path(self.verified_master(plan).path)
            n_bytes = self._export(path, plan, quantization, master)
            return Artifact(
                path=relative,
                format="gguf",
                quantization=quantization,
                bytes=n_bytes,
                sha256=rundir.sha256_file(path),
                made_from=plan.key,
                key=key,
            )

        return self.run.stage(
            Artifact,
            key,
            compute,
            name=f"export {plan.id} {quantization}",
            valid=lambda a: self.run.file_ok(a.path, a.bytes),
        )

    def verified_master(self, plan: PrunePlan) -> Artifact:
        """The plan's F16 file, checked against torch before anything is made from it."""
        master = self.artifact(plan, "F16")
        result = self.verify(plan, master, exact=True)
        if not result.passed:
            raise StageError(f"{master.path}: {result.reason}")
        return master

    def drop_master(self, plan: PrunePlan, keep: bool) -> None:
        """Delete a plan's F16 file and torch logits once its lanes are done."""
        self._logits_path(plan).unlink(missing_ok=True)
        if not keep:
            # eight digits of its key: the files of PLAN-full are another plan's
            for path in (self.run.root / "artifacts").glob(f"{plan.id}-{'?' * 8}-F16.gguf"):
                path.unlink(missing_ok=True)

    def given(self) -> Artifact:
        """The user's own GGUF file, shipped unchanged: no requantization loss."""
        source = self.parent.given
        assert source is not None
        key = make_key("artifact", "given", self.parent.key)
        relative = f"artifacts/given-{key[:8]}-{self.parent.given_quantization}.gguf"
        path = self.run.path(relative)

        def compute() -> Artifact:
            with rundir.atomic_path(path) as temporary:
                try:
                    os.link(source.resolve(), temporary)
                except OSError:
                    shutil.copyfile(source, temporary)
            return Artifact(
                path=relative,
                format="gguf",
                quantization=f"{self.parent.given_quantization}{AS_GIVEN}",
                bytes=path.stat().st_size,
                sha256=rundir.sha256_file(path),
                made_from=self.parent.key,
                key=key,
            )

        return self.run.stage(
            Artifact,
            key,
            compute,
            name="export as given",
            valid=lambda a: self.run.file_ok(a.path, a.bytes),
        )

    # ------------------------------------------------ verify

    def _logits_path(self, plan: PrunePlan) -> Path:
        return self.run.root / "arrays" / f"torch-logits-{plan.key}.npy"

    def _torch_logits(self, plan: PrunePlan, window: np.ndarray) -> np.ndarray:
        path = self._logits_path(plan)
        if path.is_file():
            stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return stored
        logits = calibration.forward(self._pruned(plan), plan.dims, window)
        with rundir.atomic_path(path) as temporary, temporary.open("wb") as f:
            np.save(f, logits, allow_pickle=False)
        return logits

    def verify(self, plan: PrunePlan, artifact: Artifact, *, exact: bool) -> VerifyResult:
        """Read the file with its runtime and compare logits with torch on 256 tokens."""
        window = self.eval_windows[:1, :VERIFY_TOKENS]
        key = make_key("verify_result", artifact.sha256, plan.key, self.eval_set.key, exact)

        def compute() -> VerifyResult:
            path = self.run.path(artifact.path)
            result = self._compare(path, plan, window, key)
            reason, note = result.failure(exact=exact), None
            if reason and artifact.quantization == "F16" and result.kl <= verify.MOST_KL:
                note = self._blame_rounding(plan, window, key)
                reason = None if note else reason
            return VerifyResult(
                tokens=result.tokens,
                kl=result.kl,
                max_abs_diff=result.max_abs_diff,
                same_argmax=result.same_argmax,
                explained_argmax=result.explained_argmax,
                passed=reason is None,
                reason=reason,
                note=note,
                key=key,
            )

        return self.run.stage(VerifyResult, key, compute, name=f"verify {artifact.path}")

    def _compare(self, path: Path, plan: PrunePlan, window: np.ndarray, key: str) -> verify.Comparison:
        out = self.run.root / "arrays" / f"file-logits-{key}.f32"
        flags = verify_flags(window.shape[1])
        try:
            found = llama_cpp.logits(path, window, out, flags=flags, threads=self.threads)
            return verify.compare(self._torch_logits(plan, window)[0], found[0])
        finally:
            out.unlink(missing_ok=True)

    def _blame_rounding(self, plan: PrunePlan, window: np.ndarray, key: str) -> str | None:
        """An F16 file is close to torch but picks another token somewhere: does the F32 file agree fully?

        If it does, names, shapes and order are right and only the rounding of F16 arithmetic differs.
        """
        path = self.run.root / "artifacts" / f".{key}-F32.gguf.part"
        try:
            self._export(path, plan, "F32", None)
            exact = self._compare(path, plan, window, key)
        finally:
            path.unlink(missing_ok=True)
        if exact.failure(exact=True) or exact.explained_argmax:
            return None
        return (
            "F16 arithmetic picks another token where the pruned model is unsure; the same model as F32 "
            f"agrees with torch at all {exact.tokens} positions (KL {exact.kl:.1e})"
        )

    # ------------------------------------------------ measure

    def measure_memory(self, artifact: Artifact, flags: LaunchFlags) -> MemoryResult:
        key = make_key("memory_result", artifact.sha256, flags, self.device_name, self._runtime_version())
        device = self.device
        if device is not None:
            return self.run.stage(
                MemoryResult,
                key,
                lambda: device.memory(
                    self.run.path(artifact.path),
                    sha256=artifact.sha256,
                    flags=flags,
                    key=key,
                    threads=device.threads(),
                ),
                name=f"memory {artifact.path}",
            )
        return self.run.stage(
            MemoryResult,
            key,
            lambda: bench.measure_memory(
                self.run.path(artifact.path),
                sha256=artifact.sha256,
                flags=flags,
                device_name=self.device_name,
                threads=self.threads,
                key=key,
            ),
            name=f"memory {artifact.path}",
        )

    def _runtime_version(self) -> str:
        return llama_cpp.RUNTIME.version() if self.device is None else self.device.runtime_version

    def fit_memory(self, artifact: Artifact, flags: LaunchFlags) -> MemoryResult:
        """Measure with the planned flags; when the limit is missed, with leaner ones, at most twice more."""
        result = self.measure_memory(artifact, flags)
        leaner = [f for f in self.flag_choices if self._leaner(f, flags)]
        tries = [leaner[len(leaner) // 2], leaner[-1]] if len(leaner) > 1 else leaner
        for other in tries:
            if result.peak_bytes <= self.memory_limit:
                break
            result = self.measure_memory(artifact, other)
        return result

    def _leaner(self, a: LaunchFlags, b: LaunchFlags) -> bool:
        choices = self.flag_choices
        return a in choices and b in choices and choices.index(a) > choices.index(b)

    def measure_bench(self, artifact: Artifact, flags: LaunchFlags) -> BenchResult:
        """Time prefill and decode; the thread count is swept with the first file and then kept."""
        # the sweep's answer is not part of the key: a resumed run must find what it measured before
        key = make_key(
            "bench_result",
            artifact.sha256,
            flags,
            self.protocol,
            self.threads,
            self.device_name,
            self._runtime_version(),
        )

        def compute() -> BenchResult:
            best: BenchResult | None = None
            threads = self.bench_threads
            if self.device is not None:
                return self.device.bench(
                    self.run.path(artifact.path),
                    sha256=artifact.sha256,
                    flags=flags,
                    protocol=self.protocol,
                    threads=threads,
                    key=key,
                )
            for _ in range(BENCH_TRIES):
                found = bench.bench_artifact(
                    self.run.path(artifact.path),
                    sha256=artifact.sha256,
                    flags=flags,
                    protocol=self.protocol,
                    threads=threads,
                    device_name=self.device_name,
                    key=key,
                )
                if best is None or bench.spread(found) < bench.spread(best):
                    best = found
                if bench.spread(best) <= bench.QUIET_SPREAD:
                    break
                threads = found.n_threads
            assert best is not None
            return best

        result = self.run.stage(BenchResult, key, compute, name=f"bench {artifact.path}")
        if self.bench_threads is None:
            self.bench_threads = result.n_threads
        return result

    # ------------------------------------------------ quality

    def make_reference(self, dense: PrunePlan) -> None:
        """Distributions of the dense F16 parent on the held-out windows, through the same runtime."""
        flags = LaunchFlags(context_tokens=self.eval_windows.shape[1], ubatch=128, kv_type="f16", mmap=True)
        key = make_key("reference", self.parent.key, self.eval_set.key, llama_cpp.RUNTIME.version())
        header = self.run.root / "arrays" / f"reference-{key}.json"
        if header.is_file():
            try:
                self.reference = llama_cpp.load_reference(header)
                return
            except EdgepruneError:
                pass  # damaged: made again below
        master = self.verified_master(dense)
        self.run.log("start", "reference", key)
        with rundir.friendly_disk_errors(self.run.root):
            self.reference = llama_cpp.make_reference(
                self.run.path(master.path), self.eval_windows, header, flags=flags, threads=self.threads
            )
        self.run.log("done", "reference", key)

    def kl_arrays(self, result: QualityResult) -> Path:
        return self.run.path(result.kl_arrays)

    def judge(self, artifact: Artifact, flags: LaunchFlags) -> QualityResult:
        """KL to the dense F16 parent and perplexity on held-out windows, with the cache it will run with."""
        reference = self.reference
        assert reference is not None
        at = dataclasses.replace(flags, context_tokens=self.eval_windows.shape[1])
        key = make_key(
            "quality_result", artifact.sha256, self.eval_set.key, at.kv_type, llama_cpp.RUNTIME.version()
        )
        relative = f"arrays/quality-{key}.safetensors"

        def compute() -> QualityResult:
            tokens = llama_cpp.quality(
                self.run.path(artifact.path),
                self.eval_windows,
                reference,
                self.run.path(relative),
                flags=at,
                threads=self.threads,
            )
            divergence = quality.kl(tokens.kl)
            perplexity = quality.perplexity(tokens.nll)
            return QualityResult(
                artifact_sha256=artifact.sha256,
                text=self.eval_set.origin,
                tokens=int(tokens.kl.size),
                kl=divergence.value,
                kl_stderr=divergence.stderr,
                perplexity=perplexity.value,
                perplexity_stderr=perplexity.stderr,
                agreement=quality.agreement(tokens.argmax, reference.argmax).value,
                dense_perplexity=quality.perplexity(reference.nll).value,
                kl_arrays=relative,
                key=key,
            )

        return self.run.stage(
            QualityResult,
            key,
            compute,
            name=f"quality {artifact.path}",
            valid=lambda q: self.kl_arrays(q).is_file(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneResult:
    """What a lane brought; `error` says why it stopped, what came before it stays."""

    lane: Lane
    artifact: Artifact | None = None
    verify: VerifyResult | None = None
    memory: MemoryResult | None = None
    bench: BenchResult | None = None
    quality: QualityResult | None = None
    error: str | None = None


def run_lane(shop: Workshop, lane: Lane) -> LaneResult:
    """One candidate through export, verification, measurement and quality; a failure stays in its lane."""
    result = LaneResult(lane=lane)
    flags = lane.cost.flags
    try:
        given = lane.quantization.endswith(AS_GIVEN)
        artifact = shop.given() if given else shop.artifact(lane.plan, lane.quantization)
        result = dataclasses.replace(result, artifact=artifact)
        exact = artifact.quantization in ("F16", "F32")
        checked = shop.verify(lane.plan, artifact, exact=exact)
        result = dataclasses.replace(result, verify=checked)
        if not checked.passed:
            return dataclasses.replace(result, error=checked.reason)
        memory = shop.fit_memory(artifact, flags)
        result = dataclasses.replace(result, memory=memory)
        if shop.measure_speed:
            timed = shop.measure_bench(artifact, memory.flags)
            result = dataclasses.replace(result, bench=timed)
        if shop.device is not None:
            shop.device.drop(artifact.sha256)
        return dataclasses.replace(result, quality=shop.judge(artifact, memory.flags))
    except StageError as error:
        return dataclasses.replace(result, error=error.message)
