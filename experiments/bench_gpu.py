"""What a CUDA GPU makes of the file, at the shape of Qwen2.5-Math-1.5B with random weights.

    python experiments/bench_gpu.py                     # all parts, about ten minutes
    python experiments/bench_gpu.py --parts decode step --questions 8
    python experiments/bench_gpu.py --parts step --questions 1 --cap 24 --shape 0.5B --max-rows 128

attention  one new token's attention by other means, in microseconds, replayed as a CUDA graph
draw       the draw of 512 next tokens, plain and compiled, in microseconds
tokens     entropies of sampled tokens, from the compiled step and from plain forwards of the trees
decode     milliseconds a token of one generate call, context about 600: as a user would call it
           (stock: do_sample, transformers' attention); with this file's draw and attention (plain);
           over the static cache with the loop inside generate (static); with decode_ahead (ahead)
profile    the kernels of 16 tokens, to results/gpu_profile_ROWS.txt
call_len   sampling with one and with several generate calls a step
step       sampling and update of one training step of the paper's tree, 8 8 8 of 384 tokens. The
           random model ends an answer with probability 1/500 a token; leaves are right by chance
flat       memory after each of twenty small training steps
update     trained tokens a second, plain and compiled, with the reference model's pass
variants   the same without it: the full mask or the blocks of flex_attention, layers compiled or
           not

--attention products makes the compiled step compute attention by two matrix products.
--cap is the size of a smaller card in GiB, of which 1 is left to CUDA itself.

Every line goes to experiments/results/gpu.jsonl with card and versions.
"""
import argparse
import dataclasses
import gc
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import treerpo  # noqa: E402

EOS_ID = 151_643
N_TOKENS = 151_646
PROMPT = 200
LONGEST_PROMPT = 512
STEP_LEN = 384
DEPTH = 3


SHAPES = {  # width, width of the MLP, layers, heads
    "1.5B": (1536, 8960, 28, 12),
    "0.5B": (896, 4864, 24, 14),
}


def make_config(shape: str = "1.5B") -> transformers.Qwen2Config:
    width, mlp_width, n_layers, n_heads = SHAPES[shape]
    return transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
    )


