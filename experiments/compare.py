"""The study: TreeRPO, GRPO, GSPO and TreeAdv on the bundled task and three variants of it, at equal sampled tokens.

    python experiments/compare.py            # everything, up to 3 hours on 2 cores; stop and start it as you like
    python experiments/compare.py --quick    # under 5 minutes: two seeds, short runs, the bundled task only
    python experiments/compare.py --table    # the tables in Markdown, from the lines that are there

Every finished job is one JSON line in experiments/results/compare.jsonl and is not done again. The parts, in order:
  credit   label each line of sampled answers right or wrong with the task's own checker; how well does the advantage
           tell them apart (AUC: the chance that a random right line has a higher one than a random wrong line)?
  tune     learning rate of each system, on seeds that no other part uses
  curves   the four systems on the bundled task
  factors  one change at a time: tree shape, level weight, advantage, normaliser
  regimes  longer chains of rarely wrong steps; answers that open with a restatement; few training questions
  twice    two updates on each batch, where the ratio and its clip matter; credit on the longer chains
What is held equal: every arm takes as many questions into a batch as make about the same number of sampled tokens, so
all have about the same number of updates for the same tokens. Accuracy is read off each curve at the same tokens.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "demo")]
import report  # noqa: E402

# ------------------------------------------------------------------------------------------------- what is compared

# arm: algo, shape, further flags. A shape is the widths of the levels, or "leaves/trees" of TreeAdv's forests.
DEFAULT = "4 2 2 2"
SYSTEMS = {"treerpo": ("treerpo", DEFAULT, ""), "grpo": ("grpo", "8", ""), "gspo": ("gspo", "8", ""),
           "treeadv": ("treeadv", "8/4", "")}
FACTORS = {"default": SYSTEMS["treerpo"], "grpo": SYSTEMS["grpo"],
           "levels": ("treerpo", DEFAULT, "--level-weight levels"),
           "leaves": ("treerpo", DEFAULT, "--advantage leaves"), "both": ("treerpo", DEFAULT, "--advantage both"),
           "std": ("treerpo", DEFAULT, "--normalizer std"), "none": ("treerpo", DEFAULT, "--normalizer none"),
           "8 2 2 2": ("treerpo", "8 2 2 2", ""),
           "8 2": ("treerpo", "8 2", ""), "2 2 2 2": ("treerpo", "2 2 2 2", ""),
           "4 4 4 4": ("treerpo", "4 4 4 4", ""),
           "4 4 4 4 levels": ("treerpo", "4 4 4 4", "--level-weight levels"),
           "4 4 4 4 leaves": ("treerpo", "4 4 4 4", "--advantage leaves")}
TWICE = {f"{name}, two updates": (algo, shape, f"{flags} --updates-per-batch 2") for name, (algo, shape, flags) in
         {**SYSTEMS, "treerpo sequence": ("treerpo", DEFAULT, "--ratio sequence --clip-eps 4e-4")}.items()}
LEAVES = {"treerpo, leaves": FACTORS["leaves"]}
SHARED = {"treerpo, shared opening": ("treerpo", "1 8 2 2", "")}  # one sampled opening, as long as the shortest one
ARMS = {**FACTORS, **SYSTEMS, **TWICE, **LEAVES, **SHARED}
CREDIT = ["8", "16", "32", "8 2", "2 2 2 2", "4 2 2 2", "8 2 2 2", "4 4 4 4", "8/4", "16/4", "32/8"]
BASES = {"demo": [], "few": [],  # few: the demo with 50 training questions; the others: flags of demo/make_demo.py
         "long": "--ops 8 --careful 0.88 --clean-steps 2200 --flawed-steps 600".split(),
         "restate": "--restate --clean-steps 3000 --flawed-steps 800 --batch-size 24".split()}
REGIMES = {"long": "8 operations, 85 % of lines right", "restate": "answers that restate the question",
           "few": "50 training questions"}
PARTS = "credit tune curves factors regimes twice".split()
LRS = (1e-4, 2e-4, 4e-4, 8e-4)
# rollouts: sampled tokens of an update, counted in answers; factors: more, so that a 4 4 4 4 tree fits into one update
FULL = dict(seeds=range(5), tune_seeds=(100, 101), evals=6, credit_tokens=60_000)
QUICK = dict(seeds=range(2), tune_seeds=(), evals=3, credit_tokens=20_000)
ROLLOUTS, UPDATES = dict(factors=80), dict(factors=18, few=72, long=48)
OTHER_ROLLOUTS, OTHER_UPDATES = 40, 36
QUICK_LR, FEW = 4e-4, 50

# ------------------------------------------------------------------------------------------------------- in a worker

def start_worker():
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import torch
    torch.set_num_threads(1)

def work(job):
    """One job -> the line of the results file; all workers are alike, so a job's seed decides its numbers."""
    clock = time.process_time()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        line = dict(make=make_base, sizes=measure_sizes, credit=measure_credit, run=train_once)[job["kind"]](**job)
    return {**line, "cpu_total": round(time.process_time() - clock, 1)}

