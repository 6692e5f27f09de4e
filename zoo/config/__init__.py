"""Overrides -> ``BuildSpec``. The only room that imports hydra and omegaconf, and only when something is composed.

    schema.py    what a YAML file may say: unfrozen twins of the specs, and strict checks with near names
    files.py     where conf lies, and reading its files alone
    loader.py    Hydra's composition, with every file and override checked before it is used
    resolve.py   composed data -> frozen, resolved specs; impossible combinations refused

    spec = compose(["models=llama-3.1-8b", "quant=fp8", "hardware=l40s", "limits.max_tokens=256"])

Nothing here opens a checkpoint.
"""

from zoo.config.files import conf_dir, families, hardware_specs, list_models, user_dir
from zoo.config.resolve import compose, compose_model, compose_sweep

__all__ = [
    "compose",
    "compose_model",
    "compose_sweep",
    "conf_dir",
    "families",
    "hardware_specs",
    "list_models",
    "user_dir",
]
