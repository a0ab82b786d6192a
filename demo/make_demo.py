"""Makes the bundled demo from nothing: word problems, a tokenizer and a tiny base model that RL can improve in minutes.

    python make_demo.py                                    # writes model/, train.jsonl and test.jsonl next to this file

The task. A question is a chain of operations on one number; the answer writes one line per operation and a box:

    Tom has 21 coins, loses 7, triples them, finds 3, doubles them. How many now?
    So:21-7=14
    Maybe now:14*3=44
    Thus:44+3=47
    So:47*2=94
    \\boxed{94}

A prompt is the bare question. The answer begins with its own newline, so stripping the question changes nothing.
Every number stays within 1..99, on wrong paths too, and so the longest answer in style is known (`max_answer_tokens`).

The base model. RL can only strengthen what is sampled now and then, so the base is taught the right behaviour together
with flaws, in two phases of supervised training:
  1. clean   every line is right: the model learns the arithmetic
  2. flawed  each line is on its own careful or careless; a careful line (So, Thus) is right 95 % of the time,
             a careless one (Maybe) 20 %; a few answers come before the last operation; some lines carry a filler word
Errors are thus random at every line and always downwards, so that a later one seldom makes up for an earlier one
(in about 3 % of the right answers): a wrong line nearly always loses the answer, and the task itself knows which line
it was (`check_lines`). Noise from the start would hide the arithmetic from so small a model; hence the order.
No question of train.jsonl or test.jsonl, whatever its names and nouns, is ever shown in either phase.

Training runs for a number of steps, on one thread, from one seed: the same versions on the same kind of processor make
the same files.
"""
import argparse
import json
import os
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# ---------------------------------------------------------------------------------------------------------- questions

LOW, HIGH = 1, 99  # every number in a chain, right or wrong
NAMES = "Tom Ann Ben Eva Max Lea Sam Ida".split()
ITEMS = "coins cards books shells stamps apples".split()
VERBS = {"-": "loses spends drops".split(), "+": "finds wins gets".split()}
TIMES = {2: "doubles", 3: "triples"}
IN_WORDS = {"-": "minus", "+": "plus", "*": "times"}


def apply_op(value, op):
    sign, operand = op
    return value - operand if sign == "-" else value + operand if sign == "+" else value * operand


def stays_in_range(value, ops):
    """Whether `value` and every number that `ops` make of it lie within LOW..HIGH."""
    for op in ops:
        if not LOW <= value <= HIGH:
            return False
        value = apply_op(value, op)
    return LOW <= value <= HIGH


def make_question(rng, ops=4, restate=False):
    """One random question with `ops` operations.

    Returns a row of the data files: question (the prompt), answer (decimal digits), start (the first number), ops (a
    list of [sign, operand], in order) and facts (the question's first sentence, which a restated answer repeats).
    `restate` is stored in the row: answers to it open with the facts and a plan.
    """
    start = value = rng.randint(2, 40)
    chain = []
    for _ in range(ops):
        choices = [[s, n] for s in "-+" for n in range(2, 10)] + [["*", n] for n in TIMES for _ in range(6)]
        op = rng.choice([op for op in choices if LOW <= apply_op(value, op) <= HIGH])
        value = apply_op(value, op)
        chain.append(op)
    words = [f"{TIMES[n]} them" if s == "*" else f"{rng.choice(VERBS[s])} {n}" for s, n in chain]
    facts = ", ".join([f"{rng.choice(NAMES)} has {start} {rng.choice(ITEMS)}", *words]) + "."
    return dict(question=facts + " How many now?", answer=str(value), start=start, ops=chain, facts=facts,
                restate=restate)


def chain_key(row):
    """What makes two questions the same: the numbers and operations, whatever the names, nouns and verbs."""
    return row["start"], tuple(map(tuple, row["ops"]))


# ------------------------------------------------------------------------------------------------------------ answers

CAREFUL, CARELESS, FILLERS = ["So", "Thus"], ["Maybe"], "now then well".split()
CLEAN = dict(careful_right=1.0, careless_right=1.0, premature=0.0)  # overrides of the flaws in the first phase
LINE = re.compile(r":(\d+)([-+*])(\d+)=(\d+)$")
BOX = re.compile(r"\\boxed\{(\d+)\}")


def write_opening(row):
    """What an answer says before its first step: nothing, or the facts and a plan."""
    plan = ",".join(f"{IN_WORDS[sign]} {operand}" for sign, operand in row["ops"])
    return f"\nGiven:{row['facts']}\nPlan:start {row['start']},{plan}." if row["restate"] else ""


