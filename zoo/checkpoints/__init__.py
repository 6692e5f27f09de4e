"""Hugging Face checkpoint folders: what is in them, and how their tensors are named."""

from zoo.checkpoints.families import check_config
from zoo.checkpoints.folder import Checkpoint
from zoo.checkpoints.names import check_tensors, fit_names

__all__ = ["Checkpoint", "check_config", "check_tensors", "fit_names"]
