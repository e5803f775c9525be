"""A client of S3, and what its errors mean.

Endpoint, region and credentials come from the usual environment (AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, AWS_PROFILE...).
Requests are tried ATTEMPTS times with growing pauses, of 0.05 s x 2^i at most: a server that refuses connections is
given up within 51 s, one that does not answer after 5 minutes; AWS_MAX_ATTEMPTS changes the number.
"""

import functools
import os
from typing import Any, Final
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from farm.errors import Denied, StoreUnusable, UserError

SCHEME: Final = "s3://"
ATTEMPTS: Final = 11
OPEN_ATTEMPTS: Final = 6  # of the look at the bucket when a store is opened
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 20
CONNECTIONS: Final = 16
_SETTINGS: Final = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
)  # fmt: skip


class Absent(Exception):
    """404: there is no such object."""


class ConditionFailed(UserError):
    """412: the object is not as the writer said."""


class Conflict(StoreUnusable):
    """409: another write of the same object is under way."""


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix without slashes around it; UserError for what is no `s3://bucket/prefix`."""
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    if "@" in bucket or ":" in bucket:
        raise UserError(
            "store: an s3:// URI holds no credentials and no port; write s3://bucket/prefix, and give the endpoint "
            "and the credentials by AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a profile"
        )
    prefix = prefix.strip("/")
    if not bucket or (prefix and ".." in prefix.split("/")):
        raise UserError(f"store: {uri} names no bucket and prefix; write s3://bucket/prefix")
    return bucket, prefix


def environment() -> tuple[tuple[str, str], ...]:
    return tuple((name, os.environ[name]) for name in _SETTINGS if name in os.environ)


@functools.lru_cache(maxsize=16)
def client_of(bucket: str, given: tuple[tuple[str, str], ...]) -> Any:
    """A client of the present environment, once it has seen the bucket."""
    settings = dict(given)
    attempts = _attempts(settings.get("AWS_MAX_ATTEMPTS", str(ATTEMPTS)))
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
                    max_pool_connections=CONNECTIONS,
                    # servers other than AWS are seldom reached under bucket.host
                    s3={"addressing_style": "path" if has_endpoint else "auto"},
                ),
            )
            for most in (min(attempts, OPEN_ATTEMPTS), attempts)
        )
    except (BotoCoreError, ValueError) as error:
        raise UserError(
            f"{SCHEME}{bucket}: no client can be made ({error}); check the AWS settings"
        ) from None
    try:
        looking.head_bucket(Bucket=bucket)
    except ClientError as error:
        if _status(error) == 404:
            raise _no_bucket(bucket, looking) from None
        raise meaning(error, f"{SCHEME}{bucket}", looking) from None
    except BotoCoreError as error:
        raise unusable(error, f"{SCHEME}{bucket}", looking) from None
    return working


def _attempts(text: str) -> int:
    try:
        attempts = int(text)
    except ValueError:
        attempts = 0
    if attempts < 1:
        raise UserError(f"AWS_MAX_ATTEMPTS: {text!r} is no number of attempts; write for instance {ATTEMPTS}")
    return attempts


def meaning(error: ClientError, what: str, client: Any) -> Exception:
    status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchBucket":
        return _no_bucket(what.removeprefix(SCHEME).partition("/")[0], client)
    if status == 404:
        return Absent(what)
    if status == 412:
        return ConditionFailed(f"{what}: was written by another meanwhile; run again")
    if status == 409:
        return Conflict(f"{what}: another write of it is under way; run again")
    if status in (401, 403):
        return Denied(
            f"{what}: {_endpoint(client)} refuses these credentials ({code}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of an identity that may read, write and list this bucket"
        )
    return StoreUnusable(
        f"{what}: {_endpoint(client)} answered {status} {code}; check AWS_DEFAULT_REGION and the server, then run again"
    )


def _no_bucket(bucket: str, client: Any) -> UserError:
    return UserError(
        f"{SCHEME}{bucket}: {_endpoint(client)} has no such bucket; create it, or correct the name"
    )


def unusable(error: BotoCoreError, what: str, client: Any) -> StoreUnusable:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreUnusable(
            f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    return StoreUnusable(
        f"{what}: {_endpoint(client)} cannot be reached ({type(error).__name__}); start the server, or correct "
        "AWS_ENDPOINT_URL"
    )


def _endpoint(client: Any) -> str:
    """Scheme, host and port: an endpoint's URL could hold a password."""
    parts = urlsplit(client.meta.endpoint_url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
