"""Whether a model can be trusted here."""

from .layer_kinds import *
from .shrinking import *
from .twins import *
from .references import *
from .checks import *
from .report import *

__all__ = [name for name in dir() if not name.startswith('_')]
