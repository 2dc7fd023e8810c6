"""What an answer loses when a layer, a head, a visual token is closed."""

from .closings import *
from .maps import *
from .sufficiency import *
from .crops import *
from .swaps import *

__all__ = [name for name in dir() if not name.startswith('_')]
