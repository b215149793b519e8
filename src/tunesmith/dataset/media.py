"""Pictures, films and sounds that rows name: there, readable, and as many as are asked for.

Source: DatasetConverter._find_medias (data/converter.py) and MMPluginMixin (data/mm_plugin.py) of
LLaMA-Factory 0.9.3. There a wrong number stops the training without the row's number, and a
missing file when its row's turn has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Severity
from tunesmith.dataset.syntax import told

PLACEHOLDERS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
_KINDS = {"images": "picture", "videos": "film", "audios": "sound"}
_SEEN, _FILMS = ("images",), ("images", "videos")
# What each template of 0.9.3 takes besides text; the others take none.
TAKEN: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("gemma3", "granite3_vision", "kimi_vl", "llama4", "mllama", "llava", "yi_vl"),
            *("llava_next", "llava_next_llama3", "llava_next_mistral", "llava_next_qwen"),
            *("llava_next_yi", "mistral_small", "pixtral", "paligemma", "paligemma_chat"),
        ),
        _SEEN,
    ),
    **dict.fromkeys(
        (
            *("intern_vl", "llava_next_video", "llava_next_video_mistral", "llava_next_video_yi"),
            *("mimo_vl", "qwen2_vl", "minicpm_v", "video_llava"),
        ),
        _FILMS,
    ),
    "minicpm_o": (*_FILMS, "audios"),
    "qwen2_omni": (*_FILMS, "audios"),
    "qwen2_audio": ("audios",),
}
# What files begin with: (offset, bytes).
_HEADS: Mapping[str, tuple[tuple[int, bytes], ...]] = {
    "images": (
        *((0, head) for head in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0")),
        *((0, b"MM\0*"), (8, b"WEBP"), (4, b"ftyp"), (0, b"\0\0\1\0"), (4, b"jP  ")),
    ),
    "videos": (
        *((4, b"ftyp"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), (4, b"moov"), (4, b"mdat")),
        *((0, b"FLV"), (0, b"\0\0\1"), (0, b"\x47"), (0, b"OggS"), (0, b"GIF8"), (4, b"wide")),
    ),
    "audios": (
        *((8, b"WAVE"), (0, b"fLaC"), (0, b"OggS"), (0, b"ID3"), (4, b"ftyp"), (8, b"AIFF")),
        *((0, b"\xff\xfb"), (0, b"\xff\xf3"), (0, b"\xff\xf2"), (0, b"\xff\xf1"), (0, b".snd")),
    ),
}
# What stands in the place of a file that was not really fetched.
_NO_MEDIA = (
    (b"version https://git-lfs", "a pointer of Git LFS", "`git lfs pull` fetches the file"),
    (b"<svg", "SVG, which cannot be read as a picture", "save it as PNG"),
    (b"<", "text (a page of a server?)", "download it again"),
    (b"{", "text (an answer of a server?)", "download it again"),
)


@dataclass(frozen=True)
class MediaPlace:
    """Where a config's media lie and which kinds its template takes; None: not known here."""

    folder: Path
    template: str | None = None

    @property
    def taken(self) -> tuple[str, ...] | None:
        """The roles (images, videos, audios) whose files the model can be given."""
        return None if self.template is None else TAKEN.get(self.template, ())


