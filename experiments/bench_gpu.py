"""What a CUDA GPU makes of the file, at the shape of Qwen2.5-Math-1.5B with random weights.

    python experiments/bench_gpu.py                     # all parts, about ten minutes
    python experiments/bench_gpu.py --parts decode step --questions 8

decode   milliseconds a token of one generate call, plain and compiled, context about 600
update   trained tokens a second, plain and compiled, with the reference model's pass
variants the same without it: the full mask or the blocks of flex_attention, layers compiled or not
step     sampling and update of one training step of the paper's tree, 8 8 8 of 384 tokens. The
         random model ends an answer with probability 1/500 a token; leaves are right by chance

Every line goes to experiments/results/gpu.jsonl with card and versions.
"""
import argparse
import dataclasses
import gc
import json
import random
import sys
import time
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import treerpo  # noqa: E402

EOS_ID = 151_643
N_TOKENS = 151_646
PROMPT = 200
STEP_LEN = 384
DEPTH = 3


def make_config() -> transformers.Qwen2Config:
    return transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
    )


def make_model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(
            make_config(), dtype=dtype, attn_implementation="sdpa"
        )


class Log:
    """Prints a line and keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.common = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def __call__(self, **figures: object) -> None:
        print(json.dumps(figures), flush=True)
        treerpo.append_jsonl(self.path, [{**figures, **self.common}])


def random_prompts(n: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1000, 100_000) for _ in range(length)] for _ in range(n)]


def seconds_of(work) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode_ms(model, rows: treerpo.Rows, n_rows: int, decoding: treerpo.Decoding) -> float:
    """Of one token: the difference of a long and a short call, so that its opening cancels."""
    def call(n_tokens: int) -> float:
        nodes = [treerpo.Node([]) for _ in range(n_rows)]
        index = list(range(n_rows))
        return seconds_of(
            lambda: treerpo.generate_tokens(model, nodes, rows, index, n_tokens, decoding)
        )

    call(8)
    differences = []
    for _ in range(3):
        long = call(96)
        differences.append((long - call(32)) / 64)
    return 1000 * sorted(differences)[1]


def graph_counts() -> dict:
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def bench_decode(model, plain: treerpo.Decoding, static: treerpo.Decoding, log: Log) -> None:
    padding = treerpo.Workspace.padding
    for n_rows in (512, 128):
        with torch.no_grad():
            rows = treerpo.prefill(model, random_prompts(n_rows, 568), EOS_ID, padding)
        ms_static = decode_ms(model, rows, n_rows, static)
        ms_plain = decode_ms(model, rows, n_rows, plain)
        log(
            part="decode", rows=n_rows, context=600, plain_ms=round(ms_plain, 1),
            compiled_ms=round(ms_static, 1), ratio=round(ms_plain / ms_static, 2),
            **graph_counts(),
        )
        del rows
    gc.collect()
    torch.cuda.empty_cache()


def end_by_chance(rate: float) -> None:
    """Make the random model end an answer with this probability a token."""
    draw = treerpo.DrawToken.__call__

    def draw_with_ends(self, input_ids, logits):
        others = logits[:, :N_TOKENS].logsumexp(-1)
        logits[:, EOS_ID] = others + torch.log(torch.tensor(rate / (1 - rate)))
        return draw(self, input_ids, logits)

    treerpo.DrawToken.__call__ = draw_with_ends


def reward_by_chance(trees: list[treerpo.Node]) -> None:
    rng = random.Random(0)
    for root in trees:
        right = rng.random()
        for leaf in root.leaves():
            leaf.reward = float(rng.random() < right)
        treerpo.backup_rewards(root)
    treerpo.add_sibling_advantages(trees, "variance", 0.1)


def bench_step(models: dict, decoding: treerpo.Decoding, n_questions: int, pack_len: int, log: Log):
    """One whole step, twice: the second one has its graphs."""
    end_by_chance(1 / 500)
    decoding = dataclasses.replace(decoding, temperature=1.0)
    optimizer = torch.optim.AdamW(models["trained"].parameters(), lr=1e-6, fused=True)
    for repeat in range(2):
        torch.cuda.reset_peak_memory_stats()
        trees = []
        prompts = random_prompts(n_questions, PROMPT)
        sampling = seconds_of(
            lambda: trees.extend(
                treerpo.sample_trees(
                    models["sampler"], prompts, [8] * DEPTH, [STEP_LEN] * DEPTH, decoding
                )
            )
        )
        sampling_gb = torch.cuda.max_memory_allocated() / 1e9
        reward_by_chance(trees)
        steps = [node for root in trees for node in root.steps()]
        trained = sum(len(node.tokens) for node in steps if node.trained)
        torch.cuda.reset_peak_memory_stats()
        updating = seconds_of(
            lambda: treerpo.update_policy(
                models["trained"], models["reference"], optimizer, trees, minibatches=2,
                pack_len=pack_len, mixed=True, temperature=1.0, vocab_size=N_TOKENS, ratio="token",
                clip_eps=0.2, kl_coef=0.001, entropy_coef=0.001,
            )
        )
        models["sampler"].load_state_dict(models["trained"].state_dict())
        tokens = sum(len(node.tokens) for node in steps)
        log(
            part="step", repeat=repeat, questions=n_questions, sampled=tokens, trained=trained,
            sampling_s=round(sampling, 1), sampled_per_s=round(tokens / sampling),
            update_s=round(updating, 1), trained_per_s=round(trained / updating),
            sampling_gb=round(sampling_gb, 1),
            update_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1), pack_len=pack_len,
            hours_300_steps_of_16=round(300 * 16 / n_questions * (sampling + updating) / 3600, 1),
            **graph_counts(),
        )


def random_tree() -> treerpo.Node:
    """A full tree of whole steps, every one trained."""
    root = treerpo.Node(random_prompts(1, PROMPT)[0])
    level = [root]
    for _ in range(DEPTH):
        tokens = random_prompts(1, STEP_LEN)[0]
        level = [treerpo.Node(tokens, parent) for parent in level[:16] for _ in range(8)]
        for node in level:
            node.trained = True
            node.advantage = 0.5
    return root


def bench_update(models: dict, label: str, pack_lens: list[int], log: Log) -> None:
    """Forward and backward passes of four packs, with the reference's pass and all host work."""
    tree = random_tree()
    for pack_len in pack_lens:
        torch.cuda.reset_peak_memory_stats()
        packs = treerpo.pack_nodes([tree], pack_len)[:5]
        padded = label == "compiled"
        rows = [treerpo.pack_row(pack, models["trained"].device, padded) for pack in packs]

        def passes(some: list) -> None:
            for row in some:
                with torch.no_grad():
                    row.ref_logps, _ = treerpo.token_logps(models["reference"], row, 1.0, N_TOKENS)
            treerpo.optimizer_step(
                models["trained"], torch.optim.SGD(models["trained"].parameters(), lr=0.0), some,
                True, 1.0, N_TOKENS, "token", 0.2, 0.001, 0.001,
            )

        first = seconds_of(lambda: passes(rows[:1]))
        elapsed = seconds_of(lambda: passes(rows[1:]))
        trained = sum(len(row.targets) for row in rows[1:])
        log(
            part="update", how=label, pack_len=pack_len, trained_per_s=round(trained / elapsed),
            first_s=round(first, 1), gb=round(torch.cuda.max_memory_allocated() / 1e9, 1),
        )


