"""A checkpoint of the smallest model, for all tests of evaluation."""

from pathlib import Path

import pytest

from tests.serving.checkpoints import NAME, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluated") / NAME)
