"""What a plan says of a run; the compiler's own part is in test_compiled_plan.py."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from dsjax.cli import main
from dsjax.cli_plan import _read_job
from dsjax.config_files import (
    CONFIGS,
    load_model_config,
    load_pretrain_config,
    load_serving_config,
)
from dsjax.errors import UserError
from dsjax.planning import compile as compiling
from dsjax.planning.account import Account, account
from dsjax.planning.chips import V5P, whole_slice
from dsjax.planning.compile import compile_once, versions
from dsjax.planning.costs import COPIES, GATHERS, MATMUL
from dsjax.planning.memory import replicated, state_bytes
from dsjax.planning.picture import draw_plan
from dsjax.planning.plan import Plan, doubts
from dsjax.planning.report import plan_json, print_plan
from dsjax.planning.train import abstract_state, remedy
from dsjax.planning.useful import flops_per_token
from dsjax.training.run import make_layout
from dsjax.training.step import init_state
from tests.planning.programs import OPERAND, account_of, matmul, program

STEP = Account(
    seconds=10.0,
    core=defaultdict(float, {MATMUL: 8.0}),
    waited=defaultdict(float, {GATHERS: 2.0}),
    hidden=defaultdict(float, {GATHERS: 1.0}),
    sent=defaultdict(float, {GATHERS: 1e9}),
)
PLAN = Plan(
    topology="v5p:8x8x8",
    chip=V5P,
    chips=512,
    mesh={"fsdp": 512},
    tokens=512 * 10_000,
    memory={"weights": 1e9, "moments": 1e9, "gradients": 1e9, "activations": 7e9},
    hbm=1e10,
    account=STEP,
    useful=250e9,
    details={"step": "train", "run_tokens": 3_600_000_000},
    read=None,
    warnings=["a large copy: [one] of them"],
    versions={"jax": "1", "jaxlib": "1", "libtpu": "1"},
    compile_seconds=1.0,
)
NO_ROOM = replace(PLAN, account=None, hbm=1e12)


def test_the_keys_that_programs_rely_on():
    found = plan_json(PLAN, price=2.0)
    assert list(found)[:6] == [
        "fits", "hbm_bytes", "step_seconds", "tokens_per_second_per_chip", "mfu", "versions",
    ]  # fmt: skip
    assert found["fits"] is True
    assert found["tokens_per_second_per_chip"] == 1000
    assert found["mfu"] == pytest.approx(1000 * 250e9 / 459e12)
    assert found["run"]["chip_hours"] == pytest.approx(1000)
    assert found["run"]["dollars"] == pytest.approx(2000)
    assert found["account"][GATHERS]["waited_seconds"] == 2


def test_a_sequence_gets_as_many_tokens_as_drafts_are_accepted():
    serving = {"step": "decode", "drafts": 0}
    plain = replace(PLAN, details=serving, read=2765e9)
    assert plain.sequence_rates == [0.1]
    drafting = replace(plain, details=serving | {"drafts": 1})
    assert drafting.sequence_rates == pytest.approx([0.185, 0.19])
    assert plain.memory_seconds == 1  # of the step's ten
    console = Console(record=True, width=150, file=StringIO())
    print_plan(console, drafting, price=None)
    assert "85% to 90% of drafts accepted; reading" in console.export_text()
    assert PLAN.sequence_rates is None


def test_a_plan_that_does_not_fit_says_so_and_knows_no_time():
    found = plan_json(NO_ROOM, price=2.0)
    assert found["fits"] is False
    assert found["hbm_bytes"] == 1e12
    assert found["step_seconds"] is found["mfu"] is found["run"]["dollars"] is None
    json.dumps(found)


def test_the_text_names_memory_time_and_doubts():
    console = Console(record=True, width=100, file=StringIO())
    print_plan(console, PLAN, price=2.0)
    text = console.export_text()
    for said in ("weights", "1.0 GB", "gathers", "54.5% of peak", "2,000 dollars", "[one]"):
        assert said in text
    print_plan(console, NO_ROOM, price=None)
    assert "does not fit" in console.export_text()


@pytest.mark.parametrize("plan", [PLAN, NO_ROOM], ids=["fits", "no room"])
def test_a_plan_can_be_drawn(plan: Plan, tmp_path: Path):
    draw_plan(plan, tmp_path / "plan.png", "a run")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_longest_bar_of_a_picture_ends_before_the_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_plan(PLAN, tmp_path / "plan.png", "a run")
    (axes,) = drawn[0].axes
    longest = max(bar.get_x() + bar.get_width() for bar in axes.patches if bar.get_width())
    begin, end = axes.get_xlim()
    assert begin == 0 and longest == 8 and 1.02 * longest < end < 1.2 * longest


def test_useful_work_is_counted_as_the_paper_counts_it():
    config = load_pretrain_config("v3-671b-v5p-512")
    model = jax.eval_shape(lambda: init_state(config)).model
    assert flops_per_token(model, config.model, 4096) / 1e9 == pytest.approx(250.4, abs=0.1)
    assert flops_per_token(model, config.model, 8192) / 1e9 == pytest.approx(281.2, abs=0.1)


def tiny(*overrides: str) -> tuple[Any, Any, Any]:
    config = load_pretrain_config("cpu-tiny", list(overrides))
    layout = make_layout(config, jax.devices()[: 8 if overrides else 1])
    return config, layout, abstract_state(config, layout)


def test_the_state_of_one_device_is_four_bytes_and_two_moments_of_two():
    _, _, state = tiny()
    held = state_bytes(state)
    assert held["weights"] >= held["gradients"]  # biases of routers have no gradient
    assert held["moments"] == held["gradients"] + 4  # and a count of steps


def test_state_is_split_over_devices_and_what_is_not_is_named():
    one, eight = (state_bytes(tiny(*mesh)[2]) for mesh in ((), ("mesh.fsdp=8",)))
    assert one["weights"] / 8 < eight["weights"] < one["weights"] / 7
    whole = replicated(tiny("mesh.fsdp=8")[2].model)
    assert whole and all("norm" in name or "bias" in name for name, _ in whole)


@pytest.mark.parametrize(
    ("overrides", "memory", "says"),
    [
        (["mesh.fsdp=8"], 200e9, "larger slice"),
        (["mesh.fsdp=8", "training.microbatch_size=16", "training.batch_size=16"], 0,
         "the least is 8"),
        (["mesh.fsdp=8", "training.remat=keep_all"], 0, "remat=keep_layer_inputs would"),
        (["mesh.fsdp=8", "training.remat=keep_layer_inputs"], 0, "_on_host"),
    ],
)  # fmt: skip
def test_what_would_help_when_a_run_does_not_fit(overrides: list[str], memory: float, says: str):
    config, layout, _ = tiny(*overrides)
    assert says in remedy(config, layout, memory, 100e9)


def test_doubts_name_copies_and_exchanges_that_nobody_asked_for():
    lines = [
        OPERAND,
        matmul("m", 1),
        "  %b = f32[4096,8192]{1,0} parameter(1)",
        "  %turned = f32[4096,8192]{0,1} copy(%b)",
        "  %g = bf16[8,8]{1,0} all-gather(%a), replica_groups={}, dimensions={0}, "
        'frontend_attributes={is_spmd_generated="true"}',
        '  %k = f32[8]{0} custom-call(%b), custom_call_target="tpu_custom_call"',
    ]
    found = program("\n".join(lines))
    counted = account(found, whole_slice(V5P, (4, 4, 4)))
    assert counted.core[COPIES] > 0.01 * counted.seconds
    copy, exchange, kernel = doubts(found, counted)
    assert "turned" in copy and "f32[4096,8192]" in copy
    assert exchange == "1 exchanges that nobody asked for, such as g"
    assert "1 kernels or matmuls" in kernel
    assert doubts(program(OPERAND), account_of(OPERAND)) == []


class Lowered:
    """A program that the compiler refuses, and how often it was asked."""

    asked = 0

    def as_text(self, debug_info: bool) -> str:
        return "a program"

    def compile(self) -> None:
        self.asked += 1
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.07G) exceeds available HBM (15.75G)."
        )


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    installed = {"libtpu": "1"}
    monkeypatch.setattr(compiling, "versions", lambda: installed)
    lowered: Any = Lowered()
    first = compile_once(lowered, tmp_path)
    assert first.hbm == 29.07 * 2**30
    assert "exceeds available HBM" in first.refusal
    assert compile_once(lowered, tmp_path) == first
    assert lowered.asked == 1
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=true")
    compile_once(lowered, tmp_path)
    installed["libtpu"] = "2"
    compile_once(lowered, tmp_path)
    assert lowered.asked == 3


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compiling, "version", missing)
    with pytest.raises(UserError, match=r"pip install 'dsjax\[plan\]'"):
        versions()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9:2x2", "mesh.fsdp=4"], "no chip 'v9'"),
        (["--topology", "v5e:2x2", "mesh.fsdp=none"], "mesh.fsdp"),
        (["--topology", "v5e:2x2", "--nope", "a=1"], "unrecognized arguments: --nope"),
        (["--topology", "v5e:2x2", "nope"], "unrecognized arguments: nope"),
        ([], "--topology"),
        (["--topology", "v5e:2x2", "--rows", "8"], "--rows 8 is for a model"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Settings may stand behind options."""
    monkeypatch.setattr("dsjax.cli_plan.describe_host", lambda topology: None)
    monkeypatch.setattr(sys, "argv", ["dsjax", "plan", "cpu-tiny", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("serving/*.yaml")), ids=lambda path: path.stem)
def test_a_step_of_the_engine_can_stand_in_a_file(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsjax.cli_plan.describe_host", lambda topology: None)
    name = f"serving/{path.stem}"
    made: Any = _read_job(name, ["drafts=1", "step=prefill"], "v5e:8x8", "train", {"rows": None})
    model, serving = made.args
    assert model == load_model_config("r1")
    assert (serving.step, serving.drafts, serving.dtype) == ("prefill", 1, "fp8")
    with pytest.raises(UserError, match="nearest valid key is 'rows'"):
        load_serving_config(name, ["row=4"])
    assert load_serving_config("cpu-tiny") is None
