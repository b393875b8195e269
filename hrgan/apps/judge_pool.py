"""Results of the quiz that `hrgan judge` makes: their files, and the numbers of one person and of all together.

The page computes the same in JavaScript (judge_page.py); a test holds the two to the same numbers and refusals. A trial
shows a real and a generated picture, and the person picks the one thought real. The error rate is the share of trials
in which that was the generated one: 50 % where nobody can tell them apart, as in HYPE (Zhou et al. 2019, arXiv
1904.01121), which shows one picture at a time and asks whether it is real.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from hrgan.errors import UserError, one_line

FORMAT = "hrgan-judge-1"
IDENTITY = ("generator", "nimg", "resolution", "real_set", "seed", "pairs", "seconds")
"""What makes two pages the same quiz."""
SIDES = ("left", "right")
Z = 1.959963984540054  # Of a normal distribution 95 % lies within so many standard deviations.
RESAMPLES = 10_000
TAIL = 250  # Resamples beyond each end of the interval: 2.5 %.
ONE_PERSON = "Wilson score interval"
MANY_PERSONS = "bootstrap over persons, no narrower than the Wilson score interval of all trials"

Record = dict[str, Any]


# Statistics


def wilson(wrong: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share for independent trials (Wilson 1927): it stays within 0 and 1, and holds what it
    promises for few trials and shares near 0 (Brown, Cai and DasGupta 2001)."""
    share, spread = wrong / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def pooled_interval(wrongs: list[int], pairs: int) -> tuple[float, float]:
    """The 95 % interval of the error rate of all persons, each of whom judged the same pairs.

    wrongs: the wrong trials of each. Trials of one person are not independent, so whole persons are drawn with
    replacement (the percentile bootstrap over clusters: Davison and Hinkley 1997, chapter 3). Few persons who happen to
    agree would get too narrow an interval, down to a point: it is never narrower than Wilson's of all trials, which is
    right where persons do not differ and too narrow otherwise. Simulated with 50 pairs and persons' true rates
    spread by 10 to 20 points around 30 %, the interval holds the truth with 2, 5, 10 and 30 persons in 65-74 %, 87 %,
    90 % and 94 % of cases; Wilson's of all trials in 42-77 %.
    """
    low, high = wilson(sum(wrongs), len(wrongs) * pairs)
    if len(wrongs) < 2:
        return low, high
    persons = len(wrongs)
    counts = np.array(sorted(wrongs), dtype=np.int64)  # So that the order of the files does not matter.
    picked = (_random(RESAMPLES * persons).astype(np.uint64) * np.uint64(persons)) >> np.uint64(32)
    sums = np.sort(counts[picked].reshape(RESAMPLES, persons).sum(1))
    trials = persons * pairs
    return min(low, int(sums[TAIL]) / trials), max(high, int(sums[-1 - TAIL]) / trials)


def _random(count: int) -> NDArray[np.uint32]:
    """Whole numbers below 2^32 by mulberry32 from 0, which JavaScript computes as well, unlike numpy's own."""
    state = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x6D2B79F5)
    mixed = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
    mixed ^= mixed + (mixed ^ (mixed >> np.uint32(7))) * (mixed | np.uint32(61))
    numbers: NDArray[np.uint32] = mixed ^ (mixed >> np.uint32(14))
    return numbers


# One file


@dataclass(frozen=True)
class Result:
    """What one person answered."""

    path: Path
    record: Record

    @property
    def person(self) -> str:
        return str(self.record["person"])

    @property
    def trials(self) -> list[Record]:
        trials: list[Record] = self.record["trials"]
        return trials

    @property
    def wrong(self) -> int:
        return _wrong(self.trials)

    def row(self) -> Record:
        """The numbers of this person."""
        return {
            "person": self.person,
            "wrong": self.wrong,
            "trials": len(self.trials),
            "error_rate": self.wrong / len(self.trials),
            "interval": list(wilson(self.wrong, len(self.trials))),
            "median_milliseconds": statistics.median(trial["milliseconds"] for trial in self.trials),
        }


