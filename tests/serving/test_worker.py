"""Admission, delivery, cancelling, failing and stopping, without HTTP around them."""

import asyncio
import dataclasses
import inspect
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dsjax.inference.engine import Engine, EngineStats
from dsjax.inference.request import Request, SamplingParams, Update
from dsjax.serving.metrics import Metrics
from dsjax.serving.protocol import RequestError
from dsjax.serving.worker import Subscription, Worker
from tests.serving.scripted import ScriptedEngine, Stats, backwards


def request(name: str, *tokens: int, max_tokens: int = 8) -> Request:
    return Request(name, tokens or (1, 2, 3), SamplingParams(max_tokens=max_tokens))


@asynccontextmanager
async def running(engine: ScriptedEngine, max_open: int = 100) -> AsyncIterator[Worker]:
    """A warm worker, drained afterwards."""
    worker = Worker(engine, Metrics("m", 512), max_open)
    worker.start()
    await until(lambda: worker.trouble() is None)
    yield worker
    await worker.drain(5)


async def until(true) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


async def everything(subscription: Subscription, ends: int = 1) -> list[Update]:
    """All updates, until so many sequences have ended."""
    found = []
    while ends:
        updates = await subscription.updates()
        ends -= sum(update.finish is not None for update in updates)
        found += updates
    return found


def test_the_scripted_engine_has_the_face_of_the_real_one():
    fields = [[f.name for f in dataclasses.fields(kind)] for kind in (Stats, EngineStats)]
    assert fields[0] == fields[1]
    for name in ("submit", "cancel", "step", "warm_up", "stats"):
        takes = [inspect.signature(getattr(kind, name)) for kind in (ScriptedEngine, Engine)]
        assert takes[0].parameters.keys() == takes[1].parameters.keys()
    assert isinstance(Engine.idle, property)


def test_updates_come_in_order_to_whom_they_belong():
    async def client(worker: Worker, number: int) -> None:
        asked = [request(f"{number}-{i}", number, i, 9) for i in range(3)]
        with worker.subscribe(asked) as subscription:
            await subscription.accepted()
            updates = await everything(subscription, ends=3)
        for each in asked:
            mine = [u.tokens[0] for u in updates if u.request_id == each.id]
            assert mine == backwards(each)

    async def main() -> None:
        engine = ScriptedEngine()
        async with running(engine) as worker:
            await asyncio.gather(*(client(worker, number) for number in range(30)))
        assert len(engine.finished) == 90 and engine.cancelled == []

    asyncio.run(main())


def test_who_leaves_is_cancelled_and_makes_room():
    async def main() -> None:
        engine = ScriptedEngine()
        async with running(engine, max_open=1) as worker:
            with worker.subscribe([request("a", max_tokens=10**6)]) as subscription:
                await subscription.updates()
                with pytest.raises(RequestError, match="1 of 1 places are taken") as refused:
                    worker.subscribe([request("b")])
                assert refused.value.status == 429
            await until(lambda: engine.cancelled == ["a"])
            await until(lambda: worker._places == {})
            with worker.subscribe([request("c")]) as subscription:
                assert len(await everything(subscription)) == 8

    # A long script is made once, not step by step.
    asyncio.run(main())


def test_a_stopped_sequence_says_nothing_more_and_the_others_go_on():
    async def main() -> None:
        engine = ScriptedEngine()
        asked = [request("a", max_tokens=10**5), request("b", max_tokens=50)]
        async with running(engine) as worker:
            with worker.subscribe(asked) as subscription:
                await subscription.updates()
                subscription.stop({"a", "unknown"})
                updates = await everything(subscription)
                assert {update.request_id for update in updates} == {"b"}
            assert 'finished_reason="stop"' in worker.metrics.text().decode()
        assert engine.cancelled == ["a"] and engine.finished == ["b"]

    asyncio.run(main())


def test_silence_is_an_empty_list():
    async def main() -> None:
        async with running(ScriptedEngine(step_seconds=0.2)) as worker:
            with worker.subscribe([request("a", max_tokens=1)]) as subscription:
                await subscription.accepted()
                assert await subscription.updates(0.02) == []
                assert len(await subscription.updates(5)) == 1

    asyncio.run(main())


