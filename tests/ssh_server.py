"""A real OpenSSH server in a network namespace of its own, whose traffic can be cut and restored."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST_ADDRESS, ADDRESS, PORT = "10.213.77.1", "10.213.77.2", 2222


def missing() -> str | None:
    """Why no such server can be started here, or None."""
    for program in ("sshd", "ssh", "ssh-keygen", "ip", "tc"):
        if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            return f"there is no {program} here"
    if os.geteuid() != 0:
        return "a network namespace needs root"
    name = f"eptry{os.getpid()}"
    made = _ip("netns", "add", name)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    veth = _ip("link", "add", f"x{os.getpid()}", "type", "veth", "peer", "name", f"y{os.getpid()}")
    _ip("link", "del", f"x{os.getpid()}")
    _ip("netns", "del", name)
    return (
        None if veth.returncode == 0 else f"no virtual network link can be made here: {veth.stderr.strip()}"
    )


def _ip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Server:
    address: str
    config: Path  # for ssh -F
    home: Path  # what the server says HOME is
    namespace: str

    def cut(self) -> None:
        """Every packet is lost from now on; nobody is told."""
        self._link("down")

    def restore(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "board0", state], check=True)

    def slow(self, megabit: int) -> None:
        """Limit what the client can send."""
        command = f"tc qdisc replace dev ephost0 root tbf rate {megabit}mbit burst 256kb latency 50ms"
        subprocess.run(command.split(), check=True)

    def fast(self) -> None:
        subprocess.run(["tc", "qdisc", "del", "dev", "ephost0", "root"], check=False, capture_output=True)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Start the server; everything of it is gone afterwards."""
    namespace = f"epboard{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="sshd-") as text:
        folder = Path(text)
        os.chmod(folder, 0o755)
        home = folder / "home"
        home.mkdir()
        for key in ("host", "user", "stranger"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
            )
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"Port {PORT}\nListenAddress {ADDRESS}\nHostKey {folder}/host\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPermitRootLogin yes\nSetEnv HOME={home}\nLogLevel ERROR\n"
        )
        host_key = (folder / "host.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[{ADDRESS}]:{PORT} {' '.join(host_key)}\n")
        config = folder / "ssh_config"
        config.write_text(
            f"Host *\n  User root\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        process = None
        try:
            for line in (
                f"ip netns add {namespace}",
                f"ip link add ephost0 type veth peer name board0 netns {namespace}",
                f"ip addr add {HOST_ADDRESS}/30 dev ephost0",
                "ip link set ephost0 up",
                f"ip -n {namespace} addr add {ADDRESS}/30 dev board0",
                f"ip -n {namespace} link set board0 up",
                f"ip -n {namespace} link set lo up",
            ):
                subprocess.run(line.split(), check=True, capture_output=True)
            sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
            assert sshd is not None
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sshd, "-D", "-e", "-f", str(folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=(folder / "log").open("wb"),
            )
            server = Server(f"ssh://root@{ADDRESS}:{PORT}", config, home, namespace)
            for _ in range(100):
                tried = subprocess.run(
                    ["ssh", "-F", str(config), "-p", str(PORT), ADDRESS, "true"],
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    check=False,
                )
                if tried.returncode == 0:
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"sshd did not start: {(folder / 'log').read_text()} {tried.stderr!r}")
            yield server
        finally:
            if process is not None:
                process.terminate()
                process.wait()
            # sessions that the server left behind live in the namespace
            left = _ip("netns", "pids", namespace).stdout.split()
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), 9)
            _ip("link", "del", "ephost0")
            _ip("netns", "del", namespace)
