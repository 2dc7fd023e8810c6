"""What every room needs: samples and pictures."""

from .catalog import *
from .errors import *
from .files import *
from .images import *

__all__ = [name for name in dir() if not name.startswith('_')]
