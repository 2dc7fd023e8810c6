"""What was found, in forms that others can use."""

from .privacy import *
from .descriptions import *
from .evaluations import *
from .repositories import *
from .entries import *
from .galleries import *
from .challenges import *
from .estimators import *
from .harnesses import *
from .leaderboards import *

__all__ = [name for name in dir() if not name.startswith('_')]
