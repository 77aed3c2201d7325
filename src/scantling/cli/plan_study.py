"""plan.py with `isoflop.flops` or `isoflop.device_hours`: a study planned, and its yaml written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from scantling.analysis.allocation import hoffmann_loss
from scantling.analysis.design import (
    LEARNING_RATES,
    PORIAN_RANGE,
    Forecast,
    Grid,
    alternatives,
    forecast,
)
from scantling.config.composition import unknown_entries
from scantling.config.decoder import build_decoder
from scantling.config.options import CONF, ROOT, is_group
from scantling.model import hardware
from scantling.model.accounting import exact
from scantling.report.figures import draw_design
from scantling.report.numbers import duration, short, some
from scantling.report.terminal import titled
from scantling.sweep.isoflop_cells import Cell, cells_of

FEWEST_STEPS = 100
"""Steps of a run at least: with fewer, warm-up and rounding to whole steps decide much of its loss."""


def plan_study(config: DictConfig, console: Console, entries: int | None) -> None:
    """Propose, forecast, print, and write `sweeps/<study>.yaml`.

    `entries`: those of the tokenizer, None where they are not known. Raises ValueError for
    what no plan can be made of.
    """
    settings = config.isoflop
    grid = Grid(settings.budgets, settings.ratio, settings.sizes, settings.spread, settings.seeds)
    check_study(config, grid)
    path = ROOT / "sweeps" / f"{config.study}.yaml"
    if path.exists() and not settings.overwrite:
        raise ValueError(f"{path} exists: choose another study=NAME, or isoflop.overwrite=true")
    law = {name: float(value) for name, value in settings.law.items()}
    speed = throughput(config)
    flops = settings.flops or settings.device_hours * 3600 * speed
    cells = cells_of(config, grid, law, flops)
    n, d, c = (
        np.array([getattr(cell, name) for cell in cells for _ in range(grid.seeds)], dtype=float)
        for name in ("parameters", "tokens", "flops")
    )
    target = settings.target or 10 * float(c.max())
    common = {"noise": settings.noise, "target": target, "draws": settings.draws}
    common |= {"level": settings.level, "seed": config.seed}
    expected = forecast(law, n, d, c, **common)
    others = alternatives(grid, law, flops, **common)
    figure = Path(config.paths.runs) / "plans" / f"{config.study}.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw_design([vars(cell) for cell in cells], law, figure, title=f"{config.study}: {grid.runs} runs")
    path.write_text(sweep_yaml(config, cells, grid, expected, law, speed))
    console.print(cells_table(config.study, cells, grid, speed))
    console.print(forecast_table(others, settings.level, target))
    for line in remarks(config, cells, grid, expected, law, entries, speed):
        console.print(line, soft_wrap=True)
    console.print(f"\n{path}, {figure}\npython src/train.py -m sweeps={config.study} dry_run=true")


def check_study(config: DictConfig, grid: Grid) -> None:
    """Raise ValueError for the first setting of `isoflop` that is out of range, and for a
    `study` that is not a name.
    """
    settings = config.isoflop
    grid.check()
    if (settings.flops is None) == (settings.device_hours is None):
        raise ValueError("give one of isoflop.flops and isoflop.device_hours")
    positive = (
        "flops",
        "device_hours",
        "target",
        "noise",
        "draws",
        *(f"law.{name}" for name in settings.law),
    )
    for name in positive:
        value = OmegaConf.select(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"isoflop.{name}={value} must be positive")
    if settings.draws < 100:
        raise ValueError(f"isoflop.draws={settings.draws} gives no interval: 100 are the least")
    if not 0 < settings.level < 1:
        raise ValueError(f"isoflop.level={settings.level} must lie between 0 and 1")
    if settings.lr_rule not in LEARNING_RATES:
        raise ValueError(f"isoflop.lr_rule={settings.lr_rule} is unknown: use {' or '.join(LEARNING_RATES)}")
    if not str(config.study).isidentifier():
        raise ValueError(f"study={config.study}: a name of letters, digits and _ is what sweeps=NAME takes")


def throughput(config: DictConfig) -> float:
    """FLOP/s of a device: as given, measured here, or the share `mfu` of `peak`."""
    given = config.isoflop.throughput
    if given == "measured":
        return measured(config)
    if isinstance(given, str):
        raise ValueError(f"isoflop.throughput={given}: give FLOP/s, or measured")
    return float(given or config.peak * config.mfu)


def measured(config: DictConfig, seconds: float = 3.0) -> float:
    """FLOP/s of training steps of the preset itself, on this machine, by the `exact` convention."""
    device = hardware.device_of(config.trainer.accelerator)
    half = hardware.resolved_precision(config.trainer.precision, device) != "fp32"
    hardware.keep_freed_memory()
    decoder = build_decoder(config, config.model.vocab_size, "cpu").to(device)
    decoder.initialise(config.seed)
    optimizer = instantiate(config.optim, _convert_="all")(list(decoder.named_parameters()))
    rows = config.micro_batch_size or config.batch_size
    text = torch.randint(config.model.vocab_size, (rows, decoder.seq_len + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            nats = decoder(text[:, :-1], targets_BT=text[:, 1:])
        (nats / text[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        nats.item()  # waits for a GPU

    step()
    step()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    tokens = steps * rows * decoder.seq_len
    return tokens * exact(decoder, decoder.seq_len) / (time.perf_counter() - start)


# --- what is written ---


def sweep_yaml(
    config: DictConfig, cells: list[Cell], grid: Grid, expected: Forecast, law: dict[str, float], speed: float
) -> str:
    """A file of `sweeps/`: the choices of this command line, and an arm for each cell."""
    groups, values = typed_for_runs(config.overrides)
    total = grid.seeds * sum(cell.flops for cell in cells)
    arms = {cell.name: changes_of(cell) for cell in cells}
    head = [
        "# @package _global_",
        "# How should compute be divided between parameters and tokens? Written by",
        f"#   python src/plan.py {' '.join(config.overrides)}",
        f"#   python src/train.py -m sweeps={config.study}",
        f"#   python src/report.py study={config.study}",
        f"# {grid.runs} runs, {total:.3g} FLOPs, {duration(total / speed)} at "
        f"{short(speed, 'FLOP/s')}. Forecast at noise {config.isoflop.noise:g}:",
        f"# exponent a ± {expected.a_isoflop:.3f} by parabolas, ± {expected.a_parametric:.3f} by approach "
        f"3; loss at {expected.target:.2g} FLOPs ± {expected.loss:.2%}",
    ]
    defaults = [{f"override /{group}": option} for group, option in groups.items()]
    body: dict[str, Any] = {"defaults": [*defaults, {"override /budget": "flops"}]}
    body |= {"study": config.study, **values}
    text = yaml.safe_dump(body, sort_keys=False, width=120)
    lines = ["hydra:", "  mode: MULTIRUN", "  sweeper:", "    arms:"]
    lines += [f"      {name}: [{', '.join(changes)}]" for name, changes in arms.items()]
    lines += ["    params:", f"      seed: {','.join(map(str, range(grid.seeds)))}"]
    return "\n".join([*head, text.rstrip(), "", *lines]) + "\n"


def typed_for_runs(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """What a run of the study needs of a command line: options of groups, and settings, nested."""
    own = OmegaConf.load(CONF / "plan.yaml")
    assert isinstance(own, DictConfig)
    left_out = {*own, "study", "budget", "seed"}
    groups: dict[str, str] = {}
    settings = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key.partition(".")[0] in left_out:
            continue
        if is_group(key):
            groups[key] = str(value)
        else:
            OmegaConf.update(settings, key, value)
    return groups, OmegaConf.to_container(settings)  # type: ignore[return-value]


def changes_of(cell: Cell) -> list[str]:
    """The overrides of the cell's arm."""
    shape = {f"model.{name}": value for name, value in vars(cell.shape).items()}
    changes = {"budget.flops": f"{cell.budget:.3g}", **shape, "lr": f"{cell.lr:.3g}"}
    return [f"{name}={value}" for name, value in changes.items()]


