"""The models of an IsoFLOP study: for every budget some sizes about its optimum, as real shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from omegaconf import DictConfig, open_dict

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN
from scantling.analysis.design import (
    LEARNING_RATES,
    Grid,
    Proportions,
    Shape,
    nearest_shape,
    optimal_size,
)
from scantling.config.decoder import build_decoder
from scantling.model.accounting import convention, non_embedding, parameter_counts
from scantling.training.budget import steps_for


@dataclass(frozen=True)
class Cell:
    """A model trained for a budget, under the name that its arm has."""

    name: str
    budget: float
    shape: Shape
    parameters: int
    steps: int
    tokens: int
    flops: float
    lr: float


def cells_of(config: DictConfig, grid: Grid, law: dict[str, float], flops: float) -> list[Cell]:
    """Real models for every budget.

    Raises ValueError where two sizes come to one shape, or a step is beyond a budget.
    """
    counted, proportions = counter(config), proportions_of(config)
    rule, reference = LEARNING_RATES[config.isoflop.lr_rule], counted(own_shape(config))[2]
    tokens_per_step = config.batch_size * config.model.seq_len
    about = linear_in_depth(counted)
    cells: list[Cell] = []
    for budget in grid.budgets_of(flops):
        budget = float(f"{budget:.3g}")
        k = FLOPS_PER_PARAMETER_AND_TOKEN
        for _ in range(2):  # small models take more FLOPs a parameter than 6, which moves their optimum
            middle = nearest_shape(optimal_size(law, budget, k), proportions, about)
            k = counted(middle)[1] / counted(middle)[0]
        here: list[Cell] = []
        for target in grid.sizes_of(law, budget, k):
            shape = nearest_shape(target, proportions, about)
            parameters, per_token, with_head = counted(shape)
            steps = steps_for(
                tokens_per_step=tokens_per_step, n_params=parameters, flops_per_token=per_token, flops=budget
            )
            tokens = steps * tokens_per_step
            name = f"c{budget:.3g}_{shape.n_layers}x{shape.d_model}".replace("+", "").replace(".", "p")
            lr = float(f"{rule(with_head, reference, config.lr):.3g}")
            here.append(Cell(name, budget, shape, parameters, steps, tokens, tokens * per_token, lr))
        if len({cell.shape for cell in here}) < len(here):
            raise ValueError(
                f"at {budget:.3g} FLOPs two sizes come to one shape: take fewer isoflop.sizes, "
                "a larger isoflop.spread, or more FLOPs"
            )
        cells += here
    return cells


def counter(config: DictConfig) -> Callable[[Shape], tuple[int, float, int]]:
    """A function that gives a shape's sizes.

    They are all parameters, training FLOPs a token (`exact`), and parameters without
    embeddings but with the head.
    """

    @cache
    def counted(shape: Shape) -> tuple[int, float, int]:
        sized = copy.deepcopy(config)
        with open_dict(sized):
            sized.model.update(vars(shape))
        decoder = build_decoder(sized, sized.model.vocab_size, "meta")
        counts = parameter_counts(decoder)
        head = shape.d_model * sized.model.vocab_size
        per_token = convention("exact")(decoder, decoder.seq_len)
        return sum(counts.values()), per_token, non_embedding(counts) + head

    return counted


def linear_in_depth(counted: Callable[[Shape], tuple[int, float, int]]) -> Callable[[Shape], float]:
    """Parameters of a shape from those of one and two layers, so that a search need not build every depth."""

    def about(shape: Shape) -> float:
        one, two = (counted(replace(shape, n_layers=n))[0] for n in (1, 2))
        return one + (two - one) * (shape.n_layers - 1)

    return about


def own_shape(config: DictConfig) -> Shape:
    """The shape of the preset itself."""
    return Shape(**{name: config.model[name] for name in Shape.__dataclass_fields__})


def proportions_of(config: DictConfig) -> Proportions:
    """The proportions of the preset; `isoflop.aspect` beats its d_model per layer."""
    model = config.model
    return Proportions(
        aspect=config.isoflop.aspect or model.d_model / model.n_layers,
        d_head=model.d_model // model.n_heads,
        widening=model.d_ff / model.d_model,
        kv_share=model.n_kv_heads / model.n_heads,
    )
