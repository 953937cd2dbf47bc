"""Bring the studies' tables and plots into `docs/studies.md`, from their results files.

Of a study without results, or with those of a `--quick` run, the page goes on to say what it said.

    python -m experiments.studies.docs [runs/studies] [--page docs/studies.md]
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper._files import write_atomically
from esper.errors import InputError
from experiments.studies._study import PLOT, RESULTS, SCHEMA_VERSION, Table, markdown

PAGE = Path("docs/studies.md")
NOT_RUN = "Not run yet."
_PLACE = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(page: Path, folder: Path) -> list[str]:
    """Fill the marked places of a page, and copy plots into the folder of the page's own name.

    A place of a study without results keeps what it has, as studies are run one at a time.

    Returns:
        The studies that were filled in.

    Raises:
        InputError: where the page or a results file cannot be read; nothing is written.
    """
    try:
        text = page.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the page {page} cannot be read: {error}; give --page") from error
    found: dict[str, tuple[str, bytes]] = {}
    for place in _PLACE.finditer(text):
        name = place[2]
        if (content := read_results(folder / name / RESULTS, name)) is not None:
            found[name] = (_section(page, name, content), (folder / name / PLOT).read_bytes())
    if not _PLACE.search(text):
        raise InputError(
            f"the page {page} has no place for results: expected `<!-- results: NAME -->` and"
            " `<!-- end -->` on lines of their own"
        )

    def filled(place: re.Match[str]) -> str:
        body = found[place[2]][0] if place[2] in found else place[3].strip() or NOT_RUN
        return f"{place[1]}\n{body}\n\n{place[4]}"

    plots = page.with_suffix("")
    for name, (_, plot) in found.items():
        plots.mkdir(exist_ok=True)
        write_atomically(plots / f"{name}.svg", plot)
    write_atomically(page, _PLACE.sub(filled, text).encode())
    return list(found)


def read_results(path: Path, name: str) -> dict[str, Any] | None:
    """What a study found; None where it has not been run, but for a quick look.

    Raises:
        InputError: for a file that is no such results.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != SCHEMA_VERSION or content["study"] != name:
            raise InputError(
                f"{path} cannot be used: expected results of {name!r} in schema version"
                f" {SCHEMA_VERSION}, got those of {content['study']!r} in version"
                f" {content['schema_version']}; run the study again"
            )
        return None if content["quick"] else content
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as a study's results ({error!r}); run the study again"
        ) from error


def _section(page: Path, name: str, content: dict[str, Any]) -> str:
    own = content["table"]
    table = Table(tuple(own["columns"]), tuple(tuple(row) for row in own["rows"]))
    machine = content["machine"]
    versions = ", ".join(f"{package} {v}" for package, v in sorted(machine["versions"].items()))
    system = f"{machine['platform'].partition('-')[0]} on {machine['processor']}"
    where = f"{system}, {machine['cores']} cores, Python {machine['python']}"
    parts = [markdown(table), *content["notes"], f"Measured on {where}; {versions}."]
    return "\n\n".join([*parts, f"![The results of {name}]({page.stem}/{name}.svg)"])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for a page or results that cannot be used."""
    parser = argparse.ArgumentParser(prog="experiments.studies.docs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/studies"))
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(argv)
    try:
        names = fill(given.page, given.folder)
    except (InputError, OSError) as error:
        print(f"experiments.studies.docs: {error}", file=sys.stderr)
        return 2
    print(f"{given.page}: {', '.join(names) or 'no results yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
