"""A stand-in for conda, on py-rattler. It is not conda and says so in its --version.

conda itself cannot be had from PyPI or Debian, so a replica host carries this instead: the
same words, files and exit codes for what provisioning uses, and real solving, downloading
and linking of real conda packages. Anything it does not know it refuses as conda refuses
a wrong option: exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

VERSION = "25.3.1"
ROOT = Path(sys.prefix)
ALIAS = "https://conda.anaconda.org"
LISTS = ("envs_dirs", "pkgs_dirs", "channels", "create_default_packages")
VALUES = ("auto_activate_base", "channel_priority", "ssl_verify", "show_channel_urls")


class CondaError(Exception):
    """What conda reports with exit code 1; `kind` is the word it prints first."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def main(argv: Sequence[str]) -> int:
    """Run one command line; return the exit code."""
    if argv[:1] == ["shell.posix"]:
        return _shell(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        return arguments.do(arguments) or 0
    except CondaError as error:
        if getattr(arguments, "json", False):
            print(json.dumps({"error": f"{error}", "exception_name": error.kind}, indent=2))
        else:
            print(f"\n{error.kind}: {error}\n", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conda", allow_abbrev=False)
    shown = f"conda {VERSION} (a stand-in made for tests, not conda)"
    parser.add_argument("-V", "--version", action="version", version=shown)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, do: Any, among: Any = commands, **rest: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = among.add_parser(name, allow_abbrev=False, **rest)
        made.set_defaults(do=do)
        made.add_argument("--json", action="store_true")
        made.add_argument("-q", "--quiet", action="store_true")
        return made

    def target(parser: argparse.ArgumentParser) -> None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument("-n", "--name")
        which.add_argument("-p", "--prefix")

    def solving(parser: argparse.ArgumentParser) -> None:
        target(parser)
        parser.add_argument("-y", "--yes", action="store_true")
        parser.add_argument("-d", "--dry-run", action="store_true")
        parser.add_argument("-c", "--channel", action="append", default=[])
        parser.add_argument("--override-channels", action="store_true")
        parser.add_argument("--strict-channel-priority", action="store_true")
        parser.add_argument("--no-default-packages", action="store_true")
        parser.add_argument("specs", nargs="*")

    info = add("info", _info)
    info.add_argument("--base", action="store_true")
    info.add_argument("-e", "--envs", action="store_true")
    solving(add("create", _create))
    solving(add("install", _install))
    listing = add("list", _list)
    target(listing)
    remove = add("remove", _remove, aliases=["uninstall"])
    target(remove)
    remove.add_argument("--all", action="store_true")
    remove.add_argument("-y", "--yes", action="store_true")
    env = commands.add_parser("env").add_subparsers(required=True)
    add("list", _env_list, env)
    env_remove = add("remove", _env_remove, env)
    target(env_remove)
    env_remove.add_argument("-y", "--yes", action="store_true")
    run = add("run", _run)
    target(run)
    run.add_argument("--no-capture-output", "--live-stream", action="store_true")
    run.add_argument("command", nargs=argparse.REMAINDER)
    clean = add("clean", _clean)
    clean.add_argument("-a", "--all", action="store_true", required=True)
    clean.add_argument("-y", "--yes", action="store_true")
    for word in ("activate", "deactivate"):
        add(word, _not_initialised).add_argument("rest", nargs="*")
    config = add("config", _config)
    config.add_argument("--system", action="store_true")
    config.add_argument("--file")
    what = config.add_mutually_exclusive_group(required=True)
    for option in ("--append", "--prepend", "--add", "--remove", "--set"):
        what.add_argument(option, nargs=2, metavar=("KEY", "VALUE"))
    what.add_argument("--remove-key")
    what.add_argument("--get", nargs="?", const="", metavar="KEY")
    what.add_argument("--show", nargs="*", metavar="KEY")
    what.add_argument("--show-sources", action="store_true")
    return parser


# --- configuration -----------------------------------------------------------------------


def _user_condarc() -> Path:
    return Path(os.environ.get("CONDARC", "~/.condarc")).expanduser()


def _sources() -> dict[Path, dict[str, Any]]:
    """Return the configuration files that are there, the strongest first."""
    found = {}
    for path in (_user_condarc(), Path("~/.conda/.condarc").expanduser(), ROOT / ".condarc"):
        if path.is_file():
            found[path] = _read(path)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise CondaError("ConfigurationLoadError", f"Unable to load {path}\n{error}") from None


def _setting(key: str) -> Any:
    if key not in LISTS:
        for content in _sources().values():
            if key in content:
                return content[key]
        return None
    values: list[str] = []
    for content in _sources().values():
        values += content.get(key) or []
    if key == "envs_dirs":
        own = os.environ.get("CONDA_ENVS_DIRS") or os.environ.get("CONDA_ENVS_PATH") or ""
        standard = [str(ROOT / "envs"), str(Path("~/.conda/envs").expanduser())]
        values = [*filter(None, own.split(os.pathsep)), *values]
        standard = standard if os.access(ROOT, os.W_OK) else standard[::-1]
        values += standard
    if key == "pkgs_dirs":
        own = os.environ.get("CONDA_PKGS_DIRS") or ""
        standard = [str(ROOT / "pkgs"), str(Path("~/.conda/pkgs").expanduser())]
        values = [*filter(None, own.split(os.pathsep)), *values]
        values += standard if os.access(ROOT, os.W_OK) else standard[::-1]
    if key == "channels" and not values:
        values = ["defaults"]
    return list(dict.fromkeys(str(Path(v).expanduser()) if "dirs" in key else v for v in values))


def _config(arguments: argparse.Namespace) -> int:
    keys = (*LISTS, *VALUES)
    if arguments.show is not None:
        shown = {key: _setting(key) for key in arguments.show or keys}
        print(json.dumps(shown, indent=2) if arguments.json else yaml.safe_dump(shown), end="\n")
        return 0
    if arguments.show_sources:
        shown = {str(path): content for path, content in _sources().items()}
        print(json.dumps(shown, indent=2) if arguments.json else yaml.safe_dump(shown))
        return 0
    path = Path(arguments.file).expanduser() if arguments.file else _user_condarc()
    path = ROOT / ".condarc" if arguments.system else path
    content = _read(path)
    if arguments.get is not None:
        for key, value in content.items():
            for item in value if isinstance(value, list) else [value]:
                word = "--add" if isinstance(value, list) else "--set"
                if arguments.get in ("", key):
                    print(f"{word} {key} {item!r}")
        return 0
    if arguments.remove_key:
        if arguments.remove_key not in content:
            raise CondaError("CondaKeyError", f"'{arguments.remove_key}': undefined in config")
        del content[arguments.remove_key]
    elif arguments.set:
        key, value = arguments.set
        _known(key, VALUES)
        content[key] = {"true": True, "false": False}.get(value.lower(), value)
    else:
        pair = arguments.append or arguments.prepend or arguments.add or arguments.remove
        key, value = pair
        _known(key, LISTS)
        values = content.setdefault(key, [])
        if arguments.remove:
            if value not in values:
                raise CondaError("CondaKeyError", f"'{key}': {value!r} is not in the list")
            values.remove(value)
            if not values:
                del content[key]
        else:
            if value in values:
                where = "bottom" if arguments.append else "top"
                print(
                    f"Warning: '{value}' already in '{key}' list, moving to the {where}",
                    file=sys.stderr,
                )
                values.remove(value)
            values.insert(len(values) if arguments.append else 0, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return 0


def _known(key: str, keys: Iterable[str]) -> None:
    if key not in keys:
        raise CondaError("CondaKeyError", f"'{key}': unknown parameter")


# --- environments ------------------------------------------------------------------------


def _is_env(prefix: Path) -> bool:
    return (prefix / "conda-meta" / "history").is_file()


def _registry() -> Path:
    return Path("~/.conda/environments.txt").expanduser()


def _registered() -> list[str]:
    try:
        return _registry().read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []


def _register(prefix: Path, present: bool) -> None:
    lines = [line for line in _registered() if line and line != str(prefix)]
    lines += [str(prefix)] if present else []
    _registry().parent.mkdir(parents=True, exist_ok=True)
    _registry().write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _all_envs() -> list[Path]:
    found = [ROOT]
    for folder in _setting("envs_dirs"):
        found += sorted(path for path in Path(folder).glob("*") if _is_env(path))
    found += [Path(line) for line in _registered() if line and _is_env(Path(line))]
    return list(dict.fromkeys(found))


def _named(name: str, must_exist: bool) -> Path:
    if name in ("base", "root"):
        return ROOT
    folders = [Path(folder) for folder in _setting("envs_dirs")]
    for folder in folders:
        if _is_env(folder / name):
            return folder / name
    if must_exist:
        raise CondaError(
            "EnvironmentNameNotFound",
            f"Could not find conda environment: {name}\n"
            "You can list all discoverable environments with `conda info --envs`.",
        )
    return folders[0] / name


def _target(arguments: argparse.Namespace, must_exist: bool = True) -> Path:
    if arguments.prefix:
        prefix = Path(arguments.prefix).expanduser().absolute()
        if must_exist and not _is_env(prefix):
            raise CondaError("EnvironmentLocationNotFound", f"Not a conda environment: {prefix}")
        return prefix
    if arguments.name:
        return _named(arguments.name, must_exist)
    if must_exist:
        return Path(os.environ.get("CONDA_PREFIX") or ROOT)
    raise CondaError("ArgumentError", "one of the arguments -n/--name -p/--prefix is required")


def _info(arguments: argparse.Namespace) -> int:
    if arguments.base:
        print(ROOT)
        return 0
    if arguments.envs and not arguments.json:
        return _env_list(arguments)
    active = os.environ.get("CONDA_PREFIX")
    shown = {
        "active_prefix": active,
        "active_prefix_name": os.environ.get("CONDA_DEFAULT_ENV"),
        "channels": _setting("channels"),
        "conda_prefix": str(ROOT),
        "conda_version": VERSION,
        "config_files": [str(path) for path in _sources()],
        "default_prefix": active or str(ROOT),
        "envs": [str(path) for path in _all_envs()],
        "envs_dirs": _setting("envs_dirs"),
        "pkgs_dirs": _setting("pkgs_dirs"),
        "platform": "linux-64",
        "python_version": ".".join(map(str, sys.version_info[:3])) + ".final.0",
        "rc_path": str(_user_condarc()),
        "root_prefix": str(ROOT),
        "root_writable": os.access(ROOT, os.W_OK),
        "user_rc_path": str(_user_condarc()),
    }
    if arguments.json:
        print(json.dumps(shown, indent=2))
    else:
        for key, value in shown.items():
            print(f"{key.replace('_', ' '):>24} : {value}")
    return 0


def _env_list(arguments: argparse.Namespace) -> int:
    envs = _all_envs()
    if arguments.json:
        print(json.dumps({"envs": [str(path) for path in envs]}, indent=2))
        return 0
    folders = set(_setting("envs_dirs"))
    print("\n# conda environments:\n#")
    for path in envs:
        name = "base" if path == ROOT else path.name if str(path.parent) in folders else ""
        mark = "*" if os.environ.get("CONDA_PREFIX") == str(path) else " "
        print(f"{name:<22} {mark} {path}")
    print()
    return 0


def _list(arguments: argparse.Namespace) -> int:
    prefix = _target(arguments)
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((prefix / "conda-meta").glob("*.json"))
    ]
    if arguments.json:
        keys = ("name", "version", "build", "channel")
        rows = [{key: record.get(key) for key in keys} for record in records]
        print(json.dumps([row | {"build_string": row.pop("build")} for row in rows], indent=2))
        return 0
    print(f"# packages in environment at {prefix}:\n#")
    for record in records:
        print(f"{record['name']:<24} {record['version']:<16} {record['build']}")
    return 0


# --- solving and linking -----------------------------------------------------------------


def _channels(arguments: argparse.Namespace) -> list[str]:
    named = list(arguments.channel)
    if not arguments.override_channels:
        named += _setting("channels")
    elif not named:
        raise CondaError(
            "ArgumentError",
            "At least one -c / --channel flag must be supplied when using --override-channels.",
        )
    return [name.rstrip("/") if "://" in name else f"{ALIAS}/{name}" for name in named]


def _check_channel(url: str) -> None:
    """Say what conda says of a channel that does not answer. Raises CondaError."""
    address = f"{url}/noarch/repodata.json"
    try:
        with urllib.request.urlopen(address, timeout=15) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise CondaError(
                "UnavailableInvalidChannel",
                f"HTTP {error.code} {error.reason.upper()} for channel "
                f"{url.rpartition('/')[2]} <{url}>\n\nThe channel is not accessible or is "
                "invalid.\n\nYou will need to adjust your conda configuration to proceed.\n"
                "Use `conda config --show channels` to view your configuration's current "
                "state,\nand use `conda config --show-sources` to view config file locations.",
            ) from None
        raise CondaError(
            "CondaHTTPError", f"HTTP {error.code} {error.reason.upper()} for url <{address}>"
        ) from None
    except OSError:
        raise CondaError(
            "CondaHTTPError",
            f"HTTP 000 CONNECTION FAILED for url <{address}>\nElapsed: -\n\nAn HTTP error "
            "occurred when trying to retrieve this URL.",
        ) from None


def _solved(arguments: argparse.Namespace, specs: Sequence[str], present: Sequence[Any]) -> Any:
    import rattler
    from rattler.exceptions import SolverError

    channels = _channels(arguments)
    for url in channels:
        _check_channel(url)
    cache = Path(_setting("pkgs_dirs")[0])
    cache.mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(
            rattler.solve(
                sources=[rattler.Channel(url) for url in channels],
                specs=[_spec(text) for text in specs],
                gateway=rattler.Gateway(cache_dir=str(cache / "cache")),
                platforms=["linux-64", "noarch"],
                locked_packages=present,
                virtual_packages=rattler.VirtualPackage.detect(),
            )
        )
    except SolverError as error:
        if "No candidates were found" in str(error):
            raise CondaError(
                "PackagesNotFoundError",
                "The following packages are not available from current channels:\n\n"
                + "".join(f"  - {text}\n" for text in specs if text.split("=")[0] in str(error))
                + "\nCurrent channels:\n\n"
                + "".join(f"  - {url}\n" for url in channels),
            ) from None
        raise CondaError(
            "LibMambaUnsatisfiableError",
            f"Encountered problems while solving:\n{error}",
        ) from None


def _spec(text: str) -> str:
    """conda's `python=3.10` means 3.10.*; the solver's own grammar would want 3.10 itself."""
    name, separator, version = text.partition("=")
    plain = separator and version and version[0] not in "=<>!~" and "=" not in version
    if plain and name.strip("<>!~") == name and "*" not in version:
        return f"{name} {version}.*"
    return text


def _link(arguments: argparse.Namespace, prefix: Path, records: Any) -> int:
    import rattler
    import rattler.exceptions

    if not arguments.json and not arguments.quiet:
        print(f"\n## Package Plan ##\n\n  environment location: {prefix}\n")
        for record in records:
            print(f"  {record.name.normalized:<20} {record.version}-{record.build}")
    if arguments.dry_run:
        raise CondaError("DryRunExit", "Dry run. Exiting.")
    if not arguments.yes:
        raise CondaError("CondaSystemExit", "Exiting. (this stand-in cannot ask; say --yes)")
    meta = prefix / "conda-meta"
    meta.mkdir(parents=True, exist_ok=True)
    with (meta / "history").open("a", encoding="utf-8") as history:
        history.write(f"==> {time.strftime('%Y-%m-%d %H:%M:%S')} <==\n")
        history.write(f"# cmd: conda {shlex.join(sys.argv[1:])}\n# conda version: {VERSION}\n")
    try:
        asyncio.run(
            rattler.install(
                records,
                target_prefix=str(prefix),
                cache_dir=_setting("pkgs_dirs")[0],
                show_progress=False,
            )
        )
    except rattler.exceptions.InstallerError as error:
        raise CondaError("CondaError", f"Downloading or linking failed: {error}") from None
    # The library's own traces, which conda does not leave.
    (prefix / "CACHEDIR.TAG").unlink(missing_ok=True)
    shutil.rmtree(prefix / "__clobbers__", ignore_errors=True)
    _register(prefix, True)
    if arguments.json:
        print(json.dumps({"success": True, "prefix": str(prefix), "dry_run": False}, indent=2))
    elif not arguments.quiet:
        print(
            "\ndone\n#\n# To activate this environment, use\n#\n"
            f"#     $ conda activate {arguments.name or prefix}\n#"
        )
    return 0


def _create(arguments: argparse.Namespace) -> int:
    prefix = _target(arguments, must_exist=False)
    if prefix == ROOT:
        raise CondaError("CondaValueError", "The target prefix is the base prefix. Aborting.")
    records = _solved(arguments, arguments.specs, []) if arguments.specs else []
    if _is_env(prefix) and not arguments.dry_run and arguments.yes:
        print(
            f"WARNING: A conda environment already exists at '{prefix}'\n\nRemoving existing "
            "environment\n",
            file=sys.stderr,
        )
        shutil.rmtree(prefix)
    return _link(arguments, prefix, records)


def _install(arguments: argparse.Namespace) -> int:
    import rattler

    prefix = _target(arguments)
    present = [
        rattler.PrefixRecord.from_path(path)
        for path in sorted((prefix / "conda-meta").glob("*.json"))
    ]
    kept = [f"{record.name.normalized} =={record.version}" for record in present]
    return _link(arguments, prefix, _solved(arguments, [*arguments.specs, *kept], present))


def _remove(arguments: argparse.Namespace) -> int:
    if not arguments.all:
        raise CondaError("ArgumentError", "this stand-in removes whole environments: say --all")
    return _env_remove(arguments)


def _env_remove(arguments: argparse.Namespace) -> int:
    prefix = _target(arguments)
    if prefix == ROOT:
        raise CondaError(
            "CondaEnvironmentError",
            "cannot remove root environment, add -n NAME or -p PREFIX option",
        )
    if not arguments.yes:
        raise CondaError("CondaSystemExit", "Exiting. (this stand-in cannot ask; say --yes)")
    shutil.rmtree(prefix)
    _register(prefix, False)
    if arguments.json:
        print(json.dumps({"success": True, "prefix": str(prefix)}))
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    for folder in _setting("pkgs_dirs"):
        shutil.rmtree(folder, ignore_errors=True)
    return 0


# --- shells ------------------------------------------------------------------------------


def _variables(prefix: Path) -> dict[str, str]:
    level = int(os.environ.get("CONDA_SHLVL") or 0)
    old = os.environ.get("CONDA_PREFIX")
    parts = os.environ.get("PATH", "").split(os.pathsep)
    if old:
        parts = [part for part in parts if part != f"{old}/bin"]
    name = "base" if prefix == ROOT else prefix.name
    if prefix != ROOT and str(prefix.parent) not in _setting("envs_dirs"):
        name = str(prefix)
    return {
        "PATH": os.pathsep.join([f"{prefix}/bin", *parts]),
        "CONDA_PREFIX": str(prefix),
        "CONDA_DEFAULT_ENV": name,
        "CONDA_PROMPT_MODIFIER": f"({name}) ",
        "CONDA_SHLVL": str(level + (old != str(prefix))),
        "CONDA_EXE": f"{ROOT}/bin/conda",
    } | ({f"CONDA_PREFIX_{level}": old} if old and level and old != str(prefix) else {})


def _run(arguments: argparse.Namespace) -> NoReturn:
    prefix = _target(arguments)
    if not arguments.command:
        raise CondaError("ArgumentError", "conda run needs a command")
    environment = os.environ | _variables(prefix)
    program = shutil.which(arguments.command[0], path=environment["PATH"])
    if program is None:
        raise CondaError("CondaError", f"{arguments.command[0]}: command not found")
    sys.stdout.flush()
    os.execve(program, arguments.command, environment)


def _not_initialised(arguments: argparse.Namespace) -> NoReturn:
    raise CondaError("CondaError", "Run 'conda init' before 'conda activate'")


def _shell(argv: Sequence[str]) -> int:
    """Print what the shell function of etc/profile.d/conda.sh has to evaluate."""
    word, *rest = argv or ["hook"]
    try:
        if word == "hook":
            print((ROOT / "etc" / "profile.d" / "conda.sh").read_text(encoding="utf-8"))
            if _setting("auto_activate_base") is not False:
                print("conda activate base")
        elif word == "activate":
            _print_activation(_place(rest[0] if rest else "base"))
        elif word == "deactivate":
            _print_deactivation()
        elif word == "reactivate":
            if active := os.environ.get("CONDA_PREFIX"):
                _print_activation(Path(active))
        else:
            print(f"conda: error: invalid choice: {word!r}", file=sys.stderr)
            return 2
    except CondaError as error:
        print(f"\n{error.kind}: {error}\n", file=sys.stderr)
        return 1
    return 0


def _place(text: str) -> Path:
    if "/" not in text:
        return _named(text, must_exist=True)
    prefix = Path(text).expanduser().absolute()
    if not _is_env(prefix):
        raise CondaError("EnvironmentLocationNotFound", f"Not a conda environment: {prefix}")
    return prefix


def _scripts(prefix: str | Path, folder: str) -> None:
    for path in sorted(Path(prefix, "etc", "conda", folder).glob("*.sh")):
        print(f". {shlex.quote(str(path))}")


def _print_activation(prefix: Path) -> None:
    if old := os.environ.get("CONDA_PREFIX"):
        _scripts(old, "deactivate.d")
    for key, value in _variables(prefix).items():
        print(f"export {key}={shlex.quote(value)}")
    _scripts(prefix, "activate.d")


def _print_deactivation() -> None:
    level = int(os.environ.get("CONDA_SHLVL") or 0)
    if level == 0:
        return
    old = os.environ["CONDA_PREFIX"]
    before = os.environ.get(f"CONDA_PREFIX_{level - 1}")
    _scripts(old, "deactivate.d")
    parts = [p for p in os.environ.get("PATH", "").split(os.pathsep) if p != f"{old}/bin"]
    if before:
        print(f"unset CONDA_PREFIX_{level - 1}")
        for key, value in _variables(Path(before)).items():
            if key not in ("PATH", "CONDA_SHLVL"):
                print(f"export {key}={shlex.quote(value)}")
        parts = [f"{before}/bin", *parts]
    else:
        print("unset CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_PROMPT_MODIFIER")
    print(f"export CONDA_SHLVL={level - 1}")
    print(f"export PATH={shlex.quote(os.pathsep.join(parts))}")
    if before:
        _scripts(before, "activate.d")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the interpreter's own end: threads of the solver may still hold its lock, and
    # crash it there.
    os._exit(code)
