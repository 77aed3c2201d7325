"""How many bytes of text each token of a tokenizer stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

# Pre-tokenisers that only cut the text, or drop nothing unless `behavior` says so.
CUTTING = frozenset({"Split", "Digits", "Punctuation", "FixedLength", "UnicodeScripts"})


def count_token_bytes(tokenizer: dict[str, Any], vocab_size: int) -> np.ndarray | None:
    """int64 [vocab_size]: bytes of UTF-8 per id, special and unknown tokens 0.

    `tokenizer` is the content of a tokenizer.json. None unless the counts are exact, that is
    unless the ids of every text add up to its length in bytes: nothing normalises the text or
    adds to it, and tokens are spelled in bytes (GPT-2's byte alphabet) or literally.
    """
    added = tokenizer["added_tokens"]
    eats_space = any((t["lstrip"] or t["rstrip"]) and not t["special"] for t in added)
    if tokenizer["normalizer"] is not None or eats_space:
        return None
    model = tokenizer["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
        vocab = {piece: id_ for id_, (piece, _) in enumerate(vocab)}
    inside = model.get("continuing_subword_prefix") or ""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    kinds = decoder_kinds(tokenizer["decoder"])

    counts = np.zeros(vocab_size, dtype=np.int64)
    if "ByteLevel" in kinds:
        cuts_only, has_bytes = judge_pre_tokenizer(tokenizer["pre_tokenizer"])
        if not (cuts_only and has_bytes and alphabet <= vocab.keys()):
            return None
        for token, id_ in vocab.items():
            counts[id_] = len(token.removeprefix(inside) if inside else token)
    elif kinds == ["Fuse"] and tokenizer["pre_tokenizer"] is None:
        for token, id_ in vocab.items():
            counts[id_] = len(token.encode())
    else:
        return None
    unknown = model.get("unk_token")
    if unknown in vocab and unknown not in alphabet:
        counts[vocab[unknown]] = 0
    for token in added:
        counts[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return counts


def decoder_kinds(part: dict[str, Any] | None) -> list[str]:
    """The types of a decoder, those inside a sequence one by one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [kind for inner in part["decoders"] for kind in decoder_kinds(inner)]
    return [part["type"]]


def judge_pre_tokenizer(part: dict[str, Any] | None) -> tuple[bool, bool]:
    """(whether it neither adds nor drops text, whether it turns text into the byte alphabet)."""
    if part is None:
        return True, False
    kind = part["type"]
    if kind == "Sequence":
        inner = [judge_pre_tokenizer(each) for each in part["pretokenizers"]]
        return all(cuts for cuts, _ in inner), any(to_bytes for _, to_bytes in inner)
    if kind == "ByteLevel":
        return not part["add_prefix_space"], True
    return kind in CUTTING and part.get("behavior") != "Removed", False
