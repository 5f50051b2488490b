"""The sequence grammar: documents become packed rows of ids, positions, blocks, targets and weights.

A document is `<start>`, its segments, and the target `<end>` behind the last position. A text is its ids. An image is `<boi>`,
one block of h_k * w_k positions for each scale k = 2..K, and `<eoi>`: `<boi>` predicts the 1x1 code, block k predicts the codes
of scale k from the codes of scale k-1 alone, resized to grid k (residual features, NextFlow 2.2; inputs begin with the 2x2
map, figure 5), or from those of all coarser scales (`layout.features: accumulated`). So code n of an image (scales coarse to
fine, each row-major) is predicted n positions behind its `<boi>`. `<eoi>` is not predicted; it predicts what follows.

Running positions: each text id, `<boi>`, `<eoi>` and each scale takes one. The same number is the block of the visibility law,

    q sees k  iff  document[q] == document[k] and block[k] <= block[q].

Shapes: B rows, L packed length, N codes of the batch, M positions that are cells of image blocks, T taps of a resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextflow.sequence.documents import Document, ImageSegment, Segment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig, image_layout
from nextflow.sequence.scales import num_codes_of

IGNORE = -100
"""Target of a position that is not trained on."""
PADDING = -1
"""Document of a position that belongs to none."""
UNKNOWN_CODE = -1
"""Code of an image that is encoded on the fly: filled by `PackedRows.with_codes`."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A batch of packed rows. Each row holds documents behind each other that never see each other."""

    ids_BL: Tensor
    """int64, id of each text position, `<boi>` and `<eoi>`; 0 and not read at cells of image blocks and at padding."""
    document_BL: Tensor
    """int64, number of the document in its row, PADDING outside."""
    block_BL: Tensor
    """int64, running position: block of the visibility law."""
    position_3BL: Tensor
    """float32, rotary positions (t, h, w)."""
    scale_BL: Tensor
    """int64, scale that an image position predicts (1 at `<boi>`), 0 for text and `<eoi>`."""
    num_scales_BL: Tensor
    """int64, number of scales of the image, on `<boi>` and its blocks; 0 elsewhere."""
    target_BL: Tensor
    """int64, id to predict, or IGNORE."""
    weight_BL: Tensor
    """float32, loss weight of the target, 0 where ignored."""
    code_N: Tensor
    """int64, target codes of all images in document order, or UNKNOWN_CODE."""
    input_code_N: Tensor
    """int64, the codes that are fed: the same, but for self-correction."""
    code_position_N: Tensor
    """int64, flat position b * L + l that predicts each code."""
    input_position_M: Tensor
    """int64, flat positions that are cells of image blocks."""
    tap_index_MT: Tensor
    """int64, into input_code_N."""
    tap_weight_MT: Tensor
    """float32"""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRows:
        """The same rows on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)}
        return PackedRows(**moved)

    @property
    def num_targets(self) -> Tensor:
        """Number of targets that are trained on, a scalar."""
        return (self.target_BL != IGNORE).sum()

    @property
    def target_scale_BL(self) -> Tensor:
        """Scale of each target: the position's own, as block k predicts scale k; 0 for text and where nothing is predicted."""
        return torch.where(self.target_BL == IGNORE, 0, self.scale_BL)

    def visible_BLL(self) -> Tensor:
        """The visibility law as a mask [B, L, L], True where the query (second axis) sees the key (third)."""
        same = self.document_BL[:, :, None] == self.document_BL[:, None, :]
        return same & (self.block_BL[:, None, :] <= self.block_BL[:, :, None])

    def with_codes(self, code_N: Tensor, code_offset: int, input_code_N: Tensor | None = None) -> PackedRows:
        """Fill in or exchange the codes of images, in document order; targets follow.

        Args:
            code_N: int64 target codes of all images of the batch.
            code_offset: id of code 0 (`Vocabulary.code_offset`).
            input_code_N: codes to feed, where they differ (self-correction).
        """
        if code_N.shape != self.code_N.shape:
            raise ValueError(f"the rows hold {self.code_N.numel()} codes, got {code_N.numel()}")
        target = self.target_BL.flatten().clone()
        trained_N = self.weight_BL.flatten()[self.code_position_N] > 0
        target[self.code_position_N] = torch.where(trained_N, code_N + code_offset, IGNORE)
        fed = code_N if input_code_N is None else input_code_N
        return replace(self, code_N=code_N, input_code_N=fed, target_BL=target.view_as(self.target_BL))


