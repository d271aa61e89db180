"""Whether an answer is true, and how sure an accuracy is."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from garserve.evaluation.questions import EvalQuestion
from garserve.evaluation.words import WORDS


def judge(question: EvalQuestion, answer: str) -> dict[str, bool]:
    """Say of each attribute that a question asks for whether the answer tells the truth.

    A question has one true answer, in the words that were taught; case, spaces around and a last full stop do not
    matter. A description is right in an attribute where its one word for it is the true one.
    """
    if question.form == "describe":
        return {name: described(name, answer) == word for name, word in question.truth.items()}
    return {question.attribute: _plain(answer) == _plain(question.answer or "")}


def described(attribute: str, description: str) -> str | None:
    """Return the word that a description has for an attribute; None where there is none, or more than one."""
    found = set(re.findall(rf"\b({'|'.join(WORDS[attribute])})\b", description))
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()


@dataclass(frozen=True)
class Accuracy:
    """Right answers among counted ones."""

    right: int
    count: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> "Accuracy":
        """Count outcomes."""
        flags = list(outcomes)
        return cls(sum(flags), len(flags))

    @property
    def share(self) -> float | None:
        """Right answers of all, 0..1; None where there are none."""
        return self.right / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        if not self.count:
            return (0.0, 1.0)
        z, n, p = 1.959964, self.count, self.right / self.count
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval
        if not self.count:
            return "-"
        return f"{100 * self.right / self.count:.1f} [{100 * low:.0f}, {100 * high:.0f}] {self.count}"
