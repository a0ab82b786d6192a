"""Scores that others can reproduce: benchmarks with standard errors, paired differences and the
whole protocol. Prompts, sampling and verifier are those of treerpo.py.

    python eval.py                                        # bundled model against the newest run
    python eval.py --model Qwen/Qwen2.5-Math-1.5B runs/NAME --benchmarks math500 aime24
    python eval.py --compare evals/FOLDER evals/FOLDER    # answers made earlier
    python eval.py --help                                 # every flag and its default

Every figure is a mean over problems with its standard error. Models are called A, B and so on, and
each is compared with A problem by problem.

  avg@k, pass@1    share of right answers among the k to a problem, or of the only one
  pass@j           chance that at least one of j answers is right (unbiased, from all k)
  maj@k            share of problems whose most frequent answer is right
  response tokens  length of an answer, its end token included
  truncated        share of answers without an end; a prompt too long for the context counts here
  no box           share of answers without a closed \\boxed{}

A model's answers to a benchmark are in one folder: problems.jsonl, a line for each problem, and
summary.json, the figures and the protocol. A command that was stopped goes on when it is repeated.
"""
import dataclasses
import fcntl
import gc
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

if __name__ == "__main__" and sys.stderr.isatty():  # the next imports take some seconds
    print("importing torch and transformers", file=sys.stderr, flush=True)

import torch
import transformers
from tqdm import tqdm
from transformers import HfArgumentParser

from treerpo import (
    HERE,
    BadInput,
    Decoding,
    HelpFormatter,
    Status,
    add_workspace,
    append_jsonl,
    build_prompt,
    choose_device,
    escape_unprintable,
    extract_boxed,
    flag,
    is_equiv,
    load_config,
    load_model,
    load_questions,
    load_template,
    load_tokenizer,
    make_decoding,
    newest_checkpoint,
    read_flags,
    read_jsonl,
    require,
    sample_trees,
    verify_leaves,
)

# Name: data file or hub ID:CONFIG:SPLIT, column of the question, column of the answer.
BENCHMARKS = {
    "demo": (f"{HERE}/demo/test.jsonl", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500::test", "problem", "answer"),
    "olympiadbench": ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", "question", "final_answer"),
    "minerva": ("math-ai/minervamath::test", "question", "answer"),
    "aime24": ("HuggingFaceH4/aime_2024::train", "problem", "answer"),
    "amc23": ("math-ai/amc23::test", "question", "answer"),
    "gsm8k": ("openai/gsm8k:main:test", "question", "answer"),
}
# Columns by which scores are shown, where the data has them.
GROUP_COLUMNS = ("subject", "subfield", "type", "category", "level")
MOST_GROUPS = 20  # a column with more values than this names problems, not kinds of problems
# What the line below a table always says of the protocol.
SHOWN = ("samples", "temperature", "max_new_tokens", "seed", "dtype", "template")


# ------------------------------------------------------------------------------------ Settings
@dataclass
class ComparisonSettings:
    _argument_group_name = "what is compared"
    model: list[str] | None = flag(
        None, "hub ids, folders or runs; without it the bundled model and the newest finished run"
    )
    benchmarks: list[str] = flag(["demo"], f"of {', '.join(BENCHMARKS)}, or data files")
    limit: int | None = flag(None, "only the first so many problems of each")
    question_column: str | None = flag(None, "of a data file, if not found by usual names")
    answer_column: str | None = flag(None, "of a data file, if not found by usual names")
    compare: list[str] | None = flag(None, "folders of answers to compare, nothing is sampled")


@dataclass
class AnswerSettings:
    _argument_group_name = "how answers are made"
    template: str | None = flag(
        None, "qwen-math (if the tokenizer knows its tokens), none (else), chat, or a text file"
    )
    samples: int = flag(8, "k, answers to a problem [paper §4]; 1 if they are greedy")
    temperature: float = flag(0.6, "of sampling from all tokens [paper §4]; 0 is greedy")
    max_new_tokens: int = flag(1152, "longest answer [paper §4]")
    seed: int = flag(0, "of sampling [ours]")


@dataclass
class SpeedSettings:
    _argument_group_name = "speed and output"
    max_rows: int = flag(512, "answers of one generate call; lower it when memory runs out [ours]")
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "decode by CUDA graphs over one static KV cache; auto: on CUDA [ours]"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: bfloat16 on CUDA [ours]")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run")
    out: str | None = flag(
        None, "folder of the answers' folders; without it evals/, by the protocol"
    )


