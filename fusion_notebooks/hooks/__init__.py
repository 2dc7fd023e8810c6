"""Reading and writing inside a forward."""

from .attaching import *
from .recording import *
from .logit_lens import *
from .edits import *
from .states import *

__all__ = [name for name in dir() if not name.startswith('_')]
