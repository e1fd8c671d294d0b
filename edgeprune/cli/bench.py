"""`edgeprune bench`: speed and peak memory of one export on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli._output import echo_json, echo_pairs, echo_table, format_option
from edgeprune.units import format_bytes


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens to prefill."
)
@click.option("--new", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to decode.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Repeats after one warm-up."
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads. Default: the fastest of a sweep."
)
@click.option(
    "--context",
    type=click.IntRange(min=32),
    metavar="N",
    help="Context to open, and to fill for --memory. Default: prompt and new tokens.",
)
@click.option(
    "--ubatch", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens computed at once."
)
@click.option("--kv-type", metavar="TYPE", default="f16", show_default=True, help="Type of the KV cache.")
@click.option("--mmap/--no-mmap", default=True, show_default=True, help="Map the file instead of reading it.")
@click.option("--memory", is_flag=True, help="Also measure peak memory in a fresh process.")
@format_option
def command(
    file: Path,
    prompt: int,
    new: int,
    repeats: int,
    threads: int | None,
    context: int | None,
    ubatch: int,
    kv_type: str,
    mmap: bool,
    memory: bool,
    form: str,
) -> None:
    """Time prefill and decode of FILE apart: a GGUF file, or an ONNX folder. JSON has llama-bench's fields.

    An ONNX folder runs in onnxruntime-genai; --kv-type and --mmap are decided by the folder.

    \b
    Examples:
      edgeprune bench model.gguf
      edgeprune bench model.gguf --threads 4 --memory --format json
      edgeprune bench pruned-onnx --memory
    """
    # help must not load numpy
    from edgeprune import bench
    from edgeprune.pipeline import light

    timed, peak = light.bench_file(
        file,
        n_prompt=prompt,
        n_gen=new,
        repeats=repeats,
        threads=threads,
        context_tokens=context,
        ubatch=ubatch,
        kv_type=kv_type,
        mmap=mmap,
        with_memory=memory,
    )
    rows = bench.to_llama_bench(timed, model_filename=str(file))
    if peak is not None:
        rows = [{**row, "peak_memory_bytes": peak.peak_bytes} for row in rows]
    if form == "json":
        echo_json(rows)
        return
    table = [
        (
            row["model_type"],
            format_bytes(row["model_size"]),
            f"{row['model_n_params'] / 1e6:.1f}M",
            str(row["n_threads"]),
            _test(row),
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        )
        for row in rows
    ]
    echo_table(("model", ">size", ">parameters", ">threads", "test", ">tokens/s"), table)
    click.echo("")
    pairs = [
        ("machine", rows[0]["cpu_info"]),
        (
            "flags",
            f"context {timed.flags.context_tokens}, ubatch {ubatch}, KV {timed.flags.kv_type}, "
            f"{'mmap' if mmap else 'no mmap'}",
        ),
        ("load", f"{timed.load_ns / 1e6:.0f} ms"),
    ]
    if timed.thread_sweep:
        sweep = ", ".join(f"{n}: {tps:.1f}" for n, tps in timed.thread_sweep.items())
        pairs.append(("thread sweep", f"{sweep} tokens/s"))
    if peak is not None:
        pairs.append(
            (
                "peak memory",
                f"{format_bytes(peak.peak_bytes)} with {peak.tokens_filled} tokens in the context",
            )
        )
    pairs += [("doubt", doubt) for doubt in timed.doubts]
    echo_pairs(pairs)


def _test(row: dict[str, Any]) -> str:
    if row["n_gen"]:
        return f"decode {row['n_gen']} behind {row['n_depth']}"
    return f"prefill {row['n_prompt']}"
