"""The demo's learning curve: `python treerpo.py` with several seeds -> results/demo.jsonl and a table.

    python experiments/demo_curve.py             # 5 seeds, one after the other, then the table
    python experiments/demo_curve.py --table     # the table from the stored lines

A finished seed is not run again. Each stored line is one evaluation row of a run's metrics.jsonl with seed, wall
and CPU seconds of the whole command, and the versions.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "demo.jsonl"


def run_seed(seed, threads):
    """One run of the demo's defaults -> its evaluation rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, HERE.parent / "treerpo.py", "--seed", str(seed), "--out", out], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = dict(wall_s=round(wall, 1),
                   cpu_s=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1))
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, machine=platform.machine(),
                    threads=threads)
    kept = ("step", "tokens_sampled", "completions/mean_length", "eval/accuracy", "eval/greedy_accuracy")
    return [dict(seed=seed, **{k: row[k] for k in kept if k in row}, **seconds, **versions)
            for row in rows if "eval/accuracy" in row]


def table(rows):
    print("| step | sampled tokens | held-out accuracy, sampled | greedy | lowest seed |\n|---|---|---|---|---|")
    for step in sorted({row["step"] for row in rows}):
        at = [row for row in rows if row["step"] == step]
        sampled, greedy = [r["eval/accuracy"] for r in at], [r["eval/greedy_accuracy"] for r in at]
        tokens = statistics.mean(r.get("tokens_sampled", 0) for r in at)
        spread = [statistics.stdev(x) if len(x) > 1 else 0 for x in (sampled, greedy)]
        print(f"| {step} | {tokens:,.0f} | {statistics.mean(sampled):.3f} +- {spread[0]:.3f} | "
              f"{statistics.mean(greedy):.3f} +- {spread[1]:.3f} | {min(sampled):.3f} |")
    ends = [row for row in rows if row["step"] == 0]
    for key in ("wall_s", "cpu_s"):
        print(f"{key}: {min(r[key] for r in ends)} to {max(r[key] for r in ends)} over {len(ends)} seeds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, exclusive (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run (default 2)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for seed in range(0 if args.table else args.seeds):
        if seed not in {row["seed"] for row in rows}:
            new = run_seed(seed, args.threads)
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
    table(rows)


if __name__ == "__main__":
    main()
