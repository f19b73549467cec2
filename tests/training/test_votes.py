"""Callbacks of several hosts act after the same update, and one message serves all of them."""

import pathlib
import tempfile
import types
import unittest.mock

import tensorflow as tf

from lars_keras.runtime.checkpoint import CheckpointManager, SavePolicy
from lars_keras.runtime.preemption import StopOnSignal
from lars_keras.runtime.recovery import CheckpointCallback
from lars_keras.runtime.unreadable_images import UnreadableImageLimit
from lars_keras.training import Trainer
from lars_keras.training.cluster import cluster_of
from tests import step_cases as cases


class VotesTest(tf.test.TestCase):
    def test_one_message_serves_all_callbacks(self):
        """One after each call of the engine, and one after each batch of an evaluation."""
        model = cases.linear()
        model.compile(cases.OPTIMIZERS["lars"](), "mse")
        trainer = Trainer(model, batch_size=cases.BATCH, steps_per_execution=2)
        folder = self.enterContext(tempfile.TemporaryDirectory())
        manager = CheckpointManager(folder)
        data = types.SimpleNamespace(num_train=1, num_test=1, unreadable_images=types.SimpleNamespace(found={}))
        messages = []

        def any_across_hosts(self, *flags):
            messages.append(flags)
            return (
                [False, trainer.position.update == 4, False, False] if len(flags) == 4 else [*flags]
            )  # another's wish

        callbacks = [
            CheckpointCallback(trainer, manager, SavePolicy(minutes=60)),
            UnreadableImageLimit(data, 0),
            self.enterContext(StopOnSignal()),
        ]
        with unittest.mock.patch.object(type(cluster_of(model)), "any_across_hosts", any_across_hosts):
            trainer.fit(
                *cases.examples(),
                validation_data=cases.examples(2),
                epochs=1,
                callbacks=callbacks,
                verbose=0,
            )
        manager.wait()
        self.assertLen([m for m in messages if len(m) == 4], 3 + 2)  # updates 2, 4 and 5; two batches of 64
        self.assertLen(messages, 3 + 2 + 2 + 3)  # before the first update, after an evaluation; stop?
        saved = sorted(path.name[:15] for path in pathlib.Path(folder).iterdir())
        self.assertEqual(saved, ["update-00000000", "update-00000004", "update-00000005"])


if __name__ == "__main__":
    tf.test.main()
