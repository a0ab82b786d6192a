"""TreeRPO (Tree Relative Policy Optimization, arXiv 2506.05183) in one file: an independent re-implementation.

The algorithm, once per training step:
  1. grow      for each question sample an N-ary tree; a child continues its parent from the parent's KV cache
  2. verify    score the text of every leaf 0 or 1 against the known answer
  3. back up   the reward of an inner node is the mean of its children's rewards, bottom-up
  4. compare   siblings form a step-level group; advantage = (reward - group mean) / normaliser
  5. update    clipped policy gradient on each step's own tokens, every unique token scored once
GRPO is the tree of depth 1; GSPO takes one ratio per segment; TreeAdv (arXiv 2601.03703) forks at uncertain tokens.

One small tree by hand, branching 2 2 (leaf rewards -> backup -> advantages, normaliser bernoulli):
    root .75 -+- a .5 -+- 1     group {1, 0}:   mean .5,  sqrt(.5 * .5)   = .5    ->  +1    and  -1
              |        +- 0
              +- b  1 -+- 1     group {1, 1}:   no spread                         ->  0, not in the update
                       +- 1     group {.5, 1}:  mean .75, sqrt(.75 * .25) = .433  ->  -.577 and  +.577

Differences from the paper, of which only the abstract and summaries could be read (README.md says more):
  1. normaliser: the paper's formula could not be read; bernoulli, sqrt(mu (1 - mu)), is our default
  2. pruning: the paper's rule could not be read; groups without spread are dropped, near-ties by --min-group-std
  3. loss: PPO clip, no KL term, no reference model; divided once by the number of all sampled tokens
  4. tree shape and step length: ours, sized for one GPU

    python treerpo.py                                    # the bundled model and task, minutes on a CPU
    python treerpo.py --model Qwen/Qwen2.5-Math-1.5B     # MATH on one 80 GB GPU
    python treerpo.py --algo grpo --print-tree           # a baseline, and a look at its samples
"""
import argparse
import copy
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor

# ------------------------------------------------------------------------------------------------- flags and defaults


class BadInput(ValueError):
    """Something the user gave cannot work; the message names it and the fix. main() turns it into exit status 2."""


def above_zero(kind):
    """An argparse type: a finite number above zero."""
    def number(text):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be a positive number")
        return kind(text)
    return number


COUNT, REAL, DEMO = above_zero(int), above_zero(float), Path(__file__).resolve().parent / "demo"
# An algo is a named set of three choices: where to branch, which advantage, which ratio.
ALGOS = {"treerpo": dict(branch_at="fixed", advantage="siblings", ratio="token"),
         "grpo": dict(branch_at="fixed", advantage="siblings", ratio="token"),
         "gspo": dict(branch_at="fixed", advantage="siblings", ratio="sequence", clip_eps=4e-4),
         "treeadv": dict(branch_at="entropy", advantage="leaves", ratio="token")}
DEPTH_1, DEMO_DEPTH_1 = dict(branching=[32], step_len=[1152]), dict(branching=[8], step_len=[64])  # all but treerpo
FLAGS = [  # a title, or: name, type or choices, default, default of the bundled demo, help
    "model and data",
    ("model", str, None, DEMO / "model", "folder or hub id; without it the bundled model and all demo defaults"),
    ("data", str, "nlile/hendrycks-MATH-benchmark", DEMO / "train.jsonl", "questions: .jsonl, .json, .parquet, or hub "
     "ID[:CONFIG[:SPLIT]]"),
    ("eval-data", str, "HuggingFaceH4/MATH-500::test", DEMO / "test.jsonl", "held-out questions; with --data alone: a "
     "fifth of it"),
    ("question-column", str, None, None, "column of the question, if not found by its usual names"),
    ("answer-column", str, None, None, "column of the answer, if not found by its usual names"),
    ("template", str, None, None, "qwen-math, none (bare question), chat (the tokenizer's own) or a file with {question} in "
     "it; default: qwen-math if the tokenizer knows <|im_end|>, else none"),
    ("out", str, None, None, "output folder, default: runs/ALGO-DATE-TIME"),
    ("resume", str, None, None, "continue the run in this folder, with its own flags"),
    "tree",
    ("algo", list(ALGOS), "treerpo", "treerpo", "named set of --branch-at, --advantage and --ratio"),
    ("branch-at", ["fixed", "entropy"], None, None, "branch every --step-len tokens, or at uncertain tokens"),
    ("branching", COUNT, [8, 2, 2], [4, 2, 2, 2], "children of a node, a number a level; other algos 32, demo 8"),
    ("step-len", COUNT, [384], [16], "tokens of a step, one number or one a level; other algos 1152, demo 64"),
    ("leaves", COUNT, 32, 8, "entropy branching: rollouts per question in all"),
    ("trees", COUNT, 8, 4, "entropy branching: first rollouts per question; the others fork from them"),
    ("entropy-threshold", REAL, 1.0, 0.3, "entropy branching: nats above which a token may fork"),
    ("temperature", REAL, 1.0, 1.0, "of sampling and scoring alike"),
    ("questions-per-step", COUNT, 16, 32, "questions of one batch"),
    "learning",
    ("steps", COUNT, 300, 40, "training steps, one batch each"),
    ("lr", REAL, 1e-6, 3e-4, "AdamW learning rate, after 5 steps of linear warm-up"),
    ("advantage", ["siblings", "leaves", "both"], None, None, "compare siblings, redistribute the leaves', or the sum"),
    ("ratio", ["token", "sequence"], None, None, "importance ratio per token (GRPO) or per segment (GSPO)"),
    ("clip-eps", REAL, 0.2, 0.2, "PPO clip range 1 +- this; gspo 4e-4"),
    ("updates-per-batch", COUNT, 1, 1, "optimiser steps on each batch"),
    ("normalizer", ["bernoulli", "std", "none"], "bernoulli", "bernoulli", "divisor of the advantages"),
    ("level-weight", ["tokens", "levels"], "tokens", "tokens", "every token alike, or every depth alike"),
    ("min-group-std", float, 0.0, 0.0, "drop groups whose rewards have at most this population std"),
    ("seed", int, 0, 0, "of sampling, data order and evaluation"),
    "memory and speed",
    ("max-rows", COUNT, 512, 2048, "sequences of one generate call; bounds the KV cache"),
    ("pack-len", COUNT, 4096, 512, "tokens of one training forward; bounds the activations"),
    ("grad-checkpointing", bool, False, False, "compute activations again in the backward pass"),
    ("dtype", ["auto", "float32", "mixed", "bfloat16"], "auto", "auto", "mixed: float32 weights, bf16 compute and sampling; "
     "auto: mixed on CUDA, float32 on CPU"),
    ("device", ["auto", "cpu", "cuda"], "auto", "auto", "where to run"),
    "evaluation and output",
    ("eval-every", COUNT, 20, 10, "steps between evaluations"),
    ("eval-questions", COUNT, 128, 256, "held-out questions used, the first ones"),
    ("eval-samples", COUNT, 4, 8, "k of avg@k"),
    ("save-every", COUNT, 50, 20, "steps between checkpoints"),
    ("keep", COUNT, 2, 2, "newest checkpoints kept"),
    ("print-tree", bool, False, False, "print the first tree of every step"),
    ("dump-trees", str, None, None, "append every node as a JSON line to this file"),
]
# A resumed run may change these: they decide what fits and what is shown, not what is learned.
MAY_CHANGE = "steps max_rows pack_len grad_checkpointing save_every keep print_tree out resume".split()

