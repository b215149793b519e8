"""Text that went wrong on its way, or that a template has been put around already.

All warnings: the training would run, and learn it. Most rows of most files are clean, and a check
waits for nothing: a piece's texts are searched together, and one by one only where a sign of
something was met.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding
from tunesmith.dataset.scan import Row

_SHORT = 20  # characters that the longest word of nothing has, and some
# Rows whose texts are searched together: so many that what is copied stays in the cache.
_TOGETHER = 500
_TOLD = 10  # rows of one kind that are told one by one

# Texts, which `re` compiles and keeps when they are first needed: most checks need none.
# UTF-8 read as Latin-1 or Windows-1252 (with what is left of a quote, a dash and a Chinese
# character), and as GBK, once and twice.
_MOJIBAKE = (
    "[\u00c3\u00c2][\u0080-\u00bf\u0152-\u0178\u2013-\u2122]"
    "|\u00e2\u20ac[\u0080-\u00bf\u02dc\u0153\u201c-\u2122]"
    "|[\u00e4-\u00e9][\u00a0-\u00bf\u0192\u02c6\u02dc\u2013-\u2122\u0152-\u0178]"
    "[\u0080-\u00bf\u0192\u02c6\u02dc\u2013-\u2122\u0152-\u0178]"
    "|\u951f\u65a4\u62f7|\u70eb\u70eb\u70eb|\u9366\u3002|\u9428\u52ec|\u6d93\u20ac|\u93c4\u4f77"
)
_ENTITY = r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,4});"
# As an escape that was written twice: a line break is meant. Not in paths, regexes and LaTeX.
_BREAK = r"(?<!\\)(?:\\n){2}|(?<!\\)\\n(?=[A-Z][a-z])|[.!?;,\u3002\uff01\uff1f]\\n"
_SHEET = r"#(?:REF!|N/A|VALUE!|NAME\?|DIV/0!|NUM!|NULL!)"
_TEMPLATE = (
    r"(?m)<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|begin_of_text|user|assistant|system"
    r"|end|eom_id|endofprompt)\|>"
    "|<\uff5c(?:User|Assistant|begin\u2581of\u2581sentence|end\u2581of\u2581sentence)\uff5c>"
    r"|\[/?INST\]|<</?SYS>>|</?start_of_turn>|<end_of_turn>"
    r"|^### (?:Instruction|Response|Human|Assistant):"
)
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e"
_NO_ANSWER = frozenset(
    (
        *("nan", "NaN", "NAN", "null", "NULL", "None", "none", "N/A", "n/a", "NA", "<NA>"),
        *("undefined", "[object Object]", "TODO", "TBD", "...", "\u2026", "-", "--"),
    )
)
_PLACEHOLDER = "<(?:image|video|audio)>"


@dataclass(frozen=True)
class _Kind:
    """Something a text may have: `first`, characters of which one is in it, then `signs`; what
    finds it; what to say."""

    name: str
    first: str
    signs: tuple[str, ...]
    pattern: str
    message: str
    fix: str
    many: str

    @property
    def foreign(self) -> bool:
        """Whether no text of bytes below 128 has it."""
        return not self.first.isascii()

    def may_be_in(self, whole: str) -> bool:
        """Whether a text has it, told as fast as can be for one that has not."""
        if self.foreign and whole.isascii():
            return False
        if not any(sign in whole for sign in self.first):
            return False
        return any(sign in whole for sign in self.signs) and bool(re.search(self.pattern, whole))


_KINDS = (
    _Kind(
        "replaced",
        "\ufffd",
        ("",),
        "\ufffd+",
        "U+FFFD ({shown}) stands for characters that were lost",
        "make the file again from its source, read in the encoding it has",
        "hold U+FFFD, a lost character",
    ),
    _Kind(
        "mojibake",
        "\u00c3\u00c2\u00e2\u00e4\u00e5\u00e6\u00e7\u00e8\u00e9\u951f\u70eb\u9366\u9428\u6d93\u93c4",
        ("",),
        _MOJIBAKE,
        "{shown} looks like UTF-8 that was read in another encoding",
        "make the file again from its source, read as UTF-8",
        "look as if they had been read in another encoding",
    ),
    _Kind(
        "entity",
        "&",
        (";",),
        _ENTITY,
        "{shown} is an entity of HTML, and is learned as it stands",
        "unescape the texts (Python: html.unescape)",
        "hold entities of HTML",
    ),
    _Kind(
        "break",
        "\\",
        ("\\n", "\\r"),
        _BREAK,
        "a backslash and a letter ({shown}) where a line break seems to be meant",
        "unescape the texts once more; right for code",
        "hold a line break written as backslash and letter",
    ),
    _Kind(
        "sheet",
        "#",
        ("#REF!", "#N/A", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!"),
        _SHEET,
        "{shown} is an error of a spreadsheet",
        "correct the cell there and export again, or delete the row",
        "hold an error of a spreadsheet",
    ),
    _Kind(
        "template",
        "<[#",
        ("<|", "<\uff5c", "[INST]", "[/INST]", "<<", "<start_of", "</start_of", "<end_of", "### "),
        _TEMPLATE,
        "{shown} belongs to a chat template, which is put around each row again",
        "write question and answer alone",
        "have a chat template around them already",
    ),
)


class Garbled:
    """Looks at rows as they come; `findings` tells at the end of how many there are."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._counts: Counter[str] = Counter()
        self._media = any(entry.column(role) for role in ("images", "videos", "audios"))
        # The templates of texts to go on training with are none of a chat's.
        self._kinds = [k for k in _KINDS if k.name != "template" or entry.stage() != "pt"]

    def add(self, piece: Piece) -> Iterator[Finding]:
        """Yield warnings of the rows of a piece, the first of each kind."""
        rows = [row for row in piece.rows if isinstance(row.value, dict)]
        for start in range(0, len(rows), _TOGETHER):
            yield from self._rows(rows[start : start + _TOGETHER], piece.file)

    def _rows(self, rows: Sequence[Row], file: str | None) -> Iterator[Finding]:
        values = list(itertools.chain.from_iterable(row.value.values() for row in rows))
        texts = [value for value in values if type(value) is str]
        texts += _all_texts(value for value in values if value and type(value) is not str)
        # Apart: a text of bytes is searched a good deal faster than one that holds Chinese.
        others = [text for text in texts if not text.isascii()]
        plain = "\n".join(filter(str.isascii, texts) if others else texts)
        wholes = (plain, "\n".join(others)) if others else (plain,)
        wanted = [kind for kind in self._kinds if any(map(kind.may_be_in, wholes))]
        nothing = not _NO_ANSWER.isdisjoint([text for text in texts if len(text) < _SHORT])
        unseen = any(sign in whole for whole in wholes[1:] for sign in _INVISIBLE)
        marked = [whole for whole in wholes if "<" in whole]
        thought = any("<think>" in whole for whole in marked)
        media = not self._media and any(re.search(_PLACEHOLDER, whole) for whole in marked)
        if wanted or nothing or unseen or thought or media:
            for row in rows:
                yield from self._row(row, file, wanted, media)

    def _row(
        self, row: Row, file: str | None, wanted: Sequence[_Kind], media: bool
    ) -> Iterator[Finding]:
        def found(kind: str, field: str, message: str, fix: str) -> Iterator[Finding]:
            self._counts[kind] += 1
            if self._counts[kind] <= _TOLD:
                yield Finding("warning", message, fix, row.number, row.line, field=field, file=file)

        said = list(_said(row.value, self._entry))
        told: set[str] = set()
        for field, text, _ in said:
            for kind in wanted:
                if kind.name not in told and (match := re.search(kind.pattern, text)):
                    told.add(kind.name)
                    shown = repr(match.group().strip()[:20])
                    yield from found(kind.name, field, kind.message.format(shown=shown), kind.fix)
        answers = [(field, text) for field, text, is_answer in said if is_answer]
        for place, (field, text) in enumerate(answers):
            if text.strip() in _NO_ANSWER:
                message = f"the answer is {text.strip()!r}"
                fix = "right where it was meant; else write the answer or delete the row"
                yield from found("nothing", field, message, fix)
            elif text.strip() and not text.strip(_INVISIBLE + " \t\r\n"):
                message = "the answer has characters of no width only"
                yield from found("unseen", field, message, "write the answer or delete the row")
            if "<think>" in text and place < len(answers) - 1 and not self._entry.ranking:
                yield from found(
                    "thought",
                    field,
                    "<think> stands in an answer before the last: it is trained there, and taken "
                    "out when the model is asked",
                    "keep it in the last answer only",
                )
        if media and any(re.search(_PLACEHOLDER, text) for _, text, _ in said):
            yield from found(
                "media",
                "",
                "<image>, <video> or <audio> stands in a text, and the entry names no media",
                "name their column in dataset_info.json, or delete the sign",
            )

    def findings(self) -> Iterator[Finding]:
        """Yield how many rows there are of each kind of which not all were told."""
        names = {kind.name: kind.many for kind in _KINDS} | _MORE
        for name, words in names.items():
            if self._counts[name] > _TOLD:
                count = self._counts[name]
                yield Finding("note", f"{count} rows {words}; the first {_TOLD} are told", "")

    @property
    def hidden(self) -> int:
        """How many warnings were counted only."""
        return sum(max(0, count - _TOLD) for count in self._counts.values())


