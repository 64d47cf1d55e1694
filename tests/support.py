"""What several test files use."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
