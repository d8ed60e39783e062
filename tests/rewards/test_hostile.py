"""Hostile answers, as root where the tests run as root: no harm, none rewarded, none stops it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest

from dsjax.config_rewards import CodeReward, MathReward
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Score, Scorer

HOUSE = Path(__file__).resolve().parents[2]
PAIRS = [{"input": "2 3\n", "output": "5\n"}, {"input": "4 5\n", "output": "9\n"}]
ASSERTIONS = ["assert add(2, 3) == 5", "assert add(4, 5) == 9"]
HONEST_PROGRAM = "a, b = map(int, input().split())\nprint(a + b)"
HONEST_FUNCTION = "def add(a, b): return a + b"


def code(source: str, tests: list) -> Answer:
    text = f"<think>\nhm\n</think>\n```python\n{source}\n```\n"
    return Answer("", text, 9, False, {"tests": tests})


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer([CodeReward(seconds=1, memory_bytes=256 << 20)], workers=2) as scorer:
        yield scorer


class World:
    """What an attack could reach, watched."""

    def __init__(self, folder: Path):
        self.canary = folder / "canary"
        self.canary.write_text("alive")
        self.canary.chmod(0o666)
        folder.chmod(0o777)
        self.tcp, self.abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(1)
        self.name = f"dsjax-{os.getpid()}"
        self.abstract.bind(f"\0{self.name}")
        self.abstract.listen()
        self.signals: list[int] = []
        self._before = signal.signal(signal.SIGTERM, lambda number, _: self.signals.append(number))

    def aim(self, source: str) -> str:
        """An attack, its targets filled in."""
        port = self.tcp.getsockname()[1]
        targets = {"canary": self.canary, "port": port, "name": self.name, "pid": os.getpid()}
        for name, target in (targets | {"house": HOUSE}).items():
            source = source.replace(f"{{{name}}}", str(target))
        return source

    def check(self) -> None:
        """Nothing happened to it."""
        assert self.canary.read_text() == "alive"
        assert [path.name for path in self.canary.parent.iterdir()] == ["canary"]
        assert self.signals == []
        for listening in (self.tcp, self.abstract):
            listening.settimeout(0)
            with pytest.raises(BlockingIOError):
                listening.accept()
        left = jailed()  # or another test's, which will end too
        wait_until(lambda: left.isdisjoint(jailed()))

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self.tcp.close()
        self.abstract.close()


def jailed() -> set[int]:
    """Processes of this machine that live with another family of users than we do."""
    ours = os.readlink("/proc/self/ns/user")
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns/user") != ours:
                found.add(int(entry.name))
        except OSError:
            continue  # it ended, or is none of ours
    return found


def children(parents: set[int]) -> set[int]:
    """Processes that these started, and those that they started in turn."""
    found = set()
    for parent in parents:
        with contextlib.suppress(OSError):
            listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
            found |= {int(child) for child in listed.split()}
    return found | children(found) if found else found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("DSJAX_SECRET", "key")
    world = World(tmp_path)
    yield world
    world.close()


def called(kind: str, source: str) -> bool:
    """Whether this is to be tested by assertions, as a function."""
    return kind == "CHEATS" or "def add" in source


def report(what: str, answers: list[Answer], scores: list[Score], seconds: float) -> None:
    reasons = Counter(reason for score in scores for reason in score.reasons.values())
    rate = len(answers) / seconds
    print(f"\n{what}: {len(answers)} answers, {rate:.1f} a second, {dict(reasons)}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LOOPS", "MEMORY", "PROCESSES", "FILES", "OTHERS", "CHEATS"])
def test_hostile_code_does_no_harm_and_is_worth_nothing(kind: str, scorer: Scorer, world: World):
    attacks = getattr(hostile, kind)
    answers = [
        code(world.aim(source), ASSERTIONS if called(kind, source) else PAIRS[:1])
        for source in attacks.values()
    ]
    honest = [code(HONEST_PROGRAM, PAIRS), code(HONEST_FUNCTION, ASSERTIONS)]
    started = time.monotonic()
    scores = scorer.score([*answers, *honest])
    report(kind, [*answers, *honest], scores, time.monotonic() - started)
    assert [score.total for score in scores[-2:]] == [1.0, 1.0], "the honest go on being rewarded"
    rewarded = [n for n, score in zip(attacks, scores[:-2], strict=True) if score.total != 0.0]
    assert rewarded == []
    world.check()


@pytest.mark.slow
def test_hostile_mathematics_does_no_harm_and_is_worth_nothing(world: World):
    answers = [
        Answer("", world.aim(text), 9, False, {"answer": "17"}) for text in hostile.MATH.values()
    ]
    honest = Answer("", r"so \boxed{\frac{34}{2}}", 9, False, {"answer": "17"})
    with Scorer([MathReward(seconds=1)], workers=2) as scorer:
        started = time.monotonic()
        scores = scorer.score([*answers, honest])
        report("MATH", [*answers, honest], scores, time.monotonic() - started)
    assert scores[-1].total == 1.0
    rewarded = [
        name for name, score in zip(hostile.MATH, scores[:-1], strict=True) if score.total != 0.0
    ]
    assert rewarded == []
    world.check()


def test_the_corpus_is_as_large_as_it_is_said_to_be():
    kinds = (hostile.LOOPS, hostile.MEMORY, hostile.PROCESSES, hostile.FILES, hostile.OTHERS)
    assert sum(map(len, [*kinds, hostile.CHEATS, hostile.MATH])) >= 50


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("MEMORY", "memory files"),
        ("MEMORY", "shared memory of System V"),
        ("PROCESSES", "daemon"),
        ("PROCESSES", "subprocess"),
        ("PROCESSES", "raw system calls"),
        ("FILES", "reads the host"),
        ("FILES", "relative path"),
        ("FILES", "symbolic link"),
        ("FILES", "hard link"),
        ("FILES", "the house"),
        ("FILES", "the environment"),
        ("FILES", "secrets of the environment"),
        ("OTHERS", "tcp"),
        ("OTHERS", "udp"),
        ("OTHERS", "abstract socket"),
        ("OTHERS", "netlink"),
    ],
)
def test_an_attack_that_is_safe_to_try_works_outside_of_a_jail(kind: str, name: str, world: World):
    """Else the corpus would prove nothing."""
    source = world.aim(getattr(hostile, kind)[name])
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=world.canary.parent, capture_output=True, timeout=60
    )
    assert b"5" in done.stdout.split(), done.stderr


KILLED = """
from dsjax.config_rewards import CodeReward
from dsjax.rewards.answer import Answer
from dsjax.rewards.score import Scorer
text = "`" * 3 + "python\\nimport time; time.sleep(1e9)\\n" + "`" * 3
with Scorer([CodeReward(seconds=99)], workers=1) as scorer:
    print("ready", flush=True)
    scorer.score([Answer("", text, 9, False, {"tests": [{"input": "", "output": ""}]})])
"""


def test_when_the_scorer_is_killed_its_jails_end():
    run = subprocess.Popen([sys.executable, "-c", KILLED], cwd=HOUSE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    wait_until(lambda: bool(jailed() & children({run.pid})))
    ours = jailed() & children({run.pid})
    run.kill()
    run.communicate()
    wait_until(lambda: ours.isdisjoint(jailed()))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_throughput(scorer: Scorer):
    """Printed, not asserted."""
    for what, answer in (
        ("programs with two tests", code(HONEST_PROGRAM, PAIRS)),
        ("functions with two assertions", code(HONEST_FUNCTION, ASSERTIONS)),
    ):
        started = time.monotonic()
        scores = scorer.score([answer] * 50)
        report(what, [answer] * 50, scores, time.monotonic() - started)
        assert {score.total for score in scores} == {1.0}
