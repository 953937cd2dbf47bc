"""What a comparison is to run: written into its folder, so that it can be gone on with."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper._files import write_atomically
from esper.errors import InputError, RunFolderError
from esper.tolaria._config import Backend
from esper.tolaria.comparison._design import ARMS, Budget, Design, Metric
from esper.tolaria.tasks import DRAWN_BY_SEED

COMPARISON = "comparison.json"
_SCHEMA_VERSION = 1

_SET_BY_COMPARISON = ("task", "backend", "seed", "library", "max_training_flops")
"""Keys of a configuration that follow from what is asked for."""
_ENDS_EARLY = "early_stopping"
_AS_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Comparison(BaseModel):
    """A treatment and its controls, on one task."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: str
    backend: Backend = "jax"
    treatment: str = "heuristic"
    controls: tuple[str, ...] = ("static-small", "static-final", "scratch", "fixed", "random",
                                 "bandit")  # fmt: skip
    own_arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Arms besides Esper's, by name: the keys of a configuration in which each differs."""
    seeds: tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...] = tuple(range(16))
    """Of randomness: every arm is run once with each."""
    budgets: tuple[Budget, ...] = ("steps", "flops")
    metric: Metric = "test_accuracy"
    smallest_effect: float = 0.02
    """The least difference in the metric that would matter."""
    alpha: float = 0.05
    values: dict[str, Any] = Field(default_factory=dict)
    """Keys of a configuration that all arms share."""

    @model_validator(mode="after")
    def _consistent(self) -> "Comparison":
        known = [*ARMS, *self.own_arms]
        for arm in self.arms:
            if arm not in known:
                raise ValueError(
                    f"unknown arm {arm!r}: expected one of {', '.join(known)}, or one of your own"
                    f" by `own_arms`{_nearest(arm, known)}"
                )
        for arm, values in self.own_arms.items():
            self._check_own(arm, values)
        self._check_keys("all arms", self.values, ("controller", *_SET_BY_COMPARISON))
        if self.treatment in ("static-small", "static-final", "scratch"):
            raise ValueError(
                f"the treatment {self.treatment!r} does not grow: expected an arm that does, such"
                " as heuristic, bandit, random or fixed, or one of your own"
            )
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise ValueError("`budgets` must name steps, flops, or both, each once")
        return self

    def _check_own(self, arm: str, values: dict[str, Any]) -> None:
        if arm in ARMS:
            raise ValueError(f"the arm {arm!r} is Esper's own: give yours another name")
        if _AS_FOLDER.fullmatch(arm) is None:
            raise ValueError(
                f"the arm {arm!r} names a folder of runs: expected at most 64 letters, digits, and"
                " . _ - behind the first of them; rename it"
            )
        if arm not in self.arms:
            raise ValueError(
                f"the arm {arm!r} is neither the treatment nor a control: name it as one, or leave"
                " it out"
            )
        # Under equal steps, all arms have those of the treatment.
        self._check_keys(f"the arm {arm!r}", values, ("steps", *_SET_BY_COMPARISON))

    def _check_keys(self, whose: str, values: dict[str, Any], taken: Iterable[str]) -> None:
        for key in taken:
            if key in values:
                raise ValueError(
                    f"the keys of {whose} have {key!r}, which the comparison sets itself: leave it"
                    " out of the file"
                )
        if values.get(_ENDS_EARLY) is not None:
            raise ValueError(
                f"the keys of {whose} have {_ENDS_EARLY!r}, and arms that end where each likes are"
                " not comparable: leave it out of the file"
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """The treatment, and then the controls."""
        return (self.treatment, *self.controls)

    def design(self, budget: Budget) -> Design:
        """What is to be judged under one budget.

        Raises:
            InputError: for a design that cannot be judged.
        """
        return Design(
            treatment=self.treatment,
            controls=self.controls,
            seeds=self.seeds,
            smallest_effect=self.smallest_effect,
            metric=self.metric,
            budget=budget,
            task_by_seed=self.task.endswith(DRAWN_BY_SEED),
            alpha=self.alpha,
        )


def make_comparison(**values: Any) -> Comparison:
    """What is asked for, checked.

    Raises:
        InputError: naming every key that is unknown or out of range.
    """
    try:
        asked = Comparison.model_validate(values)
    except ValidationError as error:
        told = "; ".join(_told(e) for e in error.errors())
        raise InputError(f"the comparison is not valid: {told}") from error
    for budget in asked.budgets:
        asked.design(budget)
    return asked


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _told(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}{_nearest(where, Comparison.model_fields)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {error.get('input')!r}" if where else message


def write_asked(folder: Path, asked: Comparison) -> None:
    """Write what is asked for into a comparison's folder, or find that it is there.

    Raises:
        InputError: where the folder holds another comparison, or something else.
    """
    if (folder / COMPARISON).exists():
        held = read_asked(folder)
        if held != asked:
            differs = [
                name for name in Comparison.model_fields
                if getattr(held, name) != getattr(asked, name)
            ]  # fmt: skip
            raise InputError(
                f"the folder {folder} holds another comparison, of which {', '.join(differs)}"
                f" differ; go on with that one by --resume {folder}, or give another --out"
            )
        return
    # A partial file is what a full disk or a kill left of a comparison that was never begun.
    if folder.exists() and (
        not folder.is_dir() or any(entry.suffix != ".partial" for entry in folder.iterdir())
    ):
        raise InputError(
            f"the output folder {folder} is not empty and holds no comparison; give another --out"
        )
    content = {"schema_version": _SCHEMA_VERSION, "comparison": asked.model_dump(mode="json")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / COMPARISON, json.dumps(content, indent=1, sort_keys=True).encode()
        )
    except OSError as error:
        raise RunFolderError(
            f"the output folder {folder} cannot be written: {error}; give another --out"
        ) from error


def read_asked(folder: Path) -> Comparison:
    """What a comparison's folder was made for.

    Raises:
        RunFolderError: where it holds none, or one that this version cannot read.
    """
    path = folder / COMPARISON
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != _SCHEMA_VERSION:
            raise RunFolderError(
                f"{path} has schema version {content['schema_version']}, this Esper reads"
                f" {_SCHEMA_VERSION}: use the Esper that wrote it, or a newer one"
            )
        return Comparison.model_validate_json(json.dumps(content["comparison"]))
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} holds no comparison: there is no {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
