"""The box proposer: where its slots lie, what it learns from, that it learns, and that it is exported as it is."""
from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import Painted
from tiny import tiny_sam

from edgekd import plugins, resolve, teachers
from edgekd.data import open_data
from edgekd.data.scenes import Scenes
from edgekd.distillation import points
from edgekd.distillation.objectives.box_proposals import assign, iou_and_giou, loss
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.proposals import Plan, distil_proposer, fit, recall, to_square
from edgekd.errors import EdgekdError
from edgekd.exporting import signature
from edgekd.models.proposer import RANGES, SLOTS, BoxProposer, decode, places, ranges
from edgekd.models.sam import Sam, components
from edgekd.parity import EXACT
from edgekd.probes import pictures
from edgekd.protocols import Session
from edgekd.quantization.calibration import EncoderCalibration, ProposerCalibration
from edgekd.tasks.promptable.everything import Settings, everything
from edgekd.tasks.promptable.exported import ArtifactModel
from edgekd.tasks.promptable.metrics import iou
from edgekd.tasks.promptable.parity import LOSSY, Reference, failure, proposer_parity
from edgekd.tasks.promptable.predictor import ModelPredictor
from edgekd.tasks.promptable.proposing import has_proposer, propose


def test_shapes_frame_and_scores() -> None:
    torch.manual_seed(0)
    net = BoxProposer(32, width=16, depth=1).eval()
    boxes, scores = net(torch.randn(2, 32, 4, 4))
    assert boxes.shape == (2, 4 * 4 * len(SLOTS), 4) and scores.shape == (2, 4 * 4 * len(SLOTS))
    assert boxes.min() >= 0 and boxes.max() <= 64 and (boxes[..., 2:] > boxes[..., :2]).all()
    assert scores.min() > 0 and scores.max() < 0.1  # before training nothing is likely


def test_slots_lie_in_their_cells_row_by_row() -> None:
    centres, unit = places(3)
    per = len(SLOTS)
    cell = centres.view(3, 3, per, 2)
    assert torch.allclose(cell.mean(2)[1, 2], torch.tensor([40.0, 24.0])) and torch.allclose(cell[0, 0, -1], torch.tensor([8.0, 8.0]))
    assert unit.view(9, per)[:, 0].unique().tolist() == pytest.approx([48 / 32]) and (ranges(3).view(9, per) == ranges(1)).all()


def test_boxes_start_around_their_centres() -> None:
    raw = torch.zeros(1, len(SLOTS) * 16, 5)
    box, (centres, unit) = decode(raw, 4)[0], places(4)
    inside = ((centres - unit >= 0) & (centres + unit <= 64)).all(1)
    assert inside.any() and torch.allclose(box[inside], torch.cat([centres - unit, centres + unit], 1)[inside], atol=1e-4)


def test_overlap_of_boxes() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10]])
    plain, giou = iou_and_giou(a, b)
    assert plain.tolist() == pytest.approx([1, 1 / 3, 0]) and giou.tolist() == pytest.approx([1, 1 / 3, -1 / 3])


def test_every_box_has_a_slot_of_its_size_near_its_centre() -> None:
    cells = 8
    wanted = torch.tensor([[3.0, 3, 12, 12], [60, 60, 90, 84], [0, 0, 128, 120], [62, 62, 70, 70]])
    owner, (centres, _) = assign(wanted, cells), places(cells)
    for i, box in enumerate(wanted):
        mine = torch.nonzero(owner == i)[:, 0]
        assert len(mine) > 0
        share = float((box[2:] - box[:2]).max()) / 128
        assert all(RANGES[int(ranges(cells)[q])][0] <= share < RANGES[int(ranges(cells)[q])][1] for q in mine)
        assert ((centres[mine] >= box[:2]) & (centres[mine] <= box[2:])).all()
    assert (owner >= 0).sum() < 40 and (assign(wanted[:0], cells) == -1).all()


def test_of_two_boxes_with_one_centre_the_small_one_wins() -> None:
    wanted = torch.tensor([[38.0, 38, 88, 88], [50, 50, 76, 76]])
    alone, both = assign(wanted[:1], 8), assign(wanted, 8)
    assert ((alone == 0) & (both == 1)).any() and (both == 0).any()


