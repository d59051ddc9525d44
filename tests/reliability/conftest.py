"""Everything here is marked ``reliability``; ``pytest -m reliability`` ends with a table of what was counted."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = {
    "test_isolation_bits": "configurations, the same bits with and without callbacks",
    "test_nasty_trainings": "configurations, the same bits with and without callbacks",
    "test_careless_controls": "controls that must differ, and do",
    "test_faults": "faults injected",
    "test_faults_around": "faults injected",
    "test_resume": "resume cases",
    "test_resume_forecasts": "resume cases",
    "test_theta_0": "resume cases",
    "test_distributed": "distributed cases",
    "test_sharded": "distributed cases",
    "test_derivatives": "derivative checks",
    "test_lightning_hazards": "what Lightning does behind a callback's back",
    "test_soak": "soak: a thousand measurements",
    "test_untrusted": "untrusted input",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.reliability)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("markexpr") != "reliability":
        return
    counts = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = KINDS.get(Path(report.nodeid.split("::")[0]).stem)
            if kind is not None and (report.when == "call" or outcome != "passed"):
                counts.setdefault(kind, {}).setdefault(outcome, 0)
                counts[kind][outcome] += 1
    terminalreporter.section("reliability")
    for kind in dict.fromkeys(KINDS.values()):
        found = counts.get(kind, {})
        others = "".join(f", {number} {name}" for name, number in found.items() if name != "passed")
        terminalreporter.write_line(f"{found.get('passed', 0):4d} passed{others}  {kind}")
