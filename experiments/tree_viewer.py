"""Turn the file of `treerpo.py --dump-trees` into one HTML page to look through the trees.

    python treerpo.py --dump-trees trees.jsonl
    python experiments/tree_viewer.py trees.jsonl                   # writes trees.html
    python experiments/tree_viewer.py trees.jsonl --steps 1 150 300 --out three.html

The page holds its data, style and script, and loads nothing. Its template is tree_viewer.html,
beside this file. Standard library only. Exit status: 0 written, 2 bad input.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parent / "tree_viewer.html"
DATA_MARK = "{{FORESTS}}"  # where the template takes the data
REQUIRED = ["step", "question_id", "id", "parent", "text", "reward", "advantage", "trained"]
LARGE_PAGE = 100_000_000  # bytes; browsers take longer than a moment to open such a page


class BadInput(ValueError):
    """Something the user gave cannot work; the message names it and the fix. Exit status 2."""


# ------------------------------------------------------------------------------ reading
def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place for messages, row) for every line of a dump.

    A half-written last line is left out. Raises BadInput for a line that is no node of a tree.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):  # a run is writing it now, or was killed
                        print(f"{place} is not complete and is left out", file=sys.stderr)
                        return
                    raise BadInput(f"{place}: not JSON ({error})") from error
                check_row(row, place)
                yield place, row
    except OSError as error:
        hint = "give the file that treerpo.py --dump-trees wrote"
        raise BadInput(f"{path}: cannot read it ({error.strerror}); {hint}") from error


def check_row(row: object, place: str) -> None:
    """Raises BadInput unless the row is a node as --dump-trees writes it."""
    missing = REQUIRED
    if isinstance(row, dict):
        missing = [key for key in REQUIRED if key not in row]
    if missing:
        hint = "give a file written by treerpo.py --dump-trees"
        raise BadInput(f"{place}: no {', '.join(missing)} in it; {hint}")
    for key in ["step", "id"]:
        if type(row[key]) is not int:
            raise BadInput(f"{place}: {key} must be a whole number, not {row[key]!r:.60}")
    if type(row["question_id"]) not in (int, str):
        raise BadInput(f"{place}: question_id must be a number or text")
    if not isinstance(row["text"], str):
        raise BadInput(f"{place}: text must be text, not {row['text']!r:.60}")


def to_number(value: object) -> float | None:
    """The value if it is a finite number, else None: null, NaN, infinite, text, true."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) < 1e300:
        return value
    return None


def page_node(row: dict, parent: int | None) -> dict:
    """What the page needs of a node. parent: the parent's index in the list of nodes."""
    tokens = row.get("tokens")
    return {
        "id": row["id"],
        "parent": parent,
        "text": row["text"],
        "tokens": len(tokens) if isinstance(tokens, list) else None,
        "done": bool(row.get("done")),
        "reward": to_number(row["reward"]),
        "advantage": to_number(row["advantage"]),
        "trained": bool(row["trained"]),
    }


def page_forest(row: dict) -> dict:
    """An empty forest for the step and question of this row, which is a root."""
    gold = row.get("answer")
    if not isinstance(gold, str):
        gold = json.dumps(gold, ensure_ascii=False)
    question = row.get("question")
    if not isinstance(question, str):
        question = "(this dump does not hold the question's text)"
    return {
        "step": row["step"],
        "question_id": str(row["question_id"]),
        "question": question,
        "gold": gold,
        "nodes": [],
    }


def collect_forests(path: Path, steps: list[int] | None = None) -> list[dict]:
    """All trees of one question in one step are a forest, as `page_forest` and `page_node` say.

    steps: keep only these. Raises BadInput for a damaged file, or if nothing is left to show.
    """
    forests = {}
    places = {}  # (step, question_id) -> {id of a node: its index in the forest's list}
    for place, row in read_rows(path):
        if steps is not None and row["step"] not in steps:
            continue
        key = (row["step"], row["question_id"])
        if key not in forests:
            forests[key] = page_forest(row)
            places[key] = {}
        index_of = places[key]
        if row["id"] in index_of:
            node = f"node {row['id']} of step {row['step']}"
            hint = "two runs wrote to this file; give each its own --dump-trees"
            raise BadInput(f"{place}: {node} is there twice; {hint}")
        parent = None
        if row["parent"] is not None:
            parent = index_of.get(row["parent"])
            if parent is None:
                raise BadInput(f"{place}: its parent {row['parent']!r:.60} is on no earlier line")
        nodes = forests[key]["nodes"]
        index_of[row["id"]] = len(nodes)
        nodes.append(page_node(row, parent))
    if not forests:
        reason = f"no tree of the steps {steps} is in it" if steps else "no tree is in it"
        raise BadInput(f"{path}: {reason}; is it the file of a run that got that far?")
    return list(forests.values())


# ------------------------------------------------------------------------------ writing
def embed(data: object) -> str:
    """JSON that is safe inside a <script> element, whatever its texts hold.

    Every < is written as an escape, so that no text can end the element or open a comment; all
    that is not ASCII is escaped, too, so that lone surrogates and U+2028 survive any encoding.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def render_page(forests: list[dict]) -> str:
    """The HTML page for these forests."""
    template = TEMPLATE.read_text("utf-8")
    return template.replace(DATA_MARK, embed(forests))


# ------------------------------------------------------------------------------ command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; its errors, too, end with exit status 2."""
    parser = argparse.ArgumentParser("tree_viewer.py", description=__doc__.splitlines()[0])
    parser.add_argument("dump", metavar="FILE", type=Path, help="what --dump-trees wrote")
    parser.add_argument("--steps", metavar="N", type=int, nargs="+",
                        help="keep only these training steps (default: all)")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="page to write (default: FILE with the ending .html)")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = args.dump.with_suffix(".html")
    if args.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out {args.out}: the name must end in .html")
    if args.out.resolve() == args.dump.resolve():
        parser.error(f"--out {args.out}: that is the dump itself; give another name")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        forests = collect_forests(args.dump, args.steps)
        page = render_page(forests)
        try:
            args.out.write_text(page, "utf-8")
        except OSError as error:
            raise BadInput(f"--out {args.out}: cannot write there ({error.strerror})") from error
    except BadInput as error:
        print(f"tree_viewer.py: error: {error}", file=sys.stderr)
        return 2
    nodes = sum(len(forest["nodes"]) for forest in forests)
    print(f"wrote {args.out}: {nodes:,} nodes; open it in a browser")
    if len(page) > LARGE_PAGE:
        print(f"it has {len(page) / 1e6:.0f} MB and opens slowly; --steps keeps only some steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
