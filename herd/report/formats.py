"""Numbers as people read them: one function a kind, used by tables, sentences and plots alike."""

from collections.abc import Sequence


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def signed_nats(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def small(value: float | None) -> str:
    """Divergences: three significant digits without an exponent where that is readable."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.1e}"


def interval(bounds: Sequence[float] | None, *, digits: int = 3) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f} – {bounds[1]:.{digits}f}".replace("-", "−")


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def size(count: float | None) -> str:
    """Decimal bytes: 9.61 MB."""
    return "–" if count is None else f"{_scaled(count)}B"


def amount(count: float | None) -> str:
    """Parameters, tokens: 4.81 M, 109 B."""
    return "–" if count is None else _scaled(count, giga="B").strip()


def rate(per_second: float | None) -> str:
    return "–" if per_second is None else f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _scaled(count: float, *, giga: str = "G") -> str:
    for factor, unit in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} "
