"""tpu-vm.sh keeps a run alive: it attaches, starts again, asks for other TPUs, or gives up."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.fake_tools import GONE, Container, Stage
from tests.deploy.test_scripts import RUN, TPU

STARTED = ["run host0", "run host1"]
ASKED = ["create", *STARTED]


def train(stage: Stage, **variables: str) -> tuple[int, str]:
    """`tpu-vm.sh run`: its exit code, and what the script itself said."""
    done = stage.run("tpu-vm.sh", "run", *RUN, **{**TPU, **variables})
    return done.returncode, done.stderr


def ended(*codes: Any) -> dict[str, Any]:
    return {"ends": codes}


def test_a_run_is_asked_for_awaited_and_started_on_all_hosts(stage: Stage) -> None:
    granted = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    stage.play(ended(0, 0), granted=granted)
    code, said = train(stage)
    assert code == 0
    assert said.splitlines() == [f"mine: {state}" for state in ("MISSING", *granted[:3])] + [
        "mine: starting on 2 hosts"
    ]
    assert stage.deeds() == ASKED
    [create] = [call for call in stage.calls if " create " in call]
    assert create == (
        "gcloud compute tpus queued-resources create mine --node-id=mine "
        "--accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5 --zone=z"
    )
    started = next(call for call in stage.calls if call.startswith("host1 docker run"))
    assert (
        "--detach --init --name dsjax " in started
        and "--env TPU_ACCELERATOR_TYPE=v5p-1024" in started
    )
    assert started.endswith(
        "r-docker.pkg.dev/p/r/dsjax python train.py v3-671b-v5p-512 run_dir=gs://b/my run "
        "data.sources.0.path=gs://b/*.parquet data.tokenizer=gs://b/t"
    )


def test_what_gcloud_needs_is_handed_on(stage: Stage) -> None:
    stage.play(ended(0, 0, 0, 0))
    more = {"PROJECT": "p", "NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a@p"}
    more |= {"CREATE_FLAGS": "--reserved --internal-ips", "SSH_FLAGS": "--tunnel-through-iap"}
    assert train(stage, **more, SLICES="2", SPOT="1")[0] == 0
    [create] = [call for call in stage.calls if " create " in call]
    for flag in (
        "--node-count=2 --node-prefix=mine", "--spot --network=n --subnetwork=s",
        "--service-account=a@p --reserved --internal-ips", "--project=p",
    ):  # fmt: skip
        assert flag in create
    ssh = [call for call in stage.calls if " ssh " in call]
    assert all("--tunnel-through-iap" in call and "--project=p" in call for call in ssh)
    assert stage.deeds() == ["create", *(f"run host{n}" for n in range(4))]


@pytest.mark.parametrize("code", [1, 2, 7])
def test_a_run_that_fails_by_itself_is_not_repeated(code: int, stage: Stage) -> None:
    stage.play(ended(code, code), states=("ACTIVE",))
    assert train(stage)[0] == code
    assert stage.deeds() == STARTED


def test_wrong_input_on_one_host_ends_all(stage: Stage) -> None:
    stage.play(ended(75, 2), states=("ACTIVE",))
    assert train(stage)[0] == 2
    assert stage.deeds() == STARTED


@pytest.mark.parametrize("codes", [(75, 137), (75, 75), (143, 143), (1, 139)])
def test_a_lost_process_starts_all_hosts_again(codes: tuple[int, int], stage: Stage) -> None:
    stage.play(ended(*codes), ended(0, 0), states=("ACTIVE",))
    assert train(stage)[0] == 0
    assert stage.deeds() == [*STARTED, *STARTED]


def test_a_run_that_is_lost_at_every_start_is_given_up(stage: Stage) -> None:
    stage.play(*[ended(75, 137)] * 3, states=("ACTIVE",))
    code, said = train(stage, MAX_STARTS="3")
    assert code == 2 and said.endswith("error: mine: gave up after 3 starts\n")
    assert stage.deeds() == STARTED * 3


def test_a_run_outlives_ssh(stage: Stage) -> None:
    """Nor is it taken for a failed one when ssh fails with its own code, or gcloud is offline."""
    offline = {"ssh": 255, "states": ["OFFLINE", "ACTIVE"]}
    stage.play({"ssh": 255}, offline, {"ssh": 1}, ended(0, 0), states=("ACTIVE",))
    assert train(stage)[0] == 0
    assert stage.deeds() == STARTED
    logs = [call.split()[4] for call in stage.calls if call.startswith("host0 docker logs")]
    assert len(logs) == 4 and logs[0] == "--tail=100"
    assert all(since.startswith("--since=20") for since in logs[1:])


def test_a_second_call_attaches_to_the_run(stage: Stage) -> None:
    stage.play(ended(0, 0), states=("ACTIVE",))
    train(stage)
    label = next(w for call in stage.calls for w in call.split() if w.startswith("run="))[4:]
    stage.play(ended(0, 0), states=("ACTIVE",), hosts=(Container(label), Container(label)))
    code, said = train(stage)
    assert code == 0 and said == "mine: attaching to the run\n"
    assert stage.deeds() == STARTED


def test_a_second_call_does_not_end_another_run(stage: Stage) -> None:
    stage.play(states=("ACTIVE",), hosts=(Container("5"), Container("5")))
    assert train(stage) == (2, "error: mine: another run is going on; stop it first\n")
    assert stage.deeds() == []


@pytest.mark.parametrize("code", [0, 2])
def test_a_second_call_after_the_end_starts_the_run_anew(code: int, stage: Stage) -> None:
    old = Container("5", "exited", code)
    stage.play(ended(0, 0), states=("ACTIVE",), hosts=(old, old))
    assert train(stage)[0] == 0
    assert stage.deeds() == STARTED


def test_a_host_that_is_gone_from_an_active_slice_is_replaced_with_it(stage: Stage) -> None:
    stage.play(ended(75, GONE), ended(0, 0), states=("ACTIVE",))
    code, said = train(stage)
    assert code == 0 and "mine: 1 of 2 hosts answer\n" in said
    assert stage.deeds() == [*STARTED, "delete", *ASKED]


def test_a_slice_that_is_repaired_is_waited_for(stage: Stage) -> None:
    repaired = [["REPAIRING"], ["REPAIRING"], ["READY"]]
    stage.play({**ended(75, 255), "slices": repaired}, ended(0, 0), states=("ACTIVE",))
    code, said = train(stage)
    assert code == 0 and "mine: REPAIRING\n" in said
    assert stage.deeds() == [*STARTED, *STARTED]


@pytest.mark.parametrize("states", [("SUSPENDING", "SUSPENDED"), ("ACTIVE",)])
def test_tpus_that_are_taken_away_are_asked_for_again(
    states: tuple[str, ...], stage: Stage
) -> None:
    """Also while the request still says that it is active; gcloud's ssh then leaves with 0."""
    taken = {"slices": [["PREEMPTED"]], "states": states}
    stage.play(taken, ended(0, 0), states=("ACTIVE",))
    code, said = train(stage)
    assert code == 0 and "mine: the TPUs were taken away; asking for others\n" in said
    assert stage.deeds() == [*STARTED, "delete", *ASKED]


