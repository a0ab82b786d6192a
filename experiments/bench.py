"""Speed and memory on a CPU against what one would run instead. Raw lines are kept.

    git show e97722c:treerpo.py > first.py
    python experiments/bench.py --old first.py    # about 15 minutes of one core
    python experiments/bench.py --table                # the table of the newest run again

Without --old the first version of treerpo.py does not take part. bench_gpu.py is for a GPU. Sections:
  sampling   a tree from its KV cache, against plain `generate`: every level's prefix again, or as
             many independent answers
  update     one optimiser step on that tree in packs, against a row for each leaf's path
Each arm runs in a process of its own, the arms in turn, three times. A ratio is the seconds of an arm
over those of the first arm in the same turn: the table shows the median and, in brackets, the range.
Models have random weights; prompts have 64 tokens, steps 32.
"""
import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import common

common.use_one_thread()

from bench_arms import Case  # noqa: E402

FILE = common.RESULTS / "bench.jsonl"
OLD = "first version"


@dataclass
class Comparison:
    """bars: the least ratio of an arm to the first one."""
    section: str
    name: str
    arms: list[str]
    case: Case
    bars: dict[str, float] = field(default_factory=dict)


def comparisons() -> list[Comparison]:
    sampling = ["tree", "prefix again", "independent", OLD]
    update = ["packed", "row a leaf", OLD]
    wide_bars = {"prefix again": 2, "independent": 2.5, OLD: 1}
    update_bars = {"row a leaf": 2, OLD: 1}
    return [
        Comparison("sampling", "small, 4 4 4", sampling, Case(), {OLD: 1}),
        Comparison("update", "small, 4 4 4", update, Case(pack_len=512), update_bars),
        Comparison("sampling", "small, 8 8 8", sampling, Case(branching=(8, 8, 8)), wide_bars),
        Comparison("sampling", "medium, 4 4 4", sampling, Case(size="medium"), {OLD: 1}),
        Comparison("update", "medium, 4 4 4", update, Case(size="medium"), update_bars),
    ]


def run_arm(comparison: Comparison, arm: str, repeat: int, old: str | None) -> dict:
    """-> the arm's figures, or its last words as "error"."""
    job = {
        "section": comparison.section,
        "arm": arm,
        "repeat": repeat,
        "old": old,
        "case": dataclasses.asdict(comparison.case),
    }
    script = Path(__file__).with_name("bench_arms.py")
    command = [sys.executable, str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last_words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"error": last_words[-1][:200]}


def run_all(repeats: int, old: str | None, section: str | None) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    code = common.code_version()
    for comparison in comparisons():
        if section not in (None, comparison.section):
            continue
        arms = [arm for arm in comparison.arms if arm != OLD or old]
        for repeat in range(repeats):
            for arm in arms if repeat % 2 == 0 else reversed(arms):
                print(f"{comparison.section}: {comparison.name}: {arm}, turn {repeat + 1}", flush=True)
                line = {
                    "run": started,
                    "section": comparison.section,
                    "name": comparison.name,
                    "arm": arm,
                    "first": comparison.arms[0],
                    "bar": comparison.bars.get(arm),
                    "repeat": repeat,
                    **run_arm(comparison, arm, repeat, old),
                    "case": dataclasses.asdict(comparison.case),
                    "code": code,
                }
                common.append_line(FILE, line)


# ------------------------------------------------------------------------------------------- Table
def spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.median(values):.3g}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.3g} to {max(values):.3g})"


def ratios(lines: list[dict], first: list[dict]) -> list[float]:
    """The seconds of an arm over those of the first arm in the same turn."""
    base = {line["repeat"]: line["seconds"] for line in first if "seconds" in line}
    found = []
    for line in lines:
        if "seconds" in line and line["repeat"] in base:
            found.append(line["seconds"] / base[line["repeat"]])
    return found


def print_arm(lines: list[dict], first: list[dict]) -> None:
    line = lines[0]
    against = ratios(lines, first)
    verdict = ""
    if line["bar"] and against:
        met = statistics.median(against) >= line["bar"]
        verdict = f"at least {line['bar']}: {'met' if met else 'MISSED'}"
    seconds = [one["seconds"] for one in lines if "seconds" in one]
    peaks = [one["peak_mb"] for one in lines if "peak_mb" in one]
    norms = [f"{one['grad_norm']:.5g}" for one in lines if "grad_norm" in one]
    errors = [one["error"].replace("|", "/") for one in lines if "error" in one]
    cells = [
        line["section"],
        line["name"],
        line["arm"],
        spread(seconds),
        spread(against),
        f"{max(peaks):,.0f}" if peaks else "",
        ", ".join(norms + errors),
        verdict,
    ]
    print("| " + " | ".join(cells) + " |")


def print_table(lines: list[dict]) -> None:
    """Of every comparison its newest run."""
    newest = {}
    for line in lines:
        newest[line["section"], line["name"]] = line["run"]
    print("| section | case | arm | CPU seconds | ratio | peak MB | gradient norms | bar |")
    print("|" + "---|" * 8)
    for (section, name), run in newest.items():
        arms = {}
        for line in lines:
            if line["section"] == section and line["name"] == name and line["run"] == run:
                arms.setdefault(line["arm"], []).append(line)
        for arm_lines in arms.values():
            print_arm(arm_lines, arms[arm_lines[0]["first"]])
    machines = {f"{line['processor']}, torch {line['torch']}" for line in lines if "torch" in line}
    print("\n" + "; ".join(sorted(machines)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", help="a file with the first version of treerpo.py")
    parser.add_argument("--only", choices=["sampling", "update"], help="run this section alone")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        run_all(args.repeats, args.old, args.only)
    print_table(common.read_lines(FILE))


if __name__ == "__main__":
    main()
