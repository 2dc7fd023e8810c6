"""Reading and writing inside a forward."""

from .recording import *
from .logit_lens import *
from .edits import *
from .states import *

__all__ = [name for name in dir() if not name.startswith('_')]
