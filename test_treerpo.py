"""The tests: each claim against an independent oracle (the paper's own figure, brute force, a closed
form, a naive version). Offline, on the CPU, with tiny models. `SLOW=1 python -m pytest -q` runs
all of them, without it the slowest are left out.

The algorithm      the paper's Figure 2 and its advantages by hand, backup, pruning, sampling
                   against full forwards and exact distributions, the static workspace, packs,
                   the loss and its gradient, mini-batches, GRPO, GSPO, TreeAdv, copied pieces
The verifier       pairs that are equal or different by kind, rules that are choices, hostile input
Data, settings,    templates and question files, flags and bad input, metrics and dumped trees,
whole runs         resuming bit by bit, kills, full disks, the screen
eval.py            figures by brute force, protocols, interrupted evaluations, comparisons
"""
import ast
import contextlib
import copy
import dataclasses
import fcntl
import gc
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import timeit
import traceback
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a machine with a GPU runs the very same tests

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eval as ev  # the file, not the builtin
import treerpo
from treerpo import (
    BadInput,
    Decoding,
    DrawToken,
    Node,
    Workspace,
    add_leaf_advantages,
    add_sibling_advantages,
    add_workspace,
    ancestor_mask,
    backup_rewards,
    compile_training,
    extract_boxed,
    group_relative_advantages,
    grouped_attention,
    is_equiv,
    is_informative,
    is_readable,
    pack_nodes,
    pack_row,
    policy_loss,
    reward_fn,
    sample_forests,
    sample_trees,
    split_by_question,
    token_logps,
    turn_on_checkpointing,
    update_policy,
    use_grouped_attention,
)

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="set SLOW=1 to run it")

# =================================================================================== The algorithm
# -------------------------------------------------------------- Models and trees made for the tests
# Everything says "CPU, float32" itself, whatever the defaults of the machine are.
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
CPU = torch.device("cpu")
VOCABULARY = 24
N_TOKENS = 20  # ids 20 to 23 only pad the embedding matrix
EOS = (3, 5, 9, 13)  # a prompt may hold them, too; the first one is the padding
PROMPTS = [[5, 6, 7, 8, 9], [4], [10, 11, 12]]  # ragged, one of a single token


def tiny_model(kind="qwen2", sharpness=12.0, seed=0):
    """A random model with predictions sharp enough that a mistake shows."""
    config_class, model_class = KINDS[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 3,
    }
    if kind == "qwen3":
        shape["head_dim"] = 8
    torch.manual_seed(seed)
    model = model_class(config_class(**shape)).to("cpu", torch.float32).eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            weights.data.mul_(sharpness)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(params=KINDS)
def tiny(request):
    """A test with this argument runs once for each kind of model."""
    return tiny_model(request.param)


def decoding(**changes):
    return dataclasses.replace(Decoding(EOS, N_TOKENS, temperature=1.0), **changes)


def static(length=64, max_rows=64, compile_config=None, **changes):
    """The same over one static block of memory, as on a GPU."""
    workspace = Workspace(max_rows, length, compile_config)
    workspace.row_multiple = 16  # small, so that a few rows have several shapes
    workspace.check_every = 1  # draws as many random numbers as the loop inside generate
    return decoding(max_rows=max_rows, workspace=workspace, **changes)


def tree(nested):
    """Nested lists with a reward for every leaf -> the tree."""
    def build(item, parent):
        if not isinstance(item, list):
            return Node([1], parent, reward=float(item))
        node = Node([1], parent)
        for child in item:
            build(child, node)
        return node

    return build(nested, None)


def nodes_of(trees):
    """All steps of these trees, without their prompts."""
    return [node for root in trees for node in root.steps()]


def path_ids(node):
    return [token for step in node.path() for token in step.tokens]


def random_rewards(trees, seed=0):
    """Right or wrong by lot, then backed up and compared with Eq. 4."""
    draw = random.Random(seed)
    for root in trees:
        for leaf in root.leaves():
            leaf.reward = float(draw.random() < 0.5)
        backup_rewards(root)
    add_sibling_advantages(trees, "variance", 0.1)
    return trees


def sampled_trees(model, branching=(3, 2, 2), step_len=4, prompts=PROMPTS, seed=0):
    """A sampled and graded batch. Some steps end early, and some groups are pruned."""
    torch.manual_seed(seed)
    step_lens = [step_len] * len(branching)
    return random_rewards(sample_trees(model, prompts, list(branching), step_lens, decoding()))


# The oracle of sampling and update alike: one path, one plain causal forward, no cache, no packs.
def own_logits(model, node, temperature):
    """[L, N_TOKENS], the logits under which the L tokens of a node were drawn."""
    ids = path_ids(node)
    first = len(ids) - len(node.tokens)
    logits = model(torch.tensor([ids])).logits[0, :, :N_TOKENS].float() / temperature
    return logits[first - 1:-1]


def own_logps(model, node, temperature):
    logps = own_logits(model, node, temperature).log_softmax(-1)
    return torch.stack([row[token] for row, token in zip(logps, node.tokens)])


def own_entropies(model, node, temperature):
    logps = own_logits(model, node, temperature).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


# ------------------------------------------------------ The worked examples (Figure 2; Eq. 3 and 4)
# Figure 2 of the paper, and Eq. 3 and 4 on two groups that fit in the head.
FIGURE_2 = [
    [[0, 0, [0, 0, 1]], 0, 0],
    [0, [0, 1, 0], 1],
    [1, 1, [[0, 1, 1], 0, 1]],
]


def test_figure_2_of_the_paper():
    """Backed-up rewards as printed there; which groups are kept; Eq. 4 by hand, in fractions."""
    root = tree(FIGURE_2)
    first, second, third = root.children
    rewards = {
        root: 4 / 9,
        first: 1 / 27,
        first.children[0]: 1 / 9,
        first.children[0].children[2]: 1 / 3,
        second: 4 / 9,
        second.children[1]: 1 / 3,
        third: 23 / 27,
        third.children[2]: 5 / 9,
        third.children[2].children[0]: 2 / 3,
    }
    assert backup_rewards(root) == pytest.approx(4 / 9, abs=1e-12)
    for node, reward in rewards.items():
        assert node.reward == pytest.approx(reward, abs=1e-12)
        assert f"{node.reward:.3f}"[1:] in Node.__doc__  # the figure printed in the source

    groups = add_sibling_advantages([root], "variance", 0.1)
    assert len(groups) == len(rewards) == 9
    assert all(node.trained for node in root.steps())

    # Eq. 4: A = (R - mu) / (mu (1 - mu)). At the root mu = 4/9, so mu (1 - mu) = 20/81.
    for child, reward in zip(root.children, (1 / 27, 4 / 9, 23 / 27)):
        assert child.advantage == pytest.approx((reward - 4 / 9) * 81 / 20, abs=1e-12)
    assert [round(child.advantage, 2) for child in root.children] == [-1.65, 0, 1.65]
    by_hand = {
        first: [27 / 13, -27 / 26, -27 / 26],
        first.children[0]: [-9 / 8, -9 / 8, 9 / 4],
        first.children[0].children[2]: [-3 / 2, -3 / 2, 3],
        second: [-9 / 5, -9 / 20, 9 / 4],
        second.children[1]: [-3 / 2, 3, -3 / 2],
        third: [27 / 23, 27 / 23, -54 / 23],
        third.children[2]: [9 / 20, -9 / 4, 9 / 5],
        third.children[2].children[0]: [-3, 3 / 2, 3 / 2],
    }
    for parent, advantages in by_hand.items():
        found = [child.advantage for child in parent.children]
        assert found == pytest.approx(advantages, abs=1e-12)
    assert root.advantage == 0 and not root.trained

    # Two groups have a range below .34: .111 and .333. Calling it again replaces, never adds.
    add_sibling_advantages([root], "variance", 0.34)
    pruned = [*first.children, *first.children[0].children]
    for node in root.steps():
        assert node.trained == (node not in pruned)
        assert (node.advantage == 0) == (node in pruned or node is second)


@pytest.mark.parametrize(
    "rewards, by_std, by_variance, kept",
    [
        ([0, 0, 1, 1], [-1, -1, 1, 1], [-2, -2, 2, 2], True),
        ([0.49, 0.49, 0.51, 0.51], [-1, -1, 1, 1], [-0.04, -0.04, 0.04, 0.04], False),
        ([0.5, 0.5, 0.5], [0, 0, 0], [0, 0, 0], False),
    ],
)
def test_equations_3_and_4_on_groups_that_fit_in_the_head(rewards, by_std, by_variance, kept):
    """Eq. 3 cannot tell a near tie from a difference. Eq. 4 can, and tau prunes it."""
    found = group_relative_advantages(rewards, "std").tolist()
    assert found == pytest.approx(by_std, abs=1e-12)
    found = group_relative_advantages(rewards, "variance").tolist()
    assert found == pytest.approx(by_variance, abs=1e-12)
    found = group_relative_advantages(rewards, "none").tolist()
    mean = sum(rewards) / len(rewards)
    assert found == pytest.approx([reward - mean for reward in rewards], abs=1e-12)
    assert is_informative(rewards, 0.1) == kept


# ---------------------------------------------------------------------------------- The tree (§3.1)
def test_a_node_enters_the_children_of_its_parent():
    """Also what path, walk, leaves and steps mean, on a root with a child and two grandchildren."""
    root = Node([1, 2], question=7)
    child = Node([3], root)
    first = Node([4], child)
    second = Node([5], child)
    assert root.children == [child]
    assert child.children == [first, second]
    assert second.path() == [root, child, second]
    assert list(root.walk()) == [root, child, first, second]
    assert root.steps() == [child, first, second]
    assert root.leaves() == [first, second]
    assert root.question == 7
    assert "children" not in repr(root) and "parent" not in repr(first)  # no endless output


# ----------------------------------------------------------------------------- Tree sampling (§3.1)
@pytest.mark.parametrize("limits", [
    {"max_rows": 100},
    {"max_rows": 5},                # below the frontier: walked in chunks
    {"max_rows": 1},
    {"max_rows": 7, "call_len": 2},  # a step takes several calls of generate
], ids=str)
def test_sampling_from_caches_equals_full_forwards(tiny, limits):
    """Every distribution that was sampled from follows from a forward without cache, padding or
    other rows. Seen through its entropy; float32 differs by less than 1e-4."""
    step_lens = [4, 3, 5]
    branching = [6, 2, 2]
    torch.manual_seed(1)
    how = decoding(temperature=1.3, keep_entropies=True, **limits)
    roots = sample_trees(tiny, PROMPTS, branching, step_lens, how)
    assert [root.tokens for root in roots] == PROMPTS
    assert [root.question for root in roots] == [0, 1, 2]
    for root in roots:
        assert len(root.children) == 6
    depths = set()
    for node in nodes_of(roots):
        depth = len(node.path()) - 1
        expected = own_entropies(tiny, node, 1.3)
        torch.testing.assert_close(torch.tensor(node.entropies), expected, atol=1e-4, rtol=0)
        assert max(node.tokens) < N_TOKENS
        assert not set(EOS) & set(node.tokens[:-1])  # the end token is kept, nothing behind it
        assert node.done == (node.tokens[-1] in EOS)
        if node.done:
            depths.add(depth)
        else:
            assert len(node.tokens) == step_lens[depth - 1]
        is_leaf = node.done or depth == 3
        assert len(node.children) == (0 if is_leaf else branching[depth])
    assert depths == {1, 2, 3}  # branches do end at every level


@pytest.mark.parametrize("call_len", [384, 3])
def test_greedy_takes_the_argmax_of_full_forwards(tiny, call_len):
    how = decoding(temperature=0.0, call_len=call_len)
    for root in sample_trees(tiny, PROMPTS, [1, 1], [5, 7], how):
        leaf = root.leaves()[0]
        for node in leaf.path()[1:]:
            assert node.tokens == own_logits(tiny, node, 1.0).argmax(-1).tolist()


def assert_drawn_from(outcomes, probabilities):
    """Chi-square: do the outcomes follow these probabilities (a dict that sums to 1)?

    Cells with fewer than five expected outcomes are pooled, as is usual. The bound lies above the
    99.9 % point of the distribution; the seeds are fixed, so a test that passes stays so.
    """
    n = len(outcomes)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert set(outcomes) <= set(probabilities)
    pooled_expected = 0.0
    pooled_observed = 0
    statistic = 0.0
    cells = 0
    for outcome, probability in probabilities.items():
        expected = n * probability
        observed = outcomes.count(outcome)
        if expected < 5:
            pooled_expected += expected
            pooled_observed += observed
            continue
        statistic += (observed - expected) ** 2 / expected
        cells += 1
    if pooled_expected > 0:
        statistic += (pooled_observed - pooled_expected) ** 2 / max(pooled_expected, 1.0)
        cells += 1
    freedom = cells - 1
    assert freedom > 10  # enough to see something
    assert statistic < freedom + 3.3 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trees_follow_the_exact_distribution(temperature):
    """All outcomes of a child (a token), its two children (a token each) and their joint
    distribution, enumerated from full forwards: p(a) p(b | a) p(c | a) if a does not end it."""
    model = tiny_model(sharpness=6.0)
    prompt = PROMPTS[0]
    n_tokens = 6  # ids 0 to 5; 3 and 5 end an answer

    def distribution(ids):
        logits = model(torch.tensor([ids])).logits[0, -1, :n_tokens].double()
        return (logits / temperature).softmax(-1).tolist()

    probabilities = {}
    for a, p_a in enumerate(distribution(prompt)):
        if a in EOS:
            probabilities[(a,)] = p_a
            continue
        after_a = distribution([*prompt, a])
        for b, c in itertools.product(range(n_tokens), repeat=2):
            probabilities[(a, b, c)] = p_a * after_a[b] * after_a[c]

    torch.manual_seed(2)
    how = decoding(vocab_size=n_tokens, temperature=temperature, max_rows=1500)
    root = sample_trees(model, [prompt], [6000, 2], [1, 1], how)[0]
    outcomes = []
    for child in root.children:
        tokens = [token for node in child.walk() for token in node.tokens]
        outcomes.append(tuple(tokens))
    assert_drawn_from(outcomes, probabilities)


def test_a_draw_is_the_one_of_torch_multinomial():
    """From the same random numbers. The ids that only pad the embedding matrix are never drawn."""
    logits = 3 * torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[:, N_TOKENS:] = 100.0
    torch.manual_seed(4)
    expected = torch.multinomial((logits[:, :N_TOKENS] / 0.6).softmax(-1), 1)[:, 0]
    torch.manual_seed(4)
    draw_token = DrawToken(decoding(temperature=0.6), 50)
    drawn = draw_token(None, logits).argmax(-1)
    assert torch.equal(drawn, expected)
    assert len(set(drawn.tolist())) > 5 and drawn.max() < N_TOKENS

    state = torch.get_rng_state()
    greedy = DrawToken(decoding(temperature=0.0), 50)(None, logits).argmax(-1)
    assert torch.equal(greedy, logits[:, :N_TOKENS].argmax(-1))
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers for nothing


def test_the_generation_config_of_a_checkpoint_has_no_influence():
    own = GenerationConfig(
        do_sample=True,
        top_p=0.3,
        top_k=2,
        min_p=0.5,
        temperature=0.1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[5, 6, 7],
        min_new_tokens=5,
        eos_token_id=9,
    )
    tokens = []
    for config in (GenerationConfig(), own):
        model = tiny_model()
        model.generation_config = config
        torch.manual_seed(4)
        roots = sample_trees(model, PROMPTS, [4, 2], [5, 5], decoding())
        tokens.append([node.tokens for node in nodes_of(roots)])
        assert model.generation_config is config  # as it was, for saving
    assert tokens[0] == tokens[1]


def test_logits_that_are_not_numbers_raise():
    model = tiny_model()
    own = model.generation_config
    for temperature in (1.0, 0.0):
        model.lm_head.weight.data[4, 0] = math.nan
        with pytest.raises(FloatingPointError, match="not numbers"):
            sample_trees(model, PROMPTS, [2], [4], decoding(temperature=temperature))
    model.lm_head.weight.data[4, 0] = 0
    model.lm_head.weight.data[VOCABULARY - 1, 0] = math.nan  # an id that is never drawn
    sample_trees(model, PROMPTS, [2], [4], decoding())
    assert model.generation_config is own


def test_sampling_turns_off_gradients_and_training_mode():
    """In training mode with gradient checkpointing `generate` would drop the cache silently."""
    model = tiny_model()
    checkpointed = tiny_model()
    turn_on_checkpointing(checkpointed)
    checkpointed.train()
    tokens = []
    for each in (model, checkpointed):
        torch.manual_seed(4)
        roots = sample_trees(each, PROMPTS, [3, 2], [4, 4], decoding())
        tokens.append([node.tokens for node in nodes_of(roots)])
        assert not each.training
    assert tokens[0] == tokens[1]


def rows_of_every_forward(model, how, branching, step_lens, prompts=PROMPTS):
    """How many sequences each decoding step continued, and the trees."""
    told = []
    torch.manual_seed(3)
    how = dataclasses.replace(how, progress=told.append)
    return told, sample_trees(model, prompts, branching, step_lens, how)


@pytest.mark.parametrize("call_len", [2, 3, 384])
def test_a_long_step_drops_finished_rows_after_every_call(call_len):
    told, roots = rows_of_every_forward(tiny_model(), decoding(call_len=call_len), [5], [8])
    lengths = [len(node.tokens) for node in nodes_of(roots)]
    expected = []
    for start in range(0, 8, call_len):
        alive = [length - start for length in lengths if length > start]
        if alive:
            expected += [len(alive)] * min(max(alive), call_len)
    assert told == expected
    assert max(lengths) > 3 and min(lengths) < 3


@pytest.mark.parametrize("max_rows", [1, 4, 7, 15])
def test_no_call_of_generate_has_more_than_max_rows(max_rows):
    """Six prompts with five children, then three each: frontiers of 30 and up to 90 rows."""
    for how in (decoding(max_rows=max_rows), static(max_rows=max_rows)):
        told, roots = rows_of_every_forward(tiny_model(), how, [5, 3], [1, 2], PROMPTS * 2)
        assert max(told) == max_rows
        assert [len(root.children) for root in roots] == [5] * 6
        for node in nodes_of(roots):
            assert node.done or len(node.children) == 3 or len(node.path()) == 3


def test_the_generation_config_comes_back_when_sampling_is_interrupted():
    def interrupt(n_rows):
        raise KeyboardInterrupt

    model = tiny_model()
    own = model.generation_config
    with pytest.raises(KeyboardInterrupt):
        sample_trees(model, PROMPTS, [2], [4], decoding(progress=interrupt))
    assert model.generation_config is own


def test_stop_ids_come_from_everywhere():
    class Tokenizer:
        eos_token = "<e>"
        eos_token_id = 1

        def get_vocab(self):
            return {"a": 0, "<e>": 1, "<|im_end|>": 17, "z": 19}

    model = tiny_model()
    model.config.eos_token_id = [3, 4, 21]  # 21 is no token of this tokenizer
    model.generation_config.eos_token_id = 5
    made = treerpo.make_decoding(model, Tokenizer(), 0.6, 8)
    assert made == Decoding((1, 3, 4, 5, 17), vocab_size=20, temperature=0.6, max_rows=8)


# ------------------------------------------------------------------- Leaf rewards and backup (§3.1)
def test_an_inner_node_takes_the_mean_of_its_children_not_of_its_leaves():
    root = tree([1, [0, 0, [1, 0]]])
    assert backup_rewards(root) == pytest.approx((1 + (0 + 0 + 1 / 2) / 3) / 2, abs=1e-12)
    leaves = [leaf.reward for leaf in root.leaves()]
    assert root.reward != pytest.approx(statistics.mean(leaves))


def test_backup_names_a_leaf_that_nobody_graded():
    root = tree([1, [0, 1]])
    root.children[1].children[0].reward = None
    with pytest.raises(ValueError, match="leaf has no reward"):
        backup_rewards(root)


# -------------------------------------------------- Pruning and advantages (§3.2, §3.3, Eq. 1 to 4)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalizer", ["variance", "std", "none"])
def test_uneven_trees_group_by_group(normalizer, seed):
    """Eq. 1 to 4 by the standard library: each group alone, whatever the shape of the tree."""
    draw = random.Random(seed)

    def grow(depth):
        if depth == 0 or draw.random() < 0.3:
            return draw.choice([0, 0, 1])
        return [grow(depth - 1) for _ in range(draw.randint(1, 4))]

    root = tree([grow(4) for _ in range(4)])
    backup_rewards(root)
    groups = iter(add_sibling_advantages([root], normalizer, 0.3))
    for parent in root.walk():
        if not parent.children:
            continue
        rewards = [child.reward for child in parent.children]
        assert next(groups) == rewards
        assert parent.reward == pytest.approx(statistics.mean(rewards), abs=1e-12)
        mu = statistics.mean(rewards)
        divisor = {"variance": mu * (1 - mu), "std": statistics.pstdev(rewards), "none": 1}
        kept = max(rewards) - min(rewards) > 0.3
        for child in parent.children:
            expected = (child.reward - mu) / divisor[normalizer] if kept else 0
            assert child.advantage == pytest.approx(expected, abs=1e-9)
            assert child.trained == kept
    assert next(groups, None) is None


def test_eq_4_is_eq_3_over_the_standard_deviation_for_zero_one_rewards():
    """The population variance of 0/1 rewards is mu (1 - mu); of rewards in [0, 1] it is at most
    that. torch.std divides by n - 1 and would fail here."""
    for n_right in range(1, 8):
        rewards = [1.0] * n_right + [0.0] * (8 - n_right)
        mu = n_right / 8
        by_std = group_relative_advantages(rewards, "std")
        by_variance = group_relative_advantages(rewards, "variance")
        torch.testing.assert_close(by_variance, by_std / math.sqrt(mu * (1 - mu)))
        assert abs(by_variance.sum()) < 1e-12


def test_a_group_whose_range_is_exactly_tau_is_pruned():
    """Eq. 2 says larger than tau. 0.3 - 0.2 is a little less than 0.1 in floating point, and
    0.8 - 0.7 a little more: neither may decide."""
    assert not is_informative([0.2, 0.3], 0.1)
    assert not is_informative([0.7, 0.8], 0.1)
    assert is_informative([0.2, 0.301], 0.1)
    assert not is_informative([0.5, 0.5], 0.0)
    assert is_informative([0.5, 0.5001], 0.0)


def test_rewards_equal_but_for_rounding_have_no_advantage():
    for normalizer in ("variance", "std", "none"):
        for rewards in ([1 / 3, 1 / 3 + 1e-16], [0.1 + 0.2, 0.3], [0, 0], [1, 1, 1]):
            assert not group_relative_advantages(rewards, normalizer).any()


def test_an_unknown_normalizer_and_rewards_out_of_range_are_named():
    with pytest.raises(ValueError, match="'bernoulli': choose 'variance', 'std' or 'none'"):
        group_relative_advantages([0, 1], "bernoulli")
    for rewards in ([0, 2], [-1, 1]):
        with pytest.raises(ValueError, match=r"needs rewards in \[0, 1\]"):
            group_relative_advantages(rewards, "variance")
        assert group_relative_advantages(rewards, "std").tolist() == pytest.approx([-1, 1])


# ----------------------------------------------------------------------- A tree in one forward pass
PACK_LENS = [1, 17, 64, 10**6]


@pytest.mark.parametrize("pack_len", PACK_LENS)
def test_packs_score_every_trained_step_once_behind_its_ancestors(pack_len):
    roots = sampled_trees(tiny_model())
    packs = pack_nodes(roots, pack_len)
    scored = [node for pack in packs for node in pack if pack[node]]
    assert scored == [node for node in nodes_of(roots) if node.trained]
    for pack in packs:
        nodes = list(pack)
        for node in nodes:
            assert node.parent is None or nodes.index(node.parent) < nodes.index(node)
        size = sum(len(node.tokens) for node in nodes)
        n_scored = sum(pack.values())
        assert size <= pack_len or n_scored == 1  # one path alone may be longer
        for node in nodes:  # nothing is in it without need
            assert any(pack[below] for below in node.walk() if below in pack)
    for pack, following in itertools.pairwise(packs):  # none is closed before it is full
        first = next(node for node in following if following[node])
        new = [step for step in first.path() if step not in pack]
        assert sum(len(step.tokens) for step in [*pack, *new]) > pack_len


def test_a_token_sees_its_own_path_and_nothing_else():
    """The mask made from two integers a token, against the paths of the nodes."""
    model = tiny_model()
    for pack in pack_nodes(sampled_trees(model), 40):
        row = pack_row(pack, CPU)
        owners = [node for node in pack for _ in node.tokens]
        mask = ancestor_mask(model, row)
        assert mask.shape == (1, 1, len(owners), len(owners))
        for i, j in itertools.product(range(len(owners)), repeat=2):
            expected = j <= i and owners[j] in owners[i].path()
            assert mask[0, 0, i, j].item() is expected


def test_the_padding_of_a_pack_changes_no_score():
    """Compiled code wants few lengths: a power of two, at least 1,024. Rounding: 1e-5."""
    model = tiny_model()
    for pack in pack_nodes(sampled_trees(model), 64):
        plain = pack_row(pack, CPU)
        padded = pack_row(pack, CPU, padded=True)
        length = plain.ids.shape[1]
        assert padded.ids.shape == (1, 1024)
        mask = ancestor_mask(model, padded)[0, 0]
        assert torch.equal(mask[:length, :length], ancestor_mask(model, plain)[0, 0])
        assert not mask[:length, length:].any()
        assert mask.any(1).all()  # a softmax over nothing would be NaN
        found = token_logps(model, padded, 0.6, N_TOKENS)
        expected = token_logps(model, plain, 0.6, N_TOKENS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_blocks_for_flex_attention_are_the_ancestor_mask():
    """The same mask, token by token, and no block of it left out or taken in without need. The
    attention itself needs a GPU."""
    model = tiny_model()
    flex_model = tiny_model()
    flex_model.set_attn_implementation("flex_attention")
    for pack in pack_nodes(sampled_trees(model), 10**6):
        row = pack_row(pack, CPU, padded=True)
        expected = ancestor_mask(model, row)[0, 0]
        blocks = ancestor_mask(flex_model, row)
        at = torch.arange(1024)
        assert torch.equal(blocks.mask_mod(0, 0, at[:, None], at[None]), expected)
        needed = expected.view(8, 128, 8, 128).any(3).any(1)
        assert torch.equal(blocks.to_dense()[0, 0].bool(), needed)


def gradient(loss, model):
    """[all weights of the model]"""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in gradients])


@pytest.mark.parametrize("pack_len", PACK_LENS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_scores_equal_path_by_path_forwards(tiny, pack_len, temperature):
    """Log-probs and entropies, values (1e-5) and gradients (relative 1e-5), in float32. With packs
    of 17 tokens the output layer runs in chunks of three tokens, too."""
    roots = sampled_trees(tiny)
    max_logits = 3 * N_TOKENS if pack_len == 17 else 2**25
    logps = []
    entropies = []
    nodes = []
    for pack in pack_nodes(roots, pack_len):
        row = pack_row(pack, CPU)
        scored = token_logps(tiny, row, temperature, N_TOKENS, max_logits)
        logps.append(scored[0])
        entropies.append(scored[1])
        here = [node for node in pack if pack[node]]
        assert row.advantages.tolist() == pytest.approx([node.advantage for node in here])
        assert row.step_of.tolist() == [k for k, node in enumerate(here) for _ in node.tokens]
        nodes += here
    logps = torch.cat(logps)
    entropies = torch.cat(entropies)
    plain_logps = torch.cat([own_logps(tiny, node, temperature) for node in nodes])
    plain_entropies = torch.cat([own_entropies(tiny, node, temperature) for node in nodes])
    torch.testing.assert_close(logps, plain_logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, plain_entropies, atol=1e-5, rtol=1e-5)
    weights = torch.arange(len(logps)) % 7 - 3.0
    packed = gradient((logps * weights + entropies * weights.flip(0)).sum(), tiny)
    plain = gradient((plain_logps * weights + plain_entropies * weights.flip(0)).sum(), tiny)
    assert (packed - plain).norm() <= 1e-5 * plain.norm()


def test_the_output_layer_never_makes_more_logits_than_allowed():
    """Chunks of four tokens; each is computed again in the backward pass instead of being kept."""
    model = tiny_model()
    (pack,) = pack_nodes(sampled_trees(model), 10**6)
    row = pack_row(pack, CPU)
    n_rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: n_rows.append(len(output)))
    logps, entropies = token_logps(model, row, 0.6, N_TOKENS, max_logits=4 * N_TOKENS)
    assert max(n_rows) == 4 and sum(n_rows) == len(row.targets)
    (logps.sum() + entropies.sum()).backward()
    assert max(n_rows) == 4 and sum(n_rows) == 2 * len(row.targets)
    n_rows.clear()
    logps, _ = token_logps(model, row, 0.6, N_TOKENS)
    logps.sum().backward()
    assert n_rows == [len(row.targets)]  # kept, as all of them are few


def test_end_tokens_are_trained_although_they_are_the_padding():
    roots = sampled_trees(tiny_model())
    ends = sum(node.done for node in nodes_of(roots) if node.trained)
    assert ends > 0
    targets = []
    for pack in pack_nodes(roots, 40):
        targets += pack_row(pack, CPU).targets.tolist()
    assert sum(target in EOS for target in targets) == ends


# ---------------------------------------------------------------------- The objective (§3.4, Eq. 5)
LOGPS = [-1.0, -1.5, -0.2, -2.0, -0.7, -0.9]
OLD_LOGPS = [-1.5, -1.4, -0.9, -1.0, -0.7, -0.8]
REF_LOGPS = [-1.2, -1.5, -0.1, -14.0, -0.5, 11.0]  # two of them meet the clamp
ENTROPIES = [0.1, 0.9, 0.4, 1.5, 0.3, 0.7]
SEGMENTS = [0, 0, 1, 1, 1, 2]
ADVANTAGES = [1.0, -2.0, 0.5]


def loss_of(ratio, ref_logps=REF_LOGPS, clip_eps=0.2, kl_coef=0.03, entropy_coef=0.07):
    """policy_loss on those six tokens of three steps, in a mini-batch of 10 tokens and 4 steps."""
    logps = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor(ENTROPIES, dtype=torch.float64, requires_grad=True)
    loss, statistics = policy_loss(
        logps,
        torch.tensor(OLD_LOGPS, dtype=torch.float64),
        None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
        entropies,
        torch.tensor(SEGMENTS),
        torch.tensor(ADVANTAGES, dtype=torch.float64),
        10,
        4,
        ratio,
        clip_eps,
        kl_coef,
        entropy_coef,
    )
    return loss, statistics, logps, entropies


def surrogate(r, advantage, eps):
    """min(r A, clip(r) A), and whether the clip decides."""
    plain = r * advantage
    clipped = min(max(r, 1 - eps), 1 + eps) * advantage
    return min(plain, clipped), clipped < plain


def k3_of(logp, ref_logp):
    d = min(max(ref_logp - logp, -10), 10)
    return math.exp(d) - d - 1


