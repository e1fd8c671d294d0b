"""Load a uniformly and a non-uniformly pruned SmolLM2-135M in every client that can be set up here.

    .venv/bin/python benchmarks/clients.py                 # 10 minutes; building llama-server once: 20
    .venv/bin/python benchmarks/clients.py --without llama-server
    .venv/bin/python benchmarks/clients.py --keep DIR      # models of an earlier run are taken again
    .venv/bin/python benchmarks/clients.py --table

For each client: version, loaded or why not, the first tokens it generates, the ids it gives for a set of
nasty texts against the parent's. Greedy tokens are compared with the first client of the same format.
Prints the table of the README and writes benchmarks/results/clients.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT, edgeprune, write_results

PROMPT = "The capital of France is"
# name of the script, what the table calls it
CLIENTS = {
    "gguf": (
        ("llama-cpp-python", "llama-cpp-python"),
        ("llama-server", "llama-server, started by the bundle"),
    ),
    "hf": (("transformers", "transformers"),),
    "onnx": (
        ("onnxruntime-genai", "onnxruntime-genai"),
        ("optimum", "optimum `ORTModelForCausalLM`"),
        ("transformers-js", "transformers.js in Node"),
        ("chromium", "transformers.js in headless Chromium"),
    ),
}
FORMS = {"gguf": "GGUF Q8_0", "hf": "safetensors", "onnx": "ONNX int8"}
PLANS = {
    "uniform": ["--allocator", "uniform"],
    "nonuniform": ["--metric", "flap", "--allocator", "global"],
}
TEXTS = {
    "emoji": "🚀😶\u200d🌫️ 👩\u200d👩\u200d👧 👍🏽 🇫🇷",
    "Chinese, Japanese, Korean": "我想在apple工作1314151天\uff5e 日本語テキスト 한국어",
    "digits": "1234567890 3.14159 1,000,000 1 22 333 4444 ٣٤٥",
    "runs of white space": "  a   b\t\t c \n\n\n d \r\n\r\n   ",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x<|im_start",
    "a long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 6,
    "one letter 300 times": "a" * 300,
    "combining accents": "e\u0301 a\u0308o\u0302\u0327 Z\u0351\u036b\u0343\u036a\u033d\u034f\u0334",
    "right to left": "\u0645\u0631\u062d\u0628\u0627 \u200f\u05e9\u05dc\u05d5\u05dd\u200e!",
    "control characters": "\x01\x07\x1b[0m\x7f\x85\u2028\ufeff\ufffd",
    "a NUL inside": "before\x00behind",
    "odd spaces": "naïve \u00a0nbsp\u200bzw\u3000wide\u2003em",
    "code": "def f(x):\n    return x**2  # ok\n\n\tend\r\n",
    "contractions": "I'm you're he'LL we'd 'tis don't WE'VE",
    "other scripts": "ΑβΓ нещо на Български កាន់តែពិសេស हिन्दी ไทย",
    "marks": "!!!???...---=== ((({{{[[[ \\\\ //",
    "nothing": "",
}


def call(command: list[str], what: str, **env: str) -> subprocess.CompletedProcess[str]:
    print(what, "…", file=sys.stderr, flush=True)
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False
    )


def made(command: list[str], what: str, out: Path) -> Path:
    if not out.exists():
        done = call(edgeprune(*command, "--out", str(out)), what)
        if done.returncode:
            raise SystemExit(f"{what}: {done.stderr}")
    return out


def models(folder: Path) -> dict[str, dict[str, Path]]:
    """Per plan a Hugging Face folder, a bundle with a GGUF file and an ONNX folder.

    Exports are not verified here: what the clients generate is the check.
    """
    found = {}
    for plan, options in PLANS.items():
        more = ["--ratio", "0.2", "--calibration", str(ROOT / "README.md"), "--samples", "16"]
        hf = made(["prune", *options, *more, "--compensation", "none"], f"prune, {plan}", folder / plan)
        gguf = made(
            ["export", str(hf), "--quantization", "Q8_0", "--no-verify"],
            f"GGUF, {plan}",
            folder / f"{plan}.gguf",
        )
        bundle = ["bundle", str(gguf), "--tokenizer", str(hf), "--license", "apache-2.0"]
        onnx = ["export", str(hf), "--format", "onnx", "--quantization", "int8", "--no-verify"]
        found[plan] = {
            "hf": hf,
            "gguf": made(bundle, f"bundle, {plan}", folder / f"{plan}-bundle"),
            "onnx": made(onnx, f"ONNX, {plan}", folder / f"{plan}-onnx"),
        }
    return found


def parent_ids() -> list[list[int]]:
    """Ids that llama.cpp gives with the parent's own file, which nothing of ours has touched."""
    import llama_cpp

    from edgeprune import locate

    parent = llama_cpp.Llama(str(locate.resolve_model(None)), vocab_only=True, verbose=False)
    return [parent.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS.values()]


