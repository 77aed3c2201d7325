"""What Hydra refuses, told in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException
from omegaconf.errors import MissingMandatoryValue, ValidationError

from scantling.config.options import is_group, options_with
from scantling.config.suggestions import known_settings, nearest, nearest_setting


def one_line(error: Exception, entry: str, typed: Sequence[str] = ()) -> str:
    """What is wrong with what was typed for an entry, naming the nearest thing that exists."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is unknown{nearest(option, error.options or [])}"
    text = str(error) or str(error.__cause__)  # which alone speaks where OmegaConf cannot read a value
    if isinstance(error, MissingMandatoryValue) and (match := re.search(r"value: (\S+)", text)):
        return f"{match[1]} is not set: add {match[1]}=…"
    if match := re.search(r"Could not override '([^']+)'", text):
        return no_setting(match[1], entry, typed)
    if match := re.search(r"Error parsing override '(.*)'\s+missing EQUAL", text):
        meant = nearest_setting(match[1], known_settings(entry, typed))
        return f"{match[1]} is not a setting with a value, such as seed=1{meant}"
    if match := re.search(r"Could not delete from config\. '(.+?)' does not exist", text):
        meant = nearest_setting(match[1], known_settings(entry, typed))
        return f"~{match[1]}: there is no {match[1]} to take away{meant}"
    if match := re.search(r"Ambiguous value for argument '((\S+?)=(.+?))'", text):
        runs_each = f"train.py -m {match[1]} runs each, " if entry == "train" else ""
        return f"{match[1]} holds a comma: {runs_each}{match[2]}=[{match[3]}] is a list"
    if match := re.search(r"In '(sweeps/\S+)': .*Key '(\S+)' not in 'StudyConf'", text, re.DOTALL):
        return (
            f"{match[1]}.yaml sets hydra.sweeper.{match[2]} of another sweeper: add hydra/sweeper=…, "
            "as its header says"
        )
    if isinstance(error.__cause__, ValidationError):
        text += ": " + str(error.__cause__).splitlines()[0]
    return " ".join(text.split())


def no_setting(key: str, entry: str, typed: Sequence[str]) -> str:
    """What to say of a key that the chosen options lack: which options have it, or what was meant."""
    if is_group(key):
        return f"{key} is a choice inside other options of {key.rpartition('/')[0]}= than the chosen one"
    if owners := options_with(key):
        group = key.partition(".")[0]
        return f"{key} is a setting of {' or '.join(f'{group}={o}' for o in owners)}: choose that too"
    return f"{key} is not a setting{nearest_setting(key, known_settings(entry, typed))}"
