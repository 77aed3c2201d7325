"""Every combination of norm, position, attention, feed-forward and block trains."""

from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hydra.utils import instantiate
from torch.nn.functional import cross_entropy

from scantling.model.decoder import Decoder

PARTS = {
    "norm": ["layernorm", "rmsnorm", "none"],
    "pos": ["sinusoidal", "learned", "rope", "alibi", "none"],
    "attn": ["mha", "gqa", "mqa"],
    "ffn": ["relu", "gelu", "swiglu", "geglu", "relu2"],
    "block": ["pre", "post"],
}
TOKENS = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def part(composed):
    """`part("attn", "gqa")` is that yaml's factory; composed once: composing takes as long as training."""
    return cache(lambda group, option: instantiate(composed("model=nano", f"{group}={option}")[group]))


@pytest.fixture(scope="module")
def shape(composed) -> dict:
    keys = ("n_layers", "d_model", "n_heads", "d_head", "d_ff", "vocab_size", "seq_len", "dropout")
    return {"layers_per_block": 1} | {key: composed("model=nano").model[key] for key in keys}


@pytest.mark.parametrize("options", product(*PARTS.values()), ids="-".join)
def test_five_steps_on_one_batch_lower_the_loss(part, shape, options):
    parts = {group: part(group, option) for group, option in zip(PARTS, options, strict=True)}
    decoder = Decoder(
        **shape,
        **parts,
        embed=part("embed", "tied"),
        head=part("head", "full"),
        param=part("param", "standard"),
    )
    decoder.initialise(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(6):
        loss = cross_entropy(decoder(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - 6.24) < 0.2, losses  # ln 512: at the start all tokens are about as likely
    assert all(after < before for before, after in pairwise(losses)), losses
