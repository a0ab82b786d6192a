"""Speed and memory against what one would run instead. One process an arm, arms alternating, raw lines kept.

    python experiments/bench.py --quick        # about two minutes, to see that it runs
    python experiments/bench.py                # everything, about an hour on one core
    python experiments/bench.py --sections trl --trl-python .venv_trl/bin/python     # where `pip install trl` was run
    python experiments/bench.py --sections sampling update step --model runs/random-1.5b --memory-cap 80    # on a GPU
    python experiments/bench.py --table        # print the newest results again

Time is CPU seconds of one thread on a CPU, wall time on a GPU, the fastest of up to three runs in a process. Memory is
the peak above the idle process on a CPU, and all that was allocated, weights included, on a GPU. No rollout ends early,
so that every arm does the same work. A ratio is arm / first arm of the same repeat: median (smallest-largest).
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BASE = dict(hidden=128, layers=4, vocab=2000, model=None, branching=[4, 4, 4], step=32, prompt=64, questions=1,
            max_rows=512, pack_len=1024, row_tokens=1024)  # row_tokens: of a micro-batch of plain rows
SECTIONS = ["sampling", "update", "trl", "scaling", "step"]
NOTES = ["memory ratio", "forwarded", "unique", "grad norm", "overhead %", "sample s", "x bandwidth limit"]

def case(section, name, arms, bars=None, quick=False, **shape):
    """bars: {arm: (field, limit)}; a ratio (to the first arm) must be at least its limit, any other field at most."""
    return dict(section=section, name=name, arms=arms.split(), bars=bars or {}, quick=quick, shape={**BASE, **shape})

def all_cases():
    n8, wide = dict(branching=[8, 8, 8]), dict(hidden=768, layers=12)
    sampling, update = "tree depth_1 recompute independent", "packed leaf_rows node_rows"
    yield case("sampling", "4 x 128, branching 4 4 4", sampling, quick=True)
    bars = dict(recompute=("ratio", 2), independent=("ratio", 2.5))
    yield case("sampling", "4 x 128, branching 8 8 8", sampling, bars, **n8)
    yield case("sampling", "12 x 768, branching 4 4 4", sampling, **wide)
    yield case("sampling", "12 x 768, branching 8 8 8", "tree recompute independent", bars, **n8, **wide)
    yield case("update", "4 x 128, branching 4 4 4", update, dict(leaf_rows=("ratio", 2)), quick=True, pack_len=512)
    yield case("update", "12 x 768, branching 4 4 4", update, **wide)
    yield case("update", "8 8 8, prompt 200, step 384, --pack-len 4096, counted",
               "count count_leaf_rows count_node_rows", dict(count=("forwarded", 1.2)), quick=True,
               step=384, prompt=200, pack_len=4096, **n8)
    for prompt, limit in ((32, 1.6), (256, 3)):
        yield case("trl", f"2 prompts of {prompt}, 64 leaves, 96 tokens", "step trl", dict(trl=("ratio", limit)),
                   quick=prompt == 32, prompt=prompt, questions=2, row_tokens=16 * (prompt + 96))
    base, both = "step 16, 64 leaves", "tree packed"
    for branching in ([4, 4], [2, 4, 4], [4, 4, 4], [8, 4, 4], [8, 8, 4], [8, 8, 8]):
        yield case("scaling", f"{math.prod(branching)} leaves, step 16", both, branching=branching, step=16)
    for name, key, values, arms, shape in (
            ("step {}, 64 leaves", "step", (16, 32, 64, 128), both, {}),
            ("{} questions, " + base, "questions", (1, 2, 4, 8), both, dict(step=16)),
            ("vocabulary {:,}, " + base, "vocab", (2000, 32000, 151936), both, dict(step=16)),
            ("--max-rows {}, 512 leaves", "max_rows", (512, 128, 32), "tree", n8),
            ("--pack-len {}, 512 leaves", "pack_len", (512, 1024, 2048, 4096), "packed", n8)):
        for value in values:
            yield case("scaling", name.format(value), arms, **{**shape, key: value})
    yield case("scaling", "vocabulary 151,936, update of 4,000 tokens", "packed full_logits",
               dict(full_logits=("memory ratio", 3)), vocab=151936, step=47, pack_len=4096)
    bar = dict(overhead=("overhead %", 5))
    yield case("step", "4 x 128, 2 questions, 64 leaves", "overhead", bar, quick=True, questions=2)
    yield case("step", "bundled demo, 32 questions, 32 leaves", "overhead", bar, model="demo/model", questions=32,
               branching=[4, 2, 2, 2], step=14, max_rows=2048, pack_len=512)

def spawn(job, python):
    """-> the arm's row, or {"error": its last words}."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, HERE / "bench_arms.py", json.dumps(job)], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return dict(error=(done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200])

def spread(values):
    middle, low, high = (f"{f(values):.3g}" for f in (statistics.median, min, max)) if values else ("",) * 3
    return middle if low == high else f"{middle} ({low}-{high})"

