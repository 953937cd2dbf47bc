"""What a run is asked to do. Configuration stops here: builders get plain values."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esper.contracts import Sha256, Size
from esper.errors import InputError
from esper.settings._password import without_password
from esper.tamiyo import Action
from esper.tezzeret import blueprint_names
from esper.tolaria._yaml import read_yaml
from esper_functional import Blend

Backend = Literal["jax", "torch"]
_Steps = Annotated[int, Field(ge=1, le=10_000_000)]


class InitialGraft(BaseModel):
    """A kernel that is there from step 0, at alpha 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    site: str
    """The layer's path."""
    seed: int = Field(ge=0)
    """Which of the layer's seeds, counted from 0."""
    kernel: Sha256
    """The id of a kernel in the run's library."""


class ScheduledDecision(BaseModel):
    """One decision of a fixed schedule, taken at the first boundary that is not before `step`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    """From which on it is taken."""
    action: Action = Field(strict=False)
    """What is done with the seed."""
    site: str
    """The layer's path."""
    seed: int | None = Field(default=None, ge=0)
    """Null takes the first free one, for a graft."""
    kernel: Sha256 | None = None
    """Of a graft; null takes the `candidate`."""
    candidate: int = Field(default=0, ge=0)
    """Which of the run's kernels for that layer, counted from 0."""
    alpha: float = Field(default=1.0, ge=0.0, le=1.0)
    """Where the ramp of a graft or a retargeting goes."""


class SafetyConfig(BaseModel):
    """Rules that hold for every controller, as in `esper.tamiyo.Safety`; null leaves one out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    cooldown_steps: int = Field(default=0, ge=0)
    """Steps for which a layer is left alone after its last change of stage."""
    max_adaptations: int | None = Field(default=None, ge=0)
    """Most grafts, fossils and retargetings in any `interval_steps`."""
    interval_steps: _Steps = 1_000
    """The window of `max_adaptations`."""
    min_confidence: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least confidence of a decision."""
    max_uncertainty: float | None = Field(default=None, ge=0.0)
    """Most standard deviation of a decision's effect for want of data, where it says one."""
    max_parameters: int | None = Field(default=None, ge=0)
    """Of the network."""
    max_parameters_factor: float | None = Field(default=None, ge=1.0)
    """The same, as a multiple of the host's."""
    max_flops: float | None = Field(default=None, ge=0.0)
    """Of a forward pass of one example."""
    max_flops_factor: float | None = Field(default=None, ge=1.0)
    """The same, as a multiple of the host's."""
    calm_steps: int = Field(default=0, ge=0)
    """Steps without growth after the run was taken back."""
    max_loss_spread: float | None = Field(default=None, ge=0.0)
    """Most standard deviation of the training losses since the last boundary, over their mean."""
    unload_below_worth: float | None = Field(default=None, ge=0.0)
    """A kernel is unloaded whose worth, all of its interval, is below minus this."""
    judge_after_steps: _Steps = 500
    """Steps at work before a kernel's worth is measured for that, and between two times."""


class ServiceConfig(BaseModel):
    """How a run asks a service."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    bus: str | None = None
    """Where the service hears: `redis://HOST:PORT/NUMBER` or `sqlite:PATH`; null takes the bus
    that the run tells, `--bus` of `esper grow`."""
    name: str | None = Field(default=None, min_length=1, max_length=200)
    """By which the service knows the run; null takes the run's folder, as it was given."""
    wait_seconds: float = Field(default=0.0, ge=0.0, le=3_600.0)
    """How long a boundary waits for the answer to its own report; without, what came since is done
    at the next boundary."""

    @field_validator("bus")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and without_password(value, whole=True) != value:
            raise ValueError(
                "`service.bus` holds a password, and a configuration is recorded: leave it out, and"
                " give the address as `bus.url` of the settings or as ESPER_BUS__URL"
            )
        return value


