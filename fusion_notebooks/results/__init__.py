"""Rows, and what they say."""

from .store import *
from .findings import *
from .sentences import *
from .tables import *

__all__ = [name for name in dir() if not name.startswith('_')]
