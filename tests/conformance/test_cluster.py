"""Engines on a cluster of real processes: same results wherever tasks run, hosts that die, what is left behind."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import dask
import numpy as np
import pandas as pd
import pytest
from distributed import Client
from distributed.security import Security

import shmengine as shm
from shmengine import cli
from shmengine.codec import encode
from shmengine.engine import courier, hosts
from tests.helpers import (
    children,
    descendants,
    describe_process,
    kill_tree,
    poll_until,
    run_script,
    start_script,
)
from tests.helpers.cluster import Cluster

SETTINGS = {"memory": "64 MiB"}


def processes_at(worker):
    """The processes of engines at a worker of dask's; the standard library's own tracker stays."""
    return {pid for pid in descendants(worker.pid) if "resource_tracker" not in describe_process(pid)}


@pytest.fixture(scope="module")
def processes():
    made = Cluster(2)
    yield made
    made.close()


@pytest.fixture
def cluster(processes):
    """Two hosts, whatever has become of those of the last test."""
    processes.refill(2)
    yield processes
    for worker in processes.alive:
        poll_until(lambda worker=worker: not processes_at(worker))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """For the module alone: dask's client opens connections when it likes, and keeps them."""


def draw(block, rng):
    return block + rng.random(block.shape)


def everything(engine):
    """Results of all that cuts or numbers tasks."""
    x = np.random.default_rng(5).random((3000, 7))
    return (
        engine.map_blocks(draw, x, rng=3, block_bytes=5000),
        engine.map_blocks(np.subtract, x, x[::-1], axis=1, block_bytes=30_000),
        engine.map_overlap(lambda b: np.gradient(b, axis=0), x, 3, "nearest", block_bytes=4000),
        engine.map_overlap(lambda b: np.gradient(b, axis=0), x, (2, 1), "none", block_bytes=4000),
        engine.reduce(np.sum, x, combine=np.add, block_bytes=3000),
        np.array(list(engine.map(lambda i, rng: i + rng.random(), range(200), rng=4))),
    )


def test_results_are_those_of_one_machine_bit_for_bit(cluster):
    with shm.Engine(backend="serial") as serial, shm.Engine(2, cluster=cluster.address, **SETTINGS) as engine:
        assert (engine.backend, engine.workers) == ("cluster", 4)
        for here, there in zip(everything(serial), everything(engine), strict=True):
            assert here.dtype == there.dtype
            assert np.array_equal(here, there)


def test_tasks_run_in_processes_of_all_hosts(cluster):
    with shm.Engine(2, cluster=cluster.address, **SETTINGS) as engine:
        pids = set(engine.map(lambda _: time.sleep(0.01) or os.getpid(), range(200)))
        assert len(pids) == 4
        assert pids <= set().union(*(processes_at(worker) for worker in cluster.alive))


def test_what_was_put_crosses_once_for_each_host(cluster):
    table = np.arange(1_000_000.0)
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        ref = engine.put(table)
        before = engine.stats().bytes_copied
        tasks = engine.map(lambda t, i: float(t[i]), itertools.repeat(ref), range(300))
        assert list(tasks) == list(range(300))
        crossed = engine.stats().bytes_copied - before
        assert table.nbytes < crossed < 2 * table.nbytes + 1_000_000
        captured = np.ones(1_000_000)
        before = engine.stats().bytes_copied
        assert sum(engine.map(lambda i: captured[i], range(300))) == 300
        assert engine.stats().bytes_copied - before < 2 * captured.nbytes + 1_000_000
        x = np.zeros(2_000_000)
        before = engine.stats().bytes_copied
        engine.map_blocks(np.sqrt, x)
        assert engine.stats().bytes_copied - before < 2 * x.nbytes + 1_000_000


def test_a_host_s_memory_is_given_back_with_the_reference(cluster):
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        for _ in range(12):  # together more than the budget of a host
            ref = engine.put(np.ones(1_500_000))
            assert list(engine.map(np.sum, [ref] * 4)) == [1_500_000] * 4
            del ref


def test_references_of_other_engines_and_of_one_that_was_closed(cluster):
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as one:
        ref, inner = one.put({"a": np.arange(50_000)}), one.put("inner")
        nested = one.put([ref, inner])
        assert one.submit(lambda n: n[0]["a"][7], nested).result() == 7
        with shm.Engine(1, cluster=cluster.address, **SETTINGS) as other:
            assert list(other.map(lambda r, i: int(r["a"][i]), [ref] * 5, range(5))) == [0, 1, 2, 3, 4]
    with shm.Engine(1, memory="64 MiB") as local:
        assert local.submit(lambda n: n[1], nested).result() == "inner"
    assert nested.get()[0]["a"][3] == 3
    assert not nested.get()[0]["a"].flags.writeable


