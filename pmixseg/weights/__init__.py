"""Models by name: where a name leads, how it is fetched, and the files of a published model.

Nothing here can run code of what it fetches: weights are safetensors, everything else is JSON.
"""

from pmixseg.weights.catalogue import CATALOGUE, Entry
from pmixseg.weights.fetch import local_copy
from pmixseg.weights.published import PublishedModel, read_published, write_published

__all__ = [
    "CATALOGUE",
    "Entry",
    "PublishedModel",
    "local_copy",
    "read_published",
    "write_published",
]