# --- what is printed ---


def cells_table(study: str, cells: list[Cell], grid: Grid, speed: float) -> Table:
    """A row for each cell; the last row is all runs together."""
    table = titled(
        study,
        f"{grid.runs} runs: {grid.budgets} budgets × {grid.sizes} sizes × {some(grid.seeds, 'seed')}",
        *("parameters", "layers × width", "tokens", "D/N", "steps", "lr", "time"),
    )
    for i, cell in enumerate(cells):
        if i and cell.budget != cells[i - 1].budget:
            table.add_section()
        table.add_row(
            cell.name,
            f"{cell.parameters:,}",
            f"{cell.shape.n_layers} × {cell.shape.d_model}",
            short(cell.tokens),
            f"{cell.tokens / cell.parameters:.3g}",
            f"{cell.steps:,}",
            f"{cell.lr:.2g}",
            duration(cell.flops / speed),
        )
    total = grid.seeds * sum(cell.flops for cell in cells)
    table.add_section()
    table.add_row(f"in all {total:.3g} FLOPs", *[""] * 6, duration(total / speed), style="bold")
    return table


def forecast_table(others: list[tuple[Grid, Forecast]], level: float, target: float) -> Table:
    """The grid first, with ideal sizes, then others of the same cost."""
    table = titled(
        "Forecast",
        f"half-widths of {level:.0%} intervals; N and loss of the optimum at {target:.2g} FLOPs",
        *("runs", "a, parabolas", "their bias", "a, approach 3", "N", "loss"),
    )
    for i, (grid, found) in enumerate(others):
        table.add_row(
            f"{grid.budgets} × {grid.ratio:.2g}, {grid.sizes} within {grid.spread:.2g}, "
            f"{some(grid.seeds, 'seed')}",
            f"{grid.runs}",
            f"± {found.a_isoflop:.3f}",
            f"{found.bias:+z.3f}",
            f"± {found.a_parametric:.3f}",
            f"± {found.n_optimal:.0%}",
            f"± {found.loss:.2%}",
            style="bold" if i == 0 else "",
        )
    return table


