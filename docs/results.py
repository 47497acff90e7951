"""Puts what lies in benchmarks/results, outside of docs/, on the site; links to it work without the site, too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = "../benchmarks/results/"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("plots/*.png")]):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(f"]({OUTSIDE}", "](results/")
