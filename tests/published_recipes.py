"""Published hyper-parameters as data, each row with its source."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published ImageNet run with LARS.

    Attributes:
        model: name in `models`.
        batch_size: global batch.
        learning_rate: peak.
        warmup: linear warm-up.
        epochs: length; where the source gives a range, as the epochs in which runs reached the accuracy, its upper end.
        momentum, weight_decay: of LARS.
        end_learning_rate: last rate of the polynomial decay of power 2.
        exclude_bias_and_norm: whether the source leaves these out of adaptation and decay.
        top1: accuracy on the validation split, a fraction.
        source: where it is published.
        ghost_batch: examples that batch normalization sees together; None where the source does not tell.
    """

    model: str
    batch_size: int
    learning_rate: float
    warmup: float
    epochs: float
    momentum: float
    weight_decay: float
    end_learning_rate: float
    exclude_bias_and_norm: bool
    top1: float
    source: str
    ghost_batch: int | None = None


_PAPER = "You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks, ICLR 2018 submission, table 3"
_MLPERF = "MLPerf Training reference convergence points, ResNet-50 with LARS"


def _paper(model: str, batch_size: int, learning_rate: float, top1: float) -> Recipe:
    warmup = 5 if model == "alexnet_bn" else 2
    return Recipe(model, batch_size, learning_rate, warmup, 100, 0.9, 5e-4, 0.0, False, top1, _PAPER)


def _mlperf(
    batch_size: int, rate: float, warmup: float, momentum: float, decay: float, epochs: float, ghost_batch: int
) -> Recipe:
    return Recipe(
        "resnet50", batch_size, rate, warmup, epochs, momentum, decay, 1e-4, True, 0.759, _MLPERF, ghost_batch
    )


RECIPES: tuple[Recipe, ...] = (
    _paper("alexnet", 512, 2.0, 0.587),
    _paper("alexnet", 4096, 10.0, 0.585),
    _paper("alexnet", 8192, 10.0, 0.582),
    _paper("alexnet", 16384, 14.0, 0.550),
    _paper("alexnet", 32768, 14.0, 0.469),
    _paper("alexnet_bn", 512, 2.0, 0.602),
    _paper("alexnet_bn", 4096, 10.0, 0.604),
    _paper("alexnet_bn", 8192, 14.0, 0.601),
    _paper("alexnet_bn", 16384, 23.0, 0.593),
    _paper("alexnet_bn", 32768, 22.0, 0.578),
    _mlperf(4096, 10.0, 5, 0.9, 2e-4, 42, 64),
    _mlperf(8192, 17.0, 5, 0.9, 2e-4, 44, 64),
    _mlperf(32768, 21.2, 16, 0.94, 2.5e-5, 57, 128),
    _mlperf(65536, 24.699, 31, 0.951807, 1e-4, 86, 128),
)