# --------------------------------------------------------------------------------------------------- prompts and data

QWEN_MATH = ("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
             "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def load_template(name, tokenizer):
    """--template -> a text with {question} in it, or "chat" (qwen-math: Qwen's own evaluation prompt)."""
    name = name or ("qwen-math" if "<|im_end|>" in tokenizer.get_vocab() else "none")
    if name == "chat" and tokenizer.chat_template:
        return name
    try:
        text = {"qwen-math": QWEN_MATH, "none": "{question}"}.get(name) or Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--template {name}: needs qwen-math, none, a tokenizer with a chat template, or a text file") from e
    if "{question}" not in text:
        raise BadInput(f"--template {name}: the file has no {{question}} in it")
    return text


def build_prompt(question, template, tokenizer):
    """Question -> prompt token ids, in training and evaluation alike."""
    if template != "chat":
        return tokenizer.encode(template.replace("{question}", question))
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)  # the chat template has written them


def use_hub_or_cache():
    """If the hub does not answer, look into its local cache only, at once instead of after minutes of retries."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=8).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def read_rows(source):
    """A .jsonl, .json or .parquet file or a hub data set ID[:CONFIG[:SPLIT]] -> list of rows. Raises BadInput."""
    suffix, rows, line = Path(source).suffix, [], 0
    try:
        if suffix == ".jsonl":
            for line, text in enumerate(Path(source).open("rb"), 1):
                rows.append(json.loads(text))
        elif suffix == ".json":
            rows = json.loads(Path(source).read_bytes())
        elif suffix == ".parquet":
            rows = datasets.Dataset.from_parquet(source, keep_in_memory=True)
        else:
            use_hub_or_cache()
            name, config, split = (source.split(":") + ["", ""])[:3]
            rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as e:  # a dozen unrelated types say "not there", "not reachable" or "not readable"
        raise BadInput(f"{source}{f' line {line + 1}' if line else ''}: cannot read it ({str(e) or type(e).__name__:.200}). "
                       "Give a .jsonl, .json or .parquet file, or a hub id that is reachable or cached") from e
    if not len(rows) or isinstance(rows, dict):
        raise BadInput(f"{source}: no questions in it; it must be a list of objects")
    return rows


def column(row, place, flag, wanted, usual):
    """The row's value under the wanted column, or under the first usual name it has, in whatever case."""
    names = {str(name).lower(): name for name in row}
    for name in [wanted.lower()] if wanted else usual:
        if name in names:
            return row[names[name]]
    raise BadInput(f"{place}: no column {wanted or ' or '.join(usual)}, only {', '.join(names)}; name it with {flag}")


def load_questions(source, question_column=None, answer_column=None):
    """-> [{"id": row number from 0, "question": str, "answer": str, number or list of accepted ones}]. Raises BadInput."""
    questions, unreadable = [], []
    for number, row in enumerate(read_rows(source)):
        place = f"{source} row {number + 1}"
        if not isinstance(row, dict):
            raise BadInput(f"{place}: not an object with columns")
        question = column(row, place, "--question-column", question_column, ("question", "problem"))
        answer = column(row, place, "--answer-column", answer_column, ("answer", "final_answer", "solution"))
        if not isinstance(question, str) or not question.strip():
            raise BadInput(f"{place}: the question must be text and not empty, not {question!r:.80}")
        golds = answer if isinstance(answer, list) else [answer]
        if not golds or any(type(g) not in (str, int, float) or not str(g).strip() for g in golds):
            raise BadInput(f"{place}: the answer must be text or a number and not empty, not {answer!r:.80}")
        if isinstance(answer, str) and "####" in answer:  # GSM8K writes the reasoning, then #### and the answer
            answer = answer.rsplit("####", 1)[1].strip()
        questions.append({"id": number, "question": question, "answer": answer})
    return questions


def fit_context(questions, name, template, tokenizer, budget, context):
    """Add each question's prompt tokens; leave out questions whose prompt and answer together exceed the context."""
    for q in questions:
        q["prompt"] = build_prompt(q["question"], template, tokenizer)
    kept = [q for q in questions if 0 < len(q["prompt"]) <= context - budget]
    if not kept:
        raise BadInput(f"{name}: no question fits, depth x --step-len takes {budget} of {context} tokens; lower --step-len")
    if len(kept) < len(questions):
        print(f"{name}: {len(questions) - len(kept)} of {len(questions)} questions left out, too long for the context")
    return kept


# -------------------------------------------------------------------------------------------------- verifiable reward

def extract_boxed(text):
    i = text.rfind("\\boxed{")
    j = text.find("}", i)
    return text[i + 7:j] if i >= 0 and j >= 0 else None


def is_equiv(a, b):
    return bool(a) and a == b


