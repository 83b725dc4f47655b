"""Results as tables: on the console, in Markdown, in JSON."""

import json
import logging
import math
import os
import pathlib

import numpy as np

from score_lib.disk.files import atomic_write, write_text

# Of a folder of results.
REPORTS = "report.json", "report.md"


def write_report(folder: str | os.PathLike, records: list[dict]) -> None:
    """Write `report.json` and `report.md`, and show the table on the console.

    Figures that are not finite, such as the error of one example, are null in JSON, which has no
    other word for them.

    Args:
        records: rows; their keys are columns.
    """
    folder = pathlib.Path(folder)
    text = json.dumps(_plain(records), indent=2, allow_nan=False)
    write_text(folder / REPORTS[0], text + "\n")
    table = markdown_table(records)
    write_text(folder / REPORTS[1], table)
    logging.info("report in %s\n%s", folder / REPORTS[1], table)


def _plain(value: object) -> object:
    """A record, or a part of one, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(records: list[dict]) -> str:
    """Rows as a Markdown table that can also be read as it is; a value with a standard error is
    written as value ± error, and tables inside the table are left out."""
    values = {key: value for record in records for key, value in record.items()}
    columns = [c for c in values if not c.endswith(_ERROR) and not isinstance(values[c], dict)]
    rows = [[_cell(record, column) for column in columns] for record in records]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean of a quantity over examples and the standard error of that mean."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {name: float(values.mean()), name + _ERROR: float(error)}


_ERROR = "_standard_error"


def _cell(record: dict, column: str) -> str:
    value, error = record.get(column, ""), record.get(column + _ERROR)
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def save_histogram(path: str | os.PathLike, values, label: str) -> None:
    """Draw a histogram of values as PNG."""
    figure = new_figure(5, 3)
    axes = figure.add_subplot(xlabel=label, ylabel="examples")
    axes.hist(values, bins=40)
    axes.set_title(f"mean {sum(values) / len(values):.4f}")
    save_figure(path, figure)


def new_figure(width: float, height: float):
    """An empty Matplotlib figure of this size in inches, which belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path: str | os.PathLike, figure) -> None:
    """Write a Matplotlib figure as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_write(path) as file:
        FigureCanvasAgg(figure).print_png(file)
