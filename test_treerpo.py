"""Every claim against an independent oracle: brute force, a closed form, or a naive row-by-row version. Offline, CPU.

The commands: python -m pytest -q. Sections: sampling, advantages, packs and loss, data, verifier, eval.py, whole runs.
"""
import http.server
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
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only cost, here and in subprocesses

import datasets  # noqa: E402
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          MambaConfig, MistralConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import eval as ev  # the project's eval.py, not the builtin
import treerpo
from treerpo import (BadInput, Decoding, Node, add_leaf_advantages, add_sibling_advantages, backup_rewards,
                     extract_boxed, group_relative_advantages, is_equiv, normalize_answer, pack_nodes,
                     pack_tensors, policy_loss, read_answer, reward_fn, sample_forests, sample_trees, token_logps,
                     unit_weights, update_policy)


# ------------------------------------------------------------------------------------------------ models made for tests

ALPHABET = [chr(i) for i in range(32, 127)] + ["\n"]
COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=256, vocab_size=24, bos_token_id=None, eos_token_id=3, pad_token_id=3)
KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
         "llama": (LlamaConfig, LlamaForCausalLM)}
EOS, N_TOKENS = (3, 5, 9, 13), 20  # ids 20..23 of the tiny models only pad the embedding matrix
PROMPTS = [[5, 6, 7, 8, 9], [4], [10, 11, 12]]  # ragged, one of a single token


def tiny_model(kind="qwen2", scale=12.0, **extra):
    """A random model with sharp predictions, so that mistakes show."""
    config, model = KINDS[kind]
    torch.manual_seed(0)
    model = model(config(**{**COMMON, **extra, **({"head_dim": 8} if kind == "qwen3" else {})})).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(scale)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(params=KINDS)
def tiny(request):
    return tiny_model(request.param)


def decoding(**changes):
    return Decoding(eos_ids=EOS, n_tokens=N_TOKENS)._replace(**changes)


def path_ids(node):
    return [token for step in node.path() for token in step.tokens]


def plain_logps(model, node, temperature=1.0):
    """log pi of a node's own tokens by a plain causal forward of its whole path: the oracle, one row a node."""
    ids = path_ids(node)
    logits = model(torch.tensor([ids])).logits[0, :-1, :N_TOKENS].float() / temperature
    own = range(len(ids) - len(node.tokens), len(ids))
    return torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in own])


def plain_entropies(model, node, temperature=1.0):
    ids = path_ids(node)
    p = (model(torch.tensor([ids])).logits[0, :-1, :N_TOKENS] / temperature).softmax(-1)
    return (-(p * p.log()).nan_to_num()).sum(-1)[len(ids) - len(node.tokens) - 1:]


def nodes_of(roots):
    return [node for root in roots for node in root.walk() if node.parent]


def graded_trees(model, seed=0, branching=(3, 2, 2), **changes):
    """Sampled trees with random leaf rewards, backed up and compared."""
    torch.manual_seed(seed)
    roots = sample_trees(model, PROMPTS, list(branching), [4] * len(branching), decoding(**changes))
    draw = random.Random(seed)
    for root in roots:
        for leaf in root.leaves():
            leaf.reward = float(draw.random() < 0.5)
        backup_rewards(root)
        add_sibling_advantages([root], "bernoulli")
    return roots


# ------------------------------------------------------------------------------------------------------------ sampling

@pytest.mark.parametrize("max_rows", [1, 2, 5, 100])
def test_sampling_from_caches_equals_full_forwards(tiny, max_rows):
    """Every entropy noted while sampling follows from a forward without cache, padding, other rows (float32: 1e-4)."""
    torch.manual_seed(1)
    roots = sample_trees(tiny, PROMPTS, [6, 2, 2], [4, 3, 5], decoding(max_rows=max_rows, temperature=1.3))
    assert [root.tokens for root in roots] == PROMPTS
    nodes = nodes_of(roots)
    assert any(node.done and node.depth < 3 for node in nodes) and any(node.depth == 3 for node in nodes)
    for node in nodes:
        assert torch.allclose(torch.tensor(node.entropies), plain_entropies(tiny, node, 1.3), atol=1e-4)
        assert len(node.tokens) == len(node.entropies) <= (4, 3, 5)[node.depth - 1] and max(node.tokens) < N_TOKENS
        assert node.done == (node.tokens[-1] in EOS)
        assert not set(EOS) & set(node.tokens[:-1])  # EOS kept, nothing behind it
        expected = 0 if node.done or node.depth == 3 else 2
        assert len(node.children) == expected
        assert node.done or len(node.tokens) == (4, 3, 5)[node.depth - 1]


def test_greedy_takes_the_argmax_of_full_forwards(tiny):
    for root in sample_trees(tiny, PROMPTS, [1, 1], [5, 4], decoding(temperature=0.0)):
        ids = path_ids(root.leaves()[0])
        logits = tiny(torch.tensor([ids])).logits[0, :, :N_TOKENS]
        assert ids[len(root.tokens):] == logits.argmax(-1)[len(root.tokens) - 1:-1].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_match_the_exact_distribution(temperature):
    """Chi-square on the first token, and on a child's first token given its parent; seeds fixed, p > 1e-3."""
    model, n = tiny_model(scale=4.0), 4000
    torch.manual_seed(2)
    first = sample_trees(model, [PROMPTS[0]], [n], [1], decoding(temperature=temperature, max_rows=1500))[0].children
    torch.manual_seed(3)
    parent = sample_trees(model, [PROMPTS[0]], [1, n], [2, 1],
                          decoding(temperature=temperature, max_rows=1500))[0].children[0]
    assert not parent.done
    for children in (first, parent.children):
        prefix = path_ids(children[0].parent)
        p = (model(torch.tensor([prefix])).logits[0, -1, :N_TOKENS] / temperature).softmax(-1).double()
        counts = torch.bincount(torch.tensor([child.tokens[0] for child in children]), minlength=N_TOKENS)
        assert counts.sum() == n
        big = p * n >= 5  # the usual rule; the rare ids are pooled
        observed = torch.cat([counts[big], counts[~big].sum()[None]]).double()
        expected = torch.cat([p[big], p[~big].sum()[None]]) * n
        statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        freedom = len(observed) - 1
        assert statistic < freedom + 3.3 * (2 * freedom) ** 0.5 + 4  # above the 99.9 % point for these degrees


def test_checkpoint_generation_config_has_no_influence():
    def tokens(model):
        torch.manual_seed(4)
        return [node.tokens for node in nodes_of(sample_trees(model, PROMPTS, [4, 2], [5, 5], decoding()))]
    plain, loaded = tiny_model(), tiny_model()
    own = GenerationConfig(do_sample=True, top_p=0.3, top_k=2, repetition_penalty=3.0, min_p=0.5,
                           no_repeat_ngram_size=1,
                           suppress_tokens=[5, 6, 7], min_new_tokens=5, temperature=0.1, eos_token_id=9)
    loaded.generation_config = own
    assert tokens(loaded) == tokens(plain)
    assert loaded.generation_config is own


def test_stop_ids_come_from_everywhere():
    class Tokenizer:
        eos_token_id = 1

        def get_vocab(self):
            return {"a": 0, "<e>": 1, "<|im_end|>": 17, "z": 19}
    model = tiny_model(eos_token_id=[3, 4])
    model.generation_config.eos_token_id = 5
    made = treerpo.make_decoding(model, Tokenizer(), 1.0, 8)
    assert made.eos_ids == (1, 3, 4, 5, 17) and made.n_tokens == 20


def test_entropy_forks_are_where_an_independent_computation_puts_them():
    model, budget = tiny_model(scale=4.0), 8
    for threshold, leaves, trees in ((0.5, 7, 3), (1e-9, 6, 2), (1e9, 5, 2)):
        torch.manual_seed(5)
        roots = sample_forests(model, PROMPTS, leaves, trees, budget, threshold, decoding(max_rows=4))
        for question, prompt in enumerate(PROMPTS):
            forest = [root for root in roots if root.question == question]
            assert all(root.tokens == prompt for root in forest)
            assert sum(len(root.leaves()) for root in forest) == leaves
            forks, spots = [], []
            for k, root in enumerate(forest[:trees]):
                # children[0] continues the first rollout, later children are forks
                rollout, node, at = [], root, 0
                while node.children:
                    forks += [(k, at)] * (len(node.children) - 1)
                    node = node.children[0]
                    rollout += node.tokens
                    at += len(node.tokens)
                whole = Node(rollout, Node(prompt))
                spots += [(h, k, t) for t, h in enumerate(plain_entropies(model, whole).tolist()) if h > threshold]
            wanted = sorted(spots, reverse=True)[:leaves - trees]
            assert sorted(forks) == sorted((k, t) for _, k, t in wanted)
            assert len(forest) == trees + leaves - trees - len(wanted)
            for leaf in (leaf for root in forest for leaf in root.leaves()):
                length = sum(len(step.tokens) for step in leaf.path()[1:])
                assert leaf.done == (leaf.tokens[-1] in EOS) and (leaf.done or length == budget)
                assert length <= budget and all(step.tokens for step in leaf.path())
        for node in nodes_of(roots):  # forks continue the model's own distribution, segments keep their entropies
            assert torch.allclose(torch.tensor(node.entropies), plain_entropies(model, node), atol=1e-4)


# ------------------------------------------------------------------------------------------------ backup and advantages

def leaf(reward):
    return Node([1], reward=reward)


def tree(*children):
    node = Node([1], children=list(children))
    for child in children:
        child.parent = node
    return node


def test_backup_is_the_mean_of_children_not_of_leaves():
    root = tree(leaf(1.0), tree(leaf(0.0), leaf(0.0), tree(leaf(1.0), leaf(0.0))))
    assert backup_rewards(root) == root.reward == (1 + (0 + 0 + 0.5) / 3) / 2
    assert root.reward != sum(x.reward for x in root.leaves()) / len(root.leaves())


def test_the_worked_example_of_the_docstring():
    root = tree(tree(leaf(1.0), leaf(0.0)), tree(leaf(1.0), leaf(1.0)))
    assert backup_rewards(root) == 0.75
    assert add_sibling_advantages([root], "bernoulli") == [True, True, False]
    a, b = root.children
    assert [round(n.advantage, 3) for n in (a, b, *a.children, *b.children)] == [-0.577, 0.577, 1, -1, 0, 0]
    assert [n.trained for n in b.children] == [False, False]


def test_normalisers_by_hand():
    rewards = torch.tensor([0.0, 0.5, 1.0, 1.0])  # mu 5/8, population variance 11/64
    for name, scale in (("bernoulli", (5 / 8 * 3 / 8) ** 0.5), ("std", (11 / 64) ** 0.5), ("none", 1.0)):
        advantages = group_relative_advantages(rewards, name)
        assert advantages.tolist() == pytest.approx([(r - 5 / 8) / scale for r in rewards.tolist()], abs=1e-12)
        assert abs(advantages.sum()) < 1e-12
        assert not group_relative_advantages(torch.tensor([1 / 3 + 1e-16, 1 / 3]), name).any()
    zero_one = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1])
    assert torch.allclose(*(group_relative_advantages(zero_one, name) for name in ("bernoulli", "std")))
    near = group_relative_advantages(torch.tensor([0.49, 0.49, 0.51, 0.51]).double(), "bernoulli")
    assert near.abs().tolist() == pytest.approx([0.02] * 4, rel=1e-3)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        group_relative_advantages(torch.tensor([0.0, 2.0]), "bernoulli")


def test_near_ties_are_pruned_by_min_group_std():
    root = tree(leaf(0.4), leaf(0.6))  # population std 0.1
    backup_rewards(root)
    assert add_sibling_advantages([root], "std", 0.11) == [False] and not any(n.advantage for n in root.children)
    assert add_sibling_advantages([root], "std", 0.09) == [True]


def test_leaf_advantages_are_redistributed_as_brute_force_does():
    forest = [tree(tree(leaf(1.0), leaf(0.0)), leaf(0.0)), tree(leaf(1.0), tree(leaf(1.0), tree(leaf(0.0), leaf(1.0))))]
    for root in forest:
        backup_rewards(root)
    values = [x.reward for root in forest for x in root.leaves()]
    mu = statistics.mean(values)
    assert add_leaf_advantages(forest, "std") == [True]
    for node in nodes_of(forest):
        below = [x.reward for x in node.walk() if not x.children]
        assert node.advantage == pytest.approx(statistics.mean((r - mu) / statistics.pstdev(values) for r in below),
                                               abs=1e-12)
    leaves_only = {node: node.advantage for node in nodes_of(forest)}
    add_sibling_advantages(forest, "std")
    both = {node: node.advantage for node in nodes_of(forest)}
    for node in both:
        node.advantage = 0.0
    add_sibling_advantages(forest, "std")
    assert all(both[n] == pytest.approx(leaves_only[n] + n.advantage, abs=1e-12) for n in both)