GROUPS = [ComparisonSettings, AnswerSettings, SpeedSettings]


@dataclass
class Settings(SpeedSettings, AnswerSettings, ComparisonSettings):
    """All settings of one benchmark."""


DEMO = {"temperature": 1.0, "max_new_tokens": 64}  # what the bundled model is trained with


# --------------------------------------------------------------- Figures, noise and differences
def pass_at_k(n: int, c: int, k: int) -> float:
    """Share of the k-subsets of n answers that hold one of c right ones (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(boxes: list[str | None], correct: list[int]) -> int:
    """The verdict on the most frequent of k boxes: 0 or 1. Equal answers count together, no box
    has no vote, and of a tie the first one wins."""
    counts = Counter(box for box in boxes if box)
    most_votes = 0
    verdict = 0
    for box in counts:
        votes = sum(n for other, n in counts.items() if is_equiv(box, other))
        if votes > most_votes:
            most_votes = votes
            verdict = correct[boxes.index(box)]
    return verdict


def scores(rows: list[dict]) -> list[float]:
    """Lines of problems.jsonl -> the percentage of right answers of each."""
    return [100 * fmean(row["correct"]) for row in rows]


def figures(rows: list[dict]) -> dict[str, list[float]]:
    """n lines of problems.jsonl -> the n values of each figure, the score first."""
    k = len(rows[0]["correct"])
    right = [sum(row["correct"]) for row in rows]
    values = {}
    values[f"avg@{k}, %" if k > 1 else "pass@1, %"] = scores(rows)
    powers_of_two = [2**i for i in range(1, k.bit_length())]
    for j in sorted({*powers_of_two, k}):
        if j > 1:
            values[f"pass@{j}, %"] = [100 * pass_at_k(k, c, j) for c in right]
    if k > 1:
        values[f"maj@{k}, %"] = [100 * row["majority"] for row in rows]
    values["response tokens"] = [fmean(row["tokens"]) for row in rows]
    values["truncated, %"] = [100 * fmean(row["truncated"]) for row in rows]
    values["no box, %"] = [100 * row["extracted"].count(None) / k for row in rows]
    return values


@dataclass(frozen=True)
class Cell:
    """A mean over problems and its standard error, which is not a number for a single problem."""
    mean: float
    error: float


def mean_and_error(values: list[float]) -> Cell:
    """[n] -> their mean and sqrt(s^2 / n), with s^2 over n - 1."""
    n = len(values)
    mean = fmean(values)
    if n == 1:
        return Cell(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Cell(mean, math.sqrt(variance / n))


def cells_of(columns: list[list[float]]) -> list[Cell]:
    """A column for each model -> a cell for each, then one for each later model minus the first.
    The differences are taken problem by problem, so that what is common to both cancels."""
    first = columns[0]
    cells = [mean_and_error(column) for column in columns]
    for later in columns[1:]:
        cells.append(mean_and_error([b - a for a, b in zip(first, later)]))
    return cells


def mean_of_cells(cells: list[Cell]) -> Cell:
    """The plain mean over benchmarks; their errors are independent."""
    n = len(cells)
    mean = fmean([cell.mean for cell in cells])
    return Cell(mean, math.hypot(*[cell.error for cell in cells]) / n)


def sign_flip_p(differences: list[int]) -> float:
    """Exact two-sided paired test of n differences in numbers of right answers.

    If two models were equal, each difference would be as likely with the other sign: p is the
    share of all 2^n choices of signs whose sum is at least as far from 0 as the one seen. With one
    answer to a problem it is McNemar's exact test.
    """
    largest = sum(abs(difference) for difference in differences)
    sums = torch.arange(-largest, largest + 1)
    chance = (sums == 0).double()  # of each sum, over the choices of signs so far
    for difference in differences:
        chance = (chance.roll(difference) + chance.roll(-difference)) / 2
    as_far = sums.abs() >= abs(sum(differences))
    return min(1.0, chance[as_far].sum().item())


# ------------------------------------------------------------------------------------ The table
def letter(i: int) -> str:
    return chr(ord("A") + i)


def cell_text(cell: Cell, form: str) -> str:
    """12.3 ± 0.4, or +12.3 ± 0.4 by the form +.1f"""
    if math.isnan(cell.error):
        return f"{cell.mean:{form}}"
    return f"{cell.mean:{form}} ± {cell.error:.1f}"


def table_lines(title: str, rows: dict[str, list[Cell]]) -> list[str]:
    """{name: cells_of(...)} -> aligned lines of text."""
    n_cells = len(next(iter(rows.values())))
    n_models = (n_cells + 1) // 2
    header = [title]
    header += [letter(i) for i in range(n_models)]
    header += [f"{letter(i)} - A" for i in range(1, n_models)]
    lines = [header]
    for name, cells in rows.items():
        texts = [cell_text(cell, ".1f") for cell in cells[:n_models]]
        texts += [cell_text(cell, "+.1f") for cell in cells[n_models:]]
        lines.append([f"  {name}", *texts])
    widths = [max(len(text) for text in column) for column in zip(*lines)]
    aligned = []
    for line in lines:
        texts = [line[0].ljust(widths[0])]
        texts += [text.rjust(width) for text, width in zip(line[1:], widths[1:])]
        aligned.append("   ".join(texts))
    return aligned


def in_group(rows: list[dict], column: str, name: str) -> list[dict]:
    return [row for row in rows if row["groups"].get(column) == name]


def group_cells(models: list[list[dict]]) -> dict[str, list[Cell]]:
    """The lines of each model -> scores by subject, level and the like."""
    table = {}
    for column in GROUP_COLUMNS:
        names = {row["groups"].get(column) for row in models[0]} - {None}
        if not 2 <= len(names) <= MOST_GROUPS:
            continue
        for name in sorted(names):
            members = [in_group(rows, column, name) for rows in models]
            label = f"{column} {name} ({len(members[0])})"
            table[label] = cells_of([scores(rows) for rows in members])
    return table


def verdict(name: str, first: list[dict], later: list[dict]) -> str:
    """Is what a model gains or loses against A more than chance? -> a line of text."""
    differences = [sum(b["correct"]) - sum(a["correct"]) for a, b in zip(first, later)]
    p = sign_flip_p(differences)
    place = "beyond" if p < 0.05 else "inside"
    return f"  {name} - A is {place} the noise (exact paired sign-flip test, p = {p:.2g})"


def protocol_line(protocols: list[dict]) -> str:
    """What the scores depend on most, and whatever else is not the same for all models."""
    words = []
    for key in protocols[0]:
        values = [str(protocol.get(key)) for protocol in protocols]
        different = list(dict.fromkeys(values))
        if key in ("model", "revision"):
            continue
        if key not in SHOWN and len(different) == 1:
            continue
        texts = [json.dumps(f"{value:.24}").strip('"') for value in different]
        words.append(f"{key} {' / '.join(texts)}")
    return f"  protocol: {', '.join(words)}"


# ----------------------------------------------------------------------- Folders with answers
@dataclass
class Answers:
    """One model's finished answers to a benchmark."""
    folder: Path
    protocol: dict
    rows: list[dict]                        # of problems.jsonl, in the order of the data


