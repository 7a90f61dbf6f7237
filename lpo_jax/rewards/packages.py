"""Installed packages that the programs of a code task may import, beside the standard library."""

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
    """The option's value as a tuple of names, each as programs import it.

    Raises:
      UserError: if it is no list of names, or one of them is not installed.
    """
    if not isinstance(packages, list | tuple) or not all(isinstance(name, str) for name in packages):
        raise UserError(f"code: packages is {packages!r}, but has to be a list of names, such as [numpy]")
    installed_paths(*packages)
    return tuple(packages)


@functools.cache
def installed_paths(*names: str) -> tuple[str, ...]:
    """Paths of the files and folders in `site-packages` that belong to packages and to what these require.

    Raises:
      UserError: if a package is not installed.
    """
    paths: dict[str, str] = {}  # by the name in `site-packages`
    for name in names:
        if name in sys.stdlib_module_names:
            continue
        try:
            spec = importlib.util.find_spec(name) if name.isidentifier() else None
        except ValueError:  # a module that was not imported from a file, such as __main__
            spec = None
        if spec is None:
            raise UserError(
                f"code: {_OPTION} names {name!r}, which is not installed here; install it beside lpo_jax, and name it "
                "as programs import it"
            )
        for distribution in _with_requirements(_distributions(name)):
            for file in distribution.files or ():
                entry = file.parts[0]
                if entry not in ("..", "__pycache__") and not entry.endswith(".pth"):
                    paths[entry] = str(distribution.locate_file(entry))
        if not any(
            entry.partition(".")[0] == name for entry in paths
        ):  # installed by reference (pip install -e)
            where = (spec.submodule_search_locations or [spec.origin])[0]
            paths[os.path.basename(where)] = where
    return tuple(sorted(path for path in paths.values() if os.path.exists(path)))


def _distributions(name: str) -> list[str]:
    """Names of the distributions that a package comes from: mostly its own name."""
    try:
        importlib.metadata.distribution(name)
        return [name]
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.packages_distributions().get(name, [])


def _with_requirements(names: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Distributions and all that they require, as far as it is installed; without optional extras."""
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
            continue  # required on another system or by another Python
        yield distribution
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])


def explain(failure: str, packages: tuple[str, ...]) -> str:
    """A program's last line on stderr; where an import has failed, with how to make the package available."""
    missing = _MISSING.match(failure)
    if missing is None or missing[1] in sys.stdlib_module_names or missing[1] in packages:
        return failure
    listed = ", ".join([*packages, missing[1]])
    return f"{failure}: programs see the standard library, and what {_OPTION} names, such as [{listed}]"
