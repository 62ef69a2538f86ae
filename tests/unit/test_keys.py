"""Keys, and who gets in with which: an end without the right one gets nowhere, and nothing of it is unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat

import numpy as np
import pytest

import shmengine as shm
from shmengine.cli import main
from tests.helpers import run_script


@pytest.fixture
def keys():
    return shm.generate_keys()


@contextlib.contextmanager
def channel_through(server, auth, address=None):
    with shm.connect(address or server.address, auth=auth, timeout=30) as end, server.accept(30) as other:
        yield end, other


def test_one_pair_for_both(keys):
    with shm.listen("tcp://127.0.0.1:0", auth=keys) as server, channel_through(server, keys) as (end, other):
        end.send([1, np.arange(100_000)])
        got = other.receive(30)
        assert got[0] == 1
        assert got[1][-1] == 99_999
        other.send("back")
        assert end.receive(30) == "back"


def test_each_his_own_pair(tmp_path):
    for name in ("server", "client"):
        shm.generate_keys().save(tmp_path / name)
    serving = shm.Keys.load(tmp_path / "server", known=[tmp_path / "client.pub"])
    calling = shm.Keys.load(tmp_path / "client", known=[tmp_path / "server.pub"])
    with (
        shm.listen("tcp://127.0.0.1:0", auth=serving) as server,
        channel_through(server, calling) as (end, other),
    ):
        end.send(1)
        assert other.receive(30) == 1


def test_a_key_that_the_server_does_not_know_is_refused(keys):
    stranger = shm.generate_keys()
    knows_the_server = shm.Keys(stranger.public, stranger.secret, (keys.public,))
    with shm.listen("tcp://127.0.0.1:0", auth=keys) as server:
        with pytest.raises(shm.PeerLost, match="does not know the key"):
            shm.connect(server.address, auth=knows_the_server, timeout=30)
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


def test_a_server_with_another_key_is_no_server(keys):
    with shm.listen("tcp://127.0.0.1:0", auth=keys) as server:
        with pytest.raises(shm.Timeout, match="key"):
            shm.connect(server.address, auth=shm.generate_keys(), timeout=0.5)
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


@pytest.mark.parametrize("auth", [None, "none"])
def test_without_a_key_nobody_gets_in(keys, auth):
    with shm.listen("tcp://127.0.0.1:0", auth=keys) as server:
        with pytest.raises(shm.Timeout):
            shm.connect(server.address, auth=auth, timeout=0.5)
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


def test_with_a_key_to_a_server_without(keys):
    with shm.listen("tcp://127.0.0.1:0") as server:
        with pytest.raises(shm.Timeout):
            shm.connect(server.address, auth=keys, timeout=0.5)
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


def test_random_bytes_do_not_disturb_who_has_a_key(keys):
    with shm.listen("tcp://127.0.0.1:0", auth=keys) as server:
        end = shm.connect(server.address, auth=keys, timeout=30)
        other = server.accept(30)
        host, _, port = server.address.removeprefix("tcp://").rpartition(":")
        random = np.random.default_rng(0)
        for _ in range(20):
            with socket.create_connection((host, int(port))) as stranger:
                try:
                    stranger.sendall(
                        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE" + bytes(47) if random.integers(2) else b""
                    )
                    stranger.sendall(random.bytes(2000))
                except OSError:
                    continue
        end.send(1)
        assert other.receive(30) == 1
        end.close()
        other.close()


def test_beyond_this_machine_with_keys(keys):
    with shm.listen("tcp://0.0.0.0:0", auth=keys) as server:
        port = server.address.rpartition(":")[2]
        with channel_through(server, keys, f"tcp://127.0.0.1:{port}") as (end, other):
            end.send(1)
            assert other.receive(30) == 1


# --- files ------------------------------------------------------------------------------------------


def test_the_secret_is_for_its_owner_only(tmp_path, keys):
    path = tmp_path / "key"
    keys.save(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert keys.secret in path.read_text()
    assert keys.secret not in (tmp_path / "key.pub").read_text()
    assert keys.secret not in repr(keys)
    assert shm.Keys.load(path) == keys
    with pytest.raises(FileExistsError):
        keys.save(path)
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        shm.Keys.load(path)


def test_a_path_is_enough_for_auth(tmp_path, keys):
    path = tmp_path / "key"
    keys.save(path)
    with (
        shm.listen("tcp://127.0.0.1:0", auth=path) as server,
        channel_through(server, str(path)) as (end, other),
    ):
        end.send(1)
        assert other.receive(30) == 1


NO_FILES = ["", "public = abc", "# shmengine key\n", "# shmengine key\npublic = short\nsecret = s\n"]


@pytest.mark.parametrize("text", NO_FILES)
def test_what_is_no_key_file_is_refused(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match="key"):
        shm.Keys.load(path)


@pytest.fixture
def descriptor(tmp_path, keys):
    """That of an open key file."""
    keys.save(tmp_path / "key")
    fd = os.open(tmp_path / "key", os.O_RDONLY)
    yield fd
    os.close(fd)  # an error if somebody else has done that


@pytest.mark.parametrize("kind", [int, np.int64, bool])
def test_a_descriptor_is_no_path_and_stays_open(kind, descriptor, tmp_path):
    number = kind(descriptor)
    text = f"not {kind.__name__}"
    for use in (shm.listen, shm.connect):
        with pytest.raises(TypeError, match=text):
            use("tcp://127.0.0.1:0", auth=number)
    with pytest.raises(TypeError, match=text):
        shm.Keys.load(number)
    with pytest.raises(TypeError, match=text):
        shm.Keys.load(tmp_path / "key", known=[number])
    os.fstat(number)


def test_a_public_key_alone_is_not_enough(tmp_path, keys):
    keys.save(tmp_path / "key")
    with pytest.raises(ValueError, match="secret"):
        shm.Keys.load(tmp_path / "key.pub")


NO_KEYS = ["", "x" * 39, "x" * 41, "é" * 40, "\\" * 40, "#" * 40, b"x" * 40, None]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused(key, keys):
    for what, arguments in {
        "public": (key, keys.secret),
        "secret": (keys.public, key),
        "known": (keys.public, keys.secret, (keys.public, key)),
    }.items():
        with pytest.raises(ValueError, match=f"the {what} key is none: .*Z85.*shmengine keys"):
            shm.Keys(*arguments)


def test_a_damaged_key_file_is_named(tmp_path, keys):
    keys.save(tmp_path / "key")
    damaged = tmp_path / "other.pub"
    damaged.write_text((tmp_path / "key.pub").read_text().replace(keys.public, "#" * 40))
    with pytest.raises(ValueError, match=r"the public key in .*other\.pub is none"):
        shm.Keys.load(tmp_path / "key", known=[damaged])


def test_known_is_a_sequence_that_is_not_empty(tmp_path, keys):
    keys.save(tmp_path / "key")
    for known in (str(tmp_path / "key.pub"), tmp_path / "key.pub"):
        with pytest.raises(ValueError, match=r"write \[path\]"):
            shm.Keys.load(tmp_path / "key", known=known)
    with pytest.raises(ValueError, match="known is empty"):
        shm.Keys.load(tmp_path / "key", known=[])
    with pytest.raises(ValueError, match=r"write \(key,\)"):
        shm.Keys(keys.public, keys.secret, keys.public)
    assert hash(shm.Keys(keys.public, keys.secret, [keys.public])) == hash(keys)


def test_who_connects_knows_one_server(keys):
    two = shm.Keys(keys.public, keys.secret, (keys.public, shm.generate_keys().public))
    with pytest.raises(ValueError, match="know 2 public keys"):
        shm.connect("tcp://127.0.0.1:1", auth=two)
    with shm.listen("tcp://127.0.0.1:0", auth=two) as server, channel_through(server, keys) as (end, other):
        end.send(1)
        assert other.receive(30) == 1


@pytest.mark.parametrize("fails", ["a file is there", "no space"])
def test_keys_are_saved_wholly_or_not_at_all(fails, tmp_path, keys, monkeypatch):
    if fails == "no space":

        def fsync(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="space"):
            keys.save(tmp_path / "key")
        assert list(tmp_path.iterdir()) == []
    else:
        (tmp_path / "key.pub").write_text("of somebody")
        with pytest.raises(FileExistsError):
            keys.save(tmp_path / "key")
        assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]
        assert (tmp_path / "key.pub").read_text() == "of somebody"


@pytest.mark.parametrize("umask", [0, 0o077])
def test_whatever_the_umask_others_read_the_public_key_alone(umask, tmp_path, keys):
    before = os.umask(umask)
    try:
        keys.save(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "key.pub").st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.pub"]


def test_the_command_line_makes_them(tmp_path, capsys):
    path = tmp_path / "new"
    assert main(["keys", str(path)]) == 0
    keys = shm.Keys.load(path)
    assert keys.public in capsys.readouterr().out
    assert main(["keys", str(path), "--json"]) == 1
    assert "exists" in json.loads(capsys.readouterr().out)["trouble"][0]
    assert shm.Keys.load(path) == keys


def test_without_pyzmq_the_error_says_what_to_install():
    run_script(
        """
        import sys
        sys.modules["zmq"] = None
        import shmengine as shm
        for call in (lambda: shm.channel("socket"), lambda: shm.listen("tcp://127.0.0.1:0"), shm.generate_keys):
            try:
                call()
            except ModuleNotFoundError as error:
                assert "shmengine[socket]" in str(error)
            else:
                raise AssertionError
        """,
        check=True,
    )
