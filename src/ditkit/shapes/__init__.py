"""The drawn world of the embedded model: drawing clips of it (``draw``) and reading clips of it (``measure``)."""
