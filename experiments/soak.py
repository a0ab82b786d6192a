"""A long demo run with many evaluations and checkpoints: does memory stay flat, do warnings pile up?

    python experiments/soak.py    # 200 steps, about 5 minutes of one core -> results/soak.jsonl

Resident memory is read from outside four times a second (Linux). Its mean over the last quarter of
the steps must be within 5 % of that over the second quarter, else the exit status is 1. Lines of the
error stream that name a warning or an error are counted.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common


def resident_bytes(pid: int) -> int:
    """0 once the process has ended."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def steps_done(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    return max(0, metrics.read_bytes().count(b"\n") - 1)  # the first line is step 0


def watch(process: subprocess.Popen, metrics: Path) -> list[tuple[int, int]]:
    """-> (steps done, resident bytes), four times a second until it ends."""
    samples = []
    shown = 0
    while process.poll() is None:
        step = steps_done(metrics)
        memory = resident_bytes(process.pid)
        if step > 0 and memory > 0:
            samples.append((step, memory))
        if step >= shown + 20:
            shown = step
            print(f"step {step}: {memory / 1e6:.0f} MB", flush=True)
        time.sleep(0.25)
    return samples


def mean_mb(samples: list[tuple[int, int]], first: float, last: float) -> float:
    """Over the samples of the steps behind `first` up to `last`."""
    return statistics.fmean(memory for step, memory in samples if first < step <= last) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        errors = Path(folder) / "errors"
        flags = ["--steps", str(args.steps), "--eval-every", "20", "--save-every", "20"]
        flags += ["--eval-questions", "64", "--out", str(out)]
        with errors.open("wb") as error_file:
            process = subprocess.Popen(
                [sys.executable, str(common.ROOT / "treerpo.py"), *flags],
                stdout=subprocess.DEVNULL,
                stderr=error_file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            samples = watch(process, out / "metrics.jsonl")
        lines = re.split(r"[\r\n]+", errors.read_text("utf-8", "replace"))
        files = sorted(path.name for path in out.iterdir())
    warnings = [line for line in lines if re.search("warn|deprecat|error", line, re.I)]
    second_quarter = mean_mb(samples, args.steps / 4, args.steps / 2)
    last_quarter = mean_mb(samples, args.steps * 3 / 4, args.steps)
    growth = last_quarter / second_quarter - 1
    row = {
        "steps": args.steps,
        "status": process.returncode,
        "second_quarter_mb": round(second_quarter, 1),
        "last_quarter_mb": round(last_quarter, 1),
        "growth_percent": round(100 * growth, 2),
        "warnings": warnings[:3],
        "files": files,
        "code": common.code_version(),
    }
    common.append_line(common.RESULTS / "soak.jsonl", row)
    print(json.dumps(row))
    return int(process.returncode != 0 or abs(growth) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