def test_coroutines_and_who_is_slow(cluster, gate):
    async def main():
        with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
            assert await engine.asubmit(pow, 2, 5) == 32
            assert [x async for x in engine.amap(abs, range(5))] == [0, 1, 2, 3, 4]
            waiting = engine.asubmit(gate.wait, 5)
            found = []
            while not found:  # a worker may still be starting
                await asyncio.sleep(0.05)
                stalls = await asyncio.to_thread(engine.stalls, 0.01)
                found = [stall for stall in stalls if "wait_for_file" in stall.stack]
            gate.open()
            assert await waiting == 5
            assert found[0].function == "asubmit(wait_for_file)"
            assert " on 127.0.0." in found[0].worker

    asyncio.run(main())


def test_a_client_of_one_s_own_stays_open(cluster):
    with Client(cluster.address, set_as_default=False) as client:
        for _ in range(2):
            with shm.Engine(1, cluster=client, **SETTINGS) as engine:
                assert engine.submit(pow, 2, 5).result() == 32
        assert client.submit(pow, 2, 6).result() == 64
        plugins = client.run(
            lambda dask_worker: [name for name in dask_worker.plugins if "shmengine" in name]
        )
        assert not any(plugins.values())
        assert not client.run_on_scheduler(
            lambda dask_scheduler: [name for name in dask_scheduler.plugins if "shmengine" in name]
        )


def test_one_engine_for_each_host_however_many_workers_dask_has_there(cluster):
    addresses = {worker.args[worker.args.index("--host") + 1] for worker in cluster.alive}
    another = cluster.add_worker(address=min(addresses))
    cluster.wait(3)
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        assert engine.workers == 2
        assert sum(engine.map(abs, range(100))) == 4950
    another.kill()


# --- deaths ---------------------------------------------------------------------------------------


def test_hosts_come_and_die_and_that_costs_time_alone(cluster):
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        third = cluster.add_worker()
        poll_until(lambda: engine.workers == 3)
        assert len(set(engine.map(lambda _: time.sleep(0.01) or os.getpid(), range(100)))) == 3
        results = engine.map(lambda i: time.sleep(0.005) or i * i, range(400))
        head = [next(results) for _ in range(20)]
        cluster.alive[0].kill()
        assert head + list(results) == [i * i for i in range(400)]
        stats = engine.stats()
        assert stats.retries > 0
        assert stats.worker_deaths == 1
        assert engine.workers == 2
        assert third.poll() is None
        x = np.random.default_rng(1).random(500_000)
        assert np.array_equal(engine.map_blocks(np.sqrt, x), np.sqrt(x))


def test_without_retries_the_tasks_of_a_dead_host_fail(cluster):
    with shm.Engine(1, cluster=cluster.address, retries=0, **SETTINGS) as engine:
        ppid = engine.submit(os.getppid).result()
        dead = next(worker for worker in cluster.alive if worker.pid == ppid)
        futures = [engine.submit(time.sleep, 3) for _ in range(4)]
        poll_until(lambda: all(future.running() for future in futures))
        dead.kill()
        errors = [future.exception(60) for future in futures]
        lost = [error for error in errors if error is not None]
        assert len(lost) == 2
        for error in lost:
            assert isinstance(error, shm.WorkerDied)
            assert error.pid == dead.pid
            assert str(error).startswith(f"worker {dead.pid} disappeared (dask's worker at tcp://127.0.0.")
            assert str(error).endswith("was lost) while it ran submit(sleep)")


def test_when_no_host_is_left(cluster, monkeypatch):
    monkeypatch.setattr(courier, "HOSTLESS_SECONDS", 1)
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        results = engine.map(lambda _: time.sleep(0.01), itertools.count())
        next(results)
        for worker in cluster.alive:
            worker.kill()
        with pytest.raises(
            shm.WorkerDied, match=r"no worker is left \(the cluster has had no host for 1 s\)"
        ):
            list(results)
        cluster.add_worker()
        poll_until(lambda: engine.workers == 1)
        assert list(engine.map(abs, [-1])) == [1]