def test_right_boxes_cost_nothing_and_wrong_ones_do() -> None:
    wanted = torch.tensor([[16.0, 16, 44, 40]])
    own = assign(wanted, 4) == 0
    boxes, scores = torch.tensor([[0.0, 0, 8, 8]]).repeat(len(own), 1), torch.zeros(len(own))
    boxes[own], scores[own] = wanted[0], 1.0
    score, box = loss(boxes, scores, wanted)
    assert float(score) < 1e-4 and float(box) == pytest.approx(0, abs=1e-5)
    assert float(loss(boxes, torch.full_like(scores, 0.5), wanted)[0]) > 1
    assert float(loss(boxes + 8, scores, wanted)[1]) > 0.3
    nothing, none = loss(boxes, scores, wanted[:0])
    assert float(none) == 0 and float(nothing) > 1  # a sure slot where nothing is


def test_the_objective_is_one_loss_an_image() -> None:
    objective = points.build("objective", "box_proposals", {"score": 2.0})
    boxes, scores = torch.rand(2, 96, 2).repeat(1, 1, 2) * 30 + torch.tensor([0.0, 0, 20, 20]), torch.rand(2, 96)
    wanted = [torch.tensor([[4.0, 4, 30, 30]]), torch.zeros(0, 4)]
    both = objective(Outputs(torch.zeros(2, 1, 4, 4), proposals=(boxes, scores)), Outputs(torch.zeros(2, 1, 4, 4)), Context(torch.ones(2, 1, 1, 1), boxes=wanted))
    score, box = loss(boxes[0], scores[0], wanted[0])
    assert both.shape == (2,) and float(both[0]) == pytest.approx(float(2 * score + 2 * box), rel=1e-5)
    assert points.describe("objective", "box_proposals")["needs"] == ["boxes"]


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings in which a rectangle is painted, and its box."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        x0, y0 = rng.integers(0, 5, 2)
        w, h = rng.integers(1, 4, 2)
        embedding = torch.zeros(8, 8, 8)
        embedding[0, y0:y0 + h, x0:x0 + w] = 3
        found.append((embedding.half(), torch.tensor([[x0, y0, x0 + w, y0 + h]]).float() * 16))
    return found


def test_it_learns_and_the_same_seed_gives_the_same() -> None:
    data, plan = pairs(16), Plan(steps=80, batch=8, lr=1e-2)
    nets = []
    for _ in range(3):
        torch.manual_seed(0)
        nets.append(BoxProposer(8, width=16, depth=1))
    short = [fit(net, data, Plan(steps=4, batch=8)) for net in nets[1:]]
    assert short[0] == short[1] and all(torch.equal(a, b) for a, b in zip(nets[1].parameters(), nets[2].parameters(), strict=True))
    before, losses = recall(nets[0], data, 3), fit(nets[0], data, plan)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]) and recall(nets[0].eval(), data, 3) > max(0.6, before)


def test_a_model_gets_a_proposer_and_nothing_else_changes() -> None:
    model = tiny_sam()
    before = copy.deepcopy(model.state_dict())
    plan = Plan(steps=3, batch=2, labels=Settings(points_per_side=4, pred_iou=-9, stability=0))
    found = distil_proposer(model, Painted(count=3), plan=plan)
    assert isinstance(model.proposer, BoxProposer) and has_proposer(model) and found.photos == 3 and len(found.losses) == 3
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and 0 <= found.recall <= 1
    first = copy.deepcopy(model.proposer.state_dict())
    distil_proposer(model, Painted(count=3), plan=plan)
    assert all(torch.equal(v, model.proposer.state_dict()[k]) for k, v in first.items())


def test_its_own_masks_are_the_labels_where_there_are_none() -> None:
    model = tiny_sam()
    never = Plan(steps=1, truth=False, labels=Settings(points_per_side=2, area=(0.9999, 0.99999)))
    with pytest.raises(EdgekdError, match=r"no mask[\s\S]*trained"):
        distil_proposer(model, Painted(count=1), plan=never)


