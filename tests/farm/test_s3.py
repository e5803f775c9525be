"""What only a remote store has to get right: damage, outages, rights, lost answers, objects of others, its cache."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from boto3.exceptions import RetriesExceededError
from botocore.exceptions import ClientError
from s3transfer.exceptions import S3DownloadFailedError

from farm.checksum import bytes_sha256
from farm.errors import StoreUnusable, UserError
from farm.s3 import S3Store, open_s3
from farm.s3_client import meaning
from farm.store import CorruptObject, local_copy, open_store
from tests.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_uri: str) -> S3Store:
    return open_s3(s3_uri)


def full_key(store: S3Store, key: str) -> str:
    return f"{store.uri.removeprefix(f's3://{BUCKET}/')}/{key}"


def damage(server: S3Server, store: S3Store, key: str) -> tuple[str, str]:
    """Other bytes under the digest of the first ones; both digests."""
    where = {"Bucket": BUCKET, "Key": full_key(store, key)}
    metadata = server.client.head_object(**where)["Metadata"]
    server.client.put_object(**where, Body=b"other bytes", Metadata=metadata)
    return bytes_sha256(b"other bytes"), metadata["sha256"]


def test_a_corrupt_object_is_refused_with_both_digests_wherever_it_is_read(store, s3_server):
    store.put("a", b"as written")
    digests = damage(s3_server, store, "a")
    for read in (store.get, store.local_path, lambda key: local_copy(store.location(key))):
        with pytest.raises(CorruptObject) as caught:
            read("a")
        assert all(digest in str(caught.value) for digest in digests)
        assert f"{store.uri}/a" in str(caught.value) or full_key(store, "a") in str(caught.value)


def test_a_store_that_does_not_check_would_hand_the_corrupt_object_out(store, s3_server):
    """Else the test above would pass because the damage is none."""
    store.put("a", b"as written")
    damage(s3_server, store, "a")
    found = s3_server.client.get_object(Bucket=BUCKET, Key=full_key(store, "a"))
    assert found["Body"].read() == b"other bytes"


def test_an_object_that_another_tool_uploaded_is_read(store, s3_server):
    s3_server.client.put_object(Bucket=BUCKET, Key=full_key(store, "model/config.json"), Body=b"{}")
    folder = full_key(store, "model/")  # as its console writes one
    s3_server.client.put_object(Bucket=BUCKET, Key=folder, Body=b"")
    assert store.get("model/config.json") == b"{}"
    assert store.digest("model/config.json") == (2, bytes_sha256(b"{}"))
    assert [path.name for path in local_copy(f"{store.uri}/model").iterdir()] == ["config.json"]
    assert local_copy(f"{store.uri}/model/config.json").read_bytes() == b"{}"


def test_a_prefix_without_objects_says_so(store):
    with pytest.raises(UserError, match="no such object and no prefix"):
        local_copy(f"{store.uri}/nothing")


class LosesAnswers:
    """A client whose first write is done by the server, while its answer never arrives: it is sent again."""

    def __init__(self, client: Any) -> None:
        self._client, self.lost = client, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, **request: Any) -> Any:
        if not self.lost:
            self.lost += 1
            self._client.put_object(**request)
        return self._client.put_object(**request)


def test_a_claim_whose_answer_was_lost_is_still_known_as_won(store, monkeypatch):
    monkeypatch.setattr(store, "_client", LosesAnswers(store._client))
    assert store.put_if_absent("claim", b"mine")
    assert store._client.lost == 1
    monkeypatch.setattr(store, "_client", LosesAnswers(store._client._client))
    assert not store.put_if_absent("claim", b"yours")  # 412 twice, and the object is another writer's
    etag = store.get_with_etag("claim")[1]
    monkeypatch.setattr(store, "_client", LosesAnswers(store._client._client))
    assert store.compare_and_swap("claim", b"changed", etag)


def test_a_server_killed_during_an_upload_keeps_the_old_object_whole(tmp_path, monkeypatch, s3_server):
    """A server of its own: the session's goes on for the other tests."""
    own = S3Server()
    for name, value in {
        **own.environment,
        "AWS_MAX_ATTEMPTS": "2",
        "FARM_CACHE": str(tmp_path / "c"),
    }.items():
        monkeypatch.setenv(name, value)
    own.start(tmp_path / "weed")
    try:
        store, source = open_s3(f"s3://{BUCKET}/p"), tmp_path / "source"
        store.put("shard", b"old")
        source.write_bytes(os.urandom(64 * 2**20))
        failed: list[Exception] = []

        def upload() -> None:
            try:
                store.put_file("shard", source)
            except (UserError, OSError) as error:
                failed.append(error)

        uploading = threading.Thread(target=upload)
        uploading.start()
        _wait_for_parts(own)
        own.kill()
        uploading.join()
        assert [type(error) for error in failed] == [StoreUnusable]
        assert f"127.0.0.1:{own.port} cannot be reached" in str(failed[0])
        begun = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            store.put("shard", b"new")
        assert time.monotonic() - begun < 5  # two attempts and a pause of at most 0.05 s
        own.start(tmp_path / "weed")
        assert store.get("shard") == b"old"
        assert store.list("") == ["shard"]
        store.put_file("shard", source)
        assert store.local_path("shard").read_bytes() == source.read_bytes()
    finally:
        own.kill()