def test_a_worker_process_of_a_host_that_dies_is_that_host_s_affair(cluster, tmp_path):
    def die_once(i):
        if i == 7 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        results = list(engine.map(die_once, range(20), on_error="return"))
        assert isinstance(results[11], shm.WorkerDied)
        assert "was killed by SIGKILL" in str(results[11])
        assert "while it ran task 11 of map(die_once); tried 2 times" in str(results[11])
        assert results[:11] + results[12:] == [i for i in range(20) if i != 11]
        assert engine.workers == 2


def test_when_the_scheduler_dies_nobody_hangs(cluster):
    engine = shm.Engine(1, cluster=cluster.address, **SETTINGS)
    future = engine.submit(time.sleep, 60)
    results = engine.map(lambda _: time.sleep(0.01), itertools.count())
    next(results)
    cluster.scheduler.kill()
    for call in (
        lambda: list(results),
        future.result,
        lambda: engine.submit(abs, 1).result(),
        lambda: engine.map_blocks(np.sqrt, np.ones(3)),
        lambda: engine.put(1),
    ):
        with pytest.raises(shm.PeerLost, match=r"the connection to the scheduler .*was lost"):
            call()
    engine.close()
    assert "closed" in repr(engine)


def test_when_the_client_is_killed_the_hosts_are_left_as_they_were(cluster):
    script = """
        import sys, time
        import shmengine as shm
        engine = shm.Engine(1, cluster=sys.argv[1], memory="64 MiB")
        futures = [engine.submit(time.sleep, 600) for _ in range(4)]
        print("started", flush=True)
        time.sleep(600)
    """
    with start_script(script, args=[cluster.address]) as process:
        assert process.stdout.readline().strip() == "started"
        assert all(processes_at(worker) for worker in cluster.alive)
        process.kill()
    poll_until(lambda: not any(processes_at(worker) for worker in cluster.alive))


def test_an_engine_that_nobody_closes_ends_with_the_program(cluster):
    script = """
        import sys
        import shmengine as shm
        engine = shm.Engine(1, cluster=sys.argv[1], memory="64 MiB")
        print(engine.submit(lambda x: x + 1, 1).result())
    """
    assert run_script(script, args=[cluster.address]).stdout.strip() == "2"


# --- starting one ---------------------------------------------------------------------------------