def reward_fn(completion, answer):
    box = extract_boxed(completion)
    return float(box is not None and is_equiv(box, str(answer)))


# ----------------------------------------------------------------------------------------------------------- the tree

@dataclass(eq=False)
class Node:
    """One step: a segment of tokens that continues its parent's path. The root holds the prompt."""
    tokens: list                                         # this step's own token ids, EOS included
    parent: "Node | None" = field(default=None, repr=False)
    children: list = field(default_factory=list, repr=False)
    done: bool = False                                   # ended by an EOS
    reward: float = None                                 # of a leaf: the verifier's; else the mean of the children's
    advantage: float = 0.0
    entropies: list = field(default_factory=list, repr=False)  # nats, of the distribution each token was drawn from
    question: int = 0                                    # of a root: index of its prompt

    def path(self):
        """Nodes from the root to this one."""
        return (self.parent.path() if self.parent else []) + [self]

    def walk(self):
        """This node and all below, depth-first, parents before children."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self):
        return [node for node in self.walk() if not node.children]

    @property
    def depth(self):
        return len(self.path()) - 1

    @property
    def trained(self):
        """Whether its tokens are in the loss: the advantage is not 0, up to rounding."""
        return abs(self.advantage) > 1e-12


def path_text(node, tokenizer):
    """Text of the completion up to the end of this node. Of a leaf: what the verifier grades."""
    ids = [token for step in node.path()[1:] for token in step.tokens]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if node.children else text  # half a UTF-8 character is left to the child that ends it


def step_text(node, tokenizer):
    """The node's own piece of text: the pieces of a path concatenate to its leaf's path_text."""
    return path_text(node, tokenizer)[len(path_text(node.parent, tokenizer)):] if node.parent else ""


def render_tree(node, tokenizer, indent=""):
    """The tree as indented lines of reward, advantage, text; control characters escaped, the terminal never sees them."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in step_text(node, tokenizer))
    line = f"{indent}{node.reward:.2f} {node.advantage:+.2f} | {text}"
    return "\n".join([line] + [render_tree(child, tokenizer, indent + "    ") for child in node.children])


# ---------------------------------------------------------------------------------------------------- tree sampling

@dataclass(frozen=True)
class Decoding:
    """How to sample: exactly softmax(logits / temperature) over the tokenizer's ids; temperature 0 is greedy."""
    eos_ids: tuple           # any of them ends a rollout
    n_tokens: int            # ids from here on are padding of the embedding matrix, never sampled or scored
    temperature: float = 1.0
    max_rows: int = 512      # sequences of one generate call


class OnPolicy(LogitsProcessor):
    """The only logits processor: cuts off ids beyond the tokenizer, applies the temperature, notes the entropy."""

    def __init__(self, n_tokens, temperature):
        self.n_tokens, self.temperature, self.entropies = n_tokens, temperature or 1.0, []

    def __call__(self, input_ids, scores):
        scores[:, self.n_tokens:] = -math.inf
        scores = scores / self.temperature
        self.entropies.append(torch.special.entr(scores.softmax(-1)).sum(-1))  # -sum_a pi log pi, over the vocabulary
        return scores


def prefill(model, sequences, pad_id):
    """[R] token lists -> (ids [R, T] left-padded, mask [R, T], KV cache of the first T - 1 positions).

    The last token stays out because `generate` feeds it itself; a cache of all T would make it feed the prompt again.
    """
    length = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (length - len(s)) + s for s in sequences], device=model.device)
    mask = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in sequences], device=model.device)
    cache = DynamicCache()
    if length > 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model.get_decoder()(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                            past_key_values=cache, use_cache=True)
    return ids, mask, cache


def select_rows(state, rows):
    """A new (ids, mask, cache) of these rows: repeats a parent for each child and drops finished rows in one go."""
    ids, mask, cache = state
    rows = torch.tensor(rows, device=ids.device)
    cache = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])
    return ids[rows], mask[rows], cache


def generate_step(model, state, max_new_tokens, decoding):
    """Continue every row by one step with HF generate. -> ([R] (tokens, done, entropies), state after the step)."""
    ids, mask, cache = state
    # Every field that a checkpoint's own generation_config could leak in (top_k, penalties, ...) must come from ours.
    clean = GenerationConfig(do_sample=decoding.temperature > 0, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                             max_new_tokens=max_new_tokens, eos_token_id=list(decoding.eos_ids),
                             pad_token_id=decoding.eos_ids[0])
    policy = OnPolicy(decoding.n_tokens, decoding.temperature)
    original, model.generation_config = model.generation_config, clean
    model.eval()  # gradient checkpointing in train mode drops the cache without a word
    try:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=clean,
                             logits_processor=[policy])
    finally:
        model.generation_config = original
    new = out[:, ids.shape[1]:]
    ended = torch.isin(new, torch.tensor(decoding.eos_ids, device=new.device))
    done = ended.any(1)
    lengths = torch.where(done, ended.int().argmax(1) + 1, new.shape[1])  # behind its first EOS a row is padding
    entropies = torch.stack(policy.entropies, 1)
    steps = [(tokens[:n], d, h[:n]) for tokens, n, d, h in
             zip(new.tolist(), lengths.tolist(), done.tolist(), entropies.tolist())]
    return steps, (out, torch.cat([mask, torch.ones_like(new)], 1), cache)


def grow(model, nodes, rows, state, branching, step_lens, decoding):
    """Give every node its children, level by level; nodes[i] lives in row rows[i] of state. Fills node.children.

    A frontier wider than max_rows is walked depth-first in chunks: the same distribution in less memory.
    """
    wanted = [i for i in range(len(nodes)) for _ in range(branching[0])]
    for start in range(0, len(wanted), decoding.max_rows):
        chunk = wanted[start:start + decoding.max_rows]
        steps, child_state = generate_step(model, select_rows(state, [rows[i] for i in chunk]), step_lens[0], decoding)
        children = [Node(tokens, nodes[i], done=done, entropies=h) for i, (tokens, done, h) in zip(chunk, steps)]
        for child in children:
            child.parent.children.append(child)
        live = [row for row, child in enumerate(children) if not child.done]
        if live and branching[1:]:
            grow(model, [children[row] for row in live], live, child_state, branching[1:], step_lens[1:], decoding)


