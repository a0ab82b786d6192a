"""TreeRPO (Tree Relative Policy Optimization, arXiv 2506.05183) in one file: an independent
re-implementation. Section and equation numbers are the paper's.

One training step:
  1. Grow: for each question the policy samples an N-ary tree. Every child continues its parent by
     one step of up to step_len tokens (§3.1), from the parent's KV cache [ours].
  2. Verify and back up: a verifier scores every leaf 0 or 1; the reward of an inner node is the
     mean of its children's rewards (§3.1).
  3. Prune: siblings form a step-level group. A group is kept iff its rewards differ by more than
     tau (§3.2, Eq. 1-2).
  4. Compare: the advantage of a child is its reward relative to its group,
     A = (R - mu) / (mu (1 - mu)) (§3.3, Eq. 3-4).
  5. Update: a clipped policy gradient with a KL term (§3.4, Eq. 5) and an entropy bonus (§4)
     trains the tokens of every step whose group was kept.
`train_step` is these five lines in code. A "step" of an answer is one Node; a training step is one
batch of questions, and takes a few optimiser steps. GRPO is the tree of depth 1, with Eq. 3. GSPO
(2507.18071) and TreeAdv (2601.03703) change one piece each.

    python treerpo.py                                   # bundled model and task, minutes on a CPU
    python treerpo.py --model Qwen/Qwen2.5-Math-1.5B    # the paper's settings, one CUDA GPU
    python treerpo.py --help                            # every flag, its default and its source
"""
import argparse
import dataclasses
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    HfArgumentParser,
)
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------ Settings (§4)
# A field is a flag. [paper], [code] and [ours] say where a default comes from: the paper's text,
# its authors' code, or our own choice.
def flag(default: object, text: str, **argument: object) -> object:
    """A field of a settings class; HfArgumentParser gives `argument` to argparse."""
    metadata = {"help": text, **argument}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataSettings:
    # The heading that HfArgumentParser gives these flags in --help, here and below.
    _argument_group_name = "model and data"
    model: str | None = flag(None, "folder or hub id; without it the bundled model and demo run")
    data: str = flag(
        "DigitalLearningGmbH/MATH-lighteval",
        "training questions: a .jsonl, .json, .csv or .parquet file, or a hub ID[:CONFIG[:SPLIT]] "
        "[paper §4]",
    )
    eval_data: str | None = flag(
        "HuggingFaceH4/MATH-500::test",
        "held-out questions; with --data alone a fifth of that is held out [ours]",
    )
    question_column: str | None = flag(None, "column of the question, if not found by usual names")
    answer_column: str | None = flag(None, "column of the answer; a.b is column b inside column a")
    template: str | None = flag(
        None, "qwen-math (if the tokenizer knows its tokens), none (else), chat, or a text file"
    )
    max_prompt_len: int = flag(512, "longer prompts are left out and counted [paper §4]")
    out: str | None = flag(None, "output folder; without it runs/ALGO-DATE-TIME")
    resume: str | None = flag(None, "continue the run in this output folder, with its settings")


@dataclass
class TreeSettings:
    _argument_group_name = "tree (§3.1)"
    algo: Literal["treerpo", "grpo", "gspo", "treeadv"] = flag("treerpo", "what is trained")
    branching: list[int] = flag([8, 8, 8], "children of a node, one number per level [paper §4]")
    step_len: list[int] = flag(
        [384], "most tokens of a step, one number, or one per level [paper §4]"
    )
    temperature: float = flag(0.6, "of sampling, log-probs and evaluation alike [paper §4]")
    questions_per_step: int = flag(16, "questions of one batch [paper Fig. 6]")
    leaves: int = flag(8, "treeadv: answers to a question in all [ours]")
    trees: int = flag(4, "treeadv: first answers to a question, the others fork from them [ours]")
    entropy_threshold: float = flag(1.0, "treeadv: nats above which a token may fork [ours]")


@dataclass
class LearningSettings:
    _argument_group_name = "learning (§3.2 to §3.4)"
    steps: int = flag(300, "training steps, one batch each [paper Table 1]")
    prune_threshold: float = flag(
        0.1, "tau, Eq. 1-2: a group is kept if its rewards spread by more [paper §3.2]"
    )
    normalizer: Literal["variance", "std", "none"] = flag(
        "variance", "divisor of the advantages: mu (1 - mu), Eq. 4; std, Eq. 3; or 1 [paper §3.3]"
    )
    ratio: Literal["token", "sequence"] = flag(
        "token", "one importance ratio per token [paper §3.4], or per step (GSPO)"
    )
    clip_eps: float = flag(
        0.2, "clip range 1 +- this [code]; with sequence ratios 4e-4 [GSPO §5.1]"
    )
    kl_coef: float = flag(0.001, "weight of the KL term against the initial model [paper §3.4]")
    entropy_coef: float = flag(0.001, "weight of the entropy bonus [paper §4]")
    minibatches: int = flag(
        2, "optimiser steps on each batch [paper §4], cut by question [ours]"
    )
    lr: float = flag(1e-6, "learning rate of AdamW, constant [paper §4]")
    seed: int = flag(0, "of sampling, data order and evaluation [ours]")


@dataclass
class SpeedSettings:
    _argument_group_name = "memory and speed"
    max_rows: int = flag(512, "sequences of one generate call; bounds the KV cache [ours]")
    pack_len: int = flag(4096, "tokens of one training forward; bounds the activations [ours]")
    grad_checkpointing: bool = flag(False, "compute activations again in the backward pass [ours]")
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "decode by CUDA graphs over one static KV cache; auto: on CUDA [ours]"
    )
    dtype: Literal["auto", "float32", "mixed", "bfloat16"] = flag(
        "auto", "mixed (auto on CUDA): float32 weights, bf16 work [code]"
    )
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run")


@dataclass
class OutputSettings:
    _argument_group_name = "evaluation and output"
    eval_every: int = flag(20, "steps between evaluations [ours]")
    eval_questions: int = flag(128, "held-out questions used, the first ones [ours]")
    eval_samples: int = flag(8, "k of avg@k [paper §4]")
    save_every: int = flag(50, "steps between checkpoints [ours]")
    keep: int = flag(2, "newest checkpoints kept [ours]")
    print_tree: int = flag(0, "print one tree every so many steps; 0: none", nargs="?", const=1)
    dump_trees: str | None = flag(None, "write every node as a JSON line to this file")


GROUPS = [DataSettings, TreeSettings, LearningSettings, SpeedSettings, OutputSettings]


@dataclass
class Settings(OutputSettings, SpeedSettings, LearningSettings, TreeSettings, DataSettings):
    """All settings of a run. train_step and the code around it see them; the functions of the
    algorithm take plain arguments. The bases stand in reverse because fields come last base first.
    """


# Presets apply in this order: DEMO (without --model), ALGORITHMS, DEMO_WHOLE_ANSWERS, given flags.
# What --algo NAME changes: whole answers instead of a tree, and what each paper says of itself.
WHOLE_ANSWERS = {"branching": [8], "step_len": [1152], "normalizer": "std"}
ALGORITHMS = {
    "treerpo": {},
    "grpo": WHOLE_ANSWERS,
    "gspo": {**WHOLE_ANSWERS, "ratio": "sequence"},
    "treeadv": WHOLE_ANSWERS,
}
SEQUENCE_CLIP_EPS = 4e-4  # GSPO §5.1: the ratio of a sequence moves far less than a token's

# Without --model. The tiny model takes a larger learning rate and a smaller tree. Its policy is
# nearly certain at temperature 0.6, where the groups soon agree and the signal runs out. Compiling
# it would take longer than the run.
DEMO = {
    "model": str(HERE / "demo/model"),
    "data": str(HERE / "demo/train.jsonl"),
    "eval_data": str(HERE / "demo/test.jsonl"),
    "branching": [4, 2, 2, 2],
    "step_len": [14],
    "temperature": 1.0,
    "entropy_threshold": 0.3,
    "steps": 40,
    "lr": 2e-4,
    "max_rows": 2048,
    "pack_len": 512,
    "compile": "off",
    "eval_every": 10,
    "eval_questions": 256,
    "save_every": 20,
}
DEMO_WHOLE_ANSWERS = {"step_len": [56]}  # four levels of 14 tokens


# ------------------------------------------------------------------- The tree (§3.1, Figure 2)
# eq=False: nodes are told apart by identity and serve as keys of dicts.
@dataclass(eq=False)
class Node:
    """One step of an answer: the tokens by which it continues its parent. A root is a prompt.

    The paper's Figure 2 as backed-up rewards. A number in parentheses, or without children, is a
    verified leaf; (0 0 1) are the children of the number before them:

        root .444 -+- .037 -+- .111 -+- 0   0   .333 (0 0 1)
                   |        +- 0
                   |        +- 0
                   +- .444 -+- 0
                   |        +- .333 (0 1 0)
                   |        +- 1
                   +- .852 -+- 1
                            +- 1
                            +- .556 -+- .667 (0 1 1)   0   1

    The root's children form the group {.037, .444, .852}: mu = .444, mu (1 - mu) = .247, so by
    Eq. 4 their advantages are -1.65, 0 and +1.65.
    """
    tokens: list[int]                       # this step's own token ids, its end token included
    parent: "Node | None" = field(default=None, repr=False)
    children: list["Node"] = field(default_factory=list, repr=False)
    done: bool = False                      # ended by an end-of-sequence token
    reward: float | None = None             # leaf: the verifier's; else the children's mean
    advantage: float = 0.0
    trained: bool = False                   # its group was kept: its tokens are in the loss
    entropies: list[float] = field(default_factory=list, repr=False)  # nats per token (TreeAdv)
    question: int = 0                       # of a root: the number of its prompt in the batch

    def __post_init__(self) -> None:
        if self.parent is not None:
            self.parent.children.append(self)

    def path(self) -> list["Node"]:
        """The nodes from the root to this one."""
        if self.parent is None:
            return [self]
        return [*self.parent.path(), self]

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, depth-first, parents before children."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self) -> list["Node"]:
        return [node for node in self.walk() if not node.children]

    def steps(self) -> list["Node"]:
        """All nodes below this one."""
        return [node for node in self.walk() if node is not self]


# ----------------------------------------------------------------------- Tree sampling (§3.1)
@dataclass(frozen=True)
class Decoding:
    """How to sample: exactly from softmax(logits / temperature) over the ids below n_tokens."""
    eos_ids: tuple[int, ...]                # each ends an answer; the first one is also padding
    n_tokens: int                           # ids from here on only pad the embedding matrix
    temperature: float = 0.6                # 0 is greedy
    max_rows: int = 512                     # most sequences of one generate call
    call_len: int = 384                     # a longer step takes several generate calls
    keep_entropies: bool = False            # fill Node.entropies (TreeAdv)
    workspace: "Workspace | None" = None    # a static KV cache (CUDA); None: a growing one
    progress: Callable[[int], None] | None = None  # called with the rows of every new token


@dataclass
class Rows:
    """R unfinished sequences of T tokens and their KV cache, ready to be continued."""
    ids: Tensor                             # [R, T], padded on the left
    mask: Tensor                            # [R, T], 1 at a token, 0 at padding
    kv: list[tuple[Tensor, Tensor]]         # keys, values [R, H_kv, T - 1, D] of every layer