# ------------------------------------------------------------------------------------------------------- packs and loss

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("pack_len", [1, 17, 64, 10**6])
def test_packed_scoring_equals_row_by_row(tiny, pack_len):
    """Log-probs and gradients of every trained token, each scored once; relative 1e-5 in float32."""
    roots = graded_trees(tiny)
    packs, seen, values = pack_nodes(roots, pack_len), [], []
    for pack in packs:
        scored = [node for node in pack if pack[node]]
        seen += scored
        assert sum(len(node.tokens) for node in pack) <= pack_len or pack_len < max(
            sum(len(s.tokens) for s in node.path()) for node in scored)
        keep = 0 if pack_len == 17 else 2**22  # both ways of the head: logits computed again, and kept
        values.append(token_logps(tiny, pack_tensors(pack, "cpu"), 0.7, N_TOKENS, chunk=5, keep=keep))
    assert len(seen) == len(set(seen)) and set(seen) == {node for node in nodes_of(roots) if node.trained}
    weights = torch.arange(sum(map(len, values))) % 7 - 3.0
    packed = gradients(tiny, (torch.cat(values) * weights).sum())
    plain = torch.cat([plain_logps(tiny, node, 0.7) for node in seen])
    assert torch.allclose(torch.cat(values), plain, rtol=1e-5, atol=1e-5)
    assert (packed - gradients(tiny, (plain * weights).sum())).norm() <= 1e-5 * packed.norm()


def naive_loss(model, roots, level_weight, ratio):
    """The update's loss at ratio 1, written node by node from its definition."""
    units = lambda n: len(n.tokens) if ratio == "token" else 1  # noqa: E731
    nodes = nodes_of(roots)
    total, depths = sum(map(units, nodes)), {n.depth for n in nodes}
    loss = 0.0
    for node in nodes:
        if node.trained:
            at_depth = sum(units(n) for n in nodes if n.depth == node.depth)
            weight = 1 / total if level_weight == "tokens" else 1 / (len(depths) * at_depth)
            logps = plain_logps(model, node)
            r = (logps - logps.detach()).exp() if ratio == "token" else (logps - logps.detach()).mean().exp()
            loss = loss - weight * node.advantage * r.sum()
    return loss


@pytest.mark.parametrize("level_weight", ["tokens", "levels"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_update_follows_the_definition_whatever_the_packs(level_weight, ratio, checkpointing):
    """One SGD step on a sampled batch equals the naive loss's gradient, clipped at norm 1; GSPO, checkpointing too."""
    results = []
    for pack_len in (30, 10**6):
        model = tiny_model()
        roots = graded_trees(model)
        weights = unit_weights(nodes_of(roots), level_weight, ratio)
        counts = Counter({d: 0 for d in weights})
        for n in nodes_of(roots):
            counts[n.depth] += len(n.tokens) if ratio == "token" else 1
        assert sum(weights[d] * counts[d] for d in weights) == pytest.approx(1, abs=1e-12)
        expected = gradients(model, naive_loss(model, roots, level_weight, ratio))
        model.zero_grad()
        start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        outcome = update_policy(model, torch.optim.SGD(model.parameters(), 1.0), roots, weights, decoding(),
                                pack_len=pack_len, clip_eps=0.2, ratio=ratio, updates=1, autocast=nullcontext())
        step = start - torch.cat([p.detach().flatten() for p in model.parameters()])
        norm = expected.norm()
        assert outcome["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and outcome["clip_ratio"] == 0
        # 1e-4: the step is read off float32 weights a hundred times larger than itself
        assert (step - expected / max(1.0, norm)).norm() <= 1e-4 * max(step.norm(), start.norm() * 1e-3)
        results.append(step)
    assert (results[0] - results[1]).norm() <= 1e-4 * max(results[0].norm(), start.norm() * 1e-3)


def test_depth_one_is_grpo():
    """Independent GRPO: group mean and std, one row a rollout, one division by all sampled tokens."""
    model = tiny_model()
    roots = graded_trees(model, branching=(6,))
    loss, total = 0.0, sum(len(n.tokens) for n in nodes_of(roots))
    for root in roots:
        rewards = [child.reward for child in root.children]
        std = statistics.pstdev(rewards)
        for child in root.children:
            advantage = (child.reward - statistics.mean(rewards)) / std if std else 0.0
            assert child.advantage == pytest.approx(advantage, abs=1e-12)
            ids = torch.tensor([root.tokens + child.tokens])
            logps = model(ids).logits[0, :-1, :N_TOKENS].log_softmax(-1).gather(1, ids[0, 1:, None])
            logps = logps[len(root.tokens) - 1:, 0]
            loss = loss - advantage * logps.sum() / total  # at ratio 1 the gradient of r is that of log pi
    expected = gradients(model, loss)
    outcome = gradients(model, naive_loss(model, roots, "tokens", "token"))
    assert (expected - outcome).norm() <= 1e-5 * expected.norm()


def test_eos_is_trained_although_it_is_the_padding():
    roots = graded_trees(tiny_model())
    rows = [pack_tensors(pack, "cpu") for pack in pack_nodes(roots, 40)]
    trained_eos = sum(node.done for node in nodes_of(roots) if node.trained)
    assert trained_eos and sum(torch.isin(row.targets, torch.tensor(EOS)).sum().item() for row in rows) == trained_eos


def test_clipping_by_the_direct_formula():
    logps = torch.tensor([-1.0, -1.5, -0.2, -2.0, -0.7], requires_grad=True)
    old = torch.tensor([-1.5, -1.4, -0.9, -1.0, -0.7])
    segments, advantages, weights = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.1])
    tokens = clipped = 0
    for lp, o, k in zip(logps.tolist(), old.tolist(), segments.tolist()):
        r, a = math.exp(lp - o), advantages[k].item()
        tokens -= weights[k].item() * min(r * a, min(max(r, 0.8), 1.2) * a)
        clipped += min(max(r, 0.8), 1.2) * a < r * a
    loss, n_clipped, units = policy_loss(logps, old, segments, advantages, weights, 0.2, "token")
    assert loss.item() == pytest.approx(tokens, rel=1e-6) and (n_clipped, units) == (clipped, 5)
    sequences = 0
    for k in (0, 1):
        s = math.exp((logps - old)[segments == k].mean().item())
        a = advantages[k].item()
        sequences -= weights[k].item() * min(s * a, min(max(s, 0.95), 1.05) * a)
    loss, n_clipped, units = policy_loss(logps, old, segments, advantages, weights, 0.05, "sequence")
    assert loss.item() == pytest.approx(sequences, rel=1e-6) and (n_clipped, units) == (2, 2)


def test_gspo_has_grpos_gradient_at_ratio_one_and_equal_lengths():
    logps = torch.randn(12, requires_grad=True)
    segments, advantages, weights = torch.arange(3).repeat_interleave(4), torch.tensor([1.0, -1.0, 0.5]), torch.ones(3)
    losses = [policy_loss(logps, logps.detach(), segments, advantages, weights, 0.2, ratio)[0]
              for ratio in ("token", "sequence")]
    token, sequence = (torch.autograd.grad(loss, logps)[0] for loss in losses)
    assert torch.allclose(token, 4 * sequence)  # a unit is a token, or a step of 4 tokens


def test_second_update_uses_the_first_passes_log_probs():
    model, seen, original = tiny_model(), [], treerpo.policy_loss
    roots = graded_trees(model)

    def spy(logps, old, *rest):
        seen.append((logps.detach(), old))
        _, advantages, step_weights, *_ = rest  # at ratio 1 they might be swapped unseen, when clipping not
        assert advantages.tolist() == pytest.approx([n.advantage for n in nodes_of(roots) if n.trained])
        assert step_weights.tolist() == pytest.approx([weights[n.depth] for n in nodes_of(roots) if n.trained])
        return original(logps, old, *rest)
    weights = unit_weights(nodes_of(roots), "tokens", "token")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(treerpo, "policy_loss", spy)
        outcome = update_policy(model, torch.optim.SGD(model.parameters(), 5.0), roots, weights, decoding(),
                                pack_len=10**6, clip_eps=0.2, ratio="token", updates=2, autocast=nullcontext())
    (first, old), (second, old_again) = seen
    assert torch.equal(first, old) and torch.equal(old, old_again) and not torch.allclose(second, first)
    assert outcome["clip_ratio"] > 0


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(monkeypatch):
    model = tiny_model()
    roots, before = graded_trees(model), [p.detach().clone() for p in model.parameters()]
    handle = next(model.parameters()).register_hook(lambda g: g * math.inf)
    outcome = update_policy(model, torch.optim.AdamW(model.parameters(), 0.1), roots,
                            unit_weights(nodes_of(roots), "tokens", "token"), decoding(), pack_len=64,
                            clip_eps=0.2, ratio="token", updates=2, autocast=nullcontext())
    handle.remove()
    assert outcome["skipped"] and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    factors = iter([math.nan, 1.0])  # the first of two passes: still counted, and the second one goes through
    next(model.parameters()).register_hook(lambda g: g * next(factors))
    outcome = update_policy(model, torch.optim.AdamW(model.parameters(), 0.1), roots,
                            unit_weights(nodes_of(roots), "tokens", "token"), decoding(), pack_len=10**6,
                            clip_eps=0.2, ratio="token", updates=2, autocast=nullcontext())
    assert outcome["skipped"] and not any(p.isnan().any() for p in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ------------------------------------------------------------------------------------------------ models, text and data

@pytest.mark.parametrize("config, named", [
    (MistralConfig(**{**COMMON, "sliding_window": 8}), "mistral"),
    (Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=0), "sliding_attention"),
    (MambaConfig(vocab_size=24, hidden_size=16, state_size=4, num_hidden_layers=1), "Mamba")],
    ids=lambda x: getattr(x, "model_type", x))
def test_unsupported_models_are_refused_by_name(tmp_path, config, named):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(treerpo.HERE / "demo/model")
    made.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=named):
        treerpo.load_model(str(tmp_path))


def test_mixed_precision_keeps_the_rotary_frequencies(tmp_path):
    model, sampler, _ = treerpo.load_model(str(treerpo.HERE / "demo/model"), "cpu", "mixed")
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.dtype for b in sampler.buffers()} <= {torch.float32}


def test_pieces_of_a_path_concatenate_even_inside_a_character():
    """Byte-level tokens: a step may end in the middle of a UTF-8 character."""
    made = AutoTokenizer.from_pretrained(treerpo.HERE / "demo/model")
    ids = made.encode("So:é🙂 x")
    for cut in range(1, len(ids)):
        root = Node([1])
        root.children = [Node(ids[:cut], root)]
        root.children[0].children = [Node(ids[cut:], root.children[0])]
        end = root.children[0].children[0]
        pieces = "".join(treerpo.step_text(step, made) for step in end.path())
        assert pieces == treerpo.path_text(end, made) == "So:é🙂 x"


def test_templates():
    made = AutoTokenizer.from_pretrained(treerpo.HERE / "demo/model")
    assert treerpo.load_template(None, made) == "{question}"
    qwen = treerpo.load_template("qwen-math", made)
    assert qwen == ("<|im_start|>system\n"
                    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    prompt = made.decode(treerpo.build_prompt("1{2}%s?", qwen, made))
    assert prompt.endswith("user\n1{2}%s?<|im_end|>\n<|im_start|>assistant\n")
    made.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert made.decode(treerpo.build_prompt("x", treerpo.load_template("chat", made), made)) == "[x]"
    bos = made.eos_token  # a tokenizer that puts a BOS in front, and a chat template that does so, too
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A",
                                                               special_tokens=[(bos, made.eos_token_id)])
    made.chat_template = bos + made.chat_template
    assert made.decode(treerpo.build_prompt("x", treerpo.load_template("chat", made), made)) == f"{bos}[x]"
    made.chat_template = "{% broken"  # nobody's trouble who does not ask for it
    assert treerpo.load_template(None, made) == "{question}"


def test_half_a_surrogate_pair_in_a_question_is_replaced(tmp_path):
    """Valid JSON, but no valid text: the tokenizer would stop with a TypeError."""
    (tmp_path / "odd.jsonl").write_text('{"question": "a \\ud800 b", "answer": "2"}')
    (q,) = treerpo.load_questions(str(tmp_path / "odd.jsonl"))
    assert q["question"] == "a ? b" and AutoTokenizer.from_pretrained(MODEL).encode(q["question"])


