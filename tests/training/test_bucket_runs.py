"""A run whose directory and data are in a bucket: killed, resumed, loaded, converted."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import dsjax
from dsjax.checkpoint.run_weights import read_run
from dsjax.config import PretrainConfig
from dsjax.model.layers import variables
from dsjax.places import as_path
from dsjax.training.bucket_metrics import read_records
from dsjax.training.pretrain import pretrain
from tests.object_store import BUCKET, ObjectStore
from tests.training.runs import config, write_corpus

RUN = f"gs://{BUCKET}/run"


def train(settings: PretrainConfig) -> None:
    pretrain(settings, Console(quiet=True))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    """Stopped and resumed, too: parameters and records are those of one run on a disk."""
    store.page = 1000
    corpus = write_corpus(tmp_path / "corpus")
    store.put_folder("corpus", corpus)
    there = Path("gs://models/corpus")
    train(config(corpus, tmp_path / "run"))
    train(config(there, Path(RUN), training__max_steps=3))
    steps = {name.split("/")[0] for name in store.tree("run/checkpoints")}
    assert steps == {"00000002", "00000003"}
    train(config(there, Path(RUN)))
    for name in ("config.yaml", "summary.json", "training.png", "tokenizer/tokenizer.json"):
        assert store.objects[f"run/{name}"]
    records = [
        [(r["step"], r["loss"]) for r in read_records(as_path(folder)) if "loss" in r]
        for folder in (tmp_path / "run", RUN)
    ]
    assert records[0] == records[1]
    summaries = [
        json.loads(text)
        for text in ((tmp_path / "run/summary.json").read_text(), store.objects["run/summary.json"])
    ]
    assert summaries[0]["held_out_loss"] == summaries[1]["held_out_loss"]
    for (path, one), (_, other) in zip(
        variables(dsjax.load(tmp_path / "run")), variables(dsjax.load(RUN)), strict=True
    ):
        assert np.array_equal(one[...], other[...]), path
    model = config(there, Path(RUN)).model
    stored = [read_run(as_path(f), model, check=True) for f in (tmp_path / "run", RUN)]
    assert stored[0].keys() == stored[1].keys()
    assert dsjax.load_tokenizer(RUN).digest == dsjax.load_tokenizer(tmp_path / "run").digest
    assert not Path("gs:").exists()
