"""Installed packages that programs of a code task may import in addition to the standard library."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator

from lpo_jax.errors import UserError

_OPTION = "task.verifier_options.packages"
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([A-Za-z_]\w*)")


def check_package_names(packages: object) -> tuple[str, ...]:
    """Check the option `packages` and return it as a tuple of import names.

    Raises:
      UserError: if it is not a list of names, or a package is not installed.
    """
    if not isinstance(packages, list | tuple) or not all(isinstance(name, str) for name in packages):
        raise UserError(f"code: packages is {packages!r}, but must be a list of names, such as [numpy]")
    installed_paths(*packages)
    return tuple(packages)


@functools.cache
def installed_paths(*names: str) -> tuple[str, ...]:
    """Return the paths of packages and of their requirements: files and folders in `site-packages`.

    Args:
      *names: the import names of the packages.

    Raises:
      UserError: if a package is not installed.
    """
    paths: dict[str, str] = {}  # name in `site-packages`: path
    for name in names:
        if name in sys.stdlib_module_names:
            continue
        try:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
        except ValueError:  # a module that was not imported from a file, such as __main__
            spec = None
        if spec is None:
            raise UserError(
                f"code: {_OPTION} names {name!r}, which is not installed here; install it in the environment of "
                "lpo_jax, and use its import name"
            )
        for distribution in _with_requirements(_distributions(name)):
            for file in distribution.files or ():
                entry = file.parts[0]
                if entry not in ("..", "__pycache__") and not entry.endswith(".pth"):
                    paths[entry] = str(distribution.locate_file(entry))
        if not any(entry.partition(".")[0] == name for entry in paths):  # an editable install
            where = (spec.submodule_search_locations or [spec.origin])[0]
            paths[os.path.basename(where)] = where
    return tuple(sorted(path for path in paths.values() if os.path.exists(path)))


def _distributions(name: str) -> list[str]:
    """Return the names of the distributions that provide a package; usually the package's own name."""
    try:
        importlib.metadata.distribution(name)
        return [name]
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.packages_distributions().get(name, [])


def _with_requirements(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Yield distributions and all their installed requirements, without optional extras."""
    seen, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required only on another system or Python version
        yield distribution
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])


def explain(failure: str, packages: tuple[str, ...]) -> str:
    """Return a program's last line on stderr; if an import failed, add how to make the package available."""
    missing = _MISSING.match(failure)
    if missing is None or missing[1] in sys.stdlib_module_names or missing[1] in packages:
        return failure
    listed = ", ".join([*packages, missing[1]])
    return f"{failure}: programs can import the standard library and the packages in {_OPTION}, such as [{listed}]"
