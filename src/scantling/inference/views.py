"""What checkpoints show: how the embeddings of tokens lie to each other, and which attends to which."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scantling.data.tokenizers import Tokenizer
from scantling.data.tokens import cached_tokens
from scantling.inference.cached_texts import largest_context
from scantling.inference.safe_loading import load_decoder, read_weights_by_step
from scantling.model.attention_weights import attention_weights
from scantling.model.decoder import Decoder
from scantling.model.embed import Embedding
from scantling.report.curve_charts import thinned
from scantling.report.view_charts import Attention, EmbeddingMap, Neighbours, Views
from scantling.runs.directory import RunDirectory, read_rows

STEPS = 12
"""Checkpoints shown, the first and the last among them."""

WORDS = 12
"""Tokens whose neighbours are listed where none are asked for."""

NEAREST = 6
"""Neighbours listed for each token."""

AMONG = 8192
"""The most frequent tokens, among which neighbours are looked for."""

MAPPED = 400
"""The most frequent tokens, which the map shows."""

COUNTED = 2_000_000
"""Tokens of the held-out text that say how frequent each is."""

LONGEST = 48
"""Tokens of a prompt whose maps can still be read."""

BEGINNING = 24
"""Tokens of a text that is taken for a prompt."""

SIDE = 12
"""Layers, and heads of each, whose maps are shown."""

LARGE = 200_000_000
"""Parameters above which a model is opened only for what is asked for: it takes more than a moment."""


@dataclass
class ViewedRun:
    """A run with its last weights. `held_out`: the tokens of its text, where the cache still has them."""

    directory: RunDirectory
    decoder: Decoder
    tokenizer: Tokenizer
    held_out: np.ndarray | None


def views_of(directory: RunDirectory, *, tokens: Sequence[str] | None, prompt: str | None) -> Views:
    """Embeddings of every checkpoint that is kept, and the last one's attention to `prompt`.

    None: the most frequent words, and the first ones of the held-out text. Raises ValueError for a run that
    cannot be read, and for what is asked for and cannot be shown.
    """
    weights, unreadable = read_weights_by_step(directory)
    if not weights:
        raise ValueError(f"{directory.checkpoints} holds no checkpoint that can be read")
    steps = list(weights)
    n_parameters = sum(weight.numel() for weight in weights[steps[-1]].values())
    if n_parameters > LARGE and tokens is None and prompt is None:
        raise ValueError(
            f"a model of {n_parameters:.2g} parameters is opened only with tokens=[…] or prompt=…"
        )
    config, decoder, tokenizer = load_decoder(directory, weights[steps[-1]])
    fingerprint = directory.environment["corpus"]["fingerprint"]
    corpus = cached_tokens(fingerprint, tokenizer, Path(config.paths.cache))
    held_out = None if corpus is None else corpus.val.tokens
    run = ViewedRun(directory, decoder, tokenizer, held_out)
    notes = [describe_steps(steps), *(f"{file} cannot be read, and is left out." for file in unreadable)]
    if run.held_out is None:
        notes.append(
            "The run's text is not in the cache: how frequent a token is, its place in the vocabulary says."
        )
    attention = None
    try:
        attention = attention_view(run, prompt, steps[-1])
    except ValueError as error:
        if prompt is not None:
            raise
        notes.append(f"No maps of attention: {error}.")
    shown = [steps[i] for i in thinned(np.arange(len(steps)), STEPS)]
    neighbours, map_ = embedding_views(run, {step: weights[step] for step in shown}, tokens)
    return Views(tuple(notes), neighbours, map_, attention)


def describe_steps(steps: Sequence[int]) -> str:
    """Which checkpoints are shown, and how to keep more."""
    each = [f"{step:,}" for step in steps]
    if len(each) == 1:
        after = f"step {each[0]}, the only one that is kept"
    elif len(each) <= STEPS:
        after = f"steps {', '.join(each[:-1])} and {each[-1]}, all that are kept"
    else:
        after = f"steps {each[0]} to {each[-1]}, {STEPS} of the {len(each)} that are kept"
    return (
        f"Checkpoints after {after}: train with checkpoint.keep=100 to keep the newest hundred, "
        "and to see more of them here."
    )


# --- embeddings ---


def embedding_views(
    run: ViewedRun, weights: dict[int, dict[str, Tensor]], tokens: Sequence[str] | None
) -> tuple[Neighbours, EmbeddingMap]:
    """The neighbours of the chosen tokens in each checkpoint, and a map of the most frequent ones."""
    order = ids_by_frequency(run.held_out, run.tokenizer.vocab_size)
    chosen = list(islice(frequent_words(run.tokenizer, order), WORDS))
    if tokens is not None:
        chosen = list(dict.fromkeys(single_token(run.tokenizer, str(token)) for token in tokens))
    ids = np.array([*chosen, *order[~np.isin(order, chosen)]])[: max(AMONG, len(chosen))]
    steps, n_mapped = tuple(weights), max(MAPPED, len(chosen))
    nearest, mapped = [], []
    for of_step in weights.values():
        vectors = embed_tokens(run.decoder.embed, of_step, ids)
        found = nearest_vectors(vectors, len(chosen), NEAREST)
        nearest.append(
            tuple(tuple((token_label(run.tokenizer, ids[i]), cosine) for i, cosine in each) for each in found)
        )
        mapped.append(vectors[:n_mapped])
    places, shares = principal_places(np.stack(mapped))
    words = tuple(token_label(run.tokenizer, id_) for id_ in ids[:n_mapped])
    return (
        Neighbours(steps, words[: len(chosen)], tuple(nearest), among=len(ids)),
        EmbeddingMap(
            steps,
            words,
            kinds=tuple(token_kind(token_text(run.tokenizer, id_)) for id_ in ids[:n_mapped]),
            named=tuple(i < len(chosen) for i in range(len(words))),
            places=places,
            shares=shares,
        ),
    )


@torch.no_grad()
def embed_tokens(embed: Embedding, weights: dict[str, Tensor], ids: np.ndarray) -> np.ndarray:
    """What enters the first layer for each of `ids` [n, D], positions aside, by a checkpoint's weights."""
    own = {key.removeprefix("embed."): w for key, w in weights.items() if key.startswith("embed.")}
    embed.load_state_dict(own)
    return embed(torch.from_numpy(ids)[None])[0].double().numpy()