def prefill(
    model: torch.nn.Module, prompts: list[list[int]], pad_id: int, padding: int
) -> Rows:
    """R prompts -> their rows, with at least `padding` columns of padding (see Workspace).

    The cache leaves out the last token, because `generate` feeds that one itself: given a cache
    of all T tokens it would feed the whole prompt once more.
    """
    model.eval()  # in training mode, gradient checkpointing drops the cache without a word
    longest = max(len(prompt) for prompt in prompts)
    columns = max(longest + padding, 2)  # the cache must hold at least one
    ids = torch.full((len(prompts), columns), pad_id)
    mask = torch.zeros((len(prompts), columns), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = columns - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    ids = ids.to(model.device)
    mask = mask.to(model.device)
    cache = DynamicCache()
    model.get_decoder()(
        ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
    )
    return Rows(ids, mask, [(layer.keys, layer.values) for layer in cache.layers])


def select_rows(rows: Rows, index: list[int]) -> Rows:
    """A copy of these rows; a row may be named more than once."""
    picked = torch.tensor(index, device=rows.ids.device)
    kv = [(keys[picked], values[picked]) for keys, values in rows.kv]
    return Rows(rows.ids[picked], rows.mask[picked], kv)


class DrawToken:
    """The only logits processor: makes `generate`, which takes the argmax, draw from the policy.

    With e ~ Exp(1), independent for every id a, argmax_a pi(a) / e(a) has distribution pi: it is
    how torch.multinomial draws, in fewer passes over [rows, vocabulary].
    """

    def __init__(self, decoding: Decoding, n_rows: int) -> None:
        self.decoding = decoding
        self.n_rows = n_rows                # rows behind these only fill up a static cache
        self.entropies: list[Tensor] = []   # one [n_rows] per token
        self.scores: Tensor | None = None   # of the newest token, checked for NaN at the end

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        eos_id = self.decoding.eos_ids[0]
        logits[:, self.decoding.n_tokens:] = -math.inf
        logits[self.n_rows:, eos_id] = math.inf  # a filler row ends at once
        if self.decoding.progress is not None:
            self.decoding.progress(self.n_rows)
        scores = logits[:self.n_rows]
        if self.decoding.temperature > 0:
            probs = scores.div_(self.decoding.temperature).softmax(-1)
            if self.decoding.keep_entropies:
                self.entropies.append(torch.special.entr(probs).sum(-1))
            noise = torch.empty_like(probs).exponential_()
            scores.copy_(probs.div_(noise))
        self.scores = scores
        return logits


def open_rows(
    rows: Rows, index: list[int], new_tokens: int, workspace: "Workspace | None"
) -> tuple[Tensor, Tensor, Cache]:
    """These rows as `generate` takes them: ids, mask and a cache of its own."""
    if workspace is not None:
        return workspace.open_rows(rows, index, new_tokens)
    picked = select_rows(rows, index)
    return picked.ids, picked.mask, DynamicCache(picked.kv)


def generate_tokens(
    model: torch.nn.Module,
    nodes: list[Node],
    rows: Rows,
    index: list[int],
    new_tokens: int,
    decoding: Decoding,
) -> Rows:
    """One call of HF generate: nodes[k] continues row index[k] by up to new_tokens tokens.

    -> the rows after it: row k is that of nodes[k], and behind its end token comes padding. They
    are views of the cache, which the next call on a static cache overwrites. Raises
    FloatingPointError if the logits are not numbers.
    """
    ids, mask, cache = open_rows(rows, index, new_tokens, decoding.workspace)
    draw_token = DrawToken(decoding, len(nodes))
    eos_ids = list(decoding.eos_ids)
    compile_config = None
    if decoding.workspace is not None:
        compile_config = decoding.workspace.compile_config
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=eos_ids[0],
        compile_config=compile_config,
    )
    # What is unset in a given config would come from the checkpoint's own (top_k, penalties, ...).
    original = model.generation_config
    model.generation_config = config
    try:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, logits_processor=[draw_token]
        )
    finally:
        model.generation_config = original
    if draw_token.scores.isnan().any():  # once there, they never leave the cache
        raise FloatingPointError("the model's logits are not numbers; are its weights damaged?")
    new = out[:, ids.shape[1]:]
    for node, tokens in zip(nodes, new.tolist()):
        ends = [tokens.index(eos_id) for eos_id in eos_ids if eos_id in tokens]
        if ends:
            node.done = True
            tokens = tokens[:min(ends) + 1]  # what follows is padding
        node.tokens += tokens
    if decoding.keep_entropies:
        entropies = torch.stack(draw_token.entropies, dim=1).tolist()
        for node, row in zip(nodes, entropies):
            missing = len(node.tokens) - len(node.entropies)
            node.entropies += row[:missing]
    past = out.shape[1] - 1
    kv = [(layer.keys[:, :, :past], layer.values[:, :, :past]) for layer in cache.layers]
    return Rows(out, torch.cat([mask, torch.ones_like(new)], dim=1), kv)


def take_step(
    model: torch.nn.Module,
    nodes: list[Node],
    rows: Rows,
    index: list[int],
    step_len: int,
    decoding: Decoding,
) -> tuple[Rows, list[int]]:
    """Fill these empty nodes with up to step_len tokens; nodes[k] continues row index[k].

    A long step takes several calls of generate, so that finished rows are dropped in between.
    -> (rows, index): the k-th node that is still unfinished is row index[k] of rows.
    """
    while True:
        new_tokens = min(step_len, decoding.call_len)
        rows = generate_tokens(model, nodes, rows, index, new_tokens, decoding)
        step_len -= new_tokens
        index = [k for k, node in enumerate(nodes) if not node.done]
        if step_len == 0 or not index:
            return rows, index
        nodes = [nodes[k] for k in index]


def grow(
    model: torch.nn.Module,
    nodes: list[Node],
    rows: Rows,
    branching: list[int],
    step_lens: list[int],
    decoding: Decoding,
) -> None:
    """Give every node its children, level by level; nodes[i] lives in row i.

    If one call of generate cannot hold all children they go in chunks, and a chunk's whole subtrees
    are grown before the next one: the same distribution in less memory.
    """
    row_of_child = [i for i in range(len(nodes)) for _ in range(branching[0])]
    width = decoding.max_rows
    if decoding.workspace is not None:
        width = decoding.workspace.most_rows(rows.ids.shape[1] + step_lens[0])
    for start in range(0, len(row_of_child), width):
        chunk = row_of_child[start:start + width]
        children = [Node([], nodes[i]) for i in chunk]
        end, index = take_step(model, children, rows, chunk, step_lens[0], decoding)
        unfinished = [child for child in children if not child.done]
        if unfinished and len(branching) > 1:
            unfinished_rows = select_rows(end, index)
            del end  # its memory is needed below
            grow(model, unfinished, unfinished_rows, branching[1:], step_lens[1:], decoding)


