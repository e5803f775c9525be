"""Reports of one target, as an earlier run of a store left them."""

from farm.evaluate.records import Report, TargetRow
from farm.store import ObjectStore


def put_report(store: ObjectStore, row: TargetRow, *, k: int) -> None:
    """Keeps the report of run 1, in which the base draft's tau on the base was 4."""
    report = Report(
        k=k, temperature=0, threads=1, dtype="float32", prompts=8, tau_base_on_base=4.0, targets=(row,), run_id="1"
    )  # fmt: skip
    store.put("runs/1/report.json", report.model_dump_json().encode())
