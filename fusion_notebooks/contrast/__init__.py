"""Contrastive attention, and answers refined with it."""

from .contrastive import *
from .boxes import *
from .first_passes import *
from .answering import *
from .crops_and_masks import *
from .refinement import *

__all__ = [name for name in dir() if not name.startswith('_')]
