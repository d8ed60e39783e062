"""One small tokenizer for all."""

import pytest

from dsjax.data.tokenizer import Tokenizer, train_tokenizer

from .corpora import make_texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(make_texts(40), vocab_size=300)
