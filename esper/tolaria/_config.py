"""What a run is asked to do. Configuration stops here: builders get plain values."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esper.contracts import Sha256, Size
from esper.errors import InputError
from esper.tezzeret import blueprint_names
from esper.tolaria._tasks import TASKS
from esper_functional import Blend

Backend = Literal["jax", "torch"]
_Steps = Annotated[int, Field(ge=1, le=10_000_000)]


class InitialGraft(BaseModel):
    """A kernel that is there from step 0, at alpha 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    site: str
    seed: int = Field(ge=0)
    kernel: Sha256


class GrowConfig(BaseModel):
    """One run: a task, a backend, a seed, and how the network may grow."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: str
    backend: Backend
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Of the host's first weights, the batches and the choice of kernels."""

    steps: _Steps = 2_500
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples a step; null takes the whole training part."""
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-2, gt=0.0, le=10.0)

    seeds_per_layer: int = Field(default=4, ge=1, le=64)
    blend: Blend = "residual"
    grow_at: list[str] = Field(default_factory=lambda: ["layers.0"])
    """The host's layers in which kernels may be grafted, in order of preference."""
    blueprint: str = "residual_mlp"
    blueprint_sizes: dict[str, Size] = Field(default_factory=dict)
    """Values for the blueprint's named sizes."""
    variants: int = Field(default=8, ge=1, le=256)
    """Kernels of the blueprint, each with first parameters of its own, to choose from."""

    controller: Literal["heuristic", "none"] = "heuristic"
    initial_grafts: list[InitialGraft] = Field(default_factory=list)
    decide_every: _Steps = 50
    """Steps between decision boundaries, where losses are read and seeds may change."""
    loading_steps: _Steps = 20
    """Steps from the decision to graft to the graft: time to compile."""
    ramp_steps: _Steps = 100
    """Steps over which alpha goes from 0 to 1."""
    trial_steps: _Steps = 300
    """Steps at alpha 1 before a kernel's worth is measured."""
    patience: int = Field(default=2, ge=1, le=1_000)
    """Boundaries without improvement that make a plateau."""
    min_improvement: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Relative fall of the training loss per boundary that counts as improvement."""
    enough_loss: float = Field(default=0.01, ge=0.0)
    """Training loss below which nothing more is grafted."""
    min_worth: float = Field(default=0.0)
    """Rise of the validation loss without a kernel above which it is kept."""

    threads: int = Field(default=1, ge=1, le=256)
    """Threads of torch. Small hosts are slower with more, and a run repeats bit for bit only
    with the number it began with."""
    checkpoint_every: _Steps = 500
    library: Path | None = Field(default=None, strict=False)
    """Folder of the library; by default `library` beside the run folder."""

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        return _one_of("task", value, list(TASKS))

    @field_validator("blueprint")
    @classmethod
    def _known_blueprint(cls, value: str) -> str:
        return _one_of("blueprint", value, blueprint_names())

    @model_validator(mode="after")
    def _consistent(self) -> "GrowConfig":
        if not self.grow_at:
            raise ValueError("`grow_at` names no layer; leave it out for the first one")
        if self.controller == "heuristic" and self.initial_grafts:
            raise ValueError("`initial_grafts` are for runs with `controller: none`")
        places = [(graft.site, graft.seed) for graft in self.initial_grafts]
        if len(set(places)) != len(places):
            raise ValueError("`initial_grafts` name one seed of one layer twice")
        return self


def _one_of(what: str, value: str, known: list[str]) -> str:
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}{hint}")


TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "spirals": {},
    "digits": {"steps": 1_500, "batch_size": 64, "min_improvement": 0.05, "enough_loss": 0.03},
}
"""What differs from `GrowConfig`'s own defaults, by task."""


def _explain(error: Any, given: dict[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        near = difflib.get_close_matches(key, GrowConfig.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {where!r}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith(("unknown ", "`")):
        return message
    if where == "backend":
        return _backend_message(given.get("backend"))
    given_value = error.get("input")
    hint = ""
    if error["type"] == "float_type" and isinstance(given_value, str):
        hint = " (a string in YAML 1.1: write 0.001 or 1.0e-3 for 1e-3)"
    return f"{where}: {message}, got {given_value!r}{hint}"


def _backend_message(value: Any) -> str:
    known = list(get_args(Backend))
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown backend {value!r}: expected one of {', '.join(known)}{hint}"


def make_config(**values: Any) -> GrowConfig:
    """A configuration from values over the task's defaults over the general ones.

    Raises:
        InputError: naming every key that is unknown or out of range.
    """
    task = values.get("task")
    given = {**(TASK_DEFAULTS.get(task, {}) if isinstance(task, str) else {}), **values}
    try:
        return GrowConfig.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(_explain(e, given) for e in error.errors())
        raise InputError(f"the configuration is not valid: {problems}") from error


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        InputError: where it cannot be read or is not a mapping of names.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"the configuration file {path} cannot be read: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration file {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(
            f"the configuration file {path} must be a mapping such as `steps: 2500`; it is a"
            f" {type(values).__name__}"
        )
    return values
