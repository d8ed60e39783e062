"""xpk.sh and slurm.sh do what the guides say; what a script misses is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharding.watch import LOST
from tests.deploy.fake_tools import Stage

BUCKET = (
    "run_dir=gs://b/my run",
    "data.sources.0.path=gs://b/*.parquet",
    "data.tokenizer=gs://b/t",
)
RUN = ("v3-671b-v5p-512", *BUCKET)
TPU = {"NAME": "mine", "ZONE": "z", "TYPE": "v5p-1024", "IMAGE": "r-docker.pkg.dev/p/r/dsjax"}
XPK = {"CLUSTER": "c", "ZONE": "z", "TYPE": "v5p-1024", "IMAGE": "i"}


def test_xpk_gets_the_run_and_the_exit_codes_to_start_again_on(stage: Stage) -> None:
    done = stage.run("xpk.sh", "v3", *RUN, **XPK, SLICES="2", PROJECT="p", XPK_FLAGS="--spot")
    assert done.returncode == 0
    [call] = stage.calls
    assert call == (
        "xpk workload create --cluster=c --zone=z --project=p --workload=v3 --tpu-type=v5p-1024 "
        "--num-slices=2 --docker-image=i --max-restarts=100 --restart-on-exit-codes=75 "
        "--termination-grace-period-seconds=600 --spot "
        r"--command=exec python train.py v3-671b-v5p-512 run_dir=gs://b/my\ run "
        r"data.sources.0.path=gs://b/\*.parquet data.tokenizer=gs://b/t"
    )


def restarted_by_xpk(listed: str) -> set[int]:
    """The exit codes after which XPK starts a workload again (its help, and workload.py)."""
    return {42, *range(127, 256), *map(int, listed.split(","))}


def test_xpk_starts_again_after_a_lost_process_and_not_after_wrong_input(stage: Stage) -> None:
    stage.run("xpk.sh", "v3", *RUN, **XPK)
    [codes] = [w.partition("=")[2] for w in stage.calls[0].split() if "exit-codes" in w]
    again = restarted_by_xpk(codes)
    assert {LOST, 137, 143} <= again and again.isdisjoint({0, 1, 2})


SLURM = ("v2-lite-16b-h100-8", "a=b")


@pytest.mark.parametrize(
    ("code", "again"),
    [(0, False), (1, False), (2, False), (130, False), (75, True), (137, True), (143, True)],
)
def test_a_slurm_job_queues_itself_again_after_a_signal_or_a_lost_process(
    code: int, again: bool, stage: Stage
) -> None:
    stage.leaves["srun"] = code
    done = stage.run("slurm.sh", *SLURM, SLURM_JOB_ID="17", SLURM_CPUS_ON_NODE="96")
    assert done.returncode == code
    assert stage.calls[0] == (
        "srun --kill-on-bad-exit=0 --cpus-per-task=96 python train.py v2-lite-16b-h100-8 a=b"
    )
    assert (stage.calls[1:] == ["scontrol requeue 17"]) is again


def test_a_slurm_job_that_is_lost_again_and_again_ends(stage: Stage) -> None:
    stage.leaves["srun"] = 75
    done = stage.run("slurm.sh", *SLURM, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="100")
    assert done.returncode == 75 and len(stage.calls) == 1


def test_slurms_container_sees_the_folders_of_the_run(stage: Stage, tmp_path: Path) -> None:
    """By pyxis' README: --container-mounts=SRC:DST[:FLAGS][,SRC:DST...]."""
    for name in ("runs", "data"):
        (tmp_path / name).mkdir()
    mounts = f"{tmp_path}/runs,{tmp_path}/data:/data:ro"
    done = stage.run("slurm.sh", *SLURM, IMAGE="/shared/dsjax.sqsh", MOUNTS=mounts)
    assert done.returncode == 0, done.stderr
    assert stage.calls == [
        "srun --kill-on-bad-exit=0 --container-image=/shared/dsjax.sqsh "
        f"--container-mounts={tmp_path}/runs:{tmp_path}/runs,{tmp_path}/data:/data:ro "
        "--container-workdir=/dsjax --no-container-mount-home "
        "python train.py v2-lite-16b-h100-8 a=b"
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "says"),
    [
        ("tpu-vm.sh", ("run", *RUN), {**TPU, "ZONE": ""}, "ZONE is not set"),
        ("tpu-vm.sh", ("run", *RUN), {**TPU, "IMAGE": ""}, "IMAGE is not set"),
        ("tpu-vm.sh", ("run",), TPU, "expected run CONFIG"),
        ("tpu-vm.sh", ("walk",), TPU, "expected run CONFIG"),
        ("tpu-vm.sh", ("run", *RUN[:2]), TPU, "path is in gs://BUCKET"),
        ("tpu-vm.sh", ("run", *RUN[:3]), TPU, "tokenizer is in gs://BUCKET"),
        ("tpu-vm.sh", ("run", *RUN, "init=gs://BUCKET/a"), TPU, "gs://BUCKET/a: BUCKET, REGION"),
        ("tpu-vm.sh", ("run", *RUN), {**TPU, "IMAGE": "REGION-docker.pkg.dev/p/r/d"}, "replace"),
        ("xpk.sh", ("v3", *RUN), {}, "CLUSTER is not set"),
        ("xpk.sh", ("v3",), XPK, "WORKLOAD"),
        ("xpk.sh", ("v3", RUN[0]), XPK, "run_dir is in gs://BUCKET"),
        ("slurm.sh", (), {}, "expected CONFIG"),
        ("slurm.sh", SLURM, {"IMAGE": "i", "MOUNTS": "/no/such"}, "/no/such is not there; MOUNTS"),
    ],
)
def test_what_a_script_misses_is_said_before_anything_is_called(
    script: str, arguments: tuple[str, ...], variables: dict[str, str], says: str, stage: Stage
) -> None:
    done = stage.run(script, *arguments, **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr
    assert stage.calls == []