_MORE = {
    "nothing": "have a word for nothing as their answer",
    "unseen": "have an answer that cannot be seen",
    "thought": "have <think> before the last answer",
    "media": "name media that the entry does not",
}


def _all_texts(values: Iterable[Any]) -> Iterator[str]:
    """Yield every text of a row, whatever column it is in."""
    for value in values:
        if type(value) is str:
            yield value
        elif type(value) is list:
            yield from _all_texts(value)
        elif type(value) is dict:
            yield from _all_texts(value.values())


def _said(value: JsonObject, entry: Entry) -> Iterator[tuple[str, str, bool]]:
    """Yield (column, text, whether it is an answer) of what a row says, in order."""

    def texts(role: str) -> Iterator[tuple[str, Any]]:
        if column := entry.column(role):
            yield column, value.get(column)

    if entry.formatting == "sharegpt":
        content, role_key = entry.tag("content_tag") or "", entry.tag("role_tag") or ""
        for column, messages in texts("messages"):
            for message in messages if isinstance(messages, list) else ():
                if isinstance(message, dict) and isinstance(message.get(content), str):
                    replies = (entry.tag("assistant_tag"), entry.tag("function_tag"))
                    yield column, message[content], message.get(role_key) in replies
        for role in ("chosen", "rejected") if entry.ranking else ():
            for column, answer in texts(role):
                if isinstance(answer, dict) and isinstance(answer.get(content), str):
                    yield column, answer[content], True
        return
    for column, history in texts("history"):
        for pair in history if isinstance(history, list) else ():
            for place, text in enumerate(pair if isinstance(pair, list) else ()):
                if isinstance(text, str):
                    yield column, text, place == 1
    asked = ("prompt", "query", "system")
    answers = ("chosen", "rejected") if entry.ranking else ("response",)
    for role in (*asked, *answers):
        for column, text in texts(role):
            if isinstance(text, str):
                yield column, text, role in answers