def test_boxes_from_photo_to_square_and_back() -> None:
    predictor = ModelPredictor(tiny_sam())
    embedding, frame = predictor.start(np.zeros((40, 100, 3), np.uint8))
    photo = np.array([[10.0, 5, 60, 39]])
    square = to_square(photo, frame)

    class Fixed(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(square)[None], torch.ones(1, 1)

    predictor.model.proposer = Fixed()  # type: ignore[attr-defined]
    assert propose(predictor.model, (embedding, frame))[0] == pytest.approx(photo)


class Opened:
    """A model of which the proposer is a file: an artifact in front of torch's encoder and decoder."""

    def __init__(self, model: Sam, session: Session) -> None:
        self.name, self.preprocess, self.embed_dim, self.model, self.proposer_session = "opened", model.preprocess, model.embed_dim, model, session
        self.manifest = SimpleNamespace(components={"encoder", "decoder", "proposer"})

    def session(self, component: str) -> Session:
        assert component == "proposer"
        return self.proposer_session

    propose = ArtifactModel.propose

    def embed(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model.embed(torch.from_numpy(images)).numpy()

    def decode(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            masks, quality = self.model.decode(*(torch.from_numpy(x) for x in inputs))
        return masks.numpy(), quality.numpy()


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_its_file_proposes_the_same_and_segments_everything(tmp_path: Path, format: str) -> None:
    exporter = plugins.exporter(format)
    if not exporter.availability().ok:
        pytest.skip(f"{format} is not installed: {exporter.availability().fix}")
    model = tiny_sam()
    torch.manual_seed(1)
    model.proposer = BoxProposer(model.embed_dim, width=16, depth=1).eval()
    parts = components(model)
    assert list(parts) == ["encoder", "decoder", "proposer"] and [o.shape for o in signature(parts["proposer"])[1]] == [[1, 96, 4], [1, 96]]
    path = tmp_path / f"proposer{exporter.suffix}"
    exporter.export(parts["proposer"], path, scheme="fp32")
    session = exporter.open(path, scheme="fp32", threads=1)
    parity = proposer_parity(session, Reference(model, pictures(2, 64, np.random.default_rng(0))))
    assert failure(parity, EXACT) is None and parity["mask_iou"] > 0.9999 and parity["images"] == 2
    asked, image = Settings(proposals=5, pred_iou=-9, stability=0, area=(0, 1)), Painted()[0].image
    ours, theirs = everything(Opened(model, session), image, settings=asked), everything(model, image, settings=asked)
    assert ours.mode == theirs.mode == "proposals" and ours.work.prompts == theirs.work.prompts == 5
    assert [s.box for s in ours] == [pytest.approx(s.box, abs=1e-3) for s in theirs]


def test_a_wrong_file_is_noticed() -> None:
    class Shifted:
        executed_precision, executed_ops = "fp32", dict[str, int]()

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                boxes, scores = model.proposer(torch.from_numpy(inputs["image_embeddings"]))  # type: ignore[misc]
            return {"boxes": boxes.numpy() + 3, "scores": scores.numpy()}

    model = tiny_sam()
    model.proposer = BoxProposer(model.embed_dim, width=16, depth=1).eval()
    parity = proposer_parity(Shifted(), Reference(model, pictures(1, 64, np.random.default_rng(0))))
    assert failure(parity, EXACT) is not None and parity["mask_iou"] < 0.9


def test_the_shipped_teacher_segments_everything_with_its_own_proposer() -> None:
    model, sample = teachers.load("sam_nano"), Scenes(77_001, 2)[1]
    found = everything(model, sample.image)
    assert sample.masks is not None and found.mode == "proposals" and found.work.prompts == Settings().proposals
    assert (iou(found.masks[:, None], sample.masks[None]).max(axis=0) > 0.5).mean() > 0.5


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_in_8_bits_the_shipped_students_proposals_stay_right(tmp_path: Path, format: str) -> None:
    """Ranges from four photos, boxes and their order compared on three others."""
    exporter = plugins.exporter(format)
    if not exporter.availability().ok:
        pytest.skip(f"{format} is not installed: {exporter.availability().fix}")
    model = resolve.load_torch("repvit_s")
    data = open_data(Path(__file__).resolve().parents[1] / "examples/photos", masks=False)
    shown = ProposerCalibration(EncoderCalibration(data, model.preprocess, indices=[0, 3, 6, 9]), model)
    path = tmp_path / f"proposer{exporter.suffix}"
    exporter.export(components(model)["proposer"], path, scheme="w8a8_static", calibration=shown)
    session = exporter.open(path, scheme="w8a8_static", threads=1)
    assert "int8" in session.executed_precision
    reference = Reference(model, np.concatenate([s["images"] for s in EncoderCalibration(data, model.preprocess, indices=[1, 4, 11])]))
    parity = proposer_parity(session, reference)
    assert failure(parity, LOSSY["proposer"]) is None and 0.96 < parity["mask_iou"] < 1
    for embedding in reference.embeddings:
        with torch.no_grad():
            best = model.propose(torch.from_numpy(embedding[None]))[1].topk(64).indices.tolist()
        ours = session.run({"image_embeddings": embedding[None]})["scores"][0].argsort()[::-1][:64]
        assert len(set(best) & set(ours.tolist())) >= 56
