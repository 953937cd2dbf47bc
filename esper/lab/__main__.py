"""`python -m esper.lab`."""

from esper.lab._command import app

app(prog_name="python -m esper.lab")
