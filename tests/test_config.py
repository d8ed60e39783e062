"""What cannot work is refused on one line: the file, the key, what was found, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dsjax.architecture import DeepSeekConfig
from dsjax.config import PretrainConfig, RunConfig, Stage, schedule_value
from dsjax.config_files import (
    CONFIGS,
    load_model_config,
    load_pretrain_config,
    load_run_config,
    load_sample_config,
    parse,
    read_yaml,
    write_config,
)
from dsjax.errors import UserError

MODEL: dict[str, Any] = read_yaml(CONFIGS / "model" / "cpu-tiny.yaml")

RUN: dict[str, Any] = {
    "run_dir": "runs/test",
    "model": "cpu-tiny",
    "data": {"sources": [{"path": "*.txt"}], "sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"tokens": "1M", "batch_size": 8, "microbatch_size": 4},
    "checkpoint": {"every_steps": 10},
    "evaluation": {"every_steps": 10},
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def refused(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The one line with which `call` refuses."""
    with pytest.raises(UserError) as error:
        call(*arguments, **keywords)
    message = str(error.value)
    assert "\n" not in message
    return message


def refused_model(**changes: Any) -> str:
    return refused(parse, DeepSeekConfig, MODEL | changes, source="model.yaml")


# Files ----------------------------------------------------------------------------------------


def test_every_shipped_configuration_is_valid() -> None:
    models = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    assert {"v3-671b", "r1", "v2-236b", "v2-lite-16b", "moonlight-16b", "kimi-k2"} <= set(models)
    for name in models:
        assert load_model_config(name).vocab_size > 0
    tiny = load_model_config("cpu-tiny")
    for path in [*CONFIGS.glob("*.yaml"), *(CONFIGS / "r1").glob("*.yaml")]:
        if path.stem.endswith("-sample"):
            assert load_sample_config(path).sampling.k > 1
        else:
            assert load_run_config(path, model_of=lambda _: tiny).training.microbatch_size > 0


def test_a_configuration_is_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    assert load_model_config(path) == load_model_config("cpu-tiny")


def test_an_unknown_name_lists_the_known_ones() -> None:
    message = refused(load_model_config, "v4")
    assert message.startswith("v4: no such file") and "v3-671b" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "cannot be read as YAML"),
        (b"\xff\xfe\xfa", "cannot be read as YAML"),
        (b"seed: 1\ntask: a\nseed: 2\n", "the key 'seed' stands twice, in lines 1 and 3"),
        (b"a:\n\tb: 1\n", "found character '\\t' that cannot start any token"),
        (b"- a\n- b\n", "expected a mapping of keys, found list"),
        (b"", "expected a mapping of keys, found NoneType"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refused(load_model_config, path)
    assert message.startswith(str(path)) and expected in message


# Keys -----------------------------------------------------------------------------------------


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    assert refused_model(kv_lora_rnk=8) == (
        "model.yaml: unknown key 'kv_lora_rnk'; the nearest valid key is 'kv_lora_rank'"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.micro_batch_size=4", "'training.micro_batch_size'; .* 'microbatch_size'"),
        ("trainin.tokens=4", "'trainin'; .* 'training'"),
        ("model.rope_scaling.betafast=4", "'model.rope_scaling.betafast'; .* 'beta_fast'"),
        ("data.sources.0.kin=text", r"'data.sources.0.kin'; .* 'kind'"),
        (
            "optimizer.learning_rate=[{value: 1, shap: linear}]",
            "'optimizer.learning_rate.0.shap'; .* 'shape'",
        ),
        ("mesh.contxt=2", r"'mesh.contxt'; the nearest valid key is 'context'"),
        ("mesh.dcn.dat=2", r"'mesh.dcn.dat'; the nearest valid key is 'data'"),
    ],
)
def test_an_unknown_nested_key_names_the_nearest_valid_one(
    run_file: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=f"unknown key {expected}"):
        load_run_config(run_file, [override])


def test_a_mistyped_required_key_names_the_nearest_valid_one() -> None:
    """It is missing and unknown at once; the mistake is the unknown one."""
    tree = {key.replace("v_head_dim", "v_head_dmi"): value for key, value in MODEL.items()}
    message = refused(parse, DeepSeekConfig, tree, source="model.yaml")
    assert "unknown key 'v_head_dmi'; the nearest valid key is 'v_head_dim'" in message


def test_a_missing_key_is_named() -> None:
    tree = {key: value for key, value in MODEL.items() if key != "v_head_dim"}
    message = refused(parse, DeepSeekConfig, tree, source="model.yaml")
    assert message == "model.yaml: the key 'v_head_dim' is missing"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "wide"}, "hidden_size='wide': "),
        ({"hidden_size": 0}, "hidden_size=0: input should be greater than 0"),
        ({"hidden_size": 64.5}, "hidden_size=64.5: "),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: input should be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf: input should be a finite number"),
        ({"scoring_func": "tanh"}, "scoring_func='tanh': input should be 'sigmoid' or 'softmax'"),
        ({"topk_method": "random"}, "topk_method='random': "),
        ({"model_type": "llama"}, "model_type='llama': "),
        ({"rope_scaling": {"factor": -1}}, "rope_scaling.factor=-1: "),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1: "),
    ],
)
def test_a_wrong_value_is_shown(changes: dict[str, Any], expected: str) -> None:
    assert refused_model(**changes).startswith(f"model.yaml: {expected}")


