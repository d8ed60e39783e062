"""Every epoch is a permutation of its own."""

from itertools import pairwise

import numpy as np

from dsjax.config import SourceConfig
from dsjax.data.formats import open_documents
from dsjax.data.shuffle import ShuffledDocuments
from dsjax.data.sources import Selection

from .corpora import make_texts, write_parquet, write_text

TEXTS = make_texts(20)


def epochs(dataset: ShuffledDocuments, count: int) -> list[list[str]]:
    size = len(dataset)
    return [[dataset[epoch * size + i] for i in range(size)] for epoch in range(count)]


def test_every_epoch_is_another_permutation_and_the_seed_decides(tmp_path):
    documents = open_documents(SourceConfig(path=write_text(tmp_path, TEXTS)))
    indices = np.arange(3, 20)
    selection = Selection(documents, indices, 1.0)
    orders = epochs(ShuffledDocuments(selection, seed=1), 4)
    assert all(sorted(order) == sorted(TEXTS[3:]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders == epochs(ShuffledDocuments(selection, seed=1), 4)
    assert orders != epochs(ShuffledDocuments(selection, seed=2), 4)


def test_row_groups_stay_together_in_random_order(tmp_path):
    path = write_parquet(tmp_path, TEXTS, row_group_size=4)
    documents = open_documents(SourceConfig(kind="parquet", path=path))
    assert documents.blocks == [4, 4, 3, 4, 4, 1]
    # The third group is left out, the fourth cut short.
    selection = Selection(documents, np.array([*range(8), *range(13, 20)]), 1.0)
    group = dict(zip(TEXTS, np.repeat(range(6), documents.blocks).tolist(), strict=True))
    orders = epochs(ShuffledDocuments(selection, seed=0), 8)
    for order in orders:
        assert sorted(order) == sorted(selection)
        groups = [group[text] for text in order]
        assert sum(a != b for a, b in pairwise(groups)) == 4
    assert len({tuple(group[text] for text in order) for order in orders}) > 4
    assert len({tuple(t for t in order if group[t] == 0) for order in orders}) > 2
