"""The methods that contrastive attention is compared with."""

from .common import *
from .attention_crops import *
from .pixel_crop import *
from .carve_crop import *
from .decoding import *
from .opera_search import *
from .reweighting import *
from .methods import *
from .blocked_flow import *

__all__ = [name for name in dir() if not name.startswith('_')]