# Impossible combinations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd, .*choose 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than n_routed_experts=8"),
        ({"n_group": 3}, "n_routed_experts=8 is not divisible by n_group=3"),
        ({"topk_group": 5}, "topk_group=5 is more than n_group=4"),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok=5 is more than the 4 experts of topk_group=2 groups; raise",
        ),
        ({"n_group": 8, "topk_group": 4}, "groups of 1 expert have no two largest scores"),
        ({"topk_method": "greedy"}, "topk_method=greedy knows no groups, but n_group=4"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace=4 is more than num_hidden_layers=3"),
        ({"bos_token_id": 512}, "bos_token_id=512 is outside vocab_size=512"),
        ({"eos_token_id": -1}, "eos_token_id=-1 is outside vocab_size=512"),
    ],
)
def test_an_impossible_model_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"^model.yaml: {expected}"):
        parse(DeepSeekConfig, MODEL | changes, source="model.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.batch_size=10", "batch_size=10 is not a multiple of microbatch_size=4"),
        ("training.batch_size=2", "batch_size=2 is not a multiple of microbatch_size=4"),
        ("data.sequence_length=2048", "data.sequence_length=2048 is beyond model.max_position"),
        ("data.sequence_length=2", "data.sequence_length=2 leaves no target for 1 MTP layers"),
        ("data.sources=[]", r"data.sources=\[\]: list should have at least 1 item"),
        ("data.held_out_fraction=1", "data.held_out_fraction=1: input should be less than 1"),
        ("mesh.fsdp=all", "mesh.fsdp"),
        ("task=dream", "task='dream': "),
        ("training.remat=some", "training.remat='some': "),
    ],
)
def test_an_impossible_run_is_refused(run_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_run_config(run_file, [override])
    assert "\n" not in str(error.value) and str(error.value).startswith(str(run_file))


# Overrides ------------------------------------------------------------------------------------


def test_overrides_reach_every_depth(run_file: Path) -> None:
    config = load_run_config(
        run_file,
        [
            "seed=7",
            "training.tokens=14.8T",
            "model.rope_scaling.factor=8",
            "data.sources.0.weight=2.5",
            "mesh.tensor=2",
            "data.tokenizer=a=b.json",
        ],
    )
    assert config.seed == 7
    assert config.training.tokens == 14_800_000_000_000
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 8
    assert config.data.sources[0].weight == 2.5
    assert (config.mesh.tensor, config.mesh.fsdp) == (2, "auto")
    assert config.data.tokenizer == "a=b.json"


def test_the_model_is_chosen_before_its_keys_are_overridden(run_file: Path) -> None:
    config = load_run_config(run_file, ["model.num_hidden_layers=5", "model=cpu-81m"])
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (512, 5)


def test_a_run_may_spell_its_model_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | {"model": MODEL}))
    assert load_run_config(path).model == load_model_config("cpu-tiny")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (".=3", "'.=3': an override looks like section.key=value"),
        ("training.=3", "'training.=3': an override looks like section.key=value"),
        ("model=5", "model=5: expected a name, a path, or a mapping of keys"),
        ("seed={a: 1, a: 2}", "the key 'a' stands twice, in lines 1 and 1"),
        ("seed=" + "[" * 3000, "cannot be read as YAML"),
        ("training.tokens=abc", "training.tokens='abc': "),
        ("seed", "'seed': an override looks like section.key=value"),
        ("=3", "'=3': an override looks like section.key=value"),
        ("seed=[1", r"seed: '\[1' cannot be read as YAML"),
        ("data.sources.3.weight=1", "there is no '3' to override in a list"),
        ("data.sources.first.weight=1", "there is no 'first' to override in a list"),
        ("seed.x=1", "unknown key|there is no|seed"),
        ("run_dir.x=1", "there is no 'x' to override in a str"),
        ("model=v4", "v4: no such file"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(
    run_file: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_run_config(run_file, [override])
    assert "\n" not in str(error.value)


def test_scalars_are_those_of_yaml_1_2(run_file: Path) -> None:
    """PyYAML takes a date, minutes, octal and false for these, and 1e-4 for a text."""
    for text in ("2024-01-01", "2001-99-99", "12:30", "no", "off"):
        assert load_run_config(run_file, [f"run_dir={text}"]).run_dir == text
    settings = ["seed=010", "optimizer.eps=1e-4", "training.max_steps=1e3", "mesh.data=0x2"]
    config = load_run_config(run_file, [*settings, "data.deduplicate=no"])
    assert (config.seed, config.optimizer.eps, config.mesh.data) == (10, 1e-4, 2)
    assert isinstance(config, PretrainConfig)
    assert config.training.max_steps == 1000 and config.data.deduplicate is False


@pytest.mark.parametrize("name", ["1e4", "2024-01-01", "no", "null", "010", "0x1f", "a: b", "~"])
def test_a_configuration_that_is_written_is_read_again(
    run_file: Path, tmp_path: Path, name: str
) -> None:
    config = load_run_config(run_file, [f"run_dir={name!r}", "optimizer.eps=1e-9"])
    write_config(config, tmp_path)
    assert load_run_config(tmp_path / "config.yaml") == config


def test_a_section_that_is_switched_off_can_be_given_a_key(run_file: Path) -> None:
    assert load_run_config(run_file, ["profile=null", "profile.steps=4"]).profile is not None


# Counts and schedules -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("10K", 10_000),
        ("1.5M", 1_500_000),
        ("469B", 469_000_000_000),
        ("14.8T", 14_800_000_000_000),
    ],
)
def test_counts_have_suffixes(run_file: Path, text: str, tokens: int) -> None:
    assert load_pretrain_config(run_file, [f"training.tokens={text}"]).training.tokens == tokens


