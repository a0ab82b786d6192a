"""Kills demo training at random instants, resumes it each time, and compares the result with that of
a run which was never stopped.

    python experiments/torture.py    # 15 kills, about 8 minutes of one core -> results/torture.jsonl

After each kill: every checkpoint that is there is whole. At the end: the same weights, the same
metrics but for timings and memory, no line lost or doubled, no other file. Else exit status 1.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

common.use_one_thread()

import treerpo  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

TIMINGS = ("tok_per_s", "time_sample", "time_score", "time_update", "peak_mem_gb")
SMALL = [
    "--save-every", "1", "--eval-every", "20", "--eval-questions", "16", "--eval-samples", "2",
    "--questions-per-step", "8",
]


def start(flags: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(common.ROOT / "treerpo.py"), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def metrics(out: Path) -> list[dict]:
    rows = []
    for row in common.read_lines(out / "metrics.jsonl"):
        rows.append({name: value for name, value in row.items() if name not in TIMINGS})
    return rows


def damaged(out: Path) -> list[str]:
    """The checkpoints that cannot be loaded."""
    names = []
    for folder in treerpo.checkpoints(out):
        try:
            treerpo.load_trainer_state(folder)
            load_file(folder / "model.safetensors")
        except Exception as error:  # whatever it is, it is what this looks for
            names.append(f"{folder.name}: {error!r:.100}")
    return names


def kill_and_resume(
    out: Path, flags: list[str], kills: int, longest: float
) -> tuple[int, list[str]]:
    """Kill the run so many times, each within `longest` seconds of its start, then let it end.
    -> how often it was killed, fewer if it ended before; what was lost."""
    lost = []
    done = 0
    while True:
        begun = treerpo.newest_checkpoint(out) is not None
        if not begun:
            shutil.rmtree(out, ignore_errors=True)  # there is nothing to resume
        process = start(["--resume", str(out)] if begun else ["--out", str(out), *flags])
        limit = random.uniform(0, longest) if done < kills else None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            lost += damaged(out)
            print(f"kill {done} after {limit:.1f} s: {treerpo.newest_checkpoint(out)}", flush=True)
            continue
        if status != 0:
            lost.append(f"exit status {status} after {done} kills")
        return done, lost


def compare(whole: Path, killed: Path, steps: int) -> list[str]:
    """-> how the killed run differs from the other one."""
    lost = []
    name = f"checkpoint-{steps}/model.safetensors"
    weights = load_file(whole / name)
    others = load_file(killed / name)
    if any(not weights[key].equal(others[key]) for key in weights):
        lost.append("weights differ")
    if metrics(whole) != metrics(killed):
        lost.append("metrics differ")
    names = {path.name for path in whole.iterdir()}
    other_names = {path.name for path in killed.iterdir()}
    if names != other_names:
        lost.append(f"files differ: {sorted(names ^ other_names)}")
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=15, help="default 15")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default 240)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default 0)")
    args = parser.parse_args()
    random.seed(args.seed)
    flags = ["--steps", str(args.steps), *SMALL]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        killed = Path(folder) / "killed"
        began = time.perf_counter()
        status = start(["--out", str(whole), *flags]).wait()
        seconds = time.perf_counter() - began
        assert status == 0, f"the run that nobody stops ended with {status}"
        loading = 6.0
        longest = loading + seconds / args.kills
        kills, lost = kill_and_resume(killed, flags, args.kills, longest)
        if not lost:
            lost = compare(whole, killed, args.steps)
    row = {
        "kills": kills,
        "steps": args.steps,
        "seed": args.seed,
        "lost": lost,
        "code": common.code_version(),
    }
    common.append_line(common.RESULTS / "torture.jsonl", row)
    print(json.dumps(row))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
