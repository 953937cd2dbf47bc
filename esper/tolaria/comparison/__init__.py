"""Comparisons: from the outcomes of runs to a verdict that may be refused, and its report."""

from esper.tolaria.comparison._arms import ArmSummary, summarise
from esper.tolaria.comparison._asked import Comparison, make_comparison
from esper.tolaria.comparison._describe import describe
from esper.tolaria.comparison._design import ARMS, NEEDED_CONTROLS, Budget, Design, Metric
from esper.tolaria.comparison._holm import holm
from esper.tolaria.comparison._interval import Interval, bootstrap_interval
from esper.tolaria.comparison._judge import judge
from esper.tolaria.comparison._kept import KeptKernel, kept_kernels
from esper.tolaria.comparison._outcome import Curve, Outcome, Setting
from esper.tolaria.comparison._pair import Pair, Word
from esper.tolaria.comparison._power import minimal_effect, paired_power, pairs_needed
from esper.tolaria.comparison._read import read_outcome
from esper.tolaria.comparison._run import Compared, judge_comparison, run_comparison
from esper.tolaria.comparison._sign_flip import fewest_pairs, sign_flip_p
from esper.tolaria.comparison._table import read_table
from esper.tolaria.comparison._verdict import Verdict, VerdictRefused
from esper.tolaria.comparison._write import write_comparison

__all__ = [
    "ARMS",
    "NEEDED_CONTROLS",
    "ArmSummary",
    "Budget",
    "Compared",
    "Comparison",
    "Curve",
    "Design",
    "Interval",
    "KeptKernel",
    "Metric",
    "Outcome",
    "Pair",
    "Setting",
    "Verdict",
    "VerdictRefused",
    "Word",
    "bootstrap_interval",
    "describe",
    "fewest_pairs",
    "holm",
    "judge",
    "judge_comparison",
    "kept_kernels",
    "make_comparison",
    "minimal_effect",
    "paired_power",
    "pairs_needed",
    "read_outcome",
    "read_table",
    "run_comparison",
    "sign_flip_p",
    "summarise",
    "write_comparison",
]
