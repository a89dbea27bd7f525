"""The prompt guard: text in, verdict out. It knows neither models nor HTTP.

>>> from guards import Guard
>>> Guard().check("How do I bake bread?").label
'safe'
"""

from guards.card import LEVELS, Level
from guards.categories import CATEGORIES, Category
from guards.conversation import Turn
from guards.errors import GuardError, GuardModelError, RuleError
from guards.guard import Guard
from guards.rules import Rules
from guards.verdict import DecidingWindow, Verdict

__all__ = [
    "CATEGORIES",
    "LEVELS",
    "Category",
    "DecidingWindow",
    "Guard",
    "GuardError",
    "GuardModelError",
    "Level",
    "RuleError",
    "Rules",
    "Turn",
    "Verdict",
]