def load_answers(folder: Path) -> Answers:
    """Raises BadInput."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        protocol = summary["protocol"]
        rows = read_jsonl(folder / "problems.jsonl")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder}: these are no answers of eval.py ({error!r:.200}); give a folder with "
            "summary.json and problems.jsonl"
        ) from error
    require(
        len(rows) == protocol["problems"],
        f"{folder}: {len(rows)} of {protocol['problems']} problems are answered; repeat the "
        "command that made it",
    )
    rows.sort(key=lambda row: row["id"])
    return Answers(folder, protocol, rows)


def check_comparable(models: list[Answers]) -> None:
    """Raises BadInput unless all of them answer the same questions as often."""
    first = models[0]
    for other in models[1:]:
        for key in ("benchmark", "samples", "fingerprint"):
            old = first.protocol[key]
            new = other.protocol[key]
            require(
                old == new,
                f"--compare: {first.folder} has {key} {old!r} and {other.folder} has {new!r}; "
                "compare as many answers to the same questions",
            )


def benchmark_cells(models: list[Answers]) -> dict[str, list[Cell]]:
    values = [figures(model.rows) for model in models]
    table = {}
    for name in values[0]:
        table[name] = cells_of([value[name] for value in values])
    return table


def benchmark_lines(models: list[Answers]) -> list[str]:
    """The table of one benchmark and what belongs to it."""
    protocol = models[0].protocol
    rows = [model.rows for model in models]
    title = f"{protocol['benchmark']}, {protocol['problems']} problems"
    lines = table_lines(title, {**benchmark_cells(models), **group_cells(rows)})
    for i, later in enumerate(rows[1:], start=1):
        lines.append(verdict(letter(i), rows[0], later))
    lines.append(protocol_line([model.protocol for model in models]))
    folders = [str(model.folder) for model in models]
    lines.append(f"  answers and summary.json: {', '.join(folders)}")
    return lines


def report(names: list[str], benchmarks: list[list[Answers]]) -> None:
    """Print the tables of all benchmarks, and the mean of their scores."""
    for i, name in enumerate(names):
        print(f"{letter(i)} = {name}")
    first_rows = []
    for models in benchmarks:
        print("", *benchmark_lines(models), sep="\n")
        table = benchmark_cells(models)
        score = next(iter(table))
        first_rows.append(table[score])
    if len(benchmarks) > 1:
        means = [mean_of_cells(list(cells)) for cells in zip(*first_rows)]
        print("", *table_lines(f"mean of {len(benchmarks)} benchmarks", {score: means}), sep="\n")


def compare(folders: list[str]) -> int:
    """--compare -> exit status. Raises BadInput."""
    require(len(folders) > 1, "--compare: give two folders of answers or more")
    models = [load_answers(Path(folder)) for folder in folders]
    check_comparable(models)
    report([model.protocol["model"] for model in models], [models])
    return 0


# ------------------------------------------------------- A job: one model answers one benchmark
@dataclass
class Job:
    settings: Settings
    questions: list[dict]                   # with a "prompt", empty if it is too long
    protocol: dict
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "problems.jsonl"

    @property
    def batch_size(self) -> int:
        return max(1, self.settings.max_rows // self.settings.samples)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        block = file.read(2**20)
        while block:
            digest.update(block)
            block = file.read(2**20)
    return digest.hexdigest()


def revision(name: str) -> str:
    """The commit of a hub model; of a folder a hash of its files, without the optimiser's."""
    if not Path(name).is_dir():
        config = transformers.utils.cached_file(name, "config.json")
        return Path(config).parent.name
    files = [path for path in sorted(Path(name).iterdir()) if path.is_file()]
    texts = [path.name + file_hash(path) for path in files if path.name != "trainer_state.pt"]
    return short_hash("\n".join(texts))


