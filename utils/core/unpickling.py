"""Reading what torch.save wrote, without running anything that the file asks for.

torch.load with weights_only refuses every class that it does not know, and training scripts save a few harmless ones
beside the tensors. Here each of them is named, and stands for plain data of ours: numpy's numbers and arrays are
rebuilt from their bytes, dicts of other kinds become dicts, and the rest is read and dropped. No class that a file
names is imported or called.
"""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.errors import UserError, message_of

_LONGEST = 400  # characters of a reason that came with an exception


class Skipped:
    """Stands for a harmless object that nobody needs; keeps nothing of it."""

    def __new__(cls, *_: Any) -> "Skipped":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict:
    """A dict of another kind, as a plain one."""

    def __new__(cls, *_: Any) -> OrderedDict:
        return OrderedDict()


class _List:
    """A deque, as a list."""

    def __new__(cls, *_: Any) -> list:
        return []


class _DType:
    """numpy.dtype of numbers and bools; any other kind is no data."""

    def __init__(self, code: Any, *_: Any):
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = str(state[1])

    def plain(self) -> np.dtype | None:
        known = re.fullmatch(r"([biufc])(1|2|4|8|16)", self.code)
        return np.dtype(f"{self.order if self.order in '<>' else '='}{self.code}") if known else None


class _Array:
    """numpy.ndarray; .value is its copy, None where it does not hold numbers."""

    def __init__(self, *_: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, data = state
        if isinstance(kind, _DType) and kind.plain() is not None and isinstance(data, bytes | bytearray):
            flat = np.frombuffer(bytes(data), kind.plain())
            self.value = flat.reshape(shape, order="F" if by_columns else "C").copy()


def _scalar(kind: Any, data: Any = b"") -> Any:
    """numpy's scalar: a number, or Skipped where it is none."""
    plain = kind.plain() if isinstance(kind, _DType) else None
    if plain is None or not isinstance(data, bytes | bytearray):
        return Skipped()
    return np.frombuffer(bytes(data), plain)[0].item()


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_SKIPPED = (
    *("argparse.Namespace", "types.SimpleNamespace", "uuid.UUID", "decimal.Decimal", "fractions.Fraction"),
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in _PATHS),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{kind}" for kind in ("int", "float", "str", "bool", "bytes", "list", "dict", "tuple")),
    *(f"builtins.{kind}" for kind in ("object", "frozenset", "range", "slice")),
)
_DICTS = ("collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode")
_DICTS += tuple(f"{place}.utilities.parsing.AttributeDict" for place in ("pytorch_lightning", "lightning.pytorch"))
_DICTS += tuple(f"{place}.utilities.data.AttributeDict" for place in ("lightning_fabric", "lightning.fabric"))
_NUMPY = tuple(f"numpy.{core}.multiarray" for core in ("core", "_core"))
_CODES = (
    "Bool",
    *(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    "Float16",
    "Float32",
    "Float64",
)

# What a file may name beside torch's own classes, and what is made of it.
ALLOWED: dict[str, Any] = {
    **dict.fromkeys(_SKIPPED, Skipped),
    **dict.fromkeys(_DICTS, _Dict),
    "collections.deque": _List,
    "numpy.dtype": _DType,
    **{f"numpy.dtypes.{code}DType": _DType for code in _CODES},
    "numpy.ndarray": _Array,
    **{f"{place}._reconstruct": _Array for place in _NUMPY},
    **{f"{place}.scalar": _scalar for place in _NUMPY},
}


def read_plain(file: Path, remedy: str) -> Any:
    """The content of a file that torch.save wrote: tensors and plain data. numpy's arrays come as tensors.

    remedy: what the user can do about a file that cannot be read; every such file is a UserError of one line.
    """
    _check_records(file, remedy)
    allowed = [(stand_in, name) for name, stand_in in ALLOWED.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about pickle's protocol, and torch.jit
            return _as_tensors(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UserError(f"{str(file)!r} {_refusal(str(error))}; {remedy}") from None
    except Exception as error:  # whatever damaged or foreign bytes lead to
        if "TorchScript" in str(error):
            raise UserError(f"{str(file)!r} is a TorchScript program, not a file of tensors; {remedy}") from None
        raise UserError(f"cannot read {str(file)!r} as what torch.save writes ({reason(error)}); {remedy}") from None


def reason(error: BaseException) -> str:
    """The first line of what an exception says, printable and not too long; its kind where it says nothing."""
    text = message_of(error)
    return printable(text) or type(error).__name__


def printable(text: str) -> str:
    """A text from a file, fit for a terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def _refusal(message: str) -> str:
    """Why torch's unpickler refuses a file, in a few words."""
    found = re.search(r"GLOBAL (.+?)(?: whose module| was not an allowed|\n|$)", message)
    if found:
        return f"holds the object {printable(found[1])!r}, which is no tensor and could run code, so it is not loaded"
    if "Unsupported operand" in message:
        return "was written with a pickle protocol that is not read safely, or is damaged, so it is not loaded"
    if "must be imported to load" in message:
        return "holds nested or distributed tensors, so it is not loaded"
    return "asks to do more than to hold tensors, and that could run code, so it is not loaded"


def _check_records(file: Path, remedy: str) -> None:
    """Compare the checksums of a zip file's records, which torch.load does not. Older formats have none."""
    try:
        with file.open("rb") as start:
            if start.read(4) != b"PK\x03\x04":  # by which torch.load tells, too
                return
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC == 0 and record.file_size:  # torch.save was told to write no checksums
                    continue
                with archive.open(record) as content:
                    while content.read(2**20):
                        pass
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        raise UserError(f"{str(file)!r} is damaged ({reason(error)}); {remedy}") from None


def _as_tensors(content: Any) -> Any:
    """The same with numpy's arrays as tensors, or Skipped where they hold no numbers."""
    if isinstance(content, _Array):
        usable = content.value is not None and content.value.dtype.kind in "biufc"
        return torch.from_numpy(content.value.astype(content.value.dtype.newbyteorder("="))) if usable else Skipped()
    if isinstance(content, dict):
        return {key: _as_tensors(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_as_tensors(value) for value in content)
    return content
