"""The command line `fusion`: a module per group of commands, listed by `fusion --help` in this order."""

from .program import *
from .options import *
from .studies import *
from .projects import *
from .asking import *
from .checking import *
from .demo_models import *
from .publishing import *

__all__ = [name for name in dir() if not name.startswith('_')]
