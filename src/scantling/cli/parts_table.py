"""Writes docs/parts.md, every option of every part: `python -m scantling.cli.parts_table`, or `make docs`.

Nothing in it is typed twice: what an option is stands in the first line of its yaml, its
formula in its docstring, its cost is counted in a model, and the families that have it are
those that `scantling.hub` reads so.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scantling.cli.plan_tables import first_sentence
from scantling.config.composition import PARTS, compose_config, with_settings
from scantling.config.decoder import build_decoder
from scantling.config.options import CONF, ROOT
from scantling.hub.family import all_families
from scantling.model.accounting import cache_bytes, forward_flops_per_token, parameter_counts
from scantling.model.decoder import Decoder

PAGE = ROOT / "docs" / "parts.md"
MODEL = "llama_125m"

HEAD = """# Every part

Written by `make docs` from the options' files, docstrings and counts; change those, not this page.

Choose a part with `GROUP=OPTION` on any command line: `python src/train.py model=llama_small attn=gqa`.

- **parameters**, **FLOPs** (forward, per token) and **cache** (keys and values of {seq_len:,} tokens) are
  those of a whole model, `model={model}` with {parameters:,} parameters and {flops} FLOPs a token, against
  the option in bold, which that model has. Attention counts the keys that causality and patterns leave. "="
  is no difference.
- **formula** is that of the option's class; "as" another option: the same class with other settings.
- **families** are those of Hugging Face models whose own default has the option, as `scantling.hub` reads it.
- Letters are those of `src/scantling/model/decoder.py`: D width of the model, E of a head, H heads, K
  key/value heads, F hidden width, V vocabulary, R rotated or reduced width; w, b, W learned.
"""

TAIL = """## Left out

- **Linformer** (Wang et al. 2020, arXiv:2006.04768). It projects keys and values along the sequence: each of
  its k summaries mixes all positions, later ones too, so that in a causal decoder every token would see the
  future. Masking its projection for each query anew would cost what it was to spare.
- **LSH attention** (Reformer, Kitaev et al. 2020, arXiv:2001.04451). Which keys a query sees depends on its
  content, in buckets sorted anew at each length: no fixed pattern, so no equality of cached with uncached
  decoding, which every part here must pass.
"""


@dataclass(frozen=True)
class Option:
    """An option of a group such as `attn`, or of a group inside it such as `attn/pattern`."""

    group: str
    name: str
    settings: dict[str, Any]

    @property
    def about(self) -> str:
        """What the option is: the first line of its yaml."""
        return (CONF / self.group / f"{self.name}.yaml").read_text().splitlines()[0].removeprefix("# ")

    @property
    def formula(self) -> str:
        """The first sentence of the docstring of what the option builds."""
        module, _, name = self.settings["_target_"].rpartition(".")
        return first_sentence(getattr(importlib.import_module(module), name))


@dataclass(frozen=True)
class Cost:
    """What a whole model costs: parameters, forward FLOPs per token, and its cache."""

    parameters: int
    flops: float
    cache: int
    """Bytes of one sequence's keys and values at the model's context, bfloat16."""

    @classmethod
    def of(cls, decoder: Decoder) -> Cost:
        """The counts of a decoder, at the context that it is trained with."""
        return cls(
            parameters=sum(parameter_counts(decoder).values()),
            flops=forward_flops_per_token(decoder, None, decoder.seq_len),
            cache=cache_bytes(decoder, context=decoder.seq_len, batch=1, precision="bf16"),
        )


def groups() -> list[str]:
    """Each group of parts, and the groups inside it."""
    return [
        path.relative_to(CONF).as_posix()
        for group in PARTS
        for path in (CONF / group, *sorted(p for p in (CONF / group).iterdir() if p.is_dir()))
    ]


def compose_options() -> tuple[DictConfig, dict[str, dict[str, Option]]]:
    """The model's configuration, and every option as it stands in that model.

    One composition serves all options.
    """
    names = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in groups()}
    places = {group: f"options.{group.replace('/', '_')}" for group in names}
    added = [f"+{group}@{places[group]}.{name}={name}" for group in names for name in names[group]]
    config = compose_config("train", [f"model={MODEL}", *added])
    options = {
        group: {
            name: Option(group, name, OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
            for name, node in OmegaConf.select(config, place).items()
        }
        for group, place in places.items()
    }
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "options"]), options


def cost_with(config: DictConfig, group: str, settings: dict[str, Any]) -> Cost:
    """The cost of the model with another option of a group."""
    return Cost.of(build_decoder(with_settings(config, {group: settings}), config.model.vocab_size, "meta"))


def families() -> dict[str, list[str]]:
    """'attn/pattern=sliding' -> the families of Hugging Face models whose default configuration has it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # of requirements-dev.txt

    found = defaultdict(list)
    for name, family in all_families().items():
        for override in family.overrides(CONFIG_MAPPING[name]().to_dict()):
            found[override].append(name)
    return found


