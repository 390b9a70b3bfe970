"""A text encoder of one's own for small vocabularies: a CLIP tokenizer that knows these words, and a CLIP text model with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tokenizer(folder: Path, words: Iterable[str], length: int) -> CLIPTokenizer:
    """Of whole words, and of letters for all others; texts of at most `length` tokens. Its files lie in the folder."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("-0123456789")
    merges: list[tuple[str, str]] = []
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                known.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocabulary = [*dict.fromkeys(known), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in merges))
    made: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=length)
    return made


def text_config(words: int, length: int, width: int) -> CLIPTextConfig:
    """`words`: of the tokenizer, which ends with those that begin and end a text."""
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        eos_token_id=words - 1,
        bos_token_id=words - 2,
    )


def text_encoder(folder: Path, words: Iterable[str], length: int, width: int, seed: int = 0) -> None:
    """Saves `tokenizer` and `text_encoder` there, as a stock pipeline has them."""
    made = tokenizer(folder / "tokenizer", words, length)
    made.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModel(text_config(len(made), length, width)).save_pretrained(folder / "text_encoder")