def assumed_speed(config: DictConfig) -> str:
    """Where `throughput` has its number from, and what sets it."""
    given = config.isoflop.throughput
    if given == "measured":
        return "as measured here"
    if given is not None:
        return "isoflop.throughput"
    return (
        f"mfu={config.mfu:g} of peak={short(config.peak, 'FLOP/s')}: set them to your device's, or "
        "isoflop.throughput=measured for this machine's"
    )


def remarks(
    config: DictConfig,
    cells: list[Cell],
    grid: Grid,
    expected: Forecast,
    law: dict[str, float],
    entries: int | None,
    speed: float,
) -> list[str]:
    """Where the numbers come from, and what to distrust about them."""
    settings = config.isoflop
    lines = [
        f"\ntime: of one device at {short(speed, 'FLOP/s')}, {assumed_speed(config)}",
        f"These {grid.runs} real models: a ± {expected.a_isoflop:.3f} by parabolas, "
        f"± {expected.a_parametric:.3f} by approach 3; loss at {expected.target:.2g} FLOPs "
        f"± {expected.loss:.2%}, were isoflop.law the truth "
        f"(a = {expected.a:.3f}) and {settings.noise:g} the noise of log loss. Parabolas will be "
        f"{expected.bias:+z.3f} off a, by their own bias and because the FLOPs of small models are not 6ND",
        f"lr: {' '.join((LEARNING_RATES[settings.lr_rule].__doc__ or '').split())}",
    ]
    sizes = [cell.parameters for cell in cells]
    doubts = [unknown_entries(config)] if entries is None else []
    if settings.lr_rule == "porian" and not PORIAN_RANGE[0] <= min(sizes) <= max(sizes) <= PORIAN_RANGE[1]:
        doubts.append(
            f"{short(min(sizes))} to {short(max(sizes))} parameters lie outside of that rule's "
            f"{short(PORIAN_RANGE[0])} to {short(PORIAN_RANGE[1])}: try lr × 2 and lr / 2 at the "
            "smallest and the largest"
        )
    worst = max(float(hoffmann_loss(law, cell.parameters, cell.tokens)) for cell in cells)
    guess = float(np.log(config.model.vocab_size))
    if worst > guess:
        doubts.append(
            f"isoflop.law forecasts {worst:.1f} nats a token where a uniform guess has {guess:.1f}: it is "
            "not of models so small; give E, A, B, alpha and beta of a few runs of yours, fitted by report.py"
        )
    few = [cell.name for cell in cells if cell.steps < FEWEST_STEPS]
    if few:
        doubts.append(
            f"{some(len(few), 'cell')} of fewer than {FEWEST_STEPS} steps, {few[0]} the first: a smaller "
            "batch_size, or more FLOPs"
        )
    if config.choices.schedule == "constant":
        doubts.append("schedule=constant does not end with the run, as these laws suppose")
    return [*lines, *(f"[yellow]warning: {doubt}[/yellow]" for doubt in doubts)]