@pytest.mark.parametrize("text", ["1.2.3M", "M", "14.8Q", "-3K", "0", "1.5", "many"])
def test_what_is_no_count_is_refused(run_file: Path, text: str) -> None:
    message = refused(load_run_config, run_file, [f"training.tokens={text}"])
    assert "training.tokens" in message


def test_a_number_is_a_constant_schedule(run_file: Path) -> None:
    stages = load_pretrain_config(run_file, ["training.mtp_weight=0.1"]).training.mtp_weight
    assert [schedule_value(stages, tokens) for tokens in (0, 10**15)] == [0.1, 0.1]


def test_the_papers_learning_rate_is_one_schedule(run_file: Path) -> None:
    """V3 section 4.2: constant to 10T, cosine over 4.3T, then two constants."""
    override = (
        "optimizer.learning_rate=[{value: 2.2e-4, until: 10T}, "
        "{value: 2.2e-5, until: 14.3T, shape: cosine}, "
        "{value: 2.2e-5, until: 14.633T}, {value: 7.3e-6, until: 14.8T}]"
    )
    stages = load_run_config(run_file, [override]).optimizer.learning_rate
    at = [
        schedule_value(stages, round(tokens * 1e12)) for tokens in (0, 9.99, 12.15, 14.4, 14.7, 20)
    ]
    assert at == pytest.approx([2.2e-4, 2.2e-4, 1.21e-4, 2.2e-5, 7.3e-6, 7.3e-6])


def test_a_linear_stage_moves_from_the_value_before_it() -> None:
    stages = [
        Stage(value=4, until=100),
        Stage(value=8, until=200, shape="linear"),
        Stage(value=8),
    ]
    assert [schedule_value(stages, t) for t in (0, 99, 100, 150, 199, 200)] == [
        4, 4, 4, 6, pytest.approx(7.96), 8,
    ]  # fmt: skip


def test_a_schedule_jumps_at_its_stages_end() -> None:
    """lambda is 0.3 for the first 10T tokens, then 0.1."""
    stages = [Stage(value=0.3, until=10), Stage(value=0.1)]
    assert [schedule_value(stages, t) for t in (9, 10)] == [0.3, 0.1]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("[]", "should have at least 1 item"),
        ("[{value: 1, shape: linear, until: 5}]", "the first stage has nothing to move from"),
        ("[{value: 1}, {value: 2}]", "only the last stage may leave `until` out"),
        ("[{value: 1, until: 9}, {value: 2, until: 9}]", r"one after the other, .*\[9, 9\]"),
        ("[{value: 1, until: 9}, {value: 2, until: 3}]", r"one after the other, .*\[9, 3\]"),
        ("[{until: 9}]", "'optimizer.learning_rate.0.value' is missing"),
        ("[{value: 1, shape: square}]", "optimizer.learning_rate.0.shape='square'"),
        ("fast", "optimizer.learning_rate.0.value='fast'"),
    ],
)
def test_an_impossible_schedule_is_refused(run_file: Path, stages: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_run_config(run_file, [f"optimizer.learning_rate={stages}"])
    assert "\n" not in str(error.value) and "learning_rate" in str(error.value)


def test_a_moving_stage_without_an_end_is_refused(run_file: Path) -> None:
    """Nobody knows when it should have arrived."""
    message = refused(
        load_run_config,
        run_file,
        ["optimizer.learning_rate=[{value: 1, until: 5}, {value: 2, shape: cosine}]"],
    )
    assert "until" in message


# Immutability ---------------------------------------------------------------------------------


def test_a_configuration_cannot_be_changed_and_can_be_a_key(run_file: Path) -> None:
    model = load_model_config("cpu-tiny")
    with pytest.raises(ValueError, match="frozen"):
        model.hidden_size = 3  # type: ignore[misc]
    assert {model: 1}[load_model_config("cpu-tiny")] == 1
    assert isinstance(load_run_config(run_file), RunConfig)
