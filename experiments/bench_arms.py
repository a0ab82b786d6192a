"""One arm of bench.py in a process of its own: prints its figures as JSON, the last line.

    python experiments/bench_arms.py JOB    # JOB: JSON with section, arm, case, repeat, old; see bench.py

Seconds are CPU seconds of one thread, the faster of two runs.
"""
import dataclasses
import importlib.util
import json
import math
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import common

common.use_one_thread()

import torch  # noqa: E402
import transformers  # noqa: E402
import treerpo  # noqa: E402
from make_random_qwen import SHAPES, make_model  # noqa: E402

NEVER = -1e4  # a logit


@dataclass
class Case:
    """What is sampled or trained, and by which model."""
    size: str = "small"                     # of make_random_qwen.py
    branching: tuple[int, ...] = (4, 4, 4)
    step: int = 32                          # tokens of a step; no answer ends early
    prompt: int = 64                        # tokens of the prompt
    max_rows: int = 512
    pack_len: int = 1024

    def step_lens(self) -> list[int]:
        return [self.step] * len(self.branching)


def make_policy(case: Case) -> tuple[torch.nn.Module, treerpo.Decoding]:
    """A random model that never ends an answer, so that all arms do the same work."""
    shape = SHAPES[case.size]
    eos_id = shape.vocab - 1
    model = make_model(shape, eos_id, torch.float32, seed=0).eval()
    bias = torch.zeros(shape.vocab)
    bias[eos_id] = NEVER
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model, treerpo.Decoding((eos_id,), shape.vocab, 1.0, case.max_rows)


def random_tokens(n: int) -> list[int]:
    return [random.randrange(200) for _ in range(n)]


def faster_of_two(work: Callable[[], object]) -> float:
    """CPU seconds of the faster of two runs; the first one also pays for fresh memory."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def load_first_version(path: str) -> object:
    spec = importlib.util.spec_from_file_location("first_treerpo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_treerpo"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------- Sampling
def sample_plain(
    model: torch.nn.Module, ids: torch.Tensor, branching: list[int], lengths: list[int]
) -> None:
    """Plain `generate`: every level reads its whole prefix again."""
    for width, length in zip(branching, lengths):
        config = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=length, num_return_sequences=width,
            eos_token_id=model.config.eos_token_id, pad_token_id=0,
        )
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, generation_config=config)


def measure_sampling(arm: str, case: Case, old: object) -> dict:
    model, decoding = make_policy(case)

    def work(case: Case) -> None:
        prompts = [random_tokens(case.prompt)]
        branching = list(case.branching)
        if arm == "tree":
            treerpo.sample_trees(model, prompts, branching, case.step_lens(), decoding)
        elif arm == "first version":
            old_decoding = old.Decoding(decoding.eos_ids, decoding.vocab_size, 1.0, case.max_rows)
            old.sample_trees(model, prompts, branching, case.step_lens(), old_decoding)
        elif arm == "prefix again":
            sample_plain(model, torch.tensor(prompts), branching, case.step_lens())
        else:
            n_leaves = math.prod(branching)
            answer_len = sum(case.step_lens())
            sample_plain(model, torch.tensor(prompts), [n_leaves], [answer_len])

    work(dataclasses.replace(case, branching=(2, 2), step=2))
    seconds = faster_of_two(lambda: work(case))
    return {"seconds": seconds, "peak_mb": peak_mb()}


# ------------------------------------------------------------------------------------------ Update
def random_tree(case: Case) -> treerpo.Node:
    """A full tree of random tokens; every step is trained, with an advantage of +1 or -1."""
    root = treerpo.Node(random_tokens(case.prompt))
    level = [root]
    for width in case.branching:
        parents = [node for node in level for _ in range(width)]
        level = [treerpo.Node(random_tokens(case.step), parent) for parent in parents]
    for step in root.steps():
        step.advantage = random.choice((-1.0, 1.0))
        step.trained = True
    return root


def as_old_tree(node: treerpo.Node, parent: object, kind: type) -> object:
    """The same tree in the first version's nodes, which do not enter their parent's children."""
    copied = kind(node.tokens, parent, advantage=node.advantage)
    copied.children = [as_old_tree(child, copied, kind) for child in node.children]
    return copied


def update_packed(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tree: treerpo.Node,
    case: Case,
) -> float:
    """-> the gradient norm. Without KL and entropy, as the other arms have none."""
    metrics = treerpo.update_policy(
        model, None, optimizer, [tree], minibatches=1, pack_len=case.pack_len, mixed=False,
        temperature=1.0, vocab_size=model.config.vocab_size, ratio="token", clip_eps=0.2, kl_coef=0.0,
        entropy_coef=0.0,
    )
    return metrics["grad_norm"]


def update_first_version(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tree: object,
    case: Case,
    old: object,
) -> float:
    """-> the gradient norm. `tree` is in the first version's nodes."""
    nodes = [node for node in tree.walk() if node.parent]
    decoding = old.Decoding((0,), model.config.vocab_size, 1.0, case.max_rows)
    metrics = old.update_policy(
        model, optimizer, [tree], old.unit_weights(nodes, "tokens", "token"), decoding,
        torch.autocast("cpu", torch.bfloat16, enabled=False), case.pack_len, 0.2, "token", 1,
    )
    return metrics["grad_norm"]


