"""The twins for asyncio: only the coroutine waits, and no thread is started for a channel."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest

from shmengine import Closed, EndOfStream, PeerLost, Timeout, WouldBlock
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, drain, fill, is_message, message, number_of, sending
from tests.helpers.partners import Child, in_thread

BLOCK = (np.arange(20_000) % 251).astype("u1")
MANY = {"mqueue": 3}  # all queues of a user have to fit into a few hundred KiB of the kernel's
COUNT = 60


def test_there_and_back(ends_here):
    left, right = ends_here

    async def talk(end):
        async def send():
            for number in range(COUNT):
                await end.asend(message(number), FOREVER)

        async def receive():
            for number in range(COUNT):
                obj = await end.areceive(FOREVER)
                assert is_message(obj)
                assert number_of(obj) == number

        await asyncio.gather(send(), receive())

    async def main():
        await asyncio.gather(talk(left), talk(right))

    asyncio.run(main())


def echo(end):
    for obj in end:
        end.send(obj)


def test_with_another_process(ends_here, partners, how):
    """Whose calls are the usual ones."""
    left, right = ends_here
    job = partners.start(how, echo, right)

    async def main():
        for number in range(20):
            await left.asend(message(number))
            assert is_message(await left.areceive(FOREVER))

    asyncio.run(main())
    left.close()
    job.result()


def threads():
    return len(os.listdir("/proc/self/task"))


def test_many_channels_in_one_loop(mechanism, make_channel_here):
    count = MANY.get(mechanism, 25)

    async def serve(end):
        async for obj in end:
            await end.asend(obj)
        end.close()

    async def ask(end, number):
        for i in range(5):
            await end.asend([number, i, BLOCK], FOREVER)
            assert (await end.areceive(FOREVER))[:2] == [number, i]
        end.close()

    async def main(channels):
        before = threads()
        servers = [asyncio.create_task(serve(right)) for _, right in channels]
        await asyncio.gather(*(ask(left, number) for number, (left, _) in enumerate(channels)))
        added = threads() - before
        await asyncio.gather(*servers)
        return added

    held, _ = make_channel_here()
    held.send(1)  # what a process has once for all channels is there from here on
    few = asyncio.run(main([make_channel_here()]))
    assert (
        asyncio.run(main([make_channel_here() for _ in range(count)])) <= few + 3
    )  # the process's own may begin


def test_timeouts(ends_here):
    left, _ = ends_here

    async def main():
        for call in (left.areceive, lambda timeout: left.asend(BLOCK, timeout)):
            with pytest.raises(WouldBlock):
                await call(0)
            start = time.monotonic()
            with pytest.raises(Timeout) as caught:
                await call(0.06)
            assert time.monotonic() - start >= 0.06
            assert caught.value.seconds == 0.06

    fill(left, BLOCK)
    asyncio.run(main())


def test_others_go_on_while_one_waits(ends_here):
    left, right = ends_here

    async def main():
        waiting = asyncio.create_task(right.areceive())
        turns = 0
        while turns < 100:
            await asyncio.sleep(0)
            turns += 1
        assert not waiting.done()
        await left.asend("now")
        assert await waiting == "now"

    asyncio.run(main())


def test_a_cancelled_receive_takes_nothing(ends_here):
    left, right = ends_here

    async def main():
        for number in range(30):
            waiting = asyncio.create_task(right.areceive())
            await asyncio.sleep(0.0005 * (number % 3))
            if number % 2:
                left.send(number)
            waiting.cancel()
            try:
                assert await waiting == number  # it was faster
            except asyncio.CancelledError:
                if number % 2:
                    assert await right.areceive(FOREVER) == number
        with pytest.raises(WouldBlock):
            await right.areceive(0)

    asyncio.run(main())


def test_a_cancelled_send_has_sent_nothing(ends_here):
    left, right = ends_here
    sent = fill(left, BLOCK)

    async def main():
        for number in range(5):
            waiting = asyncio.create_task(left.asend(np.full(3_000_000, number, "u1")))
            await asyncio.sleep(0.005)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        last = asyncio.create_task(left.asend("afterwards", FOREVER))
        for _ in range(sent):
            assert np.array_equal(await right.areceive(FOREVER), BLOCK)
        assert await right.areceive(FOREVER) == "afterwards"
        await last

    asyncio.run(main())
    assert right.stats().gaps == 0


def test_a_way_out_gather(ends_here):
    """Both send more than the buffers hold; whoever also receives gets through."""
    left, right = ends_here

    async def send(end):
        for _ in range(600):
            await end.asend(BLOCK, FOREVER)

    async def receive(end):
        for _ in range(600):
            assert np.array_equal(await end.areceive(FOREVER), BLOCK)

    async def main():
        await asyncio.gather(send(left), send(right), receive(left), receive(right))

    asyncio.run(main())


def test_several_coroutines_share_an_end(ends_here):
    left, right = ends_here

    async def main():
        async def send(who):
            for number in range(30):
                await left.asend((who, number), FOREVER)

        async def receive():
            return [await right.areceive(FOREVER) for _ in range(45)]

        *_, one, other = await asyncio.gather(*(send(who) for who in range(3)), receive(), receive())
        assert sorted(one + other) == [(who, number) for who in range(3) for number in range(30)]

    asyncio.run(main())


def test_iteration_and_the_end(ends_here):
    left, right = ends_here

    async def main():
        for number in range(5):
            await left.asend(number)
        left.close()
        assert [obj async for obj in right] == list(range(5))
        with pytest.raises(EndOfStream):
            await right.areceive()
        with pytest.raises(EndOfStream):
            await right.asend(1)
        with pytest.raises(Closed):
            await left.asend(1)

    asyncio.run(main())


def test_closed_while_a_coroutine_waits(ends_here):
    left, right = ends_here
    fill(left, BLOCK)

    async def main():
        waiting = [asyncio.create_task(left.areceive()), asyncio.create_task(left.asend(BLOCK))]
        await asyncio.sleep(0.01)
        left.close()
        for each in waiting:
            with pytest.raises(Closed):
                await each

    asyncio.run(main())
    drain(right, 1)


def test_the_other_process_dies(ends_here):
    left, right = ends_here
    child = Child(lambda end: [end.send(1), end.receive()], right)
    right.close()

    async def main():
        assert await left.areceive(FOREVER) == 1
        waiting = asyncio.create_task(left.areceive())
        await asyncio.sleep(0.01)
        child.kill()
        with pytest.raises(PeerLost):
            await waiting
        with pytest.raises(PeerLost):
            await left.asend(1)

    asyncio.run(main())
    child.end()


def test_a_waiting_coroutine_uses_no_cpu(ends_here):
    left, _ = ends_here
    fill(left, BLOCK)

    async def wait(call):
        with pytest.raises(Timeout):
            await call(0.5)

    async def main():
        await asyncio.gather(wait(left.areceive), wait(lambda timeout: left.asend(BLOCK, timeout)))

    start = time.thread_time()
    asyncio.run(main())
    assert time.thread_time() - start < 0.2


def test_a_thread_and_a_coroutine_at_one_end(ends_here, partners):
    left, right = ends_here

    async def main():
        job = in_thread(lambda end: [end.receive(FOREVER) for _ in range(20)], right)
        mine = [await right.areceive(FOREVER) for _ in range(20)]
        return mine + job.result()

    with sending(left, range(40)):
        assert sorted(asyncio.run(main())) == list(range(40))
    poll_until(lambda: right.stats().messages_received == 40)
