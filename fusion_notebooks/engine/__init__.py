"""The exact fast paths."""

from .prefix import *
from .shared_attention import *
from .branches import *
from .probes import *
from .traces import *
from .second_pictures import *
from .paths import *

__all__ = [name for name in dir() if not name.startswith('_')]