@pytest.mark.parametrize("ratio, eps", [("token", 0.2), ("sequence", 0.05)])
def test_the_loss_by_its_formula(ratio, eps):
    """The docstring's formula in plain Python, a token at a time."""
    loss, statistics, logps, entropies = loss_of(ratio, clip_eps=eps)
    log_ratios = [new - old for new, old in zip(LOGPS, OLD_LOGPS)]
    expected = 0.0
    n_clipped = 0
    if ratio == "token":
        for log_ratio, segment in zip(log_ratios, SEGMENTS):
            value, clipped = surrogate(math.exp(log_ratio), ADVANTAGES[segment], eps)
            expected -= value / 10
            n_clipped += clipped
    else:
        for segment, advantage in enumerate(ADVANTAGES):
            own = [x for x, owner in zip(log_ratios, SEGMENTS) if owner == segment]
            value, clipped = surrogate(math.exp(sum(own) / len(own)), advantage, eps)
            expected -= value / 4
            n_clipped += clipped
    k3 = [k3_of(logp, ref) for logp, ref in zip(LOGPS, REF_LOGPS)]
    expected += 0.03 * sum(k3) / 10 - 0.07 * sum(ENTROPIES) / 10
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert statistics.tolist() == pytest.approx([n_clipped, sum(k3), sum(ENTROPIES)], rel=1e-12)
    assert 0 < n_clipped < len(LOGPS)
    assert not statistics.requires_grad


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_loss_has_the_precision_of_the_log_probs(ratio):
    """The advantages of a group come in float64."""
    logps = torch.tensor([-1.0, -2.0, -0.5])
    loss, statistics = policy_loss(
        logps, logps, None, torch.ones(3), torch.tensor([0, 0, 1]),
        group_relative_advantages([1.0, 0.0], "std"), 3, 2, ratio, 0.2, 0.0, 0.0,
    )
    assert loss.dtype == statistics.dtype == torch.float32
    # Ratios are 1: minus the mean advantage of the three tokens, 1, 1 and -1, or of the two steps.
    assert loss.item() == pytest.approx(-1 / 3 if ratio == "token" else 0.0, abs=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_gradient_of_the_loss_by_its_formula(ratio):
    """d loss / d log pi, term by term. Where the clip decides, or the clamp, it is zero."""
    loss, _, logps, entropies = loss_of(ratio)
    found = torch.autograd.grad(loss, [logps, entropies])
    log_ratios = [new - old for new, old in zip(LOGPS, OLD_LOGPS)]
    for t, segment in enumerate(SEGMENTS):
        own = [k for k, owner in enumerate(SEGMENTS) if owner == segment]
        if ratio == "token":
            r = math.exp(log_ratios[t])
            scale = 1 / 10
        else:
            r = math.exp(sum(log_ratios[k] for k in own) / len(own))
            scale = 1 / 4 / len(own)
        _, clipped = surrogate(r, ADVANTAGES[segment], 0.2)
        expected = 0.0 if clipped else -scale * r * ADVANTAGES[segment]
        d = REF_LOGPS[t] - LOGPS[t]
        if abs(d) < 10:
            expected += 0.03 / 10 * (1 - math.exp(d))
        assert found[0][t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert found[1][t].item() == pytest.approx(-0.07 / 10, rel=1e-12)


def test_without_a_reference_there_is_no_kl():
    loss, statistics, _, _ = loss_of("token", ref_logps=None)
    without, _, _, _ = loss_of("token", kl_coef=0.0)
    assert loss.item() == pytest.approx(without.item(), rel=1e-12)
    assert statistics[1] == 0


def test_the_mean_of_k3_is_the_kl_divergence_from_policy_to_reference():
    """sum_a pi(a) k3(a) = KL(pi || pi_ref), exactly, by all ids. The other direction differs."""
    logps = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    ref_logps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    mean = 0.0
    for logp, ref_logp in zip(logps, ref_logps):
        _, statistics = policy_loss(
            logp[None], logp[None], ref_logp[None], torch.zeros(1), torch.tensor([0]),
            torch.zeros(1), 1, 1, "token", 0.2, 1.0, 0.0,
        )
        mean += logp.exp() * statistics[1]
    kl = (logps.exp() * (logps - ref_logps)).sum()
    reverse = (ref_logps.exp() * (ref_logps - logps)).sum()
    assert mean.item() == pytest.approx(kl.item(), rel=1e-12)
    assert abs(kl - reverse) > 0.01


def test_an_unknown_ratio_is_named():
    with pytest.raises(ValueError, match="'sequense': choose 'token' or 'sequence'"):
        loss_of("sequense")


# -------------------------------------------------------------- One update of the policy (§3.4, §4)
class RecordingSGD(torch.optim.SGD):
    """Plain SGD that remembers the gradient of every step it takes."""

    def __init__(self, model, lr=0.0):
        super().__init__(model.parameters(), lr)
        self.gradients = []

    def step(self):
        parts = [weights.grad.flatten() for weights in self.param_groups[0]["params"]]
        self.gradients.append(torch.cat(parts).clone())
        super().step()


TERMS = {"ratio": "token", "clip_eps": 0.2, "kl_coef": 0.03, "entropy_coef": 0.07}
TEMPERATURE = 0.6


def update(model, trees, optimizer, reference=None, **changes):
    arguments = {
        "minibatches": 1,
        "pack_len": 10**6,
        "mixed": False,
        "temperature": TEMPERATURE,
        "vocab_size": N_TOKENS,
        **TERMS,
        **changes,
    }
    return update_policy(model, reference, optimizer, trees, **arguments)


def scores_of(model, nodes):
    """{node: the log-probs of its tokens}, without gradient."""
    with torch.no_grad():
        return {node: own_logps(model, node, TEMPERATURE) for node in nodes}


def loss_by_definition(model, nodes, old, ref, ratio, clip_eps, kl_coef, entropy_coef):
    """The loss over all tokens of these steps, one path at a time, from full logits."""
    n_tokens = sum(len(node.tokens) for node in nodes)
    loss = 0.0
    for node in nodes:
        distribution = own_logits(model, node, TEMPERATURE).log_softmax(-1)
        logps = distribution[range(len(node.tokens)), node.tokens]
        log_ratio = logps - old[node]
        n_units = n_tokens
        if ratio == "sequence":
            log_ratio = log_ratio.mean()
            n_units = len(nodes)
        r = log_ratio.exp()
        clipped = r.clip(1 - clip_eps, 1 + clip_eps)
        surrogate = torch.minimum(r * node.advantage, clipped * node.advantage)
        loss = loss - surrogate.sum() / n_units
        entropy = -(distribution.exp() * distribution).sum()
        loss = loss - entropy_coef * entropy / n_tokens
        if ref is not None:
            d = ref[node] - logps
            loss = loss + kl_coef * (d.exp() - d - 1).sum() / n_tokens
    return loss


def clipped_to_norm_one(gradient):
    return gradient / max(1.0, gradient.norm().item())


def assert_same_gradient(found, expected, relative):
    assert expected.norm() > 0
    assert (found - expected).norm() <= relative * expected.norm()


def trained_nodes(trees, questions):
    return [
        node
        for root in trees
        for node in root.walk()
        if node.trained and root.question in questions
    ]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_follows_the_definition_whatever_the_packs(ratio, checkpointing):
    """The gradient, its norm, the KL and the entropy of one optimiser step, against the naive loss
    with a reference of other weights. The token mean is over the whole mini-batch: packs of any
    length give the same (1e-5)."""
    model = tiny_model(sharpness=6.0)
    reference = tiny_model(sharpness=6.0, seed=1)
    trees = sampled_trees(model)
    nodes = trained_nodes(trees, {0, 1, 2})
    old = scores_of(model, nodes)
    ref = scores_of(reference, nodes)
    terms = {**TERMS, "ratio": ratio}
    expected = gradient(loss_by_definition(model, nodes, old, ref, **terms), model)
    n_tokens = sum(len(node.tokens) for node in nodes)
    d = torch.cat([ref[node] - old[node] for node in nodes])
    entropies = torch.cat([own_entropies(model, node, TEMPERATURE) for node in nodes])
    if checkpointing:
        turn_on_checkpointing(model)
    for pack_len in (10, 30, 10**6):
        optimizer = RecordingSGD(model)
        metrics = update(model, trees, optimizer, reference, pack_len=pack_len, ratio=ratio)
        assert len(optimizer.gradients) == 1
        assert_same_gradient(optimizer.gradients[0], clipped_to_norm_one(expected), 1e-5)
        assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
        kl = (d.exp() - d - 1).sum().item() / n_tokens
        assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
        assert metrics["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
        assert metrics["clip_ratio"] == 0  # the first step's ratios are 1
        assert metrics["skipped"] is False
        assert model.training == checkpointing
    assert all(weights.grad is None for weights in model.parameters())


@pytest.mark.parametrize("ratio, eps", [("token", 0.02), ("sequence", 0.01)])
def test_two_mini_batches_are_two_steps_made_by_hand(ratio, eps):
    """Old and reference log-probs come from before the first step, so that the second step has
    ratios other than 1; some of them are clipped."""
    model = tiny_model(sharpness=6.0)
    reference = tiny_model(sharpness=6.0, seed=1)
    by_hand = copy.deepcopy(model)
    trees = sampled_trees(model, prompts=PROMPTS[:2])
    parts = [trained_nodes(trees, {0}), trained_nodes(trees, {1})]
    parts.sort(key=lambda nodes: -sum(len(node.tokens) for node in nodes))
    terms = {**TERMS, "ratio": ratio, "clip_eps": eps}

    old = scores_of(model, parts[0] + parts[1])
    ref = scores_of(reference, parts[0] + parts[1])
    expected = []
    for part in parts:
        step = gradient(loss_by_definition(by_hand, part, old, ref, **terms), by_hand)
        expected.append(clipped_to_norm_one(step))
        start = 0
        for weights in by_hand.parameters():
            weights.data -= 0.05 * expected[-1][start:start + weights.numel()].view_as(weights)
            start += weights.numel()
        if part is parts[0]:
            moved = scores_of(by_hand, parts[1])

    optimizer = RecordingSGD(model, lr=0.05)
    metrics = update(
        model, trees, optimizer, reference, minibatches=2, pack_len=40, ratio=ratio, clip_eps=eps
    )
    assert len(optimizer.gradients) == 2
    for found, wanted in zip(optimizer.gradients, expected):
        assert_same_gradient(found, wanted, 1e-4)
    for weights, wanted in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(weights, wanted, atol=1e-6, rtol=1e-5)
    n_clipped = 0
    units = 0
    for node in parts[1]:
        log_ratio = moved[node] - old[node]
        if ratio == "sequence":
            log_ratio = log_ratio.mean()[None]
        for r in log_ratio.exp().tolist():
            n_clipped += surrogate(r, node.advantage, eps)[1]
            units += 1
    assert 0 < n_clipped < units
    assert metrics["clip_ratio"] == pytest.approx(n_clipped / units)


@pytest.mark.parametrize("pack_len", [30, 10**6])
def test_mixed_precision_has_the_gradient_of_float32_up_to_the_rounding_of_bf16(pack_len):
    """bf16 keeps 8 bits, so a few percent; the weights and their gradients stay float32."""
    model = tiny_model(sharpness=4.0)
    trees = sampled_trees(model)
    nodes = trained_nodes(trees, {0, 1, 2})
    old = scores_of(model, nodes)
    loss = loss_by_definition(model, nodes, old, None, **TERMS)
    expected = clipped_to_norm_one(gradient(loss, model))
    optimizer = RecordingSGD(model)
    update(model, trees, optimizer, mixed=True, pack_len=pack_len)
    (found,) = optimizer.gradients
    assert found.dtype == torch.float32
    assert_same_gradient(found, expected, 0.05)
    assert (found - expected).norm() > 1e-3 * expected.norm()  # float32 would be much closer


@pytest.mark.parametrize("mixed", [False, True])
def test_old_log_probs_are_those_of_the_same_arithmetic(mixed):
    """Without a change of the weights every ratio is 1, and a clip range of 1e-3 clips nothing."""
    model = tiny_model(sharpness=6.0)
    trees = sampled_trees(model)
    metrics = update(
        model, trees, RecordingSGD(model), minibatches=3, mixed=mixed, clip_eps=1e-3, pack_len=40
    )
    assert metrics["clip_ratio"] == 0


def test_mini_batches_hold_whole_questions_of_about_equal_size():
    """Trained tokens of five questions: 0, 9, 2, 7, 4. Question 3 has two trees."""
    trees = []
    for question, lengths in enumerate([[3], [9], [2], [3, 4], [4]]):
        for length in lengths:
            root = Node([1], question=question)
            Node([1] * length, root, trained=question != 0)
            trees.append(root)
    parts = split_by_question(trees, 2)
    sizes = [sum(len(node.tokens) for node in nodes_of(part)) for part in parts]
    questions = [{root.question for root in part} for part in parts]
    assert sorted(sizes) == [9, 13]  # 9 + 4 and 7 + 2
    assert sorted(map(sorted, questions)) == [[1, 4], [2, 3]]
    assert sum(len(part) for part in parts) == 5
    assert len(split_by_question(trees, 100)) == 4
    assert split_by_question(trees[:1], 2) == []


def test_fewer_questions_than_mini_batches_make_fewer_steps():
    model = tiny_model()
    trees = sampled_trees(model, prompts=PROMPTS[:1])
    optimizer = RecordingSGD(model)
    update(model, trees, optimizer, minibatches=4)
    assert len(optimizer.gradients) == 1


def test_a_batch_whose_groups_are_all_pruned_takes_no_step():
    """AdamW would move by its momentum and its weight decay alone."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    trees = sampled_trees(model)
    update(model, trees, optimizer)
    for root in trees:
        for leaf in root.leaves():
            leaf.reward = 1.0
        backup_rewards(root)
    add_sibling_advantages(trees, "variance", 0.1)
    before = copy.deepcopy(model.state_dict())
    metrics = update(model, trees, optimizer)
    expected = {"grad_norm": 0, "clip_ratio": 0, "kl": 0, "entropy": 0, "skipped": False}
    assert metrics == expected
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, before[name])


def test_tokens_of_a_kept_group_count_where_the_advantage_is_zero():
    """The second child of Figure 2: it counts in the token mean and carries KL and entropy."""
    model = tiny_model(sharpness=6.0)
    reference = tiny_model(sharpness=6.0, seed=1)
    root = Node([4])
    for reward, token in ((0.0, 6), (0.5, 7), (1.0, 8)):
        Node([token], root, reward=reward)
    backup_rewards(root)
    add_sibling_advantages([root], "variance", 0.1)
    nodes = root.children
    assert nodes[1].advantage == 0 and nodes[1].trained
    old = scores_of(model, nodes)
    ref = scores_of(reference, nodes)
    expected = gradient(loss_by_definition(model, nodes, old, ref, **TERMS), model)
    optimizer = RecordingSGD(model)
    update(model, [root], optimizer, reference)
    assert_same_gradient(optimizer.gradients[0], clipped_to_norm_one(expected), 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad):
    """First in both mini-batches, then in the first one only: the second one still counts."""
    model = tiny_model()
    trees = sampled_trees(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for factors in ([bad, bad], [bad, 1.0]):
        remaining = list(factors)
        weights = next(model.parameters())
        hook = weights.register_hook(lambda gradient: gradient * remaining.pop(0))
        metrics = update(model, trees, optimizer, minibatches=2)
        hook.remove()
        assert remaining == []
        assert metrics["skipped"] is True
        changed = [not torch.equal(w, before[name]) for name, w in model.state_dict().items()]
        assert any(changed) == (factors[1] == 1.0)
        assert all(w.isfinite().all() for w in model.parameters())
        assert (metrics["grad_norm"] is None) == (factors[1] != 1.0)


def test_a_loss_that_is_not_finite_never_reaches_the_weights():
    """A damaged reference: the clamp of the KL term hides its NaN from the gradient, so that only
    the loss shows it."""
    model = tiny_model()
    trees = sampled_trees(model)
    reference = tiny_model(seed=1)
    reference.lm_head.weight.data[4] = math.nan
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    metrics = update(model, trees, optimizer, reference)
    assert metrics["skipped"] is True
    assert metrics["grad_norm"] is None
    assert math.isfinite(metrics["kl"])  # NaN would be no JSON
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, before[name])


# ------------------------------------------------------------ GRPO and GSPO are the tree of depth 1
def grpo_gradient(model, old_model, reference, rollouts, ratio, clip_eps, kl_coef):
    """GRPO (or GSPO) as it is usually written: whole answers as rows of one batch, padded on the
    right. rollouts: (prompt, answer, advantage). -> the gradient of the loss, clipped at norm 1."""
    longest = max(len(prompt) + len(answer) for prompt, answer, _ in rollouts)
    ids = torch.zeros(len(rollouts), longest, dtype=torch.long)
    attention = torch.zeros(len(rollouts), longest, dtype=torch.long)
    answers = torch.zeros(len(rollouts), longest - 1)  # 1 where the next token is the answer's
    for row, (prompt, answer, _) in enumerate(rollouts):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        attention[row, :length] = 1
        answers[row, len(prompt) - 1:length - 1] = 1
    advantages = torch.tensor([[advantage] for _, _, advantage in rollouts])

    def per_token_logps(which):
        logits = which(ids, attention_mask=attention).logits[:, :-1, :N_TOKENS] / TEMPERATURE
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]

    with torch.no_grad():
        old_logps = per_token_logps(old_model)
        ref_logps = per_token_logps(reference)
    logps = per_token_logps(model)
    log_ratio = logps - old_logps
    if ratio == "sequence":
        log_ratio = (log_ratio * answers).sum(1, keepdim=True) / answers.sum(1, keepdim=True)
    r = log_ratio.exp()
    clipped = r.clip(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(r * advantages, clipped * advantages)
    if ratio == "sequence":
        loss = -objective.mean()
    else:
        loss = -(objective * answers).sum() / answers.sum()
    d = ref_logps - logps
    loss = loss + kl_coef * ((d.exp() - d - 1) * answers).sum() / answers.sum()
    return clipped_to_norm_one(gradient(loss, model))


@pytest.mark.parametrize("ratio, eps", [("token", 0.02), ("sequence", 4e-4)])
def test_depth_one_is_grpo_and_gspo(ratio, eps):
    """An independent GRPO and GSPO (2507.18071) through update_policy: group mean and population
    std, two mini-batches, so that ratios differ from 1 in the second, and a reference."""
    model = tiny_model(sharpness=6.0)
    reference = tiny_model(sharpness=6.0, seed=1)
    old_model = copy.deepcopy(model)
    by_hand = copy.deepcopy(model)
    torch.manual_seed(0)
    trees = sample_trees(model, PROMPTS[:2], [6], [7], decoding())
    random_rewards(trees)
    add_sibling_advantages(trees, "std", 0.1)

    parts = []
    for root in trees:
        rewards = [child.reward for child in root.children]
        mean = statistics.mean(rewards)
        std = statistics.pstdev(rewards)
        assert std > 0
        part = [(root.tokens, child.tokens, (child.reward - mean) / std) for child in root.children]
        parts.append(part)
    parts.sort(key=lambda part: -sum(len(answer) for _, answer, _ in part))

    optimizer = RecordingSGD(model, lr=0.05)
    metrics = update(
        model, trees, optimizer, reference, minibatches=2, ratio=ratio, clip_eps=eps,
        entropy_coef=0.0,
    )
    expected_optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for part, found in zip(parts, optimizer.gradients, strict=True):
        expected = grpo_gradient(by_hand, old_model, reference, part, ratio, eps, 0.03)
        assert_same_gradient(found, expected, 1e-4)
        start = 0
        for weights in by_hand.parameters():
            weights.grad = expected[start:start + weights.numel()].view_as(weights)
            start += weights.numel()
        expected_optimizer.step()
    assert 0 < metrics["clip_ratio"] < 1


# -------------------------------------------------------------- One training step (Figure 2, right)
DEMO = treerpo.HERE / "demo"


def training_step(settings, model, sampler, reference, optimizer, n_questions=2):
    """train_step on the first questions of the bundled task."""
    tokenizer = treerpo.load_tokenizer(str(DEMO / "model"))
    batch = treerpo.load_questions(str(DEMO / "train.jsonl"), None, None)[:n_questions]
    for question in batch:
        question["prompt"] = tokenizer.encode(question["question"])
    how = treerpo.make_decoding(model, tokenizer, settings.temperature, settings.max_rows)
    status = treerpo.Status(tqdm(disable=True))
    return treerpo.train_step(
        model, sampler, reference, optimizer, tokenizer, batch, how, settings, status
    )


def bundled_model(dtype=torch.float32):
    return treerpo.load_model(str(DEMO / "model"), "cpu", dtype)


def test_a_training_step_in_mixed_precision_on_the_bundled_model():
    """float32 weights are trained, their bf16 copy samples: after every step the copy is the cast
    of the trained weights, which also keep changes that are too small for bf16."""
    settings = treerpo.Settings(branching=[4, 2, 2], step_len=[20], temperature=1.0, pack_len=300)
    model = bundled_model()
    sampler = bundled_model(torch.bfloat16)
    reference = bundled_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    torch.manual_seed(0)
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        metrics, _ = training_step(settings, model, sampler, reference, optimizer)
        assert metrics["skipped"] is False
        assert metrics["grad_norm"] > 0
        copied = sampler.state_dict()
        small_changes = 0
        for name, weights in model.state_dict().items():
            assert weights.dtype == torch.float32
            assert copied[name].dtype == torch.bfloat16
            assert torch.equal(weights.to(torch.bfloat16), copied[name])
            changed = weights != before[name]
            same_in_bf16 = weights.to(torch.bfloat16) == before[name].to(torch.bfloat16)
            small_changes += (changed & same_in_bf16).sum().item()
        assert small_changes > 0
    taken = {state["step"].item() for state in optimizer.state.values()}
    assert taken == {4}  # two mini-batches in each of two training steps


def test_the_metrics_of_a_training_step_follow_from_its_trees():
    settings = treerpo.Settings(
        branching=[4, 2, 2], step_len=[18, 18, 13], temperature=1.0, prune_threshold=0.5
    )
    model = bundled_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(0)
    metrics, trees = training_step(settings, model, model, None, optimizer, n_questions=12)
    parents = [node for root in trees for node in root.walk() if node.children]
    leaves = [leaf for root in trees for leaf in root.leaves()]
    lengths = [len(path_ids(leaf)) - len(leaf.path()[0].tokens) for leaf in leaves]
    n_kept = 0
    n_equal = 0
    for parent in parents:
        rewards = [child.reward for child in parent.children]
        n_kept += max(rewards) - min(rewards) > 0.5
        n_equal += len(set(rewards)) == 1
    truncated = [not leaf.done for leaf in leaves]
    expected = {
        "reward": statistics.mean(root.reward for root in trees),
        "groups_kept": n_kept / len(parents),
        "frac_reward_zero_std": n_equal / len(parents),
        "tokens_sampled": sum(len(node.tokens) for node in nodes_of(trees)),
        "completions/mean_length": statistics.mean(lengths),
        "completions/clipped_ratio": statistics.mean(truncated),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-12)
    assert 0 < n_kept < len(parents) and n_kept + n_equal < len(parents)
    assert 0 < sum(truncated) < len(leaves)


def noted_calls(monkeypatch, name):
    """Lets a function of treerpo.py do its work and notes its arguments by their names."""
    original = getattr(treerpo, name)
    calls = []

    def noting(*arguments, **named):
        calls.append(inspect.signature(original).bind(*arguments, **named).arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(treerpo, name, noting)
    return calls


@pytest.mark.parametrize("algo", ["treerpo", "treeadv"])
def test_a_training_step_hands_every_setting_to_the_piece_that_uses_it(monkeypatch, algo):
    settings = treerpo.Settings(
        algo=algo,
        branching=[2, 3],
        step_len=[17, 18],
        temperature=0.9,
        leaves=7,
        trees=3,
        entropy_threshold=0.2,
        prune_threshold=0.15,
        normalizer="none",
        ratio="sequence",
        clip_eps=0.12,
        kl_coef=0.013,
        entropy_coef=0.014,
        minibatches=4,
        pack_len=333,
    )
    model = bundled_model()
    sampler = bundled_model(torch.bfloat16)
    reference = bundled_model()
    if algo == "treerpo":
        sampling = noted_calls(monkeypatch, "sample_trees")
        comparing = noted_calls(monkeypatch, "add_sibling_advantages")
    else:
        sampling = noted_calls(monkeypatch, "sample_forests")
        comparing = noted_calls(monkeypatch, "add_leaf_advantages")
    updating = noted_calls(monkeypatch, "update_policy")
    torch.manual_seed(0)
    training_step(settings, model, sampler, reference, torch.optim.SGD(model.parameters(), lr=0.0))

    (sampled,) = sampling
    assert sampled["model"] is sampler
    assert sampled["decoding"].temperature == 0.9
    if algo == "treerpo":
        assert sampled["branching"] == [2, 3]
        assert sampled["step_lens"] == [17, 18]
    else:
        found = [sampled[name] for name in ("n_leaves", "n_trees", "budget", "threshold")]
        assert found == [7, 3, 17, 0.2]
    (compared,) = comparing
    assert compared["normalizer"] == "none" and compared["threshold"] == 0.15
    (updated,) = updating
    assert updated["model"] is model and updated["reference"] is reference
    assert updated["mixed"] is True
    assert updated["vocab_size"] == sampled["decoding"].vocab_size
    for name in ("minibatches", "pack_len", "temperature", "ratio", "clip_eps", "kl_coef",
                 "entropy_coef"):
        assert updated[name] == getattr(settings, name)


# ----------------------------------------------------------------------------- TreeAdv (2601.03703)
@pytest.mark.parametrize("threshold, n_leaves, n_trees", [(0.5, 7, 3), (1e-9, 6, 2), (1e9, 5, 2)])
def test_forks_are_where_an_independent_computation_puts_them(threshold, n_leaves, n_trees):
    """The positions of highest entropy above the threshold, over all first answers to a question,
    computed from full forwards of those answers. Answers that begin alike have equal entropies
    there, and any of them may be forked: the entropies of the forks are compared, not their names.
    """
    model = tiny_model(sharpness=4.0)
    budget = 8
    torch.manual_seed(5)
    how = decoding(max_rows=4)
    roots = sample_forests(model, PROMPTS, n_leaves, n_trees, budget, threshold, how)
    for question, prompt in enumerate(PROMPTS):
        forest = [root for root in roots if root.question == question]
        assert all(root.tokens == prompt for root in forest)
        assert sum(len(root.leaves()) for root in forest) == n_leaves
        forks = []
        uncertain = {}
        for k, root in enumerate(forest[:n_trees]):
            # The first child continues the first answer, the others are forks.
            node = root
            answer = []
            while node.children:
                forks += [(k, len(answer))] * (len(node.children) - 1)
                node = node.children[0]
                answer += node.tokens
            whole = Node(answer, Node(prompt))
            for position, entropy in enumerate(own_entropies(model, whole, 1.0).tolist()):
                if entropy > threshold:
                    uncertain[k, position] = entropy
        wanted = sorted(uncertain.values(), reverse=True)[:n_leaves - n_trees]
        found = sorted((uncertain[fork] for fork in forks), reverse=True)
        assert found == pytest.approx(wanted, abs=1e-4)  # rounding of two ways to batch
        assert len(set(forks)) == len(forks)
        n_fresh = n_leaves - n_trees - len(wanted)
        assert len(forest) == n_trees + n_fresh
        for root in forest:
            for leaf in root.leaves():
                length = len(path_ids(leaf)) - len(prompt)
                assert leaf.done == (leaf.tokens[-1] in EOS)
                assert leaf.done or length == budget
                assert length <= budget
    for node in nodes_of(roots):  # forks continue the model's own distribution
        assert node.tokens
        assert not set(EOS) & set(node.tokens[:-1])
        expected = own_entropies(model, node, 1.0)
        torch.testing.assert_close(torch.tensor(node.entropies), expected, atol=1e-4, rtol=0)


def test_leaf_advantages_are_redistributed_as_brute_force_does():
    """All leaves of a question are one group, over its trees; a step takes their plain mean."""
    forest = [tree([[1, 0], 0]), tree([1, [1, [0, 1]]])]
    other = tree([0, [1, 0]])
    other.question = 1
    near_tie = tree([0.5, 0.55])
    near_tie.question = 2
    trees = [*forest, other, near_tie]
    for root in trees:
        backup_rewards(root)
    for _ in range(2):  # the second call replaces, never adds
        groups = add_leaf_advantages(trees, "std", 0.1)
        assert groups == [[1, 0, 0, 1, 1, 0, 1], [0, 1, 0], [0.5, 0.55]]
        for question, roots in enumerate([forest, [other]]):
            rewards = groups[question]
            mean = statistics.mean(rewards)
            std = statistics.pstdev(rewards)
            for node in nodes_of(roots):
                below = [n.reward for n in node.walk() if not n.children]
                expected = statistics.mean((reward - mean) / std for reward in below)
                assert node.advantage == pytest.approx(expected, abs=1e-12)
                assert node.trained
        for node in nodes_of([near_tie]):
            assert node.advantage == 0 and not node.trained


# --------------------------------------------- Speed on a GPU: one static block of memory, compiled
# On a CPU nothing is compiled unless it is asked for, so most of these run the static path plainly.
def everything(model, how, branching=(6, 2, 2), step_lens=(4, 3, 5), prompts=PROMPTS, seed=1):
    """All that a sampled batch consists of: tokens and end of every step, in depth-first order."""
    torch.manual_seed(seed)
    roots = sample_trees(model, prompts, list(branching), list(step_lens), how)
    return [(len(node.path()), node.tokens, node.done) for node in nodes_of(roots)]


@pytest.mark.parametrize("changes", [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "max_rows": 4},  # below the frontier
    {"temperature": 1.3, "call_len": 2},   # a step takes several calls of generate
], ids=str)
def test_the_static_path_draws_the_same_tokens_as_the_growing_cache(tiny, changes):
    """Token for token: ragged prompts, ends at every level, depth 3, and again over the used
    block. Entropies agree to rounding."""
    growing = decoding(**{"max_rows": 64, **changes})
    fixed = static(**changes)
    expected = everything(tiny, growing)
    depths = {depth for depth, _, done in expected if done}
    assert depths == {2, 3, 4} or changes["temperature"] == 0
    for seed in (1, 2):
        expected = everything(tiny, growing, seed=seed)
        assert everything(tiny, fixed, seed=seed) == expected


def test_asking_seldom_whether_all_rows_have_ended_changes_no_answer(tiny, monkeypatch):
    """As on a GPU, where asking means waiting: rows run on behind their ends, but no further than
    to the next question. Greedy, as the extra tokens take random numbers."""
    fixed = static(temperature=0.0)
    fixed.workspace.check_every = 5
    step_lens = (4, 13, 40)
    assert everything(tiny, fixed, (2, 1, 1), step_lens) == everything(
        tiny, decoding(temperature=0.0), (2, 1, 1), step_lens
    )
    drawn = []

    def draw_the_end(logits, n_rows, vocab_size, temperature):
        drawn.append(logits)
        return torch.full((n_rows,), EOS[0])

    monkeypatch.setattr(fixed.workspace, "draw_ids", draw_the_end)
    roots = sample_trees(tiny, PROMPTS, [2], [40], fixed)
    assert all(node.tokens == [EOS[0]] for node in nodes_of(roots))
    assert len(drawn) == 5


def test_a_block_for_one_row_has_room_for_a_fork_of_treeadv():
    """One call continues a late fork, which has a long prompt, and an early one, which is continued
    by nearly a whole answer. No answer ends here: the end token is never drawn."""
    model = tiny_model(sharpness=4.0)
    never = {"max_rows": 1, "eos_ids": (N_TOKENS,)}
    forests = []
    for how in (decoding(**never), static(length=256, **never)):
        torch.manual_seed(5)
        roots = sample_forests(model, [[4] * 6], 5, 1, 250, 0.5, how)
        forests.append([node.tokens for node in nodes_of(roots)])
    assert forests[0] == forests[1]
    assert len(forests[0]) == 9  # the first answer in five pieces, and four other endings


def test_entropies_of_the_static_path_are_those_of_full_forwards(tiny):
    how = static(keep_entropies=True, call_len=3, temperature=1.3)
    torch.manual_seed(1)
    for node in nodes_of(sample_trees(tiny, PROMPTS, [6, 2], [4, 5], how)):
        expected = own_entropies(tiny, node, 1.3)
        torch.testing.assert_close(torch.tensor(node.entropies), expected, atol=1e-4, rtol=0)


def test_the_static_path_takes_the_argmax_of_full_forwards_over_more_than_256_columns():
    """Prompts longer than the block was made for lower the number of rows instead."""
    model = tiny_model()
    long = [[k % 20 for k in range(start, start + 300)] for start in (0, 7, 11)]
    how = static(length=200, max_rows=4, temperature=0.0)
    assert how.workspace.most_rows(200) == 4
    assert how.workspace.most_rows(257) == 2
    assert how.workspace.most_rows(5000) == 1
    for root in sample_trees(model, [*long, [4]], [2, 1], [5, 4], how):
        assert len(root.children) == 2
        for node in root.steps():
            assert node.tokens == own_logits(model, node, 1.0).argmax(-1).tolist()


def test_what_lies_in_the_block_beforehand_changes_nothing():
    model = tiny_model()
    fixed = static()
    expected = everything(model, decoding(max_rows=64))
    assert everything(model, fixed) == expected
    for keys, values in fixed.workspace.blocks:
        keys.fill_(3e4)
        values.fill_(-3e4)
    assert everything(model, fixed) == expected


def test_the_block_starts_finite():
    """What is masked is multiplied by 0, and 0 times NaN is NaN. In this mode of PyTorch, memory
    that nobody initialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        fixed = static()
        found = everything(tiny_model(), fixed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == everything(tiny_model(), decoding(max_rows=64))
    for keys, values in fixed.workspace.blocks:
        assert keys.isfinite().all() and values.isfinite().all()


def test_the_block_is_seen_in_few_shapes_and_memory_stays_flat():
    """Rows are a multiple of 16 (here), positions one of 256. Twenty calls keep the addresses and
    the number of tensors."""
    model = tiny_model()
    fixed = static(length=300, max_rows=64)
    workspace = fixed.workspace
    addresses = []
    n_tensors = []
    for seed in range(20):
        prompts = [[4] * 250, [5]] if seed % 2 else PROMPTS
        everything(model, fixed, (7, 3), (4, 3), prompts, seed)
        blocks = [block for layer in workspace.blocks for block in layer]
        addresses.append([block.data_ptr() for block in blocks])
        if seed in (9, 19):
            gc.collect()
            types_alive = [type(thing) for thing in gc.get_objects()]
            n_tensors.append(types_alive.count(torch.Tensor))
    assert all(found == addresses[0] for found in addresses)
    assert all(block.numel() == 64 * 512 * 2 * 8 for block in blocks)  # tokens x heads x width
    assert n_tensors[0] == n_tensors[1]
    assert {batch for batch, _ in workspace.caches} == {16, 32, 48}
    assert {length for _, length in workspace.caches} == {256, 512}
    for cache in workspace.caches.values():
        for layer, (keys, values) in zip(cache.layers, workspace.blocks):
            assert layer.keys.data_ptr() == keys.data_ptr()
            assert layer.values.data_ptr() == values.data_ptr()
            # Without a static address there is no CUDA graph; only the speed on a GPU shows it.
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                assert hasattr(tensor, "_dynamo_static_input_type")


@pytest.mark.parametrize("n_heads, n_kv_heads", [(8, 2), (4, 4), (6, 1)])
def test_grouped_attention_equals_plain_softmax_attention(n_heads, n_kv_heads):
    """By a loop over rows and heads; head h reads key head h // (n_heads / n_kv_heads)."""
    torch.manual_seed(0)
    query = torch.randn(3, n_heads, 1, 16)
    key = torch.randn(3, n_kv_heads, 11, 16)
    value = torch.randn(3, n_kv_heads, 11, 16)
    mask = torch.rand(3, 1, 1, 11) < 0.6
    mask[..., 0] = True
    module = types.SimpleNamespace(num_key_value_groups=n_heads // n_kv_heads, is_causal=True)
    out, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert out.shape == (3, 1, n_heads, 16)
    for row, head in itertools.product(range(3), range(n_heads)):
        shared = head // (n_heads // n_kv_heads)
        visible = mask[row, 0, 0]
        scores = 0.3 * key[row, shared, visible] @ query[row, head, 0]
        expected = scores.softmax(0) @ value[row, shared, visible]
        torch.testing.assert_close(out[row, 0, head], expected)


def test_a_model_with_grouped_attention_samples_the_same_tokens(tiny):
    expected = everything(tiny, decoding(max_rows=64))
    use_grouped_attention(tiny)
    assert tiny.config._attn_implementation == "grouped"
    assert everything(tiny, static()) == expected
    assert everything(tiny, decoding(max_rows=64)) == expected


@pytest.fixture
def compiler_defaults():
    """PyTorch's own settings, also afterwards."""
    with torch._dynamo.config.patch(specialize_float=False):
        yield
    torch._dynamo.reset()


def compile_on_a_cpu(backend="eager"):
    """What `generate` needs to compile its decoding step here; Dynamo's counters start at 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(dynamic=True, backend=backend)
    compile_config._compile_all_devices = True
    return compile_config


def test_the_compiled_step_is_one_graph_for_all_shapes_and_reads_new_weights():
    """No recompile after the first batch: other shapes, other weights, the next workspace. Tokens
    are those of the plain path, before and after an update of the weights."""
    model = tiny_model()
    plain_model = tiny_model()
    use_grouped_attention(model)
    compile_config = compile_on_a_cpu()
    counters = torch._dynamo.utils.counters
    fixed = static(length=300, max_rows=32, compile_config=compile_config)
    growing = decoding(max_rows=32)
    expected = everything(plain_model, growing)
    assert everything(model, fixed) == expected
    first = dict(counters["stats"])
    assert first["unique_graphs"] == 2  # the model and the draw

    long = [[k % 20 for k in range(250)], [7]]
    for branching, prompts in (((3, 2), long), ((4, 3), PROMPTS)):
        assert everything(model, fixed, branching, (9, 4), prompts) == everything(
            plain_model, growing, branching, (9, 4), prompts
        )
    for each in (model, plain_model):
        each.load_state_dict(tiny_model(seed=1).state_dict())
    after = everything(plain_model, growing)
    assert after != expected
    assert everything(model, fixed) == after
    another = static(length=64, max_rows=32, compile_config=compile_config)
    assert everything(model, another) == after
    assert dict(counters["stats"]) == first
    assert len(fixed.workspace.caches) > 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_numbers_are_constants_of_the_compiled_step(compiler_defaults):
    """As inputs of its graph, a layer's epsilon and scale would cost time at every token."""
    kinds = set()

    def backend(graph, inputs, **options):
        kinds.update(type(value) for value in inputs)
        kinds.update(value.dtype for value in inputs if isinstance(value, torch.Tensor))
        return graph

    model = tiny_model()
    compile_config = compile_on_a_cpu(backend)
    treerpo.set_up_compiler()
    assert torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit is None
    everything(model, static(compile_config=compile_config))
    assert torch.float32 in kinds
    assert torch.float64 not in kinds  # how Dynamo passes a number
    assert torch.SymFloat not in kinds and float not in kinds


def test_the_compiled_draw_follows_the_softmax(compiler_defaults):
    """With the compiler's own formula for exponential noise, which draws other random numbers.
    Numbers of rows share a graph, whether all are drawn for or some; a single row has its own."""
    compile_config = compile_on_a_cpu("aot_eager_decomp_partition")
    treerpo.set_up_compiler()
    draw = Workspace(4, 64, compile_config).draw_ids
    generator = torch.Generator().manual_seed(0)
    row = 2 * torch.randn(32, generator=generator)
    row[7] = -math.inf
    logits = row.repeat(20_000, 1, 1)
    probabilities = dict(enumerate((row[:30].double() / 0.6).softmax(-1).tolist()))
    torch.manual_seed(3)
    drawn = draw(logits, 20_000, 30, 0.6)
    assert_drawn_from(drawn.tolist(), probabilities)
    torch.manual_seed(3)
    assert not torch.equal(treerpo.draw_ids(logits, 20_000, 30, 0.6), drawn)
    several = torch.randn(5, 1, 32, generator=generator)
    assert torch.equal(draw(several, 4, 30, 0.0), several[:4, 0, :30].argmax(-1))
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] == 2  # one for each temperature
    for n_rows in (5, 3, 2, 1):
        assert draw(several, n_rows, 30, 0.6).shape == (n_rows,)
    assert counts["unique_graphs"] == 3


def test_draws_and_entropies_are_made_in_float32():
    """Noise in bfloat16 would have few values, and change about one draw in a hundred."""
    logits = torch.randn(20_000, 1, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    drawn = []
    for some in (logits, logits.float()):
        torch.manual_seed(3)
        drawn.append(treerpo.draw_ids(some, 20_000, 400, 1.0))
    assert torch.equal(*drawn)
    exact = torch.distributions.Categorical(logits=logits[:50, 0].double()).entropy()
    found = treerpo.token_entropies(logits[:50, 0], 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [decoding(), static()], ids=["growing", "static"])
def test_logits_that_are_no_numbers_late_in_a_call_are_noticed(how):
    model = tiny_model()
    n_tokens = []

    def spoil(module, inputs, output):
        n_tokens.append(len(output))
        return output * math.nan if len(n_tokens) >= 3 else output

    model.lm_head.register_forward_hook(spoil)
    never_ends = dataclasses.replace(how, eos_ids=(N_TOKENS,))
    with pytest.raises(FloatingPointError, match="not numbers"):
        sample_trees(model, PROMPTS, [2], [4], never_ends)
    assert len(n_tokens) == 4


@pytest.mark.parametrize("checkpointing, n_graphs", [(False, 3), (True, 4)])
def test_the_trial_compiles_all_that_updates_need(
    monkeypatch, compiler_defaults, checkpointing, n_graphs
):
    """No recompile in the steps after it, whatever the lengths: Dynamo gives up after eight. The
    model needs graphs with gradients and without, the reference one; checkpointing adds one. On a
    CPU flex_attention has a backward pass only if it is not compiled, as here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_module = torch.nn.Module.compile
    flex_attention = torch.nn.attention.flex_attention
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: compile_module(
        module, dynamic=dynamic, backend="eager"
    ))
    model = tiny_model()
    if checkpointing:
        turn_on_checkpointing(model)
    reference = tiny_model().to(torch.bfloat16).requires_grad_(False)
    compile_training(model, "on")
    compile_training(reference, "on")
    assert torch._dynamo.config.specialize_float
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] == n_graphs
    for step_len, pack_len in ((4, 60), (40, 1000), (80, 3000)):
        trees = sampled_trees(tiny_model(), step_len=step_len)
        update(
            model, trees, RecordingSGD(model), reference, minibatches=2, pack_len=pack_len,
            mixed=True,
        )
    assert counts["unique_graphs"] == n_graphs


def fail(*arguments, **options):
    raise RuntimeError("no C++ compiler")


def test_a_failed_compile_falls_back_with_one_line(monkeypatch, capsys):
    """--compile auto on a GPU. The sampler then is the one of before, attention included."""
    model = tiny_model()
    plain = decoding()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        patch.setattr(treerpo, "sample_trees", fail)
        found = add_workspace(model, plain, 64, "auto")
    assert found == plain and found.workspace is None
    assert model.config._attn_implementation == "sdpa"
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "cannot compile" in line]
    assert len(told) == 1
    assert "no C++ compiler" in told[0] and "slower" in told[0]
    assert everything(model, found) == everything(tiny_model(), plain)


def test_compile_on_refuses_where_the_compiler_fails(monkeypatch):
    monkeypatch.setattr(treerpo, "sample_trees", fail)
    with pytest.raises(BadInput, match="--compile on: .*no C\\+\\+ compiler"):
        add_workspace(tiny_model(), decoding(), 64, "on")


def test_too_little_memory_is_no_failure_of_the_compiler(monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(treerpo, "sample_trees", out_of_memory)
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for mode in ("auto", "on"):
        with pytest.raises(torch.OutOfMemoryError):
            add_workspace(model, decoding(), 64, mode)


def test_an_update_that_cannot_be_compiled_is_made_without(monkeypatch, capsys):
    """The model then is the one of before: attention, layers and gradients."""
    model = tiny_model()
    trees = sampled_trees(model)
    expected = RecordingSGD(model)
    update(model, trees, expected)
    with monkeypatch.context() as patch:
        patch.setattr(treerpo, "token_logps", fail)
        compile_training(model, "auto")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert "no C++ compiler" in told[0] and "slower" in told[0]
    assert model.config._attn_implementation == "sdpa"
    torch._dynamo.utils.counters.clear()
    found = RecordingSGD(model)
    update(model, trees, found)
    assert torch.equal(found.gradients[0], expected.gradients[0])
    assert not torch._dynamo.utils.counters["stats"]


def test_the_trial_of_a_compiled_update_leaves_no_gradient(monkeypatch, capsys):
    """Here it runs without the compiler. The model may also be the reference, which has none."""
    model = tiny_model()
    reference = tiny_model().requires_grad_(False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: None)
    for each in (model, reference):
        monkeypatch.setattr(each, "set_attn_implementation", lambda name: None)
        compile_training(each, "auto")
        assert all(weights.grad is None for weights in each.parameters())
    assert capsys.readouterr().out == ""


def test_without_a_gpu_nothing_is_compiled_unless_asked(monkeypatch):
    model = tiny_model()
    plain = decoding()
    assert add_workspace(model, plain, 64, "auto") is plain
    assert add_workspace(model, plain, 64, "off") is plain
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert add_workspace(model, plain, 64, "off") is plain


def test_compile_on_works_on_a_cpu(monkeypatch, capsys, compiler_defaults):
    """Through the same function as a run, with a backend that needs no C++ compiler. The trial
    compiles the decoding step even if its first token ends all answers, as with this seed."""
    compile_config = compile_on_a_cpu()

    def make_config(dynamic):
        assert dynamic is True  # else a graph for every shape
        return compile_config

    monkeypatch.setattr(treerpo, "CompileConfig", make_config)
    model = tiny_model()
    seed = 4
    ((_, tokens, done),) = everything(model, decoding(), [1], [4], [[EOS[0]]], seed)
    assert len(tokens) == 1 and done
    torch.manual_seed(seed)
    found = add_workspace(model, decoding(max_rows=16), 256, "on")
    assert found.workspace.compile_config is compile_config
    assert found.workspace.capacity == 16 * 512  # 256 tokens and a column of padding, rounded up
    assert model.config._attn_implementation == "grouped"
    assert torch._dynamo.config.specialize_float
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the model, the draw
    first = dict(torch._dynamo.utils.counters["stats"])
    found.workspace.check_every = 1
    assert everything(model, found) == everything(tiny_model(), decoding(max_rows=16))
    assert dict(torch._dynamo.utils.counters["stats"]) == first
    assert "compiled in" in capsys.readouterr().out
    torch._dynamo.reset()


# --------------------------------------------------------------- Pieces to copy into other projects
# Each is taken from the source by its name or its banner, with the pieces named here and nothing
# else, and put into an empty module that has imports only.
SOURCE = Path(treerpo.__file__).read_text(encoding="utf-8")


def source_of(name):
    """The source of a function or class of treerpo.py, with its decorators."""
    for statement in ast.parse(SOURCE).body:
        if getattr(statement, "name", None) == name:
            first = min([statement.lineno, *[d.lineno for d in statement.decorator_list]])
            lines = SOURCE.splitlines()[first - 1:statement.end_lineno]
            return "\n".join(lines)
    raise LookupError(name)


def section(banner):
    """The source below a banner, up to the next one."""
    parts = re.split(r"^# -{9,} *(.+)$", SOURCE, flags=re.MULTILINE)
    titles = parts[1::2]
    (wanted,) = [title for title in titles if title.startswith(banner)]
    return parts[2 * titles.index(wanted) + 2]


def pasted(monkeypatch, imports, *pieces):
    """A module that consists of these imports and pieces."""
    module = types.ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", module)  # dataclasses look it up
    exec("\n".join([imports, *pieces]), module.__dict__)
    return module


def imports_of_the_file():
    """The import statements at the top of treerpo.py."""
    kept = []
    for statement in ast.parse(SOURCE).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            kept.append(ast.get_source_segment(SOURCE, statement))
    return "\n".join(kept)


def test_paste_advantages(monkeypatch):
    imports = "import torch\nfrom torch import Tensor\nfrom collections.abc import Sequence"
    own = pasted(
        monkeypatch, imports, source_of("is_informative"), source_of("group_relative_advantages")
    )
    assert own.group_relative_advantages([0, 0, 1, 1], "variance").tolist() == [-2, -2, 2, 2]


NODE_IMPORTS = """
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
"""


def test_paste_backup(monkeypatch):
    own = pasted(monkeypatch, NODE_IMPORTS, source_of("Node"), source_of("backup_rewards"))
    root = own.Node([1])
    own.Node([2], root, reward=1.0)
    own.Node([3], root, reward=0.0)
    assert own.backup_rewards(root) == 0.5


def test_paste_loss(monkeypatch):
    own = pasted(monkeypatch, "import torch\nfrom torch import Tensor", source_of("policy_loss"))
    loss, _ = own.policy_loss(
        torch.tensor([-1.0]), torch.tensor([-1.0]), None, torch.tensor([0.5]), torch.tensor([0]),
        torch.tensor([3.0]), 1, 1, "token", 0.2, 0.0, 0.0,
    )
    assert loss.item() == -3


def test_paste_packs(monkeypatch):
    own = pasted(
        monkeypatch,
        imports_of_the_file(),
        *map(source_of, ["Node", "pack_nodes", "PackedRow", "leave_numbers", "pack_row"]),
        source_of("may_look"),
    )
    root = own.Node([1, 2])
    own.Node([3], root, trained=True, advantage=1.0)
    own.Node([4], root, trained=True, advantage=-1.0)
    (pack,) = own.pack_nodes([root], 100)
    row = own.pack_row(pack, torch.device("cpu"))
    assert row.ids.tolist() == [[1, 2, 3, 4]]
    assert row.positions.tolist() == [[0, 1, 2, 2]]
    assert row.predictors.tolist() == [1, 1]
    assert row.targets.tolist() == [3, 4]
    assert row.step_of.tolist() == [0, 1]
    assert row.advantages.tolist() == [1, -1]
    columns = torch.arange(4)
    mask = own.may_look(row.enter, row.leave, columns[:, None], columns).int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_paste_sampling(monkeypatch):
    own = pasted(
        monkeypatch, imports_of_the_file(), source_of("Node"), section("Tree sampling")
    )
    torch.manual_seed(1)
    how = own.Decoding(EOS, N_TOKENS)
    (root,) = own.sample_trees(tiny_model(), [[4]], [2, 3], [3, 3], how)
    assert len(root.children) == 2
    for child in root.children:
        assert len(child.children) == (0 if child.done else 3)


def test_paste_verifier(monkeypatch):
    own = pasted(monkeypatch, imports_of_the_file(), section("Answer verifier"))
    assert own.extract_boxed(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert own.is_equiv(r"\frac12", "0.5")
    assert own.reward_fn(r"so \boxed{\frac{1}{2}}.", "0.5") == 1.0
    assert own.reward_fn(r"so \boxed{\frac{1}{3}}.", "0.5") == 0.0


def test_importing_the_file_does_nothing(monkeypatch, capsys):
    """No threads set, no seed, nothing printed, no attention registered, no handler installed."""
    monkeypatch.setattr(AttentionInterface, "register", fail)
    for name in ("set_num_threads", "manual_seed", "set_default_dtype", "set_default_device"):
        monkeypatch.setattr(torch, name, fail)
    monkeypatch.setattr("signal.signal", fail)
    environment = dict(os.environ)
    random_state = torch.get_rng_state()
    spec = importlib.util.spec_from_file_location("imported_again", treerpo.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported_again", module)
    spec.loader.exec_module(module)
    assert module.Node is not treerpo.Node
    assert capsys.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), random_state)


# ==================================================================================== The verifier
# Pairs by kind. What is equal must be so in both orders, and each answer equals itself.
EQUAL = {
    "vectors": [
        (r"\frac12\begin{pmatrix}2&4\\0&6\end{pmatrix}", r"\begin{bmatrix}1&2\\0&3\end{bmatrix}"),
        (r"A^{-1}=\begin{pmatrix}2&1\\1&1\end{pmatrix}", r"\begin{pmatrix}2&1\\1&1\end{pmatrix}"),
        (r"(1,2)+t(3,4)", r"\langle 1+3t,2+4t\rangle"), ("-(1,2)", "(-1,-2)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}-s\begin{pmatrix}1\\0\end{pmatrix}", r"(1-s,2)"),
        (r"4\mathbf{i}-3\mathbf{j}+\mathbf{k}", r"4\hat{i}-3\hat{j}+\hat{k}"),
        (r"4\vec{\imath}-3\vec{\jmath}", r"\langle 4,-3\rangle"),
        (r"\left(\begin{array}{c}2n\\n\end{array}\right)", r"\binom{2n}{n}"),
        ("x=2,y=3", "(x,y)=(2,3)"), ("(m,n)=(3,6)", "(3,6)"),
    ],
    "sets of numbers": [
        ("]0,1[", "(0,1)"), (r"[2,+\infty[", r"[2,\infty)"), ("|x|<3", "(-3,3)"),
        (r"|x|\ge 2", r"(-\infty,-2]\cup[2,\infty)"), (r"(-1,1)\cup[1,3)", "(-1,3)"),
        (r"[0,2]\cup[1,5]", "[0,5]"), (r"x\ge-2,x\ne1", r"[-2,1)\cup(1,\infty)"),
        (r"\{x\mid x\ne2, x\ne-5\}", r"(-\infty,-5)\cup(-5,2)\cup(2,\infty)"),
        (r"A\cup B=\{1,2\}", r"\{1,2\}"), (r"(-\infty,\infty)", r"\mathbb R"),
    ],
    "parameters and constants": [
        ("y=c_1e^x+c_2e^{-x}", "y=C_1e^{x}+C_2e^{-x}"), (r"\sin x+c", r"C+\sin x"),
        (r"\sin^2 x+C", r"C-\frac12\cos 2x"), (r"\ln|2x|+C", r"\ln|x|+c"),
        (r"\frac{\pi}{4}+k\pi", r"\frac{\pi}{4}+n\pi"), (r"x=\pi k,k\in\mathbb{Z}", r"n\pi"),
        (r"\mathrm{C}_{1}x", "c_1x"), ("y(x)=x^2", "y=x^2"), (r"\rho(r)=\frac{1}{r}", r"\frac1r"),
        (r"\pi k, k \in \mathbb{Z}", r"n\pi, n\in\mathbb Z"),
        (r"$x=2\pi k$ for integers $k$", r"x=2\pi n, n\in Z"),
        (r"$(k,2k)$, $k$ any integer", r"(n,2n), where $n$ is an integer"),
    ],
    "words outside of dollars": [
        ("Vertex $(2,-3)$", "(2,-3)"), ("axis: $x=2$", "x=2"), ("$7$ meters", r"7\text{ m}"),
        ("width $=7$ meters", "7"), (r"$5.2\times 10^{-3}$ J", "0.0052"), ("$x=2$ or $x=3$", "2, 3"),
        (r"\operatorname{rank}(A)=2", "2"), (r"\det A=-14", "-14"),
        ("$x=5$ (multiplicity 2)", "5"), ("The area is $24$ square units", "24"),
    ],
    "congruences, cases, sums": [
        (r"x\equiv 3\pmod{7}", "3"), (r"x\equiv 3\pmod 7", r"x\equiv 10(\bmod 7)"),
        (r"\begin{cases}x^2&\text{if }x\le0\\2x&x>0\end{cases}",
         r"\left\{\begin{array}{ll}2x,&x>0\\x^2,&x\leq 0\end{array}\right."),
        (r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", "x=1, y=2"),
        (r"\sum_{k=1}^{n}(k+1)^2", r"\sum_{k=1}^n (k^2+2k+1)"),
        (r"\sum_{k=0}^{\infty}\frac{x^k}{k!}", r"\sum_{n=0}^{\infty} \frac{x^{n}}{n !}"),
        ("7!!", "105"), (r"{2 \over 3}", r"\frac23"),
        (r"\begin{aligned}x&=1\\y&=2\end{aligned}", "x=1,y=2"),
        (r"\int_{0}^{1}(x+x)\,dx", r"\int_0^1 2x dx"), (r"\sqrt2\operatorname{cis}45^\circ", "1+i"),
        (r"\frac{10!}{3!7!}", "120"), (r"{10 \choose 4}", "210"), ("3+(n-1)4", "4n-1"),
        (r"[n/2]+1", r"\lfloor n/2\rfloor+1"), (r"\binom{2018}{1009}", r"\frac{2018!}{1009!^2}"),
        (r"\gcd(n,m)", r"\gcd(m,n)"), ("2017^{2017}-1", "-1+2017^{2017}"),
    ],
    "money, units, rounding": [
        (r"\$2.50\text{ per gallon}", r"\$2.50"), ("18 dollars per hour", r"\$18"),
        (r"\$1,000", r"1000\text{ dollars}"), (r"\pi\text{ rad}", r"180^\circ"),
        (r"20^\circ C", "20"), ("361 kJ/mol", r"361\text{ kJ/mol}"),
        (r"x=\frac17\approx 0.14", r"\frac17"), (r"2\pi\approx 6.28", r"2\pi"),
        (r"\color{blue}{42}", "42"), ("10⁻⁴", "0.0001"), ("1\u2009000", "1000"), ("\u200b27", "27"),
        (r"3\colon 5", "3:5"),
    ],
    "fractions": [
        (r"\frac{1}{2}", r"\dfrac12"), (r"\tfrac{3}{4}", "3/4"),
        (r"\frac{2}{4}", r"\frac{1}{2}"), (r"-\frac{7}{3}", r"\frac{-7}{3}"),
        (r"\frac{7}{-3}", "-7/3"), (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{10}{2}", "5"), (r"\frac{1}{2}", r"\left(\frac{1}{2}\right)"),
        (r"1\frac{1}{2}", r"\frac32"), ("2 3/4", r"\frac{11}{4}"),
        (r"-1\frac{1}{2}", "-1.5"), (r"\frac{\frac12}{3}", r"\frac16"),
        (r"\cfrac{5}{8}", "0.625"), (r"3 \frac{1}{7}", r"\frac{22}{7}"),
        (r"\frac 3 4", "0.75"),
    ],
    "decimals": [
        ("0.5", r"\frac{1}{2}"), (".75", "0.750"),
        ("5.0", "5"), ("007", "7"),
        ("12.50", r"\frac{25}{2}"), ("-0.2", r"-\frac15"),
        ("+4", "4"), ("2.0", "2."),
        (r"\$12.00", "12"),
    ],
    "integers": [
        ("42", "42"), ("42", "42."),
        ("-17", "- 17"), ("1,234,567", "1234567"),
        ("1{,}234", "1234"), (r"10\,000", "10000"),
        ("10 000", "10000"), (r"12,\!345", "12345"),
        ("2^{10}", "1024"), (r"3 \cdot 5", "15"),
        ("10^{20}+1", "100000000000000000001"), ("2^{2024}", "4^{1012}"),
        (r"\mathbf{7}", "7"),
    ],
    "percent and money": [
        (r"25\%", "25"), ("25%", r"25\%"),
        (r"\$18", "18"), (r"\$1,200.50", "1200.5"),
        (r"18 \text{ dollars}", "18"), ("18 dollars", r"\$18"),
        (r"12.5\%", r"\frac{25}{2}"), (r"\text{\$}50", "50"),
        (r"30 \text{ percent}", r"30\%"),
    ],
    "scientific": [
        (r"1.5 \times 10^3", "1500"), (r"1.5\cdot 10^{-3}", "0.0015"),
        ("2e5", "200000"), ("1.2E-3", "0.0012"),
        (r"6.02\times10^{23}", "6.02e23"), ("10^{-2}", "0.01"),
        (r"3.0 \times 10^{8}", "3*10^8"), ("4.5 × 10^{2}", "450"),
    ],
    "roots and pi": [
        (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt{16}", "4"),
        (r"\sqrt[3]{27}", "3"), ("2^{1/2}", r"\sqrt2"),
        ("8^{2/3}", "4"), (r"3\sqrt{5}+2", r"2+3\sqrt{5}"),
        (r"\frac{\pi}{2}", r"0.5\pi"), (r"2\pi", r"\pi \cdot 2"),
        (r"4\pi/3", r"\frac{4\pi}{3}"), (r"\frac{4}{3}\pi", r"\frac{4\pi}{3}"),
        (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"), ("2√3", r"\sqrt{12}"),
        ("12π", r"12\pi"), ("sqrt(3)/2", r"\frac{\sqrt3}{2}"),
        ("9 pi", r"9\pi"), (r"\frac{\sqrt{6}-\sqrt{2}}{4}", r"\frac{\sqrt2(\sqrt3-1)}{4}"),
        ("e^{2}", "e^2"), (r"\sqrt{2}\sqrt{3}", r"\sqrt6"),
    ],
    "complex": [
        ("3+4i", "4i+3"), ("i^2", "-1"),
        ("(1+i)^2", "2i"), (r"\frac{1}{i}", "-i"),
        (r"2\mathrm{i}", "2i"), (r"\frac{-1+i\sqrt{3}}{2}", r"-\frac12+\frac{\sqrt3}{2}i"),
        (r"e^{i\pi}", "-1"),
    ],
    "bases": [
        ("1101_2", "1101_{2}"), ("2516_8", "2516_{8}"),
        (r"\text{1A3}_{16}", "1A3_{16}"),
    ],
    "degrees": [
        (r"30^{\circ}", "30°"), (r"45^\circ", r"45 \text{ degrees}"),
        (r"\angle ABC = 60^\circ", "60"),
    ],
    "units": [
        (r"5\text{ cm}", "5"), ("5 cm^2", "5"),
        (r"5\text{ cm}^2", "5"), (r"60\text{ miles per hour}", "60"),
        ("60 km/h", "60"), (r"12\text{ inches}", "12"),
        (r"3.5 \mathrm{~m}", "3.5"), (r"9.8\,\mathrm{m/s^2}", "9.8"),
        (r"36\sqrt{7}cm^{3}", r"36\sqrt7"), ("24 eggs", "24"),
        (r"5 \text{ hours}", "5 hours"), (r"\frac{3}{4} \text{ cup}", "0.75"),
        ("10 square feet", "10"), (r"15\text{ square units}", "15"),
        (r"16\pi \text{ cm}^3", r"16\pi"), (r"x = 5\text{ m}", "5"),
        (r"100 \mathrm{~N}", "100"), (r"12 \text{ apples}", "12.0"),
    ],
    "symbolic": [
        (r"\frac{x}{y}\cdot\frac{y}{z}", r"\frac{x}{z}"), ("(x+1)^2", "x^2+2x+1"),
        ("x^2 - 4", "(x-2)(x+2)"), ("2x", "x*2"),
        ("2(x+y)", "2x+2y"), (r"\frac{x}{2}", "0.5x"),
        (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), ("x^{-1}", r"\frac1x"),
        ("-(x-3)", "3-x"), (r"\left(x+1\right)\left(x-1\right)", "x^2-1"),
        (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), ("2^{n+1}", r"2\cdot 2^n"),
        ("a^{3/2}", r"a\sqrt{a}"), ("e^{-x}", r"\frac{1}{e^x}"),
        ("3x^2y", "3yx^2"), ("x_1+x_2", "x_{2}+x_{1}"),
        (r"\alpha\beta", r"\beta \alpha"), (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\mathbf{x}+1", "1+x"), ("xy+C", "C+xy"),
        (r"\sqrt{x^3}", r"x\sqrt{x}"), (r"\frac{-(x-29)}{(x-3)(x+5)}", r"\frac{29-x}{x^2+2x-15}"),
        ("4^n", "2^{2n}"), (r"\frac12mv^2", r"\frac{mv^2}{2}"),
        (r"\sqrt[4]{a^5}", r"a\sqrt[4]{a}"), ("x^{2}", "x^2"),
        ("3/4x", r"\frac{3x}{4}"), (r"2\,x", "2x"),
    ],
    "prefixes": [
        ("x=5", "5"), (r"x = \frac12", "0.5"),
        ("f(x)=x^2", "x^2"), ("y=2x+1", "2x+1"),
        (r"x\in[0,1]", "[0,1]"), ("(x,y)=(1,2)", "(1,2)"),
        ("AB = 7", "7"), ("x_1 = 3", "3"),
        (r"x \in (-\infty, 3)", r"(-\infty,3)"), (r"P(A)=\frac13", "1/3"),
        (r"\text{Area}=12", "12"), ("n = 2^{10}", "1024"),
        (r"\theta = 30^\circ", "30"), ("a_{n}=2n+1", "2n+1"),
        (r"x=2 \text{ or } x=-3", "-3, 2"),
    ],
    "equations": [
        ("y=2x+3", "y = 3+2x"), ("2x+3=y", "y=2x+3"),
        ("x<5", "5>x"), (r"x\le 5", r"x \leq 5"),
        (r"-1<x\leqslant 1", r"1 \ge x > -1"), (r"x \neq 2", r"x\ne2"),
        ("x^2+y^2=4", "y^2+x^2=2^2"), (r"x<1 \text{ or } x>3", "x>3, x<1"),
        ("b>a>c", "c<a<b"), ("x^{2}-7 x-44=0", "x^2-7x-44=0"),
        (r"x>\frac12", "x>0.5"), ("2x+4y-5=0", "y=-x/2+5/4"),
        ("y-3=2(x-1)", "y=2x+1"), ("(x-1)^2+(y+2)^2=9", "x^2+y^2-2x+4y-4=0"),
        ("3x=6y", "x=2y"), (r"x+y\le 4", r"4\ge x+y"),
        ("-2x<6y", "x>-3y"), ("x^2=4y", r"y=\frac{x^2}{4}"),
        (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"), ("2x-3y>6", "4x-6y>12"),
        (r"r=2\cos\theta", r"2\cos\theta=r"), ("x-2y+3z=4", "2x-4y+6z-8=0"),
        ("xy=12", "12=xy"), ("y=mx+b", "mx+b=y"),
        (r"x+y\neq 1", r"y+x\ne1"),
    ],
    "tuples": [
        ("(1,2)", r"\left( 1, 2 \right)"), (r"(\frac12, 3)", "(0.5,3)"),
        ("(1,2),(3,4)", "(3,4), (1,2)"),
        ("(x+1, y)", "(1+x,y)"), (r"\langle 1,2,3\rangle", "(1,2,3)"),
        (r"(3, \frac{\pi}{2})", r"(3,\pi/2)"), ("(5)", "5"),
        ("(1,234)", "(1, 234)"),
    ],
    "intervals": [
        ("[3,4)", r"\left[3,4\right)"), (r"(-\infty,2]", r"(-\infty, 2]"),
        (r"(3,+\infty)", r"(3,\infty)"), (r"[0,\frac12]", "[0,0.5]"),
        (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)"),
        ("(0,1)∪(2,3)", r"(0,1) \cup (2,3)"), (r"[-\sqrt{4},2]", "[-2,2]"),
        (r"x \ge 2", r"[2,\infty)"), (r"2\le x", r"[2,\infty)"),
        ("(-3,5]", r"-3<x\le5"), (r"x\neq 3", r"(-\infty,3)\cup(3,\infty)"),
        (r"\mathbb{R}\setminus\{3\}", r"x\ne 3"),
        (r"\mathbb{R}-\{0\}", r"(-\infty,0)\cup(0,\infty)"), (r"\{x\mid x\ge 0\}", r"[0,\infty)"),
        (r"x\in\mathbb{R}", r"(-\infty,\infty)"),
        (r"x<-2\text{ or }x\ge 1", r"(-\infty,-2)\cup[1,\infty)"), (r"x\in(0,1]", r"0<x\leq1"),
        ("3 > t > 1", "(1,3)"), (r"x\neq 1, x\neq 2", r"\mathbb{R}\setminus\{1,2\}"),
        (r"\{x: x\neq 5\}", r"x\ne5"), (r"(-\infty,-1]\cup[1,\infty)", r"x\le-1,x\ge1"),
        (r"a>\frac{1}{2}", r"(0.5,+\infty)"), (r"\{x \in \mathbb{R} \mid x > 1\}", r"(1,\infty)"),
    ],
    "sets and lists": [
        (r"\{1,2,3\}", r"\{3,2,1\}"), ("1,2,3", "3, 1, 2"),
        (r"\{1,2\}", "1, 2"), (r"2 \text{ and } 3", "2,3"),
        ("5 or 6", "6, 5"), (r"\pm 2", "2,-2"),
        (r"3\pm\sqrt{2}", r"3-\sqrt2, 3+\sqrt2"), (r"x=\pm 3", "3, -3"),
        (r"\emptyset", r"\varnothing"), (r"\{\}", r"\emptyset"),
        ("1; 2", "1, 2"), (r"\{-1, 0.5\}", r"\{\frac12, -1\}"),
        ("2, 3, and 5", "5,3,2"),
        (r"\frac{-1\pm\sqrt5}{2}", r"\frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}"),
        (r"\pm1,\pm i", "i,-i,1,-1"), (r"\{1\}", "1"),
        (r"\left\{ 2, 3 \right\}", r"\{2,3\}"), (r"\$5$ or $9\$", "9,5"),
        ("5 or 100", "100 or 5"), (r"10\text{ or }100", "100,10"),
        ("1,000 and 2,000", "1000, 2000"), ("1,200; 300", "300, 1200"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        (r"\begin{pmatrix} \frac12 \\ 0 \end{pmatrix}",
         r"\begin{pmatrix} 0.5 \\ 0 \\ \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 4/2 \end{pmatrix}"),
        (r"\begin{pmatrix} x+1 \\ y \end{pmatrix}", r"\begin{pmatrix} 1+x \\ y \end{pmatrix}"),
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
         r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"),
        (r"\begin{pmatrix}1\\[6pt]2\end{pmatrix}", "(1,2)"),
        (r"\langle 3,4,5\rangle", r"\begin{bmatrix}3\\4\\5\end{bmatrix}"),
        (r"\begin{Bmatrix}1&0\end{Bmatrix}", r"\begin{pmatrix}1&0\end{pmatrix}"),
        (r"\begin{pmatrix}\sin x\\ \cos x\end{pmatrix}",
         r"\begin{pmatrix}\sin(x)\\\cos(x)\end{pmatrix}"),
        (r"\begin{bmatrix} 1/2 & 0 \\ 0 & 0.5 \end{bmatrix}",
         r"\begin{pmatrix}\frac12&0\\0&\frac12\end{pmatrix}"),
        (r"\left(\begin{array}{c}1\\-1\end{array}\right)", r"\begin{pmatrix}1\\-1\end{pmatrix}"),
        (r"\left(\begin{smallmatrix}1&2\end{smallmatrix}\right)",
         r"\begin{bmatrix}1&2\end{bmatrix}"),
    ],
    "text": [
        (r"\text{Tuesday}", "Tuesday"), (r"\text{(B)}", "B"),
        ("(B)", "B"), (r"\textbf{(C)}", "C"),
        (r"\text{Yes}", "yes"), ("No", "no"),
        (r"\text{no solution}", "No solution"), (r"\mathrm{B}", "B"),
        (r"\text{all real numbers}", "All real numbers"), (r"\text{True}", "true"),
        (r"\text{even}.", "even"), ("3:4", "3 : 4"),
        (r"\text{June 20}", "June 20"), (r"\text{red and blue}", "blue and red"),
        ("IV", r"\text{IV}"), ("5:00 PM", "5:00 PM"),
        (r"5:00\text{ p.m.}", "5:00"), ("07:30", "7:30"),
    ],
    "unreadable": [
        (r"\frac{1}{0}", r"\frac{1}{0}"), (r"\vec{a}+\vec{b}", r"\vec{a} + \vec{b}"),
        (r"\sum_{k=1}^n k", r"\sum_{k=1}^n  k"), (r"\overline{AB}", r"\overline{AB}"),
        ("9^{9^{9^9}}", "9^{9^{9^9}}"),
    ],
    "as models write": [
        ("2^{100}-1", "1267650600228229401496703205375"), ("3n^2+3n+1", "(n+1)^3-n^3"),
        (r"x=1 \text{ or } x=4", "1,4"), (r"\sqrt{1-x^2}", "(1-x^2)^{1/2}"),
        (r"\sqrt{-4}", "2i"), (r"\sqrt{-3}", r"i\sqrt3"),
        (r"\frac x2", "x/2"), ("x e^{-x}", r"\frac{x}{e^{x}}"),
        (r"4.8 \times 10^{14}\text{ Hz}", "4.8e14"), ("S_n = 2^n - 1", "2^n-1"),
    ],
    "functions": [
        (r"\sqrt[3]{-8}", "-2"), (r"\ln 8", r"3\ln 2"),
        ("|3+4i|", "5"), ("|x-1|", "|1-x|"),
        (r"\sin^2 x", r"(\sin x)^2"), (r"\ln(x^2)", r"2\ln x"),
        (r"\frac{\ln 3}{2}", r"\frac12\ln 3"), ("f^{-1}(x)=x", "x"),
        (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", "1/6"),
        ("5!", "120"), (r"\binom{10}{3}", "120"),
        (r"\log_2 8", "3"), (r"\log_{10} 1000", "3"),
        (r"\sin 30^\circ", r"\frac12"), (r"\cos\frac{\pi}{3}", "0.5"),
        (r"\tan^{-1} 2", r"\arctan 2"), (r"120\degree", "120"),
        ("(n+1)!", "(n+1)n!"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        ("k!", "(k)!"), ("x=2,-2", "x=2,x=-2"),
        (r"\cos A=\frac12", r"\frac12"),
        (r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)",
         r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\sin 2x", r"\sin  2x"), (r"\ln|x|+C", r"$\ln|x|+C$"),
        (r"\sin(2x)", r"2\sin x\cos x"), (r"\cos 2x", r"1-2\sin^2 x"),
        (r"\tan x", r"\frac{\sin x}{\cos x}"), (r"\sec^2 x", r"1+\tan^2 x"),
        (r"\ln(ab)", r"\ln a+\ln b"), (r"\log_5 25", "2"),
        (r"\log_{3}{9}", "2"), (r"\ln e^3", "3"),
        (r"\frac{\ln 8}{\ln 2}", "3"), (r"\arcsin\frac12", r"\frac{\pi}{6}"),
        (r"\sin^{-1}(1)", r"\pi/2"), (r"\cot x", r"1/\tan x"),
        (r"\csc(x)", r"\frac{1}{\sin x}"), (r"\left|x-3\right|", "|3-x|"),
        (r"\lfloor 3.7 \rfloor", "3"), (r"\lceil 2.1\rceil", "3"),
        (r"\frac{6!}{4!}", "30"), (r"\binom{6}{2}+1", "16"),
        (r"\max(3,7)", "7"), (r"\gcd(12,18)", "6"),
        (r"\sqrt[3]{-27}", "-3"), (r"\sqrt[3]{x^6}", "x^2"),
        (r"3\cos\theta", r"3\cos(\theta)"), (r"\ln{(x+1)}", r"\ln(1+x)"),
        (r"2\ln x", r"\ln x^2"), (r"\omega^2\mu", r"\mu\omega^2"),
        (r"e^{\ln x}", "x"), (r"\exp(-x/2)", r"e^{-\frac{x}{2}}"),
        (r"\cos^2\theta", r"1-\sin^2\theta"), ("sin(x)cos(x)", r"\sin x\cos x"),
        (r"\frac{\sin x}{2}", r"\frac12\sin(x)"), (r"\sinh x", r"\frac{e^x-e^{-x}}{2}"),
        (r"\log_2(x)+3", r"3+\log_2 x"), (r"\arctan(x)+C", r"\tan^{-1}x+C"),
        (r"x\ln x-x+C", r"x(\ln x-1)+C"), (r"\frac{1}{2}\sin 2x+C", r"\sin x\cos x+C"),
        (r"\sqrt{\tan x}", r"(\tan x)^{1/2}"),
    ],
    "words around": [
        (r"x^2+1 \text{ for all real } x", "x^2+1"), (r"f(x)=2x\text{ for all }x", "2x"),
        (r"2n+1\text{, where }n\text{ is an integer}", "2n+1"),
        (r"2k\pi, k\in\mathbb{Z}", r"2k\pi"), ("B. 12", r"\text{B}"),
        ("(C) 3.5", "C"), (r"\textbf{(D)}\ 7", "D"),
        (r"\text{(E) } 15", "15"), (r"8\text{ chickens and }5\text{ rabbits}", "8, 5"),
        (r"3:30\text{ PM}", "3:30"), ("3:30 p.m.", r"3:30\text{ PM}"),
        ("12 m/s", "12"), (r"9\text{ m}^2", "9"),
        (r"45\text{ mph}", "45 miles per hour"), (r"3x\text{ meters}", "3x"),
        ("5 N", r"5\text{ N}"), (r"7\text{ sq. ft}", "7 square feet"),
        (r"132_{\text{five}}", "132_5"), (r"132\text{ (base 5)}", "132_5"),
        ("132", "132_5"), ("10 eggs", r"10\text{ eggs}"),
        ("40 percent", r"40\%"), ("5 kg", r"5\text{ kilograms}"),
        (r"\text{Total} = 30", "30"), (r"\text{The final answer is } 12", "12"),
        ("6 hours", "6 hr"), (r"2.5\times10^3\text{ J}", "2500"),
        (r"14\text{ people}", "14"), (r"9.8\ \mathrm{m}/\mathrm{s}^2", "9.8"),
        (r"70\,\Omega", "70"), (r"3\text{ cups of flour}", "3"),
        (r"\text{seven}", "7"), (r"\text{none}", r"\text{None}"),
        (r"n^2+n \quad (n\ge1)", "n^2+n"), (r"a_n=2^n \text{ for } n\ge 1", "2^n"),
        (r"\$4.50\text{ per hour}", "4.5"), (r"15 \text{ minutes}", "15 min"),
        ("Friday", r"\text{Friday}."), (r"\text{a circle}", "a circle"),
    ],
    "spellings": [
        ("x <= 5", r"x\leq 5"), ("y != 0", r"y\neq0"),
        (r"12,\! 345", "12345"), ("1{,}000{,}000", "10^6"),
        ("ｘ=5", "5"), ("（3，4）", "(3,4)"),
        ("exp(12)", "e^{12}"), (r"\pi rad", r"\pi"),
        (r"2 \mbox{ cm}^3", "2"), ("sqrt(5)/2", r"\frac{\sqrt5}{2}"),
        ("3*x+2", "3x+2"), ("2x^2 - 3*x", "2x**2-3x"),
        (r"\left\lbrace 1,2\right\rbrace", r"\{1,2\}"), (r"x \lt 4", "x<4"),
        (r"\dfrac{\pi}{6}", "pi/6"), (r"5 \times 6", "30"),
        (r"3\frac{3}{4}", "3.75"), ("7 1/2", "7.5"),
        (r"\frac{1}{2}x", "x/2"), (r"2\cdot 3^4", "162"),
        (r"\boldsymbol{42}", "42"), (r"\( \frac{3}{5} \)", "0.6"),
        (r"\[ 12 \]", "12"), ("100.", "100"),
        ("{,}5", "5"), (r"7\,", "7"),
        (r"-\,3", "-3"), (r"\text{ } 8", "8"),
        ("m+n=17", "17"), ("p+q = 35", "35"),
        ("20+30=50", "50"), ("x = 6/2 = 3", "3"),
        ("x=1,y=2", "(1,2)"), (r"AB=12\text{ cm}", "12"),
        (r"\angle B = 40^\circ", "40"), ("x_1=2,x_2=3", "2,3"),
        ("f(3)=9", "9"), (r"\sin A=\frac35", r"\frac35"),
        (r"P(A\cap B)=0.3", "0.3"), (r"S=\{1,2\}", r"\{1,2\}"),
        ("(a,b,c)=(1,2,3)", "(1,2,3)"), ("|AB|=5", "5"),
        (r"\text{Perimeter: }20", "20"), (r"\overline{AB}=6", "6"),
    ],
    "notations": [
        (r"(1)/(20,\!000)", r"\frac{1}{20000}"), (r"\frac{7}{20{,}000}", "7/20000"),
        ("4xsqrt(5x)", r"4x\sqrt{5x}"), (r"x\le1:(-\infty,1].", r"x\le1"),
        ("3x sqrt(2)", r"3x\sqrt2"),
        ("2[x+1]", "2(x+1)"), ("[x+1]^2", "(x+1)^2"), ("2|x|", "|2x|"), ("|x||y|", "|xy|"),
        (r"\frac{|x|}{2}", r"\frac12|x|"),
        (r"x\approx 3.2", "3.2"), (r"x\approx 3.2", "x=3.2"),
        (r"\{2,4,\ldots\}", r"\{2, 4, \dots\}"),
        (r"1,2,\ldots,n", "1,2,...,n"), (r"[0,1)\cup\{2\}", r"\{2\}\cup[0,1)"),
        (r"13\cdot-2", "-26"), ("6/-2", "-3"), ("13.0 + -1.0i", "13-i"), ("--3", "3"),
        (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"), (r"\ln x-\ln y", r"\ln\frac{x}{y}"),
        (r"\frac{\partial z}{\partial x}", "z_x"), (r"\frac{dy}{dx}=ky", "y'=ky"),
        (r"x\le1:(-\infty,1]", r"x\le1"), (r"-2\leqslant n\leqslant 4:[-2,4]", "[-2,4]"),
        (r"\begin{pmatrix}1&\phantom -1\end{pmatrix}", r"\begin{pmatrix}1&1\end{pmatrix}"),
        ("_{10}C_3", "120"), (r"{}_{5}C_{2}", "10"), ('"5"', "5"), ("“x+1”", "x+1"),
        (r"\underline{5}", "5"), (r"\boxed{5}", "5"), (r"\bf 5", "5"), ("5\\\\", "5"),
        (r"\therefore x=5", "5"), (r"\%7", "7"), (r"5\Omega", "5"), ("5¢", r"5\text{ cents}"),
        (r"\text{Area: }20", "20"), (r"\text{Thus the answer is }5", "5"),
        (r"\begin{cases}x=1\\y=2\end{cases}", "x=1,y=2"), (r"C_n^2+f(n)", r"f(n)+C_n^2"),
        (r"\cosh^2 x-\sinh^2 x", "1"), (r"\tanh x", r"\frac{\sinh x}{\cosh x}"),
        (r"\operatorname{lcm}(4,6)", "12"), (r"\operatorname{arcsec} 2", r"\frac{\pi}{3}"),
        (r"\operatorname{arccsc}(2)", r"\frac{\pi}{6}"),
        (r"\operatorname{arccot} 1", r"\frac{\pi}{4}"),
        (r"f(2x)+1", r"1+f(x\cdot2)"), (r"\frac14\vec a+\vec b", r"\vec{b}+\frac{1}{4}\vec{a}"),
        (r"\mathbf{0}", r"\begin{pmatrix}0\\0\end{pmatrix}"), ("mgh", "m g h"),
        (r"e^{i\pi}+1", "0"),
        (r"\log_{-2} 4", r"\log_{-2} 4"), (r"2-\sqrt3", r"\tan 15^\circ"),
        (r"10^{-20}\sqrt{8}", r"2\cdot10^{-20}\sqrt2"),
    ],
    "second set written before a trial": [
        (r"\frac{x}{2}\sin 2x+\frac14\cos 2x+C", r"\frac{1}{4}\cos(2x)+\frac{x\sin(2x)}{2}+C"),
        ("y=Ce^{-x^2}", r"y=C\exp(-x^2)"),
        (r"30^\circ,150^\circ", r"150^{\circ} \text{ and } 30^{\circ}"),
        ("(x-2)^2+(y+3)^2=16", "x^2+y^2-4x+6y-3=0"), ("|x|<3", "|x| < 3"),
        ("x=-3, y=2", "(-3,2)"), (r"\frac{n!}{(n-2)!}", "n(n-1)"),
        (r"2(\cos 30^\circ+i\sin 30^\circ)", r"\sqrt3+i"), (r"4e^{i\pi/3}", r"2+2\sqrt3 i"),
        (r"x=2\text{ and }y=0", "y=0, x=2"), (r"\sqrt{\frac{2GM}{R}}", "(2GM/R)^{1/2}"),
        (r"E=\frac{p^2}{2m}", r"\frac{p^2}{2m}"), (r"v=\sqrt{3kT/m}", r"\sqrt{\frac{3kT}{m}}"),
        (r"\cos^2 18^\circ", r"\frac{5+\sqrt5}{8}"), ("f(n)=n", "f(n) = n"),
        (r"k\ge2", r"[2,\infty)"), (r"a^2+b^2-2ab\cos C", r"b^2+a^2-2ab\cos(C)"),
        (r"\frac12(-1)^n", r"\frac{(-1)^n}{2}"), ("p=2,q=3", "(2,3)"),
        ("e-1", "-1+e"), (r"n\text{ odd}", r"n \text{ odd}"),
        (r"12\text{ feet}", "12 ft"), (r"\$12.50", r"12.5\text{ dollars}"),
        (r"x=\frac{\pi}{4}+k\pi, k\in\mathbb{Z}", r"\frac{\pi}{4}+k\pi"),
        (r"5\text{ units}^2", "5"), (r"25\text{ km/h}", "25"),
        (r"1.2\times 10^{-3}\text{ mol/L}", "0.0012"), (r"\text{Yes}", "Yes."),
        (r"6 \text{ is the answer}", r"6 \text{ is the answer}"), (r"\sqrt[4]{16}", "2"),
        (r"\frac{\ln 2}{\ln 3}", r"\log_3 2"), (r"\tan 60^\circ", r"\sqrt3"),
        (r"\sin\frac{\pi}{4}", r"\frac{\sqrt2}{2}"), (r"\sec 60^\circ", "2"),
        (r"\lceil \pi\rceil", "4"), ("3!", "6"),
        (r"\text{lcm}(4,6)", "12"), (r"\operatorname{gcd}(8,12)", "4"),
        (r"\min\{3,5\}", "3"), (r"\left\lfloor -1.5\right\rfloor", "-2"),
        (r"\frac{1}{2}\left|x\right|", "|x|/2"), ("(x+3)(x-2)>0", "x^2+x-6>0"),
        ("3y=2x-1", "2x-3y=1"), (r"x^2+y^2\le 4", r"4\ge x^2+y^2"),
        (r"\frac{x-1}{2}=y", "x=2y+1"), (r"t\in[0,2\pi)", r"0\le t<2\pi"),
        (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}"),
        (r"x<0\text{ or }x>0", r"x\neq0"),
        (r"\begin{bmatrix}1\\2\\3\end{bmatrix}", r"\langle1,2,3\rangle"),
        (r"\begin{pmatrix}1 & 0\\[2mm] 0 & 1\end{pmatrix}",
         r"\begin{bmatrix}1&0\\0&1\end{bmatrix}"), (r"\text{(C)}\ 12", "C"),
        ("C) 12", r"\text{(C)}"), (r"9:05\text{ a.m.}", "9:05 AM"),
        (r"7 \text{ days}", "7 days"), (r"10 \%", r"10\text{ percent}"),
        (r"1101_{\text{two}}", "1101_{2}"), (r"x\geqslant 1", "x>=1"),
        (r"4,\!096", "4096"), ("１２", "12"),
        (r"\pi\text{ radians}", r"\pi"), (r"2\,\mathrm{rad}", "2"),
        (r"\text{Distance} = 12", "12"), (r"\text{probability}=\frac14", r"\frac14"),
        ("a+b = 7", "7"), ("2+2=4", "4"),
        ("x=y=3", "x=y=3"), ("15 - 7 = 8", "8"),
        (r"12\text{ square inches}", r"12\text{ in}^2"), (r"3\text{ pounds}", r"3\text{ lb}"),
        (r"\frac{3}{8}\text{ inch}", r"\frac38"),
        (r"8\text{ boys and }7\text{ girls}", r"8\text{ boys}, 7\text{ girls}"),
        (r"\text{2 red and 3 blue}", r"\text{2 red and 3 blue}"), ("n=3k", "3k"),
        (r"f(x)=3x \text{ for all real numbers } x", "3x"), (r"2^n\text{ for }n=1,2,3", "2^n"),
    ],
    "third set written before a trial": [
        ("2x^2-8=0", "x^2=4"),
        (r"\sin(\alpha+\beta)", r"\sin\alpha\cos\beta+\cos\alpha\sin\beta"),
        (r"\cos^4 x-\sin^4 x", r"\cos 2x"), (r"\frac{1}{1+\tan^2 x}", r"\cos^2 x"),
        (r"\ln\sqrt{x}", r"\frac12\ln x"), (r"\log_4 8", r"\frac32"),
        (r"e^{2\ln 3}", "9"), (r"\sqrt{12}+\sqrt{27}", r"5\sqrt3"),
        ("(2+i)(2-i)", "5"), (r"\frac{2}{1-i}", "1+i"),
        (r"\binom{n}{k}=\binom{n}{n-k}", r"\binom{n}{n-k}=\binom{n}{k}"),
        (r"\frac{(2n)!}{n!n!}", r"\binom{2n}{n}"), ("-2<x<5", r"x\in(-2,5)"),
        (r"[1,2]\cup\{5\}", r"\{5\}\cup[1,2]"), (r"3\le n\le 9", "[3,9]"),
        (r"y\le -1 \text{ or } y\ge 4", r"(-\infty,-1]\cup[4,\infty)"),
        (r"x \neq \pm 2", r"x\ne 2, x\ne -2"),
        (r"\begin{bmatrix}2&0\\0&2\end{bmatrix}",
         r"\left(\begin{array}{rr}2&0\\0&2\end{array}\right)"),
        ("(3,-1,2)", r"\begin{bmatrix}3 & -1 & 2\end{bmatrix}"),
        (r"15\text{ cm by }10\text{ cm}", r"15\text{ cm by } 10\text{ cm}"),
        (r"4\text{ hr}", "4 hours"), ("2.50 dollars", r"\$2.50"),
        (r"1{,}200\text{ people}", "1200"), (r"\text{(A)}\ \frac12", "A"),
        ("D: 7", "D"), (r"0.5\text{ seconds}", r"\frac12"),
        (r"30\text{ mi/h}", "30"), (r"45\text{ km per hour}", "45 km/h"),
        (r"\text{Monday}", "monday"), (r"6:15\text{ AM}", "6:15 a.m."),
        (r"\text{forty}", r"\text{Forty}"), (r"x = 3\text{ cm}", "3"),
        (r"V=36\pi", r"36\pi"), ("A(t)=100e^{0.05t}", "100e^{0.05t}"),
        ("T_n=3n-1", "3n-1"), (r"\angle BAC=72°", r"72^\circ"),
        (r"x=-1\pm\sqrt3", r"-1+\sqrt3,-1-\sqrt3"), (r"\{(0,0),(1,1)\}", "(1,1),(0,0)"),
        (r"2k+1\text{ for some integer }k", "2k+1"),
        (r"\frac{22}{7}\text{ (approximately)}", r"\frac{22}{7}\text{ (approximately)}"),
        (r"3 \times 10^5", "300{,}000"), (r"5\sqrt{2} units", r"5\sqrt2"),
        (r"\frac{1}{4}\text{ or }0.25", r"\frac14, 0.25"), ("11_{7}", "11"),
        ("2AF_{16}", r"2AF_{\text{sixteen}}"), (r"\frac{dy}{dx}=2x", "y'=2x"),
    ],
}

DIFFERENT = {
    "vectors": [
        (r"2\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}2&4\\3&4\end{pmatrix}"),
        ("(1,2)+t(3,4)", "(1+3t,2-4t)"), ("(1,2)+(3,4)", "(4,7)"), ("(3,4)", "3+4i"),
        (r"4\mathbf{i}-3\mathbf{j}", "(-3,4)"), ("(y,x)=(2,3)", "(2,3)"),
        ("x=3,y=2", "(x,y)=(2,3)"), (r"\begin{pmatrix}5\\2\end{pmatrix}", r"\binom{2}{5}"),
        (r"(1,2)\cdot(3,4)", "(3,8)"),
    ],
    "sets of numbers": [
        ("[0,1[", "(0,1)"), ("]0,1]", "(0,1)"), (r"|x|\le 3", "(-3,3)"), ("|x|<3", "|x|>3"),
        (r"(-1,1)\cup(1,3)", "(-1,3)"), (r"x\ge-2,x\ne1", r"[-2,\infty)"),
        (r"\{x\mid x>1, x<3\}", r"\mathbb{R}"), (r"\sqrt[3]{2},\sqrt[3]{4}", "(2,4)"),
        (r"(1,2]\cup\{3\}", "(1,3]"), ("x>1, x<3", r"\mathbb{R}"), ("x>1, x>2", "x>1"),
    ],
    "parameters and constants": [
        (r"\pi k, k\in\mathbb{Z}", r"\pi k, k\in\mathbb{N}"), ("mc^2+C", "mC^2+C"),
        (r"x=2\pi k, k\in\mathbb{Z}", r"x=\pi k, k\in\mathbb{Z}"),
        ("k^2, k>1", "k^2, k>2"), ("a+b+c", "a+b+c+1"), ("x^2+C", "2x+C"), ("x^2+C", "x^2"),
        ("3x+C", "3x+2C"), (r"\sum_{k=1}^{9} k^2", r"\sum_{k=1}^{9} n^2"), ("f(2)=3", "f(3)=3"), ("y_1=x", "y_2=x"),
    ],
    "words outside of dollars": [
        ("twice $5$", "5"), ("never $5$", "5"), ("At least: $5$", "5"), ("at most $5$", "5"),
        ("reciprocal: $5$", "5"), ("(3!)!", "3!!"), ("7!!", "5040"), ("not $5$", "5"), ("about $5$", "5"), ("all but $5$", "5"),
        ("$5$ or less", "5"), ("$5$ squared", "5"), ("axis $x=2$", "y=2"),
        (r"\operatorname{rank}(A)=2", r"\operatorname{rank}(B)=2"),
    ],
    "congruences, cases, sums": [
        (r"x\equiv 3\pmod{7}", r"x\equiv 4\pmod{7}"),
        (r"x\equiv 3\pmod{7}", r"x\equiv 3\pmod{8}"), (r"x\equiv 3\pmod{7}", "10"),
        (r"x\equiv 3\pmod{7}", r"y\equiv 3\pmod{7}"), ("7 mod 10", "7"),
        (r"\begin{cases}1&x>0\\0&x<0\end{cases}", r"\begin{cases}0&x>0\\1&x<0\end{cases}"),
        (r"\begin{cases}1&x>0\\0&x<0\end{cases}", "1, 0"),
        (r"\sum_{k=1}^{n}k", r"\sum_{k=0}^{n}k"), (r"\sum_{k=1}^{n}k", "k"),
        (r"\int_0^1 x dx", r"\int_0^2 x dx"), (r"\int_0^1 x dx", r"\sum_0^1 x dx"),
        (r"\gcd(m,n)", "1"), (r"m+n-\gcd(m,n)", "m+n-1"), (r"\operatorname{lcm}(m,n)", "mn"),
        (r"\gcd(n,8)", r"\gcd(n,4)"), ("[n/2]+1", "n/2+1"), ("(2) 3", "6"),
    ],
    "money, units, rounding": [
        ("5 dollars", "5 euros"), (r"\$5", r"5\text{ cents}"), (r"\$5", r"5\text{ cm}"), (r"45^\circ", r"45\text{ cm}"),
        (r"1^\circ", r"1\text{ radian}"), (r"45\%", r"45^\circ"), ("5 m", "5 m/s"),
        (r"\$5 \text{ million}", r"\$5"), (r"\frac17\approx 0.14", "0.14"), (r"\approx 7", "7"),
        (r"{\color{white}7}8", "8"), ("10⁻⁴", "10^4"), (r"20^\circ C", r"20^\circ F"),
    ],
    "second set written before a trial": [
        ("|x|<3", "x<3"), (r"30^\circ,150^\circ", r"30^\circ"),
        (r"\tan 60^\circ", r"\tan 60"), ("(x-2)^2+(y+3)^2=16", "(x-2)^2+(y+3)^2=4"),
        (r"4e^{i\pi/3}", r"4e^{-i\pi/3}"), ("n(n-1)", "n(n+1)"),
        (r"\text{Yes}", r"\text{No}"), (r"\text{Yes}", "1"),
        ("x=y=3", "4"), (r"12\text{ ft}", r"12\text{ in}"),
        (r"12\text{ ft}^2", r"12\text{ ft}"), ("a+b=7", "a+b=8"),
        (r"x\in[0,2\pi]", r"[0,2\pi)"), (r"9:05\text{ a.m.}", r"9:05\text{ p.m.}"),
        ("9:05", "9:50"), ("(C) 12", "D"),
        ("(C) 12", "13"), ("1101_2", "1101_8"),
        ("1101_2", "13_8"), (r"2^n\text{ for }n>1", "3^n"),
        (r"k\ge 2", "k>2"), ("E=mc^2", "E=mc^3"),
        ("mc^2", "m^2c"), ("x^2+x-6>0", "x^2+x-6<0"),
        ("3y=2x-1", "3y=2x+1"), ("f(n)=n", "f(n)=2n"),
        (r"\frac{\pi}{4}+k\pi", r"\frac{\pi}{4}+2k\pi"), ("C e^{x}", "e^{x}"),
        ("c_1e^x+c_2e^{-x}", "c_1e^x+c_2e^{-2x}"), (r"\sin 3x", r"3\sin x"),
        (r"\log_2 3", r"\log_3 2"), (r"\lfloor \pi\rfloor", "4"),
        (r"7\text{ more}", "7"), (r"7\text{ doubled}", "7"),
        (r"7\text{ reciprocal}", "7"), (r"7\text{ below zero}", "7"),
        (r"7\text{ nope}", "7"), (r"7\text{ ?}", "7"),
        ("7?", "7"), (r"7\ldots", "7"),
        (r"7+\epsilon", "7"), (r"7\pm 0.1", "7"),
        (r"\approx 7", "7"), (r"\sim 7", "7"),
        (r"\neq 7", "7"), (r"x\neq 7", "7"),
        ("<7", "7"), (r"x\le 7", "7"),
        (r"7\to 8", "7"), (r"7\text{ then }8", "7"),
        ("7 vs 8", "7"), ("7|8", "7"),
        (r"7\cdot 10^0.5", "7"), (r"7\%\text{ of }8", "7"),
        (r"\{7,\}", "8"), (r"7\text{ twos}", "7"),
        (r"7\text{ powers}", "7"), (r"7\text{ sums}", "7"),
        (r"7\text{ pairs of }8", "7"), (r"7\text{ opposites}", "7"),
        (r"7\text{ repeats}", "7"), (r"7\text{ negatives}", "7"),
        (r"7\text{ is false}", "7"), (r"7\text{ isn't right}", "7"),
        (r"7\text{ guess}", "7"), (r"7\text{ perhaps}", "7"),
        (r"7\text{ versus}", "7"), (r"7\text{ plus}", "7"),
        (r"7\text{ degrees below}", "7"), (r"7\text{ less}", "7"),
        (r"7\text{ times}", "8"), (r"7 \text{ gross}", "7"),
        (r"7\text{ scores}", "7"), (r"7\text{ bits more}", "7"),
        (r"7\text{ unknown}", "7"), (r"7\text{ errors}", "8"),
    ],
    "third set written before a trial": [
        ("2x^2-8=0", "x=2"), ("x=3y", "y=3x"),
        (r"\sin(\alpha+\beta)", r"\sin\alpha+\sin\beta"), (r"\cos 2x", r"2\cos x"),
        (r"\ln\sqrt{x}", r"\sqrt{\ln x}"), (r"\log_4 8", "2"),
        ("(2+i)(2-i)", "3"), (r"\frac{2}{1-i}", "1-i"),
        (r"\frac{(2n)!}{n!}", r"\binom{2n}{n}"), ("-2<x<5", "(-2,5]"),
        (r"3\le n\le 9", "3,9"), (r"y\le -1", r"y\ge -1"),
        (r"x\ne 2", r"x\ne\pm2"), (r"\begin{bmatrix}2&0\\0&2\end{bmatrix}", "2"),
        ("(3,-1,2)", "(3,2,-1)"), (r"15\text{ cm by }10\text{ cm}", r"15\text{ cm}"),
        (r"4\text{ hr}", r"4\text{ min}"), ("D: 7", "8"),
        (r"30\text{ mi/h}", r"30\text{ km/h}"), (r"6:15\text{ AM}", r"6:15\text{ PM}"),
        ("x=3", "x=3,4"), (r"V=36\pi", "36"),
        ("T_n=3n-1", "3n+1"), (r"\angle BAC=72°", "27°"),
        (r"x=-1\pm\sqrt3", r"-1+\sqrt3"), (r"\{(0,0),(1,1)\}", "(0,1),(1,0)"),
        ("2k+1", "2k"), (r"5\sqrt2", r"\sqrt{10}"),
        ("11_7", "8"), ("y'=2x", "y=2x"),
        ("a<b", "b<a"), ("x+y=1", "x-y=1"),
        ("(1,2)", "1:2"), (r"5\text{ minus a bit}", "5"),
        (r"5\text{ roughly}", "5"), (r"\text{five or six}", "5"),
        ("5(?)", "5"), ("5*", "5"),
        (r"5^\prime", "5"), (r"5\to\infty", "5"),
        (r"5\text{ apples}", r"5\text{ oranges}"), (r"\sqrt{x^4}", "x^3"),
        ("x|x|", "x^2"), (r"\max(x,0)", "x"),
        ("(x^2)^{1/2}", "x"), (r"\arcsin(\sin x)", "x"),
        (r"\lfloor x\rfloor+1", r"\lceil x\rceil"), (r"\frac{x}{|x|}", "1"),
        (r"\sin n\pi", "1"),
    ],
    "notations": [
        (r"\vec{a}\times\vec{b}", r"\vec{a}\cdot\vec{b}"), (r"\frac{\partial z}{\partial x}", "z"),
        ("(-1)^m", "(-1)^n"), (r"\pm1\pm2", r"\pm3"), (r"\Gamma(3)", r"3\Gamma"),
        (r"\gcd(2a)", r"2\gcd(a)"),
        (r"10^{-20}\sqrt{8}", r"10^{-20}\sqrt{9}"), ("e^{25}-1", "e^{25}"),
        (r"\{\{1\},\{2\}\}", r"\{1,2\}"),
        (r"x<-1\text{ or }x>3", r"x<-1\text{ and }x>3"), (r"0^\circ\text{C}", r"0^\circ\text{F}"),
        ("7 for all 8", "7"), (r"7\text{ for all }54", "7"), (r"x\le1:(2", r"x\le1"),
        ("0", "(0,0)"), ("0", r"\begin{pmatrix}0&1\end{pmatrix}"),
        (r"x\ne1,y\ne2", r"x\ne1,x\ne2"), ("|x|=5", "5"), (r"\{x\}", "(1,2)"),
        (r"\sin x=\frac12", r"\frac12"), (r"\{x,y\}", "x<2"), (r"x\ne x", r"\mathbb{R}"),
        (r"\approx 7", "7"), ("7...", "7"), (r"\{1,2,\ldots\}", r"\{1,2\}"), ("(5]", "5"),
        ("C(5,2)", "5C+2C"), ("MA", "AM"), ("x_1", "x_{11}"), ("x'", "x"), (r"\hat{x}", r"\bar{x}"),
    ],
    "fractions": [
        (r"\frac{1}{2}", r"\frac{2}{1}"), (r"\frac12", "12"),
        (r"1\frac12", r"\frac12"), (r"\frac{3}{4}", r"-\frac{3}{4}"),
        (r"\frac{22}{7}", r"\pi"), (r"2\frac13", r"\frac23"),
        (r"\frac{7}{3}", r"\frac{7}{4}"), ("1/3", "0.33"),
        (r"\frac{100}{3}", "33.3"), (r"x\frac12", r"x+\frac12"),
        (r"\frac{11}{36}", r"\frac{1}{36}"),
    ],
    "decimals": [
        ("0.333", r"\frac13"), ("809.05", "809"),
        ("0.5", "0.05"), ("1.41", r"\sqrt2"),
        ("3.14", r"\pi"), ("0.67", "2/3"),
        ("3.14159265359", r"\pi"), ("2.718", "e"),
        (r"0.\overline{3}", "0.3"), ("13.0", "13.01"),
    ],
    "integers": [
        ("10081", "10080"), ("3986728", "3986729"),
        ("100000000000000000001", "100000000000000000000"), ("42", "-42"),
        ("1,234", "1.234"), ("1,234", "1235"),
        ("2^{10}", "2^{11}"), ("12", "21"),
        ("1 2", "12"), ("3 4", "7"),
        ("5!", "5"), ("2^{2024}", "2^{2025}"),
        ("0", "-1"),
    ],
    "percent and money": [
        (r"25\%", "0.25"), (r"25\%", "2.5"),
        (r"\$18", "180"), (r"\$18.50", "18.05"),
        (r"18 \text{ dollars}", "19"), (r"5\%", r"6\%"),
    ],
    "scientific": [
        (r"1.5\times10^3", r"1.5\times10^4"), ("10^{-2}", "10^2"),
        ("2e5", "2e6"), (r"1.2\times10^{-5}", r"1.3\times10^{-5}"),
    ],
    "roots and pi": [
        (r"\sqrt{2}", r"\sqrt{3}"), (r"2\sqrt{3}", r"3\sqrt{2}"),
        (r"\sqrt{2}", "2"), (r"2\pi", "2"),
        (r"2\pi", r"\pi^2"), (r"3\sqrt{2}", "3"),
        (r"\sqrt{5}+1", r"\sqrt{6}"), (r"\sqrt[3]{9}", "3"),
        (r"1+\sqrt{2}", r"1-\sqrt{2}"), (r"\frac{103993}{33102}", r"\pi"),
        (r"\sqrt2", "1.4142135623731"), (r"\ln 8", r"\log 8"),
        ("e^2", "2e"), (r"\pi", r"\frac{355}{113}"),
        (r"12\pi", "12"), (r"4\sqrt{13}", "413"),
        (r"\frac{\pi}{6}", r"\frac{\pi}{3}"), (r"\sqrt{17}", "4.123"),
        (r"\log_2 8", r"\log_8 2"),
    ],
    "complex": [
        ("3+4i", "3-4i"), ("2i", "2"),
        ("i", "-i"), ("3+4i", "4+3i"),
        ("1+i", "1+2i"), (r"i\sqrt{3}", r"\sqrt{3}"),
    ],
    "bases": [
        ("1101_2", "1101_3"), ("1101_2", "1111_2"),
        ("52_8", "52_9"), ("52_8", "42"),
    ],
    "degrees": [
        (r"30^\circ", r"60^\circ"), (r"30^\circ", "300"),
        (r"45^\circ", r"54^\circ"), (r"90^\circ", "9"),
    ],
    "units": [
        ("15^2", "15 cm^2"), ("5 cm", "6 cm"),
        (r"5\text{ cm}", r"5\text{ m}"), ("5x", "5"),
        ("5 x", "5"), ("2 pi", "2"),
        (r"5\text{ cm}^2", "25"), ("24 eggs", "42 eggs"),
        ("5m", "5"), ("3ab", "3"),
        (r"8\text{ hours}", r"8\text{ minutes}"), ("5 km", "50 km"),
        (r"5 \sin x", "5"), ("2 cos x", "2"),
    ],
    "symbolic": [
        ("x+1", "x-1"), ("x^2", "x^3"),
        ("(x+1)^2", "x^2+1"), ("2x", "x^2"),
        ("X", "x"), ("x", "y"),
        (r"\frac{x}{y}", r"\frac{y}{x}"), ("2^n", "n^2"),
        ("x_1", "x_2"), (r"\sin x", r"\cos x"),
        (r"\sqrt{x^2}", "x"), (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}"),
        ("2^{n+1}", "2^n+1"), ("-x^2", "(-x)^2"),
        ("e^x", "e^{-x}"), (r"\ln x", r"\log x"),
        ("3x^2y", "3xy^2"), ("(x-1)(x+2)", "(x+1)(x-2)"),
        ("n!", "n"), ("|x|", "x"),
        ("a+b", "ab"), ("xy", "x+y"),
        ("x+C", "x"), (r"\sin^2 x", r"\sin x^2"),
        ("1/2x", r"\frac{1}{2x}"), ("(-1)^n", "(-1)^{n+1}"),
        ("x^{10}", "x^1 0"), (r"\alpha", r"\beta"),
    ],
    "prefixes": [
        ("x=5", "y=5"), ("x=5", "6"),
        ("x=5", "x=-5"), ("2x=10", "10"),
        ("x+y=5", "5"), ("f(x)=x", "g(x)=x"),
        ("x^2=4", "4"), ("x=1,y=2", "x=2,y=1"),
        ("x=1,y=2", "2,1"), ("(x,y)=(1,2)", "(2,1)"),
        ("x(x+1)=0", "0"), ("xy=5", "5"),
        (r"x\in[0,1]", "[0,1)"),
    ],
    "equations": [
        ("x<5", "x>5"), ("x<5", r"x\le5"),
        ("x<5", "5"), ("y=2x+3", "y=2x-3"),
        (r"x\ne2", "x=2"), ("-1<x<1", r"-1<x\le1"),
        ("x^2-7x-44=0", "x^2+7x-44=0"), ("x>3", "x>4"),
        ("a<b<c", "a<c<b"), ("x<5", "y<5"),
        ("x^2+y^2=4", "x^2+y^2=2"), ("2x+4y-5=0", "2x+4y+5=0"),
        ("y=2x+1", "y=2x-1"), ("x<y", "x>y"),
        ("-2x<6", "x<-3"), ("x^2+y^2=1", "x^2-y^2=1"),
        ("y=2x", "x=2y"), (r"x+y\le4", "x+y<4"),
        ("y=x", "x"), ("2x=8", "8"),
        ("x+y=7", "7"), ("x^2=9", "9"),
        ("A=B", "B"), ("0=0", "x=x+y"),
        ("y=3", "x=3"), ("x=1", "x=-1"),
        ("3<x", "x<3"), ("a=b", "b=c"),
        ("x=5", "x=5,6"),
    ],
    "tuples": [
        ("(1,2)", "(2,1)"), ("(1,2)", "(1,2,3)"),
        ("(1,2)", "1,2"), ("(1,2)", "[1,2]"),
        ("(1,234,x)", "(1234,x)"), ("(1,234)", "1234"),
        ("(1,2)", r"\{1,2\}"), ("(1,2),(3,4)", "(1,3),(2,4)"),
        ("(1,2)", "12"),
    ],
    "intervals": [
        ("[3,4)", "(3,4]"), ("[3,4)", "[3,4]"),
        ("(3,4)", "[3,4]"), (r"(-\infty,2)", r"(2,\infty)"),
        (r"(-\infty,0)\cup(1,\infty)", r"(-\infty,0)"), (r"(0,1)\cup(2,3)", r"(0,2)\cup(1,3)"),
        (r"[2,\infty)", r"[2,-\infty)"), ("(3,4]", "3,4"),
        (r"x\ge2", r"(2,\infty)"), ("x>2", r"[2,\infty)"),
        ("(0,1)", "[0,1]"), (r"x\ne3", r"(3,\infty)"),
        (r"\mathbb{R}", r"\mathbb{R}\setminus\{0\}"),
        (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)\cup[2,\infty)"), ("x<1", "y<1"),
        ("(1,2)", r"\{1,2\}"), ("[1,3]", "1,3"),
        ("(-1,1)", "|x|<2"), (r"x\in[0,1]", "[0,1)"),
        ("1<x<3", "2"), (r"(-\infty,0)", r"(0,\infty)"),
        ("(1,2)", "(1,2]"),
    ],
    "sets and lists": [
        ("20 and 300", "20300"), (r"3 \text{ or } 400", "3400"),
        ("7;100", "7100"), (r"\{1,2\}", r"\{1,3\}"),
        ("1,2", "1,2,3"), ("5 or 6", "5"),
        ("5 or 6", "6"), (r"\pm2", "2"),
        (r"\pm 2", "2,2"), ("1, 2", "12"),
        ("1, 1, 2", "1, 2, 2"), (r"\{1,2\},\{3\}", r"\{1\},\{2,3\}"),
        ("1, 234", "1234"), (r"\emptyset", "0"),
        (r"3\pm\sqrt2", r"2\pm\sqrt3"), (r"\{0\}", r"\emptyset"),
        ("35,36", "36,37"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\-2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(2,1)"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "(1,2,3,4)"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2]"),
        (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "text": [
        ("IV", "VI"), ("IX", "XI"),
        ("5:00 PM", "5:00 AM"), ("5:30 PM", "5:30 AM"),
        (r"12:00\text{ a.m.}", r"12:00\text{ p.m.}"), ("12:00 noon", "12:00 midnight"),
        (r"\text{Tuesday}", r"\text{Thursday}"), ("A", "B"),
        (r"\text{(B)}", "C"), ("yes", "no"),
        (r"\text{odd}", r"\text{even}"), ("True", "1"),
        ("no", "on"), ("true", "false"),
        ("3:4", "4:3"), (r"\text{infinite}", r"\text{finite}"),
        ("B", "(A, B)"), (r"\text{no solution}", "0"),
        ("none", "0"), ("June 20", "June 21"),
        ("no", "n+o"),
    ],
    "unreadable": [
        (r"\frac{1}{0}", r"\frac{2}{0}"), ("", ""),
        (r"\vec{a}", r"\vec{b}"), (r"\frac{1}{0}", "1"),
        ("9^{9^{9^9}}", "9^{9^{9^8}}"), ("nan", "0"),
        (r"\infty", r"-\infty"), (r"\infty", "1000"),
        (r"\sqrt{}", "0"), ("5", ""),
        (r"\overline{AB}", "AB"), ("__import__('os')", "1"),
    ],
    "as models write": [
        ("3 to 5", "5 to 3"), (r"3\text{ to }4", "34"),
        ("2 hours 30 minutes", "3 hours 20 minutes"), (r"5\text{ ms}", r"5\text{ m}"),
        (r"5\text{ million}", "5"), (r"\$5\text{ billion}", "5"),
        (r"30^\circ 15'", r"15^\circ 30'"), (r"\sin^{-1} x", r"\frac{1}{\sin x}"),
        (r"x\sin 2", r"\sin 2x"), (r"\sin x^2", r"(\sin x)^2"),
        ("|xz|", "xz"), (r"\sqrt{a^2b^2c^2}", "abc"),
        ("(1,2)+(3,4)", "(1,2)"), ("2(1,2)", "(1,2)"),
        ("x^2", "2^x"), ("(-1)^n", "-1"),
        ("(-1)^n", "1"), (r"5\text{ hours } 30\text{ minutes}", "150"),
        (r"0.\overline{12}", "0.12"), (r"\lfloor x \rfloor", "x"),
        ("1.2.3", "0.36"), ("sin(2x)", "2sin(x)"),
        ("x sin(2)", "2 sin(x)"), ("xsin(2)", "sin(2x)"),
        ("log(2x)", "2log(x)"), ("arctan(2x)", "2arctan(x)"),
        ("f(2x)", "2f(x)"), ("P(2x)", "2P(x)"),
        (r"\sqrt{z^2}", "z"), ("f(0)=5", "g(0)=5"),
        ("f(2x)=4", "2f(x)=4"), ("2 arctan x", "2"),
        ("1+sec 2x", "1+2 sec x"), (r"3\operatorname{Re}(z)", "3z"),
        (r"2\mathbf{a}", "2"), (r"5\mathbf{i}+3\mathbf{j}", "5i+3"),
        (r"3\text{x}+2\text{x}", "5"), (r"\mathbb{R}-\{0\}", r"\mathbb{R}"),
        (r"\text{all real numbers except } x=0", "0"), (r"\sqrt{x_1^2x_2^2}", "x_1x_2"),
        ("x1=3", "x=3"), ("10^{10}", "10^{1}0"),
        ("2^{2}3", "2^{23}"), ("0.(3)", "0"),
        ("2.(3)", "6"), ("0.333...", "0.333"),
        ("1, 3, 5, ...", "1,3,5"), ("a>b<c", "c<b<a"),
        ("sinh(2x)", "2sinh(x)"), ("gcd(2a)", "2gcd(a)"),
        ("cos(ab)", "a cos(b)"), ("1+sin 2x", "1+2 sin x"),
        (r"\sqrt{1.0000000001}", "1"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "1,2"),
        (r"\pi", "3.14159265358979323846"),
    ],
    "functions": [
        (r"\sin 2x", r"2\sin x"), (r"\ln(a+b)", r"\ln a+\ln b"),
        (r"\cos x", r"\cos(x+1)"), (r"\sin^2 x", r"\sin(x^2)"),
        (r"\log 100", r"\ln 100"), (r"\arcsin 1", r"\arccos 1"),
        (r"\tan^{-1}x", r"\cot x"), ("|x|", "-x"),
        (r"\lfloor x\rfloor", r"\lceil x\rceil"), ("n!", "(n-1)!"),
        (r"\binom{n}{2}", r"\binom{n}{3}"), (r"\sqrt[3]{x}", r"\sqrt{x}"),
        (r"\ln x+C", r"\ln x"), (r"\sin\alpha", r"\sin\beta"),
        (r"\omega", "w"), (r"\mu", "u"),
        (r"\sin 30", r"\frac12"), ("e^{x+1}", "e^x+1"),
        (r"\sec x", r"\csc x"), (r"\ln|x|", r"\ln x + 1"),
        (r"\log_2 x", r"\log_3 x"), (r"\max(a,b)", r"\min(a,b)"),
        (r"2\sin x+\cos x", r"\sin x+2\cos x"), (r"\sinh x", r"\sin x"),
        (r"\sin x", r"\sin y"),
    ],
    "words around": [
        (r"7\text{ cubed}", "7"), (r"7\text{ minus }2", "7"),
        (r"7\text{ dozen}", "7"), (r"7\text{ or less}", "7"),
        (r"7\text{ at most}", "7"), (r"\text{not }7", "7"),
        (r"7\text{ is incorrect}", "7"), (r"7\text{ (wrong)}", "7"),
        (r"7\text{ hundredths}", "7"), (r"7\text{ tenths}", "7"),
        (r"7\text{ percent of }8", "7"), (r"7\text{ factorial}", "7"),
        ("7 mod 5", "7"), (r"7\text{ if not }8", "7"),
        (r"7\text{ thirds}", "7"), (r"7\text{ and a half}", "7"),
        (r"\text{half of }7", "7"), (r"\text{at least }7", "7"),
        (r"\text{minus }7", "7"), (r"\text{more than }7", "7"),
        (r"5\text{ rabbits and }8\text{ chickens}", "8, 5"), (r"5\text{ km}", r"5\text{ miles}"),
        (r"5\text{ cm}^2", r"5\text{ cm}^3"), ("(A) 5", "B"),
        ("A. 5", "B. 5"), ("A. 5", "A. 6"),
        ("3:30 PM", "3:30 AM"), (r"\text{A and B}", r"\text{A}"),
        ("132_5", "132_6"), ("132_5", "42"),
        (r"n\text{ for all }n", r"2n\text{ for all }n"),
        (r"x+1\text{ for }x>0", r"x+1\text{ for }x<0"), (r"\text{Friday}", r"\text{Sunday}"),
        (r"\text{seven}", "8"), (r"7\text{ to }8", "7"),
        (r"7\text{ unless }x=0", "7"), (r"7\text{ only if }x=1, \text{ otherwise }8", "7"),
        ("7i", "7"), (r"7\%", "0.07"),
        (r"7\text{ negative}", "7"),
    ],
    "spellings": [
        ("12{,}3", "123"), ("1,2345", "12345"),
        ("1.234,5", "1234.5"), (r"5\$6", "56"),
        (r"5\%6", "56"), ("5;6", "56"),
        ("5-6", "56"), ("5..6", "5.6"),
        ("x=5=6", "5"), ("m+n=17", "18"),
        ("20+30=60", "60"), ("(2,1)=(1,2)", "(1,2)"),
        ("x=2,y=1", "(1,2)"), (r"\angle A=40", "50"),
        ("f(5)=9", "5"), ("{5}{6}", "56"),
        (r"5\ 6", "56"), ("0x10", "10"),
        ("10_{10_{10}}", "10"), ("5^{'}", "5"),
        ("5!", "5"), (r"\sqrt{5", r"\sqrt5"),
        ("5_", "5"), ("5^", "5"),
        ("5^{}", "5"), ("5_{}", "5"),
        ("(5", "5"), ("5)", "5"),
        ("5]", "5"), (r"\frac{5}{}", "5"),
        ("5/", "5"), ("5=", "5"),
        ("=5", "6"), ("5+", "5"),
        (r"5\cdot", "5"),
    ],
}

# Rules that are a choice, each written down once: (one answer, another, equal?, the reason).
CHOICES = [
    (r"25\%", "25", True, "a percent sign is a unit: the question asks for percent"),
    (r"25\%", "0.25", False, "so it is no factor 1/100"),
    (r"\$18", "18", True, "currency signs are left out"),
    (r"\$18", r"18\text{ euros}", True, "which currency, the question says"),
    (r"\$18", r"18\text{ cents}", False, "but a hundredth of it is none"),
    (r"x\equiv 3\pmod{7}", "3", True, "the question names the modulus"),
    ("y=cx", "y=Cx", True, "a constant may be written either way"),
    ("c", "C", False, "a choice letter may not"),
    (r"\ln|x|", r"\ln x", True, "formulas are compared where both are real"),
    ("52_8", "52", True, "the question names the base, the suffix may be left out"),
    ("52_8", "42", False, "the value in base ten is another answer"),
    ("1011_2", "11", False, "in base ten, too"),
    ("(0,7.5)", "0<x<7.5", True, "an interval and its inequality are one set, whichever was asked"),
    (r"x\ge2", r"[2,\infty)", True, "the same with one end"),
    ("(1,2)", r"\begin{pmatrix}1\\2\end{pmatrix}", True, "a vector is the point of its entries"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, "not its row"),
    ("1,234", "1234", True, "a comma before three digits separates thousands"),
    ("1, 234", "1234", False, "with a space behind it, it separates two numbers"),
    ("(1,234)", "1234", False, "in brackets, too"),
    (r"1,\! 234", "1234", True, "a space that LaTeX takes back is none"),
    ("0.333", r"\frac13", False, "decimals are exact"),
    (r"0.\overline{3}", r"\frac13", True, "a bar means repetition"),
    (r"\sqrt[3]{-8}", "-2", True, "odd roots of negative numbers are real"),
    ("(-8)^{1/3}", "-2", True, "as a power, too"),
    (r"\log 100", "2", True, "log without a base is the decimal one"),
    (r"\ln 100", r"\log 100", False, "and not the natural one"),
    ("30", r"30^\circ", True, "a degree sign may be left out"),
    (r"\frac{\pi}{6}", r"30^\circ", True, "or turned into radians"),
    (r"\sin 30", r"\sin 30^\circ", False, "but not inside a function"),
    ("3:4", "6:8", False, "a ratio is not reduced"),
    ("3 to 4", "3:4", True, "but may be spelled out"),
    (r"5\text{ cm}", "5", True, "a unit may stand on one side only"),
    (r"5\text{ cm}", r"50\text{ mm}", False, "units are not converted"),
    ("x=5", "5", True, "a label may be left out"),
    ("x=5", "y=5", False, "but not exchanged"),
    ("m+n=17", "17", True, "a sum of names is a label"),
    ("a^2+b^2=17", "17", True, "with powers, too"),
    ("2m+3n=17", "17", False, "but not with factors"),
    ("x+y=5", "5", False, "but with x, y, z it is a line or a plane"),
    ("A=B", "B", False, "an equation of two names has no label"),
    ("x=3,y=4", "(3,4)", True, "named coordinates are the point"),
    ("x=4,y=3", "(3,4)", False, "by their names"),
    ("x=3,y=4", "3,4", False, "but no plain list"),
    (r"\{1,2\}", "1, 2", True, "a list is a set"),
    ("1, 2, 2", "1, 2", False, "with every item once"),
    ("5 or 6", "5", False, "a list of candidates is not one of them"),
    ("A. 5", "A", True, "a choice letter may have its content behind it"),
    ("A. 5", "5", True, "or be left out"),
    ("A. 5", "B. 5", False, "but not exchanged"),
    ("n-1 for all n>1", "n-1", True, "a condition may be left out"),
    ("n-1 for n>1", "n-1 for n<1", False, "but not exchanged"),
    ("no solution", r"\emptyset", True, "the empty set in words"),
    ("all real numbers", r"(-\infty,\infty)", True, "the real line in words"),
    (r"\sqrt23", r"\sqrt{23}", True, "as models mean it; TeX draws the root of 2, times 3"),
    ("x^12", "x^{12}", True, "the same for exponents"),
    (r"\frac123", r"\frac{1}{23}", False, "but not for fractions"),
    ("1/2x", r"\frac{1}{2}x", True, "from left to right"),
    ("1/2x", r"\frac{1}{2x}", False, "and not the other way"),
    ("P(2x)", "2P(x)", False, "a capital before a bracket without a sum is a function"),
    ("P(1+r)", "P+Pr", True, "before a sum it is a factor"),
]

# Wrong answers that hold the right one or nothing: what a model might find under training.
WRONG = {
    "7": [
        "", " ", "$", r"\%", ".", r"\text{}", r"\infty", "nan", "0=0", "x=x", "x", "6-8", "x=7=8",
        "[7]", "7,8", "7, 7", "(7,7)", "7!", "7'", "7i", "7^2", r"7\text{ }^2", "7x", r"\pm 7",
        "-7",
        r"7\text{ squared}", r"7\text{ cubed}", r"7\text{ factorial}", r"7\text{ plus 1}",
        r"7\text{ minus one}", r"7\text{ times }3", r"7\text{ over 2}", r"7\text{ million}",
        r"7\text{ dozen}", r"7\text{ halves}", r"7\text{ hundredths}", r"7\text{ is wrong}",
        r"7\text{ (or maybe 8)}", r"7\text{ or 8}", r"7\text{ or less}", r"\text{not }7",
        r"\text{half of }7", r"7\text{ and a half}", r"7\text{k}", r"7\text{t}", r"7\mathrm{i}",
        r"7\text{ of }8", r"\text{at least }7", r"\text{approximately }7", r"\text{not: }7",
        "7 mod 5", r"7\cdot", "7+", "7=", "(7", "7)", "[7,7", r"\frac{7}{}", "7_", "7^", "7 7 7",
        'int("7")', "__import__('os')", "7 if x else 8", r"7^{1}\cdot 1^{10^{10^{10}}}",
    ],
    r"\frac34": ["3", "4", "34", r"\frac43", r"\frac{0}{0}", r"\frac34, \frac12", r"0.75000000001",
                 r"x<\frac34", r"\pm\frac34", r"\frac34 - 1", r"\frac{3}{4}i"],
    "1234": ["12$34", r"12\%34", "12{,}34", "1 2 3 4", "12;34", "12 34", "1.234", "12,34"],
    "(1,2)": ["(2,1)", "[1,2]", "1,2", r"\{1,2\}", "(1,2", "(1,2),(2,1)", "(2,1)=(1,2)", "(1,2,3)",
              "x=2,y=1"],
    "1, 2": ["1", "2", "1, 2, 3", "(1,2)", "12", "1, 1", "2, 2, 1", "3"],
    "[0,3)": ["(0,3)", "[0,3]", "0,3", "[0,3", r"\emptyset", r"[0,3) \text{ or } (0,3)", "0<x<3"],
    "x^2+1": ["x^2", "x^2-1", "x^2+1, x^2-1", r"x^2+1\text{x}", r"x\sqrt{x^2}+1", "f(x^2+1)",
              "y^2+1"],
    "y=2x+3": ["x=2y+3", "y=2x", "y=2x-3", "2x+3=0", "y>2x+3", "x=x", "0=0", "y"],
    "SRAC=LRAC": ["LRAC", "SRAC", "AC=LRAC", "SRAC>LRAC"],
    r"\text{Tuesday}": [r"\text{Monday or Tuesday}", r"\text{not Tuesday}",
                        r"\{\text{Tuesday}, 1\}",
                        "Thursday", r"\emptyset", "Tues", "day"],
    r"\text{(B)}": ["A or B or C", r"\{A,B,C\}", r"\text{not B}", "ABCDE", r"\text{B because A}",
                    "(A) B", "AB", "b",
                    r"\text{(B) or 9}", "(B)(B)"],
    "52_8": ["5$2_8", "52_9", "52_{b}", "42", "25_8", r"\emptyset"],
    "3+4i": ["3+4", "3-4i", "4+3i", "5", "3", "4i", "|3+4i|"],
    "1": ["ie^{-9t}+1", r"1+\frac{i}{10^9}", r"1\text{ half}", "1!2", r"1\text{ and }1"],
    r"8\text{ chickens and }5\text{ rabbits}": [
        r"5\text{ chickens and }8\text{ rabbits}", "5, 8", "8", r"8\text{ chickens}"],
    r"2\sqrt{3}": ["3.464101615137754", r"\sqrt{3}", r"2\sqrt{5}", r"3\sqrt{2}", "12"],
    r"5\text{ hours}": [r"5\text{ minutes}", r"5\text{ hours }30\text{ minutes}", "5:30"],
}


@pytest.mark.parametrize("category", EQUAL)
def test_equal(category: str):
    for a, b in EQUAL[category]:
        assert is_equiv(a, b) and is_equiv(b, a), (a, b)
        assert is_equiv(a, a) and is_equiv(b, b), (a, b)


@pytest.mark.parametrize("category", DIFFERENT)
def test_different(category: str):
    for a, b in DIFFERENT[category]:
        assert not is_equiv(a, b) and not is_equiv(b, a), (a, b)


def test_choices():
    for a, b, equal, reason in CHOICES:
        assert is_equiv(a, b) is equal and is_equiv(b, a) is equal, (a, b, reason)


@pytest.mark.parametrize("gold", WRONG)
def test_wrong_answers_get_nothing(gold: str):
    for text in WRONG[gold]:
        assert reward_fn(rf"\boxed{{{text}}}", gold) == 0.0, text


# Rewrites of any answer that keep its value, and of an expression or a number that change it.
KEEPING = [
    lambda s: f" {s} ",
    lambda s: f"${s}$",
    lambda s: f"{s}.",
    lambda s: rf"\({s}\)",
    lambda s: s.replace(",", ", "),
    lambda s: s.replace(r"\frac", r"\dfrac"),
    lambda s: s.replace("{", "{ "),
    lambda s: r"\displaystyle " + s,
    lambda s: s.replace("(", r"\left(").replace(")", r"\right)"),
    lambda s: rf"\,{s}\;",
]
CHANGING = [
    lambda s: f"{s}+1",
    lambda s: f"2({s})",
    lambda s: f"-({s})",
    lambda s: f"({s})^2+7",
    lambda s: f"({s}, 1)",
    lambda s: rf"\{{{s}, 1\}}",
    lambda s: f"x>{s}",
    lambda s: f"{s}7",
    lambda s: f"1.0001({s})",
    lambda s: rf"\sin({s})",
    lambda s: rf"{s}\text{{ squared}}",
]
EXPRESSIONS = [
    r"\frac{3}{7}", "12", "-5", "0.25", r"2\sqrt{3}", r"\frac{\pi}{3}", "3+4i", "x^2+1", "10081",
    r"\frac{x+1}{y}", r"\sqrt{x+2}", r"2^{n}", r"1\frac{1}{2}", r"\frac{-1+\sqrt{5}}{2}", r"\ln 3",
    r"\sin 2x", r"\binom{n}{2}",
]
OTHERS = [
    "(1,2)", "[0,1)", r"\{1,2\}", "x=5", "x<3", r"\text{Tuesday}", r"5\text{ cm}", "52_8", "y=2x+3",
    r"(-\infty,1)\cup(2,\infty)", r"\text{(B)}",
]


def test_rewrites_keep_the_value():
    for text in EXPRESSIONS + OTHERS:
        for rewrite in KEEPING:
            assert is_equiv(text, rewrite(text)), rewrite(text)


def test_edits_change_the_value():
    for text in EXPRESSIONS:
        for edit in CHANGING:
            assert not is_equiv(text, edit(text)), edit(text)


def test_random_numbers():
    rng = random.Random(0)
    for _ in range(300):
        a = rng.randint(1, 10 ** rng.randint(1, 30))
        b = rng.randint(2, 10**6)
        k = rng.randint(2, 99)
        assert is_equiv(f"{a:,}", str(a))
        assert not is_equiv(str(a), str(a + 1))
        assert not is_equiv(str(a), str(-a))
        assert is_equiv(rf"\frac{{{a * k}}}{{{b * k}}}", f"{a}/{b}")
        assert not is_equiv(f"{a}/{b}", f"{a + 1}/{b}")
        assert is_equiv(rf"\sqrt{{{b * k * k}}}", rf"{k}\sqrt{{{b}}}")
        assert not is_equiv(rf"{k}\sqrt{{{b}}}", rf"{k}\sqrt{{{b + 1}}}")


def test_random_lines_and_half_planes():
    """a x + b y + c = 0 times any number is the same line; times a negative one < becomes >."""
    rng = random.Random(1)
    for _ in range(100):
        a, b, c = rng.choices([-7, -5, -3, -2, 2, 3, 4, 9], k=3)
        k = rng.choice([-6, -1, 2, 5])
        left = f"({a})x+({b})y+({c})"
        scaled = f"({a * k})x+({b * k})y+({c * k})"
        turned = "<" if k > 0 else ">"
        assert is_equiv(f"{left}=0", f"{scaled}=0")
        assert not is_equiv(f"{left}=0", f"{scaled}=1")
        assert is_equiv(f"{left}<0", f"{scaled}{turned}0")
        assert not is_equiv(f"{left}<0", f"{left}>0")


PIECES = [
    r"\frac", r"\sqrt", r"\boxed", r"\text", r"\pm", r"\left", r"\right", r"\cdot", r"\pi",
    r"\infty", r"\cup", r"\in", r"\sin", r"\log", r"\binom", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\\", "&",
    "{", "}", "(", ")", "[", "]", r"\{", r"\}", "|", "^", "_", "!", "=", "<", "+", "-", "*", "/",
    ",", ".", ";", ":", " ", "0", "1", "7", "12", "x", "y", "e", "i", "$", "%", "°", "cm", "and",
    "or", "'",
    "٣", "²", "\x00", '"', "9^{9", "1e99", r"\matrix(", r"\base(", "∪", "∖", "≤", " for all ", "f(",
]


def test_random_strings_never_raise():
    rng = random.Random(0)
    for _ in range(4_000):
        a = "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
        b = "".join(rng.choices(PIECES, k=rng.randint(1, 30)))
        assert is_equiv(a, b) is is_equiv(b, a), (a, b)
        assert reward_fn(a, b) in (0.0, 1.0)
        assert is_readable(a) in (True, False)


HOSTILE = [
    "9^{9^{9^9}}", "9^9^9^9^9^9^9^9", "1e999", "1e999999999", r"10^{10^{10}}", r"\frac{1}{0}",
    "nan",
    "((((2^99)^99)^99)^99)", "inf", "-inf", "0^{-1}", "0^0", r"\sqrt{-1}", r"\sqrt[0]{2}", r"\ln 0",
    r"\sqrt[x]{2}", "100!!!!!!", "9" * 399 + "!", "{" * 100_000 + "}" * 100_000, "(" * 10**6,
    "(" * 150 + "1" + ")" * 150, "1" * 10**6, "-" * 399 + "1", "x" * 400, r"\boxed" * 50_000,
    r"\boxed{" * 50_000, r"\boxed{}" * 50_000, r"\frac" * 80, r"\sqrt" * 80, r"\sin" * 99, "٣",
    "2^" * 199 + "2", "1," * 199 + "1", "x," * 199 + "x", "{1," * 60 + "1" + "}" * 60, "३/४", "½",
    "\ud800", "\x00\x01", "1\u200b", "①", "__import__('os')", "{{7*7}}", "${7*7}", "%s%n", "x:=5",
    "().__class__", "lambda: 0", "True", "x if x else y", "[1 for _ in x]", "'a'*9**9", "10^{400}",
    "+".join(f"x^{{{n}}}" for n in range(50)), "(x+y)^{60}" * 30, r"\frac{1}{3}" * 36, "±" * 300,
    "1/3^{999}+" * 36 + "1", "(1/7x+1)^{99}" * 28, "1±" * 190 + "1", "|" * 400, "_" * 400,
    "5 " * 200,
    "1 000" * 80, r"\text{" * 66, r"\overline{1}" * 30, "0." + "1" * 390, "a_1" * 130, "'" * 400,
    "+".join([r"\frac{1}{97}"] * 30), "x=" * 199 + "1", ",".join(map(str, range(130))),
    "e^{x}" * 70,
    r"\binom{300}{150}" * 20, "(x/97+1)^{99}" * 25, r"\gcd(10^{29},10^{28})" * 15, "x!" * 150,
    ",".join(f"x^{{{n}}}" for n in range(2, 58)), "1<x<2," * 55 + "3<x<4", 
    r"(0,1)\cup" * 40 + "(2,3)",
    r"\mathbb{R}-\{" + ",".join(map(str, range(55))) + r"\}", "for all " * 50, "n where " * 50,
    r"\begin{pmatrix}" + "1&" * 150 + r"1\end{pmatrix}", r"\log_{x}" * 40 + "x", '"' * 400,
]


def milliseconds(function: Callable, *args) -> float:
    """CPU time of a call, the best of three: another program may get in between."""
    seconds = timeit.repeat(lambda: function(*args), timer=time.process_time, number=1, repeat=3)
    return 1000 * min(seconds)


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile_input_is_bounded(index: int):
    text = HOSTILE[index]
    for other in ("5", text + " +1", f"({text})", r"\pi"):
        treerpo.value_at.cache_clear()
        assert milliseconds(is_equiv, text, other) < 50
    for completion, gold in ((rf"\boxed{{{text}}}", "5"), (text, text), ("", text)):
        assert milliseconds(reward_fn, completion, gold) < 50
    assert milliseconds(is_readable, text) < 50
    assert milliseconds(extract_boxed, text) < 50
    assert not is_equiv(text, "5")


def test_extract_boxed():
    for text, content in [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2} done", "2"),
        (r"\boxed 5", "5"), (r"\boxed 52$ ok", "52"), (r"\fbox{7}", "7"),
        (r"\boxed{1} \fbox{2}", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\{}", r"\{"), (r"\boxed {3}", "3"),
        (r"\boxed{(0, \infty\}}", r"(0, \infty\}"), (r"\boxed{}", ""), (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{x_{1}^{2}}+1}", "x_{1}^{2}"), (r"\boxed5", "5"), ("\\boxed{a\nb}", "a\nb"),
        ("no box: 5", None), (r"\boxed{5", None), (r"\boxed{1} \boxed{2", None), (r"\boxed", None),
        ("", None), (r"\boxedx{1}", None), (r"\boxed{\}", None), (r"\boxed{1}\boxed", None),
        (r"\boxed{5}. It is inside \boxed{} as asked.", "5"), (r"\bboxed{5}", None),
        (r"\boxed{5} \boxed{ } \boxed{}", "5"), (r"\ boxed{5}", None),
        (r"\boxed{5}<|im_end|>", "5"),
        (r"\boxed{5} and \boxed{6}", "5, 6"), (r"$\boxed{5}$, $\boxed{6}$, or $\boxed{7}$.", "5, 6, 7"),
        (r"\boxed{5}, so \boxed{6}", "6"), (r"\boxed{5, \boxed{6}", "6"),
    ]:
        assert extract_boxed(text) == content, text


def test_reward_fn():
    for completion, answer, reward in [
        (r"\boxed{5}", "5", 1), (r"\boxed{5}", 5, 1), (r"\boxed{0.5}", 0.5, 1),
        (r"\boxed{5}", "6", 0),
        ("5", "5", 0), (r"\boxed{6}", ["5", "6"], 1), (r"\boxed{5 \text{ or } 6}", ["5", "6"], 0),
        (r"\boxed{7}", ["5", "6"], 0), (r"\boxed{5 \text{ or } 6}", "6, 5", 1),
        (r"\boxed{}", "", 0),
        (r"\boxed{\frac12}", r"Thus $x = \boxed{0.5}$.", 1), (r"\boxed{6}", (5, 6), 1),
        (r"\boxed{2}", r"first \boxed{1}, then \boxed{2}", 1),
        (r"\boxed{1}", r"first \boxed{1}, then \boxed{2}", 0),
        (r"\boxed{2,1}", r"\boxed{1} and \boxed{2}", 1), (r"\boxed{2} or \boxed{1}", "1", 0),
        (r"\boxed{5}", [], 0), (r"\boxed{5} \boxed{", "5", 0), (r"\boxed{ }", " ", 0),
        (r"\boxed{\frac10}", r"\frac10", 1), (r"\boxed{x}", r"\boxed{", 0), ("", r"\boxed{5}", 0),
    ]:
        given = reward_fn(completion, answer)
        assert given == reward and isinstance(given, float), completion


def test_golds_that_cannot_be_read_are_known():
    for gold in ["5", r"\text{Tuesday}", "(1,2]", "x=5", r"\sin x", "y=2x+3", "52_8", r"\{1,2\}",
                 r"\begin{pmatrix}1\\2\end{pmatrix}", r"\text{June 20}", r"5\text{ cm}", "A",
                 r"\$5",
                 r"\mathbb{R}", r"x\ne3", r"n!\text{ for all }n", "ma",
                 r"\overline{AB}", r"\vec{a}", r"\sum_{k=1}^n k", r"\int x\,dx",
                 r"n\equiv 1\pmod 4", r"\frac12\begin{pmatrix}1\\2\end{pmatrix}",
                 r"$x=\pi k$ for integers $k$", "Vertex $(2,-3)$; axis $x=2$"]:
        assert is_readable(gold), gold
    for gold in [r"\frac{1}{0}", "", "9^{9^{9^9}}", "3 4", "1" * 900,
                 r"\triangle ABC", "(1", r"X\sim N(5,2)", "$x=4$ is extraneous",
                 r"\vec{a}\times\vec{b}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"]:
        assert not is_readable(gold), gold


# ====================================================================== Data, settings, whole runs
DEMO_MODEL = treerpo.HERE / "demo/model"
DEMO_TRAIN = treerpo.HERE / "demo/train.jsonl"
DEMO_TEST = treerpo.HERE / "demo/test.jsonl"

# The smallest run that does everything once.
TINY = "--device cpu --questions-per-step 2 --steps 2 --eval-questions 4 --eval-samples 2".split()
# One with a checkpoint a step, which learns enough for its KL to show.
WHOLE = [
    *"--device cpu --questions-per-step 3 --steps 4 --eval-every 2 --eval-questions 4".split(),
    *"--eval-samples 2 --save-every 1 --keep 9 --lr 1e-3 --kl-coef 0.1".split(),
]
CLOCKS = {"tok_per_s", "time_sample", "time_score", "time_update", "peak_mem_gb"}


# ------------------------------------------------------------------------------ helpers
@pytest.fixture(autouse=True)
def leave_no_trace():
    """What a run changes in its process is put back: Ctrl-C, and whether the hub is asked."""
    handler = signal.getsignal(signal.SIGINT)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    datasets_offline = datasets.config.HF_HUB_OFFLINE
    yield
    signal.signal(signal.SIGINT, handler)
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    datasets.config.HF_HUB_OFFLINE = datasets_offline


def run(*flags):
    """`python treerpo.py FLAGS` in this process -> exit status; a traceback goes to stderr."""
    try:
        return treerpo.main([str(flag) for flag in flags])
    except SystemExit as error:  # argparse
        return error.code
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        gc.collect()  # frames of an exception would keep the lock on the folder


def with_changes(flags, **changes):
    """These flags with other values: with_changes(WHOLE, steps=2)."""
    flags = list(flags)
    for name, value in changes.items():
        place = flags.index(f"--{name.replace('_', '-')}")
        flags[place + 1] = str(value)
    return flags


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(out):
    """The rows of a run without what the clock says."""
    rows = read_lines(Path(out) / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in CLOCKS} for row in rows]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(one, other):
    one = weights(one)
    other = weights(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(out, expected):
    """Weights, random stream, data order, counters: all went on as without the interruption."""
    assert metrics(out) == metrics(expected)
    assert same_weights(out / "checkpoint-4", expected / "checkpoint-4")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def copy_model(folder, **config):
    """The demo's model in another folder, with changes to its config."""
    shutil.copytree(DEMO_MODEL, folder)
    change_json(folder / "config.json", **config)
    return folder


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def own_model_flags(model):
    """A run of another model on the demo's task and with the demo's shape."""
    files = ["--model", str(model), "--data", str(DEMO_TRAIN), "--eval-data", str(DEMO_TEST)]
    return [*files, "--branching", "4", "2", "--step-len", "28", "--temperature", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from start to end with every output. Tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert run("--out", out, "--dump-trees", out.parent / "trees.jsonl", *WHOLE) == 0
    (out.parent / "screen.txt").write_text(screen.getvalue())
    return out


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


# ------------------------------------------------------------------------------ prompts
def test_templates(tokenizer, tmp_path):
    assert treerpo.load_template(None, tokenizer, 400) == "{question}"
    assert treerpo.load_template("none", tokenizer, 400) == "{question}"
    assert treerpo.load_template("qwen-math", tokenizer, 400) == (
        "<|im_start|>system\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n"
        "{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own = tmp_path / "own.txt"
    own.write_text("Q: {question}\nA:")
    template = treerpo.load_template(str(own), tokenizer, 400)
    prompt = treerpo.build_prompt("1{2}%s {answer}?", template, tokenizer)
    assert tokenizer.decode(prompt) == "Q: 1{2}%s {answer}?\nA:"


@pytest.mark.parametrize("content", [None, "no place for the text"])
def test_a_template_that_cannot_be_used_is_named(tokenizer, tmp_path, content):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match="--template .*own.txt"):
        treerpo.load_template(str(file), tokenizer, 400)


def test_qwen_math_is_the_default_only_where_its_token_has_an_embedding(tokenizer):
    tokenizer.add_tokens("<|im_end|>")
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert treerpo.load_template(None, tokenizer, token + 1) == treerpo.QWEN_MATH
    assert treerpo.load_template(None, tokenizer, token) == "{question}"


def test_chat_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    template = treerpo.load_template("chat", tokenizer, 400)
    assert tokenizer.decode(treerpo.build_prompt("x", template, tokenizer)) == "[x]>"


@pytest.mark.parametrize(
    "chat_template",
    [
        None,
        "{% broken",
        "{{ raise_exception('system turns only') }}",
        "the content is left out",
    ],
)
def test_a_chat_template_that_fails_is_refused_if_it_is_asked_for(tokenizer, chat_template):
    tokenizer.chat_template = chat_template
    with pytest.raises(BadInput, match="--template chat"):
        treerpo.load_template("chat", tokenizer, 400)
    assert treerpo.load_template(None, tokenizer, 400) == "{question}"


@pytest.mark.parametrize("added", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("template", ["{question}", "<s>{question}"])
def test_a_prompt_begins_once_and_never_ends(tokenizer, added, template):
    """Whatever tokenizer and template put around it: at most one BOS, no EOS behind it."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    processor = TemplateProcessing(single=added, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processor
    prompt = treerpo.build_prompt("Tom", template, tokenizer)
    begins = "<s>" in added or "<s>" in template
    assert tokenizer.decode(prompt) == ("<s>Tom" if begins else "Tom")


def test_an_end_token_that_the_template_itself_has_stays(tokenizer):
    prompt = treerpo.build_prompt("Tom", "{question}<|endoftext|>", tokenizer)
    assert prompt[-1] == tokenizer.eos_token_id


def fit(questions, tokenizer, **changes):
    limits = {"max_prompt_len": 512, "budget": 56, "context": 512, "vocab_size": 400}
    limits.update(changes)
    return treerpo.fit_prompts(questions, "training", "{question}", tokenizer, **limits)


@pytest.mark.parametrize("changes", [{"max_prompt_len": 4}, {"context": 60}])
def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer, capsys, changes):
    questions = [{"question": "a"}, {"question": "a b c d e f g h i j k l"}]
    kept = fit(questions, tokenizer, **changes)
    assert [entry["question"] for entry in kept] == ["a"]
    assert kept[0]["prompt"] == tokenizer.encode("a")
    budget = 56
    told = f"1 questions, 1 left out as longer than 4 tokens; an answer has up to {budget}"
    assert told in capsys.readouterr().out
    with pytest.raises(BadInput, match="more than 4 tokens; raise --max-prompt-len"):
        fit(questions[1:], tokenizer, **changes)


def test_an_answer_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(BadInput, match="600 tokens and the model's context is 512; lower --step"):
        fit([{"question": "a"}], tokenizer, budget=600)


def test_a_token_without_an_embedding_is_named_before_training(tokenizer, tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    tokenizer.add_tokens("<image>")
    tokenizer.save_pretrained(model)
    data = write_rows(tmp_path / "own.jsonl", [{"question": "<image> 1?", "answer": "1"}] * 2)
    flags = own_model_flags(model) + ["--data", str(data), "--out", str(tmp_path / "run")]
    assert run(*TINY, *flags) == 2
    message = capsys.readouterr().err
    assert "'<image>' with id 400" in message
    assert "--template" in message


# ------------------------------------------------------------------------------ question files
ROWS = [
    {"Problem": "p", "solution": r"so \boxed{4}"},
    {"Problem": "q", "solution": "steps #### 5"},
    {"Problem": "r", "solution": "6"},
]


def write_questions(path, rows):
    """These rows in the format that the file's ending names."""
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_questions(tmp_path, ending):
    file = write_questions(tmp_path / f"x.{ending}", ROWS)
    questions = treerpo.load_questions(str(file))
    assert [entry["question"] for entry in questions] == ["p", "q", "r"]
    assert [entry["id"] for entry in questions] == [0, 1, 2]
    for entry, answer in zip(questions, "456"):
        assert treerpo.reward_fn(rf"\boxed{{{answer}}}", entry["answer"]) == 1
        assert treerpo.reward_fn(r"\boxed{7}", entry["answer"]) == 0


CHAT = [
    {"role": "system", "content": "Use a box."},
    {"role": "user", "content": "an example"},
    {"role": "assistant", "content": r"\boxed{0}"},
    {"role": "user", "content": "1+1?"},
]
COLUMNS = {  # case: a row, --question-column, --answer-column
    "verl": (
        {"data_source": "x", "prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "r"}},
        None, None,
    ),
    "a plain prompt": ({"prompt": "1+1?", "answer": "2"}, None, None),
    "usual names, any case": ({"QUESTION": "1+1?", "Final_Answer": "2"}, None, None),
    "a question goes before a prompt": (
        {"prompt": "no", "question": "1+1?", "solution": "no", "answer": "2"}, None, None,
    ),
    "an empty column is passed over": (
        {"question": None, "problem": "1+1?", "answer": None, "solution": r"\boxed{2}"}, None, None,
    ),
    "named": ({"q": "1+1?", "a": "2", "question": "no", "answer": "no"}, "q", "a"),
    "inside others": (
        {"q": {"en": {"text": "1+1?"}}, "extra": {"gold": "2"}}, "q.en.text", "extra.gold",
    ),
    "a dot in the name": ({"q.en": "1+1?", "answer": "2"}, "q.en", None),
    "several right answers": ({"question": "1+1?", "answer": ["two", "2"]}, None, None),
    "a chat in a named column": ({"messages": CHAT, "answer": "2"}, "messages", None),
}


@pytest.mark.parametrize("case", COLUMNS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_columns_are_found(tmp_path, case, ending):
    row, question_column, answer_column = COLUMNS[case]
    file = write_questions(tmp_path / f"x.{ending}", [row, row])
    questions = treerpo.load_questions(str(file), question_column, answer_column)
    assert len(questions) == 2
    for entry in questions:
        assert entry["question"] == "1+1?"
        assert treerpo.reward_fn(r"\boxed{2}", entry["answer"]) == 1
        assert treerpo.reward_fn(r"\boxed{3}", entry["answer"]) == 0


GOOD = json.dumps({"question": "p", "answer": "4"}).encode()


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + GOOD, GOOD + b"\r\n", b"\n" + GOOD + b"\n\n", GOOD],
    ids=["byte order mark", "CR LF", "blank lines", "no end of line"],
)
def test_odd_but_readable_jsonl(tmp_path, content):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    (question,) = treerpo.load_questions(str(file))
    assert question["question"] == "p"
    assert question["answer"] == "4"


UNREADABLE = {  # file: its content, what the message names
    "latin.jsonl": (GOOD + b'\n{"question": "caf\xe9", "answer": "1"}\n', "latin.jsonl line 2"),
    "torn.jsonl": (GOOD + b'\n{"question": "c', "torn.jsonl line 2"),
    "utf16.jsonl": (f"{GOOD.decode()}\n{GOOD.decode()}".encode("utf-16"), "utf16.jsonl line"),
    "deep.jsonl": (b"[" * 10**5, "deep.jsonl"),
    "null.jsonl": (b"null", "null.jsonl row 1"),
    "list.jsonl": (b"[1]", "list.jsonl row 1"),
    "five.json": (b"5", "five.json"),
    "empty.json": (b"{}", "empty.json"),
    "empty.jsonl": (b"", "empty.jsonl"),
    "five.parquet": (b"5", "five.parquet"),
    "latin.csv": (b"question,answer\ncaf\xe9,1\n", "latin.csv"),
    "table.xlsx": (b"PK", "table.xlsx: its name must end in one of .jsonl, .json, .csv, .parquet"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_named(tmp_path, name):
    content, named = UNREADABLE[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(named)):
        treerpo.load_questions(str(file))


BAD_ROWS = [
    {"question": 5, "answer": "1"},
    {"question": "", "answer": "1"},
    {"question": [{"role": "system", "content": "x"}], "answer": "1"},
    {"question": [{"role": "user", "content": None}], "answer": "1"},
    {"question": "x"},
    {"answer": "1"},
    *({"question": "x", "answer": answer} for answer in ("", " ", None, [], {}, "steps ####")),
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=json.dumps)
def test_a_row_without_question_or_answer_is_named(tmp_path, row):
    file = write_rows(tmp_path / "bad.jsonl", [{"question": "p", "answer": "4"}, row])
    with pytest.raises(BadInput, match="bad.jsonl row 2"):
        treerpo.load_questions(str(file))


def test_a_missing_column_is_named_with_the_flag_that_helps(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [{"text": "p", "gold": "4"}])
    with pytest.raises(BadInput, match=r"\['text', 'gold'\]; name the column by --question-column"):
        treerpo.load_questions(str(file))
    with pytest.raises(BadInput, match="--answer-column"):
        treerpo.load_questions(str(file), "text")


def test_rows_without_an_answer_can_be_left_out(tmp_path, capsys):
    rows = [{"question": "p", "answer": answer} for answer in ("4", "", None)]
    file = write_rows(tmp_path / "some.jsonl", rows)
    (question,) = treerpo.load_questions(str(file), skip_unanswered=True)
    assert question["answer"] == "4"
    assert "2 rows without an answer" in capsys.readouterr().out


def test_prose_golds_are_named(tmp_path, capsys):
    """A solution column without a box would otherwise give no reward, without a word."""
    rows = [{"question": "p", "solution": text} for text in ("4", "The answer is 3.")]
    treerpo.load_questions(str(write_rows(tmp_path / "prose.jsonl", rows)))
    said = capsys.readouterr().out
    assert "prose.jsonl: 1 answers cannot be read as mathematics" in said
    assert "row 2: The answer is 3." in said
    treerpo.load_questions(str(write_rows(tmp_path / "plain.jsonl", rows[:1])))
    assert "cannot be read" not in capsys.readouterr().out


def test_half_a_surrogate_pair_in_a_question_is_replaced(tmp_path, tokenizer):
    """It is valid JSON but no valid text; a tokenizer would stop with a TypeError."""
    file = tmp_path / "odd.jsonl"
    file.write_text('{"question": "a \\ud800 b", "answer": "2"}')
    (question,) = treerpo.load_questions(str(file))
    assert question["question"] == "a ? b"
    assert treerpo.build_prompt(question["question"], "{question}", tokenizer)


def test_own_data_without_eval_data_holds_out_every_fifth_question(tmp_path):
    rows = read_lines(DEMO_TRAIN)[:11]
    file = write_rows(tmp_path / "own.jsonl", rows)
    training, held_out = treerpo.load_data(treerpo.parse_settings(["--data", str(file)]))
    assert [question["id"] for question in training] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [question["id"] for question in held_out] == [0, 5, 10]
    both = treerpo.parse_settings(["--data", str(file), "--eval-data", str(file)])
    training, held_out = treerpo.load_data(both)
    assert len(training) == len(held_out) == 11


def test_every_epoch_takes_every_question_once_in_its_own_order():
    questions = list(range(7))
    taken = []
    for step in range(1, 8):
        taken += treerpo.batch_of(questions, step, 3, seed=0)
    epochs = [taken[0:7], taken[7:14], taken[14:21]]
    for epoch in epochs:
        assert sorted(epoch) == questions
    assert epochs[0] != epochs[1] != epochs[2]
    assert treerpo.batch_of(questions, 1, 7, seed=1) != epochs[0]


@pytest.mark.parametrize("status", [200, 404, 429])
def test_a_hub_that_answers_at_all_is_reachable(monkeypatch, status):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    datasets.config.HF_HUB_OFFLINE = False
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        treerpo.use_hub_or_cache()
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
        assert not datasets.config.HF_HUB_OFFLINE
        server.shutdown()
    treerpo.use_hub_or_cache()  # nobody listens there any more
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


# ------------------------------------------------------------------------------ models
@pytest.mark.parametrize(
    "config, named",
    [
        (MistralConfig(), "mistral"),
        (MambaConfig(), "mamba"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=0), "sliding_attention"),
    ],
    ids=["mistral", "mamba", "sliding window"],
)
def test_unsupported_models_are_refused_by_name(tmp_path, config, named):
    config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=f"{named} is not supported"):
        treerpo.load_config(str(tmp_path))


@pytest.mark.parametrize("device, left", [("cpu", 1), ("meta", 2)])
def test_a_tiny_model_on_a_cpu_takes_one_thread(monkeypatch, device, left):
    """With two, each waits for the other for most of the time."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        treerpo.load_model(str(DEMO_MODEL), device, torch.float32)
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


def test_stop_ids_of_a_run_come_from_everywhere(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.resize_token_embeddings(450)
    tokenizer.add_tokens(["<|im_end|>", "<other>"])
    model.config.eos_token_id = [7, 9]
    model.generation_config.eos_token_id = 8
    decoding = treerpo.make_decoding(model, tokenizer, 0.6, 32)
    assert set(decoding.eos_ids) == {tokenizer.eos_token_id, 7, 8, 9, 400}
    assert decoding.vocab_size == 402  # what only pads the embedding is never drawn
    assert (decoding.temperature, decoding.max_rows) == (0.6, 32)


def test_a_stop_id_without_an_embedding_is_left_out(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens("<|im_end|>")
    decoding = treerpo.make_decoding(model, tokenizer, 0.6, 32)
    assert decoding.eos_ids == (tokenizer.eos_token_id,)
    assert decoding.vocab_size == 400


def test_an_end_token_without_an_embedding_is_refused(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(BadInput, match="<end>"):
        treerpo.make_decoding(model, tokenizer, 0.6, 32)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """One step of a model which ends its answer to QUESTION by <|im_end|>, an end that only the
    tokenizer knows -> the checkpoint."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, tie_word_embeddings=False)
    model.resize_token_embeddings(448)
    prompt = torch.tensor([treerpo.build_prompt(QUESTION, treerpo.QWEN_MATH, tokenizer)])
    with torch.no_grad():
        hidden = model.get_decoder()(prompt).last_hidden_state[0, -1]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.lm_head.weight[end] = 50 * hidden / hidden.norm()
    model.generation_config.update(do_sample=False, temperature=0.9, top_p=0.6)
    model.generation_config._from_model_config = False
    model.config.save_pretrained(folder / "model")
    model.generation_config.to_json_file(folder / "model/generation_config.json")
    torch.save(model.state_dict(), folder / "model/pytorch_model.bin")
    tokenizer.save_pretrained(folder / "model")
    flags = own_model_flags(folder / "model")
    assert run(*TINY, *flags, "--steps", "1", "--out", folder / "run") == 0
    return folder / "run/checkpoint-1"


QUESTION = "Max has 26 shells."


def test_generate_from_a_checkpoint_stops_where_training_stopped(chat_run):
    """Its generation_config knows every end. The original one knew only <|endoftext|>."""
    saved = json.loads((chat_run / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(chat_run)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert saved["eos_token_id"] == ends
    model = AutoModelForCausalLM.from_pretrained(chat_run)
    prompt = torch.tensor([treerpo.build_prompt(QUESTION, treerpo.QWEN_MATH, tokenizer)])
    answer = model.generate(prompt, max_new_tokens=8)[0, prompt.shape[1]:]
    assert answer.tolist() == ends[1:]


def test_memory_and_disk_are_estimated_and_what_cannot_fit_is_refused(
    monkeypatch, tmp_path, capsys
):
    """1.5B weights in mixed precision: 16 bytes and two bf16 copies each."""
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    )
    n_weights = 1_543_714_304  # as published for Qwen2.5-1.5B
    room = {"memory": 40, "disk": 100}
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 0}

    def sysconf(name):
        pages["SC_PHYS_PAGES"] = int(room["memory"] * 1e9)
        return pages[name]

    def disk_usage(folder):
        return shutil._ntuple_diskusage(0, 0, int(room["disk"] * 1e9))

    def check(dtype="mixed", kl_coef=0.001):
        settings = treerpo.Settings(max_rows=512, keep=2, kl_coef=kl_coef)
        treerpo.check_resources(config, "cpu", dtype, 1024, tmp_path, settings)
        return capsys.readouterr().out

    monkeypatch.setattr(treerpo.os, "sysconf", sysconf)
    monkeypatch.setattr(treerpo.shutil, "disk_usage", disk_usage)
    cache_gb = 512 * 1024 * 2 * 28 * 2 * 128 * 2 / 1e9
    said = check()
    assert f"memory: {n_weights * 20 / 1e9:.1f} GB for weights, Adam and copies" in said
    assert f"up to {cache_gb:.1f} GB for the KV cache" in said
    assert f"disk: {3 * n_weights * 12 / 1e9:.1f} GB for checkpoints of 100 GB free" in said
    assert "lower --max-rows" in said  # weights and cache together: 30.9 + 15.0 GB of 40
    room["memory"] = 60
    assert "lower --max-rows" not in check()
    assert f"memory: {n_weights * 18 / 1e9:.1f} GB" in check(kl_coef=0)
    assert f"memory: {n_weights * 20 / 1e9:.1f} GB" in check("float32")
    assert f"memory: {n_weights * 10 / 1e9:.1f} GB" in check("bfloat16")
    room["memory"] = 30
    with pytest.raises(BadInput, match="30.9 GB .* 30.0 GB; .*--dtype bfloat16.* --kl-coef 0"):
        check()
    room.update(memory=60, disk=50)
    with pytest.raises(BadInput, match="lower --keep or choose another --out"):
        check()
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    check()  # a resumed run has two of the three already
    room["disk"] = 10
    with pytest.raises(BadInput, match="lower --keep"):
        check()


# ------------------------------------------------------------------------------ settings
def settings_of(*flags):
    return treerpo.parse_settings([str(flag) for flag in flags])


def test_the_defaults_are_the_papers_run():
    settings = settings_of("--model", "x")
    expected = {
        "algo": "treerpo", "branching": [8, 8, 8], "step_len": [384], "temperature": 0.6,
        "questions_per_step": 16, "steps": 300, "prune_threshold": 0.1, "normalizer": "variance",
        "ratio": "token", "clip_eps": 0.2, "kl_coef": 0.001, "entropy_coef": 0.001,
        "minibatches": 2, "lr": 1e-6, "max_prompt_len": 512, "eval_every": 20,
        "eval_questions": 128, "eval_samples": 8,
        "data": "DigitalLearningGmbH/MATH-lighteval", "eval_data": "HuggingFaceH4/MATH-500::test",
    }
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], {"branching": [4, 2, 2, 2], "step_len": [14], "temperature": 1.0, "lr": 2e-4}),
        ([], {"model": str(DEMO_MODEL), "data": str(DEMO_TRAIN), "eval_data": str(DEMO_TEST)}),
        (["--algo", "grpo"], {"branching": [8], "step_len": [56], "normalizer": "std"}),
        (["--algo", "gspo"], {"ratio": "sequence", "clip_eps": 4e-4, "step_len": [56]}),
        (["--algo", "gspo", "--clip-eps", "0.1"], {"ratio": "sequence", "clip_eps": 0.1}),
        (["--algo", "treeadv"], {"leaves": 8, "trees": 4, "step_len": [56], "ratio": "token"}),
        (["--ratio", "sequence"], {"clip_eps": 4e-4, "branching": [4, 2, 2, 2]}),
        (["--model", "x", "--algo", "grpo"], {"branching": [8], "step_len": [1152]}),
        (["--model", "x", "--algo", "gspo"], {"step_len": [1152], "normalizer": "std"}),
        (["--algo", "grpo", "--step-len", "9"], {"step_len": [9]}),
        (["--steps", "7"], {"steps": 7, "temperature": 1.0}),
        (["--data", "x.jsonl"], {"eval_data": None, "model": str(DEMO_MODEL)}),
        (["--print-tree"], {"print_tree": 1}),
        (["--print-tree", "5"], {"print_tree": 5}),
        (["--grad-checkpointing"], {"grad_checkpointing": True}),
    ],
    ids=str,
)
def test_presets_and_what_overrides_them(flags, expected):
    settings = settings_of(*flags)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_dashes_and_underscores_are_one():
    dashes = ["--step-len", "9", "--eval-samples=3", "--grad-checkpointing", "--kl-coef", "0"]
    underscores = ["--step_len", "9", "--eval_samples=3", "--grad_checkpointing", "--kl_coef", "0"]
    assert settings_of(*dashes) == settings_of(*underscores)
    assert settings_of(*dashes).eval_samples == 3


@pytest.mark.parametrize(
    "flags",
    [["--norm", "std"], ["--questions", "2"], ["--no-such-flag"], ["more"], ["--algo", "ppo"]],
)
def test_unknown_flags_and_abbreviations_exit_2(flags, capsys):
    assert run(*flags) == 2
    message = capsys.readouterr().err
    assert flags[0] in message
    assert "--eval-samples" not in message  # no list of all flags in front of it


def test_no_file_of_arguments_is_read(tmp_path, monkeypatch):
    """HfArgumentParser would, if it were asked for dataclasses."""
    (tmp_path / "treerpo.args").write_text("--seed 7")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "treerpo.py"), "--steps", "3"])
    settings = treerpo.parse_settings(None)
    assert (settings.seed, settings.steps) == (0, 3)


