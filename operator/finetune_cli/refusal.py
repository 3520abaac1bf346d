"""Say what an API server's refusals mean to the person at the command line. Pure; imports no Kubernetes client."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_api.crd import GROUP, PLURAL
from finetune_api.explanation import line_of
from finetune_api.job import KIND, FieldError
from finetune_api.manifest_text import Document
from finetune_api.problem import Path, shown
from finetune_api.report import ExitCode
from finetune_trainer.errors import FineTuneError, SpecError


class ClusterError(FineTuneError):
    """The cluster did not answer, or cannot just now; worth trying again."""

    exit_code = ExitCode.STORAGE


class NotFoundError(SpecError):
    """There is no object of that name."""


class AlreadyExistsError(SpecError):
    """There is an object of that name."""


class ForbiddenError(SpecError):
    """The user may not do that, or a rule of the cluster is against it."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that the API server has against an object."""

    message: str
    field: str = ""
    """``spec.data.tasks[0].source``; empty when it is about the whole object."""


class InvalidObjectError(SpecError):
    """The API server refuses what the object says."""

    def __init__(self, message: str, causes: tuple[Cause, ...]) -> None:
        self.causes = causes
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of the API server, in the words of its access rules."""

    verb: str
    """get, list, watch, create, patch or delete."""
    resource: str
    """finetunejobs, pods or pods/log."""
    namespace: str
    name: str = ""


def explain_refusal(request: Request, code: int, body: str) -> FineTuneError:
    """Return the error that HTTP status ``code`` with ``body`` means."""
    status = _status(body)
    message = " ".join(str(status.get("message") or body[:300]).split())
    match code:
        case 401:
            return _unknown_user(code)
        case 403:
            return _forbidden(request, message)
        case 404:
            return _not_found(request, status)
        case 409 if status.get("reason") == "AlreadyExists":
            return AlreadyExistsError(f"{_subject(request)} exists already.")
        case 409:
            return ClusterError(f"{_subject(request)} was changed by somebody else meanwhile: {message}. Try again.")
        case 400 | 422:
            return InvalidObjectError(f"the cluster refuses {_subject(request)}: {message}", _causes(status, message))
        case _:
            return ClusterError(f"the cluster answers HTTP {code}: {message}. Try again in a moment.")


def field_errors(error: InvalidObjectError, document: Document) -> tuple[FieldError, ...]:
    """Return what the API server has against ``document``, as `finetune validate` would say it, in order of lines."""
    errors = [_field_error(cause, document) for cause in error.causes]
    return tuple(sorted(errors, key=lambda found: found.line or 0))


# --- kinds of refusals


def _status(body: str) -> dict[str, Any]:
    """Return the Status object in ``body``; nothing when a proxy or an unknown path answered."""
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and content.get("kind") == "Status" else {}


_NOBODY = "system:anonymous"
"""Whom an API server takes a request for that says nothing of who sends it."""


def _unknown_user(code: int) -> FineTuneError:
    return SpecError(
        f"the cluster does not accept who you are (HTTP {code}). Log in again, or choose another user: "
        "kubectl config get-contexts, then --context."
    )


def _forbidden(request: Request, message: str) -> FineTuneError:
    found = re.search(r'User "([^"]*)" cannot ', message)
    if found is None:
        return ForbiddenError(f"a rule of the cluster is against {_subject(request)}: {_without_policy(message)}")
    if found[1] == _NOBODY:
        return _unknown_user(403)
    resource, _, subresource = request.resource.partition("/")
    full = f"{resource}.{GROUP}" if resource == PLURAL else resource
    check = f"kubectl auth can-i {request.verb} {full} -n {request.namespace}"
    return ForbiddenError(
        f"user {found[1]!r} may not {request.verb} {request.resource} in namespace {request.namespace}. Ask the "
        f"administrator for a role that allows it (edit contains it once the operator is installed); check with: "
        f"{check}{f' --subresource={subresource}' if subresource else ''}"
    )


def _not_found(request: Request, status: dict[str, Any]) -> FineTuneError:
    if not status:
        return SpecError(
            f"this cluster does not know {KIND}s: the definition {PLURAL}.{GROUP} is missing. Install the operator: "
            "helm install finetune-operator charts/finetune-operator --namespace finetune-system --create-namespace; "
            "or choose another cluster with --context."
        )
    if (status.get("details") or {}).get("kind") == "namespaces":
        return NotFoundError(
            f"there is no namespace {request.namespace}. Create it: kubectl create namespace {request.namespace}; "
            "or choose another with --namespace."
        )
    return NotFoundError(f"there is no {_subject(request)}.")


def _subject(request: Request) -> str:
    kind = KIND if request.resource == PLURAL else request.resource.partition("/")[0].removesuffix("s")
    return f"{kind} {request.name or '?'} in namespace {request.namespace}"


# --- fields

_UNKNOWN = re.compile(r'unknown field "([^"]+)"')
_POLICY = re.compile(r"^.*?denied request: ", re.DOTALL)
_FIELD = re.compile(r"^(spec(?:\.\w+|\[\d+\])*)(?::\s*|\s+)")
_VALUE = r'(?:"(?:[^"\\]|\\.)*"|[^\s"][^:]*?): '
_WORDINGS = (
    (re.compile(rf"Unsupported value: {_VALUE}supported values: (.*)", re.DOTALL), r"is none of the choices \1"),
    (re.compile(r"Duplicate value: (.*)", re.DOTALL), r"stands twice: \1"),
    (re.compile(r"Required value(?:: .*)?", re.DOTALL), "is missing"),
    (re.compile(rf'Invalid value: {_VALUE}\S+ in body (must be of type \w+): "\w+"', re.DOTALL), r"\1"),
    (re.compile(rf"[A-Z][a-z]+(?: [a-z]+)*: {_VALUE}\S+ in body (.*)", re.DOTALL), r"\1"),
    (re.compile(rf"[A-Z][a-z]+(?: [a-z]+)*: {_VALUE}(.*)", re.DOTALL), r"\1"),
)
"""How the API server words a cause, and the predicate in it; the first that fits counts."""

_NOT_CHECKED = "some validation rules were not checked"
"""Follows other causes and says nothing about the object."""


def _causes(status: dict[str, Any], message: str) -> tuple[Cause, ...]:
    unknown = tuple(
        Cause("is no field in this cluster's definition; it may be of another version", field)
        for field in _UNKNOWN.findall(message)
    )
    if unknown:
        return unknown
    given = (status.get("details") or {}).get("causes") or ()
    causes = [Cause(str(one.get("message") or ""), _own_field(one.get("field"))) for one in given]
    told = tuple(_with_field(cause) for cause in causes if _NOT_CHECKED not in cause.message)
    return told or (_with_field(Cause(message)),)


def _own_field(field: object) -> str:
    return "" if field in (None, "<nil>") else str(field)


def _without_policy(message: str) -> str:
    return _POLICY.sub("", message)


def _with_field(cause: Cause) -> Cause:
    """Return ``cause`` with the field that an admission policy names in its sentence."""
    message = _without_policy(cause.message)
    found = _FIELD.match(message)
    return Cause(message[found.end() :], found[1]) if found and not cause.field else Cause(message, cause.field)


def _field_error(cause: Cause, document: Document) -> FieldError:
    path = _parts(cause.field)
    problem = _problem(cause.message)
    return FieldError(
        cause.field or "the cluster's answer",
        shown(_value_at(document.content, path)) if path else "",
        problem if problem.endswith(".") else f"{problem}.",
        "Correct it; docs/spec.md describes every field." if cause.field else "",
        line_of(path, document.lines) if path else None,
    )


def _problem(message: str) -> str:
    """Return the predicate in a message such as ``Invalid value: 0: spec.x in body should be at least 1``."""
    for pattern, wording in _WORDINGS:
        found = pattern.fullmatch(message)
        if found is not None:
            return found.expand(wording)
    return message


def _parts(field: str) -> Path:
    return tuple(int(index) if index else name for index, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", field))


def _value_at(content: Any, path: Iterable[str | int]) -> Any:
    for part in path:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None
    return content
