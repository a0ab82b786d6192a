"""Kills demo training at random instants, resumes it each time, and compares with a run that was never stopped.

    python experiments/torture.py --kills 50     # -> a summary line in results/torture.jsonl, exit status 1 on any loss

Checked after every kill: a whole checkpoint is on disk once the first was written. Checked at the end: identical
weights, identical metrics but for timings and memory, no lost or doubled line, no temporary file.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import treerpo  # noqa: E402

TIMINGS = ("tok_per_s", "time_sample", "time_score", "time_update", "peak_mem_gb")


def start(*flags):
    return subprocess.Popen([sys.executable, HERE.parent / "treerpo.py", *map(str, flags)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default 50)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the run (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default 0)")
    args = parser.parse_args()
    flags = ["--steps", args.steps, "--save-every", 1, "--eval-every", 20, "--eval-questions", 16, "--eval-samples", 2,
             "--questions-per-step", 8, "--keep", 2]
    draw, kills, without, lost = random.Random(args.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        began = time.perf_counter()
        assert start("--out", whole, *flags).wait() == 0
        seconds = time.perf_counter() - began
        bar = tqdm(total=args.kills, desc="kills")
        while True:
            begun = (out / "config.json").exists()
            process = start("--resume", out) if begun else start("--out", out, *flags)
            # until the last kill, stop anywhere from the first import to well into the training
            limit = draw.uniform(0, 6 + 2 * seconds / args.kills) if kills < args.kills else 600
            try:
                status = process.wait(limit)
                if status:
                    lost.append(f"resume {kills} exited with {status}")
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                bar.update()
                folders = treerpo.checkpoints(out)
                without += not folders
                if folders and not treerpo.newest_checkpoint(out):
                    lost.append(f"no whole checkpoint after kill {kills}")
        a, b = (load_file(run / f"checkpoint-{args.steps}" / "model.safetensors") for run in (whole, out))
        if any(not a[k].equal(b[k]) for k in a):
            lost.append("weights differ")
        if metrics(whole) != metrics(out):
            lost.append("metrics differ")
        names = {p.name for p in whole.iterdir()} ^ {p.name for p in out.iterdir()}
        if names:
            lost.append(f"files differ: {sorted(names)}")
    row = dict(kills=kills, steps=args.steps, seed=args.seed, kills_before_first_checkpoint=without, lost=lost)
    with open(HERE / "results" / "torture.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
