"""``REF = model[:version][@profile]``: how engines are named on the command line and in ``LLM("...")``.

    zoo-demo                                          the newest version, the best profile for this machine
    zoo-demo:3f9c2a                                   a version, or an unambiguous head of one (6 hex digits or more)
    zoo-demo:3f9c2a71b04d@none-cpu-onnxruntime-tp1    one engine
    zoo-demo@sha256:91ab44                            one engine by its manifest's digest, or a head of it

A profile that was built again with other limits keeps its older builds; the name means the newest one, and the digest
form reaches the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from zoo.errors import ArtifactError

LATEST = "latest"
SHORTEST = 6  # hex digits of an abbreviated version or digest
_MODEL = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_DIGEST_HEAD = re.compile(rf"sha256:[0-9a-f]{{{SHORTEST},64}}", re.ASCII)
_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST},}}", re.ASCII)
GRAMMAR = "a REF is model[:version][@profile], such as zoo-demo or zoo-demo:3f9c2a71b04d@none-cpu-onnxruntime-tp1"


@dataclass(frozen=True)
class Ref:
    """A parsed REF. Empty parts were not named; ``digest`` is ``sha256:`` and at least 6 hex digits."""

    model: str
    version: str = ""
    profile: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Take a REF apart. ArtifactError says which part is malformed."""
        head, at, profile = text.partition("@")
        model, colon, version = head.partition(":")
        where = f"REF {text!r}"
        if not is_model(model):
            raise ArtifactError(
                f"{where}: the model {model!r} is not lower-case letters, digits and single . _ - between; {GRAMMAR}"
            )
        if (colon and not version) or (version and not is_tag(version)):
            raise ArtifactError(f"{where}: the version {version!r} is not letters, digits, . _ -; {GRAMMAR}")
        if profile.startswith("sha256:"):
            if not _DIGEST_HEAD.fullmatch(profile):
                raise ArtifactError(f"{where}: the digest needs {SHORTEST} to 64 hex digits after 'sha256:'; {GRAMMAR}")
            return cls(model, version, "", profile)
        if (at and not profile) or (profile and not is_profile(profile)):
            raise ArtifactError(f"{where}: the profile {profile!r} is not letters, digits, . _ + -; {GRAMMAR}")
        return cls(model, version, profile)

    def __str__(self) -> str:
        part = self.digest or self.profile
        return self.model + (f":{self.version}" if self.version else "") + (f"@{part}" if part else "")


def is_model(text: str) -> bool:
    """Whether a text can name a model: one component of an OCI repository name."""
    return len(text) <= 128 and bool(_MODEL.fullmatch(text))


def is_tag(text: str) -> bool:
    """Whether a text can be a version: an OCI tag."""
    return bool(_TAG.fullmatch(text))


def is_profile(text: str) -> bool:
    """Whether a text can name a profile."""
    return bool(_PROFILE.fullmatch(text))


def is_digest(text: object) -> bool:
    """Whether a value is a complete sha256 digest, the only algorithm that is accepted."""
    return isinstance(text, str) and bool(_DIGEST.fullmatch(text))


def may_abbreviate(text: str) -> bool:
    """Whether a text is long enough, and hex, to stand for the version it begins."""
    return bool(_HEX.fullmatch(text))
