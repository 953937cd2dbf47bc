"""Tamiyo, the controller: decides what to graft, where and when."""

from esper.tamiyo._arms import DiscountedUcb, trial_reward
from esper.tamiyo._asking import ServiceController
from esper.tamiyo._bandit import BanditController
from esper.tamiyo._controller import (
    Action,
    Closing,
    Controller,
    Cost,
    Decision,
    Observation,
    Remarking,
    Veto,
    Worth,
)
from esper.tamiyo._fixed import FixedController, Scheduled
from esper.tamiyo._gradient_bottleneck import GradientBottleneckTrigger, gradient_scores
from esper.tamiyo._guard import Guard
from esper.tamiyo._held_out_gain import HeldOutGainTrigger
from esper.tamiyo._heuristic import HeuristicController
from esper.tamiyo._learned import Advice, Advisor, LearnedController
from esper.tamiyo._make import CONTROLLERS, TRIGGERS, make_controller, make_trigger
from esper.tamiyo._norms import SiteNorms
from esper.tamiyo._plateau import PlateauTrigger
from esper.tamiyo._probe import Probe, probe_follows
from esper.tamiyo._random import RandomController
from esper.tamiyo._random_trigger import RandomTrigger
from esper.tamiyo._recorder import ReadingsRecorder
from esper.tamiyo._safety import RULES, Safety
from esper.tamiyo._schedule_trigger import ScheduleTrigger
from esper.tamiyo._trigger import Cue, Trigger
from esper.tamiyo._verdict import Verdict, VerdictRule

__all__ = [
    "CONTROLLERS",
    "RULES",
    "TRIGGERS",
    "Action",
    "Advice",
    "Advisor",
    "BanditController",
    "Closing",
    "Controller",
    "Cost",
    "Cue",
    "Decision",
    "DiscountedUcb",
    "FixedController",
    "GradientBottleneckTrigger",
    "Guard",
    "HeldOutGainTrigger",
    "HeuristicController",
    "LearnedController",
    "Observation",
    "PlateauTrigger",
    "Probe",
    "RandomController",
    "RandomTrigger",
    "ReadingsRecorder",
    "Remarking",
    "Safety",
    "ScheduleTrigger",
    "Scheduled",
    "ServiceController",
    "SiteNorms",
    "Trigger",
    "Verdict",
    "VerdictRule",
    "Veto",
    "Worth",
    "gradient_scores",
    "make_controller",
    "make_trigger",
    "probe_follows",
    "trial_reward",
]
