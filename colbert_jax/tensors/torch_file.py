"""Read and write torch's checkpoint files without torch, and without running a pickle's code.

torch.save writes a pickle, which describes the value, and the raw bytes of the storages. The pickle
is interpreted here, opcode by opcode: a global stays a name and is never imported, and `_KNOWN`
defines the few names that are supported. The formats are those of torch/serialization.py: `_save`
(a zip archive) and `_legacy_save`.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from colbert_jax.files import present, replacing
from colbert_jax.tensors.stored import Stored, c_strides, span

_DTYPES = {
    name: np.dtype(name)
    for name in ("bool", "float16", "float32", "float64")
    + ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORAGES = {
    "BoolStorage": "bool",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",  # it holds uint16, uint32 and uint64 too
}
_SCALARS = (str, int, float, bool, bytes, type(None))
_BYTE = np.dtype(np.uint8)
_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a legacy file

# Limits against files that are made to exhaust memory, far above the needs of checkpoints.
_PICKLE = 2**24  # bytes of a pickle, and items that its calls copy
_EXPANDED = 2**30  # bytes of a tensor that repeats its storage by strides of 0
_DEFLATED = 1032  # the largest ratio of deflate
_NUMBER = 2**48  # sizes, strides, offsets
_DEPTH = 100  # containers in containers
_PIECE = 2**20  # elements that are written at a time
_ZIP64 = 2**30  # bytes above which members get 64-bit sizes; zipfile requires them near 2**31


class _Refused(ValueError):
    """An error message to which `read_torch_file` adds the file's name."""


# --- Reading --------------------------------------------------------------------------------


def read_torch_file(path: str | Path) -> Any:
    """Read a value that torch.save wrote, with a `Stored` for every tensor, parameter and storage.

    It reads files of torch 0.2 and later, with any suffix. Besides tensors a value may hold dict
    (OrderedDict and argparse.Namespace become one), list, tuple (torch.Size becomes one), str, int,
    float, bool, None and bytes. A torch.dtype becomes its name ("float32"), a torch.device a str.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a torch file, is damaged, or holds an object of another type.
    """
    file = Path(path)
    if not present(file):
        raise FileNotFoundError(f"{file}: no such file")
    with file.open("rb") as stream:
        try:
            head = stream.read(512)
            stream.seek(0)
            if head.startswith(b"PK\x03\x04"):
                value = _read_zip(file, stream)
            elif _MAGIC.to_bytes(10, "little") in head[:32]:
                value = _read_legacy(file, stream)
            else:
                raise _Refused(_foreign(head))
            _check_plain(value)
        except _Refused as error:
            raise ValueError(f"{file}: {error}") from None
        except Exception as error:  # damage can show anywhere in zipfile and pickletools
            detail = _shown(f"{type(error).__name__}: {error}")
            raise ValueError(
                f"{file}: damaged or truncated torch file; fetch it again ({detail})"
            ) from error
    return value


def _shown(text: str) -> str:
    """Text from a file for a message: short, and without control characters."""
    return ascii(text[:100])[1:-1]


def _foreign(head: bytes) -> str:
    """Describe a file that torch.save did not write."""
    if not head:
        return "empty file; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer in place of the file; fetch the file with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in place of the file; fetch it again"
    if head[257:262] == b"ustar":
        return "the tar format of torch 0.1; load it with an old torch and torch.save it again"
    if head[8:10] == b'{"':
        return "not a torch file; it looks like safetensors"
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write; other pickles are not read"
    return "not a torch file (written by torch.save)"