class GrowConfig(BaseModel):
    """One run: a task, a backend, a seed, and how the network may grow."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: str
    """The data and the host: one of Esper's tasks, or the name of your own."""
    backend: Backend
    """What trains it."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Of the host's first weights, the batches and the choice of kernels."""

    # Training.
    steps: _Steps = 2_500
    """Of the optimiser."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples a step; null takes the whole training part."""
    evaluation_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples of a forward pass that only measures; null takes a whole part at once."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Moments are kept for the host and for each kernel apart."""
    learning_rate: float = Field(default=1e-2, gt=0.0, le=10.0)
    """The highest of the run; `schedule` and `warmup_steps` lower it."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes from its value to 0 over the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which it rises from 0 before."""
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of sgd."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled; of adamw and sgd."""
    clip_norm: float | None = Field(default=None, gt=0.0)
    """Largest norm of the host's gradient, and of each kernel's."""
    accumulate: int = Field(default=1, ge=1)
    """Equal parts that a batch is computed in."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Of an average of the parameters, by which the network is then judged."""
    max_training_flops: float | None = Field(default=None, gt=0.0)
    """FLOPs of training, counted, which a run may use; null leaves its end to `steps`."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Boundaries without a lower validation loss after which the run ends; null never."""

    # The host's seeds.
    seeds_per_layer: int = Field(default=4, ge=1, le=64)
    """Most kernels that a layer carries at once."""
    blend: Blend = "residual"
    """How a kernel's output and the layer's become one; see the page on laws."""
    isolate: bool = False
    """Keep the kernels' gradients from the layers before them."""
    grow_at: list[str] | None = None
    """The host's layers in which kernels may be grafted, in order of preference; null leaves it
    to the task."""
    blueprints: list[str] = Field(default_factory=lambda: ["residual_mlp"])
    """What kernels are compiled from, by name."""
    blueprint_sizes: dict[str, Size] = Field(default_factory=dict)
    """Values for the blueprints' named sizes, such as `width`; `residual_mlp.width` is of one
    blueprint alone, and goes before."""
    variants: int = Field(default=8, ge=1, le=256)
    """Kernels of each blueprint, with first parameters of their own, to choose from."""

    # How a kernel comes in.
    loading_steps: _Steps = 20
    """Steps from the decision to graft to the graft: time to compile."""
    incubation_steps: int = Field(default=0, ge=0)
    """Steps in which a kernel trains in shadow forward passes before it is blended."""
    ramp_steps: _Steps = 100
    """Steps over which alpha goes from 0 to 1."""
    ramp: Literal["linear", "cosine", "sigmoid"] = "linear"
    """The shape of alpha's way."""
    kernel_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which a grafted kernel's learning rate rises from 0."""
    initialisation: Literal[
        "as_compiled", "zero_output", "gradmax", "residual_fit", "variance_transfer"
    ] = "as_compiled"
    """A grafted kernel's first parameters."""
    probe_examples: int = Field(default=256, ge=1)
    """Training examples by which initialisations and triggers see a layer."""

    # Who decides.
    controller: Literal["none", "fixed", "random", "heuristic", "bandit", "learned", "service"] = (
        "heuristic"
    )
    """Who decides what grows; `none` trains without growing."""
    trigger: Literal["plateau", "gradient_bottleneck", "held_out_gain", "schedule", "random"] = (
        "plateau"
    )
    """When the heuristic and the bandit graft."""
    policy: Path | None = Field(default=None, strict=False)
    """Of the learned controller: a policy file; null takes the one that ships with Esper."""
    service: ServiceConfig | None = None
    """Of the service controller: whom it asks, and how long; null takes what is there without."""
    initial_grafts: list[InitialGraft] = Field(default_factory=list)
    """Kernels that are there from step 0, at alpha 1."""
    schedule_of_grafts: list[ScheduledDecision] = Field(default_factory=list)
    """Of the fixed controller; without, it grafts every `graft_every` steps."""
    graft_every: _Steps = 500
    """Of the fixed controller and the trigger `schedule`."""
    graft_probability: float = Field(default=0.1, ge=0.0, le=1.0)
    """At a boundary: of the random controller and the trigger `random`."""
    keep_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    """Of the random controller, at the end of a trial."""
    max_grafts: int | None = Field(default=None, ge=0)
    """Most grafts of a run, of any controller."""
    decide_every: _Steps = 50
    """Steps between decision boundaries, where losses are read and seeds may change."""
    trial_steps: _Steps = 300
    """Steps at alpha 1 before a kernel's worth is measured."""
    trials: int = Field(default=1, ge=1)
    """Kernels on trial at once."""
    patience: int = Field(default=2, ge=1, le=1_000)
    """Boundaries without improvement that make a plateau."""
    min_improvement: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Relative fall of the training loss per boundary that counts as improvement."""
    enough_loss: float = Field(default=0.01, ge=0.0)
    """Training loss below which nothing more is grafted."""
    trigger_threshold: float | None = Field(default=None, ge=0.0)
    """Of the triggers `gradient_bottleneck` and `held_out_gain`; null takes their own."""
    min_worth: float = Field(default=0.0)
    """Rise of the validation loss without a kernel above which it is kept."""
    judge_by: Literal["value", "low"] = "value"
    """What of a worth is held against it: the mean, or the lower end of its interval."""
    safety: SafetyConfig = Field(default_factory=SafetyConfig)
    """What no controller may do; see below."""

    # When it goes wrong.
    divergence: float | None = Field(default=10.0, gt=1.0)
    """A training loss above this many times that of the first boundary counts as divergence, as
    one that is not finite always does; null leaves the latter alone."""
    max_rollbacks: int = Field(default=3, ge=0, le=100)
    """How often in a row a run is taken back to the last boundary before it gives up."""

    threads: int = Field(default=1, ge=1, le=256)
    """Threads of torch. Small hosts are slower with more, and a run repeats bit for bit only
    with the number it began with."""
    checkpoint_every: _Steps = 500
    """A multiple of `decide_every`."""
    tensorboard: bool = False
    """Whether measurements are also written for TensorBoard, into the run's folder."""
    prometheus: Path | None = Field(default=None, strict=False)
    """A `.prom` file for the textfile collector of Prometheus."""
    library: Path | None = Field(default=None, strict=False)
    """Folder of the library; by default `library` beside the run folder."""

    @field_validator("blueprints")
    @classmethod
    def _known_blueprints(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("`blueprints` names none: give at least one, or leave it out")
        for name in value:
            _one_of("blueprint", name, blueprint_names())
        if len(set(value)) != len(value):
            raise ValueError("`blueprints` names one twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "GrowConfig":
        if self.grow_at is not None and not self.grow_at:
            raise ValueError("`grow_at` names no layer; leave it out for the task's own")
        for key in self.blueprint_sizes:
            owner, dot, _ = key.rpartition(".")
            if dot and owner not in self.blueprints:
                raise ValueError(
                    f"`blueprint_sizes` has {key!r}, and {owner!r} is none of `blueprints`,"
                    f" {', '.join(self.blueprints)}"
                )
        if self.controller != "none" and self.initial_grafts:
            raise ValueError("`initial_grafts` are for runs with `controller: none`")
        if self.controller != "fixed" and self.schedule_of_grafts:
            raise ValueError("`schedule_of_grafts` is for runs with `controller: fixed`")
        if self.controller != "learned" and self.policy is not None:
            raise ValueError("`policy` is for runs with `controller: learned`")
        if self.controller != "service" and self.service is not None:
            raise ValueError("`service` is for runs with `controller: service`")
        if self.checkpoint_every % self.decide_every:
            near = max(1, round(self.checkpoint_every / self.decide_every)) * self.decide_every
            raise ValueError(
                f"`checkpoint_every` is {self.checkpoint_every}: expected a multiple of"
                f" `decide_every`, {self.decide_every}, such as {near}"
            )
        if self.batch_size is not None and self.batch_size % self.accumulate:
            raise ValueError(
                f"`accumulate` is {self.accumulate}, and does not divide `batch_size`,"
                f" {self.batch_size}, into equal parts"
            )
        if self.max_training_flops is not None and self.schedule != "constant":
            raise ValueError(
                f"`max_training_flops` ends a run at a step that nobody knows before, and"
                f" `schedule: {self.schedule}` needs it: write `schedule: constant`"
            )
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("`weight_decay` is of adamw and sgd; write `optimizer: adamw`")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError("`momentum` is of sgd; adam has its own")
        places = [(graft.site, graft.seed) for graft in self.initial_grafts]
        if len(set(places)) != len(places):
            raise ValueError("`initial_grafts` name one seed of one layer twice")
        return self


def sizes_of(config: GrowConfig, blueprint: str) -> dict[str, int]:
    """What a configuration says of the sizes of one blueprint."""
    named = [key.rpartition(".") for key in config.blueprint_sizes]
    return {
        size: config.blueprint_sizes[f"{owner}{dot}{size}"]
        for owner, dot, size in sorted(named)
        if not dot or owner == blueprint
    }


def _one_of(what: str, value: str, known: list[str]) -> str:
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}{hint}")


TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "spirals": {},
    "digits": {"steps": 1_500, "batch_size": 64, "min_improvement": 0.05, "enough_loss": 0.03},
    "xor": {"steps": 2_000, "batch_size": 64, "min_improvement": 0.05},
    # As the gym has them, with kernels of the sizes that it offers.
    "gym": {
        "steps": 800,
        "decide_every": 40,
        "checkpoint_every": 400,
        "batch_size": 32,
        "ramp_steps": 80,
        "trial_steps": 130,
        "loading_steps": 1,
        "seeds_per_layer": 2,
        "variants": 2,
        "blueprints": ["residual_mlp", "low_rank", "bottleneck"],
        "blueprint_sizes": {"residual_mlp.width": 16, "low_rank.rank": 2, "bottleneck.width": 4},
    },
    "shapes": {
        "steps": 1_500,
        "batch_size": 64,
        "min_improvement": 0.05,
        "enough_loss": 0.05,
        "blueprints": ["conv_bottleneck"],
    },
    "grammar": {
        "steps": 2_500,
        "batch_size": 64,
        "learning_rate": 5e-3,
        "min_improvement": 0.01,
        "enough_loss": 1.05,
    },
}
"""What differs from `GrowConfig`'s own defaults, by task, or by kind of task for `xor-N` and
`gym:FAMILY`."""


def _explain(error: Any, given: dict[str, Any]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        owner = {"safety": SafetyConfig, "service": ServiceConfig}.get(
            str(error["loc"][0]), GrowConfig
        )
        near = difflib.get_close_matches(key, owner.model_fields, n=1)
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
    kind = re.split("[-:]", task)[0] if isinstance(task, str) else ""
    given = {**TASK_DEFAULTS.get(kind, {}), **values}
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
    values = read_yaml("configuration file", path)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(
            f"the configuration file {path} must be a mapping such as `steps: 2500`; it is a"
            f" {type(values).__name__}"
        )
    return values
