"""The version, for the package itself and for the records of runs."""

__version__ = "0.1.0"
