"""How often do errors cancel? Correct answers of a base model that hold a wrong line, by the task's own checker.

    python experiments/cancel.py                             # the bundled base -> a line of results/cancel.jsonl
    python experiments/cancel.py experiments/cache/long      # a variant that compare.py has made there

8 samples to each held-out question at temperature 1, seed 0: what `eval.py --samples 8 --temperature 1` grades.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "demo")]
import make_demo  # noqa: E402
import torch  # noqa: E402
import treerpo  # noqa: E402

def count(folder):
    model, _, tokenizer = treerpo.load_model(str(folder / "model"), "cpu", "float32")
    rows = [json.loads(text) for text in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [treerpo.build_prompt(row["question"], "{question}", tokenizer) for row in rows]
    budget = max(make_demo.max_answer_tokens(tokenizer, row) for row in rows)
    torch.manual_seed(0)
    trees = treerpo.sample_trees(model, prompts, [8], [budget], treerpo.make_decoding(model, tokenizer, 1.0, 512))
    samples = [(rows[root.question], treerpo.path_text(leaf, tokenizer)) for root in trees for leaf in root.leaves()]
    right = [(row, text) for row, text in samples if treerpo.reward_fn(text, row["answer"])]
    wrong_line = sum(not all(ok for *_, ok in make_demo.check_lines(row, text)) for row, text in right)
    return dict(base=folder.name, samples=len(samples), correct=len(right), with_a_wrong_line=wrong_line)

for name in sys.argv[1:] or [HERE.parent / "demo"]:
    line = count(Path(name))
    print(line)
    with (HERE / "results/cancel.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
