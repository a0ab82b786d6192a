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
     A = (R - mu) / (mu (1 - mu)) (§3.3, Eq. 4; Eq. 3 divides by the standard deviation instead).
  5. Update: a clipped policy gradient with a KL term (§3.4, Eq. 5) and an entropy bonus (§4)
     trains the tokens of every step whose group was kept.
`train_step` is these five lines in code. A "step" of an answer is one Node; a training step is one
batch of questions, and takes a few optimiser steps. GRPO is the tree of depth 1, with Eq. 3. From
there GSPO (2507.18071) changes the ratio in 5, and TreeAdv (2601.03703) the trees in 1 and the
groups in 3 and 4.

    python treerpo.py                                   # bundled model and task, minutes on a CPU
    python treerpo.py --model Qwen/Qwen2.5-Math-1.5B    # the paper's settings, one CUDA GPU
    python treerpo.py --help                            # every flag, its default and its source
"""
import argparse
import cmath
import dataclasses
import fcntl
import functools
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
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

if __name__ == "__main__" and sys.stderr.isatty():  # the next imports take some seconds
    print("importing torch and transformers", file=sys.stderr, flush=True)

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
    algo: Literal["treerpo", "grpo", "gspo", "treeadv"] = flag(
        "treerpo", "grpo is the paper's baseline [paper §4]; gspo, treeadv: of later papers"
    )
    branching: list[int] = flag([8, 8, 8], "children of a node, one number per level [paper §4]")
    step_len: list[int] = flag(
        [384], "most tokens of a step, one number, or one per level [paper §4]"
    )
    temperature: float = flag(0.6, "of sampling and evaluation [paper §4], and of log-probs [code]")
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
        0.2, "clip range 1 +- this [code]; with sequence ratios 4e-4 [GSPO: 3e-4 down, 4e-4 up]"
    )
    kl_coef: float = flag(0.001, "weight of the KL term against the initial model [paper §3.4]")
    entropy_coef: float = flag(0.001, "weight of the entropy bonus [paper §4]")
    minibatches: int = flag(
        2, "optimiser steps on each batch [paper §4], cut by question [ours]"
    )
    lr: float = flag(1e-6, "learning rate [paper §4], of AdamW and constant [code]")
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
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to run [ours]")


@dataclass
class OutputSettings:
    _argument_group_name = "evaluation and output"
    eval_every: int = flag(20, "steps between evaluations [ours]")
    eval_questions: int = flag(128, "held-out questions used, the first ones [ours]")
    eval_samples: int = flag(8, "k of avg@k [paper §4]")
    save_every: int = flag(50, "steps between checkpoints [ours]")
    keep: int = flag(2, "newest checkpoints kept [ours]")
    print_tree: int = flag(
        0, "print one tree every so many steps; 0: none [ours]", nargs="?", const=1
    )
    dump_trees: str | None = flag(None, "write every node as a JSON line to this file")


GROUPS = [DataSettings, TreeSettings, LearningSettings, SpeedSettings, OutputSettings]


@dataclass
class Settings(OutputSettings, SpeedSettings, LearningSettings, TreeSettings, DataSettings):
    """All settings of a run. train_step and the code around it see them; the functions of the
    algorithm take plain arguments. The bases stand in reverse because fields come last base first.
    """


# complete_settings, near the end, applies these presets in turn: DEMO (without --model),
# ALGORITHMS, DEMO_WHOLE_ANSWERS (DEMO without a tree), SEQUENCE_CLIP_EPS (sequence ratios), given
# flags.

# What --algo NAME changes: whole answers, as long as three steps of 384 tokens, instead of a tree;
# Eq. 3; and GSPO's ratio. TreeAdv takes --leaves and --trees for --branching. All of them prune
# groups whose rewards do not spread, which GRPO and GSPO leave in the mean [ours].
WHOLE_ANSWERS = {"branching": [8], "step_len": [1152], "normalizer": "std"}
ALGORITHMS = {
    "treerpo": {},
    "grpo": WHOLE_ANSWERS,
    "gspo": {**WHOLE_ANSWERS, "ratio": "sequence"},
    "treeadv": WHOLE_ANSWERS,
}
# The ratio of a whole sequence moves far less than a token's. GSPO: 3e-4 down, 4e-4 up; one number
# for both is ours.
SEQUENCE_CLIP_EPS = 4e-4

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

    The paper's Figure 2 as backed-up rewards. Children stand below each other or, in the last two
    levels, in one line; (0 0 1) are the children of the number before them. What has no children is
    a verified leaf:

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
    tokens: list[int]                       # this step's own ids, one at least; its end token, too
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
    """How to sample: exactly from softmax(logits / temperature) over the ids below vocab_size."""
    eos_ids: tuple[int, ...]                # each ends an answer; the first one is also padding
    vocab_size: int                         # ids from here on only pad the embedding matrix
    temperature: float = 0.6                # 0 is greedy
    max_rows: int = 512                     # most sequences of one generate call
    call_len: int = 128                     # a longer step takes several generate calls
    keep_entropies: bool = False            # fill Node.entropies (TreeAdv)
    workspace: "Workspace | None" = None    # a static KV cache (CUDA); None: a growing one
    progress: Callable[[int], None] | None = None  # gets the number of rows at each new token


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


def perturb(logits: Tensor, temperature: float) -> Tensor:
    """logits [R, V] -> scores [R, V] whose argmax is a draw from softmax(logits / temperature), at
    temperature 0 the likeliest id.

    With e ~ Exp(1), independent for every id a, argmax_a logits(a) / T - log e(a) has distribution
    softmax(logits / T): the Gumbel-max trick. The scores here are T times that. It is
    torch.multinomial's draw in fewer passes over [rows, vocabulary].
    """
    if temperature == 0:
        return logits
    log_noise = torch.empty_like(logits).exponential_().log_()
    return torch.sub(logits, log_noise, alpha=temperature, out=log_noise)  # takes no more memory


def token_entropies(logits: Tensor, temperature: float) -> Tensor:
    """[R, V] -> [R]: the entropies of softmax(logits / temperature), in nats."""
    probs = (logits.float() / temperature).softmax(-1)
    return torch.special.entr(probs).sum(-1)


class DrawToken:
    """The only logits processor: makes `generate`, which takes the argmax, draw from the policy.
    decode_ahead, the loop for a static cache, draws by itself and calls `record` alone."""

    def __init__(self, decoding: Decoding, n_rows: int) -> None:
        self.decoding = decoding
        self.n_rows = n_rows                # rows behind these only fill up a static cache
        self.entropies: list[Tensor] = []   # one [n_rows] per token
        self.logits: Tensor | None = None   # of the newest token, checked for NaN at the end

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        logits = logits[:, :self.decoding.vocab_size]
        self.record(logits)
        return perturb(logits, self.decoding.temperature)

    def record(self, logits: Tensor) -> None:
        """Keep the logits for the check, tell the progress, keep the entropies."""
        self.logits = logits
        if self.decoding.progress is not None:
            self.decoding.progress(self.n_rows)
        if self.decoding.keep_entropies:
            self.entropies.append(token_entropies(logits, self.decoding.temperature))


def open_rows(
    rows: Rows, index: list[int], new_tokens: int, workspace: "Workspace | None"
) -> tuple[Tensor, Tensor, Cache]:
    """rows[index] as `generate` takes them: ids, mask and a cache that holds copies of their keys
    and values, the workspace's or a new one."""
    if workspace is not None:
        return workspace.open_rows(rows, index, new_tokens)
    picked = select_rows(rows, index)
    return picked.ids, picked.mask, DynamicCache(picked.kv)


def clean_config(new_tokens: int, decoding: Decoding) -> GenerationConfig:
    """All that `generate` needs to know; DrawToken makes its arg max a draw."""
    compile_config = None
    if decoding.workspace is not None:
        compile_config = decoding.workspace.compile_config
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=list(decoding.eos_ids),
        pad_token_id=decoding.eos_ids[0],
        compile_config=compile_config,
    )


def extend_node(node: Node, tokens: list[int], eos_ids: Sequence[int]) -> None:
    """Add these tokens to a step, up to the first end token; what follows that does not count."""
    ends = [tokens.index(eos_id) for eos_id in eos_ids if eos_id in tokens]
    if ends:
        node.done = True
        tokens = tokens[:min(ends) + 1]
    node.tokens += tokens


def generate_tokens(
    model: torch.nn.Module,
    nodes: list[Node],
    rows: Rows,
    index: list[int],
    new_tokens: int,
    decoding: Decoding,
) -> Rows:
    """One call of HF generate: nodes[k] continues row index[k] by up to new_tokens tokens.

    -> the rows after it: row k is that of nodes[k]; behind them may come filler rows. A finished
    row is good for nothing more: what follows its end token is not masked. kv are views of
    the cache, which the next call on a static cache overwrites. Raises FloatingPointError if the
    logits are not numbers.
    """
    ids, mask, cache = open_rows(rows, index, new_tokens, decoding.workspace)
    draw_token = DrawToken(decoding, len(nodes))
    loop = None if decoding.workspace is None else decode_ahead  # None: the one inside generate
    # Swapped in, not passed to generate: what a passed config leaves unset (top_k, penalties, ...)
    # generate takes from model.generation_config, the checkpoint's own.
    original = model.generation_config
    model.generation_config = clean_config(new_tokens, decoding)
    try:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, logits_processor=[draw_token],
            custom_generate=loop,
        )
    finally:
        model.generation_config = original
    if draw_token.logits.isnan().any():  # the last ones: a NaN in the cache spoils all later ones
        raise FloatingPointError("the model's logits are not numbers; are its weights damaged?")
    new = out[:, ids.shape[1]:]
    for node, tokens in zip(nodes, new.tolist()):
        extend_node(node, tokens, decoding.eos_ids)
    if decoding.keep_entropies:
        entropies = torch.stack(draw_token.entropies, dim=1).tolist()
        for node, row in zip(nodes, entropies):
            added = len(node.tokens) - len(node.entropies)
            node.entropies += row[:added]
    past = out.shape[1] - 1  # the newest token has not been fed yet (see prefill)
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
        # Row k is now that of nodes[k], so the unfinished nodes' numbers are those of their rows.
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
        after, index = take_step(model, children, rows, chunk, step_lens[0], decoding)
        unfinished = [child for child in children if not child.done]
        if unfinished and len(branching) > 1:
            unfinished_rows = select_rows(after, index)  # copies: the next call may overwrite them
            del after  # its memory is needed below
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
    step_of: Tensor                         # [M], the number of its step, 0 to S - 1
    advantages: Tensor                      # [S]
    old_logps: Tensor | None = None         # [M], from before the first optimiser step
    ref_logps: Tensor | None = None         # [M], of the initial model


def leave_numbers(nodes: list[Node]) -> list[int]:
    """Nodes numbered depth-first -> for each node k the first number behind its descendants: these
    are the nodes from k + 1 to leave[k] - 1."""
    number = {node: k for k, node in enumerate(nodes)}
    leave = [k + 1 for k in range(len(nodes))]
    for k in reversed(range(len(nodes))):
        if nodes[k].parent is not None:
            parent = number[nodes[k].parent]
            leave[parent] = max(leave[parent], leave[k])
    return leave


def pack_row(pack: dict[Node, bool], device: torch.device, padded: bool = False) -> PackedRow:
    """A pack -> its tensors. padded: T is a power of two, so that compiled code sees few lengths;
    the padding belongs to one more node, which no other token may look at."""
    nodes = list(pack)
    leave = leave_numbers(nodes)
    ids = []
    positions = []
    owners = []       # of every token, the number of its node
    last_column = {}  # of every node, the column of its last token
    predictors = []
    targets = []
    step_of = []
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
            # A step's first token is predicted by the last one of its parent.
            predictors += [last_column[node.parent], *columns[:-1]]
            targets += node.tokens
            step_of += [len(advantages)] * len(node.tokens)
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
        step_of=torch.tensor(step_of, device=device),
        advantages=torch.tensor(advantages, device=device),
    )


def may_look(enter: Tensor, leave: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """Whether the token in column `at` may see the one in column `to`: if `to` does not stand
    behind `at`, and its node is the node of `at` or an ancestor of it. As nodes stand depth-first,
    those are the ones before `at` whose descendants have not all passed."""
    return (to <= at) & (enter[at] < leave[to])


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
    vocab_size: int,
    max_logits: int = 2**25,
) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of the scored tokens and entropies [M] of the distributions they are scored
    under, softmax(logits / temperature) over the first vocab_size ids. Float32, nats.

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
        logits = model.get_output_embeddings()(hidden)[:, :vocab_size].float() / temperature
        log_probs = logits.log_softmax(-1)
        logps = log_probs.gather(1, targets[:, None])[:, 0]
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return logps, entropies

    chunk = max(1, max_logits // vocab_size)
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
    step_of: Tensor,
    advantages: Tensor,
    n_tokens: int,
    n_steps: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """What a pack of M tokens adds to the loss of a mini-batch: n_tokens tokens in n_steps steps.

        (1 / n_tokens) sum_t [ -min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)
                               + kl_coef k3_t - entropy_coef H_t ]

    A is the advantage of the token's step; r_t = pi / pi_old; k3 = exp(d) - d - 1 with
    d = log pi_ref - log pi, clamped to +-10. The loss is the mean over all tokens [code]; Eq. 5
    takes the mean over answers of their means. With ratio "sequence" (GSPO, 2507.18071) a
    step has one ratio exp(mean_t log r_t) and the min term is the mean over the n_steps steps; KL
    and entropy stay means over tokens.

    logps, old_logps, ref_logps (None: no KL), entropies, step_of: [M]; advantages: [S].
    -> loss; [tokens (sequence: steps) that the clip changed, sum of k3, sum of H], no gradient.
    Raises ValueError for an unknown ratio.
    """
    log_ratio = logps - old_logps
    advantages = advantages.to(logps.dtype)
    if ratio == "token":
        n_units = n_tokens
        advantages = advantages[step_of]
    elif ratio == "sequence":
        n_units = n_steps
        zeros = torch.zeros_like(advantages)
        lengths = zeros.index_add(0, step_of, torch.ones_like(logps))
        log_ratio = zeros.index_add(0, step_of, log_ratio) / lengths
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
    """Cut a batch into mini-batches [ours]: the questions that have trained steps, dealt out in
    turn to n_parts parts from the one with most trained tokens on, so that the first part is the
    largest; fewer parts if there are fewer questions."""
    sizes = []  # (trained tokens, question)
    forests = by_question(trees)
    for question, forest in forests.items():
        trained = [node for root in forest for node in root.walk() if node.trained]
        if trained:
            sizes.append((sum(len(node.tokens) for node in trained), question))
    sizes.sort(key=lambda entry: -entry[0])
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
    vocab_size: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
    progress: Callable[[int], None] = lambda tokens: None,
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
    # Autocast keeps its bf16 copies of the weights to the end of its block: one block for all rows.
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        for row in rows:
            logps, entropies = token_logps(model, row, temperature, vocab_size)
            # None in the first mini-batch, whose ratios are 1.
            old_logps = logps.detach() if row.old_logps is None else row.old_logps
            loss, statistics = policy_loss(
                logps, old_logps, row.ref_logps, entropies, row.step_of, row.advantages,
                batch_tokens, batch_steps, ratio, clip_eps, kl_coef, entropy_coef,
            )
            with torch.autocast(device, enabled=False):  # which is for forward passes only
                loss.backward()
            total_loss += loss.detach()
            totals += statistics
            progress(len(row.targets))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # [code]
    finite = math.isfinite(total_loss + grad_norm)  # waits for the device, once a step
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    clipped, kl_sum, entropy_sum = totals.tolist()
    return {
        "grad_norm": grad_norm.item() if finite else None,
        "clip_ratio": clipped / (batch_tokens if ratio == "token" else batch_steps),
        "kl_sum": kl_sum,
        "entropy_sum": entropy_sum,
        "tokens": batch_tokens,
    }


def add_fixed_logps(
    row: PackedRow,
    old_model: torch.nn.Module | None,
    reference: torch.nn.Module | None,
    temperature: float,
    vocab_size: int,
) -> None:
    """Fill in the log-probs that stay fixed while the policy moves; None leaves them out."""
    if old_model is not None:
        row.old_logps, _ = token_logps(old_model, row, temperature, vocab_size)
    if reference is not None:
        row.ref_logps, _ = token_logps(reference, row, temperature, vocab_size)


def set_update_mode(model: torch.nn.Module) -> None:
    """Evaluation mode (no dropout), unless gradient checkpointing needs training mode to work."""
    model.train(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))