WITHOUT_EFFECT = [  # flags, the one at fault, the one to use
    ("--leaves 16", "--leaves", "--algo treeadv"),
    ("--trees 2", "--trees", "--algo treeadv"),
    ("--entropy-threshold 0.5", "--entropy-threshold", "--algo treeadv"),
    ("--algo grpo --leaves 16", "--leaves", "--branching"),
    ("--algo gspo --trees 2", "--trees", "--algo treeadv"),
    ("--algo grpo --entropy-threshold 1", "--entropy-threshold", "--algo treeadv"),
    ("--algo treeadv --branching 16", "--branching", "--leaves"),
    ("--algo treeadv --leaves 2", "--trees", "--leaves"),
    ("--algo grpo --branching 4 2", "--branching", "--algo treerpo"),
    ("--algo gspo --branching 4 2", "--branching", "--algo treerpo"),
    ("--algo gspo --ratio token", "--ratio token", "--algo grpo"),
    ("--algo grpo --ratio sequence", "--ratio sequence", "--algo gspo"),
    ("--minibatches 1 --clip-eps 0.1", "--clip-eps", "--minibatches 1"),
    ("--prune-threshold 1", "--prune-threshold", "less than 1"),
    ("--branching 2 2 --step-len 4 4 4", "--step-len", "--branching"),
    ("--branching 1 1", "--branching", "2 or more"),
    ("--algo grpo --branching 1", "--branching", "2 or more"),
    ("--algo treeadv --leaves 1 --trees 1", "--leaves", "2 or more"),
]