def make_model(dtype: torch.dtype, shape: str = "1.5B") -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(
            make_config(shape), dtype=dtype, attn_implementation="sdpa"
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


def decode_ms(call) -> float:
    """Of one token: the difference of a long and a short call, so that its opening cancels."""
    call(8)
    differences = []
    for _ in range(3):
        long = seconds_of(lambda: call(80))
        short = seconds_of(lambda: call(16))
        differences.append((long - short) / 64)
    return 1000 * sorted(differences)[1]


def forget_graphs() -> None:
    """Dynamo makes at most eight of a function; a training run needs three or four of a layer."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graph_counts() -> dict:
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def attention_by_products(query, key, value, mask, scale):
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    least = torch.finfo(torch.float32).min  # finite: a prompt's padding may look at nothing
    probs = scores.masked_fill(~mask, least).softmax(-1).to(query.dtype)
    return torch.matmul(probs, value)


def attention_by_sdpa(query, key, value, mask, scale):
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attention_by_efficient_kernel(query, key, value, mask, scale):
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        return attention_by_sdpa(query, key, value, mask, scale)


def attention_by_gqa(query, key, value, mask, scale):
    """The kernel itself finds the key head of a query head."""
    batch, n_key_heads, group, width = query.shape
    heads = query.reshape(batch, n_key_heads * group, 1, width)
    out = scaled_dot_product_attention(
        heads, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.reshape(query.shape)


def attention_by_flex(query, key, value, mask, scale):
    visible = mask[:, 0, 0]

    def mask_scores(score, row, head, at, to):
        return torch.where(visible[row, to], score, -math.inf)

    return flex_attention(query, key, value, score_mod=mask_scores, scale=scale)


def attend_by_products() -> None:
    """In treerpo.grouped_attention."""
    def attend(query, key, value, attn_mask, scale):
        return attention_by_products(query, key, value, attn_mask, scale)

    treerpo.scaled_dot_product_attention = attend


def bench_attention(log: Log) -> None:
    """Six query heads share one of two key heads, as in grouped_attention."""
    from triton.testing import do_bench_cudagraph
    functions = {
        "sdpa": attention_by_sdpa,
        "sdpa, efficient kernel": attention_by_efficient_kernel,
        "sdpa, enable_gqa": attention_by_gqa,
        "products, compiled": torch.compile(attention_by_products, dynamic=True),
        "flex, compiled": torch.compile(attention_by_flex, dynamic=True),
    }
    for name, function in functions.items():
        for n_rows, length in ((512, 768), (256, 768), (512, 1536)):
            query = torch.randn(n_rows, 2, 6, 128, device="cuda", dtype=torch.bfloat16)
            key = torch.randn(n_rows, 2, length, 128, device="cuda", dtype=torch.bfloat16)
            value = torch.randn_like(key)
            mask = torch.zeros(n_rows, 1, 1, length, dtype=torch.bool, device="cuda")
            mask[..., 3:length - 100] = True
            arguments = (query, key, value, mask, 128**-0.5)
            try:
                found = function(*arguments)
                # Launched one by one, short kernels would wait for the CPU. Keys and values are
                # larger than the caches of the GPU, so each replay reads them from memory.
                ms = do_bench_cudagraph(lambda: function(*arguments), rep=60)
            except RuntimeError as error:
                log(part="attention", how=name, rows=n_rows, length=length, error=str(error)[:300])
                continue
            gap = (found - attention_by_sdpa(*arguments)).abs().max()
            log(
                part="attention", how=name, in_cuda_graph=True, rows=n_rows, length=length,
                us=round(1000 * ms), tb_per_s=round(4 * key.numel() / ms / 1e9, 2),
                largest_gap=round(gap.item(), 4),
            )
    forget_graphs()


def bench_draw(log: Log) -> None:
    """Plain: as inside `generate`. Compiled: as in decode_ahead."""
    from triton.testing import do_bench
    draw_token = treerpo.DrawToken(treerpo.Decoding((EOS_ID,), N_TOKENS, 1.0), 512)
    compiled = torch.compile(treerpo.draw_ids, dynamic=True)
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16)

    def draw_plainly() -> torch.Tensor:
        return draw_token(None, logits.to(torch.float32, copy=True)).argmax(-1)

    plain_ms = do_bench(draw_plainly)
    compiled_ms = do_bench(lambda: compiled(logits[:, None], 512, N_TOKENS, 1.0))
    log(part="draw", plain_us=round(1000 * plain_ms), compiled_us=round(1000 * compiled_ms))
    forget_graphs()


def check_tokens(model, static: treerpo.Decoding, log: Log) -> None:
    """Both in bf16. A token that does not belong to its path would change all later entropies."""
    decoding = dataclasses.replace(static, keep_entropies=True)
    trees = treerpo.sample_trees(model, random_prompts(4, PROMPT), [8, 4], [150, 40], decoding)
    nodes = [node for root in trees for node in root.steps()]
    for node in nodes:
        node.trained = True
    largest = 0.0
    total = 0.0
    for pack in treerpo.pack_nodes(trees, 4096):
        row = treerpo.pack_row(pack, model.device)
        with torch.no_grad():
            _, expected = treerpo.token_logps(model, row, static.temperature, N_TOKENS)
        scored = [node for node in pack if pack[node]]
        found = [entropy for node in scored for entropy in node.entropies]
        gaps = (expected - torch.tensor(found, device=model.device)).abs()
        largest = max(largest, gaps.max().item())
        total += gaps.sum().item()
    log(part="tokens", mean_gap=total / n_tokens(nodes), largest_gap=largest)


def bench_profile(model, static: treerpo.Decoding, folder: Path) -> None:
    for n_rows in (512, 128):
        with torch.no_grad():
            rows = treerpo.prefill(model, random_prompts(n_rows, 568), EOS_ID, 1)

        def call() -> None:
            nodes = [treerpo.Node([]) for _ in range(n_rows)]
            treerpo.generate_tokens(model, nodes, rows, list(range(n_rows)), 16, static)
            torch.cuda.synchronize()

        call()
        with torch.profiler.profile() as profile:
            call()
        table = profile.key_averages().table("cuda_time_total", 40, 90)
        (folder / f"gpu_profile_{n_rows}.txt").write_text(table)


def bench_decode(
    model, plain: treerpo.Decoding, static: treerpo.Decoding, args: argparse.Namespace, log: Log
) -> None:
    decode_ahead = treerpo.decode_ahead
    for n_rows in (512, 128):
        with torch.no_grad():
            rows = treerpo.prefill(
                model, random_prompts(n_rows, 568), EOS_ID, treerpo.Workspace.padding
            )

        def sample_from(decoding: treerpo.Decoding):
            def call(n_tokens: int) -> None:
                nodes = [treerpo.Node([]) for _ in range(n_rows)]
                index = list(range(n_rows))
                treerpo.generate_tokens(model, nodes, rows, index, n_tokens, decoding)
            return call

        def stock_call(n_tokens: int) -> None:
            picked = treerpo.select_rows(rows, list(range(n_rows)))
            model.generate(
                picked.ids, attention_mask=picked.mask,
                past_key_values=transformers.DynamicCache(picked.kv), max_new_tokens=n_tokens,
                do_sample=True, temperature=1.0, top_k=0, pad_token_id=EOS_ID,
            )

        ahead_ms = decode_ms(sample_from(static))
        treerpo.decode_ahead = None
        static_ms = decode_ms(sample_from(static))
        treerpo.decode_ahead = decode_ahead
        plain_ms = decode_ms(sample_from(plain))
        model.set_attn_implementation("sdpa")
        stock_ms = decode_ms(stock_call)
        model.set_attn_implementation("grouped")
        log(
            part="decode", attention=args.attention, rows=n_rows, context=600,
            stock_ms=round(stock_ms, 2), plain_ms=round(plain_ms, 2),
            static_ms=round(static_ms, 2), ahead_ms=round(ahead_ms, 2),
            plain_over_ahead=round(plain_ms / ahead_ms, 2),
            stock_over_ahead=round(stock_ms / ahead_ms, 2), **graph_counts(),
        )
        del rows
        torch.cuda.empty_cache()


def end_by_chance(workspace: treerpo.Workspace, rate: float) -> None:
    """Make the random model end an answer with this probability a token."""
    draw_ids = workspace.draw_ids

    def draw_or_end(logits, n_rows: int, vocab_size: int, temperature: float) -> torch.Tensor:
        ends = torch.rand(n_rows, device=logits.device) < rate
        return draw_ids(logits, n_rows, vocab_size, temperature).masked_fill(ends, EOS_ID)

    workspace.draw_ids = draw_or_end


def reward_by_chance(trees: list[treerpo.Node]) -> None:
    rng = random.Random(0)
    for root in trees:
        right = rng.random()
        for leaf in root.leaves():
            leaf.reward = float(rng.random() < right)
        treerpo.backup_rewards(root)
    treerpo.add_sibling_advantages(trees, "variance", 0.1)


def sample(model, n_questions: int, step_len: int, decoding: treerpo.Decoding) -> tuple:
    """-> trees with rewards and advantages, seconds."""
    trees = []
    prompts = random_prompts(n_questions, PROMPT)
    seconds = seconds_of(
        lambda: trees.extend(
            treerpo.sample_trees(model, prompts, [8] * DEPTH, [step_len] * DEPTH, decoding)
        )
    )
    reward_by_chance(trees)
    return trees, seconds


def update(models: dict, optimizer, trees: list[treerpo.Node], pack_len: int) -> float:
    """-> seconds, with the copy of the new weights to the sampler."""
    def work() -> None:
        treerpo.update_policy(
            models["trained"], models["reference"], optimizer, trees, minibatches=2,
            pack_len=pack_len, mixed=True, temperature=1.0, vocab_size=N_TOKENS, ratio="token",
            clip_eps=0.2, kl_coef=0.001, entropy_coef=0.001,
        )
        models["sampler"].load_state_dict(models["trained"].state_dict())

    return seconds_of(work)


def n_tokens(nodes: list[treerpo.Node]) -> int:
    return sum(len(node.tokens) for node in nodes)


def bench_step(
    models: dict, decoding: treerpo.Decoding, args: argparse.Namespace, log: Log
) -> None:
    """One whole step, twice: the second one has its graphs."""
    optimizer = torch.optim.AdamW(models["trained"].parameters(), lr=1e-6, fused=True)
    for repeat in range(args.repeats):
        torch.cuda.reset_peak_memory_stats()
        trees, sampling = sample(models["sampler"], args.questions, STEP_LEN, decoding)
        sampling_gb = torch.cuda.max_memory_allocated() / 1e9
        steps = [node for root in trees for node in root.steps()]
        sampled = n_tokens(steps)
        trained = n_tokens([node for node in steps if node.trained])
        torch.cuda.reset_peak_memory_stats()
        updating = update(models, optimizer, trees, args.pack_len)
        leaves = [leaf for root in trees for leaf in root.leaves()]
        answers = [sum(len(node.tokens) for node in leaf.path()[1:]) for leaf in leaves]
        log(
            part="step", shape=args.shape, cap=args.cap, repeat=repeat, questions=args.questions,
            max_rows=args.max_rows, call_len=decoding.call_len, pack_len=args.pack_len,
            grad_checkpointing=args.grad_checkpointing, sampled=sampled, trained=trained,
            mean_answer=round(sum(answers) / len(answers)),
            sampling_s=round(sampling, 1), sampled_per_s=round(sampled / sampling),
            update_s=round(updating, 1), trained_per_s=round(trained / updating),
            sampling_gb=round(sampling_gb, 1),
            update_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1),
            hours_300_steps_of_16=round(
                300 * 16 / args.questions * (sampling + updating) / 3600, 1
            ),
            **graph_counts(),
        )


def bench_call_len(model, decoding: treerpo.Decoding, log: Log) -> None:
    """Sampling of four trees, with one generate call for a step and with several."""
    n_questions = 4
    for call_len in (STEP_LEN, 128):
        each = dataclasses.replace(decoding, call_len=call_len)
        sample(model, n_questions, STEP_LEN, each)  # records the graphs
        torch.manual_seed(0)
        trees, seconds = sample(model, n_questions, STEP_LEN, each)
        tokens = n_tokens([node for root in trees for node in root.steps()])
        log(
            part="call_len", call_len=call_len, questions=n_questions, sampled=tokens,
            sampling_s=round(seconds, 1), sampled_per_s=round(tokens / seconds),
        )


def bench_flat(models: dict, decoding: treerpo.Decoding, pack_len: int, log: Log) -> None:
    optimizer = torch.optim.AdamW(models["trained"].parameters(), lr=1e-6, fused=True)
    allocated = []
    reserved = []
    for _ in range(20):
        trees, _ = sample(models["sampler"], 2, 32, decoding)
        update(models, optimizer, trees, pack_len)
        del trees
        gc.collect()
        allocated.append(round(torch.cuda.memory_allocated() / 1e9, 3))
        reserved.append(round(torch.cuda.memory_reserved() / 1e9, 3))
    log(part="flat", allocated_gb=allocated, reserved_gb=reserved, **graph_counts())


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
    forget_graphs()


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
    parts = [
        "attention", "draw", "tokens", "decode", "profile", "call_len", "step", "flat", "update",
        "variants",
    ]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--questions", type=int, default=16, help="of part step")
    parser.add_argument("--repeats", type=int, default=2, help="of part step")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5B")
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--pack-len", type=int, default=4096, help="of parts step and flat")
    parser.add_argument("--attention", choices=["sdpa", "products"], default="sdpa")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--cap", type=int, help="use no more memory than a card of this many GiB")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs a CUDA GPU")
    log = Log(args.out)
    treerpo.set_up_compiler()
    measure_model(args, log)
    if "attention" in args.parts:  # last: a failed capture of a CUDA graph spoils what follows
        bench_attention(log)


def measure_model(args: argparse.Namespace, log: Log) -> None:
    if args.cap:
        total = torch.cuda.mem_get_info()[1] / 2**30
        torch.cuda.set_per_process_memory_fraction((args.cap - 1) / total)
    sampler = make_model(torch.bfloat16, args.shape).eval()
    plain = treerpo.Decoding((EOS_ID,), N_TOKENS, 1.0, args.max_rows)
    parts = set(args.parts)
    if "draw" in parts:
        bench_draw(log)
    if args.attention == "products":
        attend_by_products()
    if parts - {"attention", "draw", "update", "variants"}:
        length = LONGEST_PROMPT + DEPTH * STEP_LEN
        start = time.perf_counter()
        static = treerpo.add_workspace(sampler, plain, length, "on")
        log(part="compile", seconds=round(time.perf_counter() - start, 1), **graph_counts())
    if "tokens" in parts:
        check_tokens(sampler, static, log)
    if "decode" in parts:
        bench_decode(sampler, plain, static, args, log)
    if "profile" in parts:
        bench_profile(sampler, static, args.out.parent)
    if parts & {"call_len", "step", "flat"}:
        end_by_chance(static.workspace, 1 / 500)
    if "call_len" in parts:
        bench_call_len(sampler, static, log)
    if not parts & {"update", "variants", "step", "flat"}:
        return
    models = {
        "sampler": sampler,
        "trained": make_model(torch.float32, args.shape),
        "reference": make_model(torch.bfloat16, args.shape).eval().requires_grad_(False),
    }
    if args.grad_checkpointing:
        treerpo.turn_on_checkpointing(models["trained"])
    treerpo.set_update_mode(models["trained"])
    if "update" in parts:
        bench_update(models, "plain", [4096], log)
    if "variants" in parts:
        bench_variants(models["trained"], log)
    start = time.perf_counter()
    treerpo.compile_training(models["trained"], "on")
    treerpo.compile_training(models["reference"], "on")
    log(part="compile update", seconds=round(time.perf_counter() - start, 1))
    if "step" in parts:
        bench_step(models, static, args, log)
    if "flat" in parts:
        bench_flat(models, static, args.pack_len, log)
    if "update" in parts:
        bench_update(models, "compiled", [4096, 8192], log)
        check_flex(models["trained"], log)  # the last one: it makes graphs of its own


if __name__ == "__main__":
    main()
