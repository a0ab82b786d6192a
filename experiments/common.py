"""What every experiment needs: where things are, one thread, raw lines, and which code made them."""
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "experiments" / "figures"

sys.path.insert(0, str(DEMO))
sys.path.insert(0, str(ROOT))


def use_one_thread() -> None:
    """To be called before torch is imported. More threads only wait for each other here."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"


def code_version(path: Path = ROOT / "treerpo.py") -> str:
    """The first 12 digits of the file's SHA-256, which every raw line carries: compare with
    `git show COMMIT:treerpo.py | sha256sum`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def read_lines(path: Path) -> list[dict]:
    """The rows of a file of JSON lines. Half a line at the end, left by a kill, is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_line(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
