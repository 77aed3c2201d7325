"""Linear attention: `attn=performer`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from scantling.model.attn import Mixer
from scantling.model.cache import Buffer
from scantling.model.checks import check_whole
from scantling.model.linear import Linear
from scantling.model.pos import Rotation
from scantling.model.scores import Scores

CHUNK = 64
"""Tokens that attend to one another by products of all pairs; earlier ones come in as a sum."""


class StateCache:
    """S = Σ φ(k_s)·[v_s, 1]ᵀ over all tokens so far: the same room whatever their number."""

    def __init__(self):
        self.state_BHME: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the state, in this order; a row may be taken twice."""
        if self.state_BHME is not None:
            self.state_BHME = self.state_BHME[rows]

    @property
    def nbytes(self) -> int:
        """Memory of the state; 0 before the first token."""
        return 0 if self.state_BHME is None else self.state_BHME.nbytes


class Performer(Mixer):
    """out(φ(q)·Σ_s φ(k_s)·v_sᵀ / φ(q)·Σ_s φ(k_s)), s ≤ t: time and memory linear in the context. Choromanski
    et al. 2020 (FAVOR+), arXiv:2009.14794, §2.2 and §2.3.

    φ(x) = exp(W·x' - |x'|²/2)/√M with x' = x/E^¼ and M orthogonal random rows W, so that φ(q)·φ(k) is on
    average exp(q·k/√E). W is drawn once, for the layer, and stored with the model. No scores are formed, so a
    position that adds to them cannot be used; in float32 throughout.
    """

    takes_bias: ClassVar[bool] = False
    features_ME: Tensor

    def __init__(self, d_model: int, n_heads: int, d_head: int, layer: int, *, n_features: int, bias: bool):
        super().__init__()
        check_whole("attn.n_features", n_features)
        self.n_heads, self.d_head, self.n_features = n_heads, d_head, n_features
        self.d_rotated = d_head
        self.qkv = Linear(d_model, 3 * n_heads * d_head, bias=bias)
        self.out = Linear(n_heads * d_head, d_model, bias=bias)
        self.register_buffer("features_ME", orthogonal_features(n_features, d_head, seed=layer))

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: Scores,
        cache: StateCache | None,
    ) -> Float[Tensor, "B T D"]:
        qkv_BTNE = self.qkv(x_BTD).unflatten(-1, (3 * self.n_heads, self.d_head))
        q_BTHE, k_BTHE, v_BTHE = qkv_BTNE.chunk(3, dim=2)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q_BHTM = self.features(rotate(q_BTHE))
            k_BHTM = self.features(rotate(k_BTHE))
            v_BHTE = v_BTHE.transpose(1, 2).float()
            if scores.placement.valid_BT is not None:
                k_BHTM = k_BHTM * scores.placement.valid_BT[:, None, :, None]
            state = None if cache is None else cache.state_BHME
            o_BHTE, state = causal_sums(q_BHTM, k_BHTM, v_BHTE, state)
        if cache is not None:
            cache.state_BHME = state
        return self.out(o_BHTE.type_as(v_BTHE).transpose(1, 2).flatten(2))

    def features(self, x_BTHE: Float[Tensor, "B T H E"]) -> Float[Tensor, "B H T M"]:
        """φ(x) of queries or keys, in float32."""
        x_BHTE = x_BTHE.transpose(1, 2).float() * self.d_head**-0.25
        projected = x_BHTE @ self.features_ME.T
        return torch.exp(projected - x_BHTE.square().sum(-1, keepdim=True) / 2) / self.n_features**0.5

    def mixing_flops(self, keys: float) -> float:
        """Features of q and k; all pairs of a chunk, twice; the sum of earlier chunks, made and used."""
        M, E, pairs = self.n_features, self.d_head, min(keys, CHUNK)
        return float(self.n_heads * (4 * M * E + 2 * pairs * M + 2 * pairs * (E + 1) + 4 * M * (E + 1)))

    def mean_keys(self, seq_len: int) -> float:
        return (seq_len + 1) / 2

    def cached_numbers(self, context: int) -> int:
        return self.n_heads * self.n_features * (self.d_head + 1)

    def cached_vectors(self, context: int) -> int:
        """None: the state stays in float32."""
        return 0

    def new_cache(self, max_len: int, buffer: type[Buffer]) -> StateCache:
        return StateCache()


def causal_sums(
    q_BHTM: Tensor, k_BHTM: Tensor, v_BHTE: Tensor, state_BHME: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ_{s≤t} (q_t·k_s)·v_s / Σ_{s≤t} q_t·k_s for every t, and the state after the last; chunk by chunk."""
    B, H, T, M = q_BHTM.shape
    ones = torch.ones_like(v_BHTE[..., :1])
    v_BHTE = torch.cat((v_BHTE, ones), -1)
    if state_BHME is None:
        state_BHME = v_BHTE.new_zeros(B, H, M, v_BHTE.shape[-1])
    sums = []
    for start in range(0, T, CHUNK):
        chunk = slice(start, start + CHUNK)
        q, k, v = q_BHTM[:, :, chunk], k_BHTM[:, :, chunk], v_BHTE[:, :, chunk]
        sums.append((q @ k.mT).tril() @ v + q @ state_BHME)
        state_BHME = state_BHME + k.mT @ v
    sums_BHTE = torch.cat(sums, 2)
    return sums_BHTE[..., :-1] / sums_BHTE[..., -1:], state_BHME


def orthogonal_features(n_features: int, width: int, seed: int) -> Float[Tensor, "M E"]:
    """Rows orthogonal in blocks of `width`, each as long as a row of standard normal numbers. Ibid., §2.4."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    blocks = []
    for _ in range(math.ceil(n_features / width)):
        Q, R = torch.linalg.qr(normal(width, width))
        blocks.append(Q * R.diagonal().sign())  # without the signs Q would favour some directions
    lengths = normal(n_features, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:n_features] * lengths
