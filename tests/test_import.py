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
