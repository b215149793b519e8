"""Hints of personal data and of keys in a text. Hints: a pattern proves nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MAIL = re.compile(r"[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}")
_DIGITS = re.compile(r"[0-9]{11,19}[Xx]?")
_INTERNATIONAL = re.compile(r"\+\d[\d ()-]{8,18}\d")
# Domains that RFC 2606 keeps for examples, and the usual made-up ones.
_EXAMPLES = ("example.com", "example.org", "example.net", "test.com", ".example", ".invalid")
_KEYS = (
    ("sk-", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"), "an API key"),
    ("AKIA", re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "an AWS access key"),
    ("ghp_", re.compile(r"\bghp_[A-Za-z0-9]{36}\b"), "a GitHub token"),
    ("hf_", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"), "a Hugging Face token"),
    ("-----BEGIN", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key"),
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def hints(text: str) -> Iterator[tuple[str, str]]:
    """Yield (what it looks like, the text with its middle hidden), each kind once."""
    # Cheap words first: nearly all texts hold none of these.
    if "@" in text:
        for mail in _MAIL.finditer(text):
            if not mail.group().lower().endswith(_EXAMPLES):
                yield "an e-mail address", hidden(mail.group())
                break
    number = _number(text)
    if number is not None:
        yield number
    elif "+" in text and (found := _INTERNATIONAL.search(text)):
        yield "a phone number", hidden(found.group())
    for word, pattern, name in _KEYS:
        if word in text and (found := pattern.search(text)):
            yield name, hidden(found.group())


def hidden(text: str) -> str:
    """Return a text of which only the ends can be read."""
    keep = 3 if len(text) > 8 else 1
    return f"{text[:keep]}...{text[-2:]}"


def _number(text: str) -> tuple[str, str] | None:
    for match in _DIGITS.finditer(text):
        digits = match.group()
        before = text[match.start() - 1 : match.start()]
        if before.isalnum() or before in (".", "_"):
            continue
        plain = digits.rstrip("Xx")
        if len(plain) == 11 and re.match("1[3-9]", plain):
            return "a mobile number", hidden(plain)  # China's numbering plan
        if len(digits) == 18 and _is_identity(digits):
            return "an identity number", hidden(digits)
    return None


def _is_identity(digits: str) -> bool:
    """Whether they are a Chinese identity number: birth date and check digit (GB 11643)."""
    if not re.match(r"\d{6}(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", digits):
        return False
    total = sum(int(digit) * weight for digit, weight in zip(digits[:17], _WEIGHTS, strict=True))
    return "10X98765432"[total % 11] == digits[17].upper()