@torch.no_grad()
def sample_trees(model, prompts, branching, step_lens, decoding):
    """One tree per prompt [summary of section 3]: branching[d] children of step_lens[d] tokens below each live node.

    prompts: token id lists. branching, step_lens: one entry a level. -> roots, in the order of the prompts.
    """
    roots = [Node(list(prompt), question=i) for i, prompt in enumerate(prompts)]
    by_length = sorted(roots, key=lambda root: len(root.tokens))  # little padding
    width = max(1, decoding.max_rows // branching[0])
    for start in range(0, len(roots), width):
        group = by_length[start:start + width]
        state = prefill(model, [root.tokens for root in group], decoding.eos_ids[0])
        grow(model, group, range(len(group)), state, branching, step_lens, decoding)
    return roots


def split_step(node, t):
    """Cut a step in two before its token t >= 1: the node keeps the head, a new only child takes all the rest."""
    tail = Node(node.tokens[t:], node, node.children, node.done, entropies=node.entropies[t:])
    for child in tail.children:
        child.parent = tail
    node.tokens, node.children, node.done, node.entropies = node.tokens[:t], [tail], False, node.entropies[:t]


@torch.no_grad()
def sample_forests(model, prompts, leaves, trees, budget, threshold, decoding):
    """TreeAdv: `trees` first rollouts a prompt, then forks where they were most uncertain, `leaves` rollouts in all.

    Forks: the leaves - trees positions of highest entropy above threshold (nats); where there are fewer, fresh rollouts
    fill up. budget: tokens of a rollout. One round of forks [ours]. -> roots, several for each prompt.
    """
    roots, empty = [], []  # empty: (node to fill, tokens it may take)
    for first in sample_trees(model, prompts, [trees], [budget], decoding):
        for rollout in first.children:
            rollout.parent = Node(first.tokens, children=[rollout], question=first.question)
        forest = [rollout.parent for rollout in first.children]
        spots = [(h, k, t) for k, rollout in enumerate(first.children) for t, h in enumerate(rollout.entropies)]
        spots = sorted((spot for spot in spots if spot[0] > threshold), reverse=True)[:leaves - trees]
        for _, k, t in sorted(spots, key=lambda spot: -spot[2]):  # last fork first: the head stays the rollout's node
            rollout = first.children[k]
            if t > 0:
                split_step(rollout, t)
            fork = Node([], rollout if t > 0 else rollout.parent)
            fork.parent.children.append(fork)
            empty.append((fork, budget - t))
        for _ in range(leaves - trees - len(spots)):
            fresh = Node(first.tokens, question=first.question)
            fresh.children = [Node([], fresh)]
            forest.append(fresh)
            empty.append((fresh.children[0], budget))
        roots += forest
    prefix = {node: [token for step in node.parent.path() for token in step.tokens] for node, _ in empty}
    empty.sort(key=lambda pair: len(prefix[pair[0]]))
    for start in range(0, len(empty), decoding.max_rows):
        chunk = empty[start:start + decoding.max_rows]
        state = prefill(model, [prefix[node] for node, _ in chunk], decoding.eos_ids[0])
        steps, _ = generate_step(model, state, max(limit for _, limit in chunk), decoding)
        for (node, limit), (tokens, done, entropies) in zip(chunk, steps):
            node.tokens, node.entropies, node.done = tokens[:limit], entropies[:limit], done and len(tokens) <= limit
    return roots


# ---------------------------------------------------------------------------------------------------- reward backup

def backup_rewards(node):
    """Fill node.reward below and at node, return it. A leaf keeps its own; an inner node takes the mean of its
    children's (section 3 [summary]), which is not the mean of its leaves where a branch ended early."""
    if node.children:
        node.reward = sum(backup_rewards(child) for child in node.children) / len(node.children)
    return node.reward


# --------------------------------------------------------------------------------------- step-level groups, advantages

def group_relative_advantages(rewards, normalizer):
    """Rewards [n] of one group -> advantages [n], float64, sum 0; all 0 if the rewards have no spread.

    bernoulli: (r - mu) / sqrt(mu (1 - mu)), for r in [0, 1]; ours: it is std for 0/1 rewards and keeps near-ties small
    std: (r - mu) / population std        none: r - mu
    """
    rewards = rewards.double()
    mu = rewards.mean()
    if rewards.max() - rewards.min() < 1e-9:  # equal but for rounding
        return torch.zeros_like(rewards)
    if normalizer == "bernoulli" and (rewards.min() < 0 or rewards.max() > 1):
        raise ValueError("the bernoulli normaliser needs rewards in [0, 1]")
    scales = {"bernoulli": (mu * (1 - mu)).sqrt(), "std": rewards.std(correction=0), "none": 1.0}
    return (rewards - mu) / scales[normalizer]


def compare(nodes, normalizer, min_group_std):
    """Advantages of the nodes of one group, as a list; zeros if the group is pruned (rule ours)."""
    rewards = torch.tensor([node.reward for node in nodes], dtype=torch.float64)
    pruned = rewards.std(correction=0) <= min_group_std
    return [0.0] * len(nodes) if pruned else group_relative_advantages(rewards, normalizer).tolist()


def add_sibling_advantages(forest, normalizer, min_group_std=0.0):
    """TreeRPO's step-level groups: node.advantage += its advantage among its siblings. -> has each group a signal?"""
    signals = []
    for parent in (node for root in forest for node in root.walk() if node.children):
        group = compare(parent.children, normalizer, min_group_std)
        for child, advantage in zip(parent.children, group):
            child.advantage += advantage
        signals.append(any(group))
    return signals


def add_leaf_advantages(forest, normalizer, min_group_std=0.0):
    """TreeAdv: compare all leaves of a question; node.advantage += the mean over the leaves below it (plain mean: ours)."""
    leaves = [leaf for root in forest for leaf in root.leaves()]
    own = dict(zip(leaves, compare(leaves, normalizer, min_group_std)))
    for node in (node for root in forest for node in root.walk() if node.parent):
        below = node.leaves()
        node.advantage += math.fsum(own[leaf] for leaf in below) / len(below)
    return [any(own.values())]


def unit_weights(nodes, level_weight, ratio):
    """{depth: loss weight of a unit there}; a unit is a token, or a whole step under sequence ratios. The weights of all
    sampled units, trained or not, sum to 1, so that pruning, packs and micro-batches do not change the gradient.

    tokens: every unit alike. levels: every depth alike in sum (ours).
    """
    units = Counter()
    for node in nodes:
        units[node.depth] += len(node.tokens) if ratio == "token" else 1
    return {d: 1 / (units.total() if level_weight == "tokens" else len(units) * n) for d, n in units.items()}


# ------------------------------------------------------------------------------------------ packed log-probs and loss

def pack_nodes(roots, pack_len):
    """Put every node with an advantage into a pack once, behind its ancestors. -> list of {node: scored here?}.

    Packs hold at most pack_len tokens, unless one path alone is longer. Depth-first order keeps the children of a node
    together, so an ancestor is seldom computed again; in a later pack it is context only.
    """
    packs, pack, size = [], {}, 0
    for node in (node for root in roots for node in root.walk() if node.trained):
        missing = [step for step in node.path() if step not in pack]
        if pack and size + sum(len(step.tokens) for step in missing) > pack_len:
            packs.append(pack)
            pack, size, missing = {}, 0, node.path()
        pack.update(dict.fromkeys(missing, False))
        pack[node] = True
        size += sum(len(step.tokens) for step in missing)
    return packs + [pack] if pack else packs


def pack_tensors(pack, device):
    """A pack -> tensors of one row of T tokens, M of them scored, in S segments.

    ids, positions [1, T]; mask [1, 1, T, T], True where a token may look: itself, earlier tokens of its step, ancestors;
    predictors [M]: the column whose output predicts a scored token; targets [M]: that token; segments [M] in 0..S-1.
    """
    nodes = list(pack)
    index = {node: k for k, node in enumerate(nodes)}
    related = torch.eye(len(nodes), dtype=torch.bool)  # related[k, j]: j is k or an ancestor of k
    ids, positions, columns, predictors, targets, segments = [], [], [], [], [], []
    last, behind = {}, {}  # node: its last column; node: the position after its last token
    for k, node in enumerate(nodes):
        start, offset, length = len(ids), behind.get(node.parent, 0), len(node.tokens)
        if node.parent:
            related[k] |= related[index[node.parent]]
        if pack[node]:
            predictors += [last[node.parent], *range(start, start + length - 1)]
            targets += node.tokens
            segments += [len(set(segments))] * length
        ids += node.tokens
        positions += range(offset, offset + length)
        columns += [k] * length
        last[node], behind[node] = start + length - 1, offset + length
    columns = torch.tensor(columns)
    mask = related[columns][:, columns].tril()
    row = dict(ids=[ids], positions=[positions], predictors=predictors, targets=targets, segments=segments)
    return SimpleNamespace(mask=mask[None, None].to(device), **{k: torch.tensor(v, device=device) for k, v in row.items()})


def token_logps(model, row, temperature, n_tokens, chunk=256):
    """Log-probabilities [M], float32, of the scored tokens under softmax(logits / temperature) over n_tokens ids.

    Never holds float32 logits of more than `chunk` tokens: the head runs in chunks and again in the backward pass.
    """
    hidden = model.get_decoder()(input_ids=row.ids, attention_mask=row.mask, position_ids=row.positions,
                                 use_cache=False).last_hidden_state[0, row.predictors]
    head = model.get_output_embeddings()

    def score(hidden, targets):
        logits = head(hidden)[:, :n_tokens].float() / temperature
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    return torch.cat([checkpoint(score, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(chunk), row.targets.split(chunk))])


def policy_loss(logps, old_logps, segments, advantages, weights, clip_eps, ratio):
    """Clipped surrogate -sum_u w_u min(r_u A_u, clip(r_u, 1 - eps, 1 + eps) A_u) -> (loss, clipped units, units).

    logps, old_logps, segments [M]; advantages, weights [S]. token (GRPO): a unit is a token, r = pi / pi_old.
    sequence (GSPO, 2507.18071): a unit is a segment, r = (pi(y) / pi_old(y))^(1 / |y|) = exp(mean_t log r_t).
    """
    log_ratio = logps - old_logps
    if ratio == "sequence":
        sums = torch.zeros_like(advantages).index_add(0, segments, log_ratio)
        log_ratio = sums / torch.bincount(segments, minlength=len(advantages))
    else:
        advantages, weights = advantages[segments], weights[segments]
    r = log_ratio.exp()
    plain, clipped = r * advantages, r.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -(weights * torch.min(plain, clipped)).sum(), (clipped < plain).sum().item(), len(r)


# ------------------------------------------------------------------------------------------------------------ update

def update_policy(model, optimizer, trees, weights, decoding, *, pack_len, clip_eps, ratio, updates, autocast):
    """`updates` optimiser steps on one batch of trees. -> grad_norm and clip_ratio of the passes, skipped.

    weights: {depth: weight of a unit}, see unit_weights. Old log-probs are those of the first pass, before any step, so
    one pass has ratio 1 throughout. A pass with a loss or gradient that is not finite never reaches the weights.
    """
    packs, old_logps = pack_nodes(trees, pack_len), {}
    result = dict(grad_norm=0.0, clip_ratio=0.0, skipped=False)
    for _ in range(updates if packs else 0):
        optimizer.zero_grad(set_to_none=True)
        loss_sum, clipped, units = 0.0, 0, 0
        for k, pack in enumerate(packs):
            row = pack_tensors(pack, model.device)
            scored = [node for node in pack if pack[node]]
            advantages = torch.tensor([node.advantage for node in scored], device=model.device)
            weight = torch.tensor([weights[node.depth] for node in scored], device=model.device)
            with autocast():
                logps = token_logps(model, row, decoding.temperature, decoding.n_tokens)
            old = old_logps.setdefault(k, logps.detach())
            loss, n_clipped, n = policy_loss(logps, old, row.segments, advantages, weight, clip_eps, ratio)
            loss.backward()
            loss_sum, clipped, units = loss_sum + loss.item(), clipped + n_clipped, units + n
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(loss_sum + norm):
            optimizer.zero_grad(set_to_none=True)
            return dict(result, skipped=True)
        optimizer.step()
        result.update(grad_norm=norm, clip_ratio=clipped / units)
    optimizer.zero_grad(set_to_none=True)
    return result


def copy_weights(source, target):
    """Make the sampling copy follow the trained weights, rounding them to its own precision."""
    if target is not source:
        for p, q in zip(target.parameters(), source.parameters()):
            p.data.copy_(q.data)


# -------------------------------------------------------------------------------------------------------- evaluation

def evaluate(model, tokenizer, questions, samples, budget, decoding, seed):
    """Held-out accuracy: avg@samples at temperature 1 and greedy. Its own random stream leaves the training's alone."""
    prompts = [q["prompt"] for q in questions]
    accuracy = {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, width, temperature in (("eval/accuracy", samples, 1.0), ("eval/greedy_accuracy", 1, 0.0)):
            roots = sample_trees(model, prompts, [width], [budget], replace(decoding, temperature=temperature))
            rewards = [reward_fn(path_text(leaf, tokenizer), questions[root.question]["answer"])
                       for root in roots for leaf in root.leaves()]
            accuracy[name] = sum(rewards) / len(rewards)
    return accuracy


# ------------------------------------------------------------------------------------------------- checkpoint and log

def append_jsonl(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def drop_later_steps(path, step):
    """Keep the lines of a JSONL file up to this step; a line torn by a kill goes too."""
    if path and os.path.exists(path):
        lines = [line for line in Path(path).read_bytes().splitlines(True) if line.endswith(b"\n")]
        Path(f"{path}.tmp").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= step))
        os.replace(f"{path}.tmp", path)


def checkpoints(out):
    """Checkpoint folders of a run, oldest first."""
    return sorted((p for p in Path(out).glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))


def is_whole(folder):
    """Whether every file that save_checkpoint wrote is there with its size."""
    try:
        sizes = json.loads((folder / "manifest.json").read_bytes())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def save_checkpoint(out, step, model, tokenizer, state, keep):
    """OUT/checkpoint-STEP: a plain Hugging Face folder plus trainer_state.pt, written aside and then renamed, so that a
    kill or a full disk leaves the earlier ones whole. Raises OSError."""
    final, aside = Path(out) / f"checkpoint-{step}", Path(out) / "checkpoint.tmp"
    if is_whole(final):
        return
    for folder in (aside, final):  # left by a kill; damaged
        shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        torch.save(state, aside / "trainer_state.pt")
        (aside / "manifest.json").write_text(json.dumps({p.name: p.stat().st_size for p in aside.iterdir()}))
        for p in aside.iterdir():
            with p.open("rb") as file:
                os.fsync(file.fileno())
        aside.rename(final)
    except Exception as e:  # torch and safetensors have types of their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"cannot write {final}: {e}. Earlier checkpoints are intact") from e
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old.rename(aside))  # renamed first: no half-deleted folder looks like a checkpoint


