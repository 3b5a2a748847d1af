"""The published models: what is known of them, and each one's file told from names and shapes, with every name accounted for."""
from __future__ import annotations

from pathlib import Path

import official
import pytest
import torch

from edgekd import zoo
from edgekd.errors import UsageError
from edgekd.zoo import layouts, loading, meta_hf
from edgekd.zoo.renaming import Table

# Encoder parameters in millions, tensors of encoder and whole file, counted on the authors' classes.
PUBLISHED = {
    "sam_vit_h": (637.03, 457, 594), "sam_vit_l": (308.28, 345, 482), "sam_vit_b": (89.67, 177, 314), "mobile_sam": (5.74, 302, 439), "edge_sam": (5.52, 684, 821),
    "repvit_sam": (23.16, 1461, 1598), "efficient_sam_ti": (6.16, 153, 278), "efficient_sam_s": (22.35, 153, 278), "efficientvit_sam_l0": (30.7, 272, 409),
    "efficientvit_sam_l1": (43.6, 378, 515), "efficientvit_sam_l2": (57.3, 508, 645), "efficientvit_sam_xl0": (112.9, 318, 455), "efficientvit_sam_xl1": (199.3, 564, 701),
    "nanosam": (15.83, 133, 133)}
SMALL = [n for n in zoo.names() if zoo.SPECS[n].params < 35e6]
NAMES = zoo.names()


def problems(shapes: dict) -> list[str]:
    found = layouts.detect(shapes)
    return layouts.match(found, shapes).problems


def test_registry__is_the_published_family() -> None:
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_spec__agrees_with_the_authors_counts(name: str) -> None:
    params, encoder, total = PUBLISHED[name]
    model, spec = zoo.build(name, device="meta"), zoo.spec(name)
    assert sum(p.numel() for p in model.encoder.parameters()) == spec.encoder_params == pytest.approx(params * 1e6, rel=0.005)
    assert sum(p.numel() for p in model.parameters()) == spec.params
    unused = official.UNUSED.get(spec.family, {})
    file = {k: v for k, v in official.shapes(name).items() if k not in unused or k.startswith("image_encoder.")}
    assert len(file) == total
    assert sum(k.startswith("image_encoder.") or spec.family == "nanosam" for k in file) == encoder


@pytest.mark.parametrize("name", NAMES)
def test_detect__from_names_and_shapes_alone(name: str) -> None:
    shapes, spec = official.shapes(name), zoo.spec(name)
    found = layouts.detect(shapes)
    assert (found.spec.name, found.spec.family, found.spec.variant, found.layout.name) == (name, spec.family, spec.variant, official.layout_of(name).name)
    match = layouts.match(found, shapes)
    assert match.problems == [] and set(match.dropped) == set(official.UNUSED.get(spec.family, {}))
    assert set(match.sources.values()) | set(match.dropped) == set(shapes), "every name is needed or known"


