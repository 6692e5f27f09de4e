"""Copying engines to and from OCI registries over HTTP. Blobs are content-addressed on both sides and checked on both."""

from __future__ import annotations

from zoo.artifacts.remote.address import Address
from zoo.artifacts.remote.fetching import pull
from zoo.artifacts.remote.sending import push

__all__ = ["Address", "pull", "push"]
