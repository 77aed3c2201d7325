"""Generation against the same decoder without a cache, and `transformers`."""

import copy
import itertools
import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.testing import assert_close

from scantling.inference import speculation
from scantling.inference.beam_search import beam_search
from scantling.inference.decoding_layout import lay_out_for_decoding
from scantling.inference.generation import generate
from scantling.inference.sampling import GenerationSettings
from scantling.inference.speculation import speculate
from scantling.model.linear import FEW, goes_to_onednn

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
PROMPT = torch.randint(512, (9,), generator=torch.Generator().manual_seed(0))
PROMPTS = [
    torch.randint(512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 3, 14, 1)
]


@pytest.fixture(autouse=True)
def seeded():
    """`transformers` initialises its models from the global generator: the same weights whatever ran
    before.
    """
    torch.manual_seed(0)


def settings(n_tokens: int, **given) -> GenerationSettings:
    return GenerationSettings(n_tokens=n_tokens, **(PLAIN | given))


def generated(
    decoder, n_tokens: int, *, prompt: Sequence[int] | torch.Tensor = PROMPT, seed: int = 0, **given
) -> list[int]:
    (ids,) = batch_of(decoder, [list(prompt)], n_tokens, seed=seed, **given)
    return ids


def batch_of(decoder, prompts, n_tokens: int, *, seed: int = 0, done=None, **given) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = [[] for _ in prompts]
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    for step in generate(
        decoder, prompts, settings=settings(n_tokens, **given), generator=generator, done=done
    ):
        for row, token in step:
            texts[row].append(token)
    return texts


