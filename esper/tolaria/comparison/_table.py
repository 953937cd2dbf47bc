"""Verdicts and outcomes as files for spreadsheets and programs."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from esper.errors import EsperError
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._verdict import Verdict

SCHEMA_VERSION = 1
"""1: verdicts and outcomes, fields as in `Verdict` and `Outcome`; what is not finite as text."""


class _Content(BaseModel):
    """What `table.json` holds."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    schema_version: int
    verdicts: tuple[Verdict, ...]
    outcomes: tuple[Outcome, ...]


def table_json(verdicts: Sequence[Verdict], outcomes: Sequence[Outcome]) -> bytes:
    """All that is known, without loss; `read_table` gives it back."""
    content = _Content.model_construct(
        schema_version=SCHEMA_VERSION, verdicts=tuple(verdicts), outcomes=tuple(outcomes)
    )
    return (content.model_dump_json(indent=1) + "\n").encode()


def read_table(path: Path) -> tuple[tuple[Verdict, ...], tuple[Outcome, ...]]:
    """The verdicts and outcomes of a `table.json`.

    Raises:
        EsperError: where it cannot be read, or is of another schema version.
    """
    try:
        data = path.read_bytes()
        version = json.loads(data)["schema_version"]
        if version != SCHEMA_VERSION:
            raise EsperError(
                f"{path} has schema version {version}, this Esper reads {SCHEMA_VERSION}: use the"
                " Esper that wrote it"
            )
        content = _Content.model_validate_json(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsperError(
            f"{path} cannot be read as the table of a comparison: expected `schema_version`,"
            f" `verdicts` and `outcomes` ({error}); write it again from the runs"
        ) from error
    return content.verdicts, content.outcomes


def table_csv(verdicts: Sequence[Verdict]) -> bytes:
    """A row for each budget and arm: what its runs came to, and the treatment beside it."""
    rows: list[dict[str, Any]] = []
    for verdict in verdicts:
        design = verdict.design
        pairs = {pair.control: pair for pair in verdict.pairs}
        for arm in verdict.arms:
            row = {
                "budget": design.budget,
                "metric": design.metric,
                **dataclasses.asdict(arm),
                "role": "treatment" if arm.arm == design.treatment else "control",
                "verdict": "no verdict" if verdict.refused else "",
            }
            if pair := pairs.get(arm.arm):
                row |= {
                    "verdict": pair.word.value,
                    "n": len(pair.differences),
                    **{name: getattr(pair, _FIELDS.get(name, name)) for name in _PAIR_COLUMNS},
                }
            rows.append(row)
    return _csv([*_ARM_COLUMNS, *_PAIR_COLUMNS], rows)


def differences_csv(verdicts: Sequence[Verdict]) -> bytes:
    """A row for each budget, control and seed: treatment minus control."""
    rows = [
        {
            "budget": verdict.design.budget,
            "metric": verdict.design.metric,
            "treatment": verdict.design.treatment,
            "control": pair.control,
            "seed": seed,
            "difference": difference,
        }
        for verdict in verdicts
        for pair in verdict.pairs
        for seed, difference in zip(verdict.design.seeds, pair.differences, strict=True)
    ]
    return _csv(["budget", "metric", "treatment", "control", "seed", "difference"], rows)


_ARM_COLUMNS = [
    "budget", "metric", "arm", "role", "runs", "mean", "median", "interquartile_mean", "least",
    "greatest", "parameters", "steps", "training_flops", "kept", "removed", "compilations",
    "seconds", "verdict", "n",
]  # fmt: skip
_PAIR_COLUMNS = [
    "mean_difference", "median_difference", "spread", "low", "high", "inner_low", "inner_high", "p",
    "p_holm", "p_equivalent", "p_equivalent_holm", "d_z", "superiority", "power", "minimal_effect",
    "seeds_needed",
]  # fmt: skip

_FIELDS = {"mean_difference": "mean", "median_difference": "median"}
"""Columns that are called otherwise in `Pair`, because arms have them too."""


def _csv(columns: list[str], rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if v is None else v for key, v in row.items()} for row in rows)
    return text.getvalue().encode()
