"""Processes that are forked from this warm one, killed at any moment, and replaced.

A *role* (a producer, a consumer) is played by one *life* after the other; lives are numbered from 0.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from tests.helpers.leftovers import describe_process
from tests.soak.report import Report

HANG_SECONDS = 60.0
"""Without any progress for so long, something hangs."""


class Participants:
    """All roles of a round.

    Parameters
    ----------
    roles : sequence of callables
        ``roles[i](life)`` is what a life of role i does; it returns when it is told to.
    report : Report
        Where kills, and what goes wrong, are counted.
    """

    def __init__(self, roles: Sequence[Callable[[int], None]], report: Report) -> None:
        self.roles = roles
        self.report = report
        self.births = 0
        self.deaths = [0] * len(roles)
        self.pids: dict[int, int] = {}  # by role
        for role in range(len(roles)):
            self.begin(role)

    def begin(self, role: int) -> None:
        """Let a new life play a role."""
        life, self.births = self.births, self.births + 1
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self.pids[role] = pid
            return
        code = 1
        try:
            faulthandler.enable(2)
            self.roles[role](life)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def kill(self, role: int) -> None:
        """SIGKILL, at whatever it is doing; it must not have ended by itself."""
        pid = self.pids.pop(role)
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL:
            self.report.kills += 1
            self.deaths[role] += 1
        else:
            self.report.failures.append(f"a life of role {role} ended by itself, with code {code}")

    def torment(
        self,
        rng: random.Random,
        every: float,
        goes_on: Callable[[], bool],
        progress: Callable[[], int],
        *,
        at_once: int = 1,
        stops: bool = False,
    ) -> bool:
        """Kill and replace while `goes_on`; False if all progress ended meanwhile.

        Parameters
        ----------
        rng
            Chooses the victims.
        every
            Seconds from one kill to the next.
        progress
            A number that changes as long as things go on.
        at_once
            Victims of one kill.
        stops
            Whether others are stopped meanwhile, and sleep through death and replacement.
        """
        tick = time.monotonic()
        seen, seen_at = progress(), tick
        while goes_on():
            tick = max(tick + every, time.monotonic())
            time.sleep(max(tick - time.monotonic(), 0.0))
            victims = rng.sample(range(len(self.roles)), at_once)
            stopped = [] if not stops else [role for role in self.pids if role not in victims][:1]
            for role in stopped:
                os.kill(self.pids[role], signal.SIGSTOP)
            for role in victims:
                self.kill(role)
            for role in victims:
                self.begin(role)
            for role in stopped:
                os.kill(self.pids[role], signal.SIGCONT)
            now = progress()
            if now != seen:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > HANG_SECONDS:
                self.end_all("no progress")
                return False
        return True

    def finish(self, roles: Iterable[int]) -> bool:
        """Wait for roles that were told to end; False if one does not."""
        end = time.monotonic() + HANG_SECONDS
        for role in roles:
            pid = self.pids[role]
            while (waited := os.waitpid(pid, os.WNOHANG)) == (0, 0):
                if time.monotonic() > end:
                    self.end_all(f"role {role} does not end")
                    return False
                time.sleep(0.001)
            del self.pids[role]
            if code := os.waitstatus_to_exitcode(waited[1]):
                self.report.failures.append(f"role {role} ended with code {code}")
        return True

    def end_all(self, why: str) -> None:
        """It hangs: say who is where, and kill everybody."""
        lines = [f"role {role}: {describe_process(pid)}" for role, pid in self.pids.items()]
        self.report.hung += 1
        self.report.failures.append("\n".join([f"{why}:", *lines]))
        for number in (signal.SIGCONT, signal.SIGABRT):  # at which faulthandler writes their stacks
            for pid in self.pids.values():
                os.kill(pid, number)
        time.sleep(1.0)
        for role in list(self.pids):
            os.kill(self.pids[role], signal.SIGKILL)
            os.waitpid(self.pids.pop(role), 0)