@pytest.mark.parametrize("flags, fault, fix", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused_by_name(flags, fault, fix):
    with pytest.raises(BadInput) as caught:
        settings_of(*flags.split())
    assert fault in str(caught.value)
    assert fix in str(caught.value)


POSITIVE = [
    "branching", "step-len", "temperature", "questions-per-step", "leaves", "trees", "steps",
    "clip-eps", "minibatches", "lr", "max-rows", "pack-len", "eval-every", "eval-questions",
    "eval-samples", "save-every", "keep", "max-prompt-len",
]
ZERO_OR_MORE = ["prune-threshold", "kl-coef", "entropy-coef", "print-tree"]
OUT_OF_RANGE = [
    *((f"--{name}", value) for name in POSITIVE for value in ("0", "-1")),
    *((f"--{name}", "-1") for name in ZERO_OR_MORE),
    *((f"--{name}", value) for name in ("lr", "temperature") for value in ("nan", "inf")),
    ("--kl-coef", "nan"),
    ("--seed", "9" * 20),
]


@pytest.mark.parametrize("flag, value", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_by_name(flag, value):
    with pytest.raises(BadInput, match=f"{flag} "):
        settings_of(flag, value)


@pytest.mark.parametrize("name", ZERO_OR_MORE)
def test_what_may_be_zero(name):
    assert getattr(settings_of(f"--{name}", 0), name.replace("-", "_")) == 0


def test_paths_are_stored_absolute_and_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "chat", "runs"):
        Path(name).mkdir()
    Path("t.txt").write_text("{question}")
    Path("d.jsonl").write_text("")
    flags = ["--model", "m", "--data", "d.jsonl", "--out", "runs/a", "--dump-trees", "t.jsonl"]
    settings = settings_of(*flags, "--eval-data", "openai/gsm8k:main:test", "--template", "t.txt")
    assert settings.model == str(tmp_path / "m")
    assert settings.data == str(tmp_path / "d.jsonl")
    assert settings.template == str(tmp_path / "t.txt")
    assert settings.out == str(tmp_path / "runs/a")
    assert settings.dump_trees == str(tmp_path / "t.jsonl")
    assert settings.eval_data == "openai/gsm8k:main:test"
    assert settings_of("--template", "chat").template == "chat"  # not the folder of that name


def test_help(capsys):
    """Every flag with its default and where that is from, once, with dashes; on few lines."""
    assert run("--help") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 140
    assert max(len(line) for line in lines) <= 100
    assert lines[0] == "usage: python treerpo.py [flags]"
    entries = {}
    for entry in re.split(r"^  --", text.partition("\noptions:")[2], flags=re.M)[1:]:
        name, _, rest = entry.partition(" ")
        entries[name] = " ".join(rest.partition("\n\n")[0].split())
    paper = treerpo.Settings()
    names = [entry.name for entry in treerpo.dataclasses.fields(treerpo.Settings)]
    assert sorted(entries) == sorted(["help", *(name.replace("_", "-") for name in names)])
    for name in names:
        words = entries[name.replace("_", "-")]
        default = getattr(paper, name)
        if isinstance(default, list):
            default = " ".join(str(number) for number in default)
        assert default is None or words.endswith(f"(default: {default})"), name
        assert not isinstance(default, int | float) or name in UNSOURCED or SOURCE_TEXT.search(words)


SOURCE_TEXT = re.compile(r"\[(paper [^]]+|code|ours)\]")
UNSOURCED = {"print_tree"}  # a switch


def test_helps_last_part_has_a_line_for_each_preset(capsys):
    run("--help")
    lines = capsys.readouterr().out.splitlines()
    for beginning in ("Without --model:", "--algo grpo:", "--algo gspo:", "Exit status:"):
        assert [line for line in lines if line.startswith(beginning)], beginning
    assert not [line for line in lines if line.endswith("-")]  # no word is cut


# ------------------------------------------------------------------------------ bad input
BAD_INPUT = {  # case: flags, what the message names
    "no such model": ("--model no/such/folder/at/all", "no/such/folder/at/all"),
    "no hub for the model": ("--model Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"),
    "no hub for the data": ("--data nlile/hendrycks-MATH", "nlile/hendrycks-MATH"),
    "no data file": ("--data none.jsonl", "none.jsonl"),
    "no such template": ("--template no-such-file", "--template no-such-file"),
    "no EOS": ("--model no-eos --data fine.jsonl", "eos_token"),
    "no words": ("--model no-words --data fine.jsonl", "tokenizer.json"),
    "torn weights": ("--model torn-model --data fine.jsonl --step-len 9", "torn-model"),
    "model of no run": ("--resume no-eos", "no-eos: not the output folder of a run"),
    "run with a torn config": ("--resume broken", "broken: not the output folder of a run"),
    "config of something else": ("--resume odd", "odd: not the output folder of a run"),
    "no run": ("--resume .", "not the output folder of a run"),
    "an answer over the context": ("--step-len 100000", "--step-len"),
    "a run is there": ("--out taken", "--resume"),
    "a file is there": ("--out fine.jsonl", "--out"),
    "unwritable": ("--out /proc/none/run", "--out /proc/none/run"),
    "unwritable dump": ("--dump-trees no/folder/t.jsonl --out run", "--dump-trees"),
    "a dump of another run": ("--dump-trees fine.jsonl --out run", "--dump-trees"),
    "no GPU": ("--device cuda", "--device cpu"),
}


@pytest.fixture
def bad_folder(tmp_path, monkeypatch):
    """Files and folders that cannot be used, by name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("fine.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    for name, text in (("taken", "{}"), ("broken", "{"), ("odd", "[]")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    copy_model(Path("no-eos"))
    change_json(Path("no-eos/tokenizer_config.json"), eos_token=None)
    shutil.copytree(DEMO_MODEL, "no-words", ignore=shutil.ignore_patterns("tokenizer.json"))
    shutil.copytree(DEMO_MODEL, "torn-model")
    os.truncate("torn-model/model.safetensors", 100_000)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_exits_2_with_a_short_message(bad_folder, case, capsys):
    flags, named = BAD_INPUT[case]
    before = Path("fine.jsonl").read_bytes()
    assert run(*flags.split()) == 2
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) <= 3
    assert Path("fine.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------ whole runs
def test_metrics_have_the_promised_keys(whole):
    rows = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = {
        "reward", "groups_kept", "frac_reward_zero_std", "completions/mean_length",
        "completions/clipped_ratio", "no_answer_ratio", "entropy", "kl", "clip_ratio", "grad_norm",
        "lr", "tokens_sampled", "questions_seen", "skipped", *CLOCKS,
    }
    for row in rows[1:]:
        assert promised <= row.keys()
        assert row["lr"] == 1e-3
        assert row["questions_seen"] == 3 * row["step"]
        assert row["kl"] >= 0
    assert rows[-1]["kl"] > 1e-3
    for row in rows:
        evaluated = row["step"] in (0, 2, 4)
        assert ("eval/accuracy" in row) == evaluated
        assert ("eval/greedy_accuracy" in row) == evaluated
        assert ("eval/standard_error" in row) == evaluated


@pytest.mark.parametrize("n_questions, error", [(4, math.sqrt(0.5 / 3) / 2), (1, None)])
def test_held_out_accuracy_and_its_standard_error_by_hand(monkeypatch, n_questions, error):
    """Shares right of the questions: 1, 1/2, 0, 1/2; their squares around 1/2 add up to 1/2. The
    four samples of one question say the same thing again, so they do not make it smaller."""
    right = {2: [[1, 1], [1, 0], [0, 0], [0, 1]], 1: [[1], [0], [0], [0]]}

    def sample(model, prompts, branching, step_lens, decoding):
        assert decoding.temperature == (0.6 if branching == [2] else 0.0)
        trees = []
        for question in range(len(prompts)):
            root = Node([1], question=question)
            for reward in right[branching[0]][question]:
                Node([1], root, reward=reward)
            trees.append(root)
        return trees

    monkeypatch.setattr(treerpo, "sample_trees", sample)
    monkeypatch.setattr(treerpo, "verify_leaves", lambda trees, answers, tokenizer: None)
    questions = [{"prompt": [1], "answer": "1"}] * n_questions
    found = treerpo.evaluate(None, None, questions, 2, 5, Decoding((0,), 9), 0)
    assert found["eval/accuracy"] == (0.5 if n_questions == 4 else 1.0)
    assert found["eval/greedy_accuracy"] == (0.25 if n_questions == 4 else 1.0)
    assert found["eval/standard_error"] == (None if error is None else pytest.approx(error))


def reference_advantages(rewards):
    """Eq. 1, 2 and 4 in exact arithmetic -> is the group kept, its advantages."""
    mu = sum(rewards) / len(rewards)
    if max(rewards) - min(rewards) <= Fraction(1, 10):
        return False, [Fraction(0) for _ in rewards]
    return True, [(reward - mu) / (mu * (1 - mu)) for reward in rewards]


def reference_reward(text, answer):
    """The demo's answers are whole numbers: the last box must hold it."""
    boxes = re.findall(r"\\boxed\{(-?\d+)\}", text)
    return Fraction(bool(boxes) and int(boxes[-1]) == int(answer))


class DumpedNode:
    """A line of --dump-trees with what follows from it and the lines of its children."""

    def __init__(self, line, parent):
        self.line = line
        self.parent = parent
        self.children = []
        if parent is not None:
            parent.children.append(self)

    def text(self):
        before = self.parent.text() if self.parent else ""
        return before + self.line["text"]

    def length(self):
        return self.parent.length() + len(self.line["tokens"]) if self.parent else 0

    def reward(self):
        if self.children:
            return sum(child.reward() for child in self.children) / len(self.children)
        return reference_reward(self.text(), self.line["answer"])


def load_dump(path, step):
    """The nodes of one step, parents before children."""
    nodes = {}
    for line in read_lines(path):
        if line["step"] == step:
            parent = nodes.get(line["parent"])
            nodes[line["id"]] = DumpedNode(line, parent)
    return list(nodes.values())


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_dumped_trees_can_be_recomputed(whole, step):
    """Texts, backup, advantages, what is trained and the metrics, from the lines alone."""
    nodes = load_dump(whole.parent / "trees.jsonl", step)
    roots = [node for node in nodes if node.parent is None]
    leaves = [node for node in nodes if not node.children]
    assert len(roots) == 3
    kept_groups = []
    flat_groups = []
    for node in nodes:
        assert node.line["reward"] == pytest.approx(float(node.reward()), abs=1e-12)
        if node.children:
            rewards = [child.reward() for child in node.children]
            kept, advantages = reference_advantages(rewards)
            kept_groups.append(kept)
            flat_groups.append(max(rewards) == min(rewards))
            for child, advantage in zip(node.children, advantages):
                assert child.line["trained"] == kept
                assert child.line["advantage"] == pytest.approx(float(advantage), abs=1e-9)
                assert child.line["depth"] == node.line["depth"] + 1
            assert len(node.children) == [4, 2, 2, 2][node.line["depth"]]
        else:
            assert node.line["done"] or node.line["depth"] == 4
    row = metrics(whole)[step]
    mean_reward = sum(root.reward() for root in roots) / 3
    assert row["reward"] == pytest.approx(float(mean_reward), abs=1e-12)
    assert row["groups_kept"] == pytest.approx(sum(kept_groups) / len(kept_groups))
    assert row["frac_reward_zero_std"] == pytest.approx(sum(flat_groups) / len(flat_groups))
    lengths = [leaf.length() for leaf in leaves]
    assert row["completions/mean_length"] == pytest.approx(sum(lengths) / len(leaves))
    unfinished = sum(not leaf.line["done"] for leaf in leaves)
    assert row["completions/clipped_ratio"] == pytest.approx(unfinished / len(leaves))
    sampled = sum(len(node.line["tokens"]) for node in nodes if node.parent is not None)
    assert row["tokens_sampled"] - metrics(whole)[step - 1].get("tokens_sampled", 0) == sampled


def test_dumped_roots_hold_question_and_answer(whole):
    known = {row["question"]: row["answer"] for row in read_lines(DEMO_TRAIN)}
    lines = read_lines(whole.parent / "trees.jsonl")
    roots = [line for line in lines if line["parent"] is None]
    assert len(roots) == 12
    assert len({root["question"] for root in roots}) == 12  # no question comes twice in an epoch
    for root in roots:
        assert root["answer"] == known[root["question"]]
        assert root["text"] == ""
    assert not any("question" in line for line in lines if line["parent"] is not None)


def test_a_checkpoint_is_a_plain_hugging_face_folder(whole):
    folder = whole / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    before = AutoTokenizer.from_pretrained(DEMO_MODEL)
    after = AutoTokenizer.from_pretrained(folder)
    assert after.encode("Tom has 3.") == before.encode("Tom has 3.")
    assert after.eos_token_id == before.eos_token_id
    assert not same_weights(folder, DEMO_MODEL)


def test_a_runs_folder(whole):
    names = {path.name for path in whole.iterdir()}
    folders = {f"checkpoint-{step}" for step in (1, 2, 3, 4)}
    assert names == {"config.json", "metrics.jsonl", "lock", *folders}
    assert json.loads((whole / "config.json").read_text())["kl_coef"] == 0.1


def test_the_newest_checkpoints_are_kept(tmp_path):
    assert run(*TINY, "--out", tmp_path / "run", "--save-every", "1", "--keep", "1") == 0
    assert [path.name for path in tmp_path.glob("run/checkpoint*")] == ["checkpoint-2"]


def test_same_seed_same_run_other_seed_other_run(whole, tmp_path):
    assert run("--out", tmp_path / "same", *WHOLE) == 0
    assert_same_run(tmp_path / "same", whole)
    assert run("--out", tmp_path / "other", *WHOLE, "--seed", "1") == 0
    assert metrics(tmp_path / "other")[1] != metrics(whole)[1]


def test_how_often_is_evaluated_and_printed_changes_nothing_else(whole, tmp_path):
    flags = with_changes(WHOLE, steps=3, eval_every=3, eval_samples=1)
    assert run("--out", tmp_path / "run", *flags, "--print-tree", "2") == 0
    for step in (1, 3):
        with_evaluation = metrics(tmp_path / "run")[step]
        assert metrics(whole)[step].items() <= with_evaluation.items()


@pytest.mark.parametrize("algo", ["treerpo", "grpo", "gspo", "treeadv"])
def test_every_algorithm_learns_something_in_a_step(tmp_path, algo):
    """Whole answers are 8 a question; a tree has up to 4 x 2 x 2 x 2 and branches inside."""
    out = tmp_path / "run"
    flags = ["--algo", algo, "--questions-per-step", "6", "--steps", "1", "--out", str(out)]
    assert run(*TINY, *flags, "--dump-trees", tmp_path / "trees.jsonl") == 0
    row = metrics(out)[-1]
    assert row["grad_norm"] > 0
    assert 0 < row["groups_kept"] <= 1
    assert not same_weights(out / "checkpoint-1", DEMO_MODEL)
    lines = read_lines(tmp_path / "trees.jsonl")
    parents = {line["parent"] for line in lines}
    leaves = [line for line in lines if line["id"] not in parents]
    depths = {line["depth"] for line in leaves}
    if algo == "treerpo":
        assert 6 * 8 < len(leaves) <= 6 * 32
        assert 4 in depths
    else:
        assert len(leaves) == 6 * 8
        assert depths == {1} or algo == "treeadv"
    assert any(line["trained"] for line in lines)


def test_a_batch_without_any_kept_group_takes_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(treerpo, "reward_fn", lambda text, answer: 0.0)
    assert run(*TINY, "--steps", "4", "--out", tmp_path / "run") == 0  # never "not finite"
    for row in metrics(tmp_path / "run")[1:]:
        assert (row["grad_norm"], row["groups_kept"], row["skipped"]) == (0, 0, 0)
    assert same_weights(tmp_path / "run/checkpoint-4", DEMO_MODEL)


def test_in_mixed_precision_the_sampler_is_the_cast_of_the_trained_weights(tmp_path, monkeypatch):
    """Sampling and evaluation use a bf16 copy, which follows every update of the float32 weights;
    the reference, in bf16 too, stays at the initial model."""
    used = []
    references = []
    sample_trees = treerpo.sample_trees
    update_policy = treerpo.update_policy

    def sample(model, *args):
        used.append({name: value.clone() for name, value in model.named_parameters()})
        return sample_trees(model, *args)

    def update(model, reference, *args, **named):
        references.append(reference)
        return update_policy(model, reference, *args, **named)

    monkeypatch.setattr(treerpo, "sample_trees", sample)
    monkeypatch.setattr(treerpo, "update_policy", update)
    flags = ["--dtype", "mixed", "--grad-checkpointing", "--eval-every", "1", "--save-every", "1"]
    assert run(*TINY, *flags, "--out", tmp_path / "run") == 0
    assert len(used) == 8  # evaluation (sampled, greedy); then twice: a step, evaluation
    for step, calls in ((1, (3, 4, 5)), (2, (6, 7))):
        saved = weights(tmp_path / f"run/checkpoint-{step}")
        assert not torch.equal(saved["model.norm.weight"], weights(DEMO_MODEL)["model.norm.weight"])
        for name, value in saved.items():
            assert value.dtype == torch.float32
            for call in calls:
                assert torch.equal(used[call][name], value.bfloat16())
    initial = weights(DEMO_MODEL)
    for name, value in references[-1].named_parameters():
        assert torch.equal(value, initial[name].bfloat16())
        assert not value.requires_grad


def test_without_a_kl_term_no_reference_is_loaded(tmp_path, monkeypatch):
    loaded = []
    load_model = treerpo.load_model
    monkeypatch.setattr(
        treerpo, "load_model", lambda *args: loaded.append(args) or load_model(*args)
    )
    assert run(*TINY, "--kl-coef", "0", "--steps", "1", "--out", tmp_path / "run") == 0
    assert len(loaded) == 1
    assert metrics(tmp_path / "run")[-1]["kl"] == 0


def test_no_network_is_needed(tmp_path, monkeypatch):
    def blocked(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    assert run(*TINY, "--out", tmp_path / "run") == 0


@slow
def test_the_demo_learns_in_a_few_steps(tmp_path):
    flags = ["--steps", "10", "--eval-every", "10", "--eval-questions", "100", "--device", "cpu"]
    assert run(*flags, "--out", tmp_path / "run") == 0
    rows = metrics(tmp_path / "run")
    assert rows[0]["eval/accuracy"] < 0.4
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.15


# ------------------------------------------------------------------------------ resume
def test_resume_is_bit_exact_and_takes_more_steps(whole, tmp_path):
    """Weights, Adam's moments, random stream, data order, counters, and the KL's reference."""
    out = tmp_path / "run"
    trees = tmp_path / "trees.jsonl"
    assert run("--out", out, "--dump-trees", trees, *with_changes(WHOLE, steps=2)) == 0
    assert run("--resume", out, "--steps", "4") == 0
    assert_same_run(out, whole)
    assert trees.read_bytes() == (whole.parent / "trees.jsonl").read_bytes()


def test_resume_takes_the_same_command_line_again(whole, tmp_path, monkeypatch):
    """Add --resume to what was typed, paths as they were typed, too."""
    monkeypatch.chdir(tmp_path)
    flags = ["--out", "run", "--data", os.path.relpath(DEMO_TRAIN), "--eval-data", DEMO_TEST]
    assert run(*flags, *with_changes(WHOLE, steps=2)) == 0
    assert run("--resume", "run", *flags, *WHOLE) == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "flags",
    ["--lr 2e-3", "--seed 1", "--algo grpo", "--branching 2 2", "--kl-coef 0", "--eval-samples 3"],
)
def test_resume_refuses_another_setting_and_says_what_may_change(whole, capsys, flags):
    before = metrics(whole)
    assert run("--resume", whole, *flags.split()) == 2
    message = capsys.readouterr().err
    assert flags.split()[0] in message
    may_change = message.partition("May change: ")[2]
    for name in ("--steps", "--max-rows", "--pack-len", "--save-every", "--keep", "--print-tree"):
        assert name in may_change
    assert metrics(whole) == before


def test_resume_refuses_fewer_steps_and_another_dump(whole, capsys):
    trees = whole.parent / "trees.jsonl"
    before = trees.read_bytes()
    assert run("--resume", whole, "--steps", "3") == 2
    assert "--steps 3: that run has 4" in capsys.readouterr().err
    assert run("--resume", whole, "--dump-trees", whole.parent / "other.jsonl") == 2
    assert "--dump-trees" in capsys.readouterr().err
    assert trees.read_bytes() == before


def test_resume_may_change_memory_and_output(whole, tmp_path):
    out = tmp_path / "run"
    assert run("--out", out, *with_changes(WHOLE, steps=2)) == 0
    flags = "--steps 3 --max-rows 16 --pack-len 100 --save-every 9 --keep 1 --print-tree 1".split()
    assert run("--resume", out, *flags, "--grad-checkpointing") == 0
    assert metrics(out)[3]["questions_seen"] == metrics(whole)[3]["questions_seen"]
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-3"]
    assert json.loads((out / "config.json").read_text())["max_rows"] == 16


def test_resume_from_another_folder(tmp_path, monkeypatch):
    """Paths were given relative to the working directory of the first run."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    copy_model(Path("model"))
    shutil.copy(DEMO_TRAIN, "data.jsonl")
    Path("template.txt").write_text("{question}")
    flags = [*TINY, "--model", "model", "--data", "data.jsonl", "--template", "template.txt"]
    shape = ["--branching", "2", "--step-len", "56", "--temperature", "1", "--steps", "1"]
    assert run(*flags, *shape, "--out", "run", "--dump-trees", "trees.jsonl") == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("--resume", "../here/run", "--steps", "2") == 0
    assert [row["step"] for row in metrics(tmp_path / "here/run")] == [0, 1, 2]
    assert {line["step"] for line in read_lines(tmp_path / "here/trees.jsonl")} == {1, 2}
    assert not list(Path().iterdir())


def test_a_run_that_was_moved_goes_on_in_its_new_place(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "moved")
    change_json(tmp_path / "moved/config.json", dump_trees=None)
    before = metrics(whole)
    assert run("--resume", tmp_path / "moved", "--steps", "5") == 0
    assert metrics(tmp_path / "moved")[:5] == before
    assert (tmp_path / "moved/checkpoint-5").exists()
    assert metrics(whole) == before


DAMAGES = [
    ("trainer_state.pt", "missing"), ("trainer_state.pt", "empty"), ("trainer_state.pt", "cut"),
    ("model.safetensors", "missing"), ("model.safetensors", "empty"), ("model.safetensors", "cut"),
    ("config.json", "missing"), ("config.json", "empty"),
]


@pytest.mark.parametrize("file, damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_its_fix(whole, tmp_path, capsys, file, damage):
    """--resume never takes it; deleted, the one before goes on to the same end."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    change_json(out / "config.json", dump_trees=None)
    victim = out / "checkpoint-4" / file
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, 0 if damage == "empty" else victim.stat().st_size - 1)
    before = metrics(out)
    assert run("--resume", out) == 2
    message = capsys.readouterr().err
    assert str(out / "checkpoint-4") in message
    assert "delete that" in message
    assert metrics(out) == before
    shutil.rmtree(out / "checkpoint-4")
    assert run("--resume", out) == 0
    assert_same_run(out, whole)