def lay_out(
    rows: Sequence[Sequence[Document]], vocabulary: Vocabulary, config: LayoutConfig, length: int | None = None
) -> PackedRows:
    """Lay documents out as packed rows.

    Args:
        rows: for each row of the batch its documents, in order.
        vocabulary: ids of the transformer.
        config: positions, weights and resizing.
        length: pad every row to this length; default: the longest row.

    Raises ValueError when a row is longer than `length`, or an image has another number of codes than its grids.
    """
    built = [_Row(vocabulary, config) for _ in rows]
    for row, documents in zip(built, rows):
        for document in documents:
            row.add(document)
    longest = max(row.length for row in built)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a row has {longest} positions, more than the length {length}: raise data.max_length")

    def table(name: str, padding: float, dtype: type) -> np.ndarray:
        out: np.ndarray = np.full((len(built), length), padding, dtype=dtype)
        for index, row in enumerate(built):
            pieces = row.pieces[name]
            if pieces:
                out[index, : row.length] = np.concatenate(pieces)
        return out

    code_starts = np.cumsum([0, *(row.num_codes for row in built)])
    image_starts = np.arange(len(built)) * length

    def flat(name: str, offsets: np.ndarray | None, dtype: type, width: int | None = None) -> Tensor:
        pieces = [
            piece if offsets is None else piece + offsets[index]
            for index, row in enumerate(built)
            for piece in row.pieces[name]
        ]
        if width is not None:
            # Images of fewer scales may have fewer taps. More of the last one, of weight 0: its code is known when it is fed.
            mode: Any = "edge" if dtype is np.int64 else "constant"
            pieces = [np.pad(piece, ((0, 0), (0, width - piece.shape[1])), mode) for piece in pieces]
        empty: np.ndarray = np.zeros((0,) if width is None else (0, width), dtype=dtype)
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(pieces) if pieces else empty))

    num_taps = config.num_taps(max((row.max_scales for row in built), default=1))
    code_N = flat("code", None, np.int64)
    position = np.stack([table(axis, 0, np.float32) for axis in ("position_t", "position_h", "position_w")])
    return PackedRows(
        ids_BL=torch.from_numpy(table("ids", 0, np.int64)),
        document_BL=torch.from_numpy(table("document", PADDING, np.int64)),
        block_BL=torch.from_numpy(table("block", 0, np.int64)),
        position_3BL=torch.from_numpy(position),
        scale_BL=torch.from_numpy(table("scale", 0, np.int64)),
        num_scales_BL=torch.from_numpy(table("num_scales", 0, np.int64)),
        target_BL=torch.from_numpy(table("target", IGNORE, np.int64)),
        weight_BL=torch.from_numpy(table("weight", 0, np.float32)),
        code_N=code_N,
        input_code_N=code_N.clone(),
        code_position_N=flat("code_position", image_starts, np.int64),
        input_position_M=flat("input_position", image_starts, np.int64),
        tap_index_MT=flat("tap_index", code_starts, np.int64, num_taps),
        tap_weight_MT=flat("tap_weight", None, np.float32, num_taps),
    )


