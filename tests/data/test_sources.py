"""Entropies of sources against counts of their own text, sums over all strings, and closed forms."""

import itertools
from collections import Counter

import numpy as np
import pytest

from scantling.data.sources import ALPHABET, GrammarText, MarkovText

LENGTHS = {"characters": 400_000, "val_characters": 20_000, "document": 20_000}


def markov(symbols=4, weights=(0.2, 0.3, 0.5), seed=0, **changes):
    settings = {"zipf": 1.0, "concentration": 1.0, **LENGTHS, **changes}
    return MarkovText(symbols=symbols, weights=list(weights), seed=seed, **settings)


def grammar(nonterminals=2, rules=4, branching=0.5, seed=0, **changes):
    return GrammarText(
        nonterminals=nonterminals, rules=rules, branching=branching, zipf=1.0, seed=seed, **LENGTHS | changes
    )


def block_entropy(text: str, n: int) -> float:
    """Nats of blocks of n characters, counted, with Miller's correction for what rare blocks hide."""
    counts = np.array(list(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))


@pytest.mark.parametrize("seed", [0, 1])
def test_markov_entropy_is_that_of_counted_blocks(seed):
    """h = H(3 symbols) − H(2 symbols) for order 2, from nothing but the text."""
    source = markov(seed=seed)
    text = "".join(source.documents("train"))
    assert len(text) == 400_000
    counted = block_entropy(text, 3) - block_entropy(text, 2)
    assert source.entropy_rate == pytest.approx(counted, rel=0.01)
    for n in (1, 2, 3, 5):
        assert source.window_entropy(n) == pytest.approx(block_entropy(text, n) / n, rel=0.01), n


def test_markov_entropy_of_order_1_by_eigenvectors():
    """−Σ π P log P with π the left eigenvector of eigenvalue 1."""
    source = markov(symbols=6, weights=(0.3, 0.7))
    p = source.transitions
    values, vectors = np.linalg.eig(p.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    pi /= pi.sum()
    np.testing.assert_allclose(source.stationary, pi, atol=1e-12)
    assert source.entropy_rate == pytest.approx(-(pi[:, None] * p * np.log(p)).sum())


def test_markov_contexts_are_read_in_the_order_they_stand():
    """Each context's counted successors against its row: oldest symbol first."""
    source = markov(symbols=3, concentration=0.5)
    text = "".join(source.documents("train"))
    successors = Counter(zip(text, text[1:], text[2:], strict=False))
    for a, b in itertools.product(range(3), repeat=2):
        counts = np.array([successors[ALPHABET[a], ALPHABET[b], ALPHABET[c]] for c in range(3)])
        if counts.sum() > 5000:
            np.testing.assert_allclose(counts / counts.sum(), source.transitions[3 * a + b], atol=0.02)


def test_every_order_tells_more():
    """At the shipped settings the best loss falls with each symbol of context: there is something left to
    learn.
    """
    source = MarkovText(
        symbols=32, weights=[0.05, 0.15, 0.3, 0.5], zipf=1.0, concentration=2.0, seed=0, **LENGTHS
    )
    steps = np.diff([0, *(n * source.window_entropy(n) for n in (1, 2, 3))])
    chain = [*steps, source.entropy_rate]
    assert all(before - after > 0.05 for before, after in itertools.pairwise(chain))


def test_grammar_entropy_is_the_sum_over_its_sentences():
    """−Σ p log p over every string of the language up to a length, most of it: strings, not derivations."""
    source = grammar(rules=3, branching=0.3)
    probabilities, terminals, children = source.grammar
    strings: Counter[str] = Counter()

    def expand(stack, text, p):
        if not stack:
            strings[text] += p
            return
        if p < 1e-7:
            return
        a, *rest = stack
        for rule in range(3):
            below = [int(c) for c in children[a, rule] if c >= 0]
            expand(below + rest, text + ALPHABET[terminals[a, rule]], p * probabilities[a, rule])

    expand([0], "", 1.0)
    p = np.array(list(strings.values()))
    assert p.sum() > 0.999
    assert source.sentence_entropy == pytest.approx(-(p * np.log(p)).sum(), rel=0.01)
    assert source.expansions.sum() == pytest.approx(sum(len(s) * q for s, q in strings.items()), rel=0.01)


def test_grammar_entropy_is_that_of_counted_sentences():
    source = grammar(branching=0.2)
    sentences = "".join(source.documents("train")).split("\n")
    counts = np.array(list(Counter(sentences).values()))
    shares = counts / counts.sum()
    counted = -(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum())
    assert source.sentence_entropy == pytest.approx(counted, rel=0.02)
    length = np.mean([len(sentence) + 1 for sentence in sentences])
    assert length == pytest.approx(1 / (1 - 0.2) + 1, rel=0.02)
    assert source.entropy_rate == pytest.approx(counted / length, rel=0.02)


@pytest.mark.parametrize("make", [markov, grammar])
class TestEverySource:
    def test_the_same_seed_gives_the_same_text(self, make):
        assert list(make().documents("train")) == list(make().documents("train"))
        assert make().fingerprint == make().fingerprint

    def test_another_seed_or_length_gives_another_fingerprint(self, make):
        changed = [
            make(seed=1),
            make(characters=200_000),
            make(zipf=1.1) if make is markov else make(rules=5),
        ]
        assert len({source.fingerprint for source in [make(), *changed]}) == 4
        assert list(make(seed=1).documents("val")) != list(make().documents("val"))

    def test_more_text_begins_with_the_same_and_validation_is_other_text(self, make):
        short, long = (list(make(characters=n).documents("train")) for n in (100_000, 400_000))
        assert long[:5] == short
        assert not set(make().documents("val")) & set(long)

    def test_documents_have_their_length(self, make):
        assert {len(document) for document in make().documents("train")} == {20_000}
        assert sum(map(len, make().documents("val"))) == 20_000

    def test_it_says_its_entropy(self, make):
        assert f"entropy rate {make().entropy_rate:.6f} nats a byte" in make().describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: markov(symbols=1), r"data\.symbols=1 must lie between 2 and 95"),
        (lambda: markov(weights=(0.5, 0.6)), r"data\.weights=\[0\.5, 0\.6\]: .* must sum to 1"),
        (
            lambda: markov(symbols=90, weights=(0.25,) * 4),
            "table of 65,610,000 probabilities; 16,777,216 is the most",
        ),
        (lambda: markov(characters=0), r"data\.characters=0 must be positive"),
        (lambda: grammar(branching=1.0), r"data\.branching=1\.0 must lie between 0 and 1"),
        (lambda: grammar(rules=96), r"data\.rules=96 must lie between 2 and 95"),
    ],
)
def test_settings_that_make_no_source(make, message):
    with pytest.raises(ValueError, match=message):
        make()
