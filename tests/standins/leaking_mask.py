"""A stand-in for a model that takes the mask another way: rows of one line see each other."""

import importlib.abc
import importlib.machinery
import sys


class Leaking(importlib.abc.MetaPathFinder):
    """Loads tunesmith.job.training.packing with a mask that is causal and nothing else."""

    def find_spec(self, name, path=None, target=None):
        if name != "tunesmith.job.training.packing":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            mask = module.segment_mask
            module.segment_mask = lambda segment_ids, dtype: mask(segment_ids.clamp(max=1), dtype)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Leaking())
