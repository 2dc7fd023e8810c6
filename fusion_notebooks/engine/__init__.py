"""The exact fast paths."""

from .prefix import *
from .shared_attention import *
from .branches import *
from .capabilities import *
from .trace import *
from .second_pictures import *
from .paths import *

__all__ = [name for name in dir() if not name.startswith('_')]