def make_base(base, folder, **job):
    import make_demo
    Path(folder).mkdir(parents=True, exist_ok=True)
    make_demo.main([*BASES[base], "--out", folder])
    return {}

def open_base(folder):
    """-> (model, tokenizer, decoding, questions of train.jsonl with their prompts, tokens of the longest answer)."""
    import make_demo
    import treerpo
    model, _, tokenizer = treerpo.load_model(f"{folder}/model", "cpu", "float32")
    rows = [json.loads(text) for text in open(f"{folder}/train.jsonl", encoding="utf-8")]
    for row in rows:
        row["prompt"] = treerpo.build_prompt(row["question"], "{question}", tokenizer)
    limit = max(make_demo.max_answer_tokens(tokenizer, row) for row in rows)
    return model, tokenizer, treerpo.make_decoding(model, tokenizer, 1.0, 2048), rows, limit

def step_lengths(shape, limit, opening=0):
    """Tokens of a step at each level: even, and the longest answer fits; a first level of width 1 is the opening."""
    depth = len(shape.split())
    if shape.startswith("1 "):
        return [opening] + [math.ceil((limit - opening) / (depth - 1))] * (depth - 1)
    return [math.ceil(limit / depth)] * depth

def sample(model, rows, shape, lengths, decoding):
    """-> forests, one list of roots for each of the rows."""
    import treerpo
    prompts = [row["prompt"] for row in rows]
    if "/" in shape:
        leaves, trees = map(int, shape.split("/"))
        roots = treerpo.sample_forests(model, prompts, leaves, trees, lengths[0], 0.3, decoding)
    else:
        roots = treerpo.sample_trees(model, prompts, list(map(int, shape.split())), lengths, decoding)
    return [[root for root in roots if root.question == i] for i in range(len(rows))]

def sampled_tokens(forests):
    return sum(len(node.tokens) for forest in forests for root in forest for node in root.walk() if node.parent)

def measure_sizes(base, folder, **job):
    """Sampled tokens per question of every shape on this base; of the restated opening, the shortest length."""
    import make_demo
    import torch
    model, tokenizer, decoding, rows, limit = open_base(folder)
    torch.manual_seed(0)
    opening = min(len(tokenizer(make_demo.write_opening(row)).input_ids) for row in rows)
    sizes = {}
    for shape in dict.fromkeys([shape for _, shape, _ in ARMS.values()] + CREDIT):
        if shape.startswith("1 ") and not opening:
            continue
        few = rows[:96 if len(shape) < 6 else 24]
        lengths = step_lengths(shape, limit, opening)
        sizes[shape] = sampled_tokens(sample(model, few, shape, lengths, decoding)) / len(few)
    return dict(limit=limit, opening=opening, sizes=sizes)

