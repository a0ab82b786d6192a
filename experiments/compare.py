"""The study: TreeRPO under the paper's settings against GRPO, GSPO and TreeAdv on the bundled task,
at equal sampled tokens.

    python experiments/compare.py            # all that is not done yet, about an hour on one core
    python experiments/compare.py --table    # only the tables, from the lines that are there
    python experiments/report.py             # draw the figures again

Every finished job is one line of results/compare.jsonl and is not done again. The parts, in order:
  credit   how well does the advantage of a token tell right lines of an answer from wrong ones?
  tune     the learning rate of each system, on seeds that no other part uses
  curves   the four systems
  factors  one change at a time to TreeRPO's defaults
What is held equal: every arm takes so many questions into a batch that its batches have about the
same number of sampled tokens, and so many batches that all arms sample about the same number.
"""
import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from pathlib import Path

import common

common.use_one_thread()

import make_demo  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
import treerpo  # noqa: E402
from tqdm import tqdm  # noqa: E402

FILE = common.RESULTS / "compare.jsonl"
CODE = common.code_version()  # of what was imported just now

# ------------------------------------------------------------------------------- What is compared
# An arm is what it changes in the demo's settings, which are the paper's but for temperature, tree
# shape, batch size and learning rate.
WIDE = {"branching": [4, 4, 4], "step_len": [19]}
CREDIT = {
    "GRPO, 16 rollouts": {"algo": "grpo", "branching": [16]},
    "TreeRPO 4 2 2 2": {},
    "TreeRPO 4 4 4 4": {"branching": [4, 4, 4, 4]},
    "TreeAdv, 16 leaves of 4 trees": {"algo": "treeadv", "leaves": 16, "trees": 4},
}
SYSTEMS = {
    "treerpo": {},
    "grpo": {"algo": "grpo"},
    "gspo": {"algo": "gspo"},
    "treeadv": {"algo": "treeadv"},
}
FACTORS = {
    "divisor of Eq. 3": {"normalizer": "std"},
    "no divisor": {"normalizer": "none"},
    "tau 0.3": {"prune_threshold": 0.3},
    "no KL, no entropy term": {"kl_coef": 0.0, "entropy_coef": 0.0},
    "1 mini-batch": {"minibatches": 1},
    "4 mini-batches": {"minibatches": 4},
    "temperature 0.6": {"temperature": 0.6},
    "4 4 4, tau 0.1": WIDE,
    "4 4 4, tau 0": {**WIDE, "prune_threshold": 0.0},
    "4 4 4, tau 0.3": {**WIDE, "prune_threshold": 0.3},
}
ARMS = {**CREDIT, **SYSTEMS, **FACTORS}

SEEDS = range(5)
TUNE_SEEDS = (100, 101)
RATES = (1e-4, 2e-4, 4e-4)
CREDIT_TOKENS = 60_000   # sampled tokens of a credit job
BATCH_TOKENS = 3_600     # of a training batch
TRAIN_TOKENS = 65_000    # of a training run
EVALUATIONS = 4          # of a training run, and one before it
EVAL_SAMPLES = 2
MEASURED_QUESTIONS = 64  # for the tokens of a question


def settings_of(arm: str, **changes: object) -> treerpo.Settings:
    return treerpo.complete_settings({**ARMS[arm], **changes})


# ---------------------------------------------------------------------------------------- Sampling
def open_base() -> tuple:
    """-> the bundled model, its tokenizer, the training questions with their prompts."""
    tokenizer = treerpo.load_tokenizer(str(common.DEMO / "model"))
    model = treerpo.load_model(str(common.DEMO / "model"), "cpu", torch.float32)
    questions = treerpo.load_questions(str(common.DEMO / "train.jsonl"))
    for question in questions:
        question["prompt"] = treerpo.build_prompt(question["question"], "{question}", tokenizer)
    return model, tokenizer, questions


def sample(
    model: torch.nn.Module, tokenizer: object, questions: list[dict], settings: treerpo.Settings
) -> list[list[treerpo.Node]]:
    """-> the trees of each question."""
    prompts = [question["prompt"] for question in questions]
    decoding = treerpo.make_decoding(model, tokenizer, settings.temperature, settings.max_rows)
    roots = treerpo.grow_trees(model, prompts, decoding, settings)
    forests = [[] for _ in questions]
    for root in roots:
        forests[root.question].append(root)
    return forests


def sampled_tokens(forests: list[list[treerpo.Node]]) -> int:
    total = 0
    for forest in forests:
        for root in forest:
            total += sum(len(step.tokens) for step in root.steps())
    return total


def shape_of(arm: str) -> str:
    """What decides how many tokens a question takes."""
    settings = settings_of(arm)
    if settings.algo == "treeadv":
        shape = f"{settings.leaves} leaves of {settings.trees} trees"
    else:
        shape = " ".join(str(width) for width in settings.branching)
    return f"{shape} at temperature {settings.temperature:g}"


