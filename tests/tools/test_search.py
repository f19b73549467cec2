"""The search for rates on synthetic scores: near the optimum, inside the range, equal budgets, resumable anywhere."""

import itertools
import json
import math
import random

from absl.testing import absltest, parameterized

import flags
from tests.tools.test_comparison import outcome
from tools.comparison import search
from tools.comparison.candidates import FIRST_RATES, Candidate
from tools.comparison.runner import seconds_left
from tools.comparison.search import GridCell, ModeTrial, grid, next_round, rank

FACTOR = 3.0
# By optimizer: logarithm, to the base of the factor, of best rate over first rate; width of the peak; distance from the
# best rate at which training diverges. All but LARS diverge soon after their best rate.
SURFACES = {
    "lars": (1.4, 2.0, 9.0),
    "lamb": (-0.6, 1.5, 1.2),
    "sgd": (4.3, 0.8, 0.3),
    "momentum": (-3.8, 1.0, 0.4),
    "adam": (0.0, 0.5, 0.6),
}
SHIFT = 0.4  # short runs do best at rates that are higher by so many factors


def train(job, surfaces=SURFACES):
    """Return the outcome of a job on its optimizer's surface; it depends on the job alone."""
    best, width, cliff = surfaces[job.candidate.name]
    first = job.candidate.rate(job.batch_size, 1.0)
    distance = math.log(job.rate / first, FACTOR) - best - SHIFT * (job.length < 1.0)
    seconds = 100.0 * job.length
    if distance > cliff:
        return outcome(0.0, None, diverged=True, seconds=None)
    if distance > cliff - 0.2:
        return outcome(0.0, 2.4, lost=True, seconds=None)
    luck = random.Random(job.name).uniform(-0.001, 0.001)
    top1 = max(0.9 - 0.3 * (1 - job.length) - 0.2 * (distance / width) ** 2, 0.1) + luck
    return outcome(top1, 2.3 - 2 * top1 if top1 > 0.12 else 2.3 + abs(distance), seconds=seconds)


def cells_of(names=tuple(SURFACES), batch_sizes=(256, 4096), seeds=(0, 1), tuning_runs=8):
    candidates = [Candidate(name, flags.RunConfig(optimizer=name), FIRST_RATES[name], 256) for name in names]
    return grid(candidates, batch_sizes, tuning_runs, FACTOR, seeds)


def run(cells, outcomes=None, until=None, surfaces=SURFACES, order=None, workers=1):
    """Run the jobs of the cells, `workers` at a time, which end in a random order if there is one."""
    outcomes, running = dict(outcomes or {}), []
    while until is None or len(outcomes) < until:
        ready = [job for cell in cells for job in cell.jobs(outcomes) if job not in running]
        running += ready[: workers - len(running)]
        if not running:
            break
        job = running.pop(order.randrange(len(running)) if order else 0)
        assert job.name not in outcomes
        outcomes[job.name] = train(job, surfaces)
    return json.loads(json.dumps(outcomes))


class SurfacesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.cells = cells_of()
        cls.outcomes = run(cls.cells)
        cls.table = [cell.row(cls.outcomes) for cell in cls.cells]

    def test_the_best_rate_is_found_within_one_factor(self):
        for cell, row in zip(self.cells, self.table, strict=True):
            best = cell.candidate.rate(cell.batch_size, FACTOR ** SURFACES[cell.candidate.name][0])
            self.assertLess(abs(math.log(row["rate"] / best, FACTOR)), 1.0, row)
            self.assertGreater(row["mean"], 0.8, row)

    def test_no_search_ends_at_an_edge(self):
        for row in self.table:
            self.assertFalse(row["at_edge"], row)
            rates = [tried["rate"] for tried in row["tuning"]]
            self.assertBetween(row["rate"], min(rates) * 1.1, max(rates) / 1.1)

    def test_budgets_are_equal(self):
        for cell, row in zip(self.cells, self.table, strict=True):
            lengths = [tried["length"] for tried in row["tuning"]]
            failed = sum(tried["length"] == 1.0 and tried["state"] != "finished" for tried in row["tuning"])
            self.assertEqual((lengths.count(0.25), set(lengths)), (8, {0.25, 1.0}), row)
            self.assertBetween(lengths.count(1.0), 2, 2 + failed, row)  # one that fails is replaced if another learned
            self.assertLessEqual(failed, 1)
            self.assertLen({(tried["rate"], tried["length"]) for tried in row["tuning"]}, len(lengths))
            self.assertEqual((cell.lengths_left(self.outcomes), cell.jobs(self.outcomes)), ([], []))

    def test_what_is_left_counts_down_to_nothing(self):
        left = [sum(len(c.lengths_left({})) for c in self.cells)]
        for until in range(1, len(self.outcomes) + 1):
            outcomes = dict(list(self.outcomes.items())[:until])
            left.append(sum(len(cell.lengths_left(outcomes)) for cell in self.cells))
        steps = {before - after for before, after in itertools.pairwise(left)}
        self.assertContainsSubset(steps, {0, 1})  # 0 where a finalist is replaced
        self.assertEqual((left[0], left[-1]), (len(self.cells) * (8 + 2 + 2), 0))

    @parameterized.parameters(range(4))
    def test_cut_anywhere_it_ends_with_the_same_table(self, seed):
        """Cut after every number of runs, which end in another order, and two or three at a time."""
        order = random.Random(seed)
        cells = cells_of(names=("sgd", "lars"), batch_sizes=(4096,))
        whole = run(cells)
        table = [cell.row(whole) for cell in cells]
        for until in range(len(whole) + 1):
            part = run(cells, until=until, order=order, workers=order.randint(1, 3))
            again = run(cells, part, order=order, workers=order.randint(1, 3))
            self.assertEqual([cell.row(again) for cell in cells], table)
            self.assertEqual(again, whole)

    def test_more_seeds_and_batches_keep_the_rates(self):
        cells = cells_of(batch_sizes=(64, 256, 4096), seeds=(0, 1, 5))
        outcomes = run(cells, self.outcomes)
        self.assertEqual({name: outcomes[name] for name in self.outcomes}, self.outcomes)
        more = {(row["candidate"], row["batch_size"]): row for row in (cell.row(outcomes) for cell in cells)}
        for row in self.table:
            self.assertEqual(more[row["candidate"], row["batch_size"]]["tuning"], row["tuning"])
            self.assertEqual(more[row["candidate"], row["batch_size"]]["top1"][:2], row["top1"])

    def test_a_larger_budget_keeps_the_runs(self):
        """It ends as a search with that budget from the start, and runs nothing twice, however the budget grew."""
        for fewer in (3, 5, 6, 7):
            grown = run(cells_of(), run(cells_of(tuning_runs=fewer)))
            for before, after in zip(self.table, (cell.row(grown) for cell in self.cells), strict=True):
                self.assertEqual(after, before)

    def test_an_optimum_out_of_reach_is_said_to_be(self):
        cells = cells_of(names=("lars",), batch_sizes=(256,))
        (row,) = (cell.row(run(cells, surfaces={"lars": (9.0, 6.0, 2.0)})) for cell in cells)
        self.assertTrue(row["at_edge"])
        self.assertLen(row["tuning"], 10)

    def test_where_nothing_learns_it_goes_down(self):
        cells = cells_of(names=("sgd",), batch_sizes=(256,))
        (row,) = (cell.row(run(cells, surfaces={"sgd": (-30.0, 1.0, -1.0)})) for cell in cells)
        self.assertEqual(row["rate"], min(tried["rate"] for tried in row["tuning"]))
        self.assertEqual(row["diverged"], 2)


