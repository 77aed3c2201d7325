"""Two configurations compared leaf by leaf."""

from scantling.config.differences import different_leaves, leaves, varying_leaves


def test_leaves_are_values_by_dotted_key():
    assert leaves({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": None, "g": {}}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": None,
    }


def test_what_differs_is_said_with_both_values():
    one = {"a": {"b": 1, "c": 2}, "d": None, "e": 5}
    other = {"a": {"b": 1, "c": 3}, "f": 4}
    assert different_leaves(one, other) == [("a.c", 2, 3), ("e", 5, None), ("f", None, 4)]
    assert different_leaves(one, one) == []


def test_what_repeats_a_setting_is_left_out():
    """Where it has the setting's value in every configuration."""
    one = {"lr": 1, "optim.lr": 1, "model.d_ff": 8, "decoder.d_ff": 8, "seed": 0}
    other = {"lr": 2, "optim.lr": 2, "model.d_ff": 9, "decoder.d_ff": 9, "seed": 0}
    assert varying_leaves([one, other]) == ["lr", "model.d_ff"]
    assert varying_leaves([one, other | {"decoder.d_ff": 7}]) == ["lr", "model.d_ff", "decoder.d_ff"]
    assert varying_leaves([one]) == []
