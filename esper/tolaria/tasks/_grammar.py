"""Text of a small probabilistic context-free grammar, whose entropy is known exactly."""

import math
from bisect import bisect
from collections.abc import Mapping

import numpy as np

from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._task import Task
from esper.tolaria.tasks._text_host import TextHost

RULES: Mapping[str, tuple[tuple[float, str], ...]] = {
    "S": ((1.0, "P."),),
    "P": ((0.57, "xA"), (0.03, "yB"), (0.2, "(Q)C"), (0.2, "[L]D")),
    "Q": ((0.03, "xA"), (0.57, "yB"), (0.2, "(P)D"), (0.2, "[L]C")),
    "A": ((0.2, "+P"), (0.25, "*Q"), (0.55, "")),
    "B": ((0.25, "+Q"), (0.2, "*P"), (0.55, "")),
    "C": ((0.05, "+P"), (0.2, "*P"), (0.75, "")),
    "D": ((0.2, "+Q"), (0.05, "*Q"), (0.75, "")),
    "L": ((1.0, "PM"),),
    "M": ((0.4, ",Q"), (0.6, "")),
}
"""The rules by what they rewrite, each with its probability; capitals are rewritten.

The next character tells which rule was taken (the grammar is LL(1)), so a sentence has one
derivation, and who has read a text knows the probabilities of its next character. Whether `x`
or `y` is likely is told by the last letter or bracket together with the sign after it, as in an
exclusive or.
"""

CHARACTERS = ".()[],xy+*"
"""All of them, in the order of their tokens."""

_TIME = 32


def _per_symbol(local: Mapping[str, float]) -> float:
    """The mean over derivations of S of a quantity that adds up over rewritings.

    For each symbol it is what the symbol's own rewriting brings, and what the symbols that it
    is rewritten to bring on average: a linear system.
    """
    names = list(RULES)
    system = np.eye(len(names))
    for row, name in enumerate(names):
        for chance, body in RULES[name]:
            for symbol in body:
                if symbol in RULES:
                    system[row, names.index(symbol)] -= chance
    return float(np.linalg.solve(system, [local[name] for name in names])[names.index("S")])


def grammar_entropy_rate() -> float:
    """Nats per character of endless text, exactly: 1.0387.

    The entropy of a sentence over its mean length. A sentence has one derivation and ends in a
    full stop, so that its entropy is that of its derivation: the sum over symbols of how often
    they are rewritten and the entropy of their rules (Chi, Statistical Properties of
    Probabilistic Context-Free Grammars, Computational Linguistics 25, 1999, after Grenander).
    No model's loss is below it on average over new text.
    """
    entropy = {
        name: -sum(chance * math.log(chance) for chance, _ in rules)
        for name, rules in RULES.items()
    }
    length = {
        name: sum(chance * sum(symbol not in RULES for symbol in body) for chance, body in rules)
        for name, rules in RULES.items()
    }
    return _per_symbol(entropy) / _per_symbol(length)


def write_text(random: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[length]` i32, and the surprise of each to who knows the grammar, in nats f64."""
    bounds = {name: np.cumsum([chance for chance, _ in rules]) for name, rules in RULES.items()}
    table = {name: (list(bounds[name][:-1]), RULES[name]) for name in RULES}
    tokens, surprise = np.empty(length, np.int32), np.empty(length)
    draws, stack = iter(()), list[str]()
    place, pending = 0, 0.0
    while place < length:
        symbol = stack.pop() if stack else "S"
        if symbol not in table:
            tokens[place], surprise[place] = CHARACTERS.index(symbol), pending
            place, pending = place + 1, 0.0
            continue
        if (draw := next(draws, None)) is None:
            draws = iter(random.random(1_024).tolist())
            draw = next(draws)
        limits, rules = table[symbol]
        chance, body = rules[bisect(limits, draw)]
        pending -= math.log(chance)
        stack.extend(reversed(body))
    return tokens, surprise


def _part(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    tokens, _ = write_text(np.random.default_rng([20_263, seed]), count * _TIME + 1)
    return tokens[:-1].reshape(count, _TIME), tokens[1:].reshape(count, _TIME)


def grammar() -> Task:
    """Formulas such as `(x+y)*[y,x].`, to be foretold character by character.

    Three texts by a grammar of our own, `RULES`, of 4,000, 500 and 1,000 pieces of 32
    characters. What may come next depends on which brackets are open, however far back. Examples
    `[32]` tokens, labels `[32]`, the character after each; 10 characters. `best_loss` is the
    entropy rate of the grammar: the loss of who remembers all that came before, which is more
    than a piece shows, so that it is a bound from below and a close one.
    """
    vocabulary = len(CHARACTERS)
    return make_task(
        "grammar",
        train=_part(0, 4_000),
        validation=_part(1, 500),
        test=_part(2, 1_000),
        host=TextHost(vocabulary, embedding=4, window=8, channels=32, hidden=3),
        best_loss=grammar_entropy_rate(),
    )