class _Row:
    """Collects the pieces of one row; `pieces` holds arrays that are concatenated at the end."""

    def __init__(self, vocabulary: Vocabulary, config: LayoutConfig) -> None:
        self.vocabulary, self.config = vocabulary, config
        self.length = 0
        self.num_codes = 0
        self.num_documents = 0
        self.max_scales = 1
        names = "ids document block position_t position_h position_w scale num_scales target weight"
        flat_names = "code code_position input_position tap_index tap_weight"
        self.pieces: dict[str, list[np.ndarray]] = {name: [] for name in (*names.split(), *flat_names.split())}

    def add(self, document: Document) -> None:
        """Append a document: `<start>`, its segments, `<end>` as the last target."""
        vocabulary = self.vocabulary
        # What each segment begins with is the target of the position before it, trained on when that segment is.
        following = [(_first_id(segment, vocabulary), segment.loss) for segment in document.segments]
        following.append((vocabulary.end_id, document.segments[-1].loss if document.segments else True))
        self._text([vocabulary.start_id], [following[0]], start=0)
        running = 1
        for segment, after in zip(document.segments, following[1:]):
            if isinstance(segment, TextSegment):
                targets = [(int(token), segment.loss) for token in segment.ids[1:]] + [after]
                self._text(segment.ids, targets, start=running)
                running += len(segment.ids)
            else:
                running = self._image(segment, running)
                self._text([vocabulary.eoi], [after], start=running)
                running += 1
        self.num_documents += 1

    def _text(self, ids: Sequence[int], targets: list[tuple[int, bool]], start: int) -> None:
        count = len(ids)
        if not count:
            return
        trained = np.array([loss for _, loss in targets])
        running = np.arange(start, start + count)
        self._extend(count, ids=np.asarray(ids, dtype=np.int64), block=running, scale=0, num_scales=0)
        for axis in ("position_t", "position_h", "position_w"):
            self.pieces[axis].append(running.astype(np.float32))
        self.pieces["target"].append(np.where(trained, [target for target, _ in targets], IGNORE))
        self.pieces["weight"].append(trained.astype(np.float32))

    def _image(self, image: ImageSegment, start: int) -> int:
        """Append `<boi>` and the blocks; returns the running position of `<eoi>`."""
        layout = image_layout(image.grids, self.config)
        num_codes, num_scales = num_codes_of(image.grids), len(image.grids)
        count = len(layout.block_P)
        codes = _as_codes(image.codes, num_codes)
        ids = np.zeros(count, dtype=np.int64)
        ids[0] = self.vocabulary.boi
        spatial = layout.spatial_2P + start * layout.moves_P
        known = codes[0] != UNKNOWN_CODE
        target = np.full(count, IGNORE, dtype=np.int64)
        if image.loss and known:
            target[:num_codes] = codes + self.vocabulary.code_offset
        position = self.length
        self._extend(count, ids=ids, block=layout.block_P + start, scale=layout.scale_P, num_scales=num_scales)
        pieces = self.pieces
        pieces["position_t"].append((layout.block_P + start).astype(np.float32))
        pieces["position_h"].append(spatial[0].astype(np.float32))
        pieces["position_w"].append(spatial[1].astype(np.float32))
        pieces["target"].append(target)
        pieces["weight"].append(layout.weight_P if image.loss else np.zeros(count, dtype=np.float32))
        pieces["code"].append(codes)
        pieces["code_position"].append(np.arange(position, position + num_codes))
        pieces["input_position"].append(np.arange(position + 1, position + count))
        pieces["tap_index"].append(layout.tap_index_PT[1:] + self.num_codes)
        pieces["tap_weight"].append(layout.tap_weight_PT[1:])
        self.num_codes += num_codes
        self.max_scales = max(self.max_scales, num_scales)
        return start + int(layout.block_P[-1]) + 1

    def _extend(self, count: int, ids: np.ndarray, block: np.ndarray, scale: np.ndarray | int, num_scales: int) -> None:
        pieces = self.pieces
        pieces["ids"].append(ids)
        pieces["block"].append(block)
        pieces["document"].append(np.full(count, self.num_documents, dtype=np.int64))
        pieces["scale"].append(np.broadcast_to(np.asarray(scale, dtype=np.int64), (count,)))
        pieces["num_scales"].append(np.full(count, num_scales, dtype=np.int64))
        self.length += count


def _first_id(segment: Segment, vocabulary: Vocabulary) -> int:
    if isinstance(segment, ImageSegment):
        return vocabulary.boi
    if not len(segment.ids):
        raise ValueError("a text segment has no ids: leave empty texts out of the document")
    return int(segment.ids[0])


def _as_codes(codes: Tensor | np.ndarray | None, num_codes: int) -> np.ndarray:
    if codes is None:
        return np.full(num_codes, UNKNOWN_CODE, dtype=np.int64)
    array = np.asarray(codes, dtype=np.int64)
    if array.shape != (num_codes,):
        raise ValueError(f"an image's codes have shape {array.shape}, but its grids hold {num_codes} codes")
    return array
