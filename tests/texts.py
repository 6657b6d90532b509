"""README.md and the pages of docs/, for the tests that hold them to the code."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(name: str) -> str:
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


README = read("README.md")
DOCS = {name: read(os.path.join("docs", name)) for name in sorted(os.listdir(os.path.join(ROOT, "docs")))}
ALL = "\n".join([README, *DOCS.values()])