def bench_variants(model, log: Log) -> None:
    """Forward and backward passes of the packs of a tree, attention and compilation in turn."""
    tree = random_tree()
    layers = model.get_decoder().layers
    for compiled in (False, True):
        if compiled:
            for layer in layers:
                layer.compile(dynamic=True)
        for attention in ("sdpa", "flex_attention"):
            model.set_attn_implementation(attention)
            packs = treerpo.pack_nodes([tree], 8192)[:5]
            padded = attention == "flex_attention"
            rows = [treerpo.pack_row(pack, model.device, padded) for pack in packs]

            def passes(some: list) -> None:
                for row in some:
                    with torch.autocast("cuda", torch.bfloat16):
                        logps, _ = treerpo.token_logps(model, row, 1.0, N_TOKENS)
                    logps.sum().backward()
                model.zero_grad()

            passes(rows[:1])
            elapsed = seconds_of(lambda: passes(rows[1:]))
            trained = sum(len(row.targets) for row in rows[1:])
            log(
                part="variants", how=f"{attention}, compiled {compiled}", pack_len=8192,
                trained_per_s=round(trained / elapsed),
            )
    for layer in layers:
        layer._compiled_call_impl = None
    model.set_attn_implementation("sdpa")


def check_flex(model, log: Log) -> None:
    """Log-probs of a pack by the compiled blocks and by the full mask, both in bf16."""
    tree = random_tree()
    pack = treerpo.pack_nodes([tree], 2048)[0]
    row = treerpo.pack_row(pack, model.device, True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        blocks, _ = treerpo.token_logps(model, row, 1.0, N_TOKENS)
        model.set_attn_implementation("sdpa")
        full, _ = treerpo.token_logps(model, row, 1.0, N_TOKENS)
        model.set_attn_implementation("flex_attention")
    gap = (blocks - full).abs()
    log(part="flex against sdpa", mean=gap.mean().item(), largest=gap.max().item())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["decode", "update", "variants", "step"])
    parser.add_argument("--questions", type=int, default=16, help="of part step")
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--pack-len", type=int, default=4096, help="of part step")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs a CUDA GPU")
    log = Log(args.out)
    sampler = make_model(torch.bfloat16).eval()
    plain = treerpo.Decoding((EOS_ID,), N_TOKENS, 1.0, args.max_rows)
    if "decode" in args.parts or "step" in args.parts:
        length = PROMPT + DEPTH * STEP_LEN
        start = time.perf_counter()
        static = treerpo.add_workspace(sampler, plain, length, "on")
        log(part="compile", seconds=round(time.perf_counter() - start, 1), **graph_counts())
    if "decode" in args.parts:
        bench_decode(sampler, plain, static, log)
    if {"update", "variants", "step"} & set(args.parts):
        models = {
            "sampler": sampler,
            "trained": make_model(torch.float32),
            "reference": make_model(torch.bfloat16).eval().requires_grad_(False),
        }
    if "update" in args.parts:
        bench_update(models, "plain", [4096], log)
    if "variants" in args.parts:
        bench_variants(models["trained"], log)
    if "update" in args.parts or "step" in args.parts:
        treerpo.compile_training(models["trained"], "on")
        treerpo.compile_training(models["reference"], "on")
        check_flex(models["trained"], log)
    if "update" in args.parts:
        bench_update(models, "compiled", [4096, 8192], log)
    if "step" in args.parts:
        bench_step(models, static, args.questions, args.pack_len, log)


if __name__ == "__main__":
    main()
