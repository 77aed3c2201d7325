"""The frame of every entry: Hydra reads the command line, and a user's mistake becomes one line and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"

SWEEPS = f"hydra.searchpath=['file://{ROOT}']"
"""Makes the folder `sweeps` beside `conf` a group of it; and every other folder there, so that only what takes sweeps has it."""

TAKES_SWEEPS = ("train", "plan")
"""Entries: `report.py runs=[…]` would choose in the folder `runs`."""

FREE_TEXT = ("prompt", "sample.prompt", "stop", "baseline")
"""Settings that take any text: Hydra's grammar would trip over its brackets and strip its spaces."""

NAMES = ("study", "law", "paths.runs", "paths.cache")
"""Settings that name something: 7 is a name there, and no number."""

SEVERAL = {
    "train": ("data.files", "data.data_files"),
    "plan": ("data.files", "data.data_files"),
    "evaluate": ("data.files", "data.data_files", "run", "lengths"),
    "sample": ("prompts", "stops"),
    "runs": ("run",),
    "report": ("run", "runs", "tokens", "n", "budgets"),
}
"""Settings of an entry that take a list, or one value, whatever their default; `report.py` has words of its own for its own."""

OR_NULL = ("val_windows", "checkpoint.every_minutes", "clip", "sample.top_k", "top_k", "prompt")
"""Settings of an entry that may be null, with a default that is not."""

MULTIRUN = ("-m", "--multirun")


class Mistake(Exception):
    """Something the user can put right. The message says what is wrong, where, and what would be right."""


class Failed(Exception):
    """What was computed did not all succeed. The message says which and why; exit code 1."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """While nothing has been computed yet, a ValueError or OSError is the user's to put right."""
    try:
        yield
    except MissingConfigException:  # an OSError to Python; `one_line` says more of it
        raise
    except (ValueError, OSError, InstantiationException) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise Mistake(str(cause)) from error


def run_entry(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `task` on it.

    `HYDRA_FULL_ERROR=1` shows the traceback behind a one-line error.
    """
    # argparse takes no flag between overrides.
    typed = sorted(map(quoted, sys.argv[1:]), key=lambda argument: argument not in MULTIRUN)
    first = next((i for i, o in enumerate(typed) if "=" in o and not o.startswith("-")), len(typed))
    sys.argv[1:] = [
        *typed[:first],
        *search_path(config_name),
        *typed[first:],
    ]  # overrides must stand together
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def explained(call: Callable[[], object]) -> None:
        try:
            call()
        except (Mistake, HydraException, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            print(f"error: {one_line(error, config_name)}", file=sys.stderr)
            sys.exit(2)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    @functools.wraps(task)
    def job(config: DictConfig) -> None:
        # Explained here too: past this function Hydra prints a line of its own.
        explained(lambda: (check_values(config, config_name), task(config)))

    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    with raising_hydra():
        explained(lambda: (check_options(typed), main(job)()))


def search_path(config_name: str) -> list[str]:
    return [SWEEPS] if config_name in TAKES_SWEEPS else []


@contextlib.contextmanager
def raising_hydra() -> Iterator[None]:
    """Hydra raises what it would otherwise print and exit 1 for."""
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def quoted(argument: str) -> str:
    """The argument, free text put in quotes, and names that would be read as numbers."""
    key, _, text = argument.partition("=")
    if key in NAMES and re.fullmatch(r"[\d.eE_+-]+|nan|inf|true|false", text, re.IGNORECASE):
        return f"{key}='{text}'"
    if key not in FREE_TEXT or text == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return argument
    escaped = text.replace("${", "\\${")  # no interpolation
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escaped)  # backslashes count only before a quote
    if escaped.endswith("\\"):
        escaped += "\\" * (len(escaped) - len(escaped.rstrip("\\")))
    return f"{key}='{escaped}'"


def one_line(error: Exception, config_name: str) -> str:
    """What is wrong, naming the nearest thing that exists."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is unknown{nearest(option, error.options or [])}"
    text = str(error) or str(error.__cause__)  # which alone speaks where OmegaConf cannot read a value
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"value: (\S+)", text)):
        return f"{match[1]} is not set: add {match[1]}=…"
    if match := re.search(r"Could not override '([^']+)'", text):
        if (CONF / match[1]).is_dir():
            group = match[1].rpartition("/")[0]
            return f"{match[1]} is a choice inside other options of {group}= than the chosen one"
        if owners := options_with(match[1]):
            group = match[1].partition(".")[0]
            return (
                f"{match[1]} is a setting of {' or '.join(f'{group}={o}' for o in owners)}: choose that too"
            )
        return f"{match[1]} is not a setting{nearest(match[1], settings(config_name))}"
    if match := re.search(r"Error parsing override '(.*)'\s+missing EQUAL", text):
        return f"{match[1]} is no setting with its value, as seed=1{nearest(match[1], settings(config_name))}"
    if match := re.search(r"Could not delete from config\. '(.+?)' does not exist", text):
        return f"~{match[1]}: there is no {match[1]} to take away{nearest(match[1], settings(config_name))}"
    if match := re.search(r"Ambiguous value for argument '((\S+?)=(.+?))'", text):
        runs_each = f"train.py -m {match[1]} runs each, " if config_name == "train" else ""
        return f"{match[1]} holds a comma: {runs_each}{match[2]}=[{match[3]}] is a list"
    if match := re.search(r"In '(sweeps/\S+)': .*Key '(\S+)' not in 'StudyConf'", text, re.DOTALL):
        return f"{match[1]}.yaml sets hydra.sweeper.{match[2]} of another sweeper: add hydra/sweeper=…, as its header says"
    if isinstance(error.__cause__, ValidationError):
        text += ": " + str(error.__cause__).splitlines()[0]
    return " ".join(text.split())


