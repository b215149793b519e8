"""Ask a host of the inventory for sections of the probe: one SSH command."""

from __future__ import annotations

from tunesmith.hosts.probe.answer import Answer, Section, TruncatedError
from tunesmith.hosts.probe.script import ProbeSettings, script
from tunesmith.hosts.remote import Remote

# Seconds; the probe itself bounds each step that may hang.
TIMEOUT = 60.0


def ask(
    remote: Remote,
    *sections: type[Section],
    settings: ProbeSettings | None = None,
    timeout: float = TIMEOUT,
) -> Answer:
    """Return what a host says of these sections.

    Raises TruncatedError when its answer is not whole, TunesmithError when it is out of reach or
    says what no host has, UsageError for settings that cannot be.
    """
    text = script([section.SECTION for section in sections], settings or ProbeSettings())
    done = remote.run(text, timeout=timeout)
    try:
        return Answer(done.stdout, remote.name, sections)
    except TruncatedError as error:
        said = done.stderr.strip().splitlines()[-3:]
        raise TruncatedError(error.message, (*error.detail, *said), hint=error.hint) from None
