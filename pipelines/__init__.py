"""Entry points for automation, thin over the zoo package: run them as ``python -m pipelines.NAME``."""
