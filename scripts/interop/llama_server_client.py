"""Start llama-server on this machine, ask it one chat question over HTTP, stop it.

A bundle is started by its own llama-server.sh, so that the flags in it are tried as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _client import NEW_TOKENS, answer

START_S = 300
ANSWER_S = 600
FLAGS = ["-c", "2048", "-ub", "128", "-b", "128", "-lm", "none", "-np", "1", "--cache-ram", "0"]


def ask(base: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = ANSWER_S) -> Any:
    """GET, or POST with a body; the JSON of the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    # no proxy: the server is on this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as found:
        return json.load(found)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextlib.contextmanager
def running(server: str, model: str) -> Iterator[str]:
    """The address of a server that is ready; it is stopped at the end."""
    base = f"http://127.0.0.1:{(port := free_port())}"
    more = ["--host", "127.0.0.1", "--port", str(port), "--jinja", "--offline"]
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch, open(f"{scratch}/log", "w+") as log:
        # the bundle's line calls it by name
        Path(scratch, "llama-server").symlink_to(Path(server).resolve())
        env = {**os.environ, "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}"}
        path = Path(model)
        if (path / "llama-server.sh").is_file():
            command = ["sh", str(path / "llama-server.sh")]
        else:
            file = next(path.glob("*.gguf")) if path.is_dir() else path
            command = ["llama-server", "-m", str(file), *FLAGS]
        process = subprocess.Popen([*command, *more], stdout=log, stderr=log, env=env)
        try:
            limit = time.monotonic() + START_S
            while True:
                try:
                    ask(base, "/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    pass
                if process.poll() is not None or time.monotonic() > limit:
                    log.seek(0)
                    tail = "".join(log.readlines()[-8:])
                    state = "ended" if process.poll() is not None else f"was not ready within {START_S} s"
                    raise SystemExit(f"{tail}Error: llama-server {state}; its last lines are above")
                time.sleep(0.2)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(server: str, about: str, model: str, prompt: str, texts: str | None = None) -> int:
    began = time.monotonic()
    with running(server, model) as base:
        ready = time.monotonic() - began
        asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "temperature": 0}
        said = ask(base, "/v1/chat/completions", asked)
        text, timings = said["choices"][0]["message"]["content"], said["timings"]
        print(
            f"{about}: ready after {ready:.1f} s; prompt {timings['prompt_n']} tokens, "
            f"{timings['prompt_per_second']:.0f} tokens/s; answer {timings['predicted_n']} tokens, "
            f"{timings['predicted_per_second']:.1f} tokens/s",
            file=sys.stderr,
        )
        if texts is None:
            print(text)
            return 0 if timings["predicted_n"] else 1

        def encode(content: str, *, whole: bool = False) -> list[int]:
            body = {"content": content, "add_special": whole, "parse_special": True}
            found: list[int] = ask(base, "/tokenize", body)["tokens"]
            return found

        given = encode(prompt, whole=True)
        body = {"prompt": given, "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True}
        done = ask(base, "/completion", body)
        return answer(
            "llama-server",
            about,
            given=given,
            made=done["tokens"],
            text=prompt + done["content"],
            encode=encode,
            texts=texts,
            chat=text,
            timings=timings,
        )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
