"""Figures as a table: medians, spread, ratios. No dependency; used by engine.py and its parts."""
import random
import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def ratio_interval(a: Sequence[float], b: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """95 % of the ratios of medians that the same measurement would have given, by resampling."""
    rng = random.Random(1)
    ratios = sorted(median(rng.choices(a, k=len(a))) / median(rng.choices(b, k=len(b))) for _ in range(rounds))
    return ratios[int(0.025 * rounds)], ratios[int(0.975 * rounds)]


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  " + "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))))
    for note in notes:
        print(f"  {note}")


def verdict(value: float, bar: float) -> str:
    return f"{'<=' if value <= bar else '>'} {bar:g}"
