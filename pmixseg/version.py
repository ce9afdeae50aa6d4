"""Version of this package: every result names it, also where only the source tree is at hand."""

__version__ = "0.1.0"
