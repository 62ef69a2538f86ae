from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shmengine import config
from tests.helpers import memory_cgroup, run_script

MIB = 1 << 20


class TestParseBytes:
    @pytest.mark.parametrize(
        ("text", "count"),
        [
            (0, 0),
            (4096, 4096),
            (np.int64(7), 7),
            ("4096", 4096),
            ("4096 B", 4096),
            ("1 KiB", 1024),
            ("256 MiB", 256 * MIB),
            ("256MiB", 256 * MIB),
            ("  2 gib ", 2 << 30),
            ("1.5 GiB", 3 << 29),
            (".5 KiB", 512),
            ("2. KiB", 2048),
            ("1 kB", 1000),
            ("64 MB", 64_000_000),
            ("1 TB", 10**12),
            ("1 PiB", 1 << 50),
            ("1_000_000", 1_000_000),
            ("0.1 GiB", (1 << 30) // 10),
        ],
    )
    def test_means(self, text, count):
        result = config.parse_bytes(text)
        assert result == count
        assert type(result) is int

    @pytest.mark.parametrize(
        "text", ["", "MiB", "-1 MiB", "1e6", "0x10", "1 2", "nan", "inf", "1,5 MiB", "1__0.0.0"]
    )
    def test_refuses_what_is_no_size(self, text):
        with pytest.raises(ValueError, match="not a size"):
            config.parse_bytes(text)

    @pytest.mark.parametrize("text", ["1 M", "5 bytes", "3 Mbit", "2 EiB", "1 iB"])
    def test_refuses_unknown_units_and_names_the_known_ones(self, text):
        with pytest.raises(ValueError, match=r"unknown unit .* KiB"):
            config.parse_bytes(text)

    def test_refuses_negative_numbers(self):
        with pytest.raises(ValueError, match="negative"):
            config.parse_bytes(-1)

    @pytest.mark.parametrize("value", [1.5, None, True, b"1 MiB", np.float64(3)])
    def test_refuses_other_types(self, value):
        with pytest.raises(TypeError, match="size"):
            config.parse_bytes(value)


class TestFormatBytes:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (1, "1 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (100 * 1024 + 512, "100 KiB"),
            (MIB - 1, "1 MiB"),
            (256 * MIB, "256 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 50, "1 PiB"),
            (5000 << 50, "5000 PiB"),
            (-2048, "-2 KiB"),
        ],
    )
    def test_writes(self, count, text):
        assert config.format_bytes(count) == text

    @example(1152)
    @given(st.integers(0, 1 << 60))
    def test_is_read_back_within_half_a_percent(self, count):
        assert config.parse_bytes(config.format_bytes(count)) == pytest.approx(count, rel=0.0051, abs=0.5)


# --- fake machines ------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """A builder of fake /proc and /sys trees."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, root):
        self.root = str(root)
        self.mounts = []
        self.membership = []
        self.write("proc/meminfo", "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
        self._flush()

    def write(self, path, text):
        path = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(text)

    def _flush(self):
        self.write("proc/self/mountinfo", "".join(self.mounts))
        self.write("proc/self/cgroup", "".join(self.membership))

    def hierarchy(self, group, *, v2, controllers="", mount_point=None, mount_root="/"):
        mount_point = mount_point or ("/sys/fs/cgroup" if v2 else f"/sys/fs/cgroup/{controllers}")
        kind = f"cgroup2 cgroup2 rw,{controllers}" if v2 else f"cgroup cgroup rw,{controllers}"
        self.mounts.append(f"30 29 0:26 {mount_root} {mount_point} rw,relatime shared:4 - {kind}\n")
        self.membership.append(f"{0 if v2 else 4}:{'' if v2 else controllers}:{group}\n")
        os.makedirs(self.root + mount_point, exist_ok=True)
        self._flush()
        return mount_point.lstrip("/")

    def memory(self, directory, limit, usage, inactive=0, *, v2):
        names = ("memory.max", "memory.current", "inactive_file")
        if not v2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        self.write(f"{directory}/{names[0]}", f"{limit}\n")
        self.write(f"{directory}/{names[1]}", f"{usage}\n")
        self.write(f"{directory}/memory.stat", f"anon 1\n{names[2]} {inactive}\nactive_file 5\n")

    def cpu(self, directory, quota, period, *, v2):
        if v2:
            self.write(f"{directory}/cpu.max", f"{quota} {period}\n")
        else:
            self.write(f"{directory}/cpu.cfs_quota_us", f"{quota}\n")
            self.write(f"{directory}/cpu.cfs_period_us", f"{period}\n")


def test_memory_available_is_what_the_kernel_says(machine):
    assert config.memory_available(machine.root) == 8 << 30


def test_memory_available_says_when_the_kernel_does_not(machine):
    machine.write("proc/meminfo", "MemTotal: 1 kB\n")
    with pytest.raises(OSError, match="MemAvailable"):
        config.memory_available(machine.root)


class TestHeadroom:
    def test_none_without_control_groups(self, machine):
        assert config.cgroup_headroom(machine.root) is None

    @pytest.mark.parametrize(("v2", "limit"), [(True, "max"), (False, 9223372036854771712)])
    def test_none_without_a_limit(self, machine, v2, limit):
        top = machine.hierarchy("/a", v2=v2, controllers="memory")
        machine.memory(f"{top}/a", limit, 5 * MIB, v2=v2)
        assert config.cgroup_headroom(machine.root) is None

    @pytest.mark.parametrize("v2", [True, False])
    def test_inactive_file_pages_count_as_free(self, machine, v2):
        top = machine.hierarchy("/a", v2=v2, controllers="memory")
        machine.memory(f"{top}/a", 100 * MIB, 70 * MIB, 20 * MIB, v2=v2)
        assert config.cgroup_headroom(machine.root) == 50 * MIB

    @pytest.mark.parametrize("v2", [True, False])
    def test_never_negative(self, machine, v2):
        top = machine.hierarchy("/a", v2=v2, controllers="memory")
        machine.memory(f"{top}/a", 100 * MIB, 130 * MIB, v2=v2)
        assert config.cgroup_headroom(machine.root) == 0

    @pytest.mark.parametrize("v2", [True, False])
    @pytest.mark.parametrize("tightest", range(4))
    def test_every_ancestor_counts(self, machine, v2, tightest):
        top = machine.hierarchy("/a/b/c", v2=v2, controllers="cpu,memory")
        for depth, directory in enumerate([top, f"{top}/a", f"{top}/a/b", f"{top}/a/b/c"]):
            machine.memory(directory, (50 if depth == tightest else 100) * MIB, 10 * MIB, v2=v2)
        assert config.cgroup_headroom(machine.root) == 40 * MIB

    def test_hybrid_takes_the_least_of_both_versions(self, machine):
        v1 = machine.hierarchy("/x", v2=False, controllers="memory")
        v2 = machine.hierarchy("/y", v2=True, mount_point="/sys/fs/cgroup/unified")
        machine.memory(f"{v1}/x", 100 * MIB, 10 * MIB, v2=False)
        machine.memory(f"{v2}/y", 80 * MIB, 10 * MIB, v2=True)
        assert config.cgroup_headroom(machine.root) == 70 * MIB

    def test_other_controllers_do_not_count(self, machine):
        top = machine.hierarchy("/a", v2=False, controllers="pids")
        machine.memory(f"{top}/a", 100 * MIB, 10 * MIB, v2=False)
        assert config.cgroup_headroom(machine.root) is None

    @pytest.mark.parametrize("group", ["/docker/id", "/docker/id/inner"])
    def test_container_sees_its_subtree_as_root(self, machine, group):
        top = machine.hierarchy(group, v2=False, controllers="memory", mount_root="/docker/id")
        machine.memory(top, 60 * MIB, 10 * MIB, v2=False)
        assert config.cgroup_headroom(machine.root) == 50 * MIB

    def test_group_outside_the_visible_subtree(self, machine):
        top = machine.hierarchy("/../other", v2=True)
        machine.memory(top, 60 * MIB, 10 * MIB, v2=True)
        assert config.cgroup_headroom(machine.root) == 50 * MIB

    def test_mount_point_with_a_space(self, machine):
        machine.hierarchy("/a", v2=True, mount_point="/odd\\040place")
        machine.memory("odd place/a", 60 * MIB, 10 * MIB, v2=True)
        assert config.cgroup_headroom(machine.root) == 50 * MIB

    def test_a_process_that_was_moved_is_seen_in_its_new_group(self, machine):
        top = machine.hierarchy("/a", v2=True)
        machine.memory(f"{top}/a", 60 * MIB, 10 * MIB, v2=True)
        machine.memory(f"{top}/b", 90 * MIB, 10 * MIB, v2=True)
        assert config.cgroup_headroom(machine.root) == 50 * MIB
        machine.write("proc/self/cgroup", "0::/b\n")
        assert config.cgroup_headroom(machine.root) == 80 * MIB


class TestBudget:
    def test_a_quarter_of_what_is_available(self, machine):
        assert config.default_budget(machine.root) == 2 << 30

    def test_a_quarter_of_the_headroom_when_that_is_less(self, machine):
        top = machine.hierarchy("/a", v2=True)
        machine.memory(f"{top}/a", 1023 * MIB, 10 * MIB, v2=True)
        assert config.default_budget(machine.root) == 252 * MIB  # 253.25, whole extents of 2 MiB

    def test_never_below_the_minimum(self, machine):
        top = machine.hierarchy("/a", v2=True)
        machine.memory(f"{top}/a", 10 * MIB, 10 * MIB, v2=True)
        assert config.default_budget(machine.root) == 16 * MIB


class TestWorkers:
    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch):
        monkeypatch.delenv("SHMENGINE_WORKERS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))

    def test_affinity(self, machine):
        assert config.default_workers(machine.root) == 8

    @pytest.mark.parametrize("v2", [True, False])
    @pytest.mark.parametrize(
        ("quota", "workers"), [(100_000, 1), (150_000, 2), (200_000, 2), (10_000, 1), (5_000_000, 8), (-1, 8)]
    )
    def test_quota_is_rounded_up(self, machine, v2, quota, workers):
        top = machine.hierarchy("/a", v2=v2, controllers="cpu,cpuacct")
        machine.cpu(f"{top}/a", "max" if v2 and quota < 0 else quota, 100_000, v2=v2)
        assert config.default_workers(machine.root) == workers

    @pytest.mark.parametrize("v2", [True, False])
    def test_ancestors_count(self, machine, v2):
        top = machine.hierarchy("/a/b", v2=v2, controllers="cpu")
        machine.cpu(f"{top}/a", 300_000, 100_000, v2=v2)
        machine.cpu(f"{top}/a/b", 600_000, 100_000, v2=v2)
        assert config.default_workers(machine.root) == 3

    def test_environment_overrides(self, machine, monkeypatch):
        monkeypatch.setenv("SHMENGINE_WORKERS", " 17 ")
        assert config.default_workers(machine.root) == 17

    @pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "\N{SUPERSCRIPT TWO}"])
    def test_environment_with_rubbish_is_an_error(self, monkeypatch, value):
        monkeypatch.setenv("SHMENGINE_WORKERS", value)
        with pytest.raises(ValueError, match="SHMENGINE_WORKERS must be an integer"):
            config.default_workers()


def test_thread_limits_name_every_library():
    environment = config.thread_limit_environment(3)
    assert set(environment.values()) == {"3"}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"} <= set(
        environment
    )
    with pytest.raises(ValueError, match="at least 1"):
        config.thread_limit_environment(0)


def test_shm_free(tmp_path):
    assert config.shm_free() > 0
    assert config.shm_free(str(tmp_path / "missing")) == 0


def test_this_machine():
    assert 1 <= config.default_workers() <= (os.cpu_count() or 1)
    assert config.memory_available() > 0
    assert config.default_budget() % (2 * MIB) == 0


def test_a_real_limit_is_seen():
    with memory_cgroup(256 * MIB) as group:
        result = run_script(
            """
            from shmengine import config
            print(config.cgroup_headroom(), config.default_budget())
            """,
            prefix=group.prefix,
            check=True,
        )
    headroom, budget = map(int, result.stdout.split())
    assert 128 * MIB < headroom < 256 * MIB
    assert 32 * MIB <= budget <= 64 * MIB
