"""Serve an ONNX folder and transformers.js to headless Chromium and print what it generates."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 600
PAGE = r"""<!doctype html>
<script type="importmap">
{"imports": {
  "@huggingface/transformers": "/lib/@huggingface/transformers/dist/transformers.web.js",
  "onnxruntime-web": "/lib/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  "onnxruntime-web/webgpu": "/lib/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
  "onnxruntime-common": "/lib/onnxruntime-common/dist/esm/index.js"
}}
</script>
<script type="module">
let answer;
try {
  const { env } = await import('@huggingface/transformers');
  env.backends.onnx.wasm.wasmPaths = '/lib/onnxruntime-web/dist/';
  const { generate } = await import('/generate.mjs');
  answer = { made: await generate('/models/', NAME, PROMPT, TEXTS, { device: 'wasm' }) };
  if (TEXTS) answer.made.version += ', Chromium ' + /Chrome\/(\d+)/.exec(navigator.userAgent)[1];
} catch (error) {
  answer = { error: String(error?.message ?? error) };
}
await fetch('/result', { method: 'POST', body: JSON.stringify(answer) });
</script>
"""


def _script(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Three roots and the page; the answer comes back as a POST."""

    extensions_map: ClassVar[dict[str, str]] = {
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: Any, shared: dict[str, Any], **more: Any) -> None:
        self.shared = shared
        super().__init__(*args, **more)

    def translate_path(self, path: str) -> str:
        path = path.split("?")[0]
        for prefix, root in self.shared["roots"].items():
            if path.startswith(prefix):
                found = (root / path[len(prefix) :]).resolve()
                if found.is_relative_to(root) and found.is_file():
                    return str(found)
        return str(HERE / "no such file")

    def do_GET(self) -> None:
        if self.path != "/":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.shared["page"].encode())

    def do_POST(self) -> None:
        self.shared["answer"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.shared["done"].set()

    def end_headers(self) -> None:
        # what a page needs to use threads in WebAssembly
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def main(browser: str, modules: str, folder: str, prompt: str, texts: str | None = None) -> int:
    values = {
        "NAME": Path(folder).name,
        "PROMPT": prompt,
        "TEXTS": json.loads(Path(texts).read_text(encoding="utf-8")) if texts else None,
    }
    shared: dict[str, Any] = {
        "roots": {
            "/lib/": Path(modules).resolve(),
            f"/models/{Path(folder).name}/": Path(folder).resolve(),
            "/": HERE,
        },
        "page": re.sub(r"\b(NAME|PROMPT|TEXTS)\b", lambda m: _script(values[m[1]]), PAGE),
        "done": threading.Event(),
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, shared=shared))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="edgeprune-", ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            waited = 0
            while not shared["done"].wait(1) and waited < TIMEOUT_S and process.poll() is None:
                waited += 1
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    answer = shared.get("answer")
    if answer is None:
        print(f"Error: Chromium ended or said nothing within {TIMEOUT_S} s", file=sys.stderr)
        return 1
    if "error" in answer:
        print(f"Error: transformers.js in Chromium: {answer['error']}", file=sys.stderr)
        return 1
    print(json.dumps(answer["made"]) if texts else answer["made"])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