def test_tpus_of_which_nothing_is_left_are_asked_for_again(stage: Stage) -> None:
    stage.play(ended(0, 0), states=("DELETING", "SUSPENDED"))
    assert train(stage)[0] == 0
    assert stage.deeds() == ["delete", *ASKED]


def test_a_run_that_was_stopped_stays_so(stage: Stage) -> None:
    stage.play({**ended(143, 143), "stop": True}, states=("ACTIVE",))
    assert train(stage)[0] == 143
    assert stage.deeds() == STARTED


def test_stop_and_delete(stage: Stage) -> None:
    stage.play(states=("ACTIVE",), hosts=(Container("5"), Container("5")))
    assert stage.run("tpu-vm.sh", "stop", **TPU).returncode == 0
    assert (stage.home / "host1/dsjax-stop").exists()
    assert stage.run("tpu-vm.sh", "delete", **TPU).returncode == 0
    assert stage.deeds() == ["stop host0", "stop host1", "delete"]


def test_a_request_that_fails_or_is_refused_ends_the_script(stage: Stage) -> None:
    stage.play(states=("FAILED",))
    code, said = train(stage)
    assert code == 2 and "error: mine: the request failed" in said
    stage.play(refuse=True)
    code, said = train(stage)
    assert code == 2 and "RESOURCE_EXHAUSTED" in said and "was refused" in said
    stage.play()
    code, said = train(stage, TYPE="v9-8")
    assert code == 2 and "TYPE=v9-8: set RUNTIME" in said
    assert stage.deeds() == ["create"]


def test_an_image_that_cannot_be_loaded_ends_the_script(stage: Stage) -> None:
    stage.play(states=("ACTIVE",), pulls_that_fail=100)
    code, said = train(stage)
    assert code == 2 and said.endswith("docker says why above\n")
    assert stage.deeds() == []


def test_a_host_that_is_shut_down_while_the_run_starts_does_not_end_the_script(
    stage: Stage,
) -> None:
    """Its processes have left with 143, docker is gone already, and the slice still says READY."""
    soon = {"pulls_that_fail": 1, "slices": [["READY"], ["PREEMPTED"]]}
    stage.play({**ended(143, 143), **soon}, ended(0, 0), states=("ACTIVE",))
    code, said = train(stage)
    assert code == 0 and "the TPUs were taken away" in said
    assert stage.deeds() == [*STARTED, "delete", *ASKED]


def test_hosts_that_never_answered_do_not_cost_the_tpus(stage: Stage) -> None:
    """It is a firewall or a key, then."""
    stage.play(states=("ACTIVE",), hosts=(GONE, GONE))
    code, said = train(stage)
    assert code == 2 and "no host answers ssh" in said
    assert stage.deeds() == []
