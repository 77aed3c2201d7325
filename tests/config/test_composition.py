"""What Hydra composes, and the configuration that everything else reads: it alone says what was chosen and
typed.
"""

import copy

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from scantling.config.composition import compose_config, resolved_config, with_choices, with_settings
from scantling.config.options import CONF

TYPED = ("model=nano", "attn=gqa", "attn/pattern=sliding", "seed=3", "optim.lr=${lr}")


@pytest.fixture(scope="module")
def whole():
    """As Hydra hands it over."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(TYPED), return_hydra_config=True)


def test_choices_and_overrides_stand_in_the_place_of_hydras_node(whole):
    before = copy.deepcopy(whole)
    config = with_choices(whole, whole.hydra)
    assert whole == before
    assert set(whole) - set(config) == {"hydra"}
    assert set(config) - set(whole) == {"choices", "overrides"}
    groups = {group: option for group, option in whole.hydra.runtime.choices.items() if "hydra/" not in group}
    assert config.choices == groups
    assert (config.choices.attn, config.choices["attn/pattern"], config.choices.tune) == (
        "gqa",
        "sliding",
        None,
    )
    assert config.overrides == whole.hydra.overrides.task
    assert config.decoder.n_heads == whole.model.n_heads


def test_a_composed_configuration_says_the_same(whole):
    outer = GlobalHydra.instance().hydra
    composed = compose_config("train", TYPED)
    assert GlobalHydra.instance().hydra is outer
    expected = with_choices(whole, whole.hydra)
    expected.choices.sweeps = None  # a group of what takes sweeps
    assert resolved_config(composed) == resolved_config(expected)
    assert composed.overrides == expected.overrides


def test_what_is_recorded_is_resolved_and_ends_with_the_choices(whole):
    """Byte for byte what two pieces of YAML were, one after the other."""
    own = OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])
    resolved = OmegaConf.create(OmegaConf.to_container(own, resolve=True))
    chosen = {k: option for k, option in whole.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    expected = OmegaConf.to_yaml(resolved) + OmegaConf.to_yaml({"choices": chosen})
    assert OmegaConf.to_yaml(resolved_config(with_choices(whole, whole.hydra))) == expected


def test_other_settings_make_another_configuration(whole):
    config = with_choices(whole, whole.hydra)
    before = copy.deepcopy(config)
    other = with_settings(config, {"model.d_ff": 96, "seed": 7, "norm": {"_target_": "torch.nn.Identity"}})
    assert config == before
    assert (other.model.d_ff, other.decoder.d_ff, other.seed) == (96, 96, 7)
    assert other.norm == {"_target_": "torch.nn.Identity"}
    with pytest.raises(Exception, match="nothing"):
        with_settings(config, {"nothing": 1})
