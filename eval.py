"""A score that others can reproduce: benchmarks with standard errors, paired differences and the whole protocol.

    python eval.py                                    # bundled held-out questions: bundled model against the newest run
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --benchmarks math500 olympiadbench minerva aime24 amc23
    python eval.py --model Qwen/Qwen2.5-Math-1.5B runs/NAME --benchmarks math500      # before and after, side by side
    python eval.py --model runs/NAME --benchmarks aime24 --samples 32 --temperature 0.6

Prompts, sampling and grading are treerpo.py's own. What is measured, every figure with its standard error over problems:
  pass@1           share of problems whose one answer is right
  avg@k            the same, mean over k samples of a problem
  pass@j           chance that one of j samples is right, unbiased from the k samples there are
  maj@k            share of problems whose most frequent answer is right
  response tokens  mean length of an answer, its end token included
  truncated        share of answers that hit --max-new-tokens; a prompt that leaves no room for them counts here, and as wrong
  no box           share of answers without a closed \\boxed{}, that is without an answer

Every answer goes to a file at once: the same command after a kill goes on where it stopped, to the same table.
Exit status: 0 done; 1 some benchmark could not be read, the others ran, or out of memory; 2 bad input; 130 interrupted.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tqdm import tqdm

from treerpo import (BadInput, append_jsonl, build_prompt, checkpoints, extract_boxed, grade, is_equiv, load_model,
                     load_questions, load_template, make_decoding, newest_checkpoint, require, sample_trees)

DEMO = Path(__file__).resolve().parent / "demo"
BENCHMARKS = {  # name: data file or hub ID:CONFIG:SPLIT, column of the question, column of the answer
    "demo": (f"{DEMO / 'test.jsonl'}", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500::test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath::test", "question", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024::train", "problem", "answer"),
    "amc23": ("math-ai/amc23::test", "question", "answer"),
    "gsm8k": ("openai/gsm8k:main:test", "question", "answer")}
NOISE = 0.05  # a difference is inside the noise if chance alone makes one as large at least this often

# ------------------------------------------------------------------------------------------------- figures of one run

def pass_at_k(n, c, k):
    """Chance that at least one of k samples is right, from c right ones among n: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374): the share of all k-subsets of the n samples with a right one in them.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(answers, correct):
    """The verdict on the most frequent of a problem's k answers, a tie going to the one seen first; 0 if there is none.

    answers [k]: the text of each box; None (no box) does not vote. correct [k]: its verdict, 0 or 1. Votes are counted
    by is_equiv, so that 1/2 and 0.5 are one answer.
    """
    groups = []  # [answer, verdict, votes], in the order first seen
    for answer, verdict in zip(answers, correct):
        group = next((group for group in groups if answer is not None and is_equiv(answer, group[0])), None)
        if group:
            group[2] += 1
        elif answer is not None:
            groups.append([answer, verdict, 1])
    return max(groups, key=lambda group: group[2])[1] if groups else 0

def figures(rows):
    """The lines of problems.jsonl, n problems with k answers each -> {figure: [n] values}, the score first."""
    k, right = len(rows[0]["correct"]), [sum(row["correct"]) for row in rows]
    shown = {f"avg@{k}" if k > 1 else "pass@1": [100 * c / k for c in right]}
    for j in sorted({2 ** i for i in range(1, k.bit_length())} | {k} if k > 1 else {}):
        shown[f"pass@{j}"] = [100 * pass_at_k(k, c, j) for c in right]
    if k > 1:
        shown[f"maj@{k}"] = [100 * majority(row["extracted"], row["correct"]) for row in rows]
    return {**shown, "response tokens": [sum(row["tokens"]) / k for row in rows],
            "truncated": [100 * sum(row["truncated"]) / k for row in rows],
            "no box": [100 * row["extracted"].count(None) / k for row in rows]}

# ------------------------------------------------------------------------------------------------- noise and difference

def mean_se(values):
    """[n] numbers -> (mean, its standard error sqrt(s^2 / n) with s^2 over n - 1; None for a single one)."""
    n, mean = len(values), math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None

def sign_flip_p(differences):
    """Exact two-sided paired test of [n] whole numbers, each problem's right answers of one model minus the other's.

    If the models were equal, every difference would be as likely with the other sign: p is the share of all 2^n
    choices of signs whose sum is at least as far from 0. With one answer a problem this is McNemar's exact test (the
    sign test); with k samples it needs no normal approximation either, however few the problems.
    """
    sizes = [abs(d) for d in differences if d]
    reach = sum(sizes)
    chance = torch.zeros(2 * reach + 1, dtype=torch.float64)  # chance[reach + s]: that the sum is s
    chance[reach] = 1
    for size in sizes:
        chance = (chance.roll(size) + chance.roll(-size)) / 2
    far = torch.arange(-reach, reach + 1).abs() >= abs(sum(differences))
    return min(1.0, chance[far].sum().item())

def side_by_side(runs):
    """[m] figures() of m models on the same n problems -> {figure: [2m - 1] (mean, standard error)}: each model's, then
    each later model's difference from the first, taken problem by problem."""
    table = {}
    for name in runs[0]:
        first, *others = [run[name] for run in runs]
        table[name] = [mean_se(values) for values in (first, *others)]
        table[name] += [mean_se([b - a for a, b in zip(first, other)]) for other in others]
    return table

def average(tables):
    """side_by_side() of several benchmarks -> their plain mean, every benchmark alike; their errors are independent."""
    def mean(cells):
        errors = [se for _, se in cells]
        se = None if None in errors else math.sqrt(math.fsum(se * se for se in errors)) / len(cells)
        return math.fsum(m for m, _ in cells) / len(cells), se
    return {name: [mean(cells) for cells in zip(*(table[name] for table in tables))] for name in tables[0]}

