"""Studies: what growth does, measured; one script for each question.

`docs/studies.md` says what each asks, and how it is run.
"""
