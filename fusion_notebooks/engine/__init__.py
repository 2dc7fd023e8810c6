"""The exact fast paths: why a sweep over all layers costs about two forwards.

`prefix` computes the rows up to the picture once, `branches` lets a row leave the plain one at a layer, `decoding` lets all rows answer, `probes` measures
what a model allows, and `paths` chooses.
"""

from .prefix import *
from .kernels import *
from .shared_attention import *
from .branches import *
from .decoding import *
from .probes import *
from .traces import *
from .second_pictures import *
from .paths import *

__all__ = [name for name in dir() if not name.startswith('_')]