def write_answer(row, rng, careful, careful_right, careless_right, filler, premature):
    """A random answer to the question `row`, flawed at the given rates.

    careful: share of careful lines; careful_right, careless_right: how often such a line is right; filler: share of
    lines with a filler word; premature: chance, before each line but the first, of giving the answer there and then.
    """
    text, value = write_opening(row), row["start"]
    for i, op in enumerate(row["ops"]):
        if i and rng.random() < premature:
            break
        is_careful = rng.random() < careful
        marker = rng.choice(CAREFUL if is_careful else CARELESS)
        marker += " " + rng.choice(FILLERS) if rng.random() < filler else ""
        (sign, operand), result = op, apply_op(value, op)
        if rng.random() >= (careful_right if is_careful else careless_right):
            # A slip in the result or an operand misread, always downwards: later errors seldom make up for it.
            wrong = [(operand, result + slip) for slip in (-10, -2, -1)]
            misread = operand + 1 if sign == "-" else operand - 1
            wrong += [(misread, apply_op(value, (sign, misread)))] if 2 <= misread <= 9 else []
            wrong = [w for w in wrong if w[1] != result and stays_in_range(w[1], row["ops"][i + 1:])]
            operand, result = rng.choice(wrong) if wrong else (operand, result)
        text += f"\n{marker}:{value}{sign}{operand}={result}"
        value = result
    return text + f"\n\\boxed{{{value}}}"


def check_lines(row, completion):
    """Labels the lines of an answer right or wrong, each on its own, given what the answer wrote before it.

    The i-th line with a `=` is right if it reads PREVIOUS SIGN OPERAND = RESULT where PREVIOUS is the number that the
    line before it arrived at (the question's start for the first line), SIGN OPERAND is the question's i-th operation
    and RESULT is what that makes. So the line after an error is right if it goes on correctly from the wrong number.
    The line with `\\boxed` is right if it repeats the last line's result and no operation is left out.
    Other lines (restated facts, a plan) decide nothing and are not labelled. A line cut off after its `=` is wrong.

    Returns a list of (start, end, right): the line is completion[start:end], with the newline that opens it.
    """
    labels, done, value = [], 0, row["start"]
    for line in re.finditer(r"\n?[^\n]+", completion):
        if "\\boxed" in line[0]:
            box = BOX.search(line[0])
            right = bool(box) and int(box[1]) == value and done == len(row["ops"])
        elif "=" in line[0]:
            step = LINE.search(line[0])
            op = row["ops"][done] if done < len(row["ops"]) else None
            right = bool(step and op) and (int(step[1]), step[2], int(step[3])) == (value, *op)
            right = right and int(step[4]) == apply_op(value, op)
            value, done = int(step[4]) if step else value, done + 1
        else:
            continue
        labels.append((*line.span(), right))
    return labels


def is_correct(row, completion):
    boxes = BOX.findall(completion)
    return bool(boxes) and boxes[-1] == row["answer"]


# -------------------------------------------------------------------------------------------------- tokenizer, model

EOS = "<|endoftext|>"


def build_tokenizer():
    """Qwen2's own kind of tokenizer (byte-level BPE, single digits), trained so that each word is one token.

    Another kind would not survive: for a qwen2 checkpoint AutoTokenizer always builds this class. All 256 bytes are in
    the vocabulary, so any text can be encoded; decoding joins the pieces and loses nothing.
    """
    words = [*NAMES, *ITEMS, *sum(VERBS.values(), []), *TIMES.values(), *IN_WORDS.values(), *CAREFUL, *CARELESS,
             *FILLERS]
    words += "has them How many now Given Plan start".split()
    tokenizer = Qwen2Tokenizer(unk_token=None)  # pad == eos on purpose, as in most base models
    trainer = trainers.BpeTrainer(vocab_size=10_000, special_tokens=[EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.backend_tokenizer.train_from_iterator([*words, *(" " + word for word in words), "\\boxed"], trainer)
    return tokenizer


def build_model(tokenizer, hidden, layers):
    eos = tokenizer.eos_token_id
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=eos, pad_token_id=eos))


def max_answer_tokens(tokenizer, row):
    """Tokens of the longest answer to `row` that the style allows, with its end-of-sequence token."""
    longest = write_opening(row) + len(row["ops"]) * "\nMaybe well:99+9=99" + "\n\\boxed{99}"
    return len(tokenizer(longest).input_ids) + 1


# ----------------------------------------------------------------------------------------------------------- training


