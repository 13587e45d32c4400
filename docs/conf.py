"""The site: pages of this folder, and pages that are made from the code: every pass, plan files, the public names."""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project, author = "splitfx", "the authors of splitfx"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
html_theme, html_title = "furo", "splitfx"
default_role = "code"  # docstrings name code in single quotes
autodoc_typehints = "none"
autodoc_member_order = "bysource"
myst_heading_anchors = 3
exclude_patterns = ["README.md"]
html_extra_path = ["page.png", "vgg16.svg", "splitnet.svg"]  # pictures in plain HTML


def setup(app: Any) -> None:
    app.connect("builder-inited", lambda _: write_pages(HERE / "made"))


def write_pages(folder: Path) -> None:
    """The pages that are made from the code."""
    from splitfx import _HOME
    from splitfx.compiler import registry
    from splitfx.compiler.plan import plan_schema
    from splitfx.report.passes import pass_text

    folder.mkdir(exist_ok=True)
    passes = "\n\n".join(f"## {name}\n\n```text\n{pass_text(name, cls)}\n```" for name, cls in registry.all().items())
    note = "What `splitfx passes NAME` prints: what a pass does, what it promises, and every option."
    (folder / "passes.md").write_text(f"# The passes\n\n{note}\n\n{passes}\n", encoding="utf-8")
    schema = json.dumps(plan_schema(), indent=2)
    head = "# Plan files: the schema\n\nA plan is TOML of this JSON schema; an option that is left out has its default."
    (folder / "schema.md").write_text(f"{head}\n\n```json\n{schema}\n```\n", encoding="utf-8")
    names = [(name, home) for home, found in _HOME.items() for name in found if home != "splitfx.errors"]
    calls = [entry("autofunction", "splitfx", name) for name, _ in sorted(names) if name[0].islower()]
    kinds = [entry("autoclass", "splitfx", name) for name, _ in sorted(names) if name[0].isupper()]
    text = "\n\n".join(["# Reference", "## Functions", *calls, "## Results and options", *kinds])
    (folder / "reference.md").write_text(f"{text}\n", encoding="utf-8")


def entry(directive: str, home: str, name: str) -> str:
    options = ":members:\n" if directive == "autoclass" else ""
    return f"```{{eval-rst}}\n.. {directive}:: {home}.{name}\n" + (f"   {options}" if options else "") + "```"