def test_question_files(tmp_path, capsys):
    rows = [{"Problem": "p", "solution": r"so \boxed{4}"}, {"Problem": "q", "solution": "steps #### 5"},
            {"Problem": "r", "solution": 6}]
    for kind, write in {"jsonl": lambda f: f.write_text("\n".join(map(json.dumps, rows))),
                        "json": lambda f: f.write_text(json.dumps(rows))}.items():
        file = tmp_path / f"x.{kind}"
        write(file)
        loaded = treerpo.load_questions(str(file))
        assert [q["question"] for q in loaded] == ["p", "q", "r"] and [q["id"] for q in loaded] == [0, 1, 2]
        assert [treerpo.reward_fn(r"\boxed{%s}" % a, q["answer"]) for a, q in zip("456", loaded)] == [1, 1, 1]
    datasets.Dataset.from_list([{"q": "p", "a": ["1", "2"]}]).to_parquet(tmp_path / "x.parquet")
    assert treerpo.load_questions(str(tmp_path / "x.parquet"), "q", "a")[0]["answer"] == ["1", "2"]
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(rows[0]).encode() + b'\n{"problem": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(BadInput, match="latin.jsonl line 2"):
        treerpo.load_questions(str(tmp_path / "latin.jsonl"))
    good = json.dumps({"question": "p", "answer": "4"}).encode()
    for name, raw in {"bom": b"\xef\xbb\xbf" + good, "crlf": good + b"\r\n" + good, "blank": good + b"\n\n"}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(raw)
        assert treerpo.load_questions(str(tmp_path / f"{name}.jsonl"))[0]["answer"] == "4"
    for name, raw in {"utf16.jsonl": good.decode().encode("utf-16") + b"\n", "deep.jsonl": b"[" * 10**5,
                      "five.json": b"5", "dict.json": b"{}", "x.parquet": b"5", "null.jsonl": b"null"}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(BadInput, match=name):
            treerpo.load_questions(str(tmp_path / name))
    answers = [good, good.replace(b'"4"', b'""'), good.replace(b'"4"', b"null")]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(answers))
    with pytest.raises(BadInput, match="some.jsonl row 2"):
        treerpo.load_questions(str(tmp_path / "some.jsonl"))
    assert len(treerpo.load_questions(str(tmp_path / "some.jsonl"), skip_unanswered=True)) == 1
    assert "2 rows without an answer left out" in capsys.readouterr().out
    rows = [{"question": "x", "answer": empty} for empty in ("", " ", None, [], {}, "steps ####")]
    for bad in ({"question": 5, "answer": "1"}, {"question": "", "answer": "1"}, [1], *rows):
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
        with pytest.raises(BadInput, match="bad.jsonl row 1"):
            treerpo.load_questions(str(tmp_path / "bad.jsonl"))


# --------------------------------------------------------------------------------------------------------- the verifier

