"""From raw scans to what a model reads: registration, atlas space, brain extraction; and back.

Needs the extra ``preprocess`` (SimpleITK). Nothing here needs a network.
"""

from pmixseg.preprocess.pipeline import Preprocessed, preprocess_scans

__all__ = ["Preprocessed", "preprocess_scans"]