def shown(name: str) -> str:
    """A bundled file has the same name wherever the project lies."""
    return name.removeprefix(f"{HERE}/")


def add_prompts(
    questions: list[dict], name: str, template: str, tokenizer: object, config: object, budget: int
) -> list[dict]:
    """The questions with their prompts, longest first: what needs most memory comes at once."""
    longest = config.max_position_embeddings - budget
    prepared = []
    for question in tqdm(questions, "tokenizing", leave=False, delay=1):
        prompt = build_prompt(question["question"], template, tokenizer)
        top = max(prompt, default=0)
        require(
            top < config.vocab_size,
            f"{name}: the prompt has token {tokenizer.convert_ids_to_tokens(top)!r} with id {top}, "
            f"but the model knows ids below {config.vocab_size} only; use another --template",
        )
        if len(prompt) > longest:
            prompt = []
        prepared.append({**question, "prompt": prompt})
    require(
        any(question["prompt"] for question in prepared),
        f"--max-new-tokens {budget}: no prompt fits with so long an answer into {name}'s context "
        f"of {config.max_position_embeddings} tokens; lower it",
    )
    prepared.sort(key=lambda question: (-len(question["prompt"]), question["id"]))
    return prepared


def make_protocol(
    benchmark: str, questions: list[dict], template: str, settings: Settings
) -> dict:
    """All that the answers depend on besides the model, for summary.json."""
    source = BENCHMARKS[benchmark][0] if benchmark in BENCHMARKS else benchmark
    device = choose_device(settings.device)
    asked = [[q["id"], q["question"], q["answer"]] for q in questions]
    code = [path.read_text("utf-8") for path in (HERE / "treerpo.py", Path(__file__))]
    return {
        "benchmark": benchmark,
        "dataset": shown(source),
        "problems": len(questions),
        "prompts_too_long": sum(not question["prompt"] for question in questions),
        "fingerprint": short_hash(json.dumps(sorted(asked))),
        "template": template,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "max_rows": settings.max_rows,  # samples and rounding depend on the rows beside them
        "compile": settings.compile,
        "dtype": choose_dtype(settings.dtype, device),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "code": short_hash("\n".join(code)),
    }