# category -> (equal pairs, different pairs); the two answers of a pair are separated by " ~ ", pairs by " ;; "
CASES = {
    "fractions": (r"""\frac{1}{2} ~ \dfrac12 ;; \tfrac{3}{4} ~ 3/4 ;; \frac{2}{4} ~ \frac{1}{2}
    ;; -\frac{7}{3} ~ \frac{-7}{3} ;; \frac{7}{-3} ~ -7/3 ;; \frac1{72} ~ \frac{1}{72} ;; \frac{10}{2} ~ 5
    ;; \frac{1}{2} ~ \left(\frac{1}{2}\right) ;; 1\frac{1}{2} ~ \frac32 ;; 2 3/4 ~ \frac{11}{4}
    ;; -1\frac{1}{2} ~ -1.5 ;; \frac{\frac12}{3} ~ \frac16 ;; \cfrac{5}{8} ~ 0.625 ;; 3 \frac{1}{7} ~ \frac{22}{7}
    ;; \frac 3 4 ~ 0.75""", r"""\frac{1}{2} ~ \frac{2}{1} ;; \frac12 ~ 12 ;; 1\frac12 ~ \frac12
    ;; \frac{3}{4} ~ -\frac{3}{4} ;; \frac{22}{7} ~ \pi ;; 2\frac13 ~ \frac23 ;; \frac{7}{3} ~ \frac{7}{4}
    ;; 1/3 ~ 0.33 ;; \frac{100}{3} ~ 33.3 ;; x\frac12 ~ x+\frac12 ;; \frac{11}{36} ~ \frac{1}{36}"""),
    "decimals": (r"""0.5 ~ \frac{1}{2} ;; .75 ~ 0.750 ;; 5.0 ~ 5 ;; 007 ~ 7 ;; 12.50 ~ \frac{25}{2} ;; -0.2 ~ -\frac15
    ;; +4 ~ 4 ;; 2.0 ~ 2. ;; \$12.00 ~ 12""", r"""0.333 ~ \frac13 ;; 809.05 ~ 809 ;; 0.5 ~ 0.05 ;; 1.41 ~ \sqrt2
    ;; 3.14 ~ \pi ;; 0.67 ~ 2/3 ;; 3.14159265359 ~ \pi ;; 2.718 ~ e ;; 0.\overline{3} ~ 0.3 ;; 13.0 ~ 13.01"""),
    "integers": (r"""42 ~ 42 ;; 42 ~ 42. ;; -17 ~ - 17 ;; 1,234,567 ~ 1234567 ;; 1{,}234 ~ 1234 ;; 10\,000 ~ 10000
    ;; 10 000 ~ 10000 ;; 12,\!345 ~ 12345 ;; 2^{10} ~ 1024 ;; 3 \cdot 5 ~ 15 ;; 10^{20}+1 ~ 100000000000000000001
    ;; 2^{2024} ~ 4^{1012} ;; \mathbf{7} ~ 7""", r"""10081 ~ 10080 ;; 3986728 ~ 3986729
    ;; 100000000000000000001 ~ 100000000000000000000 ;; 42 ~ -42 ;; 1,234 ~ 1.234 ;; 1,234 ~ 1235
    ;; 2^{10} ~ 2^{11} ;; 12 ~ 21 ;; 1 2 ~ 12 ;; 3 4 ~ 7 ;; 5! ~ 5 ;; 2^{2024} ~ 2^{2025} ;; 0 ~ -1"""),
    "percent and money": (r"""25\% ~ 25 ;; 25% ~ 25\% ;; \$18 ~ 18 ;; \$1,200.50 ~ 1200.5 ;; 18 \text{ dollars} ~ 18
    ;; 18 dollars ~ \$18 ;; 12.5\% ~ \frac{25}{2} ;; \text{\$}50 ~ 50 ;; 30 \text{ percent} ~ 30\%""",
    r"""25\% ~ 0.25 ;; 25\% ~ 2.5 ;; \$18 ~ 180 ;; \$18.50 ~ 18.05 ;; 18 \text{ dollars} ~ 19 ;; 5\% ~ 6\%"""),
    "scientific": (r"""1.5 \times 10^3 ~ 1500 ;; 1.5\cdot 10^{-3} ~ 0.0015 ;; 2e5 ~ 200000 ;; 1.2E-3 ~ 0.0012
    ;; 6.02\times10^{23} ~ 6.02e23 ;; 10^{-2} ~ 0.01 ;; 3.0 \times 10^{8} ~ 3*10^8 ;; 4.5 × 10^{2} ~ 450""",
    r"""1.5\times10^3 ~ 1.5\times10^4 ;; 10^{-2} ~ 10^2 ;; 2e5 ~ 2e6 ;; 1.2\times10^{-5} ~ 1.3\times10^{-5}"""),
    "roots and pi": (r"""\sqrt{8} ~ 2\sqrt{2} ;; \sqrt2 ~ \sqrt{2} ;; \frac{1}{\sqrt{2}} ~ \frac{\sqrt{2}}{2}
    ;; \sqrt{16} ~ 4 ;; \sqrt[3]{27} ~ 3 ;; 2^{1/2} ~ \sqrt2 ;; 8^{2/3} ~ 4 ;; 3\sqrt{5}+2 ~ 2+3\sqrt{5}
    ;; \frac{\pi}{2} ~ 0.5\pi ;; 2\pi ~ \pi \cdot 2 ;; 4\pi/3 ~ \frac{4\pi}{3} ;; \frac{4}{3}\pi ~ \frac{4\pi}{3}
    ;; \sqrt{3+2\sqrt{2}} ~ 1+\sqrt{2} ;; 2√3 ~ \sqrt{12} ;; 12π ~ 12\pi
    ;; sqrt(3)/2 ~ \frac{\sqrt3}{2} ;; 9 pi ~ 9\pi ;; \frac{\sqrt{6}-\sqrt{2}}{4} ~ \frac{\sqrt2(\sqrt3-1)}{4}
    ;; e^{2} ~ e^2 ;; \sqrt{2}\sqrt{3} ~ \sqrt6""", r"""\sqrt{2} ~ \sqrt{3}
    ;; 2\sqrt{3} ~ 3\sqrt{2} ;; \sqrt{2} ~ 2 ;; 2\pi ~ 2 ;; 2\pi ~ \pi^2 ;; 3\sqrt{2} ~ 3
    ;; \sqrt{5}+1 ~ \sqrt{6} ;; \sqrt[3]{9} ~ 3 ;; 1+\sqrt{2} ~ 1-\sqrt{2} ;; \frac{103993}{33102} ~ \pi
    ;; \sqrt2 ~ 1.4142135623731 ;; \ln 8 ~ \log 8 ;; e^2 ~ 2e ;; \pi ~ \frac{355}{113} ;; 12\pi ~ 12
    ;; 4\sqrt{13} ~ 413 ;; \frac{\pi}{6} ~ \frac{\pi}{3} ;; \sqrt{17} ~ 4.123 ;; \log_2 8 ~ \log_8 2"""),
    "complex": (r"""3+4i ~ 4i+3 ;; i^2 ~ -1 ;; (1+i)^2 ~ 2i ;; \frac{1}{i} ~ -i ;; 2\mathrm{i} ~ 2i
    ;; \frac{-1+i\sqrt{3}}{2} ~ -\frac12+\frac{\sqrt3}{2}i ;; e^{i\pi} ~ -1""",
    r"""3+4i ~ 3-4i ;; 2i ~ 2 ;; i ~ -i ;; 3+4i ~ 4+3i ;; 1+i ~ 1+2i ;; i\sqrt{3} ~ \sqrt{3}"""),
    "bases": (r"""1101_2 ~ 1101_{2} ;; 2516_8 ~ 2516_{8} ;; \text{1A3}_{16} ~ 1A3_{16}""",
    r"""1101_2 ~ 1101_3 ;; 1101_2 ~ 1111_2 ;; 1101_2 ~ 1101 ;; 52_8 ~ 52_9 ;; 52_8 ~ 42"""),
    "degrees": (r"""30^{\circ} ~ 30° ;; 45^\circ ~ 45 \text{ degrees} ;; \angle ABC = 60^\circ ~ 60""",
    r"""30^\circ ~ 60^\circ ;; 30^\circ ~ 300 ;; 45^\circ ~ 54^\circ ;; 90^\circ ~ 9"""),
    "units": (r"""5\text{ cm} ~ 5 ;; 5 cm^2 ~ 5 ;; 5\text{ cm}^2 ~ 5 ;; 60\text{ miles per hour} ~ 60 ;; 60 km/h ~ 60
    ;; 12\text{ inches} ~ 12 ;; 3.5 \mathrm{~m} ~ 3.5 ;; 9.8\,\mathrm{m/s^2} ~ 9.8 ;; 36\sqrt{7}cm^{3} ~ 36\sqrt7
    ;; 24 eggs ~ 24 ;; 5 \text{ hours} ~ 5 hours ;; \frac{3}{4} \text{ cup} ~ 0.75 ;; 10 square feet ~ 10
    ;; 15\text{ square units} ~ 15 ;; 16\pi \text{ cm}^3 ~ 16\pi ;; x = 5\text{ m} ~ 5 ;; 100 \mathrm{~N} ~ 100
    ;; 12 \text{ apples} ~ 12.0""", r"""15^2 ~ 15 cm^2 ;; 5 cm ~ 6 cm ;; 5\text{ cm} ~ 5\text{ m} ;; 5x ~ 5
    ;; 5 x ~ 5 ;; 2 pi ~ 2 ;; 5\text{ cm}^2 ~ 25 ;; 24 eggs ~ 42 eggs ;; 5m ~ 5 ;; 3ab ~ 3
    ;; 8\text{ hours} ~ 8\text{ minutes} ;; 5 km ~ 50 km ;; 5 \sin x ~ 5 ;; 2 cos x ~ 2"""),
    "symbolic": (r"""\frac{x}{y}\cdot\frac{y}{z} ~ \frac{x}{z}
    ;; (x+1)^2 ~ x^2+2x+1 ;; x^2 - 4 ~ (x-2)(x+2) ;; 2x ~ x*2 ;; 2(x+y) ~ 2x+2y ;; \frac{x}{2} ~ 0.5x
    ;; \frac{1}{x}+\frac{1}{y} ~ \frac{x+y}{xy} ;; x^{-1} ~ \frac1x ;; -(x-3) ~ 3-x
    ;; \left(x+1\right)\left(x-1\right) ~ x^2-1 ;; \frac{n(n+1)}{2} ~ \frac{n^2+n}{2} ;; 2^{n+1} ~ 2\cdot 2^n
    ;; a^{3/2} ~ a\sqrt{a} ;; e^{-x} ~ \frac{1}{e^x}
    ;; 3x^2y ~ 3yx^2 ;; x_1+x_2 ~ x_{2}+x_{1} ;; \alpha\beta ~ \beta \alpha
    ;; \frac{x^2-1}{x-1} ~ x+1 ;; \mathbf{x}+1 ~ 1+x ;; xy+C ~ C+xy ;; \sqrt{x^3} ~ x\sqrt{x}
    ;; \frac{-(x-29)}{(x-3)(x+5)} ~ \frac{29-x}{x^2+2x-15} ;; 4^n ~ 2^{2n} ;; \frac12mv^2 ~ \frac{mv^2}{2}
    ;; \sqrt[4]{a^5} ~ a\sqrt[4]{a} ;; x^{2} ~ x^2 ;; 3/4x ~ \frac{3x}{4}
    ;; 2\,x ~ 2x""", r"""x+1 ~ x-1 ;; x^2 ~ x^3 ;; (x+1)^2 ~ x^2+1 ;; 2x ~ x^2 ;; X ~ x ;; x ~ y
    ;; \frac{x}{y} ~ \frac{y}{x} ;; 2^n ~ n^2 ;; x_1 ~ x_2 ;; \sin x ~ \cos x ;; \sqrt{x^2} ~ x
    ;; \frac{n(n+1)}{2} ~ \frac{n(n-1)}{2} ;; 2^{n+1} ~ 2^n+1 ;; -x^2 ~ (-x)^2 ;; e^x ~ e^{-x} ;; \ln x ~ \log x
    ;; 3x^2y ~ 3xy^2 ;; (x-1)(x+2) ~ (x+1)(x-2) ;; n! ~ n ;; |x| ~ x ;; a+b ~ ab ;; xy ~ x+y ;; x+C ~ x
    ;; \sin^2 x ~ \sin x^2 ;; 1/2x ~ \frac{1}{2x} ;; (-1)^n ~ (-1)^{n+1} ;; x^{10} ~ x^1 0 ;; \alpha ~ \beta"""),
    "prefixes": (r"""x=5 ~ 5 ;; x = \frac12 ~ 0.5 ;; f(x)=x^2 ~ x^2 ;; y=2x+1 ~ 2x+1 ;; x\in[0,1] ~ [0,1]
    ;; (x,y)=(1,2) ~ (1,2) ;; AB = 7 ~ 7 ;; x_1 = 3 ~ 3
    ;; x \in (-\infty, 3) ~ (-\infty,3) ;; P(A)=\frac13 ~ 1/3 ;; \text{Area}=12 ~ 12 ;; n = 2^{10} ~ 1024
    ;; \theta = 30^\circ ~ 30 ;; a_{n}=2n+1 ~ 2n+1 ;; x=2 \text{ or } x=-3 ~ -3, 2""",
    r"""x=5 ~ y=5 ;; x=5 ~ 6 ;; x=5 ~ x=-5 ;; 2x=10 ~ 10 ;; x+y=5 ~ 5 ;; f(x)=x ~ g(x)=x ;; x^2=4 ~ 4
    ;; x=1,y=2 ~ x=2,y=1 ;; x=1,y=2 ~ 2,1 ;; (x,y)=(1,2) ~ (2,1) ;; x(x+1)=0 ~ 0 ;; xy=5 ~ 5 ;; x\in[0,1] ~ [0,1)"""),
    "equations": (r"""y=2x+3 ~ y = 3+2x ;; 2x+3=y ~ y=2x+3 ;; x<5 ~ 5>x ;; x\le 5 ~ x \leq 5
    ;; -1<x\leqslant 1 ~ 1 \ge x > -1 ;; x \neq 2 ~ x\ne2 ;; x^2+y^2=4 ~ y^2+x^2=2^2 ;; x<1 \text{ or } x>3 ~ x>3, x<1
    ;; b>a>c ~ c<a<b ;; x^{2}-7 x-44=0 ~ x^2-7x-44=0 ;; x>\frac12 ~ x>0.5""", r"""x<5 ~ x>5 ;; x<5 ~ x\le5
    ;; x<5 ~ 5 ;; y=2x+3 ~ y=2x-3 ;; x\ne2 ~ x=2 ;; -1<x<1 ~ -1<x\le1 ;; x^2-7x-44=0 ~ x^2+7x-44=0 ;; x>3 ~ x>4
    ;; a<b<c ~ a<c<b ;; x<5 ~ y<5 ;; x^2+y^2=4 ~ x^2+y^2=2"""),
    "tuples": (r"""(1,2) ~ \left( 1, 2 \right) ;; (\frac12, 3) ~ (0.5,3) ;; (1,2),(3,4) ~ (3,4), (1,2)
    ;; (x+1, y) ~ (1+x,y) ;; \langle 1,2,3\rangle ~ (1,2,3) ;; (3, \frac{\pi}{2}) ~ (3,\pi/2) ;; (5) ~ 5
    ;; (1,234) ~ (1, 234)""", r"""(1,2) ~ (2,1) ;; (1,2) ~ (1,2,3) ;; (1,2) ~ 1,2 ;; (1,2) ~ [1,2]
    ;; (1,234,x) ~ (1234,x) ;; (1,234) ~ 1234 ;; (1,2) ~ \{1,2\} ;; (1,2),(3,4) ~ (1,3),(2,4) ;; (1,2) ~ 12"""),
    "intervals": (r"""[3,4) ~ \left[3,4\right) ;; (-\infty,2] ~ (-\infty, 2] ;; (3,+\infty) ~ (3,\infty)
    ;; [0,\frac12] ~ [0,0.5] ;; (-\infty,0)\cup(1,\infty) ~ (1,\infty)\cup(-\infty,0)
    ;; (0,1)∪(2,3) ~ (0,1) \cup (2,3) ;; [-\sqrt{4},2] ~ [-2,2]""", r"""[3,4) ~ (3,4] ;; [3,4) ~ [3,4]
    ;; (3,4) ~ [3,4] ;; (-\infty,2) ~ (2,\infty) ;; (-\infty,0)\cup(1,\infty) ~ (-\infty,0)
    ;; (0,1)\cup(2,3) ~ (0,2)\cup(1,3) ;; [2,\infty) ~ [2,-\infty) ;; (3,4] ~ 3,4"""),
    "sets and lists": (r"""\{1,2,3\} ~ \{3,2,1\} ;; 1,2,3 ~ 3, 1, 2 ;; \{1,2\} ~ 1, 2 ;; 2 \text{ and } 3 ~ 2,3
    ;; 5 or 6 ~ 6, 5 ;; \pm 2 ~ 2,-2 ;; 3\pm\sqrt{2} ~ 3-\sqrt2, 3+\sqrt2 ;; x=\pm 3 ~ 3, -3
    ;; \emptyset ~ \varnothing ;; \{\} ~ \emptyset ;; 1; 2 ~ 1, 2 ;; \{-1, 0.5\} ~ \{\frac12, -1\}
    ;; 2, 3, and 5 ~ 5,3,2 ;; \frac{-1\pm\sqrt5}{2} ~ \frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}
    ;; \pm1,\pm i ~ i,-i,1,-1 ;; \{1\} ~ 1 ;; \left\{ 2, 3 \right\} ~ \{2,3\} ;; \$5$ or $9\$ ~ 9,5
    ;; 5 or 100 ~ 100 or 5 ;; 10\text{ or }100 ~ 100,10 ;; 1,000 and 2,000 ~ 1000, 2000 ;; 1,200; 300 ~ 300, 1200""",
    r"""20 and 300 ~ 20300 ;; 3 \text{ or } 400 ~ 3400 ;; 7;100 ~ 7100 ;; \{1,2\} ~ \{1,3\} ;; 1,2 ~ 1,2,3
    ;; 5 or 6 ~ 5 ;; 5 or 6 ~ 6 ;; \pm2 ~ 2 ;; \pm 2 ~ 2,2 ;; 1, 2 ~ 12
    ;; 1, 1, 2 ~ 1, 2, 2 ;; \{1,2\},\{3\} ~ \{1\},\{2,3\} ;; 1, 234 ~ 1234 ;; \emptyset ~ 0
    ;; 3\pm\sqrt2 ~ 2\pm\sqrt3 ;; \{0\} ~ \emptyset ;; 35,36 ~ 36,37"""),
    "matrices": (r"""\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
    ;; \begin{pmatrix} \frac12 \\ 0 \end{pmatrix} ~ \begin{pmatrix} 0.5 \\ 0 \\ \end{pmatrix}
    ;; \begin{pmatrix} 1 & 2 \end{pmatrix} ~ \begin{pmatrix} 1 & 4/2 \end{pmatrix}
    ;; \begin{pmatrix} x+1 \\ y \end{pmatrix} ~ \begin{pmatrix} 1+x \\ y \end{pmatrix}""",
    r"""\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
    ;; \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
    ;; \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
    ;; \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\-2\end{pmatrix}"""),
    "text": (r"""\text{Tuesday} ~ Tuesday ;; \text{(B)} ~ B ;; (B) ~ B ;; \textbf{(C)} ~ C ;; \text{Yes} ~ yes
    ;; No ~ no ;; \text{no solution} ~ No solution ;; \mathrm{B} ~ B ;; \text{all real numbers} ~ All real numbers
    ;; \text{True} ~ true ;; \text{even}. ~ even ;; 3:4 ~ 3 : 4 ;; \text{June 20} ~ June 20
    ;; \text{red and blue} ~ blue and red ;; IV ~ \text{IV} ;; 5:00 PM ~ 5:00 PM
    ;; 5:00\text{ p.m.} ~ 5:00 ;; 07:30 ~ 7:30""", r"""IV ~ VI ;; IX ~ XI ;; 5:00 PM ~ 5:00 AM ;; 5:30 PM ~ 5:30 AM
    ;; 12:00\text{ a.m.} ~ 12:00\text{ p.m.} ;; 12:00 noon ~ 12:00 midnight ;; \text{Tuesday} ~ \text{Thursday}
    ;; A ~ B ;; \text{(B)} ~ C
    ;; yes ~ no ;; \text{odd} ~ \text{even} ;; True ~ 1 ;; no ~ on ;; true ~ false ;; 3:4 ~ 4:3
    ;; \text{infinite} ~ \text{finite} ;; B ~ (A, B) ;; \text{no solution} ~ 0 ;; none ~ 0 ;; June 20 ~ June 21
    ;; no ~ n+o"""),
    "unreadable": (r"""\frac{1}{0} ~ \frac{1}{0} ;; \vec{a}+\vec{b} ~ \vec{a} + \vec{b}
    ;; \sum_{k=1}^n k ~ \sum_{k=1}^n  k ;; \overline{AB} ~ \overline{AB} ;; 9^{9^{9^9}} ~ 9^{9^{9^9}}""",
    r"""\frac{1}{0} ~ \frac{2}{0} ;;  ~  ;; \vec{a} ~ \vec{b} ;; \frac{1}{0} ~ 1 ;; 9^{9^{9^9}} ~ 9^{9^{9^8}}
    ;; nan ~ 0 ;; \infty ~ -\infty ;; \infty ~ 1000 ;; \sqrt{} ~ 0 ;; 5 ~  ;; \overline{AB} ~ AB
    ;; __import__('os') ~ 1"""),
    "as models write": (r"""2^{100}-1 ~ 1267650600228229401496703205375 ;; 3n^2+3n+1 ~ (n+1)^3-n^3
    ;; x=1 \text{ or } x=4 ~ 1,4 ;; \sqrt{1-x^2} ~ (1-x^2)^{1/2}
    ;; \sqrt{-4} ~ 2i ;; \sqrt{-3} ~ i\sqrt3 ;; \frac x2 ~ x/2 ;; x e^{-x} ~ \frac{x}{e^{x}}
    ;; 4.8 \times 10^{14}\text{ Hz} ~ 4.8e14 ;; S_n = 2^n - 1 ~ 2^n-1""",
    r"""3 to 5 ~ 5 to 3 ;; 3\text{ to }4 ~ 34 ;; 2 hours 30 minutes ~ 3 hours 20 minutes ;; 5\text{ ms} ~ 5\text{ m}
    ;; 5\text{ million} ~ 5 ;; \$5\text{ billion} ~ 5 ;; 30^\circ 15' ~ 15^\circ 30'
    ;; \sin^{-1} x ~ \frac{1}{\sin x} ;; x\sin 2 ~ \sin 2x ;; \sin x^2 ~ (\sin x)^2 ;; |xz| ~ xz
    ;; \sqrt{a^2b^2c^2} ~ abc ;; (1,2)+(3,4) ~ (1,2) ;; 2(1,2) ~ (1,2) ;; x^2 ~ 2^x ;; (-1)^n ~ -1 ;; (-1)^n ~ 1
    ;; 5\text{ hours } 30\text{ minutes} ~ 150 ;; 0.\overline{12} ~ 0.12 ;; \lfloor x \rfloor ~ x ;; 1.2.3 ~ 0.36
    ;; sin(2x) ~ 2sin(x) ;; x sin(2) ~ 2 sin(x) ;; xsin(2) ~ sin(2x) ;; log(2x) ~ 2log(x)
    ;; arctan(2x) ~ 2arctan(x) ;; f(2x) ~ 2f(x) ;; P(2x) ~ 2P(x) ;; \sqrt{z^2} ~ z
    ;; f(0)=5 ~ g(0)=5 ;; f(2x)=4 ~ 2f(x)=4 ;; 2 arctan x ~ 2 ;; 1+sec 2x ~ 1+2 sec x ;; 3\operatorname{Re}(z) ~ 3z
    ;; 2\mathbf{a} ~ 2 ;; 5\mathbf{i}+3\mathbf{j} ~ 5i+3 ;; 3\text{x}+2\text{x} ~ 5 ;; \mathbb{R}-\{0\} ~ \mathbb{R}
    ;; \text{all real numbers except } x=0 ~ 0 ;; \sqrt{x_1^2x_2^2} ~ x_1x_2 ;; x1=3 ~ x=3 ;; 10^{10} ~ 10^{1}0
    ;; 2^{2}3 ~ 2^{23} ;; 0.(3) ~ 0 ;; 2.(3) ~ 6 ;; 0.333... ~ 0.333 ;; 1, 3, 5, ... ~ 1,3,5 ;; a>b<c ~ c<b<a
    ;; sinh(2x) ~ 2sinh(x) ;; gcd(2a) ~ 2gcd(a) ;; cos(ab) ~ a cos(b) ;; 1+sin 2x ~ 1+2 sin x ;; \sqrt{1.0000000001} ~ 1
    ;; \begin{pmatrix}1\\2\end{pmatrix} ~ 1,2 ;; \pi ~ 3.14159265358979323846"""),
    "not supported": (r"""\sin 2x ~ \sin  2x ;; \ln|x|+C ~ $\ln|x|+C$""", r"""\sqrt[3]{-8} ~ -2 ;; \ln 8 ~ 3\ln 2
    ;; |3+4i| ~ 5 ;; |x-1| ~ |1-x| ;; \sin^2 x ~ (\sin x)^2 ;; \ln(x^2) ~ 2\ln x ;; \frac{\ln 3}{2} ~ \frac12\ln 3
    ;; f^{-1}(x)=x ~ x ;; 0.\overline{3} ~ \frac13 ;; 0.1\overline{6} ~ 1/6 ;; 5! ~ 120
    ;; \binom{10}{3} ~ 120 ;; \log_2 8 ~ 3 ;; \log_{10} 1000 ~ 3 ;; \sin 30^\circ ~ \frac12
    ;; \cos\frac{\pi}{3} ~ 0.5 ;; \tan^{-1} 2 ~ \arctan 2 ;; 120\degree ~ 120 ;; (n+1)! ~ (n+1)n!
    ;; \binom{n}{2} ~ \frac{n(n-1)}{2} ;; k! ~ (k)! ;; x=2,-2 ~ x=2,x=-2 ;; \cos A=\frac12 ~ \frac12
    ;; \left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right) ~ \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"""),
}
PAIRS = [(category, equal, *map(str.strip, pair.split(" ~ "))) for category, texts in CASES.items()
         for equal, text in zip((True, False), texts) for pair in text.split(";;")]

