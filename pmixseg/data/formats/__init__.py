"""Image files: read NIfTI, MetaImage and NRRD; write label maps and colours."""
