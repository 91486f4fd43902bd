"""The version of the package, and the name of its method among PEFT's."""

__version__ = "0.1.0"
METHOD = "SAPT"
