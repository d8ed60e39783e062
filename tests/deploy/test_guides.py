"""What the guides name is there, and their figures are those of their formulas."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest

from dsjax.cli import Parser, make_parser
from dsjax.config_files import load_pretrain_config, load_run_config, refuse_placeholders
from dsjax.serving.options import add_http
from tests.deploy.fake_tools import Stage

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("cloud-tpu", "gpu", "pods")]

STARTS = {"train.py", "deploy/tpu-vm.sh run", "deploy/slurm.sh", "deploy/xpk.sh v3"}
"""What stands before the configuration of a run."""

FOREIGN = {
    "docker build": "file build-arg tag",
    "docker run": "rm gpus ipc ulimit volume publish env security-opt",
    "enroot import": "output",
    "gcloud artifacts repositories add-iam-policy-binding": "location member role",
    "gcloud artifacts repositories create": "repository-format location",
    "gcloud compute firewall-rules create": "network allow source-ranges",
    "gcloud compute tpus tpu-vm service-identity create": "zone",
    "gcloud compute networks subnets update": "region enable-private-ip-google-access",
    "gcloud container clusters create": "location",
    "gcloud container clusters get-credentials": "location",
    "gcloud container clusters update": "location workload-pool",
    "gcloud container node-pools create": "cluster location node-locations machine-type"
    " tpu-topology num-nodes service-account scopes spot",
    "gcloud container node-pools update": "cluster location workload-metadata",
    "gcloud projects add-iam-policy-binding": "member role",
    "gcloud storage buckets add-iam-policy-binding": "member role",
    "gcloud storage buckets create": "location uniform-bucket-level-access",
    "gcloud storage cp": "recursive",
    "hf download": "local-dir",
    "kubectl apply": "filename server-side",
    "kubectl logs": "follow",
    "sbatch": "nodes",
    "xpk cluster create": "cluster project zone tpu-type num-slices spot custom-nodepool-arguments",
    "xpk workload delete": "cluster zone workload",
    "xpk workload list": "cluster zone",
}
"""The flags of other tools that the guides use, checked against each tool's reference."""


def commands(text: str) -> list[list[str]]:
    """The words of every command of every console block."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.S | re.M)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    found = []
    for words in lines:
        while "|" in words:
            found.append(words[: words.index("|")])
            words = words[words.index("|") + 1 :]
        found.append(words)
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_files_and_runs_that_a_guide_names_are_there(guide: Path) -> None:
    """Once BUCKET is replaced no placeholder is left: `train.py` takes every run as it stands."""
    text = guide.read_text()
    named = set(re.findall(r"\b(?:deploy|configs)/[\w./-]+\.\w+", text))
    assert [name for name in named if not (ROOT / name).exists()] == []
    runs = [run for words in commands(text) if (run := run_of(words))]
    assert runs or guide.stem == "pods"
    for name, *settings in runs:
        if name.startswith("/shared/"):
            continue  # the reader's own
        settings = [setting.replace("gs://BUCKET", "gs://mine") for setting in settings]
        config = refuse_placeholders(load_run_config(name, settings), name)
        sizes = config.mesh.model_dump(exclude={"dcn"})
        rows = [sizes[axis] * sizes_of_dcn(config)[axis] for axis in ("data", "fsdp", "expert")]
        microbatch = config.model_dump()["training"]["microbatch_size"]
        assert microbatch % prod(rows) == 0, f"{name}: {microbatch} rows over {rows}"


def sizes_of_dcn(config: Any) -> dict[str, int]:
    """How often each axis is repeated over slices or nodes."""
    return {"expert": 1, **config.mesh.dcn.model_dump()}


def run_of(words: list[str]) -> list[str]:
    """The configuration that a command names, and the settings after it."""
    for number, (one, two) in enumerate(pairwise(words)):
        for start in STARTS & {one, f"{one} {two}"}:
            later = words[number + len(start.split()) :]
            return later
    return []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guides_commands_are_those_of_their_tools(guide: Path) -> None:
    for words in commands(guide.read_text()):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        options = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        if "serve.py" in words:
            verbs = Parser(prog="serve.py").add_subparsers()
            add_http(verbs, print)
            verbs.choices["http"].parse_args(words[words.index("http") + 1 :])
            continue
        if words[:3] == ["python", "-m", "dsjax"]:
            make_parser().parse_args(words[3:])
            continue
        said = " ".join(words)
        known = [flags for tool, flags in FOREIGN.items() if f"{said} ".startswith(f"{tool} ")]
        assert not options or known or words[0] in ("export", "xprof", "tensorboard"), said
        for flags in known:
            assert set(options) <= set(flags.split()), said


def test_the_guides_runs_start_as_they_stand(stage: Stage) -> None:
    """With BUCKET, PROJECT and REGION replaced; and not before."""
    text = (ROOT / "docs/cloud-tpu.md").read_text()
    calls = [words for words in commands(text) if "deploy/" in " ".join(words)]
    calls = [words for words in calls if "run" in words or "deploy/xpk.sh" in words]
    assert len(calls) == 5
    for words in calls:
        variables = dict(word.split("=") for word in words if re.match("[A-Z]+=", word))
        script, *arguments = words[len(variables) :]
        given = {"NAME": "n", "ZONE": "z", "TYPE": "v5p-8", "CLUSTER": "c", **variables}
        stage.play({"ends": (0, 0, 0, 0)}, hosts=(None,) * 4)
        image = "REGION-docker.pkg.dev/PROJECT/dsjax/dsjax"
        name = script.removeprefix("deploy/")
        assert stage.run(name, *arguments, IMAGE=image, **given).returncode == 2
        arguments = [word.replace("BUCKET", "mine") for word in arguments]
        done = stage.run(name, *arguments, IMAGE="r/p/dsjax", **given)
        assert done.returncode == 0, done.stderr


def expert_bytes(name: str) -> tuple[Any, float]:
    """A model, and the bytes of one layer's routed experts in bfloat16."""
    model: Any = load_pretrain_config(name).model
    size = 3 * model.n_routed_experts * model.hidden_size * model.moe_intermediate_size
    return model, 2.0 * size