def print_table(path, quick):
    """Markdown, from the raw lines alone: of each case, on each device and memory cap, its newest run."""
    cases = {}
    for row in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        if row["quick"] == quick:
            key = row["device"], row["memory_cap"], row["section"], row["case"]
            cases.setdefault(key, {}).setdefault(row["run"], []).append(row)
    print("| device | section | case | arm | seconds | ratio | MiB | more | bar |\n" + "|---" * 9 + "|")
    for (_, cap, section, name), runs in cases.items():
        rows = runs[max(runs)]
        hardware = next((row["hardware"] for row in rows if "hardware" in row), "?") + f", cap {cap} GB" * bool(cap)
        first = {row["repeat"]: row for row in rows if row["arm"] == row["first"]}
        for arm in dict.fromkeys(row["arm"] for row in rows):
            mine = [row for row in rows if row["arm"] == arm]
            values = {field: [row[field] for row in mine if field in row] for field in ("seconds", "memory", *NOTES)}
            for ratio, field in (("ratio", "seconds"), ("memory ratio", "memory")):
                pairs = [(row, first[row["repeat"]]) for row in mine if arm != row["first"] and row["repeat"] in first]
                values[ratio] = [row[field] / base[field] for row, base in pairs if field in row and base.get(field)]
            field, limit = mine[0]["bar"] or ("", 0)
            sign, verdict = 1 if "ratio" in field else -1, ""
            if values.get(field):
                met = sign * statistics.median(values[field]) >= sign * limit
                verdict = f"{field} {'>=' if sign > 0 else '<='} {limit}: {'met' if met else 'MISSED'}"
            more = [f"{note} {spread(values[note])}" for note in NOTES if values[note]]
            more += [row["error"].replace("|", "/") for row in mine if "error" in row][:1]
            print("|", " | ".join([hardware, section, name, arm, spread(values["seconds"]), spread(values["ratio"]),
                                   spread(values["memory"]), "; ".join(more), verdict]), "|")
    if not any(device == "cuda" for device, *_ in cases):
        print("| NVIDIA GPU | all | all | all | not measured | | | | |")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS, help="default: all")
    what.add_argument("--cases", default="", help="only cases whose name holds this text")
    what.add_argument("--repeats", type=int, default=3, help="processes an arm (default 3)")
    what.add_argument("--quick", action="store_true", help="the small cases, once; kept apart from full runs")
    own = parser.add_argument_group("one case of your own, in sampling, update and step, with --model")
    own.add_argument("--model", help="a checkpoint folder")
    own.add_argument("--branching", nargs="+", type=int, default=[8, 8, 8], help="default 8 8 8")
    for name, default in dict(step=384, prompt=200, questions=1, max_rows=512, pack_len=4096, row_tokens=4096).items():
        own.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=f"default {default}")
    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    where.add_argument("--memory-cap", type=float, help="GB of GPU memory a process may take")
    where.add_argument("--trl-python", default=sys.executable, help="interpreter with trl (default: this one)")
    where.add_argument("--results", type=Path, default=HERE / "results/bench.jsonl", help="raw lines, appended")
    where.add_argument("--table", action="store_true", help="only print the table of the raw lines")
    args = parser.parse_args()
    if args.table:
        return print_table(args.results, args.quick)
    if args.device == "auto":
        found = [sys.executable, "-c", "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"]
        args.device = subprocess.run(found, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    cases = list(all_cases())
    if args.model:
        shape = {key: value for key, value in vars(args).items() if key in BASE}
        name = ", ".join(f"{key} {value}" for key, value in shape.items()).replace(args.model, Path(args.model).name)
        cases = [case(section, name, arms, **shape) for section, arms in
                 dict(sampling="tree depth_1", update="packed leaf_rows", step="overhead").items()]
    cases = [one for one in cases if one["section"] in args.sections and args.cases in one["name"]
             and (one["quick"] or not args.quick)]
    if any(one["section"] == "trl" for one in cases) and subprocess.run([args.trl_python, "-c", "import trl"],
                                                                        stderr=subprocess.DEVNULL).returncode:
        print(f"section trl is left out: {args.trl_python} cannot import trl; pip install it, or give --trl-python")
        cases = [one for one in cases if one["section"] != "trl"]
    jobs = [(one, arm, repeat) for one in cases for repeat in range(1 if args.quick else args.repeats)
            for arm in one["arms"][::-1 if repeat % 2 else 1]]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    run, bar = datetime.now().strftime("%Y-%m-%d %H:%M:%S"), tqdm(jobs, unit="process")
    for one, arm, repeat in bar:
        bar.set_postfix_str(f"{one['section']}: {one['name']}: {arm}")
        row = dict(run=run, section=one["section"], case=one["name"], arm=arm, repeat=repeat, first=one["arms"][0],
                   bar=one["bars"].get(arm), quick=args.quick, device=args.device, memory_cap=args.memory_cap,
                   threads=1, shape=one["shape"])
        row |= spawn(row, args.trl_python if one["section"] == "trl" else sys.executable)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print_table(args.results, args.quick)

if __name__ == "__main__":
    main()
