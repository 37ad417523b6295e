"""The errors retrofit raises.

Each message names the thing, what was expected, what came, and what to do about it, in one line.
"""

from __future__ import annotations


class RetrofitError(Exception):
    """Base of every error that retrofit raises on purpose."""


class ConfigError(RetrofitError, ValueError):
    """A configuration value is out of its range or contradicts another."""


class NoAttentionFound(RetrofitError):
    """No site of the model can be converted; the message lists what was looked at and why it was refused."""


class CaptureError(RetrofitError):
    """A module could not be recorded or exported."""


class VerificationError(RetrofitError):
    """A rewritten module did not reproduce the original within the tolerance."""


class MaskError(RetrofitError, ValueError):
    """A mask at run time is not of the class the site was verified for."""


class CacheError(RetrofitError):
    """A cache that a converted model cannot use was handed over."""


class ModelLoadError(RetrofitError):
    """A model, folder or file could not be loaded."""


class DataError(RetrofitError, ValueError):
    """A text or data set cannot be used."""


class ExportError(RetrofitError):
    """The ONNX export failed or did not match the model."""


class OutputError(RetrofitError):
    """The output folder cannot be written."""


class BenchmarkError(RetrofitError):
    """A benchmark cannot be run, or its inputs' correctness check failed."""