@pytest.mark.parametrize(
    ("name", "tokens", "limits"),
    [
        ("v3-671b-v5p-512", (4096, 12288, 49152), {8: 4, 64: 8}),
        ("v2-lite-16b-v5e-32", (4096, 16384, 49152), {8: 6, 64: 6}),
    ],
)
def test_the_bytes_that_travel_are_those_of_the_formulas(
    name: str, tokens: tuple[int, ...], limits: dict[int, int]
) -> None:
    text = (ROOT / "docs/pods.md").read_text()
    model, weights = expert_bytes(name)
    for count in tokens:
        sums = [4 * weights] + [
            4 * weights / n + 5 * c * 2 * model.hidden_size * count for n, c in limits.items()
        ]
        row = f"{count:,} | " + " | ".join(f"{value / 1e9:.1f} GB" for value in sums) + " |"
        assert row in text, row


# MTP's layer included: dsjax inspect has them.
PARAMETERS = {"v3": 682_636_487_424, "v2": 15_706_484_224}


@pytest.mark.parametrize(
    ("name", "family", "mesh"),
    [
        ("v3-671b-v5p-512", "v3", None),
        ("v3-671b-v5p-512", "v3", {"fsdp": 512}),
        ("v2-lite-16b-v5e-32", "v2", None),
        ("v2-lite-16b-h100-8", "v2", None),
    ],
)
def test_the_memory_of_each_run_is_that_of_the_formulas(
    name: str, family: str, mesh: dict[str, int] | None
) -> None:
    config = load_pretrain_config(name)
    sizes = mesh or config.mesh.model_dump()
    fsdp, expert, tensor = (int(sizes.get(axis, 1)) for axis in ("fsdp", "expert", "tensor"))
    model, layer = expert_bytes(name)
    state = 12 * PARAMETERS[family] / (fsdp * expert * tensor)
    rows = config.training.microbatch_size / (fsdp * expert)
    kept = model.num_hidden_layers + model.num_nextn_predict_layers
    inputs = 2 * rows * config.data.sequence_length * model.hidden_size * kept
    rest = 2 * rest_of_a_layer(model)
    gathered = 2 * (layer / expert + rest) / tensor
    row = " | ".join(f"{value / 1e9:.1f} GB" for value in (state, inputs, gathered))
    assert row in (ROOT / "docs/pods.md").read_text(), row


def rest_of_a_layer(model: Any) -> int:
    """Parameters of attention and shared experts."""
    heads, d = model.num_attention_heads, model.hidden_size
    query = model.qk_nope_head_dim + model.qk_rope_head_dim
    into = model.q_lora_rank or d
    attention = into * heads * query + (d * into if model.q_lora_rank else 0)
    attention += d * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention += heads * model.v_head_dim * d
    return attention + 3 * d * model.moe_intermediate_size * model.n_shared_experts
