"""README.md and the pages of docs/, for the tests that hold them to the code; and files of lines."""

import json
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(name: str) -> str:
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def write_lines(path, *rows) -> str:
    """Rows, or lines as they are -> JSONL"""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{line}\n" for line in lines)
    return str(path)


def read_lines(path) -> list:
    with open(path, encoding="utf-8", newline="") as f:
        return [json.loads(line) for line in f]


README = read("README.md")
PAGES = sorted(name for name in os.listdir(os.path.join(ROOT, "docs")) if name.endswith(".md"))
DOCS = {name: read(os.path.join("docs", name)) for name in PAGES}
ALL = "\n".join([README, *DOCS.values()])


def table_rows(header: str) -> list[list[str]]:
    """The cells of the table with this header line, wherever it stands."""
    assert ALL.count(header + "\n") == 1, header
    _, _, *lines = ALL[ALL.index(header) :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
