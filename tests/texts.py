"""The texts that tests hold to what they say: README.md, and all of docs/."""

import glob
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


README = read_text(os.path.join(ROOT, "README.md"))
DOCS = "\n".join(map(read_text, sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))))
ALL = README + "\n" + DOCS


def table_rows(header):
    """The cells of the table with this header line, wherever it stands.       -> [[cell]]"""
    assert ALL.count(header + "\n") == 1, header
    _, _, *lines = ALL[ALL.index(header) :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
