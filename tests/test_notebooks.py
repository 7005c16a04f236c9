"""The notebooks run from the first cell to the last, and their committed outputs are small."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")


# Of a notebook: what it says, and the same of fewer steps and rows. No cell needs a model that has learned.
SMALL = {
    "extend": {"steps=150": "steps=12", "[:32]": "[:2]", "max_new_tokens=24": "max_new_tokens=4"},
    "own_mixer": {"steps=60": "steps=12", "max_new_tokens=24": "max_new_tokens=4"},
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    for said, small in SMALL.get(path.stem, {}).items():
        (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and said in cell.source]
        cell.source = cell.source.replace(said, small)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()  # raises CellExecutionError with the cell and its traceback


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < 60_000
    assert "/tmp/" not in path.read_text() and "/home/" not in path.read_text()