class RulesTest(parameterized.TestCase):
    def found(self, **scores):
        return {float(step): outcome(top1, beats_chance=top1 > 0.12) for step, top1 in scores.items()}

    def test_rounds(self):
        """Three rates, the range extended where the best is at its end, then halves, the better side first."""
        scores = {-1.0: 0.2, 0.0: 0.3, 1.0: 0.4}
        found = {step: outcome(top1, beats_chance=True) for step, top1 in scores.items()}
        self.assertEqual(next_round({}, 8), [0.0, 1.0, -1.0])
        self.assertEqual(next_round(found, 8), [2.0])
        found[2.0] = outcome(0.35, beats_chance=True)
        self.assertEqual(next_round(found, 8), [1.5, 0.5])
        self.assertEqual(next_round(found, 5), [1.5])
        self.assertEqual(next_round(found, 4), [])
        self.assertEqual(next_round({}, 0), [])

    def test_of_equals_the_lower_loss(self):
        found = {s: outcome(0.5, loss, beats_chance=True) for s, loss in ((0.0, 1.0), (1.0, 0.9), (-1.0, 1.1))}
        self.assertEqual(next_round(found, 8), [2.0])

    def test_scores_of_guesses_are_no_slope(self):
        """12.8 % of 450 images is two standard deviations above a guess among 10 classes."""
        candidate = cells_of()[0].candidate
        self.assertEqual([candidate.beats_chance(outcome(t)) for t in (0.05, 0.12, 0.13)], [False, False, True])
        self.assertFalse(candidate.beats_chance({"top1": 0.0, "n": None, "diverged": True}))
        self.assertFalse(candidate.beats_chance({"top1": 0.0, "n": None, "diverged": False, "lost": True}))
        found = {
            s: outcome(top1, loss, beats_chance=False)
            for s, top1, loss in ((0.0, 0.05, 6.0), (1.0, 0.1, 457.0), (-1.0, 0.09, 2.3))
        }
        self.assertEqual(next_round(found, 8), [-2.0])

    def test_finalists_are_inside_the_range_and_have_learned(self):
        scores = {-1.0: 0.3, 0.0: 0.5, 0.5: 0.6, 1.0: 0.55, 2.0: 0.54}
        found = {step: outcome(top1, beats_chance=True) for step, top1 in scores.items()}
        self.assertEqual(rank(found), [0.5, 1.0, 0.0])
        found[1.0] |= {"beats_chance": False}
        self.assertEqual(rank(found), [0.5, 0.0])

    def test_a_finalist_that_fails_is_replaced(self):
        """The best two of the short runs diverge at full length: the next two take their place."""
        cell = cells_of(names=("lars",), batch_sizes=(256,))[0]
        outcomes = {}
        while (state := cell.search(outcomes)).best is None:
            for step in state.steps:
                job = cell.job(step, state.stage)
                failed = state.stage == "tuning" and len(state.full) + len(outcomes) < 10
                outcomes[job.name] = outcome(0.0, None, diverged=True) if failed else train(job)
        tuning = [tried for tried in cell.row(outcomes)["tuning"] if tried["length"] == 1.0]
        self.assertCountEqual([tried["state"] for tried in tuning], ["diverged", "diverged", "finished", "finished"])
        chosen = max(tuning, key=lambda tried: tried["top1"])
        self.assertEqual((cell.row(outcomes)["rate"], chosen["state"]), (chosen["rate"], "finished"))

    def test_short_runs_have_updates_enough(self):
        """4 epochs of 50,000 images are 782 updates at 256, and 13 at 16,384."""
        config = flags.RunConfig(epochs=4.0)
        candidate = Candidate("lars", config, 2.5, 256)
        cells = [GridCell(candidate, b, 8, FACTOR, (0,)) for b in (256, 8192, 16384)]
        self.assertEqual([cell.short_length for cell in cells], [0.25, 16 / 25, 1.0])
        self.assertEqual([cell.finalists for cell in cells], [2, 2, 0])
        self.assertEqual(GridCell(candidate, 256, 7, FACTOR, (0,)).finalists, 0)

    def test_without_tuning_the_rate_is_the_candidates_own(self):
        jobs = cells_of(names=("adam",), batch_sizes=(1024,), tuning_runs=0)[0].jobs({})
        self.assertEqual([(job.rate, job.stage, job.seed) for job in jobs], [(2e-3, "seed", 0), (2e-3, "seed", 1)])

    def test_the_faster_mode_is_taken(self):
        trial = ModeTrial(cells_of()[0].candidate, 256)
        xla, graph = trial.jobs({})
        outcomes = {xla.name: outcome(0.1, images_per_second=100.0)}
        self.assertEqual(trial.jobs(outcomes), [graph])
        for speed, mode in ((160.0, "off"), (90.0, "on"), (None, "on")):
            outcomes[graph.name] = outcome(0.1, images_per_second=speed)
            self.assertEqual((trial.jobs(outcomes), trial.faster(outcomes)), ([], mode))

    def test_time_left(self):
        """Whole runs of 100 s: 5 cells of 8 short runs, 2 finalists and 2 seeds, on 2 workers."""
        cells = cells_of(batch_sizes=(256,))
        self.assertIsNone(seconds_left(cells, {}, 2))
        first = run(cells, until=1)
        self.assertAlmostEqual(seconds_left(cells, first, 2), 100 * (5 * 6 - 0.25) / 2)
        self.assertEqual(seconds_left(cells, run(cells), 2), 0.0)

    def test_the_rule_is_written_down(self):
        self.assertIn(f"1/{search.HALVING} of the length", search.RULE)


if __name__ == "__main__":
    absltest.main()
