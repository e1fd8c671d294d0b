"""The `edgeprune` command: the whole pipeline, and the group its verbs hang on."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgeprune import __version__, registry, rundir
from edgeprune.cli._options import (
    calibration_seeds_option,
    metric_option_option,
    query_heads_option,
    recovery_options,
    recovery_recipe,
    trim_options,
)
from edgeprune.cli._output import plain
from edgeprune.config.targets import list_targets
from edgeprune.errors import ConfigError, EdgepruneError, MissingExtraError, StageError
from edgeprune.units import BYTE_UNITS, parse_bytes

INTERRUPTED = 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "failed to map segment from shared object",
)
# libraries of the extras, by the name they are imported by
_EXTRA_OF = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"), "torch"),
    **dict.fromkeys(("accelerate", "peft"), "torch"),
    **dict.fromkeys(("gguf", "llama_cpp"), "gguf"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxruntime_genai"), "onnx"),
    "datasets": "data",
    "lm_eval": "eval",
    "vl_convert": "report",
}


class _Stopped(BaseException):
    """A signal asked the program to end; not an Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stray(word: str) -> str | None:
    """What a word that is no verb most likely was meant to be."""
    if word in BYTE_UNITS:
        return f"'{word}' stands alone: write number and unit together, such as 200{word}"
    if word in list_targets():
        return f"'{word}' is a target, not a verb: write --target {word}"
    return None


