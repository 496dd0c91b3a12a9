import selective_scan_cuda  # noqa: F401  (the package does not import without its extension)

__version__ = "2.3.2"