def measure_sizes() -> dict:
    """Sampled tokens a question of every shape, at the base policy."""
    model, tokenizer, questions = open_base()
    sizes = {}
    for arm in ARMS:
        shape = shape_of(arm)
        if shape not in sizes:
            torch.manual_seed(0)
            forests = sample(model, tokenizer, questions[:MEASURED_QUESTIONS], settings_of(arm))
            sizes[shape] = sampled_tokens(forests) / MEASURED_QUESTIONS
    return {"sizes": sizes}


# -------------------------------------------------------------------------------- Credit of a line
def token_ends(tokens: list[int], tokenizer: object) -> list[int]:
    """For each token, where its text ends in the text of all."""
    ends = []
    end = 0
    for token in tokens:
        end += len(tokenizer.decode([token], skip_special_tokens=True))
        ends.append(end)
    return ends


def line_advantages(
    forest: list[treerpo.Node], row: dict, tokenizer: object
) -> list[tuple[bool, float, bool]]:
    """Every labelled line of these answers, once -> (right?, mean advantage of its tokens, decisive?).

    A line is decisive if no line before it is wrong: behind an error the answer is lost, and what
    is written there can neither earn nor cost a reward. A line is the tokens that write it,
    wherever the tree cuts them; answers that share all its tokens share the line.
    """
    lines = {}
    leaves = [leaf for root in forest for leaf in root.leaves()]
    for leaf in leaves:
        tokens = []
        owners = []  # of each token: its step and its place in it
        for step in leaf.path()[1:]:
            tokens += step.tokens
            owners += [(step, k) for k in range(len(step.tokens))]
        ends = token_ends(tokens, tokenizer)
        text = treerpo.answer_text(leaf, tokenizer)
        assert ends[-1] == len(text), "the texts of the tokens must make up the answer's"
        decisive = True
        for start, end, right in make_demo.check_lines(row, text):
            inside = [owner for owner, place in zip(owners, ends) if start < place <= end]
            advantage = statistics.fmean(step.advantage for step, _ in inside)
            lines[inside[-1]] = (right, advantage, decisive)
            decisive = decisive and right
    return list(lines.values())


def auc(lines: list[tuple]) -> float:
    """The chance that a random right line has a higher advantage than a random wrong one."""
    wrong = sorted(line[1] for line in lines if not line[0])
    right = [line[1] for line in lines if line[0]]
    wins = 0.0
    for advantage in right:
        below = bisect_left(wrong, advantage - 1e-9)
        not_above = bisect_right(wrong, advantage + 1e-9)
        wins += (below + not_above) / 2
    return wins / (len(right) * len(wrong))


def credit_figures(lines: list[tuple]) -> dict:
    decisive = [line for line in lines if line[2]]
    later = [line for line in lines if not line[2]]
    silent = [abs(line[1]) < 1e-12 for line in decisive]
    noisy = [abs(line[1]) > 1e-12 for line in later]
    return {
        "auc": auc(decisive),
        "auc_all": auc(lines),
        "decisive": len(decisive),
        "silent": statistics.fmean(silent),
        "noise": statistics.fmean(noisy),
    }


def measure_credit(arm: str, seed: int, size: float) -> dict:
    """Sample at the base policy, compare, and look at the advantages of the labelled lines."""
    model, tokenizer, questions = open_base()
    settings = settings_of(arm)
    questions = random.Random(seed).sample(questions, round(CREDIT_TOKENS / size))
    torch.manual_seed(seed)
    forests = sample(model, tokenizer, questions, settings)
    for forest, question in zip(forests, questions):
        for leaf in [leaf for root in forest for leaf in root.leaves()]:
            text = treerpo.answer_text(leaf, tokenizer)
            leaf.reward = treerpo.reward_fn(text, question["answer"])
        for root in forest:
            treerpo.backup_rewards(root)
    trees = [root for forest in forests for root in forest]
    rules = {}
    if settings.algo != "treeadv":
        rules["siblings"] = (treerpo.add_sibling_advantages, settings.normalizer)
    if settings.algo != "grpo":
        rules["leaves"] = (treerpo.add_leaf_advantages, "std")
    figures = {}
    for rule, (add_advantages, normalizer) in rules.items():
        add_advantages(trees, normalizer, settings.prune_threshold)
        lines = []
        for forest, question in zip(forests, questions):
            lines += line_advantages(forest, question["row"], tokenizer)
        figures[rule] = credit_figures(lines)
    return {"tokens": sampled_tokens(forests), "questions": len(questions), "rules": figures}


