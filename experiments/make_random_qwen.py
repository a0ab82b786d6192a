"""Writes a checkpoint of Qwen2.5-Math-1.5B's shape, or a smaller one, with random weights.

    python experiments/make_random_qwen.py --size 1.5b --out runs/random-1.5b    # 3 GB in bfloat16

Nothing is downloaded. Speed and memory are the real model's, the text is noise. Random weights seldom
end an answer, so nearly every tree is full: the worst case. A text is one token a byte.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


@dataclass
class ModelShape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


SHAPES = {
    "1.5b": ModelShape(hidden=1536, layers=28, heads=12, kv_heads=2, ffn=8960, vocab=151936),
    "0.5b": ModelShape(hidden=896, layers=24, heads=14, kv_heads=2, ffn=4864, vocab=151936),
    "medium": ModelShape(hidden=512, layers=8, heads=8, kv_heads=2, ffn=2048, vocab=2000),
    "small": ModelShape(hidden=128, layers=4, heads=4, kv_heads=2, ffn=512, vocab=2000),
    "tiny": ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=1024),
}
PADDING = 271  # ids at the end of Qwen's embedding matrix that its tokenizer does not know


def make_tokenizer(known: int) -> Qwen2Tokenizer:
    """Qwen's own kind, byte-level, without merges: 256 bytes, made-up words, the end as the last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{i}" for i in range(len(alphabet), known - 1)]
    tokens = [*alphabet, *words, "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="left")


def make_model(shape: ModelShape, eos_id: int, dtype: torch.dtype, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of this shape with random weights."""
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="1.5b", help="default 1.5b")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args()
    shape = SHAPES[args.size]
    known = shape.vocab - PADDING
    model = make_model(shape, known - 1, torch.bfloat16, args.seed)
    model.save_pretrained(args.out)
    make_tokenizer(known).save_pretrained(args.out)
    size_gb = sum(path.stat().st_size for path in Path(args.out).iterdir()) / 1e9
    print(f"{args.out}: {model.num_parameters() / 1e6:.0f} M parameters, {size_gb:.2f} GB")


if __name__ == "__main__":
    main()
