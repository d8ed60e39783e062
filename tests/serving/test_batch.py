"""A file of requests: one record for each line, whatever is in it and whatever happens."""

import gzip
import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from dsjax.errors import UserError
from dsjax.serving import batch_files, opening
from dsjax.serving.batch import QUEUE, Batch, run_batch
from dsjax.serving.batch_files import open_records, read_lines, survey
from dsjax.serving.options import ModelOptions
from tests.forked import Forks, forks
from tests.serving.checkpoints import ENVIRONMENT, NAME, command, write_checkpoint

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ROWS = 4


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> ModelOptions:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / NAME, mtp=1)
    return ModelOptions(folder, NAME, context=128, rows=ROWS)


@pytest.fixture(scope="module")
def opened(options):
    return opening.open_model(options)


@pytest.fixture(autouse=True)
def opened_once(opened, monkeypatch):
    """One engine for all tests of this file."""
    monkeypatch.setattr(opening, "open_model", lambda options: opened)


def request(custom_id: str, url: str = COMPLETIONS, **body) -> str:
    body = {"model": NAME, "max_tokens": 6, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def requests(count: int, temperature: float = 0.0) -> list[str]:
    """Prompts of many lengths; every other one is a chat."""
    lines = []
    for i in range(count):
        text = "def f(x): " * (i % 4) + str(i)
        if i % 2:
            message = {"role": "user", "content": text}
            lines.append(request(f"r{i}", CHAT, messages=[message], temperature=temperature))
        else:
            lines.append(request(f"r{i}", prompt=text, temperature=temperature, n=1 + i % 3))
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choices(path: Path) -> dict[str, list]:
    """What each custom_id was answered; each stands there once."""
    found = records(path)
    answers = {record["custom_id"]: record["response"]["body"]["choices"] for record in found}
    assert len(answers) == len(found)
    return answers


def test_every_line_gets_one_record_and_a_bad_one_says_why(tmp_path, options, capsys):
    good = requests(5)
    bad = {
        "invalid_json_line": ["{", "[1]", '{"a": NaN}', "[" * 100_000],
        "missing_custom_id": ["{}", '{"custom_id": 7}', request("")],
        "duplicate_custom_id": [good[0], request("r1", prompt="other")],
        "invalid_method": [request("m", prompt="x").replace("POST", "GET")],
        "invalid_url": [request("u", None, prompt="x")],
        "invalid_request_error": [
            request("e", "/v1/embeddings", prompt="x"),
            request("s", prompt="x", stream=True),
            request("b", prompt="x", max_token=1),
            request("l", prompt="\ud800"),
            request("\ud800", prompt="x", temperature=-1),
        ],
        "model_not_found": [request("n", prompt="x", model="other")],
        "context_length_exceeded": [request("c", prompt="x", max_tokens=1000)],
    }
    lines = [*good, "", *(line for some in bad.values() for line in some)]
    source = write(tmp_path / "in.jsonl", lines)
    run_batch(source, tmp_path / "out.jsonl", options)
    found = records(tmp_path / "out.jsonl")
    assert len({record["id"] for record in found}) == len(found) == len(lines) - 1
    named = Counter(record["custom_id"] for record in found)
    assert named.pop(None) == 9 and set(named.values()) == {1}
    answered = [record for record in found if record["error"] is None]
    assert {record["custom_id"] for record in answered} == {f"r{i}" for i in range(5)}
    assert all(record["response"]["status_code"] == 200 for record in answered)
    refused = [record for record in found if record["error"]]
    expected = {code: len(some) for code, some in bad.items()}
    assert Counter(record["error"]["code"] for record in refused) == expected
    for record in refused:
        response = record["response"]
        assert response["status_code"] in (400, 404)
        assert response["body"]["error"]["message"] == record["error"]["message"]
        if record["custom_id"] is None:
            assert record["error"]["message"].startswith("line ")
    assert "5 answered, 18 refused" in capsys.readouterr().out


def test_a_byte_order_mark_is_not_part_of_the_first_request(tmp_path, options):
    lines = requests(2)
    source = tmp_path / "in.jsonl"
    for text in ("\n".join(lines), "\n" + "\r\n".join(lines)):
        source.write_bytes(b"\xef\xbb\xbf" + text.encode())
        run_batch(source, tmp_path / "out.jsonl", options)
        assert choices(tmp_path / "out.jsonl").keys() == {"r0", "r1"}
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.parametrize("encode", [
    ("UTF-16", lambda text: text.encode("utf-16")),
    ("UTF-32", lambda text: text.encode("utf-32")),
    ("gzip", lambda text: gzip.compress(text.encode())),
], ids=lambda case: case[0])  # fmt: skip
def test_a_file_that_is_not_utf_8_is_refused_by_the_name_of_its_encoding(tmp_path, options, encode):
    name, encoded = encode
    source = tmp_path / "in.jsonl"
    source.write_bytes(encoded(requests(1)[0]))
    with pytest.raises(UserError, match=rf"in\.jsonl: is {name}; expected JSON lines in UTF-8"):
        run_batch(source, tmp_path / "out.jsonl", options)


def test_answers_equal_those_of_each_request_alone(tmp_path, options):
    lines = requests(7)
    run_batch(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", options)
    together = choices(tmp_path / "out.jsonl")
    alone = {}
    for i, line in enumerate(lines):
        run_batch(write(tmp_path / f"{i}.jsonl", [line]), tmp_path / f"{i}.out", options)
        alone |= choices(tmp_path / f"{i}.out")
    assert together == alone


def test_a_request_without_a_seed_is_answered_alike_each_time(tmp_path, options):
    lines = requests(4, temperature=1.0)
    run_batch(write(tmp_path / "a.jsonl", lines), tmp_path / "a.out", options)
    run_batch(write(tmp_path / "b.jsonl", lines[::-1]), tmp_path / "b.out", options)
    assert choices(tmp_path / "a.out") == choices(tmp_path / "b.out")
    renamed = [lines[0].replace("r0", "other")]
    run_batch(write(tmp_path / "c.jsonl", renamed), tmp_path / "c.out", options)
    assert choices(tmp_path / "c.out")["other"] != choices(tmp_path / "a.out")["r0"]


def test_a_stop_string_ends_an_answer_in_the_engine_too(tmp_path, options, opened):
    run_batch(write(tmp_path / "a.jsonl", [request("a", prompt="x", temperature=0, max_tokens=40)]),
              tmp_path / "a.out", options)  # fmt: skip
    [whole] = choices(tmp_path / "a.out")["a"]
    stop = whole["text"][3:5]
    line = request("a", prompt="x", temperature=0, max_tokens=40, stop=stop)
    run_batch(write(tmp_path / "b.jsonl", [line]), tmp_path / "b.out", options)
    [cut] = choices(tmp_path / "b.out")["a"]
    assert cut["text"] == whole["text"].partition(stop)[0] and cut["finish_reason"] == "stop"
    assert opened[0].idle


def test_no_more_is_read_than_the_engine_needs(tmp_path, opened):
    source = write(tmp_path / "in.jsonl", [request(f"r{i}", prompt="x") for i in range(40)])
    most = 0

    def counted():
        nonlocal most
        for number, line in enumerate(read_lines(source), start=1):
            most = max(most, number - len(answers.done))
            yield line

    with open_records(tmp_path / "out.jsonl", survey(source, NAME)) as answers:
        for _ in Batch(*opened, answers).run(counted()):
            pass
        answers.finish()
    assert most == QUEUE * ROWS


def test_a_line_beyond_all_measure_is_refused_and_not_held(tmp_path, options, monkeypatch):
    monkeypatch.setattr(batch_files, "MAX_LINE", 200)
    lines = [request("a", prompt="x"), "x" * 1000, "y" * 199, request("b", prompt="x")]
    source = write(tmp_path / "in.jsonl", lines)
    run_batch(source, tmp_path / "out.jsonl", options)
    found = {record["custom_id"]: record["error"] for record in records(tmp_path / "out.jsonl")}
    assert found["a"] is None and found["b"] is None and len(found) == 3
    held = [len(line.data or b"") for line in read_lines(source)]
    assert max(held) <= 200 and held[1] == 0


# ---------------------------------------------------------------------------------------------
# What is there already
# ---------------------------------------------------------------------------------------------


def test_a_whole_output_is_left_alone(tmp_path, options, monkeypatch, capsys):
    source, output = write(tmp_path / "in.jsonl", requests(3)), tmp_path / "out.jsonl"
    run_batch(source, output, options)
    before = output.read_bytes()
    monkeypatch.setattr(opening, "open_model", pytest.fail)
    run_batch(source, output, options)
    assert "nothing to do" in capsys.readouterr().out
    assert output.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_torn_line_is_cut_and_what_stands_before_it_is_kept(tmp_path, options, capsys):
    source, output = write(tmp_path / "in.jsonl", ["bad", *requests(5)]), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    run_batch(source, output, options)
    whole = output.read_bytes().splitlines(keepends=True)
    by_id = {json.loads(line)["id"]: line for line in whole}
    for kept in range(len(whole) + 1):
        torn = whole[kept][:-1] if kept < len(whole) else b""
        for tail in {torn, torn[: len(torn) // 2], torn[:1]}:
            output.unlink()
            partial.write_bytes(b"".join(whole[:kept]) + tail)
            run_batch(source, output, options)
            now = output.read_bytes().splitlines(keepends=True)
            assert now[:kept] == whole[:kept] and not partial.exists()
            assert {json.loads(line)["id"] for line in now} == by_id.keys()
            assert len(now) == len(whole)
    assert "going on after 3 of 6 requests" in capsys.readouterr().out


def test_answers_to_something_else_are_refused_and_not_touched(tmp_path, options):
    source, output = write(tmp_path / "in.jsonl", requests(3)), tmp_path / "out.jsonl"
    run_batch(source, output, options)
    answers = output.read_bytes()
    other = write(tmp_path / "other.jsonl", requests(4))
    with pytest.raises(UserError, match="is not the answer to"):
        run_batch(other, output, options)
    with pytest.raises(UserError, match="is not the answer to"):
        run_batch(source, output, ModelOptions(options.checkpoint, "another-name"))
    assert output.read_bytes() == answers
    partial = tmp_path / "out.jsonl.partial"
    for content in (answers, b"something of the user's\n", answers.splitlines(True)[0] * 2):
        output.unlink(missing_ok=True)
        partial.write_bytes(content)
        with pytest.raises(UserError, match="another input"):
            run_batch(other, output, options)
        assert partial.read_bytes() == content
    with pytest.raises(UserError, match="is the input"):
        run_batch(source, source, options)


def test_an_output_that_is_being_written_is_refused(tmp_path, options):
    source, output = write(tmp_path / "in.jsonl", requests(3)), tmp_path / "out.jsonl"
    taken = pytest.raises(UserError, match="another process")
    with open_records(output, survey(source, NAME)), taken:
        run_batch(source, output, options)
    run_batch(source, output, options)


def test_nothing_is_left_when_the_model_cannot_be_opened(tmp_path, options, monkeypatch):
    def fail(_):
        raise UserError("no such model")

    source = write(tmp_path / "in.jsonl", requests(3))
    monkeypatch.setattr(opening, "open_model", fail)
    with pytest.raises(UserError, match="no such model"):
        run_batch(source, tmp_path / "out.jsonl", options)
    assert list(tmp_path.iterdir()) == [source]


def test_an_input_that_grows_meanwhile_is_not_called_done(tmp_path, options, monkeypatch, opened):
    source, output = write(tmp_path / "in.jsonl", requests(3)), tmp_path / "out.jsonl"

    def meanwhile(_):
        write(source, requests(4))
        return opened

    monkeypatch.setattr(opening, "open_model", meanwhile)
    with pytest.raises(UserError, match="3 lines when it was counted, but 4"):
        run_batch(source, output, options)
    assert not output.exists()


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------


def arguments(source: Path, output: Path, options: ModelOptions) -> tuple[object, ...]:
    files = (options.checkpoint, "--input", source, "--output", output)
    return ("batch", *files, "--rows", ROWS, "--context", 128)


def grown(partial: Path, before: int) -> bool:
    return partial.exists() and partial.stat().st_size > before


@pytest.mark.slow
def test_a_batch_killed_ten_times_equals_the_unbroken_one(tmp_path, options):
    lines = requests(300, temperature=0.8)
    lines[50:50] = ["bad", lines[0], "{}"]
    source = write(tmp_path / "in.jsonl", lines)
    run_batch(source, tmp_path / "whole.jsonl", options)

    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    mine = arguments(source, output, options)
    with subprocess.Popen(
        command(*mine), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        while process.poll() is None and not grown(partial, 0):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on" in said
    with forks(tmp_path / "said.txt", ENVIRONMENT) as processes:
        kill_ten_times(processes, mine, output, partial)

    def comparable(path: Path) -> dict[str, tuple]:
        found = records(path)
        answers = {
            record["id"]: (
                record["custom_id"],
                record["error"],
                record["response"]["body"].get("choices"),
            )
            for record in found
        }
        assert len(answers) == len(found) == len(lines)
        return answers

    assert comparable(output) == comparable(tmp_path / "whole.jsonl")


def kill_ten_times(processes: Forks, mine: tuple, output: Path, partial: Path) -> None:
    """The batch, killed while it starts and soon after it has written a record; then to its end."""
    rng = random.Random(0)
    for kill in range(10):
        output.unlink(missing_ok=True)  # it got through: begin again, so that kills meet a batch
        before = partial.stat().st_size if partial.exists() else 0
        processes.start("serve", *mine)
        if kill % 4:
            while not grown(partial, before) and processes.wait(0.005) is None:
                pass
            processes.wait(rng.uniform(0, 0.1))
        else:  # while it starts
            processes.wait(rng.uniform(0, 2))
        processes.kill()
    processes.start("serve", *mine)
    assert processes.wait(120) == 0, processes.output.read_text()
