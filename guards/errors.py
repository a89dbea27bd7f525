"""The exceptions that guards raise on purpose.

GuardError
├── RuleError        a rule of an allow or block list is malformed
└── GuardModelError  the classifier's files are missing, unsound or do not fit together
"""

from __future__ import annotations


class GuardError(Exception):
    """Base of every deliberate error. `str(error)` is fit to be shown to a user."""


class RuleError(GuardError):
    """A rule of an allow or block list is malformed."""


class GuardModelError(GuardError):
    """The classifier's files are missing, unsound or do not fit together."""
