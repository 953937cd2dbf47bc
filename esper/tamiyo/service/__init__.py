"""Tamiyo as a service: decides for many models at once, from what they tell on a bus.

Its core is a plain object, `Tamiyo`, which a run in one process calls directly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper.tamiyo._telling import report_of
from esper.tamiyo.service._advisor import Advisor, News
from esper.tamiyo.service._collector import HealthCollector, Outcomes
from esper.tamiyo.service._counts import Counts, LearningCounts
from esper.tamiyo.service._experience import Experience, Learner, measured_reward, was_done
from esper.tamiyo.service._heap import frozen_heap
from esper.tamiyo.service._loop import GROUP, SHADOW_GROUP, TamiyoService, Traffic
from esper.tamiyo.service._report import Report, observation_of, seeds_now
from esper.tamiyo.service._rows import COUNTED, HEALTH, merge, rows_of
from esper.tamiyo.service._rules import RuleAdvisor
from esper.tamiyo.service._safety_file import read_safety
from esper.tamiyo.service._serve import serve_tamiyo
from esper.tamiyo.service._spread import RunningSpread
from esper.tamiyo.service._tamiyo import Advice, Tamiyo
from esper.tamiyo.service._ticks import Ticks

if TYPE_CHECKING:
    from esper.tamiyo.service._policy_advisor import PolicyAdvisor

__all__ = [
    "COUNTED",
    "GROUP",
    "HEALTH",
    "SHADOW_GROUP",
    "Advice",
    "Advisor",
    "Counts",
    "Experience",
    "HealthCollector",
    "Learner",
    "LearningCounts",
    "News",
    "Outcomes",
    "PolicyAdvisor",
    "Report",
    "RuleAdvisor",
    "RunningSpread",
    "Tamiyo",
    "TamiyoService",
    "Ticks",
    "Traffic",
    "frozen_heap",
    "measured_reward",
    "merge",
    "observation_of",
    "read_safety",
    "report_of",
    "rows_of",
    "seeds_now",
    "serve_tamiyo",
    "was_done",
]


def __getattr__(name: str) -> Any:
    # Policies take Equinox, which services by rule do without.
    if name == "PolicyAdvisor":
        return import_module("esper.tamiyo.service._policy_advisor").PolicyAdvisor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
