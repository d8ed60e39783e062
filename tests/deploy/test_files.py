"""The files of deploy/ are what their tools accept: linters, and the fields of JobSet's API."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsjax.config_files import load_pretrain_config, refuse_placeholders
from sharding.watch import LOST

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
TOOLS = Path(sys.executable).parent


def lint(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_scripts_are_clean_shell() -> None:
    names = [script.name for script in SCRIPTS]
    assert names == ["checks.sh", "slurm.sh", "tpu-vm.sh", "xpk.sh"]
    assert lint("shellcheck", "--external-sources", *SCRIPTS) == ""
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
        called = script.read_text().startswith("#!")
        assert bool(script.stat().st_mode & stat.S_IXUSR) is called, script.name


def test_the_image_is_clean_and_copies_what_is_there() -> None:
    assert lint("hadolint", DEPLOY / "Dockerfile") == ""
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert {"dsjax", "sharding", "configs", "train.py", "serve.py"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_trains_tunes_and_serves() -> None:
    """It has the extras that buckets, parquet, GRPO's rewards and the server ask for."""
    [extras] = re.findall(r'--editable "\.\[(.+)\]"', (DEPLOY / "Dockerfile").read_text())
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) == {"${EXTRA}", "gcs", "data", "post", "serve"}
    assert {"gcs", "data", "post", "serve", "tpu"} <= known["optional-dependencies"].keys()


def test_enroot_gives_the_image_gpus() -> None:
    """Its hook 98-nvidia.sh gives no GPU without the first, and no CUDA without the second."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert "NVIDIA_VISIBLE_DEVICES=all" in text
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in text


def test_a_configuration_is_changed_without_installing_again() -> None:
    steps = (DEPLOY / "Dockerfile").read_text()
    assert steps.index("RUN pip install") < steps.index("COPY configs configs")


class Strict(BaseModel):
    """A part of jobset.x-k8s.io/v1alpha2 and of batch/v1: these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class FailureRule(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[
        Literal["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"]
    ]


class FailurePolicy(Strict):
    maxRestarts: int = Field(ge=0)
    rules: list[FailureRule]


class ExitCodes(Strict):
    containerName: str
    operator: Literal["In", "NotIn"]
    values: list[Annotated[int, Field(ge=1, le=255)]]


class PodFailureRule(Strict):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes


class Resources(Strict):
    requests: dict[str, int]
    limits: dict[str, int]


class Container(Strict):
    name: str
    image: str
    command: list[str]
    securityContext: dict[Literal["privileged"], bool]
    resources: Resources


class PodSpec(Strict):
    restartPolicy: Literal["Never"]
    hostNetwork: bool
    dnsPolicy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]
    terminationGracePeriodSeconds: int = Field(ge=0)
    nodeSelector: dict[str, str]
    containers: list[Container] = Field(min_length=1)


class Pod(Strict):
    spec: PodSpec


class JobSpec(Strict):
    parallelism: int = Field(ge=1)
    completions: int = Field(ge=1)
    completionMode: Literal["Indexed"]
    backoffLimit: int = Field(ge=0)
    podFailurePolicy: dict[Literal["rules"], list[PodFailureRule]]
    template: Pod


class Job(Strict):
    spec: JobSpec


class ReplicatedJob(Strict):
    name: str
    replicas: int = Field(ge=1)
    template: Job


class JobSetSpec(Strict):
    failurePolicy: FailurePolicy
    replicatedJobs: list[ReplicatedJob] = Field(min_length=1)


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: dict[Literal["name", "annotations"], Any]
    spec: JobSetSpec

    @model_validator(mode="after")
    def _names_make_host_names(self) -> JobSet:
        for job in self.spec.replicatedJobs:
            name = (
                f"{self.metadata['name']}-{job.name}-{job.replicas}-{job.template.spec.completions}"
            )
            assert len(name) <= 63 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        return self


def test_the_jobset_is_one_and_has_a_pod_for_each_host_of_its_topology() -> None:
    jobset = JobSet.model_validate(yaml.safe_load((DEPLOY / "jobset.yaml").read_text()))
    [job] = [job.template.spec for job in jobset.spec.replicatedJobs]
    pod = job.template.spec
    [container] = pod.containers
    [rule] = job.podFailurePolicy["rules"]
    # Wrong input and a run that failed end it; a lost process and signals start all again.
    assert (rule.action, rule.onExitCodes.operator) == ("FailJob", "In")
    assert (rule.onExitCodes.containerName, rule.onExitCodes.values) == (container.name, [1, 2])
    assert not {LOST, 137, 143} & set(rule.onExitCodes.values)
    assert [r.action for r in jobset.spec.failurePolicy.rules] == ["FailJobSet"]
    # Pods on the host's network do not use Workload Identity: no Kubernetes account is needed.
    assert pod.hostNetwork
    # The sandbox of GRPO's rewards: neither seccomp nor AppArmor confine a privileged container.
    assert container.securityContext == {"privileged": True}
    x, y, z = map(int, pod.nodeSelector["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container.resources.limits["google.com/tpu"]
    assert container.resources.requests == container.resources.limits
    assert job.parallelism == job.completions == x * y * z // chips
    assert container.command[:2] == ["python", "train.py"]
    settings = [word.replace("gs://BUCKET", "gs://mine") for word in container.command[3:]]
    config = load_pretrain_config(container.command[2], settings)
    refuse_placeholders(config, "jobset.yaml")
    assert config.mesh.fsdp * config.mesh.expert == x * y * z
