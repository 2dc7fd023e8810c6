"""Benchmarks."""

from ..core.images import Sample
from .benchmarks import *
from .files import *
from .own_tables import *
from .hub import *
from .samples import *

__all__ = [name for name in dir() if not name.startswith('_')]
