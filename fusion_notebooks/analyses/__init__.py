"""The analyses of a study, one module each."""

from .records import *
from .masking import *
from .attention import *
from .early_exit import *
from .refine import *
from .candidates import *
from .causal import *

__all__ = [name for name in dir() if not name.startswith('_')]
