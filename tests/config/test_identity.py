"""What a run is named by: the same for the same training, whatever settings are added to `conf/` later."""

import shutil

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from scantling.config import settings
from scantling.config.composition import compose_config, with_choices, with_settings
from scantling.config.differences import leaves
from scantling.config.identity import identity, run_id
from scantling.config.options import CONF
from scantling.config.settings import NOT_TRAINED, NULL_IN_IDENTITY, Setting

IDS = {
    "model=llama_small attn=gqa": "llama_small-b7c2cc8386",
    "model=nano": "nano-5a352ea694",
    "model=gpt2_tiny norm=rmsnorm pos=alibi ffn=geglu": "gpt2_tiny-6a9732cc19",
    "attn=gqa attn/pattern=sliding attn/qk_norm=per_head": "llama_small-d4d3b9e218",
    "data=text data.files=books/*.txt tokenizer=unigram": "llama_small-6a77960fd6",
    "model=mixtral_8x7b seed=3": "mixtral_8x7b-d920a7dacd",
    "experiment=nanogpt_shakespeare_cpu data.files=x.txt": "gpt2_tiny-5dc135302f",
    "model=llama_60m optim=sgd schedule=wsd clip=null z_loss=1e-4 ema.decay=0.999": "llama_60m-15089b4d8f",
    "model=deepseek_v3 trainer.precision=bf16": "deepseek_v3-057dc987a8",
    "model=nano head=sampled embed=untied param=mup batch_warmup.start=2 batch_warmup.steps=3 "
    "document_mask=true": "nano-b4d2f662a4",
    # with the nulls that these lack
    "model=nano attn=mla": "nano-4231739d48",
    "model=nano pos=rope pos/scaling=yarn": "nano-7e312452d9",
    "model=nano data=hf data.path=x val_windows=null": "nano-c218ccc6cc",
}
"""Of commands, as they were before neutral values were left out."""


@pytest.mark.parametrize("command", IDS)
def test_runs_of_before_are_found_again(command):
    assert run_id(compose_config("train", command.split())) == IDS[command]


def test_every_null_of_old_is_in_one_of_these():
    """So that none is missing above, and none too many in the list."""
    found = set()
    for command in IDS:
        named = leaves(identity(compose_config("train", command.split())))
        found |= {key.removeprefix("decoder.") for key, value in named.items() if value is None}
    assert found == set(NULL_IN_IDENTITY)


def test_an_identity_is_of_the_configuration_alone(monkeypatch):
    monkeypatch.setattr(HydraConfig, "get", None)
    one, other = (compose_config("train", [f"model={name}"]) for name in ("nano", "gpt2_tiny"))
    assert run_id(one) == IDS["model=nano"]
    assert run_id(other).startswith("gpt2_tiny-")
    assert run_id(with_settings(one, {"study": "x", "log_every": 1, "trainer.devices": 8})) == run_id(one)
    assert run_id(with_settings(one, {"seed": 1})) != run_id(one)


PARTS_TYPED = ("model=nano", "pos/scaling=yarn", "data=text", "data.files=x.txt", "optim=adamw", "attn=gqa")


@pytest.fixture
def grown(tmp_path, monkeypatch):
    """`grown("train", "wanted: null")` adds that to a copy of the file -> the configuration of overrides on
    the copy.
    """
    conf = shutil.copytree(CONF, tmp_path / "conf")

    def grown(file: str, text: str):
        path = conf / f"{file}.yaml"
        content = path.read_text()
        path.write_text(
            content + text if "\nhydra:" not in content else content.replace("\nhydra:", f"\n{text}\nhydra:")
        )

        def composed(*overrides):
            with initialize_config_dir(str(conf), version_base="1.3"):
                whole = compose("train", [*PARTS_TYPED, *overrides], return_hydra_config=True)
            return with_choices(whole, whole.hydra)

        return composed

    return grown


@pytest.fixture
def declared(monkeypatch):
    """`declared("wanted", 0)` declares a neutral value."""
    return lambda key, value: monkeypatch.setitem(settings.SETTINGS, key, Setting(neutral=value))


PLACES = [
    *(("train", ""), ("attn/mha", "attn."), ("attn/pattern/full", "attn.pattern."), ("ffn/swiglu", "ffn.")),
    *(("pos/scaling/yarn", "pos.scaling."), ("optim/adamw", "optim."), ("schedule/linear", "schedule.")),
    *(
        ("data/text", "data."),
        ("tokenizer/bpe", "tokenizer."),
        ("budget/tokens", "budget."),
        ("norm/rmsnorm", "norm."),
    ),
]


@pytest.mark.parametrize(("file", "prefix"), PLACES)
def test_a_null_setting_more_makes_no_other_run(grown, file, prefix):
    before = run_id(compose_config("train", PARTS_TYPED))
    composed = grown(file, "\nwanted: null\n")
    assert composed().pos is not None
    assert run_id(composed()) == before
    assert run_id(composed(f"{prefix}wanted=1")) != before


@pytest.mark.parametrize(("file", "prefix"), PLACES)
def test_a_setting_more_at_its_neutral_value_makes_no_other_run(grown, declared, file, prefix):
    before = run_id(compose_config("train", PARTS_TYPED))
    composed = grown(file, "\nwanted: 0\n")
    assert run_id(composed()) != before
    declared(f"{prefix}wanted", 0)
    assert run_id(composed()) == before
    assert run_id(composed(f"{prefix}wanted=0.0")) == before
    assert run_id(composed(f"{prefix}wanted=null")) == before
    assert run_id(composed(f"{prefix}wanted=2")) != before


def test_a_node_of_neutral_settings_makes_no_other_run(grown, declared):
    before = run_id(compose_config("train", PARTS_TYPED))
    composed = grown("train", "\nwanted:\n  more: null\n  steps: 0\n")
    declared("wanted.steps", 0)
    assert run_id(composed()) == before
    assert len({before, run_id(composed("wanted.more=1")), run_id(composed("wanted.steps=1"))}) == 3


def test_a_setting_of_before_stays_in_at_any_value():
    config = compose_config("train", ["model=nano"])
    assert all(run_id(with_settings(config, {key: 1})) != run_id(config) for key in ("z_loss", "ema.decay"))
    named = identity(config)
    assert not {*NOT_TRAINED, "choices", "overrides"} & set(named)
    assert named["precision"] == "auto"
    assert named["batch_warmup"] == {"start": None, "steps": 0}