def newest_checkpoint(out):
    """The newest whole checkpoint folder, or None if the run was stopped before its first. Raises BadInput."""
    shutil.rmtree(Path(out) / "checkpoint.tmp", ignore_errors=True)
    for folder in reversed(checkpoints(out)):
        if is_whole(folder):
            return folder
        print(f"{folder} is damaged: a file is missing or changed in size", file=sys.stderr)
    if checkpoints(out):
        raise BadInput(f"--resume {out}: no whole checkpoint is left; start again with another --out")
    return None


# ------------------------------------------------------------------------------------------------------ model loading

def load_model(name, device, dtype, grad_checkpointing):
    """-> (model to train, model to sample from, tokenizer). Under mixed precision the second is a bf16 copy."""
    if not os.path.isdir(name):
        use_hub_or_cache()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32, attn_implementation="sdpa").to(device)
    except (OSError, ValueError, KeyError) as e:
        raise BadInput(f"--model {name}: cannot load it ({str(e).splitlines()[0]:.300}). Give a folder with config.json, "
                       "weights and tokenizer; offline, a hub id works only if it is cached") from e
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--model {name}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    sampler = copy.deepcopy(model) if dtype == "mixed" else model
    if dtype == "mixed":
        for p in sampler.parameters():  # not the buffers: rotary frequencies must stay float32
            p.data = p.data.bfloat16()
    if grad_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, sampler, tokenizer


