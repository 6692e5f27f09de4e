"""Weights as recipes, and the code that carries them out. Shared by both wings: the build wing writes recipes, an engine
that stores recipes instead of weights is bound to its checkpoint by the serve wing. Needs numpy and ml_dtypes only.

    recipe.py    what a weight is made of: an expression over checkpoint tensors, computed tables and scales
    reader.py    safetensors files, mapped, with headers treated as hostile
    bind.py      recipes -> arrays, one weight at a time, and the packed weight file of an engine
"""
