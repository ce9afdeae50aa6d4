"""Models by name: look up, fetch, and read or write the files of a published model.

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
