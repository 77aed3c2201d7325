"""Text drawn from sources whose entropy is known exactly: what cannot be learned has a true value."""

from __future__ import annotations

import string
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantling.data.corpora import Corpus, Split, hash_manifest

ALPHABET = string.ascii_letters + string.digits + string.punctuation + " "
"""A symbol is one character and one byte, so that nats per byte and per symbol are the same."""

TOGETHER = 256
"""Documents drawn at once."""

LARGEST_TABLE = 2**24
"""Probabilities that a table may hold."""

Array = NDArray[Any]


class Source(Corpus):
    """Documents of equal length, the i-th of a split a pure function of (seed, split, i).

    `characters`, `val_characters`: lengths of the splits; `document`: length of a document, of which
    each split has at least one.
    """

    def __init__(self, *, characters: float, val_characters: float, document: float, seed: int) -> None:
        sizes = {"characters": characters, "val_characters": val_characters, "document": document}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"data.{name}={value} must be positive")
        self.characters, self.val_characters = int(characters), int(val_characters)
        self.document, self.seed = int(document), seed

    @property
    @abstractmethod
    def entropy_rate(self) -> float:
        """Nats per character that remain for whoever knows the source and all that came before; exact."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the text, beside its length."""

    @abstractmethod
    def draw(self, rngs: Sequence[np.random.Generator]) -> list[str]:
        """A document of `document` characters from each generator."""

    def documents(self, split: Split) -> Iterator[str]:
        total = self.characters if split == "train" else self.val_characters
        n = max(1, total // self.document)
        for first in range(0, n, TOGETHER):
            numbers = range(first, min(first + TOGETHER, n))
            yield from self.draw([np.random.default_rng([self.seed, split == "val", i]) for i in numbers])

    @property
    def fingerprint(self) -> str:
        return hash_manifest(
            {
                "corpus": type(self).__name__,
                "settings": self.settings,
                "seed": self.seed,
                "characters": [self.characters, self.val_characters, self.document],
            }
        )

    def describe(self) -> str:
        return (
            f"{type(self).__name__}, {self.characters / 1e6:.1f} MB, "
            f"entropy rate {self.entropy_rate:.6f} nats a byte, "
            f"{self.entropy_rate / np.log(2):.6f} bits per byte"
        )


def zipf(n: int, exponent: float) -> Array:
    """Probabilities ∝ rank^-exponent."""
    weights = np.arange(1, n + 1) ** -float(exponent)
    return weights / weights.sum()


class MarkovText(Source):
    """A mixture of Markov chains of orders 0 to K: p(x | past) = Σₖ weightₖ·pₖ(x | last k symbols).

    p₀ is Zipf's law; each context of pₖ draws its distribution from a Dirichlet around it, so that contexts
    are as unevenly frequent as words are: a larger model and more text always have a rarer context left to
    learn. Lower `concentration` makes contexts tell more.

    Raises ValueError for more symbols than there are characters, weights that do not sum to 1, and
    tables that are beyond memory.
    """

    def __init__(
        self,
        *,
        symbols: int,
        weights: Sequence[float],
        zipf: float,
        concentration: float,
        characters: float,
        val_characters: float,
        document: float,
        seed: int,
    ) -> None:
        super().__init__(characters=characters, val_characters=val_characters, document=document, seed=seed)
        if not 2 <= symbols <= len(ALPHABET):
            raise ValueError(f"data.symbols={symbols} must lie between 2 and {len(ALPHABET)}")
        if len(weights) < 2 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-9 or weights[0] <= 0:
            raise ValueError(
                f"data.weights={list(weights)}: those of orders 0, 1, … must sum to 1, "
                "the first being positive"
            )
        if symbols ** len(weights) > LARGEST_TABLE:
            raise ValueError(
                f"{symbols} symbols and order {len(weights) - 1} make a table of {symbols ** len(weights):,} "
                f"probabilities; {LARGEST_TABLE:,} is the most"
            )
        if concentration <= 0:
            raise ValueError(f"data.concentration={concentration} must be positive")
        self.symbols, self.weights = symbols, tuple(float(w) for w in weights)
        self.zipf, self.concentration = float(zipf), float(concentration)

    @property
    def order(self) -> int:
        """K: how many symbols back the next one depends on."""
        return len(self.weights) - 1

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "symbols": self.symbols,
            "weights": self.weights,
            "zipf": self.zipf,
            "concentration": self.concentration,
        }

    @cached_property
    def transitions(self) -> Array:
        """(V^K, V): the next symbol's distribution after each context.

        A context's last symbol counts least in its number.
        """
        rng, base = np.random.default_rng([self.seed, 2]), zipf(self.symbols, self.zipf)
        mixed = self.weights[0] * base[None]
        for order, weight in enumerate(self.weights[1:], start=1):
            drawn = rng.standard_gamma(self.concentration * base, size=(self.symbols**order, self.symbols))
            drawn += 1e-300 * base  # so that a context whose every draw underflows has a distribution
            own = drawn / drawn.sum(axis=1, keepdims=True)
            # Context abc of order 3 contains bc of order 2: the older symbols come first.
            mixed = np.tile(mixed, (self.symbols, 1)) if order > 1 else mixed
            mixed = mixed + weight * own
        return mixed

    @cached_property
    def stationary(self) -> Array:
        """(V^K,): how often each context occurs in the long run."""
        v, table = self.symbols, self.transitions.reshape(self.symbols, -1, self.symbols)
        frequency = np.full(v**self.order, float(v) ** -self.order)
        for _ in range(10_000):
            after = (frequency.reshape(v, -1, 1) * table).sum(axis=0).reshape(-1)
            change = np.abs(after - frequency).sum()
            frequency = after / after.sum()
            if change < 1e-14:
                break
        return frequency

    @property
    def entropy_rate(self) -> float:
        return float(self.stationary @ entropies(self.transitions))

    def window_entropy(self, n: int) -> float:
        """Nats per character of a window of n that shows nothing before it: the least mean loss over it."""
        v, seen = self.symbols, min(n, self.order)
        of_start = entropies(self.stationary.reshape(v**seen, -1).sum(axis=1)[None])[0]
        return float((of_start + (n - seen) * self.entropy_rate) / n)

    def draw(self, rngs: Sequence[np.random.Generator]) -> list[str]:
        v, contexts, length = self.symbols, self.symbols**self.order, max(self.document, self.order)
        uniform_TB = np.stack([rng.random(length) for rng in rngs], axis=1)
        # The first context is drawn as one symbol of an alphabet of contexts.
        context_B = self.stationary.cumsum().searchsorted(uniform_TB[0] * self.stationary.sum(), side="right")
        context_B = np.minimum(context_B, contexts - 1)
        symbols_TB = np.empty((length, len(rngs)), dtype=np.uint8)
        for i in range(self.order):
            symbols_TB[i] = context_B // v ** (self.order - 1 - i) % v
        for t in range(self.order, length):
            symbol_B = (self.cumulative[context_B] <= uniform_TB[t][:, None]).sum(axis=1)
            symbols_TB[t] = symbol_B
            context_B = (context_B * v + symbol_B) % contexts
        letters = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
        return [letters[symbols].tobytes().decode() for symbols in symbols_TB[: self.document].T]

    @cached_property
    def cumulative(self) -> Array:
        """(V^K, V): `transitions` summed from the left, to draw by one uniform number."""
        cumulative = self.transitions.cumsum(axis=1)
        cumulative[:, -1] = 1.0  # above every uniform number, whatever the rounding
        return cumulative