def seconds(function, *args):
    """CPU seconds of a call, the best of three: another program may get in between."""
    return min(timeit.repeat(lambda: function(*args), timer=time.process_time, number=1, repeat=3))

@pytest.mark.parametrize("category", CASES)
def test_cases(category):
    for a, b, equal in [(a, b, equal) for name, equal, a, b in PAIRS if name == category]:
        assert is_equiv(a, b) is equal and is_equiv(b, a) is equal, (a, b)
        assert all(is_equiv(side, side) for side in (a, b) if side.strip())

# Rewrites of any answer that keep its value, and of an expression or a number that change it.
PRESERVING = [lambda s: f" {s} ", lambda s: f"${s}$", lambda s: f"{s}.", lambda s: s.replace(",", ", "),
              lambda s: s.replace(r"\frac", r"\dfrac"), lambda s: s.replace("{", "{ "), lambda s: r"\displaystyle " + s,
              lambda s: s.replace("(", r"\left(").replace(")", r"\right)"), lambda s: rf"\,{s}\;"]
CHANGING = [lambda s: f"{s}+1", lambda s: f"2({s})", lambda s: f"-({s})", lambda s: f"({s})^2+7", lambda s: f"({s}, 1)",
            lambda s: rf"\{{{s}, 1\}}", lambda s: f"x>{s}", lambda s: f"{s}7", lambda s: f"1.0001({s})"]
EXPRESSIONS = [r"\frac{3}{7}", "12", "-5", "0.25", r"2\sqrt{3}", r"\frac{\pi}{3}", "3+4i", "x^2+1", r"\frac{x+1}{y}",
               r"\sqrt{x+2}", r"2^{n}", "10081", r"1\frac{1}{2}", r"\frac{-1+\sqrt{5}}{2}"]

def test_rewrites_keep_and_edits_change_the_value():
    for text in EXPRESSIONS + ["(1,2)", "[0,1)", r"\{1,2\}", "x=5", "x<3", r"\text{Tuesday}", r"5\text{ cm}"]:
        assert [is_equiv(text, rewrite(text)) for rewrite in PRESERVING] == [True] * len(PRESERVING), text
    for text in EXPRESSIONS:
        assert [is_equiv(text, edit(text)) for edit in CHANGING] == [False] * len(CHANGING), text

def test_random_numbers():
    rng = random.Random(0)
    for _ in range(300):
        a, b, k = rng.randint(1, 10 ** rng.randint(1, 30)), rng.randint(2, 10 ** 6), rng.randint(2, 99)
        assert is_equiv(f"{a:,}", str(a)) and not is_equiv(str(a), str(a + 1)) and not is_equiv(str(a), str(-a))
        assert is_equiv(rf"\frac{{{a * k}}}{{{b * k}}}", f"{a}/{b}") and not is_equiv(f"{a}/{b}", f"{a + 1}/{b}")
        assert is_equiv(rf"\sqrt{{{b * k * k}}}", rf"{k}\sqrt{{{b}}}")
        assert not is_equiv(rf"{k}\sqrt{{{b}}}", rf"{k}\sqrt{{{b + 1}}}")

PIECES = [r"\frac", r"\sqrt", r"\boxed", r"\text", r"\pm", r"\left", r"\right", r"\cdot", r"\pi", r"\infty", r"\cup",
    r"\in", r"\sin", r"\log", r"\binom", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "&", "{", "}", "(", ")", "[", "]",
    r"\{", r"\}", "|", "^", "_", "!", "=", "<", "+", "-", "*", "/", ",", ".", ";", ":", " ", "0", "1", "7", "12", "x",
    "y", "e", "i", "$", "%", "°", "cm", "and", "or", "٣", "²", "\x00", "'", "⟨", "⟦", "⦃", "¶",
    "9^{9", "1e99"]

def test_random_strings_never_raise_nor_take_long():
    rng = random.Random(0)
    for _ in range(20_000):
        a, b = ("".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(2))
        start = time.process_time()
        result = is_equiv(a, b), reward_fn(a, b), is_equiv(a, a)
        slow = time.process_time() - start > 0.05 and seconds(is_equiv, a, b) > 0.05
        assert result[2] is (normalize_answer(a) != "") and result[1] in (0.0, 1.0) and not slow, (a, b)

HOSTILE = ["9^{9^{9^9}}", "9^9^9^9^9^9^9^9", "1e999", "1e999999999", r"10^{10^{10}}", "((((2^99)^99)^99)^99)",
    r"\frac{1}{0}", "nan", "inf", "-inf", "0^{-1}", "0^0", r"\sqrt{-1}", r"\sqrt[0]{2}", r"\sqrt[x]{2}", r"\ln 0",
    "100!!!!!!", "9" * 399 + "!", "{" * 100_000 + "}" * 100_000, "(" * 150 + "1" + ")" * 150, "(" * 10 ** 6,
    "1" * 10 ** 6, "-" * 399 + "1", "x" * 400, r"\boxed" * 50_000, r"\boxed{" * 50_000, r"\frac" * 80, r"\sqrt" * 80,
    r"\sin" * 99, "2^" * 199 + "2", "1," * 199 + "1", "x," * 199 + "x", "{1," * 60 + "1" + "}" * 60, "٣", "३/४",
    "\ud800", "\x00\x01", "1\u200b", "①", "½", "__import__('os')", "{{7*7}}", "${7*7}", "%s%n", "().__class__",
    "lambda: 0", "True", "x if x else y", "[1 for _ in x]", "x:=5", "'a'*9**9",
    "+".join(f"x^{{{n}}}" for n in range(50)), "(x+y)^{60}" * 30, r"\frac{1}{3}" * 36, "10^{400}",
    "1/3^{999}+" * 36 + "1", "(1/7x+1)^{99}" * 28, "±" * 300, "1±" * 190 + "1", "|" * 400, "_" * 400, " " * 10 ** 6,
    "5 " * 200, "1 000" * 80, r"\text{" * 66, r"\overline{1}" * 30, "0." + "1" * 390, "a_1" * 130, "'" * 400,
    "+".join([r"\frac{1}{97}"] * 30), "x=" * 199 + "1", ",".join(map(str, range(130)))]

@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile(index):
    text = HOSTILE[index]
    calls = [(is_equiv, text, other) for other in ("5", text + " +1", r"\pi")] + [(normalize_answer, text)] + [
        (reward_fn, box, gold) for box, gold in ((rf"\boxed{{{text}}}", "5"), (text, text), ("", text))]
    assert all(seconds(*call) < 0.05 for call in calls)
    assert is_equiv(text, text) is (normalize_answer(text) != "")
    assert not is_equiv(text, "5")

