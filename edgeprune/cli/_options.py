"""Options that several verbs share, as decorators; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise click.BadParameter(f"'{text}' is not KEY=VALUE, such as form=C.", ctx, param)
        if name in out:
            raise click.BadParameter(f"'{name}' is given twice.", ctx, param)
        out[name] = value
    return out


def model_argument(command: F) -> F:
    """Add the argument `model`: a folder, a hub id or a GGUF file; None is the default model."""
    return click.argument("model", metavar="[MODEL]", required=False)(command)


def metric_option_option(command: F) -> F:
    """Add `--metric-option KEY=VALUE`, repeatable, as the dict `metric_options`."""
    return click.option(
        "--metric-option",
        "metric_options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_pairs,
        help="Switch of the metric, such as form=C; may be repeated.",
    )(command)


def calibration_seeds_option(command: F) -> F:
    """Add --calibration-seeds."""
    return click.option(
        "--calibration-seeds",
        type=click.IntRange(min=1, max=100),
        default=1,
        show_default=True,
        metavar="N",
        help="Draw the calibration N times, with seeds from --seed on, average the scores and report "
        "how stable their ranks are.",
    )(command)


def calibration_options(command: F) -> F:
    """Add --calibration, --samples, --length, --seed and --calibration-seeds."""
    for decorate in (
        calibration_seeds_option,
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all sampling."
        ),
        click.option(
            "--length",
            type=click.IntRange(min=2),
            default=128,
            show_default=True,
            metavar="T",
            help="Tokens of each sample.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            metavar="N",
            help="Calibration samples.",
        ),
        click.option(
            "--calibration",
            metavar="FILE|DATASET",
            help="Calibration text. Default: sampled from the model itself.",
        ),
    ):
        command = decorate(command)
    return command


def allocator_option(default: str) -> Callable[[F], F]:
    """Add --allocator."""
    return click.option(
        "--allocator",
        metavar="NAME",
        default=default,
        show_default=True,
        help="uniform: same widths in every layer; inner: channels of all but the first and last layers; "
        "global: one threshold over all layers; sensitivity: "
        "least summed KL, measured per axis; search: that, refined by measured KL.",
    )


def cut_options(command: F) -> F:
    """Add --protect-first, --protect-last and --width-multiple."""
    for decorate in (
        click.option(
            "--width-multiple",
            type=click.IntRange(min=1),
            default=32,
            show_default=True,
            metavar="N",
            help="FFN widths are multiples of N.",
        ),
        click.option(
            "--protect-last",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="Leave the last N layers whole.",
        ),
        click.option(
            "--protect-first",
            type=click.IntRange(min=0),
            default=0,
            metavar="N",
            help="Leave the first N layers whole.",
        ),
    ):
        command = decorate(command)
    return command


def refine_options(command: F) -> F:
    """Add --compensation, --compensation-samples, --steps, --rechoose and --blocks."""
    for decorate in (
        click.option(
            "--rechoose",
            is_flag=True,
            help="With ridge: the metric decides only the widths; units go whose loss the others can make up "
            "for, layer after layer.",
        ),
        click.option("--blocks", is_flag=True, help="Whole attention and FFN blocks may leave as well."),
        click.option(
            "--steps",
            type=click.IntRange(min=1, max=64),
            default=1,
            show_default=True,
            metavar="K",
            help="Cut in K small steps, with new scores (and compensation) in between.",
        ),
        click.option(
            "--compensation-samples",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            metavar="N",
            help="Windows of 512 calibration tokens that compensation and damage curves look at.",
        ),
        click.option(
            "--compensation",
            type=click.Choice(["ridge", "bias", "none"]),
            default="ridge",
            show_default=True,
            help="ridge: solve the output matrices anew on what stays; bias: add biases that give back "
            "the mean, where the runtime has a place for them.",
        ),
    ):
        command = decorate(command)
    return command


def query_heads_option(command: F) -> F:
    """Add --query-heads."""
    return click.option(
        "--query-heads",
        is_flag=True,
        help="Attention gives up single query heads, as many in each KV group, instead of whole groups.",
    )(command)


def trim_options(command: F) -> F:
    """Add --trim-vocab and --trim-check."""
    for decorate in (
        click.option(
            "--trim-check",
            metavar="FILE|DATASET",
            help="Text whose tokens are counted before and after trimming. Default: samples in ten languages "
            "and code.",
        ),
        click.option(
            "--trim-vocab",
            "trim_vocab",
            multiple=True,
            metavar="FILE|DATASET|languages:en,de",
            help="Keep only the tokens that this text, or text in these languages, needs; may be repeated. "
            "Bytes and special tokens stay, so everything can still be written.",
        ),
    ):
        command = decorate(command)
    return command


def out_option(metavar: str, text: str) -> Callable[[F], F]:
    """Add the required `--out` with its own help."""
    return click.option("--out", type=click.Path(path_type=Path), metavar=metavar, required=True, help=text)


def given_on_command_line(ctx: click.Context, names: tuple[str, ...]) -> list[str]:
    """Of these parameters, the option names that the user wrote."""
    source = click.core.ParameterSource.COMMANDLINE
    return [
        p.opts[0]
        for p in ctx.command.params
        if p.name in names and ctx.get_parameter_source(p.name) == source
    ]


def recovery_options(default: str) -> Callable[[F], F]:
    """Add --recovery and what belongs to it; `recovery_recipe` turns the values into a recipe."""

    def decorate_all(command: F) -> F:
        for decorate in (
            click.option(
                "--recovery-batch",
                type=click.IntRange(min=1),
                default=8,
                show_default=True,
                metavar="N",
                help="Windows of a training step, over all processes.",
            ),
            click.option(
                "--recovery-length",
                type=click.IntRange(min=8),
                default=256,
                show_default=True,
                metavar="T",
                help="Tokens of a training window.",
            ),
            click.option(
                "--recovery-checkpoint",
                type=click.FloatRange(min=0),
                default=60.0,
                show_default=True,
                metavar="S",
                help="Seconds between checkpoints.",
            ),
            click.option(
                "--recovery-precision",
                type=click.Choice(["auto", "float32"]),
                default="auto",
                show_default=True,
                help="auto: bfloat16 matrix products where the machine is fast at them.",
            ),
            click.option(
                "--recovery-shard",
                is_flag=True,
                help="With several processes: share weights and moments out among them (FSDP), for models "
                "larger than one device.",
            ),
            click.option(
                "--gradient-checkpointing",
                is_flag=True,
                help="Work out activations twice while training, to hold fewer of them.",
            ),
            click.option(
                "--recovery-rate",
                type=click.FloatRange(min=0, min_open=True),
                metavar="X",
                help="Learning rate.",
            ),
            click.option(
                "--recovery-objective",
                type=click.Choice(["distill", "lm"]),
                default="distill",
                show_default=True,
                help="distill: KL to the dense parent and the plain loss; lm: the plain loss alone.",
            ),
            click.option(
                "--recovery-mix",
                type=click.FloatRange(min=0, max=1),
                default=0.5,
                show_default=True,
                metavar="X",
                help="Share of the KL in distill; the rest is the plain loss.",
            ),
            click.option(
                "--recovery-samples",
                type=click.IntRange(min=2),
                default=256,
                show_default=True,
                metavar="N",
                help="Windows that the parent writes, at most, where no text is given.",
            ),
            click.option(
                "--recovery-data",
                metavar="FILE|DATASET",
                help="Training text: plain, .jsonl with 'text', or instruction records. Default: written by "
                "the dense parent.",
            ),
            click.option(
                "--recovery-tokens",
                type=click.IntRange(min=1),
                metavar="N",
                help="End after this many tokens of training. Default: --recovery-minutes 10.",
            ),
            click.option(
                "--recovery-minutes",
                type=click.FloatRange(min=0, min_open=True),
                metavar="X",
                help="End after this time, writing the text included.",
            ),
            click.option(
                "--recovery-option",
                "recovery_switches",
                multiple=True,
                metavar="KEY=VALUE",
                callback=_pairs,
                help="Switch of the method, such as rank=32; may be repeated.",
            ),
            click.option(
                "--recovery",
                metavar="METHOD",
                default=default,
                show_default=True,
                help="auto: the minutes go where the KL falls; lora, group, full or none.",
            ),
        ):
            command = decorate(command)
        return command

    return decorate_all


def recovery_recipe(given: Mapping[str, Any], *, seed: int, text: str | None = None) -> Any:
    """The RecoveryRecipe of these options, or None for --recovery none. Raises ConfigError.

    `text` is the calibration text, which also trains where no other is given.
    """
    from edgeprune.recovery.recipe import DEFAULT_MINUTES, RecoveryRecipe, check

    if given["recovery"] == "none":
        return None
    minutes, tokens = given["recovery_minutes"], given["recovery_tokens"]
    recipe = RecoveryRecipe(
        method=given["recovery"],
        options=given["recovery_switches"],
        objective=given["recovery_objective"],
        mix=given["recovery_mix"],
        minutes=DEFAULT_MINUTES if minutes is None and tokens is None else minutes,
        tokens=tokens,
        data=given["recovery_data"] or text,
        samples=given["recovery_samples"],
        length=given["recovery_length"],
        batch=given["recovery_batch"],
        rate=given["recovery_rate"],
        quantization=given.get("recovery_quantization"),
        gradient_checkpointing=given["gradient_checkpointing"],
        checkpoint_s=given["recovery_checkpoint"],
        precision=given["recovery_precision"],
        shard=given["recovery_shard"],
        seed=seed,
    )
    check(recipe)
    return recipe
