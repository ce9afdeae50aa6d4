"""Check classes of your own against their contracts, and report what is wrong.

>>> from pmixseg.backbones import MultiEncoderUNet
>>> check_backbone(MultiEncoderUNet(("pet", "ct"), num_classes=2, width=2, levels=2))
"""

from pmixseg.testing.backbone import check_backbone
from pmixseg.testing.findings import ConformanceError
from pmixseg.testing.term import check_term

__all__ = ["ConformanceError", "check_backbone", "check_term"]