def choose_dtype(dtype: str, device: str) -> str:
    if dtype == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return dtype


def write_summary(folder: Path, protocol: dict, results: dict | None) -> None:
    text = json.dumps({"protocol": protocol, "results": results}, indent=1)
    aside = folder / "summary.json.tmp"
    aside.write_text(text + "\n")
    aside.replace(folder / "summary.json")


def open_folder(out: str | None, protocol: dict) -> Path:
    """The folder for answers of this protocol. Raises BadInput if it has answers of another."""
    benchmark = Path(protocol["benchmark"]).with_suffix("")
    name = re.sub(r"[^\w.]+", "-", f"{protocol['model']}-{benchmark}")
    name = name[-150:].strip("-.")
    if out is not None:
        folder = Path(out) / name
    else:
        folder = Path("evals") / f"{name}-{short_hash(json.dumps(protocol))[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "summary.json").exists():
            write_summary(folder, protocol, None)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there ({error})") from error
    try:
        saved = json.loads((folder / "summary.json").read_bytes())["protocol"]
    except (ValueError, KeyError) as error:
        raise BadInput(
            f"--out: {folder}/summary.json cannot be read ({error!r:.200}); remove the folder or "
            "choose another --out"
        ) from error
    for key, new in protocol.items():
        old = saved.get(key)
        require(
            old == new,
            f"--out: {folder} has answers with {key} {old!r:.60}, not {new!r:.60}; choose another",
        )
    return folder


