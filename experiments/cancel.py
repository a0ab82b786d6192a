"""How often do errors cancel out? Right answers of the bundled base model that hold a wrong line.

    python experiments/cancel.py    # half a minute -> results/cancel.jsonl

8 answers to each held-out question at temperature 1, seed 0; lines are checked by the task itself.
"""
import common

common.use_one_thread()

import make_demo  # noqa: E402
import torch  # noqa: E402
import treerpo  # noqa: E402

SAMPLES = 8
LONGEST_ANSWER = 56  # tokens


def main() -> None:
    base = str(common.DEMO / "model")
    tokenizer = treerpo.load_tokenizer(base)
    model = treerpo.load_model(base, "cpu", torch.float32)
    rows = treerpo.read_jsonl(str(common.DEMO / "test.jsonl"))
    prompts = []
    for row in rows:
        prompts.append(treerpo.build_prompt(row["question"], "{question}", tokenizer))
    decoding = treerpo.make_decoding(model, tokenizer, temperature=1.0, max_rows=512)
    torch.manual_seed(0)
    trees = treerpo.sample_trees(model, prompts, [SAMPLES], [LONGEST_ANSWER], decoding)
    right_answers = 0
    with_a_wrong_line = 0
    for root in trees:
        row = rows[root.question]
        for leaf in root.leaves():
            text = treerpo.answer_text(leaf, tokenizer)
            if treerpo.reward_fn(text, row["answer"]) == 0:
                continue
            right_answers += 1
            labels = [right for _, _, right in make_demo.check_lines(row, text)]
            with_a_wrong_line += not all(labels)
    line = {
        "answers": SAMPLES * len(rows),
        "right": right_answers,
        "right_with_a_wrong_line": with_a_wrong_line,
        "code": common.code_version(),
    }
    common.append_line(common.RESULTS / "cancel.jsonl", line)
    print(line)


if __name__ == "__main__":
    main()
