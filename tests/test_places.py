import os
import pickle
from pathlib import Path

import pytest

from dsjax.config_files import CONFIGS, load_run_config
from dsjax.errors import UserError
from dsjax.places import ObjectPath, as_path, local_path
from dsjax.small_files import write_whole
from tests.object_store import BUCKET, ObjectStore


def test_a_path_of_this_machine_stays_what_it_is(tmp_path: Path) -> None:
    for path in (tmp_path, "a/b", "gs", "gs/a", "~"):
        assert type(as_path(path)) is type(Path())
        assert local_path(path, "this") == Path(path)


def test_a_bucket_is_recognized_however_it_came() -> None:
    for path in ("gs://bucket/a/b", Path("gs://bucket/a/b"), as_path("gs://bucket/a/") / "b"):
        found = as_path(path)
        assert isinstance(found, ObjectPath)
        assert (str(found), found.key) == ("gs://bucket/a/b", "bucket/a/b")
        assert str(found.parent) == f"{found.parent}" == "gs://bucket/a"
        assert (found / "c.txt").relative_to(found).as_posix() == "c.txt"
        assert str((found / "c.txt").with_name("d")) == "gs://bucket/a/b/d"
        assert str(pickle.loads(pickle.dumps(found))) == str(found)


@pytest.mark.parametrize("path", ["s3://bucket/a", "https://host/a", "gs://"])
def test_what_is_neither_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"expected .*gs://BUCKET/PATH"):
        as_path(path)


def test_the_placeholder_of_the_guides_is_no_bucket() -> None:
    with pytest.raises(UserError, match="gs://BUCKET/a: BUCKET stands for your own bucket"):
        as_path("gs://BUCKET/a")


def test_a_configuration_may_lie_in_a_bucket(store: ObjectStore) -> None:
    """So one of your own needs no new image."""
    store.put("mine.yaml", (CONFIGS / "v2-lite-16b-v5e-16.yaml").read_bytes())
    assert load_run_config(f"gs://{BUCKET}/mine.yaml", ["run_dir=a"]).run_dir == "a"


def test_no_object_is_taken_for_a_file() -> None:
    """What `ObjectPath` does not know ends here, not in a folder named gs: on this machine."""
    path = as_path("gs://bucket/a")
    for use in (
        lambda: os.open(path, os.O_CREAT),
        lambda: os.makedirs(path),
        lambda: path.open("w"),
        lambda: path.write_text("text"),
        lambda: path.touch(),
        lambda: path.rename("b"),
        lambda: Path("b").rename(path),
        lambda: path.rmdir(),
        lambda: path.chmod(0o600),
    ):
        with pytest.raises(UserError, match="gs://bucket/a: is in an object store"):
            use()
    with pytest.raises(UserError, match="gs://bucket/a: a run must be on a disk of this machine"):
        local_path(path, "a run")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, store: ObjectStore) -> None:
    for file in (tmp_path / "a", as_path(f"gs://{BUCKET}/a")):
        for data in (b"long before", b"after"):
            write_whole(file, data)
            assert file.read_bytes() == data
    (tmp_path / "folder/inside").mkdir(parents=True)
    with pytest.raises(UserError, match="folder: cannot be written"):
        write_whole(tmp_path / "folder", b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]