def leaf_rows(leaves: list[treerpo.Node]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids of the whole paths, the advantage of each token behind the prompt over the number of
    rows which that token is in."""
    ids = []
    weights = []
    for leaf in leaves:
        row = []
        for step in leaf.path()[1:]:
            row += [step.advantage / len(step.leaves())] * len(step.tokens)
        ids.append([token for node in leaf.path() for token in node.tokens])
        weights.append(row)
    return torch.tensor(ids), torch.tensor(weights)


def update_rows(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tree: treerpo.Node,
    case: Case,
) -> float:
    """A row for each leaf's path, in micro-batches of pack_len tokens -> the gradient norm."""
    leaves = tree.leaves()
    n_tokens = sum(len(step.tokens) for step in tree.steps())
    answer_len = sum(case.step_lens())
    width = max(1, case.pack_len // (case.prompt + answer_len))
    for start in range(0, len(leaves), width):
        ids, weights = leaf_rows(leaves[start:start + width])
        out = model(ids, logits_to_keep=answer_len + 1, use_cache=False)
        logits = out.logits[:, :-1]
        targets = ids[:, -answer_len:, None]
        logps = logits.gather(2, targets)[..., 0] - logits.logsumexp(2)
        ratios = (logps - logps.detach()).exp()
        loss = -(weights * ratios).sum() / n_tokens
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


def measure_update(arm: str, case: Case, old: object) -> dict:
    """Forward, backward and optimiser step. All arms have the same tree and weights, so that their
    gradient norms must agree."""
    model, _ = make_policy(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def work(tree: treerpo.Node, case: Case) -> float:
        if arm == "packed":
            return update_packed(model, optimizer, tree, case)
        if arm == "first version":
            old_tree = as_old_tree(tree, None, old.Node)
            return update_first_version(model, optimizer, old_tree, case, old)
        return update_rows(model, optimizer, tree, case)

    tree = random_tree(case)
    little = dataclasses.replace(case, branching=(2,), step=4, prompt=4)
    work(random_tree(little), little)  # makes Adam's memory
    norms = []
    seconds = faster_of_two(lambda: norms.append(work(tree, case)))
    return {"seconds": seconds, "peak_mb": peak_mb(), "grad_norm": norms[0]}


def processor() -> str:
    try:
        lines = open("/proc/cpuinfo", encoding="utf-8").read().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(job["repeat"])
    random.seed(job["repeat"])
    case = Case(**job["case"])
    old = load_first_version(job["old"]) if job["old"] else None
    if job["section"] == "sampling":
        figures = measure_sampling(job["arm"], case, old)
    else:
        figures = measure_update(job["arm"], case, old)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**figures, "processor": processor(), **versions}))


if __name__ == "__main__":
    main()
