"""What may be built: spaces of architectures with their sparsity.

A space is one function of a `Chooser` that returns a module (space.py). `get_space` finds the shipped ones by name and the user's
own by "module:function" or "path/to/file.py:function".
"""

from search_spaces.architecture import Architecture, SpaceError
from search_spaces.chooser import Chooser
from search_spaces.registry import SPACES, get_space
from search_spaces.space import Space

__all__ = ["SPACES", "Architecture", "Chooser", "Space", "SpaceError", "get_space"]
