# %% [markdown]
# # A large batch on CIFAR-10
#
# The same small network at batch 256 and at batch 2,048, with momentum and with LARS, for the same number of epochs.
# It takes a few minutes on two CPU cores, less on a GPU or TPU. This page is also [a notebook](cifar10.ipynb). It
# needs this project with JAX (in a checkout, `pip install ".[jax]"`), and downloads CIFAR-10 (170 MB).

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported; "tensorflow" does as well

import keras

from lars_keras import LARS, schedules
from lars_keras.report.noise import NoiseScaleLog
from lars_keras.training import Trainer

# %% [markdown]
# ## Data
#
# The small form: about a fifth of the images. The 10,240 training images are 40 batches of 256, or 5 of 2,048, with
# none left over: `Trainer` leaves out the last partial batch of an epoch. `IMAGES = 50_000` takes all, and five times
# as long.

# %%
IMAGES, EPOCHS = 10_240, 8
(images, labels), (test_images, test_labels) = keras.datasets.cifar10.load_data()
train = images[:IMAGES], labels[:IMAGES, 0].astype("int32")
test = test_images[: IMAGES // 5], test_labels[: IMAGES // 5, 0].astype("int32")

# %% [markdown]
# ## One network, any batch
#
# `Trainer` takes each batch in ghost batches of 64 images. So batch normalization sees 64 images at a time, whatever
# the batch size, and only the size of the update differs between runs.
#
# At batch 2,048 an epoch has an eighth of the updates. Each has to go further, so the rates are larger. They rise
# linearly for a fifth of the run, then fall to 0. `Trainer` takes `EPOCHS * (IMAGES // batch)` updates.

# %%
GHOST, SMALL, LARGE = 64, 256, 2048


def network():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 64, offset=-2)]
    for filters in (16, 32, 64):
        layers += [keras.layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)]
        layers += [keras.layers.BatchNormalization(momentum=0.9), keras.layers.ReLU()]
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10)])


def trained(optimizer, batch, peak, callbacks=(), **options):
    """Return a trainer after all epochs. `optimizer` makes one from a schedule."""
    updates = EPOCHS * (IMAGES // batch)
    rate = schedules.WarmupPolynomial(peak, warmup_updates=updates // 5, total_updates=updates)
    model, loss = network(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(rate), loss, weighted_metrics=["accuracy"])
    trainer = Trainer(model, batch_size=batch, microbatch_size=GHOST, **options)
    trainer.fit(*train, epochs=EPOCHS, callbacks=[callback(trainer) for callback in callbacks], verbose=0)
    accuracy = trainer.evaluate(*test)["accuracy"]
    print(f"{optimizer.__name__:8}  batch {batch:4}  peak rate {peak:<4g}  top-1 {100 * accuracy:.1f} %")
    return trainer


# %% [markdown]
# ## Momentum
#
# A learning rate of 0.05 is good at batch 256. Eight times the batch asks for eight times the rate, by the rule of
# linear scaling. Here that is too much. A learning rate of 0.1 is better, and still far from what the small batch
# reaches.


# %%
def momentum(rate):
    return keras.optimizers.SGD(rate, momentum=0.9)


trained(momentum, SMALL, 0.05)
trained(momentum, LARGE, 0.4)
trained(momentum, LARGE, 0.1)

# %% [markdown]
# ## LARS, and the noise scale on the way
#
# LARS multiplies the learning rate of each layer by its trust ratio, a thousandth of the norm of its weights over the
# norm of its gradient. So at a rate of 20 one gradient moves a layer by 2 % of the layer's norm, however large the
# gradient is. With momentum 0.9, an update moves it by at most 20 %. That is why the rates of LARS look so large.
#
# The callback estimates the *gradient noise scale* every two epochs: at a batch of that size, each example contributes
# half as much progress as in a very small batch. The estimate compares the ghost batches of an update, which are
# computed anyway.


# %%
def lars(rate):
    return LARS(rate, excluded_lr_scale=0.05)  # for scales, offsets, biases: no trust ratio makes their rate small


def noise_scale(trainer):
    return NoiseScaleLog(trainer, update_freq=2 * IMAGES // SMALL)


trained(lars, SMALL, 10.0, callbacks=[noise_scale], noise_scale=True)
trainer = trained(lars, LARGE, 20.0)

# %% [markdown]
# ## The layer plan
#
# The plan shows what LARS does to each variable. A variable that is not adapted takes the rate times its factor.

# %%
for row in trainer.model.optimizer.layer_plan():
    print(f"{row.path:44} adapted {row.adapt!s:6} decayed {row.decay!s:6} rate x {row.lr_scale:g}")

# %% [markdown]
# ## What to make of it
#
# At 2,048 both lose, because they take an eighth of the updates. The noise scale is a hint of the loss: for most of the
# run the large batch is several times above it, so each example contributes much less. More epochs bring more updates.
# One seed of a small network, at rates that were not tuned, proves little.
#
# A longer comparison took all images for 4 epochs, another network, and for each cell the best of several rates.
# Top-1, one seed ([results](results.md#lars-and-momentum-on-cifar-10)):
#
# | batch | lars | momentum |
# | --- | --- | --- |
# | 256 | 68.26 % | 65.07 % |
# | 1,024 | 63.32 % | 56.95 % |
# | 4,096 | 44.10 % | 43.14 % |
# | 8,192 | 34.16 % | 30.93 % |
# | 16,384 | 22.32 % | 11.71 % |
#
# ## Next
#
# - [Which optimizer, which batch size?](choosing.md), and [the noise scale](noise_scale.md)
# - [The fast network](results.md#the-fast-network-on-cifar-10): LARS at batch 1,024 to 16,384 on all of CIFAR-10
# - [First minutes on a TPU](tpu.ipynb)