@torch.no_grad()
def sample_trees(
    model: torch.nn.Module,
    prompts: list[list[int]],
    branching: list[int],
    step_lens: list[int],
    decoding: Decoding,
) -> list[Node]:
    """One tree per prompt (a list of token ids) -> their roots, in the order of the prompts.

    Below each unfinished node of depth d grow branching[d] children of up to step_lens[d] tokens
    (§3.1). GRPO's whole answers are the tree of depth 1.
    """
    roots = [Node(list(prompt), question=i) for i, prompt in enumerate(prompts)]
    by_length = sorted(roots, key=lambda root: len(root.tokens))  # little padding
    width = max(1, decoding.max_rows // branching[0])  # their children fit into one call
    padding = 0 if decoding.workspace is None else decoding.workspace.padding
    for start in range(0, len(roots), width):
        part = by_length[start:start + width]
        rows = prefill(model, [root.tokens for root in part], decoding.eos_ids[0], padding)
        grow(model, part, rows, branching, step_lens, decoding)
    return roots


# -------------------------------------------------------------- Leaf rewards and backup (§3.1)
def answer_text(node: Node, tokenizer: object) -> str:
    """The text of the answer up to the end of this node. Of a leaf it is what is verified; of an
    inner node it is only printed."""
    ids = [token for step in node.path()[1:] for token in step.tokens]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if node.children:
        return text.rstrip("\ufffd")  # half a character is left to the child that completes it
    return text


def verify_leaves(
    trees: list[Node], answers: list, tokenizer: object
) -> tuple[list[Node], list[str]]:
    """Set the reward of every leaf to 0 or 1 by the verifier -> the leaves, their texts.

    answers: the known answer to each prompt. Unfinished answers are verified like the others.
    """
    leaves = []
    texts = []
    for root in trees:
        for leaf in root.leaves():
            text = answer_text(leaf, tokenizer)
            leaf.reward = reward_fn(text, answers[root.question])
            leaves.append(leaf)
            texts.append(text)
    return leaves, texts


def backup_rewards(node: Node) -> float:
    """Fill in the rewards from the leaves up -> this node's. An inner node takes the mean of its
    children's, which differs from the mean of its leaves where a branch ended early (§3.1)."""
    if node.children:
        node.reward = fmean([backup_rewards(child) for child in node.children])
    if node.reward is None:
        raise ValueError("a leaf has no reward: verify the leaves before the backup")
    return node.reward


# -------------------------------------------- Pruning and advantages (§3.2, §3.3, Eq. 1 to 4)
def is_informative(rewards: Sequence[float], threshold: float) -> bool:
    """Eq. 1-2: a group is kept iff max R - min R > tau."""
    rounding = 1e-9
    return max(rewards) - min(rewards) > threshold + rounding


def group_relative_advantages(rewards: Sequence[float], normalizer: str) -> Tensor:
    """Rewards [n] of one group -> advantages [n], float64, of sum 0.

    variance: (R - mu) / (mu (1 - mu)), Eq. 4, for rewards in [0, 1]; std: (R - mu) / sigma, Eq. 3,
    with the population's sigma [ours]; none: R - mu. Equal rewards give zeros. Raises ValueError
    for an unknown normalizer, or rewards outside [0, 1] with Eq. 4.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    mu = rewards.mean()
    if normalizer == "variance":
        if rewards.min() < 0 or rewards.max() > 1:
            raise ValueError("the normalizer 'variance' needs rewards in [0, 1]")
        divisor = mu * (1 - mu)
    elif normalizer == "std":
        divisor = rewards.std(correction=0)
    elif normalizer == "none":
        divisor = torch.tensor(1.0)
    else:
        raise ValueError(f"normalizer {normalizer!r}: choose 'variance', 'std' or 'none'")
    if not is_informative(rewards.tolist(), 0.0):
        return torch.zeros_like(rewards)
    return (rewards - mu) / divisor


def add_sibling_advantages(
    trees: list[Node], normalizer: str, threshold: float
) -> list[list[float]]:
    """Compare the children of every node with each other (§3.3): set their advantage and whether
    they are trained -> the rewards of every group."""
    groups = []
    for root in trees:
        for parent in root.walk():
            if not parent.children:
                continue
            rewards = [child.reward for child in parent.children]
            informative = is_informative(rewards, threshold)
            advantages = group_relative_advantages(rewards, normalizer)
            for child, advantage in zip(parent.children, advantages.tolist()):
                child.advantage = advantage if informative else 0.0
                child.trained = informative
            groups.append(rewards)
    return groups


# ------------------------------------------------------------- A tree in one forward pass [ours]
# Steps are trained in rows in which every shared prefix stands once. A mask lets a token see only
# its own path, and its position counts along that path, so that its log-prob is what it would be in
# a row of its own.
def pack_nodes(trees: list[Node], pack_len: int) -> list[dict[Node, bool]]:
    """Lay every trained step into a pack once, behind its ancestors.

    -> packs, each {node: is it scored here?}, parents before children. A pack holds at most
    pack_len tokens, unless one path alone is longer. Depth-first order keeps siblings together, so
    an ancestor is seldom computed again; where it is, it is only context.
    """
    packs = []
    pack = {}
    size = 0
    for root in trees:
        for node in root.walk():
            if not node.trained:
                continue
            path = node.path()
            new = [step for step in path if step not in pack]
            new_size = sum(len(step.tokens) for step in new)
            if pack and size + new_size > pack_len:
                packs.append(pack)
                pack = {}
                size = 0
                new = path
                new_size = sum(len(step.tokens) for step in path)
            for step in new:
                pack[step] = False
            pack[node] = True
            size += new_size
    if pack:
        packs.append(pack)
    return packs


@dataclass
class PackedRow:
    """A pack as one row of T tokens, of which M tokens in S steps are scored."""
    ids: Tensor                             # [1, T]
    positions: Tensor                       # [1, T], of the token in its own path
    enter: Tensor                           # [T], depth-first number of the token's node
    leave: Tensor                           # [T], first number behind the node's descendants
    predictors: Tensor                      # [M], the column whose output predicts the token
    targets: Tensor                         # [M], the token
    segments: Tensor                        # [M], its step, 0 to S - 1
    advantages: Tensor                      # [S]
    old_logps: Tensor | None = None         # [M], from before the first optimiser step
    ref_logps: Tensor | None = None         # [M], of the initial model


def pack_row(pack: dict[Node, bool], device: torch.device, padded: bool = False) -> PackedRow:
    """A pack -> its tensors. padded: T is a power of two, so that compiled code sees few lengths;
    the padding belongs to one more node, which no other token may look at."""
    nodes = list(pack)
    number = {node: k for k, node in enumerate(nodes)}
    # Numbered depth-first, the descendants of node k are those from k + 1 to leave[k] - 1.
    leave = [k + 1 for k in range(len(nodes))]
    for k in reversed(range(len(nodes))):
        if nodes[k].parent is not None:
            parent = number[nodes[k].parent]
            leave[parent] = max(leave[parent], leave[k])
    ids = []
    positions = []
    owners = []       # of every token, the number of its node
    last_column = {}  # of every node, the column of its last token
    predictors = []
    targets = []
    segments = []
    advantages = []
    for k, node in enumerate(nodes):
        start = len(ids)
        first_position = 0
        if node.parent is not None:
            first_position = positions[last_column[node.parent]] + 1
        columns = range(start, start + len(node.tokens))
        ids += node.tokens
        positions += [first_position + column - start for column in columns]
        owners += [k] * len(node.tokens)
        last_column[node] = columns[-1]
        if pack[node]:
            predictors += [last_column[node.parent], *columns[:-1]]
            targets += node.tokens
            segments += [len(advantages)] * len(node.tokens)
            advantages.append(node.advantage)
    if padded:
        length = max(1024, 2 ** math.ceil(math.log2(len(ids))))
        padding = length - len(ids)
        ids += [0] * padding
        positions += [0] * padding
        owners += [len(nodes)] * padding
        leave.append(len(nodes) + 1)
    return PackedRow(
        ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        enter=torch.tensor(owners, device=device),
        leave=torch.tensor([leave[k] for k in owners], device=device),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
        segments=torch.tensor(segments, device=device),
        advantages=torch.tensor(advantages, device=device),
    )


def may_look(enter: Tensor, leave: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Whether the token in column `at` may see the one in column `to`: if that comes no later, and
    belongs to the same step or to an ancestor of it."""
    return (to <= at) & (enter[to] <= enter[at]) & (enter[at] < leave[to])


def ancestor_mask(model: torch.nn.Module, row: PackedRow) -> Tensor | BlockMask:
    """What may_look says of all columns, as the model's attention function takes it: bool
    [1, 1, T, T], or only the blocks of it that are not empty (see compile_training)."""
    length = len(row.enter)
    device = row.enter.device
    if model.config._attn_implementation == "flex_attention":
        return create_block_mask(
            lambda batch, head, at, to: may_look(row.enter, row.leave, at, to),
            None, None, length, length, device=device,
        )
    columns = torch.arange(length, device=device)
    return may_look(row.enter, row.leave, columns[:, None], columns)[None, None]


def token_logps(
    model: torch.nn.Module,
    row: PackedRow,
    temperature: float,
    n_tokens: int,
    max_logits: int = 2**25,
) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of the scored tokens and entropies [M] of the distributions they are scored
    under, softmax(logits / temperature) over the first n_tokens ids. Float32, nats.

    The output layer runs in chunks of at most max_logits float32 logits. If it takes more than
    one, a chunk is computed again in the backward pass instead of being kept.
    """
    hidden = model.get_decoder()(
        row.ids,
        attention_mask=ancestor_mask(model, row),
        position_ids=row.positions,
        use_cache=False,
    ).last_hidden_state[0, row.predictors]

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.get_output_embeddings()(hidden)[:, :n_tokens].float() / temperature
        log_z = logits.logsumexp(-1)
        logps = logits.gather(1, targets[:, None])[:, 0] - log_z
        entropies = log_z - (logits.softmax(-1) * logits).sum(-1)
        return logps, entropies

    chunk = max(1, max_logits // n_tokens)
    if len(hidden) <= chunk:
        return score(hidden, row.targets)
    logps = []
    entropies = []
    for part, targets in zip(hidden.split(chunk), row.targets.split(chunk)):
        scored = torch.utils.checkpoint.checkpoint(score, part, targets, use_reentrant=False)
        logps.append(scored[0])
        entropies.append(scored[1])
    return torch.cat(logps), torch.cat(entropies)


# --------------------------------------------------------------------- Objective (§3.4, Eq. 5)
def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    entropies: Tensor,
    segments: Tensor,
    advantages: Tensor,
    n_tokens: int,
    n_steps: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """What these M tokens, one pack, add to the loss of a mini-batch of n_tokens tokens.

        (1 / n_tokens) sum_t [ -min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)
                               + kl_coef k3_t - entropy_coef H_t ]

    r_t = pi / pi_old; k3 = exp(d) - d - 1 with d = log pi_ref - log pi, clamped to +-10. It is the
    mean over all tokens [code]; Eq. 5 takes the mean over answers of their means. With ratio
    "sequence" (GSPO, 2507.18071 Eq. 7) a step has one ratio exp(mean_t log r_t) and the first term
    is the mean over the n_steps steps; KL and entropy stay means over tokens.

    logps, old_logps, ref_logps (None: no KL), entropies, segments: [M]; advantages: [S].
    -> loss; [tokens (sequence: steps) that the clip changed, sum of k3, sum of H], no gradient.
    Raises ValueError for an unknown ratio.
    """
    log_ratio = logps - old_logps
    if ratio == "token":
        n_units = n_tokens
        advantages = advantages[segments]
    elif ratio == "sequence":
        n_units = n_steps
        zeros = torch.zeros_like(advantages)
        lengths = zeros.index_add(0, segments, torch.ones_like(logps))
        log_ratio = zeros.index_add(0, segments, log_ratio) / lengths
    else:
        raise ValueError(f"ratio {ratio!r}: choose 'token' or 'sequence'")
    r = log_ratio.exp()
    plain = r * advantages
    clipped = r.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    loss = -torch.min(plain, clipped).sum() / n_units
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        d = (ref_logps - logps).clamp(-10, 10)
        kl = d.exp() - d - 1
    loss = loss + kl_coef * kl.sum() / n_tokens - entropy_coef * entropies.sum() / n_tokens
    statistics = torch.stack([(clipped < plain).sum(), kl.sum(), entropies.sum()])
    return loss, statistics.detach()


# --------------------------------------------------------- One training step (Figure 2, right)
def by_question(trees: list[Node]) -> dict[int, list[Node]]:
    """{question: its trees}; one tree, or with TreeAdv several."""
    forests = {}
    for root in trees:
        forests.setdefault(root.question, []).append(root)
    return forests


def split_by_question(trees: list[Node], n_parts: int) -> list[list[Node]]:
    """Cut a batch into mini-batches [ours]: the questions that have trained steps, in n_parts parts
    of about equal numbers of trained tokens; fewer if there are fewer questions."""
    sizes = []  # (trained tokens, question)
    forests = by_question(trees)
    for question, forest in forests.items():
        trained = [node for root in forest for node in root.walk() if node.trained]
        if trained:
            sizes.append((sum(len(node.tokens) for node in trained), question))
    sizes.sort(reverse=True)
    n_parts = min(n_parts, len(sizes))
    parts = []
    for k in range(n_parts):
        part = []
        for _, question in sizes[k::n_parts]:
            part += forests[question]
        parts.append(part)
    return parts


def optimizer_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[PackedRow],
    mixed: bool,
    temperature: float,
    n_tokens: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
) -> dict[str, float | None]:
    """One optimiser step on one mini-batch -> the gradient's norm before clipping (None: the step
    was skipped), the share of clipped ratios, sums of KL and entropy, the number of tokens.

    The gradient is that of the loss over all its tokens, however they are packed. A loss or a
    gradient that is not finite never reaches the weights.
    """
    batch_tokens = sum(len(row.targets) for row in rows)
    batch_steps = sum(len(row.advantages) for row in rows)
    device = model.device.type
    total_loss = torch.zeros((), device=model.device)
    totals = torch.zeros(3, device=model.device)
    with torch.autocast(device, torch.bfloat16, enabled=mixed):  # casts the weights once
        for row in rows:
            logps, entropies = token_logps(model, row, temperature, n_tokens)
            # None in the first mini-batch, whose ratios are 1.
            old_logps = logps.detach() if row.old_logps is None else row.old_logps
            loss, statistics = policy_loss(
                logps, old_logps, row.ref_logps, entropies, row.segments, row.advantages,
                batch_tokens, batch_steps, ratio, clip_eps, kl_coef, entropy_coef,
            )
            with torch.autocast(device, enabled=False):  # it is not meant for backward passes
                loss.backward()
            total_loss += loss.detach()
            totals += statistics
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # [code]
    finite = math.isfinite(total_loss + grad_norm)  # waits for the device, once a step
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    clipped, kl_sum, entropy_sum = totals.tolist()
    return {
        "grad_norm": grad_norm.item() if finite else None,
        "clip_ratio": clipped / (batch_tokens if ratio == "token" else batch_steps),
        "kl_sum": kl_sum if finite else 0.0,  # NaN would be no JSON
        "entropy_sum": entropy_sum if finite else 0.0,
        "tokens": batch_tokens,
    }


def update_policy(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    trees: list[Node],
    minibatches: int,
    pack_len: int,
    mixed: bool,
    temperature: float,
    n_tokens: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float | bool | None]:
    """One optimiser step for each mini-batch of these trees (§4) -> the metrics of the batch.

    Old and reference log-probs are taken before the first optimiser step. The first mini-batch
    needs no pass for the old ones: they are its own, so that it clips nothing, and clip_ratio is
    that of the last mini-batch. progress is called with the tokens of each pass.
    """
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    model.train(checkpointing)  # which works in training mode only
    padded = model.config._attn_implementation == "flex_attention"
    batches = []
    for part in split_by_question(trees, minibatches):
        packs = pack_nodes(part, pack_len)
        batches.append([pack_row(pack, model.device, padded) for pack in packs])
    for number, rows in enumerate(batches):
        for row in rows:
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
                if number > 0:
                    row.old_logps, _ = token_logps(model, row, temperature, n_tokens)
                if reference is not None:
                    row.ref_logps, _ = token_logps(reference, row, temperature, n_tokens)
            progress(len(row.targets))
    updates = []
    for rows in batches:
        update = optimizer_step(
            model, optimizer, rows, mixed, temperature, n_tokens, ratio, clip_eps, kl_coef,
            entropy_coef,
        )
        updates.append(update)
        progress(update["tokens"])
    if not updates:  # every group was pruned
        return {"grad_norm": 0.0, "clip_ratio": 0.0, "kl": 0.0, "entropy": 0.0, "skipped": False}
    trained_tokens = sum(update["tokens"] for update in updates)
    return {
        "grad_norm": updates[-1]["grad_norm"],
        "clip_ratio": updates[-1]["clip_ratio"],
        "kl": sum(update["kl_sum"] for update in updates) / trained_tokens,
        "entropy": sum(update["entropy_sum"] for update in updates) / trained_tokens,
        "skipped": any(update["grad_norm"] is None for update in updates),
    }


def grow_trees(
    sampler: torch.nn.Module, prompts: list[list[int]], decoding: Decoding, settings: Settings
) -> list[Node]:
    """One tree for each prompt; with treeadv several."""
    step_lens = per_level(settings.step_len, settings.branching)
    if settings.algo == "treeadv":
        return sample_forests(
            sampler, prompts, settings.leaves, settings.trees, step_lens[0],
            settings.entropy_threshold, decoding,
        )
    return sample_trees(sampler, prompts, settings.branching, step_lens, decoding)


def sample_metrics(
    trees: list[Node], leaves: list[Node], texts: list[str], groups: list[list[float]], tau: float
) -> dict[str, float]:
    """What is logged of a batch's answers and groups, before the update. reward is the mean of the
    roots' backed-up rewards, which is not the share of right leaves."""
    lengths = []
    for leaf in leaves:
        lengths.append(sum(len(step.tokens) for step in leaf.path()[1:]))
    return {
        "reward": fmean([root.reward for root in trees]),
        "groups_kept": fmean([is_informative(group, tau) for group in groups]),
        "frac_reward_zero_std": fmean([not is_informative(group, 0.0) for group in groups]),
        "tokens_sampled": sum(len(node.tokens) for root in trees for node in root.steps()),
        "completions/mean_length": fmean(lengths),
        "completions/clipped_ratio": fmean([not leaf.done for leaf in leaves]),
        "no_answer_ratio": fmean([extract_boxed(text) is None for text in texts]),
    }


def train_step(
    model: torch.nn.Module,
    sampler: torch.nn.Module,
    reference: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    tokenizer: object,
    batch: list[dict],
    decoding: Decoding,
    settings: Settings,
    status: "Status",
) -> tuple[dict, list[Node]]:
    """The algorithm of the module docstring on one batch of questions -> (metrics, trees).

    A question is a dict with its prompt (token ids) and the known answer. sampler is the model
    itself, or in mixed precision its bf16 copy.
    """
    mixed = sampler is not model
    prompts = [question["prompt"] for question in batch]
    answers = [question["answer"] for question in batch]
    tau = settings.prune_threshold
    start = time.perf_counter()

    # 1. Grow.
    status.phase("sampling")
    trees = grow_trees(sampler, prompts, decoding, settings)
    sampled = time.perf_counter()

    # 2. Verify and back up.
    status.phase("verifying")
    leaves, texts = verify_leaves(trees, answers, tokenizer)
    for root in trees:
        backup_rewards(root)
    verified = time.perf_counter()

    # 3. Prune and 4. compare.
    if settings.algo == "treeadv":
        groups = add_leaf_advantages(trees, settings.normalizer, tau)
    else:
        groups = add_sibling_advantages(trees, settings.normalizer, tau)
    metrics = sample_metrics(trees, leaves, texts, groups, tau)

    # 5. Update.
    status.phase("updating")
    update = update_policy(
        model, reference, optimizer, trees, settings.minibatches, settings.pack_len,
        mixed, settings.temperature, decoding.n_tokens, settings.ratio,
        settings.clip_eps, settings.kl_coef, settings.entropy_coef, status.tokens,
    )
    if mixed:
        sampler.load_state_dict(model.state_dict())  # the trained weights, rounded to bf16
    end = time.perf_counter()

    times = {
        "tok_per_s": metrics["tokens_sampled"] / (end - start),
        "time_sample": sampled - start,
        "time_score": verified - sampled,
        "time_update": end - verified,
        "peak_mem_gb": peak_memory_gb(),
    }
    return {**metrics, **update, **times}, trees