# --------------------------------------------------------------------------------- A training run
def measure_policy(run: treerpo.Run, seed: int, temperature: float) -> dict:
    """Held-out avg@2, share of right lines, tokens of an answer."""
    decoding = treerpo.make_decoding(run.model, run.tokenizer, temperature, 2048)
    prompts = [question["prompt"] for question in run.held_out]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trees = treerpo.sample_trees(run.model, prompts, [EVAL_SAMPLES], [56], decoding)
    answers = [question["answer"] for question in run.held_out]
    leaves, texts = treerpo.verify_leaves(trees, answers, run.tokenizer)
    lines = []
    for leaf, text in zip(leaves, texts):
        row = run.held_out[leaf.parent.question]["row"]
        lines += [right for _, _, right in make_demo.check_lines(row, text)]
    return {
        "accuracy": statistics.fmean(leaf.reward for leaf in leaves),
        "lines": statistics.fmean(lines),
        "length": statistics.fmean(len(leaf.tokens) for leaf in leaves),
    }


def train_once(arm: str, seed: int, lr: float, size: float) -> dict:
    """A run of treerpo.py's own training loop, evaluated at temperature 1 as it goes.

    -> a curve: for each evaluation, sampled tokens, CPU seconds of training and what was measured.
    """
    questions_per_step = max(1, round(BATCH_TOKENS / size))
    steps = round(TRAIN_TOKENS / (questions_per_step * size))
    with tempfile.TemporaryDirectory() as out:
        settings = settings_of(
            arm, seed=seed, lr=lr, questions_per_step=questions_per_step, steps=steps, out=out
        )
        run = treerpo.set_up(settings)
    status = treerpo.Status(tqdm(disable=True))
    points = [{"step": 0, "tokens": 0, "cpu": 0.0, **measure_policy(run, seed, 1.0)}]
    stops = [round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)]
    logged = []
    cpu = 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        row = treerpo.run_step(run, step, settings, status)
        cpu += time.process_time() - start
        run.last.update(row)
        logged.append(row)
        if step in stops:
            point = {"step": step, "tokens": row["tokens_sampled"], "cpu": round(cpu, 2)}
            points.append({**point, **measure_policy(run, seed, 1.0)})
    curve = {name: [point[name] for point in points] for name in points[0]}
    return {
        "questions_per_step": questions_per_step,
        **curve,
        "accuracy_at_0.6": measure_policy(run, seed, 0.6)["accuracy"],
        "groups_kept": [round(row["groups_kept"], 4) for row in logged],
        "grad_norm": [row["grad_norm"] for row in logged],
        "kl": [round(row["kl"], 6) for row in logged],
        "entropy": [round(row["entropy"], 5) for row in logged],
        "clip_ratio": [round(row["clip_ratio"], 5) for row in logged],
        "skipped": sum(row["skipped"] > 0 for row in logged),
    }


# ------------------------------------------------------------------------------------- The plan
class Study:
    """The lines that are there and the jobs that are not done."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines = {line["key"]: line for line in common.read_lines(file)}

    def of(self, part: str, arm: str, lr: float | None = None) -> list[dict]:
        """The lines of one arm, by seed."""
        found = []
        for line in self.lines.values():
            if line["part"] == part and line["arm"] == arm and lr in (None, line["lr"]):
                found.append(line)
        return sorted(found, key=lambda line: line["seed"])

    def tuned(self, algo: str) -> float:
        """The rate with the best mean accuracy over the second half of the curve."""
        scores = {}
        for lr in RATES:
            lines = self.of("tune", algo, lr)
            scores[lr] = statistics.fmean(second_half(line["accuracy"]) for line in lines)
        return max(scores, key=scores.get)

    def do(self, part: str, arm: str, seed: int, lr: float | None = None) -> None:
        """Do a job unless its line is there."""
        key = f"{part}/{arm}/{seed}"
        if part == "tune":
            key += f"/{lr:g}"
        if key in self.lines:
            return
        start = time.process_time()
        print(f"{time.strftime('%H:%M:%S')} {key}", flush=True)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if part == "sizes":
                result = measure_sizes()
            elif part == "credit":
                result = measure_credit(arm, seed, self.size(arm))
            else:
                result = train_once(arm, seed, lr, self.size(arm))
        line = {
            "key": key, "part": part, "arm": arm, "seed": seed, "lr": lr, **result,
            "cpu_total": round(time.process_time() - start, 1), "code": CODE,
        }
        common.append_line(self.file, line)
        self.lines[key] = line

    def size(self, arm: str) -> float:
        return self.lines["sizes/all/0"]["sizes"][shape_of(arm)]

    def do_all(self) -> None:
        """Seed by seed, so that a study that is cut short has every arm."""
        self.do("sizes", "all", 0)
        for seed in SEEDS:
            for arm in CREDIT:
                self.do("credit", arm, seed)
        for seed in TUNE_SEEDS:
            for lr in RATES:
                for arm in SYSTEMS:
                    self.do("tune", arm, seed, lr)
        for seed in SEEDS:
            for arm in SYSTEMS:
                self.do("curves", arm, seed, self.tuned(arm))
        for seed in SEEDS:
            for arm in FACTORS:
                self.do("factors", arm, seed, self.tuned("treerpo"))


def second_half(curve: list[float]) -> float:
    return statistics.fmean(curve[len(curve) // 2:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    study = Study(FILE)
    if not args.table:
        study.do_all()
    print(report.tables(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