def make_decoding(model, tokenizer, temperature, max_rows):
    """Stops on the EOS ids of model, generation config and tokenizer and on the template's end of turn."""
    stops = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")]
    for eos in (model.config.eos_token_id, model.generation_config.eos_token_id):
        stops += eos if isinstance(eos, list) else [eos]
    n_tokens = min(max(tokenizer.get_vocab().values()) + 1, model.get_output_embeddings().weight.shape[0])
    return Decoding(tuple(dict.fromkeys(i for i in stops if i is not None)), n_tokens, temperature, max_rows)


@torch.no_grad()
def check_model(model, name, n_tokens):
    """Refuse, by name, models whose attention, cache or head sampling and packed scoring would get wrong."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) or getattr(model, "_is_stateful", False):
        raise BadInput(f"--model {name}: model type {config.model_type} is not supported, only full attention with a KV cache")
    root = Node([0, 1])  # a tiny tree, packed, against the model's own forward on each path
    root.children = [Node([2, 1, 0], root, advantage=1.0), Node([1, 2], root, advantage=1.0)]
    packed = token_logps(model.eval(), pack_tensors(pack_nodes([root], 64)[0], model.device), 1.0, n_tokens)
    paths = [torch.tensor([root.tokens + child.tokens], device=model.device) for child in root.children]
    logps = [model(p).logits[0, 1:-1, :n_tokens].float().log_softmax(-1).gather(1, p[0, 2:, None])[:, 0] for p in paths]
    if not torch.allclose(packed, torch.cat(logps), atol=0.1 if model.dtype == torch.bfloat16 else 1e-2):
        raise BadInput(f"--model {name}: model type {config.model_type} is not supported: packed and plain log-probs differ")


# --------------------------------------------------------------------------------------------------------------- main

def parse_args(argv):
    """Command line -> namespace of all flags: those given, else those of the resumed run, else the defaults."""
    parser = argparse.ArgumentParser(prog="treerpo.py", usage="treerpo.py [flags], see --help", description=__doc__[:104],
                                     argument_default=argparse.SUPPRESS)
    defaults, demo_defaults = {}, {}
    for row in FLAGS:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        name, kind, default, demo, text = row
        key = name.replace("-", "_")
        defaults[key], demo_defaults[key] = default, str(demo) if isinstance(demo, Path) else demo
        if default is not None and kind is not bool:
            text += f" (default {default}" + (f", demo {getattr(demo, 'name', demo)})" if demo != default else ")")
        how = dict(action="store_true") if kind is bool else dict(choices=kind) if isinstance(kind, list) else dict(type=kind)
        group.add_argument("--" + name, help=text, **how, **(dict(nargs="+") if isinstance(default, list) else {}))
    given, saved = vars(parser.parse_args(argv)), {}
    if "resume" in given:
        try:
            saved = json.loads((Path(given["resume"]) / "config.json").read_text())
        except (OSError, ValueError) as e:
            parser.error(f"--resume {given['resume']}: there is no run in that folder ({e})")
        changed = [k for k in given if k not in MAY_CHANGE and given[k] != saved.get(k)]
        if changed or given.get("steps", saved["steps"]) < saved["steps"]:
            parser.error(f"--resume: the run has another --{(changed or ['steps'])[0].replace('_', '-')}; leave it out")
        saved["out"] = given["resume"]
    algo, demo = given.get("algo", "treerpo"), "model" not in given
    preset = {} if algo == "treerpo" else DEMO_DEPTH_1 if demo else DEPTH_1
    no_eval = {"eval_data": None} if "data" in given else {}
    args = SimpleNamespace(**{**(demo_defaults if demo else defaults), **no_eval, **ALGOS[algo], **preset, **saved, **given})
    args.template = args.template and str(args.template)
    for wrong, message in (
            (len(args.step_len) not in (1, len(args.branching)), "--step-len takes one number, or one for each of --branching"),
            (args.algo in ("grpo", "gspo") and len(args.branching) > 1, f"--algo {args.algo} is the tree of depth 1: give one "
             "number to --branching, or take --algo treerpo"),
            (args.branch_at == "entropy" and len(args.branching) > 1, "--branch-at entropy takes --trees and --leaves instead "
             "of --branching, and one --step-len, the tokens of a rollout"),
            (args.branch_at == "entropy" and args.trees > args.leaves, "--trees must be at most --leaves"),
            (not 0 <= args.min_group_std < math.inf, "--min-group-std must be 0 or more"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: there is no CUDA GPU; try --device cpu")):
        if wrong:
            parser.error(message)
    return args


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    """The questions' order in this epoch, from the seed alone, so that a resumed run needs no state for it."""
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def open_run(args):
    """-> (output folder, its newest checkpoint if resumed). Raises BadInput if it is taken or cannot be written."""
    out = Path(args.out or f"runs/{args.algo}-{time.strftime('%Y%m%d-%H%M%S')}")
    while not args.out and out.exists():
        out = out.with_name(out.name + "b")  # two runs in one second
    if not args.resume and (out / "config.json").exists():
        raise BadInput(f"--out {out}: there is a run in it; continue it with --resume {out} or choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.tmp").write_text(json.dumps({**vars(args), "out": str(out), "resume": None}, indent=1))
    except OSError as e:
        raise BadInput(f"--out {out}: cannot write there ({e})") from e
    return out, newest_checkpoint(out) if args.resume else None


