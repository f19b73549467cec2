"""Settings and outcomes of a comparison in one JSON file, whole after each run."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from lars_keras.runtime.errors import UsageError
from running.resume import config_of_flags
from tools.committed import write_json
from tools.comparison.search import GridCell, ModeTrial

MAY_DIFFER = ("batch_sizes", "seeds", "tuning_runs")  # when a comparison is resumed, as may the list of candidates
OF_CANDIDATES = ("candidates", "data")  # by candidate: its flags, and the fingerprint of its data


class ResultsStore:
    """`OUT/compare.json`: the settings, the table so far, and the outcome of each finished run.

    Args:
        out: existing folder.
        about: what is written beside the outcomes: title, command, machine, commit, versions, settings.
        cells: the grid, of which the table is made.
        clock: returns seconds.

    Attributes:
        outcomes: outcomes of the finished runs by their names.
        modes: `--jit_compile` by model, where trials have chosen it.

    Raises:
        UsageError: if the file is damaged, or holds a comparison of other settings. `MAY_DIFFER` may differ.
    """

    def __init__(
        self, out: Path, about: dict[str, Any], cells: list[GridCell], clock: Callable[[], float] = time.monotonic
    ):
        self._path, self._about, self._cells, self._clock = out / "compare.json", about, cells, clock
        self.outcomes: dict[str, Any] = {}
        self.modes: dict[str, str] = {}
        self._earlier, self._began = 0.0, clock()
        if not self._path.exists():
            return
        try:
            before = json.loads(self._path.read_text(encoding="utf-8"))
            self.outcomes, self._earlier = before["runs"], before["wall_seconds"]
            settings, self.modes = before["settings"], before.get("modes", {})
        except (ValueError, KeyError) as e:
            raise UsageError(f"{self._path} is damaged: {e!r}. Name another folder with --out.") from e
        if other := differing(about["settings"], settings):
            raise UsageError(
                f"--out={out} holds a comparison of other settings ({', '.join(other)}). Name another folder."
            )
        for outcome in self.outcomes.values():
            outcome.setdefault("commit", before["commit"])
        both = {  # a candidate that is left out now may come back
            name: settings.get(name, {}) | about["settings"].get(name, {}) for name in OF_CANDIDATES
        }
        self._about = about | {"settings": about["settings"] | both}
        if not self.left:  # no new run, so what made the old ones stays; the table is of the cells asked for now
            self._about |= {name: before[name] for name in about if name not in ("settings", "command")}

    @property
    def commit(self) -> str | None:
        """Return the commit of the runs that are made now."""
        return self._about["commit"]

    @property
    def left(self) -> int:
        """Return the number of runs that are left."""
        return sum(len(cell.lengths_left(self.outcomes)) for cell in self._cells)

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a run."""
        self.outcomes[name] = outcome | {"commit": self.commit}
        self.write()

    def forget_failed(self, trials: Sequence[ModeTrial]) -> None:
        """Drop failed trials of the models that have no mode yet, so that they are tried again."""
        names = {job.name for t in trials if t.model not in self.modes for job in t.jobs({})}
        if failed := [name for name in names if self.outcomes.get(name, {}).get("failed")]:
            for name in failed:
                del self.outcomes[name]
            self.write()

    def choose_modes(self, trials: Sequence[ModeTrial]) -> None:
        """Keep the faster mode of each model whose trials are finished.

        It holds for all runs to come: another grid would have other trials, and a run that was stopped goes on only in
        the mode in which it began.
        """
        found = {t.model: t.faster(self.outcomes) for t in trials if not t.jobs(self.outcomes)}
        if found.keys() - self.modes.keys():
            self.modes = found | self.modes
            self.write()

    def write(self) -> dict[str, Any]:
        """Write the file and return its contents."""
        found = self._about | {
            "commit": ", ".join(sorted({o["commit"] or "?" for o in self.outcomes.values()})) or self._about["commit"],
            "wall_seconds": round(self._earlier + self._clock() - self._began, 1),
            "left": self.left,
            "modes": self.modes,
            "table": [cell.row(self.outcomes) for cell in self._cells],
            "runs": self.outcomes,
        }
        write_json(self._path, found)
        return found


def differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that keep a comparison from being resumed.

    Candidates may come and go, but each keeps its flags and its images. A search may be added where there was none. A
    setting that is None may be missing before: comparisons made by the earlier search rule do not record `search`.
    Earlier ones do not record `data` either.
    """
    may_differ = (*MAY_DIFFER, *OF_CANDIDATES, *(() if before.get("tuning_runs") else ("search",)))
    other = [name for name in now if name not in may_differ and before.get(name) != now[name]]
    candidates, earlier = now["candidates"], before.get("candidates", {})
    data, data_then = now.get("data", {}), before.get("data", {})
    if any(data[c] != data_then[c] for c in data if c in data_then):
        other.insert(0, "data")
    same = earlier and all(_same_flags(candidates[c], earlier[c]) for c in candidates if c in earlier)
    return other if same else ["candidates", *other]


def _same_flags(a: str, b: str) -> bool:
    """Return True if two flagfiles ask for the same, although a flag may be younger than one of them."""
    if a == b:
        return True
    try:
        return config_of_flags(a.splitlines()) == config_of_flags(b.splitlines())
    except (absl_flags.Error, ValueError):
        return False
