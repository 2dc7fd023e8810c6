"""One function per figure."""

from .style import *
from .layers import *
from .maps import *
from .outcomes import *
from .cards import *
from .causal import *
from .files import *

__all__ = [name for name in dir() if not name.startswith('_')]
