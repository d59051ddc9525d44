"""What importing costs and exposes."""

import subprocess
import sys

import torch_eft


def test_importing_the_package_loads_neither_lightning_nor_tensorboard_nor_matplotlib():
    program = (
        "import sys, torch_eft, torch_eft.theory, torch_eft.measure\n"
        "heavy = {'lightning', 'pytorch_lightning', 'tensorboard', 'matplotlib', 'sklearn', 'functorch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    packages = (torch_eft.theory, torch_eft.measure, torch_eft.live, torch_eft.callbacks, torch_eft.tensorboard)
    for package in (torch_eft, *packages):
        for name in package.__all__:
            assert getattr(getattr(package, name), "__doc__", None), f"{package.__name__}.{name}"


def test_the_wings_do_not_know_each_other_nor_lightning():
    """theory imports no measure, no nn.Module and no Lightning; measure imports no Lightning, no callbacks."""
    import pathlib
    import re

    root = pathlib.Path(torch_eft.__file__).parent

    def imports(folder):
        for file in (root / folder).rglob("*.py"):
            for line in file.read_text().splitlines():
                if re.match(r"\s*(from|import) ", line):
                    yield file.name, line

    for file, line in imports("theory"):
        assert not re.search(r"lightning|measure|callbacks|tensorboard|from torch import .*nn", line), (file, line)
    for file, line in imports("measure"):
        assert not re.search(r"lightning|callbacks|tensorboard", line), (file, line)
    for file, line in imports("tensorboard"):
        assert not re.search(r"lightning|callbacks", line), (file, line)
    for file, line in imports("live"):
        assert not re.search(r"lightning|callbacks", line), (file, line)
