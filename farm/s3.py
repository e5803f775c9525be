"""An object store in an S3 bucket, of AWS or of any server that honours If-Match and If-None-Match."""

import io
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3transfer.exceptions import S3DownloadFailedError

from farm.checksum import bytes_sha256, file_sha256
from farm.errors import StoreUnusable, UserError
from farm.object_cache import CachedObject, ObjectCache
from farm.s3_client import (
    Absent,
    ConditionFailed,
    Conflict,
    client_of,
    environment,
    meaning,
    split_uri,
    unusable,
)
from farm.store import S3_SCHEME, CorruptObject, Entry, NotFound, ObjectStore, check_key

BODY_ATTEMPTS: Final = 4  # of a download that breaks off
CONFLICT_ATTEMPTS: Final = 8  # of a conditional write that the server asks to repeat
PART_BYTES: Final = 16 * 2**20  # of an upload or a download in parallel parts
PARALLEL_PARTS: Final = 8
PAGE_KEYS = 1000  # of a listing
SHA256, WRITER = "sha256", "writer"  # metadata of an object
_BROKEN_OFF = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
_PARTS = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARALLEL_PARTS
)


class Broken(StoreUnusable):
    """A transfer that ended before its object did."""


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
            return self._put(key, data)
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
        # Keys that end with a slash stand for folders in some tools.
        return [each for each in found if not each["Key"].endswith("/")]

    def _cached(self, key: str, etag: str) -> Path:
        def download(to: Path) -> CachedObject:
            head = self._head(key)
            try:
                with self._explained(key):
                    self._client.download_file(self._bucket, self._prefix + key, str(to), Config=_PARTS)
                expected, found = head["Metadata"].get(SHA256), file_sha256(to)
                if expected is not None and found != expected:
                    raise CorruptObject(f"{self.uri}/{key}", found, expected)
            except (Broken, CorruptObject):
                if _plain_etag(self._head(key)) != _plain_etag(head):
                    return download(to)  # replaced while it was read
                raise
            return CachedObject(etag=_plain_etag(head), sha256=found)

        return self._cache.fetch(self._prefix + key, etag, download)

    def _head(self, key: str) -> Any:
        with self._explained(key):
            return self._client.head_object(**self._object(key))

    def _put(self, key: str, data: bytes, writer: str = "", **condition: str) -> str:
        metadata = {SHA256: bytes_sha256(data), WRITER: writer} if writer else {SHA256: bytes_sha256(data)}
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
                self._put(key, data, writer, **condition)
            except NotFound:  # nothing is there to be swapped
                return False
            except ConditionFailed:
                return self._wrote(key, writer)
            except Conflict:
                time.sleep(0.05 * 2**attempt)
            else:
                return True
        raise StoreUnusable(f"{self.uri}/{key}: others write it all the time; run again")

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
            said = meaning(error, f"{self.uri}/{key}", self._client)
            raise (NotFound(f"{self.uri}/{key}") if isinstance(said, Absent) else said) from None
        except BotoCoreError as error:
            raise unusable(error, self.uri, self._client) from None
        except (Boto3Error, S3DownloadFailedError) as error:
            raise Broken(f"{self.uri}/{key}: broke off ({type(error).__name__}); run again") from None


def open_s3(uri: str) -> S3Store:
    """The store behind `s3://bucket/prefix`. UserError when it cannot be reached, is not there or may not be used."""
    bucket, prefix = split_uri(uri)
    return S3Store(client_of(bucket, environment()), bucket, prefix, _cache_of(bucket))


def fetch(uri: str) -> Path:
    """A local copy of the object, or else of the folder, that an `s3://` URI names. UserError if there is neither."""
    bucket, path = split_uri(uri)
    store = S3Store(client_of(bucket, environment()), bucket, "", _cache_of(bucket))
    if path and store.exists(path):
        return store.local_path(path)
    folder = store.folder(path)
    if folder is None:
        raise UserError(f"{uri}: there is no such object and no prefix of objects; correct the URI")
    return folder


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


def _plain_etag(answer: Any) -> str:
    return str(answer["ETag"]).strip('"')
