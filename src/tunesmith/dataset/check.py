"""Check one data file, or a folder, against LLaMA-Factory 0.9.3's rules, in one pass."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.callbacks import OnBytes
from tunesmith.dataset.alpaca import AlpacaRules
from tunesmith.dataset.columns import Dates, Kinds, Rules, Shapes, check_columns
from tunesmith.dataset.duplicates import Duplicates
from tunesmith.dataset.entry import FORMATTINGS, Entry
from tunesmith.dataset.garbled import Garbled
from tunesmith.dataset.media import Media, MediaPlace
from tunesmith.dataset.preferences import Preferences
from tunesmith.dataset.reading import TYPES, Piece, Reader, Tables
from tunesmith.dataset.report import DatasetReport, Finding, Findings, spread
from tunesmith.dataset.sharegpt import SharegptRules
from tunesmith.dataset.syntax import told

if TYPE_CHECKING:
    from tunesmith.dataset.quality import Looks


def check_file(
    path: Path,
    entry: Entry,
    stage: str | None = None,
    *,
    tables: Tables | None = None,
    thorough: bool = False,
    media: MediaPlace | None = None,
    progress: OnBytes | None = None,
) -> DatasetReport:
    """Check a file or folder; all faults go into one report, none is raised.

    `stage` is LLaMA-Factory's (sft, pt, rm, dpo, ppo, kto); None means the one the entry
    is made for: rm for ranking entries, kto for those with a kto_tag, else sft. `tables`
    reads what is not JSON; without it such files are noted, not judged. `thorough` also
    looks for what no rule forbids: near-duplicates, personal data, mixed languages. `media`
    says where pictures lie (default: beside the file) and for which template.
    """
    reader = Reader(path, tables, progress)
    check = _Check(path, entry, "rm" if stage == "dpo" else stage or entry.stage(), thorough, media)
    for piece in reader.pieces():
        check.add(piece)
    if not reader.checked:
        why = f"{_suffix(path)} files are read by the training environment: not checked here"
        return unchecked(entry, str(path), why)
    return check.report(reader)


def unchecked(entry: Entry, file: str, why: str) -> DatasetReport:
    """Return the report of a data set whose rows cannot be looked at here."""
    note = Finding("note", why, "")
    return DatasetReport(entry.key, file, entry.formatting, None, (note,), None, None, None, 0)


class _Check:
    """All rules, fed piece by piece."""

    def __init__(
        self, path: Path, entry: Entry, stage: str, thorough: bool, media: MediaPlace | None
    ) -> None:
        self._path, self._entry, self._stage = path, entry, stage
        self._again = f"inv data.register --file {shlex.quote(str(path))} "
        self._again += f"--key {entry.key or path.stem} --replace"
        self._convert = None
        if path.suffix == ".csv":
            self._convert = f"`inv data.convert {shlex.quote(str(path))}`"
        self._count = 0
        self._stops = False
        self._no_objects = Findings()
        self._by_row, self._by_kind = Findings(), Findings()
        self._blamed: set[tuple[str | None, int, str]] = set()
        self._files: dict[str | None, int] = {}
        self._shapes, self._kinds, self._dates = Shapes(), Kinds(), Dates(entry)
        self._duplicates = Duplicates()
        self._garbled = Garbled(entry)
        self._preferences = Preferences(entry, stage)
        self._media = Media(entry, media or MediaPlace(path.parent))
        self._looks: Looks | None = None
        if thorough:
            # Here: numpy, a fifth of what `inv --dry train` waits for.
            from tunesmith.dataset.quality import Looks

            self._looks = Looks(entry)
        self._rules: AlpacaRules | SharegptRules | None = None
        if entry.formatting == "alpaca":
            self._rules = AlpacaRules(entry, stage, self._convert)
        elif entry.formatting == "sharegpt":
            self._rules = SharegptRules(entry, stage, self._again)

    def add(self, piece: Piece) -> None:
        """Check the rows of a piece."""
        self._files.setdefault(piece.file, len(self._files))
        self._count += len(piece.rows)
        for row in piece.rows:
            if not isinstance(row.value, dict):
                self._stops = True
                message = f"{told(row.value)}, not an object"
                self._no_objects.add(
                    Finding("error", message, "write {...}", row.number, row.line, file=piece.file)
                )
        if self._rules is None:
            return
        self._shapes.add(piece)
        for fault in itertools.chain(self._rules.add(piece), self._media.add(piece)):
            self._by_row.add(fault)
            if fault.row is not None and fault.field and len(self._blamed) < 100_000:
                self._blamed.add((fault.file, fault.row, fault.field))
        self._by_kind.extend(self._kinds.add(piece, self._blamed))
        self._by_row.extend(self._preferences.add(piece))
        self._by_row.extend(self._garbled.add(piece))
        self._dates.add(piece)
        self._duplicates.add(piece)
        if self._looks is not None:
            self._looks.add(piece)

    def report(self, reader: Reader) -> DatasetReport:
        """Return all that was found."""
        of_file = list(_file_faults(self._path, reader, self._entry, self._stage))
        parts = [*of_file, *reader.found.held, *self._no_objects.held]
        beyond = [reader.found, self._no_objects]
        rules = self._rules if self._rules is not None else Rules(stops=True)
        stops = self._stops or not reader.readable or bool(of_file)
        looks = {}
        if self._rules is not None and self._shapes.first():
            of_columns, fails = self._whole_file(self._rules)
            stops = stops or fails or self._kinds.stops or rules.stops
            rows = [*of_columns, *self._by_row.held, *self._by_kind.held]
            parts += sorted(rows, key=lambda f: (self._files.get(f.file, 0), f.row or 0))
            again = self._duplicates.findings()
            parts += [*again.held, *self._garbled.findings(), *self._preferences.findings()]
            beyond += [self._by_row, self._by_kind, again]
            if self._looks is not None:
                seen = self._looks.findings(self._duplicates.again)
                parts += seen.held
                beyond.append(seen)
                looks = self._looks.record() | {"duplicates": len(self._duplicates.again)}
        else:
            stops = True
        return DatasetReport(
            key=self._entry.key,
            file=str(self._path),
            formatting=self._entry.formatting,
            rows=self._count,
            findings=tuple(parts),
            sha256=reader.sha256,
            prompt_characters=spread(rules.prompt_lengths),
            response_characters=spread(rules.answer_lengths),
            kept=0 if stops else rules.kept,
            hidden_errors=sum(part.hidden("error") for part in beyond),
            hidden_warnings=sum(part.hidden("warning") for part in beyond)
            + self._garbled.hidden
            + self._preferences.hidden,
            media=tuple(self._media.files),
            absolute_media=self._media.absolute,
            looks=looks,
        )

    def _whole_file(self, rules: AlpacaRules | SharegptRules) -> tuple[list[Finding], bool]:
        """Return what holds for the file as a whole, and whether LLaMA-Factory stops at it.

        Row rules leave a column, or a message key, that no row has to this.
        """
        entry = self._entry
        used = {column for role in entry.used_roles() if (column := entry.column(role))}
        absent = frozenset(used - set(self._shapes.first()))
        findings = check_columns(self._shapes, entry, self._stage, self._again, self._convert)
        self._by_row.drop(absent)
        keys: list[Finding] = []
        if isinstance(rules, SharegptRules):
            column = entry.column("messages")
            keys = list(rules.key_faults())
            if column is None or column in absent or keys:
                self._by_row = Findings()
        stops = bool(absent or keys) or self._dates.stops
        return [*findings, *keys, *self._dates.findings()], stops


def _file_faults(path: Path, reader: Reader, entry: Entry, stage: str) -> Iterator[Finding]:
    if reader.sha256 is not None and path.is_file() and path.suffix not in TYPES:
        message = (
            f"LLaMA-Factory tells the type by the name, {path.suffix or 'no suffix'} is unknown"
        )
        yield Finding("error", message, f"rename it; known are {', '.join(TYPES)}")
    if entry.formatting not in FORMATTINGS:
        message = f"formatting {entry.formatting} is unknown to LLaMA-Factory"
        yield Finding("error", message, f"write {' or '.join(FORMATTINGS)} in dataset_info.json")
    if entry.ranking != (stage == "rm"):
        kind = "pairs (ranking: true)" if entry.ranking else "no pairs (ranking: false)"
        message = f"the entry holds {kind}, which stage {stage} refuses"
        yield Finding("error", message, "choose another data set or stage; rm and dpo take pairs")


def _suffix(path: Path) -> str:
    if path.is_dir():
        return next((file.suffix for file in path.iterdir()), "")
    return path.suffix