class _Verbs(click.Group):
    """Imports the file of a verb only when that verb, or the list of all, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in registry.names("cli") if name != "main"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"edgeprune.cli.{cmd_name.replace('-', '_')}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"edgeprune/cli/{cmd_name}.py: 'command' must be a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known:
            raise click.UsageError(
                _stray(args[0]) or f"unknown verb '{args[0]}'{registry.suggest(args[0], known)}", ctx
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="[VERB [ARGS]...]",
)
@click.version_option(__version__, prog_name="edgeprune", message="%(prog)s %(version)s")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME|FILE",
    help="Device to fit, see 'edgeprune targets'. May be repeated: what does not depend on the device is "
    "done once, and each has its own report.",
)
@click.option(
    "--budget",
    metavar="SIZE",
    help="Memory the model may take, such as 200MB or 6GB. Default: what the target can spare.",
)
@click.option(
    "--model",
    metavar="FOLDER|FILE|ID",
    help="Hugging Face folder or id, or a GGUF file. Default: SmolLM2-135M-Instruct.",
)
@click.option(
    "--profile",
    metavar="NAME|FILE",
    default="chat-2k",
    show_default=True,
    help="Use case, see 'edgeprune profiles'.",
)
@click.option(
    "--device",
    metavar="ADDRESS",
    default="local",
    show_default=True,
    help="Where to measure: local, ssh://user@host[:port] or adb://serial. With local, the speed of a "
    "target that is not this machine is predicted.",
)
@click.option(
    "--ssh-config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Instead of ~/.ssh/config.",
)
@click.option("--device-python", metavar="PATH", help="Python on the device. Default: python3.")
@click.option("--llama-bench", metavar="PATH", help="llama-bench on the device. Default: found on its path.")
@click.option(
    "--sustained",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Seconds to decode without a pause on another device, behind the repeats.",
)
@click.option("--keep-remote", is_flag=True, help="Leave what was copied to the device there.")
@click.option("--mode", metavar="NAME", help="Power mode of the target, such as 25W.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; an interrupted run goes on there. Default: a folder in edgeprune-runs/.",
)
@click.option("--max-file", metavar="SIZE", help="Largest file to ship.")
@click.option("--min-tps", type=float, metavar="X", help="Slowest decode allowed, tokens per second.")
@click.option(
    "--max-first-token",
    type=float,
    metavar="MS",
    help="Longest wait for the first token behind the profile's prompt, milliseconds.",
)
@click.option(
    "--max-energy",
    type=float,
    metavar="J",
    help="Most energy for a generated token, joules; checked where the device has a meter.",
)
@click.option("--max-kl", type=float, metavar="X", help="Largest KL to the dense model, nats per token.")
@click.option(
    "--min-agreement",
    type=float,
    metavar="X",
    help="Smallest share of tokens, 0 to 1, whose first choice is the dense model's.",
)
@click.option(
    "--objective",
    type=click.Choice(["quality", "speed", "size"]),
    default="quality",
    show_default=True,
    help="Within the limits take the best quality, the fastest decode or the smallest file; the last two "
    "need --max-kl or --min-agreement.",
)
@click.option("--metric", metavar="NAME", help="Importance metric. Default: the profile's.")
@metric_option_option
@click.option(
    "--allocator",
    "allocators",
    multiple=True,
    metavar="NAME",
    help="How widths are shared among layers: uniform, inner, global or sensitivity; may be repeated. "
    "Default: the profile's.",
)
@click.option(
    "--compensation",
    type=click.Choice(["ridge", "bias", "none"]),
    help="What is done to make up for what leaves, see 'edgeprune prune'. Default: the profile's.",
)
@click.option(
    "--calibration",
    metavar="FILE|DATASET",
    help="Calibration text. Default: sampled from the model itself.",
)
@click.option(
    "--eval-text", metavar="FILE", help="Held-out text for quality. Default: sampled from the model itself."
)
@click.option(
    "--eval",
    "eval_suite",
    metavar="papers|quick|FILE",
    help="Score the selected file and its dense parent on this suite, see 'edgeprune eval'.",
)
@click.option(
    "--eval-data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the suite's files. Default: the hub.",
)
@click.option(
    "--quantization",
    "quantizations",
    multiple=True,
    metavar="TYPE",
    help="Allow only this type, such as Q4_0 or Q4_0+ffn=Q5_1; may be repeated. Default: the profile's.",
)
@click.option(
    "--max-candidates", type=click.IntRange(min=1), metavar="N", help="Measure at most N candidates."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Begin no candidate after X minutes of measuring. Default: no limit but --max-candidates.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all sampling."
)
@calibration_seeds_option
@query_heads_option
@trim_options
@recovery_options("none")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads to use. Default: the best found."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Form of the result on stdout.",
)
@click.pass_context
def cli(ctx: click.Context, form: str, **given: Any) -> None:
    """Make the best decoder LLM that fits a device: prune, export, measure, choose.

    \b
    Examples:
      edgeprune --target laptop-cpu --budget 200MB
      edgeprune --target jetson-orin --budget 6GB --model org/name
      edgeprune --target raspberry-pi-5-8gb --target laptop-cpu --budget 200MB
      edgeprune --target laptop-cpu --objective speed --max-kl 0.1
      edgeprune targets show jetson-orin
    """
    if ctx.invoked_subcommand is not None:
        _refuse_stray_options(ctx)
        return
    targets: tuple[str, ...] = given["targets"]
    if not targets:
        raise ConfigError(
            "--target is missing: which device must the model fit?", "list them: edgeprune targets"
        )
    budget_bytes, file_bytes = _sizes(given["budget"], given["max_file"])
    out = given["out"] or rundir.default_root(
        given["model"], "-and-".join(map(rundir.slug, targets)), given["profile"], given["budget"]
    )

    # the one place that reaches down lazily: help must not load torch
    from edgeprune import pipeline
    from edgeprune.cli._output import echo_json
    from edgeprune.cli._progress import open_progress

    options = pipeline.RunOptions(
        target=targets[0],
        budget_bytes=budget_bytes,
        model=given["model"],
        profile=given["profile"],
        device=given["device"],
        out=out,
        file_bytes=file_bytes,
        min_tps=given["min_tps"],
        max_first_token_ms=given["max_first_token"],
        max_energy_j=given["max_energy"],
        max_kl=given["max_kl"],
        min_agreement=given["min_agreement"],
        objective=given["objective"],
        metric=given["metric"],
        metric_options=given["metric_options"],
        calibration=given["calibration"],
        eval_text=given["eval_text"],
        eval_suite=given["eval_suite"],
        eval_data=given["eval_data"],
        seed=given["seed"],
        calibration_seeds=given["calibration_seeds"],
        threads=given["threads"],
        max_candidates=given["max_candidates"],
        minutes=given["minutes"],
        quantizations=given["quantizations"],
        allocators=given["allocators"],
        compensation=given["compensation"],
        mode=given["mode"],
        ssh_config=given["ssh_config"],
        device_python=given["device_python"],
        llama_bench=given["llama_bench"],
        keep_remote=given["keep_remote"],
        sustained_s=given["sustained"],
        query_heads=given["query_heads"],
        trim_vocab=given["trim_vocab"],
        trim_check=given["trim_check"],
        recovery=recovery_recipe(given, seed=given["seed"], text=given["calibration"]),
        command=tuple(["edgeprune", *ctx.obj]),
    )
    with open_progress() as progress:
        if len(targets) == 1:
            report = pipeline.run(options, progress)
        else:
            report = pipeline.run_all(options, targets, progress)
    if form == "json":
        echo_json(report)
    else:
        from edgeprune.report.terminal import render_table

        click.echo(render_table(report, str(out)))


def _sizes(budget: str | None, max_file: str | None) -> tuple[int | None, int | None]:
    problems: list[str] = []
    values: list[int | None] = []
    hints: list[str] = []
    for option, text in (("--budget", budget), ("--max-file", max_file)):
        try:
            values.append(None if text is None else parse_bytes(text, what=option))
        except ConfigError as error:
            problems += error.problems
            hints += [error.hint] if error.hint else []
            values.append(None)
    if problems:
        raise ConfigError(problems, "; ".join(dict.fromkeys(hints)) or None)
    return values[0], values[1]


def _refuse_stray_options(ctx: click.Context) -> None:
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{param.opts[0]} belongs to the whole pipeline; write options of "
                f"'{ctx.invoked_subcommand}' after it",
                ctx,
            )


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the one place that prints errors."""
    args = list(sys.argv[1:] if args is None else args)
    # threads that spin while they wait make a shared machine several times slower; set before torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        result = cli.main(args=args, prog_name="edgeprune", standalone_mode=False, obj=tuple(args))
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except EdgepruneError as error:
        problems = error.problems if isinstance(error, ConfigError) else (error.message,)
        return _fail(problems, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return ConfigError.exit_code
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edgeprune"
        return _fail((error.format_message(),), f"see {path} --help", ConfigError.exit_code)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRA_OF:
            raise
        missing = MissingExtraError(library, _EXTRA_OF[library])
        return _fail((missing.message,), missing.hint, missing.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _say_stopped(INTERRUPTED)
    except _Stopped as stopped:
        return _say_stopped(128 + stopped.number)
    except BrokenPipeError:
        # the reader of stdout has gone, as with `| head`: not worth a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        if _no_memory(error):
            hint = "close other programs, or raise this one's limit, and run the same command again"
            return _fail(("not enough memory on this machine",), hint, StageError.exit_code)
        if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror}"
        hint = "free some space and run the same command again" if error.errno == errno.ENOSPC else None
        return _fail((what,), hint, ConfigError.exit_code)


def _no_memory(error: BaseException | None) -> bool:
    """Memory was refused: to Python, to torch, or to the loader of a library."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(words in str(error) for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(problems: Sequence[str], hint: str | None, code: int) -> int:
    for problem in problems:
        click.echo(f"Error: {plain(problem)}", err=True)
    if hint:
        click.echo(f"Hint: {plain(hint)}", err=True)
    return code


def _say_stopped(code: int) -> int:
    word = "interrupted" if code == INTERRUPTED else "terminated"
    click.echo(f"{word}; run the same command again to continue", err=True)
    return code


def _stop(number: int, _frame: object) -> None:
    # the next one ends the program at once
    signal.signal(number, signal.SIG_DFL)
    raise _Stopped(number)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(run())