def tree_rows(trees, batch, step, tokenizer):
    """Every node as a dict for --dump-trees; ids count through the step, a root's tokens are the prompt."""
    rows, ids = [], {}
    for number, root in enumerate(trees):
        question = batch[root.question]
        for node in root.walk():
            ids[node] = len(ids)
            rows.append(dict(step=step, question_id=question["id"], answer=question["answer"], tree=number, id=ids[node],
                             parent=ids.get(node.parent), depth=node.depth, tokens=node.tokens,
                             text=step_text(node, tokenizer), done=node.done, reward=node.reward,
                             advantage=node.advantage, trained=node.trained))
    return rows


def train(args):
    """Run the algorithm of the module docstring; -> exit status."""
    questions = load_questions(args.data, args.question_column, args.answer_column)
    if args.eval_data:
        held_out = load_questions(args.eval_data, args.question_column, args.answer_column)[:args.eval_questions]
    else:
        n = min(args.eval_questions, max(1, len(questions) // 5))
        questions, held_out = questions[:-n] or questions, questions[-n:]
        print(f"held out for evaluation: the last {n} questions of {args.data}")
    out, resumed = open_run(args)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = args.dtype if args.dtype != "auto" else "mixed" if device.type == "cuda" else "float32"
    model, sampler, tokenizer = load_model(str(resumed or args.model), device, dtype, args.grad_checkpointing)
    decoding = make_decoding(model, tokenizer, args.temperature, args.max_rows)
    check_model(model, args.model, decoding.n_tokens)
    template = load_template(args.template, tokenizer)
    step_lens = args.step_len if len(args.step_len) > 1 else args.step_len * len(args.branching)
    context, budget = getattr(model.config, "max_position_embeddings", 1 << 30), sum(step_lens)
    questions = fit_context(questions, args.data, template, tokenizer, budget, context)
    held_out = fit_context(held_out, "held-out questions", template, tokenizer, budget, context)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=device.type == "cuda")
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if dtype == "mixed" else nullcontext
    torch.manual_seed(args.seed)
    done, tokens_sampled, questions_seen, bad_steps, accuracy = 0, 0, 0, 0, math.nan
    metrics_file = out / "metrics.jsonl"
    if resumed:
        state = torch.load(resumed / "trainer_state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        done, tokens_sampled, questions_seen, bad_steps, accuracy = state["counters"]
    print(f"resuming {out} after step {done}" if args.resume else f"output: {out}")
    for path in (metrics_file, args.dump_trees):
        drop_later_steps(path, done if resumed else -1)
    (out / "config.tmp").rename(out / "config.json")

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def save():
        cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
        counters = [done, tokens_sampled, questions_seen, bad_steps, accuracy]
        state = dict(optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), cuda_rng=cuda_rng, counters=counters)
        save_checkpoint(out, done, model, tokenizer, state, args.keep)

    def held_out_accuracy():
        return evaluate(sampler, tokenizer, held_out, args.eval_samples, budget, decoding, args.seed)

    interrupted = []

    def on_interrupt(signum, frame):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(signum)
        tqdm.write("interrupted: finishing this step, then saving; press again to stop at once", file=sys.stderr)
    signal.signal(signal.SIGINT, on_interrupt)

    if not resumed:
        row = held_out_accuracy()
        accuracy = row["eval/accuracy"]
        append_jsonl(metrics_file, [dict(step=0, **row)])
        print(f"step 0: held-out accuracy {accuracy:.3f} sampled, {row['eval/greedy_accuracy']:.3f} greedy")
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc=args.algo, unit="step")
    for step in bar:
        n, size = len(questions), args.questions_per_step
        batch = [dict(questions[epoch_order(n, k // n, args.seed)[k % n]]) for k in range((step - 1) * size, step * size)]
        prompts = [q["prompt"] for q in batch]

        t0 = clock()  # 1. grow
        if args.branch_at == "fixed":
            trees = sample_trees(sampler, prompts, args.branching, step_lens, decoding)
        else:
            trees = sample_forests(sampler, prompts, args.leaves, args.trees, budget, args.entropy_threshold, decoding)
        t1 = clock()  # 2. verify
        leaves = [leaf for root in trees for leaf in root.leaves()]
        texts = [path_text(leaf, tokenizer) for leaf in leaves]
        for leaf, text in zip(leaves, texts):
            leaf.reward = reward_fn(text, batch[leaf.path()[0].question]["answer"])
        t2 = clock()  # 3. back up   4. compare
        for root in trees:
            backup_rewards(root)
        signals = []
        for forest in (list(g) for _, g in groupby(trees, key=lambda root: root.question)):
            if args.advantage in ("siblings", "both"):
                signals += add_sibling_advantages(forest, args.normalizer, args.min_group_std)
            if args.advantage in ("leaves", "both"):
                signals += add_leaf_advantages(forest, args.normalizer, args.min_group_std)
        nodes = [node for root in trees for node in root.walk() if node.parent]
        for group in optimizer.param_groups:  # 5. update
            group["lr"] = args.lr * min(1.0, step / 5)
        update = update_policy(model, optimizer, trees, unit_weights(nodes, args.level_weight, args.ratio), decoding,
                               pack_len=args.pack_len, clip_eps=args.clip_eps, ratio=args.ratio,
                               updates=args.updates_per_batch, autocast=autocast)
        copy_weights(model, sampler)
        t3 = clock()

        sampled = sum(len(node.tokens) for node in nodes)
        done, tokens_sampled, questions_seen = step, tokens_sampled + sampled, questions_seen + size
        bad_steps = bad_steps + 1 if update["skipped"] else 0
        row = {
            "step": step, "reward": sum(root.reward for root in trees) / len(trees),
            "frac_reward_zero_std": 1 - sum(signals) / len(signals),
            "completions/mean_length": sum(len(n.tokens) for leaf in leaves for n in leaf.path()[1:]) / len(leaves),
            "completions/clipped_ratio": sum(not leaf.done for leaf in leaves) / len(leaves),
            "no_answer_ratio": sum(extract_boxed(text) is None for text in texts) / len(leaves),
            "entropy": math.fsum(h for node in nodes for h in node.entropies) / sampled, **update,
            "lr": optimizer.param_groups[0]["lr"], "tokens_sampled": tokens_sampled, "questions_seen": questions_seen,
            "tok_per_s": sampled / (t3 - t0), "time_sample": t1 - t0, "time_score": t2 - t1, "time_update": t3 - t2,
            "peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)}
        if update["skipped"]:
            row["skipped_questions"] = [q["id"] for q in batch]
        if step % args.eval_every == 0 or step == args.steps:
            row.update(held_out_accuracy())
            accuracy = row["eval/accuracy"]
        append_jsonl(metrics_file, [row])
        if args.dump_trees:
            append_jsonl(args.dump_trees, tree_rows(trees, batch, step, tokenizer))
        if args.print_tree:
            tqdm.write(render_tree(trees[0], tokenizer))
        tqdm.write(f"step {step}: reward {row['reward']:.3f}, groups without signal {row['frac_reward_zero_std']:.0%}, length "
                   f"{row['completions/mean_length']:.0f}, cut {row['completions/clipped_ratio']:.0%}, grad norm "
                   f"{row['grad_norm']:.2f}, {row['tok_per_s']:.0f} tokens/s, held-out {accuracy:.3f}")
        bar.set_postfix(reward=f"{row['reward']:.3f}", held_out=f"{accuracy:.3f}", tok_per_s=f"{row['tok_per_s']:.0f}")
        if step % args.save_every == 0 or step == args.steps or interrupted or bad_steps == 3:
            save()
        if bad_steps == 3:
            raise FloatingPointError("three steps in a row had a loss or gradient that is not finite; the weights are those "
                                     f"before them, saved in {out}. Lower --lr, or try --dtype float32")
        if interrupted:
            print(f"saved; continue with: python treerpo.py --resume {out}")
            return 130
    return 0


def main(argv=None):
    args = parse_args(argv)
    try:
        return train(args)
    except BadInput as e:
        print(f"treerpo.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (OSError, FloatingPointError) as e:
        print(f"treerpo.py: stopped: {e}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as e:
        if "memory" not in f"{type(e).__name__} {e}".lower():
            raise
        print(f"treerpo.py: out of memory ({str(e).splitlines()[0]}). Lower --max-rows (now {args.max_rows}) if it happened "
              f"while sampling, --pack-len (now {args.pack_len}) or set --grad-checkpointing if it happened in the update; "
              "then continue with --resume", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
