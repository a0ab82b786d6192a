"""Compare the verifier with Math-Verify on the golds of question files and on the cases of test_treerpo.py.

    python experiments/verifier.py questions.jsonl [more.jsonl ...] [--out experiments/results/verifier.jsonl]

Pairs whose truth is known by construction: every gold with itself, with other golds of its file (different when both
are plain numbers of different value; otherwise their truth is unknown and only agreement is counted), with rewrites
that keep the value and edits that change it, and our own table of cases. Results hold answers only, no question texts.
Needs Math-Verify (pip install math-verify "latex2sympy2_extended[antlr4_13_2]"); it is used here and nowhere else.
"""
import argparse
import json
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from treerpo import is_equiv, normalize_answer, read_answer  # noqa: E402

REWRITES = {  # keep the value of any answer
    "spaces": lambda s: f" {s} ", "dollars": lambda s: f"${s}$", "dfrac": lambda s: s.replace(r"\frac", r"\dfrac"),
    "left-right": lambda s: s if r"\left" in s else s.replace("(", r"\left(").replace(")", r"\right)"),
    "thin space": lambda s: rf"\,{s}",
}
EDITS = {  # change the value of a number or an expression
    "sign": lambda s: f"-({s})", "plus one": lambda s: f"({s})+1", "double": lambda s: f"2({s})",
    "pair": lambda s: f"({s}, 1)", "greater": lambda s: f"x > {s}",
}


def load_golds(path):
    """Final answers of a JSONL file, without the surrounding dollar signs."""
    golds = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = {key.lower(): value for key, value in json.loads(line).items()}
        gold = next((row[key] for key in ("final_answer", "answer", "solution") if row.get(key) is not None), None)
        gold = gold[0] if isinstance(gold, list) and gold else gold
        text = str(gold if gold is not None else "").rsplit("####", 1)[-1].strip()
        golds.append(text[1:-1] if re.fullmatch(r"\$[^$]*\$", text) else text)
    return [gold for gold in golds if gold]


def plain_number(text):
    """The value if it is a plain number, for which the truth needs no grader."""
    text = text.replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else None


def pairs_of(name, golds, per_gold, rng):
    """(source, kind, a, b, truth or None)."""
    for gold in golds:
        yield name, "itself", gold, gold, True
        for kind, rewrite in REWRITES.items():
            yield name, f"rewrite: {kind}", gold, rewrite(gold), True
        if plain_number(gold) or re.fullmatch(r"-?\\frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{\d+\}", gold):
            for kind, edit in EDITS.items():
                yield name, f"edit: {kind}", gold, edit(gold), False
        for other in rng.sample(golds, min(per_gold, len(golds))):
            if other != gold:
                a, b = plain_number(gold), plain_number(other)
                yield name, "other gold", gold, other, None if a is None or b is None else a == b


def math_verify_equiv(a, b):
    """Math-Verify's verdict for gold a and answer b, as its own documentation calls it."""
    return bool(verify(parse(rf"\boxed{{{a}}}"), parse(rf"\boxed{{{b}}}")))


def timed(function, a, b):
    start = time.process_time()
    try:
        verdict = function(a, b)
    except Exception as error:  # a grader that stops is a result, too
        verdict = type(error).__name__
    return verdict, time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="question files (JSONL)")
    parser.add_argument("--out", default="experiments/results/verifier.jsonl")
    parser.add_argument("--per-gold", type=int, default=3, help="other golds to compare each gold with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    global parse, verify
    try:
        from math_verify import parse, verify
    except ImportError:
        print('Math-Verify is missing: pip install math-verify "latex2sympy2_extended[antlr4_13_2]"', file=sys.stderr)
        sys.exit(2)
    from test_treerpo import PAIRS

    rng, pairs = random.Random(args.seed), []
    for path in args.files:
        golds = load_golds(path)
        unreadable = [gold for gold in golds if read_answer(normalize_answer(gold)) is None]
        print(f"{Path(path).stem}: {len(golds)} golds, {len(unreadable)} not readable: {unreadable}")
        pairs += pairs_of(Path(path).stem, golds, args.per_gold, rng)
    pairs += [("our cases", category, a, b, truth) for category, truth, a, b in PAIRS
              if category != "not supported"]  # there the table says what ours does, not what is true

    rows = []
    for source, kind, a, b, truth in pairs:
        ours, our_seconds = timed(is_equiv, a, b)
        theirs, their_seconds = timed(math_verify_equiv, a, b)
        rows.append({"source": source, "kind": kind, "a": a, "b": b, "truth": truth, "ours": ours,
                     "math_verify": theirs, "ours_ms": round(1000 * our_seconds, 3),
                     "math_verify_ms": round(1000 * their_seconds, 3)})
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    print("\nDisagreements (truth: by construction, ? = not known)")
    for row in rows:
        if row["ours"] != row["math_verify"]:
            right = {None: "?", row["ours"]: "ours", row["math_verify"]: "Math-Verify"}.get(row["truth"], "neither")
            print(f"  {right:12} {row['source']}, {row['kind']}: {row['a']} ~ {row['b']} | ours {row['ours']}, "
                  f"Math-Verify {row['math_verify']}")

    print("\nfp: false positives of the pairs known to differ; MV: Math-Verify")
    print("| source | pairs | agree | ours right | MV right | ours fp | MV fp |")
    print("|---|---|---|---|---|---|---|")
    for source in dict.fromkeys(row["source"] for row in rows):
        some = [row for row in rows if row["source"] == source]
        known = [row for row in some if row["truth"] is not None]
        different = [row for row in known if row["truth"] is False]
        cells = [f"{sum(row['ours'] == row['math_verify'] for row in some) / len(some):.1%}"]
        for right in ("ours", "math_verify"):
            cells.append(f"{sum(row[right] == row['truth'] for row in known) / len(known):.1%}")
        for who in ("ours", "math_verify"):
            cells.append(f"{sum(row[who] is True for row in different)}/{len(different)}")
        print(f"| {source} | {len(some)} | " + " | ".join(cells) + " |")
    others = [row for row in rows if row["kind"] == "other gold"]
    equal = [(row["a"], row["b"]) for row in others if row["ours"] is True]
    print(f"pairs of different golds of one file: {len(others)}, called equal by ours: {len(equal)} {equal}")
    for who in ("ours", "math_verify"):
        times = [row[f"{who}_ms"] for row in rows]
        print(f"{who}: {sum(times) / len(times):.2f} ms per pair, longest {max(times):.1f} ms (CPU time)")


if __name__ == "__main__":
    main()
