"""A score that others can reproduce: benchmarks with standard errors, paired differences and the whole protocol.

    python eval.py                               # bundled held-out questions: the bundled model against the newest run
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --benchmarks math500 olympiadbench minerva aime24 amc23
    python eval.py --model Qwen/Qwen2.5-Math-1.5B runs/NAME --benchmarks math500 --max-rows 128    # before and after
    python eval.py --model runs/NAME --benchmarks aime24 --samples 32 --temperature 0.6

Prompts, sampling and grading are treerpo.py's own. Every figure has its standard error over problems; more of A - B than
chance gives in 5 % of cases is beyond the noise, the rest inside it.
  pass@1, avg@k    share of right answers: one answer to a problem, or the mean over k of them
  pass@j, maj@k    chance that one of j answers is right, unbiased, from the k there are; whether the most frequent is
  response tokens  mean length of an answer, its end token included
  truncated        share of answers without an end token; a prompt too long for the context counts here, and as wrong
  no box           share of answers without a closed \\boxed{}

OUT/MODEL-BENCHMARK/ gets problems.jsonl, a line for every problem, and summary.json, the figures and the protocol. After
a kill the same command goes on where it stopped and ends in the same files and the same table.

Flags: type, default (- none), meaning. This table is what the parser reads.
what is compared
  --model            list   -  hub ids, model folders, runs (newest whole checkpoint); without: bundled model, newest run
  --benchmarks       list   demo  demo, math500, olympiadbench, minerva, aime24, amc23, gsm8k or data files
  --limit            count  -  only the first so many problems of each benchmark
  --question-column  str    -  of a data file (.jsonl, .json, .parquet), if not found by its usual names
  --answer-column    str    -  of a data file, if not found by its usual names
how answers are made
  --template         str    -  qwen-math (if the tokenizer knows <|im_end|>), none (else), chat, or a text file
  --samples          count  1  k, answers to a problem
  --temperature      float  0  0 is greedy decoding; above it no top-k and no top-p cuts the distribution
  --max-new-tokens   count  -  of an answer; without: 3072, or 3/4 of the context if that is less; demo 64
  --seed             int    0  of sampling; every batch has a random stream of its own
speed and output
  --max-rows         count  256  answers made at a time; bounds the KV cache
  --device           auto|cpu|cuda  auto  where to run
  --dtype            auto|float32|bfloat16  auto  bfloat16 on CUDA, float32 on a CPU
  --out              str    -  output folder; without: evals, and there a folder of its own for every other protocol
Exit status: 0 done, 1 out of memory or a hub benchmark is missing (the others ran), 2 bad input, 130 interrupted.
"""
import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm

from treerpo import (BadInput, above_zero, append_jsonl, build_prompt, extract_boxed, grade, is_equiv, load_model,
                     load_questions, load_template, make_decoding, newest_checkpoint, require, sample_trees)

HERE = Path(__file__).resolve().parent
BENCHMARKS = {  # name: data file or hub ID:CONFIG:SPLIT, column of the question, column of the answer
    "demo": (f"{HERE}/demo/test.jsonl", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500::test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath::test", "question", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024::train", "problem", "answer"),
    "amc23": ("math-ai/amc23::test", "question", "answer"),
    "gsm8k": ("openai/gsm8k:main:test", "question", "answer")}

# ------------------------------------------------------------------------------------------------- figures of a model

