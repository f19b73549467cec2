"""Flags: each means something or is refused, recipes parse, and messages of the library name flags."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import tempfile
from unittest import mock

import keras
import tensorflow as tf
from absl.testing import parameterized

import flags
import train
from lars_keras.runtime.errors import UsageError
from running import renamed, start
from running.errors import in_flags, usage_errors
from running.optimizers import OPTIMIZER_FLAGS, OPTIMIZERS, SCHEDULE_FLAGS, SCHEDULES, make_optimizer, make_schedule
from running.resume import config_of_flags
from tests.cli.runs import parse_only
from tests.published_recipes import RECIPES
from tools.comparison import command

ROOT = pathlib.Path(__file__).parents[2]
# Another value than the default for each flag that not all optimizers and schedules have.
VALUES = {
    "momentum": 0.8,
    "nesterov": True,
    "beta_2": 0.98,
    "adam_epsilon": 1e-3,
    "bias_correction": False,
    "trust_coefficient": 0.002,
    "trust_epsilon": 1e-4,
    "variant": "norm_of_sum",
    "trust_clip": True,
    "excluded_lr_scale": 0.5,
    "bias_lr_scale": 64.0,
    "power": 1.0,
    "end_learning_rate": 0.25,
    "end_lr_scale": 0.5,
}
PAIRS = [(o, s) for o in OPTIMIZERS for s in SCHEDULES]


def as_flag(name, value):
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"


def config_of(*arguments):
    """Return the `RunConfig` of flags that are accepted."""
    values, rest = flags.parse(["train.py", *arguments])
    assert not rest, rest
    return flags.read(values)


def made(config):
    """Return the configs of the optimizer and of the schedule of a run."""
    schedule = make_schedule(**config.schedule_arguments(200_000))
    with keras.name_scope("model"):
        variables = [keras.Variable([[1.0]], name="kernel"), keras.Variable([1.0], name="bias")]
    with keras.name_scope("batch_normalization"):  # without which a large rate of biases brings a warning
        variables.append(keras.Variable([1.0], name="gamma"))
    options = config.optimizer_options | ({"exclude": ()} if config.exclude else {})
    return make_optimizer(config.optimizer, schedule, variables, **options).get_config(), schedule.get_config()


class MeaningTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*VALUES)
    def test_a_flag_reaches_the_optimizer_or_is_refused(self, name):
        owners = OPTIMIZER_FLAGS.get(name) or SCHEDULE_FLAGS[name]
        default = next(field.default for field in dataclasses.fields(flags.RunConfig) if field.name == name)
        for optimizer, schedule in PAIRS:
            kind, owner = ("optimizer", optimizer) if name in OPTIMIZER_FLAGS else ("schedule", schedule)
            end = [] if name.startswith("end_") or schedule != "exponential" else ["--end_learning_rate=0.1"]
            chosen = [f"--optimizer={optimizer}", f"--schedule={schedule}", *end]
            for value in (VALUES[name], default):
                if value is None or (schedule == "exponential" and name == "end_learning_rate" and not value):
                    continue  # no value can be given, or it is refused for what it is
                with self.subTest(optimizer=optimizer, schedule=schedule, value=value):
                    if owner in owners:
                        config = config_of(*chosen, as_flag(name, value))
                        argument, expected = owners[owner], value
                        if argument == "end_scale":  # a factor on the peak
                            argument, expected = "end", value * config.learning_rate
                        self.assertEqual(made(config)[kind == "schedule"][argument], expected)
                        self.assertIn(as_flag(name, value), config.as_flags().splitlines())
                        continue
                    code, _, _, err = parse_only(*chosen, as_flag(name, value))
                    self.assertEqual(code, 2)
                    self.assertIn(f"--{name}={value} --{kind}={owner}", err)
                    self.assertIn(f"--{name} needs --{kind}={' or '.join(owners)}", err)

    def test_the_table_is_complete(self):
        """An argument of an optimizer that a flag sets for another optimizer is set, or not there."""
        self.assertCountEqual(VALUES, [*OPTIMIZER_FLAGS, *SCHEDULE_FLAGS])
        for optimizer in OPTIMIZERS:
            config, _ = made(config_of(f"--optimizer={optimizer}", "--learning_rate=1"))
            settable = {arguments[optimizer] for arguments in OPTIMIZER_FLAGS.values() if optimizer in arguments}
            known = {a for arguments in OPTIMIZER_FLAGS.values() for a in arguments.values()}
            # Momentum is what tells `momentum` from `sgd`; AMSGrad is not offered; see OPTIMIZER_FLAGS for LAMB.
            left = {"sgd": {"momentum", "nesterov"}, "lamb": {"excluded_lr_scale"}}.get(optimizer, set())
            self.assertEqual(known & set(config) - settable, left, optimizer)

    def test_defaults(self):
        self.assertEqual(made(config_of("--optimizer=lamb"))[0]["epsilon"], 1e-6)
        self.assertEqual(made(config_of("--optimizer=adam"))[0]["epsilon"], 1e-7)
        self.assertEqual(made(config_of("--optimizer=sgd"))[0]["momentum"], 0.0)
        self.assertEqual(made(config_of("--optimizer=momentum"))[0]["momentum"], 0.9)

    def test_exclude_needs_something_to_exclude_from(self):
        for optimizer in ("sgd", "momentum", "adam"):
            code, _, _, err = parse_only(f"--optimizer={optimizer}", "--weight_decay=0", "--exclude=bias")
            self.assertEqual(code, 2)
            other = "" if optimizer == "adam" else " or --bias_lr_scale other than 1"
            self.assertIn(f"--exclude needs --weight_decay above 0{other} with", err)
        code, _, _, err = parse_only("--optimizer=momentum", "--bias_lr_scale=64", "--exclude=")
        self.assertEqual(code, 2)
        self.assertIn("needs variables in --exclude. Received: --exclude= --bias_lr_scale=64", err)
        config = config_of("--optimizer=momentum", "--bias_lr_scale=64", "--weight_decay=0", "--exclude=bias")
        self.assertEqual(config.exclude, ("bias",))
        self.assertEqual(config_of("--weight_decay=0", "--exclude=bias").exclude, ("bias",))

    def test_another_optimizer_drops_flags_of_a_flagfile(self):
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "f.flags")
        path.write_text("--momentum=0.8\n--power=1\n--weight_decay=0\n--exclude=bias\n")
        for flagfile in ([f"--flagfile={path}"], ["--flagfile", str(path)]):
            config = config_of(*flagfile, "--optimizer=sgd", "--schedule=step")
            self.assertNotRegex(config.as_flags(), "--(momentum|power)=")
            made(config)
            code, _, _, err = parse_only(*flagfile, "--optimizer=sgd", "--momentum=0.7")
            self.assertEqual(code, 2)
            self.assertIn("Received: --momentum=0.7 --optimizer=sgd", err)
            code, _, _, err = parse_only(*flagfile, "--schedule=step", "--power=1")
            self.assertIn("--power needs", err)
        path.write_text("--momentum=0.8\n--optimizer=sgd\n")
        code, _, _, err = parse_only(f"--flagfile={path}", "--seed=1")
        self.assertEqual(code, 2)
        self.assertIn("--momentum needs", err)

    def test_epochs_beside_steps_of_a_flagfile(self):
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "f.flags")
        path.write_text("--steps=30\n--epochs=2\n")
        self.assertEqual(config_of(f"--flagfile={path}").total_updates(10**6), 30)
        self.assertEqual(config_of(f"--flagfile={path}", "--epochs=4", "--steps=9").total_updates(10**6), 9)
        code, _, _, err = parse_only(f"--flagfile={path}", "--epochs=4")
        self.assertEqual(code, 2)
        self.assertIn("--epochs has no effect beside the --steps=30", err)

    def test_zero_is_a_value(self):
        variables = [keras.Variable([1.0], name="kernel")]
        for name in OPTIMIZERS:
            optimizer = make_optimizer(name, 0.1, variables, use_ema=True, ema_momentum=0.0, weight_decay=0.0)
            self.assertEqual(optimizer.ema_momentum, 0.0, name)
            self.assertFalse(optimizer.weight_decay, name)
            config = config_of(f"--optimizer={name}", "--ema_momentum=0", "--weight_decay=0")
            self.assertEqual(config.optimizer_options["ema_momentum"], 0.0)
            self.assertEqual(config.optimizer_options["weight_decay"], 0.0)


class UsageTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        (["--dataset=mnist"], "dataset"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=64", "--microbatch_size=24"], "--microbatch_size must divide --batch_size"),
        (["--batch_size=63", "--strategy=single", "--replicas=2"], "--replicas needs"),
        (["--batch_size=64", "--tpu=name", "--replicas=2"], "--replicas cannot be combined with --tpu"),
        (["--optimizer=rmsprop"], "optimizer"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--epochs=0"], "--epochs must be above 0"),
        (["--epochs=nan"], "--epochs must be finite. Received: --epochs=nan"),
        (["--epochs=inf"], "--epochs must be finite"),
        (["--checkpoint_minutes=inf"], "--checkpoint_minutes must be finite"),
        (["--global_clipnorm=nan"], "--global_clipnorm must be finite"),
        (["--warmup=soon"], "--warmup"),
        (["--momentum=1"], "--momentum must be below 1"),
        (["--optimizer=adam", "--beta_2=1"], "--beta_2 must be below 1"),
        (["--tpu=name", "--strategy=single"], "--tpu needs"),
        (["--strategy=one"], "single"),
        (["--eval_only"], "--run_dir"),
        (["--nodry_run=3"], "--nodry_run=3 does not take an argument"),
        (["--run_dir=no_such_run", "--eval_every=3"], "There is no run to resume in --run_dir=no_such_run."),
        (["--eval_only", "--dry_run", "--run_dir=run"], "--dry_run rehearses a training"),
        (["--variant=ratio_on_momentum", "--nesterov"], "Nesterov"),
        (["stray"], "stray"),
        (["--flagfile=no_such_file.flags"], "no_such_file"),
    )
    def test_refused(self, arguments, message):
        code, config, out, err = parse_only(*arguments)
        self.assertEqual(code, 2, out + err)
        self.assertIsNone(config)
        self.assertRegex(err, "^train.py: error: ")
        self.assertIn(message, err)

    @parameterized.parameters(*renamed.FLAGS.items())
    def test_an_earlier_name_is_refused_with_todays(self, before, now):
        code, _, _, err = parse_only(f"--{before}=0")
        self.assertEqual((code, err), (2, f"train.py: error: --{before} was renamed to --{now}.\n"))

    def test_help(self):
        code, config, out, _ = parse_only("--help")
        self.assertEqual((code, config), (0, None))
        for field in dataclasses.fields(flags.RunConfig):
            self.assertRegex(out, rf"\n  --(\[no\])?{field.name}\b")
        first, rest = out.split("\n\nModel and data\n")
        self.assertEqual(first.count("\n  --"), 5)
        self.assertIn("--flagfile=FILE", first)
        self.assertIn("--run_dir=", first)
        self.assertIn("--run_dir=", rest)
        self.assertLessEqual(max(map(len, out.splitlines())), 120)

    @parameterized.parameters(
        (
            "`replicas` must be at most 2. Received: replicas=3, batch_size=8",
            "--replicas must be at most 2. Received: --replicas=3, --batch_size=8",
        ),
        ("Use `strategy=\"single\"`. Received: strategy='x'", "Use --strategy=single. Received: --strategy='x'"),
        ("`model.fit` and `no_flag` stay. Received: no_flag=1", "`model.fit` and `no_flag` stay. Received: no_flag=1"),
        (
            "`epsilon` must be a number above 1e-38. Received: epsilon=0.0",
            "--adam_epsilon must be a number above 1e-38. Received: --adam_epsilon=0.0",
        ),
        ("`peak` must be above 0. Received: peak=-1", "--learning_rate must be above 0. Received: --learning_rate=-1"),
        (
            "Not with `synchronized=True`. Received: jit_compile=True",
            "Not with --sync_batch_norm. Received: --jit_compile=on",
        ),
        ("Received: KERAS_BACKEND=jax", "Received: KERAS_BACKEND=jax"),
        ("Received: --run_dir=a/seed=3", "Received: --run_dir=a/seed=3"),
    )
    def test_arguments_of_the_library_become_flags(self, message, expected):
        self.assertEqual(in_flags(message), expected)
        self.assertEqual(in_flags(expected), expected)
        with self.assertRaises(UsageError) as raised, usage_errors():
            raise ValueError(message)
        self.assertEqual(str(raised.exception), expected)

    def test_a_lost_host_is_no_usage_error(self):
        """JAX raises `ValueError` for it, also while hosts compare their data. Its exit code is for a restart."""
        lost = ValueError("Gloo AllGather failed: Connection closed by peer")
        with (
            mock.patch("keras.backend.backend", return_value="jax"),
            mock.patch.dict(os.environ, {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:2"]}}'}),
        ):
            with self.assertRaisesRegex(ValueError, "Gloo"), usage_errors():
                raise lost
            with self.assertRaises(UsageError), usage_errors():
                raise ValueError("`seed` must be at least 0")

    def test_a_missing_device_is_a_usage_error(self):
        """JAX fails again when it is asked for its processes. For most errors it is not asked: that takes devices."""
        with (
            mock.patch("keras.backend.backend", return_value="jax"),
            mock.patch.dict(os.environ, {"TF_CONFIG": ""}),
            mock.patch("jax.process_count", side_effect=RuntimeError("Unable to initialize backend")) as asked,
        ):
            for message, times in (("`seed` must be at least 0", 0), ("no device: UNAVAILABLE", 1)):
                with self.assertRaises(UsageError), usage_errors():
                    raise ValueError(message)
                self.assertEqual(asked.call_count, times)


class StartTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"tensorflow"}, "tensorflow"), ({"tensorflow", "absl", "matplotlib"}, "tensorflow,train")
    )
    def test_missing_packages_are_named(self, missing, extras):
        def find(name):
            return None if name in missing else object()

        err = io.StringIO()
        with mock.patch.object(importlib.util, "find_spec", find), contextlib.redirect_stderr(err):
            with self.assertRaises(SystemExit) as ended:
                start._check_packages()
        self.assertEqual(ended.exception.code, 2)
        for name in missing:
            self.assertIn(name, err.getvalue())
        self.assertIn(f'pip install -e ".[{extras}]"', err.getvalue())


class RecipesTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.enterContext(contextlib.chdir(ROOT))  # recipes name other recipes from here

    @parameterized.parameters(*sorted(path.name for path in (ROOT / "flags/recipes").iterdir()))
    def test_recipe(self, name):
        code, config, _, err = parse_only(f"--flagfile=flags/recipes/{name}")
        self.assertEqual(code, 0, err)
        made(config)
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "flags.txt")
        path.write_text(config.as_flags())
        self.assertEqual(config_of(f"--flagfile={path}"), config)
        self.assertEqual(config_of_flags(path.read_text().splitlines()), config)

    @parameterized.parameters(*sorted(path.name for path in (ROOT / "flags/comparisons").iterdir()))
    def test_comparison(self, name):
        """Every candidate makes its optimizer, with what applies to it, and its flags are accepted again."""
        own = command.define()
        self.assertEqual(own(["compare.py", f"--flagfile=flags/comparisons/{name}"]), ["compare.py"])
        for candidate in command.candidates_of(own):
            config = candidate.config
            optimizer, _ = made(config)
            for flag, arguments in OPTIMIZER_FLAGS.items():
                if config.optimizer in arguments and getattr(config, flag) is not None:
                    self.assertEqual(optimizer[arguments[config.optimizer]], getattr(config, flag), (config, flag))
            path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "flags.txt")
            path.write_text(config.as_flags())
            self.assertEqual(config_of(f"--flagfile={path}").as_flags(), config.as_flags())

    @parameterized.parameters("cifar10", "digits", "pytorch_lars_short", "questions")
    def test_recorded_flags_are_those_of_the_recipes(self, name):
        """Their flags, as earlier versions wrote them, are those that this version writes of the same recipes."""
        before = json.loads(pathlib.Path(f"results/compare_{name}.json").read_text())["settings"]["candidates"]
        own = command.define()
        more = ["--epochs=0.16"] if name.endswith("short") else []
        own(["compare.py", f"--flagfile=flags/comparisons/{name.removesuffix('_short')}.flags", *more])
        now = {c.name: c.config for c in command.candidates_of(own)}
        self.assertEqual({name: config_of_flags(text.splitlines()) for name, text in before.items()}, now)

    def test_patterns_with_a_comma_are_read_again(self):
        patterns = ("conv[0-9]{1,2}/bias", "gamma", 'a"b')
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "flags.txt")
        path.write_text(
            dataclasses.replace(config_of("--flagfile=flags/recipes/demo.flags"), exclude=patterns).as_flags()
        )
        self.assertEqual(config_of(f"--flagfile={path}").exclude, patterns)

    def test_flagfiles_hold_the_published_values(self):
        published = {(r.model, r.batch_size): r for r in RECIPES}
        models = {r.model for r in RECIPES}
        paths = [path for model in models for path in (ROOT / "flags/recipes").glob(f"{model}_[0-9]*.flags")]
        configs = [config_of(f"--flagfile={path}") for path in paths]
        self.assertCountEqual([(c.model, c.batch_size) for c in configs], list(published))
        for config in configs:
            recipe = published[config.model, config.batch_size]
            for name in ("learning_rate", "epochs", "momentum", "weight_decay", "end_learning_rate"):
                self.assertEqual(getattr(config, name), getattr(recipe, name), (config.model, config.batch_size, name))
            self.assertEqual(config.warmup_duration, f"{recipe.warmup:g} epochs")
            self.assertEqual(config.exclude is None, recipe.exclude_bias_and_norm)
            self.assertEqual(config.microbatch_size, recipe.ghost_batch or config.microbatch_size)
            self.assertEqual((config.schedule, config.power, config.variant), ("polynomial", 2.0, "paper"))

    def test_the_main_path_is_short(self):
        lines = pathlib.Path(train.__file__).read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("def main("))
        last = next(i for i, line in enumerate(lines) if line.startswith("def run("))
        self.assertLessEqual(last - first, 110)


if __name__ == "__main__":
    tf.test.main()
