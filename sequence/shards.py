"""Tar shards of documents, in the form of WebDataset: files that share a key are one sample.

    _header.json          what the shard holds (see `ShardHeader`), always the first member
    KEY.json              {"segments": [{"text": "..."}, {"image": "0.png"}], "source": "...", ...}
    KEY.0.png             an image of a document shard
    KEY.0.npz             the codes of an image of a token shard: `codes`, `level`, `base_grid`; with self-correction also
                          `input_codes` and `target_codes`

Shards are read by seeking: opening one reads the member headers, a sample reads its own bytes and nothing else. Writing is
deterministic (no times, no user names) and atomic (a shard has its final name only when it is complete).
"""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

HEADER_NAME = "_header.json"
KINDS = ("documents", "codes")


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard holds, written as the first member of each shard."""

    kind: str
    """ "documents" (images are image files) or "codes" (images are codes of one tokenizer)."""
    schedule: dict[str, Any] | None = None
    """`ScaleSchedule.to_dict()` of the codes; None for documents."""
    tokenizer: str | None = None
    """Fingerprint of the image tokenizer that made the codes; None for documents."""
    text: str = ""
    """Where the data comes from and under which licence."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"shard kind {self.kind!r} is not one of {KINDS}")
        if self.kind == "codes" and (self.schedule is None or self.tokenizer is None):
            raise ValueError("a shard of codes needs the schedule and the tokenizer's fingerprint in its header")


def check_header(header: ShardHeader, schedule: Any, fingerprint: str | None, where: str) -> None:
    """Refuse codes made with another schedule or by another tokenizer than the run's.

    Args:
        header: the shard's header; headers of documents always pass.
        schedule: the run's `ScaleSchedule` (anything with `to_dict()` and `fingerprint()`).
        fingerprint: of the run's image tokenizer; None if the run has none, then only the schedule is compared.
        where: the shard, for the message.

    Raises:
        ValueError: naming both fingerprints.
    """
    if header.kind != "codes":
        return
    # Tuples become lists in JSON, so both sides are compared as JSON.
    ours = json.loads(json.dumps(schedule.to_dict()))
    if ours != header.schedule:
        raise ValueError(
            f"{where}: its codes follow another scale schedule than this run (`data.schedule`)."
            f"\n  shard: {json.dumps(header.schedule)}\n  run (fingerprint {schedule.fingerprint()}): {json.dumps(ours)}"
            "\nExtract the codes again with this run's schedule, or set `data.schedule` to the shard's."
        )
    if fingerprint is not None and fingerprint != header.tokenizer:
        raise ValueError(
            f"{where}: its codes come from the image tokenizer {header.tokenizer}, this run uses {fingerprint}. "
            "Extract the codes again with this tokenizer, or load the tokenizer that made the shard."
        )


class Codes(NamedTuple):
    """The codes of one image, coarse to fine, each scale row-major."""

    codes_N: np.ndarray
    """int32, the plain codes: the nearest entries."""
    level: int
    base_grid: tuple[int, int]
    """(height, width): the entry of `ScaleSchedule.base_grids` that fixes the aspect ratio."""
    input_codes_N: np.ndarray | None = None
    """int32, what a model is fed under self-correction; None where the shard was made without."""
    target_codes_N: np.ndarray | None = None
    """int32, what it then has to predict: the nearest entries, given the codes fed before."""


