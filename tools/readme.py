"""Put the tables that the README shows into it, from the committed reports: `make readme`.

A line `<!-- table: FILE -->` is followed by the table of that report, up to `<!-- end of table -->`.
"""

import re
from pathlib import Path

from quantforge import record, report

ROOT = Path(__file__).parent.parent
_SLOT = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """Return the README `text` with every table as its report has it now."""

    def table(slot: re.Match[str]) -> str:
        found = record.from_json((ROOT / slot[2]).read_text(encoding="utf-8"))
        facts = f"`{found.command}`, {found.machine.get('processor', 'unknown processor')}, {found.created}"
        return f"{slot[1]}\n{report.table(found)}\n\n{facts}\n{slot[3]}"

    return _SLOT.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text(encoding="utf-8")), encoding="utf-8")
