"""An Android device behind adb; it needs a Python 3 and llama-bench or llama-cpp-python on its path."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from edgeprune.devices.base import Device, Transport
from edgeprune.errors import ConfigError

_ADDRESS = re.compile(r"adb://(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]*)/?")


def transport(address: str, *, config: Path | None = None) -> Transport:
    """Read adb://serial, as `adb devices` lists it; `config` means nothing here."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"'{address}' is not a device address", "write adb://SERIAL, see 'adb devices'")
    if shutil.which("adb") is None:
        raise ConfigError("there is no adb program on this machine", "install the Android platform tools")
    serial = found["serial"]

    def argv(line: str) -> Sequence[str]:
        # -T: no terminal, so stdin passes bytes through
        return ["adb", "-s", serial, "shell", "-T", line]

    def explain(code: int, words: str) -> tuple[str, str, str | None]:
        if "unauthorized" in words:
            return "refused", f"{address} refused: {words}", "allow debugging on the device's screen"
        if "not found" in words or "offline" in words or "no devices" in words or not words:
            return "lost", f"{address} cannot be reached: {words or 'connection lost'}", None
        return "remote", words, None

    return Transport(address=address, argv=argv, explain=explain)


DEVICE = Device(
    name="adb",
    summary="an Android device behind adb (not tried on hardware yet)",
    reference="https://developer.android.com/tools/adb",
    transport=transport,
)