def _read_zip(file: Path, stream: BinaryIO) -> Any:
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
    members = {info.filename: info for info in infos}
    roots = [n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1 or len(members) != len(infos):
        raise _Refused("a zip archive that torch.save did not write; others are not read")
    root = roots[0]
    if root + "constants.pkl" in members:
        raise _Refused("a TorchScript program; torch.save its state_dict instead")
    size = file.stat().st_size

    def member(name: str) -> Stored:
        """A member's bytes. Its checksum is not checked, since torch can omit it."""
        info = members.get(root + name)
        if info is None:
            raise _Refused(f"its zip member {_shown(name)} is missing; fetch the file again")
        if info.flag_bits & 1:
            raise _Refused("an encrypted zip archive; decrypt it first")
        if info.compress_type != zipfile.ZIP_STORED:
            if info.compress_type != zipfile.ZIP_DEFLATED or info.file_size > _DEFLATED * size:
                raise _Refused("compressed in an unknown way; unzip it, then zip it with `zip -0`")
            return Stored(file, 0, _BYTE, (info.file_size,), member=info.filename)
        stream.seek(info.header_offset)
        header = stream.read(30)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if header[:4] != b"PK\x03\x04" or start + info.file_size > size:
            raise _Refused("the zip archive is damaged or truncated; fetch the file again")
        return Stored(file, start, _BYTE, (info.file_size,))

    def record(name: str) -> bytes:
        stored = member(name)
        if stored.shape[0] > _PICKLE:
            raise _Refused(f"its {name} has more than {_PICKLE} bytes")
        return stored.read().tobytes()

    order = record("byteorder").decode() if root + "byteorder" in members else "little"
    if order not in ("little", "big"):
        raise _Refused("its byte order is neither little nor big")

    def storage(key: str, dtype: np.dtype) -> Stored:
        return replace(member(f"data/{key}"), swapped=order != sys.byteorder)

    return _interpret(io.BytesIO(record("data.pkl")), storage)


def _read_legacy(file: Path, stream: BinaryIO) -> Any:
    pickles = io.BytesIO(stream.read(_PICKLE))
    magic, version, _ = (_interpret(pickles) for _ in range(3))
    if magic != _MAGIC or version != 1001:
        raise _Refused("an unknown version of torch's legacy format")
    # The storages follow the pickle, each after its number of elements. The pickle is interpreted
    # twice: for the storages' types, from which their offsets follow, and for the value.
    widths: dict[str, int] = {}
    places: dict[str, Stored] = {}

    def anywhere(key: str, dtype: np.dtype) -> Stored:
        widths.setdefault(key, dtype.itemsize)
        return Stored(file, 0, _BYTE, (8 * _NUMBER,))

    start = pickles.tell()
    _interpret(pickles, anywhere)
    keys = _interpret(pickles)
    offset = pickles.tell()
    for key in keys:
        if type(key) is not str or key not in widths:
            raise _Refused("damaged: it lists a storage that no tensor uses")
        stream.seek(offset)
        (count,) = struct.unpack("<q", stream.read(8))
        if not 0 <= count < _NUMBER:
            raise _Refused(f"damaged: a storage of {count} elements")
        places[key] = Stored(file, offset + 8, _BYTE, (count * widths[key],))
        offset += 8 + count * widths[key]
    if offset > file.stat().st_size:
        raise _Refused("truncated; fetch the file again")
    pickles.seek(start)
    swapped = sys.byteorder != "little"  # these files are little-endian everywhere
    return _interpret(pickles, lambda key, dtype: replace(places[key], swapped=swapped))


def _check_plain(value: Any) -> None:
    """Refuse leaves other than data, and nesting too deep for recursion over the value."""
    level = [value]
    for _ in range(_DEPTH):
        inner: dict[int, Any] = {}  # by identity: one item may be shared a million times
        for item in level:
            if isinstance(item, dict):
                inner.update((id(x), x) for x in item.values())
            elif isinstance(item, list | tuple):
                inner.update((id(x), x) for x in item)
            elif not isinstance(item, (Stored, *_SCALARS)):
                raise _Refused(f"it holds {item.name}; only tensors and plain values are read")
        level = list(inner.values())
        if not level:
            return
    raise _Refused(f"containers more than {_DEPTH} deep, or a container that holds itself")


# --- The pickle -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """The name of a global in a pickle; there is nothing to call or to change."""

    name: str


class _Namespace(dict):
    """argparse.Namespace, whose entries BUILD sets; on a dict it sets attributes."""


_NEW = {"NONE": type(None), "NEWFALSE": bool, "EMPTY_DICT": dict, "EMPTY_LIST": list}
_TAKES = dict(TUPLE1=1, TUPLE2=2, TUPLE3=3, APPEND=1, SETITEM=2, BUILD=1)
_TAKES |= dict(STACK_GLOBAL=2, REDUCE=2, NEWOBJ=2, BINPERSID=1)


def _interpret(pickle: BinaryIO, find: Callable[[str, np.dtype], Stored] | None = None) -> Any:
    """The value of the pickle at the stream's position, which moves to the pickle's end.

    Args:
      find: (key, type) -> the bytes of a storage. If None, a storage is refused.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the open marks
    memo: dict[int, Any] = {}
    copied = 0
    arg: Any
    for opcode, arg, _ in pickletools.genops(pickle):
        name = opcode.name
        items = [stack.pop() for _ in range(_TAKES.get(name, 0))][::-1]
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, below.pop()
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "BINSTRING" | "SHORT_BINSTRING":  # of Python 2
                stack.append(arg.encode("latin1").decode("utf-8"))
            case "NEWTRUE":
                stack.append(True)
            case _ if name in _NEW:
                stack.append(_NEW[name]())
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" if type(stack[-1]) is list:
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" if type(stack[-1]) in (dict, _Namespace):
                _set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_known(arg.replace(" ", ".")))
            case "STACK_GLOBAL" if all(type(item) is str for item in items):
                stack.append(_known(".".join(items)))
            case "BINPERSID" if find is not None:
                stack.append(_storage(items[0], find))
            case "REDUCE" | "NEWOBJ" if type(items[0]) is _Global and type(items[1]) is tuple:
                copied += sum(len(arg) for arg in items[1] if isinstance(arg, Sized))
                stack.append(_KNOWN[items[0].name](*items[1]))
            case "BUILD" if type(stack[-1]) is _Namespace and type(items[0]) is dict:
                copied += len(items[0])
                _set_items(stack[-1], items[0].items())
            case "BUILD" if type(stack[-1]) is dict:
                pass  # attributes of an OrderedDict, such as the _metadata of a state_dict
            case "STOP" if len(stack) == 1:
                return stack[0]
            case _:
                if name == "INST":
                    _known(arg.replace(" ", "."))  # raises with the name of the global
                raise _Refused(
                    f"its pickle uses the opcode {name} in a way that torch.save does not"
                )
        if copied > _PICKLE:
            raise _Refused("its pickle copies parts of itself, which would fill the memory")
    raise AssertionError("genops raises where there is no STOP")


def _set_items(target: dict, items: Iterable[Any]) -> dict:
    for key, item in items:
        if not isinstance(key, _SCALARS):  # hashing a tuple nested too deeply is a crash
            raise _Refused("a dict has a key that is neither text nor a number")
        target[key] = item
    return target


def _known(name: str) -> Any:
    module, _, last = name.rpartition(".")
    if module == "torch" and last in _DTYPES:
        return last
    if module in ("torch", "torch.cuda", "torch.storage") and last in _STORAGES:
        return _Global(last)
    if name in _KNOWN:
        return _Global(name)
    hint = "a model is best saved by torch.save(model.state_dict(), file)"
    if name.startswith("numpy."):
        hint = "save numpy values as tensors or as Python numbers"
    raise _Refused(
        f"its pickle needs {_shown(name)}; only tensors and plain containers are read ({hint})"
    )


def _storage(pid: Any, find: Callable[[str, np.dtype], Stored]) -> Stored:
    """The storage that a persistent id names, as a tensor of one dimension."""
    match pid:
        case ("storage", _Global(name=kind), str(key), _, count, *view) if kind in _STORAGES:
            dtype, first = _STORAGES[kind], 0
            if view and view[0] is not None:  # of the legacy format: a part of the storage
                _, first, count = view[0]
            return _tensor(find(key, _DTYPES[dtype]), first, (count,), (1,), dtype)
    raise _Refused("its pickle has a persistent id that is not a storage")


def _tensor(
    storage: Any, first: Any, shape: Any, strides: Any, dtype: Any = None, flags: Iterable = ()
) -> Stored:
    """A part of a storage, checked to lie within it. Arguments from a pickle may have any type."""
    if type(storage) is not Stored or storage.strides is not None:
        raise _Refused("a tensor without a storage")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) > 64:
        raise _Refused("a tensor whose shape is not a tuple of at most 64 sizes")
    if any(type(n) is not int or not 0 <= n < _NUMBER for n in (first, *shape, *strides)):
        raise _Refused("a tensor with a size, stride or offset that is not a natural number")
    if type(dtype) not in (str, type(None)):
        raise _Refused("a tensor whose type is not a name")
    if any(flag and (type(flag) is not dict or any(flag.values())) for flag in flags):
        raise _Refused("a lazily negated or conjugated tensor; save it after .resolve_neg()")
    dtype = storage.dtype if dtype is None else _DTYPES[dtype]
    held = math.prod(storage.shape) * storage.dtype.itemsize
    empty = 0 in shape
    if not empty and (first + span(shape, strides)) * dtype.itemsize > held:
        raise _Refused(f"a tensor of shape {shape} does not fit into its storage of {held} bytes")
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > max(held, _EXPANDED):
        raise _Refused(f"a tensor of shape {shape}, repeated from {held} bytes, is too large")
    plain = c_strides(shape)  # where a size is 1, torch may have any stride
    strides = tuple(c if n == 1 else s for n, s, c in zip(shape, strides, plain, strict=True))
    return replace(
        storage,
        offset=storage.offset + (0 if empty else first * dtype.itemsize),
        dtype=dtype,
        shape=shape,
        strides=None if empty or strides == plain else strides,
    )


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused("bytes that are not encoded as pickle does")
    return text.encode("latin1")


# The globals that a pickle may call. Their arguments come from the pickle and may have any type;
# an error that a wrong one raises is reported as damage.
_KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": lambda *a: _tensor(a[0], a[1], a[2], a[3]),
    "torch._utils._rebuild_tensor_v2": lambda *a: _tensor(a[0], a[1], a[2], a[3], None, a[6:]),
    "torch._utils._rebuild_tensor_v3": lambda *a: _tensor(a[0], a[1], a[2], a[3], a[6], a[7:]),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": tuple,
    "torch.device": lambda kind, *index: ":".join([kind, *(str(int(i)) for i in index)]),
    "collections.OrderedDict": lambda pairs=(): _set_items({}, pairs),  # pairs: Python 2
    "argparse.Namespace": lambda: _Namespace(),
    "_codecs.encode": _latin1,  # protocol 2 writes bytes so, and empty bytes as the next two
    "__builtin__.bytes": lambda: b"",
    "builtins.bytes": lambda: b"",
}


# --- Writing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written block by block: `blocks()` yields its elements in C order.

    Writing raises ValueError if the blocks do not have as many elements as the shape.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize


_Arrays = dict[
    int, tuple[str, np.ndarray | Streamed]
]  # by identity, each with the key of its storage


def write_torch_file(path: str | Path, value: Any) -> None:
    """Write a file that torch.load reads, with weights_only and mmap too.

    Args:
      value: dicts, lists and tuples of str, int, float, bool, None, `Streamed` and NumPy arrays
        (also with the bfloat16 of ml_dtypes). An array that occurs twice is written once, and is
        shared when loaded.

    Raises:
      ValueError: the value holds an object of another type; nothing is written.
    """
    arrays: _Arrays = {}
    pickle = b"\x80\x02" + b"".join(_opcodes(value, arrays)) + b"."
    with replacing(Path(path), "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        _write_member(archive, "data.pkl", len(pickle), [pickle])
        _write_member(archive, "byteorder", 6, [b"little"])
        for key, array in arrays.values():
            _write_member(archive, f"data/{key}", array.nbytes, _chunks(array))
        _write_member(archive, "version", 2, [b"3\n"])


def _write_member(archive: zipfile.ZipFile, name: str, size: int, chunks: Iterable[Any]) -> None:
    """Write a member whose bytes start at a multiple of 64, as torch's; an extra field pads it."""
    info = zipfile.ZipInfo(f"archive/{name}")
    wide = size > _ZIP64
    header = archive.start_dir + 30 + len(info.filename) + 20 * wide + 4  # 20: zipfile's own field
    info.extra = struct.pack("<2sH", b"FB", -header % 64) + bytes(-header % 64)
    with archive.open(info, "w", force_zip64=wide) as stream:
        for chunk in chunks:
            stream.write(chunk)


def _chunks(array: np.ndarray | Streamed) -> Iterator[np.ndarray]:
    """The elements in C order and little-endian, a piece at a time."""
    if isinstance(array, Streamed):
        size = 0
        for block in array.blocks():
            assert block.dtype == array.dtype, (block.dtype, array.dtype)
            size += block.size
            yield from _chunks(block)
        if size != array.size:
            raise ValueError(f"a tensor of shape {array.shape} got {size} elements")
        return
    kind = np.dtype(f"u{array.dtype.itemsize}")  # NumPy cannot change the byte order of bfloat16
    bits = array.view(kind.newbyteorder(array.dtype.byteorder))
    flat = bits.reshape(-1) if bits.flags.c_contiguous else bits.flat  # a slice of flat is a copy
    for start in range(0, array.size, _PIECE):
        yield flat[start : start + _PIECE].astype(kind.newbyteorder("<"), copy=False)


@dataclass(frozen=True)
class _Call:
    """A call of a global with arguments; with the name "", a persistent id."""

    name: str
    args: tuple


def _opcodes(value: Any, arrays: _Arrays, place: str = "value", depth: int = 0) -> Iterator[bytes]:
    """Yield the opcodes of protocol 2 for a value, and add its arrays to `arrays`."""
    if depth > _DEPTH:
        raise ValueError(f"{place[:60]}...: containers more than {_DEPTH} deep")

    def each(items: Iterable[Any]) -> Iterator[bytes]:
        for i, item in enumerate(items):
            yield from _opcodes(item, arrays, f"{place}[{i}]", depth + 1)

    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            yield struct.pack("<ci", b"J", value)
        case int() if value.bit_length() < 2040:
            size = value.bit_length() // 8 + 1
            yield b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            yield struct.pack(">cd", b"G", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            yield struct.pack("<cI", b"X", len(text)) + text
        case list():
            yield from (b"](", *each(value), b"e")
        case tuple():
            yield from (b"(", *each(value), b"t")
        case dict():
            yield b"}("
            for key, item in value.items():
                if not isinstance(key, _SCALARS) or isinstance(key, bytes):
                    raise ValueError(f"{place}: the key {key!r} is neither text nor a number")
                yield from _opcodes(key, arrays, place, depth)
                yield from _opcodes(item, arrays, f"{place}[{key!r}]", depth + 1)
            yield b"u"
        case np.ndarray() | Streamed() if value.dtype.name in _DTYPES:
            key, _ = arrays.setdefault(id(value), (str(len(arrays)), value))
            yield from _opcodes(_rebuild(key, value), arrays, place)
        case _Global():
            yield "c{}\n{}\n".format(*value.name.rsplit(".", 1)).encode()
        case _Call(name=""):
            yield from (*each([value.args]), b"Q")
        case _Call():
            yield from (*each([_Global(value.name), value.args]), b"R")
        case _:
            found = value.dtype if isinstance(value, np.ndarray) else type(value)
            raise ValueError(f"{place}: {found} cannot be written to a torch file")


def _rebuild(key: str, array: np.ndarray | Streamed) -> _Call:
    """As torch pickles a tensor in C order: `torch.Tensor._reduce_ex_internal`."""
    name, count = "torch._utils._rebuild_tensor_v2", array.size
    dtype: tuple[_Global, ...] = ()
    kinds = [f"torch.{kind}" for kind, d in _STORAGES.items() if d == array.dtype.name]
    if not kinds:  # newer types have no storage class
        kinds, name = ["torch.storage.UntypedStorage"], "torch._utils._rebuild_tensor_v3"
        count, dtype = array.nbytes, (_Global(f"torch.{array.dtype.name}"),)
    storage = _Call("", ("storage", _Global(kinds[0]), key, "cpu", count))
    hooks = _Call("collections.OrderedDict", ())
    strides = c_strides(array.shape)
    return _Call(name, (storage, 0, array.shape, strides, False, hooks, *dtype))
