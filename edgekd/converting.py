"""Weights from one layout to another: Meta's names, transformers' names, or a checkpoint of ours. The tensors stay as they are, bit by bit."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import checkpoint, zoo
from edgekd.errors import UsageError, unknown
from edgekd.workspace import atomic_path, sha256, write_json
from edgekd.zoo import layouts, loading
from edgekd.zoo.files import SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.zoo import Spec
    from edgekd.zoo.layouts import Layout

LAYOUTS = ("meta", "hf", "edgekd")


def convert(source: str | Path, *, to: str, output: str | Path, decoder: str | Path | None = None) -> dict[str, Any]:
    """Write the weights of a file in another layout.

    Args:
        source: a weight file of any known layout, a Hugging Face folder, or a checkpoint of ours of a published model.
        to: `meta` (the authors' own names: Meta's for SAM, MobileSAM's for MobileSAM, ...), `hf` (SAM only) or `edgekd`.
        output: a new file, `.safetensors` or a torch file (`.pth`, `.pt`, `.bin`); for `hf` also a folder.
        decoder: where prompt encoder and mask decoder come from, when the source is an encoder alone and `to` is `edgekd`.

    Raises:
        UsageError: the source cannot be read, the layout has no such names, or `output` is the source.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if to not in LAYOUTS:
        raise unknown("layout", to, LAYOUTS)
    if output.exists() and source.exists() and output.resolve() in (source.resolve(), *(p.resolve() for p in source.glob("*"))):
        raise UsageError("the output is the source, which is never overwritten", where=output, hint="name another file")
    folder = output.is_dir() or output.suffix not in SUFFIXES
    if folder and to != "hf":
        raise UsageError(f"'{output.name}' is no name of a weight file", where=output, hint=f"end it in one of {', '.join(SUFFIXES)}")
    if to == "edgekd":
        return _ours(source, output, decoder)
    spec, layout, ours = _open(source)
    if to == "hf" and spec.family != "sam":
        raise UsageError(f"transformers has no class for '{spec.name}'", where=source, hint="--to meta writes its authors' names, --to edgekd a checkpoint of ours")
    tensors = _renamed(ours, layouts.by_name("hf" if to == "hf" else "meta" if spec.family == "sam" else spec.family))
    if folder:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "config.json", hf_config(spec))
        output = output / "model.safetensors"
    write(tensors, output)
    return _done(source, layout, to, spec.name, output, len(tensors))


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Plain tensors, atomically: safetensors or torch's format by the name of the file."""
    import torch
    from safetensors.torch import save_file

    plain = {k: v.detach().contiguous() for k, v in tensors.items()}
    with atomic_path(path) as temp:
        if path.suffix == ".safetensors":
            seen: set[int] = set()
            for name, value in plain.items():  # safetensors stores no tensor twice under two names
                if value.data_ptr() in seen:
                    plain[name] = value.clone()
                seen.add(value.data_ptr())
            save_file(plain, temp, metadata={"format": "pt"})
        else:
            torch.save(plain, temp)


def hf_config(spec: Spec) -> dict[str, Any]:
    """`config.json` of a transformers SamModel with these sizes."""
    assert spec.vit is not None
    v, d = spec.vit, spec.shape
    vision = {"model_type": "sam_vision_model", "hidden_size": v.dim, "num_hidden_layers": v.depth, "num_attention_heads": v.heads, "image_size": v.image_size, "patch_size": 16,
              "window_size": v.window, "global_attn_indexes": list(v.global_blocks), "mlp_ratio": v.mlp_ratio, "mlp_dim": round(v.dim * v.mlp_ratio),
              "output_channels": v.out, "num_pos_feats": d.embed_dim // 2}
    prompt = {"model_type": "sam_prompt_encoder", "hidden_size": d.embed_dim, "image_size": v.image_size, "patch_size": 16, "mask_input_channels": d.mask_channels}
    decoder = {"model_type": "sam_mask_decoder", "hidden_size": d.embed_dim, "mlp_dim": d.mlp_dim, "num_attention_heads": d.heads, "iou_head_hidden_dim": 256}
    return {"model_type": "sam", "architectures": ["SamModel"], "vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}


def _open(source: Path) -> tuple[Spec, str, dict[str, Tensor]]:
    """What a source is, its layout's name and its tensors under our names."""
    if source.is_file() and checkpoint.is_checkpoint(source):
        return _published(source), "edgekd", {k: v for k, v in checkpoint.load_tensors(source).items() if not k.startswith("proposer.")}
    opened = loading.open_file(source)
    return opened.found.spec, opened.found.layout.name, opened.ours()


def _published(source: Path) -> Spec:
    """The published model that a checkpoint of ours holds weights of; its names are then those of the authors' file."""
    meta = checkpoint.read_meta(source)
    spec = zoo.SPECS.get(meta.name)
    if spec is None or asdict(spec.shape) != meta.shape:
        raise UsageError(f"'{meta.name}' is a network of its own, which no other layout has names for", where=source,
                         hint=f"published models have: {', '.join(zoo.names())}, at their decoder's width")
    return zoo.resized(spec, meta.image_size) if spec.vit else spec


def _renamed(ours: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Under the names of a layout."""
    out = {layout.table.right(k): v for k, v in ours.items() if k not in layout.zeros}
    for copy, original in layout.copies.items():
        out[copy] = out[original]
    return out


def _ours(source: Path, output: Path, decoder: str | Path | None) -> dict[str, Any]:
    """A checkpoint of ours, in float32, that needs no word beside it."""
    if output.suffix != checkpoint.SUFFIX:
        raise UsageError("checkpoints of ours are safetensors files", where=output, hint=f"end the name in {checkpoint.SUFFIX}")
    if source.is_file() and checkpoint.is_checkpoint(source):
        raise UsageError("this is a checkpoint of ours already", where=source, hint="--to meta and --to hf write the layouts of others")
    opened = loading.open_file(source)
    spec = opened.found.spec
    if spec.name not in zoo.SPECS or spec.shape != zoo.SPECS[spec.name].shape:
        raise UsageError("only the published models have a checkpoint of ours, and this SAM has other sizes", where=source,
                         hint="it can be used as it is: give its file as the teacher")
    model = loading.load(source, decoder=decoder)
    checkpoint.save(model, output, kind="teacher" if spec.kind == "teacher" else "student",
                    history={"converted_from": {"layout": opened.found.layout.name, "sha256": [sha256(p) for p in opened.file.files]}})
    return _done(source, opened.found.layout.name, "edgekd", spec.name, output, len(model.state_dict()))


def _done(source: Path, layout: str, to: str, name: str, output: Path, tensors: int) -> dict[str, Any]:
    return {"source": str(source), "from": layout, "to": to, "name": name, "path": str(output), "tensors": tensors,
            "size_bytes": output.stat().st_size, "sha256": sha256(output)}
