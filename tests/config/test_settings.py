"""The table of settings against the files of `conf/`."""

from scantling.config import settings
from scantling.config.differences import leaves
from scantling.config.options import CONF, entry_settings, is_group, option_settings, options_of, read_yaml
from scantling.config.settings import SETTINGS, Setting, is_neutral, setting

ENTRIES = sorted(path.stem for path in CONF.glob("*.yaml"))


def every_setting() -> set[str]:
    """Dotted keys of every entry and option, and of the nodes and groups that hold them."""
    keys = {key for entry in ENTRIES for key in leaves(read_yaml(entry))}
    for folder in (path for path in CONF.rglob("*") if path.is_dir()):
        group = folder.relative_to(CONF).as_posix()
        keys |= {key for option in options_of(group) for key in option_settings(group, option)}
    nodes = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
    return keys | nodes | {path.name for path in CONF.iterdir() if is_group(path.name)}


def test_every_setting_of_the_table_exists():
    assert set(SETTINGS) <= every_setting()
    assert {key for key in settings.NULL_IN_IDENTITY if key != "d_head"} <= every_setting()


def test_every_row_says_something():
    assert all(known != Setting() for known in SETTINGS.values())
    assert {entry for known in SETTINGS.values() for entry in known.several} <= set(ENTRIES)


def test_what_is_noted_is_of_a_setting():
    assert {*settings.NOTES.values()} <= every_setting()
    assert {*settings.NOTES} <= {*settings.NOT_TRAINED}


def test_columns_and_sizes_are_of_the_model():
    model = {key for key in entry_settings("train") if key.startswith("model.")} | {
        key for option in options_of("model") for key in option_settings("model", option)
    }
    assert {f"model.{name}" for name in (*settings.SHAPE, *settings.COLUMNS)} <= model
    assert set(settings.TUNED) < set(settings.FOLLOWS_SIZE)


def test_a_setting_that_the_table_lacks_is_trained_and_neutral_at_null():
    assert setting("not.there") == Setting()
    assert setting("not.there").trained
    assert is_neutral("attn.not_there", None)
    assert is_neutral("decoder.attn.not_there", None)
    assert not is_neutral("attn.not_there", 0)
    assert not is_neutral("decoder.attn.softcap", None)
    assert not is_neutral("z_loss", None)
