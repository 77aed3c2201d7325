"""Positions against `transformers`, the authors' code and the papers' formulas."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import GPTNeoXConfig, LlamaConfig, SmolLM3Config, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from scantling.model.pos import ALiBi, EveryNth, Learned, Position, RoPE, Sinusoidal, T5Relative
from scantling.model.rope_scaling import unscaled

B, T, H, E = 2, 24, 4, 16
D = H * E


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rope(d_head: int = E, *, theta=10000.0, fraction=1.0, interleaved=False, scaling=unscaled) -> RoPE:
    return RoPE(
        H * d_head, H, d_head, theta=theta, fraction=fraction, interleaved=interleaved, scaling=scaling
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("start", [0, 100])
def test_rope_equals_llamas(theta, start):
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=H,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = normal(B, T, H, E), normal(B, T, H, E, seed=1)
    positions = torch.arange(start, start + T)[None]
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotate = rope(theta=theta).rotate(positions)
    assert_close(rotate(q), expected_q)
    assert_close(rotate(k), expected_k)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_partial_rope_equals_gpt_neoxs(fraction):
    config = GPTNeoXConfig(
        hidden_size=D,
        num_attention_heads=H,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction},
    )
    q, k, positions = normal(B, T, H, E), normal(B, T, H, E, seed=1), torch.arange(3, 3 + T)[None]
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q, positions)
    expected = neox.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    rotate = rope(fraction=fraction).rotate(positions)
    assert_close((rotate(q), rotate(k)), expected)
    assert torch.equal(rotate(q)[..., round(E * fraction) :], q[..., round(E * fraction) :])


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_interleaved_rope_equals_gptjs(fraction):
    """GPT-J turns the first `rotary_dim` channels of each head."""
    x, width = normal(B, T, H, E), round(E * fraction)
    positions = torch.stack([torch.arange(T), torch.arange(9, 9 + T)])  # rows may stand apart
    sin, cos = gptj.create_sinusoidal_positions(64, width)[positions].chunk(2, dim=-1)
    turned = gptj.apply_rotary_pos_emb(x[..., :width], sin, cos)
    ours = rope(fraction=fraction, interleaved=True).rotate(positions)(x)
    assert_close(ours, torch.cat([turned, x[..., width:]], -1))


def test_interleaved_rope_is_the_halved_one_of_permuted_channels():
    x, positions = normal(B, T, H, E), torch.arange(T)[None]
    order = torch.arange(E).view(2, -1).T.flatten()  # 0, E/2, 1, E/2+1, …
    assert_close(
        rope(interleaved=True).rotate(positions)(x[..., order]), rope().rotate(positions)(x)[..., order]
    )


@pytest.mark.parametrize("every", [2, 4])
def test_every_nth_layer_is_smollm3s(every):
    """Its list says for each layer whether it rotates."""
    pos = EveryNth(
        D,
        H,
        E,
        nth=Position,
        others=lambda *shape: rope(theta=5000.0),
        every=every,
    )
    x, positions = normal(B, T, H, E), torch.arange(T)[None]
    rotations = pos.rotations(positions, 12)
    rotates = SmolLM3Config(num_hidden_layers=12, no_rope_layer_interval=every).no_rope_layers
    assert rotates is not None
    assert len(rotations) == len(rotates) == 12
    for rotation, rotated in zip(rotations, rotates, strict=True):
        assert_close(rotation(x), rope(theta=5000.0).rotate(positions)(x) if rotated else x, rtol=0, atol=0)


@pytest.mark.parametrize("every", [0, -1])
def test_a_period_of_layers_is_a_whole_number(every):
    with pytest.raises(ValueError, match=f"pos.every={every} must be a whole number, at least 1"):
        EveryNth(D, H, E, nth=Position, others=Position, every=every)


def test_rope_is_a_product_of_complex_numbers():
    """Su et al. 2021, eq. 12: f(x, t) = x·exp(i·t·θ_i), the pair of channels read as one complex number."""
    x, positions = normal(B, T, H, E), torch.arange(7, 7 + T)
    frequencies = torch.tensor([10000 ** (-2 * i / E) for i in range(E // 2)], dtype=torch.float64)
    pairs = torch.complex(x[..., : E // 2].double(), x[..., E // 2 :].double())
    angles = positions[:, None, None].double() * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    assert_close(rope().rotate(positions[None])(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_gradients_turn_back(interleaved, fraction):
    """A rotation's gradient is its inverse: turning what was turned gives x again."""
    rotate = rope(interleaved=interleaved, fraction=fraction).rotate(torch.arange(7, 10)[None])
    x = normal(1, 3, 2, E).double().requires_grad_()
    torch.autograd.gradcheck(rotate, x)
    (back,) = torch.autograd.grad(rotate(x), x, rotate(x.detach()))
    assert_close(back, x.detach(), rtol=1e-6, atol=1e-6)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = normal(1, 1, H, E).expand(1, T, H, E), normal(1, 1, H, E, seed=1).expand(1, T, H, E)

    def scores(start: int) -> torch.Tensor:
        rotate = rope().rotate(torch.arange(start, start + T)[None])
        return torch.einsum("bthe,bshe->bhts", rotate(q), rotate(k))

    near, far = scores(0), scores(1000)
    assert_close(near, far, rtol=1e-4, atol=2e-3)  # float32 angles around 1000 are good to 1e-4
    for offset in range(-T + 1, T):  # every diagonal is constant …
        diagonal = near.diagonal(offset, dim1=-2, dim2=-1)
        assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert near[0, 0, :, 0].std() > 0.1  # … and they differ