def prepare_jobs(name: str, data: dict[str, list[dict]], given: dict) -> list[Job]:
    """All jobs of a model, without its weights. Raises BadInput."""
    tokenizer = load_tokenizer(name)
    config = load_config(name)
    of_model = {"model": shown(name), "revision": revision(name)}
    jobs = []
    for benchmark, questions in data.items():
        settings = settings_for(benchmark, given)
        template = load_template(settings.template, tokenizer, config.vocab_size)
        prepared = add_prompts(
            questions, name, template, tokenizer, config, settings.max_new_tokens
        )
        protocol = {**of_model, **make_protocol(benchmark, prepared, template, settings)}
        folder = open_folder(settings.out, protocol)
        if protocol["prompts_too_long"]:
            print(
                f"{benchmark}: {protocol['prompts_too_long']} prompts are too long for "
                f"{shown(name)} and count as wrong and truncated"
            )
        jobs.append(Job(settings, prepared, protocol, folder))
    return jobs


def groups_of(question: dict) -> dict[str, str]:
    """{"subject": "Algebra", "level": "5"} from the columns of the data."""
    groups = {}
    for column in GROUP_COLUMNS:
        value = question["row"].get(column)
        if type(value) in (str, int):
            groups[column] = str(value)
    return groups


def new_row(question: dict) -> dict:
    """A line of problems.jsonl, without answers."""
    return {
        "id": question["id"],
        "question": question["question"],
        "gold": question["answer"],
        "groups": groups_of(question),
        "outputs": [],
        "extracted": [],
        "correct": [],
        "tokens": [],
        "truncated": [],
    }


def add_answer(row: dict, text: str, correct: int, n_tokens: int, truncated: bool) -> None:
    row["outputs"].append(text)
    row["extracted"].append(extract_boxed(text))
    row["correct"].append(correct)
    row["tokens"].append(n_tokens)
    row["truncated"].append(truncated)


def answer_batch(
    batch: list[dict],
    samples: int,
    budget: int,
    model: torch.nn.Module,
    tokenizer: object,
    decoding: Decoding,
) -> list[dict]:
    """`samples` verified answers to each question -> a line of problems.jsonl for each."""
    rows = [new_row(question) for question in batch]
    asked = []
    rows_asked = []
    for question, row in zip(batch, rows):
        if question["prompt"]:
            asked.append(question)
            rows_asked.append(row)
        else:
            for _ in range(samples):
                add_answer(row, "", 0, 0, True)
    prompts = [question["prompt"] for question in asked]
    answers = [question["answer"] for question in asked]
    trees = sample_trees(model, prompts, [samples], [budget], decoding)
    leaves, texts = verify_leaves(trees, answers, tokenizer)
    for leaf, text in zip(leaves, texts):
        row = rows_asked[leaf.parent.question]
        add_answer(row, text, int(leaf.reward), len(leaf.tokens), not leaf.done)
    for row in rows:
        row["majority"] = majority(row["extracted"], row["correct"])
    return rows


def is_answered(job: Job) -> bool:
    return job.path.exists() and job.path.read_bytes().count(b"\n") == len(job.questions)


def kept_rows(job: Job) -> list[dict]:
    """The lines that a stopped command left, cut to whole batches: samples depend on the rows
    beside them, so half a batch is answered again as a whole."""
    job.path.touch()
    lines = job.path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    n_kept = len(lines)
    if n_kept < len(job.questions):
        n_kept -= n_kept % job.batch_size
    kept = lines[:n_kept]
    aside = job.path.with_suffix(".tmp")
    aside.write_bytes(b"".join(kept))
    aside.replace(job.path)
    return [json.loads(line) for line in kept]


def lock_folder(folder: Path) -> object:
    """-> a file that keeps other processes out until it is closed. Raises BadInput."""
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, also after a kill
    except BlockingIOError as error:
        lock.close()
        raise BadInput(f"{folder}: another process is using this folder") from error
    return lock


