"""The scripts of deploy/ do what the guides say.

gcloud, xpk, srun and scontrol are played by a script that notes how it was called.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

STAND_IN = """\
#!/usr/bin/env bash
# Notes the call; says what lies ready for it, and leaves with the code that does.
echo "$(basename "$0") $*" >> "$HOME/calls"
verb=$(basename "$0")
[[ "$verb" != gcloud ]] || verb=$4
answers="$HOME/$verb"
[[ -s "$answers" ]] || exit 0
read -r code words < "$answers"
sed -i 1d "$answers"
[[ -z "$words" ]] || echo "$words"
exit "$code"
"""


class Stage:
    """A home in which a script runs, with stand-ins for what it calls."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("gcloud", "xpk", "srun", "scontrol"):
            (home / "bin").mkdir(exist_ok=True)
            (home / "bin" / name).write_text(STAND_IN)
            (home / "bin" / name).chmod(0o755)

    def answers(self, verb: str, *lines: str) -> None:
        """What the next calls of `verb` leave with and say; all later ones leave with 0."""
        (self.home / verb).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        path = f"{self.home / 'bin'}:{os.environ['PATH']}"
        quick = {"POLL_SECONDS": "0", "SETTLE_SECONDS": "0"}
        return subprocess.run(
            [DEPLOY / script, *arguments],
            env={"PATH": path, "HOME": str(self.home), **quick, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        noted = self.home / "calls"
        return noted.read_text().splitlines() if noted.exists() else []

    def verbs(self) -> list[str]:
        """Of gcloud's calls, but for questions about the state."""
        return [verb for call in self.calls if (verb := call.split()[4]) != "describe"]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


TPU = {"NAME": "mine", "ZONE": "z", "TYPE": "v5p-1024", "IMAGE": "r-docker.pkg.dev/p/r/dsjax"}
RUN = ("run", "v3-671b-v5p-512", "run_dir=gs://b/my run")


def test_a_run_on_tpu_vms_is_asked_for_awaited_and_started_on_all_workers(stage: Stage) -> None:
    stage.answers("describe", "1", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 ACTIVE")
    done = stage.run("tpu-vm.sh", *RUN, **TPU)
    assert (done.returncode, done.stderr) == (
        0, "mine: WAITING_FOR_RESOURCES\nmine: PROVISIONING\n"
    )  # fmt: skip
    assert stage.verbs() == ["create", "ssh"]
    create, ssh = (call for call in stage.calls if " describe " not in call)
    assert create == (
        "gcloud compute tpus queued-resources create mine --zone=z --node-id=mine "
        "--accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5"
    )
    assert "--node=all --worker=all" in ssh
    assert ssh.endswith(r"python train.py v3-671b-v5p-512 run_dir=gs://b/my\ run")


def test_several_slices_and_spot_are_asked_for(stage: Stage) -> None:
    stage.answers("describe", "1", "0 ACTIVE")
    stage.run("tpu-vm.sh", *RUN, **TPU, SLICES="2", SPOT="1")
    [create] = [call for call in stage.calls if " create " in call]
    assert "--node-count=2 --node-prefix=mine --spot" in create


def test_tpus_that_are_taken_away_are_asked_for_again(stage: Stage) -> None:
    stage.answers("describe", "0 ACTIVE", "0 ACTIVE", "0 SUSPENDING", "1", "0 ACTIVE")
    stage.answers("ssh", "1", "0")
    done = stage.run("tpu-vm.sh", *RUN, **TPU)
    assert done.returncode == 0
    assert stage.verbs() == ["ssh", "delete", "create", "ssh"]


def test_a_run_that_fails_by_itself_is_not_repeated(stage: Stage) -> None:
    """Nor does a question that fails for once cost the TPUs."""
    stage.answers("describe", "0 ACTIVE", "0 ACTIVE", "1", "0 ACTIVE")
    stage.answers("ssh", "7")
    assert stage.run("tpu-vm.sh", *RUN, **TPU).returncode == 7
    assert stage.verbs() == ["ssh"]


def test_a_request_that_fails_ends_the_script(stage: Stage) -> None:
    stage.answers("describe", "0 FAILED", "0 FAILED")
    done = stage.run("tpu-vm.sh", *RUN, **TPU)
    assert done.returncode == 2 and "mine: the request failed" in done.stderr
    assert stage.verbs() == []


def test_xpk_gets_the_run(stage: Stage) -> None:
    here = {"CLUSTER": "c", "ZONE": "z", "TYPE": "v5p-1024", "IMAGE": "i"}
    done = stage.run("xpk.sh", "v3", *RUN[1:], **here, SLICES="2")
    assert done.returncode == 0
    [call] = stage.calls
    assert call == (
        "xpk workload create --cluster=c --zone=z --workload=v3 --tpu-type=v5p-1024 --num-slices=2 "
        "--docker-image=i --max-restarts=100 "
        r"--command=python train.py v3-671b-v5p-512 run_dir=gs://b/my\ run"
    )


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (143, True)])
def test_a_slurm_job_that_was_told_to_stop_queues_itself_again(
    code: int, again: bool, stage: Stage
) -> None:
    stage.answers("srun", str(code))
    done = stage.run("slurm.sh", "v2-lite-16b-h100-8", "a=b", SLURM_JOB_ID="17")
    assert done.returncode == code
    assert stage.calls[0] == "srun --kill-on-bad-exit=0 python train.py v2-lite-16b-h100-8 a=b"
    assert (stage.calls[1:] == ["scontrol requeue 17"]) is again


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "says"),
    [
        ("tpu-vm.sh", RUN, {**TPU, "ZONE": ""}, "ZONE is not set"),
        ("tpu-vm.sh", RUN, {**TPU, "IMAGE": ""}, "IMAGE is not set"),
        ("tpu-vm.sh", ("run",), TPU, "expected run CONFIG"),
        ("tpu-vm.sh", ("walk",), TPU, "expected run CONFIG"),
        ("xpk.sh", RUN, {}, "CLUSTER is not set"),
        ("xpk.sh", ("v3",), {n: "x" for n in ("CLUSTER", "ZONE", "TYPE", "IMAGE")}, "WORKLOAD"),
        ("slurm.sh", (), {}, "expected CONFIG"),
    ],
)
def test_what_a_script_misses_is_said_before_anything_is_called(
    script: str, arguments: tuple[str, ...], variables: dict[str, str], says: str, stage: Stage
) -> None:
    done = stage.run(script, *arguments, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr
    assert stage.calls == []


def test_an_unknown_tpu_is_not_asked_for(stage: Stage) -> None:
    stage.answers("describe", "1")
    done = stage.run("tpu-vm.sh", *RUN, **{**TPU, "TYPE": "v9-8"})
    assert done.returncode == 2 and "TYPE=v9-8: set RUNTIME" in done.stderr
    assert stage.verbs() == []
