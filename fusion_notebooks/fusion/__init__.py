"""From curves and maps to fusion layers and review layer."""

from .maps import *
from .evidence import *
from .bands import *
from .layers import *
from .known_answers import *
from .noise import *
from .measured import *

__all__ = [name for name in dir() if not name.startswith('_')]
