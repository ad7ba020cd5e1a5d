"""Execute a notebook with other values of its parameters, and write it with its outputs.

    run_notebook.py NOTEBOOK OUTPUT PARAMETERS     PARAMETERS: a JSON object, name -> value

The values are assigned in a cell after the one that is tagged `parameters`. Commands of the notebook run in the current
folder. If a cell fails, the outputs until then are written.
"""

import json
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_TIMEOUT = 1800  # seconds


def main() -> None:
    notebook_path, output_path, parameters = sys.argv[1:]
    notebook = nbformat.read(notebook_path, as_version=4)
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assignments = [f"{name} = {value!r}" for name, value in json.loads(parameters).items()]
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell("\n".join(assignments)))
    try:
        NotebookClient(notebook, timeout=CELL_TIMEOUT, coalesce_streams=True).execute(cwd=str(Path.cwd()))
    finally:
        nbformat.write(notebook, output_path)


if __name__ == "__main__":
    main()
