"""The twins for asyncio: only the coroutine waits, and no thread is started for a channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import numpy as np
import pytest

from shmengine import Closed, EndOfStream, Timeout, WouldBlock
from tests.helpers.channels import FOREVER, echo, fill, is_message, make_pair, message, number_of
from tests.helpers.partners import STARTS, Partners, in_thread

BLOCK = (np.arange(20_000) % 251).astype("u1")
MANY = {"mqueue": 3}  # all queues of a user have to fit into a few hundred KiB of the kernel's
COUNT = 40


async def talk(end):
    """Send and receive at once."""

    async def send():
        for number in range(COUNT):
            await end.asend(message(number), FOREVER)

    async def receive():
        for number in range(COUNT):
            obj = await end.areceive(FOREVER)
            assert is_message(obj)
            assert number_of(obj) == number

    await asyncio.gather(send(), receive())


def talk_there(end):
    asyncio.run(talk(end))


def test_there_and_back(ends):
    left, right = ends
    job = right.start(talk_there)
    asyncio.run(talk(left))
    job.result()


def test_both_in_one_loop(ends_here):
    left, right = ends_here

    async def main():
        await asyncio.gather(talk(left), talk(right))

    asyncio.run(main())


def test_with_calls_that_wait(ends):
    """Whoever has the other end uses the usual ones."""
    left, right = ends
    job = right.start(echo)

    async def main():
        for number in range(20):
            await left.asend(message(number))
            assert is_message(await left.areceive(FOREVER))

    asyncio.run(main())
    left.close()
    job.result()


def threads():
    return len(os.listdir("/proc/self/task"))


def serve_all(ends):
    """Serve many channels in one loop; return how many threads came."""

    async def serve(end):
        async for obj in end:
            await end.asend(obj)
        end.close()

    async def main():
        before = threads()
        await asyncio.gather(*map(serve, ends))
        return threads() - before

    return asyncio.run(main())


def ask_all(ends):
    """Ask those who serve; return how many threads came."""

    async def ask(end, number):
        for i in range(5):
            await end.asend([number, i, BLOCK], FOREVER)
            assert (await end.areceive(FOREVER))[:2] == [number, i]
        end.close()

    async def main():
        before = threads()
        await asyncio.gather(*(ask(end, number) for number, end in enumerate(ends)))
        return threads() - before

    return asyncio.run(main())


def test_many_channels_in_one_loop(mechanism, make_channel_here, take, how):
    """And their other ends in another one."""

    def talk(count):
        lefts, rights = zip(*(make_channel_here() for _ in range(count)), strict=True)
        if STARTS[how].own_process:
            rights = [take(end, pickled=True) for end in rights]
            job = rights[0].start_with(rights[1:], serve_all)
        else:
            job = in_thread(serve_all, rights)
        return ask_all(lefts), job.result()

    held, _ = make_channel_here()
    held.send(1)  # what a process has once for all channels is there from here on
    few = talk(1)
    many = talk(MANY.get(mechanism, 25))
    for added, before in zip(many, few, strict=True):
        assert added <= before + 3  # the process's own may begin


def let_time_pass(end):
    async def main():
        for call in (end.areceive, lambda timeout: end.asend(BLOCK, timeout)):
            with pytest.raises(WouldBlock):
                await call(0)
            start = time.monotonic()
            with pytest.raises(Timeout) as caught:
                await call(0.06)
            assert time.monotonic() - start >= 0.06
            assert caught.value.seconds == 0.06

    fill(end, BLOCK)
    asyncio.run(main())


def test_timeouts(ends):
    let_time_pass(ends[0])


def test_timeouts_of_a_partner(ends):
    ends[1].run(let_time_pass)


def test_others_go_on_while_one_waits(ends):
    left, right = ends

    async def main():
        waiting = asyncio.create_task(left.areceive())
        turns = 0
        while turns < 100:
            await asyncio.sleep(0)
            turns += 1
        assert not waiting.done()
        right.send("now")
        assert await waiting == "now"

    asyncio.run(main())


def test_a_cancelled_receive_takes_nothing(ends):
    left, right = ends

    async def main():
        for number in range(30):
            waiting = asyncio.create_task(left.areceive())
            await asyncio.sleep(0.0005 * (number % 3))
            if number % 2:
                right.send(number)
            waiting.cancel()
            try:
                assert await waiting == number  # it was faster
            except asyncio.CancelledError:
                if number % 2:
                    assert await left.areceive(FOREVER) == number
        with pytest.raises(WouldBlock):
            await left.areceive(0)

    asyncio.run(main())


def receive_blocks(end, count):
    for _ in range(count):
        assert np.array_equal(end.receive(FOREVER), BLOCK)
    return end.receive(FOREVER)


def test_a_cancelled_send_has_sent_nothing(ends):
    left, right = ends
    sent = fill(left, BLOCK)

    async def main():
        for number in range(5):
            waiting = asyncio.create_task(left.asend(np.full(3_000_000, number, "u1")))
            await asyncio.sleep(0.005)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        job = right.start(receive_blocks, sent)
        await left.asend("afterwards", FOREVER)
        return job

    assert asyncio.run(main()).result() == "afterwards"
    assert right.stats().gaps == 0


def send_and_receive_much(end):
    async def send():
        for _ in range(600):
            await end.asend(BLOCK, FOREVER)

    async def receive():
        for _ in range(600):
            assert np.array_equal(await end.areceive(FOREVER), BLOCK)

    async def main():
        await asyncio.gather(send(), receive())

    asyncio.run(main())


def test_a_way_out_gather(ends):
    """Both send more than the buffers hold; whoever also receives gets through."""
    left, right = ends
    job = right.start(send_and_receive_much)
    send_and_receive_much(left)
    job.result()


def receive_in_two(end):
    async def receive():
        return [await end.areceive(FOREVER) for _ in range(45)]

    async def main():
        return await asyncio.gather(receive(), receive())

    return sum(asyncio.run(main()), [])


def test_several_coroutines_share_an_end(ends):
    left, right = ends
    job = right.start(receive_in_two)

    async def send(who):
        for number in range(30):
            await left.asend((who, number), FOREVER)

    async def main():
        await asyncio.gather(*(send(who) for who in range(3)))

    asyncio.run(main())
    assert sorted(job.result()) == [(who, number) for who in range(3) for number in range(30)]


def iterate(end):
    async def main():
        got = [obj async for obj in end]
        with pytest.raises(EndOfStream):
            await end.areceive()
        with pytest.raises(EndOfStream):
            await end.asend(1)
        return got

    return asyncio.run(main())


def test_iteration_and_the_end(ends):
    left, right = ends

    async def main():
        for number in range(5):
            await left.asend(number)
        left.close()
        with pytest.raises(Closed):
            await left.asend(1)

    job = right.start(iterate)
    asyncio.run(main())
    assert job.result() == list(range(5))


def test_iteration_until_a_partner_closes(ends):
    left, right = ends
    right.send_many(range(5))
    right.close()
    assert iterate(left) == list(range(5))


def test_closed_while_a_coroutine_waits(ends):
    left, right = ends
    fill(left, BLOCK)

    async def main():
        waiting = [asyncio.create_task(left.areceive()), asyncio.create_task(left.asend(BLOCK))]
        await asyncio.sleep(0.01)
        left.close()
        for each in waiting:
            with pytest.raises(Closed):
                await each

    asyncio.run(main())
    assert np.array_equal(right.receive(FOREVER), BLOCK)


def test_the_other_one_dies(mechanism, how):
    partners = Partners()
    left, right = make_pair(mechanism)
    right, lost = partners.take(how, right), STARTS[how].lost

    async def main():
        assert await left.areceive(FOREVER) == 1
        waiting = asyncio.create_task(left.areceive())
        await asyncio.sleep(0.01)
        right.kill()
        with pytest.raises(lost):
            await waiting
        with pytest.raises(lost):
            await left.asend(1)

    with left, contextlib.closing(partners):
        right.send(1)
        asyncio.run(main())


def seconds_of_waiting(end):
    """The CPU time of two coroutines that wait for half a second."""

    async def wait(call):
        with pytest.raises(Timeout):
            await call(0.5)

    async def main():
        await asyncio.gather(wait(end.areceive), wait(lambda timeout: end.asend(BLOCK, timeout)))

    fill(end, BLOCK)
    start = time.thread_time()
    asyncio.run(main())
    return time.thread_time() - start


def test_a_waiting_coroutine_uses_no_cpu(ends):
    assert seconds_of_waiting(ends[0]) < 0.2


def test_a_partners_waiting_coroutine_uses_no_cpu(ends):
    assert ends[1].run(seconds_of_waiting) < 0.2


def receive_in_a_thread_and_a_coroutine(end):
    async def main():
        job = in_thread(lambda: [end.receive(FOREVER) for _ in range(20)])
        mine = [await end.areceive(FOREVER) for _ in range(20)]
        return mine + job.result()

    return asyncio.run(main())


def test_a_thread_and_a_coroutine_at_one_end(ends):
    left, right = ends
    job = right.start(receive_in_a_thread_and_a_coroutine)
    left.send_many(range(40), FOREVER)
    assert sorted(job.result()) == list(range(40))
    assert right.stats().messages_received == 40
