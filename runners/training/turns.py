"""Runs that take turns: each is a generator that yields when others may continue, and returns its result."""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Turns = Generator[None, None, Result]


def alone(turns: Turns[Result]) -> Result:
    """Run a generator to its end, without others, and return its result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            result: Result = end.value
            return result
