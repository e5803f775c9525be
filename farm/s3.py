"""An object store in an S3 bucket, of AWS or of any server that honours If-Match and If-None-Match.

Endpoint, region and credentials come from the usual environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, ...).
Requests are tried again with growing pauses, for at most ATTEMPTS times: a server that refuses connections is given up
after 51 s, one that does not answer after 5 minutes; AWS_MAX_ATTEMPTS changes the number.
"""

import functools
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from farm.checksum import bytes_sha256, file_sha256
from farm.errors import UserError
from farm.object_cache import CachedObject, ObjectCache
from farm.store import S3_SCHEME, CorruptObject, Entry, NotFound, ObjectStore, check_key

ATTEMPTS: Final = 11
OPEN_ATTEMPTS: Final = (
    6  # of the look at the bucket when a store is opened: 2 s where connections are refused
)
BODY_ATTEMPTS: Final = 4  # of a download that breaks off
CONFLICT_ATTEMPTS: Final = 8  # of a conditional write that the server asks to repeat
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 20
PART_BYTES: Final = 16 * 2**20  # of an upload or a download in parallel parts
PARALLEL_PARTS: Final = 8
PAGE_KEYS = 1000  # of a listing
SHA256, WRITER = "sha256", "writer"  # metadata of an object
_SETTINGS: Final = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
)  # fmt: skip
_BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_PARTS = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL_PARTS
)


