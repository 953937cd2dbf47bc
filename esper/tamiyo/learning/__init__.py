"""How a policy learns: from its own steps, from others', and from what it kept of both."""

from esper.tamiyo.learning._choices import CHOICES, choice_kl
from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._experienced import Refusal
from esper.tamiyo.learning._fit import (
    CloneSettings,
    Fitted,
    OfflineSettings,
    fine_tune_offline,
    pretrain,
)
from esper.tamiyo.learning._gae import Advantages, explained_variance, gae, normalised
from esper.tamiyo.learning._learner import Learner, LearningState
from esper.tamiyo.learning._losses import (
    Batch,
    LossTerms,
    Policy,
    a2c_loss,
    approximate_kl,
    clipped_surrogate,
    ppo_loss,
    value_error,
)
from esper.tamiyo.learning._measured_effects import (
    Decisions,
    JudgedEffects,
    Known,
    judge_effects,
    learn_effects,
    measure_effects,
)
from esper.tamiyo.learning._offline import OfflineTerms, Recorded, awr_loss, clone_loss
from esper.tamiyo.learning._online import LEARNING, POLICY, OnlineLearner
from esper.tamiyo.learning._online_settings import OnlineSettings
from esper.tamiyo.learning._recipe import Judged, Recipe, judge, make, quick_recipe
from esper.tamiyo.learning._replay import Drawn, ReplayStore, Transition
from esper.tamiyo.learning._rollout import (
    EnvironmentLike,
    StepLike,
    Steps,
    Walk,
    begin,
    rollout,
)
from esper.tamiyo.learning._settings import LearningSettings
from esper.tamiyo.learning._train import Learnt, train
from esper.tamiyo.learning._verdict import Diagnosis, Health, verdict

__all__ = [
    "CHOICES",
    "LEARNING",
    "POLICY",
    "Advantages",
    "Batch",
    "CloneSettings",
    "Decisions",
    "Diagnosis",
    "Distribution",
    "Drawn",
    "EnvironmentLike",
    "Fitted",
    "Health",
    "Judged",
    "JudgedEffects",
    "Known",
    "Learner",
    "LearningSettings",
    "LearningState",
    "Learnt",
    "LossTerms",
    "OfflineSettings",
    "OfflineTerms",
    "OnlineLearner",
    "OnlineSettings",
    "Policy",
    "Recipe",
    "Recorded",
    "Refusal",
    "ReplayStore",
    "StepLike",
    "Steps",
    "Transition",
    "Walk",
    "a2c_loss",
    "approximate_kl",
    "awr_loss",
    "begin",
    "choice_kl",
    "clipped_surrogate",
    "clone_loss",
    "explained_variance",
    "fine_tune_offline",
    "gae",
    "judge",
    "judge_effects",
    "learn_effects",
    "make",
    "measure_effects",
    "normalised",
    "ppo_loss",
    "pretrain",
    "quick_recipe",
    "rollout",
    "train",
    "value_error",
    "verdict",
]
