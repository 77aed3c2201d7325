"""What was typed for a setting, checked against the kind of value that it has by default.

The defaults' own types in `conf/` are the schema, with what `settings.py` knows beside them: an option is one
yaml, and has its kinds declared once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scantling.config.composition import compose_config, unresolved_settings
from scantling.config.mistakes import Mistake
from scantling.config.options import (
    CONF,
    entry_settings,
    is_group,
    option_settings,
    options_of,
    options_with,
)
from scantling.config.settings import setting
from scantling.config.suggestions import nearest


def quoted(argument: str) -> str:
    """The argument, free text put in quotes, and names that would be read as numbers."""
    key, _, text = argument.partition("=")
    kind = setting(key).kind
    if kind == "name" and re.fullmatch(r"[\d.eE_+-]+|nan|inf|true|false", text, re.IGNORECASE):
        return f"{key}='{text}'"
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if kind != "free text" or text == "null" or is_quoted:
        return argument
    escaped = text.replace("${", "\\${")  # no interpolation
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)  # backslashes count only before a quote
    if escaped.endswith("\\"):
        escaped += "\\" * (len(escaped) - len(escaped.rstrip("\\")))
    return f"{key}='{escaped}'"


def check_options(typed: Sequence[str]) -> None:
    """Raise Mistake where an option is null, which Hydra takes from a file alone."""
    for argument in typed:
        group, _, option = argument.partition("=")
        if "null" in option.split(",") and (CONF / group).is_dir():
            raise Mistake(f"{argument}: {group} takes an option{nearest('null', options_of(group))}")


def check_values(config: DictConfig, entry: str) -> None:
    """Raise Mistake where what was typed is of another kind than the default.

    That is: one value for what holds settings or is a list; a list or null for one value; a word for a
    number, true or false; or a study that leads out of the place of runs.
    """
    pairs = [o.partition("=") for o in config.overrides if not o.startswith(("+", "~"))]
    typed = {key: text for key, _, text in pairs if not is_group(key)}
    for key, text in typed.items():
        if not OmegaConf.is_dict(OmegaConf.select(config, key)):
            check_place(config, entry, key, text)
    study = config.get("study")
    if isinstance(study, str) and (Path(study).is_absolute() or ".." in Path(study).parts):
        raise Mistake(f"study={study} leaves paths.runs={config.paths.runs}: a name below it is meant")
    declared = declared_settings(config, entry, typed)

    def may_be_wrong(key: str, text: str, value: Any) -> bool:
        if key in declared:
            return complaint(entry, key, text, value, declared[key]) is not None
        return text == "null" or isinstance(value, str) or OmegaConf.is_config(value)

    doubtful = {key: OmegaConf.select(config, key) for key in typed}
    doubtful = {key: value for key, value in doubtful.items() if may_be_wrong(key, typed[key], value)}
    if not doubtful:  # composing the defaults takes as long as composing the run
        return
    defaults = unresolved_settings(
        compose_config(entry, [f"{k}={text}" for k, _, text in pairs if is_group(k)])
    )
    for key, value in doubtful.items():
        if key in defaults and (wrong := complaint(entry, key, typed[key], value, defaults[key])):
            raise Mistake(wrong)


def check_place(config: DictConfig, entry: str, key: str, text: str) -> None:
    """Raise Mistake where one value was typed for what holds settings, or for an option."""
    if (CONF / key.replace(".", "/")).is_dir():
        raise Mistake(f"{key}={text}: an option is chosen with a slash, {key.replace('.', '/')}={text}")
    if held := [name for name in entry_settings(entry) if name.startswith(f"{key}.")]:
        raise Mistake(f"{key}={text}: {key} holds settings, {', '.join(held)}")
    if isinstance(OmegaConf.select(config, key), str) and (options := options_with(key, below=True)):
        which = f"which come with {key.partition('.')[0]}=: use one of {', '.join(options)}"
        raise Mistake(f"{key}={text}: {key} holds settings, {which}")


def declared_settings(config: DictConfig, entry: str, keys: Collection[str]) -> dict[str, Any]:
    """Defaults by dotted key, as the entry's file and those of the chosen options give them.

    An option is read only where one of its settings is among `keys`.
    """
    found = dict(entry_settings(entry))
    for group, option in config.choices.items():
        prefix = f"{group.replace('/', '.')}."
        if any(key.startswith(prefix) for key in keys) and (CONF / group / f"{option}.yaml").exists():
            found |= option_settings(group, option)
    return found


def complaint(entry: str, key: str, text: str, value: Any, default: Any) -> str | None:
    """What is wrong with a value, typed as `text`, against the default that a file gives; None: nothing."""
    takes_several = entry in setting(key).several
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    if isinstance(default, list):
        fits = OmegaConf.is_list(value) or (takes_several and text != "null")
        return None if fits else f"{key}={text} must be a list, as {listed(default)}"
    if text == "null":
        known = f"; its default is {default}" if is_number or isinstance(default, bool) else ""
        return None if default is None or takes_null(key) else f"{key}=null: a value is meant{known}"
    if OmegaConf.is_list(value):
        each = f" (for several runs: -m {key}={text[1:-1]})" if entry == "train" else ""
        return None if takes_several else f"{key}={text} is a list; one value is meant{each}"
    if OmegaConf.is_dict(value) and (is_number or isinstance(default, bool) or is_word(default)):
        return f"{key}={text} holds settings; one value is meant"
    if isinstance(value, str) and isinstance(default, bool):
        return f"{key}={text} must be true or false"
    if isinstance(value, str) and is_number:
        return f"{key}={text} is not a number; its default is {default}"
    return None


def takes_null(key: str) -> bool:
    """Whether the table of settings, or any option of the key's group, allows null."""
    group = key.rpartition(".")[0].replace(".", "/")
    options = options_of(group) if group else ()
    return setting(key).nullable or any(option_settings(group, o).get(key, "") is None for o in options)


def is_word(value: Any) -> bool:
    """Whether a value in a file is a word; what an environment variable gives is one."""
    return isinstance(value, str) and (value[:1].isalpha() or value.startswith("${oc.env:"))


def listed(default: list[Any]) -> str:
    """A list as it is typed: the default, or an example where that is empty."""
    return f"[{', '.join(map(str, default))}]" if default else "[a,b]"
