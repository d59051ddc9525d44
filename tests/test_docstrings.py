"""Examples in docstrings run, and every public name has one."""

import doctest
import importlib
import pkgutil
import warnings

import pytest
import torch

import torch_eft

MODULES = sorted(module.name for module in pkgutil.walk_packages(torch_eft.__path__, "torch_eft."))
ROOMS = ("theory", "measure", "live", "callbacks", "tensorboard", "diagnosis")
PUBLIC = ["torch_eft", *(f"torch_eft.{room}" for room in ROOMS)]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    if not tests:
        return
    monkeypatch.chdir(tmp_path)  # what an example writes is not left behind
    for test in tests:
        torch.manual_seed(0)
        lines: list[str] = []
        with warnings.catch_warnings(record=True):  # of no interest here; an example may look at its own
            warnings.simplefilter("always")
            failed = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append).failed
        assert not failed, "".join(lines)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_example(package):
    module = importlib.import_module(package)
    lacking = []
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) and not getattr(value, "__module__", "").startswith("typing"):
            text = value.__doc__ or ""
            if "Example:" not in text or ">>>" not in text:
                lacking.append(name)
    assert not lacking, f"{package}: {', '.join(lacking)}"