class S3Store(ObjectStore):
    """The objects of a bucket below a prefix; each carries the sha256 of its content, which every read checks.

    An object that somebody else uploaded has no such digest and is taken as it comes.
    """

    def __init__(self, client: Any, bucket: str, prefix: str, cache: ObjectCache) -> None:
        self._client, self._bucket, self._cache = client, bucket, cache
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"{S3_SCHEME}{bucket}/{prefix}".rstrip("/")

    def put(self, key: str, data: bytes) -> str:
        if len(data) <= PART_BYTES:
            return self._put(key, data, bytes_sha256(data))
        return self._upload(key, io.BytesIO(data), bytes_sha256(data))

    def put_file(self, key: str, path: Path) -> str:
        with path.open("rb") as file:
            if path.stat().st_size <= PART_BYTES:
                return self.put(key, file.read())
            return self._upload(key, file, file_sha256(path))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._put_when(key, data, IfNoneMatch="*")

    def compare_and_swap(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        if expected_etag is None:
            return self.put_if_absent(key, data)
        return self._put_when(key, data, IfMatch=f'"{expected_etag}"')

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        def read() -> tuple[bytes, Any]:
            answer = self._client.get_object(**self._object(key))
            return answer["Body"].read(), answer

        with self._explained(key):
            data, answer = _again_if_broken_off(read)
        expected, found = answer["Metadata"].get(SHA256), bytes_sha256(data)
        if expected is not None and found != expected:
            raise CorruptObject(f"{self.uri}/{key}", found, expected)
        return data, _plain_etag(answer)

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except NotFound:
            return False
        return True

    def entries(self, prefix: str) -> list[Entry]:
        if prefix:
            check_key(prefix)
        found = (
            Entry(each["Key"].removeprefix(self._prefix), each["Size"], each["LastModified"].timestamp())
            for each in self._listed(prefix)
        )
        return sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._client.delete_object(**self._object(key))

    def local_path(self, key: str) -> Path:
        """Downloaded in parallel parts into the cache, unless the cache has this very object."""
        return self._cached(key, _plain_etag(self._head(key)))

    def location(self, key: str) -> str:
        check_key(key)
        return f"{self.uri}/{key}"

    def digest(self, key: str) -> tuple[int, str]:
        head = self._head(key)
        known = head["Metadata"].get(SHA256)
        return head["ContentLength"], known or file_sha256(self.local_path(key))

    def folder(self, prefix: str) -> Path | None:
        """A local folder of every object below `prefix/`, and of nothing else; None if there is no object."""
        listed = self._listed(f"{prefix}/" if prefix else "")
        if not listed:
            return None
        paths = [self._cached(each["Key"].removeprefix(self._prefix), _plain_etag(each)) for each in listed]
        folder = self._cache.path_of(self._prefix + prefix)
        self._cache.drop_others(folder, paths)
        if not all(path.exists() for path in paths):
            raise UserError(f"{self.uri}/{prefix}: does not fit into the local cache; raise FARM_CACHE_GB")
        return folder

    def _listed(self, prefix: str) -> list[Any]:
        """What the server says of every object whose key starts with `prefix`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, PaginationConfig={"PageSize": PAGE_KEYS}
        )
        with self._explained(prefix):
            found = [listed for page in pages for listed in page.get("Contents", ())]
        return [
            each for each in found if not each["Key"].endswith("/")
        ]  # those stand for folders in some tools

    def _cached(self, key: str, etag: str) -> Path:
        def download(to: Path) -> CachedObject:
            head = self._head(key)
            with self._explained(key):
                self._client.download_file(self._bucket, self._prefix + key, str(to), Config=_PARTS)
            expected, found = head["Metadata"].get(SHA256), file_sha256(to)
            if expected is not None and found != expected:
                if _plain_etag(self._head(key)) != _plain_etag(head):
                    return download(to)  # replaced while it was read
                raise CorruptObject(f"{self.uri}/{key}", found, expected)
            return CachedObject(etag=_plain_etag(head), sha256=found)

        return self._cache.fetch(self._prefix + key, etag, download)

    def _head(self, key: str) -> Any:
        with self._explained(key):
            return self._client.head_object(**self._object(key))

    def _put(self, key: str, data: bytes, sha256: str, **condition: str) -> str:
        metadata = {SHA256: sha256, **({WRITER: condition.pop(WRITER)} if WRITER in condition else {})}
        with self._explained(key):
            answer = self._client.put_object(**self._object(key), Body=data, Metadata=metadata, **condition)
        return _plain_etag(answer)

    def _upload(self, key: str, file: Any, sha256: str) -> str:
        with self._explained(key):
            self._client.upload_fileobj(
                file, Config=_PARTS, ExtraArgs={"Metadata": {SHA256: sha256}}, **self._object(key)
            )
        return _plain_etag(self._head(key))

    def _put_when(self, key: str, data: bytes, **condition: str) -> bool:
        writer = secrets.token_hex(8)
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                self._put(key, data, bytes_sha256(data), **condition, writer=writer)
            except NotFound:  # nothing is there to be swapped
                return False
            except ConditionFailed:
                return self._wrote(key, writer)
            except Conflict:
                time.sleep(0.05 * 2**attempt)
            else:
                return True
        raise UserError(f"{self.uri}/{key}: others write it all the time; run again")

    def _wrote(self, key: str, writer: str) -> bool:
        """Whether the object that is there is this writer's: a request was repeated whose first answer was lost."""
        try:
            return bool(self._head(key)["Metadata"].get(WRITER) == writer)
        except NotFound:
            return False

    def _object(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """What botocore raises as what a store raises. Its own errors are not chained: they may name credentials."""
        try:
            yield
        except ClientError as error:
            raise _meaning(error, f"{self.uri}/{key}", self._client) from None
        except BotoCoreError as error:
            raise _unusable(error, self.uri, self._client) from None


class ConditionFailed(Exception):
    """412: the object is not as the writer said."""


class Conflict(Exception):
    """409: another conditional write of the same object is under way."""


def open_s3(uri: str) -> S3Store:
    """The store behind `s3://bucket/prefix`. UserError when it cannot be reached, is not there or may not be used."""
    bucket, prefix = split_uri(uri)
    return S3Store(_client(bucket, _environment()), bucket, prefix, _cache_of(bucket))


def fetch(uri: str) -> Path:
    """A local copy of the object, or else of the folder, that an `s3://` URI names. UserError if there is neither."""
    bucket, path = split_uri(uri)
    store = S3Store(_client(bucket, _environment()), bucket, "", _cache_of(bucket))
    if path and store.exists(path):
        return store.local_path(path)
    folder = store.folder(path)
    if folder is None:
        raise UserError(f"{uri}: there is no such object and no prefix of objects; correct the URI")
    return folder


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix without slashes around it; UserError for what is no `s3://bucket/prefix`."""
    bucket, _, prefix = uri.removeprefix(S3_SCHEME).partition("/")
    if "@" in bucket or ":" in bucket:
        raise UserError(
            "store: an s3:// URI holds no credentials and no port; write s3://bucket/prefix, and give the endpoint "
            "and the credentials by AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a profile"
        )
    prefix = prefix.strip("/")
    if not bucket or (prefix and ".." in prefix.split("/")):
        raise UserError(f"store: {uri} names no bucket and prefix; write s3://bucket/prefix")
    return bucket, prefix


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple((name, os.environ[name]) for name in _SETTINGS if name in os.environ)


@functools.lru_cache(maxsize=16)
def _client(bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """A client of the present environment, once it has seen the bucket."""
    settings = dict(environment)
    attempts = int(settings.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
    has_endpoint = "AWS_ENDPOINT_URL" in settings or "AWS_ENDPOINT_URL_S3" in settings
    try:
        looking, working = (
            boto3.session.Session().client(
                "s3",
                config=Config(
                    retries={
                        "total_max_attempts": most,
                        "mode": settings.get("AWS_RETRY_MODE", "standard"),
                    },
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    max_pool_connections=2 * PARALLEL_PARTS,
                    # servers other than AWS are seldom reached under bucket.host
                    s3={"addressing_style": "path" if has_endpoint else "auto"},
                ),
            )
            for most in (min(attempts, OPEN_ATTEMPTS), attempts)
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(
            f"{S3_SCHEME}{bucket}: no client can be made ({error}); check the AWS settings"
        ) from None
    try:
        looking.head_bucket(Bucket=bucket)
    except ClientError as error:
        if _status(error) == 404:
            raise _no_bucket(bucket, looking) from None
        raise _meaning(error, f"{S3_SCHEME}{bucket}", looking) from None
    except BotoCoreError as error:
        raise _unusable(error, f"{S3_SCHEME}{bucket}", looking) from None
    return working


def _cache_of(bucket: str) -> ObjectCache:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "aws"
    return ObjectCache.of_environment(bytes_sha256(f"{endpoint} {bucket}".encode())[:16])


def _again_if_broken_off(read: Callable[[], tuple[bytes, Any]]) -> tuple[bytes, Any]:
    """`read`, repeated when the body of an answer ends early: botocore repeats requests, not bodies."""
    for attempt in range(BODY_ATTEMPTS - 1):
        try:
            return read()
        except _BROKEN_OFF:
            time.sleep(0.1 * 2**attempt)
    return read()


def _meaning(error: ClientError, what: str, client: Any) -> Exception:
    status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchBucket":
        return _no_bucket(what.removeprefix(S3_SCHEME).partition("/")[0], client)
    if status == 404:
        return NotFound(what)
    if status == 412:
        return ConditionFailed(what)
    if status == 409:
        return Conflict(what)
    if status in (401, 403):
        return UserError(
            f"{what}: {_endpoint(client)} refuses these credentials ({code}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of an identity that may read, write and list this bucket"
        )
    return UserError(
        f"{what}: {_endpoint(client)} answered {status} {code}; check AWS_REGION and the server, then run again"
    )


def _no_bucket(bucket: str, client: Any) -> UserError:
    return UserError(
        f"{S3_SCHEME}{bucket}: {_endpoint(client)} has no such bucket; create it, or correct the name"
    )


def _unusable(error: BotoCoreError, what: str, client: Any) -> UserError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return UserError(
            f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return UserError(
        f"{what}: {_endpoint(client)} cannot be reached ({type(error).__name__}); start the server, or correct "
        "AWS_ENDPOINT_URL"
    )


def _endpoint(client: Any) -> str:
    """Scheme, host and port: an endpoint's URL could hold a password."""
    parts = urlsplit(client.meta.endpoint_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _plain_etag(answer: Any) -> str:
    return str(answer["ETag"]).strip('"')