# ------------------------------------------------------------------------------------------------------------- output

def render(title, table):
    """A title and side_by_side() as text; the models are A, B, C ..., shares and scores in percent."""
    letters = [chr(65 + i) for i in range(len(table["no box"]) // 2 + 1)]
    lines = [[title, *letters, *(f"{letter} - A" for letter in letters[1:])]]
    for name, cells in table.items():
        signs = [""] * len(letters) + ["+"] * (len(letters) - 1)
        lines.append(["  " + name + (" %" if name != "response tokens" else "")])
        lines[-1] += [f"{m:{sign}.1f}" + ("" if se is None else f" +- {se:.1f}") for sign, (m, se) in zip(signs, cells)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)

def verdict(table, runs, k):
    """One line for each later model: how likely the difference in score is by chance, and what happened to the length."""
    lines, (score, *_) = [], table
    for i, run in enumerate(runs[1:], 1):
        p = sign_flip_p([round((b - a) * k / 100) for a, b in zip(runs[0][score], run[score])])
        length, se = table["response tokens"][len(runs) + i - 1]
        share = f"{100 * length / table['response tokens'][0][0]:+.1f} %" if table["response tokens"][0][0] else "n/a"
        inside = {True: "inside the noise", False: "beyond the noise"}
        lines.append(f"  {chr(65 + i)} - A: {score} is {inside[p >= NOISE]} (p = {p:.2g}, exact paired test), length "
                     f"{share}{'' if se is None else f' is {inside[abs(length) <= 1.96 * se]} (1.96 standard errors)'}")
    return "\n".join(lines)

def render_protocol(jobs):
    """Everything a reader needs to repeat the scores: what all jobs share, then what is each job's own."""
    shared = {key: value for key, value in jobs[0].protocol.items() if all(j.protocol[key] == value for j in jobs)}
    def pairs(protocol):
        return [f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in protocol.items()]
    own = [", ".join(pairs({k: v for k, v in job.protocol.items() if k not in shared})) for job in jobs]
    return "\n".join(["protocol"] + ["  " + line for line in [*pairs(shared), *filter(None, own)]])

# ------------------------------------------------------------------------------------ one model on one benchmark: a job

def sha(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()

def revision(name, model):
    """The hub's commit of a hub model; of a folder the SHA-256 of its files, optimiser state left out."""
    commit, digest = getattr(model.config, "_commit_hash", None), hashlib.sha256()
    for path in sorted(Path(name).glob("*")) if not commit else []:
        if path.is_file() and path.name != "trainer_state.pt":
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return commit or digest.hexdigest()[:16]

def open_model(name):
    """A hub id, a model folder or a run folder -> (name of the model or newest whole checkpoint, what load_model gives)."""
    if checkpoints(name) or (Path(name) / "metrics.jsonl").exists():
        run, name = name, newest_checkpoint(name)
        require(name, f"--model {run}: a run without a whole checkpoint")
    return str(name), load_model(str(name), "cpu", args_dtype)

def make_job(args, name, model, tokenizer, benchmark, questions):
    """Build the prompts, fix the protocol, open the folder. -> everything run_job needs. Raises BadInput."""
    context, template = model.config.max_position_embeddings, load_template(args.template, tokenizer)
    budget = args.max_new_tokens or (64 if benchmark == "demo" else min(3072, context * 3 // 4))
    questions = [{**q, "prompt": build_prompt(q["question"], template, tokenizer)} for q in questions]
    room = sum(0 < len(q["prompt"]) <= context - budget for q in questions)
    require(room, f"--max-new-tokens {budget}: no question of {benchmark} fits into {name}'s {context} tokens with it")
    if room < len(questions):
        note(f"{benchmark}: {len(questions) - room} of {len(questions)} prompts leave no room for {budget} tokens in "
             f"{name}'s context of {context}; they count as wrong")
    decoding = make_decoding(model, tokenizer, args.temperature, args.max_rows)
    source = BENCHMARKS.get(benchmark, [benchmark])[0]
    protocol = dict(
        model=short(name), benchmark=benchmark, revision=revision(name, model), dataset=short(source), n=len(questions),
        fingerprint=sha(*(json.dumps([q["question"], q["answer"]]) for q in questions))[:16],
        template=tokenizer.chat_template if template == "chat" else template, samples=args.samples,
        decoding=f"temperature {args.temperature}, no top-p, no top-k" if args.temperature else "greedy",
        max_new_tokens=budget, eos_ids=list(decoding.eos_ids), vocabulary=decoding.n_tokens, seed=args.seed,
        max_rows=args.max_rows, dtype=args.dtype, device=args.device_name, python=platform.python_version(),
        torch=torch.__version__, transformers=transformers.__version__,
        code=sha(*(path.read_text("utf-8") for path in (DEMO.parent / "eval.py", DEMO.parent / "treerpo.py")))[:16])
    fixed = {key: value for key, value in protocol.items() if key != "max_rows" or args.temperature}
    tag = "" if args.out else "-" + sha(json.dumps(fixed))[:8]  # without --out every protocol has a folder of its own
    folder = Path(args.out or "evals") / (re.sub(r"[^\w.]+", "-", f"{short(name)}-{Path(benchmark).stem}")[-100:] + tag)
    saved = read_summary(folder)
    for key in fixed if saved else []:
        require(saved["protocol"].get(key) == fixed[key], f"{folder}: answers with another {key} are in it "
                f"({saved['protocol'].get(key)!r:.80}, now {fixed[key]!r:.80}); choose another --out")
    write_summary(folder, protocol, saved and saved["results"])
    return SimpleNamespace(name=name, model=model, tokenizer=tokenizer, questions=questions, context=context,
                           decoding=decoding, budget=budget, protocol=protocol, folder=folder)
