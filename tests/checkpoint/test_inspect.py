import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsjax import cli
from dsjax.checkpoint.inspect import inspect, report
from dsjax.errors import UserError

REPOSITORY = Path(__file__).parents[2]

Weights = dict[str, np.ndarray]
Write = Callable[..., Path]


def command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m dsjax`, or `code` in its place."""
    how = ["-c", code] if code else ["-m", "dsjax"]
    return subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_671b_has_the_published_parameter_counts() -> None:
    counts = report("v3-671b")["parameters"]
    kinds = counts.pop("by_kind")
    assert counts == {
        "main": 671_026_419_200,
        "mtp": 11_610_068_224,
        "unique": 682_636_487_424,
        "file": 684_489_845_504,
        "trainable": 682_636_487_424 - 59 * 256,
        "active_per_token": 671_026_419_200 - 58 * 248 * 3 * 7168 * 2048,
    }
    assert kinds["router bias"] == {"main": 14_848, "mtp": 256}
    for place in ("main", "mtp"):
        assert sum(kind[place] for kind in kinds.values()) == counts[place]


def test_fp8_files_of_671b_take_the_bytes_of_the_released_folder() -> None:
    size = report("v3-671b")["bytes"]["file"]
    assert size["fp8"] == 688_574_839_360
    assert size["float32"] == 4 * 684_489_845_504
    assert size["bfloat16"] == 2 * 684_489_845_504 + 2 * 59 * 256


def test_the_released_folder_is_inspected_whole(
    released: dict[str, dict], released_folder: Path
) -> None:
    found = report(str(released_folder))
    by_dtype = {
        dtype: [math.prod(x["shape"]) * size for x in released.values() if x["dtype"] == dtype]
        for dtype, size in (("F8_E4M3", 1), ("BF16", 2), ("F32", 4))
    }
    assert found["stored"] == {
        "files": 163,
        "tensors": 91_991,
        "bytes": 688_574_839_360,
        "by_dtype": {k: {"tensors": len(v), "bytes": sum(v)} for k, v in by_dtype.items()},
    }
    assert {k: len(v) for k, v in by_dtype.items()} == {
        "F8_E4M3": 45_808,
        "BF16": 316,
        "F32": 45_867,
    }
    assert found["parameters"] == report("r1")["parameters"]


def test_a_folder_is_reported_as_it_is_stored(
    write_folder: Write, weights_bfloat16: Weights
) -> None:
    found = report(str(write_folder(weights_bfloat16, shards=2)))
    assert found["stored"]["files"] == 2
    assert found["stored"]["bytes"] == sum(w.nbytes for w in weights_bfloat16.values())
    assert found["stored"]["bytes"] == found["bytes"]["file"]["bfloat16"]
    assert found["stored"]["by_dtype"]["F32"]["tensors"] == 3


def test_absent_mtp_is_reported_and_not_counted(
    write_folder: Write, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {name: w for name, w in weights.items() if not name.startswith("model.layers.3.")}
    folder = str(write_folder(main))
    found = report(folder)
    assert found["mtp_layers"] == {"config": 1, "found": 0}
    assert found["parameters"]["mtp"] == 0
    assert found["parameters"]["file"] == sum(w.size for w in main.values())
    inspect(folder, as_json=False)
    assert "config.json promises MTP layers, but the files hold none" in capsys.readouterr().out


def test_a_broken_folder_is_refused(write_folder: Write, weights: Weights) -> None:
    del weights["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 missing .lm_head.weight"):
        report(str(write_folder(weights)))


def test_models_runs_and_config_files_are_all_found(
    write_folder: Write, weights: Weights, config_json: dict
) -> None:
    model = report("cpu-tiny")
    assert report(str(REPOSITORY / "configs/model/cpu-tiny.yaml"))["config"] == model["config"]
    assert report(str(REPOSITORY / "configs/cpu-tiny.yaml"))["config"] == model["config"]
    folder = write_folder(weights)
    file = report(str(folder / "config.json"))
    assert file["stored"] is None
    assert file["parameters"] == report(str(folder))["parameters"]


def test_plain_output_is_text_without_frames(capsys: pytest.CaptureFixture[str]) -> None:
    inspect("v3-671b", as_json=False)
    out = capsys.readouterr().out
    assert out.isascii()
    for said in ("deepseek_v3", "671,026,419,200", "682,636,472,320", "688.6 GB"):
        assert said in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_inspecting_671b_is_quick_and_imports_no_jax() -> None:
    done = command(
        code="import sys, time\n"
        "from dsjax import cli\n"
        "sys.argv = ['dsjax', 'inspect', 'v3-671b', '--json']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as left:\n    assert left.code == 0, left.code\n"
        "print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    assert json.loads(done.stdout)["parameters"]["main"] == 671_026_419_200
    imported, seconds = done.stderr.splitlines()
    assert imported == "['numpy']"
    assert float(seconds) < 2


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    for arguments, says in (
        (["inspect", "no-such-model"], "error: no-such-model: no such file"),
        (["inspect", str(tmp_path)], "error: "),
        (["inspect"], "error: the following arguments are required: CONFIG|FOLDER"),
        (["inspekt"], "error: argument VERB: invalid choice: 'inspekt'"),
        ([], "error: the following arguments are required: VERB"),
    ):
        done = command(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(says)
        assert done.stderr.count("\n") == 1


def test_help_names_the_verbs_and_shows_examples() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert "inspect" in done.stdout
    assert "examples:" in done.stdout
    assert command("inspect", "--help").returncode == 0


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 0), (UserError("a\nb"), 2), (KeyboardInterrupt(), 130)]
)
def test_every_door_leaves_with_the_shared_exit_codes(
    raised: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def door() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as left:
        cli.run(door)
    assert left.value.code == code
    assert capsys.readouterr().err == ("error: a b\n" if code == 2 else "")


def test_a_fault_of_ours_is_not_hidden() -> None:
    def door() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        cli.run(door)
