"""The scripts of a page: modules that name what they use of each other, joined to one script,
because a page that opens from disk can load nothing.

Of the grammar of modules only `import { a, b } from "./module.js";` and `export` before a
declaration at the start of a line are known. All modules of a page share one scope, so no name may
be declared by two of them, and an imported name keeps its name.
"""

from __future__ import annotations

import re

from rlfr_vlm.report.template import asset

IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?function |const |let )", re.MULTILINE)


def joined(entry: str) -> str:
    """The module `entry` and all that it uses, as one script."""
    modules = [asset(f"{name}.js") for name in order(entry)]
    return "\n".join(['"use strict";', *(EXPORT.sub("", IMPORT.sub("", text)) for text in modules)])


def order(entry: str) -> list[str]:
    """The modules of a page, each after those that it uses. Raises ValueError where two use each
    other: one of them would run before what it needs.
    """
    found: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"modules use each other: {' > '.join((*above, name))}")
        if name in found:
            return
        for used in uses(name):
            visit(used, (*above, name))
        found.append(name)

    visit(entry, ())
    return found


def uses(name: str) -> dict[str, list[str]]:
    """What a module uses: names by the module that they come from."""
    return {
        module: [each.strip() for each in names.split(",") if each.strip()]
        for names, module in IMPORT.findall(asset(f"{name}.js"))
    }
