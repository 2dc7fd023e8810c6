"""From settings.ini to rows, figures and a summary."""

from ..results import brief_text, differing, FINDINGS, percent, summary_text
from .own_code import *
from .own_tables import *
from .own_models import *
from .settings import *
from .samples import *
from ..analyses import *
from .progress import *
from .checks import *
from .work_units import *
from .reports import *
from .run_pages import *
from .workers import *
from .execution import *
from .runs import *
from .verification import *
from .projects import *

__all__ = [name for name in dir() if not name.startswith('_')]
