"""Recovery: what methods may and must not change, the objective by hand, resuming, limits, discarding."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeprune import checkpoint, graph, registry, surgery
from edgeprune.errors import ConfigError
from edgeprune.progress import Silent
from edgeprune.recovery import run, train
from edgeprune.recovery.methods.base import Method, Setting
from edgeprune.recovery.methods.lora import factors
from edgeprune.recovery.objective import token_losses, top_kl, top_log_probs
from edgeprune.recovery.recipe import RecoveryRecipe, check
from edgeprune.recovery.teacher import Cache, Teacher
from edgeprune.recovery.text import Rows, plain_rows, split
from tests import builders

VOCAB, LENGTH = 96, 24
KEPT = {"layers.0.kv": (1,), "layers.1.ffn": tuple(range(32, 96)), "layers.2.ffn": tuple(range(96))}
PLAIN = ("lora", "full")  # methods whose weights are not rounded


@dataclasses.dataclass
class Pair:
    """A tiny dense model, its pruned form, and text that the dense one wrote."""

    folder: Path
    source: checkpoint.Source
    graph: graph.ModelGraph
    pruned: checkpoint.Source
    dims: graph.ModelDims
    rows: Rows
    held: Rows

    def parent(self, dtype: torch.dtype) -> torch.nn.Module:
        return checkpoint.load_model(self.folder, dtype=dtype)

    def student(self) -> torch.nn.Module:
        return run.assemble(self.pruned, self.dims)

    def setting(self, method: Method, **over: str) -> Setting:
        options = method.resolve(over)
        return Setting(dims=self.dims, dense=self.graph.dims, quantization=None, seed=3, options=options)

    def recover(self, folder: Path, recipe: RecoveryRecipe, **over: object) -> run.Recovered:
        return run.recover(
            self.pruned,
            self.dims,
            dense=self.graph.dims,
            parent=self.parent,
            rows=self.rows,
            held=self.held,
            recipe=recipe,
            folder=folder,
            progress=Silent(),
            **over,  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = builders.tiny_llama(tmp_path_factory.mktemp("dense"), vocab=VOCAB)
    source = checkpoint.SafetensorsSource(folder)
    whole = graph.build(source.config)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (48, LENGTH))
    rows, held = split(plain_rows(tokens))
    return Pair(
        folder=folder,
        source=source,
        graph=whole,
        pruned=surgery.PrunedSource(source, whole, KEPT),
        dims=graph.prune_dims(whole, KEPT),
        rows=rows,
        held=held,
    )


def recipe(method: str, **over: object) -> RecoveryRecipe:
    given: dict = {"method": method, "tokens": 12 * 8 * LENGTH, "length": LENGTH, "rate": 1e-3, "seed": 5}
    given["mix"] = 1.0  # the text is random, only the parent has something to teach
    return RecoveryRecipe(**(given | over))


# ---------------------------------------------------------------- objective


def test_top_kl_by_hand() -> None:
    # parent 1/2, 1/4, 1/8, 1/8 and two kept: the other two count as one token of 1/4
    parent = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    ids, values = top_log_probs(parent, 2)
    assert ids.tolist() == [0, 1]
    assert values.exp().tolist() == pytest.approx([0.5, 0.25])
    # model 1/4 each: 1/2 ln 2 + 1/4 ln 1 + 1/4 ln (1/4 / 1/2) = 1/4 ln 2
    flat = torch.full((4,), 0.25).log()
    assert float(top_kl(flat, ids, values)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert float(top_kl(parent, ids, values)) == pytest.approx(0.0, abs=1e-6)


def test_top_kl_lies_below_the_full_kl_and_reaches_it() -> None:
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(50, 40, generator=generator)).log_softmax(-1)
    q = (2 * torch.randn(50, 40, generator=generator)).log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    found = [top_kl(q, *top_log_probs(p, k)) for k in (1, 4, 16, 39)]
    for fewer, more in zip(found, [*found[1:], full], strict=True):
        assert bool((fewer <= more + 1e-5).all())
    torch.testing.assert_close(found[-1], full, rtol=1e-4, atol=1e-4)


def test_token_losses_mix_and_shift() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 7, generator=generator)
    tokens = torch.randint(7, (2, 5), generator=generator)
    plain, same = token_losses(logits, tokens, None, distill=0.0)
    assert plain.shape == (2, 4)
    expected = -logits[1, 2].log_softmax(-1)[tokens[1, 3]]
    assert float(plain[1, 2]) == pytest.approx(float(expected), rel=1e-5)
    targets = top_log_probs(torch.randn(2, 5, 7, generator=generator), 3)
    pure, _ = token_losses(logits, tokens, targets, distill=1.0)
    mixed, plain_again = token_losses(logits, tokens, targets, distill=0.75)
    torch.testing.assert_close(mixed, 0.75 * pure + 0.25 * plain)
    torch.testing.assert_close(plain_again, same)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("name", registry.names("recovery.methods"))
def test_every_method_keeps_the_contract(name: str) -> None:
    method: Method = registry.load("recovery.methods", name, "METHOD")
    assert method.name == name
    assert method.summary
    assert "\n" not in method.summary
    assert method.reference
    assert set(method.choices) <= set(method.switches)
    with pytest.raises(ConfigError, match="no switch 'nonsense'"):
        method.resolve({"nonsense": "1"})


@pytest.mark.parametrize("name", PLAIN)
def test_attached_and_untrained_a_model_is_what_it_was(pair: Pair, name: str) -> None:
    method: Method = registry.load("recovery.methods", name, "METHOD")
    tokens = torch.from_numpy(pair.rows.tokens[:2]).long()
    model = pair.student()
    before = model(tokens).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    attached = method.attach(model, pair.setting(method))
    assert torch.equal(torch.get_rng_state(), random)
    assert attached.model is model
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)
    groups = attached.groups()
    params = [id(p) for g in groups for p in g.params]
    assert len(params) == len(set(params)) > 0
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(params)
    attached.load_(attached.state())
    attached.merge_()
    after = model.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in state.items()}
    for key, value in after.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_merging_changes_no_logits_and_states_come_back(pair: Pair, name: str) -> None:
    method: Method = registry.load("recovery.methods", name, "METHOD")
    model = pair.student()
    attached = method.attach(model, pair.setting(method))
    optimizer = torch.optim.AdamW([p for g in attached.groups() for p in g.params], lr=1e-2)
    tokens = torch.from_numpy(pair.rows.tokens[:4]).long()
    losses = []
    for _ in range(6):
        loss = token_losses(model(tokens).logits, tokens, None, distill=0.0)[0].mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]  # a repeated batch is learned
    trained = attached.state()
    logits = model(tokens).logits.detach()
    with torch.no_grad():
        for group in attached.groups():
            for parameter in group.params:
                parameter.add_(1.0)
    attached.load_(trained)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=0)
    attached.merge_()
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())


def test_lora_gives_more_where_more_was_cut(pair: Pair) -> None:
    method: Method = registry.load("recovery.methods", "lora", "METHOD")
    # lost: layer 0 half its KV groups, layer 1 half its channels, layer 2 a quarter; mean 5/12
    found = factors(pair.setting(method), 1.0)
    assert found[0, "kv"] == pytest.approx(1 + 0.5 / (5 / 12))
    assert found[2, "ffn"] == pytest.approx(1 + 0.25 / (5 / 12))
    assert found[0, "ffn"] == found[1, "kv"] == 1.0
    model = pair.student()
    attached = method.attach(model, pair.setting(method, rank="10"))
    layers = model.get_decoder().layers
    assert layers[1].mlp.down_proj.lora_A["default"].weight.shape == (22, 64)
    assert layers[2].mlp.down_proj.lora_A["default"].weight.shape == (16, 96)
    assert layers[1].self_attn.q_proj.lora_A["default"].weight.shape == (10, 64)
    scales = {g.name: g.scale for g in attached.groups()}
    assert scales["layers.1.ffn"] == pytest.approx(math.sqrt(2.2))
    assert scales["layers.1.kv"] == 1.0


def test_lora_base_weights_stay(pair: Pair, tmp_path: Path) -> None:
    made = pair.recover(tmp_path, recipe("lora"))
    assert made.kept
    # embeddings and norms are not among what changed, every matrix of a layer is
    assert len(made.tensors) == 3 * 7
    assert all(".layers." in name and name.endswith("_proj.weight") for name in made.tensors)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_other_families_can_be_recovered(tmp_path: Path, family: str) -> None:
    folder = builders.tiny_family(tmp_path / "m", family)
    source = checkpoint.SafetensorsSource(folder)
    whole = graph.build(source.config)
    kept = {a.name: tuple(range(a.n_units // 2)) for a in whole.axes if a.unit == "ffn"}
    dims = graph.prune_dims(whole, kept)
    pruned = surgery.PrunedSource(source, whole, kept)
    tokens = np.random.default_rng(0).integers(3, 96, (24, 16))
    rows, held = split(plain_rows(tokens))
    for name in PLAIN:
        made = run.recover(
            pruned,
            dims,
            dense=whole.dims,
            parent=lambda dtype: checkpoint.load_model(folder, dtype=dtype),
            rows=rows,
            held=held,
            recipe=RecoveryRecipe(method=name, tokens=6 * 8 * 16, length=16, rate=1e-3, mix=1.0),
            folder=tmp_path / name,
            progress=Silent(),
        )
        shapes = graph.graph_of(graph.find_family(dims.family), dims).shapes
        assert made.kept
        assert {n: tuple(t.shape) for n, t in made.tensors.items()} == {n: shapes[n] for n in made.tensors}


# ---------------------------------------------------------------- training


def test_training_lowers_the_validation_kl(pair: Pair, tmp_path: Path) -> None:
    made = pair.recover(tmp_path, recipe("full"))
    points = made.trained.points
    assert [p.step for p in points] == [0, 2, 4, 6, 8, 10, 12]
    assert points[-1].tokens == 12 * 8 * LENGTH
    assert made.trained.best.kl < 0.97 * points[0].kl
    assert made.trained.stopped == "the tokens asked for"
    # the figure that was written down is that of the weights that are handed on
    model = pair.student()
    model.load_state_dict(made.tensors, strict=False)
    teacher = Teacher(pair.parent(torch.float32))
    ids, values = teacher.compute(pair.held.tokens)
    tokens = torch.from_numpy(pair.held.tokens).long()
    with torch.no_grad():
        found = token_losses(model(tokens).logits, tokens, (ids, values), distill=1.0)[0].mean()
    # training may have measured in bfloat16
    assert float(found) == pytest.approx(made.trained.best.kl, rel=0.05)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_stopped_three_times_ends_with_the_same_weights(pair: Pair, tmp_path: Path) -> None:
    asked = recipe("lora", options={"dropout": "0.1"}, checkpoint_s=0.0)
    whole = pair.recover(tmp_path / "whole", asked)

    def kill_at(step: int) -> Callable[[int], None]:
        def see(done: int) -> None:
            if done == step:
                raise Killed

        return see

    for step in (3, 7, 8):
        with pytest.raises(Killed):
            pair.recover(tmp_path / "killed", asked, after_step=kill_at(step))
    parts = pair.recover(tmp_path / "killed", asked)
    assert parts.trained.losses == whole.trained.losses
    assert [p.kl for p in parts.trained.points] == [p.kl for p in whole.trained.points]
    assert set(parts.tensors) == set(whole.tensors)
    for name, value in whole.tensors.items():
        assert torch.equal(parts.tensors[name], value), name


def test_the_rate_rises_stays_and_falls() -> None:
    trainer = object.__new__(train.Trainer)
    trainer.training = train.Training(rate=1.0, batch=1, steps=20, seconds=None, seed=0, warmup=4)
    journal = train.Journal(evaluate_every=5, decay_from=12, steps=20)
    found = [trainer._rate(step, journal) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:12] == [1.0] * 8
    assert found[12] == pytest.approx(8 / 9)
    assert found[19] == pytest.approx(1 / 9)


def test_the_clock_decides_once(pair: Pair) -> None:
    trainer = object.__new__(train.Trainer)
    trainer.training = train.Training(rate=1.0, batch=1, steps=None, seconds=100.0, seed=0)
    trainer.main = True
    trainer._agree = lambda value: value
    written: list[train.Journal] = []
    trainer._write_journal = lambda journal: written.append(dataclasses.replace(journal))
    journal = train.Journal()
    trainer._watch(journal, 1, 2.0, 2.0, known=False)
    assert journal == train.Journal()
    trainer._watch(journal, 3, 6.0, 2.0, known=True)
    assert journal.evaluate_every == 8  # 50 steps in all, six evaluations
    trainer._watch(journal, 30, 60.0, 2.0, known=True)
    # 40 s left, 5 s kept back, 2 s a step
    assert (journal.decay_from, journal.steps, journal.timed) == (30, 47, True)
    trainer._watch(journal, 31, 70.0, 2.5, known=True)
    assert (journal.decay_from, journal.steps) == (30, 47)
    trainer._watch(journal, 40, 100.5, 2.5, known=True)
    assert (journal.last, journal.why, journal.end) == (40, "the time limit", 40)
    assert len(written) == 3


def test_without_progress_the_rate_falls_and_then_it_ends() -> None:
    trainer = object.__new__(train.Trainer)
    trainer.training = train.Training(rate=1.0, batch=1, steps=100, seconds=None, seed=0)
    trainer._write_journal = lambda journal: None
    journal = train.Journal(decay_from=60, steps=100)

    def point(step: int, kl: float) -> train.Point:
        return train.Point(step=step, tokens=step, seconds=0.0, kl=kl, loss=0.0)

    points = [point(0, 0.3), point(10, 0.4), point(20, 0.5)]
    trainer._rest(journal, points, 20)
    assert (journal.decay_from, journal.steps, journal.why) == (60, 100, None)
    points.append(point(30, 0.4))
    trainer._rest(journal, points, 30)  # 40% of 50 steps
    assert (journal.decay_from, journal.steps, journal.last) == (30, 50, None)
    assert journal.why == "the validation KL no longer fell"
    # the best before does not count any more: the fall has its own three
    points += [point(35, 0.38), point(40, 0.39), point(45, 0.4)]
    trainer._rest(journal, points, 45)
    assert journal.last is None
    points.append(point(48, 0.41))
    trainer._rest(journal, points, 48)
    assert journal.last == 48
    # too late for a fall of its own
    late = train.Journal(decay_from=60, steps=100)
    trainer._rest(late, [point(0, 0.3), point(57, 0.4), point(58, 0.4), point(60, 0.4)], 60)
    assert (late.decay_from, late.steps, late.last) == (60, 100, None)


def test_a_resumed_run_stops_where_the_limit_struck(pair: Pair, tmp_path: Path) -> None:
    asked = recipe("lora")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "journal.json").write_text(
        '{"evaluate_every": 3, "decay_from": 4, "steps": 9, "timed": true, "last": 7, '
        '"why": "the time limit"}'
    )
    made = pair.recover(tmp_path / "one", dataclasses.replace(asked, tokens=None, minutes=60.0))
    assert made.trained.steps == 7
    assert made.trained.stopped == "the time limit"


def test_minutes_end_a_run(pair: Pair, tmp_path: Path) -> None:
    made = pair.recover(tmp_path, recipe("full", tokens=None, minutes=0.03))
    assert made.trained.steps > 0
    assert made.trained.stopped in ("the time limit", "the validation KL no longer fell")


def test_what_makes_things_worse_is_discarded(pair: Pair, tmp_path: Path) -> None:
    # one channel of 128 is gone, so that there is little to win and much to lose
    kept = {"layers.1.ffn": tuple(range(127))}
    light = dataclasses.replace(
        pair,
        pruned=surgery.PrunedSource(pair.source, pair.graph, kept),
        dims=graph.prune_dims(pair.graph, kept),
    )
    made = light.recover(tmp_path, recipe("full", rate=0.3))
    assert not made.kept
    assert made.tensors == {}
    assert made.note.startswith("discarded: the validation KL went from 0.0")
    assert made.trained.best.step == 0


def test_none_trains_nothing(pair: Pair, tmp_path: Path) -> None:
    made = pair.recover(tmp_path, recipe("none"))
    assert (made.kept, made.note, made.trained.steps) == (False, "nothing was trained", 0)


def test_distillation_beats_the_plain_loss_on_kl(pair: Pair, tmp_path: Path) -> None:
    one = pair.recover(tmp_path / "distill", recipe("full"))
    two = pair.recover(tmp_path / "lm", recipe("full", objective="lm"))
    assert one.trained.points[-1].kl < two.trained.points[-1].kl
    # each is judged by what it was asked to lower
    assert one.trained.best.kl == min(p.kl for p in one.trained.points)
    assert two.trained.best.loss == min(p.loss for p in two.trained.points)
    assert "validation loss " in two.note


def test_gradient_checkpointing_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    plain = pair.recover(tmp_path / "plain", recipe("full"))
    less = pair.recover(tmp_path / "less", recipe("full", gradient_checkpointing=True))
    assert less.trained.losses == pytest.approx(plain.trained.losses, rel=1e-3)


# ---------------------------------------------------------------- parent's targets


def test_the_cache_gives_back_what_was_computed(pair: Pair, tmp_path: Path) -> None:
    model = pair.parent(torch.float32)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = pair.rows.tokens
    plain = Teacher(model, k=8)
    cached = Teacher(model, k=8, cache=Cache(tmp_path, 10, LENGTH, 8), micro=64)
    first = cached.targets(np.array([1, 4]), tokens[[1, 4]])
    n = len(calls)
    again = cached.targets(np.array([4, 1]), tokens[[4, 1]])
    assert len(calls) == n
    assert torch.equal(first[0][[1, 0]], again[0])
    assert torch.equal(first[1][[1, 0]], again[1])
    # one known, one new, one beyond the cache's rows
    mixed = cached.targets(np.array([2, 4, 11]), tokens[[2, 4, 11]])
    expected = plain.compute(tokens[[2, 4, 11]])
    assert torch.equal(mixed[0], expected[0])
    torch.testing.assert_close(mixed[1], expected[1], rtol=1e-5, atol=1e-5)
    cached.release()
    assert torch.equal(cached.targets(np.array([4]), tokens[[4]])[0], first[0][1:])


# ---------------------------------------------------------------- recipes and sources


def test_a_recipe_that_cannot_be_followed_says_all_of_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check(RecoveryRecipe(method="lorra", objective="ml"))
    assert caught.value.problems == (
        "unknown recovery 'lorra' (did you mean 'lora'?)",
        "unknown recovery objective 'ml'",
        "recovery has no end: give --recovery-minutes or --recovery-tokens",
    )


def test_recovered_tensors_keep_the_types_they_had(pair: Pair, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name, other = "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"

    class Half:
        config = pair.pruned.config
        fingerprint = "x"

        def tensor(self, one: str) -> torch.Tensor:
            return pair.pruned.tensor(one).bfloat16()

        def close(self) -> None:
            return

    new = {name: torch.full((64, 64), 1 / 3), other: torch.full((64, 96), 1 / 3)}
    save_file(new, tmp_path / "w.safetensors", metadata={"exact": f'["{other}"]'})
    exact = run.exact_names(tmp_path / "w.safetensors")
    source = run.RecoveredSource(Half(), tmp_path / "w.safetensors", exact=exact)
    assert torch.equal(source.tensor(name), new[name].bfloat16())
    assert torch.equal(source.tensor(other), load_file(tmp_path / "w.safetensors")[other])
    untouched = "model.norm.weight"
    assert torch.equal(source.tensor(untouched), pair.pruned.tensor(untouched).bfloat16())


# ---------------------------------------------------------------- auto


def test_auto_spends_the_minutes_on_what_helps(pair: Pair, tmp_path: Path) -> None:
    asked = recipe("auto", tokens=None, minutes=0.08, rate=None)
    made = pair.recover(tmp_path, asked)
    tried = {one.candidate.label: one for one in made.tried}
    assert {"lora 0.002", "lora 0.0008"} <= set(tried)
    winner = tried[made.candidate.label]
    assert winner.kl == made.trained.best.kl
    assert winner.seconds == max(one.seconds for one in made.tried)
    assert made.kept
    # the finalist was among the better half of the first round
    rounds = json.loads((tmp_path / "auto.json").read_text())
    first = {name[2:]: figures["kl"] for name, figures in rounds.items() if name.startswith("0 ")}
    second = {name[2:]: figures["kl"] for name, figures in rounds.items() if name.startswith("1 ")}
    assert len(first) == len(run.candidates(asked))
    assert set(second) == set(sorted(first, key=lambda name: first[name])[: len(second)])
    assert made.candidate.label == min(second, key=lambda name: second[name])


def test_auto_does_not_decide_anew_after_a_kill(pair: Pair, tmp_path: Path) -> None:
    asked = recipe("auto", tokens=None, minutes=0.08, rate=None)
    (tmp_path / "auto.json").write_text(
        json.dumps(
            {
                f"0 {c.label}": {"seconds": 0.1, "tokens": 8, "kl": kl, "wall": 0.1}
                for c, kl in zip(run.candidates(asked), (0.1, 0.4, 0.3, 0.2, 0.5, 0.6), strict=False)
            }
        )
    )
    made = pair.recover(tmp_path, asked)
    rounds = json.loads((tmp_path / "auto.json").read_text())
    labels = [c.label for c in run.candidates(asked)]
    assert {name[2:] for name in rounds if name.startswith("1 ")} == {labels[0], labels[3]}
    assert made.candidate.label in (labels[0], labels[3])


def test_a_pause_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    method: Method = registry.load("recovery.methods", "lora", "METHOD")
    teacher = Teacher(pair.parent(torch.float32))
    held = teacher.compute(pair.held.tokens)
    asked = train.Training(rate=1e-3, batch=8, steps=6, seconds=None, seed=1)

    def go(folder: Path, pause_s: float | None) -> tuple[train.Trained, dict[str, torch.Tensor]]:
        attached = method.attach(pair.student(), pair.setting(method))
        trainer = train.Trainer(
            *(attached, pair.rows, pair.held, teacher, asked, folder, Silent()), held_targets=held
        )
        return trainer.run(pause_s=pause_s), attached.state()

    whole, weights = go(tmp_path / "whole", None)
    first, _ = go(tmp_path / "parts", 0.0)
    assert first.steps == 1
    second, again = go(tmp_path / "parts", None)
    assert second.losses == whole.losses
    assert all(torch.equal(weights[name], again[name]) for name in weights)
