"""`edgeprune eval`: perplexity and zero-shot accuracy of an artifact, as the papers report them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli._output import echo_json, echo_table, format_option


def _names(ctx: click.Context, param: click.Parameter, given: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in given.split(",") if n.strip()) if given else ()


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path), metavar="ARTIFACT|DIR")
@click.option(
    "--suite",
    metavar="papers|quick|FILE",
    default="quick",
    show_default=True,
    help="papers: all of WikiText-2 and PTB in windows of 128 and 2048 tokens and seven tasks; quick: a part "
    "of it; or a .toml file with texts, windows, tasks, items, tokens.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the official files; nothing is then fetched. Default: the hub.",
)
@click.option(
    "--tasks", callback=_names, metavar="A,B", help="Only these of the suite, such as wikitext2,boolq."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Items of each task, drawn by --seed.")
@click.option("--tokens", type=click.IntRange(min=2), metavar="N", help="First tokens of each text.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all drawing.")
@click.option(
    "--compare",
    "against",
    type=click.Path(path_type=Path),
    metavar="DENSE",
    help="Score this one on the same items too, and test the difference item by item.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of a model folder in torch.",
)
@click.option(
    "--torch-device", metavar="NAME", default="cpu", show_default=True, help="Of a model folder: cpu or cuda."
)
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "f32", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="KV cache of a GGUF file.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="A GGUF file's weights widened to float32 and all else in float32, as torch computes: what the file "
    "holds, without what the runtime rounds.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads. Default: all there are.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where eval.json and finished items go; the same command goes on there. "
    "Default: a folder in edgeprune-runs/.",
)
@format_option
def command(
    artifact: Path,
    suite: str,
    data: Path | None,
    tasks: tuple[str, ...],
    limit: int | None,
    tokens: int | None,
    seed: int,
    against: Path | None,
    dtype: str,
    torch_device: str,
    kv_type: str,
    exact: bool,
    threads: int | None,
    out: Path | None,
    form: str,
) -> None:
    """Score a model folder, a GGUF file (llama.cpp) or an ONNX folder (ONNX Runtime): what ships is scored.

    Tasks are those of lm-evaluation-harness, zero-shot: boolq, piqa, hellaswag, winogrande, arc_easy,
    arc_challenge, openbookqa. acc is plain accuracy, acc_norm divides by the length of the choice.

    \b
    Examples:
      edgeprune eval pruned --suite papers --data ./data --compare dense
      edgeprune eval model-Q4_0.gguf --tasks wikitext2,boolq --limit 200 --data ./data
    """
    # help must not load torch
    from edgeprune.cli._progress import open_progress
    from edgeprune.devices import local
    from edgeprune.evaluation import run, suites
    from edgeprune.evaluation.engines import Settings

    asked = suites.chosen(suites.find(suite), names=tasks, items=limit, tokens=tokens)
    settings = Settings(
        threads=threads or local.available_threads(),
        dtype=dtype,
        device=torch_device,
        kv_type=kv_type,
        exact=exact,
    )
    with open_progress() as progress:
        found = run.evaluate(
            artifact,
            asked,
            out or Path("edgeprune-runs") / f"eval_{artifact.resolve().name}",
            data=data,
            against=against,
            settings=settings,
            seed=seed,
            progress=progress,
        )
    if form == "json":
        echo_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    against = found["against"]
    if found["texts"]:
        rows = []
        for i, t in enumerate(found["texts"]):
            row = [t["text"], str(t["window"]), str(t["tokens"]), f"{t['value']:.2f} ± {t['stderr']:.2f}"]
            if against:
                row += [f"{against['texts'][i]['reference']:.2f}", _nll(against["texts"][i])]
            rows.append(row)
        head = ["text", ">window", ">tokens", ">perplexity"]
        echo_table([*head, ">compared", ">nats/token"] if against else head, rows)
    if found["tasks"]:
        if found["texts"]:
            click.echo("")
        rows = []
        for i, t in enumerate(found["tasks"]):
            for metric, m in t["metrics"].items():
                row = [t["task"], metric, f"{t['items']} of {t['of']}", _percent(m["value"], m["stderr"])]
                if against:
                    p = against["tasks"][i]["metrics"][metric]
                    row += [
                        f"{100 * p['reference']:.2f}",
                        f"{100 * p['difference']:+.2f} ({100 * p['low']:+.2f} to {100 * p['high']:+.2f})",
                        f"{p['p_value']:.3f}",
                    ]
                rows.append(row)
        head = ["task", "metric", ">items", ">%"]
        echo_table([*head, ">compared", ">difference", ">McNemar p"] if against else head, rows)
        mean = found["averages"]
        click.echo(
            f"mean of {mean['tasks']} tasks: {100 * mean['acc']:.2f} plain (acc), "
            f"{100 * mean['acc_norm_where_defined']:.2f} with acc_norm where the task has it"
        )


def _percent(value: float, stderr: float) -> str:
    return f"{100 * value:.2f} ± {100 * stderr:.2f}"


def _nll(row: dict[str, Any]) -> str:
    if "nll_difference" not in row:
        return "other tokens"
    if "low" not in row:
        return f"{row['nll_difference']:+.4f}"
    return f"{row['nll_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
