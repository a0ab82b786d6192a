"""Measure the verifier on labelled pairs and on rewrites and edits of real answers.

    python experiments/verifier.py questions.jsonl [more.jsonl ...] [--pairs pairs.jsonl]
                                   [--out experiments/results/verifier.jsonl] [--no-math-verify]

Question files are JSONL; the right answer stands in final_answer, answer or solution. For each file
this prints how many of its answers can be read, and it compares every answer with itself, with
rewrites that keep its value, edits that change it, and other answers of its file (known to differ
only where both are plain numbers; otherwise agreement is counted, and no truth).

A pairs file has one JSON object a line: {"completion", "answer"} or {"a", "b"}, "right" (the
verdict), and "group" and "kind", by which the table is split. Results hold answers, no questions.
Math-Verify is measured beside ours; it is used here and nowhere else:
pip install math-verify "latex2sympy2_extended[antlr4_13_2]"
"""
import argparse
import importlib.util
import json
import random
import re
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from treerpo import extract_boxed, is_equiv, is_readable, reward_fn  # noqa: E402


def replace(old: str, new: str) -> Callable:
    return lambda text: text.replace(old, new)


NUMBER = re.compile(r"(\d|[-+.(){} ]|\\d?frac|\\sqrt|\\pi)+")
FRACTION = re.compile(r"(?<!\d)(?<!\d )\\d?frac\{([^{}]*)\}\{([^{}]*)\}")  # no mixed number
KEEPING = {
    "spaces": lambda text: f" {text} ",
    "dollars": lambda text: f"${text}$",
    "full stop": lambda text: text if text.endswith(".") else f"{text}.",
    "dfrac": replace(r"\frac", r"\dfrac"),
    "left-right": lambda text: replace_brackets(text),
    "thin space": lambda text: rf"\,{text}",
    "x =": lambda text: f"x = {text}" if NUMBER.fullmatch(text) else text,
    "a/b": lambda text: FRACTION.sub(r"(\1)/(\2)", text),
    "sqrt()": lambda text: re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text),
    "pi": lambda text: re.sub(r"\\pi(?![A-Za-z])", "π", text),
    "n.0": lambda text: f"{text}.0" if re.fullmatch(r"-?\d{1,3}", text) else text,
    "bmatrix": replace("pmatrix", "bmatrix"),
    "row space": replace(r" \\ ", r" \\[4pt] "),
}
CHANGING = {
    "sign": lambda text: f"-({text})",
    "plus one": lambda text: f"({text})+1",
    "double": lambda text: f"2({text})",
    "pair": lambda text: f"({text}, 1)",
    "greater": lambda text: f"x > {text}",
    "squared": lambda text: rf"{text}\text{{ squared}}",
    "list": lambda text: rf"{text} \text{{ or }} 10^9",
}
NONZERO_NUMBER = re.compile(r"-?[1-9]\d*(\.\d+)?|-?\\frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{\d+\}")


def replace_brackets(text: str) -> str:
    if r"\left" in text or r"\{" in text or text.count("(") != text.count(")"):
        return text
    return text.replace("(", r"\left(").replace(")", r"\right)")


def load_golds(path: str) -> list[str]:
    """The right answers of a question file, without the dollar signs around them."""
    golds = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = {key.lower(): value for key, value in json.loads(line).items()}
        found = [row[key] for key in ("final_answer", "answer", "solution") if row.get(key)]
        gold = found[0] if found else ""
        gold = gold[0] if isinstance(gold, list) else gold
        text = str(gold).rsplit("####", 1)[-1].strip()
        text = (extract_boxed(text) or "") if r"\boxed" in text else text
        golds.append(text[1:-1] if re.fullmatch(r"\$[^$]*\$", text) else text)
    return [gold for gold in golds if gold]


def plain_number(text: str) -> Fraction | None:
    """The value if the text is a plain number, for which the truth needs no grader."""
    text = text.replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def pairs_of_golds(name: str, golds: list[str], others: int, rng: random.Random) -> list[dict]:
    """Every answer with itself, its rewrites, its edits and `others` other answers."""
    pairs = []

    def add(kind: str, a: str, b: str, truth: bool | None) -> None:
        pairs.append({"source": name, "kind": kind, "a": a, "b": b, "truth": truth})

    for gold in golds:
        add("itself", gold, gold, True)
        for kind, rewrite in KEEPING.items():
            if rewrite(gold) != gold:
                add(f"rewrite: {kind}", gold, rewrite(gold), True)
        if NONZERO_NUMBER.fullmatch(gold):
            for kind, edit in CHANGING.items():
                add(f"edit: {kind}", gold, edit(gold), False)
        for other in rng.sample(golds, min(others, len(golds))):
            if other != gold:
                a = plain_number(gold)
                b = plain_number(other)
                add("other answer", gold, other, None if a is None or b is None else a == b)
    return pairs