def encode_codes(codes: Codes) -> bytes:
    """Codes as the bytes of an npz file; the same codes always give the same bytes."""
    arrays = {
        "codes": np.ascontiguousarray(codes.codes_N, dtype=np.int32),
        "level": np.asarray(codes.level, dtype=np.int32),
        "base_grid": np.asarray(codes.base_grid, dtype=np.int32),
    }
    for name, corrected_N in (("input_codes", codes.input_codes_N), ("target_codes", codes.target_codes_N)):
        if corrected_N is not None:
            arrays[name] = np.ascontiguousarray(corrected_N, dtype=np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_codes(data: bytes) -> Codes:
    """Inverse of `encode_codes`.

    Raises:
        ValueError: the bytes are not such a file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            height, width = (int(side) for side in arrays["base_grid"])
            corrected = (
                [arrays[name] for name in ("input_codes", "target_codes")] if "input_codes" in arrays else [None] * 2
            )
            return Codes(arrays["codes"], int(arrays["level"]), (height, width), *corrected)
    except (OSError, KeyError, EOFError) as error:
        raise ValueError(f"not a file of codes: {error}") from error
    except Exception as error:  # zipfile.BadZipFile and friends have no common base class
        raise ValueError(f"not a readable npz file: {error}") from error


class ShardWriter:
    """Writes samples into `folder/000000.tar`, `folder/000001.tar`, ...; a suffix such as "-rank1of2" stands before ".tar".

        with ShardWriter("data/train", header=ShardHeader(kind="documents")) as writer:
            writer.write("1F34E", {"segments": [...], "source": "openmoji"}, {"0.png": png_bytes})

    A shard is written as `000000.tar.partial` and renamed when complete. Leaving the block by an exception leaves no shard that
    was not finished.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        header: ShardHeader,
        samples_per_shard: int = 4096,
        suffix: str = "",
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be positive, not {samples_per_shard}")
        self.folder = Path(folder)
        self.suffix = suffix
        self.header = header
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self.num_samples = 0
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()

    def write(self, key: str, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Adds one sample.

        Args:
            key: unique in the shard, without a dot (WebDataset splits names at the first dot) and without leading underscore.
            record: the sample's KEY.json.
            files: ending -> bytes, such as {"0.png": ...}.
        """
        if not key or "." in key or key.startswith("_") or key.endswith("/"):
            raise ValueError(f"key {key!r}: a key may not be empty, hold a dot, or begin with an underscore")
        if self._tar is None:
            self._open()
        if key in self._keys:
            raise ValueError(f"key {key!r} occurs twice in {self._final_path}")
        self._keys.add(key)
        self._add(f"{key}.json", _json_bytes(record))
        for name, data in files.items():
            self._add(f"{key}.{name}", data)
        self.num_samples += 1
        if len(self._keys) >= self.samples_per_shard:
            self._finish()

    def close(self) -> None:
        """Completes the last shard. A writer that got no sample leaves one shard with only a header."""
        if self._tar is None and not self.paths:
            self._open()
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._tar = None
            self._partial_path.unlink(missing_ok=True)

    @property
    def _final_path(self) -> Path:
        return self.folder / f"{len(self.paths):06d}{self.suffix}.tar"

    @property
    def _partial_path(self) -> Path:
        return self._final_path.with_suffix(".tar.partial")

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self._partial_path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._keys = set()
        self._add(HEADER_NAME, _json_bytes(asdict(self.header)))

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # TarInfo's defaults carry no time, owner or group: equal data gives equal files
        member.size = len(data)
        assert self._tar is not None
        self._tar.addfile(member, io.BytesIO(data))

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        path = self._final_path
        os.replace(self._partial_path, path)
        self.paths.append(path)


class Shard:
    """One shard opened for reading. Make it with `open_shard`."""

    def __init__(self, path: Path, header: ShardHeader, members: dict[str, dict[str, tuple[int, int]]]):
        self.path = path
        self.header = header
        self.keys = list(members)
        self._members = members
        self._file = -1

    def __len__(self) -> int:
        return len(self.keys)

    def files(self, key: str) -> list[str]:
        """Endings of the files of a sample, such as ["json", "0.png"]."""
        return list(self._members[key])

    def read(self, key: str, name: str) -> bytes:
        """The bytes of one file of a sample; KeyError if there is none."""
        try:
            offset, size = self._members[key][name]
        except KeyError:
            raise KeyError(f"{self.path}: no file {key}.{name}") from None
        if self._file < 0:
            self._file = os.open(self.path, os.O_RDONLY)
        data = os.pread(self._file, size, offset)  # carries its own offset: processes may share the descriptor
        if len(data) != size:
            raise ValueError(f"{self.path}: {key}.{name} is cut off after {len(data)} of {size} bytes")
        return data

    def record(self, key: str) -> dict[str, Any]:
        """The sample's KEY.json."""
        record = json.loads(self.read(key, "json"))
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}: {key}.json is not an object")
        return record

    def image_name(self, key: str, name: str) -> str:
        """Ending of the file that holds the image a segment names.

        The record of a sample is the same in document and token shards, so "0.png" also finds "0.npz".
        """
        members = self._members[key]
        codes = f"{name.split('.')[0]}.npz"
        found = codes if self.header.kind == "codes" and codes in members else name
        if found not in members:
            raise KeyError(f"{self.path}: {key}.json names the image {name!r}, but there is no {key}.{found}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": -1}

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Reads the header and the member offsets of a shard.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete tar file, or its first member is not a header.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    header: ShardHeader | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if header is None:
                    header = _read_header(tar, member, path)
                    continue
                key, _, name = member.name.partition(".")
                members.setdefault(key, {})[name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a complete tar file: {error}") from error
    if header is None:
        raise ValueError(f"{path} is empty: a shard begins with {HEADER_NAME}")
    return Shard(Path(path), header, members)


def _read_header(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str | os.PathLike[str]) -> ShardHeader:
    file = tar.extractfile(member) if member.name == HEADER_NAME else None
    if file is None:
        raise ValueError(f"{path}: the first member is {member.name}, but a shard begins with {HEADER_NAME}")
    try:
        return ShardHeader(**json.load(file))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {HEADER_NAME} is no shard header: {error}") from error


def _json_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()