def train(model, tokenizer, steps, batch_size, lr, next_row, rng, flaws, name):
    """`steps` AdamW steps of next-token prediction on the answers only; the questions are random numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer,
                                                 lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup)))
    bar, average = tqdm(range(steps), desc=name, unit="step"), None
    for _ in bar:
        rows = [next_row() for _ in range(batch_size)]
        prompts = tokenizer([row["question"] for row in rows]).input_ids
        answers = tokenizer([write_answer(row, rng, **flaws) + EOS for row in rows]).input_ids
        width = max(len(p) + len(a) for p, a in zip(prompts, answers))
        ids = torch.full((batch_size, width), tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)  # from the lengths: the real end has the same id as the padding
        for i, (p, a) in enumerate(zip(prompts, answers)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        logits = model(ids).logits  # [batch, width, vocab]; causal, so padding on the right is never seen
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.3f}")


@torch.no_grad()
def sample_answers(model, tokenizer, rows, samples, max_new_tokens, do_sample=True):
    """`samples` answers to each question, temperature 1, whole vocabulary: [(row, text, tokens with the end)]."""
    tokenizer.padding_side = "left"
    prompts = [row["question"] for row in rows for _ in range(samples)]
    out = []
    for at in tqdm(range(0, len(prompts), 512), desc="evaluate", unit="batch"):
        batch = tokenizer(prompts[at : at + 512], return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = model.generate(**batch, do_sample=do_sample, top_k=0 if do_sample else None,
                             max_new_tokens=max_new_tokens)
        for i, new in enumerate(ids[:, batch.input_ids.shape[1] :].tolist()):
            end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
            out.append((rows[(at + i) // samples], tokenizer.decode(new[:end], skip_special_tokens=True), end))
    return out


def report(model, tokenizer, rows, samples, limit):
    """Prints the accuracy of `rows`, sampled and greedy, the share of right lines, the lengths of the answers."""
    answers = sample_answers(model, tokenizer, rows, samples, limit)
    greedy = sample_answers(model, tokenizer, rows, 1, limit, do_sample=False) if samples else []
    lines = [right for row, text, _ in answers for *_, right in check_lines(row, text)]
    lengths = [length for *_, length in answers]
    prompts = [len(tokenizer(row["question"]).input_ids) for row in rows]
    right = [is_correct(row, text) for row, text, _ in answers]
    print(f"sampled accuracy {sum(right) / len(right):.3f} ({len(rows)} questions x {samples}), "
          f"greedy {sum(is_correct(r, t) for r, t, _ in greedy) / len(greedy):.3f}, "
          f"right lines {sum(lines) / len(lines):.3f}")
    print(f"answer tokens mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)} (limit {limit}); "
          f"question tokens mean {sum(prompts) / len(prompts):.1f}, max {max(prompts)}")
    print(rows[0]["question"] + answers[0][1])


# --------------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("task")
    group.add_argument("--ops", type=int, default=4, help="operations in a question, lines in its answer")
    group.add_argument("--restate", action="store_true", help="answers open with the facts restated and a plan")
    group.add_argument("--train-questions", type=int, default=2000, help="questions in train.jsonl")
    group.add_argument("--test-questions", type=int, default=256, help="questions in test.jsonl")
    group = parser.add_argument_group("flaws of the base model")
    group.add_argument("--careful", type=float, default=0.64, help="share of careful lines; the others are careless")
    group.add_argument("--careful-right", type=float, default=0.95, help="how often a careful line is right")
    group.add_argument("--careless-right", type=float, default=0.2, help="how often a careless line is right")
    group.add_argument("--filler", type=float, default=0.15, help="share of lines with a filler word")
    group.add_argument("--premature", type=float, default=0.015, help="chance before each later line to answer at once")
    group = parser.add_argument_group("model and training")
    group.add_argument("--hidden", type=int, default=96, help="hidden size, a multiple of 24")
    group.add_argument("--layers", type=int, default=3, help="transformer layers")
    group.add_argument("--clean-steps", type=int, default=3000, help="steps on answers without errors")
    group.add_argument("--flawed-steps", type=int, default=1000, help="steps on flawed answers")
    group.add_argument("--batch-size", type=int, default=32, help="answers in a step")
    group.add_argument("--lr", type=float, default=2e-3,
                       help="peak learning rate of the clean phase; flawed: a quarter")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    group.add_argument("--seed", type=int, default=0, help="seed of the questions, the weights and the training")
    group.add_argument("--samples", type=int, default=8, help="sampled answers to a test question in the final check")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(args.seed)
    rng, held_out, splits = random.Random(args.seed), set(), {}
    for split, size in (("test", args.test_questions), ("train", args.train_questions)):
        splits[split] = []
        while len(splits[split]) < size:
            row = make_question(rng, args.ops, args.restate)
            if chain_key(row) not in held_out:
                held_out.add(chain_key(row))
                splits[split].append(dict(id=f"{split}-{len(splits[split])}", **row))

    def next_row():
        while chain_key(row := make_question(rng, args.ops, args.restate)) in held_out:
            pass
        return row

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.hidden, args.layers)
    flaws = {name: getattr(args, name) for name in "careful careful_right careless_right filler premature".split()}
    clock = time.process_time()
    train(model, tokenizer, args.clean_steps, args.batch_size, args.lr, next_row, rng, flaws | CLEAN, "clean ")
    train(model, tokenizer, args.flawed_steps, args.batch_size, args.lr / 4, next_row, rng, flaws, "flawed")
    print(f"trained in {time.process_time() - clock:.0f} CPU seconds")

    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    for split, rows in splits.items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (args.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    limit = max(max_answer_tokens(tokenizer, row) for row in splits["test"])
    report(model.eval(), tokenizer, splits["test"], args.samples, limit)


if __name__ == "__main__":
    main()