def test_rope_keeps_lengths():
    x = normal(B, T, H, E)
    assert_close(rope().rotate(torch.arange(T)[None])(x).norm(dim=-1), x.norm(dim=-1))


def test_rope_refuses_an_odd_head():
    with pytest.raises(ValueError, match="d_head=15 must be even"):
        rope(15)


def slopes_of_the_authors(n: int) -> list[float]:
    """ofirpress/attention_with_linear_biases, fairseq/models/transformer.py, `get_slopes`."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return slopes_of_the_authors(closest) + slopes_of_the_authors(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("n_heads", [1, 4, 6, 8, 12, 16, 71])
def test_alibi_slopes_equal_blooms_and_the_authors(n_heads):
    slopes = ALiBi(n_heads * 8, n_heads, 8).slopes_H
    # Bloom's tensor is slope · key position, which differs from -slope · distance by a constant in each row.
    bloom = build_alibi_tensor(torch.ones(1, 3, dtype=torch.long), n_heads, torch.float32)
    assert_close(slopes, bloom[:, 0, 1], rtol=1e-6, atol=0)
    assert_close(slopes, torch.tensor(slopes_of_the_authors(n_heads)), rtol=1e-6, atol=0)


def test_alibi_bias_equals_its_figure():
    """Press et al. 2021, figure 3: distances 0, -1, -2 … to the left, by the slope; 8 heads start at 1/2."""
    bias = ALiBi(64, 8, 8).bias
    positions = torch.arange(4)
    rows = bias(torch.tensor(0), positions[:, None], positions[None])
    expected = -0.5 * torch.tensor([[0, -1, -2, -3], [1, 0, -1, -2], [2, 1, 0, -1], [3, 2, 1, 0]])
    assert_close(rows, expected)
    far = bias(torch.tensor([0, 7]), torch.tensor(5000), torch.tensor(0))
    assert_close(far, torch.tensor([-2500.0, -5000 / 256]))


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_t5_bias_equals_t5s(n_buckets, max_distance):
    """A decoder's: earlier keys alone have buckets."""
    config = T5Config(
        d_model=D,
        num_heads=H,
        d_kv=E,
        is_decoder=True,
        relative_attention_num_buckets=n_buckets,
        relative_attention_max_distance=max_distance,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5Relative(D, H, E, n_buckets=n_buckets, max_distance=max_distance)
    ours.weight.data.copy_(normal(n_buckets, H))
    theirs.relative_attention_bias.weight.data.copy_(ours.weight)
    distance = torch.arange(300)
    bucket = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=n_buckets, max_distance=max_distance
    )
    assert torch.equal(ours.bucket(distance), bucket)
    head, query = torch.arange(H)[:, None, None], torch.arange(40, 300)[:, None]
    bias = ours.bias(head, query, torch.arange(300))
    expected = theirs.compute_bias(260, 300, past_seen_tokens=40)[0]
    causal = torch.arange(300) <= query
    assert_close(bias.where(causal, 0), expected.where(causal, 0), rtol=0, atol=0)


@pytest.mark.parametrize("start", [0, 9])
def test_sinusoidal_equals_the_papers_formula(start):
    x = normal(B, T, D)
    out = Sinusoidal(D, H, E, theta=10000.0, scale=0.5).embed(x, torch.arange(start, start + T)[None])
    table = torch.empty(T, D)
    for t in range(T):
        for i in range(D // 2):
            angle = (start + t) / 10000 ** (2 * i / D)
            table[t, 2 * i], table[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    assert_close(out, x + 0.5 * table, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(0, 128), (1, 128), (32, 16), (32, 0)])
def test_t5_refuses_buckets_that_are_none(n_buckets, max_distance):
    """Half of them are single distances, and the others end beyond these."""
    with pytest.raises(
        ValueError, match=f"n_buckets={n_buckets} .* at least 2, and max_distance={max_distance}"
    ):
        T5Relative(D, H, E, n_buckets=n_buckets, max_distance=max_distance)


def test_sinusoidal_refuses_an_odd_width():
    with pytest.raises(ValueError, match="d_model=33 must be even"):
        Sinusoidal(33, 3, 11, theta=10000.0, scale=1.0)


def test_learned_equals_a_lookup():
    learned = Learned(D, H, E, max_len=64)
    learned.weight.data.copy_(normal(64, D, seed=2))
    x, positions = normal(B, T, D), torch.arange(5, 5 + T)[None]
    assert_close(learned.embed(x, positions), x + torch.nn.functional.embedding(positions, learned.weight))


def test_hooks_do_nothing_by_default():
    none, x, positions = Position(D, H, E), normal(B, T, D), torch.arange(T)[None]
    heads = normal(B, T, H, E)
    assert none.embed(x, positions) is x
    assert none.rotate(positions)(heads) is heads
    assert none.bias is None
    assert none.max_len is None