@torch.no_grad()
def without_cache(decoder, n_tokens: int, prompt=PROMPT, context=None) -> list[int]:
    """Greedy, each time over all tokens seen; a full context goes on from its last half."""
    context = context or decoder.seq_len
    seen, out = [int(token) for token in prompt[-context:]], []
    for _ in range(n_tokens):
        if len(seen) > context:
            seen = seen[-(context // 2) :]
        out.append(int(decoder(torch.tensor([seen]))[0, -1].argmax()))
        seen.append(out[-1])
    return out


@pytest.mark.parametrize("pos", ["rope", "learned", "alibi", "sinusoidal"])
@pytest.mark.parametrize("attn", ["mha", "gqa"])
def test_greedy_equals_argmax_without_cache_also_beyond_the_context(nano, pos, attn):
    decoder = nano(f"pos={pos}", f"attn={attn}", "embed=untied", "model.seq_len=24", gain=8)
    ids = generated(decoder, 50, **GREEDY)
    assert ids == without_cache(decoder, 50)
    assert len(set(ids)) > 3


@pytest.mark.parametrize("length", [1, 23, 24, 25, 70])
def test_a_prompt_of_any_length_goes_on(nano, length):
    decoder = nano("pos=learned", "embed=untied", "model.seq_len=24", gain=8)
    prompt = torch.randint(512, (length,), generator=torch.Generator().manual_seed(1))
    assert generated(decoder, 15, prompt=prompt, **GREEDY) == without_cache(decoder, 15, prompt)
    end = prompt[-24:]  # the model's context
    assert generated(decoder, 15, prompt=end, **GREEDY) == generated(decoder, 15, prompt=prompt, **GREEDY)


def test_a_model_without_limit_reads_on_when_asked(nano):
    decoder = nano("pos=alibi", "embed=untied", "model.seq_len=24", gain=8)
    ids = generated(decoder, 50, context=70, **GREEDY)
    assert ids == without_cache(decoder, 50, context=70) != without_cache(decoder, 50)
    with pytest.raises(ValueError, match="a table of 24 positions, so at most 24"):
        generated(nano("pos=learned", "model.seq_len=24"), 5, context=25)


@pytest.mark.parametrize("attn", ["sliding", "sinks"])
def test_a_window_rolls_beyond_the_context_of_training(nano, attn):
    decoder = nano(f"attn={attn}", "embed=untied", "model.seq_len=24", "model.window=8", gain=8)
    ids = generated(decoder, 60, **GREEDY)
    assert ids == without_cache(decoder, 60, context=1000)


@pytest.mark.parametrize(
    "overrides", [("pos=learned",), ("pos=rope", "attn=sliding", "model.window=8")], ids=" ".join
)
def test_prompts_of_different_length_go_on_as_each_alone(nano, overrides):
    """Also where they reach the end of the context at different times, and where some end before others."""
    decoder = nano(*overrides, "embed=untied", "model.seq_len=24", gain=8)
    alone = [generated(decoder, 40, prompt=prompt, **GREEDY) for prompt in PROMPTS]
    assert batch_of(decoder, PROMPTS, 40, **GREEDY) == alone
    done = set()
    context = GenerationSettings(n_tokens=40, **GREEDY)
    found = [[] for _ in PROMPTS]
    for step in generate(decoder, PROMPTS, settings=context, generator=torch.Generator(), done=done):
        for row, token in step:
            found[row].append(token)
            if len(found[row]) == 5 * (row + 1):
                done.add(row)
    assert found == [ids[: 5 * (row + 1)] for row, ids in enumerate(alone)]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("overrides", [(), ("attn=mla", "attn.d_rotated=0", "pos=none")], ids=" ".join)
def test_a_quantised_cache_draws_from_nearly_the_same_distribution(nano, overrides, precision):
    """The first tokens come out of the same logits but for rounding: greedy texts agree for a while."""
    decoder = nano("embed=untied", *overrides, gain=8)
    full, low = (generated(decoder, 8, precision=p, **GREEDY) for p in ("full", precision))
    assert full[:2] == low[:2]


def test_greedy_equals_transformers_llama(llama_pair):
    ours, theirs = llama_pair(attn="gqa", embed="untied")
    expected = theirs.generate(
        PROMPT[None], do_sample=False, max_new_tokens=50, eos_token_id=None, pad_token_id=0
    )
    assert generated(ours, 50, **GREEDY) == expected[0, len(PROMPT) :].tolist()


def test_greedy_equals_transformers_gpt2(gpt2_pair):
    ours, theirs = gpt2_pair()
    expected = theirs.generate(
        PROMPT[None], do_sample=False, max_new_tokens=50, eos_token_id=None, pad_token_id=0
    )
    assert generated(ours, 50, **GREEDY) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("embed", ["tied", "untied"])
def test_the_layout_for_decoding_changes_memory_alone(nano, embed):
    plain, laid_out = (
        nano(f"embed={embed}", gain=8),
        lay_out_for_decoding(nano(f"embed={embed}", gain=8), FEW),
    )
    first, head = (cast(Any, part) for part in (laid_out.blocks[0], laid_out.head))
    if goes_to_onednn():
        assert first.ffn.gate_up.weight.is_mkldnn
        assert (laid_out.embed.output if embed == "untied" else head.packed_output).is_mkldnn
    else:
        assert first.ffn.gate_up.weight.stride() == (1, 2 * 88)
    expected = dict(plain.named_parameters())
    for name, p in laid_out.named_parameters():
        parts = [expected.pop(name.replace("gate_up", part), None) for part in ("gate", "up")]
        assert torch.equal(torch.cat(parts) if "gate_up" in name else parts[0], p.to_dense())
    assert not expected
    assert generated(laid_out, 30, **GREEDY) == generated(plain, 30, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [("ffn=geglu",), ("ffn=reglu", "ffn.bias=true"), ("ffn=moe", "ffn.n_shared=1")],
    ids=" ".join,
)
@pytest.mark.parametrize("rows", [1, FEW])
def test_joined_gates_are_the_same_function(nano, overrides, rows):
    decoder = nano(*overrides, gain=8)
    for p in decoder.parameters():
        if p.ndim == 1:
            p.add_(torch.randn(p.shape))
    laid_out = lay_out_for_decoding(copy.deepcopy(decoder), rows)
    assert any("gate_up" in name for name, _ in laid_out.named_parameters())
    assert not any("up.weight" in name and "gate_up" not in name for name, _ in laid_out.named_parameters())
    tokens = torch.randint(512, (rows, 9), generator=torch.Generator().manual_seed(0))
    assert_close(laid_out(tokens), decoder(tokens), rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [("attn=mha",), ("attn=gqa",), ("attn=mha", "pos=alibi")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_of_many_rows_attends_as_without_cache(nano, overrides, dtype):
    """So many that attention is written out as two products."""
    decoder = nano(*overrides, "model.seq_len=96", gain=8).to(dtype)
    tokens = torch.randint(512, (512, 70), generator=torch.Generator().manual_seed(0))
    cache = decoder.new_cache(96)
    decoder(tokens[:, :-1], cache)
    found, expected = decoder(tokens[:, -1:], cache)[:, 0], decoder(tokens)[:, -1]
    if dtype == torch.float32:
        assert_close(found, expected, rtol=0, atol=5e-5)
    else:
        assert (found - expected).float().std() < 0.03 * expected.float().std()


@pytest.mark.parametrize(("precision", "size"), [("full", 4), ("int8", 1), ("fp8", 1)])
@pytest.mark.parametrize("attn", ["mha", "gqa", "sliding"])
def test_a_cache_takes_the_bytes_of_the_numbers_that_layers_say_they_keep(nano, attn, precision, size):
    decoder = nano(f"attn={attn}")
    cache = decoder.new_cache(60, precision)
    decoder(torch.zeros(1, 60, dtype=torch.long), cache)
    numbers = sum(block.attn.cached_numbers(60) for block in decoder.layers)
    scales = 0 if precision == "full" else 4 * numbers // 8  # heads of width 8, a float32 for each
    assert cache.nbytes == pytest.approx(size * numbers + scales, rel=0.02)


# --- beams


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("end", [None, 7, 433])
def test_beams_equal_transformers(llama_pair, beams, length_penalty, end):
    ours, theirs = llama_pair(attn="gqa", embed="untied")
    with torch.no_grad():  # some texts should end early
        for model_weight in (ours.embed.head.weight, theirs.lm_head.weight):
            model_weight.mul_(0.25)
    expected = theirs.generate(
        PROMPT[None],
        do_sample=False,
        num_beams=beams,
        length_penalty=length_penalty,
        max_new_tokens=20,
        eos_token_id=end,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    expected = expected[: expected.index(end)] if end in expected else expected
    given = settings(20, beams=beams, length_penalty=length_penalty)
    assert beam_search(ours, [PROMPT.tolist()], settings=given, end_of_text=end) == [expected]


def test_beams_of_a_batch_equal_each_alone_and_penalised_ones_transformers(gpt2_pair):
    ours, theirs = gpt2_pair()
    given = settings(15, beams=3, repetition_penalty=1.3)
    alone = [beam_search(ours, [prompt], settings=given, end_of_text=0)[0] for prompt in PROMPTS]
    assert beam_search(ours, PROMPTS, settings=given, end_of_text=0) == alone
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            do_sample=False,
            num_beams=3,
            repetition_penalty=1.3,
            max_new_tokens=15,
            eos_token_id=0,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert ids == (expected[: expected.index(0)] if 0 in expected else expected)


@torch.no_grad()
def test_enough_beams_find_the_likeliest_text(nano):
    """All texts of three tokens out of six, scored one by one."""
    decoder = nano("model.vocab_size=6", "embed=untied", gain=12)
    prompt = [1, 2, 3]

    def score(text):
        logits = decoder(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(text)), text].sum().item()

    best = max(itertools.product(range(6), repeat=3), key=score)
    found = beam_search(decoder, [prompt], settings=settings(3, beams=36), end_of_text=None)
    assert found == [list(best)]


# --- drafts


@pytest.mark.parametrize(
    "overrides", [("pos=learned",), ("attn=sliding", "model.window=8"), ("attn=mla",)], ids=" ".join
)
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_with_a_draft_equals_greedy_without(nano, overrides, draft_tokens):
    """With a draft that is often right and one that never is, also beyond the context of both."""
    decoder = nano(*overrides, "embed=untied", "model.seq_len=24", gain=8)
    near = nano(*overrides, "embed=untied", "model.seq_len=24", gain=8)
    with torch.no_grad():
        near.embed.head.weight.add_(0.05 * torch.randn(512, 32, generator=torch.Generator().manual_seed(0)))
    other = nano("pos=rope", "model.n_layers=1", "model.seq_len=16", seed=3, gain=8)
    expected = generated(decoder, 50, **GREEDY)
    for draft in (near, other):
        given = settings(50, draft_tokens=draft_tokens, **GREEDY)
        found = speculate(decoder, draft, PROMPT.tolist(), settings=given, generator=torch.Generator())
        assert list(found) == expected


class Table:
    """Stands for a decoder: the logits of the next token depend on the last one alone."""

    def __init__(self, vocab_size: int, seed: int):
        self.table = 1.5 * torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))
        self.embed = SimpleNamespace(tokens=SimpleNamespace(weight=self.table))
        self.pos, self.layers, self.seq_len = SimpleNamespace(max_len=None), [], 1000

    def new_cache(self, max_len, precision="full"):
        return SimpleNamespace(keep_all=lambda: None, rewind=lambda n: None)

    def forward(self, tokens_BT, cache):
        return self.table[tokens_BT]


def every_outcome(monkeypatch, run):
    """(probability, result) of `run` for each way in which its draws can fall."""
    paths: list[tuple[int, ...]] = [()]
    while paths:
        path, taken, probability = paths.pop(), [], []

        def draw_one(p, generator, path=path, taken=taken, probability=probability):
            p = p.double() / p.double().sum()
            if len(taken) < len(path):
                choice = path[len(taken)]
            else:
                choice, *others = p.nonzero()[:, 0].tolist()
                paths.extend((*taken, other) for other in others)
            taken.append(choice)
            probability.append(p[choice].item())
            return choice

        monkeypatch.setattr(speculation, "draw_one", draw_one)
        result = run()
        yield math.prod(probability), result


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.6, "top_k": 3, "min_p": 0.1}, {"typical_p": 0.8}, {"repetition_penalty": 1.8}],
    ids=str,
)
def test_a_draft_leaves_the_distribution_as_it_is(monkeypatch, given):
    """Of all texts of four tokens out of four, exactly: every outcome of every draw is gone through."""
    decoder, draft, generator = (cast(Any, each) for each in (Table(4, seed=0), Table(4, seed=1), None))
    prompt = [1, 2]
    how = settings(4, draft_tokens=2, **given)
    found: dict[tuple[int, ...], float] = {}
    run = partial(speculate, decoder, draft, prompt, settings=how, generator=generator)
    for probability, text in every_outcome(monkeypatch, lambda: tuple(run())):
        found[text] = found.get(text, 0.0) + probability
    for text in itertools.product(range(4), repeat=4):
        expected = 1.0
        for i, token in enumerate(text):
            before = [*prompt, *text[:i]]
            seen = None
            if how.repetition_penalty != 1:
                seen = torch.zeros(1, 4, dtype=torch.bool).index_fill_(1, torch.tensor(before), True)
            expected *= how.probabilities(decoder.table[before[-1:]], seen)[0, token].item()
        assert found.get(text, 0.0) == pytest.approx(expected, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)


