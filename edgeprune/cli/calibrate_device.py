"""`edgeprune calibrate-device`: measure a device once, so that predictions for it get narrow."""

from __future__ import annotations

from pathlib import Path

import click

from edgeprune.cli._output import echo_json, echo_pairs, format_option


@click.command()
@click.option(
    "--target",
    metavar="NAME",
    default="laptop-cpu",
    show_default=True,
    help="Target that this device is; laptop-cpu is this machine.",
)
@click.option(
    "--device",
    metavar="ADDRESS",
    default="local",
    show_default=True,
    help="local, ssh://user@host[:port] or adb://serial.",
)
@click.option("--mode", metavar="NAME", help="Power mode the device is in. Default: what it says.")
@click.option(
    "--backend", type=click.Choice(["cpu", "gpu"]), help="Default: the GPU of a Jetson, else the CPU."
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads. Default: the fastest of a sweep."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=5),
    default=100.0,
    show_default=True,
    metavar="S",
    help="Time to spend; more files make more types known.",
)
@click.option(
    "--ssh-config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Instead of ~/.ssh/config.",
)
@click.option("--device-python", metavar="PATH", help="Python on the device. Default: python3.")
@click.option("--llama-bench", metavar="PATH", help="llama-bench on the device. Default: found on its path.")
@format_option
def command(
    target: str,
    device: str,
    mode: str | None,
    backend: str | None,
    threads: int | None,
    seconds: float,
    ssh_config: Path | None,
    device_python: str | None,
    llama_bench: str | None,
    form: str,
) -> None:
    """Time a few files of random weights on a device and keep the result as your profile of it.

    It takes less than two minutes. `predict` and the main job use the profile from then on; it lies in
    $XDG_DATA_HOME/edgeprune/devices (~/.local/share where that is not set).

    \b
    Examples:
      edgeprune calibrate-device
      edgeprune calibrate-device --target raspberry-pi-5-8gb --device ssh://pi@raspberrypi.local
    """
    # help must not load numpy
    from edgeprune.cli._progress import open_progress
    from edgeprune.config.targets import calibration_path
    from edgeprune.pipeline import calibrating

    with (
        open_progress() as progress,
        calibrating.open_session(
            device,
            name="calibrate",
            ssh_config=ssh_config,
            python=device_python,
            llama_bench=llama_bench,
            say=progress.say,
        ) as session,
    ):
        record, before = calibrating.calibrate(
            target,
            session,
            mode=mode,
            backend=backend,
            threads=threads,
            seconds=seconds,
            say=progress.say,
        )
    now = record.speeds[0]
    if form == "json":
        echo_json(
            {
                "target": record.target,
                "file": str(calibration_path(record.target)),
                "mode": now.mode or None,
                "backend": now.backend,
                "threads": now.threads,
                "bandwidth_gb_per_s": now.bandwidth_bytes_per_s / 1e9,
                "layer_us": now.layer_ns / 1e3,
                "token_us": now.token_ns / 1e3,
                "relative_error": now.relative_error,
                "before": {
                    "basis": before.basis,
                    "bandwidth_gb_per_s": before.bandwidth_bytes_per_s / 1e9,
                    "relative_error": before.relative_error,
                },
                "type_factors": now.type_factors,
                "probes": len(record.samples),
                "doubts": list(record.doubts),
            }
        )
        return
    echo_pairs(
        [
            ("target", " ".join(filter(None, (record.target, now.mode, now.backend)))),
            ("measured on", f"{record.cpu}, {len(record.samples)} files"),
            ("threads", str(now.threads or "-")),
            (
                "decode",
                f"{now.bandwidth_bytes_per_s / 1e9:.1f} GB/s on Q4_K_M, {now.layer_ns / 1e3:.0f} µs a layer, "
                f"band x/÷ {1 + now.relative_error:.2f}",
            ),
            (
                "before",
                f"{before.bandwidth_bytes_per_s / 1e9:.1f} GB/s, band x/÷ {1 + before.relative_error:.2f} "
                f"({before.basis})",
            ),
            *(("doubt", doubt) for doubt in record.doubts),
            ("kept in", str(calibration_path(record.target))),
        ]
    )
