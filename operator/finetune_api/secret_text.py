"""Recognise what looks like a secret in any text, to count it or to keep it out. Pure; imports nothing of ours.

The patterns find the usual forms of keys and tokens; a password that looks like a word is no more recognisable here
than it is to a reader.
"""

import re

MASK = "***"

SECRET = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]{0,20000}-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\b(?:ghp|gho|ghs|hf|glpat)[_-][A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abp]-[A-Za-z0-9-]{10,}"
)
"""Access keys, tokens and private keys."""

_NAMED = re.compile(
    r"(?i)(\b[\w.-]{0,40}(?:secret|password|passwd|token|api[_-]?key|access[_-]?key|authorization)[\w.-]{0,40}"
    r"[\"']?\s{0,4}[=:]\s{0,4}[\"']?(?:bearer\s{1,4}|basic\s{1,4})?)([^\s\"',;}]{6,400})"
)
_CREDENTIALS = re.compile(r"([a-z][a-z0-9+.-]{0,20}://[^\s/@:]{1,200}:)([^\s/@]{1,400})(@)", re.IGNORECASE)


def masked(text: str) -> str:
    """Return ``text`` with `MASK` for everything that looks like a secret, or that stands behind the name of one."""
    text = SECRET.sub(MASK, text)
    text = _NAMED.sub(rf"\1{MASK}", text)
    return _CREDENTIALS.sub(rf"\1{MASK}\3", text)