def page() -> str:
    """The whole of docs/parts.md."""
    config, options = compose_options()
    default = Cost.of(build_decoder(config, config.model.vocab_size, "meta"))
    chosen = {group: defaults_of(options[group], config[group]) for group in PARTS}
    having, n_families = families(), len(all_families())
    text = [
        HEAD.format(
            model=MODEL,
            parameters=default.parameters,
            flops=f"{default.flops / 1e6:,.0f} M",
            seq_len=config.model.seq_len,
        )
    ]
    for group in groups():
        outer, _, inner = group.partition("/")
        if inner:
            host = host_of(options[outer], inner, chosen[outer])
            costs = {
                name: cost_with(config, outer, host.settings | {inner: option.settings})
                for name, option in options[group].items()
            }
            base = defaults_of(options[group], host.settings[inner])
            title = f"## `{group}`\n\n{about(group)} Here in `{outer}={host.name}`."
        else:
            costs = {name: cost_with(config, outer, o.settings) for name, o in options[group].items()}
            base, title = chosen[group], f"## `{group}`\n\n{about(group)}"
        text.append(f"{title}\n\n{table(options[group], costs, base, having, n_families)}")
    return "\n".join([*text, TAIL])


def defaults_of(options: dict[str, Option], settings: Any) -> str:
    """The option that has these settings."""
    if isinstance(settings, DictConfig):
        settings = OmegaConf.to_container(settings, resolve=True)
    return next(name for name, option in options.items() if option.settings == settings)


def host_of(options: dict[str, Option], inner: str, preferred: str) -> Option:
    """An option with a choice among `inner`: the default where it has one."""
    having = {name: option for name, option in options.items() if inner in option.settings}
    return having.get(preferred) or next(iter(having.values()))


def about(group: str) -> str:
    """The first line of the module that says the group's name.

    Of a group inside another it is the comment beside its choice.
    """
    outer, _, inner = group.partition("/")
    if inner:
        texts = (path.read_text() for path in sorted((CONF / outer).glob("*.yaml")))
        said = next(found[1] for text in texts if (found := re.search(rf"- {inner}: \w+ # (.+)", text)))
    else:
        lines = (
            path.read_text().splitlines()[0] for path in sorted((ROOT / "src/scantling/model").glob("*.py"))
        )
        said = next(found[1] for line in lines if (found := re.match(rf'"""(.+): `{group}=`', line)))
    return f"{said[0].upper()}{said[1:]}."


def table(
    options: dict[str, Option],
    costs: dict[str, Cost],
    base: str,
    having: dict[str, list[str]],
    n_families: int,
) -> str:
    """A row for each option, the default first; a column for the cache where options differ in it."""
    caches = len({cost.cache for cost in costs.values()}) > 1
    first: dict[str, str] = {}
    columns = [
        "option",
        "what it is",
        "formula",
        "parameters",
        "FLOPs",
        *(["cache"] if caches else []),
        "families",
    ]
    rows = [columns, ["---", "---", "---", "--:", "--:", *(["--:"] if caches else []), "---"]]
    for name in sorted(options, key=lambda name: (name != base, name)):
        option, cost, reference = options[name], costs[name], costs[base]
        target = option.settings["_target_"]
        formula = f"as `{first[target]}`" if target in first else escaped(option.formula)
        first.setdefault(target, name)
        users = having.get(f"{option.group}={name}", [])
        rows.append(
            [
                f"**`{name}`**" if name == base else f"`{name}`",
                escaped(option.about),
                formula,
                relative(cost.parameters, reference.parameters),
                relative(cost.flops, reference.flops),
                *([relative(cost.cache, reference.cache)] if caches else []),
                "most" if len(users) > n_families / 2 else ", ".join(users),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def relative(cost: float, reference: float) -> str:
    """A cost against the reference: two digits of a difference, three of a multiple."""
    if cost == reference:
        return "="
    if cost >= 2 * reference:
        return f"×{cost / reference:#.3g}".rstrip(".")
    change = 100 * (cost / reference - 1)
    digits = max(0, 1 - math.floor(math.log10(abs(change))))
    return f"{change:+.{digits}f} %".replace("-", "−")


def escaped(text: str) -> str:
    """The text with backslashes before signs that Markdown would read outside of code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_|<])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} is written")
