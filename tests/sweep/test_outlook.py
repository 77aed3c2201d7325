"""Jobs looked at before they start."""

import copy

from hydra import compose, initialize_config_dir

from scantling.config.composition import compose_config, with_settings
from scantling.config.identity import path_of
from scantling.config.options import CONF
from scantling.sweep.outlook import look_ahead

USUAL = ("model=nano", "tokenizer=byte", "trainer=cpu", "match=params")


def test_configurations_are_left_as_they_are_and_name_the_runs():
    """Also of an arm that is matched to another, and of a job for another machine."""
    composed = []

    def compose_whole(overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [*USUAL, *overrides], return_hydra_config=True)
        composed.append((config, copy.deepcopy(config)))
        return config

    jobs = [["ffn=swiglu", "seed=0"], ["ffn=swiglu", "seed=5"], ["ffn=gelu", "seed=0"]]
    looks = look_ahead(compose_whole, jobs, ["a", "b", "c"], 2, None, elsewhere=True)
    assert len(composed) == 2  # seeds of an arm share one
    assert all(config == before for config, before in composed)
    for look, overrides in zip(looks, jobs, strict=True):
        found = [o for o in look["overrides"] if o.startswith("model.d_ff=")]
        single = compose_config("train", [*USUAL, *overrides, *found])
        assert look["directory"] == str(path_of(single))
    assert looks[2]["overrides"][-2] != "model.d_ff=128"
    plain = compose_config("train", [*USUAL, *jobs[0]])
    assert str(path_of(with_settings(plain, {"seed": 5}))) == looks[1]["directory"]
