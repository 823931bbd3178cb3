r"""Patterns that name sites in a policy: globs, `re:` and `op:` strings, callables.

| pattern | a site matches if |
|---|---|
| `layer1.*` | the glob fits the whole of one of its names (`*` also crosses dots) |
| `re:blocks\.\d+\.mlp` | the regular expression fits the whole of one of its names |
| `op:conv*` | the glob fits its op (`linear`, `conv2d`, `embedding`, `norm`, ...) |
| `lambda site: site.numel < 4096` | the callable returns True |

The names of a site are its parameter (`layer1.0.conv1.weight`), the module that owns it (`layer1.0.conv1`), and the
same two for every tensor tied to it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import get_args

from fp4fx.errors import PolicyError
from fp4fx.site import Op, Site

Pattern = str | Callable[[Site], bool]


def check(pattern: object, where: str) -> None:
    """Raise PolicyError if `pattern` is not one; `where` says which field holds it."""
    if callable(pattern):
        return
    if not isinstance(pattern, str) or not pattern:
        raise PolicyError(f"{where}: found {pattern!r}, expected a glob, 're:...', 'op:...' or a callable on the site")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PolicyError(f"{where}: {pattern!r} is not a regular expression: {error}; mend it") from error
    if pattern.startswith("op:") and not any(fnmatchcase(op, pattern[3:]) for op in get_args(Op)):
        raise PolicyError(f"{where}: {pattern!r} fits no op; expected one of {', '.join(get_args(Op))}")


def names(site: Site) -> tuple[str, ...]:
    """Every name a pattern may give to a site: parameters and their modules, tied ones included."""
    parameters = (site.parameter, *site.tied)
    return (*parameters, *(p.rpartition(".")[0] for p in parameters if "." in p))


def fits(pattern: str, candidates: Iterable[str]) -> bool:
    """True if a glob or `re:` pattern fits the whole of one of the candidate names."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in candidates)
    return any(fnmatchcase(name, pattern) for name in candidates)


def matches(pattern: Pattern, site: Site) -> bool:
    """True if the pattern names this site."""
    if callable(pattern):
        return bool(pattern(site))
    if pattern.startswith("op:"):
        return fnmatchcase(site.op, pattern[3:])
    return fits(pattern, names(site))


def first_match(patterns: Iterable[Pattern], site: Site) -> Pattern | None:
    """The first of the patterns that names this site, or None."""
    return next((p for p in patterns if matches(p, site)), None)


def literal(pattern: Pattern, sites: Sequence[Site]) -> str:
    """The pattern itself or, for a callable, the `re:` pattern of exactly the parameters that it picked."""
    if not callable(pattern):
        return pattern
    picked = dict.fromkeys(re.escape(site.parameter) for site in sites if pattern(site))
    return f"re:{'|'.join(picked)}"


def require_match(pattern: Pattern, where: str, sites: Sequence[Site], others: Iterable[str] = ()) -> None:
    """Raise PolicyError with near names if the pattern names no site, nor one of the `others`."""
    others = tuple(others)
    if any(matches(pattern, site) for site in sites) or (isinstance(pattern, str) and fits(pattern, others)):
        return
    known = tuple(dict.fromkeys(name for site in sites for name in names(site)))
    if callable(pattern):
        advice = f"it returned False for all {len(sites)} sites"
    elif pattern.startswith("op:"):
        advice = f"ops of this model: {', '.join(sorted({site.op for site in sites}))}"
    elif not pattern.startswith("re:") and any(name.startswith(f"{pattern}.") for name in known):
        advice = f"it names a container; to reach what is in it write '{pattern}.*'"
    else:
        near = difflib.get_close_matches(pattern.removeprefix("re:"), (*known, *others), n=3, cutoff=0.5)
        advice = f"near names: {', '.join(near)}" if near else f"names look like {', '.join(known[:3])}"
    raise PolicyError(f"{where}: pattern {pattern!r} matches no site of this model; {advice}")