def answer_job(
    job: Job, model: torch.nn.Module, tokenizer: object, decoding: Decoding
) -> None:
    """Answer what is not answered yet, batch by batch."""
    settings = job.settings
    n_questions = len(job.questions)
    with lock_folder(job.folder):
        rows = kept_rows(job)
        with tqdm(total=n_questions, initial=len(rows), desc=job.folder.name) as bar:
            status = Status(bar)
            decoding = dataclasses.replace(
                decoding, temperature=settings.temperature, progress=status.tokens
            )
            for start in range(len(rows), n_questions, job.batch_size):
                score = f"score {fmean(scores(rows)):.1f} %, " if rows else ""
                status.phase(f"{score}this batch")
                batch = job.questions[start:start + job.batch_size]
                torch.manual_seed(random.Random(f"{settings.seed} {start}").getrandbits(63))
                answered = answer_batch(
                    batch, settings.samples, settings.max_new_tokens, model, tokenizer, decoding
                )
                append_jsonl(job.path, answered)
                rows += answered
                bar.update(len(answered))


def answer_jobs(name: str, jobs: list[Job]) -> None:
    """Load a model if anything is left to answer, and answer it. Raises BadInput."""
    todo = [job for job in jobs if not is_answered(job)]
    if not todo:
        return
    settings = todo[0].settings
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    print(f"loading {shown(name)} on {device} in {dtype}", flush=True)
    tokenizer = load_tokenizer(name)
    model = load_model(name, device, getattr(torch, dtype))
    decoding = make_decoding(model, tokenizer, settings.temperature, settings.max_rows)
    lengths = []
    for job in todo:
        longest_prompt = len(job.questions[0]["prompt"])
        lengths.append(longest_prompt + job.settings.max_new_tokens)
    decoding = add_workspace(model, decoding, max(lengths), settings.compile)
    for job in todo:
        answer_job(job, model, tokenizer, decoding)


def free_memory(device: str) -> None:
    """Make room for the next model. CUDA graphs hold what they were recorded with."""
    if device == "cuda":
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def summarise(job: Job) -> Answers:
    """Write the figures into summary.json -> the answers."""
    answers = load_answers(job.folder)
    results = {}
    for name, values in figures(answers.rows).items():
        cell = mean_and_error(values)
        error = None if math.isnan(cell.error) else cell.error
        results[name] = {"mean": cell.mean, "standard_error": error}
    write_summary(job.folder, job.protocol, results)
    return answers


# --------------------------------------------------------------------- Benchmarks and models
def read_benchmarks(settings: Settings) -> dict[str, list[dict]]:
    """The questions of each benchmark. One on the hub that cannot be read is named and left out;
    anything else that cannot raises BadInput."""
    data = {}
    for name in settings.benchmarks:
        columns = (name, settings.question_column, settings.answer_column)
        try:
            questions = load_questions(*BENCHMARKS.get(name, columns), skip_unanswered=True)
        except BadInput as error:
            if name == "demo" or name not in BENCHMARKS:
                raise
            print(
                f"eval.py: {name} is missing: {error}. A local copy does, too: --benchmarks FILE",
                file=sys.stderr,
            )
            continue
        data[name] = questions[:settings.limit]
    return data


def is_finished(run: Path) -> bool:
    """Whether this is a run's folder whose log has reached its last step."""
    try:
        steps = json.loads((run / "config.json").read_bytes())["steps"]
        rows = read_jsonl(run / "metrics.jsonl")
        return rows[-1]["step"] == steps and newest_checkpoint(run) is not None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return False


def newest_finished_run() -> Path | None:
    finished = [run for run in Path("runs").glob("*") if is_finished(run)]
    return max(finished, key=lambda run: (run / "metrics.jsonl").stat().st_mtime, default=None)


def find_models(given: list[str] | None) -> list[str]:
    """--model -> hub ids and folders; of a run its newest checkpoint. Raises BadInput."""
    names = given
    if names is None:
        names = [str(HERE / "demo/model")]
        run = newest_finished_run()
        if run is None:
            print("there is no finished run under runs/ to compare with")
        else:
            names.append(str(run))
    found = []
    for name in names:
        checkpoint = newest_checkpoint(name)
        is_run = (Path(name) / "metrics.jsonl").exists()
        require(checkpoint or not is_run, f"--model {name}: this run has no checkpoint yet")
        found.append(str(checkpoint or name))
    return found


