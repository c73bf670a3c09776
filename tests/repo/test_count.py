"""What the house must not outgrow."""

from __future__ import annotations

from tests.repo import count


def test_the_core_is_thin() -> None:
    files, lines = count.count("bird", ("bird/lab",))
    assert files >= 13, "the core was not found"
    assert lines <= 2272


def test_no_file_of_the_packages_is_too_long() -> None:
    packages = [path for path in count.tracked() if path.parts[len(count.ROOT.parts)] in ("bird", "bird_kernels")]
    assert len(packages) > 100
    assert [str(path) for path in packages if count.lines_of(path) > count.LONGEST] == []
