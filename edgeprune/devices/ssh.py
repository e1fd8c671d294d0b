"""A device behind SSH, reached with the user's own OpenSSH client.

The client and not a library: it reads the user's configuration, agent, jump hosts and hardware keys,
checks host keys against what the user trusts, and no secret passes through this program.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from edgeprune.devices.base import Device, Transport
from edgeprune.errors import ConfigError

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)


def transport(
    address: str, *, config: Path | None = None, connect_s: int = 10, alive_s: int = 5
) -> Transport:
    """Read ssh://[user@]host[:port]; `config` is another ssh_config than the user's.

    A connection attempt gives up after `connect_s`, an open one after three times `alive_s` of silence.
    """
    found = _ADDRESS.fullmatch(address)
    port = int(found["port"] or 22) if found else 0
    if found is None or not 0 < port < 65536:
        raise ConfigError(
            f"'{address}' is not a device address", "write ssh://user@host or ssh://user@host:port"
        )
    if shutil.which("ssh") is None:
        raise ConfigError("there is no ssh program on this machine", "install the OpenSSH client")
    host = found["host"].strip("[]")
    command = ["ssh", "-T"]
    if config is not None:
        command += ["-F", str(config)]
    for option in (
        "BatchMode=yes",  # a question nobody answers would hang the run
        "StrictHostKeyChecking=yes",
        f"ConnectTimeout={connect_s}",
        f"ServerAliveInterval={alive_s}",
        "ServerAliveCountMax=3",
        "ControlMaster=no",
        "ControlPath=none",
        "ForwardAgent=no",
        "ForwardX11=no",
        "RequestTTY=no",
    ):
        command += ["-o", option]
    if found["port"]:
        command += ["-p", found["port"]]
    if found["user"]:
        command += ["-l", found["user"]]
    command += ["--", host]

    def argv(line: str) -> Sequence[str]:
        return [*command, line]

    def explain(code: int, words: str) -> tuple[str, str, str | None]:
        if "Host key verification failed" in words or "host key" in words.lower():
            return (
                "host-key",
                f"the host key of {host} is not known, or has changed",
                f"check it and log in once by hand: ssh {_by_hand(found)}",
            )
        if "Permission denied" in words:
            return "refused", f"{address} refused the login: {words}", "put your key there with ssh-copy-id"
        if "Could not resolve hostname" in words:
            return "address", f"there is no host {host}", "check the address given to --device"
        if code == 255:
            return "lost", f"{address} cannot be reached: {words or 'connection lost'}", None
        return "remote", words or f"the remote command ended with {code}", None

    return Transport(address=address, argv=argv, explain=explain)


def _by_hand(found: re.Match[str]) -> str:
    who = f"{found['user']}@" if found["user"] else ""
    port = f"-p {found['port']} " if found["port"] else ""
    return f"{port}{who}{found['host'].strip('[]')}"


DEVICE = Device(
    name="ssh",
    summary="a machine behind SSH, with Python 3.8 or newer and llama-cpp-python or llama-bench",
    reference="ssh(1), ssh_config(5)",
    transport=transport,
)
