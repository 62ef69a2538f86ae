"""The command line: ``shmengine doctor``, ``clean``, ``keys``, ``cluster``, ``bench``; also ``python -m shmengine``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]

CLUSTER_EPILOG = """\
On many machines dask's own commands do it (pip install 'shmengine[dask]' on each of them):

  scheduler$  dask scheduler --port 8786
  host-1$     dask worker tcp://scheduler:8786 --nthreads 1
  host-2$     dask worker tcp://scheduler:8786 --nthreads 1

One worker of dask's is enough for a machine: the engine starts a process there for each of its cores. Then

  with shm.Engine(cluster="tcp://scheduler:8786") as engine:
      ...

Keys and certificates: give the commands --tls-ca-file, --tls-cert and --tls-key, and Engine a
distributed.Client(address, security=...).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser("shmengine", description="Process large arrays through shared memory.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("doctor", "say what this machine allows, and what stands in the way"),
        ("clean", "remove named regions and message queues that nobody uses any more"),
        ("keys", "make keys for channels between machines (listen and connect, auth=)"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="for programs")
        if name == "keys":
            command.add_argument(
                "path",
                help="file for the pair, which only its owner can read; the public key goes to PATH.pub, for others",
            )
    text = "start a dask cluster on this machine for Engine(cluster=...), until Ctrl-C"
    _add_cluster(
        commands.add_parser(
            "cluster",
            help=text,
            description=text,
            epilog=CLUSTER_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    text = "measure the ways from one process to another, and say which one to take"
    _add_bench(commands.add_parser("bench", help=text, description=text), arguments)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        from shmengine.bench.command import run

        return run(options)
    if options.command == "cluster":
        return _cluster(options)
    report = (
        _keys(options.path)
        if options.command == "keys"
        else {"doctor": _doctor, "clean": _clean}[options.command]()
    )
    if options.json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        width = max(map(len, report), default=0)
        for key, value in report.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{key:<{width}}  {line}")
                key = ""
    return 1 if report.get("trouble") else 0


def _add_bench(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Give the verb its options, if it is the one that is asked for: others do not load its modules."""
    if "bench" in (sys.argv[1:] if arguments is None else arguments)[:1]:
        from shmengine.bench.command import add_arguments

        add_arguments(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument(
        "--port", type=_whole(0, 65535), default=8786, help="of the scheduler (default: %(default)s; 0: any)"
    )
    parser.add_argument(
        "--workers", type=_whole(1), default=1, help="workers of dask's (default: %(default)s)"
    )


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    parse.__name__ = "int"  # what argparse says it is, where int refuses
    return parse


def _cluster(options: argparse.Namespace) -> int:
    """Run a scheduler and workers of dask's in the foreground."""
    import signal
    from multiprocessing import resource_tracker

    # Ctrl-C goes to all processes of a terminal, and is for this thread alone, when all have started. Whatever thread
    # or process comes from here on inherits that it is blocked; who starts the resource tracker unblocks it.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        from distributed import LocalCluster
    except ImportError:
        print("shmengine cluster needs distributed: pip install 'shmengine[dask]'", file=sys.stderr)
        return 1
    try:
        with LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            host=options.host,
            scheduler_port=options.port,
            dashboard_address=f"{options.host}:0",
        ) as cluster:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            print(f"Engine(cluster={cluster.scheduler_address!r}); Ctrl-C ends it", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    except (OSError, RuntimeError, ValueError) as error:
        print(f"shmengine cluster: {error}", file=sys.stderr)
        return 1
    return 0


def _doctor() -> dict[str, Any]:
    from importlib.metadata import version

    import numpy as np

    from shmengine import config
    from shmengine._native import ABI
    from shmengine.errors import ShmError
    from shmengine.region import Region, RegionConfig

    budget, free = config.default_budget(), config.shm_free()
    trouble: list[str] = []
    backing = "/dev/shm" if free >= budget else "an anonymous memory file"
    if free < budget:
        trouble.append(
            f"/dev/shm has only {config.format_bytes(free)} free: unnamed regions use an anonymous memory file"
            " instead, named rings cannot be larger (docker run --shm-size gives it more)"
        )
    try:
        Region.create(RegionConfig(arena_bytes=budget, capacities=(16,))).close()
    except (ShmError, OSError) as error:
        trouble.append(f"a region of the default size cannot be made: {error}")
    headroom = config.cgroup_headroom()
    return {
        "shmengine": f"{version('shmengine')} (layout {ABI})",
        "python": f"{platform.python_version()}, numpy {np.__version__}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "workers": config.default_workers(),
        "memory": f"{config.format_bytes(config.memory_available())} available",
        "cgroup": "no memory limit"
        if headroom is None
        else f"{config.format_bytes(headroom)} left of its limit",
        "/dev/shm": f"{config.format_bytes(free)} free",
        "budget": f"{config.format_bytes(budget)} by default, in {backing}",
        "trouble": trouble,
    }


def _clean() -> dict[str, Any]:
    from shmengine.channels import mqueue
    from shmengine.region import abandoned_names, remove_name

    removed = []
    for name in abandoned_names():
        remove_name(name)
        removed.append(name)
    for name in mqueue.abandoned_queues():
        mqueue.remove_queue(name)
        removed.append(f"{name} (message queue)")
    report: dict[str, Any] = {"removed": removed or ["nothing"]}
    if not mqueue.are_listed():
        report["not looked for"] = "message queues: `mount -t mqueue none /dev/mqueue` lists them"
    return report


def _keys(path: str) -> dict[str, Any]:
    from shmengine.channels.keys import generate_keys

    keys = generate_keys()
    try:
        keys.save(path)
    except OSError as error:
        return {"trouble": [f"the keys cannot be written: {error}"]}
    return {"secret": path, "public": f"{path}.pub", "public key": keys.public}
