"""The demo's learning curve: `python treerpo.py` with five seeds.

    python experiments/demo_curve.py            # runs the seeds that are not done yet, then the table
    python experiments/demo_curve.py --table    # only the table

A line of results/demo.jsonl is one evaluation of one run, with the CPU and wall seconds of the whole
command. To measure a seed again, take its lines out.
"""
import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

FILE = common.RESULTS / "demo.jsonl"
KEPT = (
    "step", "tokens_sampled", "completions/mean_length", "groups_kept", "grad_norm", "kl", "entropy",
    "eval/accuracy", "eval/greedy_accuracy",
)


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_seed(seed: int) -> list[dict]:
    """One run of the demo with its defaults -> its evaluations."""
    import torch
    import transformers
    code = common.code_version()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(common.ROOT / "treerpo.py"), "--seed", str(seed), "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        cpu = cpu_seconds_of_children()
        wall = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        seconds = {
            "cpu_s": round(cpu_seconds_of_children() - cpu, 1),
            "wall_s": round(time.perf_counter() - wall, 1),
        }
        metrics = common.read_lines(out / "metrics.jsonl")
    versions = {
        "code": code,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    rows = []
    for metric in metrics:
        if "eval/accuracy" in metric:
            values = {name: metric[name] for name in KEPT if name in metric}
            rows.append({"seed": seed, **values, **seconds, **versions})
    return rows


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def print_table(rows: list[dict]) -> None:
    """Mean and standard deviation over seeds."""
    print("| step | sampled tokens | held-out avg@8 | lowest seed | greedy | answer tokens |")
    print("|---|---|---|---|---|---|")
    for step in sorted({row["step"] for row in rows}):
        at_step = [row for row in rows if row["step"] == step]
        sampled = [row["eval/accuracy"] for row in at_step]
        greedy = [row["eval/greedy_accuracy"] for row in at_step]
        tokens = statistics.mean(row.get("tokens_sampled", 0) for row in at_step)
        lengths = [row["completions/mean_length"] for row in at_step if step > 0]
        length = f"{statistics.mean(lengths):.1f}" if lengths else ""
        print(
            f"| {step} | {tokens:,.0f} | {spread(sampled)} | {min(sampled):.3f} | {spread(greedy)} "
            f"| {length} |"
        )
    ends = [row for row in rows if row["step"] == 0]
    for name in ("cpu_s", "wall_s"):
        values = [row[name] for row in ends]
        print(f"{name} of a run: {min(values)} to {max(values)}, {len(values)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default 5)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    rows = common.read_lines(FILE)
    done = {row["seed"] for row in rows}
    for seed in range(args.seeds):
        if seed in done or args.table:
            continue
        for row in run_seed(seed):
            common.append_line(FILE, row)
    rows = common.read_lines(FILE)
    if rows:
        print_table(rows)


if __name__ == "__main__":
    main()