def line_advantages(forest, row, tokenizer):
    """Every labelled line of the forest's answers, once: (right?, mean advantage of its tokens, is it decisive?).

    A line is decisive if no line before it is wrong: behind an error the answer is lost, and nothing written there can
    earn or cost a reward. A line belongs to the tokens that write it, wherever the tree cut them into steps; answers
    that share all of a line's tokens share the line.
    """
    import make_demo
    import treerpo
    lines = {}
    for leaf in (leaf for root in forest for leaf in root.leaves()):
        tokens = [(node, i, token) for node in leaf.path()[1:] for i, token in enumerate(node.tokens)]
        ends, at = [], 0  # where each token's text ends
        for _, _, token in tokens:
            at += len(tokenizer.decode([token], skip_special_tokens=True))
            ends.append(at)
        text = treerpo.path_text(leaf, tokenizer)
        assert at == len(text), "the texts of the tokens must make up the answer's"
        decisive = True
        for start, end, right in make_demo.check_lines(row, text):
            inside = [k for k, e in enumerate(ends) if start < e <= end]
            last = tokens[inside[-1]]
            lines[last[0], last[1]] = right, sum(tokens[k][0].advantage for k in inside) / len(inside), decisive
            decisive = decisive and right
    return list(lines.values())

def auc(pairs):
    """[(right?, score)] -> the chance that a right one scores above a wrong one, ties half."""
    scores = sorted(score for right, score in pairs if not right)
    wins = [bisect_left(scores, s - 1e-9) + bisect_right(scores, s + 1e-9) for right, s in pairs if right]
    return sum(wins) / (2 * len(wins) * len(scores))

def measure_credit(folder, shape, seed, n_questions, **job):
    import torch
    import treerpo
    model, tokenizer, decoding, rows, limit = open_base(folder)
    torch.manual_seed(seed)
    rows = random.Random(seed).sample(rows, n_questions)
    forests, rules = sample(model, rows, shape, step_lengths(shape, limit), decoding), {}
    for forest, row in zip(forests, rows):
        for root in forest:
            for leaf in root.leaves():
                leaf.reward = treerpo.reward_fn(treerpo.path_text(leaf, tokenizer), row["answer"])
            treerpo.backup_rewards(root)
    for name in ["siblings", "leaves"] if " " in shape else ["leaves" if "/" in shape else "siblings"]:
        lines = []
        for forest, row in zip(forests, rows):
            for node in (node for root in forest for node in root.walk()):
                node.advantage = 0.0
            add = treerpo.add_sibling_advantages if name == "siblings" else treerpo.add_leaf_advantages
            add(forest, "bernoulli")
            lines += line_advantages(forest, row, tokenizer)
        first = [(right, advantage) for right, advantage, decisive in lines if decisive]
        later = [advantage for _, advantage, decisive in lines if not decisive]
        rules[name] = dict(
            auc=auc(first), auc_all=auc([line[:2] for line in lines]), decisive=len(first), later=len(later),
            silent=sum(abs(a) < 1e-12 for _, a in first) / len(first),
            noise=sum(abs(a) > 1e-12 for a in later) / len(later))
    return dict(tokens=sampled_tokens(forests), rules=rules)

def train_once(folder, data, arm, seed, lr, questions, steps, evals, lengths, **job):
    """A whole run of treerpo.py; its evaluations are replaced by one that also measures length, lines and CPU time."""
    import make_demo
    import torch
    import treerpo
    rows = {row["question"]: row for row in map(json.loads, open(f"{folder}/test.jsonl", encoding="utf-8"))}
    started, paused = None, 0.0

    def evaluate(model, tokenizer, questions, samples, budget, decoding, seed):
        nonlocal started, paused
        start = time.process_time()
        started = start if started is None else started
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            roots = treerpo.sample_trees(model, [q["prompt"] for q in questions], [samples], [budget], decoding)
        right, lengths, lines = [], [], []
        for root in roots:
            row = rows[questions[root.question]["question"]]
            for leaf in root.leaves():
                text = treerpo.path_text(leaf, tokenizer)
                right.append(treerpo.reward_fn(text, row["answer"]))
                lengths.append(len(leaf.tokens))
                lines += [ok for *_, ok in make_demo.check_lines(row, text)]
        mean = lambda values: round(sum(values) / max(1, len(values)), 4)
        result = {"eval/accuracy": mean(right), "eval/greedy_accuracy": math.nan, "eval/length": mean(lengths),
                  "eval/lines": mean(lines), "eval/cpu": round(start - started - paused, 2)}
        paused += time.process_time() - start
        return result

    original, treerpo.evaluate = treerpo.evaluate, evaluate
    algo, shape, flags = ARMS[arm]
    flags = f"--algo {algo} --lr {lr} --seed {seed} --questions-per-step {questions} --steps {steps} {flags}".split()
    if "/" in shape:
        flags += f"--leaves {shape.split('/')[0]} --trees {shape.split('/')[1]} --entropy-threshold 0.3".split()
    else:
        flags += ["--branching", *shape.split()]
    flags += ["--step-len", *map(str, lengths), "--eval-every", str(math.ceil(steps / evals))]
    flags += "--eval-questions 256 --eval-samples 2 --save-every 1000000 --max-rows 2048 --pack-len 512".split()
    flags += "--template none --dtype float32 --device cpu".split()
    try:
        with tempfile.TemporaryDirectory() as out:
            status = treerpo.main(["--model", f"{folder}/model", "--data", data, "--eval-data", f"{folder}/test.jsonl",
                                   "--out", out, *flags])
            with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
                log = [json.loads(text) for text in file]
    finally:
        treerpo.evaluate = original
    if status not in (0, 1):  # 1: stopped by losses that are not finite, a result too
        raise RuntimeError(f"treerpo.py ended with status {status}: {' '.join(flags)}")
    points = [row for row in log if "eval/accuracy" in row]
    curve = {name: [row.get(key, 0) for row in points] for name, key in dict(
        step="step", tokens="tokens_sampled", cpu="eval/cpu", accuracy="eval/accuracy", length="eval/length",
        lines="eval/lines").items()}
    return dict(status=status, flags=" ".join(flags), **curve)

