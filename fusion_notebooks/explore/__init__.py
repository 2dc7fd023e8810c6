"""The explorer."""

from .session import *
from .payload import *
from .jobs import *
from .canvas import *
from .widget import *
from .recorded import *

__all__ = [name for name in dir() if not name.startswith('_')]
