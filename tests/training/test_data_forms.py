"""`Trainer` takes data in the forms that `model.fit` takes, and resumes exactly where they can be indexed.

`tests/jax/test_on_jax.py` runs this file on JAX, too.
"""

import gc
import itertools
import math
import threading

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from lars_keras.training import Trainer, array_data, sources
from lars_keras.training.inputs import InputContext

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4))  # float64, as NumPy makes them
Y = RNG.normal(size=(40, 1)).astype("float32")
W = RNG.random(40).astype("float32")
BATCH = 8


def batches(size=10, *arrays):
    arrays = arrays or (X.astype("float32"), Y)
    return [tuple(a[i : i + size] for a in arrays) for i in range(0, len(X), size)]


class Files(keras.utils.PyDataset):
    """Batches by index; remembers what was read."""

    def __init__(self, size=10, n=40, count=None, **options):
        super().__init__(**options)
        self.size, self.n, self.count, self.read, self.epochs = size, n, count, [], 0

    @property
    def num_batches(self):
        return None if self.count == 0 else -(-self.n // self.size)

    def __getitem__(self, index):
        self.read.append(index)
        part = slice(index * self.size % self.n, min(index * self.size % self.n + self.size, self.n))
        return X[part].astype("float32"), Y[part]

    def on_epoch_end(self):
        self.epochs += 1


class Tensor:
    """A tensor of torch, on a device and with a gradient."""

    def __init__(self, value, ready=False):
        self.value, self.ready = value, ready

    def detach(self):
        return Tensor(self.value, ready=True)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "a tensor that needs its gradient"
        return self.value


class DataLoader:
    """A loader of torch."""

    batch_size, drop_last = 10, False
    dataset = range(40)

    def __iter__(self):
        return iter([[Tensor(a) for a in batch] for batch in batches()])


class MapDataset:
    """Batches of Grain by index."""

    def __init__(self, endless=False):
        self.endless = endless

    def __len__(self):
        return (2**63 - 1) // 8192 if self.endless else 4

    def __getitem__(self, index):
        return batches()[index % 4]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


class IterDataset:
    """Batches of Grain in order."""

    def __iter__(self):
        return iter(batches())


DataLoader.__module__ = "torch.utils.data.dataloader"
MapDataset.__module__ = IterDataset.__module__ = "grain._src.python.dataset.dataset"


def generator():
    yield from itertools.chain.from_iterable(itertools.repeat(batches()))


def dataset():
    return tf.data.Dataset.from_tensor_slices((X.astype("float32"), Y)).batch(10)


UNSHUFFLED = {"shuffle": False}
FORMS = {
    "arrays": lambda: ((X, Y), UNSHUFFLED),
    "tensors": lambda: ((keras.ops.convert_to_tensor(X.astype("float32")), keras.ops.convert_to_tensor(Y)), UNSHUFFLED),
    "weights of 1": lambda: ((X, Y), {"sample_weight": np.ones(40), **UNSHUFFLED}),
    "class weights": lambda: ((X, Y), {"class_weight": {0: 1.0}, **UNSHUFFLED}),
    "PyDataset": lambda: ((Files(),), UNSHUFFLED),
    "PyDataset, threads": lambda: ((Files(7, workers=3),), UNSHUFFLED),
    "PyDataset, endless": lambda: ((Files(count=0),), {"steps_per_epoch": 5}),
    "torch": lambda: ((DataLoader(),), {}),
    "Grain by index": lambda: ((MapDataset(),), {}),
    "Grain, endless": lambda: ((MapDataset(endless=True),), {"steps_per_epoch": 5}),
    "Grain in order": lambda: ((IterDataset(),), {"steps_per_epoch": 5}),
    "generator": lambda: ((generator(),), {"steps_per_epoch": 5}),
    "tf.data": lambda: ((dataset(),), {}),
    "list of batches": lambda: ((batches(),), {}),
}


def trainer_of(model=None, metrics=("mae",), **options):
    keras.utils.set_random_seed(0)
    model = model or keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.1), "mse", weighted_metrics=list(metrics))
    return Trainer(model, **({"batch_size": BATCH, "microbatch_size": 4} | options))


def weights(model):
    return [np.array(w) for w in model.get_weights()]


