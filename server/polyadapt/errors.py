"""Every error a caller can react to, with its HTTP status and stable code. Knows no HTTP library.

PolyadaptError
├── InvalidRequest                400 invalid_request         the request itself is wrong
│   ├── UnsupportedField          400 unsupported_field       a field that would change the output
│   ├── ContextLengthExceeded     400 context_length_exceeded
│   ├── PolicyConflict            400 policy_conflict         with the tenant's mandatory adapters
│   └── EvidenceRejected          400 evidence_rejected       a record that its key did not sign
├── Unauthenticated               401 invalid_api_key
├── Forbidden                     403 forbidden
│   └── ForeignOrigin             403 foreign_origin
├── NotFound                      404 not_found
│   └── ModelNotFound             404 model_not_found         also every adapter name
├── MethodNotAllowed              405 method_not_allowed
├── Conflict                      409 conflict
├── PayloadTooLarge               413 payload_too_large
├── UnsupportedMediaType          415 unsupported_media_type
├── AdapterRejected               422 adapter_rejected        lists every problem found
├── QueueFull                     429 queue_full              retry_after_s
├── RequestCancelled              499 request_cancelled
│   └── AdapterDeleted            410 adapter_deleted         DELETE ...?mode=now under way
├── InternalError                 500 internal_error
│   └── NumericalError            500 numerical_error         non-finite logits of this request
├── Unavailable                   503 unavailable             retry_after_s
│   ├── EngineUnavailable         503 engine_unavailable
│   ├── PolicyUnavailable         503 policy_unavailable      a mandatory adapter cannot be served
│   ├── SecretsUnavailable        503 secrets_unavailable     a mark's secrets cannot be opened
│   └── AdapterUnavailable        503 adapter_unavailable     its weights cannot be placed now
│       └── AdapterCold           503 adapter_cold            not on the device yet; on_cold said so
├── RequestTimeout                504 request_timeout
└── StartupError                  never HTTP: the server or a command cannot start
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


class PolyadaptError(Exception):
    """Base of all errors; `message` is shown to the caller and never holds paths or tracebacks."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def envelope(self) -> dict[str, Any]:
        """Return OpenAI's error envelope: {"error": {"message", "type", "code", "param"}}."""
        body: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "code": self.code,
            "param": self.param,
        }
        return {"error": body}


class InvalidRequest(PolyadaptError):
    """The request is malformed or out of range; sending it again unchanged cannot succeed."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """A field that is unknown, or known and not served, and that would change the output."""

    code = "unsupported_field"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested tokens do not fit into the model's context."""

    code = "context_length_exceeded"


class PolicyConflict(InvalidRequest):
    """The request cannot be served together with the adapters that its tenant's policy names."""

    code = "policy_conflict"


class EvidenceRejected(InvalidRequest):
    """A record of evidence is malformed, or the trusted key did not sign exactly it."""

    code = "evidence_rejected"


class Unauthenticated(PolyadaptError):
    """No key, or a key that is not known here."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class Forbidden(PolyadaptError):
    """The key is known and lacks the scope for this call."""

    status = 403
    code = "forbidden"
    type = "permission_error"


class ForeignOrigin(Forbidden):
    """A keyless server was called with a foreign Origin or Host header."""

    code = "foreign_origin"


class NotFound(PolyadaptError):
    """No such path or object; a foreign object answers the same."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """No base model, adapter or version answers to this name."""

    code = "model_not_found"


class MethodNotAllowed(PolyadaptError):
    """The path exists and does not take this method."""

    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"


class Conflict(PolyadaptError):
    """The object is in a state that does not allow this call."""

    status = 409
    code = "conflict"
    type = "invalid_request_error"


class PayloadTooLarge(PolyadaptError):
    """The body is larger than this server accepts."""

    status = 413
    code = "payload_too_large"
    type = "invalid_request_error"


class UnsupportedMediaType(PolyadaptError):
    """The body's content type is not one this call reads."""

    status = 415
    code = "unsupported_media_type"
    type = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an adapter: a stable code, a sentence, and the file, key or tensor."""

    code: str
    message: str
    where: str | None = None


class AdapterRejected(PolyadaptError):
    """An adapter that cannot be served exactly; `problems` lists everything that was found."""

    status = 422
    code = "adapter_rejected"
    type = "invalid_request_error"

    def __init__(self, problems: list[Problem], *, param: str | None = None) -> None:
        if not problems:
            raise ValueError("AdapterRejected needs at least one problem")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0].message}{more}", param=param)
        self.problems = problems

    def envelope(self) -> dict[str, Any]:
        """Return the error envelope with `problems` beside the message."""
        body = super().envelope()
        body["error"]["problems"] = [asdict(problem) for problem in self.problems]
        return body


class QueueFull(PolyadaptError):
    """The waiting queue is at its limit."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestCancelled(PolyadaptError):
    """The request was cancelled before it ended."""

    status = 499
    code = "request_cancelled"


class AdapterDeleted(RequestCancelled):
    """The adapter was deleted with mode=now while the request ran."""

    status = 410
    code = "adapter_deleted"


class InternalError(PolyadaptError):
    """A fault of ours that ended this request and nothing else."""


class NumericalError(InternalError):
    """The model returned non-finite logits for this request."""

    code = "numerical_error"


class Unavailable(PolyadaptError):
    """The server cannot serve this now and expects to later."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(Unavailable):
    """The engine is starting, restarting or gone."""

    code = "engine_unavailable"


class PolicyUnavailable(Unavailable):
    """An adapter that the tenant's policy names cannot be served; without it nothing is."""

    code = "policy_unavailable"


class SecretsUnavailable(Unavailable):
    """A mark's sealed secrets do not open: another key, or a truncated or changed file."""

    code = "secrets_unavailable"


class AdapterUnavailable(Unavailable):
    """The adapter's weights could not be read or placed."""

    code = "adapter_unavailable"


class AdapterCold(AdapterUnavailable):
    """The adapter was not on the device within the time that the request gives it; it is on its
    way.
    """

    code = "adapter_cold"


class RequestTimeout(PolyadaptError):
    """The request's own time limit passed before it ended."""

    status = 504
    code = "request_timeout"
    type = "timeout_error"


class StartupError(PolyadaptError):
    """The server or a command cannot start; the message says what to change."""

    code = "startup_error"


def by_code(code: str, message: str, param: str | None = None) -> PolyadaptError:
    """Rebuild the error that crossed a process border as (code, message, param)."""
    error = _BY_CODE.get(code, InternalError)(message)
    error.param = param
    return error


def located(error: PolyadaptError, where: str) -> PolyadaptError:
    """Return the same error with `where` before its message; the one given may be shared."""
    found = by_code(error.code, f"{where}: {error.message}", error.param)
    if isinstance(error, QueueFull | Unavailable) and isinstance(found, QueueFull | Unavailable):
        found.retry_after_s = error.retry_after_s
    return found


def _leaves(root: type[PolyadaptError]) -> list[type[PolyadaptError]]:
    found = [root]
    for child in root.__subclasses__():
        found += _leaves(child)
    return found


_BY_CODE: dict[str, type[PolyadaptError]] = {
    cls.code: cls for cls in _leaves(PolyadaptError) if cls is not AdapterRejected
}
