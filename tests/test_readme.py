"""The README's table is the one that the result files give."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_is_generated_from_the_results():
    path = ROOT / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.with_table(readme) == readme, "run: python benchmarks/readme_table.py --write"