# ------------------------------------------------------- TreeAdv (2601.03703) and GSPO (2507.18071)
# GSPO is policy_loss with ratio "sequence". TreeAdv grows other trees and compares other groups:
# a forest of answers that fork where the policy was uncertain, and leaf advantages that are
# redistributed to the steps. Only its abstract and summaries could be read, so the details (one
# round of forks, positions of highest entropy, the plain mean) are ours.
def pick_forks(rollouts: list[Node], n_forks: int, threshold: float) -> list[list[int]]:
    """The n_forks positions of highest entropy above the threshold (nats) in these answers to one
    question -> for every answer the sorted positions at which a fork draws another token."""
    candidates = []
    for k, rollout in enumerate(rollouts):
        for position, entropy in enumerate(rollout.entropies):
            if entropy > threshold:
                candidates.append((entropy, k, position))
    candidates.sort(reverse=True)
    forks = [[] for _ in rollouts]
    for _, k, position in candidates[:n_forks]:
        forks[k].append(position)
    return [sorted(positions) for positions in forks]


def split_rollout(rollout: Node, forks: list[int]) -> tuple[Node, list[Node]]:
    """Cut an answer before these positions -> the root of a new tree, a chain of steps; for each
    position the node that its fork continues, which for position 0 is the root."""
    prompt = rollout.parent
    root = Node(prompt.tokens, question=prompt.question)
    node = root
    parents = []
    start = 0
    for end in [*forks, len(rollout.tokens)]:
        if end > start:
            entropies = rollout.entropies[start:end]
            node = Node(rollout.tokens[start:end], node, entropies=entropies)
        parents.append(node)
        start = end
    node.done = rollout.done
    return root, parents[:-1]  # the last one is the end of the answer


def continue_forks(
    model: torch.nn.Module, parents: list[Node], budgets: list[int], decoding: Decoding
) -> None:
    """Sample one more ending below each of these nodes, of up to its budget of tokens: all in one
    call with the largest budget, then cut."""
    if not parents:
        return
    prefixes = []
    for parent in parents:
        prefixes.append([token for step in parent.path() for token in step.tokens])
    endings = sample_trees(model, prefixes, [1], [max(budgets)], decoding)
    for parent, budget, root in zip(parents, budgets, endings):
        ending = root.children[0]
        Node(  # it enters its parent's children
            ending.tokens[:budget],
            parent,
            done=ending.done and len(ending.tokens) <= budget,
            entropies=ending.entropies[:budget],
        )


def sample_forests(
    model: torch.nn.Module,
    prompts: list[list[int]],
    n_leaves: int,
    n_trees: int,
    budget: int,
    threshold: float,
    decoding: Decoding,
) -> list[Node]:
    """TreeAdv's sampler: n_trees first answers a prompt, then forks at their most uncertain
    positions; n_leaves answers in all, of up to `budget` tokens. Where too few positions lie above
    the threshold, fresh answers fill up. -> the roots of all trees, grouped by prompt."""
    decoding = dataclasses.replace(decoding, keep_entropies=True)
    roots = []
    parents = []
    budgets = []
    for first in sample_trees(model, prompts, [n_trees], [budget], decoding):
        forks = pick_forks(first.children, n_leaves - n_trees, threshold)
        for rollout, positions in zip(first.children, forks):
            root, fork_parents = split_rollout(rollout, positions)
            roots.append(root)
            parents += fork_parents
            budgets += [budget - position for position in positions]
        n_forks = sum(len(positions) for positions in forks)
        for _ in range(n_leaves - n_trees - n_forks):  # a fresh answer is a fork of a bare prompt
            root = Node(first.tokens, question=first.question)
            roots.append(root)
            parents.append(root)
            budgets.append(budget)
    continue_forks(model, parents, budgets, decoding)
    return roots


def add_leaf_advantages(
    trees: list[Node], normalizer: str, threshold: float
) -> list[list[float]]:
    """TreeAdv's advantages: all leaves of a question form one group, and a step takes the plain
    mean over the leaves below it -> the rewards of every group."""
    groups = []
    for forest in by_question(trees).values():
        leaves = [leaf for root in forest for leaf in root.leaves()]
        rewards = [leaf.reward for leaf in leaves]
        informative = is_informative(rewards, threshold)
        advantages = group_relative_advantages(rewards, normalizer).tolist()
        leaf_advantage = dict(zip(leaves, advantages))
        for root in forest:
            for node in root.steps():
                below = [leaf_advantage[leaf] for leaf in node.leaves()]
                node.advantage = fmean(below) if informative else 0.0
                node.trained = informative
        groups.append(rewards)
    return groups


# ------------------------------------------------------------------------- Speed on a GPU
# A GPU waits for the launches of a growing cache's many small kernels. Given a static cache,
# `generate` compiles its decoding step by itself and replays it as a CUDA graph.
def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention of one new token: the query heads that share a key head become rows of one product.
    The stock function, once compiled, copies keys and values for each of them. Prompts take it.

    query [B, H, 1, D]; key, value [B, H_kv, T, D]; attention_mask [B, 1, 1, T] -> [B, 1, H, D].
    """
    batch, n_heads, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(batch, 1, n_heads, width), None


def use_grouped_attention(model: torch.nn.Module) -> None:
    """For the model that is sampled from (see add_workspace)."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model.set_attn_implementation("grouped")


def compile_training(model: torch.nn.Module) -> None:
    """Make the update faster: attention leaves out the blocks that the ancestor mask empties, and
    each layer's small operations are fused. If the compiler fails on a trial, a line says so."""
    model.set_attn_implementation("flex_attention")
    layers = model.get_decoder().layers
    for layer in layers:
        layer.compile(dynamic=True)
    trial = Node([0, 0], Node([0]), trained=True)
    row = pack_row(pack_nodes([trial.parent], 3)[0], model.device, padded=True)
    try:
        with torch.autocast(model.device.type, torch.bfloat16):
            logps, _ = token_logps(model, row, 1.0, model.config.vocab_size)
        if logps.requires_grad:  # the reference's do not
            logps.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler shows in many ways
        model.set_attn_implementation("sdpa")
        for layer in layers:
            layer._compiled_call_impl = None
        print(f"cannot compile the update ({one_line(error)}); it goes on about 1.4 times slower")
    model.zero_grad()


class Workspace:
    """The KV cache of every `generate` call on a GPU: two blocks of memory, keys and values, for
    each layer. They are never freed, because a CUDA graph is bound to addresses and shapes.

    There is room for max_rows x length tokens, seen in few shapes [B, H_kv, T, D]: B a power of
    two or the most that fits, T a multiple of 256. One long prompt then lowers B instead of raising
    T for all.
    """
    padding = 1      # `generate` drops a mask without padding, and would compile a second time
    least_rows = 16
    columns = 256    # T is a multiple of this

    def __init__(self, max_rows: int, length: int, compile_config: CompileConfig | None) -> None:
        self.max_rows = max_rows
        self.capacity = max_rows * self.round_up(length)    # tokens over all rows
        self.compile_config = compile_config
        self.blocks: list[tuple[Tensor, Tensor]] = []       # keys, values of every layer
        self.caches: dict[tuple[int, int], Cache] = {}  # by shape (B, T)

    def round_up(self, length: int) -> int:
        return math.ceil(length / self.columns) * self.columns

    def most_rows(self, length: int) -> int:
        """How many sequences of this length fit."""
        return max(1, min(self.max_rows, self.capacity // self.round_up(length)))

    def open_rows(
        self, rows: Rows, index: list[int], new_tokens: int
    ) -> tuple[Tensor, Tensor, Cache]:
        """Copy these rows into the block -> ids, mask and the cache for `generate`. Copies of the
        last row fill up the shape."""
        past = rows.ids.shape[1] - 1
        length = self.round_up(past + new_tokens)
        power_of_two = 2 ** math.ceil(math.log2(len(index)))
        batch = min(max(self.least_rows, power_of_two), self.most_rows(length))
        cache = self.cache(rows.kv, batch, length)
        filler = [index[-1]] * (batch - len(index))
        picked = torch.tensor(index + filler, device=rows.ids.device)
        for layer, (keys, values) in zip(cache.layers, rows.kv):
            layer.keys[:, :, :past] = keys[picked]
            layer.values[:, :, :past] = values[picked]
            layer.cumulative_length.fill_(past)
        return rows.ids[picked], rows.mask[picked], cache

    def cache(self, kv: list[tuple[Tensor, Tensor]], batch: int, length: int) -> Cache:
        """The block as a cache of this shape, made once for each shape."""
        if not self.blocks:
            for keys, values in kv:
                # Zeros: what is masked is multiplied by 0, so it must be finite.
                self.blocks.append((self.new_block(keys), self.new_block(values)))
        if (batch, length) not in self.caches:
            cache = Cache(layers=[StaticLayer(length) for _ in kv])
            for layer, blocks, tensors in zip(cache.layers, self.blocks, kv):
                layer.keys = self.view(blocks[0], tensors[0], batch, length)
                layer.values = self.view(blocks[1], tensors[1], batch, length)
                layer.cumulative_length = layer.cumulative_length.to(layer.keys.device)
                layer.dtype = layer.keys.dtype
                layer.device = layer.keys.device
                layer.is_initialized = True
                # Without a static address there is no CUDA graph, as the step writes to its inputs.
                torch._dynamo.mark_static_address(layer.cumulative_length)
                for tensor in (layer.keys, layer.values):
                    torch._dynamo.mark_static_address(tensor)
                    torch._dynamo.mark_static(tensor, [1, 3])  # heads and width never change
            self.caches[batch, length] = cache
        return self.caches[batch, length]

    def new_block(self, tensor: Tensor) -> Tensor:
        _, n_heads, _, width = tensor.shape
        return tensor.new_zeros(self.capacity * n_heads * width)

    def view(self, block: Tensor, like: Tensor, batch: int, length: int) -> Tensor:
        _, n_heads, _, width = like.shape
        size = batch * n_heads * length * width
        return block[:size].view(batch, n_heads, length, width)


# ------------------------------------------------------------------------ Answer verifier
import operator
# LaTeX is respelled by tables, then one small parser gives the value of an answer: exact in rational numbers, to ten
# digits once roots or pi enter, at fixed points if there are variables. Work is bounded before it is done (characters,
# bits of a number), so no timeout is needed. Precision comes before recall: what cannot be read equals nothing else.
MAX_CHARS, MAX_BITS = 300, 4096
# Spellings of one character; ⦃⦄ are \{ \}, ⟦⟧ enclose a matrix, ¶ ends its row, ⟨⟩ enclose a unit, '' a word or 12_{3}.
SYMBOLS = {name: names.split()[0] for names in r"""⦃ \{; ⦄ \}; ( \langle; ) \rangle; ≤ \le \leq \leqslant; ± \pm; = \in;
    ≥ \ge \geq \geqslant; ≠ \ne \neq; , \cup ∪; * \cdot \times × ·; / \div; - −; ° \circ; ∞ \infty; π \pi; \sqrt √;
    ∅ \emptyset \varnothing; α \alpha; β \beta; θ \theta; λ \lambda""".split(";") for name in names.split()}
TEXT = r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it|bb)|mbox|boldsymbol) *"
UNIT = r"(?:[cmk]m|ft|in|mph|kg|(?<= )[a-z]{4,}(?: [a-z]+)*)(?:/[a-z]+)?(?:\^\d)?(?= *\.?(?:$|[,;)\]⦄⟧&¶=]))"
FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log"
REWRITES = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in (
    (r"\\\\", "¶"), (r"\\begin\{[pb]matrix\}", "⟦"), (r"¶?\s*\\end\{[pb]matrix\}", "⟧"), (r"\\[dtc]frac", r"\\frac"),
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle|rm|bf)(?![A-Za-z])\.?|\\[()\[\]!]|\{,\}|\\?[$£€%]|\\angle", ""),
    (r"(\\[,;: ]|\\q?quad|\s|~)+", " "), (";", ", "), (r"(?<=[{(]) | (?=[)}])", ""), (r"\\frac ?(\w)", r"\\frac{\1}"),
    # the name of a function is no product of letters: sin 2x and P(2x) are not 2 sin x and 2P(x)
    (rf"(?<![A-Za-z\\])(sqrt|pi|{FUNCTION}|[a-z]{{3,}}(?=\()|[fghA-Z](?=\([^()]*\)(?! ?=)))(?![a-z])", r"\\\1"),
    (r"\\[A-Za-z]+|\\[{}]|[^\x00-\x7f]", lambda match: SYMBOLS.get(match[0], match[0])), (r"\^? ?\{?°\}?", "⟨degree⟩"),
    (rf"[,; ]*({TEXT}\{{[, ]*)?(?<![A-Za-z])(and|or)(?![A-Za-z])[, ]*\}}?[, ]*", ", "), (r"\^\{(\w)\}(?!\d)", r"^\1"),
    (rf"(?<=[\d}})π]) *((/? ?(?!\\math[^r]|\\b){TEXT}\{{(?![abeinxyz]\}})[^{{}}]*\}} ?(\^ ?\d)?)+|{UNIT})", r"⟨\g<0>⟩"),
    (TEXT + r"\{([^{}]*)\}", r"\1"), (r"\\sqrt(?! ?\[)", r"\\root{2}"), (r"\\sqrt ?\[(\w+)\]", r"\\root{\1}"),
    # mixed numbers: 1\frac12, 1 1/2; e-forms; thousands: 1,234 and 1 234 are one number, "1, 234" and (1,234) are two
    (r"(?<![\w.^}/])(\d+) ?(\\frac ?\{\d+\} ?(?:\d|\{\d+\})|(?<= )\d+/\d+)(?!\.?\d)", r"(\1+\2)"),
    (r"(?<![\d.])(\d*\.?\d+)[eE]([+-]?\d{1,3})(?![\d.])", r"(\1*10^{\2})"), (r"_(\d+|[A-Za-z])", r"_{\1}"),
    (r"(?<![\d.,(\[⦃])(?<![(\[⦃]-)\d{1,3}([, ]\d{3})+(?![\d)\]⦄]|[, ]\d)", lambda match: re.sub("[, ]", "", match[0])),
    (r"(?<=}) |(?<!\d) | (?!\d)|[,: ]*\.?$", ""), (r"(?<=\w\w)s⟩", "⟩"), (r"([^,⦃⦄]*)±([^,⦃⦄]*)", r"\1+\2,\1-\2"),
    (r":00(?!\d)", ":60"),  # full hours: with a factor 0, am and pm would be equal
    (r"⦃ ?⦄", "∅"), (r"(\.\d*)(?=\(\d+\))|-(?=⦃)", r"\1\\"),  # 0.(3), R-{0}: not a product, not a number taken off
    (r"(?<![^,(\[⦃=&-])((?i:no|[a-z]{3,}[a-z\d-]*)|[IVX]{2,}|\d+_\{\d+\})(?![^,)\]⦄=&])",
     lambda match: f"'{match[0].lower()}'"), (r"(?<=[A-Za-z⟩])(?=\d)", ":"))]  # 3 to 5, 2 hours 30: parts in order