def _wait_for_parts(server: S3Server) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads"):
                return
        except ClientError:  # the first one makes the list
            pass
    raise AssertionError("no upload in parts was begun")


def test_what_makes_a_store_unusable_is_one_error_with_its_remedy_and_no_secret(monkeypatch, s3_server):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    cases = (
        ({}, "s3://no-such-bucket/x", "has no such bucket; create it"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, f"s3://{BUCKET}/x", "refuses these credentials"),
        ({"AWS_ENDPOINT_URL": "http://name:pass-word@127.0.0.1:9"}, f"s3://{BUCKET}/x", "0.1:9 cannot be reached"),
        ({}, f"s3://{ACCESS_KEY}:{SECRET_KEY}@{BUCKET}/x", "holds no credentials"),
        ({}, "s3://", "names no bucket"),
        ({}, f"s3://{BUCKET}/a/../b", "names no bucket"),
    )  # fmt: skip
    for environment, uri, message in cases:
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            with pytest.raises(UserError, match=message) as caught:
                open_store(uri)
        assert caught.value.__cause__ is None
        assert "\n" not in str(caught.value)
        for secret in (SECRET_KEY, "wrong-secret", "pass-word", ACCESS_KEY):
            assert secret not in str(caught.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{BUCKET}/x")


@pytest.mark.parametrize("attempts", ["many", "", "0"])
def test_a_number_of_attempts_that_is_none_is_the_users_mistake(monkeypatch, attempts):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    with pytest.raises(UserError, match="AWS_MAX_ATTEMPTS: '.*' is no number") as caught:
        open_store(f"s3://{BUCKET}/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "may_pass"), [(500, True), (503, True), (403, True), (409, True), (412, False)]
)
def test_a_server_that_may_answer_later_is_told_apart_from_what_stays_so(store, status, may_pass):
    answer = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert (
        isinstance(meaning(ClientError(answer, "GetObject"), "what", store._client), StoreUnusable)
        is may_pass
    )


def test_a_cached_copy_is_not_downloaded_again_until_the_object_changes(store, monkeypatch):
    store.put("a", b"one")
    path = store.local_path("a")
    monkeypatch.setattr(store._client, "download_file", None)
    assert store.local_path("a") == path
    monkeypatch.undo()
    store.put("a", b"two")
    assert store.local_path("a").read_bytes() == b"two"


def breaks_off_once(store: S3Store, error: Exception, meanwhile: Callable[[], object]) -> Callable[..., Any]:
    """A download that fails the first time, after something else has happened."""
    download, failures = store._client.download_file, [error]

    def broken(*args: Any, **options: Any) -> Any:
        if failures:
            meanwhile()
            raise failures.pop()
        return download(*args, **options)

    return broken


def test_an_object_that_is_replaced_while_its_parts_are_read_is_read_again(store, monkeypatch):
    store.put("a", b"one")
    changed = S3DownloadFailedError("Contents of stored object changed")  # of a ranged read with If-Match
    once = breaks_off_once(store, changed, lambda: store.put("a", b"two"))
    monkeypatch.setattr(store._client, "download_file", once)
    assert store.local_path("a").read_bytes() == b"two"


@pytest.mark.parametrize("error", [S3DownloadFailedError("short"), RetriesExceededError(OSError("reset"))])
def test_a_transfer_that_breaks_off_is_told_with_the_remedy(store, monkeypatch, error):
    """It is none of botocore's errors: uncaught it would end an onboarding for one target's file."""
    store.put("a", b"one")
    monkeypatch.setattr(store._client, "download_file", breaks_off_once(store, error, lambda: None))
    with pytest.raises(UserError, match=f"/a: broke off .{type(error).__name__}.; run again"):
        store.local_path("a")


def test_a_damaged_copy_in_the_cache_is_downloaded_again(store):
    store.put("a", b"as written")
    path = store.local_path("a")
    path.write_bytes(b"as WRITTEN")
    assert store.local_path("a").read_bytes() == b"as written"
