"""Rules about the network of a host and the addresses it must reach. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from tunesmith.core import formats
from tunesmith.core.mirrors import Mirror
from tunesmith.doctor.facts import Facts
from tunesmith.doctor.verdicts import Verdict
from tunesmith.hosts.probe.software import Tried

NAMES = {
    "pypi": "PyPI index",
    "conda": "conda channel",
    "miniforge": "Miniforge",
    "hf": "Hugging Face",
    "apt": "apt",
}


_OUTCOMES = {
    "dns": "has a name that the host cannot look up",
    "refused": "refuses the connection",
    "timeout": "does not answer",
    "tls": "has a certificate that the host does not trust",
    "proxy": "is behind a proxy that cannot be reached",
    "failed": "breaks the connection",
}


def network(facts: Facts) -> Iterator[Verdict]:
    if facts.network.proxies:
        names = dict.fromkeys(f"{name.lower()}={value}" for name, value in facts.network.proxies)
        text = ", ".join(names)
        exempt = {word.strip().lower() for word in facts.network.no_proxy.split(",")}
        missing = [name for name in ("localhost", "127.0.0.1") if name not in exempt]
        if missing and "*" not in exempt:
            yield Verdict(
                "warning",
                "proxy",
                f"{text}; no_proxy lacks {' and '.join(missing)}: the web UI would answer 503",
                "export no_proxy=localhost,127.0.0.1 where the proxy is set",
            )
        else:
            yield Verdict("info", "proxy", f"{text}; no_proxy={facts.network.no_proxy}")
    if facts.network.network_turbo:
        yield Verdict(
            "info",
            "proxy",
            "/etc/network_turbo is there: a proxy that slows mirrors in China; it is not used",
        )
    for source in facts.network.pip_indexes:
        if source.urls[0].startswith("http:"):
            yield Verdict(
                "info",
                "pip",
                f"{source.where} names {source.urls[0]}, plain http; not used (uv, https, hashes)",
            )
    for source in facts.network.condarcs:
        hosts = dict.fromkeys(urlsplit(url).hostname or url for url in source.urls)
        if hosts:
            yield Verdict(
                "info",
                "conda",
                f"{source.where} names {', '.join(hosts)}; not used (the mirror is)",
            )


def mirrors(facts: Facts, mirror: Mirror) -> Iterator[Verdict]:
    for kind, name in NAMES.items():
        tried = [item for item in facts.mirrors if item.kind == kind]
        if not tried or (kind == "miniforge" and facts.condas):
            continue
        good = [item for item in tried if item.outcome == "ok"]
        bad = [item for item in tried if item.outcome != "ok"]
        told = "; ".join(_told(item) for item in bad)
        if all(item.outcome == "no_tool" for item in tried):
            yield Verdict(
                "unknown", name, "the host has no program to try it", "apt-get install curl"
            )
        elif not good:
            needed = kind in ("pypi", "conda", "miniforge") and not facts.installed
            yield Verdict(
                "critical" if needed else "warning",
                name,
                f"mirror {mirror.name}: no address works: {told}",
                _fix(bad),
            )
        elif tried[0] is not good[0]:
            text = f"{_host(good[0].url)} works, the first choice does not: {told}"
            yield Verdict("warning", name, text, _fix(bad))
        else:
            text = f"{_host(good[0].url)} answers in {formats.duration(good[0].seconds)}"
            yield Verdict("info" if bad else "pass", name, text + (f"; {told}" if bad else ""))


def _told(item: Tried) -> str:
    what = f"answers {item.status}" if item.outcome == "http" else _OUTCOMES.get(item.outcome, "")
    return f"{item.url} {what or item.outcome}"


def _fix(bad: Sequence[Tried]) -> str:
    if any(item.outcome == "tls" for item in bad):
        return "name your authority's file as `ca_bundle` in the mirror; a wrong clock does it too"
    return "choose another mirror with --mirror, or write one (configs/mirrors/default.yml)"


def _host(url: str) -> str:
    return urlsplit(url).netloc or url
