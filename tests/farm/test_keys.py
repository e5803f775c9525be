"""Keys are hashed at rest, found in constant time, re-read, and a broken file never tells what stands in it."""

import json
import stat
import threading
import time
from pathlib import Path

import pytest

import farm.keys as keys_module
from farm.errors import UserError
from farm.keys import Key, KeyRing, add_key, digest, find, read_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "keys.jsonl"


def test_a_new_key_is_in_the_file_as_its_hash_alone(path: Path) -> None:
    secret = add_key(path, "team", ("legal",), max_concurrent=2)
    assert secret not in path.read_text()
    (key,) = read_keys(path)
    assert (key.name, key.targets, key.max_concurrent, key.max_new_tokens) == ("team", ("legal",), 2, None)
    assert key.sha256 == digest(secret)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert add_key(path, "other") != secret
    assert [key.targets for key in read_keys(path)] == [("legal",), "*"]


def test_only_the_key_itself_is_found(path: Path) -> None:
    secret = add_key(path, "team")
    keys = read_keys(path)
    assert find(keys, secret) == keys[0]
    for wrong in ("", secret[:-1], secret + "x", keys[0].sha256, secret.upper()):
        assert find(keys, wrong) is None


def test_every_key_is_compared_whichever_matches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [add_key(path, f"team{index}") for index in range(4)]
    keys, compared = read_keys(path), []

    def compare(left: str, right: str) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    assert find(keys, secrets[0]) == keys[0]
    assert compared == [key.sha256 for key in keys]


def test_keys_that_are_added_at_the_same_time_are_all_there(path: Path) -> None:
    makers = [threading.Thread(target=add_key, args=(path, f"team{index}")) for index in range(16)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert sorted(key.name for key in read_keys(path)) == sorted(f"team{index}" for index in range(16))


def test_a_key_added_behind_a_line_without_an_end_leaves_both_valid(path: Path) -> None:
    secrets = [add_key(path, "first")]
    path.write_text(path.read_text().rstrip("\n"))
    secrets += [add_key(path, "second"), add_key(path, "third")]
    keys = read_keys(path)
    assert [found.name for secret in secrets if (found := find(keys, secret))] == ["first", "second", "third"]
    assert path.read_text().count("\n") == 3


def test_a_mistake_in_the_file_names_its_line_and_not_its_content(path: Path) -> None:
    secret = add_key(path, "team")
    good = path.read_text()
    for broken in (secret, '{"name": "a b", "sha256": "' + digest(secret) + '"}', '{"name": "x"}'):
        path.write_text(good + "\n" + broken + "\n")
        with pytest.raises(UserError, match="line 3") as caught:
            read_keys(path)
        assert secret not in str(caught.value)
        assert digest(secret) not in str(caught.value)
    path.write_text(good + good)
    with pytest.raises(UserError, match="'team' is there twice"):
        read_keys(path)
    with pytest.raises(UserError, match="farm key new"):
        read_keys(path.parent / "nothing")


def test_names_are_taken_once_and_limits_are_checked(path: Path) -> None:
    add_key(path, "team")
    with pytest.raises(UserError, match="already"):
        add_key(path, "team")
    with pytest.raises(UserError, match="max_new_tokens"):
        add_key(path, "other", max_new_tokens=0)
    assert [key.name for key in read_keys(path)] == ["team"]


def test_a_ring_follows_the_file_and_keeps_what_it_had_when_the_file_breaks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "LOOK_S", 0.0)
    first = add_key(path, "first")
    ring = KeyRing(path)
    second = add_key(path, "second")
    assert ring.find(second) is not None
    lines = path.read_text().splitlines()
    path.write_text(lines[1] + "\n")
    assert ring.find(first) is None
    assert ring.find(second) is not None
    path.write_text("no key at all")
    assert ring.find(second) is not None
    path.unlink()
    assert ring.find(second) is not None


def test_the_file_is_not_looked_at_for_every_request(path: Path) -> None:
    ring = KeyRing(path if add_key(path, "team") else path)
    started = time.monotonic()
    other = Key.model_validate({"name": "other", "sha256": digest("other")})
    path.write_text(json.dumps(other.model_dump()) + "\n")
    assert ring.find("other") is None
    assert time.monotonic() - started < keys_module.LOOK_S