def update_policy(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    trees: list[Node],
    minibatches: int,
    pack_len: int,
    mixed: bool,
    temperature: float,
    vocab_size: int,
    ratio: str,
    clip_eps: float,
    kl_coef: float,
    entropy_coef: float,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float | bool | None]:
    """One optimiser step for each mini-batch of these trees (§4) -> the metrics of the batch.

    Old and reference log-probs are taken before the first optimiser step, and not from sampling,
    whose rounding is another. The first mini-batch needs no pass for the old ones: the policy has
    not moved yet, so its ratios are 1 and it clips nothing. clip_ratio and grad_norm are those of
    the last mini-batch. progress is called with the tokens of each row, once before the optimiser
    steps and once in them.
    """
    set_update_mode(model)
    padded = model.config._attn_implementation == "flex_attention"
    batches = []
    for part in split_by_question(trees, minibatches):
        packs = pack_nodes(part, pack_len)
        batches.append([pack_row(pack, model.device, padded) for pack in packs])
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        for number, rows in enumerate(batches):
            old_model = model if number > 0 else None
            for row in rows:
                add_fixed_logps(row, old_model, reference, temperature, vocab_size)
                progress(len(row.targets))
    updates = []
    for rows in batches:
        update = optimizer_step(
            model, optimizer, rows, mixed, temperature, vocab_size, ratio, clip_eps, kl_coef,
            entropy_coef, progress,
        )
        updates.append(update)
    if not updates:  # every group was pruned
        return {"grad_norm": 0.0, "clip_ratio": 0.0, "kl": 0.0, "entropy": 0.0, "skipped": False}
    made = [update for update in updates if update["grad_norm"] is not None]
    trained_tokens = max(1, sum(update["tokens"] for update in made))
    return {
        "grad_norm": updates[-1]["grad_norm"],
        "clip_ratio": updates[-1]["clip_ratio"],
        "kl": sum(update["kl_sum"] for update in made) / trained_tokens,
        "entropy": sum(update["entropy_sum"] for update in made) / trained_tokens,
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

    # 1. Grow.
    start = time.perf_counter()
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
        model,
        reference,
        optimizer,
        trees,
        minibatches=settings.minibatches,
        pack_len=settings.pack_len,
        mixed=mixed,
        temperature=settings.temperature,
        vocab_size=decoding.vocab_size,
        ratio=settings.ratio,
        clip_eps=settings.clip_eps,
        kl_coef=settings.kl_coef,
        entropy_coef=settings.entropy_coef,
        progress=status.tokens,
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
# round of forks, positions of highest entropy, the plain mean, pruning) are ours.
def pick_forks(rollouts: list[Node], n_forks: int, threshold: float) -> list[list[int]]:
    """The up to n_forks positions of highest entropy above the threshold (nats) in these answers to
    one question -> for every answer the sorted positions whose token a fork draws once more."""
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
    """Cut an answer before each of these positions -> (root, parents): the answer as a new tree,
    prompt - step - step ..., and for each position the node that ends there. A fork at the position
    becomes a second child of that node, which for position 0 is the root. Five tokens t cut at
    [0, 3] give the tree root - t[:3] - t[3:] and the parents [root, t[:3]]."""
    prompt = rollout.parent
    root = Node(prompt.tokens, question=prompt.question)
    node = root
    parents = []
    start = 0
    for end in [*forks, len(rollout.tokens)]:
        if end > start:  # else a fork at position 0, whose parent is the root
            entropies = rollout.entropies[start:end]
            node = Node(rollout.tokens[start:end], node, entropies=entropies)
        parents.append(node)
        start = end
    node.done = rollout.done
    return root, parents[:-1]  # the last one is the end of the answer


def continue_forks(
    model: torch.nn.Module, parents: list[Node], budgets: list[int], decoding: Decoding
) -> None:
    """Sample one more ending below each of these nodes, of up to its budget of tokens: all by one
    sample_trees with the largest budget, as prompts of their own, then cut."""
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
    # Here a prompt is a root Node; its children are the n_trees first answers.
    for prompt in sample_trees(model, prompts, [n_trees], [budget], decoding):
        forks = pick_forks(prompt.children, n_leaves - n_trees, threshold)
        for rollout, positions in zip(prompt.children, forks):
            root, fork_parents = split_rollout(rollout, positions)
            roots.append(root)
            parents += fork_parents
            budgets += [budget - position for position in positions]
        n_forks = sum(len(positions) for positions in forks)
        for _ in range(n_leaves - n_trees - n_forks):  # a fresh answer is a fork of a bare prompt
            root = Node(prompt.tokens, question=prompt.question)
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
# transformers compiles the decoding step, which is then replayed as a CUDA graph.
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
    The stock function, once compiled, copies keys and values for each query head; prompts still
    take it.

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


def draw_ids(logits: Tensor, n_rows: int, vocab_size: int, temperature: float) -> Tensor:
    """[B, 1, V] of any dtype -> [n_rows]: DrawToken and the argmax of `generate` as one function,
    of which the compiler makes one kernel. It cuts the logits itself: given a part of them, the
    compiler would make a graph for a part and another one for the whole."""
    logits = logits[:n_rows, -1, :vocab_size].float()
    return perturb(logits, temperature).argmax(-1)


def decode_ahead(
    model: torch.nn.Module,
    ids: Tensor,
    logits_processor: list[DrawToken],
    stopping_criteria: object,
    generation_config: GenerationConfig,
    **model_inputs: object,
) -> Tensor:
    """The loop inside `generate`, once more, for a static cache: ids [R, T] -> [R, T + new].

    `generate` waits for the GPU after each token, to ask whether all rows have ended. This loop
    asks seldom, so that the CPU prepares a token while the GPU still computes earlier ones. What a
    row gets behind its end token is cut off later. Of the library's criteria for stopping, the two
    that are set here, length and end tokens, are in the loop itself.
    """
    draw_token = logits_processor[0]
    n_rows = draw_token.n_rows
    decoding = draw_token.decoding
    vocab_size = decoding.vocab_size
    workspace = decoding.workspace
    forward = model
    if generation_config.compile_config is not None:
        forward = model.get_compiled_call(generation_config.compile_config)
    eos_ids = torch.tensor(generation_config.eos_token_id, device=ids.device)
    tokens = torch.full_like(ids[:, 0], decoding.eos_ids[0])  # what filler rows get each time
    ended = torch.zeros(n_rows, dtype=torch.bool, device=ids.device)
    for count in range(1, generation_config.max_new_tokens + 1):
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_inputs)
        output = forward(**inputs, return_dict=True)
        model_inputs = model._update_model_kwargs_for_generation(output, model_inputs)
        draw_token.record(output.logits[:n_rows, -1, :vocab_size])
        tokens[:n_rows] = workspace.draw_ids(
            output.logits, n_rows, vocab_size, decoding.temperature
        )
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens[:n_rows], eos_ids)
        if count % workspace.check_every == 0 and ended.all():
            break
    return ids


def set_up_compiler() -> None:
    """What torch.compile needs to know about these models, in this whole process."""
    # Numbers such as a layer's epsilon never change. As inputs of the graph they would cost time at
    # each token, and more than double the compilation, which would make code for the CPU for them.
    torch._dynamo.config.specialize_float = True
    # Each shape of the static cache has a CUDA graph; from the ninth one on there is a warning.
    torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None


def try_update(model: torch.nn.Module) -> None:
    """All passes that an update makes, with a tree of three tokens."""
    step = Node([0, 0], Node([0]), trained=True)
    pack = pack_nodes([step.parent], 3)[0]
    row = pack_row(pack, model.device, padded=True)
    set_update_mode(model)
    with torch.autocast(model.device.type, torch.bfloat16):
        with torch.no_grad():
            token_logps(model, row, 1.0, model.config.vocab_size)
        if any(weight.requires_grad for weight in model.parameters()):  # not the reference's
            logps, _ = token_logps(model, row, 1.0, model.config.vocab_size)
            logps.sum().backward()
    model.zero_grad()


