"""Score the trained model on several views of each image, for `--test_views`."""

import models
from flags.config import RunConfig
from lars_keras.data import ImageData
from lars_keras.training import Trainer
from running.feeds import Feed
from running.model import scoring


def score_views(config: RunConfig, data: ImageData, trainer: Trainer, test_feed: Feed) -> dict[str, float]:
    """Score the trained model with its logits averaged over `--test_views` views of each image.

    Collective: call it on every host.

    Returns:
        `test_views`, `top1_views`, `top5_views` and `loss_views`; nothing for one view.
    """
    if config.test_views == 1:
        return {}
    with trainer.cluster.scope():
        model = models.with_views(trainer.model, config.test_views)
        model.compile("sgd", **scoring(config, data))
    views = Trainer(
        model,
        batch_size=trainer.batch_size,
        microbatch_size=trainer.microbatch_size,
        jit_compile=config.compiles,
    )
    scores = views.evaluate(test_feed)
    return {"test_views": config.test_views, **{f"{name}_views": scores[name] for name in ("top1", "top5", "loss")}}
