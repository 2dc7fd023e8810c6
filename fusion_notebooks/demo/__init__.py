"""Glyph world and the demo models."""

from .scenes import *
from .questions import *
from .models import *
from .packing import *
from .streams import *
from .fitting import *
from .recipes import *
from .trainer import *
from .lessons import *
from .stages import *
from .evaluation import *
from .tuning import *
from .shipped import *
from .fetching import *

__all__ = [name for name in dir() if not name.startswith('_')]