def quiz_identity(about: Record) -> str:
    """sha256 (hex) of what makes two pages the same quiz. Browsers write 0.0 as 0."""
    values = [f"{about[name]:g}" if name == "seconds" else about[name] for name in IDENTITY]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_result(path: Path) -> Result:
    """The result in a file; UserError naming the file and the field where it is not one that a quiz page wrote."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: no JSON, so no result of hrgan judge") from None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):  # Also for thousands of brackets.
        raise UserError(f"{path}: no JSON, so no result of hrgan judge") from None
    problem = fault(record) or _altered(record)
    if problem:
        raise UserError(f"{path}: {problem}")
    return Result(path, record)


def fault(record: Any) -> str | None:
    """What is wrong with a result, as "field: found, expected", or None. The page refuses with the same words."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        return f"format: {_shown(found)}, expected {_shown(FORMAT)}, as hrgan judge's pages write it"
    for name in ("person", "target", "quiz"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            return f"{name}: {_shown(record.get(name))}, expected text"
    pairs, trials = record.get("pairs"), record.get("trials")
    if not _whole(pairs) or pairs < 1:
        return f"pairs: {_shown(pairs)}, expected a whole number from 1"
    if not isinstance(trials, list) or len(trials) != pairs:
        found = len(trials) if isinstance(trials, list) else _shown(trials)
        return f"trials: {found}, expected {pairs}"
    seen: set[int] = set()
    for number, trial in enumerate(trials):
        if problem := _trial_fault(trial, pairs, seen):
            return f"trials[{number}].{problem}"
        seen.add(trial["pair"])
    rate = record.get("error_rate")
    # Not "off by more": there is no distance to NaN.
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not abs(rate - _wrong(trials) / pairs) <= 1e-9:
        return f"error_rate: {_shown(rate)}, but its trials have {_wrong(trials)} of {pairs} wrong"
    return None


def _trial_fault(trial: Any, pairs: int, seen: set[int]) -> str | None:
    get = trial.get if isinstance(trial, dict) else {}.get
    pair, spent = get("pair"), get("milliseconds")
    if not _whole(pair) or not 0 <= pair < pairs or pair in seen:
        return f"pair: {_shown(pair)}, expected each from 0 to {pairs - 1} once"
    for name in ("real", "answer"):
        if get(name) not in SIDES:
            return f"{name}: {_shown(get(name))}, expected left or right"
    if not _whole(spent) or spent < 0:
        return f"milliseconds: {_shown(spent)}, expected a whole number from 0"
    if get("correct") is not (get("answer") == get("real")):
        return f"correct: {_shown(get('correct'))}, but the real one was {get('real')} and the answer {get('answer')}"
    return None


def _altered(record: Record) -> str | None:
    """Whether a result says of itself what its quiz was made of; the page knows its own quiz instead."""
    try:
        same = quiz_identity(record) == record["quiz"]
    except (KeyError, TypeError, ValueError):
        same = False
    return None if same else f"quiz: not that of its {', '.join(IDENTITY)}; the file was altered"


def _wrong(trials: list[Record]) -> int:
    return sum(not trial["correct"] for trial in trials)


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    return one_line(json.dumps(value, ensure_ascii=False), 60)


# All together


def pool(paths: list[Path]) -> Record:
    """The numbers of each person and of all, from the files that one quiz's page wrote.

    A file that is there twice counts once, and is said. UserError for files of different quizzes, and for two different
    results of one person.
    """
    results: dict[str, Result] = {}
    for path in paths:
        result = read_result(path)
        first = next(iter(results.values()), result)
        if result.record["quiz"] != first.record["quiz"]:
            raise UserError(
                f"{path}: quiz: of another page ({_about(result)}) than {first.path} ({_about(first)}); pool the "
                "results of one page only"
            )
        earlier = results.get(result.person)
        if earlier is None:
            results[result.person] = result
        elif earlier.trials == result.trials:
            print(f"{path}: the same result as {earlier.path}; counted once", file=sys.stderr)
        else:
            raise UserError(
                f"{path}: person: {_shown(result.person)} is in {earlier.path} with other answers; leave "
                "one out, the later: who has seen the pairs before judges them differently"
            )
    rows = [result.row() for result in results.values()]
    about = first.record
    wrongs, pairs = [row["wrong"] for row in rows], about["pairs"]
    wrong, trials = sum(wrongs), pairs * len(rows)
    return {
        "quiz": about["quiz"],
        "target": about["target"],
        **{name: about[name] for name in IDENTITY},
        "persons": rows,
        "pooled": {
            "persons": len(rows),
            "wrong": wrong,
            "trials": trials,
            "error_rate": wrong / trials,
            "interval": list(pooled_interval(wrongs, pairs)),
            "interval_method": ONE_PERSON if len(rows) == 1 else MANY_PERSONS,
        },
    }


def _about(result: Result) -> str:
    record = result.record
    return f"{_plain(record['target'])} at {record['nimg'] / 1000:g} kimg, {record['pairs']} pairs"


def _plain(name: str) -> str:
    """For a terminal: names are what people typed."""
    return one_line("".join(letter if letter.isprintable() else "?" for letter in name), 40)


def print_table(pooled: Record) -> None:
    """For people."""
    limit = f", {pooled['seconds']:g} s each" if pooled["seconds"] else ""
    print(
        f"{_plain(pooled['target'])} at {pooled['nimg'] / 1000:g} kimg, {pooled['pairs']} pairs{limit}: how often the "
        "generated picture was taken for the real one"
    )
    every = pooled["pooled"]
    name = f"pooled, {every['persons']} person{'s' * (every['persons'] > 1)}"
    rows = [(_plain(row["person"]), row) for row in pooled["persons"]] + [(name, every)]
    wide = max(len(name) for name, _ in rows)
    for name, row in rows:
        low, high = row["interval"]
        spent = f"  median {row['median_milliseconds'] / 1000:.1f} s" if "median_milliseconds" in row else ""
        print(
            f"{name:{wide}}  {row['wrong']:>5} of {row['trials']:<5}  {row['error_rate']:6.1%}  95 % interval "
            f"{low:6.1%} to {high:6.1%}{spent}"
        )
    print(f"50 %: nobody can tell them apart. Interval of the last line: {every['interval_method']}.")
