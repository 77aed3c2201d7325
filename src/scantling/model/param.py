"""How initial weights, learning rates and scales follow the width of the model: `param=`."""

from __future__ import annotations

from dataclasses import dataclass

from scantling.model.checks import check_positive


@dataclass(frozen=True)
class Parametrisation:
    """Factors on the standard values. Hidden matrices are those of the linear layers inside blocks."""

    hidden_std: float = 1.0
    """Factor on the initial standard deviation of hidden matrices."""
    hidden_rate: float = 1.0
    """Factor on the learning rate of hidden matrices; the product of rate and weight decay stays."""
    logits: float = 1.0
    scores: float = 1.0
    """Factor on the scores of attention, before the softmax."""

    @property
    def is_standard(self) -> bool:
        """Whether every factor is 1."""
        return self == Parametrisation()


def standard(d_model: int, d_head: int) -> Parametrisation:
    """No factor: the best learning rate falls as the model grows wider."""
    return Parametrisation()


def mup(d_model: int, d_head: int, *, base_width: int, base_d_head: int) -> Parametrisation:
    """μP with r = d_model/base_width: hidden matrices start at 1/√r of the deviation and learn at 1/r of the
    rate, logits are times 1/r, scores q·k go by 1/E instead of 1/√E. Yang et al. 2022 (Tensor Programs V),
    arXiv:2203.03466, table 8 for Adam, and definition 4.1.

    Embeddings, positions, norms and biases keep deviation and rate. At the base nothing changes.
    Widths should grow together: d_ff and heads × d_head in proportion to d_model. Adam's ε stays, far
    below the size of gradients.

    Raises ValueError when a base is not positive.
    """
    check_positive("param.base_width", base_width)
    check_positive("param.base_d_head", base_d_head)
    r = d_model / base_width
    return Parametrisation(
        hidden_std=r**-0.5, hidden_rate=1 / r, logits=1 / r, scores=(base_d_head / d_head) ** 0.5
    )