def widths(hf: Path) -> str:
    config = json.loads((hf / "config.json").read_text())
    layers = config.get("edgeprune_layers")
    if layers is None:
        return f"KV heads {config['num_key_value_heads']}, FFN {config['intermediate_size']} in every layer"
    heads, ff = {row[1] for row in layers}, {row[2] for row in layers}
    return f"KV heads {min(heads)} to {max(heads)}, FFN {min(ff)} to {max(ff)} by layer"


def one(client: str, model: Path, texts: Path, expected: list[list[int]]) -> dict[str, Any]:
    began = time.monotonic()
    script = str(ROOT / "scripts" / "interop" / client)
    done = call([script, str(model), PROMPT, str(texts)], f"{client}, {model.name}", PYTHON=sys.executable)
    row: dict[str, Any] = {"client": client, "seconds": round(time.monotonic() - began, 1)}
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in errors if line.startswith("Error: ")), errors[-1] if errors else "")
        return {**row, "loaded": False, "why": said.removeprefix("Error: ")}
    found = json.loads(done.stdout.splitlines()[-1])
    ids = found.pop("ids")
    other = [name for name, mine, theirs in zip(TEXTS, ids, expected, strict=True) if mine != theirs]
    how = found.pop("loaded", None)
    return {**row, "loaded": True, "how": how, **found, "ids": ids, "texts_with_other_ids": other}


def compare(rows: list[dict[str, Any]]) -> None:
    """Greedy tokens that agree with the first client of the format; one that ends a text does not count."""
    first: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if not row["loaded"]:
            continue
        tokens = row["made"][:-1] if row["made"][-1] == 2 else row["made"]
        theirs = first.setdefault((row["plan"], row["format"]), tokens)
        same = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b), None)
        same = min(len(tokens), len(theirs)) if same is None else same
        row["same_tokens"], row["tokens"] = same, max(len(tokens), len(theirs))


def cell(row: dict[str, Any]) -> str:
    if not row["loaded"]:
        return f"no: {row['why']}"
    said = "loads" if row["how"] in (None, "as it is") else row["how"].split(", KV")[0]
    if said == "with PerLayer":
        said = "only with ten lines of one's own (`PerLayer`)"
    return f"{said}; {row['same_tokens']} of {row['tokens']}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| client | version | format | uniform | every layer its own widths | ids of nasty texts |",
        "|---|---|---|---|---|---|",
    ]
    for form, clients in CLIENTS.items():
        for client, name in clients:
            mine = {row["plan"]: row for row in rows if row["client"] == client}
            if not mine:
                continue
            loaded = [row for row in mine.values() if row["loaded"]]
            version = loaded[0]["version"] if loaded else "-"
            other = sorted({t for row in loaded for t in row["texts_with_other_ids"]})
            ids = (
                "-"
                if not loaded
                else f"others for: {', '.join(other)}"
                if other
                else f"all {len(TEXTS)} the parent's"
            )
            cells = " | ".join(cell(mine[plan]) for plan in PLANS)
            lines.append(f"| {name} | {version} | {FORMS[form]} | {cells} | {ids} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder of the models, kept")
    parser.add_argument("--without", action="append", default=[], help="leave a client out; may be repeated")
    parser.add_argument("--table", action="store_true", help="print the table of the last results again")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads((RESULTS / "clients.json").read_text())["rows"]["clients"]))
        return
    with tempfile.TemporaryDirectory(prefix="edgeprune-clients-") as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        found = models(folder)
        texts = folder / "texts.json"
        texts.write_text(json.dumps(list(TEXTS.values())))
        expected = parent_ids()
        rows = []
        for plan, paths in found.items():
            for form, clients in CLIENTS.items():
                for client in (name for name, _ in clients if name not in args.without):
                    row = one(client, paths[form], texts, expected)
                    rows.append({"plan": plan, "format": form, "widths": widths(paths["hf"]), **row})
                    print(json.dumps({k: v for k, v in rows[-1].items() if k != "ids"}), file=sys.stderr)
    compare(rows)
    for row in rows:
        print(f"{row['plan']:10} {row['client']:18}", row["text"].encode() if row["loaded"] else row["why"])
    print(table(rows))
    parent = dict(zip(TEXTS, expected, strict=True))
    result = {"prompt": PROMPT, "texts": TEXTS, "parent_ids": parent, "clients": rows}
    print("written to", write_results("clients", result).relative_to(ROOT))


if __name__ == "__main__":
    main()
