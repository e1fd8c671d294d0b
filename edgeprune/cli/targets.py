"""`edgeprune targets`: the devices that are described, and where each figure comes from."""

from __future__ import annotations

from typing import Any

import click

from edgeprune import records
from edgeprune.cli._output import echo_json, echo_pairs, echo_table, format_option
from edgeprune.config import toml
from edgeprune.config.targets import (
    TargetFamily,
    family_members,
    list_targets,
    read_target,
    with_calibration,
)
from edgeprune.costs.speed import speed_model
from edgeprune.errors import ConfigError
from edgeprune.records import DeviceTarget
from edgeprune.units import format_bytes


@click.group(invoke_without_command=True)
@format_option
@click.pass_context
def command(ctx: click.Context, form: str) -> None:
    """List the devices that can be named with --target.

    \b
    Examples:
      edgeprune targets
      edgeprune targets show raspberry-pi-5-8gb
    """
    if ctx.invoked_subcommand is not None:
        return
    found = [(name, read_target(toml.find("targets", name))) for name in list_targets()]
    if form == "json":
        echo_json([_plain(target) for _, target in found])
        return
    rows = []
    for name, target in found:
        if isinstance(target, TargetFamily):
            rows.append(
                (name, "", "", "", f"{target.title}: {len(target.members)} modules, the smallest that fits")
            )
        else:
            rows.append(
                (
                    name,
                    format_bytes(target.usable_bytes),
                    f"{target.bandwidth_peak_bytes_per_s / 1e9:.1f}",
                    target.default_mode or "-",
                    target.title,
                )
            )
    echo_table(("name", ">usable", ">peak GB/s", "mode", "device"), rows)


@command.command("show")
@click.argument("name", metavar="NAME|FILE")
@format_option
def show(name: str, form: str) -> None:
    """Show one target with the source of every figure.

    \b
    Example:
      edgeprune targets show jetson-orin-nano-8gb
    """
    path = toml.find("targets", name)
    target = read_target(path)
    members = family_members(target, path) if isinstance(target, TargetFamily) else ()
    if form == "json":
        plain = _plain(target if isinstance(target, TargetFamily) else _as_seen_here(target))
        echo_json({**plain, "modules": [_plain(m) for m in members]} if members else plain)
        return
    if isinstance(target, TargetFamily):
        click.echo(f"{target.name}: {target.title}")
        click.echo("resolves to the first of these whose usable memory holds the budget:")
        ordered = sorted(members, key=lambda t: t.usable_bytes)
        rows = [
            (m.name, format_bytes(m.usable_bytes), f"{m.bandwidth_peak_bytes_per_s / 1e9:.1f}")
            for m in ordered
        ]
        echo_table(("name", ">usable", ">peak GB/s"), rows)
        return
    _show_device(_as_seen_here(target))


@command.command("check")
@click.argument("file", metavar="FILE")
@format_option
def check(file: str, form: str) -> None:
    """Check a target file of your own: every problem at once, or what it predicts.

    \b
    Example:
      edgeprune targets check my-board.toml
    """
    if "/" not in file and not file.endswith(".toml"):
        raise ConfigError(f"'{file}' is not a file", "give the path of a .toml file, such as ./my-board.toml")
    path = toml.find("targets", file)
    target = read_target(path)
    members = family_members(target, path) if isinstance(target, TargetFamily) else (target,)
    rows = []
    for member in members:
        for mode in [m.name for m in member.power_modes] or [None]:
            found = speed_model(member, mode=mode)
            rows.append(
                {
                    "target": member.name,
                    "mode": mode,
                    "backend": found.backend,
                    "bandwidth_gb_per_s": round(found.bandwidth_bytes_per_s / 1e9, 2),
                    "relative_error": round(found.relative_error, 3),
                    "basis": found.basis,
                }
            )
    if form == "json":
        echo_json({"file": file, "ok": True, "speeds": rows})
        return
    click.echo(f"{file}: no problems")
    echo_table(
        ("target", "mode", "on", ">GB/s on Q4_K_M", "80% band", "based on"),
        [
            (
                str(r["target"]),
                str(r["mode"] or "-"),
                str(r["backend"]),
                f"{r['bandwidth_gb_per_s']:.1f}",
                f"x/÷ {1 + float(r['relative_error'] or 0):.2f}",
                str(r["basis"]),
            )
            for r in rows
        ],
    )


def _as_seen_here(target: DeviceTarget) -> DeviceTarget:
    """This machine with detected facts; another device with the user's own calibration."""
    if not target.local:
        return with_calibration(target)
    from edgeprune.devices import local

    return local.describe(target)


def _show_device(target: DeviceTarget) -> None:
    sources = {fact.field: fact.source for fact in target.facts}
    click.echo(f"{target.name}: {target.title}")
    figures = (
        ("architecture", target.arch, "arch"),
        ("instructions", " ".join(target.isa), "isa"),
        ("cores", str(target.cores), "cores"),
        ("memory", format_bytes(target.memory_bytes), "memory_bytes"),
        ("usable", format_bytes(target.usable_bytes), "usable_bytes"),
        (
            "peak bandwidth",
            f"{target.bandwidth_peak_bytes_per_s / 1e9:.1f} GB/s",
            "bandwidth_peak_bytes_per_s",
        ),
        ("runtime overhead", format_bytes(target.runtime_overhead_bytes), "runtime_overhead_bytes"),
        ("formats", " ".join(target.formats), "formats"),
    )
    echo_table(("figure", "value", "source"), [(n, v, sources.get(f, "not stated")) for n, v, f in figures])
    if target.power_modes:
        click.echo("")
        modes = [
            (
                m.name + (" (default)" if m.name == target.default_mode else ""),
                f"{m.bandwidth_peak_bytes_per_s / 1e9:.1f}",
                "-" if m.gpu_sm_ghz is None else f"{m.gpu_sm_ghz:.1f}",
                m.source,
            )
            for m in target.power_modes
        ]
        echo_table(("power mode", ">peak GB/s", ">GPU SM x GHz", "source"), modes)
    click.echo("")
    modes_named = [m.name for m in target.power_modes] or [None]
    speeds = [speed_model(target, mode=name) for name in modes_named]
    rows = [
        (
            s.mode or "-",
            s.backend,
            f"{s.bandwidth_bytes_per_s / 1e9:.1f}",
            f"{s.layer_ns / 1e6:.3f}",
            f"x/÷ {1 + s.relative_error:.2f}",
            f"{s.basis}: {s.source}",
        )
        for s in speeds
    ]
    echo_table(("mode", "on", ">GB/s on Q4_K_M", ">ms a layer", "80% band", "based on"), rows)
    if target.notes:
        click.echo("")
        echo_pairs([("note:", note) for note in target.notes])


def _plain(target: DeviceTarget | TargetFamily) -> dict[str, Any]:
    if isinstance(target, TargetFamily):
        return {"name": target.name, "title": target.title, "members": list(target.members)}
    plain = records.to_plain(target)
    assert isinstance(plain, dict)
    return plain
