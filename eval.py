"""A score that others can reproduce: benchmarks with standard errors, paired differences and the whole protocol.

    python eval.py                               # bundled held-out questions: the bundled model against the newest run
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --benchmarks math500 olympiadbench minerva aime24 amc23
    python eval.py --model Qwen/Qwen2.5-Math-1.5B runs/NAME --benchmarks aime24 --samples 32 --temperature 0.6
Prompts, sampling and grading are treerpo.py's own; every figure has its standard error over problems. Later models are
compared with the first, problem by problem: inside the noise is what chance alone does in 5 % of cases or more.
  pass@1, avg@k    share of right answers: one to a problem, or the mean over k of them
  pass@j, maj@k    chance that one of j answers is right (unbiased, from k); whether the most frequent answer is
  response tokens  mean length of an answer, its end token included
  truncated        share of answers that met no end; prompts too long for the context count here, and as wrong
  no box           share of answers without a closed \\boxed{}
OUT/MODEL-BENCHMARK/ gets problems.jsonl, a line each, and summary.json, figures and protocol. After a kill the same
command goes on and ends in the same files and table. Flags (the parser reads them here): type, default, meaning.
what is compared
  --model            list   -  hub ids, model folders, runs (newest whole checkpoint); without: bundled and newest run
  --benchmarks       list   demo  of demo, math500, olympiadbench, minerva, aime24, amc23, gsm8k, or data files
  --limit            count  -  only the first so many problems of each
  --question-column  str    -  of a data file (.jsonl, .json, .parquet), if not found by its usual names
  --answer-column    str    -  of a data file, if not found by its usual names
how answers are made
  --template         str    -  qwen-math (if the tokenizer knows <|im_end|>), none (else), chat, or a text file
  --samples          count  1  k, answers to a problem
  --temperature      float  0  0 is greedy; above it all tokens are sampled from, without top-k and top-p
  --max-new-tokens   count  -  of an answer; without: 3072, or 3/4 of the context if that is less; demo 64
  --seed             int    0  of sampling; every batch has its own stream
speed and output
  --max-rows         count  256  answers made at a time; bounds the KV cache, the flag to lower when memory runs out
  --device           auto|cpu|cuda  auto  where to run
  --dtype            auto|float32|bfloat16  auto  bfloat16 on CUDA, else float32
  --out              str    -  output folder; without: evals, with a folder of its own for every protocol
Exit status: 0 done; 1 a hub benchmark is missing, the others ran; 2 bad input, full disk or memory; 130 interrupted.
"""
import argparse, hashlib, json, math, re, sys, textwrap, time
from collections import Counter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from treerpo import (HERE, BadInput, append_jsonl, build_prompt, extract_boxed, grade, is_equiv, load_model,
                     load_questions, load_template, make_decoding, newest_checkpoint, require, sample_trees)

BENCHMARKS = {  # name: data file or hub ID:CONFIG:SPLIT, column of the question, column of the answer
    "demo": (f"{HERE}/demo/test.jsonl", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500::test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath::test", "question", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024::train", "problem", "answer"),
    "amc23": ("math-ai/amc23::test", "question", "answer"),
    "gsm8k": ("openai/gsm8k:main:test", "question", "answer")}

# ------------------------------------------------------------------------------------------ figures, noise, differences
def pass_at_k(n, c, k):
    """Share of the k-subsets of n samples that hold one of c right ones; unbiased (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(answers, correct):
    """[k] boxes (None: has no vote) and their verdicts 0/1 -> that on the most frequent; of a tie on the first seen."""
    counts = Counter(filter(None, answers))
    votes = {a: sum(n for b, n in counts.items() if is_equiv(a, b)) for a in counts}
    return correct[answers.index(max(votes, key=votes.get))] if votes else 0

def figures(rows):
    """n lines of problems.jsonl, k answers each -> {figure: [n] values, shares in percent}, the score first."""
    k, right = len(rows[0]["correct"]), [sum(row["correct"]) for row in rows]
    values = {f"avg@{k}" if k > 1 else "pass@1": [100 * c / k for c in right]}
    for j in sorted({2 ** i for i in range(1, k.bit_length())} | {k} - {1}):
        values[f"pass@{j}"] = [100 * pass_at_k(k, c, j) for c in right]
    if k > 1:
        values[f"maj@{k}"] = [100 * majority(row["extracted"], row["correct"]) for row in rows]
    return {**values, "response tokens": [sum(row["tokens"]) / k for row in rows],
            "truncated": [100 * sum(row["truncated"]) / k for row in rows],
            "no box": [100 * row["extracted"].count(None) / k for row in rows]}

def mean_se(values):
    """[n] -> (mean, its standard error sqrt(s^2 / n), s^2 over n - 1; not a number for a single value)."""
    n, mean = len(values), math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan

def sign_flip_p(differences):
    """Exact two-sided paired test. differences [n]: right answers of one model minus the other's, whole numbers. Were
    the models equal, each would be as likely with the other sign: p is the share of all 2^n choices of signs whose sum
    is as far from 0. McNemar's exact test for one answer a problem, as exact for k. chance[i]: that of sums[i]."""
    sizes = [abs(d) for d in differences if d]
    sums = torch.arange(-sum(sizes), sum(sizes) + 1)
    chance = (sums == 0).double()
    for size in sizes:
        chance = (chance.roll(size) + chance.roll(-size)) / 2
    return min(1.0, chance[sums.abs() >= abs(sum(differences))].sum().item())

