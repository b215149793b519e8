"""Let a host resume cut-off runs by itself when it starts, where its platform offers a hook.

The script is on the data disk; in the platform's own file, which a rebuild takes away, stands
one line that calls it. Off unless it is asked for.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.layout import Layout
from tunesmith.hosts.platforms import load_platforms, platform_of
from tunesmith.hosts.remote import Remote

# $1 base, $2 interpreter, $3 the platform's file, $4 install, renew or remove.
_SCRIPT = """
script=$1/autostart.sh
# The platform's file is read, changed and written again: by one of us at a time.
exec 9>"$1/.autostart.lock" && flock 9 || exit 1
[ "$4" != renew ] || [ -f "$script" ] || exit 0
if [ -f "$3" ]; then
    others=$(sed '/^# BEGIN tunesmith$/,/^# END tunesmith$/d' "$3") || exit 1
    printf '%s' "${others:+$others
}" >"$3" || exit 1
fi
if [ "$4" = remove ]; then
    rm -f "$script"
    exit
fi
cat >"$script.part" <<END
#!/bin/sh
# Made by inv host.autostart: continue the runs that a restart has cut off.
: "\\${HOME:=/root}"
export HOME
date
cd "$1" && . ./env.sh && exec "$2" -I -m tunesmith.job.supervisor.agent --runs "$1/runs" \\
    resume-all --cause autostart
END
chmod 0755 "$script.part" && mv "$script.part" "$script" || exit 1
cat >>"$3" <<END
# BEGIN tunesmith
[ ! -r "$script" ] || sh "$script" >>"$1/autostart.log" 2>&1 </dev/null
# END tunesmith
END
"""


def install(remote: Remote, layout: Layout, platforms: Path) -> None:
    """Let the host resume its runs at each start. `platforms` is configs/platforms.yml.

    Raises UsageError where it is not known what the platform runs at a start.
    """
    _change(remote, layout, platforms, "install")


def remove(remote: Remote, layout: Layout, platforms: Path) -> None:
    """Undo `install`. Raises UsageError as `install` does."""
    _change(remote, layout, platforms, "remove")


def renew(remote: Remote, layout: Layout, platforms: Path) -> None:
    """Write the line again where `install` was asked for and a rebuild has taken it."""
    if platform_of(load_platforms(platforms), str(layout.disk)).start_hook:
        _change(remote, layout, platforms, "renew")


def _change(remote: Remote, layout: Layout, platforms: Path, what: str) -> None:
    platform = platform_of(load_platforms(platforms), str(layout.disk))
    if platform.start_hook is None:
        raise UsageError(
            f"{remote.name}: what a {platform.name} host runs at its start is not known; after a "
            f"restart `inv resume --on {remote.name}` continues the runs"
        )
    words = [str(layout.base), str(layout.python), platform.start_hook, what]
    done = remote.run(_SCRIPT, arguments=words)
    if done.returncode != 0:
        raise TunesmithError(
            f"{remote.name}: {platform.start_hook} cannot be changed", done.stderr.splitlines()[-3:]
        )
