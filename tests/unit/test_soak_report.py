"""The soak's account sees what it is there to see."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.soak.commands import command
from tests.soak.ledger import WORDS, Ledger, read_message, write_message
from tests.soak.report import Report


def entry(life, number, attempts=0):
    frame = np.empty(WORDS + 3, "u8")
    write_message(frame, life, number)
    return read_message(frame, attempts)


def settled(entries, sent=(3, 2), deaths=0):
    ledger = Ledger(consumers=2, lives=5, arrivals=20)
    for life, count in enumerate(sent):
        ledger.sent[life] = count
    for i, each in enumerate(entries):
        role = i % 2
        ledger.logs[role][ledger.cursors[role]] = each
        ledger.cursors[role] += 1
    report = Report()
    ledger.settle(births=2, consumer_deaths=deaths, report=report)
    return report


ALL = [entry(0, 0), entry(0, 1), entry(0, 2), entry(1, 0), entry(1, 1)]


def test_an_account_that_adds_up():
    assert settled(ALL) == Report(messages=5)
    assert settled([*ALL, entry(1, 2)]) == Report(messages=6)  # its commit never returned
    assert settled([*ALL, entry(1, 1, attempts=1)], deaths=1) == Report(messages=5, redelivered=1)


@pytest.mark.parametrize(
    ("entries", "deaths", "found"),
    [
        (ALL[1:], 0, {"lost": 1}),
        ([*ALL, ALL[2]], 0, {"duplicated": 1}),
        ([*ALL, entry(1, 1, attempts=1)], 0, {"duplicated": 1}),
        ([*ALL, entry(1, 1, attempts=1), entry(1, 1, attempts=1)], 2, {"duplicated": 1}),
        ([*ALL, entry(1, 3)], 0, {"wrong": 1}),
        ([*ALL, entry(2, 0)], 0, {"wrong": 1}),
    ],
)
def test_an_account_that_does_not(entries, deaths, found):
    report = settled(entries, deaths=deaths)
    assert not report.passed
    counts = report.as_dict()
    for name in ("lost", "duplicated", "wrong"):
        assert counts[name] == found.get(name, 0)


def test_a_torn_message_is_seen():
    for at in range(WORDS + 3):
        frame = np.empty(WORDS + 3, "u8")
        write_message(frame, 1, 1)
        frame[at] += 1
        assert settled([*ALL, read_message(frame, 0)]).wrong == 1


def test_commands_report_and_fail():
    say = "print('report {{\"kills\": 2, \"lost\": 1}}'); import os; print(os.environ['SHMENGINE_SOAK_SEED'])"
    report = command(sys.executable, "-c", say)(1, 5)
    assert report == Report(kills=2, lost=1)
    assert not report.passed
    report = command(sys.executable, "-c", "print('oops {seed} {seconds}'); exit(3)")(2, 5)
    assert "exit code 3\noops 5 2" in report.failures[0]
    assert not report.passed
