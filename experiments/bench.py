"""Cost of the tree against what one would do instead, in CPU seconds of one thread: raw lines in results/bench.jsonl.

    python experiments/bench.py            # all sections, about 10 minutes
    python experiments/bench.py --quick    # one repeat, small trees, about a minute
    python experiments/bench.py --table    # medians and ratios from the stored lines

  sampling   one tree of N^D leaves with cache reuse / every level's prefix computed again / independent rollouts
  update     forward and backward of that tree: packed / one row per leaf / one row per node
  counting   tokens forwarded over unique tokens at branching 8 8 8, prompt 200, step 384, packs of 4096 (no model)
Random Qwen2 weights, no EOS, so that every tree is full. The arms alternate, each in a process of its own.
"""
import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench.jsonl"
sys.path.insert(0, str(HERE.parent))
from treerpo import (Decoding, Node, generate_step, pack_nodes, pack_tensors, prefill, sample_trees,  # noqa: E402
                     token_logps)

SIZES = {"4x128": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
         "12x768": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                        num_key_value_heads=4)}
ARMS = {"sampling": ["cache reuse", "prefix again", "independent"], "update": ["packed", "row per leaf", "row per node"]}


def make_model(size):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=2000, max_position_embeddings=2048, **SIZES[size])).eval()
    model.set_attn_implementation("sdpa")
    return model


def sample_again(model, prompt, branching, step, decoding):
    """The tree without cache reuse: every level is prefilled from its tokens."""
    level = [prompt]
    for n in branching:
        rows = [ids for ids in level for _ in range(n)]
        steps, _ = generate_step(model, prefill(model, rows, 0), step, decoding)
        level = [ids + tokens for ids, (tokens, _, _) in zip(rows, steps)]


def full_tree(prompt, branching, step):
    """A tree of random tokens in which every node is trained."""
    draw = torch.Generator().manual_seed(0)
    root, level = Node(list(prompt)), []
    level = [root]
    for n in branching:
        for node in level:
            node.children = [Node(torch.randint(1, 2000, (step,), generator=draw).tolist(), node, advantage=1.0)
                             for _ in range(n)]
        level = [child for node in level for child in node.children]
    return root


def rows_of(root, arm):
    """The update's rows as packs: packed as treerpo.py does, or every leaf path, or every node with its path, a row."""
    if arm == "packed":
        return pack_nodes([root], 1024)
    if arm == "row per leaf":
        return [dict.fromkeys(leaf.path()[:1], False) | dict.fromkeys(leaf.path()[1:], True) for leaf in root.leaves()]
    return [dict.fromkeys(node.path()[:-1], False) | {node: True} for node in root.walk() if node.parent]


def run_arm(section, arm, size, branching, step, prompt_len):
    """-> CPU seconds, peak resident MB beyond the model, forwarded over unique tokens (update)."""
    torch.set_num_threads(1)
    model, prompt = make_model(size), list(range(1, prompt_len + 1))
    decoding = Decoding(eos_ids=(2000,), n_tokens=2000, max_rows=512)  # an id that cannot be sampled: trees are full
    sample_trees(model, [prompt[:4]], [2], [2], decoding)  # warm up
    idle, ratio = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    start = time.process_time()
    if section == "sampling":
        leaves = 1
        for n in branching:
            leaves *= n
        if arm == "cache reuse":
            sample_trees(model, [prompt], branching, [step] * len(branching), decoding)
        elif arm == "prefix again":
            with torch.no_grad():
                sample_again(model, prompt, branching, step, decoding)
        else:
            sample_trees(model, [prompt], [leaves], [step * len(branching)], decoding)
    else:
        root = full_tree(prompt, branching, step)
        packs = rows_of(root, arm)
        for pack in packs:
            (-token_logps(model, pack_tensors(pack, "cpu"), 1.0, 2000).sum()).backward()
        unique = sum(len(node.tokens) for node in root.walk())
        ratio = sum(len(node.tokens) for pack in packs for node in pack) / unique
    seconds = time.process_time() - start
    return dict(cpu_s=round(seconds, 3), peak_mb=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) // 1024,
                forwarded_over_unique=ratio and round(ratio, 3))


def table(lines):
    print("| section | model | branching | arm | CPU s, median | times the first arm (lowest to highest) | peak MB | "
          "forwarded / unique |\n|---|---|---|---|---|---|---|---|")
    measured = [r for r in lines if r["section"] != "counting"]
    for job in dict.fromkeys((r["section"], r["size"], tuple(r["branching"])) for r in measured):
        mine = [r for r in measured if (r["section"], r["size"], tuple(r["branching"])) == job]
        base = {r["repeat"]: r["cpu_s"] for r in mine if r["arm"] == ARMS[job[0]][0]}
        for arm in ARMS[job[0]]:
            runs = [r for r in mine if r["arm"] == arm]
            if runs:
                ratios = sorted(r["cpu_s"] / base[r["repeat"]] for r in runs)
                forwarded = runs[0]["forwarded_over_unique"] or "-"
                print(f"| {job[0]} | {job[1]} | {' '.join(map(str, job[2]))} | {arm} | "
                      f"{statistics.median(r['cpu_s'] for r in runs):.2f} | {statistics.median(ratios):.2f} "
                      f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {statistics.median(r['peak_mb'] for r in runs):.0f} | {forwarded} |")
    for r in lines:
        if r["section"] == "counting":
            print(f"\ncounting: {r['forwarded_over_unique']} tokens forwarded per unique token at {r['what']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of the small trees")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--repeats", type=int, default=3, help="of every arm (default 3)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(**json.loads(args.arm))))
        return
    jobs = [("sampling", "4x128", [4, 4, 4]), ("update", "4x128", [4, 4, 4])]
    if not args.quick:
        jobs += [("sampling", "4x128", [8, 8, 8]), ("sampling", "12x768", [4, 4, 4])]
    versions = dict(torch=torch.__version__, transformers=transformers.__version__, machine=platform.machine())
    if not args.table:
        todo = [(job, repeat, arm) for job in jobs for repeat in range(1 if args.quick else args.repeats) for arm in ARMS[job[0]]]
        with RESULTS.open("w") as file:
            packs = pack_nodes([full_tree(range(200), [8, 8, 8], 384)], 4096)
            forwarded = sum(len(node.tokens) for pack in packs for node in pack)
            file.write(json.dumps(dict(section="counting", what="8 8 8, step 384, prompt 200, packs of 4096",
                                       forwarded_over_unique=round(forwarded / (200 + 584 * 384), 3))) + "\n")
            for (section, size, branching), repeat, arm in tqdm(todo):
                job = dict(section=section, arm=arm, size=size, branching=branching, step=32, prompt_len=64)
                made = subprocess.run([sys.executable, __file__, "--arm", json.dumps(job)], check=True, capture_output=True,
                                      text=True).stdout
                file.write(json.dumps({**job, "repeat": repeat, **json.loads(made.splitlines()[-1]), **versions}) + "\n")
                file.flush()
    table([json.loads(line) for line in RESULTS.read_text().splitlines()])


if __name__ == "__main__":
    main()
