"""Counts of a campaign, printed at the end of a run of pytest, also where it failed or was cut."""

import os
import signal

import pytest

from tests.campaign.judging import TOTAL


def pytest_configure(config):
    """Let `timeout` and a runner's SIGTERM end the run as Ctrl-C does, with its summary."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def pytest_sessionfinish(session):
    """Send the counts of a process of pytest-xdist home."""
    if (home := getattr(session.config, "workeroutput", None)) is not None:
        counts = [[*key, number] for key, number in TOTAL.counts.items()]
        home["campaign"] = {"counts": counts, "faults": TOTAL.faults}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Add them to those of the others."""
    sent = getattr(node, "workeroutput", {}).get("campaign", {"counts": [], "faults": []})
    for *key, number in sent["counts"]:
        TOTAL.counts[tuple(key)] += number
    TOTAL.faults.extend(sent["faults"])


def pytest_terminal_summary(terminalreporter):
    if TOTAL.counts:
        terminalreporter.section("campaign")
        terminalreporter.write_line(TOTAL.table())
        for fault in TOTAL.faults:
            terminalreporter.write_line(f"fault: {fault}")
