"""What the phases say of their results: evaluation.json, proof.json, parity.json, the answers.

A report shows them, also of runs that came from elsewhere. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.job.run.codec import named
from tunesmith.job.run.schema import Count, Figure, FileRecord, Loss, Values


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    met: Count
    of: Count


@dataclass(frozen=True)
class SetScores:
    """ROUGE and BLEU (0 to 100) over the answers of one set, and how many are exact."""

    exact: Share | None = None
    of: Count | None = None
    rouge_1: Loss | None = named("rouge-1", default=None)
    rouge_2: Loss | None = named("rouge-2", default=None)
    rouge_l: Loss | None = named("rouge-l", default=None)
    bleu_4: Loss | None = named("bleu-4", default=None)


@dataclass(frozen=True)
class GuardMeasure:
    """The general prompts that show what was forgotten."""

    loss: Loss | None = None
    perplexity: Loss | None = None
    expected: Share | None = None


@dataclass(frozen=True)
class Measure:
    """One measurement of a model: the held-out loss in nat a token, and the answers."""

    loss: Loss | None = None
    perplexity: Loss | None = None
    seconds: Figure | None = None
    tokens: Count | None = None
    rows: Count | None = None
    expected: Share | None = None
    guard: GuardMeasure | None = None
    scores: Mapping[str, SetScores | None] | None = None
    omitted: Mapping[str, str | None] | None = None
    generation: Values | None = None


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json."""

    before: Measure | None = None
    after: Measure | None = None


@dataclass(frozen=True)
class ProofCheck:
    """One check of a proof; `passed` None: not possible."""

    name: str
    passed: bool | None
    detail: str
    figures: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """proof.json."""

    passed: bool = False
    checks: tuple[ProofCheck, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    seconds: Figure | None = None
    tolerance: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A renderer whose prompt differs from the training prompt."""

    renderer: str
    probe: str
    found: Any
    expected: Any
    at: Any


@dataclass(frozen=True)
class CorrectedFile:
    """A file of the export that was replaced."""

    file: str


@dataclass(frozen=True)
class Parity:
    """parity.json."""

    passed: bool = False
    accepted: bool = False
    differences: tuple[Difference, ...] = ()
    corrected: tuple[CorrectedFile, ...] = ()
    notes: tuple[str, ...] = ()
    ends: tuple[Any, ...] = ()
    before: tuple[Any, ...] = ()


@dataclass(frozen=True)
class AnswerRow:
    """A line of before.jsonl or after.jsonl."""

    prompt: str = ""
    answer: str = ""
    reference: str | None = None
    expect: str | None = None
    set: str = "prompts"
    met: bool | None = None
    finished: bool | None = None