def test_logs_are_cut_to_the_checkpoints_step(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": step, "text": "é\u2028"} for step in (0, 1, 1, 2, 3)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    for half in ("", '{"st', '{"step": 2}'):
        log.write_text("".join(lines) + half)
        treerpo.cut_log(log, 2)
        assert log.read_text() == "".join(lines[:4])
        treerpo.cut_log(log, 0)
        assert log.read_text() == lines[0]
        log.write_text("".join(lines[:2]) + half)
        treerpo.cut_log(log, 2)
        assert log.read_text() == "".join(lines[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    treerpo.cut_log(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


# ------------------------------------------------------------------------------ survival
class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so nothing is tidied up."""


def die_at(patch, owner, name, when):
    """From now on, `name` of `owner` ends the process when `when(args)` is true."""
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if when(*args):
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapper)


def die_in_a_line(patch):
    """Dies when half of the line of step 2 is in the log."""
    append_jsonl = treerpo.append_jsonl

    def append(path, rows):
        if rows[0]["step"] != 2 or Path(path).name != "metrics.jsonl":
            return append_jsonl(path, rows)
        text = json.dumps(rows[0])
        with open(path, "a") as file:
            file.write(text[:len(text) // 2])
        raise Killed

    patch.setattr(treerpo, "append_jsonl", append)


def updates_done(optimizer):
    states = list(optimizer.state.values())
    return int(states[0]["step"]) if states else 0


INSTANTS = {
    "in the log": die_in_a_line,
    "before the trainer's state": lambda patch: die_at(
        patch, torch, "save", lambda state, path: state["last"]["step"] == 2
    ),
    "before the rename": lambda patch: die_at(
        patch, Path, "rename", lambda path, target: Path(target).name == "checkpoint-2"
    ),
    "before an old one is deleted": lambda patch: die_at(
        patch, Path, "rename", lambda path, target: path.name == "checkpoint-1"
    ),
    "while an old one is deleted": lambda patch: die_at(
        patch, shutil, "rmtree", lambda path, *_: Path(path, "trainer_state.pt").exists()
    ),
    "in the update": lambda patch: die_at(
        patch, treerpo, "optimizer_step", lambda model, optimizer, *_: updates_done(optimizer) == 3
    ),
    "between log and checkpoint": lambda patch: die_at(
        patch, treerpo, "step_line", lambda row, steps: row["step"] == 2
    ),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_dying_at_this_instant_loses_nothing(whole, tmp_path, instant):
    out = tmp_path / "run"
    trees = tmp_path / "trees.jsonl"
    flags = [*with_changes(WHOLE, keep=1), "--dump-trees", trees]
    with pytest.MonkeyPatch.context() as patch:
        INSTANTS[instant](patch)
        with contextlib.suppress(Killed):
            run("--out", out, *flags)
            raise AssertionError("the instant never came")
    gc.collect()
    assert run("--resume", out) == 0
    assert_same_run(out, whole)
    assert trees.read_bytes() == (whole.parent / "trees.jsonl").read_bytes()
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-4"]


# Starts runs in real processes of their own, without importing everything for each.
LAUNCHER = """
import json, os, sys
import treerpo
print(json.dumps(sorted(sys.modules)), flush=True)
from transformers import Qwen2ForCausalLM
for line in sys.stdin:
    flags, log = json.loads(line)
    process = os.fork()
    if process == 0:
        screen = open(log, "w")
        os.dup2(screen.fileno(), 1)
        os.dup2(screen.fileno(), 2)
        sys.exit(treerpo.main(flags))
    print(process, flush=True)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Launcher:
    """Runs `python treerpo.py FLAGS` in processes of their own, one at a time."""

    def __init__(self, folder):
        self.log = folder / "screen.txt"
        environment = {**os.environ, "PYTHONPATH": str(treerpo.HERE), "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )
        self.imported = json.loads(self.server.stdout.readline())

    def start(self, *flags):
        """-> the process id."""
        words = [str(flag) for flag in flags]
        self.server.stdin.write(json.dumps([words, str(self.log)]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self):
        """-> the exit status; minus the signal's number after a signal."""
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


def test_a_typo_is_answered_without_importing_data_sets_and_models(launcher):
    assert "treerpo" in launcher.imported
    late = ("datasets", "pandas", "pyarrow", "transformers.models.qwen2.")
    assert not [name for name in launcher.imported if name.startswith(late)]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.01)


def logged_steps(out):
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") - 1 if log.exists() else -1


def test_killed_at_random_instants_nothing_is_lost(whole, tmp_path, launcher):
    """SIGKILL somewhere in each step, resumed each time. The kernel frees the lock."""
    out = tmp_path / "run"
    draw = random.Random(0)
    for step in (1, 1, 2, 3, 3):
        flags = ["--resume", out] if treerpo.newest_checkpoint(out) else ["--out", out, *WHOLE]
        process = launcher.start(*flags)
        wait_for(lambda: logged_steps(out) >= step)
        time.sleep(draw.random() * 0.2)
        os.kill(process, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL
        if treerpo.newest_checkpoint(out) is None:
            shutil.rmtree(out)
    launcher.start("--resume", out)
    assert launcher.wait() == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("both", [False, True], ids=["| tee log", "2>&1 | tee log"])
def test_ctrl_c_saves_the_step_when_it_ends_the_reader_of_the_screen(whole, tmp_path, both):
    """The terminal sends Ctrl-C to tee as well, so that nobody reads what is printed next."""
    out = tmp_path / "run"
    command = [sys.executable, treerpo.__file__, "--out", out, *with_changes(WHOLE, save_every=100)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE
    )
    wait_for(lambda: logged_steps(out) >= 1)
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    if not both:
        told = process.stderr.read()
        assert b"nobody reads the output any more" in told
        assert b"Traceback" not in told
    assert process.wait() == (1 if both else 130)
    last = metrics(out)[-1]["step"]
    assert [path.name for path in out.glob("checkpoint*")] == [f"checkpoint-{last}"]
    assert run("--resume", out) == 0
    assert_same_run(out, whole)


def test_a_second_process_on_the_folder_is_refused(tmp_path, launcher, capsys):
    out = tmp_path / "run"
    flags = with_changes(TINY, steps=1000)
    process = launcher.start("--out", out, *flags, "--save-every", "1")
    wait_for(lambda: logged_steps(out) >= 2)
    assert run("--out", out, *TINY) == 2
    assert "another process is using this folder" in capsys.readouterr().err
    assert run("--resume", out) == 2
    assert "another process is using this folder" in capsys.readouterr().err
    os.kill(process, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    steps = [row["step"] for row in metrics(out)]
    assert steps == list(range(len(steps)))


def press_ctrl_c(patch, name, at_call, times=1, number=signal.SIGINT):
    """Ctrl-C, or another signal, during the given call of this function of treerpo."""
    original = getattr(treerpo, name)
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == at_call:
            for _ in range(times):
                signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(treerpo, name, wrapper)


@pytest.mark.parametrize(
    "function, call, saved",
    [
        ("evaluate", 1, 0),         # before training: nothing to save yet
        ("sample_trees", 3, 1),     # after two of the evaluation: step 1
        ("update_policy", 2, 2),
        ("evaluate", 2, 2),         # of step 2
        ("save_checkpoint", 1, 4),  # the last one, when everything is done
    ],
)
def test_ctrl_c_saves_the_finished_step(whole, tmp_path, capfd, function, call, saved):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, function, call)
        status = run("--out", out, *with_changes(WHOLE, save_every=100))
    assert status == (130 if saved < 4 else 0)
    checkpoints = [path.name for path in out.glob("checkpoint*")]
    assert checkpoints == ([f"checkpoint-{saved}"] if saved > 0 else [])
    assert metrics(out)[-1]["step"] == saved
    screen = capfd.readouterr()
    assert "stopping after this step" in screen.err
    if saved < 4:
        assert f"--resume {out}" in screen.out
        assert run("--resume", out) == 0
        told = "no checkpoint yet" if saved == 0 else f"continuing from {out}/checkpoint-{saved}"
        assert told in capfd.readouterr().out
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_stops_at_once(whole, tmp_path, monkeypatch, capsys, number):
    """So does a second SIGTERM. Both signals do afterwards what they did before."""
    out = tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, "update_policy", at_call=3, times=2, number=number)
        assert run("--out", out, *WHOLE) == 130
    assert signal.getsignal(number) is before
    gc.collect()
    assert treerpo.newest_checkpoint(out).name == "checkpoint-2"
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "stopped at once" in told
    assert run("--resume", out) == 0
    assert_same_run(out, whole)


def test_sigterm_saves_the_finished_step_as_ctrl_c_does(whole, tmp_path):
    """It is what batch systems send before they kill."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, "update_policy", at_call=3, number=signal.SIGTERM)
        assert run("--out", out, *with_changes(WHOLE, save_every=100)) == 130
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-3"]
    assert run("--resume", out) == 0
    assert_same_run(out, whole)


def test_print_tree_shows_all_trees_of_the_question(tmp_path, monkeypatch):
    """TreeAdv compares the answers of several."""
    shown = []
    monkeypatch.setattr(treerpo, "print_tree", lambda root, *others: shown.append(root))
    flags = ["--algo", "treeadv", "--steps", "1", "--print-tree", "--out", tmp_path / "run"]
    assert run(*TINY, *flags, "--dump-trees", tmp_path / "trees.jsonl") == 0
    assert len(shown) > 1
    assert {root.question for root in shown} == {shown[0].question}
    rows = read_lines(tmp_path / "trees.jsonl")
    of_question = [row for row in rows if row["question_id"] == rows[0]["question_id"]]
    assert sum(len(root.steps()) + 1 for root in shown) == len(of_question)


def test_a_full_disk_keeps_the_earlier_checkpoint(whole, tmp_path, capsys):
    """A limit on the size of a file, which the optimizer's state exceeds, stands for it."""
    out = tmp_path / "run"
    assert run("--out", out, *with_changes(WHOLE, steps=2, keep=1)) == 0
    first = out / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    limit = (first / "model.safetensors").stat().st_size + 5000
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        status = run("--resume", out, "--steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert status == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write {out / 'checkpoint-3'}" in message
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-2"]
    assert run("--resume", out, "--steps", "4") == 0  # there is room again
    assert_same_run(out, whole)


def poison(patch, name):
    """Make the log-probs or the loss not finite."""
    original = getattr(treerpo, name)

    def wrapper(*args):
        first, second = original(*args)
        return first * math.nan, second

    patch.setattr(treerpo, name, wrapper)


@pytest.mark.parametrize("name", ["policy_loss", "token_logps"])
def test_three_steps_that_are_not_finite_stop_the_run(tmp_path, capsys, name):
    """They never reach the weights, and the folder can be resumed."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, name)
        assert run("--out", out, *TINY, "--steps", "9", "--save-every", "9") == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "three steps in a row were not finite" in message
        assert f"{out}/checkpoint-3" in message
        assert "--lr" in message
        assert [row["skipped"] for row in metrics(out)[1:]] == [1, 2, 3]
        assert [row["grad_norm"] for row in metrics(out)[1:]] == [None] * 3
        assert all(len(row["skipped_questions"]) == 2 for row in metrics(out)[1:])
        assert same_weights(out / "checkpoint-3", DEMO_MODEL)
        assert run("--resume", out) == 1  # it stops again at the next one
        assert [row["skipped"] for row in metrics(out)[1:]] == [1, 2, 3, 4]
        assert (out / "checkpoint-4").exists()
    assert "NaN" not in (out / "metrics.jsonl").read_text()  # it would be no JSON
    assert run("--resume", out) == 0
    assert metrics(out)[5]["skipped"] == 0
    assert metrics(out)[9]["step"] == 9


def test_out_of_memory_names_the_flags_that_help(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(treerpo, "sample_trees", fail)
    assert run(*TINY, "--out", tmp_path / "run") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--max-rows (now 2048)" in message
    assert "--pack-len (now 512)" in message


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(treerpo, "sample_trees", fail)
    assert run(*TINY, "--out", tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert message.strip().endswith("RuntimeError: shapes differ")
    assert "--max-rows" not in message


# ------------------------------------------------------------------------------ screen
def test_step_lines_are_aligned(whole):
    lines = (whole.parent / "screen.txt").read_text().splitlines()
    steps = [line for line in lines if re.match(r"step [1-4]/4 ", line)]
    assert len(steps) == 4
    for word in ("reward", "kept", "% of groups", "tok/s", "GB"):
        assert len({line.index(word) for line in steps}) == 1, word
    evaluated = [line for line in steps if "held-out" in line]
    assert len(evaluated) == 2
    assert len({line.index("held-out") for line in evaluated}) == 1


def test_a_step_line():
    row = {
        "step": 10, "reward": 0.4124, "groups_kept": 0.612, "tok_per_s": 9812.3,
        "peak_mem_gb": 41.2, "completions/clipped_ratio": 0.05, "skipped": 0,
    }
    plain = treerpo.step_line(row, 300)
    assert plain.startswith("step  10/300  reward  .412  kept  61 % of groups")
    assert "9.8k tok/s" in plain
    assert "truncated" not in plain and "SKIPPED" not in plain
    row.update({"eval/accuracy": 1.0, "eval/greedy_accuracy": 0.398})
    assert "held-out 1.000  greedy  .398" in treerpo.step_line(row, 300)
    row.update({"completions/clipped_ratio": 0.25, "skipped": 1})
    assert "25 % truncated" in treerpo.step_line(row, 300)
    assert "SKIPPED" in treerpo.step_line(row, 300)


def test_the_last_lines_give_scores_checkpoint_and_next_command(whole):
    last = (whole.parent / "screen.txt").read_text().splitlines()[-3:]
    rows = metrics(whole)
    before = treerpo.share(rows[0]["eval/accuracy"])
    after = treerpo.share(rows[-1]["eval/accuracy"])
    assert f"held-out {before} at step 0" in last[0]
    assert f"{after} at step 4" in last[0]
    assert str(whole / "checkpoint-4") in last[1]
    assert "python eval.py" in last[2] and str(whole) in last[2]


def test_the_first_lines_say_what_runs_where(whole):
    screen = (whole.parent / "screen.txt").read_text()
    assert "training: 2000 questions, 0 left out" in screen
    assert f"loading {DEMO_MODEL} on cpu in float32" in screen
    assert "memory: " in screen and "disk: " in screen
    assert f"output: {whole}" in screen


class OddTokenizer:
    """Token k has the text TEXTS[k]."""
    texts = ["", "\x1b[2J\x07ok\n", "plain"]

    def decode(self, ids, **options):
        return "".join(self.texts[token] for token in ids)


def small_tree(n_pruned=0):
    """Two trained children, of reward 0 and 1, and others."""
    root = treerpo.Node([0], reward=0.5)
    treerpo.Node([1], root, reward=0.0, advantage=-2.0, trained=True)
    treerpo.Node([2], root, reward=1.0, advantage=2.0, trained=True)
    for _ in range(n_pruned):
        treerpo.Node([2], root, reward=1.0)
    return root


QUESTION_OF_TREE = {"question": "1+1?\x1b[31m", "answer": "2\x07"}


def test_print_tree_shows_question_gold_legend_and_steps():
    lines = treerpo.render_tree(small_tree(1), QUESTION_OF_TREE, OddTokenizer()).splitlines()
    assert lines[0].startswith("question: 1+1?")
    assert lines[1].startswith("answer: 2")
    assert "reward" in lines[2] and "advantage" in lines[2]
    assert re.fullmatch(r" *0\.00 +-2\.00 \| .*ok\\n", lines[3])
    assert re.fullmatch(r" *1\.00 +\+2\.00 \| plain", lines[4])
    assert re.fullmatch(r" *1\.00 +- \| plain", lines[5])  # pruned


def test_print_tree_escapes_what_a_terminal_would_obey():
    shown = treerpo.render_tree(small_tree(), QUESTION_OF_TREE, OddTokenizer())
    assert not set(shown) & set("\x1b\x07\r")
    assert "\\x1b[2J\\x07ok\\n" in shown
    assert "1+1?\\x1b[31m" in shown


def test_print_tree_is_at_most_one_screen():
    shown = treerpo.render_tree(small_tree(98), QUESTION_OF_TREE, OddTokenizer(), False, 30, 20)
    lines = shown.splitlines()
    assert len(lines) == 20
    assert max(len(line) for line in lines) <= 30
    shown_steps = len(lines[3:-1])
    assert lines[-1].startswith(f"... {100 - shown_steps} more steps")


@pytest.mark.parametrize(
    "terminal, no_color, coloured", [(True, None, True), (True, "1", False), (False, None, False)]
)
def test_print_tree_has_colour_where_the_terminal_has(
    monkeypatch, capsys, terminal, no_color, coloured
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    treerpo.print_tree(small_tree(), QUESTION_OF_TREE, OddTokenizer())
    assert ("\x1b[32m" in capsys.readouterr().out) == coloured


def test_trees_are_printed_every_so_many_steps(tmp_path, capsys):
    assert run(*TINY, "--steps", "4", "--print-tree", "2", "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [k for k, line in enumerate(lines) if line.startswith("question: ")]
    steps = [k for k, line in enumerate(lines) if line.startswith("step ")]
    first, second = printed
    assert steps[1] < first < steps[2]  # above the line of step 2
    assert steps[3] < second < steps[4]


def test_a_terminal_that_shows_only_ascii_does_not_end_a_run(tmp_path):
    """As a user types it; nothing but progress comes to stderr."""
    rows = [{"question": "1+1? é🙂", "answer": "2"}] * 4
    data = write_rows(tmp_path / "own.jsonl", rows)
    flags = [*TINY, "--steps", "1", "--data", str(data), "--print-tree", "--out", "run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    environment.pop("PYTHONUTF8", None)
    done = subprocess.run(
        [sys.executable, treerpo.__file__, *flags], cwd=tmp_path, env=environment,
        capture_output=True,
    )
    assert done.returncode == 0
    assert b"question: 1+1? \\xe9\\U0001f642" in done.stdout
    assert done.stdout.isascii() and done.stderr.isascii()
    for phase in (b"evaluating", b"sampling", b"updating", b"saving"):
        assert phase in done.stderr
    for word in (b"Traceback", b"Warning", b"warn"):
        assert word not in done.stderr


# ========================================================================================= eval.py
MODEL = str(treerpo.HERE / "demo/model")
TEST = treerpo.HERE / "demo/test.jsonl"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty current folder: evals/ and runs/ are looked for there."""
    monkeypatch.chdir(tmp_path)


def run_eval(capsys, *flags):
    """eval.main on the CPU -> exit status, stdout, and what eval.py itself wrote to stderr."""
    capsys.readouterr()
    arguments = [str(flag) for flag in flags]
    if "--compare" not in arguments:
        arguments += ["--device", "cpu"]
    try:
        status = ev.main(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("eval.py: ")]


def table_of(out):
    """stdout from the first model's name on, without the lines that name folders."""
    start = out.index("A = ")
    return [line for line in out[start:].splitlines() if "summary.json: " not in line]


def write_lines(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(pattern, folder="."):
    found, = Path(folder).glob(pattern)
    return found


# -------------------------------------------------------------------------------------- figures
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert ev.pass_at_k(n, c, k) == pytest.approx(share, rel=1e-12)


def test_majority_against_brute_force():
    for boxes in itertools.product(["1", "2", "3", None], repeat=5):
        given = [box for box in boxes if box is not None]
        most = max((given.count(box) for box in given), default=0)
        winners = [box for box in given if given.count(box) == most]
        for gold in "12":
            correct = [int(box == gold) for box in boxes]
            right = bool(winners) and winners[0] == gold  # of a tie the one seen first
            assert ev.majority(list(boxes), correct) == int(right)


def test_majority_counts_equal_answers_together(monkeypatch):
    monkeypatch.setattr(ev, "is_equiv", lambda a, b: float(a) == float(b))
    assert ev.majority(["3", "3", "0.5", ".5", "5e-1"], [0, 0, 1, 1, 1]) == 1
    assert ev.majority(["3", "3", "0.5", ".5", None], [0, 0, 1, 1, 0]) == 0
    assert ev.majority([None, "", None], [0, 0, 0]) == 0


def test_sign_flip_test_by_hand_and_over_all_signs():
    # McNemar, 8 problems won and 2 lost: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024
    assert ev.sign_flip_p([1] * 8 + [-1] * 2 + [0] * 50) == pytest.approx(112 / 1024, rel=1e-12)
    assert ev.sign_flip_p([-1] * 100) == pytest.approx(2 / 2**100, rel=1e-12)
    for equal in ([], [0, 0], [3, -3]):
        assert ev.sign_flip_p(equal) == 1
    draw = random.Random(0)
    for _ in range(20):
        differences = [draw.randint(-4, 4) for _ in range(8)]
        seen = abs(sum(differences))
        as_far = 0
        for signs in itertools.product((1, -1), repeat=8):
            flipped = sum(sign * d for sign, d in zip(signs, differences))
            as_far += abs(flipped) >= seen
        assert ev.sign_flip_p(differences) == pytest.approx(as_far / 2**8, rel=1e-12)


def test_mean_and_error_against_statistics():
    draw = random.Random(1)
    values = [draw.random() for _ in range(50)]
    cell = ev.mean_and_error(values)
    assert cell.mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert cell.error == pytest.approx(statistics.stdev(values) / 50**0.5, rel=1e-12)
    single = ev.mean_and_error([3.0])
    assert single.mean == 3 and math.isnan(single.error)


def test_differences_are_paired_and_benchmarks_are_independent():
    first, later, gain = ev.cells_of([[50, 0], [60, 10]])
    assert (first.mean, later.mean, gain.mean) == (25, 35, 10)
    assert first.error == later.error == pytest.approx(25)
    assert gain.error == 0  # every problem gains the same: no noise is left
    mean = ev.mean_of_cells([ev.Cell(1.0, 3.0), ev.Cell(2.0, 4.0)])
    assert mean == ev.Cell(1.5, 2.5)  # sqrt(3^2 + 4^2) / 2


def line(number, correct, tokens, truncated, extracted, **groups):
    return {
        "id": number, "correct": correct, "tokens": tokens, "truncated": truncated,
        "extracted": extracted, "majority": ev.majority(extracted, correct), "groups": groups,
    }


def test_figures_by_hand():
    rows = [
        line(0, [1, 0], [10, 20], [False, True], ["1", None]),
        line(1, [0, 0], [4, 6], [False, False], ["2", "3"]),
    ]
    assert ev.figures(rows) == {
        "avg@2, %": [50, 0], "pass@2, %": [100, 0], "maj@2, %": [100, 0],
        "response tokens": [15, 5], "truncated, %": [50, 0], "no box, %": [50, 0],
    }
    single = ev.figures([line(0, [1], [3], [False], ["1"])])
    assert list(single) == ["pass@1, %", "response tokens", "truncated, %", "no box, %"]
    six = ev.figures([line(0, [1] * 6, [3] * 6, [False] * 6, ["1"] * 6)])
    assert [name for name in six if "pass" in name] == ["pass@2, %", "pass@4, %", "pass@6, %"]


# ---------------------------------------------------------------------------------------- table
def test_scores_by_subject_and_level():
    base = [
        line(0, [1], [3], [False], ["1"], subject="Algebra", level="1", type="x"),
        line(1, [0], [3], [False], ["1"], subject="Algebra", level="2", type="x"),
        line(2, [1], [3], [False], ["1"], subject="Geometry", type="x"),
    ]
    better = [{**row, "correct": [1]} for row in base]
    table = ev.group_cells([base, better])
    means = {name: [cell.mean for cell in cells] for name, cells in table.items()}
    assert means == {  # type has one value only; row 2 has no level
        "subject Algebra (2)": [50, 100, 50], "subject Geometry (1)": [100, 100, 0],
        "level 1 (1)": [100, 100, 0], "level 2 (1)": [0, 100, 100],
    }
    many = [line(i, [1], [3], [False], ["1"], type=f"problem {i}") for i in range(30)]
    assert ev.group_cells([many]) == {}


def test_table_is_aligned_and_signs_show_in_differences_only():
    rows = {
        "score": [ev.Cell(5, 1), ev.Cell(100, 0), ev.Cell(95, 1)],
        "a long name": [ev.Cell(1, math.nan), ev.Cell(0, math.nan), ev.Cell(-1, math.nan)],
    }
    assert ev.table_lines("title", rows) == [
        "title                   A             B         B - A",
        "  score         5.0 ± 1.0   100.0 ± 0.0   +95.0 ± 1.0",
        "  a long name         1.0           0.0          -1.0",
    ]


def test_verdict_at_five_percent():
    worse = [line(i, [0, 0], [1, 1], [False] * 2, ["1", "1"]) for i in range(6)]
    better = [line(i, [1, 0], [1, 1], [False] * 2, ["1", "1"]) for i in range(6)]
    assert "B - A is beyond the noise" in ev.verdict("B", worse, better)  # p = 2 / 2^6
    assert "C - A is inside the noise" in ev.verdict("C", worse[:5], better[:5])  # p = 2 / 2^5
    assert "p = 0.062" in ev.verdict("B", worse[:5], better[:5])


def test_protocol_line_has_the_usual_and_whatever_differs():
    first = dict.fromkeys([*ev.SHOWN, "model", "revision", "torch", "python"], 1)
    other = {**first, "model": 2, "revision": 2, "torch": 3, "template": "a\nb" * 30}
    text = ev.protocol_line([first, other])
    assert "torch 1 / 3" in text and "python" not in text and "model" not in text
    assert "temperature 1," in text and "template 1 / a\\nba\\nb" in text and "\n" not in text


def test_registry_is_well_formed_and_in_the_help(capsys):
    status, out, _ = run_eval(capsys, "--help")
    assert status == 0 and max(len(text) for text in out.splitlines()) <= 100
    for name, (source, question, answer) in ev.BENCHMARKS.items():
        assert question and answer and name in out
        if name == "demo":
            assert Path(source).is_file()
        else:
            assert source.count(":") == 2 and source.count("/") == 1
    for entry in dataclasses.fields(ev.Settings):
        assert f"--{entry.name.replace('_', '-')}" in out
    assert "_" not in "".join(word for word in out.split() if word.startswith("--"))


# -------------------------------------------------------------------------------------- answers
def test_greedy_answers_equal_plain_generation(empty, capsys):
    """The oracle: model and tokenizer of Hugging Face, one question at a time."""
    status, _, _ = run_eval(
        capsys, "--model", MODEL, "--temperature", 0, "--limit", 5, "--out", "o"
    )
    assert status == 0
    rows = [json.loads(text) for text in only("o/*/problems.jsonl").open()]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for row in rows:
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1]:]
        assert row["outputs"] == [tokenizer.decode(out, skip_special_tokens=True)]
        assert row["tokens"] == [len(out)]
        right = f"\\boxed{{{row['gold']}}}" in row["outputs"][0]
        assert row["correct"] == [int(right)]


@pytest.fixture
def stub(monkeypatch):
    """A sampler whose i-th answer is \\boxed{9} where the question's i-th word is right; every
    second answer is truncated."""
    asked = []

    def sample(model, prompts, branching, step_lens, decoding):
        asked.append((len(prompts), branching, step_lens, decoding))
        roots = []
        for number, prompt in enumerate(prompts):
            root = Node(prompt, question=number)
            for i in range(branching[0]):
                Node([1] * (2 + i), root, done=i % 2 == 0)
            roots.append(root)
        return roots

    def verify(trees, answers, tokenizer):
        leaves = []
        texts = []
        for root in trees:
            words = tokenizer.decode(root.tokens).split()
            for i, leaf in enumerate(root.children):
                right = i < len(words) and words[i] == "right"
                leaf.reward = float(right)
                leaves.append(leaf)
                texts.append("\\boxed{9}" if right else "\\boxed{8}" if i % 2 else "none")
        return leaves, texts

    monkeypatch.setattr(ev, "sample_trees", sample)
    monkeypatch.setattr(ev, "verify_leaves", verify)
    return asked


def test_known_answers_give_exactly_the_known_score(empty, stub, capsys):
    texts = ["right wrong", "wrong wrong", "right right", "wrong right " + "x " * 900]
    write_lines("known.jsonl", [
        {"question": text, "answer": "9", "level": i % 2, "subject": None}
        for i, text in enumerate(texts)
    ])
    status, out, _ = run_eval(
        capsys, "--model", MODEL, "--benchmarks", "known.jsonl", "--out", "o", "--samples", 2,
        "--temperature", 1, "--max-new-tokens", 64,
    )
    summary = json.loads(only("o/*/summary.json").read_text())
    means = {name: figure["mean"] for name, figure in summary["results"].items()}
    # The last prompt is too long: wrong, truncated, without a box and without a token.
    assert status == 0 and means == {
        "avg@2, %": 37.5, "pass@2, %": 50, "maj@2, %": 50, "response tokens": 15 / 8,
        "truncated, %": 62.5, "no box, %": 37.5,
    }
    assert "known.jsonl: 1 prompts are too long" in out
    words = " ".join(out.split())
    assert "avg@2, % 37.5 ± 23.9" in words  # stdev(50, 0, 100, 0) / 2
    assert "level 0 (2) 75.0 ± 25.0" in words and "subject" not in words
    assert "known.jsonl, 4 problems" in out and summary["protocol"]["prompts_too_long"] == 1
    rows = {row["id"]: row for row in map(json.loads, only("o/*/problems.jsonl").open())}
    assert rows[0] == {
        "id": 0, "question": "right wrong", "gold": "9", "groups": {"level": "0"},
        "outputs": ["\\boxed{9}", "\\boxed{8}"], "extracted": ["9", "8"], "correct": [1, 0],
        "tokens": [2, 3], "truncated": [False, True], "majority": 1,
    }
    assert out.count("protocol: ") == 1 and "samples 2, temperature 1.0, max_new_tokens 64" in out


def test_default_protocols(empty, stub, capsys):
    """The paper's for benchmarks, the demo's for the demo, one answer to a problem if greedy."""
    def protocols(*flags):
        stub.clear()
        shutil.rmtree("evals", ignore_errors=True)
        assert run_eval(capsys, "--model", "long", "--limit", 2, *flags)[0] == 0
        made = []
        for _, branching, step_lens, decoding in stub:
            made.append((branching, step_lens, decoding.temperature))
        return made

    shutil.copytree(MODEL, "long")
    config = json.loads(Path("long/config.json").read_text())
    config["max_position_embeddings"] = 2048
    Path("long/config.json").write_text(json.dumps(config))
    shutil.copy(TEST, "own.jsonl")
    paper = ([8], [1152], 0.6)
    assert protocols("--benchmarks", "own.jsonl") == [paper]
    assert protocols() == [([8], [64], 1.0)]
    assert protocols("--benchmarks", "own.jsonl", "demo") == [paper, ([8], [64], 1.0)]
    greedy = ["--temperature", 0]
    assert protocols("--benchmarks", "own.jsonl", *greedy) == [([1], [1152], 0)]
    assert protocols(*greedy) == [([1], [64], 0)]
    assert protocols("--samples", 3, "--max-new-tokens", 9) == [([3], [9], 1.0)]


def test_static_workspace_is_long_enough_and_changes_no_greedy_answer(empty, capsys, monkeypatch):
    lengths = []

    def add_workspace(model, decoding, length, mode):
        lengths.append(length)
        padded = length + treerpo.Workspace.padding
        workspace = treerpo.Workspace(decoding.max_rows, padded, None)
        monkeypatch.setattr(workspace, "column_multiple", 1)  # no room is left by rounding
        return dataclasses.replace(decoding, workspace=workspace)

    shutil.copy(TEST, "own.jsonl")
    flags = ["--model", MODEL, "--temperature", 0, "--limit", 9, "--max-rows", 4]
    flags += ["--benchmarks", "demo", "own.jsonl", "--max-new-tokens", 70]
    assert run_eval(capsys, *flags, "--out", "plain")[0] == 0
    monkeypatch.setattr(ev, "add_workspace", add_workspace)
    assert run_eval(capsys, *flags, "--out", "static")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    questions = [json.loads(text)["question"] for text in TEST.open()][:9]
    assert lengths == [max(len(tokenizer(text).input_ids) for text in questions) + 70]
    for plain in Path("plain").glob("*/problems.jsonl"):
        static = Path("static") / plain.relative_to("plain")
        assert static.read_bytes() == plain.read_bytes()


def test_progress_moves_within_a_generate_call(empty, capsys, monkeypatch):
    told = []

    class Recorder(ev.Status):
        def tokens(self, n):
            told.append(n)
            super().tokens(n)

    monkeypatch.setattr(ev, "Status", Recorder)
    assert run_eval(capsys, "--model", MODEL, "--limit", 4, "--samples", 2)[0] == 0
    rows = [json.loads(text) for text in only("evals/*/problems.jsonl").open()]
    longest = max(max(row["tokens"]) for row in rows)
    assert len(told) == longest  # one batch: told at every token


def test_problems_of_the_same_text_get_answers_of_their_own(empty, capsys):
    write_lines("same.jsonl", [json.loads(TEST.read_text().splitlines()[0])] * 4)
    flags = ["--benchmarks", "same.jsonl", "--samples", 4, "--temperature", 1]
    flags += ["--max-new-tokens", 64, "--max-rows", 4]
    assert run_eval(capsys, "--model", MODEL, *flags)[0] == 0
    rows = [json.loads(text) for text in only("evals/*/problems.jsonl").open()]
    assert len({json.dumps(row["outputs"]) for row in rows}) == 4


def test_tables_are_the_same_byte_for_byte(empty, capsys):
    flags = ["--model", MODEL, MODEL, "--limit", 8, "--samples", 2]
    one = table_of(run_eval(capsys, *flags, "--out", "o")[1])
    two = table_of(run_eval(capsys, *flags, "--out", "p")[1])
    assert one == two and "+0.0 ± 0.0" in "\n".join(one)
    assert "inside the noise (exact paired sign-flip test, p = 1)" in "\n".join(one)
    run_eval(capsys, *flags, "--out", "q", "--seed", 1)
    name = "demo-model-demo/problems.jsonl"
    assert Path("o", name).read_bytes() == Path("p", name).read_bytes()
    assert Path("o", name).read_bytes() != Path("q", name).read_bytes()
    for rows in (1, 7, 256):  # greedy in float32 on a CPU
        run_eval(capsys, "--model", MODEL, "--limit", 20, "--temperature", 0, "--max-rows", rows,
            "--out", f"rows{rows}")
    assert len({path.read_bytes() for path in Path().glob("rows*/*/problems.jsonl")}) == 1


# ------------------------------------------------------------------------------------- survival
SAMPLED = ["--model", MODEL, "--samples", 2, "--max-rows", 4, "--limit", 5, "--out", "o"]


def test_killed_at_any_byte_it_ends_in_the_same_files_and_table(empty, capsys, monkeypatch):
    assert run_eval(capsys, *SAMPLED)[0] == 0
    table = table_of(run_eval(capsys, *SAMPLED)[1])  # nothing is left to answer
    path = only("o/*/problems.jsonl")
    whole = path.read_bytes()
    summary = path.with_name("summary.json").read_bytes()
    assert whole.count(b"\n") == 5
    asked = []
    real = ev.answer_batch

    def counted(batch, *rest):
        asked.append(len(batch))
        return real(batch, *rest)

    monkeypatch.setattr(ev, "answer_batch", counted)
    ends = [0, *itertools.accumulate(len(text) for text in whole.splitlines(True))]
    for end in ends:
        for cut in {end, max(0, end - 1)}:
            asked.clear()
            path.write_bytes(whole[:cut])
            status, out, _ = run_eval(capsys, *SAMPLED)
            assert (status, table_of(out)) == (0, table)
            assert path.read_bytes() == whole
            assert path.with_name("summary.json").read_bytes() == summary
            lines = whole[:cut].count(b"\n")
            kept = 5 if lines == 5 else lines // 2 * 2  # whole batches of 2 are kept
            assert sum(asked) == 5 - kept


def test_a_model_with_nothing_left_to_answer_is_not_loaded(empty, capsys, monkeypatch):
    flags = ["--model", MODEL, "--limit", 2]
    table = table_of(run_eval(capsys, *flags)[1])
    monkeypatch.setattr(ev, "load_model", None)
    status, out, _ = run_eval(capsys, *flags)
    assert status == 0 and table_of(out) == table


def test_a_killed_process_keeps_its_answers_and_frees_the_folder(empty, capsys):
    flags = ["--model", MODEL, "--samples", 1, "--max-rows", 1, "--limit", 30, "--out", "o"]
    command = [sys.executable, ev.__file__, "--device", "cpu", *[str(flag) for flag in flags]]
    paths = os.pathsep.join([str(treerpo.HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    with open("screen.txt", "w") as screen:
        process = subprocess.Popen(command, env=environment, stdout=screen, stderr=screen)
    while not any(path.stat().st_size > 500 for path in Path("o").glob("*/problems.jsonl")):
        assert process.poll() is None, Path("screen.txt").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it is not done too soon
    status, _, lines = run_eval(capsys, *flags)
    assert status == 2 and "another process is using this folder" in lines[0]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    path = only("o/*/problems.jsonl")
    killed = path.read_bytes()
    assert run_eval(capsys, *flags)[0] == 0 and run_eval(capsys, *flags[:-1], "p")[0] == 0
    assert path.read_bytes() == only("p/*/problems.jsonl").read_bytes()
    assert 500 < len(killed) < len(path.read_bytes())


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, also where these tests run behind a shell's &, which ignores
    it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_whole_batches(empty, ctrl_c, capsys, monkeypatch):
    whole = run_eval(capsys, *SAMPLED[:-1], "p")
    calls = []
    real = ev.answer_batch

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ev, "answer_batch", interrupted)
        status, out, lines = run_eval(capsys, *SAMPLED)
    path = only("o/*/problems.jsonl")
    assert (status, len(lines)) == (130, 1) and "A = " not in out
    assert lines == ["eval.py: interrupted; the same command goes on from here"]
    assert path.read_bytes().count(b"\n") == 2
    assert json.loads(path.with_name("summary.json").read_text())["results"] is None
    status, out, _ = run_eval(capsys, *SAMPLED)
    assert status == 0 and table_of(out) == table_of(whole[1])
    assert path.read_bytes() == only("p/*/problems.jsonl").read_bytes()


def test_a_terminal_that_knows_only_ascii(empty, capsys, monkeypatch):
    assert run_eval(capsys, *SAMPLED)[0] == 0
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="ascii"))
    assert ev.main([str(flag) for flag in [*SAMPLED, "--device", "cpu"]]) == 0
    sys.stdout.flush()
    assert b" \\xb1 " in bytes_out.getvalue()
    bytes_err = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(bytes_err, encoding="ascii"))
    assert ev.main(["--benchmarks", "π.jsonl"]) == 2
    sys.stderr.flush()
    assert b"--benchmarks \\u03c0.jsonl" in bytes_err.getvalue()


def test_a_full_memory_is_named_and_other_faults_are_not_hidden(empty, capsys, monkeypatch):
    faults = [torch.OutOfMemoryError("CUDA"), MemoryError(),
              RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    for fault in [*faults, RuntimeError("a fault")]:
        def fail(*args):
            raise fault
        monkeypatch.setattr(ev, "answer_batch", fail)
        if fault in faults:
            status, _, lines = run_eval(capsys, "--limit", 2)
            assert status == 2 and len(lines) == 1 and "--max-rows" in lines[0]
        else:
            with pytest.raises(RuntimeError, match="a fault"):
                run_eval(capsys, "--limit", 2)


# -------------------------------------------------------------------------------------- folders
def test_revision_is_the_commit_of_a_hub_model_and_else_the_files(tmp_path, monkeypatch):
    """A hub cache as the hub's own library lays it out, with two commits of one model."""
    cache = tmp_path / "models--org--toy"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(ev.transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(MODEL, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)
        assert ev.revision("org/toy") == commit
    folder = tmp_path / "folder"
    shutil.copytree(MODEL, folder)
    (folder / "trainer_state.pt").write_bytes(b"of the optimiser")
    assert ev.revision(MODEL) == ev.revision(str(folder))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # the last bit of more than one block
    (folder / "model.safetensors").write_bytes(weights)
    assert ev.revision(MODEL) != ev.revision(str(folder))


def test_another_protocol_in_the_folder_is_named(empty, capsys):
    flags = ["--model", MODEL, "--limit", 4, "--out", "o"]
    assert run_eval(capsys, *flags)[0] == 0
    before = {path: path.read_bytes() for path in Path("o").glob("*/*")}
    changes = {
        "--seed 1": "seed", "--max-new-tokens 63": "max_new_tokens", "--limit 3": "problems",
        "--samples 2": "samples", "--temperature 0.9": "temperature", "--max-rows 8": "max_rows",
        "--dtype bfloat16": "dtype", "--template chat.txt": "template",
    }
    Path("chat.txt").write_text("Q: {question}")
    for extra, key in changes.items():
        status, _, lines = run_eval(capsys, *flags, *extra.split())
        assert status == 2 and len(lines) == 1 and f"answers with {key} " in lines[0]
    assert {path: path.read_bytes() for path in Path("o").glob("*/*")} == before
    only("o/*/summary.json").write_text("")  # nobody knows whose answers they are
    status, _, lines = run_eval(capsys, *flags)
    assert status == 2 and len(lines) == 1 and "summary.json cannot be read" in lines[0]
    for seed in (0, 1):  # without --out each protocol has a folder of its own
        assert run_eval(capsys, *flags[:-2], "--seed", seed)[0] == 0
    assert len(list(Path("evals").iterdir())) == 2


def test_files_of_one_name_have_folders_of_their_own(empty, capsys):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(TEST, Path(folder, "test.jsonl"))
    files = ["a/test.jsonl", "b/test.jsonl"]
    flags = ["--limit", 2, "--max-new-tokens", 64, "--out", "o"]
    status, out, _ = run_eval(capsys, "--model", MODEL, "--benchmarks", *files, *flags)
    assert status == 0 and len(list(Path("o").glob("*/problems.jsonl"))) == 2
    assert "mean of 2 benchmarks" in out


def test_compare_shows_the_table_of_before_without_sampling(empty, capsys, monkeypatch):
    shutil.copytree(MODEL, "twin")
    flags = ["--model", MODEL, "twin", "--limit", 6]
    table = table_of(run_eval(capsys, *flags, "--out", "o")[1])
    folders = ["o/demo-model-demo", "o/twin-demo"]
    monkeypatch.setattr(ev, "sample_trees", None)
    monkeypatch.setattr(ev, "load_tokenizer", None)
    status, out, _ = run_eval(capsys, "--compare", *folders)
    assert status == 0 and table_of(out) == table
    # Another tokenizer has another order by length: problems are paired by their number.
    path = Path(folders[1], "problems.jsonl")
    path.write_text("".join(reversed(path.read_text().splitlines(True))))
    status, out, _ = run_eval(capsys, "--compare", *folders)
    assert status == 0 and table_of(out) == table and "+0.0 ± 0.0" in out
    status, out, _ = run_eval(capsys, "--compare", *reversed(folders), folders[0])
    assert status == 0 and out.startswith("A = twin\nB = demo/model\nC = demo/model\n")


def test_compare_refuses_what_cannot_be_compared(empty, capsys, stub):
    shutil.copy(TEST, "own.jsonl")
    base = ["--model", MODEL, "--max-new-tokens", 64, "--limit", 4]
    assert run_eval(capsys, *base, "--out", "a")[0] == 0
    assert run_eval(capsys, *base, "--out", "seed", "--seed", 1)[0] == 0
    assert run_eval(capsys, *base, "--out", "samples", "--samples", 2)[0] == 0
    assert run_eval(capsys, *base[:-1], 3, "--out", "fingerprint")[0] == 0
    assert run_eval(capsys, *base, "--out", "benchmark", "--benchmarks", "own.jsonl")[0] == 0
    folders = {path.parent.parent.name: path.parent for path in Path().glob("*/*/summary.json")}
    status, out, _ = run_eval(capsys, "--compare", folders["a"], folders["seed"])
    assert status == 0 and "seed 0 / 1" in out
    for key in ("samples", "fingerprint", "benchmark"):
        status, out, lines = run_eval(capsys, "--compare", folders["a"], folders[key])
        assert (status, out, len(lines)) == (2, "", 1) and f"has {key} " in lines[0]
    shutil.copytree(folders["a"], "half")
    text = Path("half/problems.jsonl").read_text()
    Path("half/problems.jsonl").write_text("".join(text.splitlines(True)[:3]))
    Path("none").mkdir()
    Path("list").mkdir()
    Path("list/summary.json").write_text("[]")
    refused = {"half": "3 of 4 problems", "none": "no answers", "list": "no answers",
               "gone": "no answers"}
    for folder, words in refused.items():
        status, out, lines = run_eval(capsys, "--compare", folders["a"], folder)
        assert (status, out, len(lines)) == (2, "", 1) and words in lines[0] and folder in lines[0]
    assert "give two" in run_eval(capsys, "--compare", folders["a"])[2][0]
    status, _, lines = run_eval(capsys, "--compare", folders["a"], folders["a"], "--max-rows", 9)
    assert status == 2 and "--max-rows has no effect" in lines[0]


def make_run(name, steps, rows, checkpoints, age):
    """A run's folder with the files that say how far it came."""
    folder = Path("runs") / name
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": steps}))
    write_lines(folder / "metrics.jsonl", [{"step": step} for step in rows])
    os.utime(folder / "metrics.jsonl", (10**9 - age, 10**9 - age))


def test_the_newest_finished_run_is_found(empty, capsys):
    assert ev.find_models(None) == [MODEL]
    assert "no finished run under runs/" in capsys.readouterr().out
    make_run("old", 4, [0, 1, 4], [4], age=90)
    make_run("finished", 100, [0, 100], [20, 100], age=60)
    make_run("stopped", 100, [0, 20], [20], age=30)
    make_run("unsaved", 2, [0, 2], [1], age=20)
    shutil.rmtree("runs/unsaved/checkpoint-1")
    make_run("torn", 9, [9], [9], age=10)
    Path("runs/torn/metrics.jsonl").write_text('{"step": 9}\n{"st')
    make_run("empty", 9, [], [9], age=10)
    make_run("odd", 9, [9], [9], age=10)
    Path("runs/odd/config.json").write_text("[]")
    Path("runs/stray.txt").write_text("")
    assert ev.find_models(None) == [MODEL, "runs/finished/checkpoint-100"]
    assert capsys.readouterr().out == ""
    found = ev.find_models(["runs/stopped", "runs/old/checkpoint-4", "org/model"])
    assert found == ["runs/stopped/checkpoint-20", "runs/old/checkpoint-4", "org/model"]
    with pytest.raises(BadInput, match="no checkpoint yet"):
        ev.find_models(["runs/unsaved"])


# ---------------------------------------------------------------------------------------- flags
BAD = [
    "--benchmarks math501", "--benchmarks gone.jsonl", "--benchmarks empty.jsonl",
    "--benchmarks torn.jsonl", "--benchmarks other.jsonl", "--model gone", "--model run",
    "--samples 0", "--temperature 0 --samples 2", "--limit -1", "--max-rows 0",
    "--max-new-tokens 0", "--max-new-tokens 512", "--temperature -1", "--temperature nan",
    "--temperature 1e-40", "--template gone.txt", "--question-column q", "--out empty.jsonl",
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_exits_2_with_one_line_before_any_answer(empty, capsys, monkeypatch, flags):
    Path("empty.jsonl").write_text("")
    Path("torn.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"quest')
    write_lines("other.jsonl", [{"q": "1+1?", "a": "2"}])
    Path("run").mkdir()
    Path("run/config.json").write_text('{"model": "x"}')
    Path("run/metrics.jsonl").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(ev, "answer_jobs", None)
    status, _, lines = run_eval(capsys, *flags.split())
    assert status == 2 and len(lines) == 1
    assert flags.split()[-1] in lines[0]
    if "math501" in flags:
        assert all(name in lines[0] for name in ev.BENCHMARKS)


@pytest.mark.parametrize("flags", ["--no-such-flag", "--sample 2", "--samples x", "--model",
                                   "--device tpu", "--compile yes"])
def test_argparse_refuses_the_rest(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        ev.main(flags.split())
    assert stop.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_a_prompt_with_tokens_that_the_model_does_not_know(empty, capsys):
    shutil.copytree(MODEL, "odd")
    tokenizer = AutoTokenizer.from_pretrained("odd")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("odd")
    Path("new.txt").write_text("<new>{question}")
    known = AutoModelForCausalLM.from_pretrained(MODEL).config.vocab_size
    if len(tokenizer) <= known:  # the embedding has rows to spare: use them up
        tokenizer.add_tokens([f"<new{i}>" for i in range(known)])
        tokenizer.save_pretrained("odd")
        Path("new.txt").write_text(f"<new{known - 1}>{{question}}")
    status, _, lines = run_eval(capsys, "--model", "odd", "--template", "new.txt", "--limit", 2)
    assert status == 2 and "--template" in lines[0] and f"below {known} only" in lines[0]


def test_a_missing_hub_benchmark_does_not_stop_the_others(empty, capsys, monkeypatch):
    real = ev.load_questions

    def load(source, *columns, **options):
        if "MATH-500" in source:
            raise BadInput(f"cannot read {source} (ConnectionError)")
        return real(source, *columns, **options)

    monkeypatch.setattr(ev, "load_questions", load)
    flags = ["--model", MODEL, "--limit", 3]
    status, out, lines = run_eval(capsys, *flags, "--benchmarks", "math500", "demo")
    assert status == 1 and "demo, 3 problems" in out and len(lines) == 1
    assert "math500 is missing" in lines[0] and "local copy" in lines[0]
    status, out, again = run_eval(capsys, *flags, "--benchmarks", "math500")
    assert (status, out, again) == (1, "", lines)
