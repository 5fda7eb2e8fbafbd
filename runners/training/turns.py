"""Runs that take turns: each is a generator that yields when others may go on, and returns what it comes to."""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Turns = Generator[None, None, Result]


def alone(turns: Turns[Result]) -> Result:
    """Run it to its end where there are no others."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            result: Result = end.value
            return result
