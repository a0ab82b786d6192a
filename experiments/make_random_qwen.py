"""Writes a checkpoint with the shape of Qwen2.5-Math-1.5B (or a smaller one) and random weights, without any download.

    python experiments/make_random_qwen.py --size 1.5b --out runs/random-1.5b       # 3 GB in bfloat16

Speed and memory are those of the real model; the text is noise. Random weights rarely stop early, so that nearly every
tree is full: the worst case. The tokenizer reads a text as one token a byte.
"""
import argparse
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SIZES = {"1.5b": dict(hidden=1536, layers=28, heads=12, kv_heads=2, ffn=8960, vocab=151936),
         "0.5b": dict(hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocab=151936),
         "tiny": dict(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=1024)}
PADDING = 271  # ids at the end of Qwen's embedding matrix that its tokenizer does not know: 151,936 - 151,665


def make_tokenizer(known):
    """Qwen's own kind, byte-level, without merges: 256 bytes, made-up words, and the EOS as id known - 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet + [f"w{i}" for i in range(len(alphabet), known - 1)])}
    return Qwen2Tokenizer(vocab=vocab | {"<|endoftext|>": known - 1}, merges=[], padding_side="left")


def make_model(hidden, layers, heads, kv_heads, ffn, vocab, eos=None, dtype=torch.float32, seed=0):
    """A Qwen2 of this shape with random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocab,
                         num_key_value_heads=kv_heads, intermediate_size=ffn, max_position_embeddings=4096,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=eos, pad_token_id=None, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1.5b", help="shape of the model (default 1.5b)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args()
    shape = SIZES[args.size]
    known = shape["vocab"] - PADDING
    model = make_model(**shape, eos=known - 1, dtype=torch.bfloat16, seed=args.seed)
    model.save_pretrained(args.out)
    make_tokenizer(known).save_pretrained(args.out)
    size = sum(p.stat().st_size for p in Path(args.out).iterdir()) / 1e9
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {size:.2f} GB")


if __name__ == "__main__":
    main()
