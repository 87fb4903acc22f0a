"""Torch's files: read as torch reads them, written as torch takes them, and no code run."""

import collections
import contextlib
import copyreg
import io
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
from argparse import Namespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colbert_jax.tensors import torch_file
from colbert_jax.tensors.torch_file import Stored, read_torch_file, write_torch_file

FLOATS = ["float16", "bfloat16", "float32", "float64"]
SIGNED = ["int8", "int16", "int32", "int64"]
UNSIGNED = ["uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *FLOATS, *SIGNED, *UNSIGNED]
MAGIC = 0x1950A86A20F9469CFC6C


def np_dtype(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def arrays_of(value):
    """The same value with every `Stored` read."""
    if isinstance(value, Stored):
        return value.read()
    if isinstance(value, dict):
        return {key: arrays_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(arrays_of(item) for item in value)
    return value


def assert_same(found, expected):
    """Equal with types: arrays by shape, dtype and bits, everything else by ==."""
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.flags.c_contiguous and found.flags.writeable
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected or (found != found and expected != expected)


# --- Torch as the oracle --------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def from_torch(torch, value):
    """A loaded value in the terms of this module, with arrays for tensors."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.contiguous().numpy()
    if isinstance(value, dict):
        return {key: from_torch(torch, item) for key, item in value.items()}
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, list | tuple):
        return type(value)(from_torch(torch, item) for item in value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return value


def tensors(torch):
    """A value with a tensor of every sort that is read."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 7, generator=generator)
    every = torch.arange(24)
    tied = torch.nn.Parameter(torch.randn(3, 2, generator=generator))
    return {
        "dtypes": {
            name: (every % 2 if name == "bool" else every).to(getattr(torch, name)).reshape(4, 6)
            for name in DTYPES
        },
        "base": base,
        "view": base[1:4, 2:6],
        "last element": base[4:, 6:],
        "transposed": base.t(),
        "stepped": base[::2, 1::3],
        "diagonal": base.diagonal(),
        "windows": every.unfold(0, 4, 1),
        "expanded": torch.tensor([1.5, 2.5])[:, None].expand(2, 300),
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "odd strides of ones": torch.empty_strided((1, 3, 1), (77, 1, 5)).fill_(2),
        "bf16 transposed": base.to(torch.bfloat16).t(),
        "uint16 view": every.to(torch.uint16)[5:].reshape(-1),
        "uint64 stepped": every.to(torch.uint64)[::5],
        "scalar": torch.tensor(3.5),
        "scalar of a view": base[2, 3],
        "bool scalar": torch.tensor(True),
        "empty": torch.empty(0),
        "empty 2d": torch.empty(0, 3, dtype=torch.int64),
        "empty end": torch.arange(10)[10:],
        "tied": [tied, tied, tied.detach()],
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "nan and inf": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "size": base.shape,
        "no size": torch.Size([]),
        "dtype": torch.float32,
        "bfloat16": torch.bfloat16,
        "device": torch.device("cpu"),
        "cuda": torch.device("cuda", 1),
        "plain": [None, True, False, 0, -1, 255, 65536, -(2**31), 2**40, -(2**80), 1e-300, ""],
        "text": ("é", "\N{SNOWMAN}", "a\nb", "tab\t'\""),
        "bytes": [b"", b"\x00\xff ab"],
        "nested": {"a": [(), {}, [], ({"b": ([1], 2)},)], 3: "int key", 2.5: "float", None: 0},
        "ordered": collections.OrderedDict(z=1, a=collections.OrderedDict()),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(torch, tmp_path, zipped, protocol):
    file = tmp_path / "model.bin"
    value = tensors(torch)
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = arrays_of(read_torch_file(str(file)))
    assert_same(found, from_torch(torch, value))
    if zipped:  # of the legacy format, torch does not load its own unsigned integers
        assert_same(found, from_torch(torch, torch.load(file, weights_only=False)))
    stored = read_torch_file(file)
    assert isinstance(stored["tied"][0], Stored) and stored["tied"][0] == stored["tied"][2]
    assert stored["odd strides of ones"].strides is None and stored["transposed"].strides == (1, 7)


def test_reads_state_dicts_and_optimizers(torch, tmp_path):
    """A state_dict is an OrderedDict with attributes, an optimizer's has int keys and scalars."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 3)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0]}]
    saved = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {"state": {0: state}, "param_groups": groups},
        "arguments": Namespace(lr=3e-6, bsize=32, mask=True, path=None, more=Namespace()),
    }
    assert hasattr(saved["model_state_dict"], "_metadata")
    torch.save(saved, tmp_path / "colbert.dnn")
    found = arrays_of(read_torch_file(tmp_path / "colbert.dnn"))
    arguments = found.pop("arguments")
    assert arguments == dict(lr=3e-6, bsize=32, mask=True, path=None, more={})
    del saved["arguments"]
    assert_same(found, from_torch(torch, saved))


def test_reads_only_the_bytes_of_the_tensor(torch, tmp_path):
    file = tmp_path / "model.bin"
    torch.save({"rows": torch.arange(1000.0).reshape(100, 10)[3:5]}, file)
    stored = read_torch_file(file)["rows"]
    assert stored.strides is None and stored.shape == (2, 10)
    assert stored.member is None and not stored.swapped
    with file.open("rb") as stream:
        stream.seek(stored.offset)
        assert np.array_equal(np.frombuffer(stream.read(80), np.float32), np.arange(30.0, 50.0))


def test_storages_alone_and_without_checksums(torch, tmp_path):
    """torch can be told to write no checksums; a storage is read as an array."""
    file = tmp_path / "model.bin"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"s": torch.arange(6, dtype=torch.uint8).untyped_storage()}, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(arrays_of(read_torch_file(file)), {"s": np.arange(6, dtype=np.uint8)})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda t: t.zeros(2, dtype=t.complex64), "torch.ComplexFloatStorage"),
        (lambda t: t.zeros(2, dtype=t.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda t: t.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda t: t.quantize_per_tensor(t.ones(2), 1.0, 0, t.qint8), "_rebuild_qtensor"),
        (lambda t: t.zeros(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (lambda t: t._neg_view(t.ones(2)), "resolve_neg"),
        (lambda t: t.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (lambda t: {1, 2}, "set"),
        (lambda t: np.float32(1.5), "numpy"),
        (lambda t: np.ones(2), "as tensors"),
        (lambda t: {(1, 2): 3}, "a key"),
        (lambda t: collections.OrderedDict, "it holds collections.OrderedDict"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_the_rest_by_name(torch, tmp_path, make, named, zipped):
    file = tmp_path / "model.bin"
    torch.save({"x": make(torch)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.bin: ") as error:
        read_torch_file(file)
    assert named in str(error.value)


def test_refuses_torchscript(torch, tmp_path):
    file = tmp_path / "model.pt"
    root = "model/"
    torch.save({"x": torch.ones(1)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(root + "constants.pkl", b"\x80\x02).")
    with pytest.raises(ValueError, match=r"model.pt: a TorchScript program"):
        read_torch_file(file)


def test_a_stored_file_of_a_big_endian_machine(torch, tmp_path):
    """The bytes as torch would have them there, checked by torch's own swapping."""
    file = tmp_path / "model.bin"
    value = {"f": torch.randn(3, 4).t(), "h": torch.arange(3).to(torch.bfloat16)}
    value |= {"b": torch.tensor([True, False]), "i": torch.tensor(2**40 + 3)}
    torch.save(value, file)
    widths = {"data/0": 4, "data/1": 2, "data/2": 1, "data/3": 8}
    members = unzip(file)
    for name, width in widths.items():
        swapped = np.frombuffer(members[f"model/{name}"], f"u{width}").byteswap()
        members[f"model/{name}"] = swapped.tobytes()
    members["model/byteorder"] = b"big"
    rezip(file, members)
    expected = from_torch(torch, value)
    assert_same(from_torch(torch, torch.load(file, weights_only=True)), expected)
    assert_same(arrays_of(read_torch_file(file)), expected)


def test_a_part_of_a_storage_in_the_legacy_format(torch, tmp_path):
    """Views of storages, which torch before 0.4 wrote; the file is made by hand, torch agrees."""
    file = tmp_path / "model.pth"
    view = ("key of the view", 2, 5)
    data = np.arange(8, dtype=np.float32)
    pid = persistent("FloatStorage", "7", 8, view)
    body = b"\x80\x02" + tensor_opcodes(pid, 1, (2, 2), (2, 1)) + b"."
    file.write_bytes(legacy(body, {"7": data.tobytes()}, 4))
    expected = data[2:7][1:5].reshape(2, 2)
    assert_same(from_torch(torch, torch.load(file, weights_only=False)), expected)
    assert_same(read_torch_file(file).read(), expected)
    outside = persistent("FloatStorage", "7", 8, ("key", 5, 4))
    body = b"\x80\x02" + tensor_opcodes(outside, 0, (2,), (1,)) + b"."
    file.write_bytes(legacy(body, {"7": data.tobytes()}, 4))
    with pytest.raises(ValueError, match="does not fit into its storage"):
        read_torch_file(file)


def written():
    """What the writer takes: every type, layout and size, and an array that occurs twice."""
    base = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    value = {
        name: (np.arange(24) % 2 if name == "bool" else np.arange(24)).astype(np_dtype(name))
        for name in DTYPES
    }
    value |= {
        "base": base,
        "again": [base, (base,)],
        "transposed": base.T,
        "reversed": base[::-1, ::-2],
        "stepped": base[1::2, ::3],
        "repeated": np.broadcast_to(base[:, :1], (5, 9)),
        "bf16 transposed": base.astype(ml_dtypes.bfloat16).T,
        "big-endian": base.astype(">f4").T,
        "scalar": np.array(2.5),
        "scalar bool": np.array(True),
        "empty": np.empty(0, np.float16),
        "empty 3d": np.empty((2, 0, 3), np.int64),
        "plain": [None, True, False, 0, -1, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, 2**2038],
        "floats": [0.5, -0.0, math.inf, math.nan, 1e-320],
        "text": ("é", "\N{SNOWMAN}\n", "x" * 300, "\ud800"),
        "nested": {"a": [(), {}, [], ({"b": ([1], 2)},)], 3: "int key", True: 1, None: 0},
    }
    return value


def test_torch_loads_what_is_written(torch, tmp_path):
    file = tmp_path / "model.bin"
    value = written()
    write_torch_file(file, value)
    expected = {**value, "big-endian": value["base"].T}
    mapped = torch.load(file, weights_only=True, mmap=True)
    for loaded in (torch.load(file, weights_only=True), mapped):
        assert_same(from_torch(torch, loaded), expected)
        shared = {loaded["base"].data_ptr(), loaded["again"][0].data_ptr()}
        assert shared == {loaded["again"][1][0].data_ptr()}
    assert mapped["stepped"].data_ptr() % 64 == 0


@pytest.mark.parametrize("zip64", [False, True])
def test_storages_are_aligned_and_written_once(tmp_path, monkeypatch, request, zip64):
    """Members above a GiB have longer headers; here all do."""
    if zip64:
        monkeypatch.setattr(torch_file, "_ZIP64", -1)
    file = tmp_path / "model.bin"
    shared = np.arange(9.0)
    write_torch_file(file, {"a": shared, "b": shared, "c": np.arange(3, dtype=np.int8)})
    found = read_torch_file(file)
    assert found["a"] == found["b"] and found["a"].offset != found["c"].offset
    assert found["a"].offset % 64 == 0 and found["c"].offset % 64 == 0
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert [n for n in archive.namelist() if "/data/" in n] == [
            "archive/data/0",
            "archive/data/1",
        ]
    torch = request.getfixturevalue("torch")
    for mmap in (False, True):
        loaded = torch.load(file, weights_only=True, mmap=mmap)
        assert loaded["b"].tolist() == list(range(9)) and loaded["c"].tolist() == [0, 1, 2]


# --- Without torch --------------------------------------------------------------------------


def test_reads_what_it_writes(tmp_path):
    file = tmp_path / "model.bin"
    value = written()
    write_torch_file(file, value)
    assert_same(arrays_of(read_torch_file(file)), {**value, "big-endian": value["base"].T})


def test_pieces_of_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_PIECE", 7)
    value = {"c": np.arange(60.0).reshape(3, 4, 5), "f": np.arange(60.0).reshape(3, 4, 5).T}
    write_torch_file(tmp_path / "model.bin", value)
    assert_same(arrays_of(read_torch_file(tmp_path / "model.bin")), value)


def test_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        write_torch_file(tmp_path / name, {"x": np.arange(5)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "model.bin"
    write_torch_file(file, {"x": np.arange(5)})
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"value\['y'\]\[1\]: <class 'set'> cannot be written"):
        write_torch_file(file, {"x": np.arange(6), "y": [0, {1}]})

    def full(array):
        yield array[:1].tobytes()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_file, "_chunks", full)
    with pytest.raises(OSError, match="No space"):
        write_torch_file(file, {"x": np.arange(6)})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.bin"]


@pytest.mark.parametrize(
    "value",
    [
        {"x": np.array([1j])},
        {"x": np.array(["a"])},
        {"x": np.array([None])},
        {"x": np.ones(2, ml_dtypes.float8_e4m3fn)},
        {"x": np.float32(1)},
        {"x": b"bytes"},
        {(1, 2): 3},
        {"x": 2**2040},
        {"x": object()},
    ],
)
def test_refuses_to_write(tmp_path, value):
    with pytest.raises(ValueError, match=r"^value"):
        write_torch_file(tmp_path / "model.bin", value)
    assert os.listdir(tmp_path) == []


def test_refuses_to_write_a_list_that_holds_itself(tmp_path):
    value: list = []
    value.append({"x": value})
    with pytest.raises(ValueError, match="deep"):
        write_torch_file(tmp_path / "model.bin", value)


def unzip(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_zip_that_was_compressed_again(tmp_path):
    file = tmp_path / "model.bin"
    value = {"a": np.arange(5000.0).reshape(50, 100).T, "b": np.zeros((3, 2), ml_dtypes.bfloat16)}
    write_torch_file(file, value)
    members = unzip(file)
    rezip(file, members, zipfile.ZIP_DEFLATED)
    found = read_torch_file(file)
    assert found["a"].member == "archive/data/0"
    assert_same(arrays_of(found), value)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("archive/data/0").header_offset
    data[start + 100 : start + 200] = bytes(100)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.bin: archive/data/0: "):
        found["a"].read()
    rezip(file, members, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match=r"model.bin: compressed in an unknown way"):
        read_torch_file(file)


def test_a_file_cut_between_reading_and_reading(tmp_path):
    file = tmp_path / "model.bin"
    write_torch_file(file, {"a": np.arange(5000.0)})
    found = read_torch_file(file)["a"]
    os.truncate(file, 10_000)
    with pytest.raises(ValueError, match=r"model.bin: truncated"):
        found.read()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        found.read()


def test_a_place_in_a_file(tmp_path):
    """`Stored` by hand, as for the tensors of a safetensors file."""
    file = tmp_path / "some.file"
    file.write_bytes(b"head" + np.arange(6, dtype=np.int16).tobytes() + b"tail")
    whole = Stored(file, 4, np.dtype(np.int16), (2, 3))
    assert_same(whole.read(), np.arange(6, dtype=np.int16).reshape(2, 3))
    columns = Stored(file, 6, np.dtype(np.int16), (2, 2), (1, 3), swapped=True)
    assert_same(columns.read(), np.array([[256, 1024], [512, 1280]], np.int16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"just some text\n", "not a torch file"),
        (b"\x93NUMPY\x01\x00", "not a torch file"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}', "safetensors"),
        (b"pickle".ljust(257, b"\0") + b"ustar\x0000".ljust(300, b"\0"), "tar format of torch 0.1"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
        (pickle.dumps(MAGIC, 2) + pickle.dumps(1002, 2) + pickle.dumps({}, 2), "legacy format"),
        (b"PK\x03\x04" + bytes(100), "damaged or truncated"),
    ],
)
def test_what_is_no_torch_file_is_named(tmp_path, content, message):
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.bin: ") as error:
        read_torch_file(file)
    assert message in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.bin: no such file"):
        read_torch_file(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="folder"):
        read_torch_file(tmp_path)


# --- Pickles made by hand -------------------------------------------------------------------


def global_(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def plain(value):
    """The opcodes that push a value, without the frame around them."""
    data = pickle.dumps(value, 2)
    return data[2:-1]


def persistent(kind, key, count, *view):
    end = b"".join(plain(v) for v in view)
    parts = text("storage"), global_("torch", kind), text(key), text("cpu"), plain(count), end
    return b"(" + b"".join(parts) + b"tQ"


def tensor_opcodes(pid, offset, shape, strides, extra=b""):
    call = global_("torch._utils", "_rebuild_tensor_v2")
    where = plain(offset) + plain(shape) + plain(strides)
    return call + b"(" + pid + where + b"\x89}" + extra + b"tR"


def zipped(body, storages, **more):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/data.pkl", body)
        for key, data in storages.items():
            archive.writestr(f"m/data/{key}", data)
        for name, data in more.items():
            archive.writestr(f"m/{name}", data)
    return out.getvalue()


def legacy(body, storages, width=4):
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True}))
    data = b"".join(struct.pack("<q", len(d) // width) + d for d in storages.values())
    return head + body + pickle.dumps(list(storages), 2) + data


FORMATS = {"zip": zipped, "legacy": legacy}
FLOATS4 = {"0": np.arange(4, dtype=np.float32).tobytes()}


@pytest.fixture(params=list(FORMATS))
def load(request, tmp_path):
    """Reads a pickle's opcodes as the file of either format, with one storage of 4 floats."""

    def read(body, storages=None):
        file = tmp_path / "model.bin"
        file.write_bytes(FORMATS[request.param](body, FLOATS4 if storages is None else storages))
        return read_torch_file(file)

    return read


FOUR = persistent("FloatStorage", "0", 4)


def framed(opcodes, protocol=2):
    return b"\x80" + bytes([protocol]) + opcodes + b"."


USED = tensor_opcodes(FOUR, 0, (4,), (1,))  # the legacy format lists only storages that are used


def test_hand_made_files_are_read(load):
    """So that the refusals below are of the one thing that is wrong in each."""
    assert load(framed(USED)).read().tolist() == [0, 1, 2, 3]
    assert load(framed(tensor_opcodes(FOUR, 1, (3,), (1,)))).read().tolist() == [1, 2, 3]
    assert load(framed(tensor_opcodes(FOUR, 3, (2, 3), (0, 0)))).read().tolist() == [[3] * 3] * 2
    for kind in ("torch.cuda", "torch.storage"):
        moved = USED.replace(b"ctorch\nFloatStorage", f"c{kind}\nFloatStorage".encode())
        assert load(framed(moved)).shape == (4,)
    by_stack = text("torch._utils") + text("_rebuild_tensor") + b"\x93"
    by_stack += b"(" + FOUR + plain(0) + plain((2, 2)) + plain((2, 1)) + b"tR"
    assert load(framed(by_stack, 4)).read().tolist() == [[0, 1], [2, 3]]


def test_python_2_pickles(load):
    """Byte strings for text, and an OrderedDict made of a list of pairs."""
    pair = b"]" + b"(U\x01a" + USED + b"e"
    value = load(framed(global_("collections", "OrderedDict") + b"(]" + pair + b"atR"))
    assert list(value) == ["a"] and value["a"].read().tolist() == [0, 1, 2, 3]


class Canary:
    """Pickled, it is a call that makes a file."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def calls(canary):
    """Opcodes that would make the file `canary`, in each way that a pickle can call."""
    path = plain(str(canary))
    mkdir = global_("os", "mkdir")
    stacked = text("os") + text("mkdir") + b"\x93"
    system = plain(f"mkdir {canary}")
    code = plain(f"__import__('os').mkdir({str(canary)!r})")
    nested = pickle.dumps(Canary(os.mkdir, str(canary)), 2)
    return {
        "os.mkdir": mkdir + path + b"\x85R",
        "posix.mkdir": plain(Canary(os.mkdir, str(canary))),
        "os.system": global_("os", "system") + system + b"\x85R",
        "nt.system": global_("nt", "system") + system + b"\x85R",
        "os.mkdir ": stacked + path + b"\x85R",
        "os.mkdir  ": b"(" + path + b"ios\nmkdir\n",
        "os.mkdir   ": b"(" + mkdir + path + b"o",
        "os.mkdir    ": mkdir + path + b"\x85\x81",
        "os.mkdir     ": mkdir + path + b"\x85}\x92",
        "builtins.eval": global_("builtins", "eval") + code + b"\x85R",
        "__builtin__.eval": global_("__builtin__", "eval") + code + b"\x85R",
        "builtins.exec": global_("builtins", "exec") + code + b"\x85R",
        "builtins.getattr": global_("builtins", "getattr") + plain((1, "real")) + b"R",
        "torch.serialization.load": global_("torch.serialization", "load") + path + b"\x85R",
        "torch.load": global_("torch", "load") + path + b"\x85R",
        "torch.storage._load_from_bytes": global_("torch.storage", "_load_from_bytes")
        + plain(nested)
        + b"\x85R",
        "torch._utils.os.mkdir": global_("torch._utils", "os.mkdir") + path + b"\x85R",
        "torch.serialization.os.mkdir": text("torch.serialization") + text("os.mkdir") + b"\x930",
        "torch._utils._rebuild_tensor.__globals__": text("torch._utils._rebuild_tensor")
        + text("__globals__")
        + b"\x93",
        "collections.OrderedDict.fromkeys": global_("collections", "OrderedDict.fromkeys")
        + plain(("ab",))
        + b"R",
        "_codecs.decode": global_("_codecs", "decode") + plain(("a", "rot13")) + b"R",
        "torch._tensor._rebuild_from_type_v2": global_("torch._tensor", "_rebuild_from_type_v2"),
        "numpy.core.multiarray._reconstruct": global_("numpy.core.multiarray", "_reconstruct"),
        "torch.float32.__class__": global_("torch.float32", "__class__"),
        "opcode PERSID": b"P" + str(canary).encode() + b"\n",
        "a persistent id": plain(nested) + b"Q",
        "a persistent id ": b"(" + text("storage") + mkdir + text("0") + text("cpu") + b"K\x04tQ",
        "a persistent id  ": b"(" + text("module") + plain(nested) + b"NNtQ",
    }


@pytest.mark.parametrize("named", list(calls("x")))
@pytest.mark.parametrize("inside", [False, True])
def test_no_code_is_run(load, tmp_path, named, inside):
    canary = tmp_path / "canary"
    call = calls(canary)[named]
    if inside:  # an item of what would else be read
        call = b"}(" + text("w") + USED + text("x") + call + b"u"
    with pytest.raises(ValueError, match=r"model.bin: ") as error:
        load(framed(call, 4))
    wanted = named.strip()
    if "persistent" in wanted and "os\nmkdir" in call.decode("latin1"):
        wanted = "os.mkdir"
    assert wanted in str(error.value)
    assert not canary.exists()


def test_the_canary_sings(tmp_path):
    """The same opcodes do make the file where a pickle's code is run."""
    canary = tmp_path / "canary"
    ran = 0
    for call in calls(canary).values():
        with contextlib.suppress(Exception):
            pickle.loads(framed(call, 4))
        if canary.exists():
            ran += 1
            canary.rmdir()
    assert ran >= 8  # one more where torch is installed


def test_extension_codes(load, tmp_path, monkeypatch):
    """copyreg's codes stand for globals, and pickle takes them from a cache of the process."""

    copyreg.add_extension("os", "mkdir", 0x77)
    try:
        canary = tmp_path / "canary"
        for code in (b"\x82\x77", b"\x83\x77\x00", b"\x84\x77\x00\x00\x00"):
            call = framed(code + plain(str(canary)) + b"\x85R")
            pickle.loads(call)  # now in the cache
            canary.rmdir()
            with pytest.raises(ValueError, match="the opcode EXT"):
                load(call)
            assert not canary.exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 0x77)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    "target",
    [
        global_("torch._utils", "_rebuild_tensor_v2"),
        global_("torch", "FloatStorage"),
        global_("torch", "Size"),
        USED,
        b"]",
        b")",
        text("x"),
        b"N",
    ],
)
def test_attributes_are_set_on_nothing(load, target):
    state = plain({"name": "os.system", "shape": (10**9,), "__class__": 1, "__setstate__": 2})
    for body in (target + state + b"b", target + b"N" + state + b"\x86b"):
        with pytest.raises(ValueError, match="the opcode BUILD"):
            load(framed(b"(" + USED + body + b"t"))
    assert load(framed(USED)).read().tolist() == [0, 1, 2, 3]


def test_a_dict_keeps_its_own_methods(load):
    """What BUILD gives to an OrderedDict and a Namespace changes neither the class nor others."""
    state = plain({"items": 1, "__class__": 2, "_metadata": {}})
    ordered = global_("collections", "OrderedDict") + b")R" + state + b"b"
    assert_same(arrays_of(load(framed(ordered + b"\x85"), {})), ({},))
    space = global_("argparse", "Namespace") + b")\x81" + state + b"b"
    found = load(framed(space), {})
    assert dict(found) == {"items": 1, "__class__": 2, "_metadata": {}}
    assert len(found.items()) == 3
    assert load(framed(global_("argparse", "Namespace") + b")\x81"), {}) == {}


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (tensor_opcodes(FOUR, 1, (4,), (1,)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 0, (5,), (1,)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 0, (2, 2), (3, 1)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 4, (), ()), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 2**47, (1,), (1,)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 0, (2**31, 2**31), (1, 1)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, 0, (2,), (2**47,)), "does not fit into its storage"),
        (tensor_opcodes(FOUR, -1, (2,), (1,)), "not a natural number"),
        (tensor_opcodes(FOUR, 3, (4,), (-1,)), "not a natural number"),
        (tensor_opcodes(FOUR, 0, (-1,), (1,)), "not a natural number"),
        (tensor_opcodes(FOUR, 0, (2**64,), (0,)), "not a natural number"),
        (tensor_opcodes(FOUR, 0, (2.0,), (1,)), "not a natural number"),
        (tensor_opcodes(FOUR, 0, (True,), (1,)), "not a natural number"),
        (tensor_opcodes(FOUR, "0", (2,), (1,)), "not a natural number"),
        (tensor_opcodes(FOUR, 0, (10**12,), (0,)), "too large"),
        (tensor_opcodes(FOUR, 0, (10**6, 10**6), (0, 0)), "too large"),
        (tensor_opcodes(FOUR, 0, (0, 10**12), (1, 1)), "too large"),
        (tensor_opcodes(FOUR, 0, (2,), (1, 1)), "damaged"),
        (tensor_opcodes(FOUR, 0, [2], (1,)), "64 sizes"),
        (tensor_opcodes(FOUR, 0, (1,) * 65, (1,) * 65), "64 sizes"),
        (tensor_opcodes(FOUR, 0, "ab", (1,)), "64 sizes"),
        (tensor_opcodes(plain("0"), 0, (1,), (1,)), "without a storage"),
        (tensor_opcodes(tensor_opcodes(FOUR, 0, (2, 2), (1, 2)), 0, (1,), (1,)), "storage"),
        (tensor_opcodes(FOUR, 0, (1,), (1,), plain({"neg": True})), "resolve_neg"),
        (tensor_opcodes(FOUR, 0, (1,), (1,), plain("neg")), "resolve_neg"),
        (persistent("FloatStorage", "0", 5), "does not fit into its storage"),
        (persistent("FloatStorage", "0", -4), "not a natural number"),
        (persistent("FloatStorage", "0", 2**62), "not a natural number"),
        (persistent("DoubleStorage", "0", 4), "does not fit into its storage"),
        (persistent("float32", "0", 4), "persistent id"),
        (persistent("Size", "0", 4), "persistent id"),
        (global_("torch", "FloatStorage") + b")R", "damaged"),
        (global_("torch._utils", "_rebuild_tensor_v2") + b")R", "damaged"),
        (global_("torch._utils", "_rebuild_parameter") + b")R", "damaged"),
        (global_("torch", "FloatStorage"), "it holds FloatStorage"),
        (global_("torch", "Size") + plain((3,)) + b"R", "damaged"),
        (global_("_codecs", "encode") + plain(("a", "rot13")) + b"R", "not encoded as pickle"),
        (text("x") + b"Na", "the opcode APPEND"),
        (b"}K\x01a", "the opcode APPEND"),
        (b"](K\x01K\x02u", "the opcode SETITEMS"),
        (b"](K\x01u", "the opcode SETITEMS"),
        (b"}(K\x01u", "damaged"),
        (b"}(" + b")" + b"N" + b"u", "a key"),
        (b"\x8f", "the opcode EMPTY_SET"),
        (b"h\x05", "damaged"),
        (b"0", "the opcode POP"),
        (b"R", "damaged"),
        (b"N" + b"N", "the opcode STOP"),
        (b"\xff", "damaged"),
        (b"X\xff\xff\xff\x7fab", "damaged"),
        (b"\x8d" + b"\xff" * 7 + b"\x7fab", "damaged"),
        (b"\x8b\xff\xff\xff\xff", "damaged"),
        (b"X\x02\x00\x00\x00\xc3(", "damaged"),
    ],
)
def test_damage_and_tricks(load, opcodes, message):
    with pytest.raises(ValueError, match=r"model.bin: ") as error:
        load(framed(b"(" + USED + opcodes + b"t" if "STOP" not in message else opcodes))
    assert message in str(error.value)


