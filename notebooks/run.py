"""Execute notebooks in place, each from a fresh kernel, as `make notebooks` does.

    python -m notebooks.run               # all
    python -m notebooks.run tour          # one of them

What differs between machines, such as the version of Python, is left out of the files.
"""

import argparse
import pathlib
import time
from collections.abc import Mapping

import nbclient
import nbformat

from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.files import write_text

FOLDER = pathlib.Path(__file__).parent
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(
    path: pathlib.Path, parameters: Mapping[str, object] | None = None, last_cell: str = ""
) -> nbformat.NotebookNode:
    """A notebook with the outputs of a fresh kernel that runs in the notebook's folder.

    Args:
        parameters: values for names that the cell tagged `parameters` sets.
        last_cell: code to execute in the end.
    Raises:
        ValueError: that cell does not set such a name.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        _insert_parameters(notebook, parameters)
    if last_cell:
        notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(_METADATA)
    return notebook


def _insert_parameters(notebook: nbformat.NotebookNode, parameters: Mapping[str, object]) -> None:
    """Set parameters in a cell of their own, below the one that is tagged."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in _tags(cell)]
    known = notebook.cells[tagged[0]].source if tagged else ""
    unknown = [name for name in parameters if f"\n{name} = " not in f"\n{known}"]
    if unknown:
        raise ValueError(f"the cell tagged 'parameters' does not set {', '.join(unknown)}")
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell("\n".join(lines)))


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def main() -> None:
    """Execute the named notebooks, or all, and write them with their outputs."""
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of notebooks: {', '.join(names)}")
    for name in parser.parse_args().names or names:
        path, start = FOLDER / f"{name}.ipynb", time.perf_counter()
        write_text(path, nbformat.writes(executed(path)) + "\n")
        seconds, size = time.perf_counter() - start, path.stat().st_size / 1000
        print(f"{path.name}: {seconds:.0f} s, {size:.0f} kB")


if __name__ == "__main__":
    with brief_mistakes():
        main()