def test_a_cluster_of_one_machine_from_the_command_line():
    command = [sys.executable, "-m", "shmengine", "cluster"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "dask worker tcp://scheduler:8786" in shown
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        address = process.stdout.readline().split("'")[1]
        with shm.Engine(1, cluster=address, **SETTINGS) as engine:
            assert engine.submit(pow, 2, 5).result() == 32
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0


@pytest.mark.parametrize("moment", ["started", "starting"])
def test_control_c_in_a_terminal_ends_it_without_a_word(moment):
    command = [sys.executable, "-m", "shmengine", "cluster", "--port", "0", "--workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            if moment == "started":
                assert "Ctrl-C ends it" in process.stdout.readline()
            else:  # the first worker is there, beside multiprocessing's tracker
                poll_until(lambda: len(children(process.pid)) > 1)
            while process.poll() is None:  # once, and again and again
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
        output, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 0
    assert ("Ctrl-C ends it" in output) == (moment == "starting")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--port", "99999", "argument --port: must be from 0 to 65535, not 99999"),
        ("--port", "-1", "argument --port: must be from 0 to 65535, not -1"),
        ("--port", "http", "argument --port: invalid int value: 'http'"),
        ("--workers", "0", "argument --workers: must be at least 1, not 0"),
        ("--workers", "-1", "argument --workers: must be at least 1, not -1"),
        ("--workers", "two", "argument --workers: invalid int value: 'two'"),
    ],
)
def test_bad_options_of_the_command(option, value, text, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_cluster", lambda options: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["cluster", f"{option}={value}"])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_bad_clusters(cluster):
    for bad in (5, ["tcp://127.0.0.1:8786"], object()):
        with pytest.raises(
            TypeError, match=r"cluster must be the address of a scheduler or a distributed\.Client"
        ):
            shm.Engine(cluster=bad)
    with pytest.raises(ValueError, match="backend='thread' does not"):
        shm.Engine(cluster=cluster.address, backend="thread")
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
        pytest.raises(shm.PeerLost, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"),
    ):
        shm.Engine(cluster="tcp://127.0.0.1:9")
    with Client(cluster.address, set_as_default=False) as client:
        pass
    with pytest.raises(shm.PeerLost, match="'closed'"):
        shm.Engine(cluster=client)


def test_what_a_host_refuses_is_refused_at_once(cluster):
    with pytest.raises(shm.MemoryBudgetExceeded, match="too small"):
        shm.Engine(4, cluster=cluster.address, memory="4 MiB")
    with pytest.raises(shm.SerializationError, match="lock"):
        shm.Engine(1, cluster=cluster.address, initializer=abs, initargs=[threading.Lock()])


def test_bad_tasks(cluster):
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        with pytest.raises(shm.SerializationError, match=r"args\[0\]\['lock'\]"):
            list(engine.map(abs, [{"lock": threading.Lock()}]))
        with pytest.raises(shm.SerializationError, match=r"kwargs\['key'\]"):
            engine.submit(abs, key=threading.Lock())
        with pytest.raises(shm.ArrayError, match="writable='private'"):
            engine.map_blocks(np.sqrt, np.ones(4), writable="shared")
        with pytest.raises(OSError, match="no such") as caught:
            engine.submit(open, "/no such/file").result()
        assert caught.value.errno == 2
        with pytest.raises(shm.BlockError, match="block 1 of"):
            engine.map_blocks(lambda b: b[:1] if b[0] else b, np.arange(4.0), block_bytes=16)
        assert list(engine.map(abs, [-1])) == [1]


def test_a_scheduler_without_workers(cluster, monkeypatch):
    monkeypatch.setattr(courier, "HOSTLESS_SECONDS", 0.5)
    for worker in cluster.alive:
        worker.kill()
        worker.wait()
    with pytest.raises(shm.PeerLost, match="has no workers: `shmengine cluster --help`"):
        shm.Engine(1, cluster=cluster.address)


def test_frames_and_progress(cluster):
    frame = pd.DataFrame({"a": np.arange(5000), "b": np.arange(5000.0)}, index=np.arange(5000) * 2)
    told, later = [], []
    with shm.Engine(1, cluster=cluster.address, **SETTINGS) as engine:
        found = engine.map_blocks(
            lambda rows: rows * 2,
            frame,
            block_bytes=4000,
            progress=lambda done, total: told.append((done, total)),
        )
        assert list(engine.map(len, ["a", "bb"], progress=lambda *done: later.append(done))) == [1, 2]
    pd.testing.assert_frame_equal(found, frame * 2)
    assert told[-1] == (20, 20)
    assert later[-1] == (2, 2)


def test_an_engine_that_takes_long_to_end_holds_up_no_other():
    """Those of other clients end in the event loop of the same worker of dask's."""
    settings = encode({"workers": 1, "memory": 64 << 20}).to_bytes()
    plugin = hosts.HostPlugin("any", settings)
    plugin.setup(None)
    backend = plugin.backend()

    async def end():
        with backend._core.pool._output:  # somebody does not read what its workers print
            ending = asyncio.ensure_future(plugin.teardown(None))
            await asyncio.sleep(0.1)
            assert not ending.done()
        await ending

    asyncio.run(end())
    with pytest.raises(shm.Closed):
        plugin.backend()


def test_an_engine_on_a_host_ends_at_the_end_of_that_process(monkeypatch):
    def none_left(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    plugin = hosts.HostPlugin("any", encode({"workers": 1, "memory": 64 << 20}).to_bytes())
    plugin.setup(None)
    plugin.backend()
    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", none_left)
    asyncio.run(plugin.teardown(None))
    with pytest.raises(shm.Closed):
        plugin.backend()


def test_over_tls(tmp_path):
    """All that crosses goes by the client, with its certificates."""
    security = Security.temporary()
    settings = {}
    for name, text in (
        ("ca", security.tls_ca_file),
        ("key", security.tls_client_key),
        ("cert", security.tls_client_cert),
    ):
        (tmp_path / name).write_text(text)
    for role in ("SCHEDULER", "WORKER"):
        settings[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = str(tmp_path / "key")
        settings[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = str(tmp_path / "cert")
    settings["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] = str(tmp_path / "ca")
    cluster = Cluster(0, protocol="tls", settings=settings)
    try:
        cluster.add_worker()
        x = np.random.default_rng(5).random((20_000, 50))
        assert cluster.address.startswith("tls://")
        with (
            Client(cluster.address, security=security) as client,
            shm.Engine(1, cluster=client, **SETTINGS) as engine,
        ):
            assert np.array_equal(engine.map_blocks(np.sqrt, x), np.sqrt(x))
            assert engine.submit(np.sum, engine.put(x)).result() == x.sum()
    finally:
        cluster.close()
