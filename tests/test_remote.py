"""Remote paths: copied once, whole or not at all; what cannot be read is named with the way out."""

import sys

import fsspec
import pytest

from vikhr_t5 import remote
from vikhr_t5.data.vocabulary import Vocabulary
from vikhr_t5.errors import UserError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A file system that fsspec keeps in memory, and the folder of copies."""
    monkeypatch.setenv(remote.DOWNLOADS, str(tmp_path / "downloads"))
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a.model": b"pieces", "/bucket/checkpoint_5/checkpoint": b"index"})
    memory.pipe("/bucket/checkpoint_5/target.a/0.0", b"array")
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_local_path_is_itself(tmp_path, bucket):
    for path in ("a/b", "/a/b", "~/x", "a:b", str(tmp_path)):
        assert remote.local_copy(path, "") == path
        assert not remote.is_remote(path)


def test_a_file_and_a_folder_are_copied_once(bucket, tmp_path, capfd):
    copy = remote.local_copy("memory://bucket/a.model", "")
    assert copy == str(tmp_path / "downloads/memory/bucket/a.model")
    assert open(copy, "rb").read() == b"pieces"  # noqa: SIM115
    folder = remote.local_copy("memory://bucket/checkpoint_5/", "")
    assert open(f"{folder}/target.a/0.0", "rb").read() == b"array"  # noqa: SIM115
    assert capfd.readouterr().err.count("copying memory://") == 2
    bucket.pipe("/bucket/a.model", b"others")
    assert open(remote.local_copy("memory://bucket/a.model", ""), "rb").read() == b"pieces"  # noqa: SIM115
    assert capfd.readouterr().err == ""


def test_a_remote_vocabulary_is_read_from_its_copy(bucket, tmp_path):
    vocabulary = Vocabulary("memory://bucket/a.model", 10)
    assert vocabulary.sentencepiece_model_file == str(tmp_path / "downloads/memory/bucket/a.model")
    assert vocabulary.model_bytes == b"pieces"
    with pytest.raises(UserError, match="or set VOCABULARY_FILE to a local copy"):
        Vocabulary("memory://bucket/b.model")


def test_what_is_not_there_leaves_nothing(bucket, tmp_path):
    with pytest.raises(UserError, match=r"^memory:.*b.model cannot be read \(FileNotFoundError: .*\); use this$"):
        remote.local_copy("memory://bucket/b.model", "use this")
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]


def test_an_interrupted_copy_leaves_nothing(bucket, tmp_path, monkeypatch):
    def cut(source, target, recursive=False):
        with open(target, "wb") as file:
            file.write(b"pie")
        raise OSError("connection reset")

    monkeypatch.setattr(type(bucket), "get", staticmethod(cut))
    with pytest.raises(UserError, match=r"OSError: connection reset"):
        remote.local_copy("memory://bucket/a.model", "")
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]


def test_a_missing_driver_and_an_unknown_scheme(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"^nowhere://a: .*; use this$"):
        remote.local_copy("nowhere://a", "use this")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="needs the packages fsspec and gcsfs"):
        remote.local_copy("gs://bucket/a", "use this")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="needs the packages fsspec and its driver of memory://"):
        remote.local_copy("memory://bucket/a.model", "use this")


def test_no_network_is_found_out_at_once(bucket, monkeypatch):
    def unreachable(address, timeout):
        assert address == ("storage.googleapis.com", 443)
        raise OSError("Name or service not known")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote.socket, "create_connection", unreachable)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path, **options: (bucket, "/bucket/a.model"))
    with pytest.raises(UserError, match=r"^gs://bucket/a.model cannot be read \(OSError: Name or service not known\)"):
        remote.local_copy("gs://bucket/a.model", "use this")
