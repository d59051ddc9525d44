"""The notebooks under examples/ hold their pictures, and their code runs as it stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["attach_and_read", "one_over_n", "your_own_mlp"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_in_it_and_no_error_is(path):
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output["output_type"] == "error" for output in outputs)
    assert all(cell["execution_count"] == index for index, cell in enumerate(cells(path), 1))  # run once, in order
    assert str(Path.home()) not in path.read_text() and "/tmp/" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path)))
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 1200}
    environment = {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env={**os.environ, **environment}, **options)
    assert done.returncode == 0, done.stderr[-3000:]
