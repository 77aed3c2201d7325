"""What was typed for runs: their settings, those in which they differ, and names made of these."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence

from scantling.config.settings import NOT_AN_ARM, NOTES


def settings_of(overrides: str) -> dict[str, str]:
    """Key and value of each line of what was typed."""
    return {key: value for key, _, value in (line.partition("=") for line in overrides.splitlines())}


def joined(setting: dict[str, str], keys: Sequence[str]) -> str:
    """The settings of these keys as they were typed, in one line; keys that are not set are left out."""
    return " ".join(f"{key}={setting[key]}" for key in keys if key in setting)


def varied_keys(settings: Sequence[dict[str, str]], without: Collection[str] = NOT_AN_ARM) -> list[str]:
    """Settings that are not alike in all runs, in the order in which they were typed.

    The groups of `without` are left out, and what the launcher found for each arm.
    """
    keys = dict.fromkeys(key for setting in settings for key in setting)
    found = {key for note, key in NOTES.items() if any(note in setting for setting in settings)}
    return [
        key
        for key in keys
        if key.partition(".")[0] not in without
        and key not in found
        and len({setting.get(key) for setting in settings}) > 1
    ]


def varied_within(groups: Sequence[Hashable], settings: Sequence[dict[str, str]]) -> set[str]:
    """Settings that are not alike in all runs of a group."""
    of_group: dict[Hashable, list[dict[str, str]]] = {}
    for group, setting in zip(groups, settings, strict=True):
        of_group.setdefault(group, []).append(setting)
    return {key for found in of_group.values() for key in varied_keys(found)}


def names_by_difference(overrides: Iterable[str]) -> list[str]:
    """A name for each run that has none: the settings in which they differ, but for seeds.

    Where and how they ran is among them, as runs side by side are often compared for that.
    """
    settings = [settings_of(text) for text in overrides]
    varied = varied_keys(settings, without=("seed", *NOTES))
    return [joined(setting, varied) or "default" for setting in settings]


def arms_changes(settings: Sequence[dict[str, str]]) -> set[str]:
    """Keys that named arms change: they follow the arm's name, and are alike in all runs of an arm."""
    found = set()
    for setting in settings:
        keys = list(setting)
        if "arm" in keys:
            found |= set(keys[keys.index("arm") + 1 :])
    named = [setting for setting in settings if "arm" in setting]
    return found - varied_within([setting["arm"] for setting in named], named)
