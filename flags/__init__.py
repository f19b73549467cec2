"""The flags of `train.py`, resolved to one frozen `RunConfig`.

Recipes are flagfiles: `train.py --flagfile=flags/recipes/alexnet_bn_8k.flags`. `flags/comparisons` holds those of
`compare.py`.
"""

from flags.config import RunConfig
from flags.parsing import define, parse, read

__all__ = ["RunConfig", "define", "parse", "read"]
