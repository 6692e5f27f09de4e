"""The exception tree. A ``ZooError`` is a user's problem and says what, where, what is allowed, and what to do next.

    ZooError
    ├── ConfigError             a YAML file or an override is wrong
    ├── CheckpointError         a checkpoint folder or safetensors file is wrong or hostile
    ├── GraphError              a graph cannot be expanded or rewritten
    │   └── PassError           a pass that the spec demands found nothing, or broke its promise
    ├── CompileError            a compiler refused the graph
    │   └── UnavailableError    the compiler, GPU or package is not on this machine
    ├── ResourceError           not enough memory or disk
    ├── ArtifactError           a registry or an artifact is wrong
    │   ├── NotFoundError       no such model, version or profile
    │   ├── DigestError         the bytes are not what the digest says
    │   └── IncompatibleError   the engine is not for this machine
    ├── RequestError            a request to a running engine is wrong
    └── EngineError             a running engine failed in a step

Broken invariants are bugs: they are ``assert``s, not ``ZooError``s.
"""

from __future__ import annotations


class ZooError(Exception):
    """A problem the user can act on. ``str(error)`` is the whole message; the command line prints it without a traceback."""


class ConfigError(ZooError):
    """A YAML file, an override or a combination of them is wrong."""


class CheckpointError(ZooError):
    """A checkpoint folder or one of its files cannot be used."""


class GraphError(ZooError):
    """A model graph cannot be expanded, rewritten or checked."""


class PassError(GraphError):
    """A rewriting pass failed: nothing matched although the spec demands it, or a promise was broken."""


class CompileError(ZooError):
    """A compiler refused the graph."""


class UnavailableError(CompileError):
    """The compiler, its package or its GPU is not on this machine."""


class ResourceError(ZooError):
    """Not enough memory or disk for what was asked."""


class ArtifactError(ZooError):
    """A registry or an artifact cannot be used."""


class NotFoundError(ArtifactError):
    """There is no such model, version, profile or blob."""


class DigestError(ArtifactError):
    """Bytes do not match the digest that names them."""


class IncompatibleError(ArtifactError):
    """The artifact is sound, but not for this machine."""


class RequestError(ZooError):
    """A generation request is wrong: empty prompt, too long, a parameter out of range."""


class EngineError(ZooError):
    """A running engine failed in a step. The requests of that step are lost; others can go on."""
