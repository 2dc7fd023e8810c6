"""Glyph world and the demo models."""

from .scenes import *
from .questions import *
from .models import *
from .packing import *
from .training import *
from .shipped import *

__all__ = [name for name in dir() if not name.startswith('_')]