class GrammarText(Source):
    """Sentences of a random probabilistic grammar, a newline after each.

    A rule is A -> a or A -> a B C, and no two rules of a nonterminal begin with the same terminal: a string
    has one derivation, so its entropy is that of its rules. Rules have Zipf's probabilities; those with
    children sum to `branching`/2, which makes a sentence 1/(1 − branching) characters long on average.

    Raises ValueError for a branching outside of (0, 1), and more rules than there are characters.
    """

    def __init__(
        self,
        *,
        nonterminals: int,
        rules: int,
        zipf: float,
        branching: float,
        characters: float,
        val_characters: float,
        document: float,
        seed: int,
    ) -> None:
        super().__init__(characters=characters, val_characters=val_characters, document=document, seed=seed)
        if nonterminals < 1:
            raise ValueError(f"data.nonterminals={nonterminals} must be positive")
        if not 2 <= rules <= len(ALPHABET):
            raise ValueError(f"data.rules={rules} must lie between 2 and {len(ALPHABET)}")
        if not 0 < branching < 1:
            raise ValueError(f"data.branching={branching} must lie between 0 and 1: sentences end")
        self.nonterminals, self.rules = nonterminals, rules
        self.zipf, self.branching = float(zipf), float(branching)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "nonterminals": self.nonterminals,
            "rules": self.rules,
            "zipf": self.zipf,
            "branching": self.branching,
        }

    @cached_property
    def grammar(self) -> tuple[Array, Array, Array]:
        """Probabilities (A, R), terminals (A, R), and children (A, R, 2), −1 where a rule has none."""
        rng, (a, r) = np.random.default_rng([self.seed, 2]), (self.nonterminals, self.rules)
        probabilities = np.empty((a, r))
        children = np.full((a, r, 2), -1)
        branching_rules = r // 2
        for i in range(a):
            order = rng.permutation(r)
            with_children, leaves = order[:branching_rules], order[branching_rules:]
            probabilities[i, with_children] = self.branching / 2 * zipf(branching_rules, self.zipf)
            probabilities[i, leaves] = (1 - self.branching / 2) * zipf(r - branching_rules, self.zipf)
            children[i, with_children] = rng.integers(a, size=(branching_rules, 2))
        terminals = np.stack([rng.permutation(r) for _ in range(a)])
        return probabilities, terminals, children

    @property
    def expansions(self) -> Array:
        """(A,): how often each nonterminal is expanded in a sentence on average: n = e₀ + Mᵀn."""
        probabilities, _, children = self.grammar
        mean_children = np.zeros((self.nonterminals, self.nonterminals))
        for parent, rule, which in np.argwhere(children >= 0):
            mean_children[parent, children[parent, rule, which]] += probabilities[parent, rule]
        start = np.eye(self.nonterminals)[0]
        return np.linalg.solve(np.eye(self.nonterminals) - mean_children.T, start)

    @property
    def sentence_entropy(self) -> float:
        """Mean entropy of a sentence in nats."""
        return float(self.expansions @ entropies(self.grammar[0]))

    @property
    def entropy_rate(self) -> float:
        return self.sentence_entropy / (float(self.expansions.sum()) + 1)

    def draw(self, rngs: Sequence[np.random.Generator]) -> list[str]:
        return [self.sentences(rng) for rng in rngs]

    def sentences(self, rng: np.random.Generator) -> str:
        """Expands the leftmost nonterminal, character by character."""
        uniforms = chain.from_iterable(rng.random(4096).tolist() for _ in iter(int, 1))
        drawn, stack = [], []
        while len(drawn) < self.document:
            if not stack:
                drawn.append("\n") if drawn else None
                stack.append(0)
            a = stack.pop()
            terminal, children = self.productions[a][bisect_right(self.cumulative[a], next(uniforms))]
            drawn.append(terminal)
            stack += children
        return "".join(drawn[: self.document])

    @cached_property
    def productions(self) -> list[list[tuple[str, list[int]]]]:
        """By nonterminal and rule: the terminal, and the children in the order that a stack takes them."""
        _, terminals, children = self.grammar
        return [
            [(ALPHABET[t], [int(c) for c in pair[::-1] if c >= 0]) for t, pair in zip(*both, strict=True)]
            for both in zip(terminals, children, strict=True)
        ]

    @cached_property
    def cumulative(self) -> list[list[float]]:
        """The rules' probabilities summed from the left, without the last sum, which is 1."""
        return self.grammar[0].cumsum(axis=1)[:, :-1].tolist()


def entropies(distributions: Array) -> Array:
    """The entropy -Σ p·log p of each row, in nats."""
    return -np.where(distributions > 0, distributions * np.log(np.maximum(distributions, 1e-300)), 0.0).sum(
        axis=-1
    )
