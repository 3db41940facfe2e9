"""The one place where the version stands; setup.py and CMake read it."""

__version__ = "0.1.0"
