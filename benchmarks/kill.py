"""Kill the main job at random moments and run it again: the choice must be the undisturbed run's.

    .venv/bin/python benchmarks/kill.py --kills 10 --budget 200MB

Prints each kill with the stage it hit, then whether the selection and every finished stage survived:
no stage that had finished is started again. Writes benchmarks/results/kill.json.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="200MB")
    parser.add_argument("--model")
    parser.add_argument("--profile", default="chat-2k")
    args = parser.parse_args()
    extra = ["--budget", args.budget, "--profile", args.profile]
    extra += ["--model", args.model] if args.model else []
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="edgeprune-kill-") as scratch:
        calm, rough = Path(scratch, "calm"), Path(scratch, "rough")
        began = time.monotonic()
        if start(calm, extra).wait() not in (0, 3):
            raise SystemExit("the undisturbed run failed")
        whole = time.monotonic() - began
        print(f"undisturbed: {whole:.0f} s")
        kills = []
        for number in range(args.kills):
            # shares of the undisturbed time, so that the moments spread over the whole run
            wait = rng.uniform(0.3, 2.0) * whole / args.kills
            process = start(rough, extra)
            try:
                process.wait(timeout=wait)
                print(f"kill {number + 1}: the run had finished after {wait:.0f} s")
                kills.append({"after_s": wait, "hit": "nothing, it had finished"})
                continue
            except subprocess.TimeoutExpired:
                # only the main process: its workers must die with it by themselves
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            seen = events(rough)
            hit = f"{seen[-1]['event']} {seen[-1]['stage']}" if seen else "nothing started"
            kills.append({"after_s": round(wait, 1), "hit": hit})
            print(f"kill {number + 1}: after {wait:.0f} s, last event: {hit}", flush=True)
        start(rough, extra).wait()
        same = [json.loads((f / "report.json").read_text())["selected"] for f in (calm, rough)]
        done = Counter((e["stage"], e["key"]) for e in events(rough) if e["event"] == "done")
        twice = [stage for (stage, _), n in done.items() if n > 1]
        rows = {
            "undisturbed_s": round(whole, 1),
            "kills": kills,
            "selected_undisturbed": same[0],
            "selected_after_kills": same[1],
            "finished_stages": len(done),
            "finished_stages_run_twice": twice,
        }
        print(f"selected: {same[0]} undisturbed, {same[1]} after {args.kills} kills")
        print(f"finished stages: {len(done)}, run twice: {len(twice)} {twice or ''}")
    print("written to", write_results("kill", rows).relative_to(ROOT))
    if same[0] != same[1] or twice:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
