"""What ``KINDS`` names is marked ``reliability``; ``pytest -m reliability`` ends with a table of what was counted."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = {  # files here, or elsewhere among the tests
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
    "measure/forward/isolation/test_any_forward": "forwards that are more than their module",
    "measure/forward/isolation/test_no_trace": "configurations, the same bits with and without callbacks",
    "callbacks/test_steps": "steps, schedules and batches as they really are",
    "callbacks/test_training_data": "steps, schedules and batches as they really are",
    "callbacks/test_workers": "steps, schedules and batches as they really are",
    "live/config/test_schedule": "steps, schedules and batches as they really are",
    "callbacks/test_several_monitors": "results under one name told apart",
    "live/test_begin": "refusals in words, the training goes on",
    "measure/ensembles/test_learning_rates": "refusals in words, the training goes on",
    "live/instruments/test_step_check": "trainings that are not the theory's",
    "tensorboard/test_plugin": "damaged records that leave the others",
}


def _kind(path):
    """The kind of a file among the tests; None if it has none."""
    name = Path(path).with_suffix("").as_posix().partition("tests/")[2]
    return KINDS.get(name.removeprefix("reliability/"))


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents or _kind(item.nodeid.split("::")[0]) is not None:
            item.add_marker(pytest.mark.reliability)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("markexpr") != "reliability":
        return
    counts = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = _kind(report.nodeid.split("::")[0])
            if kind is not None and (report.when == "call" or outcome != "passed"):
                counts.setdefault(kind, {}).setdefault(outcome, 0)
                counts[kind][outcome] += 1
    terminalreporter.section("reliability")
    for kind in dict.fromkeys(KINDS.values()):
        found = counts.get(kind, {})
        others = "".join(f", {number} {name}" for name, number in found.items() if name != "passed")
        terminalreporter.write_line(f"{found.get('passed', 0):4d} passed{others}  {kind}")
