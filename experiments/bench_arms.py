"""One arm of bench.py in a process of its own: prints its row of results, a JSON object, as the last line.

    python experiments/bench_arms.py JOB        # JOB: JSON with arm, shape, repeat, device, memory_cap; see bench.py
"""
import json
import math
import platform
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from make_random_qwen import make_model, make_tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import treerpo  # noqa: E402

def clock(c):
    if c.gpu:
        torch.cuda.synchronize()
    return time.perf_counter() if c.gpu else time.process_time()

def memory(c, idle=False):
    """MiB: the peak of the process so far; idle: what is in use now, from which the peak on a CPU is counted."""
    if c.gpu:
        return 0.0 if idle else torch.cuda.max_memory_allocated() / 2**20
    if idle and Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

def measure(c, run, most=5.0):
    """-> (row of the seconds and the peak memory, the last result). No further run after `most` seconds."""
    start, seconds = memory(c, idle=True), []
    while len(seconds) < 3 and sum(seconds) < most:
        begin = clock(c)
        result = run()
        seconds.append(clock(c) - begin)
    return dict(seconds=min(seconds), memory=memory(c) - start), result

def load(c):
    """-> (model to train, float32; model to sample from, bfloat16 on a GPU; optimiser; decoding without early ends)."""
    if c.model:
        folder = c.model if Path(c.model).exists() else HERE.parent / c.model
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = make_model(c.hidden, c.layers, max(4, c.hidden // 64), 2, 4 * c.hidden, c.vocab)
    model = sampler = model.to("cuda" if c.gpu else "cpu").eval()
    if c.gpu:
        sampler = deepcopy(model)
        for p in sampler.parameters():
            p.data = p.data.bfloat16()
    size = model.config.vocab_size  # an EOS of this id is never sampled
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=c.gpu)
    return model, sampler, optimizer, treerpo.Decoding((size,), size, 1.0, c.max_rows)

def random_tokens(n):
    return [random.randrange(200) for _ in range(n)]

def bandwidth_limit(model, c):
    """Seconds in which a GPU can read, at the speed of a copy, what each decoding step needs: weights and KV cache."""
    block, config = torch.empty(2**28, dtype=torch.int32, device=model.device), model.config
    speed = 2 * block.nbytes / measure(c, block.clone)[0]["seconds"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize  # bytes a position
    weights, read = sum(p.nbytes for p in model.parameters()), 0
    for depth in range(len(c.branching)):
        rows, start = c.questions * math.prod(c.branching[:depth + 1]), c.prompt + depth * c.step
        read += sum(math.ceil(rows / c.max_rows) * weights + rows * kv * (start + t) for t in range(c.step))
    return read / speed

def sampling_arm(arm, c):
    """tree: ours. depth_1: ours, the same leaves without a tree. recompute, independent: plain generate."""
    _, model, _, decoding = load(c)

    def run(branching, steps):
        prompts = [random_tokens(c.prompt) for _ in range(c.questions)]
        if arm in ("depth_1", "independent"):
            branching, steps = [math.prod(branching)], [sum(steps)]
        if arm in ("tree", "depth_1"):
            return [leaf for tree in treerpo.sample_trees(model, prompts, branching, steps, decoding)
                    for leaf in tree.leaves()]
        ids = torch.tensor(prompts, device=model.device)
        for n, length in zip(branching, steps):  # every level reads its whole prefix again
            config = transformers.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0,
                                                   num_return_sequences=n, eos_token_id=decoding.eos_ids[0])
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return ids
    run([2, 2], [2, 2])  # warm-up
    row, leaves = measure(c, lambda: run(c.branching, [c.step] * len(c.branching)))
    assert len(leaves) == c.questions * math.prod(c.branching)
    if arm == "tree" and c.gpu:
        row["x bandwidth limit"] = row["seconds"] / bandwidth_limit(model, c)
    return row

def random_tree(branching, step, prompt):
    """A full tree of random tokens and advantages."""
    level = [root := treerpo.Node(random_tokens(prompt))]
    for n in branching:
        for node in level:
            node.children = [treerpo.Node(random_tokens(step), node, advantage=random.choice((-1.0, 1.0)))
                             for _ in range(n)]
        level = [child for node in level for child in node.children]
    return root

def plain_rows(arm, trees):
    """-> [(path from the root, its nodes scored in this row)]: a row for each leaf, or for each node."""
    nodes = [node for root in trees for node in root.walk() if node.parent]
    return [(n.path(), n.path()[1:] if "leaf" in arm else [n]) for n in nodes if "node" in arm or not n.children]

def plain_update(model, optimizer, rows, weights, c):
    """Rows of equal length under causal attention, the logits of a micro-batch at once. -> grad norm, as of packs."""
    copies = Counter(node for _, scored in rows for node in scored)  # a node in k rows counts 1 / k in each
    optimizer.zero_grad()
    for length, same in groupby(rows, key=lambda row: sum(len(node.tokens) for node in row[0])):
        same, width = list(same), max(1, c.row_tokens // length)
        for batch in (same[start:start + width] for start in range(0, len(same), width)):
            ids = torch.tensor([[t for node in path for t in node.tokens] for path, _ in batch], device=model.device)
            scale = torch.tensor([[node.advantage * weights[node.depth] / copies[node] for node in scored
                                   for _ in node.tokens] for _, scored in batch], device=model.device)
            keep = scale.shape[1]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=c.gpu):
                logits = model(ids, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1].float()
            logps = logits.gather(2, ids[:, -keep:, None])[..., 0] - logits.logsumexp(2)
            (-(scale * (logps - logps.detach()).exp()).sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return norm

def full_logits(model, row, temperature, n_tokens):
    """What token_logps replaces: the logits of all tokens of a pack at once."""
    logits = model(input_ids=row.ids, attention_mask=row.mask, position_ids=row.positions, use_cache=False).logits
    logps = (logits[0, row.predictors, :n_tokens].float() / temperature).log_softmax(-1)
    return logps.gather(1, row.targets[:, None])[:, 0]

def update(arm, model, optimizer, trees, decoding, c):
    weights = treerpo.unit_weights([node for root in trees for node in root.walk() if node.parent], "tokens", "token")
    if "rows" in arm:
        rows = sorted(plain_rows(arm, trees), key=lambda row: len(row[0]))
        return plain_update(model, optimizer, rows, weights, c)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=c.gpu)
    return treerpo.update_policy(model, optimizer, trees, weights, decoding, pack_len=c.pack_len, clip_eps=0.2,
                                 ratio="token", updates=1, autocast=autocast)["grad_norm"]

def update_arm(arm, c):
    trees = [random_tree(c.branching, c.step, c.prompt) for _ in range(c.questions)]
    rows = plain_rows(arm, trees) if "rows" in arm else [(p, 0) for p in treerpo.pack_nodes(trees, c.pack_len)]
    unique = sum(len(node.tokens) for root in trees for node in root.walk())
    counts = dict(forwarded=sum(len(node.tokens) for nodes, _ in rows for node in nodes) / unique, unique=unique)
    if arm.startswith("count"):
        return counts
    if arm == "full_logits":
        treerpo.token_logps = full_logits
    model, _, optimizer, decoding = load(c)
    update(arm, model, optimizer, [random_tree([2], 4, 4)], decoding, c)  # warm-up, and Adam's memory
    row, norm = measure(c, lambda: update(arm, model, optimizer, trees, decoding, c))
    return {**row, **counts, "grad norm": norm}

def step_arm(arm, c):
    """A whole step: grow, decode the texts, reward at random (nothing is pruned), back up, compare, update."""
    model, sampler, optimizer, decoding = load(c)
    tokenizer, spent, steps = make_tokenizer(decoding.n_tokens + 1), Counter(), []

    def book(owner, name):
        """Add the time of owner.name to `spent`, unless it runs inside another booked one."""
        def booked(*args, call=getattr(owner, name), **kwargs):
            begin, spent["depth"] = clock(c), spent["depth"] + 1
            result = call(*args, **kwargs)
            spent["depth"] -= 1
            spent["work"] += 0 if spent["depth"] else clock(c) - begin
            return result
        setattr(owner, name, booked)

    def run():
        spent["work"], begin = 0.0, clock(c)
        prompts = [random_tokens(c.prompt) for _ in range(c.questions)]
        trees = treerpo.sample_trees(sampler, prompts, c.branching, [c.step] * len(c.branching), decoding)
        sampled = clock(c)
        for leaf in (leaf for root in trees for leaf in root.leaves()):
            tokenizer.decode([token for node in leaf.path()[1:] for token in node.tokens])
            leaf.reward = random.random()
        for root in trees:
            treerpo.backup_rewards(root)
        treerpo.add_sibling_advantages(trees, "bernoulli")
        update("packed", model, optimizer, trees, decoding, c)
        sampler.load_state_dict(model.state_dict())
        share = 100 * (1 - spent["work"] / (clock(c) - begin))
        steps.append({"sample s": sampled - begin} | ({"overhead %": share} if arm == "overhead" else {}))
    if arm == "overhead":
        for owner, name in ((sampler, "generate"), (treerpo, "prefill"), (treerpo, "token_logps"), (optimizer, "step"),
                            (torch.Tensor, "backward"), (torch.nn.utils, "clip_grad_norm_")):
            book(owner, name)
    run()  # warm-up
    row, _ = measure(c, run, most=math.inf)
    return row | {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}

def trl_arm(arm, c):
    """The same step in TRL: one generation of all completions, then micro-batches of row_tokens."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    marks, leaves, length = [], math.prod(c.branching), c.step * len(c.branching)
    rows = c.row_tokens // (c.prompt + length)

    class Marks(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            marks.append(memory(c, idle=True))

        def on_step_end(self, *args, **kwargs):
            marks.append(clock(c))
    model, _, _, decoding = load(c)
    prompts = ["".join(random.choices("abcdefgh", k=c.prompt)) for _ in range(c.questions * 4)]  # a token a letter
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            folder, use_cpu=not c.gpu, bf16=c.gpu, gradient_checkpointing=False, learning_rate=1e-6, max_steps=4,
            per_device_train_batch_size=rows, gradient_accumulation_steps=c.questions * leaves // rows,
            num_generations=leaves, max_completion_length=length, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1000)
        trl.GRPOTrainer(model, lambda completions, **_: [random.random() for _ in completions], args=config,
                        train_dataset=Dataset.from_dict(dict(prompt=prompts)), callbacks=[Marks()],
                        processing_class=make_tokenizer(decoding.n_tokens + 1)).train()
    seconds = [b - a for a, b in zip(marks[1:], marks[2:])]  # the first step is the warm-up
    return dict(seconds=min(seconds), memory=memory(c) - marks[0], trl=trl.__version__)

def main():
    job = json.loads(sys.argv[1])
    arm, c = job["arm"], SimpleNamespace(**job["shape"])
    c.gpu = job["device"] != "cpu" and torch.cuda.is_available()
    if c.gpu and job["memory_cap"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["memory_cap"] * 1e9 / total))
    torch.set_num_threads(1)
    torch.manual_seed(job["repeat"])
    random.seed(job["repeat"])
    kinds = dict(tree=sampling_arm, depth_1=sampling_arm, recompute=sampling_arm, independent=sampling_arm,
                 step=step_arm, overhead=step_arm, trl=trl_arm)
    row = kinds.get(arm, update_arm)(arm, c)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.processor()]
    row.update(hardware=torch.cuda.get_device_name() if c.gpu else names[0], torch=torch.__version__)
    print(json.dumps(row | dict(transformers=transformers.__version__)))

if __name__ == "__main__":
    main()
