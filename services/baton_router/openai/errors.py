"""Errors in OpenAI's shape, with the right status."""

import logging
import math

import orjson
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from baton.errors import BatonError, InternalError

log = logging.getLogger(__name__)

BUG = InternalError("an error of ours; it is in the router's log")
CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


def error_body(error: BatonError) -> bytes:
    return _body(error.message, error.type, error.param, error.code)


def error_response(error: BatonError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), error.status, headers, "application/json")


def http_error_response(request: Request, error: HTTPException) -> Response:
    """Unknown routes and methods, and bodies that cannot be read."""
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = f"there is no {request.url.path} here"
    if error.status_code == 405:
        detail = f"{request.url.path} does not take {request.method}"
    body = _body(detail, "invalid_request_error", None, CODES.get(error.status_code))
    return Response(body, error.status_code, error.headers, "application/json")


def response_to(request: Request, error: Exception) -> Response:
    if isinstance(error, BatonError):
        return error_response(error)
    if isinstance(error, HTTPException):
        return http_error_response(request, error)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(BUG)


async def on_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of exceptions."""
    return response_to(request, error)


def _body(message: str, type_: str, param: str | None, code: str | None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})
