"""What every package needs: errors, files, pictures, limits, and the catalog of semantics and methods."""

from .errors import *
from .files import *
from .limits import *
from .templates import *
from .images import *
from .catalog import *
from .resources import *
from .model_words import *

__all__ = [name for name in dir() if not name.startswith('_')]
