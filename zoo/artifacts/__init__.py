"""Versioned engine artifacts: what an engine says of itself, where it is stored, how it is chosen and checked.

Shared by both wings: the build wing ends in an artifact, the serve wing begins with one.
"""