class FormsTest(parameterized.TestCase, tf.test.TestCase):
    def test_train_as_keras(self):
        """One trainer, whose programs serve all forms."""
        trainer = trainer_of()
        start = weights(trainer.model)
        reference = trainer_of().model
        expected = reference.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0).history
        for name, form in FORMS.items():
            with self.subTest(name):
                arguments, options = form()
                trainer.model.set_weights(start)
                history = trainer.fit(*arguments, epochs=2, verbose=0, **options).history
                self.assertAllClose(history["loss"], expected["loss"], rtol=1e-5)
                for actual, value in zip(weights(trainer.model), weights(reference), strict=True):
                    self.assertAllClose(actual, value, rtol=1e-5, atol=1e-6)

    def test_evaluate_as_keras(self):
        trainer = trainer_of()
        expected = trainer.model.evaluate(X, Y, batch_size=40, verbose=0, return_dict=True)
        for name, form in FORMS.items():
            if "endless" in name or "class" in name:
                continue
            with self.subTest(name):
                arguments, options = form()
                options = {k: v for k, v in options.items() if k == "sample_weight"}
                if name == "generator":
                    arguments = ((b for b in batches(11)),)  # it must end
                scores = trainer.evaluate(*arguments, **options)
                self.assertEqual(scores.pop("n"), 40)
                self.assertAllClose(scores, expected, rtol=1e-5)
        losses = trainer.evaluate(X, Y, sample_weight=W)
        self.assertAllClose(losses["n"], W.sum(), rtol=1e-6)
        history = trainer.fit(X, Y, validation_data=(X, Y), verbose=0).history
        self.assertAllClose(history["val_loss"][0], trainer.evaluate(X, Y)["loss"], rtol=1e-6)
        history = trainer.fit(X, Y, validation_data=[X, Y, W], verbose=0).history
        self.assertAllClose(history["val_loss"][0], trainer.evaluate(X, Y, sample_weight=W)["loss"], rtol=1e-6)

    def test_structures(self):
        """Several inputs and outputs, weights like the targets, targets None, data of x only."""
        first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
        together = keras.layers.Concatenate()([first, second])
        outputs = {name: keras.layers.Dense(1, name=name)(together) for name in ("p", "q")}
        model = keras.Model({"a": first, "b": second}, outputs)
        x, y, w = {"a": X, "b": -X}, {"p": Y, "q": Y + 1}, {"p": W, "q": np.ones(40)}
        model.compile("sgd", {"p": "mse", "q": "mae"})
        trainer = Trainer(model, batch_size=40)
        expected = model.evaluate(x, y, sample_weight=w, batch_size=40, verbose=0, return_dict=True)
        scores = trainer.evaluate(x, y, sample_weight=w)
        self.assertAllClose(scores["loss"], expected["loss"], rtol=1e-5)
        history = trainer.fit(x, y, sample_weight=w, verbose=0).history
        self.assertAllClose(history["loss"][0], expected["loss"], rtol=1e-5)

    def test_list_that_grows(self):
        batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
        trainer = trainer_of()
        trainer.fit(batches, verbose=0)
        updates = trainer.position.update
        batches *= 2
        trainer.fit(batches, verbose=0)
        self.assertEqual(trainer.position.update, 2 * updates)

    def test_x_only(self):
        class Encoder(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(4)

            def call(self, x):
                y = self.dense(x)
                self.add_loss(keras.ops.mean((y - x) ** 2))
                return y

        x = X.astype("float32")
        model = Encoder()
        model.compile(keras.optimizers.SGD(0.0))
        expected = model.evaluate(x, batch_size=40, verbose=0)
        trainer = Trainer(model, batch_size=20)
        forms = {
            "array": x,
            "tf.data": tf.data.Dataset.from_tensor_slices(x).batch(7),
            "tf.data, None": tf.data.Dataset.from_tensor_slices((x, None)).batch(7),
            "tuples": [(x[:30],), (x[30:],)],
            "None": [(x[:30], None), (x[30:], None, None)],
            "weights": [(x, None, W)],
        }
        for name, data in forms.items():
            with self.subTest(name):
                self.assertAllClose(trainer.evaluate(data)["loss"], expected, rtol=1e-5)
                self.assertAllClose(trainer.fit(data, verbose=0).history["loss"], [expected], rtol=1e-5)


class ClassWeightsTest(tf.test.TestCase):
    def test_of_each_example(self):
        classes, found = np.array([0, 1, 2, 2]), {0: 2.0, 2: 0.5}
        for y in (classes, classes[:, None], classes.astype("float32"), np.eye(3)[classes]):
            self.assertAllEqual(array_data.weights_of_classes(y, found), [2.0, 1.0, 0.5, 0.5])
        files = feed_of(Files(7), class_weight={0: 3.0, 1: 3.0, -1: 3.0, 2: 3.0, -2: 3.0, 3: 3.0, -3: 3.0})
        x, y, weight = next(files(InputContext(), 0))
        self.assertAllEqual(weight, [3.0, 3.0])


class MemoryTest(tf.test.TestCase):
    def test_one_memory_for_all_batches(self):
        def reusing():
            x, y = np.zeros((10, 4), "float32"), np.zeros((10, 1), "float32")
            while True:
                for a, b in batches():
                    x[:], y[:] = a, b
                    yield x, y

        trainer, reference = trainer_of(), trainer_of()
        options = {"epochs": 2, "steps_per_epoch": 5, "verbose": 0}
        history = trainer.fit(reusing(), **options).history
        self.assertAllClose(history["loss"], reference.fit(batches(), **options).history["loss"], rtol=1e-6)


def feed_of(*arguments, microbatch_size=2, **options):
    return sources.training_data(*arguments, batch_size=BATCH, microbatch_size=microbatch_size, **options)


def stream(feed, first_update, examples, context=None):
    """Return the first numbers of the examples from an update on."""
    found = []
    for batch in feed(context or InputContext(), first_update):
        found += np.asarray(batch[0])[:, 0].tolist()
        if len(found) >= examples:
            return found[:examples]
    raise AssertionError("ended")


class OrderTest(parameterized.TestCase, tf.test.TestCase):
    """The order is a function of the seed and the place."""

    def test_arrays(self):
        numbers = np.arange(21, dtype="float32")[:, None]
        feed = feed_of(numbers, numbers)
        whole = stream(feed, 0, 84)
        for epoch in range(4):
            self.assertCountEqual(whole[21 * epoch : 21 * epoch + 21], range(21))
        self.assertNotEqual(whole[:21], whole[21:42])
        self.assertNotEqual(whole[:21], stream(feed_of(numbers, numbers, seed=1), 0, 21))
        for update in range(1, 6):
            self.assertEqual(stream(feed, update, 30), whole[BATCH * update :][:30])
        self.assertEqual(stream(feed_of(numbers, numbers, shuffle=False), 2, 8), [*range(16, 21), 0, 1, 2])
        part = feed.first(16)  # of the last five another choice in each epoch
        self.assertLen(set(stream(part, 0, 16)), 16)
        self.assertEqual(stream(part, 3, 16), stream(part, 0, 40)[24:])

    @parameterized.parameters(True, False)
    def test_by_index(self, shuffle):
        files = Files(6, 20)
        feed = feed_of(files, shuffle=shuffle)
        self.assertEqual(files.read, [0, 3])  # the first and the last say how many there are
        self.assertEqual(feed.examples, 20)
        whole = stream(feed, 0, 80)
        self.assertEqual(files.epochs, 3)
        for epoch in range(4):
            self.assertCountEqual(whole[20 * epoch : 20 * epoch + 20], X[:20, 0].astype("float32").tolist())
        self.assertEqual(whole[:20] != whole[20:40], shuffle)
        for update in range(1, 6):
            files.read.clear()
            self.assertEqual(stream(feed, update, 20), whole[BATCH * update :][:20])
            self.assertLess(len(files.read), 8)  # nothing before it was read
        short = feed.first(16)
        self.assertEqual(stream(short, 1, 40), stream(short, 0, 48)[8:])

    def test_hosts_take_their_parts(self):
        numbers = np.arange(40, dtype="float32")[:, None]
        for feed in (feed_of(numbers, numbers), feed_of(Files(6, 40))):
            whole = stream(feed, 1, 32)
            parts = [stream(feed, 1, 16, InputContext(2, host, 4)) for host in range(2)]
            together = [x for i in range(0, 16, 4) for part in parts for x in part[i : i + 4]]
            self.assertEqual(together, whole)

    def test_batches_of_other_sizes_are_said(self):
        files = Files(6, 20)
        source = sources.Indexed(type("List", (), {"__getitem__": lambda self, i: files[i * 3]})(), 2, "PyDataset")
        with self.assertLogs(level="WARNING") as logs:
            source.check_size(1, files[0])
        self.assertIn("has 6 examples, not 2", logs.output[0])

    def test_resume(self):
        """A run that was cut ends as a whole one, and says when its order cannot be kept."""
        for data in ((X, Y), (Files(6),), (generator,)):
            first, second = (data[0](), data[0]()) if data[0] is generator else (data, data)
            call = lambda trainer, data, **o: trainer.fit(*(data if isinstance(data, tuple) else (data,)), **o)  # noqa: E731
            options = {"epochs": 3, "steps_per_epoch": 2.5, "verbose": 0}
            whole = trainer_of()
            call(whole, first, **options)
            cut = trainer_of()
            call(cut, second, **options | {"epochs": 1.2})
            arrays, position = cut.snapshot()
            resumed = trainer_of()
            third = generator() if data[0] is generator else data
            resumed.restore(arrays, position, third)
            call(resumed, third, **options)
            for actual, value in zip(weights(resumed.model), weights(whole.model), strict=True):
                self.assertAllEqual(actual, value)
        resumed.restore(arrays, position | {"order": [0, 40, 40]}, (X, Y))
        with self.assertLogs(level="WARNING") as logs:
            resumed.fit(X, Y, seed=1, verbose=0)
        self.assertIn("order of examples differs", str(logs.output))

    def test_nothing_is_read_after_the_last_update(self):
        """A stream may wait for examples that nobody trains on, and the next `fit` goes on with them."""
        read = []
        stream = (read.append(len(read)) or batch for batch in generator())
        trainer = trainer_of()
        for updates in (5, 8):
            trainer.fit(stream, steps_per_epoch=updates, verbose=0)
            self.assertLen(read, math.ceil((5 if updates == 5 else 13) * trainer.batch_size / 10))

    def test_threads_end_with_the_training(self):
        threads = set()

        class Watched(Files):
            def __getitem__(self, index):
                threads.add(threading.current_thread())
                return super().__getitem__(index)

        trainer_of().fit(Watched(7, workers=3), epochs=2, verbose=0)
        gc.collect()
        readers = [thread for thread in threads if thread.name.startswith("read")]
        self.assertNotEmpty(readers)
        for thread in readers:
            thread.join(timeout=60)
            self.assertFalse(thread.is_alive())


class RefusedTest(parameterized.TestCase, tf.test.TestCase):
    CASES = (
        (lambda: feed_of(5), "int"),
        (lambda: feed_of(iter(batches())), "list_iterator"),
        (lambda: feed_of("x"), "str"),
        (lambda: feed_of(Files), "type"),
        (lambda: feed_of(None), "NoneType"),
        (lambda: feed_of(X, Y[:39]), "of length 39, 40"),
        (lambda: feed_of([1, 2], [3, 4]), "numpy.array"),
        (lambda: feed_of(dataset(), Y), "any other form must hold their own targets"),
        (lambda: feed_of(Files(), sample_weight=W), "hold weights in their batches"),
        (lambda: feed_of(batches(), class_weight={0: 1}), "hold weights in their batches"),
        (lambda: feed_of(X, Y, W, {0: 1}), "one of `sample_weight` and `class_weight`"),
        (lambda: feed_of(X, Y, class_weight=[1]), "must be a dictionary"),
        (lambda: feed_of(X, {"a": Y}, class_weight={0: 1}), "one output"),
        (lambda: feed_of(X, class_weight={0: 1}), "one output"),
        (lambda: feed_of(X[:0], Y[:0]), "at least one example"),
        (lambda: feed_of(np.array(3.0)), "first dimension"),
        (lambda: feed_of(np.array([{}, {}]), Y[:2]), "numbers or text"),
        (lambda: feed_of(Files(n=0)), "at least one batch"),
        (lambda: feed_of(b for b in ()), "at least one batch"),
        (lambda: feed_of(X, Y, seed=-1), "seed=-1"),
        (lambda: feed_of(DataLoader(), hosts=2), "Each of the 2 hosts"),
        (lambda: feed_of(generator(), hosts=2), "Each of the 2 hosts"),
        (lambda: sources.scoring_data(Files(count=0)), "must be finite"),
        (lambda: sources.scoring_data(dataset().repeat().map(lambda *b: b)), "must be finite"),
        (lambda: sources.scoring_data(MapDataset(endless=True)), "must be finite"),
        (lambda: sources.scoring_data(generator()), "again and again"),
        (lambda: sources.validation_data_of((X, Y, W, W), batch_size=8), "length 4"),
        (lambda: sources.validation_data_of((), batch_size=8), "length 0"),
    )

    def test_what_is_refused(self):
        for case, message in self.CASES:
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                case()

    def test_by_the_trainer(self):
        trainer = trainer_of()
        for call, message in (
            (lambda: trainer.fit(generator(), verbose=0), "`steps_per_epoch` is needed"),
            (lambda: trainer.fit(IterDataset(), verbose=0), "`steps_per_epoch` is needed"),
            (lambda: trainer.fit(X[:3], Y[:3], verbose=0), "at most the number of examples, 3"),
            (
                lambda: trainer.fit((b for b in batches(4)[:1]), steps_per_epoch=9, verbose=0),
                "have ended before the last",
            ),
            (
                lambda: trainer.fit(lambda *_: iter(batches()), steps_per_epoch=9, verbose=0),
                "have ended before the last",
            ),
            (lambda: trainer.fit([(X, Y), (X[:3], Y)], steps_per_epoch=9, verbose=0), "of length 3, 40"),
            (lambda: trainer.fit([(X, 3)], verbose=0), "first dimension"),
            (lambda: trainer.fit([(X, Y, W, W)], verbose=0), "of length 4"),
            (lambda: trainer.fit(X, Y, validation_data=dataset().repeat(), verbose=0), "must be finite"),
            (lambda: trainer.evaluate(lambda context: dataset().repeat()), "must be finite"),
            (lambda: trainer.evaluate(dataset().repeat()), "must be finite"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                call()


if __name__ == "__main__":
    tf.test.main()
