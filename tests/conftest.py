"""A limit on every test, so that one that waits for ever ends the run, and says where it stood."""

import faulthandler
import os

import pytest

LIMIT, SLOW_LIMIT = 300, 1500
"""Seconds; the longest tests take a fifth of it on two quiet cores."""


def pytest_configure(config):
    config.watchdog_file = os.fdopen(os.dup(2), "w")  # output is captured later


def pytest_unconfigure(config):
    config.watchdog_file.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    limit = SLOW_LIMIT if item.get_closest_marker("slow") else LIMIT
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.watchdog_file)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