def nearest(wrong: str, options: Sequence[str]) -> str:
    """': did you mean …?' for near ones, else the whole list when it is short."""
    close = difflib.get_close_matches(wrong, options, n=3, cutoff=0.6)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": use one of {', '.join(sorted(options))}" if 0 < len(options) <= 20 else ""


def options_with(key: str, *, below: bool = False) -> list[str]:
    """Of a dotted key's group, the options whose yaml has it as a setting or, with `below`, has settings below it."""
    group, dot, name = key.partition(".")
    files = sorted((CONF / group).glob("*.yaml")) if dot else []
    found = {path.stem: OmegaConf.load(path) for path in files}
    if below:
        return [option for option, own in found.items() if OmegaConf.is_dict(OmegaConf.select(own, name))]
    return [option for option, own in found.items() if name in leaves(OmegaConf.to_container(own))]  # type: ignore[arg-type]


def check_options(typed: Sequence[str]) -> None:
    """Raise Mistake where an option is null, which Hydra takes from a file alone."""
    for argument in typed:
        group, _, option = argument.partition("=")
        if "null" in option.split(",") and (CONF / group).is_dir():
            options = [path.stem for path in (CONF / group).glob("*.yaml")]
            raise Mistake(f"{argument}: {group} takes an option{nearest('null', options)}")


def settings(config_name: str) -> list[str]:
    """Every dotted key under the options that the command line chose, and every group where options are chosen. Keys that
    are Hydra's, as `_target_`, are left out.
    """
    chosen = [o for o in sys.argv[1:] if (CONF / (o.replace("=", "/", 1) + ".yaml")).exists()]
    config = composed(config_name, chosen)
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()] if "model" in config else []
    return sorted({*groups, *(key for key in leaves(config) if not key.endswith("_"))})


