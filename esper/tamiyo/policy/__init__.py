"""The policy that learns: what it makes of a model's graph."""

from esper.tamiyo.policy._calibration import Reliability, platt, reliability
from esper.tamiyo.policy._choice import (
    ALPHAS,
    MASKED,
    Choice,
    Kind,
    Logits,
    best,
    entropies,
    log_prob,
    masked,
    sample,
)
from esper.tamiyo.policy._effects import Effects, Estimate, Method, effect_loss, make_effects
from esper.tamiyo.policy._familiar import (
    SUMMARY,
    Familiar,
    distance,
    distances,
    learn_familiar,
    summary,
)
from esper.tamiyo.policy._file import load_policy, save_policy
from esper.tamiyo.policy._loaded import Advice, LoadedPolicy, explain
from esper.tamiyo.policy._message_passing import GraphAttention, MessagePassing
from esper.tamiyo.policy._policy import Embedded, Policy, make_policy

__all__ = [
    "ALPHAS",
    "MASKED",
    "SUMMARY",
    "Advice",
    "Choice",
    "Effects",
    "Embedded",
    "Estimate",
    "Familiar",
    "GraphAttention",
    "Kind",
    "LoadedPolicy",
    "Logits",
    "MessagePassing",
    "Method",
    "Policy",
    "Reliability",
    "best",
    "distance",
    "distances",
    "effect_loss",
    "entropies",
    "explain",
    "learn_familiar",
    "load_policy",
    "log_prob",
    "make_effects",
    "make_policy",
    "masked",
    "platt",
    "reliability",
    "sample",
    "save_policy",
    "summary",
]
