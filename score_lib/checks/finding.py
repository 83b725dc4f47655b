"""The result of a check."""

from typing import NamedTuple

OK, NOTE, WRONG = "ok", "note", "wrong"


class Finding(NamedTuple):
    """One line of a report.

    Attributes:
        subject: the part that was checked, such as "prior".
        state: "ok"; "note", something to know; or "wrong", numbers cannot be trusted.
        text: the figures, and in words.
    """

    subject: str
    state: str
    text: str


def graded(subject: str, error: float, note: float, wrong: float, text: str) -> Finding:
    """A finding by the size of an error: ok below `note`, wrong above `wrong`, or if it is nan."""
    state = OK if error <= note else NOTE if error <= wrong else WRONG
    return Finding(subject, state, text)


def worst(findings: list[Finding]) -> str:
    """The worst state among findings."""
    states = {finding.state for finding in findings}
    return next((state for state in (WRONG, NOTE) if state in states), OK)