# What one of two answers may leave out, by the mark that shows it: a unit, or x=, f(x)=, (x,y)=, AB=, area=
OPTIONAL = {"⟨": "⟨(?![^⟩]*(?:illion|thousand|hundred|dozen|hal[fv]|than))[^⟩]*⟩",
            "=": r"(?<![^,])(?:(?:'\w{1,9}'|[A-Z]+|[a-zα-ω])(?:_{\w+})?(?:\(\w*\))?|\(\w(?:,\w)+\))="}
TOKEN = re.compile(r"'[^']*'|⟨[^⟩]*⟩|[\d.]+|\\(?:frac|root)|[A-Za-z]\(\w*\)(?==)|[A-Za-zα-ω∞∅](?:_\{\w+\})?|.")
# How tightly an operator binds: closing brackets not at all, up to RATIO they join parts, the others compute.
LEVELS = {symbol: level for level, row in enumerate(")]}⦄⟧ , ¶ & =≠<>≤≥ : +- */ ^".split()) for symbol in row}
RATIO, PRODUCT, POWER, ATOM, BRACKETS = 5, 7, 8, 9, {pair: pair for pair in "() [] (] [) {} ⦃⦄ ⟦⟧".split()}
OPERATIONS = {"+": lambda a, b: a - -b, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": operator.pow,
              r"\frac": operator.truediv, r"\root": lambda n, a: operate("^", a, 1 / n)}

def extract_boxed(text):
    r"""Content of the last \boxed{...}, \fbox{...} or \boxed 5; None without box, or if it is not closed. Ours."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"), 0)
    box = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?![A-Za-z])([^\s{}$]+))").match(text, start)
    if not box or box[1]:
        return box and box[1]
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end(), box.end() + 20_000):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[box.end():brace.start()]

def normalize_answer(s):
    """One spelling for notations with one meaning: REWRITES in order; over MAX_CHARS only stripped. Ours."""
    for pattern, replacement in REWRITES if len(s) <= MAX_CHARS else ():
        s = pattern.sub(replacement, s)
    return s.strip()

def operate(sign, a, b):
    """Exact where it can be, and never large; roots are the principal ones, that of -8 is complex."""
    bits = [max(map(int.bit_length, n.as_integer_ratio())) if isinstance(n, Fraction) else 0 for n in (a, b)]
    if (bits[0] * abs(b) if sign == "^" else max(bits)) > MAX_BITS:
        raise OverflowError("too large")
    return OPERATIONS[sign](a, b)

def read(tokens, point, level=1):
    """Value at a point of the reversed tokens, as far as their operators bind at least as tightly as `level`."""
    token = tokens.pop()
    if token in "+-":
        value = Fraction(token + "1") * read(tokens, point, POWER)
    elif token in "([{⦃⟦":
        value, pair = read(tokens, point), BRACKETS[token + tokens.pop()]
        if isinstance(value, tuple) and value[0][0] == "," and pair != "⦃⦄":
            value = pair, value[1]
    elif token in OPERATIONS:  # \frac, \root
        value = operate(token, read(tokens, point, ATOM), read(tokens, point, ATOM))
    else:
        value = Fraction(token) if token[0] in ".0123456789" else point[token]
    while (binding := LEVELS.get(tokens[-1], PRODUCT)) >= level:
        if binding > RATIO:  # two values side by side are a product
            sign = tokens.pop() if tokens[-1] in LEVELS else "*"
            value = operate(sign, value, read(tokens, point, min(binding + 1, POWER)))
            continue
        kind, parts = "", [value]
        while LEVELS.get(tokens[-1]) == binding:
            kind += tokens.pop()
            parts.append(read(tokens, point, binding + 1))
        value = (kind[::-1].translate({62: "<", 8805: "≤"}), parts[::-1]) if not kind.strip(">≥") else (kind, parts)
    return value

def spell(value):
    """Equal values have one spelling: lists, sets and equations are sorted, roots and pi rounded to ten digits."""
    if isinstance(value, tuple):
        parts = [spell(part) for part in value[1]]
        return f"{value[0]}[{'; '.join(parts if value[0].strip(',=≠') else sorted(parts))}]"
    exact = value if isinstance(value, Fraction) else Fraction(value.real).limit_denominator(10_000)
    if value == exact or abs(value - exact) < 1e-13 * abs(value) < 1e-4:  # also (√2)^2, but 3.14159265358979 is not pi
        return str(exact)
    shift = 1000 * abs(value) * (1 + 1j)  # rounds away what is 0 but for rounding, as in √-4 = 1e-16 + 2i
    return f"{value + shift - shift:.10g}"

def read_answer(s):
    """Spelled values of a normalized answer at fixed points; None if it cannot be read: the check for golds. Ours."""
    tokens, values = TOKEN.findall(s if len(s) <= 2 * MAX_CHARS else ""), []
    names = sorted({token for token in tokens if re.match("['⟨A-Za-zα-ω∞∅]", token)} - {"e", "i", "π"})
    for turn in range(8):  # three points of integers, even and odd, then fractions of both signs
        point, stack = {"e": math.e, "i": 1j, "π": math.pi}, [")", *tokens[::-1]]
        for name in names:  # by its name alone: other names of the answer may cancel
            n = random.Random(f"{turn}{name}").randint(2, 20)
            sign = (-1) ** (ord(name[-2:][0]) >> max(0, turn - 3))  # of its letter, or its index: x_{1}
            point[name] = Fraction(2 * n + turn) if turn < 3 else Fraction(n * sign, 8)
        try:
            value = read(stack, point)
            values.append(None if len(stack) > 1 or (turn > 2 and "j" in repr(value)) else spell(value))
        except Exception:  # nothing a model writes may stop the training
            values.append(None)
    return values if values.count(None) < 6 else None

def is_equiv(a, b):
    """Whether two answers are equal. An unreadable one equals only the same string, an empty one nothing. Ours."""
    a, b = normalize_answer(a), normalize_answer(b)
    for mark, pattern in OPTIONAL.items():
        if (mark in a) != (mark in b) and len({*re.findall(pattern, f"{a},{b}")}) == 1:
            a, b = re.sub(pattern, "", a), re.sub(pattern, "", b)
    same = [x == y for x, y in zip(read_answer(a) or (), read_answer(b) or ()) if x and y]
    return a == b != "" or (len(same) > 2 and all(same))

def reward_fn(completion, answer):
    """1.0 if the last box equals the answer (or one of a list; each may be a text with a box), else 0.0. Ours."""
    golds = map(str, answer if isinstance(answer, (list, tuple, set)) else [answer])
    golds = [(extract_boxed(gold) or "") if re.search(r"\\(boxed|fbox)", gold) else gold for gold in golds]
    return float(any(is_equiv(extract_boxed(completion) or "", gold) for gold in golds))


def is_readable(gold): return gold.isdigit() or read_answer(normalize_answer(gold)) is not None


# ------------------------------------------------------------------------- Prompts and data
class BadInput(ValueError):
    """Something the user gave cannot work; the message names it and the fix. Exit status 2."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise BadInput(message)


def one_line(error: BaseException, length: int = 300) -> str:
    """Messages of libraries have several lines."""
    return " ".join(str(error).split())[:length]


