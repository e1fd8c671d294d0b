"""Kill the main job at random moments and run it again: the choice must be the undisturbed run's.

    .venv/bin/python benchmarks/kill.py --kills 10 --budget 200MB

Prints each kill with the stage it hit, then whether the selection and every finished stage survived:
no stage that had finished is done again. A run that finishes before its kill is compared, and the next
one starts in a fresh folder, so every kill hits something. `--calm DIR` takes the undisturbed run from a
finished run folder of the same command. Writes benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from _common import ROOT, edgeprune, write_results


def events(folder: Path) -> list[dict]:
    log = folder / "log.jsonl"
    if not log.exists():
        return []
    out = []
    for line in log.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue  # the line the kill cut short
    return out


def start(folder: Path, extra: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        edgeprune("--target", "laptop-cpu", "--out", str(folder), *extra),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def selected(folder: Path) -> str | None:
    chosen: str | None = json.loads((folder / "report.json").read_text())["selected"]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="200MB")
    parser.add_argument("--model")
    parser.add_argument("--profile", default="chat-2k")
    parser.add_argument("--calm", type=Path, help="a finished run folder of the same command")
    parser.add_argument("--seconds", type=float, help="how long the undisturbed run took, with --calm")
    args = parser.parse_args()
    extra = ["--budget", args.budget, "--profile", args.profile]
    extra += ["--model", args.model] if args.model else []
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="edgeprune-kill-") as scratch:
        calm = args.calm or Path(scratch, "calm")
        began = time.monotonic()
        if start(calm, extra).wait() not in (0, 3):
            raise SystemExit("the undisturbed run failed")
        whole = time.monotonic() - began
        if args.calm:
            seen = events(calm)
            whole = seen[-1]["time"] - seen[0]["time"] if args.seconds is None else args.seconds
        expected = selected(calm)
        print(f"undisturbed: {whole:.0f} s, selected {expected}", flush=True)
        kills: list[dict] = []
        folders = [Path(scratch, "rough-0")]
        wrong: list[str | None] = []

        def finished() -> None:
            found = selected(folders[-1])
            if found != expected:
                wrong.append(found)

        while len(kills) < args.kills:
            # long enough for the longest stage to finish now and then, so that every stage gets its turn
            wait = rng.uniform(0.1, 0.35) * whole
            process = start(folders[-1], extra)
            try:
                process.wait(timeout=wait)
                finished()
                folders.append(Path(scratch, f"rough-{len(folders)}"))
                continue
            except subprocess.TimeoutExpired:
                # only the main process: its workers must die with it by themselves
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            seen = events(folders[-1])
            hit = f"{seen[-1]['event']} {seen[-1]['stage']}" if seen else "nothing started"
            kills.append({"after_s": round(wait, 1), "hit": hit, "folder": len(folders) - 1})
            print(f"kill {len(kills)}: after {wait:.0f} s, last event: {hit}", flush=True)
        start(folders[-1], extra).wait()
        finished()
        done = Counter(
            (f.name, e["stage"], e["key"]) for f in folders for e in events(f) if e["event"] == "done"
        )
        twice = [stage for (_, stage, _), n in done.items() if n > 1]
        rows = {
            "undisturbed_s": round(whole, 1),
            "kills": kills,
            "selected_undisturbed": expected,
            "other_selections_after_kills": wrong,
            "finished_stages": len(done),
            "finished_stages_done_twice": twice,
        }
        print(f"{len(kills)} kills: {len(wrong)} other selections {wrong or ''}")
        print(f"finished stages: {len(done)}, done twice: {len(twice)} {twice or ''}")
    print("written to", write_results("kill", rows).relative_to(ROOT))
    if wrong or twice:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