def test_containers_nested_too_deeply(load):
    """Python's own walks of a value nested thousands of times are errors, or crashes."""
    many = {
        "lists": b"]" * 2000 + b"a" * 1999,
        "tuples": b")" + b"\x85" * 100_000,
        "dicts": b"}" + b"N}" * 2000 + b"s" * 2000,
        "itself": b"]q\x00h\x00a",
    }
    for opcodes in many.values():
        with pytest.raises(ValueError, match="deep"):
            load(framed(opcodes), {})
    for key in (many["tuples"], many["lists"]):
        with pytest.raises(ValueError, match="a key"):
            load(framed(b"}" + key + b"Ns"), {})
    with pytest.raises(ValueError, match="persistent id"):
        load(framed(many["tuples"] + b"Q"), {})
    fine = b"]" * 90 + b"a" * 89
    assert str(load(framed(fine), {})) == "[" * 90 + "]" * 90


def test_memory_stays_bounded(load):
    """A memo index of 2^32, text copied again and again, and lists shared to 2^80 items."""

    sharing = b"]q\x00" + b"]q\x01h\x00ah\x00aq\x00" * 80
    copying = b"(" + text("x" * 2**20) + b"q\x00"
    copying += (global_("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R") * 300 + b"t"
    sizes = b"](" + b"N" * 10**5 + b"eq\x00" + global_("torch", "Size") + b"q\x01"
    sizes += b"(" + b"h\x01h\x00\x85R" * 1000 + b"t\x87"
    tracemalloc.start()
    try:
        assert load(framed(b"Nr\xff\xff\xff\xff"), {}) is None
        load(framed(b"(" + sharing + b"t"), {})
        for opcodes in (copying, sizes):
            with pytest.raises(ValueError, match="copies"):
                load(framed(opcodes), {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**28


def test_a_zip_bomb(tmp_path):
    """A small file whose storage or pickle is said to be huge."""
    file = tmp_path / "model.bin"
    big = tensor_opcodes(persistent("ByteStorage", "0", 2**24), 0, (2**24,), (1,))
    rezip(file, {"m/data.pkl": framed(big), "m/data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    assert read_torch_file(file).shape == (2**24,)
    data = file.read_bytes()
    told = data.replace(struct.pack("<I", 2**24), struct.pack("<I", 2**31 - 1))
    file.write_bytes(told.replace(plain(2**24), plain(2**31 - 1)))
    with pytest.raises(ValueError, match="compressed in an unknown way"):
        read_torch_file(file)
    rezip(file, {"m/data.pkl": framed(b"N" * (2**24))}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"data.pkl has more"):
        read_torch_file(file)


def test_zip_archives_that_torch_would_not_write(tmp_path):
    file = tmp_path / "model.bin"
    body = framed(USED)
    for members, message in [
        ({"m/data.pkl": body}, "data/0 is missing"),
        ({"m/data.pkl": body, "m/data/0": bytes(15)}, "does not fit into its storage"),
        ({"m/data.pkl": body, "n/data.pkl": body}, "torch.save did not write"),
        ({"data.pkl": body, "data/0": bytes(16)}, "torch.save did not write"),
        ({"a/m/data.pkl": body, "a/m/data/0": bytes(16)}, "torch.save did not write"),
        ({"readme.txt": b"hello"}, "torch.save did not write"),
        ({"m/data.pkl": body, "m/data/0": bytes(16), "m/byteorder": b"middle"}, "byte order"),
        ({"m/data.pkl": b"", "m/data/0": bytes(16)}, "damaged"),
    ]:
        rezip(file, members)
        with pytest.raises(ValueError, match=r"model.bin: ") as error:
            read_torch_file(file)
        assert message in str(error.value)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as archive:
        for _ in range(2):
            archive.writestr("m/data.pkl", body)
    with pytest.raises(ValueError, match=r"torch.save did not write"):
        read_torch_file(file)
    rezip(file, {"m/data.pkl": body, "m/data/0": bytes(16)})
    data = bytearray(file.read_bytes())
    file.write_bytes(data.replace(struct.pack("<II", 16, 16), struct.pack("<II", 9999, 9999)))
    with pytest.raises(ValueError, match=r"model.bin: the zip archive is damaged"):
        read_torch_file(file)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the bit of encryption
        position = data.rindex(mark)
        data[position + at] |= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"):
        read_torch_file(file)


def test_legacy_storages_that_do_not_fit(tmp_path):
    file = tmp_path / "model.bin"
    whole = legacy(framed(USED), FLOATS4)
    tail = struct.pack("<q", 4) + FLOATS4["0"]
    assert whole.endswith(tail)
    for count in (-1, 2**60, 2**47, 5):
        file.write_bytes(whole.removesuffix(tail) + struct.pack("<q", count) + FLOATS4["0"])
        with pytest.raises(ValueError, match=r"model.bin: (damaged|truncated)"):
            read_torch_file(file)
    head = whole.removesuffix(pickle.dumps(["0"], 2) + tail)
    for keys in (["1"], [0], [("0",)], [], None):
        file.write_bytes(head + pickle.dumps(keys, 2) + tail)
        with pytest.raises(ValueError, match=r"model.bin: damaged" + ": it lists" * bool(keys)):
            read_torch_file(file)


# --- Damage everywhere ----------------------------------------------------------------------

_BODY = framed(b"}(" + text("w") + USED + text("n") + plain([1, 2.5]) + b"u")
SAMPLE = {kind: wrap(_BODY, FLOATS4) for kind, wrap in FORMATS.items()}


@pytest.mark.parametrize("kind", list(SAMPLE))
def test_truncation_at_every_byte(tmp_path, kind):
    file = tmp_path / "model.bin"
    whole = SAMPLE[kind]
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model.bin: "):
            read_torch_file(file)
    file.write_bytes(whole)
    assert arrays_of(read_torch_file(file))["n"] == [1, 2.5]


def read_or_refuse(file, data):
    """Whatever the bytes: a value that can be walked and read, or a ValueError."""
    file.write_bytes(data)
    try:
        arrays_of(read_torch_file(file))
    except ValueError as error:
        assert str(error).startswith(str(file))


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind", list(SAMPLE))
@FUZZ
@given(data=st.data())
def test_changed_bytes(tmp_path, kind, data):
    changed = bytearray(SAMPLE[kind])
    places = st.integers(0, len(changed) - 1)
    for place, byte in data.draw(st.dictionaries(places, st.integers(0, 255), min_size=1)).items():
        changed[place] = byte
    read_or_refuse(tmp_path / "model.bin", bytes(changed))


@pytest.mark.parametrize("kind", list(SAMPLE))
@FUZZ
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from(
                [USED, FOUR, text("0"), plain(3), plain((2, 2)), plain({"a": [1]}), b"q\x00"]
                + [global_(*name.rsplit(".", 1)) for name in torch_file._KNOWN]
                + [global_("torch", "FloatStorage"), global_("torch", "float32"), b"h\x00"]
            ),
            st.sampled_from(
                [bytes([opcode]) for opcode in b"()]}NRbQtuseal2.\x81\x85\x86\x87\x93\x94"]
            ),
            st.binary(max_size=4),
        ),
        max_size=30,
    )
)
def test_random_opcodes(tmp_path, kind, parts):
    body = framed(b"".join(parts), 4)
    read_or_refuse(tmp_path / "model.bin", FORMATS[kind](body, FLOATS4))
