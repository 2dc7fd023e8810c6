"""Edits of the visual tokens, layer by layer."""

from ..hooks.states import *
from ..engine import *
from .sweeps import *

__all__ = [name for name in dir() if not name.startswith('_')]
