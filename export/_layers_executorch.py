"""What every operator of a `.pte` file takes in ExecuTorch, from the event trace of its runtime. XNNPACK tells the time of each of its kernels, under their
kinds; the file holds no names of modules."""
from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgekd.export._layers import WARMUP, Rows, together

OWN = "native_call_"
"""how the runtime names its own kernels: `native_call_aten::cat.out`"""
PRECISIONS = (("F32", "fp32"), ("F16", "fp16"), ("QC8", "int8"), ("QS8", "int8"), ("QU8", "int8"), ("QD8", "int8"))


def layers(runtime: Any, path: Path, given: list[Any], repeats: int, quiet: Callable[[], Any]) -> Rows:
    """See `edgekd.protocols.Facts.layers`. `runtime` is ExecuTorch's, `given` the tensors in the order of the file."""
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder, quiet():
        program = runtime.load_program(path, enable_etdump=True, debug_buffer_size=0)
        method = program.load_method("forward")
        for _ in range(WARMUP + repeats):
            method.execute(given)
        dump = Path(folder) / "dump"
        program.write_etdump_result_to_file(str(dump), str(Path(folder) / "debug"))
        found = deserialize_from_etdump_flatcc(dump.read_bytes())
    return rows(run.events for run in found.run_data)


def rows(runs: Iterable[Iterable[Any]]) -> Rows:
    """Of the events of every run; those that loaded the file, and the first `WARMUP`, are left out."""
    timed = [{name: ms for name, ms in _kernels(events)} for events in runs]
    times = together([run for run in timed if run][WARMUP:])
    return [{"name": name, "op": name.removeprefix(OWN).split(" (")[0].split("#")[0].strip(), "ms": ms,
             "precision": next((ours for theirs, ours in PRECISIONS if theirs in name), None), "covers": []} for name, ms in times.items()]


def _kernels(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """(name, milliseconds) of one run: XNNPACK's by its number in the delegate, the runtime's own by how many of a name came before."""
    count: Counter[str] = Counter()
    for event in events:
        one = event.profile_event
        if one is None or one.chain_index < 0:
            continue
        ms = (one.end_time - one.start_time) / 1e6  # nanoseconds
        if one.delegate_debug_id_str:
            yield f"{one.delegate_debug_id_str} @{one.instruction_id}", ms
        elif one.name and one.name.startswith(OWN):
            count[one.name] += 1
            yield f"{one.name}#{count[one.name]}", ms
