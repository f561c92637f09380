"""Errors as OpenAI's clients expect them: a status, and a body that says what was wrong."""

from __future__ import annotations

from typing import Any

from hybridgen.errors import (
    ConfigError,
    HybridgenError,
    PromptError,
    RequestError,
    SamplingError,
    ServerBusyError,
    ServerError,
    TokenizerError,
)

_CALLERS = (ConfigError, PromptError, RequestError, SamplingError, TokenizerError)
"""What these say is for the caller to change."""
_UNAVAILABLE = frozenset({None, "shutting_down", "stuck", "timeout", "clients"})
"""Codes of a `ServerError` that may go away by itself; None: there is no connection to the server."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            kind: the `type` of OpenAI's body.
            param: the field that was wrong.
            code: a word for programs.
            retry_after: seconds.
        """
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return {} if self.retry_after is None else {"retry-after": f"{max(1, round(self.retry_after))}"}


def api_error(error: Exception) -> ApiError:
    """The answer for an exception of ours; any other one's message stays in the log."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ServerBusyError):
        return ApiError(
            text, status=429, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=error.retry_after
        )
    if isinstance(error, ServerError):
        if error.code == "limit":
            return ApiError(text)
        if error.code in _UNAVAILABLE:
            return ApiError(text, status=503, kind="server_error", code=error.code or "unavailable", retry_after=1.0)
        return ApiError(text, status=500, kind="server_error", code=error.code)
    if isinstance(error, _CALLERS):
        return ApiError(text)
    if isinstance(error, HybridgenError):
        return ApiError(text, status=500, kind="server_error")
    return ApiError("the server failed at this request; its log says why", status=500, kind="server_error")