def labelled_pairs(path: str) -> list[dict]:
    pairs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pair = {"source": row["group"], "kind": row["kind"], "truth": row["right"]}
        pair["a"] = row["answer"] if "answer" in row else row["a"]
        pair["b"] = row["completion"] if "completion" in row else row["b"]
        pair["is_completion"] = "completion" in row
        pairs.append(pair)
    return pairs


def ours(pair: dict) -> bool:
    if pair.get("is_completion"):
        return reward_fn(pair["b"], pair["a"]) == 1.0
    return is_equiv(pair["a"], pair["b"])


def math_verify(pair: dict) -> bool:
    """Its verdict, called as its documentation says: the right answer first."""
    from math_verify import parse, verify

    answer = pair["b"] if pair.get("is_completion") else rf"\boxed{{{pair['b']}}}"
    return bool(verify(parse(rf"\boxed{{{pair['a']}}}"), parse(answer)))


def judge(pairs: list[dict], name: str, grader: Callable) -> None:
    """Enter verdict and CPU time; a grader that stops is a result, too."""
    for pair in pairs:
        start = time.process_time()
        try:
            pair[name] = grader(pair)
        except Exception as error:
            pair[name] = type(error).__name__
        pair[f"{name}_ms"] = round(1000 * (time.process_time() - start), 3)


def print_table(pairs: list[dict], names: list[str], key: str) -> None:
    """Share of right verdicts and number of false positives, by source or kind."""
    columns = [f"{name} right | {name} false positives" for name in names]
    print("| " + " | ".join([key, "pairs", *columns]) + " |")
    print("|---|---|" + "---|---|" * len(names))
    for value in dict.fromkeys(pair[key] for pair in pairs):
        known = [pair for pair in pairs if pair[key] == value and pair["truth"] is not None]
        if not known:
            continue
        cells = [value, str(len(known))]
        for name in names:
            right = sum(pair[name] == pair["truth"] for pair in known)
            false = sum(pair[name] is True and pair["truth"] is False for pair in known)
            cells += [f"{right / len(known):.1%}", str(false)]
        print("| " + " | ".join(cells) + " |")


def print_report(pairs: list[dict], names: list[str]) -> None:
    print("\nWrong verdicts")
    for pair in pairs:
        if pair["truth"] is None:
            continue
        wrong = ", ".join(name for name in names if pair[name] != pair["truth"])
        says = "equal" if pair["truth"] else "different"
        if wrong:
            print(f"  {wrong}: {pair['kind']}: {pair['a']} ~ {pair['b']} ({says})")
    unknown = [pair for pair in pairs if pair["truth"] is None and pair["ours"] is True]
    print(f"\nDifferent answers of one file that ours calls equal: {len(unknown)}")
    for pair in unknown:
        print(f"  {pair['source']}: {pair['a']} ~ {pair['b']}")
    for key in ("source", "kind"):
        print()
        print_table(pairs, names, key)
    print()
    for name in names:
        times = [pair[f"{name}_ms"] for pair in pairs]
        print(f"{name}: {sum(times) / len(times):.2f} ms CPU a pair, longest {max(times):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="question files (JSONL)")
    parser.add_argument("--pairs", help="labelled pairs (JSONL)")
    parser.add_argument("--out", default="experiments/results/verifier.jsonl")
    parser.add_argument("--others", type=int, default=3, help="other answers to compare each with")
    parser.add_argument("--no-math-verify", action="store_true", help="measure ours alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.files and not args.pairs:
        parser.error("nothing to measure: give question files, or --pairs")
    graders = {"ours": ours}
    if not args.no_math_verify:
        if importlib.util.find_spec("math_verify") is None:
            parser.error('math-verify is missing: pip install math-verify "latex2sympy2_extended'
                         '[antlr4_13_2]", or give --no-math-verify')
        graders["math_verify"] = math_verify

    rng = random.Random(args.seed)
    pairs = labelled_pairs(args.pairs) if args.pairs else []
    for path in args.files:
        golds = load_golds(path)
        unreadable = [gold for gold in golds if not is_readable(gold)]
        share = 1 - len(unreadable) / len(golds)
        print(f"{Path(path).stem}: {len(golds)} answers, {share:.2%} can be read, not {unreadable}")
        pairs += pairs_of_golds(Path(path).stem, golds, args.others, rng)

    for name, grader in graders.items():
        judge(pairs, name, grader)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    print_report(pairs, list(graders))


if __name__ == "__main__":
    main()
