from __future__ import annotations

from zoo_cases import Case

CASES: dict[str, Case] = {}