class Media:
    """Checks each row's media; `files` are those that are there, `absolute` those named so."""

    def __init__(self, entry: Entry, place: MediaPlace) -> None:
        self._entry, self._place = entry, place
        self._columns = {role: column for role in PLACEHOLDERS if (column := entry.column(role))}
        self._judged: dict[tuple[str, str], tuple[Severity, str, str] | None] = {}
        self._refused: set[str] = set()
        self.files: dict[str, None] = {}
        self.absolute: str | None = None

    def add(self, piece: Piece) -> Iterator[Finding]:
        """Yield what is wrong with the media of the rows of a piece."""
        if not self._columns:
            return
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            for role, column in self._columns.items():
                for severity, message, fix in self._row(row.value, role, column):
                    yield Finding(
                        severity,
                        message,
                        fix,
                        row.number,
                        row.line,
                        field=column,
                        file=piece.file,
                    )

    def _row(
        self, value: JsonObject, role: str, column: str
    ) -> Iterator[tuple[Severity, str, str]]:
        held = value.get(column)
        named = [] if held is None else held if isinstance(held, list) else [held]
        taken = self._place.taken
        if taken is not None and role not in taken:
            if named and role not in self._refused:
                self._refused.add(role)
                yield (
                    "error",
                    f'"{column}" names {role}, and template {self._place.template} takes none',
                    f"{_models(role)}, or take the column out of dataset_info.json",
                )
            return
        for number, texts in self._counted(value, PLACEHOLDERS[role]):
            if number != len(named):
                yield (
                    "error",
                    f"{len(named)} {role} and {number} {PLACEHOLDERS[role]} in {texts}",
                    f"write {PLACEHOLDERS[role]} where each belongs, in a question as a rule",
                )
                break
        for item in named:
            # A film may be a list of its pictures.
            frames = role == "videos" and isinstance(item, list)
            for name in item if frames else (item,):
                # A picture inside the row (Parquet) is {"bytes", "path"}.
                if isinstance(name, dict) and (frames or role == "images"):
                    continue
                if not isinstance(name, str):
                    yield (
                        "error",
                        f'"{column}" holds {told(name)}, not the name of a file',
                        'write ["name", ...]',
                    )
                    return
                if fault := self._file("images" if frames else role, name):
                    yield fault

    def _counted(self, value: JsonObject, placeholder: str) -> Iterator[tuple[int, str]]:
        """Yield the placeholders of a row, with each answer of a pair, and where they stand."""
        entry = self._entry
        before = 0
        if entry.formatting == "sharegpt":
            content, role = entry.tag("content_tag") or "", entry.tag("role_tag") or ""
            messages = value.get(entry.column("messages") or "")
            said = (
                [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
            )
            if said and entry.tag("system_tag") and said[0].get(role) == entry.tag("system_tag"):
                said = said[1:]
            before = sum(str(message.get(content)).count(placeholder) for message in said)
        else:
            history = value.get(entry.column("history") or "")
            for pair in history if isinstance(history, list) else ():
                before += sum(str(text).count(placeholder) for text in pair or ())
            for part in ("prompt", "query"):
                before += str(value.get(entry.column(part) or "")).count(placeholder)
        roles = ("chosen", "rejected") if entry.ranking else ("response",)
        if entry.formatting == "sharegpt" and not entry.ranking:
            yield before, "the messages"
            return
        for name in roles:
            answer = value.get(entry.column(name) or "")
            text = (
                answer.get(entry.tag("content_tag") or "") if isinstance(answer, dict) else answer
            )
            of = f' with "{entry.column(name)}"' if entry.ranking else ""
            yield before + str(text).count(placeholder), f"the texts{of}"

    def _file(self, role: str, name: str) -> tuple[Severity, str, str] | None:
        """Return what is wrong with a file that rows name; it is told for the first row only."""
        if (role, name) in self._judged:
            return None
        if Path(name).is_absolute() and self.absolute is None:
            self.absolute = name
        path = self._place.folder / name
        fault = self._fault(role, name, path)
        self._judged[role, name] = fault
        if fault is None or fault[0] != "error":
            self.files[str(path)] = None
        return fault

    def _fault(self, role: str, name: str, path: Path) -> tuple[Severity, str, str] | None:
        kind = _KINDS[role]
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            fix = f"names are looked up in {self._place.folder} (`media_dir`, or `dataset_dir`)"
            return "error", f"the {kind} {name} {what}", fix
        try:
            with path.open("rb") as stream:
                head = stream.read(32)
        except OSError as error:
            return "error", f"the {kind} {name} cannot be read: {error.strerror}", "mend its rights"
        if not head:
            return "error", f"the {kind} {name} is empty", "copy it again, or delete the row"
        for begin, what, fix in _NO_MEDIA:
            if head.lstrip().startswith(begin):
                return "error", f"the {kind} {name} is {what}", fix
        if not any(head[at : at + len(sign)] == sign for at, sign in _HEADS[role]):
            fix = "is it one? save it in a usual format"
            return "warning", f"the {kind} {name} begins as no {kind} that is known", fix
        return None


def _models(role: str) -> str:
    names = [name for name, taken in TAKEN.items() if role in taken]
    return f"take a model of a template that does ({', '.join(names[-4:])} ...)"