QWEN_MATH = (  # the prompt of Qwen2.5-Math's own evaluation
    "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATES = ("qwen-math", "none", "chat")
TEXT_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
QUESTION_COLUMNS = ["question", "problem", "prompt"]
ANSWER_COLUMNS = ["answer", "final_answer", "reward_model.ground_truth", "solution"]


def chat_template(tokenizer: object) -> str:
    """The tokenizer's own chat template as a text with {question} in it. Raises BadInput."""
    require(tokenizer.chat_template, "--template chat: this tokenizer has no chat template")
    turns = [{"role": "user", "content": "{question}"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the checkpoint's author
        raise BadInput(
            f"--template chat: the tokenizer's chat template fails ({one_line(error)}); "
            "give a text file with {question} in it"
        ) from error
    require("{question}" in text, "--template chat: that chat template drops the question")
    return text


def load_template(name: str | None, tokenizer: object, vocab_size: int) -> str:
    """--template -> a text with {question} in it. Raises BadInput."""
    if name is None:
        end_of_turn = tokenizer.get_vocab().get("<|im_end|>", vocab_size)
        name = "qwen-math" if end_of_turn < vocab_size else "none"
    if name == "qwen-math":
        return QWEN_MATH
    if name == "none":
        return "{question}"
    if name == "chat":
        return chat_template(tokenizer)
    require(
        os.path.isfile(name),
        f"--template {name}: neither qwen-math, none, chat nor a file",
    )
    text = Path(name).read_text("utf-8", "replace")
    require("{question}" in text, f"--template {name}: there is no {{question}} in it")
    return text


def build_prompt(question: str, template: str, tokenizer: object) -> list[int]:
    """The token ids of a prompt, in training and evaluation alike: begun once, never ended."""
    text = template.replace("{question}", question)
    ids = tokenizer.encode(text)
    bos_id = tokenizer.bos_token_id
    if bos_id is not None and ids[:2] == [bos_id, bos_id]:
        ids = ids[1:]  # one from the template, one from the tokenizer
    eos_token = tokenizer.eos_token or ""
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos_token):
        ids = ids[:-1]  # put there by the tokenizer
    return ids


def use_hub_or_cache() -> None:
    """If the hub does not answer, look only into its local cache, at once instead of after minutes
    of retries."""
    import datasets
    import huggingface_hub
    try:
        session = huggingface_hub.utils.get_session()
        session.head(huggingface_hub.constants.ENDPOINT, timeout=8)  # any answer will do
    except Exception:  # of whatever HTTP library is below
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def read_jsonl(path: str) -> list:
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise BadInput(f"{path} line {number}: not a JSON object ({error})") from error
    return rows


def read_rows(source: str) -> Sequence[dict]:
    """The rows of a file or of a hub data set ID[:CONFIG[:SPLIT]]. Raises BadInput."""
    ending = Path(source).suffix
    formats = ", ".join(TEXT_FORMATS)
    require(
        ending in TEXT_FORMATS or not os.path.exists(source),
        f"{source}: its name must end in one of {formats}",
    )
    try:
        if ending == ".jsonl":
            return read_jsonl(source)
        import datasets
        if ending in TEXT_FORMATS:
            return datasets.load_dataset(ending[1:], data_files=source, split="train")
        use_hub_or_cache()
        name, config, split = f"{source}::".split(":")[:3]
        return datasets.load_dataset(name, config or None, split=split or "train")
    except BadInput:
        raise
    except Exception as error:  # a dozen unrelated types: not there, not reachable, not readable
        reason = error.__cause__ or error
        raise BadInput(
            f"cannot read {source} ({reason!r:.200}); give a file ({formats}) or a hub id"
        ) from error


def look_up(row: object, name: str) -> object:
    """The value of a column in whatever case, None if there is none. a.b is column b in a."""
    first, _, rest = name.partition(".")
    if not isinstance(row, dict):
        return None
    for column, value in row.items():
        if str(column).lower() == name.lower():
            return value
        if rest and str(column).lower() == first.lower():
            return look_up(value, rest)
    return None


def pick(row: dict, place: str, given: str | None, usual: list[str], what: str) -> object:
    """The row's question or answer, from the given column, else from the first usual one."""
    for name in [given] if given else usual:
        value = look_up(row, name)
        if value is not None:
            return value
    columns = list(row) if isinstance(row, dict) else "no JSON object"
    wanted = given or "/".join(usual)
    raise BadInput(f"{place}: no {wanted} in {columns}; name the column by --{what}-column")


def question_text(cell: object, place: str) -> str:
    """A question, or the last user message of a chat (the files of verl and rllm)."""
    if isinstance(cell, list):
        turns = [turn for turn in cell if isinstance(turn, dict) and turn.get("role") == "user"]
        cell = turns[-1].get("content") if turns else None
    require(
        isinstance(cell, str) and cell.strip(),
        f"{place}: the question must be text or a chat, not {cell!r:.80}",
    )
    return cell.encode("utf-8", "replace").decode()  # half a surrogate pair has no tokens


def is_known(answer: object) -> bool:
    golds = answer if isinstance(answer, list) else [answer]
    for gold in golds:
        if type(gold) not in (str, int, float) or not str(gold).strip():
            return False
    return len(golds) > 0


def load_questions(
    source: str,
    question_column: str | None = None,
    answer_column: str | None = None,
    skip_unanswered: bool = False,
) -> list[dict]:
    """-> a dict for each question: id, its row number from 0; question, a text; answer, a text, a
    number or a list of them; row, all columns. Raises BadInput."""
    questions = []
    unreadable = []
    rows = read_rows(source)
    for number, row in enumerate(tqdm(rows, source, leave=False, delay=1)):
        place = f"{source} row {number + 1}"
        cell = pick(row, place, question_column, QUESTION_COLUMNS, "question")
        try:
            answer = pick(row, place, answer_column, ANSWER_COLUMNS, "answer")
        except BadInput:
            if not skip_unanswered:
                raise
            continue
        if isinstance(answer, str):
            answer = answer.rsplit("####", 1)[-1].strip()  # GSM8K
        if not is_known(answer):
            require(
                skip_unanswered,
                f"{place}: the answer must be text or a number, not {answer!r:.80}",
            )
            continue
        text = question_text(cell, place)
        questions.append({"id": number, "question": text, "answer": answer, "row": row})
        for gold in answer if isinstance(answer, list) else [answer]:
            gold = extract_boxed(str(gold)) or str(gold)
            words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)  # no LaTeX commands
            if len(words) > 2 or not is_readable(gold):
                unreadable.append(f"row {number + 1}: {gold:.60}")
    require(questions, f"{source}: no question is in it")
    if len(questions) < len(rows):
        print(f"{source}: {len(rows) - len(questions)} rows without an answer are left out")
    if unreadable:
        print(
            f"{source}: {len(unreadable)} answers cannot be read as mathematics and match only "
            f"the same text; the first is in {unreadable[0]}"
        )
    return questions


def fit_prompts(
    questions: list[dict],
    name: str,
    template: str,
    tokenizer: object,
    max_prompt_len: int,
    budget: int,
    context: int,
    vocab_size: int,
) -> list[dict]:
    """Add each question's prompt; leave out those too long for the flag or the context."""
    longest = min(max_prompt_len, context - budget)
    require(
        longest > 0,
        f"{name}: an answer takes up to {budget} tokens and the model's context is {context}; "
        "lower --step-len",
    )
    kept = []
    for question in tqdm(questions, "tokenizing", leave=False, delay=1):
        prompt = build_prompt(question["question"], template, tokenizer)
        top = max(prompt, default=0)
        require(
            top < vocab_size,
            f"{name}: the prompt has token {tokenizer.convert_ids_to_tokens(top)!r} with id {top}, "
            f"but the model knows ids below {vocab_size} only; use another --template",
        )
        if 0 < len(prompt) <= longest:
            kept.append({**question, "prompt": prompt})
    require(
        kept,
        f"{name}: every prompt has more than {longest} tokens; raise --max-prompt-len, or lower "
        f"--step-len, as an answer of {budget} must fit into the context of {context}, too",
    )
    left_out = len(questions) - len(kept)
    print(f"{name}: {len(kept)} questions, {left_out} left out as longer than {longest} tokens")
    return kept


# ---------------------------------------------------------------------------------- Models
def from_pretrained(kind: type, name: str, **options: object) -> object:
    """kind.from_pretrained(name) of a folder, the hub or its cache. Raises BadInput."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    try:
        if not os.path.isdir(name):
            use_hub_or_cache()
        return kind.from_pretrained(name, **options)
    except Exception as error:  # a dozen unrelated types: missing, torn, or another kind of model
        advice = (
            "give a folder with config, weights and tokenizer, or a hub id that is reachable or in "
            "the local cache"
        )
        if os.path.exists(os.path.join(name, "trainer_state.pt")):
            advice = "delete that checkpoint: --resume then takes the one before"
        raise BadInput(f"{name}: cannot load the model ({one_line(error)}); {advice}") from error


def load_tokenizer(name: str) -> object:
    from transformers import AutoTokenizer
    tokenizer = from_pretrained(AutoTokenizer, name)
    require(
        tokenizer.encode("1"), f"{name}: its tokenizer knows no words; is tokenizer.json missing?"
    )
    require(
        tokenizer.eos_token_id is not None,
        f"{name}: no end-of-sequence token; set eos_token in its tokenizer_config.json",
    )
    return tokenizer


def load_config(name: str) -> object:
    """The model's config, if its attention is one that the packed update is tested with."""
    from transformers import AutoConfig
    config = from_pretrained(AutoConfig, name)
    kinds = {config.model_type, *(getattr(config, "layer_types", None) or [])}
    unknown = kinds - {"qwen2", "qwen3", "llama", "full_attention"}
    require(
        not unknown,
        f"{name}: {', '.join(sorted(unknown))} is not supported, only qwen2, qwen3 and llama "
        "models with full attention in every layer are tested",
    )
    return config


def load_model(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Raises BadInput."""
    from transformers import AutoModelForCausalLM
    load_config(name)
    model, loaded = from_pretrained(
        AutoModelForCausalLM, name, dtype=dtype, attn_implementation="sdpa",
        output_loading_info=True,
    )
    missing = sorted(loaded["missing_keys"])
    require(not missing, f"{name}: its files lack the weights {', '.join(missing[:3])}")
    small = model.num_parameters() < 10_000_000
    if device == "cpu" and small:
        torch.set_num_threads(1)  # more of them only wait for each other
    return model.to(device)


def choose_device(device: str) -> str:
    available = torch.cuda.is_available()
    require(device != "cuda" or available, "--device cuda: there is no CUDA GPU; use --device cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def choose_dtype(dtype: str, device: str) -> str:
    if dtype == "auto":
        return "mixed" if device == "cuda" else "float32"
    return dtype


def make_decoding(
    model: torch.nn.Module, tokenizer: object, temperature: float, max_rows: int
) -> Decoding:
    """Stop at every end token that model, generation config or tokenizer name, and at the end of
    a chat turn. Tokens that the tokenizer does not know are never drawn."""
    vocabulary = tokenizer.get_vocab()
    n_tokens = min(max(vocabulary.values()) + 1, model.config.vocab_size)
    stops = {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")}
    for named in (model.config.eos_token_id, model.generation_config.eos_token_id):
        stops |= set(named) if isinstance(named, list) else {named}
    eos_ids = sorted(stop for stop in stops if stop is not None and stop < n_tokens)
    require(
        eos_ids,
        f"the model has no embedding for the end token {tokenizer.eos_token!r}; set another "
        "eos_token in its tokenizer_config.json",
    )
    return Decoding(tuple(eos_ids), n_tokens, temperature, max_rows)


def add_workspace(
    model: torch.nn.Module, decoding: Decoding, length: int, mode: str
) -> Decoding:
    """--compile: a decoding with a static workspace for sequences of up to `length` tokens.

    auto: on CUDA, and if it fails, without one and with a line that says what it costs. on: on any
    device, and a failure is a BadInput.
    """
    on_cuda = model.device.type == "cuda"
    if mode == "off" or (mode == "auto" and not on_cuda):
        return decoding
    compile_config = CompileConfig(dynamic=True)
    compile_config._compile_all_devices = True
    length += Workspace.padding
    workspace = Workspace(decoding.max_rows, length, compile_config)
    static = dataclasses.replace(decoding, workspace=workspace)
    original = model.config._attn_implementation
    use_grouped_attention(model)
    print("compiling the decoding step, which takes about two minutes", flush=True)
    start = time.perf_counter()
    try:
        sample_trees(model, [[decoding.eos_ids[0]]], [1], [4], static)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler shows in many ways
        require(mode == "auto", f"--compile on: the compiler fails ({one_line(error)})")
        model.set_attn_implementation(original)
        print(
            f"cannot compile ({type(error).__name__}: {one_line(error)}); sampling goes on without "
            "CUDA graphs, several times slower"
        )
        return decoding
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    return static


def peak_memory_gb() -> float:
    """Of the GPU, else of this process, in GB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def count_weights(config: object) -> int:
    """Without loading or allocating any."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def bytes_per_weight(dtype: str, with_reference: bool) -> int:
    """Of weights, gradients and Adam's two moments, then the sampler's copy and the reference."""
    if dtype == "bfloat16":
        return 8 + 2 * with_reference
    if dtype == "mixed":
        return 16 + 2 + 2 * with_reference
    return 16 + 4 * with_reference


def cache_bytes_per_token(config: object, dtype: str) -> int:
    """Of the keys and values of all layers."""
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    size = 4 if dtype == "float32" else 2
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * size


def memory_of(device: str) -> int:
    """In bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_resources(
    config: object, device: str, dtype: str, length: int, folder: Path, settings: Settings
) -> None:
    """Say what memory and disk a run needs before its long work begins. Raises BadInput if the
    weights alone or the checkpoints cannot fit."""
    gb = 1e9
    n_weights = count_weights(config)
    weights = n_weights * bytes_per_weight(dtype, settings.kl_coef > 0) / gb
    cache = settings.max_rows * length * cache_bytes_per_token(config, dtype) / gb
    memory = memory_of(device) / gb
    new_checkpoints = max(1, settings.keep + 1 - len(checkpoints(folder)))
    disk = new_checkpoints * n_weights * (6 if dtype == "bfloat16" else 12) / gb
    free = shutil.disk_usage(folder).free / gb
    print(
        f"memory: {weights:.1f} GB for weights, Adam and copies, up to {cache:.1f} GB for the KV "
        f"cache, plus activations, of {memory:.0f} GB; disk: {disk:.1f} GB for checkpoints of "
        f"{free:.0f} GB free"
    )
    require(
        weights < memory,
        f"the model needs {weights:.1f} GB before any activation and {device} has {memory:.1f} GB; "
        "use a smaller --model, --dtype bfloat16, or --kl-coef 0",
    )
    if weights + cache > memory:
        print("that is more than there is: lower --max-rows, then --pack-len")
    require(
        disk < free,
        f"{folder} has {free:.1f} GB free and {new_checkpoints} more checkpoints take {disk:.1f} "
        "GB; lower --keep or choose another --out",
    )


# ------------------------------------------------------------------------------ Evaluation
def evaluate(
    model: torch.nn.Module,
    tokenizer: object,
    questions: list[dict],
    samples: int,
    budget: int,
    decoding: Decoding,
    seed: int,
) -> dict[str, float]:
    """Held-out accuracy: avg@samples at the decoding's temperature, and greedy. It has a random
    stream of its own, so that evaluating never changes the training."""
    prompts = [question["prompt"] for question in questions]
    answers = [question["answer"] for question in questions]
    greedy = dataclasses.replace(decoding, temperature=0.0)
    accuracy = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, width, how in (
            ("eval/accuracy", samples, decoding),
            ("eval/greedy_accuracy", 1, greedy),
        ):
            trees = sample_trees(model, prompts, [width], [budget], how)
            leaves, _ = verify_leaves(trees, answers, tokenizer)
            accuracy[name] = fmean([leaf.reward for leaf in leaves])
    return accuracy


# --------------------------------------------------------------------- Checkpoints and logs
def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in Path(out).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def newest_checkpoint(out: Path) -> Path | None:
    found = checkpoints(out)
    return found[-1] if found else None


def save_checkpoint(
    out: Path,
    model: torch.nn.Module,
    tokenizer: object,
    optimizer: torch.optim.Optimizer,
    eos_ids: Sequence[int],
    last: dict,
    keep: int,
) -> Path:
    """OUT/checkpoint-STEP: a plain Hugging Face folder and trainer_state.pt.

    It is written aside and then renamed: whatever kills the program, a folder of that name is
    whole and the earlier ones are untouched. `last` holds the step and its metrics. Raises OSError.
    """
    final = Path(out) / f"checkpoint-{last['step']}"
    aside = Path(out) / "checkpoint.tmp"
    shutil.rmtree(aside, ignore_errors=True)  # left by a kill
    generation = model.generation_config
    generation.eos_token_id = list(eos_ids)  # where training stopped
    if not generation.do_sample:  # what only sampling uses; left in by many, it can't be saved
        generation.temperature = None
        generation.top_p = None
        generation.top_k = None
    state = {
        "optimizer": optimizer.state_dict(),
        "last": last,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        torch.save(state, aside / "trainer_state.pt")
        aside.rename(final)
    except Exception as error:  # torch and safetensors have types of their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"cannot write {final}: {error}. Earlier checkpoints are whole") from error
    for old in checkpoints(out)[:-keep]:
        old.rename(aside)  # no half-deleted folder looks like a checkpoint
        shutil.rmtree(aside)
    return final


def load_trainer_state(folder: Path) -> dict:
    """Raises BadInput."""
    try:
        return torch.load(folder / "trainer_state.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # missing, torn, or no such file
        raise BadInput(
            f"--resume: {folder} is damaged ({one_line(error)}); delete that folder, and --resume "
            "takes the one before"
        ) from error


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of later steps, and half a line, that a kill left behind the checkpoint."""
    if not os.path.exists(path):
        return
    size = 0
    with open(path, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
        file.truncate(size)


def step_text(node: Node, tokenizer: object) -> str:
    """A step's own piece of text. The pieces of a path make up the text that is verified."""
    if node.parent is None:
        return ""
    before = answer_text(node.parent, tokenizer)
    return answer_text(node, tokenizer)[len(before):]


def tree_rows(trees: list[Node], batch: list[dict], step: int, tokenizer: object) -> list[dict]:
    """Every node as a line of --dump-trees; ids count through the step."""
    rows = []
    number = {}
    for tree, root in enumerate(trees):
        question = batch[root.question]
        for node in root.walk():
            number[node] = len(rows)
            row = {
                "step": step,
                "question_id": question["id"],
                "answer": question["answer"],
                "tree": tree,
                "id": number[node],
                "parent": number.get(node.parent),
                "text": step_text(node, tokenizer),
                "depth": len(node.path()) - 1,
                "tokens": node.tokens,
                "done": node.done,
                "reward": node.reward,
                "advantage": node.advantage,
                "trained": node.trained,
            }
            if node.parent is None:
                row["question"] = question["question"]
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------ The screen
class Status:
    """The bar at the bottom: training steps done, and what is going on in this one."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.name = ""
        self.count = 0
        self.shown = 0.0

    def phase(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.show()

    def tokens(self, n: int) -> None:
        self.count += n
        if time.monotonic() - self.shown > 0.5:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        self.bar.set_postfix_str(f"{self.name} {self.count:,} tokens" if self.count else self.name)


def share(value: float | None) -> str:
    """.412 and 1.000, always five characters wide."""
    if value is None:
        return "     "
    return f"{value:.3f}".removeprefix("0").rjust(5)


def step_line(row: dict, steps: int) -> str:
    """What matters of a row of metrics.jsonl; behind it only what is not as usual."""
    step = f"{row['step']}".rjust(len(str(steps)))
    text = f"step {step}/{steps}"
    if "reward" in row:
        text += f"  reward {share(row['reward'])}"
        text += f"  kept {100 * row['groups_kept']:3.0f} % of groups"
        text += f"  {row['tok_per_s'] / 1000:5.1f}k tok/s  {row['peak_mem_gb']:5.1f} GB"
    if "eval/accuracy" in row:
        text += f"  held-out {share(row['eval/accuracy'])}"
        text += f"  greedy {share(row['eval/greedy_accuracy'])}"
    if row.get("completions/clipped_ratio", 0) > 0.2:
        text += f"  {100 * row['completions/clipped_ratio']:.0f} % truncated"
    if row.get("skipped"):
        text += "  SKIPPED: loss or gradient not finite"
    return text


def printable(text: str) -> str:
    """Control characters escaped, so that a terminal obeys none of them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def render_tree(
    root: Node,
    question: dict,
    tokenizer: object,
    colour: bool = False,
    width: int = 100,
    height: int = 40,
) -> str:
    """A tree as at most `height` lines of text of at most `width` characters."""
    lines = [
        f"question: {printable(question['question'])}"[:width],
        f"answer: {printable(str(question['answer']))}"[:width],
        "reward, advantage (- pruned), text; indented below the step it continues"[:width],
    ]
    for node in root.steps():
        depth = len(node.path()) - 1
        advantage = f"{node.advantage:+6.2f}" if node.trained else "     -"
        text = printable(step_text(node, tokenizer))
        line = f"{'  ' * depth}{node.reward:.2f} {advantage} | {text}"[:width]
        if colour and node.trained and node.advantage != 0:
            code = 32 if node.advantage > 0 else 31
            line = f"\033[{code}m{line}\033[0m"
        lines.append(line)
    if len(lines) > height:
        hidden = len(lines) - height + 1
        lines = lines[:height - 1]
        lines.append(f"... {hidden} more steps; --dump-trees FILE writes all of them"[:width])
    return "\n".join(lines)


def print_tree(root: Node, question: dict, tokenizer: object) -> None:
    screen = shutil.get_terminal_size((100, 40))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = render_tree(root, question, tokenizer, colour, screen.columns, screen.lines - 4)
    tqdm.write(text)


# ---------------------------------------------------------------------------- The training loop
class CtrlC:
    """Inside `with`, the first Ctrl-C is only noted: the run ends after its step. The second one
    stops at once."""

    def __enter__(self) -> "CtrlC":
        self.pressed = False
        self.original = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, number: int, frame: object) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self.original)


def open_run(settings: Settings) -> tuple[Path, object]:
    """-> the output folder and its lock, to be kept as long as the run. Raises BadInput."""
    name = settings.out or f"runs/{settings.algo}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(settings.resume or name).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, also after a kill
    except BlockingIOError as error:
        raise BadInput(f"{out}: another process is using this folder") from error
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there ({error})") from error
    taken = (out / "config.json").exists()
    require(
        settings.resume or not taken, f"--out {out}: it holds a run; continue it by --resume {out}"
    )
    if settings.dump_trees:
        dump = Path(settings.dump_trees)
        require(
            settings.resume or not dump.exists(),
            f"--dump-trees {dump}: it is there already; delete it or name another file",
        )
        try:
            open(dump, "a").close()
        except OSError as error:
            raise BadInput(f"--dump-trees: cannot write there ({error})") from error
    return out, lock


def batch_of(questions: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The questions of a step. Every epoch has its own order, made from the seed alone, so that a
    resumed run needs no state for it."""
    batch = []
    for place in range((step - 1) * size, step * size):
        epoch, k = divmod(place, len(questions))
        order = random.Random(f"{seed} {epoch}").sample(range(len(questions)), len(questions))
        batch.append(questions[order[k]])
    return batch


@dataclass
class Run:
    """All that the loop works on."""
    out: Path
    lock: object
    questions: list[dict]
    held_out: list[dict]
    model: torch.nn.Module                  # trained
    sampler: torch.nn.Module                # the same, or its bf16 copy
    reference: torch.nn.Module | None       # the initial model, frozen
    tokenizer: object
    decoding: Decoding
    optimizer: torch.optim.Optimizer
    last: dict                              # the newest metrics


def load_data(settings: Settings) -> tuple[list[dict], list[dict]]:
    """-> training and held-out questions, without their prompts. Raises BadInput."""
    columns = settings.question_column, settings.answer_column
    questions = load_questions(settings.data, *columns)
    if settings.eval_data is not None:
        return questions, load_questions(settings.eval_data, *columns)
    held_out = questions[::5]
    training = [question for k, question in enumerate(questions) if k % 5 != 0]
    return training or questions, held_out


def load_models(
    settings: Settings, weights: str, device: str, dtype: str
) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module | None]:
    """-> the model to train; the one to sample from, in mixed precision a bf16 copy, else the same;
    the reference, None without a KL term: always the run's original --model."""
    exact = torch.float32
    half = torch.bfloat16
    print(f"loading {weights} on {device} in {dtype}", flush=True)
    model = load_model(weights, device, half if dtype == "bfloat16" else exact)
    sampler = load_model(weights, device, half) if dtype == "mixed" else model
    reference = None
    if settings.kl_coef > 0:
        reference = load_model(settings.model, device, exact if dtype == "float32" else half)
        reference.eval().requires_grad_(False)
    if settings.grad_checkpointing:  # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable()
    return model, sampler, reference


def restore(resumed: Path | None, optimizer: torch.optim.Optimizer) -> dict:
    """Optimiser and random numbers of the checkpoint, if there is one -> its newest metrics."""
    if resumed is None:
        return {"step": -1, "tokens_sampled": 0, "skipped": 0}
    state = load_trainer_state(resumed)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["last"]


def set_up(settings: Settings) -> Run:
    """Load everything; what cannot work is refused before anything slow. Raises BadInput."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    tokenizer = load_tokenizer(settings.model)
    config = load_config(settings.model)
    template = load_template(settings.template, tokenizer, config.vocab_size)
    budget = sum(per_level(settings.step_len, settings.branching))
    questions, held_out = load_data(settings)
    limits = (
        template, tokenizer, settings.max_prompt_len, budget, config.max_position_embeddings,
        config.vocab_size,
    )
    questions = fit_prompts(questions, "training", *limits)
    held_out = fit_prompts(held_out[:settings.eval_questions], "held out", *limits)
    length = budget + max(len(question["prompt"]) for question in [*questions, *held_out])

    out, lock = open_run(settings)
    check_resources(config, device, dtype, length, out, settings)
    resumed = newest_checkpoint(out)
    weights = str(resumed or settings.model)
    model, sampler, reference = load_models(settings, weights, device, dtype)
    decoding = make_decoding(model, tokenizer, settings.temperature, settings.max_rows)
    decoding = add_workspace(sampler, decoding, length, settings.compile)
    if decoding.workspace is not None and dtype == "mixed":
        compile_training(model)
        if reference is not None:
            compile_training(reference)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        fused=device == "cuda",  # without a second copy of the weights
    )
    torch.manual_seed(settings.seed)
    last = restore(resumed, optimizer)
    cut_log(out / "metrics.jsonl", last["step"])
    if settings.dump_trees:
        cut_log(Path(settings.dump_trees), last["step"])
    write_config(out, settings)
    return Run(
        out, lock, questions, held_out, model, sampler, reference, tokenizer, decoding, optimizer,
        last,
    )


def run_step(run: Run, step: int, settings: Settings, status: Status) -> dict:
    """Train on one batch -> its row of metrics.jsonl, without an evaluation."""
    batch = batch_of(run.questions, step, settings.questions_per_step, settings.seed)
    decoding = dataclasses.replace(run.decoding, progress=status.tokens)
    metrics, trees = train_step(
        run.model, run.sampler, run.reference, run.optimizer, run.tokenizer, batch, decoding,
        settings, status,
    )
    row = {"step": step, "lr": settings.lr, **metrics}
    row["skipped"] = run.last["skipped"] + 1 if metrics["skipped"] else 0
    row["questions_seen"] = step * len(batch)
    row["tokens_sampled"] = run.last["tokens_sampled"] + metrics["tokens_sampled"]
    if row["skipped"]:
        row["skipped_questions"] = [question["id"] for question in batch]
    if settings.dump_trees:
        append_jsonl(settings.dump_trees, tree_rows(trees, batch, step, run.tokenizer))
    if settings.print_tree and step % settings.print_tree == 0:
        print_tree(trees[0], batch[trees[0].question], run.tokenizer)
    return row


def evaluate_run(run: Run, settings: Settings, status: Status) -> dict[str, float]:
    status.phase("evaluating")
    decoding = dataclasses.replace(run.decoding, progress=status.tokens)
    budget = sum(per_level(settings.step_len, settings.branching))
    return evaluate(
        run.sampler, run.tokenizer, run.held_out, settings.eval_samples, budget, decoding,
        settings.seed,
    )


def log(run: Run, row: dict, steps: int) -> None:
    append_jsonl(run.out / "metrics.jsonl", [row])
    run.last.update(row)
    tqdm.write(step_line(row, steps))


def evaluate_before_training(run: Run, settings: Settings) -> None:
    with tqdm(desc="before training", bar_format="{desc}{postfix}", leave=False) as bar:
        row = {"step": 0, **evaluate_run(run, settings, Status(bar))}
    log(run, row, settings.steps)


def run_steps(run: Run, settings: Settings, ctrl_c: CtrlC) -> int:
    """Train, evaluate, log and save, step by step -> exit status."""
    first = run.last["step"] + 1
    bar = tqdm(
        total=settings.steps, initial=first - 1, desc=settings.algo, smoothing=0.0, leave=False
    )
    with bar:
        status = Status(bar)
        for step in range(first, settings.steps + 1):
            row = run_step(run, step, settings, status)
            if step % settings.eval_every == 0 or step == settings.steps:
                row.update(evaluate_run(run, settings, status))
            log(run, row, settings.steps)
            bar.update()
            interrupted = ctrl_c.pressed  # asked once: what is reported is what is saved
            broken = row["skipped"] >= 3
            ending = step == settings.steps or interrupted or broken
            if step % settings.save_every == 0 or ending:
                status.phase("saving")
                save_checkpoint(
                    run.out, run.model, run.tokenizer, run.optimizer, run.decoding.eos_ids,
                    run.last, settings.keep,
                )
            if broken:
                raise FloatingPointError(
                    f"three steps in a row were not finite; {run.out}/checkpoint-{step} has the "
                    "weights before them: start from it in a new --out, with a lower --lr"
                )
            if interrupted and step < settings.steps:
                tqdm.write(f"stopped; continue with: python treerpo.py --resume {run.out}")
                return 130
    return 0


def train(settings: Settings) -> int:
    """A whole run -> exit status."""
    run = set_up(settings)
    print(f"output: {run.out}; Ctrl-C finishes a step and saves, Ctrl-C twice stops at once")
    with CtrlC() as ctrl_c:
        if run.last["step"] < 0:
            evaluate_before_training(run, settings)
        status = run_steps(run, settings, ctrl_c)
    if status == 0:
        print(closing_lines(run.out, settings.model))
    return status


def closing_lines(out: Path, base: str) -> str:
    """What came out, where it is, and what to type next."""
    rows = read_jsonl(out / "metrics.jsonl")
    first = rows[0]
    last = rows[-1]
    checkpoint = newest_checkpoint(out)
    benchmarks = "" if base == DEMO["model"] else " --benchmarks math500"
    return "\n".join(
        [
            f"held-out {share(first['eval/accuracy'])} at step 0, "
            f"{share(last['eval/accuracy'])} at step {last['step']}; greedy "
            f"{share(first['eval/greedy_accuracy'])} and {share(last['eval/greedy_accuracy'])}",
            f"model: {checkpoint}",
            f"next: python eval.py --model {base} {out}{benchmarks}",
        ]
    )


# ---------------------------------------------------------------------------- Command line
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Dashed names only, lists without brackets, at most 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "_" not in name]
        if action.choices:
            return f"{names[-1]} {'|'.join(action.choices)}"
        return names[-1]

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is argparse.SUPPRESS:
            return action.help
        default = action.default
        if isinstance(default, list):
            default = " ".join(str(number) for number in default)
        return f"{action.help} (default: {default})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for paragraph in text.splitlines():
            lines += textwrap.wrap(paragraph, width, break_on_hyphens=False)
        return "\n".join(lines)


def describe(preset: dict) -> str:
    """{"step_len": [14]} -> --step-len 14"""
    words = []
    for name, value in preset.items():
        numbers = value if isinstance(value, list) else [value]
        words.append(f"--{name.replace('_', '-')} {' '.join(str(n) for n in numbers)}")
    return " ".join(words)


def make_parser() -> HfArgumentParser:
    shown = {name: value for name, value in DEMO.items() if not str(value).startswith(str(HERE))}
    presets = [
        f"Without --model: the bundled model and data with {describe(shown)}",
        f"--algo grpo: {describe(ALGORITHMS['grpo'])}",
        f"--algo gspo: {describe(ALGORITHMS['gspo'])} --clip-eps {SEQUENCE_CLIP_EPS}",
        "--algo treeadv: as grpo, with --leaves and --trees instead of --branching",
        "Exit status: 0 done, 2 bad input, 130 interrupted (after saving), 1 anything else.",
    ]
    description, _, _ = __doc__.partition("\n\n")
    return HfArgumentParser(
        GROUPS,
        prog="treerpo.py",
        usage="python treerpo.py [flags]",
        description=description,
        epilog="\n".join(presets),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def read_flags(argv: list[str] | None) -> dict:
    """The flags that were given, and no others."""
    not_given = object()
    names = [entry.name for entry in dataclasses.fields(Settings)]
    blank = argparse.Namespace(**dict.fromkeys(names, not_given))
    parsed = vars(make_parser().parse_args(argv, blank))
    return {name: value for name, value in parsed.items() if value is not not_given}


def complete_settings(given: dict) -> Settings:
    """Defaults, then the demo's or the algorithm's preset, then the flags that were given."""
    algo = given.get("algo", "treerpo")
    preset = {}
    if "model" not in given:
        preset.update(DEMO)
    preset.update(ALGORITHMS[algo])
    if "model" not in given and algo != "treerpo":
        preset.update(DEMO_WHOLE_ANSWERS)
    if "data" in given:
        preset["eval_data"] = None
    if given.get("ratio", preset.get("ratio")) == "sequence":
        preset["clip_eps"] = SEQUENCE_CLIP_EPS
    return Settings(**{**preset, **given})


# What a resumed run may change: what fits, what is shown and how long, not what is learned.
MAY_CHANGE = [
    "steps", "max_rows", "pack_len", "grad_checkpointing", "compile", "save_every", "keep",
    "print_tree",
]


def dashed(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def resume_settings(given: dict) -> Settings:
    """The settings of the run in --resume, with what may change. Raises BadInput."""
    folder = Path(os.path.abspath(given["resume"]))
    try:
        saved = json.loads((folder / "config.json").read_bytes())
        saved = {**saved, "resume": str(folder), "out": str(folder)}
        settings = Settings(**saved)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"--resume {folder}: not the output folder of a run ({error!r:.90}); give a folder "
            "with config.json in it"
        ) from error
    repeated = make_absolute(Settings(**{**saved, **given}))
    changed = [name for name in given if getattr(repeated, name) != saved[name]]
    fixed = [name for name in changed if name not in [*MAY_CHANGE, "resume"]]
    require(
        not fixed,
        f"--resume: that run has another {dashed(fixed)}; leave it out. "
        f"May change: {dashed(MAY_CHANGE)}",
    )
    require(
        repeated.steps >= settings.steps,
        f"--steps {repeated.steps}: that run has {settings.steps}; give as many or more",
    )
    return dataclasses.replace(settings, **{name: given[name] for name in changed})


def make_absolute(settings: Settings) -> Settings:
    """Paths as seen from everywhere, so that --resume works from another folder."""
    changes = {}
    for name in ("model", "data", "eval_data", "template"):
        value = getattr(settings, name)
        if value not in (None, *TEMPLATES) and os.path.exists(value):
            changes[name] = os.path.abspath(value)
    for name in ("out", "resume", "dump_trees"):
        value = getattr(settings, name)
        if value is not None:
            changes[name] = os.path.abspath(value)
    return dataclasses.replace(settings, **changes)


def write_config(out: Path, settings: Settings) -> None:
    saved = dataclasses.asdict(settings)
    saved.update(out=str(out), resume=None)
    (out / "config.tmp").write_text(json.dumps(saved, indent=1) + "\n")
    (out / "config.tmp").replace(out / "config.json")


def per_level(step_len: list[int], branching: list[int]) -> list[int]:
    """One number for all levels, or one for each -> one for each."""
    if len(step_len) == 1:
        return step_len * len(branching)
    return step_len


def check_effects(settings: Settings, given: dict) -> None:
    """Refuse, by name, a flag that has no effect together with the others. Raises BadInput."""
    algo = settings.algo
    one_level = algo != "treerpo"
    if algo == "treeadv":
        require("branching" not in given, "--branching has no effect on treeadv; use --leaves")
    else:
        for name in ("leaves", "trees", "entropy_threshold"):
            require(
                name not in given,
                f"{dashed([name])} has no effect on {algo}; use --algo treeadv, or --branching",
            )
    name = "leaves" if algo == "treeadv" else "branching"
    widest = settings.leaves if algo == "treeadv" else max(settings.branching)
    require(
        widest > 1,
        f"{dashed([name])} {widest}: one answer has no sibling to be compared with; give 2 or more",
    )
    require(
        not one_level or len(settings.branching) == 1,
        f"--branching: {algo} samples whole answers; give one number, or use --algo treerpo",
    )
    require(
        len(settings.step_len) in (1, len(settings.branching)),
        "--step-len: give one number, or one for each number of --branching",
    )
    require(
        (algo, settings.ratio) != ("gspo", "token"),
        "--ratio token: gspo with ratios of tokens is grpo; use --algo grpo",
    )
    require(
        (algo, settings.ratio) != ("grpo", "sequence"),
        "--ratio sequence: grpo with ratios of sequences is gspo; use --algo gspo",
    )
    require(
        settings.minibatches > 1 or "clip_eps" not in given,
        "--clip-eps has no effect with --minibatches 1, where every ratio is 1",
    )
    require(
        settings.trees <= settings.leaves,
        f"--trees {settings.trees}: it must be at most --leaves, {settings.leaves}",
    )
    require(
        settings.compile != "on" or settings.grad_checkpointing is False
        or choose_dtype(settings.dtype, choose_device(settings.device)) == "mixed",
        "--compile on with --grad-checkpointing needs --dtype mixed",
    )


def check_numbers(settings: Settings) -> None:
    """Raises BadInput."""
    may_be_zero = ("seed", "print_tree", "kl_coef", "entropy_coef", "prune_threshold",
                   "entropy_threshold")
    for entry in dataclasses.fields(Settings):
        value = getattr(settings, entry.name)
        for number in value if isinstance(value, list) else [value]:
            if type(number) not in (int, float):
                continue
            least = 0 if entry.name in may_be_zero else 1e-9
            require(
                least <= number < math.inf or entry.name == "seed",
                f"{dashed([entry.name])} {number}: it must be "
                f"{'0 or more' if least == 0 else 'above 0'}",
            )
    require(
        settings.prune_threshold < 1,
        f"--prune-threshold {settings.prune_threshold}: rewards lie between 0 and 1, so from 1 on "
        "every group is pruned; give less than 1",
    )
    require(abs(settings.seed) < 2**63, f"--seed {settings.seed} has more than 63 bits")


def parse_settings(argv: list[str] | None) -> Settings:
    """Raises BadInput; argparse exits with status 2 by itself."""
    given = read_flags(argv)
    if "resume" in given:
        settings = resume_settings(given)
        check_numbers(settings)
        return settings
    settings = make_absolute(complete_settings(given))
    check_numbers(settings)
    check_effects(settings, given)
    return settings


def escape_unprintable() -> None:
    """A terminal that cannot show a character shows its number; the run goes on."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    escape_unprintable()
    try:
        settings = parse_settings(argv)
        return train(settings)
    except BadInput as error:
        print(f"treerpo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError) as error:
        if "memory" in f"{type(error).__name__} {error}".lower():
            traceback.print_exc()  # first, so that the advice is the last thing on the screen
            print(
                f"treerpo.py: out of memory: lower --max-rows (now {settings.max_rows}) or "
                f"--pack-len (now {settings.pack_len}), or add --grad-checkpointing; then "
                "continue from the last checkpoint with --resume",
                file=sys.stderr,
            )
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