def pass_at_k(n, c, k):
    """Chance that one of k samples is right, if c of n are: 1 - C(n-c, k) / C(n, k), the share of all k-subsets of the
    samples that hold a right one. Unbiased (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(answers, correct):
    """Verdict, 0 or 1, on the most frequent of a problem's answers; of a tie the one seen first; 0 without answers.

    answers [k]: contents of the boxes, None does not vote; correct [k]: 0 or 1. is_equiv adds up 1/2 and 0.5.
    """
    counts = Counter(filter(None, answers))
    votes = {a: sum(n for b, n in counts.items() if is_equiv(a, b)) for a in counts}
    return correct[answers.index(max(votes, key=votes.get))] if votes else 0

def figures(rows):
    """Lines of problems.jsonl, n problems with k answers each -> {figure: [n] values, shares in percent}, score first."""
    k, right = len(rows[0]["correct"]), [sum(row["correct"]) for row in rows]
    values = {f"avg@{k}" if k > 1 else "pass@1": [100 * c / k for c in right]}
    if k > 1:
        for j in sorted({2 ** i for i in range(1, k.bit_length())} | {k}):
            values[f"pass@{j}"] = [100 * pass_at_k(k, c, j) for c in right]
        values[f"maj@{k}"] = [100 * majority(row["extracted"], row["correct"]) for row in rows]
    return {**values, "response tokens": [sum(row["tokens"]) / k for row in rows],
            "truncated": [100 * sum(row["truncated"]) / k for row in rows],
            "no box": [100 * row["extracted"].count(None) / k for row in rows]}

# --------------------------------------------------------------------------------------------------- noise and tables

def mean_se(values):
    """[n] -> (mean, its standard error sqrt(s^2 / n), s^2 over n - 1; not a number for a single value)."""
    n, mean = len(values), math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan

def sign_flip_p(differences):
    """Exact two-sided paired test. differences [n]: whole numbers, right answers of one model minus the other's.

    Were the models equal, each difference would be as likely with the other sign: p is the share of all 2^n choices of
    signs whose sum lies as far from 0. With one answer a problem this is McNemar's exact test (the sign test); with k it
    stays exact, however few the problems. Adds them one by one: chance[reach + s] is the probability of the sum s.
    """
    sizes = [abs(d) for d in differences if d]
    sums = torch.arange(-sum(sizes), sum(sizes) + 1)
    chance = (sums == 0).double()
    for size in sizes:
        chance = (chance.roll(size) + chance.roll(-size)) / 2
    return min(1.0, chance[sums.abs() >= abs(sum(differences))].sum().item())

def side_by_side(models):
    """figures() of m models, same problems -> {figure: [2m - 1] (mean, standard error)}: each model's, then those of
    each later model minus the first, problem by problem."""
    table = {}
    for name in models[0]:
        first, *others = [values[name] for values in models]
        table[name] = [mean_se(v) for v in (first, *others, *([b - a for a, b in zip(first, v)] for v in others))]
    return table

def average(tables):
    """side_by_side() of each benchmark -> their plain mean; the errors of different benchmarks are independent."""
    return {name: [(math.fsum(m for m, _ in cells) / len(cells), math.hypot(*(se for _, se in cells)) / len(cells))
                   for cells in zip(*(table[name] for table in tables))] for name in tables[0]}

def render(title, table):
    """side_by_side() -> aligned lines of text; the models are A, B, C, and so on."""
    letters = [chr(ord("A") + i) for i in range(len(table["no box"]) // 2 + 1)]
    lines = [[title, *letters, *(f"{letter} - A" for letter in letters[1:])]]
    for name, cells in table.items():
        signs = [""] * len(letters) + ["+"] * (len(letters) - 1)
        texts = [f"{m:{sign}.1f}" + f" ± {se:.1f}" * (se == se) for sign, (m, se) in zip(signs, cells)]
        lines.append([f"  {name}" + ", %" * (name != "response tokens"), *texts])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]

def verdicts(models, table, k):
    """A line for each later model: is what it gains or loses in score, and in length, more than noise?"""
    lines, score, says = [], next(iter(table)), {True: "inside the noise", False: "beyond the noise"}
    for i, values in enumerate(models[1:], 1):
        p = sign_flip_p([round((b - a) * k / 100) for a, b in zip(models[0][score], values[score])])
        longer, se = table["response tokens"][len(models) + i - 1]
        lines.append(f"  {chr(ord('A') + i)} - A: {score} {says[p >= 0.05]} (exact paired sign-flip test, p = {p:.2g}), "
                     f"length {says[not abs(longer) > 1.96 * se]} (1.96 standard errors)")
    return lines

# ------------------------------------------------------------------------------------ one model on one benchmark: a job

def sha(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

def revision(name, model):
    """Commit of a hub model; of a folder a SHA-256 over its files, the optimiser's aside."""
    files = [path for path in sorted(Path(name).glob("*")) if path.is_file() and path.name != "trainer_state.pt"]
    return getattr(model.config, "_commit_hash", None) or sha(
        *(path.name + hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files))

def write_summary(folder, protocol, results):
    (folder / "summary.tmp").write_text(json.dumps(dict(protocol=protocol, results=results), indent=1) + "\n")
    (folder / "summary.tmp").replace(folder / "summary.json")  # whole at any moment