def evaluate(settings: Settings, given: dict) -> int:
    """Every model answers every benchmark; then the tables -> exit status. Raises BadInput."""
    data = read_benchmarks(settings)
    if not data:
        return 1
    names = find_models(settings.model)
    jobs = [prepare_jobs(name, data, given) for name in names]
    device = choose_device(settings.device)
    for name, jobs_of_model in zip(names, jobs):
        answer_jobs(name, jobs_of_model)
        free_memory(device)
    benchmarks = []
    for jobs_of_benchmark in zip(*jobs):
        benchmarks.append([summarise(job) for job in jobs_of_benchmark])
    report([shown(name) for name in names], benchmarks)
    missing = set(settings.benchmarks) - set(data)
    return 1 if missing else 0


# -------------------------------------------------------------------------------- Command line
def make_parser() -> HfArgumentParser:
    return HfArgumentParser(
        GROUPS,
        prog="eval.py",
        usage="python eval.py [flags]",
        description="Benchmark scores with standard errors, paired differences and the protocol.",
        epilog=(
            f"The demo's answers are made with --temperature {DEMO['temperature']} and "
            f"--max-new-tokens {DEMO['max_new_tokens']}. Exit status: 0 done, 1 a hub benchmark is "
            "missing and the others ran, 2 bad input, full disk or memory, 130 interrupted."
        ),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def settings_for(benchmark: str, given: dict) -> Settings:
    """Defaults, then the demo's or the greedy preset, then the flags that were given."""
    preset = {}
    if benchmark == "demo":
        preset.update(DEMO)
    if given.get("temperature") == 0:
        preset["samples"] = 1
    return Settings(**{**preset, **given})


def check_settings(settings: Settings, given: dict) -> None:
    """Raises BadInput."""
    for name in ("limit", "samples", "max_new_tokens", "max_rows"):
        number = getattr(settings, name)
        dashed = name.replace("_", "-")
        require(number is None or number > 0, f"--{dashed} {number}: it must be above 0")
    temperature = settings.temperature
    require(
        temperature == 0 or 0.001 <= temperature < math.inf,
        f"--temperature {temperature}: give 0 for greedy answers, or 0.001 and more",
    )
    require(
        temperature > 0 or settings.samples == 1,
        f"--samples {settings.samples}: all greedy answers are the same; leave it out, or give "
        "--temperature above 0",
    )
    for name in settings.benchmarks:
        require(
            name in BENCHMARKS or Path(name).is_file(),
            f"--benchmarks {name}: neither one of {', '.join(BENCHMARKS)} nor a data file",
        )
    own_data = set(settings.benchmarks) - set(BENCHMARKS)
    for name in ("question_column", "answer_column"):
        require(
            own_data or name not in given,
            f"--{name.replace('_', '-')} {given.get(name)}: it is for data files; the columns of "
            "benchmarks are known",
        )


def check_compare(given: dict) -> None:
    """Raises BadInput."""
    others = [f"--{name.replace('_', '-')}" for name in given if name != "compare"]
    require(
        not others,
        f"--compare: {', '.join(others)} has no effect on answers made earlier; leave it out",
    )


def run(argv: list[str] | None) -> int:
    """Raises BadInput; argparse exits with status 2 by itself."""
    given = read_flags(make_parser(), Settings, argv)
    settings = settings_for("", given)
    if settings.compare is not None:
        check_compare(given)
        return compare(settings.compare)
    check_settings(settings, given)
    return evaluate(settings, given)


def main(argv: list[str] | None = None) -> int:
    escape_unprintable()
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("eval.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (BadInput, OSError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if "memory" not in f"{type(error).__name__} {error}".lower():
            raise
        print(f"eval.py: error: out of memory, lower --max-rows ({error})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