def compile_training(model: torch.nn.Module, mode: str) -> None:
    """Make the update faster: attention leaves out the blocks that the ancestor mask empties, and
    each layer's small operations are fused. If the compiler fails on a trial, mode "auto" undoes
    this and prints a line; mode "on" raises BadInput."""
    set_up_compiler()
    layers = model.get_decoder().layers
    model.set_attn_implementation("flex_attention")
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        try_update(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler shows in many ways
        require(mode == "auto", f"--compile on: the compiler fails ({one_line(error)})")
        model.set_attn_implementation("sdpa")
        for layer in layers:
            layer._compiled_call_impl = None
        model.zero_grad()
        print(f"cannot compile the update ({one_line(error)}); it goes on about 1.2 times slower")


class Workspace:
    """The KV cache of every `generate` call on a GPU: two blocks of memory, keys and values, for
    each layer. They are never freed, because a CUDA graph is bound to addresses and shapes.

    A block has room for max_rows x length tokens. Each call views its start in a shape [B, H_kv, T,
    D] that fits the call, one of a few: B a multiple of 64 or the most that fits, T a multiple of
    256. So a long prompt lowers B for its own calls only; it needs no larger block.
    """
    padding = 1      # `generate` drops a mask without padding, and would compile a second time
    row_multiple = 64
    column_multiple = 256
    check_every = 16  # tokens, see decode_ahead

    def __init__(self, max_rows: int, length: int, compile_config: CompileConfig | None) -> None:
        self.max_rows = max_rows
        # In tokens over all rows. One row may be twice as long: TreeAdv continues a late fork,
        # whose prompt is nearly a whole answer, together with an early one, which may grow by as
        # much.
        self.capacity = max(2, max_rows) * self.round_up(length)
        self.compile_config = compile_config
        self.draw_ids = draw_ids
        if compile_config is not None:
            self.draw_ids = torch.compile(draw_ids, dynamic=True, backend=compile_config.backend)
        self.blocks: list[tuple[Tensor, Tensor]] = []       # keys, values of every layer
        self.caches: dict[tuple[int, int], Cache] = {}  # by shape (B, T)

    def round_up(self, length: int) -> int:
        return math.ceil(length / self.column_multiple) * self.column_multiple

    def most_rows(self, length: int) -> int:
        """How many sequences of this length fit."""
        return max(1, min(self.max_rows, self.capacity // self.round_up(length)))

    def open_rows(
        self, rows: Rows, index: list[int], new_tokens: int
    ) -> tuple[Tensor, Tensor, Cache]:
        """Copy these rows into the block -> ids, mask and the cache for `generate`. Copies of the
        last row fill up the shape. All rows fit: `grow` sends at most most_rows of the length
        that they can have at the end of the step."""
        past = rows.ids.shape[1] - 1
        length = self.round_up(past + new_tokens)
        batch = math.ceil(len(index) / self.row_multiple) * self.row_multiple
        batch = min(batch, self.most_rows(length))
        cache = self.cache_of_shape(rows.kv, batch, length)
        filler = [index[-1]] * (batch - len(index))
        picked = torch.tensor(index + filler, device=rows.ids.device)
        for layer, (keys, values) in zip(cache.layers, rows.kv):
            # keys may lie in this very block; indexing copies them before they are written.
            layer.keys[:, :, :past] = keys[picked]
            layer.values[:, :, :past] = values[picked]
            layer.cumulative_length.fill_(past)
        return rows.ids[picked], rows.mask[picked], cache

    def cache_of_shape(self, kv: list[tuple[Tensor, Tensor]], batch: int, length: int) -> Cache:
        """The blocks viewed as a cache of this shape, made once for each shape. Of kv only heads,
        widths and dtypes count; open_rows copies the contents."""
        if not self.blocks:
            for keys, values in kv:
                # Zeros: what is masked is multiplied by 0, so it must be finite.
                self.blocks.append((self.new_block(keys), self.new_block(values)))
        if (batch, length) not in self.caches:
            layers = []
            for blocks, tensors in zip(self.blocks, kv):
                keys = self.view(blocks[0], tensors[0], batch, length)
                values = self.view(blocks[1], tensors[1], batch, length)
                layers.append(self.make_layer(keys, values))
            self.caches[batch, length] = Cache(layers=layers)
        return self.caches[batch, length]

    def make_layer(self, keys: Tensor, values: Tensor) -> StaticLayer:
        """A layer of transformers' static cache in this memory, where it would take its own."""
        layer = StaticLayer(keys.shape[2])
        layer.keys = keys
        layer.values = values
        layer.cumulative_length = layer.cumulative_length.to(keys.device)
        layer.dtype = keys.dtype
        layer.device = keys.device
        layer.is_initialized = True
        # Without a static address there is no CUDA graph, as the step writes to its inputs.
        torch._dynamo.mark_static_address(layer.cumulative_length)
        for tensor in (keys, values):
            torch._dynamo.mark_static_address(tensor)
            torch._dynamo.mark_static(tensor, [1, 3])  # heads and width never change
        return layer

    def new_block(self, tensor: Tensor) -> Tensor:
        _, n_heads, _, width = tensor.shape
        return tensor.new_zeros(self.capacity * n_heads * width)

    def view(self, block: Tensor, like: Tensor, batch: int, length: int) -> Tensor:
        _, n_heads, _, width = like.shape
        size = batch * n_heads * length * width
        return block[:size].view(batch, n_heads, length, width)


# ------------------------------------------------------------------------ Answer verifier
# An answer goes through four steps: extract the box, normalise its spelling, parse it to a tree,
# compare two trees. Values are exact rational numbers wherever that is possible; formulas with
# variables are compared at test points. All work is bounded before it is done, so that nothing a
# model writes can stop the training: no eval, no timeout. Precision comes before recall: what
# cannot be read equals only the same text.

MAX_CHARS = 400    # longer answers are compared as text
MAX_DEPTH = 25     # nested brackets
MAX_BITS = 32_768  # of a numerator or denominator: 2017^{2017} is exact, 9^{9^9} is not computed
MAX_ITEMS = 60     # of a list
MAX_BOX = 20_000   # characters of a box


class Unreadable(Exception):
    """The text has no meaning here, or the value is undefined or too large."""


# -- Step 1: extract the box

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
# What stands between two boxes of a list: }$, $ and } \text{ or } count.
JOINT = re.compile(r"\}[\s$]*(?:,|;|,? *(?:and|or)|\\text *\{ *(?:and|or) *\})[\s$]*$")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...}, \fbox{...} or \boxed 5. [ours]

    None without a box or if the last one is not closed. An empty box behind another one only
    mentions the word, as in "\boxed{5}, inside \boxed{} as asked": it is passed over. Boxes with
    nothing but a comma or "and" between them are a list: "\boxed{5} and \boxed{6}" is 5, 6.
    """
    start, content = last_box(text, len(text))
    for _ in range(5):
        if content is None or content.strip():
            break
        start, earlier = last_box(text, start)
        if earlier is None:
            break
        content = earlier
    if not content:
        return content
    return ", ".join([*boxes_before(text, start), content])


def boxes_before(text: str, start: int) -> list[str]:
    """Contents of the boxes that are listed directly before the one at `start`."""
    contents = []
    while len(contents) < MAX_ITEMS:
        if not JOINT.search(text, max(0, start - 40), start):
            break
        start, content = last_box(text, start)
        if not content:
            break
        contents.insert(0, content)
    return contents


def last_box(text: str, end: int) -> tuple[int, str | None]:
    """Where the last box before `end` starts, and its content (None: no box, or not closed)."""
    start = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
    box = BOX.match(text, start) if start >= 0 else None
    return (start, read_box(text, box.end())) if box else (0, None)


def read_box(text: str, start: int) -> str | None:
    """Content of the box whose opening brace, or whose single word, is at `start`."""
    if text[start:start + 1] != "{":
        word = re.compile(r"[^\s{}$\\]+").match(text, start)
        return word[0] if word else None
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + MAX_BOX):
        if brace[0] == "{":
            depth += 1
        if brace[0] == "}":
            depth -= 1
        if depth == 0:
            return text[start + 1:brace.start()]
    return None


# -- Step 2: normalise (spellings of one thing become one spelling)

# LaTeX commands and single characters with one meaning; `→` stands before the common spelling.
SPELLINGS = r"""
    \le \leq \leqslant <= =< ⩽ → ≤      \ge \geq \geqslant >= ⩾ → ≥     \ne \neq != → ≠
    \lt → <                             \gt → >                         \in → ∈
    \cup \bigcup → ∪                    \setminus \backslash → ∖        \pm +- → ±
    \cdot \ast · ⋅ ∙ → *                \times → ×                      \mp → ∓
    \div ÷ → /                          − – — \minus → -                ** → ^
    \infty \infin → ∞                   \emptyset \varnothing \oslash → ∅
    \pi → π                             \mathbb{R} \R ℝ → \reals        \circ \degree \degrees → °
    \lvert \rvert \vert \mid → |        \langle → (                     \rangle → )
    \lbrace → \{    \rbrace → \}        \lbrack → [    \rbrack → ]      \prime ′ ’ → '
    \dfrac \tfrac \cfrac → \frac        \dbinom \tbinom → \binom        √ → \sqrt
    \varphi → \phi                      \varepsilon → \epsilon          \vartheta → \theta
    \ldots \cdots … ... → \dots        \approx \simeq → ≈               \equiv → ≡
    \overrightarrow → \vec              \arctg → \arctan                \lg → \log
    \tg → \tan                          \ctg → \cot                     ¢ → "cents"
    \colon → :     ½ → \frac{1}{2}     、 → ,    。 → .
    α → \alpha      β → \beta           θ → \theta                      λ → \lambda
"""


def read_spellings(table: str) -> dict[str, str]:
    """{spelling: common spelling} of a table of `a b → c`."""
    meaning = {}
    waiting = []
    words = iter(table.split())
    for word in words:
        if word == "→":
            common = next(words)
            meaning.update(dict.fromkeys(waiting, common))
            waiting = []
        else:
            waiting.append(word)
    return meaning


COMMON_SPELLING = read_spellings(SPELLINGS)
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # （１，２） is (1,2)
SPACES = dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000"), " ")
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))  # dropped
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
SPELLING = re.compile(r"\\mathbb\{R\}|\\[A-Za-z]+|\.\.\.|[<>!=]=|=<|\*\*|\+-|[^\x00-\x7f]")

# Units: the common name, then its other names. A plural s is dropped before a look-up.
UNIT_TABLE = """
    mm millimeter | cm centimeter centimetre | dm decimeter | m meter metre | km kilometer kilometre
    in inch inche | ft foot feet | yd yard | mi mile | mi/hour mph | acre | nm | Angstrom angstrom
    AU | mg | g gram | kg kilogram | lb pound | oz ounce | ton | mol mole | mL ml | L l liter litre
    gallon gal | cup | ms | s sec second | min minute | hour h hr | am | pm | noon | midnight | day
    week | month | year yr | N newton | J joule | kJ | eV | keV | MeV | GeV | erg | W watt | kW
    V volt | A ampere amp | ohm | Hz hertz | kHz | MHz | GHz | Pa pascal | kPa | atm | K kelvin
    C coulomb celsius | F fahrenheit | degree deg | arcsecond | rad radian
    percent pct percentage | cent | dollar USD | euro | money
    unit | point | piece | way | people person | children child | men man
"""


def read_units(table: str) -> dict[str, str]:
    """{name: common name} of every unit."""
    common = {}
    for row in table.replace("\n", "|").split("|"):
        for name in row.split():
            common[name] = row.split()[0]
    return common


UNITS = read_units(UNIT_TABLE)

NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
""".split()

# Words that change the value they stand behind: "7 squared" and "5 million" hold no unit.
MODIFIERS = {"half", "third", "quarter", *NUMBER_WORDS} | set("""
    squared cubed factorial inverse prime plus minus time over less more than fewer by is was not
    no or and mod root power sum multiple opposite negative repeat double triple score to the wrong
    maybe perhaps approximately about except but twice thrice at reciprocal never
    hundred thousand million billion trillion dozen halve
    fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth digit
""".split())


def singular(word: str) -> str:
    """Without the plural s, and in small letters unless the table knows the word as it is."""
    if word in UNITS:
        return word
    word = word.lower()
    return word if word.endswith(("ss", "us", "is")) else word.removesuffix("s")


def unit_name(phrase: str) -> str | None:
    """Common name of a unit: "centimeters" -> cm, "square feet" -> ft^2, "red marbles" as it is.

    None where the phrase is no unit: a unit stands in the table or is a noun in the plural.
    """
    words = phrase.replace(".", "").split()
    names = [singular(word) for word in words]
    if not names or MODIFIERS.intersection(names + words):
        return None
    if "of" in words[1:-1]:  # cups of flour
        return unit_name(phrase[:phrase.index(" of ")])
    before, per, after = phrase.rpartition("per ")
    if per:
        above = unit_name(before) if before.strip() else ""
        below = unit_name(after)
        return None if above is None or below is None else f"{above}/{below}"
    if names[-1] in UNITS:
        unit = UNITS[names[-1]]
        first_word = " ".join(names[:-1])
        powers = {"": "", "square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
        return unit + powers[first_word] if first_word in powers else " ".join(names)
    is_noun = phrase.islower() and len(words[-1]) > 2
    is_plural = names[-1] != words[-1]
    return " ".join(names) if is_noun and is_plural else None


VERTICAL = re.compile(
    r"(?P<open>(?:\\left *)?(?:[(\[]|\\\{) *)?"
    r"\\begin *\{(?P<name>[bBp]?matrix|smallmatrix|array|cases|aligned)\} *(?:\{[lcr| ]*\})?"
    r"(?P<body>.*?)\\end *\{(?P=name)\}"
    r"(?P<close> *(?:\\right *)?[)\].])?",
    re.DOTALL,
)


def write_rows(found: re.Match) -> str:
    r"""Every kind of matrix: \begin{bmatrix}1&2\\[4pt]3&4\end{bmatrix} -> \matrix(1&2;3&4).

    Behind a brace: \begin{cases}x=1\\y=2\end{cases} -> x=1,y=2, and with conditions
    \begin{cases}1 & x>0\\0 & x<0\end{cases} -> \cases(1&x>0;0&x<0).
    """
    body = found["body"].replace(r"\hline", "")
    rows = [row.strip() for row in re.split(r"\\\\(?: *\[[^\]]*\])?", body)]
    rows = [row for row in rows if row]
    opening = found["open"] or ""
    if found["name"] == "aligned":  # x&=1\\y&=2 -> x=1,y=2
        return ",".join(rows).replace("&", "")
    if found["name"] == "cases" or opening.strip().endswith("{"):
        if "&" not in body:
            return ",".join(rows)
        return rf"\cases({';'.join(map(write_case, rows))})"
    matrix = rf"\matrix({';'.join(rows)})"
    if opening and found["close"]:
        return matrix
    return opening + matrix + (found["close"] or "")


def write_case(row: str) -> str:
    r"""x^2, & \text{if } x>0, -> x^2&x>0."""
    value, _, condition = row.partition("&")
    condition = re.sub(r"\\text *\{ *(?:if|for|when) *\}|\b(?:if|for|when)\b", "", condition)
    return value.strip(" ,") + "&" + condition.strip(" ,.")


TEXT_COMMAND = (
    r"\\(?:text(?:rm|bf|it|sf|normal|up)?|math(?:rm|bf|it|sf|normal)|mbox|hbox|operatorname)\*? *"
)
FUNCTIONS = set(
    "arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh sin cos tan cot sec csc "
    "ln log exp cis sqrt max min gcd lcm floor ceil pi".split()
)
GLUED_UNITS = {"cm", "mm", "km", "kg", "ft", "mph", "Hz"}  # 5cm is 5 "cm", but 5m is a product


def quote_text(found: re.Match) -> str:
    r"""\text{no solution} -> "no solution", \text{4:30 p.m.} -> 4:30 "p.m"., \text{1A3} -> 1A3."""
    content = found[1].strip()
    if content in FUNCTIONS and content not in UNITS:
        return "\\" + content
    if re.fullmatch(r"[0-9A-Z]*\d[0-9A-Z]*", content):
        return content
    return re.sub(r"[A-Za-z]+(?:[ .'-]+[A-Za-z]+)*", r' "\g<0>"', content)


# Up to three words in front of a formula, as in "Vertex $(2,-3)$; axis $x=2$".
HEADING = re.compile(r"(?P<comma>[,;]? *)(?P<words>[A-Za-z]+(?:[ -][A-Za-z]+){0,2}) *:? *")
NO_HEADING = set("and or for where with if when all any every but than".split())


def quote_outside(text: str) -> str:
    """Words outside of $...$ are text: $x=k$ for integers $k$. Before it they are a heading:
    Vertex $(2,-3)$ -> "Vertex": $(2,-3)$."""
    parts = re.split(r"(?<!\\)\$", text)
    if len(parts) == 1 or len(parts) % 2 == 0:
        return text
    last = len(parts) - 1
    for k in range(0, len(parts), 2):  # every other one lies outside
        heading = HEADING.fullmatch(parts[k])
        if heading and k < last and NO_HEADING.isdisjoint(heading["words"].split()):
            words = heading["words"].removeprefix("The ").removesuffix(" is")
            colon = "" if parts[k + 1].lstrip().startswith("=") else ":"
            parts[k] = heading["comma"] + r"\text{" + words + "}" + colon
        elif "\\" not in parts[k]:
            parts[k] = re.sub(r"[A-Za-z]+(?:[ -][A-Za-z]+)*", r"\\text{\g<0>}", parts[k])
    return "$".join(parts)


def quote_bare(found: re.Match) -> str:
    r"""no solution -> "no solution", 12 apples -> 12 "apples", 2 sin x -> 2 \sin x; 3 ab stays."""
    phrase = found[0]
    if phrase[0] in '"\\':
        return phrase
    words = phrase.replace(".", "").split()
    first = words[0]
    before = found.string[:found.start()]
    behind_value = re.search(r"[\d})\]π] *$", before)
    if behind_value and before.endswith(" "):
        is_unit = len(first) > 3 or (len(first) > 1 and unit_name(first) is not None)
    else:
        is_unit = behind_value and first in GLUED_UNITS
    if is_unit and not found.string.startswith("(", found.end()):
        return f'"{phrase}"'
    if FUNCTIONS.intersection(words):
        return " ".join("\\" + word if word in FUNCTIONS else word for word in words)
    has_long_word = len(first) > 2 or max(map(len, words)) > 3
    return f'"{phrase}"' if len(words) > 1 and has_long_word else phrase


def drop_separators(found: re.Match) -> str:
    """1,234,567 -> 1234567."""
    return re.sub("[, ]", "", found[0])


def write_comma(found: re.Match) -> str:
    """5 and 6 -> 5,6; but "x>1 and x<3" is no list of two sets, so its word stays."""
    is_inequality = re.search("[<>≤≥]", found.string[:found.start()])
    return found[0] if "and" in found[0] and is_inequality else " , "


def write_rate(found: re.Match) -> str:
    """361 kJ/mol -> 361 "kJ"/"mol"; 2 h/g stays: these are more often letters."""
    above = found[1]
    below = found[2]
    is_rate = above in UNITS and below in UNITS and (len(above + below) > 2 or found[0] == " m/s")
    return f' "{above}"/"{below}"' if is_rate else found[0]


def write_superscript(found: re.Match) -> str:
    """10⁻⁴ -> 10^{-4}."""
    return "^{" + found[0].translate(SUPERSCRIPTS) + "}"


def write_interval(found: re.Match) -> str:
    """]0,1[ -> (0,1), [0,1[ -> [0,1)."""
    left = "(" if found["left"] == "]" else "["
    right = ")" if found["right"] == "[" else "]"
    return left + found["ends"] + right


def drop_rounding(found: re.Match) -> str:
    r"""x=\frac{1}{7}≈0.14 -> x=\frac{1}{7}, 2\pi≈6.28 -> 2\pi, but x≈0.14 stays."""
    _, equals, exact = found[1].rpartition("=")
    has_name = re.search(r"(?<![A-Za-z\\])[A-Za-z]", exact)
    return found[1] if exact.strip() and (equals or not has_name) else found[0]


def write_base(found: re.Match) -> str:
    r"""52_8 -> \base(52;8), 1011_{"two"} -> \base(1011;2); 2A_1 stays: A is no digit in base 1."""
    digits = found["digits"].lower()
    base = (found["base"] or found["named"]).strip('"').lower()
    if base in NUMBER_WORDS:
        base = NUMBER_WORDS.index(base)
    if not str(base).isdecimal():
        return found[0]
    largest = max(int(digit, 36) for digit in digits.strip("-"))
    return rf"\base({digits};{base})" if largest < int(base) <= 36 else found[0]


# The rules in the order of their use: a name, what is looked for, what is written instead.
RULES = [
    ("sure thousands", r"(?<=\d)(?:,\\! *|\{,\})(?=\d{3}(?!\d))", ""),    # 1,\! 234 -> 1234
    ("joined", r"\\! ?", ""),                                           # a\!b -> ab
    ("space", r"\\[,;:> ]|\\q?quad(?![A-Za-z])|[~\s]+", " "),           # 10\,000 -> 10 000
    ("size", r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),  # \left( -> (
    # \displaystyle x -> x, \angle ABC -> ABC
    ("style", r"\\(?:displaystyle|limits|bf|rm|it|large|Large|therefore|angle)(?![A-Za-z])", " "),
    ("colour", r"\\(?:text)?color *\{(?!white)[a-z]+\}", " "),            # \color{blue}{42} -> {42}
    ("delimiters", r"\\[()\[\]]", ""),                                  # \(5\) -> 5
    # 2\hat{i}+\mathbf{j} -> 2 i+ j
    ("unit vector", r"\\(?:hat|vec|mathbf|boldsymbol|bm) *\{? *\\?([ijk])(?:math)? *\}?", r" \1"),
    # \mathbf{x} -> x, \boxed{5} -> 5
    ("frame", r"\\(?:boxed|fbox|underline|mathbf|boldsymbol|bm) *\{([\w.]+)\}", r" \1"),
    ("phantom", r"\\phantom *(?:\{[^{}]*\}|.)", ""),                    # \phantom -1 -> 1
    ("quotation", r"[\"`“”]", ""),                                      # "5" -> 5
    ("comma", r"\{,\}", ","),                                           # 12{,}34 -> 12,34
    # \$5 -> 5 "money", which is not 5 cents
    ("dollars", r"(?<!\d)\\\$ *(\d[\d,]*(?:\.\d+)?)(?=[$ .]*(?:$|[,;/]|(?:\\text\{)? *per))",
     r'\1 "money"'),
    ("money", r"(?<!\d)\\?[$£€]|\\?[$£€](?!\d)", ""),                   # \$18 -> 18, not 12$34
    # 1,234,567 and 10 000 are one number each; "1, 234" and (1,234) are two
    ("thousands", r"(?<![\w.,([])(?<!\\\{)(?<![([]-)\d{1,3}([, ]\d{3})+(?![\w)\]]|\\\}|[, ]\d)",
     drop_separators),
    # (\bmod 7), \pmod{7} -> \mod{7}
    ("modulus", r"\(? *(?:\\[pb]?mod|\\(?:text|mathrm)\{ *mod *\}|(?<![A-Za-z\\])mod)(?![A-Za-z])"
     r"[ {]*(\w+)[ })]*", r" \\mod{\1}"),
    # x=\frac{1}{7}≈0.14 -> x=\frac{1}{7}, but x≈0.14 is x=0.14
    ("rounded", r"(?:^|(?<=[,;]))([^≈,;]*[^≈,;\s]) *≈ *-?[\d.,]*\d", drop_rounding),
    ("approximately", "(?<!^)(?<!^ )≈", "="),                           # x≈2.3 -> x=2.3
    ("and, or", r"[, ]*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])[, ]*", write_comma),  # 5 or 6 -> 5 , 6
    ("text", TEXT_COMMAND + r"\{([^{}]*)\}", quote_text),               # \text{(B)} -> ("B")
    ("one comma", r" *,[, ]*,", ","),                                   # 1, 2,, 3 -> 1, 2, 3
    ("percent first", r"^ *\\?%", ""),                                  # \%7 -> 7
    ("percent", r" *\\?%", ' "percent"'),                               # 25\% -> 25 "percent"
    ("degree", r"\^? *\{? *° *\}?", "°"),                               # 30^{\circ} -> 30°
    ("temperature", r"° *([CF])(?!\w)", r'° "\1"'),                     # 20°C -> 20° "C"
    ("DNE", r"(?<![A-Za-z])DNE(?![A-Za-z])", '"does not exist"'),
    ("star", r"\^ *(?:\{ *\* *\}|\*)", "_{*}"),                          # x^* -> x_{*}
    ("prime", r"\^ *\{? *('[' ]*)\}?", r"\1"),                          # y^{\prime} -> y'
    ("derivative", r"\\frac *\{ *d *([A-Za-z]) *\} *\{ *d *[a-z] *\}", r"\1'"),  # dy/dx -> y'
    # \frac{\partial z}{\partial x} -> z_{x}
    ("partial", r"\\frac *\{ *\\partial *(\w) *\} *\{ *\\partial *(\w) *\}", r"\1_{\2}"),
    # 1 1/2 -> 1\frac{1}{2}
    ("mixed number", r"(?<![\w.^}/])(\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    ("superscript", "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", write_superscript),               # 10⁻⁴ -> 10^{-4}
    # ]0,1[ -> (0,1)
    ("outer brackets",
     r"(?<![\w}])(?P<left>[][])(?P<ends>[^][(),;]+,[^][(),;]+)(?P<right>[][])(?![\w{[])",
     write_interval),
    ("over", r"\{([^{}]+)\\over(?![A-Za-z])([^{}]+)\}", r"\\frac{\1}{\2}"),    # {2\over 3}
    ("choose", r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}", r"\\binom{\1}{\2}"),  # {n\choose k}
    # 1.2e-3 -> (1.2*10^{-3})
    ("e-form", r"(?<![\w.])(\d*\.?\d+)[eE]([+-]?\d{1,4})(?![\w.])", r"(\1*10^{\2})"),
    ("time", r"(?<=\d) *([apAP])\.?[mM](?:\.|(?![A-Za-z]))", r' "\1m"'),  # 3:30 p.m. -> 3:30 "pm"
    ("rate", r"(?<=[\d}]) ([A-Za-z]+)/([A-Za-z]+)(?![A-Za-z(])", write_rate),  # 12 km/h
    ("ohm", r"(?<=\d) *\\Omega(?![A-Za-z])", ' "ohm"'),                 # 5\Omega -> 5 "ohm"
    ("glued root", r"(?<=[A-Za-z])sqrt(?=[({])", r"\\sqrt"),              # xsqrt(2) -> x\sqrt(2)
    # 12 apples -> 12 "apples", sin x -> \sin x
    ("bare words", r'"[^"]*"|\\[A-Za-z]+|[A-Za-z]+(?:\.? [A-Za-z]+)*', quote_bare),
    ("heading", r'(^|[,;]) *("[A-Za-z -]+") *:', r"\1 \2 ="),           # "area": 20 -> "area" = 20
    ("multiplicity", r'\( *"mult(?:iplicity)?" *\.? *\d+ *\)', ""),      # 5 (multiplicity 2) -> 5
    # "the answer is" 5 -> 5
    ("lead-in", r'(?i)^ *"(?:(?:so|thus|therefore|hence|the|final) )*answer is" *:?', ""),
    # "all real numbers" -> \reals
    ("real line", r'(?i)"(?:the set of )?(?:all )?real(?:s| numbers?)"', r" \\reals "),
    # no solution -> ∅
    ("empty set", r'(?i)"(?:there (?:is|are) )?no (?:real )?solutions?"(?: *: *∅)?', "∅"),
    ("ratio", r'(?<=[\d)]) *"?to"? *(?=[\d(])', ":"),                   # 3 to 5 -> 3:5
    # _{10}C_{3} -> \binom{10}{3}
    ("combinations", r"(?:\{ *\} *)?_ *\{? *(\w+) *\}? *C *_ *\{? *(\w+) *\}?", r"\\binom{\1}{\2}"),
    ("base", r'(?<![\w.])\(?(?P<digits>-?[0-9A-Z]*\d[0-9A-Z]*)\)?'
             r'(?: *_ *\{? *(?P<base>\d\d?|"[a-z]+") *\}?| *\(? *"base" *(?P<named>\d\d?)\)?)',
     write_base),                                                       # 52_8 -> \base(52;8)
    ("ends", r"^[ ,;:]+|(?:\\\\ *)?(?<![.,;: ])[ ,;:]*\.?[ ,;:]*$", ""),  # 5. -> 5, not 0.33...
    ("two forms", r"^([^:]*[<>≤≥][^:]*): *[(\[][^:()]*[)\]]$", r"\1"),  # x≤1:(-∞,1] -> x≤1
]
COMPILED_RULES = [(re.compile(pattern, re.ASCII), replacement) for _, pattern, replacement in RULES]


def normalise(text: str) -> str:
    """The text in the spelling that the parser reads."""
    text = text.replace("｛", r"\{").replace("｝", r"\}")
    text = text.translate(FULL_WIDTH | SPACES | INVISIBLE)
    text = quote_outside(re.sub(r"\\mathbb *([A-Z])(?![A-Za-z])", r"\\mathbb{\1}", text))
    text = VERTICAL.sub(write_rows, text)
    text = SPELLING.sub(lambda found: COMMON_SPELLING.get(found[0], found[0]), text)
    for pattern, replacement in COMPILED_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


# -- Step 3: parse (recursive descent to a tree of plain tuples)
#
# list     := relation (("," | ";") relation)*
# relation := part (("=" | "<" | "≤" | ">" | "≥" | "≠" | "∈") part)*
# part     := words | union (":" union)* [unit | "mod" atom]
# union    := sum ("∪" sum)* ("∖" sum)*
# sum      := ["+" | "-"] product (("+" | "-" | "±" | "∓") product)*
# product  := power (["*" | "/"] power)*             side by side is a product
# power    := atom ("!" | "!!" | "°")* ["^" argument]
# atom     := number | name | bracket | |sum| | \frac.. | \sqrt.. | \sin.. | \matrix..
#
# The trees: ("number", 3/4) ("name", "x") ("word", "Tuesday") ("sum", terms) ("product", factors)
# ("inverse", a) ("power", a, b) ("call", "sin", arguments) ("degrees", a) ("infinity",) ("reals",)
# ("unit", a, "cm") ("base", "52", "8") ("mod", a, b) ("ratio", parts) ("list", items)
# ("set", items) ("tuple", "[)", items) ("union", parts) ("without", a, b) ("matrix", rows)
# ("cases", ((value, condition), ...)) ("relation", "<≤", parts)

TOKEN = re.compile(
    r'"[^"]*"'                              # words
    r"|\d*\.\d*\\overline *\{\d+\}"         # a repeating decimal
    r"|\d+(?:\.\d+)?|\.\d+"                 # a number
    r"|\\base\(-?[0-9a-z]+;\d+\)"           # a number in a base
    r"|\\[A-Za-z]+|\\[{}|\\]"               # a command
    r"|[A-Za-z]+|\S",                       # letters, a sign
    re.ASCII,
)
GREEK = set(
    r"\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \rho "
    r"\sigma \tau \upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Sigma \Upsilon "
    r"\Phi \Psi \Omega \ell \hbar".split()
)
DECORATIONS = set(r"\hat \bar \tilde \dot \ddot \overline \widehat \vec".split())
LARGE = set(r"\sum \prod \int \iint \iiint \oint \lim".split())
COMMANDS = LARGE | {"\\" + name for name in FUNCTIONS} | set(
    r"\frac \binom \sqrt \lfloor \lceil \matrix".split()
)
RELATIONS = "=<>≤≥≠∈≡"
ITEM_ENDS = {"", ",", ";", "(", ")", "[", "]", r"\{", r"\}", "|", *RELATIONS}
# f(x), \rho_1(r), f^{-1}(2), P(A∩B), "rank"(A), \det A on the left of a sign, token by token.
GREEK_LETTER = "|".join(re.escape(name) for name in sorted(GREEK))
FUNCTION_LABEL = re.compile(
    f"((?:[A-Za-z]|{GREEK_LETTER})"
    r"(?: ')*(?: _ \w| _ \{ \w+ \})?(?: \^ \{ - 1 \})? \( [\\\w]+(?: , [\\\w]+)* \)"
    r"|[PE] \( [^()]+ \)"
    r'|(?:"[A-Za-z]+"|\\det|\\nabla) (?:\( \w+ \)|[A-Za-z]|\\vec \{ \w \})'
    f") [{RELATIONS}]"
)
MINUS_ONE = ("number", Fraction(-1))
INFINITY = ("infinity",)
SPECIAL_TREES = {
    "π": ("name", "π"),
    r"\pi": ("name", "π"),
    "∞": INFINITY,
    "∅": ("set", ()),
    r"\reals": ("reals",),
    r"\dots": ("name", r"\dots"),
}


def is_letters(token: str) -> bool:
    return token.isascii() and token.isalpha()


def tokenize(text: str) -> list[str]:
    r"""Tokens of a text. Letters that stand alone are a word (CBAD), others a product (3ab)."""
    raw = ["", *TOKEN.findall(text), ""]
    tokens = []
    for place, token in enumerate(raw[1:-1], start=1):
        stands_alone = raw[place - 1] in ITEM_ENDS and raw[place + 1] in ITEM_ENDS
        looks_like_word = len(token) > 2 or token in ("no", "No") or token.isupper()
        if is_letters(token) and len(token) > 1 and stands_alone and looks_like_word:
            tokens.append(f'"{token}"')
        elif is_letters(token):
            tokens.extend(token)
        elif token.isdecimal() and raw[place - 1] in (r"\frac", r"\binom"):
            tokens.extend(token)  # \frac12 is \frac{1}{2}
        else:
            tokens.append(token)
    if "C" not in tokens and set(tokens) - {"(", "c", ")"}:  # a constant is c or C; (c) is not (C)
        tokens = ["C" if token == "c" else token for token in tokens]
    return tokens


class Parser:
    """The tokens of one answer, and how far they are read."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.depth = 0
        self.in_bars = False   # inside |...|, where the next bar closes
        self.plus_minus = "+"  # what ± means in this reading
        self.index_names = []  # of the sums that are being read

    def peek(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise Unreadable(f"{token!r} where {expected} was expected")
        self.place += 1
        return token

    def parse_answer(self) -> tuple:
        items = self.parse_items(both_signs=True)
        if self.peek():
            raise Unreadable(f"{self.peek()!r} behind the end")
        return joined("list", items)

    def parse_items(self, both_signs: bool) -> tuple:
        """Items between commas. With `both_signs` 3±√2 is two of them."""
        items = []
        while len(items) < MAX_ITEMS:
            start = self.place
            items.append(self.parse_relation())
            tokens = self.tokens[start:self.place]
            if tokens.count("±") > 1:
                raise Unreadable("two signs ± may be independent")
            if both_signs and "±" in tokens:
                self.place = start
                self.plus_minus = "-"
                items.append(self.parse_relation())
                self.plus_minus = "+"
            if self.peek() not in (",", ";"):
                return tuple(items)
            self.take()
        raise Unreadable("too many items")

    def parse_relation(self) -> tuple:
        parts = [self.parse_part()]
        signs = ""
        while self.peek() and self.peek() in RELATIONS:
            signs += self.take()
            parts.append(self.parse_part())
        has_heading = parts[0][0] == "word" and signs[:1] == "=" and len(signs) > 1
        if has_heading and MODIFIERS.isdisjoint(parts[0][1].lower().split()):
            signs = signs[1:]  # "asymptote" = (y=2)
            parts = parts[1:]
        return ("relation", signs, tuple(parts)) if signs else parts[0]

    def parse_part(self) -> tuple:
        """Words, or a formula or ratio with or without a unit."""
        label = self.parse_function_label()
        if label:
            return label
        if self.peek().startswith('"') and self.peek(1) in ITEM_ENDS:
            return read_word(self.take())
        parts = [self.parse_union()]
        while self.peek() == ":":
            self.take()
            parts.append(self.parse_union())
        part = joined("ratio", parts)
        if self.peek() == r"\mod":
            self.take()
            return ("mod", part, self.parse_argument())
        return self.parse_unit(part) if self.peek().startswith('"') else part

    def parse_function_label(self) -> tuple | None:
        """f(x), f^{-1}(2), P(A∩B) or \\det A on the left of a sign: one name."""
        text = " ".join(self.tokens[self.place:self.place + 20])
        found = FUNCTION_LABEL.match(text)
        if found is None:
            return None
        self.place += len(found[1].split())
        return ("name", found[1].replace(" ", ""))

    def parse_unit(self, value: tuple) -> tuple:
        """The units behind a value: 60 "km"/"h", 9 "kg"*"m"/"s"^{2}."""
        unit = ""
        while self.peek().startswith('"') or self.peek() in ("*", "/", "^"):
            token = self.take()
            if token == "^":
                unit += "^" + self.raw_group()
            elif token in "*/":
                unit += token
            else:
                name = unit_name(token.strip('"'))
                if name is None:
                    raise Unreadable(f"{token} is no unit")
                unit += name
        return ("degrees", value) if unit == "degree" else ("unit", value, unit)

    def parse_union(self) -> tuple:
        """Sums joined by ∪, without the set behind ∖ or behind a minus sign."""
        parts = [self.parse_sum()]
        while self.peek() == "∪":
            self.take()
            parts.append(self.parse_sum())
        union = joined("union", parts)
        while self.peek() == "∖" or self.at_set_difference():
            self.take()
            union = ("without", union, self.parse_sum())
        return union

    def parse_sum(self) -> tuple:
        terms = [self.parse_term()]
        while self.peek() in ("+", "-", "±", "∓") and not self.at_set_difference():
            terms.append(self.parse_term())
        return summed(terms)

    def at_set_difference(self) -> bool:
        r"""The minus sign of R-\{0\}."""
        return self.peek() == "-" and self.peek(1) == r"\{"

    def parse_term(self) -> tuple:
        """A product behind any number of signs."""
        opposite = "-" if self.plus_minus == "+" else "+"
        meaning = {"±": self.plus_minus, "∓": opposite}
        is_negative = False
        while self.peek() in ("+", "-", "±", "∓"):
            sign = self.take()
            if meaning.get(sign, sign) == "-":
                is_negative = not is_negative
        product = self.parse_product()
        return negative(product) if is_negative else product

    def parse_product(self) -> tuple:
        factors = [self.parse_power()]
        while self.peek() in ("*", "×", "/") or self.at_factor(factors[-1]):
            sign = self.take() if self.peek() in ("*", "×", "/") else ""
            factor = self.parse_term_factor() if sign else self.parse_power()
            if sign == "/":
                factors.append(("inverse", factor))
            elif sign and is_vector(factor) and is_vector(factors[-1]):
                raise Unreadable("a dot or cross product")
            elif not sign and len(factors) == 1 and is_mixed_number(factors[0], factor):
                factors = [("sum", (factors[0], factor))]
            else:
                factors.append(factor)
        return scaled(factors)

    def parse_term_factor(self) -> tuple:
        """The factor behind * or /, which may have a sign: 13*-2."""
        if self.peek() == "-":
            self.take()
            return negative(self.parse_power())
        return self.parse_power()

    def at_factor(self, before: tuple) -> bool:
        """Does another factor follow this one side by side? "2 3" is no product: a number follows
        only in (n-1)4 and 3!7!."""
        token = self.peek()
        if re.match(r"\.?\d", token, re.ASCII):
            sign = self.tokens[self.place - 1]
            return sign == "!" or (sign == ")" and variables(before) != set())
        if token == "|":
            return not self.in_bars
        if token.startswith('"'):
            return is_symbol(token)
        if token.startswith("\\"):
            return token in GREEK or token in DECORATIONS or token in COMMANDS
        return is_letters(token) or token in ("(", "[", "{", "π", "∞")

    def parse_power(self) -> tuple:
        base = self.parse_atom()
        while self.peek() in ("!", "°"):
            if self.take() == "°":
                base = ("degrees", base)
            elif self.peek() == "!":
                self.take()
                base = ("call", "double factorial", (base,))
            else:
                base = ("call", "factorial", (base,))
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.parse_argument()
        if self.peek() == "^":
            raise Unreadable("two exponents")
        return ("power", base, exponent)

    def parse_argument(self) -> tuple:
        """What belongs to \\frac, \\sqrt, ^ or _: {...} or one atom, which may have a sign."""
        if self.peek() == "-":
            self.take()
            return negative(self.parse_atom())
        return self.parse_atom()

    def parse_atom(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        token = self.peek()
        if token in ("(", "[", "{"):
            atom = self.parse_bracket()
        elif token == r"\{":
            atom = self.parse_set()
        elif token == "|":
            atom = self.parse_absolute_value()
        elif re.match(r"\.?\d", token, re.ASCII):
            atom = read_number(self.take())
        elif token.startswith('"') and self.peek(1) == "_":
            atom = ("name", self.take().strip('"') + self.take() + self.raw_group())
        elif is_symbol(token):
            atom = read_letters(self.take())
        elif is_letters(token) or token in GREEK or token in DECORATIONS:
            atom = self.parse_name()
        else:
            atom = self.parse_command(self.take())
        self.depth -= 1
        return atom

    def parse_bracket(self) -> tuple:
        """(a) and {a} are a; (a,b] is an interval, (a,b) a point or an interval."""
        before = self.tokens[self.place - 1] if self.place else ""
        outer = self.in_bars
        self.in_bars = False
        brackets = self.take()
        items = self.parse_items(both_signs=False)
        brackets += self.take("}") if brackets == "{" else self.take(")", "]")
        self.in_bars = outer
        if len(items) > 1:
            return ("tuple", brackets, items)
        stands_alone = before in ITEM_ENDS and self.peek() in ITEM_ENDS
        is_term = {before, self.peek()} <= {*ITEM_ENDS, "+", "-"}
        if brackets == "[]" and is_term and not stands_alone and items[0][0] != "sum":
            return ("call", "floor", items)  # [n/2]+1: as brackets they would be idle
        if brackets in ("(]", "[)") or (brackets == "[]" and stands_alone):
            raise Unreadable("half an interval, or [x], which may be a floor")
        return items[0]

    def parse_set(self) -> tuple:
        r"""\{1,2\}; \{x | x<2\} and \{x∈R | x<2\} are their condition."""
        self.take(r"\{")
        if self.peek() == r"\}":
            self.take()
            return ("set", ())
        head = "".join(self.tokens[self.place:self.place + 4])
        condition = re.match(r"[A-Za-z](∈\\reals)?[|:]", head)
        is_condition = condition is not None
        if is_condition:
            self.place += 4 if condition[1] else 2
        items = self.parse_items(both_signs=True)
        self.take(r"\}")
        if not is_condition:
            return ("set", items)
        if len(items) > 1 and any(item[:2] != ("relation", "≠") for item in items):
            raise Unreadable("several conditions")
        return joined("list", items)

    def parse_absolute_value(self) -> tuple:
        self.take("|")
        self.in_bars = True
        inside = self.parse_sum()
        self.take("|")
        self.in_bars = False
        return ("call", "abs", (inside,))

    def parse_name(self) -> tuple:
        r"""x, x_1, x_{n+1}, y', \alpha_2, \hat{p}; an unknown function such as f(2x) is a call."""
        name = self.take()
        if name in self.index_names:
            return ("name", f"index {self.index_names.index(name)}")
        can_be_function = name.isupper() or name in GREEK
        is_function = name in "fgh" or (can_be_function and not self.at_sum_in_bracket())
        if name in DECORATIONS:
            name += self.raw_group()
        if self.peek() == "_":
            name += self.take() + self.raw_group()
        while self.peek() == "'":
            name += self.take()
        if is_function and self.peek() == "(":
            return ("call", name, self.parse_function_arguments())
        return ("name", name)

    def at_sum_in_bracket(self) -> bool:
        """P(1+r) is a product; P(2x) is taken for a function."""
        text = "".join(self.tokens[self.place:])
        return re.match(r"\((?:[^()]|\([^()]*\))*?[+-]", text) is not None

    def raw_group(self) -> str:
        """The text of {...} or of one token."""
        token = self.take()
        if token != "{":
            return token
        text = ""
        depth = 1
        while True:
            token = self.take()
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return text
            text += token.strip('"')

    def parse_command(self, token: str) -> tuple:
        if token == r"\frac":
            numerator = self.parse_argument()
            return ("product", (numerator, ("inverse", self.parse_argument())))
        if token == r"\binom":
            above = self.parse_argument()
            return ("call", "binomial", (above, self.parse_argument()))
        if token == r"\sqrt":
            return self.parse_root()
        if token in (r"\lfloor", r"\lceil"):
            inside = self.parse_sum()
            self.take(token.replace("l", "r", 1))
            return ("call", "floor" if token == r"\lfloor" else "ceil", (inside,))
        if token == r"\matrix":
            return self.parse_matrix()
        if token == r"\cases":
            return self.parse_cases()
        if token in LARGE:
            return self.parse_large(token)
        if token.startswith(r"\base("):
            digits, base = token[6:-1].split(";")
            return ("base", digits.lstrip("0"), base)
        if token in SPECIAL_TREES:
            return SPECIAL_TREES[token]
        if token[1:] in FUNCTIONS:
            return self.parse_function(token[1:])
        raise Unreadable(f"{token} is not known")

    def parse_large(self, token: str) -> tuple:
        """A sum, integral or limit: some unknown function of what stands behind it. So two are
        equal if their bounds are spelled alike and their terms are equal."""
        while self.peek() in ("_", "^"):
            token += self.take() + self.raw_group()
        index = re.search("_([a-z])=", token)
        if index is None:
            return ("call", token, (self.parse_product(),))
        self.index_names.append(index[1])  # k or n, it is the same sum
        terms = self.parse_product()
        self.index_names.pop()
        return ("call", token.replace(index[0], "_index="), (terms,))

    def parse_root(self) -> tuple:
        index = ("number", Fraction(2))
        if self.peek() == "[":
            self.take()
            index = self.parse_sum()
            self.take("]")
        return ("call", "root", (self.parse_argument(), index))

    def parse_matrix(self) -> tuple:
        self.take("(")
        rows = [[self.parse_sum()]]
        while self.peek() != ")":
            if self.take("&", ";") == "&":
                rows[-1].append(self.parse_sum())
            else:
                rows.append([self.parse_sum()])
        self.take(")")
        return ("matrix", tuple(map(tuple, rows)))

    def parse_cases(self) -> tuple:
        r"""\cases(value&condition;value&condition)."""
        separator = self.take("(")
        cases = []
        while separator != ")":
            value = self.parse_sum()
            self.take("&")
            cases.append((value, self.parse_relation()))
            separator = self.take(";", ")")
        return ("cases", tuple(cases))

    def parse_function(self, name: str) -> tuple:
        r"""\sin x, \sin^2 x, \tan^{-1} x, \log_2 8, \max(a,b)."""
        exponent = None
        base = ()
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                exponent = self.parse_argument()
            else:
                base = (self.parse_argument(),)
        if exponent == MINUS_ONE and "arc" + name in FUNCTIONS:
            name = "arc" + name
            exponent = None
        call = ("call", name, self.parse_function_arguments() + base)
        return call if exponent is None else ("power", call, exponent)

    def parse_function_arguments(self) -> tuple:
        """All those in a bracket; else the factors side by side, up to the next function."""
        if self.peek() in ("(", "[", "{"):
            argument = self.parse_bracket()
            return argument[2] if argument[0] == "tuple" else (argument,)
        if self.peek() == r"\{":
            return self.parse_set()[1]
        factors = [self.parse_power()]
        while self.at_factor(factors[-1]) and self.peek()[1:] not in FUNCTIONS:
            if self.peek() in ("(", "[") and factors[-1][0] != "number":
                break
            factors.append(self.parse_power())
        return (joined("product", factors),)


def joined(kind: str, parts: Sequence) -> tuple:
    """One part alone, several as a tree of this kind."""
    return parts[0] if len(parts) == 1 else (kind, tuple(parts))


def negative(tree: tuple) -> tuple:
    if tree[0] == "number":
        return ("number", -tree[1])
    return scaled([MINUS_ONE, tree])


def rows_of(tree: tuple) -> tuple | None:
    """Entries of a matrix by rows; a point is one row."""
    if tree[0] == "tuple" and tree[1] == "()":
        return (tree[2],)
    return tree[1] if tree[0] == "matrix" else None


def with_rows(tree: tuple, rows: list[tuple]) -> tuple:
    """A matrix or a point like this one with other entries."""
    return ("matrix", tuple(rows)) if tree[0] == "matrix" else ("tuple", "()", rows[0])


def scaled(factors: list[tuple]) -> tuple:
    """A product; t(1,2) is (1t,2t), and so is a matrix."""
    vectors = [factor for factor in factors if rows_of(factor) is not None]
    if len(factors) == 1 or len(vectors) != 1:
        return joined("product", factors)
    place = factors.index(vectors[0])
    before = tuple(factors[:place])
    behind = tuple(factors[place + 1:])
    rows = []
    for row in rows_of(vectors[0]):
        rows.append(tuple(("product", (*before, entry, *behind)) for entry in row))
    return with_rows(vectors[0], rows)


def summed(terms: list[tuple]) -> tuple:
    """A sum; (1,2)+(t,3) is (1+t,2+3), and so are matrices of one shape."""
    shapes = set()
    for term in terms:
        rows = rows_of(term)
        shapes.add(None if rows is None else (term[0], *map(len, rows)))
    if len(terms) == 1 or None in shapes or len(shapes) > 1:
        return joined("sum", terms)
    rows = []
    for rows_at_place in zip(*map(rows_of, terms)):
        rows.append(tuple(("sum", entries) for entries in zip(*rows_at_place)))
    return with_rows(terms[0], rows)


def read_number(token: str) -> tuple:
    r"""12.5 -> 25/2, 0.1\overline{6} -> 1/6."""
    digits, _, period = token.partition(r"\overline")
    value = Fraction(digits + "0")
    if period:
        period = period.strip(" {}")
        places = len(digits.partition(".")[2])
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** places)
    elif "." not in digits:
        value = Fraction(int(digits))
    return ("number", value)


def read_word(token: str) -> tuple:
    word = token.strip('"').replace(".", "")
    if len(word) == 1:
        return ("name", word)
    if word.lower() in NUMBER_WORDS:
        return ("number", Fraction(NUMBER_WORDS.index(word.lower())))
    return ("word", word)


def is_symbol(token: str) -> bool:
    r"""Is a word inside a formula a name, such as that of \mathrm{P}? A unit is none."""
    letters = token.strip('"')
    is_short_word = letters != token and is_letters(letters) and len(letters) < 3
    return is_short_word and unit_name(letters) is None


def read_letters(token: str) -> tuple:
    return joined("product", [("name", letter) for letter in token.strip('"')])


def is_vector(tree: tuple) -> bool:
    return tree[0] == "name" and tree[1].startswith(r"\vec")


def is_mixed_number(whole: tuple, fraction: tuple) -> bool:
    r"""1\frac{1}{2}: a whole number before a fraction of numbers."""
    if whole[0] != "number" or whole[1].denominator != 1 or fraction[0] != "product":
        return False
    above, below = fraction[1][:2]
    return above[0] == "number" and below[0] == "inverse" and below[1][0] == "number"


def parse_text(text: str) -> tuple:
    """Tree of a normalised answer. Raises Unreadable."""
    if not text or len(text) > 2 * MAX_CHARS:
        raise Unreadable("empty or too long")
    return Parser(tokenize(text)).parse_answer()


# -- Step 4: compare (exact in rationals, at test points with variables)

Number = Fraction | float | complex


def bounded(value: Number) -> Number:
    """The value itself; Unreadable if it is infinite, undefined or too large."""
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable("too large")
        return value
    if isinstance(value, complex) and abs(value.imag) < 1e-14 * abs(value):
        value = value.real
    if not cmath.isfinite(value):
        raise Unreadable("not finite")
    return value


def add(values: list[Number]) -> Number:
    """The sum; 0 where nothing but rounding errors is left of it."""
    total = bounded(sum(values))
    if isinstance(total, Fraction):
        return total
    largest = max(map(abs, values))
    if abs(total) < 1e-14 * largest and largest < 1e4:
        return Fraction(0)
    if abs(total) < 1e-5 * largest:
        raise Unreadable("too few digits are left for a comparison")
    return total


def multiply(values: list[Number]) -> Number:
    if values[0] == -1 and values[1:] == [math.inf]:
        return -math.inf
    result = Fraction(1)
    for value in values:
        result = bounded(result * value)
    return result


def power(base: Number, exponent: Number) -> Number:
    """Exact where it can be. An odd root of a negative number is real: (-8)^{1/3} = -2."""
    if not isinstance(exponent, Fraction):
        return base ** exponent if base else Fraction(0)
    if exponent.denominator == 1:
        if isinstance(base, Fraction):
            bits = math.log2(max(abs(base.numerator), base.denominator)) * abs(exponent)
            if bits > MAX_BITS:
                raise Unreadable("too large")
        return base ** int(exponent)
    if not isinstance(base, complex) and base < 0 and exponent.denominator % 2 == 1:
        sign = -1 if exponent.numerator % 2 else 1
        return sign * power(-base, exponent)
    if isinstance(base, Fraction) and base >= 0:
        root = exact_root(base, exponent.denominator)
        if root is not None:
            return power(root, Fraction(exponent.numerator))
        base = float(base)
    return complex(base) ** float(exponent)


def exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The root of a value that is not negative, if it is rational."""
    roots = []
    for number in (value.numerator, value.denominator):
        if degree > 64 or number.bit_length() > 1000:
            return None
        root = math.isqrt(number) if degree == 2 else round(number ** (1 / degree))
        if root ** degree != number:
            return None
        roots.append(root)
    return Fraction(roots[0], roots[1])


def small_integer(value: Number, largest: int = 3000) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or abs(value) > largest:
        raise Unreadable("not a small whole number")
    return int(value)


def binomial(n: Number, k: Number) -> Number:
    """n may be any number: n(n-1)...(n-k+1)/k!."""
    k = small_integer(k)
    if isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 3000 and k >= 0:
        return Fraction(math.comb(int(n), k))
    result = Fraction(1)
    for step in range(small_integer(Fraction(k), 300)):
        result = result * (n - step) / (step + 1)
    return result


def common(function: Callable, values: tuple) -> Fraction:
    """Greatest common divisor or least common multiple of two numbers or more."""
    if len(values) < 2:
        raise Unreadable("one number has nothing in common")
    return Fraction(function(*(small_integer(value, 10**30) for value in values)))


CALLS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "arccot": lambda x: math.pi / 2 - cmath.atan(x),
    "arcsec": lambda x: cmath.acos(1 / x),
    "arccsc": lambda x: cmath.asin(1 / x),
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "exp": cmath.exp,
    "cis": lambda x: cmath.exp(1j * x),
    "ln": cmath.log,
    "log": lambda x, base=10: cmath.log(x) / cmath.log(base),
    "root": lambda x, index=2: power(x, 1 / index),
    "sqrt": lambda x: power(x, Fraction(1, 2)),
    "abs": abs,
    "floor": lambda x: Fraction(math.floor(x)),
    "ceil": lambda x: Fraction(math.ceil(x)),
    "factorial": lambda n: Fraction(math.factorial(small_integer(n))),
    "double factorial": lambda n: Fraction(math.prod(range(small_integer(n), 0, -2))),
    "binomial": binomial,
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "gcd": lambda *values: common(math.gcd, values),
    "lcm": lambda *values: common(math.lcm, values),
}
CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}
POINTS = 13


def point_value(name: str, point: int) -> Number:
    """Value of a name at a point. It depends on the name alone, so that other names may cancel.

    Points 0 to 3 are whole numbers, 4 and 5 lie between 0 and 1, 12 has many divisors (for gcd),
    the others are fractions of both signs. Parity and sign are bits of the letter's number: at some
    point those of two letters differ, and (-1)^m is not (-1)^n.
    """
    if name in CONSTANTS:
        return CONSTANTS[name]
    letter = sum(map(ord, name))
    bit = letter >> (point % 5) & 1
    mixed = zlib.crc32(f"{point} {name}".encode())
    if point < 4:
        rank = letter % 32 // 2  # rising at point 0, falling at 1: both n > k and k > n are tried
        halves = [2 + rank, 18 - rank, 2 + mixed % 9, 2 + mixed % 15]
        return Fraction(2 * halves[point] + bit)
    if point < 6:
        return Fraction(1 + mixed % 95, 97)
    if point == 12:
        return Fraction(840 * (1 + letter % 5))
    size = Fraction(1 + mixed % 300, 97)
    return -size if bit or point == 11 else size


def value_of(tree: tuple, point: int, real: bool) -> Number:
    """Value of a formula at a point. Raises Unreadable where it has none, or none that is real."""
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return point_value(tree[1], point)
    if kind == "word" and may_be_product(tree[1]):
        return multiply([point_value(letter, point) for letter in tree[1]])
    if kind == "infinity":
        return math.inf
    if kind == "sum":
        return add([value_of(term, point, real) for term in tree[1]])
    if kind == "product":
        return multiply([value_of(factor, point, real) for factor in tree[1]])
    if kind == "inverse":
        return bounded(1 / value_of(tree[1], point, real))
    if kind == "degrees":
        return value_of(tree[1], point, real) * math.pi / 180
    if kind == "power":
        base = value_of(tree[1], point, real)
        value = bounded(power(base, value_of(tree[2], point, real)))
    elif kind == "call":
        values = [value_of(argument, point, real) for argument in tree[2]]
        function = CALLS.get(tree[1])
        value = bounded(function(*values) if function else unknown_function(tree[1], values))
    else:
        raise Unreadable(f"a {kind} has no value")
    if real and isinstance(value, complex):
        raise Unreadable("outside the real domain")
    return value


def may_be_product(word: str) -> bool:
    """mgh, which stands alone and so was taken for a word."""
    return is_letters(word) and len(word) < 5 and word.lower() != "no"


def unknown_function(name: str, values: list[Number]) -> Number:
    """Some fixed function in place of the f of f(2x): it tells f(2x) from 2f(x)."""
    weighted = [place * value for place, value in enumerate(values, start=1)]
    return cmath.cos(sum(weighted) + zlib.crc32(name.encode()) % 97)


@functools.lru_cache(maxsize=4096)
def value_at(tree: tuple, point: int, real: bool) -> Number | None:
    """Value of a formula at a point, None where it has none."""
    try:
        return value_of(tree, point, real)
    except (Unreadable, ArithmeticError, ValueError, TypeError):
        return None


def constant_value(tree: tuple) -> Number | None:
    """Value of a formula without variables; (√2)^2 is 2, though computed with rounding errors."""
    if variables(tree):
        return None
    value = value_at(tree, 0, real=False)
    if not isinstance(value, float) or abs(value) > 1e9:
        return value
    near = Fraction(value).limit_denominator(1 + int(10_000 / (1 + abs(value))))
    return near if abs(near - value) < 1e-13 * abs(value) else value


def names_in(tree: tuple) -> set[str]:
    if tree[:1] == ("name",):
        return {tree[1]}
    if tree[:1] == ("word",):
        return set(tree[1])
    return set().union(*(names_in(part) for part in tree if isinstance(part, tuple)))


def variables(tree: tuple) -> set[str]:
    return names_in(tree) - CONSTANTS.keys()


def same_number(a: Number, b: Number, exact: bool) -> bool:
    """Equal as fractions, or to eleven digits; if `exact`, a fraction is no rounded number."""
    if a == b:
        return True
    rational = isinstance(a, Fraction) + isinstance(b, Fraction)
    if rational == 2 or (exact and rational == 1) or not cmath.isfinite(a - b):
        return False
    return abs(a - b) <= 1e-11 * max(abs(a), abs(b))


def values_at_points(a: tuple, b: tuple) -> Iterator[tuple]:
    """Pairs of values at the points where both formulas are defined: in real numbers, unless one
    of the formulas speaks of i."""
    real = "i" not in names_in(a) | names_in(b)
    for point in range(POINTS):
        x = value_at(a, point, real)
        y = value_at(b, point, real)
        if x is not None and y is not None:
            yield x, y


def same_value(a: tuple, b: tuple) -> bool:
    """Equal wherever both are defined, at two points at least."""
    if not variables(a) and not variables(b):
        x = constant_value(a)
        y = constant_value(b)
        return x is not None and y is not None and same_number(x, y, exact=True)
    agreed = 0
    for x, y in values_at_points(a, b):
        if not same_number(x, y, exact=False):
            return False
        agreed += 1
    return agreed > 1


def is_multiple(a: tuple, b: tuple, positive: bool) -> bool:
    """Is a = c b with a constant c (c > 0 if `positive`)? Then a = 0 and b = 0 say the same."""
    if not variables(a) or not variables(b):
        return False
    pairs = list(values_at_points(a, b))
    if any((x == 0) != (y == 0) for x, y in pairs):
        return False
    ratios = [x / y for x, y in pairs if y != 0]
    if len(ratios) < 3:
        return False
    factor = ratios[0]
    if not all(same_number(factor, ratio, exact=False) for ratio in ratios):
        return False
    return not positive or (not isinstance(factor, complex) and factor > 0)


# Sets of real numbers are lists of intervals ((low, is in), (high, is in)).

REAL_LINE = [((-math.inf, False), (math.inf, False))]


def region(tree: tuple) -> list | None:
    """Intervals of [1,2), of a union, of R without points, of an inequality in one variable."""
    kind = tree[0]
    if kind == "reals":
        return REAL_LINE
    if kind == "tuple":
        return interval(tree[1], tree[2]) if len(tree[2]) == 2 else None
    if kind == "set":
        ends = [(constant_value(item), True) for item in tree[1]]
        return list(zip(ends, ends)) if all(is_real(point) for point, _ in ends) else None
    if kind == "relation":
        return region_of_relation(tree[1], tree[2])
    if kind == "without":
        return without_points(region(tree[1]), region(tree[2]))
    is_list_of_relations = kind == "list" and all(item[0] == "relation" for item in tree[1])
    if kind == "union":
        return region_of_parts(tree[1])
    if is_list_of_relations:
        pieces = region_of_parts(tree[1])
        # x<1, x>2 means "or"; x>1, x<3 means "and", or nobody knows.
        return pieces if pieces is not None and len(merged(pieces)) == len(pieces) else None
    return None


def interval(brackets: str, ends: tuple) -> list | None:
    low, high = map(constant_value, ends)
    if not is_real(low) or not is_real(high) or low >= high:
        return None
    has_low = brackets[0] == "["
    has_high = brackets[1] == "]"
    return [((low, has_low), (high, has_high))]


def is_real(value: Number | None) -> bool:
    return isinstance(value, (Fraction, float))


def region_of_parts(parts: tuple) -> list | None:
    """The union of the parts, without the points that others such as x≠1 leave out."""
    regions = list(map(region, parts))
    if None in regions or len(set().union(*map(variables, parts))) > 1:
        return None
    pieces = []
    points = []
    for part, part_region in zip(parts, regions):
        if part[:2] == ("relation", "≠"):
            points += [side for side in part[2] if not variables(side)]
        else:
            pieces += part_region
    return without_points(pieces or REAL_LINE, region(("set", tuple(points))))


def without_points(pieces: list | None, points: list | None) -> list | None:
    if pieces is None or points is None:
        return None
    for (point, _), end in points:
        if point != end[0]:
            return None
        rest = []
        for low, high in pieces:
            if low[0] < point < high[0]:
                rest.append((low, (point, False)))
                rest.append(((point, False), high))
            else:
                rest.append((low, high))
        pieces = rest
    return pieces


def region_of_relation(signs: str, parts: tuple) -> list | None:
    """x<2, 0<x≤7, x≠1, x∈[0,1): a name between constants."""
    if set(signs) <= {">", "≥"}:
        signs = signs[::-1].replace(">", "<").replace("≥", "≤")
        parts = parts[::-1]
    if len(parts) == 2 and set(signs) <= {"<", "≤"}:
        left, right = parts
        if left[:2] == ("call", "abs"):  # |x|<3 is -3<x<3
            return region_of_relation(signs * 2, (negative(right), left[2][0], right))
        if right[:2] == ("call", "abs"):  # 2<|x| is x<-2 or 2<x
            below = ("relation", signs, (right[2][0], negative(left)))
            return region_of_parts((below, ("relation", signs, (left, right[2][0]))))
    is_name = [is_variable(part) for part in parts]
    if sum(is_name) != 1:
        return None
    if signs == "∈":
        return region(parts[1]) if is_name[0] else None
    if signs == "≠":
        point = parts[1] if is_name[0] else parts[0]
        return without_points(REAL_LINE, region(("set", (point,))))
    if not set(signs) <= {"<", "≤"}:
        return None
    if is_name == [True, False]:  # x<2 is -∞<x<2
        return interval("(]" if signs == "≤" else "()", (negative(INFINITY), parts[1]))
    if is_name == [False, True]:
        return interval("[)" if signs == "≤" else "()", (parts[0], INFINITY))
    if is_name == [False, True, False]:
        brackets = ("[" if signs[0] == "≤" else "(") + ("]" if signs[1] == "≤" else ")")
        return interval(brackets, (parts[0], parts[2]))
    return None


def same_region(a: tuple, b: tuple) -> bool | None:
    """Whether two sets of real numbers are equal; None if one side is no such set."""
    one = region(a)
    other = region(b)
    if one is None or other is None:
        return None
    if variables(a) and variables(b) and variables(a) != variables(b):
        return False
    one = merged(one)
    other = merged(other)
    ends_one = [end for piece in one for end in piece]
    ends_other = [end for piece in other for end in piece]
    return len(one) == len(other) and all(map(same_end, ends_one, ends_other))


def merged(pieces: list) -> list:
    """In order, those that touch or overlap joined: (-1,1) and [1,3) are (-1,3)."""
    result = []
    for low, high in sorted(pieces):
        if result:
            first, last = result[-1]
            touch = low[0] == last[0] and (low[1] or last[1])
            if low[0] < last[0] or touch:
                if low[0] == first[0]:
                    first = max(first, low)
                result[-1] = (first, max(last, high))
                continue
        result.append((low, high))
    return result


def same_end(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and same_number(a[0], b[0], exact=True)


# What one of two answers may leave out: a label such as x= or area=, a unit, a degree sign.

def label_of(tree: tuple) -> str:
    """The label of x=5, f(x)=x^2, area=12, m+n=17, (x,y)=(1,2), x∈[0,1]; "" if there is none."""
    if tree[0] != "relation" or not set(tree[1]) <= {"=", "∈"}:
        return ""
    label = tree[2][0]
    value = tree[2][-1]
    if label[0] == "name" and "(" in label[1]:
        return label[1]
    if label in SPECIAL_TREES.values() or value[0] == "word" or is_variable(value):
        return ""  # A=B is not B
    if label[0] == "word":
        return label[1] if MODIFIERS.isdisjoint(label[1].lower().split()) else ""
    if value[0] != "set" and variables(label) & variables(value):
        return ""
    if label[0] == "tuple":
        is_label = is_point_of_names(label) and value[0] in ("tuple", "matrix")
    elif label[0] in ("set", "union"):
        is_label = all(map(is_variable, label[1])) and value[0] == "set"  # A∪B=\{1,2\}
    elif value[0] == "matrix":
        is_label = is_power_of_name(label)  # A^{-1}
    elif not variables(label).isdisjoint({"x", "y", "z"}) and label[0] != "name":
        is_label = False  # m+n=17 names a number, but x+y=5 is a line
    elif label[0] == "sum":
        is_label = all(map(is_power_of_name, label[1]))
    elif label[0] == "call":
        is_label = not has_number(label)
    else:
        is_label = is_variable(label)
    return str(label[1:]) if is_label else ""


def is_variable(tree: tuple) -> bool:
    return tree[0] == "name" and tree[1] not in CONSTANTS


def is_point_of_names(tree: tuple) -> bool:
    """(m,n), (x,y), but not (y,x): a bare point is taken for (x,y)."""
    if not all(map(is_variable, tree[2])):
        return False
    coordinates = [name for _, name in tree[2] if name in ("x", "y", "z")]
    return coordinates == sorted(coordinates)


def is_power_of_name(tree: tuple) -> bool:
    return tree[0] == "name" or (tree[0] == "power" and tree[1][0] == "name")


def has_number(tree: tuple) -> bool:
    if tree[:1] == ("number",):
        return True
    return any(has_number(part) for part in tree if isinstance(part, tuple))


def without_label(tree: tuple) -> tuple | None:
    """5 of x=5, of x=10/2=5 and of 2+3=5; None where nothing may be left out."""
    parts = tree[2]
    value = parts[-1]
    if tree[1] == "≡" and is_variable(parts[0]) and value[0] == "mod":
        return value[1]
    is_equation = set(tree[1]) <= {"=", "∈"}
    if not is_equation or not all(same_value(part, value) for part in parts[1:-1]):
        return None
    is_true = not variables(parts[0]) and same_value(parts[0], value)
    return value if is_true or label_of(tree) else None


def without_degrees(tree: tuple) -> tuple:
    """30 of 30°, but sin 30° stays what it is."""
    if tree[0] == "degrees":
        return tree[1]
    if tree[0] in ("sum", "product"):
        return (tree[0], tuple(map(without_degrees, tree[1])))
    return tree


# The comparison itself, by the kinds of the two trees.

def same_tree(a: tuple, b: tuple) -> bool:
    """Are two trees the same answer?"""
    kinds = {a[0], b[0]}
    if kinds == {"number"}:
        return a == b
    if kinds not in ({"tuple"}, {"set"}):
        verdict = same_region(a, b)
        if verdict is not None:
            return verdict
    if kinds == {"relation"}:
        return same_relation(a, b)
    if "relation" in kinds:
        relation, other = in_order(a, b, "relation")
        value = without_label(relation)
        if value is not None and (other[0] != "list" or value[0] == "set"):
            return same_tree(value, other)
        return other[0] == "list" and same_items(a, b)
    if kinds & {"list", "set"}:
        return same_items(a, b)
    if "unit" in kinds:
        unit, other = in_order(a, b, "unit")
        if other[0] == "unit":
            return same_unit(unit[2], other[2]) and same_tree(unit[1], other[1])
        if other[0] == "degrees" and unit[1][0] != "degrees":
            return unit[2] == "rad" and same_value(unit[1], other)
        return same_tree(unit[1], other)
    if kinds & {"tuple", "matrix"}:
        return same_entries(a, b) or same_written_out(a, b)
    if kinds == {"cases"}:
        return match_all(a[1], b[1], all_same)
    if "mod" in kinds:
        return a[0] == b[0] and same_residue(a, b)
    if kinds == {"name"}:
        names = {a[1], b[1]}
        return len(names) == 1 or {name.partition("(")[0] for name in names} < names  # y(x) and y
    if kinds in ({"union"}, {"ratio"}):
        return all_same(a[1], b[1])
    if "base" in kinds:
        return same_base(a, b)
    if kinds == {"word"}:
        return a[1].casefold() == b[1].casefold()
    return same_value(a, b) or same_angle(a, b) or same_antiderivative(a, b)


def in_order(a: tuple, b: tuple, kind: str) -> tuple[tuple, tuple]:
    """The tree of this kind first."""
    return (a, b) if a[0] == kind else (b, a)


def same_unit(a: str, b: str) -> bool:
    r"""A sign of money may be any currency, and what a price is for may be left out: \$18 is 18
    "dollars per hour"."""
    currency_a, _, good_a = a.partition("/")
    currency_b, _, good_b = b.partition("/")
    if a == b or not {currency_a, currency_b} <= {"dollar", "euro", "money"}:
        return a == b
    same_currency = currency_a == currency_b or "money" in (currency_a, currency_b)
    return same_currency and (good_a == good_b or "" in (good_a, good_b))


def all_same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(map(same_tree, a, b))


def same_angle(a: tuple, b: tuple) -> bool:
    """30° and 30: the sign may be left out on one side."""
    bare_a = without_degrees(a)
    bare_b = without_degrees(b)
    return (bare_a == a) != (bare_b == b) and same_value(bare_a, bare_b)


def same_antiderivative(a: tuple, b: tuple) -> bool:
    r"""\sin^2 x+C and C-\cos^2 x: their difference is the same at all points."""
    for tree in (a, b):
        has_constant = tree[0] == "sum" and ("name", "C") in tree[1]
        if not has_constant or len(variables(tree)) != 2:
            return False
    pairs = list(values_at_points(a, b))
    if len(pairs) < 3 or variables(a) != variables(b):
        return False
    first = pairs[0][0] - pairs[0][1]
    for x, y in pairs:
        rounding = 1e-11 * (abs(x) + abs(y) + 1)
        if abs(x - y - first) > rounding:
            return False
    return True


def same_base(a: tuple, b: tuple) -> bool:
    """52_8 and 52: the question names the base, so it may be left out; 42 is another answer."""
    based, other = in_order(a, b, "base")
    if other[0] == "base":
        return a == b
    digits = based[1]
    return digits.strip("-").isdecimal() and other == ("number", Fraction(digits))


def same_entries(a: tuple, b: tuple) -> bool:
    """Points, intervals with their brackets, matrices; a vector and the point of its entries."""
    if a[0] == b[0] == "tuple":
        return a[1] == b[1] and all_same(a[2], b[2])
    if a[0] == b[0]:
        rows_a = a[1]
        rows_b = b[1]
        return len(rows_a) == len(rows_b) and all(map(all_same, rows_a, rows_b))
    one = entries(a)
    other = entries(b)
    if ("number", 0) in (a, b) and "matrix" in (a[0], b[0]):  # \mathbf{0} is a column of zeros
        return set(one + other) == {("number", 0)}
    return one != () and all_same(one, other)


def same_written_out(a: tuple, b: tuple) -> bool:
    r"""(2,-1,3) and 2i-j+3k; {2n \atop n} in brackets and \binom{2n}{n}."""
    vector, other = (a, b) if a[0] in ("tuple", "matrix") else (b, a)
    values = entries(vector)
    if other[0] not in ("sum", "product", "call") or len(values) not in (2, 3):
        return False
    units = [("name", letter) for letter in "ijk"]
    in_units = ("sum", tuple(("product", pair) for pair in zip(values, units)))
    above_below = ("call", "binomial", values)
    is_column = vector[0] == "matrix" and len(vector[1]) == 2
    return same_value(in_units, other) or (is_column and same_value(above_below, other))


def same_residue(a: tuple, b: tuple) -> bool:
    """3 mod 7 and 10 mod 7."""
    if not same_tree(a[2], b[2]):
        return False
    difference = ("sum", (a[1], negative(b[1])))
    quotient = constant_value(("product", (difference, ("inverse", a[2]))))
    is_whole = isinstance(quotient, Fraction) and quotient.denominator == 1
    return is_whole or same_tree(a[1], b[1])


def entries(tree: tuple) -> tuple:
    """Entries of a point, a column or a row; () for anything else."""
    if tree[0] == "tuple" and tree[1] == "()":
        return tree[2]
    if tree[0] != "matrix":
        return ()
    if len(tree[1]) == 1:
        return tree[1][0]
    is_column = all(len(row) == 1 for row in tree[1])
    return tuple(row[0] for row in tree[1]) if is_column else ()


def same_items(a: tuple, b: tuple) -> bool:
    """Lists and sets without order, each item once; named items and bare ones in order."""
    one = items_of(a)
    other = items_of(b)
    if len(one) != len(other):
        return same_named_point(one, b) or same_named_point(other, a)
    labels_one = set(map(item_label, one))
    labels_other = set(map(item_label, other))
    if len(labels_one | labels_other) > 2 and {""} in (labels_one, labels_other):
        has_units = any(item[0] == "unit" for item in one + other)
        return has_units and all_same(one, other)  # 8 chickens and 5 rabbits: 8, 5
    return match_all(one, other, same_item)


def items_of(tree: tuple) -> tuple:
    """Items of a list or set; (x,y)=(2,3) is x=2,y=3."""
    if tree[0] in ("list", "set"):
        return tree[1]
    if tree[:2] != ("relation", "="):
        return (tree,)
    names = tree[2][0]
    values = tree[2][-1]
    if names[0] != "tuple" or values[0] != "tuple" or len(names[2]) != len(values[2]):
        return (tree,)
    return tuple(("relation", "=", pair) for pair in zip(names[2], values[2]))


def match_all(one: Sequence, other: Sequence, is_same: Callable) -> bool:
    """Has each item its own partner?"""
    rest = list(other)
    for item in one:
        partner = next((candidate for candidate in rest if is_same(item, candidate)), None)
        if partner is None:
            return False
        rest.remove(partner)
    return not rest


def same_item(a: tuple, b: tuple) -> bool:
    r"""\{1\} and 1 are the same answer, but not the same item of a set of sets."""
    return (a[0] == "set") == (b[0] == "set") and same_tree(a, b)


def item_label(item: tuple) -> str:
    """Unit or name of an item, without index: x of x_1=5, chicken of 8 chickens."""
    return item[2] if item[0] == "unit" else label_of(item).partition("_")[0]


def same_named_point(named: tuple, point: tuple) -> bool:
    """y=4,x=3 and (3,4): the names in alphabetical order."""
    labels = [label_of(item) for item in named]
    if "" in labels or len(set(labels)) < max(2, len(labels)):
        return False
    values = [item[2][-1] for _, item in sorted(zip(labels, named))]
    return all_same(tuple(values), entries(point))


def same_relation(a: tuple, b: tuple) -> bool:
    """Equal part by part, or step by step up to order and a constant factor."""
    if a[1] == b[1]:
        turned = b[2][::-1] if b[1] == "=" else b[2]
        if all_same(a[2], b[2]) or all_same(a[2], turned):
            return True
    return match_all(chain_steps(a), chain_steps(b), same_step)


def chain_steps(relation: tuple) -> list[tuple]:
    """(sign, difference of the sides) of every step of a chain; > and ≥ are turned round."""
    _, signs, parts = relation
    turned = {">": "<", "≥": "≤"}
    found = []
    for sign, left, right in zip(signs, parts, parts[1:]):
        if sign in turned:
            found.append((turned[sign], ("sum", (right, negative(left)))))
        else:
            found.append((sign, ("sum", (left, negative(right)))))
    return found


def same_step(a: tuple, b: tuple) -> bool:
    """2x-4<0 and x-2<0: the differences are multiples of one another."""
    is_inequality = a[0] in ("<", "≤")
    return a[0] == b[0] and is_multiple(a[1], b[1], positive=is_inequality)


# Words around an answer.

CONDITION = re.compile(
    r'^(?P<formula>.*?[^,;(\s])[,;(\s]*'
    r'(?P<condition>"(?:for|where|with|when|if|provided|such that|given)\b.*'
    r'|(?<=[,;(] )[a-zA-Z] *"(?:is )?(?:an?|any|arbitrary)? ?(?:integer|real|number|constant)s?".*'
    r'|(?<=[,;\s(])[a-zA-Z] ?∈ ?(?:\\mathbb|\\reals|[ZNRQ]\b).*'
    r'|(?<=\()[a-zA-Z] ?[<>≤≥≠][^()]*\))$'
)
CONDITION_WORDS = re.compile(
    r"[=<>≤≥≠∈]|\b(?:integers?|real|constants?|numbers?|arbitrary|positive|primes?|rational)\b"
    r'|\b(?:all|any|every|each|some)[" ]+[a-zA-Z]\b'
)
CHOICE = re.compile(
    r'^(?:\( *"?(?P<a>[A-H])"? *\)\s+|"?(?P<b>[A-H])"? *[.):]\s*)'
    r'(?P<content>(?!\W*[A-H]\W*$)[^"\s,;].*)$'
)


def split_condition(text: str) -> tuple[str, str]:
    """n^2 "for all n" -> n^2 and its condition."""
    found = CONDITION.match(text)
    if found is None or not CONDITION_WORDS.search(found["condition"]):
        return text, ""
    first_word = found["condition"].split()[0]
    if "otherwise" in text or (first_word[0] == '"' and text.count(first_word) > 1):
        return text, ""  # several cases
    return found["formula"], found["condition"]


# Words and signs of a condition that say nothing, and its words for sets of numbers.
FILLERS = set(
    "for all any every each where with when if is are be a an the some such that provided given "
    'numbers number values value ∈ , ; . ( ) { } "'.split()
)
NUMBER_SETS = {
    "integer": "Z", "integers": "Z", "real": "R", "reals": "R", "natural": "N", r"\reals": "R",
    r"\mathbb{Z}": "Z", r"\mathbb{N}": "N",
}


def meaning(condition: str) -> tuple:
    """for integers k, k any integer and k∈Z are all ("Z", "k")."""
    tokens = []
    for token in re.findall(r"\\mathbb\{\w\}|\\?[A-Za-z]+|\S", condition):
        if token not in FILLERS:
            tokens.append(NUMBER_SETS.get(token, token))
    if not {"Z", "R", "N"}.isdisjoint(tokens):
        tokens.sort()
    return tuple(tokens)


def with_common_parameter(formula: str, condition: str) -> tuple[str, str]:
    """πn, n∈Z -> πk, k∈Z: the only letter of a condition has any name, and so has the n of πn
    without a condition."""
    letters = set(re.findall(r"(?<![A-Za-z\\])[b-z](?![A-Za-z])", condition))
    if not condition and ("π" in formula or "°" in formula):
        letters = set(re.findall(r"(?<![A-Za-z\\])[kmn](?![A-Za-z])", formula))
    if len(letters) != 1 or "k" in letters or re.search(r"(?<![A-Za-z\\])k", formula):
        return formula, condition
    letter = r"(?<![A-Za-z\\])" + letters.pop() + r"(?![A-Za-z])"
    return re.sub(letter, "k", formula), re.sub(letter, "k", condition)


def split_choice(text: str) -> list[str]:
    """(B) 5 and B. 5 -> B and 5; any other text alone."""
    found = CHOICE.match(text)
    return [text] if found is None else [found["a"] or found["b"], found["content"]]


def plain_text(text: str) -> str:
    """For texts that cannot be read: without idle spaces and quotes, words in small letters."""
    text = re.sub(r"(?<![A-Za-z\\])[A-Za-z]{3,}", lambda word: word[0].casefold(), text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text.replace('"', ""))


def same_text(a: str, b: str) -> bool:
    if plain_text(a) == plain_text(b):
        return plain_text(a) != ""
    try:
        return same_tree(parse_text(a), parse_text(b))
    except (Unreadable, OverflowError):  # or a fraction too large for a float
        return False


def same_answer(a: str, condition_a: str, b: str, condition_b: str) -> bool:
    """A condition may be left out on one side, and so may a choice letter."""
    if condition_a and condition_b and meaning(condition_a) != meaning(condition_b):
        return False
    parts_a = split_choice(a)
    parts_b = split_choice(b)
    if len(parts_a) == len(parts_b):
        return all(map(same_text, parts_a, parts_b))
    return any(same_text(x, y) for x in parts_a for y in parts_b)


def is_equiv(a: str, b: str) -> bool:
    """Whether two answers are equal; one that cannot be read equals only the same text. [ours]"""
    if max(len(a), len(b)) > MAX_CHARS:
        return a.strip() == b.strip()
    answers = (*split_condition(normalise(a)), *split_condition(normalise(b)))
    if same_answer(*answers):
        return True
    renamed = (*with_common_parameter(*answers[:2]), *with_common_parameter(*answers[2:]))
    return renamed != answers and same_answer(*renamed)


def reward_fn(completion: str, answer: str | float | list) -> float:
    """1.0 if the last box equals the answer (or one of a list), else 0.0. [ours]

    Each right answer may itself be a text with a box, such as a solution.
    """
    box = extract_boxed(completion)
    golds = answer if isinstance(answer, (list, tuple, set)) else [answer]
    for gold in map(str, golds):
        if BOX.search(gold):
            gold = extract_boxed(gold) or ""
        if box is not None and is_equiv(box, gold):
            return 1.0
    return 0.0


def is_readable(gold: str) -> bool:
    """False if this right answer would be compared as text only. [ours]"""
    if len(gold) > MAX_CHARS:
        return False
    text = split_condition(normalise(gold))[0]
    try:
        tree = parse_text(text)
        return same_tree(tree, tree)
    except (Unreadable, OverflowError):
        return bool(re.fullmatch(r'[\w\s".,:\'-]*"[\w\s".,:\'-]*', text))


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
        if value is not None and value != "":
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
                f"{place}: the answer must be text or a number, not {answer!r:.80}; "
                "delete that row",
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
            f"{source}: {len(unreadable)} answers cannot be read as mathematics and may match only "
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
    print(
        f"{name}: {len(kept)} questions, {left_out} left out as longer than {longest} tokens; an "
        f"answer has up to {budget}"
    )
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
    vocab_size = min(max(vocabulary.values()) + 1, model.config.vocab_size)
    stops = {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")}
    for named in (model.config.eos_token_id, model.generation_config.eos_token_id):
        stops |= set(named) if isinstance(named, list) else {named}
    eos_ids = sorted(stop for stop in stops if stop is not None and stop < vocab_size)
    require(
        eos_ids,
        f"the model has no embedding for the end token {tokenizer.eos_token!r}; set another "
        "eos_token in its tokenizer_config.json",
    )
    return Decoding(tuple(eos_ids), vocab_size, temperature, max_rows)


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
    compile_config._compile_all_devices = True  # else --compile on would be ignored on a CPU
    length += Workspace.padding
    workspace = Workspace(decoding.max_rows, length, compile_config)
    static = dataclasses.replace(decoding, workspace=workspace)
    original = model.config._attn_implementation
    use_grouped_attention(model)
    set_up_compiler()
    print("compiling the decoding step, which takes about a minute", flush=True)
    start = time.perf_counter()
    try:
        sample_trees(model, [[decoding.eos_ids[0]]], [8], [4], static)
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
) -> dict[str, float | None]:
    """Held-out accuracy: avg@samples at the decoding's temperature with its standard error over
    questions, and greedy. It has a random stream of its own, so that evaluating never changes the
    training."""
    prompts = [question["prompt"] for question in questions]
    answers = [question["answer"] for question in questions]

    def shares_right(width: int, how: Decoding) -> list[float]:
        trees = sample_trees(model, prompts, [width], [budget], how)
        verify_leaves(trees, answers, tokenizer)
        return [backup_rewards(root) for root in trees]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = shares_right(samples, decoding)
        greedy = shares_right(1, dataclasses.replace(decoding, temperature=0.0))
    error = None  # of a single question
    if len(sampled) > 1:
        error = stdev(sampled) / math.sqrt(len(sampled))
    return {
        "eval/accuracy": fmean(sampled),
        "eval/standard_error": error,
        "eval/greedy_accuracy": fmean(greedy),
    }


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
        text = f"{self.name} {self.count:,} tokens" if self.count else self.name
        try:
            self.bar.set_postfix_str(text)
        except BrokenPipeError:  # Ctrl-C ends `2>&1 | tee log`, too; the step is still to be saved
            self.bar.disable = True


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
    stops at once. SIGTERM, by which batch systems end a job, counts as Ctrl-C."""
    signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "CtrlC":
        self.pressed = False
        self.originals = [signal.signal(number, self.press) for number in self.signals]
        return self

    def press(self, number: int, frame: object) -> None:
        self.pressed = True
        for number in self.signals:
            signal.signal(number, signal.default_int_handler)
        text = b"\nstopping after this step or evaluation; Ctrl-C again: at once\n"
        try:
            os.write(2, text)  # print could meet itself: a signal may come in the middle of another
        except BrokenPipeError:  # see Status.show
            pass

    def __exit__(self, *error: object) -> None:
        for number, original in zip(self.signals, self.originals):
            signal.signal(number, original)


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


def turn_on_checkpointing(model: torch.nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
    enable = enable or model.gradient_checkpointing_enable
    enable()


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
    if settings.grad_checkpointing:
        turn_on_checkpointing(model)
    return model, sampler, reference


def restore(resumed: Path | None, optimizer: torch.optim.Optimizer) -> dict:
    """Optimiser and random numbers of the checkpoint, if there is one -> its newest metrics."""
    if resumed is None:
        return {"step": -1, "tokens_sampled": 0, "skipped": 0}  # -1: before the evaluation, step 0
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
    if decoding.workspace is not None and dtype == "mixed":  # the one dtype that was measured
        compile_training(model, settings.compile)
        if reference is not None:
            compile_training(reference, settings.compile)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(0.9, 0.999),  # [code]
        weight_decay=0.01,  # [code]
        fused=device == "cuda",  # without a second copy of the weights
    )
    torch.manual_seed(settings.seed)
    last = restore(resumed, optimizer)
    if settings.resume is not None:
        print(f"continuing from {resumed or 'the beginning, as there is no checkpoint yet'}")
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
        first = trees[0].question
        for root in by_question(trees)[first]:
            print_tree(root, batch[first], run.tokenizer)
    return row


def evaluate_run(run: Run, settings: Settings, status: Status) -> dict[str, float | None]:
    status.phase("evaluating")
    decoding = dataclasses.replace(run.decoding, progress=status.tokens)
    budget = sum(per_level(settings.step_len, settings.branching))
    return evaluate(
        run.sampler, run.tokenizer, run.held_out, settings.eval_samples, budget, decoding,
        settings.seed,
    )


def log(run: Run, row: dict) -> None:
    """Write a row of metrics, and make it the newest one, which a checkpoint holds."""
    append_jsonl(run.out / "metrics.jsonl", [row])
    run.last.update(row)


def evaluate_before_training(run: Run, settings: Settings) -> None:
    with tqdm(desc="before training", bar_format="{desc}{postfix}", leave=False) as bar:
        row = {"step": 0, **evaluate_run(run, settings, Status(bar))}
    log(run, row)
    print(step_line(row, settings.steps), flush=True)


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
            log(run, row)
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
            tqdm.write(step_line(row, settings.steps))  # after saving: it fails if nobody reads it
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
        if ctrl_c.pressed:
            print(f"stopped; start again with: python treerpo.py --resume {run.out}")
            return 130
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
        "Exit status: 0 done, 2 bad input, 130 interrupted (once: saved; twice: not), 1 all else.",
    ]
    return HfArgumentParser(
        GROUPS,
        prog="treerpo.py",
        usage="python treerpo.py [flags]",
        description="TreeRPO (arXiv 2506.05183) in one file: train a small maths model on one GPU.",
        epilog="\n".join(presets),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def read_flags(parser: HfArgumentParser, settings: type, argv: list[str] | None) -> dict:
    """The flags that were given, and no others; settings is the class with a field for each."""
    not_given = object()
    names = [entry.name for entry in dataclasses.fields(settings)]
    blank = argparse.Namespace(**dict.fromkeys(names, not_given))
    parsed = vars(parser.parse_args(argv, blank))
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
    given = read_flags(make_parser(), Settings, argv)
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
        print("stopped at once; --resume continues from a run's last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # Ctrl-C ends the tee of `| tee log`, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python itself prints at the end
        print("nobody reads the output any more; continue with --resume", file=sys.stderr)
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
