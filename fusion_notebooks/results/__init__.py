"""Rows, and what they say."""

from .files import *
from .store import *
from .claims import *
from .packs import *
from .findings import *
from .sentences import *
from .tables import *

__all__ = [name for name in dir() if not name.startswith('_')]
