"""`edgeprune profiles`: the use cases that are described."""

from __future__ import annotations

import click

from edgeprune import records
from edgeprune.cli._output import echo_json, echo_pairs, echo_table, format_option
from edgeprune.config.profiles import DEFAULT, list_profiles, load_profile


@click.group(invoke_without_command=True)
@format_option
@click.pass_context
def command(ctx: click.Context, form: str) -> None:
    """List the use cases that can be named with --profile.

    \b
    Examples:
      edgeprune profiles
      edgeprune profiles show chat-2k
    """
    if ctx.invoked_subcommand is not None:
        return
    found = [load_profile(name) for name in list_profiles()]
    if form == "json":
        echo_json([records.to_plain(p) for p in found])
        return
    rows = [
        (
            p.name + (" (default)" if p.name == DEFAULT else ""),
            str(p.workload.context_tokens),
            str(p.workload.prompt_tokens),
            str(p.workload.new_tokens),
            p.title,
        )
        for p in found
    ]
    echo_table(("name", ">context", ">prompt", ">new", "use"), rows)


@command.command("show")
@click.argument("name", metavar="NAME|FILE")
@format_option
def show(name: str, form: str) -> None:
    """Show the workload, limits and recipe of one profile.

    \b
    Example:
      edgeprune profiles show chat-2k
    """
    profile = load_profile(name)
    if form == "json":
        echo_json(records.to_plain(profile))
        return
    work, recipe, bench = profile.workload, profile.recipe, profile.bench
    click.echo(f"{profile.name}: {profile.title}")
    echo_pairs(
        [
            ("context", f"{work.context_tokens} tokens"),
            ("prompt", f"{work.prompt_tokens} tokens"),
            ("new", f"{work.new_tokens} tokens"),
            ("slowest decode", _limit(profile.min_decode_tps, "tokens/s")),
            ("first token within", _limit(profile.max_first_token_ms, "ms")),
            ("largest KL", _limit(profile.max_kl, "nats a token")),
            ("least agreement", _limit(profile.min_agreement, "of tokens")),
            ("most energy", _limit(profile.max_energy_j, "J a token")),
            ("metric", recipe.metric),
            ("allocators", " ".join(recipe.allocators)),
            ("calibration", f"{recipe.calibration_samples} samples of {recipe.calibration_tokens} tokens"),
            ("evaluation", f"{recipe.eval_samples} samples of {recipe.eval_tokens} tokens"),
            ("formats", " ".join(recipe.formats)),
            ("quantizations", " ".join(recipe.quantizations)),
            ("ratios", " ".join(f"{r:g}" for r in recipe.ratios) + " of the decoder parameters"),
            ("candidates measured", f"at most {recipe.max_measured}"),
            ("bench", f"prompt {bench.prompt_tokens}, new {bench.new_tokens}, {bench.repeats} repeats"),
        ]
    )


def _limit(value: float | None, unit: str) -> str:
    return "no limit" if value is None else f"{value:g} {unit}"
