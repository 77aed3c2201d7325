"""What every option of every part must do, one at a time in the `nano` model: a new yaml is tested by being
there."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from warm import CONTEXT, warm_up

from scantling.config.composition import PARTS
from scantling.model.accounting import forward_flops_per_token
from scantling.model.cross_entropy import IGNORED, negative_log_likelihood
from scantling.model.head import Full

CONF = Path(__file__).resolve().parents[2] / "conf"
T = 64
TOKENS = torch.randint(512, (3, T), generator=torch.Generator().manual_seed(0))


def host(path: Path) -> list[str]:
    """The option that has this nested group: none needed where the default has it."""
    group, nested = path.relative_to(CONF).parts[:2]
    defaults = {"attn": "mha", "pos": "rope", "ffn": "swiglu"}
    choosing = [f.stem for f in sorted((CONF / group).glob("*.yaml")) if f"- {nested}: " in f.read_text()]
    assert choosing, f"no option of {group}= chooses among {group}/{nested}"
    return [] if defaults[group] in choosing else [f"{group}={choosing[0]}"]


OPTIONS = [(f"{group}={path.stem}",) for group in PARTS for path in sorted((CONF / group).glob("*.yaml"))] + [
    (*host(path), f"{path.parent.relative_to(CONF)}={path.stem}")
    for group in PARTS
    for path in sorted((CONF / group).glob("*/*.yaml"))
]

pytestmark = pytest.mark.parametrize("option", OPTIONS, ids=" ".join)


@pytest.fixture
def lively(nano, option):
    """nano with the option and biases, weights large enough for attention to be far from uniform."""
    decoder = nano(*option, "model.bias=true", gain=8).eval()
    jitter(decoder)
    return decoder


@torch.no_grad()
def jitter(decoder):
    """Move vectors away from where they start: a factor of 0 or a bias of 0 would hide what it multiplies or
    adds."""
    generator = torch.Generator().manual_seed(1)
    for p in decoder.parameters():
        if p.ndim < 2:
            p.add_(torch.empty(p.shape).uniform_(-0.1, 0.1, generator=generator))


def sees_all(decoder) -> bool:
    return all(block.attn.mean_keys(T) == (T + 1) / 2 for block in decoder.layers)


@torch.no_grad()
def test_a_future_token_never_changes_past_logits(lively):
    logits = lively(TOKENS)
    for t in (1, 20, T - 1):
        changed = TOKENS.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 512
        after = lively(changed)
        assert_close(after[:, :t], logits[:, :t], rtol=0, atol=2e-5)
        assert (after[:, t:] - logits[:, t:]).abs().amax((0, 2)).min() > 1e-2  # every later one does change


@torch.no_grad()
def test_a_past_token_changes_later_logits(lively):
    """All of them, unless the layers see only some: then none beyond what the layers together can reach."""
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 512
    difference = (lively(changed) - lively(TOKENS)).abs().amax((0, 2))
    if sees_all(lively):
        assert difference[3:].min() > 1e-5
        return
    t, s = torch.arange(T)[:, None], torch.arange(T)
    reached = torch.eye(T, dtype=torch.bool)
    for block in lively.layers:
        sees = (s <= t) & block.attn.pattern.sees(t, s)
        reached = (sees.float() @ reached.float()) > 0
    assert (difference[reached[:, 3]] > 1e-6).all()
    assert not difference[~reached[:, 3]].any()


@torch.no_grad()
@pytest.mark.parametrize("splits", [[40], [1] * 40, [24] + [1] * 16, [5, 1, 14, 1, 19]], ids=len)
def test_cached_logits_equal_uncached(lively, splits):
    tokens = TOKENS[:, :40]
    cache = lively.new_cache(max_len=44)
    pieces = [lively(piece, cache) for piece in tokens.split(splits, dim=1)]
    assert cache.length == 40
    assert_close(torch.cat(pieces, 1), lively(tokens), rtol=0, atol=5e-5)


@torch.no_grad()
def test_rows_of_different_length_share_a_cache(lively):
    """Prompts of 30, 7 and 19 tokens, padded on the right, then ten more tokens each, one by one and four at
    once."""
    lengths = torch.tensor([30, 7, 19])
    cache = lively.new_cache(max_len=48)
    padded = torch.where(torch.arange(30) < lengths[:, None], TOKENS[:, :30], 0)
    logits = [lively(padded, cache, lengths_B=lengths)]
    for start, n in [*((i, 1) for i in range(6)), (6, 4)]:
        at = lengths[:, None] + start + torch.arange(n)
        logits.append(lively(TOKENS.gather(1, at), cache))
    whole = lively(TOKENS)
    for row, length in enumerate(lengths):
        ours = torch.cat([logits[0][row, :length], *(piece[row] for piece in logits[1:])])
        assert_close(ours, whole[row, : length + 10], rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize(("precision", "error"), [("int8", 0.06), ("fp8", 0.2)])
def test_a_quantised_cache_stays_near(lively, precision, error):
    """Relative to the spread of the logits, after 24 tokens at once and 16 one by one."""
    cache = lively.new_cache(44, precision)
    pieces = [lively(piece, cache) for piece in TOKENS[:, :40].split([24] + [1] * 16, dim=1)]
    expected = lively(TOKENS[:, :40])
    difference = torch.cat(pieces, 1) - expected
    assert difference.std() < error * expected.std()


@torch.no_grad()
def test_the_cache_takes_the_bytes_it_is_said_to(lively):
    cache = lively.new_cache(max_len=64)
    lively(TOKENS[:1], cache)
    assert cache.nbytes == 4 * sum(block.attn.cached_numbers(64) for block in lively.layers)


@torch.no_grad()
def test_a_batch_equals_its_rows(lively):
    rows = torch.cat([lively(row[None]) for row in TOKENS])
    assert_close(lively(TOKENS), rows, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_shorter_context_gives_the_same_logits(lively):
    assert_close(lively(TOKENS[:, :11]), lively(TOKENS)[:, :11], rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient(lively):
    decoder = lively.train()
    torch.manual_seed(0)
    for _ in range(4):  # stochastic depth leaves some out
        decoder(TOKENS[:, :-1], targets_BT=TOKENS[:, 1:]).backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


@pytest.fixture(scope="module")
def unchecked():
    """A process in which the model goes without the checks of shapes that tests add, and that no compiler can
    trace."""
    warm_up()
    with CONTEXT.Pool(1) as pool:
        yield pool


def gradients(decoder, compiled: bool, fullgraph: bool) -> list[torch.Tensor]:
    """The loss and its gradients in bf16; compiled they come from what the compiler traced, which torch
    itself then runs."""
    torch.compiler.reset()
    if compiled:
        decoder.compile(backend="eager", fullgraph=fullgraph)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(TOKENS[:, :-1], targets_BT=TOKENS[:, 1:])
    return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]


def test_compiled_it_trains_the_same(nano, option, unchecked):
    """As `trainer.compile=true` has it traced: in one graph, unless what is computed depends on what the
    tokens are."""
    decoder = nano(*option, "model.n_layers=1", gain=8)
    jitter(decoder)
    fullgraph = not decoder.routers and type(decoder.head) is Full
    eager, traced = (unchecked.apply(gradients, (decoder, compiled, fullgraph)) for compiled in (False, True))
    assert_close(traced[0], eager[0], rtol=1e-2, atol=0)
    for a, b in zip(traced, eager, strict=True):  # in norm: rounding turns hidden units of ReLU on and off
        assert (a - b).norm() < 0.2 * b.norm()


@torch.no_grad()
def test_forward_flops_equal_torchs_count(nano, option):
    """torch counts attention over all T keys, causal and seen or not, and on CPU only by the math kernel's
    products."""
    decoder = nano(*option)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(TOKENS)
    assert TOKENS.numel() * forward_flops_per_token(decoder, T, T) == counter.get_total_flops()


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(lively):
    with torch.autocast("cpu", torch.bfloat16):
        low = lively(TOKENS)
    high = lively(TOKENS)
    # The median, for a token whose router was of two minds may go to another expert.
    assert (low.float() - high).abs().median() < 0.02 * high.std()


@torch.no_grad()
def test_the_loss_is_that_of_the_logits(lively):
    """In both precisions, with targets left out."""
    targets = TOKENS.roll(-1, 1)
    targets[:, -1] = IGNORED
    expected = negative_log_likelihood(lively(TOKENS), targets)
    assert_close(lively(TOKENS, targets_BT=targets), expected, rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(lively(TOKENS, targets_BT=targets), expected, rtol=0.02, atol=0)


def test_a_seed_repeats_and_another_differs(nano, option):
    first, again, other = (dict(nano(*option, seed=s).named_parameters()) for s in (1, 1, 2))
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        assert p.ndim < 2 or not torch.equal(p, other[name]), name


def test_what_two_models_share_starts_equal(nano, option):
    """Runs that differ in one part are paired: tensors of one name and shape have the same values in both."""
    default, ours = (dict(nano(*overrides).named_parameters()) for overrides in ((), option))
    shared = [name for name in default.keys() & ours.keys() if default[name].shape == ours[name].shape]
    assert shared
    for name in shared:
        if ours[name].ndim >= 2:
            assert torch.equal(default[name], ours[name]), name


@torch.no_grad()
def test_a_state_dict_brings_the_logits_back(nano, option, lively):
    again = nano(*option, "model.bias=true", seed=7).eval()
    again.load_state_dict(lively.state_dict())
    assert torch.equal(again(TOKENS), lively(TOKENS))


@pytest.mark.parametrize("value", [0, -1])
def test_a_number_out_of_range_is_refused_by_its_name(nano, option, value):
    """Each number that the option's own file sets: 0 and -1 either make a model that can be trained, or are
    refused."""
    group, name = option[-1].split("=")
    settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml")))
    numbers = {key: type(default) for key, default in settings.items() if type(default) in (int, float)}
    for key, kind in numbers.items():
        decoder, refusal = None, ""
        try:
            decoder = nano(*option, f"{group.replace('/', '.')}.{key}={kind(value)}")
        except ValueError as error:
            refusal = str(error)
        if decoder is None:
            assert key in refusal
            continue
        loss = decoder(TOKENS, targets_BT=TOKENS.roll(-1, 1)) + decoder.auxiliary_loss()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)