def test_a_draft_that_does_not_fit_is_refused(nano):
    decoder, prompt = nano(), [1]
    with pytest.raises(ValueError, match="use a draft of the same tokenizer"):
        next(
            speculate(
                decoder,
                nano("model.vocab_size=64"),
                prompt,
                settings=settings(3),
                generator=torch.Generator(),
            )
        )
    with pytest.raises(ValueError, match="cannot take one back"):
        next(
            speculate(
                decoder, nano("attn=performer"), prompt, settings=settings(3), generator=torch.Generator()
            )
        )


def test_greedy_with_a_penalty_equals_transformers(gpt2_pair):
    ours, theirs = gpt2_pair()
    expected = theirs.generate(
        PROMPT[None],
        do_sample=False,
        repetition_penalty=1.4,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generated(ours, 40, repetition_penalty=1.4, **GREEDY)
    assert found == expected[0, len(PROMPT) :].tolist()


def test_drawn_tokens_follow_the_probabilities(nano):
    decoder = nano(gain=8)
    with torch.no_grad():
        logits = decoder(PROMPT[None])[:, -1]
    p = settings(1, top_k=5).probabilities(logits)[0]
    drawn = [generated(decoder, 1, seed=s, top_k=5)[0] for s in range(200)]
    counts = torch.bincount(torch.tensor(drawn), minlength=512)
    expected = 200 * p[p > 0]
    assert counts[p == 0].sum() == 0
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 18.5  # four degrees of freedom: 0.1 %


def test_a_seed_repeats_and_another_differs(nano):
    decoder = nano(gain=8)
    one, again, other = (generated(decoder, 30, seed=s) for s in (1, 1, 2))
    assert one == again != other
