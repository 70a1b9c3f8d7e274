"""The adapter calls of a Polyadapt server, typed."""

from polyadapt_client.client import Polyadapt
from polyadapt_client.errors import AdapterRejected, ApiError, NotFound, Problem, Unavailable
from polyadapt_client.types import Adapter, Report, Residency, Tokenized, Version

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterRejected",
    "ApiError",
    "NotFound",
    "Polyadapt",
    "Problem",
    "Report",
    "Residency",
    "Tokenized",
    "Unavailable",
    "Version",
]