def test_extract_boxed():
    for text, content in [
            (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2} done", "2"), (r"\boxed 5", "5"),
            (r"\boxed 52$ ok", "52"), (r"\fbox{7}", "7"), (r"\boxed{1} \fbox{2}", "2"),
            (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\{}", r"\{"), (r"\boxed{(0, \infty\}}", r"(0, \infty\}"),
            (r"\boxed {3}", "3"), (r"\boxed{}", ""), (r"\boxed{\boxed{4}}", "4"),
            (r"\boxed{x_{1}^{2}}+1}", "x_{1}^{2}"), (r"\boxed5", "5"), ("\\boxed{a\nb}", "a\nb"), ("no box: 5", None),
            (r"\boxed{5", None), (r"\boxed{1} \boxed{2", None), (r"\boxed", None), ("", None), (r"\boxedx{1}", None),
            (r"\boxed{\}", None), (r"\boxed{1}\boxed", None)]:
        assert extract_boxed(text) == content, text

def test_reward_fn():
    for completion, answer, reward in [
            (r"\boxed{5}", "5", 1), (r"\boxed{5}", 5, 1), (r"\boxed{0.5}", 0.5, 1), (r"\boxed{5}", "6", 0),
            ("5", "5", 0), (r"\boxed{6}", ["5", "6"], 1), (r"\boxed{5 \text{ or } 6}", ["5", "6"], 0),
            (r"\boxed{7}", ["5", "6"], 0), (r"\boxed{5 \text{ or } 6}", "6, 5", 1),
            (r"\boxed{\frac12}", r"Thus $x = \boxed{0.5}$.", 1), (r"\boxed{}", "", 0),
            (r"\boxed{2}", r"\boxed{1} and \boxed{2}", 1), (r"\boxed{1}", r"\boxed{1} and \boxed{2}", 0),
            (r"\boxed{5}", [], 0), (r"\boxed{5} \boxed{", "5", 0), (r"\boxed{ }", " ", 0),
            (r"\boxed{\frac10}", r"\frac10", 1), (r"\boxed{x}", r"\boxed{", 0)]:
        assert reward_fn(completion, answer) == reward and isinstance(reward_fn(completion, answer), float), completion

def test_unreadable_golds_are_known():
    for gold, readable in [
            ("5", True), (r"\text{Tuesday}", True), ("(1,2]", True), (r"\frac{1}{0}", False), ("", False),
            (r"\vec{a}", False), ("9^{9^{9^9}}", False), ("3 4", False), ("1" * 900, False)]:
        assert (read_answer(normalize_answer(gold)) is not None) is readable, gold


# ------------------------------------------------------------------------------------------------------------- eval.py

HERE = Path(ev.__file__).resolve().parent
MODEL, TEST = str(HERE / "demo" / "model"), HERE / "demo" / "test.jsonl"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # evals/ and runs/ are looked for here


def eval_run(capsys, *flags):
    """eval.main -> (exit status, stdout, the lines of stderr that eval.py itself wrote)."""
    capsys.readouterr()
    status = ev.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("eval.py:")]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_against_brute_force():
    for answers in itertools.product(["1", "2", "3", None], repeat=5):
        boxes = [a for a in answers if a is not None]
        most = max((boxes.count(a) for a in boxes), default=0)
        first = next((a for a in boxes if boxes.count(a) == most), None)  # of a tie the one seen first
        for gold in "12":
            assert ev.majority(list(answers), [int(a == gold) for a in answers]) == int(first == gold)


def test_majority_counts_equal_answers_together(monkeypatch):
    monkeypatch.setattr(ev, "is_equiv", lambda a, b: float(a) == float(b))
    assert ev.majority(["3", "3", "0.5", ".5", "5e-1"], [0, 0, 1, 1, 1]) == 1
    assert ev.majority(["3", "3", "0.5", ".5", None], [0, 0, 1, 1, 0]) == 0
    assert ev.majority([None, "", None], [0, 0, 0]) == 0


def test_paired_test_against_a_hand_computed_case_and_all_signs():
    # McNemar, 8 problems won and 2 lost: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024
    assert ev.sign_flip_p([1] * 8 + [-1] * 2 + [0] * 50) == pytest.approx(112 / 1024)
    assert ev.sign_flip_p([1] * 6) == ev.sign_flip_p([-1] * 6) == pytest.approx(2 / 64)
    assert ev.sign_flip_p([]) == ev.sign_flip_p([0, 0]) == ev.sign_flip_p([3, -3]) == 1
    rng = random.Random(0)
    for _ in range(20):
        d = [rng.randint(-4, 4) for _ in range(8)]
        flips = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=8)]
        assert ev.sign_flip_p(d) == pytest.approx(sum(f >= abs(sum(d)) for f in flips) / len(flips))


def row(number, correct, tokens, truncated, extracted):
    return dict(id=number, correct=correct, tokens=tokens, truncated=truncated, extracted=extracted)


def test_figures_and_differences_by_hand():
    base = [row(0, [1, 0], [10, 20], [False, True], ["1", None]), row(1, [0, 0], [4, 6], [False] * 2, ["2", "3"])]
    values = ev.figures(base)
    assert values == {"avg@2": [50, 0], "pass@2": [100, 0], "maj@2": [100, 0], "response tokens": [15, 5],
                      "truncated": [50, 0], "no box": [50, 0]}
    assert list(ev.figures([row(0, [1], [3], [False], ["1"])])) == ["pass@1", "response tokens", "truncated", "no box"]
    assert {"pass@2", "pass@4", "pass@6"} <= ev.figures([row(0, [1] * 6, [3] * 6, [False] * 6, ["1"] * 6)]).keys()
    assert ev.mean_se([1, 2, 6]) == pytest.approx((3, (14 / 2 / 3) ** 0.5))
    later = {name: [v + 10 for v in column] for name, column in values.items()}
    (a, a_se), (b, b_se), (gain, gain_se) = ev.side_by_side([values, later])["avg@2"]
    assert (a, b, gain, gain_se) == (25, 35, 10, 0) and a_se == b_se == pytest.approx(25)  # paired: no noise left
    table = {name: [(1.0, 3.0), (2.0, 4.0)] for name in values}
    assert ev.average([table, table])["no box"] == [(1.0, pytest.approx(18 ** 0.5 / 2)), (2.0, pytest.approx(8 ** 0.5))]
    few, many = dict(later, **{"avg@2": [100, 0]}), {name: column * 20 for name, column in later.items()}
    assert "avg@2 inside the noise" in ev.verdict("B", values, few, 2)
    assert "avg@2 beyond the noise" in ev.verdict("B", {n: c * 20 for n, c in values.items()}, many, 10)


def test_registry_rows_are_well_formed():
    for name, (source, question, answer) in ev.BENCHMARKS.items():
        assert question and answer and (Path(source).is_file() if name == "demo" else source.count(":") == 2)
        assert name == "demo" or source.count("/") == 1
        assert name in next(line for line in ev.__doc__.splitlines() if "--benchmarks    " in line)


@pytest.fixture
def stub(monkeypatch):
    """A sampler whose i-th answer is \\boxed{9} where the question's i-th word is right."""
    def sample(model, prompts, branching, step_lens, decoding):
        return [Node([0], children=[Node([1] * (2 + i), done=i != 1) for i in range(branching[0])], question=q)
                for q, prompt in enumerate(prompts)]
    def graded(trees, questions, tokenizer):
        leaves, texts = [leaf for tree in trees for leaf in tree.children], []
        for tree in trees:
            for i, leaf in enumerate(tree.children):
                right = questions[tree.question]["question"].split()[i] == "right"
                texts.append("\\boxed{9}" if right else "\\boxed{8}" if i % 2 else "none")
                leaf.reward = float(right)
        return leaves, texts
    monkeypatch.setattr(ev, "sample_trees", sample)
    monkeypatch.setattr(ev, "grade", graded)


def test_known_answers_give_exactly_the_known_score(empty, stub, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(ev, "side_by_side", lambda models, real=ev.side_by_side: seen.extend(models) or real(models))
    asked = ["right wrong", "wrong wrong", "right right", "wrong right " + "x " * 900]
    Path("known.jsonl").write_text("".join(json.dumps(dict(question=q, answer="9")) + "\n" for q in asked))
    status, out, _ = eval_run(capsys, "--model", MODEL, "--benchmarks", "known.jsonl", "--out", "o", "--samples", 2,
                              "--temperature", 1, "--max-new-tokens", 64)
    folder, = Path("o").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    means = {name: mean for name, (mean, _) in summary["results"].items()}
    # the last prompt is too long: wrong, cut, without a box and without a token
    assert status == 0 and means == {"avg@2": 37.5, "pass@2": 50, "maj@2": 50, "response tokens": 15 / 8,
                                     "truncated": 62.5, "no box": 37.5}
    assert seen[0]["avg@2"] == [50, 0, 100, 0]  # in the order of the data, so that every model's can be paired
    assert "37.5 ± 23.9" in out and "1.88 ± 0.62" in out and "known.jsonl, 4 problems" in out
    assert summary["protocol"]["prompts_too_long"] == 1
    found = {r["id"]: r for r in map(json.loads, (folder / "problems.jsonl").open())}
    assert found[0] == dict(id=0, question="right wrong", gold="9", outputs=["\\boxed{9}", "\\boxed{8}"],
                            extracted=["9", "8"], correct=[1, 0], tokens=[2, 3], truncated=[False, True])
    assert {"model", "revision", "template", "decoding", "max_new_tokens", "torch", "transformers", "python", "seed",
            "dataset", "fingerprint"} <= summary["protocol"].keys()
    assert all(f"{key} {json.dumps(value)}"[:30] in " ".join(out.split()) for key, value in summary["protocol"].items())


SAMPLED = ["--model", MODEL, "--samples", "2", "--temperature", "1", "--max-rows", "6", "--limit", "8", "--out", "o"]


def test_killed_at_any_byte_of_interest_it_ends_in_the_same_file_and_table(empty, capsys, monkeypatch):
    assert eval_run(capsys, *SAMPLED)[0] == 0
    status, table, _ = eval_run(capsys, *SAMPLED)  # nothing left to answer
    path, = Path("o").glob("*/problems.jsonl")
    whole, summary = path.read_bytes(), (path.parent / "summary.json").read_bytes()
    assert whole.count(b"\n") == 8 and len({line[:30] for line in whole.splitlines()}) == 8
    asked, real = [], ev.answer
    monkeypatch.setattr(ev, "answer", lambda job, batch: asked.append(len(batch)) or real(job, batch))
    ends = list(itertools.accumulate(len(line) for line in whole.splitlines(True)))
    for done, end in enumerate([0] + ends):
        for cut in {end, max(0, end - 1), max(0, end - 40)}:
            asked.clear()
            path.write_bytes(whole[:cut])
            assert eval_run(capsys, *SAMPLED)[:2] == (0, table)
            assert path.read_bytes() == whole and (path.parent / "summary.json").read_bytes() == summary
            kept = 8 if cut == len(whole) else whole[:cut].count(b"\n") // 3 * 3
            assert sum(asked) == 8 - kept  # batches of 3: whole ones are never answered again


def test_lines_of_two_runs_at_once_are_not_taken_for_answers(empty, capsys):
    flags = ["--model", MODEL, "--limit", "8", "--max-rows", "2", "--out", "o"]
    table = eval_run(capsys, *flags)[1]
    path, = Path("o").glob("*/problems.jsonl")
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(line for pair in zip(lines[::2], lines[1::2]) for line in pair * 2))  # each batch twice
    summary = (path.parent / "summary.json").read_bytes()
    assert eval_run(capsys, *flags)[:2] == (0, table) and path.read_bytes() == b"".join(lines)
    assert (path.parent / "summary.json").read_bytes() == summary


def test_problems_of_the_same_text_get_answers_of_their_own(empty, capsys):
    row = (HERE / "demo/test.jsonl").read_text().splitlines(True)[0]
    Path("same.jsonl").write_text(row * 4)
    flags = ["--benchmarks", "same.jsonl", "--samples", 4, "--temperature", 1, "--max-new-tokens", 64, "--max-rows", 4]
    assert eval_run(capsys, "--model", MODEL, *flags, "--out", "o")[0] == 0
    rows = [json.loads(line)["outputs"] for line in next(Path("o").glob("*/problems.jsonl")).read_text().splitlines()]
    assert len(rows) == 4 and len({json.dumps(outputs) for outputs in rows}) == 4


