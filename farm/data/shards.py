"""Names of the files of a shard of answers; without torch, for who only lists them."""


def shard_names(number: int, writer: str = "") -> tuple[str, str]:
    """File names of tokens and features of a shard, of a `writer` beside whom others may write the same one."""
    mark = f"-{writer}" if writer else ""
    return f"tokens-{number:05d}{mark}.parquet", f"features-{number:05d}{mark}.safetensors"