def side_by_side(models):
    """figures() of m models -> {figure: [2m - 1] (mean, standard error)}: of each, of each later minus the first."""
    first, *others = models
    gains = [{name: [b - a for a, b in zip(first[name], other[name])] for name in first} for other in others]
    return {name: [mean_se(values[name]) for values in (*models, *gains)] for name in first}

def average(tables):
    """side_by_side() of each benchmark -> their plain mean; errors of different benchmarks are independent."""
    return {name: [(math.fsum(m for m, _ in cells) / len(cells), math.hypot(*(se for _, se in cells)) / len(cells))
                   for cells in zip(*(table[name] for table in tables))] for name in tables[0]}

def render(title, table):
    """side_by_side() -> aligned lines of text; the models are A, B, C, and so on."""
    letters = [chr(ord("A") + i) for i in range(len(table["no box"]) // 2 + 1)]
    lines = [[title, *letters, *(f"{letter} - A" for letter in letters[1:])]]
    for name, cells in table.items():
        unit, digits = ("", 2) if name == "response tokens" else (", %", 1)
        lines.append([f"  {name}{unit}"])
        for i, (mean, se) in enumerate(cells):
            error = "" if math.isnan(se) else f" ± {se:.{digits}f}"
            lines[-1].append(f"{mean:{'+' * (i >= len(letters))}.{digits}f}" + error)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]

def verdict(letter, first, other, k):
    """Is what a model gains or loses against the first, in score and in length, more than noise? -> a line of text."""
    score, noise = next(iter(first)), {True: "inside the noise", False: "beyond the noise"}
    p = sign_flip_p([round((b - a) * k / 100) for a, b in zip(first[score], other[score])])
    longer, se = mean_se([b - a for a, b in zip(first["response tokens"], other["response tokens"])])
    return (f"  {letter} - A: {score} {noise[p >= 0.05]} (exact paired sign-flip test, p = {p:.2g}), "
            f"length {noise[not abs(longer) > 1.96 * se]} (1.96 standard errors)")

# ------------------------------------------------------------------------------------ one model on one benchmark: a job
def sha(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
def revision(name):
    """Commit of a hub model; of a folder a SHA-256 over its files, those of the optimiser aside."""
    files = [p for p in sorted(Path(name).glob("*")) if p.is_file() and p.name != "trainer_state.pt"]
    texts = [p.name + hashlib.file_digest(p.open("rb"), "sha256").hexdigest() for p in files]
    return sha(*texts) if files else Path(transformers.utils.cached_file(name, "config.json")).parent.name

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
        model=shown(name), revision=revision(name), benchmark=benchmark, problems=len(questions),
        dataset=shown(BENCHMARKS.get(benchmark, [benchmark])[0]), prompts_too_long=len(questions) - len(fit),
        fingerprint=sha(*(json.dumps([q["question"], q["answer"]]) for q in questions)), max_new_tokens=budget,
        template=template, samples=args.samples, seed=args.seed, max_rows=args.max_rows, dtype=args.dtype,
        decoding=f"temperature {args.temperature:g}" if args.temperature else "greedy", eos_ids=[*decoding.eos_ids],
        vocabulary=decoding.n_tokens, torch=torch.__version__, transformers=transformers.__version__,
        python=sys.version.split()[0], device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        code=sha(*((HERE / file).read_text("utf-8") for file in ("eval.py", "treerpo.py"))))
    exact = (args.device, args.dtype, args.temperature) == ("cpu", "float32", 0)  # else rounding depends on max_rows
    fixed = {key: value for key, value in protocol.items() if key != "max_rows" or not exact}
    slug = re.sub(r"[^\w.]+", "-", f"{shown(name)}-{Path(benchmark).with_suffix('')}")[-150:].strip("-.")
    folder = Path(args.out) / slug if args.out else Path("evals") / f"{slug}-{sha(json.dumps(fixed))[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    try:
        saved = json.loads(summary.read_bytes()) if summary.exists() else dict(protocol=protocol, results=None)
    except ValueError as e:
        raise BadInput(f"--out: {summary} cannot be read ({e}); remove its folder or choose another --out") from e
    for key, new in fixed.items():
        old = saved["protocol"].get(key)
        require(old == new, f"--out: {folder} has answers with {key} {old!r:.60}, not {new!r:.60}; choose another one")
    write_summary(folder, protocol, saved["results"])
    return argparse.Namespace(model=model, tokenizer=tokenizer, questions=questions, fit=fit, decoding=decoding,
                           k=args.samples, budget=budget, protocol=protocol, folder=folder)

def answered(path, order, width):
    """The lines that a killed run left of these problems, in whole batches of width; cuts the file to them. A torn
    batch is done again whole: samples depend on the rows beside them. So are two runs' lines that got mixed."""
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    fit = [line.startswith(b'{"id": %d,' % q["id"]) and line.endswith(b"}\n") for line, q in zip(lines, order)]
    whole = [*fit, False].index(False)
    lines = lines[:whole if whole == len(order) else whole // width * width]
    with path.open("ab") as file:
        file.truncate(sum(map(len, lines)))
    return list(map(json.loads, lines))

def answer(job, batch):
    """k answers to each problem of a batch, made in one call and graded. -> their lines of problems.jsonl."""
    fit, names = [q for q in batch if q["id"] in job.fit], ("outputs", "extracted", "correct", "tokens", "truncated")
    trees = sample_trees(job.model, [q["prompt"] for q in fit], [job.k], [job.budget], job.decoding) if fit else []
    graded = ((text, extract_boxed(text), int(leaf.reward), len(leaf.tokens), not leaf.done)
              for leaf, text in zip(*grade(trees, fit, job.tokenizer)))
    rows = [(q, [next(graded) if q["id"] in job.fit else ("", None, 0, 0, True) for _ in range(job.k)]) for q in batch]
    return [dict(id=q["id"], question=q["question"], gold=q["answer"], **dict(zip(names, map(list, zip(*answers)))))
            for q, answers in rows]

def run_job(job):
    """Answer what is not answered yet, write the summary. -> figures(), problems in the order of the data."""
    order = sorted(job.questions, key=lambda q: (-len(q["prompt"]), q["id"]))  # longest first: no late surprise
    width, path = max(1, job.decoding.max_rows // job.k), job.folder / "problems.jsonl"
    rows, tokens, start = answered(path, order, width), 0, time.perf_counter()
    with tqdm(total=len(order), initial=len(rows), desc=job.folder.name) as bar:
        for i in range(len(rows), len(order), width):
            batch = order[i:i + width]
            torch.manual_seed(int(sha(f"{job.protocol['seed']} {i}", *(q["question"] for q in batch))[:15], 16))
            rows += answer(job, batch)
            append_jsonl(path, rows[i:])
            tokens += sum(sum(row["tokens"]) for row in rows[i:])
            score = sum(sum(row["correct"]) for row in rows) / len(rows) / job.k
            bar.set_postfix_str(f"score {score:.1%}, {tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(batch))
    values = figures(sorted(rows, key=lambda row: row["id"]))  # the order that all models share
    pairs = {name: mean_se(column) for name, column in values.items()}
    write_summary(job.folder, job.protocol, {name: [m, se if se == se else None] for name, (m, se) in pairs.items()})
    return values

# ----------------------------------------------------------------------------------------------------------------- main
def note(text):
    print("eval.py:", *text.split(), file=sys.stderr)  # one line, whatever the message holds
def shown(name):
    return str(name).replace(f"{HERE}/", "")  # bundled files: one name wherever they lie

def parse_args(argv):
    """Command line -> namespace of all flags. Raises BadInput."""
    parser = argparse.ArgumentParser(prog="eval.py", usage="python eval.py [flags]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, message)
    for line in re.findall(r"^  (--.*)", __doc__, re.M):
        flag, kind, default, _ = re.split(" +", line, maxsplit=3)
        read = dict(count=int, float=float, int=int).get(kind, str)
        parser.add_argument(flag, help=argparse.SUPPRESS, type=read, nargs="+" if kind == "list" else None,
                            default=None if default == "-" else [default] if kind == "list" else read(default),
                            choices=kind.split("|") if "|" in kind else None)
    args, cuda = parser.parse_args(argv), torch.cuda.is_available()
    for name in ("limit", "samples", "max_new_tokens", "max_rows"):
        n = getattr(args, name)
        require(n is None or n > 0, f"--{name.replace('_', '-')}: {n} must be above zero")
    fine = args.temperature == 0 or 0.001 <= args.temperature < math.inf
    require(fine, f"--temperature {args.temperature}: give 0 for greedy, or 0.001 and more")
    require(args.samples == 1 or args.temperature, f"--samples {args.samples}: greedy is one; add --temperature")
    for name in args.benchmarks:
        require(name in BENCHMARKS or Path(name).suffix in (".jsonl", ".json", ".parquet"),
                f"--benchmarks {name}: not one of {', '.join(BENCHMARKS)} or a .jsonl, .json or .parquet file")
    require(cuda or args.device != "cuda", "--device cuda: there is no CUDA GPU; use --device cpu")
    args.device = "cuda" if cuda and args.device != "cpu" else "cpu"
    args.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if args.device == "cuda" else "float32"
    return args

def read_benchmarks(args):
    """-> {benchmark: questions}; a hub benchmark that cannot be read is named and left out. Raises BadInput."""
    data = {}
    for name in args.benchmarks:
        try:
            columns = BENCHMARKS.get(name, (name, args.question_column, args.answer_column))
            data[name] = load_questions(*columns, skip_unanswered=True)  # their number is printed
        except BadInput as e:
            if name == "demo" or name not in BENCHMARKS:
                raise
            note(f"{name} is missing: {e}. A local copy does, too: --benchmarks {name}.jsonl")
    return {name: questions[:args.limit] for name, questions in data.items()}

def find_models(names):
    """--model -> list of what load_model takes: of a run its newest whole checkpoint."""
    runs = sorted(filter(None, map(newest_checkpoint, Path("runs").glob("*"))), key=lambda run: run.stat().st_mtime)
    return [str(newest_checkpoint(name) or name) for name in names or [HERE / "demo/model", *runs[-1:]]]

def evaluate(args):
    """Every model on every benchmark, then the tables and the protocols. -> exit status."""
    data = read_benchmarks(args)
    names, jobs, values, tables = find_models(args.model) if data else [], [], [], []
    for name in names:  # all before the first answer: a mistake shows at once
        require(not (Path(name) / "metrics.jsonl").exists(), f"--model {name}: a run without a whole checkpoint")
        _, model, tokenizer = load_model(name, "cpu", args.dtype)
        jobs.append([make_job(name, model, tokenizer, benchmark, data[benchmark], args) for benchmark in data])
    for row in jobs:
        row[0].model.to(args.device)
        values.append([run_job(job) for job in row])
        row[0].model.to("cpu")  # room for the next
    lines = [f"{chr(ord('A') + i)} = {shown(name)}" for i, name in enumerate(names)]
    lines += ["no run with a whole checkpoint under runs/ to compare with"] * (not args.model and len(names) == 1)
    for (benchmark, questions), (first, *others) in zip(data.items(), zip(*values)):
        tables.append(side_by_side([first, *others]))
        lines += ["", *render(f"{benchmark}, {len(questions)} problems", tables[-1])]
        lines += [verdict(chr(ord("B") + i), first, other, args.samples) for i, other in enumerate(others)]
    lines += ["", *render(f"mean of {len(tables)} benchmarks", average(tables))] if len(tables) > 1 else []
    for job in sum(jobs, []):
        text = f"{job.folder}: " + ", ".join(f"{key} {json.dumps(value)}" for key, value in job.protocol.items())
        lines += ["", textwrap.fill(text, 118, subsequent_indent="  ", break_on_hyphens=False)]
    print(*lines, sep="\n", end="\n" * bool(lines))
    return int(len(data) < len(set(args.benchmarks)))

def main(argv=None):
    try:
        return evaluate(parse_args(argv))
    except (BadInput, OSError, MemoryError, RuntimeError) as e:
        if type(e) is RuntimeError and "memory" not in str(e):  # a full CPU memory is a plain one
            raise
        note(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        note("interrupted; the same command goes on from here")
        return 130

if __name__ == "__main__":
    sys.exit(main())