def test_revision_is_the_commit_of_a_hub_model_and_else_the_files(tmp_path, monkeypatch):
    """A hub cache as the hub's own library lays it out, with two commits of one model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(ev.transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(MODEL, tmp_path / "models--org--toy/snapshots" / commit)
        (tmp_path / "models--org--toy/refs").mkdir(exist_ok=True)
        (tmp_path / "models--org--toy/refs/main").write_text(commit)
        assert ev.revision("org/toy") == commit
    shutil.copytree(MODEL, tmp_path / "folder")
    assert ev.revision(MODEL) == ev.revision(tmp_path / "folder") and len(ev.revision(MODEL)) == 16
    (tmp_path / "folder/config.json").write_text("{}")
    assert ev.revision(MODEL) != ev.revision(tmp_path / "folder")


def test_a_full_memory_is_named_and_other_faults_are_not_hidden(empty, capsys, monkeypatch):
    for message, status in (("DefaultCPUAllocator: can't allocate memory", 2), ("a fault", None)):
        def fail(*args):
            raise RuntimeError(message)
        monkeypatch.setattr(ev, "answer", fail)
        if status:
            assert eval_run(capsys, "--limit", 2)[0] == 2
        else:
            with pytest.raises(RuntimeError, match="a fault"):
                eval_run(capsys, "--limit", 2)


def test_a_real_kill_and_ctrl_c(empty, capsys, monkeypatch):
    flags = ["--model", MODEL, "--max-rows", "1", "--limit", "40", "--out", "o"]
    process = subprocess.Popen([sys.executable, HERE / "eval.py", *flags], stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(p.stat().st_size > 500 for p in Path("o").glob("*/problems.jsonl")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    path, = Path("o").glob("*/problems.jsonl")
    asked, real = [], ev.answer
    def interrupted(job, batch):
        asked.append(batch)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(job, batch)
    with monkeypatch.context() as patch:
        patch.setattr(ev, "answer", interrupted)
        status, out, lines = eval_run(capsys, *flags)
    assert (status, out, len(lines)) == (130, "", 1) and 3 < path.read_bytes().count(b"\n") < 40
    assert eval_run(capsys, *flags)[0] == eval_run(capsys, "--model", MODEL, "--limit", 40, "--out", "p")[0] == 0
    assert path.read_bytes() == next(Path("p").glob("*/problems.jsonl")).read_bytes()


def test_tables_are_the_same_byte_for_byte(empty, capsys):
    flags = ["--model", MODEL, MODEL, "--limit", 24, "--samples", 2, "--temperature", 1]
    one = eval_run(capsys, *flags, "--out", "o")[1]
    two = eval_run(capsys, *flags, "--out", "p")[1]
    assert one == two.replace("p/", "o/") and "+0.0 ± 0.0" in one and "inside the noise" in one and "p = 1)" in one
    assert eval_run(capsys, *flags, "--out", "q", "--seed", 1)[1].partition("\nq/")[0] != one.partition("\no/")[0]
    greedy = [eval_run(capsys, "--model", MODEL, "--limit", 40, "--max-rows", n, "--out", n)[1] for n in (1, 7, 256)]
    assert len({text.partition("demo-model-demo")[0].rpartition("\n")[0] for text in greedy}) == 1
    assert len({path.read_bytes() for path in Path().glob("[127]*/*/problems.jsonl")}) == 1


def test_models_are_found(empty, capsys):
    assert ev.find_models(None) == [MODEL]
    assert "no run with a whole checkpoint under runs/" in eval_run(capsys, "--limit", 2)[1].splitlines()[1]
    for i, (run, step) in enumerate((("a", 4), ("b", 20), ("b", 100), ("b", 300))):
        folder = Path("runs") / run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "x").write_text("four")
        (folder / "manifest.txt").write_text("4 x" if step < 300 else "5 x")  # the last one is damaged
        os.utime(folder, (step, step))
    assert ev.find_models(None) == [MODEL, "runs/b/checkpoint-100"] and ev.find_models(["runs/a", "org/model"]) == [
        "runs/a/checkpoint-4", "org/model"]


@pytest.mark.parametrize("flags", [
    "--benchmarks math501", "--benchmarks gone.jsonl", "--benchmarks empty.jsonl", "--benchmarks torn.jsonl",
    "--benchmarks other.jsonl", "--model gone", "--model run", "--model", "--samples 0", "--samples x", "--samples 2",
    "--limit -1", "--max-rows 0", "--max-new-tokens 0", "--max-new-tokens 512", "--temperature -1", "--temperature nan",
    "--temperature 1e-40",
    "--template gone.txt", "--device tpu", "--no-such-flag", "--out empty.jsonl"])
def test_bad_input_exits_2_with_one_line_before_any_answer(empty, capsys, monkeypatch, flags):
    Path("empty.jsonl").write_text("")
    Path("torn.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"quest')
    Path("other.jsonl").write_text('{"q": "1+1?", "a": "2"}\n')
    Path("run").mkdir()
    Path("run/config.json").write_text('{"model": "x"}')
    Path("run/metrics.jsonl").write_text("")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(ev, "answer", None)
    status, out, lines = eval_run(capsys, *flags.split())
    assert status == 2 and out == "" and len(lines) == 1
    assert flags.split()[-1] in lines[0] and all(name in lines[0] for name in ev.BENCHMARKS if "math501" in flags)


def test_another_protocol_in_the_folder_is_named(empty, capsys):
    flags = ["--model", MODEL, "--limit", 4, "--out", "o"]
    assert eval_run(capsys, *flags)[0] == 0
    for extra, key in (("--seed 1", "seed"), ("--max-new-tokens 63", "max_new_tokens"), ("--limit 3", "problems"),
                       ("--samples 2 --temperature 1", "samples")):
        status, _, lines = eval_run(capsys, *flags, *extra.split())
        assert status == 2 and len(lines) == 1 and f"answers with {key}" in lines[0]
    assert eval_run(capsys, *flags, "--max-rows", 2)[0] == 0  # greedy: the same answers
    flags[-1] = "p"  # but in bfloat16 the rows beside an answer decide its rounding
    assert eval_run(capsys, *flags, "--dtype", "bfloat16")[0] == 0
    status, _, lines = eval_run(capsys, *flags, "--dtype", "bfloat16", "--max-rows", 2)
    assert status == 2 and "answers with max_rows" in lines[0]
    next(Path("p").glob("*/summary.json")).write_text("")  # no harm to the answers, but nobody knows whose they are
    status, _, lines = eval_run(capsys, *flags, "--dtype", "bfloat16")
    assert status == 2 and len(lines) == 1 and "summary.json cannot be read" in lines[0]


def test_files_of_one_name_have_folders_of_their_own(empty, capsys):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(HERE / "demo/test.jsonl", Path(folder, "test.jsonl"))
    assert eval_run(capsys, "--model", MODEL, "--benchmarks", "a/test.jsonl", "b/test.jsonl", "--limit", 2, "--out",
                    "o")[0] == 0
    assert len([*Path("o").glob("*/problems.jsonl")]) == 2


def test_a_missing_hub_benchmark_does_not_stop_the_others(empty, capsys, monkeypatch):
    def load(source, *columns, real=ev.load_questions, **options):
        if "MATH-500" in source:
            raise BadInput(f"cannot read {source}\n(ConnectionError)")
        return real(source, *columns, **options)
    monkeypatch.setattr(ev, "load_questions", load)
    status, out, lines = eval_run(capsys, "--model", MODEL, "--benchmarks", "math500", "demo", "--limit", 3)
    assert status == 1 and "demo, 3 problems" in out and len(lines) == 1
    assert "math500 is missing" in lines[0] and "local copy" in lines[0]
    assert eval_run(capsys, "--model", MODEL, "--benchmarks", "math500")[::2] == (1, lines)


# ----------------------------------------------------------------------------------------- the command line, whole runs

TIMINGS = ("tok_per_s", "time_sample", "time_score", "time_update", "peak_mem_gb")
SMALL = ["--questions-per-step", "6", "--steps", "4", "--save-every", "1", "--eval-every", "2", "--eval-questions", "6",
         "--eval-samples", "2", "--lr", "1e-3", "--keep", "9"]


def run(*flags):
    """treerpo.main in this process, argparse's own exits included -> exit status."""
    try:
        return treerpo.main([str(flag) for flag in flags])
    except SystemExit as e:
        return e.code


def metrics(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One short demo run with every output, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("--out", out, "--dump-trees", out.parent / "trees.jsonl", *SMALL) == 0
    return out


def test_metrics_have_the_promised_keys_and_steps(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = {"reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio",
                "no_answer_ratio", "entropy", "clip_ratio", "grad_norm", "lr", "tokens_sampled", "questions_seen",
                *TIMINGS}
    assert all(promised <= row.keys() for row in rows[1:])
    evaluated = [("eval/accuracy" in row, "eval/greedy_accuracy" in row) for row in rows]
    assert evaluated == [(s % 2 == 0,) * 2 for s in range(5)]
    assert [row["questions_seen"] for row in rows[1:]] == [6, 12, 18, 24]
    assert [row["lr"] for row in rows[1:]] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])  # linear warm-up over 5 steps
    assert json.loads((finished_run / "config.json").read_text())["seed"] == 0


def test_dump_can_be_recomputed(finished_run):
    """Backup, advantages, texts, token counts and metrics all follow from the dumped nodes."""
    rows = metrics(finished_run)
    nodes = [json.loads(line) for line in (finished_run.parent / "trees.jsonl").read_text().splitlines()]
    assert {node["step"] for node in nodes} == {1, 2, 3, 4}
    tokens_so_far = 0
    for row in rows[1:]:
        step = {node["id"]: node for node in nodes if node["step"] == row["step"]}
        children = {i: [n for n in step.values() if n["parent"] == i] for i in step}
        roots = [n for n in step.values() if n["parent"] is None]
        assert len(roots) == 6 and sorted(n["tree"] for n in roots) == list(range(6))
        for n in step.values():
            group = children[n["id"]]
            if group:
                assert n["reward"] == pytest.approx(sum(c["reward"] for c in group) / len(group), abs=1e-12)
                mu = n["reward"]
                for c in group:  # bernoulli
                    flat = max(g["reward"] for g in group) - min(g["reward"] for g in group) < 1e-9
                    expected = 0 if flat else (c["reward"] - mu) / (mu * (1 - mu)) ** 0.5
                    assert c["advantage"] == pytest.approx(expected, abs=1e-9)
                    assert c["trained"] == (abs(expected) > 1e-12) and c["depth"] == n["depth"] + 1
            elif n["parent"] is not None:
                text, up = "", n
                while up is not None:
                    text, up = up["text"] + text, step.get(up["parent"])
                assert n["reward"] == treerpo.reward_fn(text, n["answer"])
                assert n["done"] or n["depth"] == 4
        tokens_so_far += sum(len(n["tokens"]) for n in step.values() if n["parent"] is not None)
        assert row["tokens_sampled"] == tokens_so_far
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in roots) / 6)


def test_checkpoint_is_a_plain_hugging_face_folder(finished_run):
    folder = finished_run / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (folder, treerpo.HERE / "demo/model")]
    assert tokenizers[0].encode("Tom") == tokenizers[1].encode("Tom")
    original = json.loads((treerpo.HERE / "demo/model/generation_config.json").read_text())
    saved = json.loads((folder / "generation_config.json").read_text())
    for config in (original, saved):
        config.pop("transformers_version", None)
    assert saved == original and not same_weights(folder, treerpo.HERE / "demo/model")
    assert model.dtype == torch.float32


def test_same_seed_same_run_other_seed_other_run(finished_run, tmp_path):
    assert run("--out", tmp_path / "again", *SMALL) == 0
    assert metrics(tmp_path / "again") == metrics(finished_run)
    assert same_weights(tmp_path / "again/checkpoint-4", finished_run / "checkpoint-4")
    assert run("--out", tmp_path / "other", "--seed", "1", *SMALL) == 0
    assert metrics(tmp_path / "other")[1] != metrics(finished_run)[1]


def test_resume_is_bit_exact_and_takes_more_steps(finished_run, tmp_path):
    """Weights, Adam moments, random stream, data order and counters all continue."""
    flags = [f if f != "4" else "2" for f in SMALL]
    assert run("--out", tmp_path / "a", "--dump-trees", tmp_path / "d.jsonl", *flags) == 0
    assert run("--resume", tmp_path / "a", "--steps", "4") == 0
    first, second = metrics(finished_run), metrics(tmp_path / "a")
    assert second == first
    assert same_weights(tmp_path / "a/checkpoint-4", finished_run / "checkpoint-4")
    assert (tmp_path / "d.jsonl").read_bytes() == (finished_run.parent / "trees.jsonl").read_bytes()


def test_resume_refuses_other_flags_and_names_them(finished_run, capsys):
    assert run("--resume", finished_run, "--lr", "1e-3") == 0  # the run's own value is fine
    assert run("--resume", finished_run, "--lr", "2e-3") == 2
    assert "--lr" in capsys.readouterr().err
    assert run("--resume", finished_run, "--steps", "3") == 2
    assert "--steps" in capsys.readouterr().err
    before = (finished_run.parent / "trees.jsonl").read_bytes()  # another file would be cut to this one's size
    assert run("--resume", finished_run, "--dump-trees", finished_run.parent / "other.jsonl") == 2
    assert "--dump-trees" in capsys.readouterr().err and (finished_run.parent / "trees.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_does_not_push_out_whole_ones(finished_run, tmp_path):
    """The checkpoints kept are the newest up to this step: a damaged one of a later step is not among them."""
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    for n in (3, 4):
        (out / f"checkpoint-{n}/model.safetensors").write_bytes(b"")
    stop, real = [], treerpo.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(treerpo, "save_checkpoint", lambda *args: (real(*args), stop.append(1), 1 / 0))
        with pytest.raises(ZeroDivisionError):  # stops the resumed run right after it has saved step 3
            run("--resume", out, "--keep", "1")
    assert stop and treerpo.newest_checkpoint(out) == out / "checkpoint-3"


@pytest.mark.parametrize("damage, file", [
    ("missing", "trainer_state.pt"), ("empty", "trainer_state.pt"), ("truncated", "trainer_state.pt"),
    ("truncated", "model.safetensors"), ("missing", "tokenizer.json"), ("empty", "config.json"),
    ("truncated", "manifest.txt"), ("missing", "manifest.txt")])
def test_damaged_checkpoint_is_named_and_the_one_before_used(finished_run, tmp_path, capsys, damage, file):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    victim = out / "checkpoint-4" / file
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"" if damage == "empty" else victim.read_bytes()[:-1])
    assert run("--resume", out) == 0
    assert "checkpoint-4 is damaged" in capsys.readouterr().err
    assert same_weights(out / "checkpoint-4", finished_run / "checkpoint-4") and metrics(out) == metrics(finished_run)
    for folder in out.glob("checkpoint-*"):
        (folder / "model.safetensors").write_bytes(b"")
    assert run("--resume", out) == 2
    assert "no whole checkpoint" in capsys.readouterr().err


