"""What every room needs: errors, files, samples and pictures, the catalog."""

from .errors import *
from .files import *
from .limits import *
from .images import *
from .catalog import *
from .resources import *

__all__ = [name for name in dir() if not name.startswith('_')]
