"""The peak memory of a run's devices, forecast from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hydra.utils import instantiate
from omegaconf import DictConfig

from scantling.model.decoder import Decoder
from scantling.training.memory import ENGINES, Choice, DecoderSizes, Memory, training_memory

Forecast = Callable[[Choice], Memory]
"""The peak of one device, for each choice of what memory depends on."""


def memory_forecast(
    config: DictConfig, decoder: Decoder, *, devices: int, half_precision: bool, on_gpu: bool
) -> Forecast:
    """The forecast for one of `devices` devices, under the settings of `config` beside the choice's."""
    sizes = DecoderSizes.of(decoder, instantiate(config.optim, _convert_="all"))
    return lambda choice: training_memory(
        sizes,
        sequences=choice.micro_batch_size,
        seq_len=decoder.seq_len,
        half_precision=half_precision,
        checkpoint_activations=choice.checkpoint_activations,
        engine=ENGINES[choice.engine],
        devices=devices,
        accumulates=choice.micro_batch_size * devices < config.batch_size,
        averages=config.ema.decay is not None,
        on_gpu=on_gpu,
    )


def cheapest_within(limit: float, choices: Iterable[Choice], forecast: Forecast) -> Choice | None:
    """The first choice whose peak is at most `limit` bytes; None: there is none. The cheapest come first."""
    return next((choice for choice in choices if forecast(choice).total <= limit), None)
