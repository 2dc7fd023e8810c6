"""The explorer."""

from .session import *
from .payload import *
from .widget import *

__all__ = [name for name in dir() if not name.startswith('_')]