def nearest_vectors(vectors: np.ndarray, n_words: int, n_nearest: int) -> list[list[tuple[int, float]]]:
    """The nearest others of the first `n_words` of `vectors` [n, D], with their cosine x·y / |x||y|."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
    cosines = unit[:n_words] @ unit.T
    cosines[np.arange(n_words), np.arange(n_words)] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(n_nearest, len(vectors) - 1)]
    return [[(int(j), float(cosines[i, j])) for j in row] for i, row in enumerate(order)]


def principal_places(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [step, n, 2] of vectors [step, n, D] on the first two principal components of the last step.

    With them the share [step, 2] of each step's variance along these. X - mean = U·S·Vᵀ at the last step;
    other steps are seen from the same mean along the same rows of Vᵀ, whose largest entries are made
    positive, as their signs are free. Pearson 1901, doi:10.1080/14786440109462720.
    """
    mean = vectors[-1].mean(0)
    axes = np.linalg.svd(vectors[-1] - mean, full_matrices=False)[2][:2]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    places = (vectors - mean) @ axes.T
    total = vectors.var(1).sum(-1, keepdims=True)
    return places, places.var(1) / np.maximum(total, np.finfo(float).tiny)


# --- tokens ---


def ids_by_frequency(held_out: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Every id, the most frequent first.

    Without a text they come in the order of the vocabulary, where those learned first are.
    """
    if held_out is None:
        return np.arange(vocab_size)
    return np.argsort(-np.bincount(held_out[:COUNTED], minlength=vocab_size), kind="stable")


def frequent_words(tokenizer: Tokenizer, order: np.ndarray) -> Iterator[int]:
    """Tokens of letters, in this order; those of several letters before single ones."""
    single = []
    for id_ in order.tolist():
        bare = token_text(tokenizer, id_).strip()
        if bare.isalpha():
            if len(bare) > 1:
                yield id_
            else:
                single.append(id_)
    yield from single


def single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one token. Raises ValueError for another."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        pieces = ", ".join(f'"{token_text(tokenizer, id_)}"' for id_ in ids)
        cut = f", whose tokenizer cuts it into {pieces}" if ids else ""
        is_one = len(tokenizer.encode(f" {text}")) == 1
        hint = f'; with a space before it is one: tokens=[" {text}"]' if is_one else ""
        raise ValueError(f'tokens: "{text}" is not a token of this run{cut}{hint}')
    return ids[0]


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """A token's text as it is inside a text: alone, words of some tokenizers lose the space before them."""
    if id_ == tokenizer.end_of_text:
        return tokenizer.end_of_text_name
    (before, *_) = tokenizer.encode("a")
    return tokenizer.decode([before, id_]).removeprefix(tokenizer.decode([before]))


VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def token_label(tokenizer: Tokenizer, id_: int) -> str:
    """A token made visible, its repetitions counted.

    The id, where the token has no text of its own, as a part of a character.
    """
    seen = token_text(tokenizer, id_).translate(VISIBLE)
    if not seen.isprintable() or not seen or "\N{REPLACEMENT CHARACTER}" in seen:
        return f"⟨{id_}⟩"
    return re.sub(r"(.)\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", seen)


def token_kind(text: str) -> str:
    """What a token is made of, by which the map colours it."""
    if any(c.isalpha() for c in text):
        return "letters after a space" if text[0].isspace() else "letters"
    return "digits" if text.strip().isdigit() else "signs and space"


# --- attention ---


def attention_view(run: ViewedRun, prompt: str | None, step: int) -> Attention:
    """How much each token of the prompt attends to each before it, in as many maps as are readable."""
    ids = prompt_ids(run, prompt)
    weights = attention_weights(run.decoder, torch.tensor([ids]))[:, 0].numpy()
    n_layers, n_heads = weights.shape[:2]
    layers, heads = thinned(np.arange(n_layers), SIDE), thinned(np.arange(n_heads), SIDE)
    left_out = (len(layers), len(heads)) != (n_layers, n_heads)
    return Attention(
        step=step,
        words=tuple(token_label(run.tokenizer, id_) for id_ in ids),
        layers=tuple((layers + 1).tolist()),
        heads=tuple((heads + 1).tolist()),
        weights=weights[np.ix_(layers, heads)],
        note=f"{len(layers)} of {n_layers} layers, {len(heads)} of {n_heads} heads." if left_out else "",
    )


def prompt_ids(run: ViewedRun, prompt: str | None) -> list[int]:
    """The start of a document and what follows.

    Raises ValueError for a prompt that cannot be read, or whose maps cannot be seen.
    """
    first, encode = run.tokenizer.end_of_text, run.tokenizer.encode
    context = largest_context(run.decoder, None)
    if prompt is not None:
        ids = [first, *encode(prompt)]
        if len(ids) < 2:
            raise ValueError('the prompt is empty: give a text, as prompt="def f(x):"')
        if len(ids) > context:
            raise ValueError(f"the prompt has {len(ids)} tokens and the model reads {context}: shorten it")
        if len(ids) > LONGEST:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and a map is readable up to {LONGEST}: shorten it"
            )
        return ids
    return [first, *own_text(run)][: min(context, BEGINNING + 1)]


def own_text(run: ViewedRun) -> list[int]:
    """The beginning of the run's held-out text, the same for all runs on it; else of what it wrote last."""
    if run.held_out is not None:
        return run.held_out[:BEGINNING].tolist()
    written = read_rows(run.directory.samples)
    if not written:
        raise ValueError("the run's text is not in the cache, nor has it written any: give one with prompt=…")
    return run.tokenizer.encode(written[-1]["text"])
