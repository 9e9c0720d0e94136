"""Synthetic CT subjects with all 117 structures, on disk in the dataset layout: for tests and for a first run.

The files follow the way of a phantom: `shapes` (solids with a distance), `parts` (what a solid is made of and which
mask it joins), `spine`, `skeleton`, `organs`, `vessels`, `muscles` (where each structure lies), `anatomy` (all of
them, in painting order), `rendering` (parts to voxels), `subject` (what varies between subjects), `writing` (files).
"""

from .subject import Phantom, Traits, make_phantom, traits_of
from .writing import PhantomError, splits_of, write_phantoms

__all__ = ["Phantom", "PhantomError", "Traits", "make_phantom", "splits_of", "traits_of", "write_phantoms"]
