"""A model behind one handle."""

from ..core.images import *
from .conversations import *
from .grids import *
from .devices import *
from .memory import *
from .key_value_caches import *
from .processor import *
from .sinks import *
from .gate import *
from .handle import *
from .coordinate_ramps import *
from .places import *
from .prompts import *
from .thoughts import *
from .batching import *
from .generation import *
from .state import *
from .vision_features import *
from .options import *
from .loading import *

__all__ = [name for name in dir() if not name.startswith('_')]
