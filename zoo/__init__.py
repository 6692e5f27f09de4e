"""Engine Zoo: a declarative LLM model zoo whose engines are generated.

The public Python surface is what a service needs: ``LLM`` and ``SamplingParams``. Both are imported on first use, so
that ``import zoo`` costs nothing and pulls in neither the builder nor an inference library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.llm import LLM
    from zoo.runtime.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from zoo.llm import LLM

        return LLM
    if name == "SamplingParams":
        from zoo.runtime.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
