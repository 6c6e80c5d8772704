# SPDX-License-Identifier: Apache-2.0
"""Archives: unpacked whole, resumed, and refused where they reach for more than their folder."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec_jax.data import archives
from vlm2vec_jax.data.placement import Placement, find_placement
from vlm2vec_jax.errors import UserError

FILES = {"A/1.png": b"one", "A/deep/2.png": b"two" * 1000, "B/1.png": b"three"}


def zip_file(path: Path, files, method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
    return path


def tar_file(path: Path, files, **fields) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpack(path: Path, target: Path, **options) -> int:
    return archives.unpack(path, archives.list_members(path), target, lambda n: n, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("make", [zip_file, tar_file])
def test_everything_is_unpacked_and_nothing_twice(tmp_path, make):
    path = make(tmp_path / ("a.zip" if make is zip_file else "a.tar.gz"), FILES)
    target = tmp_path / "out"
    assert unpack(path, target) == 3
    assert contents(target) == FILES
    kept = (target / "A/1.png").stat().st_mtime_ns
    (target / "B/1.png").write_bytes(b"thr")  # what an older program left of an interrupted run
    (target / "A/deep/2.png").unlink()
    assert unpack(path, target) == 2
    assert contents(target) == FILES and (target / "A/1.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png", "a\\..\\..\\x.png", "a/../.."]
)
@pytest.mark.parametrize("make", [zip_file, tar_file])
def test_names_that_leave_the_folder_refuse_the_archive(tmp_path, make, name):
    path = make(tmp_path / ("a.zip" if make is zip_file else "a.tar.gz"), {**FILES, name: b"x"})
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(path, tmp_path / "in" / "out")
    assert not (tmp_path / "in").exists() and not (tmp_path / "x.png").exists()


def test_a_name_cut_short_by_a_nul_is_judged_as_written(tmp_path):
    path = zip_file(tmp_path / "a.zip", {"aaaa.png": b"x"})
    raw = path.read_bytes().replace(b"aaaa.png", b"a\0..aaaa"[:8])
    path.write_bytes(raw)
    with pytest.raises(UserError):
        unpack(path, tmp_path / "out")


def test_links_devices_and_passwords_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(UserError, match="'link.png': a symbolic link"):
        unpack(zip_file(tmp_path / "a.zip", {link: b"/etc/passwd"}), tmp_path / "out")
    for kind, said in ((tarfile.SYMTYPE, "a link"), (tarfile.LNKTYPE, "a link"),
                       (tarfile.FIFOTYPE, "special file")):  # fmt: skip
        path = tar_file(tmp_path / "a.tar.gz", {"l.png": b""}, type=kind, linkname="/etc/passwd")
        with pytest.raises(UserError, match=said):
            unpack(path, tmp_path / "out")
    path = zip_file(tmp_path / "b.zip", {"x.png": b"x"})
    raw = bytearray(path.read_bytes())
    for head, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(head) + offset] |= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="encrypted"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.png", b"a")
        archive.writestr("x/./1.png", b"b")
    with pytest.raises(UserError, match="comes twice"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_bombs_are_refused(tmp_path):
    path = zip_file(tmp_path / "a.zip", {"x.png": bytes(80 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="bytes unpacked are more than the limit"):
        unpack(path, tmp_path / "out")
    with pytest.raises(UserError, match="limit of 1,000 for a file"):
        archives.list_members(path, archives.Limits(file_bytes=1000, total_bytes=1 << 40))
    with pytest.raises(UserError, match="more than 1 files"):
        archives.list_members(zip_file(tmp_path / "b.zip", FILES), archives.Limits(files=1))
    assert not (tmp_path / "out").exists()


def test_a_member_larger_than_announced_is_cut_off(tmp_path):
    path = zip_file(tmp_path / "a.zip", {"x.png": b"y" * 5000}, zipfile.ZIP_DEFLATED)
    (member,) = archives.list_members(path)
    member.handle.file_size = 100  # what a forged directory would say
    lying = archives.Member(member.name, 100, member.handle)
    with pytest.raises(UserError, match="damaged"):
        archives.unpack(path, [lying], tmp_path / "out", lambda n: n)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_damaged_archives_leave_nothing_half_written(tmp_path, place):
    raw = bytearray(zip_file(tmp_path / "a.zip", FILES).read_bytes())
    (tmp_path / "cut.zip").write_bytes(raw[: int(len(raw) * place)])
    with pytest.raises(UserError, match="download it again"):
        unpack(tmp_path / "cut.zip", tmp_path / "out")
    raw[raw.index(b"twotwo") + 1] ^= 255  # one byte of an image: only the checksum knows
    (tmp_path / "flipped.zip").write_bytes(raw)
    with pytest.raises(UserError, match="'A/deep/2.png' is damaged"):
        unpack(tmp_path / "flipped.zip", tmp_path / "out", workers=1)
    assert set(contents(tmp_path / "out").items()) <= set(FILES.items())
    (tmp_path / "text.zip").write_text("<html>404</html>")
    with pytest.raises(UserError, match="not a readable archive"):
        unpack(tmp_path / "text.zip", tmp_path / "out")


def test_a_link_below_the_target_is_not_followed(tmp_path):
    path = zip_file(tmp_path / "a.zip", FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/A").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link leads out"):
        unpack(path, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    path = zip_file(tmp_path / "a.zip", FILES)
    usage = archives.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda p: usage._replace(free=10))
    with pytest.raises(UserError, match="only 10 are free"):
        unpack(path, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


# ----------------------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("names", "wanted", "strip", "add"),
    [
        (["A/1.png", "A/2.png"], ["A/1.png", "A/2.png"], "", ""),
        (["A/1.png", "A/2.png"], ["images/A/1.png", "images/A/2.png"], "", "images/"),
        (["1.png", "2.png"], ["images/A/1.png", "images/A/2.png"], "", "images/A/"),
        (["eval_images/A/1.png", "eval_images/B/1.png"], ["B/1.png", "A/1.png"],
         "eval_images/", ""),
        (["x/y/Train/1.png", "x/y/Val/1.png"], ["images/A/Train/1.png", "images/A/Val/1.png"],
         "x/y/", "images/A/"),
    ],
)  # fmt: skip
def test_prefixes_are_found(names, wanted, strip, add):
    placement = find_placement(names, wanted)
    assert placement == Placement(strip, add)
    assert {placement(name) for name in names} == set(wanted)


def test_what_no_row_names_has_no_place():
    assert find_placement(["a.png"], ["b.png"]) is None
    assert Placement("x/", "")("y/a.png") is None
    # A few strays do not outvote the others.
    names = [f"A/{i}.png" for i in range(50)] + ["0.png"]
    assert find_placement(names, [f"images/A/{i}.png" for i in range(50)]).add == "images/"


@given(
    st.lists(st.sampled_from(["a", "b", "images"]), max_size=2),
    st.lists(st.sampled_from(["a", "c", "images"]), max_size=2),
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 30)), min_size=1, unique=True),
)
def test_any_prefix_puts_every_member_in_its_place(before, after, files):
    inner = [f"{folder}{folder}/{number}.jpg" for folder, number in files]
    names = ["/".join([*before, name]) for name in inner]
    wanted = ["/".join([*after, name]) for name in inner]
    placement = find_placement(names, wanted)
    assert {placement(name) for name in names} == set(wanted)
