"""Readers of files from anyone: what is there is read, what is wrong is said, and nothing is believed."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

from ehap_jax._untrusted_files import MAX_JSON_DEPTH, parse_json, read_arrays, read_json, regular_file, shown

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/b": RNG.normal(size=(3, 4)).astype(np.float32),
    "column": np.asfortranarray(RNG.integers(0, 9, (4, 5))),
    "empty": np.zeros((0, 3), np.uint8),
    "half": np.float16(0.5),
    "truth": np.array([True, False]),
    "text": np.array(["é", "long"]),
    "swapped": np.arange(4, dtype=">i8"),
    "complex": np.array([1j]),
}


def npy(array, **header):
    """An .npy file whose header says something else."""
    stream = io.BytesIO()
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, described | header)
    return stream.getvalue() + array.tobytes()


def archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as expected:
        assert list(found) == expected.files
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype and array.flags.writeable
            assert array.flags.f_contiguous == expected[name].flags.f_contiguous


@pytest.mark.slow
def test_only_what_is_asked_for_is_unpacked(tmp_path):
    huge = npy(np.zeros(1, np.uint8)) + bytes(80 * 2**20)
    path = archive(
        tmp_path / "a.npz", {"x.npy": npy(ARRAYS["a/b"]), "huge.npy": huge}, compression=zipfile.ZIP_DEFLATED
    )
    np.testing.assert_array_equal(read_arrays(path, ["x"])["x"], ARRAYS["a/b"])
    with pytest.raises(ValueError, match="would unpack to 83,"):
        read_arrays(path)
    with pytest.raises(ValueError, match="has no y, z; it holds: 'x', 'huge'"):
        read_arrays(path, ["y", "x", "z"])


def encrypted(path):
    archive(path, {"x.npy": npy(np.zeros(2))})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def broken_deflate(path):
    archive(path, {"x.npy": npy(RNG.normal(size=999))}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[40:60] = b"\xff" * 20
    path.write_bytes(content)


def flipped(path):
    archive(path, {"x.npy": npy(np.zeros(100))})
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: archive(p, {"x.npy": npy(np.zeros(2), shape=(10**12,))}),
            r"says to be float64 of shape .* 16 bytes",
        ),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), shape=(2**62, 4))}), "says to be"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), shape=(1,))}), "says to be"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), shape=(-2, -1))}), "shape"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), descr="|O")}), "holds object, not plain"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), descr="<U0")}), "not plain"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), descr="M8[s]")}), "not plain"),
        (lambda p: archive(p, {"x.npy": npy(np.zeros(2), descr=[("a", "<f8")])}), "not plain"),
        (lambda p: archive(p, {"x.npy": npy(np.array([2], np.uint8), descr="|b1")}), "truth values other than 0 and 1"),
        (
            lambda p: archive(p, {"x.npy": npy(np.array([2**31 - 1], np.int32), descr="<U1")}),
            "letters that Unicode lacks",
        ),
        (lambda p: archive(p, {"x.npy": b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118}), "header of 'x' cannot be read"),
        (lambda p: archive(p, {"x.npy": b"cos\nsystem\n."}), "magic string is not correct"),
        (encrypted, "encrypted"),
        (broken_deflate, "not a readable .npz"),
        (flipped, "Bad CRC-32"),
        (lambda p: np.savez(p, a=np.array([{}], object)), "not plain"),
        (lambda p: p.write_bytes(b""), "not a zip file"),
        (lambda p: p.mkdir(), "but a folder"),
        (os.mkfifo, "but a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "but a device"),
    ],
)
def test_a_hostile_archive_is_refused_on_one_line(tmp_path, make, message):
    path = tmp_path / "a.npz"
    make(path)
    with pytest.raises(ValueError, match=message) as found:
        read_arrays(path)
    assert "a.npz" in str(found.value) and "\n" not in str(found.value)


def test_an_array_of_its_own_and_a_name_twice(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(2))
    with pytest.raises(ValueError, match="holds a single array"):
        read_arrays(tmp_path / "a.npy")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("x.npy", npy(np.zeros(2)))
        file.writestr("x.npy", npy(np.ones(2)))
    with pytest.raises(ValueError, match="has 'x' twice"):
        read_arrays(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no trace .*nowhere"):
        read_arrays(tmp_path / "nowhere", what="trace")


def test_a_directory_entry_that_lies_about_sizes(tmp_path):
    """The central directory promises 10 MB more than deflate has in it."""
    header = npy(np.zeros(0), shape=(10**7 // 8,))
    path = archive(tmp_path / "a.npz", {"x.npy": header}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (len(header) + 10**7).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ends after 0 of 10,000,000"):
        read_arrays(path)


def test_json_objects_are_read(tmp_path):
    document = {"a": [1, 2.5, None, {"é": "ü"}]}
    (tmp_path / "a.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_json(tmp_path / "a.json") == document


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' + b"[" * 10**5, "nested deeper"),
        (b'{"a": ' + b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1) + b"}", "nested deeper"),
        (b"[1]", "must hold an object .* not a list"),
        (b"7", "not a int"),
        (b"{", "not a JSON file: Expecting"),
        (b"\xff\xfe\x00", "not a JSON file"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file: Exceeds the limit"),
        (b"", "not a JSON file"),
    ],
)
def test_what_is_no_json_object_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json .*{message}"):
        read_json(tmp_path / "a.json")


def test_json_at_the_depth_limit_and_beyond_the_size_limit(tmp_path, monkeypatch):
    nested = '{"a": ' + "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH + "}"
    assert parse_json(nested, "text")
    monkeypatch.setattr("ehap_jax._untrusted_files.MAX_JSON_BYTES", 5)
    (tmp_path / "a.json").write_text("{     }")
    with pytest.raises(ValueError, match="7 bytes; a JSON file has 5 at most"):
        read_json(tmp_path / "a.json")


def test_names_that_no_file_has():
    with pytest.raises(ValueError, match="no name of a file"):
        regular_file("a\0b")


def test_values_are_shown_short_and_on_one_line():
    assert shown("a\nb\x1b[2J\u202e") == r"'a\nb\x1b[2J\u202e'"
    assert shown("é") == "'é'" and shown({"a": 1}) == "{'a': 1}"
    assert len(shown("x" * 10**6)) == 80
