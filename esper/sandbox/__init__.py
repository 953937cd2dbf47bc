"""A function in a child process that cannot do more than compute, and not for ever.

    outcome = run("package.module:function", b"payload", limits=Limits(wall_seconds=10))

The child imports the function's module, restricts itself, and only then reads the payload.
Bytes go in and bytes come out; nothing is pickled. `outcome` tells whether it finished, raised,
reached a limit or died, and which protections were in force: not every kernel has all of them.
"""

from esper.sandbox._limits import Limit, Limits, Outcome, Protections, Status, signal_name
from esper.sandbox._run import run

__all__ = ["Limit", "Limits", "Outcome", "Protections", "Status", "run", "signal_name"]
