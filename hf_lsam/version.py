"""The version, for the package's front door and for the records of runs."""

__version__ = "0.1.0"
