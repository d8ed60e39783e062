"""Records outlive a kill, and never mix with others."""

import pytest

from dsjax.errors import UserError
from dsjax.evaluation.protocol import Key
from dsjax.journal import Journal

SETTINGS = {"seed": 0, "dtype": None}


def fill(path, count=3):
    with Journal(path, SETTINGS, Key) as journal:
        for number in range(count):
            journal.write(Key("t", "q", number), {"text": f"line\n{number} \ud83d"})


def test_a_torn_line_is_cut_and_the_others_stay(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal(path, SETTINGS, Key) as journal:
            kept = sum(end <= cut for end in ends)
            assert len(journal.records) == max(kept - 1, 0)
            for number in range(len(journal.records), 3):
                journal.write(Key("t", "q", number), {"text": f"line\n{number} \ud83d"})
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"settings":{"seed":1,"dtype":null}}\n', "seed=1, now it is 0; choose another output"),
        ('{"settings":{"seed":0,"dtype":null,"more":2}}\n', "more=2, now it is None"),
        ('{"custom_id":"a"}\n', "is no journal; choose"),
        ("no JSON\n", "line 1: not the JSON expected"),
        ('{"settings":{"seed":0,"dtype":null}}\n{"task":"t"}\n', "'question' is missing"),
        (
            '{"settings":{"seed":0,"dtype":null}}\n'
            + 2 * '{"task":"t","question":"q","sample":0}\n',
            "stands in an earlier line too",
        ),
    ],
)
def test_other_files_are_refused_and_left_as_they_are(tmp_path, content, problem):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        Journal(path, SETTINGS, Key)
    assert path.read_text() == content


def test_only_one_process_writes(tmp_path):
    with (
        Journal(tmp_path / "a", SETTINGS, Key),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        Journal(tmp_path / "a", SETTINGS, Key)
