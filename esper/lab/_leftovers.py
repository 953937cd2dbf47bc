"""Processes of a lab that are written down, so that another process can end them."""

import json
import signal
from collections.abc import Mapping

from esper.lab._errors import LabError
from esper.lab._folder import LabFolder, write_whole
from esper.lab._process import ProcessMark, wait_until_gone


def write_processes(folder: LabFolder, processes: Mapping[str, ProcessMark]) -> None:
    """Write down which processes there are."""
    data = {name: mark.to_data() for name, mark in processes.items()}
    write_whole(folder.processes, json.dumps(data, indent=2) + "\n")


def read_processes(folder: LabFolder) -> dict[str, ProcessMark]:
    """The processes that are written down and alive.

    Raises:
        LabError: where the file is damaged.
    """
    try:
        data = json.loads(folder.processes.read_text(encoding="utf-8"))
        marks = {str(name): ProcessMark.of_data(mark) for name, mark in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"{folder.processes} is damaged ({error}), so that it is not known which processes are"
            f" left: see `ps x` for those that name {folder.root}, end them, and remove the file"
        ) from error
    return {name: mark for name, mark in marks.items() if mark.alive}


def end_leftovers(folder: LabFolder, patience: float = 20.0) -> list[str]:
    """End what a lab left behind whose supervisor was killed; the names of what there was.

    They were told to end when the supervisor died, and get time for that; then they are told once
    more; then they are killed.
    """
    left = read_processes(folder)
    marks = list(left.values())
    for number in (None, signal.SIGINT, signal.SIGKILL):
        if number is not None:
            for mark in marks:
                # SIGTERM would have PostgreSQL wait for its clients.
                (mark.signal_group if number == signal.SIGKILL else mark.signal)(number)
        marks = wait_until_gone(marks, patience)
        if not marks:
            break
    if marks:
        raise LabError(
            f"processes {', '.join(str(mark.pid) for mark in marks)} of the lab in {folder.root}"
            " do not end, not even killed: the disk or the machine hangs"
        )
    folder.processes.unlink(missing_ok=True)
    return sorted(left)
