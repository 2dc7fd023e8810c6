"""Scores, intervals and tests."""

from .scores import *
from .intervals import *

__all__ = [name for name in dir() if not name.startswith('_')]
