"""A comparison's files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from esper._files import sync
from esper.errors import InputError
from esper.tolaria.comparison._figures import (
    draw_differences,
    draw_flops,
    draw_parameters,
    draw_steps,
)
from esper.tolaria.comparison._latex import table_tex
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._page import page
from esper.tolaria.comparison._render import Drawing, render
from esper.tolaria.comparison._table import differences_csv, table_csv, table_json
from esper.tolaria.comparison._verdict import Verdict


def write_comparison(
    folder: Path, verdicts: Iterable[Verdict], outcomes: Iterable[Outcome]
) -> None:
    """Write tables, figures and the report of a comparison; a refused one says so in all of them.

    `table.csv`, `table.json` (all there is; see `read_table`), `table.tex`, `differences.csv`,
    `report.html`, and for each budget, `equal-steps` or `equal-flops`, figures as `.svg` and
    `.png`: `BUDGET-differences`, and `BUDGET-accuracy-` over `steps`, `flops` and `parameters`.
    Equal verdicts and outcomes give equal bytes. All is made before the first file is touched,
    and what is there is replaced together; figures of these names that this comparison does not
    have are removed.

    Args:
        folder: made where it is not there.
        verdicts: one for each budget.
        outcomes: of their runs.

    Raises:
        InputError: without a verdict, or with two of one budget; nothing is written.
        OSError: where the disk does not take it; what was there stays.
    """
    judged = list(verdicts)
    runs = sorted(outcomes, key=lambda o: (o.budget, o.arm, o.seed, o.folder))
    budgets = [verdict.design.budget for verdict in judged]
    if not judged or len(set(budgets)) < len(budgets):
        raise InputError(
            "the comparison cannot be written: expected one verdict for each budget, got"
            f" {', '.join(budgets) or 'none'}; judge each budget once"
        )
    drawings = {
        (verdict.design.budget, name): drawing
        for verdict in judged
        for name, drawing in _drawings(verdict, runs).items()
    }
    files = {
        "table.csv": table_csv(judged),
        "table.json": table_json(judged, runs),
        "table.tex": table_tex(judged),
        "differences.csv": differences_csv(judged),
        "report.html": page(judged, drawings, folder.absolute().name),
    }
    for (budget, name), drawing in drawings.items():
        files[f"equal-{budget}-{name}.svg"] = drawing.svg
        files[f"equal-{budget}-{name}.png"] = drawing.png
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, files)
    for budget in ("steps", "flops"):
        for name in _NAMES:
            for suffix in (".svg", ".png"):
                if (file := f"equal-{budget}-{name}{suffix}") not in files:
                    (folder / file).unlink(missing_ok=True)


_NAMES = ("differences", "accuracy-steps", "accuracy-flops", "accuracy-parameters")


def _drawings(verdict: Verdict, runs: list[Outcome]) -> dict[str, Drawing]:
    """The figures of one budget; a refused verdict has no differences to draw."""
    found = {
        "differences": None if verdict.refused else render(lambda: draw_differences(verdict)),
        "accuracy-steps": render(lambda: draw_steps(verdict, runs)),
        "accuracy-flops": render(lambda: draw_flops(verdict, runs)),
        "accuracy-parameters": render(lambda: draw_parameters(verdict, runs)),
    }
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace files by new content, none of them before all are on the disk."""
    partial = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, data in files.items():
            partial[name].write_bytes(data)
            sync(partial[name])
    except OSError:
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
    for name, path in partial.items():
        path.replace(folder / name)
    sync(folder)
