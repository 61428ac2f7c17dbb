"""What became of each linear."""

from __future__ import annotations

from dataclasses import dataclass

from compress.progress import log


@dataclass(frozen=True)
class FitRecord:
    """What one linear became. relative_error = ||X(W - What)|| / ||XW|| on the inputs it was fitted on.

    failed: the fit failed and the linear was left as it is. note: why, or what else was unusual. damped: the moments
    that were singular ("Gram matrix", "metric"), so that the fit rests on their damping.
    """

    name: str
    structure: str
    parameters: int
    dense_parameters: int
    relative_error: float
    predicted_loss: float | None
    failed: bool = False
    note: str | None = None
    damped: str | None = None


def summarise(records: list[FitRecord]) -> None:
    """One line for the log."""
    structured = [r for r in records if r.structure != "dense"]
    alone = sum(r.parameters for r in records) / sum(r.dense_parameters for r in records)
    log(
        f"{len(records)} linears, {len(records) - len(structured)} left dense: their own parameters, with nothing that "
        f"goes with them, are {alone:.4f} of the dense ones"
    )
    grams, metrics = (sum(what in (r.damped or "") for r in structured) for what in ("Gram matrix", "metric"))
    if grams or metrics:
        log(
            f"singular and therefore damped: the Gram matrices of {grams} structured linears, the metrics of {metrics} "
            f"(fit.json)"
        )
    failed = [r.name for r in records if r.failed]
    if failed:
        log(f"warning: the fits of {len(failed)} linears failed, they are as they were: {', '.join(failed)} (fit.json)")