def start(*flags, **kwargs):
    return subprocess.Popen([sys.executable, treerpo.__file__, *map(str, flags)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, cwd=kwargs.pop("cwd", None), **kwargs)


def wait_for_step(out, step):
    while not (out / "metrics.jsonl").exists() or f'"step": {step}' not in (out / "metrics.jsonl").read_text():
        time.sleep(0.01)


def test_killed_five_times_nothing_is_lost(finished_run, tmp_path):
    """SIGKILL at five instants; resumed each time. experiments/torture.py does it 50 times and more."""
    out, draw = tmp_path / "run", random.Random(0)
    process = start("--out", out, *SMALL)
    for kill in range(5):
        wait_for_step(out, min(kill, 3))
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        process = start("--resume", out)
    assert process.wait() == 0
    process.communicate()
    assert metrics(out) == metrics(finished_run)
    assert same_weights(out / "checkpoint-4", finished_run / "checkpoint-4")
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl",
                                               *(f"checkpoint-{n}" for n in (1, 2, 3, 4))}


def test_ctrl_c_saves_the_finished_step(finished_run, tmp_path):
    out = tmp_path / "run"
    process = start("--out", out, *[f if f != "1" else "100" for f in SMALL[:-2]])
    wait_for_step(out, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    (saved,) = out.glob("checkpoint-*")
    assert metrics(out)[-1]["step"] == int(saved.name[11:])
    assert run("--resume", out) == 0
    assert metrics(out) == metrics(finished_run)


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    """A file-size limit that the optimizer state exceeds stands for a full disk."""
    out = tmp_path / "run"
    assert run("--out", out, *[f if f != "4" else "1" for f in SMALL]) == 0
    before = {p.name: p.read_bytes() for p in (out / "checkpoint-1").iterdir()}
    limit = (out / "checkpoint-1/model.safetensors").stat().st_size + 5000
    process = start("--resume", out, "--steps", "2", preexec_fn=lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    _, err = process.communicate()
    assert process.returncode == 1 and "cannot write" in err and "checkpoint-2" in err
    assert {p.name: p.read_bytes() for p in (out / "checkpoint-1").iterdir()} == before
    assert [p.name for p in out.glob("checkpoint*")] == ["checkpoint-1"]
    assert run("--resume", out, "--steps", "2") == 0  # there is room again
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


@pytest.mark.parametrize("poisoned", ["policy_loss", "token_logps"])
def test_a_loss_that_is_not_finite_is_skipped_then_stops(tmp_path, monkeypatch, poisoned):
    whole = getattr(treerpo, poisoned)

    def poison(*args):
        result = whole(*args)
        return result * math.inf if poisoned == "token_logps" else (result[0] * math.nan, *result[1:])
    monkeypatch.setattr(treerpo, poisoned, poison)
    with pytest.raises(FloatingPointError, match="three steps"):
        treerpo.main(["--out", str(tmp_path / "run"), *SMALL])
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows[1:]] == [1, 2, 3]
    assert all(len(row["skipped_questions"]) == 6 for row in rows[1:])
    assert same_weights(tmp_path / "run/checkpoint-3", treerpo.HERE / "demo/model")
    with pytest.raises(FloatingPointError):  # resumed, it stops at the next one
        treerpo.main(["--resume", str(tmp_path / "run"), "--steps", "9", "--save-every", "9"])
    assert [row["skipped"] for row in metrics(tmp_path / "run")[1:]] == [1, 2, 3, 4]
    assert (tmp_path / "run/checkpoint-4").exists()  # the message names it


def test_out_of_memory_names_the_flags(tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(treerpo, "sample_trees", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        treerpo.main(["--out", str(tmp_path / "run"), *SMALL])
    assert "--max-rows (now 2048)" in caught.value.__notes__[0]


def test_a_few_steps_raise_the_reward(tmp_path):
    """The demo learns: 8 steps of 32 questions, at twice the demo's rate, must clearly beat the base model."""
    assert run("--out", tmp_path / "run", "--steps", "12", "--eval-every", "12", "--eval-questions", "100") == 0
    rows = metrics(tmp_path / "run")
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.15


@pytest.mark.parametrize("algo", ["grpo", "gspo", "treeadv"])
def test_every_algo_runs_end_to_end(tmp_path, algo):
    """Including two updates a batch, both advantages' sum and level weights."""
    extra = ["--advantage", "both", "--level-weight", "levels"] if algo == "treeadv" else []
    assert run("--algo", algo, "--out", tmp_path / "run", "--updates-per-batch", "2", *SMALL, "--steps", "1",
               *extra) == 0
    row = metrics(tmp_path / "run")[-1]
    assert row["grad_norm"] > 0 and row["clip_ratio"] >= 0
    assert not same_weights(tmp_path / "run/checkpoint-1", treerpo.HERE / "demo/model")


def test_own_data_without_eval_data_holds_out_every_fifth_question(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (treerpo.HERE / "demo/train.jsonl").read_text().splitlines()[:11]]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts, real = [], treerpo.fit_context
    monkeypatch.setattr(treerpo, "fit_context", lambda *args: parts.append(real(*args)) or parts[-1])
    assert run("--data", tmp_path / "own.jsonl", "--out", tmp_path / "run", *SMALL, "--steps", "1") == 0
    assert [[q["id"] for q in part] for part in parts] == [[1, 2, 3, 4, 6, 7, 8, 9], [0, 5, 10]]


def test_the_bf16_sampling_copy_follows_every_update(tmp_path, monkeypatch):
    """Sampling and evaluation use the copy; after a step it holds the trained float32 weights, rounded."""
    used, real = [], treerpo.sample_trees
    def record(model, *args):
        used.append({name: p.clone() for name, p in model.named_parameters()})
        return real(model, *args)
    monkeypatch.setattr(treerpo, "sample_trees", record)
    assert run("--out", tmp_path / "run", "--dtype", "mixed", "--grad-checkpointing", *SMALL, "--steps", "2",
               "--eval-every", "1") == 0
    # calls: 0, 1 the evaluation before training; 2 step 1; 3, 4 evaluation; 5 step 2; 6, 7 evaluation
    for checkpoint, call in ((1, 3), (1, 4), (1, 5), (2, 6), (2, 7)):
        saved = load_file(tmp_path / f"run/checkpoint-{checkpoint}/model.safetensors")
        assert all(p.dtype == torch.float32 and used[call][name].equal(p.bfloat16()) for name, p in saved.items())
    assert not same_weights(tmp_path / "run/checkpoint-1", treerpo.HERE / "demo/model")


def test_print_tree_escapes_what_a_terminal_would_obey(capsys):
    node = treerpo.Node([1], reward=1.0)
    node.children = [treerpo.Node([2], node, reward=1.0)]

    class Tokenizer:
        def decode(self, ids, **_):
            return "\x1b[2J\x07ok\n" * len(ids)
    shown = treerpo.render_tree(node, Tokenizer())
    assert "\x1b" not in shown and "\x07" not in shown and "\\x1b[2J\\x07ok\\n" in shown


def test_demo_needs_no_network(tmp_path, monkeypatch):
    def blocked(*args, **kwargs):
        raise AssertionError("the demo opened a socket")
    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    assert run("--out", tmp_path / "run", *SMALL, "--steps", "1") == 0


def test_of_two_runs_begun_in_one_second_the_later_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(treerpo.time, "strftime", lambda form: "20260101-000000")
    Path("runs/treerpo-20260101-000000").mkdir(parents=True)
    assert run(*SMALL, "--steps", "1") == 2
    assert "--out" in capsys.readouterr().err and not [*Path("runs/treerpo-20260101-000000").iterdir()]


def test_one_level_means_whole_answers():
    """Depth 1, however it is asked for, has the budget of the default tree's whole path unless --step-len is given."""
    for flags in (["--branching", "8"], ["--branch-at", "entropy"], ["--algo", "grpo"], ["--algo", "treeadv"]):
        args = treerpo.parse_args(flags)
        assert args.branching == [8] and args.step_len == [56]
        assert treerpo.parse_args([*flags, "--step-len", "9"]).step_len == [9]
        assert treerpo.parse_args(["--model", "x", *flags]).step_len == [1152]
    assert treerpo.parse_args([]).step_len == [14] and treerpo.parse_args(["--branching", "2", "2"]).step_len == [14]


@pytest.mark.parametrize("status", [200, 404, 429])
def test_a_hub_that_answers_at_all_is_reachable(monkeypatch, status):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()
        do_GET = do_HEAD
        log_message = lambda *args: None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        treerpo.use_hub_or_cache()
        assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
        server.shutdown()
    treerpo.use_hub_or_cache()  # nobody listens there any more
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_help_lists_every_flag(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)", treerpo.__doc__, re.M)
    assert len(flags) >= 35 and all(flag in text for flag in flags)


BAD = {
    "model folder": (["--model", "no/such/folder/at/all"], "--model"),
    "model hub": (["--model", "Qwen/Qwen2.5-Math-1.5B", "--data", "fine.jsonl"], "--model"),
    "data hub": (["--data", "nlile/hendrycks-MATH-benchmark"], "nlile/hendrycks-MATH-benchmark"),
    "resume a checkpoint": (["--resume", MODEL], "--resume"), "torn run": (["--resume", "broken"], "--resume"),
    "resume a list": (["--resume", "odd"], "--resume"),
    "no EOS": (["--model", "no-eos", "--data", "fine.jsonl", "--eval-data", "fine.jsonl"], "eos_token"),
    "no words": (["--model", "no-words", "--data", "fine.jsonl", "--eval-data", "fine.jsonl"], "tokenizer.json"),
    "data missing": (["--data", "none.jsonl"], "none.jsonl"),
    "data empty": (["--data", "empty.jsonl"], "empty.jsonl"),
    "data not JSON": (["--data", "torn.jsonl"], "torn.jsonl line 2"),
    "no column": (["--data", "columns.jsonl"], "--question-column"),
    "empty answer": (["--data", "answers.jsonl"], "answers.jsonl row 1"),
    "branching": (["--branching", "0"], "--branching"), "negative": (["--step-len", "-3"], "--step-len"),
    "lengths": (["--branching", "2", "2", "--step-len", "4", "4", "4"], "--step-len"),
    "context": (["--step-len", "100000"], "--step-len"),
    "grpo depth": (["--algo", "grpo", "--branching", "2", "2"], "--branching"),
    "run there": (["--out", "taken"], "--resume"), "no run": (["--resume", "."], "--resume"),
    "unwritable": (["--out", "/proc/none/run"], "--out"), "cuda": (["--device", "cuda"], "--device cpu"),
    "temperature": (["--temperature", "0"], "--temperature"), "lr": (["--lr", "-1"], "--lr"),
    "nan": (["--lr", "nan"], "--lr"),
    "choice": (["--algo", "ppo"], "--algo"), "std": (["--min-group-std", "-1"], "--min-group-std"),
    "template": (["--template", "no-such-file"], "--template"),
    "trees": (["--algo", "treeadv", "--leaves", "2"], "--trees"), "seed": (["--seed", "9" * 20], "--seed"),
    "torn weights": (["--model", "torn-model", "--data", "fine.jsonl", "--eval-data", "fine.jsonl"], "torn-model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_2_with_a_short_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    question = '{"question": "1+1?", "answer": "2"}\n'
    for file, text in {"empty": "", "fine": question, "torn": question + "{", "columns": '{"q": 1}\n',
                       "answers": '{"question": "x", "answer": ""}\n'}.items():
        Path(f"{file}.jsonl").write_text(text)
    Path("taken").mkdir()
    Path("taken/config.json").write_text("{}")
    for folder, text in (("broken", "{"), ("odd", "[]")):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(text)
    shutil.copytree(MODEL, "no-eos")
    Path("no-eos/tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": null}')
    shutil.copytree(MODEL, "no-words", ignore=shutil.ignore_patterns("tokenizer.json"))
    shutil.copytree(MODEL, "torn-model")
    with open("torn-model/model.safetensors", "ab") as file:
        file.truncate(100_000)
    flags, named = BAD[name]
    assert run(*flags) == 2
    err = capsys.readouterr().err
    assert named in err and "Traceback" not in err and len(err.strip().splitlines()) <= 3