# --------------------------------------------------------------------------------------------------------- the plan

class Study:
    """Which jobs there are, and the lines of those that are done."""
    systems, factors, twice, regimes, regime_arms = SYSTEMS, FACTORS, TWICE, REGIMES, SYSTEMS | LEAVES | SHARED
    credit_shapes, lrs = CREDIT, LRS

    def __init__(self, args):
        self.size, self.quick, self.file = QUICK if args.quick else FULL, args.quick, Path(args.results)
        self.cache, self.variants, self.demo = Path(args.cache), args.variants, Path(args.demo)
        self.lines = {}
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line torn by a kill is done again
                    line = json.loads(text)
                    self.lines[line["key"]] = line

    def folder(self, base):
        if base in ("demo", "few"):
            return self.demo
        ready = self.variants and Path(self.variants, base)
        return ready if ready and (ready / "model").exists() else self.cache / base

    def data(self, base):
        if base != "few":
            return str(self.folder(base) / "train.jsonl")
        path = self.cache / "few.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = (self.demo / "train.jsonl").read_text(encoding="utf-8").splitlines(True)[:FEW]
        path.write_text("".join(rows), encoding="utf-8")
        return str(path)

    def job(self, kind, part, base, *key, **job):
        """A job; its key says all that makes it differ from others and is the identity of its line in the results."""
        key = "/".join(map(str, (part, base, *key)))
        return dict(kind=kind, key=key, part=part, base=base, folder=str(self.folder(base)), **job)

    def runs(self, part, base, arms, seeds, lrs=(None,)):
        """Training runs, seed by seed, so that a study cut short has all arms. lr None: the tuned one of the algo."""
        jobs = []
        for seed in seeds:
            for lr in lrs:
                for arm in arms:
                    job = self.job("run", part, base, arm, lr or "tuned", seed, arm=arm, seed=seed)
                    size = self.lines.get(f"sizes/{'demo' if base == 'few' else base}")
                    if size:  # not yet, when jobs are only counted
                        algo, shape, _ = ARMS[arm]
                        budget = ROLLOUTS.get(part, OTHER_ROLLOUTS) * size["sizes"]["8"] / 8
                        questions = max(1, round(budget / size["sizes"][shape]))
                        updates = UPDATES.get(base, UPDATES.get(part, OTHER_UPDATES))
                        steps = round(updates * budget / (questions * size["sizes"][shape]))
                        job.update(questions=questions, steps=steps, evals=self.size["evals"], data=self.data(base),
                                   lr=lr or self.tuned(algo),
                                   lengths=step_lengths(shape, size["limit"], size["opening"]))
                    jobs.append(job)
        return jobs

    def tuned(self, algo):
        """The learning rate with the best mean accuracy over the curve's second half, on the tuning seeds."""
        scores = {}
        for line in self.of("tune"):
            if line["arm"] == algo:
                scores.setdefault(line["lr"], []).append(statistics.mean(line["accuracy"][len(line["accuracy"]) // 2:]))
        return max(scores, key=lambda lr: statistics.mean(scores[lr])) if scores else QUICK_LR

    def of(self, part, **wanted):
        return [line for line in self.lines.values() if line.get("part") == part
                and all(line[name] == value for name, value in wanted.items())]

    def credit(self, base, shapes, seeds):
        size, jobs = self.lines.get(f"sizes/{base}"), []
        for seed in seeds:
            for shape in shapes:
                n = max(1, round(self.size["credit_tokens"] / size["sizes"][shape])) if size else 0
                jobs.append(self.job("credit", "credit", base, shape, seed, shape=shape, seed=seed, n_questions=n))
        return jobs

    def phases(self):
        """Lists of jobs; each list needs the results of those before it."""
        seeds = self.size["seeds"]
        yield lambda: [self.job("sizes", "sizes", "demo")]
        yield lambda: self.credit("demo", CREDIT[::2] if self.quick else CREDIT, seeds)
        yield lambda: self.runs("tune", "demo", SYSTEMS, self.size["tune_seeds"], LRS)
        yield lambda: self.runs("curves", "demo", SYSTEMS, seeds)
        if self.quick:
            return
        yield lambda: self.runs("factors", "demo", FACTORS, seeds)
        yield lambda: [self.job("make", "make", base) for base in ("long", "restate")
                       if not (self.folder(base) / "model").exists()]
        yield lambda: [self.job("sizes", "sizes", base) for base in ("long", "restate")]
        yield lambda: [job for base, arms in (("long", SYSTEMS | LEAVES), ("restate", SYSTEMS | LEAVES | SHARED),
                                              ("few", SYSTEMS)) for job in self.runs("regimes", base, arms, seeds)]
        yield lambda: self.runs("twice", "demo", TWICE, seeds) + self.credit("long", CREDIT[1::2], seeds)

    def do(self, workers, parts):
        from tqdm import tqdm
        self.file.parent.mkdir(parents=True, exist_ok=True)
        wanted = lambda jobs: [job for job in jobs if not parts or job["part"] in ("sizes", "make", *parts)]
        bar = tqdm(total=sum(len(wanted(phase())) for phase in self.phases()), unit="job", smoothing=0)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, start_worker) as pool, self.file.open("a", encoding="utf-8") as file:
            for phase in self.phases():
                jobs = wanted(phase())
                waiting = {pool.submit(work, job): job for job in jobs if job["key"] not in self.lines}
                bar.update(len(jobs) - len(waiting))
                for future in as_completed(waiting):
                    job = {name: value for name, value in waiting[future].items() if name not in ("folder", "data")}
                    self.lines[job["key"]] = {**job, **future.result()}
                    file.write(json.dumps(self.lines[job["key"]]) + "\n")
                    file.flush()
                    bar.set_postfix_str(job["key"])
                    bar.update()
        bar.close()

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do")
    group.add_argument("--quick", action="store_true", help="the form of under 5 minutes, results in quick.jsonl")
    group.add_argument("--table", action="store_true", help="only print the tables")
    group.add_argument("--parts", nargs="+", choices=PARTS, help="only these parts")
    group.add_argument("--workers", type=int, default=2, help="processes of one thread each (default 2)")
    group = parser.add_argument_group("files")
    group.add_argument("--results", help="file of JSON lines (default experiments/results/compare.jsonl)")
    group.add_argument("--demo", default=HERE.parent / "demo", help="folder of the bundled base model (default demo)")
    group.add_argument("--cache", default=HERE / "cache",
                       help="folder of the bases made here (default experiments/cache)")
    group.add_argument("--variants", help="folder with ready base models, long/ and restate/")
    args = parser.parse_args(argv)
    args.results = args.results or HERE / "results" / ("quick.jsonl" if args.quick else "compare.jsonl")
    return args

def main(argv=None):
    args = parse_args(argv)
    study = Study(args)
    if not args.table:
        study.do(args.workers, args.parts)
        if not args.quick:
            report.figures(study)
    print(report.tables(study))
    return 0

if __name__ == "__main__":
    sys.exit(main())
