"""Teacher outputs on disk: sharded, coded in a quarter of fp16, checked, made by any number of processes and readable meanwhile.

    made = build_cache(teacher, photos, Path("cache"))
    made.outputs(17)["embedding"]          # (E, s, s), in any order
    open_cache(Path("cache")).verify()     # names what is damaged

The format is described in docs/cache.md. A killed run goes on with the next shard; a damaged shard is made again; another teacher,
preprocessing, dataset or codec has another fingerprint and is never mixed in.
"""
from __future__ import annotations

from edgekd.distillation.cache.format import CODE, SCHEMA, cache_fingerprint
from edgekd.distillation.cache.reading import TeacherCache, open_cache
from edgekd.distillation.cache.writing import Estimate, build_cache, estimate_cache

__all__ = ["CODE", "SCHEMA", "Estimate", "TeacherCache", "build_cache", "cache_fingerprint", "estimate_cache", "open_cache"]