def make_job(name, model, tokenizer, benchmark, questions, args):
    """Build the prompts, fix the protocol, open the folder. -> all that run_job needs. Raises BadInput."""
    context, template = model.config.max_position_embeddings, load_template(args.template, tokenizer)
    budget = args.max_new_tokens or (64 if benchmark == "demo" else min(3072, context * 3 // 4))
    questions = [{**q, "prompt": build_prompt(q["question"], template, tokenizer)} for q in questions]
    fit = {q["id"] for q in questions if 0 < len(q["prompt"]) <= context - budget}
    require(fit, f"--max-new-tokens {budget}: no prompt of {benchmark} fits with it into {name}'s context of {context}")
    decoding = make_decoding(model, tokenizer, args.temperature, args.max_rows)
    protocol = dict(
        model=shown(name), revision=revision(name, model), benchmark=shown(benchmark), problems=len(questions),
        prompts_too_long=len(questions) - len(fit), dataset=shown(BENCHMARKS.get(benchmark, [benchmark])[0]),
        fingerprint=sha(*(json.dumps([q["question"], q["answer"]]) for q in questions)),
        template=tokenizer.chat_template if template == "chat" else template, max_new_tokens=budget,
        samples=args.samples, temperature=args.temperature, decoding="sampled" if args.temperature else "greedy",
        seed=args.seed, max_rows=args.max_rows, eos_ids=list(decoding.eos_ids), vocabulary=decoding.n_tokens,
        dtype=args.dtype, device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__,
        code=sha(*((HERE / file).read_text("utf-8") for file in ("eval.py", "treerpo.py"))))
    fixed = {key: value for key, value in protocol.items() if key != "max_rows" or args.temperature}
    slug = re.sub(r"[^\w.]+", "-", f"{shown(name)}-{Path(benchmark).stem}")[-100:].strip("-.")
    folder = Path(args.out) / slug if args.out else Path("evals") / f"{slug}-{sha(json.dumps(fixed))[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    saved = json.loads(path.read_bytes()) if path.exists() else dict(protocol=protocol, results=None)
    for key, new in fixed.items():
        old = saved["protocol"].get(key)
        require(old == new, f"--out: {folder} has answers with {key} {old!r:.60}, not {new!r:.60}; choose another --out")
    write_summary(folder, protocol, saved["results"])
    return SimpleNamespace(model=model, tokenizer=tokenizer, questions=questions, fit=fit, decoding=decoding,
                           protocol=protocol, folder=folder)

def answered(path, order, width):
    """The lines that a killed run left, whole batches only; the file is cut to them.

    order: the problems as they are answered, width of them to a batch. Only the last batch can be torn. It is done again
    as a whole, from its own seed: a sample depends on the rows beside it, so only thus does it come out the same.
    """
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith(b"}\n")]
    same = next((i for i, (row, q) in enumerate(zip(rows, order)) if row["id"] != q["id"]), min(len(rows), len(order)))
    whole = same if same == len(order) else same // width * width
    with path.open("ab") as file:
        file.truncate(sum(map(len, lines[:whole])))
    return rows[:whole]

def answer(job, batch):
    """k answers to each problem of a batch, made in one call and graded. -> their lines of problems.jsonl."""
    k, fit = job.protocol["samples"], [q for q in batch if q["id"] in job.fit]
    prompts, budget = [q["prompt"] for q in fit], job.protocol["max_new_tokens"]
    trees = sample_trees(job.model, prompts, [k], [budget], job.decoding) if fit else []
    graded = ((text, extract_boxed(text), int(leaf.reward), len(leaf.tokens), not leaf.done)
              for leaf, text in zip(*grade(trees, fit, job.tokenizer)))
    rows, names = [], ("outputs", "extracted", "correct", "tokens", "truncated")
    for q in batch:
        answers = [next(graded) if q["id"] in job.fit else ("", None, 0, 0, True) for _ in range(k)]
        rows.append(dict(id=q["id"], question=q["question"], gold=q["answer"], **dict(zip(names, zip(*answers)))))
    return rows

def run_job(job):
    """Answer what is not answered yet, write the summary. -> figures(), problems in the order of the data."""
    k, order = job.protocol["samples"], sorted(job.questions, key=lambda q: (-len(q["prompt"]), q["id"]))  # longest first
    width, path = max(1, job.decoding.max_rows // k), job.folder / "problems.jsonl"
    rows, tokens, start = answered(path, order, width), 0, time.perf_counter()
    with tqdm(total=len(order), initial=len(rows), desc=job.folder.name) as bar:
        for i in range(len(rows), len(order), width):
            batch = order[i:i + width]
            torch.manual_seed(int(sha(str(job.protocol["seed"]), *(q["question"] for q in batch))[:15], 16))
            rows += answer(job, batch)
            append_jsonl(path, rows[i:])
            tokens += sum(sum(row["tokens"]) for row in rows[i:])
            score = sum(sum(row["correct"]) for row in rows) / len(rows) / k
            bar.set_postfix_str(f"score {score:.1%}, {tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(batch))
    values = figures(sorted(rows, key=lambda row: row["id"]))
    results = {name: [m, se if se == se else None] for name, (m, se) in zip(values, map(mean_se, values.values()))}
    write_summary(job.folder, job.protocol, results)  # {figure: [mean, standard error]}
    return values

# ---------------------------------------------------------------------------------------------------------------- main

def note(text):
    print("eval.py:", *text.split(), file=sys.stderr)  # one line, whatever an error message holds

def shown(name):
    return str(name).replace(f"{HERE}/", "")  # the bundled files are called the same wherever this folder lies

def parse_args(argv):
    """Command line -> namespace of all flags. Raises BadInput."""
    parser = argparse.ArgumentParser(prog="eval.py", usage="python eval.py [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = partial(require, False)
    for line in re.findall(r"^  (--.*)", __doc__, re.M):
        flag, kind, default, _ = re.split(" +", line, maxsplit=3)
        read = dict(count=above_zero(int), float=float, int=int).get(kind, str)
        value = None if default == "-" else [default] if kind == "list" else read(default)
        parser.add_argument(flag, help=argparse.SUPPRESS, type=read, default=value, nargs="+" if kind == "list" else None,
                            choices=kind.split("|") if "|" in kind else None)
    args = parser.parse_args(argv)
    require(0 <= args.temperature < math.inf, "--temperature must be 0 (greedy) or above")
    require(args.samples == 1 or args.temperature, "--samples above 1: greedy answers are all alike; add --temperature")
    for name in args.benchmarks:
        require(name in BENCHMARKS or Path(name).suffix in (".jsonl", ".json", ".parquet"), f"--benchmarks {name}: not one "
                f"of {', '.join(BENCHMARKS)} or a .jsonl, .json or .parquet file")
    cuda = torch.cuda.is_available()
    require(cuda or args.device != "cuda", "--device cuda: there is no CUDA GPU; use --device cpu")
    args.device = "cuda" if cuda and args.device != "cpu" else "cpu"
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if args.device == "cuda" else "float32"
    return args

def read_benchmarks(args):
    """-> ({benchmark: questions}, a message for each that is missing). Raises BadInput for a bad file, or if all are."""
    data, missing = {}, []
    for name in dict.fromkeys(args.benchmarks):
        source = BENCHMARKS.get(name, (name, args.question_column, args.answer_column))
        try:
            data[name] = load_questions(*source)[:args.limit]
        except BadInput as e:
            if Path(source[0]).suffix:  # a file; a hub benchmark that does not come need not stop the others
                raise
            missing.append(f"{name} is missing: {e}. --benchmarks takes a local copy of it, too")
    require(data, "; ".join(missing))
    return data, missing

def find_models(names):
    """--model -> list of what load_model takes: of a run its newest whole checkpoint. Raises BadInput."""
    if not names:
        runs = [folder for run in Path("runs").glob("*") if (folder := newest_checkpoint(run))]
        names = [HERE / "demo/model", *sorted(runs, key=lambda folder: folder.stat().st_mtime)[-1:]]
        if not runs:
            note("no run with a whole checkpoint under runs/: the bundled model alone")
    found = [newest_checkpoint(name) or name for name in names]
    for name in found:
        require(not (Path(name) / "metrics.jsonl").exists(), f"--model {name}: a run without a whole checkpoint")
    return [str(name) for name in found]

def evaluate(args):
    """Every model on every benchmark, then tables and protocol. -> exit status."""
    data, missing = read_benchmarks(args)
    for message in missing:
        note(message)
    names, jobs, values, tables = find_models(args.model), [], [], []
    for name in names:  # all of them before the first answer: a mistake shows at once
        _, model, tokenizer = load_model(name, "cpu", args.dtype)
        jobs.append([make_job(name, model, tokenizer, benchmark, data[benchmark], args) for benchmark in data])
    for row in jobs:
        model = row[0].model.to(args.device)
        values.append([run_job(job) for job in row])
        model.to("cpu")  # room for the next
    lines = [f"{chr(ord('A') + i)} = {shown(name)}" for i, name in enumerate(names)]
    for benchmark, models in zip(data, zip(*values)):
        tables.append(side_by_side(models))
        title = f"{shown(benchmark)}, {len(data[benchmark])} problems"
        lines += ["", *render(title, tables[-1]), *verdicts(models, tables[-1], args.samples)]
    lines += ["", *render(f"mean of {len(tables)} benchmarks", average(tables))] if len(tables) > 1 else []
    flat = [job for row in jobs for job in row]
    shared = {key: v for key, v in flat[0].protocol.items() if all(job.protocol[key] == v for job in flat)}
    lines += ["", "protocol", *(f"  {key}: {json.dumps(v)}" for key, v in shared.items())]
    for job in flat:
        own = [f"{key}: {json.dumps(v)}" for key, v in job.protocol.items() if key not in shared]
        lines.append("  " + ", ".join([f"answers: {job.folder}", *own]))
    print("\n".join(lines))
    return 1 if missing else 0

def main(argv=None):
    try:
        return evaluate(parse_args(argv))
    except (BadInput, OSError) as e:  # OSError: an output folder that cannot be written, a full disk
        note(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        return 130
    except (RuntimeError, MemoryError) as e:
        require_memory = "memory" in f"{type(e).__name__} {e}".lower()
        if not require_memory:
            raise
        note(f"error: out of memory, lower --max-rows ({e!s:.200})")
        return 1

if __name__ == "__main__":
    sys.exit(main())
