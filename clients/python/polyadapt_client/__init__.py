"""The calls of a Polyadapt server that OpenAI's client does not have, typed."""

from polyadapt_client.client import Polyadapt, generation_fields
from polyadapt_client.errors import AdapterRejected, ApiError, NotFound, Problem, Unavailable
from polyadapt_client.types import (
    Adapter,
    Candidate,
    Capabilities,
    Choice,
    Completion,
    MandatoryAdapter,
    Option,
    Policy,
    Profile,
    Report,
    Residency,
    Served,
    Tokenized,
    TraceEntry,
    Traits,
    Use,
    Version,
    Workflow,
    WorkflowRun,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterRejected",
    "ApiError",
    "Candidate",
    "Capabilities",
    "Choice",
    "Completion",
    "MandatoryAdapter",
    "NotFound",
    "Option",
    "Policy",
    "Polyadapt",
    "Problem",
    "Profile",
    "Report",
    "Residency",
    "Served",
    "Tokenized",
    "TraceEntry",
    "Traits",
    "Unavailable",
    "Use",
    "Version",
    "Workflow",
    "WorkflowRun",
    "generation_fields",
]