def composed(config_name: str, overrides: list[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name, overrides=[*overrides, *search_path(config_name)])
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values, inner nodes left out."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@functools.cache
def own_settings(config_name: str) -> dict[str, Any]:
    """Those that the file itself gives, not an option."""
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{config_name}.yaml"), resolve=False)  # type: ignore[return-value]


def is_word(value: Any) -> bool:
    """Of a value as a file gives it; what an environment variable gives is one."""
    return isinstance(value, str) and (value[:1].isalpha() or value.startswith("${oc.env:"))


@functools.cache
def declared(group: str, option: str) -> dict[str, Any]:
    """Settings as an option gives them, with those it starts from."""
    text = (CONF / group / f"{option}.yaml").read_text()
    own = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    package = "" if text.startswith("# @package _global_") else f"{group.replace('/', '.')}."
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for base in bases:  # as `swiglu`, or below a key of its own as `swiglu@dense`
        name, _, place = base.partition("@")
        below = f"{package}{place}." if place else package
        found |= {below + key.removeprefix(package): value for key, value in declared(group, name).items()}
    return found | leaves(own, package)  # type: ignore[arg-type]


def takes_null(key: str) -> bool:
    """Whether an entry or any option of the key's group says so."""
    group = key.rpartition(".")[0].replace(".", "/")
    files = (CONF / group).glob("*.yaml") if group else ()
    return key in OR_NULL or any(declared(group, path.stem).get(key, "") is None for path in files)


def complaint(config_name: str, key: str, text: str, value: Any, default: Any) -> str | None:
    """What is wrong with a value, typed as `text`, by the default, as a file gives it."""
    if text == "null":
        if isinstance(default, list):
            return f"{key}=null must be a list, as {listed(default)}"
        if default is None or takes_null(key):
            return None
        return f"{key}=null: a value is meant" + (
            f"; its default is {default}" if isinstance(default, bool | int | float) else ""
        )
    takes_several = key in SEVERAL.get(config_name, ())
    if isinstance(default, list):
        fits = OmegaConf.is_list(value) or takes_several
        return None if fits else f"{key}={text} must be a list, as {listed(default)}"
    if OmegaConf.is_list(value):
        each = f" (for several runs: -m {key}={text[1:-1]})" if config_name == "train" else ""
        return None if takes_several else f"{key}={text} is a list; one value is meant{each}"
    if OmegaConf.is_dict(value):
        is_one = isinstance(default, bool | int | float) or is_word(default)
        return f"{key}={text} holds settings; one value is meant" if is_one else None
    if isinstance(value, str) and isinstance(default, bool):
        return f"{key}={text} must be true or false"
    if isinstance(value, str) and isinstance(default, int | float):
        return f"{key}={text} is not a number; its default is {default}"
    return None


def listed(default: list[Any]) -> str:
    return f"[{', '.join(map(str, default))}]" if default else "[a,b]"


def check_values(config: DictConfig, config_name: str) -> None:
    """Raise Mistake where what was typed is of another kind than the default: one value for what holds settings or is a
    list, a list or null for one value, a word for a number, true or false; or where a study leaves the place of runs.
    """
    typed = [o.partition("=") for o in HydraConfig.get().overrides.task if not o.startswith(("+", "~"))]
    for key, _, value in typed:
        if (CONF / key).is_dir() or OmegaConf.is_dict(OmegaConf.select(config, key)):
            continue
        if (CONF / key.replace(".", "/")).is_dir():
            raise Mistake(f"{key}={value}: an option is chosen with a slash, {key.replace('.', '/')}={value}")
        if held := [name for name in leaves(own_settings(config_name)) if name.startswith(f"{key}.")]:
            raise Mistake(f"{key}={value}: {key} holds settings, {', '.join(held)}")
        if isinstance(OmegaConf.select(config, key), str) and (options := options_with(key, below=True)):
            group = key.partition(".")[0]
            raise Mistake(
                f"{key}={value}: {key} holds settings, which come with {group}=: use one of {', '.join(options)}"
            )
    study = config.get("study")
    if isinstance(study, str) and (Path(study).is_absolute() or ".." in Path(study).parts):
        raise Mistake(f"study={study} leaves paths.runs={config.paths.runs}: a name below it is meant")
    values = {
        key: (text, OmegaConf.select(config, key))
        for key, _, text in typed
        if not (CONF / key).is_dir() and key not in ("arm", "sweeps")
    }
    given = {key: value for key, value in leaves(own_settings(config_name)).items() if value != "???"}
    for group, option in HydraConfig.get().runtime.choices.items():
        prefix = f"{group.replace('/', '.')}."
        if any(key.startswith(prefix) for key in values) and (CONF / group / f"{option}.yaml").exists():
            given |= declared(group, option)

    def may_be_wrong(key: str, text: str, value: Any) -> bool:
        if key in given:
            return complaint(config_name, key, text, value, given[key]) is not None
        return text == "null" or isinstance(value, str) or OmegaConf.is_config(value)

    doubtful = {key: pair for key, pair in values.items() if may_be_wrong(key, *pair)}
    if not doubtful:  # composing the defaults takes as long as composing the run
        return
    groups = [f"{key}={value}" for key, _, value in typed if (CONF / key).is_dir() or key == "sweeps"]
    hydra_state = GlobalHydra.instance().hydra
    defaults = leaves(composed(config_name, groups))
    GlobalHydra.instance().hydra = hydra_state
    for key, (text, value) in doubtful.items():
        if key in defaults and (wrong := complaint(config_name, key, text, value, defaults[key])):
            raise Mistake(wrong)
