"""What a few-shot prefix that all questions share costs in a training step.

    python experiments/prefix_share.py --model FOLDER --data QUESTIONS.jsonl --template TEXT_FILE

One step of 16 questions, sampled once; then its parts again, with the prompts as they are and
without the prefix that all of them share: the first forward pass of sampling, and the update. The
difference is what sharing the prefix could save at most. CPU seconds of one thread, median of three.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import common

common.use_one_thread()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import treerpo  # noqa: E402

BRANCHINGS = {"treerpo": ([4, 2, 2, 2], [8]), "grpo": ([8], [32])}
PACK_LEN = 512
REPEATS = 3


def cpu_seconds(function: Callable) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def shared_length(prompts: list[list[int]]) -> int:
    """How many first tokens all prompts have in common."""
    n = 0
    while all(len(prompt) > n + 1 and prompt[n] == prompts[0][n] for prompt in prompts):
        n += 1
    return n


def without_prefix(trees: list[treerpo.Node], n: int) -> None:
    for root in trees:
        root.tokens = root.tokens[n:]


def update(model: torch.nn.Module, trees: list[treerpo.Node], vocab_size: int) -> None:
    """Three passes over every pack, as in a step with a reference model and old log-probs; the
    optimiser itself is left out."""
    for pack in treerpo.pack_nodes(trees, PACK_LEN):
        row = treerpo.pack_row(pack, model.device)
        with torch.no_grad():
            treerpo.token_logps(model, row, 0.6, vocab_size)
        logps, _ = treerpo.token_logps(model, row, 0.6, vocab_size)
        logps.sum().backward()
    model.zero_grad()


def measure(
    algo: str, model: torch.nn.Module, tokenizer: object, prompts: list, answers: list
) -> dict:
    branching, step_lens = BRANCHINGS[algo]
    decoding = treerpo.Decoding((tokenizer.eos_token_id,), len(tokenizer), 0.6, max_rows=128)
    lens = treerpo.per_level(step_lens, branching)
    start = time.process_time()
    torch.manual_seed(0)
    trees = treerpo.sample_trees(model, prompts, branching, lens, decoding)
    sampling = time.process_time() - start
    treerpo.verify_leaves(trees, answers, tokenizer)
    for root in trees:
        treerpo.backup_rewards(root)
    treerpo.add_sibling_advantages(trees, "variance" if algo == "treerpo" else "std", 0.1)
    n = shared_length(prompts)
    short = [prompt[n:] for prompt in prompts]
    with torch.no_grad():
        whole_prefill = cpu_seconds(lambda: treerpo.prefill(model, prompts, 0, 0))
        short_prefill = cpu_seconds(lambda: treerpo.prefill(model, short, 0, 0))
    packs = treerpo.pack_nodes(trees, PACK_LEN)
    packed = sum(len(node.tokens) for pack in packs for node in pack)
    whole_update = cpu_seconds(lambda: update(model, trees, len(tokenizer)))
    without_prefix(trees, n)
    short_update = cpu_seconds(lambda: update(model, trees, len(tokenizer)))
    saved = whole_prefill - short_prefill + whole_update - short_update
    return {
        "algo": algo,
        "prompt_tokens": sum(len(prompt) for prompt in prompts),
        "shared_tokens": n,
        "sampled_tokens": sum(len(node.tokens) for root in trees for node in root.steps()),
        "packed_tokens": packed,
        "sampling": sampling,
        "prefill": whole_prefill,
        "prefill_without_prefix": short_prefill,
        "update": whole_update,
        "update_without_prefix": short_update,
        "share_of_step": saved / (sampling + whole_update),
        "torch": torch.__version__,
        "code": common.code_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--template", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    rows = [json.loads(line) for line in args.data.read_text("utf-8").splitlines()[:16]]
    template = args.template.read_text("utf-8")
    prompts = [treerpo.build_prompt(row["question"], template, tokenizer) for row in rows]
    answers = [row["answer"] for row in rows]
    for algo in BRANCHINGS:
        line = measure(algo, model, tokenizer, prompts, answers)
        common.append_line(common.RESULTS / "prefix_share.jsonl", line)
        print(json.dumps(line, indent=1))


if __name__ == "__main__":
    main()