@pytest.mark.parametrize("name", NAMES)
def test_match__names_what_is_wrong_as_the_file_spells_it(name: str) -> None:
    shapes = official.shapes(name)
    used = [k for k in shapes if k not in official.UNUSED.get(zoo.spec(name).family, {})]
    for key in (used[0], used[len(used) // 2], used[-1]):
        rest = {k: v for k, v in shapes.items() if k != key}
        assert problems(rest) == [f"missing {key}"]
        assert problems({**shapes, key: (*shapes[key], 3)}) == [f"{key} is {(*shapes[key], 3)} instead of {shapes[key]}"]
    stranger = ("backbone." if zoo.spec(name).family == "nanosam" else "image_encoder.") + "surprise.weight"
    assert problems({**shapes, stranger: (1,)}) == [f"unknown {stranger}"]


@pytest.mark.parametrize("name", SMALL)
def test_load__is_the_model_and_answers(name: str, tmp_path: Path) -> None:
    state = official.write(name, tmp_path / "w.pth", wrapper="model" if name.startswith(("efficient_sam", "nanosam")) else None)
    if zoo.spec(name).decoder_of:
        official.write(zoo.spec(name).decoder_of, tmp_path / "decoder.pt")
    model = loading.load(tmp_path / "w.pth", expect=zoo.spec(name).family, decoder=tmp_path / "decoder.pt" if zoo.spec(name).decoder_of else None)
    assert (model.name, model.preprocess, model.shape, model.training) == (name, zoo.spec(name).preprocess, zoo.spec(name).shape, False)
    layout = official.layout_of(name)
    own = model.state_dict()
    assert all(torch.equal(own[k], state[layout.table.right(k)]) for k in own if layout.table.right(k) in state)
    assert all(not own[k].any() for k in layout.zeros)
    side = 128 if model.preprocess.side == model.preprocess.image_size else 64
    with torch.no_grad():
        embedding = model.embed(torch.randn(1, 3, side, side))
        masks, iou = model.decode(embedding, torch.tensor([[[30.0, 40.0]], [[9.0, 9.0]]]), torch.ones(2, 1))
    assert embedding.shape == (1, 256, 8, 8) and masks.shape == (2, 4, 32, 32)
    assert embedding.isfinite().all() and masks.isfinite().all() and iou.isfinite().all() and embedding.std() > 1e-4


def test_build__on_the_meta_device_needs_no_memory() -> None:
    assert all(p.is_meta for p in zoo.build("sam_vit_h", device="meta").parameters())


def test_spec__tinysam_is_mobile_sams_network() -> None:
    assert zoo.spec("tinysam") is zoo.spec("mobile_sam")


def test_spec__unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'mobile_sam'"):
        zoo.spec("mobilesam")


@pytest.mark.parametrize(("name", "size", "said"), [("edge_sam", 512, "runs at 1024 px, not at 512"), ("sam_vit_b", 500, "multiple of 16"), ("sam_vit_b", 16, "multiple of 16")])
def test_build__a_size_that_cannot_be(name: str, size: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        zoo.build(name, device="meta", image_size=size)


# --- layouts of the same networks ---------------------------------------------------------------------------------------


def test_meta_and_hf__are_one_to_one() -> None:
    meta = list(official.shapes("sam_vit_b"))
    hf = [meta_hf.to_hf(k) for k in meta]
    assert len(set(hf)) == len(meta) == 314 and [meta_hf.to_meta(k) for k in hf] == meta
    assert len({*hf, *meta_hf.COPIES}) == 315


@pytest.mark.parametrize(("meta", "hf"), [
    ("mask_decoder.transformer.layers.1.self_attn.q_proj.weight", "mask_decoder.transformer.layers.1.self_attn.q_proj.weight"),
    ("mask_decoder.iou_prediction_head.layers.1.weight", "mask_decoder.iou_prediction_head.layers.0.weight"),
    ("mask_decoder.iou_prediction_head.layers.0.bias", "mask_decoder.iou_prediction_head.proj_in.bias"),
    ("mask_decoder.output_hypernetworks_mlps.3.layers.2.bias", "mask_decoder.output_hypernetworks_mlps.3.proj_out.bias"),
    ("mask_decoder.transformer.norm_final_attn.weight", "mask_decoder.transformer.layer_norm_final_attn.weight"),
    ("image_encoder.blocks.11.norm2.bias", "vision_encoder.layers.11.layer_norm2.bias"),
    ("image_encoder.neck.2.weight", "vision_encoder.neck.conv2.weight"),
    ("prompt_encoder.mask_downscaling.6.bias", "prompt_encoder.mask_embed.conv3.bias"),
])
def test_meta_and_hf__spell_it_so(meta: str, hf: str) -> None:
    assert meta_hf.to_hf(meta) == hf and meta_hf.to_meta(hf) == meta


def test_table__renames_once_and_whole_names_only() -> None:
    table = Table([("a.{n}.{p}", "b.{n}.{p}"), ("b.{p}", "c.{p}")])
    assert table.right("a.0.b.1") == "b.0.b.1" and table.right("xa.0.b") == "xa.0.b" and table.left("c.x") == "b.x"


def _hf_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {meta_hf.to_hf(k): v for k, v in official.shapes("sam_vit_b").items()}
    return {**shapes, **{copy: shapes[original] for copy, original in meta_hf.COPIES.items()}}


@pytest.mark.parametrize("absent", [None, *meta_hf.COPIES, *meta_hf.COPIES.values()])
def test_hf__either_of_the_two_copies_is_enough(absent: str | None) -> None:
    shapes = {k: v for k, v in _hf_shapes().items() if k != absent}
    found = layouts.detect(shapes)
    assert (found.layout.name, found.spec.name) == ("hf", "sam_vit_b") and layouts.match(found, shapes).problems == []


def test_hf__metas_spelling_in_it_is_unknown() -> None:
    assert problems({**_hf_shapes(), "vision_encoder.layers.0.norm1.weight": (768,)}) == ["unknown vision_encoder.layers.0.norm1.weight"]


@pytest.mark.parametrize("name", ["edge_sam", "repvit_sam", "mobile_sam", "sam_vit_b", "efficientvit_sam_l1"])
def test_encoder_alone__without_its_prefix(name: str) -> None:
    """What EdgeSAM's first phase writes."""
    shapes = {k.removeprefix("image_encoder."): v for k, v in official.shapes(name).items() if k.startswith("image_encoder.")}
    found = layouts.detect(shapes)
    assert found.spec.name == name and found.encoder_only and found.bare
    assert layouts.match(found, shapes).problems == []
    key = next(iter(shapes))
    assert problems({k: v for k, v in shapes.items() if k != key}) == [f"missing {key}"]


@pytest.mark.parametrize(("key", "said"), [
    ("image_encoder.trunk.blocks.0.norm1.weight", "SAM 2"), ("sam_mask_decoder.iou_token.weight", "SAM 2"), ("spatial_perceiver.latents", "EdgeTAM"),
    ("detector.backbone.weight", "SAM 3"), ("mask_decoder.hf_token.weight", "SAM-HQ"),
])
def test_detect__other_families_are_sent_to_transformers(key: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"{said}'s weights[\s\S]*Hugging Face folder"):
        layouts.detect({**official.shapes("sam_vit_b"), key: (1,)})


def test_detect__nothing_known() -> None:
    with pytest.raises(UsageError, match=r"no known model has these 1 parameters[\s\S]*mobile_sam"):
        layouts.detect({"fc.weight": (10, 10)})


def test_detect__a_sam_of_other_sizes() -> None:
    model = zoo.sam_spec(zoo.VitShape(224, 48, 3, 3, 7, (1,), 64, mlp_ratio=2.0), "x", "x", shape=zoo.DecoderShape(64, heads=2, mlp_dim=96, mask_channels=8))
    shapes = {official.layout_of("sam_vit_b").table.right(k): tuple(v.shape) for k, v in zoo.assemble(model, device="meta").state_dict().items()}
    found = layouts.detect(shapes)
    assert found.spec.vit == model.vit and found.spec.shape == model.shape and found.spec.variant == "vit_48x3"
    assert layouts.match(found, shapes).problems == []


def test_detect__a_published_sam_at_another_image_size() -> None:
    shapes = {official.layout_of("sam_vit_b").table.right(k): tuple(v.shape) for k, v in zoo.build("sam_vit_b", device="meta", image_size=512).state_dict().items()}
    found = layouts.detect(shapes)
    assert (found.spec.name, found.spec.preprocess.image_size) == ("sam_vit_b", 512) and layouts.match(found, shapes).problems == []
