"""500 steps of demo training with evaluations and checkpoints: does memory stay flat, do warnings pile up?

    python experiments/soak.py        # about 10 minutes on one core -> results/soak.jsonl; exit status 1 if not

Resident memory is read from outside four times a second (Linux); the mean of the last quarter must be within 5 % of the
second quarter's. Lines on stderr that are no progress bar are counted.
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

from tqdm import tqdm

HERE = Path(__file__).resolve().parent

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "run", Path(folder) / "stderr"
        command = [sys.executable, HERE.parent / "treerpo.py", "--out", out, "--steps", args.steps, "--eval-every", 25,
                   "--save-every", 25, "--eval-questions", 64]
        with errors.open("wb") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=file,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        memory, bar = [], tqdm(total=args.steps, desc="steps")  # memory: (step, resident bytes)
        while process.poll() is None:
            metrics = out / "metrics.jsonl"
            step = max(0, metrics.read_bytes().count(b"\n") - 1) if metrics.exists() else 0
            bar.update(step - bar.n)
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1] or 0)
            if step and pages:
                memory.append((step, pages * os.sysconf("SC_PAGE_SIZE")))
            time.sleep(0.25)
        quarters = [statistics.mean(m for step, m in memory if q < 4 * step / args.steps <= q + 1) for q in (1, 3)]
        lines = re.split(r"[\r\n]+", errors.read_text("utf-8", "replace"))
        warnings = [line for line in lines if re.search("warn|deprecat|error", line, re.I)]
        left = sorted(p.name for p in out.iterdir())
    growth = quarters[1] / quarters[0] - 1
    row = dict(steps=args.steps, status=process.returncode, second_quarter_mb=round(quarters[0] / 1e6, 1),
               last_quarter_mb=round(quarters[1] / 1e6, 1), growth_percent=round(100 * growth, 2),
               warnings=len(warnings), first_warning="".join(warnings[:1])[:200], files=left)
    with open(HERE / "results" / "soak.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return int(process.returncode != 0 or abs(growth) > 0.05)

if __name__ == "__main__":
    sys.exit(main())