def test_what_the_engine_refuses_leaves_nothing_behind():
    async def main() -> None:
        engine = ScriptedEngine(context=10)
        async with running(engine) as worker:
            asked = [request("fits"), request("never", *range(11))]
            with worker.subscribe(asked) as subscription:
                with pytest.raises(RequestError, match="11 tokens; at most 10") as refused:
                    await subscription.accepted()
                assert refused.value.status == 400
            assert engine.open == 0 and engine.cancelled == ["fits"]
            assert worker._places == {}

    asyncio.run(main())


def test_more_sequences_than_places_will_never_do():
    async def main() -> None:
        async with running(ScriptedEngine(), max_open=2) as worker:
            with pytest.raises(RequestError, match="3 sequences; 2 at once") as refused:
                worker.subscribe([request(str(i)) for i in range(3)])
            assert refused.value.status == 400

    asyncio.run(main())


def test_nothing_is_taken_before_it_is_warm():
    async def main() -> None:
        worker = Worker(ScriptedEngine(warm_up_seconds=0.1), Metrics("m", 512), 10)
        worker.start()
        await until(lambda: worker._thread.compiled == (1, 3))
        with pytest.raises(RequestError, match="warming up: 1 of 3 programs") as refused:
            worker.subscribe([request("a")])
        assert refused.value.status == 503
        await until(lambda: worker.trouble() is None)
        await worker.drain(1)

    asyncio.run(main())


def test_a_broken_engine_tells_everyone(caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        engine = ScriptedEngine(step_seconds=0.01)
        engine.fail_at_step = 5
        async with running(engine) as worker:
            with (
                worker.subscribe([request("a", max_tokens=99)]) as first,
                worker.subscribe([request("b", max_tokens=99)]) as second,
            ):
                for subscription in (first, second):
                    with pytest.raises(RequestError, match="the engine has failed") as failed:
                        await everything(subscription)
                    assert failed.value.status == 500
            with pytest.raises(RequestError, match="the engine has failed"):
                worker.subscribe([request("c")])
            assert 'finished_reason="error",model_name="m"} 2.0' in worker.metrics.text().decode()

    asyncio.run(main())
    assert "the device is on fire" in caplog.text


def test_an_engine_that_cannot_warm_up_is_broken(caplog: pytest.LogCaptureFixture):
    class Cold(ScriptedEngine):
        def warm_up(self, progress=None) -> None:
            raise RuntimeError("no memory")

    async def main() -> None:
        worker = Worker(Cold(), Metrics("m", 512), 10)
        worker.start()
        await until(lambda: worker._thread.broken)
        assert worker.trouble().status == 500
        await worker.drain(1)

    asyncio.run(main())
    assert "no memory" in caplog.text


def test_draining_lets_what_runs_finish():
    async def main() -> None:
        async with running(ScriptedEngine(step_seconds=0.005)) as worker:
            with worker.subscribe([request("a", max_tokens=20)]) as subscription:
                draining = asyncio.create_task(worker.drain(5))
                await asyncio.sleep(0)
                with pytest.raises(RequestError, match="shutting down"):
                    worker.subscribe([request("b")])
                assert len(await everything(subscription)) == 20
            await draining
            assert not worker._thread.is_alive()

    asyncio.run(main())


def test_draining_ends_what_takes_too_long():
    async def main() -> None:
        async with running(ScriptedEngine()) as worker:
            with worker.subscribe([request("a", max_tokens=10**6)]) as subscription:
                await worker.drain(0.05)
                with pytest.raises(RequestError, match="has shut down"):
                    await everything(subscription)
            assert not worker._thread.is_alive()

    asyncio.run(main())


def test_a_hanging_device_does_not_hold_the_end_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("dsjax.serving.worker.LAST_STEP_SECONDS", 0.05)
    caplog.set_level(logging.WARNING)

    async def main() -> None:
        engine = ScriptedEngine(step_seconds=0.5)
        worker = Worker(engine, Metrics("m", 512), 10)
        worker.start()
        await until(lambda: worker.trouble() is None)
        with worker.subscribe([request("a")]):
            await until(lambda: engine.steps == 1)
            await worker.drain(0)
        await until(lambda: not worker._thread.is_alive())

    asyncio.run(main())
    assert "the device is still busy" in caplog.text
