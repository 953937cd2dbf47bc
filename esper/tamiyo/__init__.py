"""Tamiyo, the controller: decides what to graft, where and when."""

from esper.tamiyo._controller import Action, Controller, Decision, Observation
from esper.tamiyo._heuristic import HeuristicController

__all__ = ["Action", "Controller", "Decision", "HeuristicController", "Observation"]
