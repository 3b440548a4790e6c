"""The version, read by the package's metadata without importing torch.

>>> VERSION.count(".")
2
"""

VERSION = "0.2.0"
